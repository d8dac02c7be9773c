"""Test that the package keeps the rules that no other tool checks."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import persipubsub
import persipubsub.errors
from tests import support

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGE = _ROOT / "persipubsub"

# A module imports only from rows below its own. A package stands for all its modules, unless they
# have rows of their own; the package itself (__init__) is above them all.
_ROWS: list[set[str]] = [
    {"__main__"},
    {"cli.commands"},
    {"cli.deploy", "cli.look", "cli.maintain", "cli.messages"},
    {"cli.options", "cli.view"},
    {"cli.text"},
    {"metrics"},
    {"control"},
    {"letters", "migration"},
    {"aio", "publisher", "subscriber"},
    {"face"},
    {"engine"},
    {"queue", "jetstream.engine"},
    {"jetstream.delivery"},
    {"jetstream.publishing"},
    {"jetstream.stream"},
    {"jetstream.connection", "jetstream.settings"},
    {"jetstream.address", "jetstream.errors", "jetstream.loop"},
    {"lmdb_engine.maintenance", "lmdb_engine.figures"},
    {"lmdb_engine.sending", "lmdb_engine.consuming"},
    {"lmdb_engine.room"},
    {"lmdb_engine.environment"},
    {"lmdb_engine.check", "lmdb_engine.dead_letters"},
    {"lmdb_engine.journal", "lmdb_engine.pending"},
    {"lmdb_engine.retention"},
    {"lmdb_engine.once", "lmdb_engine.positions"},
    {"lmdb_engine.log_file", "lmdb_engine.meta"},
    {
        "lmdb_engine.attempts", "lmdb_engine.claims", "lmdb_engine.datafile", "lmdb_engine.locks",
        "lmdb_engine.log", "lmdb_engine.notifier", "lmdb_engine.segments"
    },
    {"lmdb_engine.files", "lmdb_engine.format"},
    {"lmdb_engine.lmdb_private"},
    {"config", "drop_log", "message", "shared_errors", "statistics"},
    {"errors"},
]

_RANKS = {name: rank for rank, row in enumerate(reversed(_ROWS)) for name in row}


def _rank(name: str) -> tuple[int, str]:
    """Return the rank of a module, and the row's name for it."""
    while name not in _RANKS:
        name, _, last = name.rpartition(".")
        assert name, f"Expected each module to have a rank; add {last!r} to _ROWS in {__file__}"
    return _RANKS[name], name


_FILES = {
    ".".join(pth.relative_to(_PACKAGE).with_suffix("").parts): pth
    for pth in sorted(_PACKAGE.rglob("*.py"))
}

_MODULES = [name for name in _FILES if name.rpartition(".")[2] != "__init__"]

_PUBLIC = [name for name in persipubsub.__all__ if name in _MODULES]


def _parse(name: str) -> ast.Module:
    return ast.parse(_FILES[name].read_text(encoding="utf-8"))


def _imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and module for all imports of the package's modules, wherever they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: expected no relative import"
            module = node.module or ""
            targets = [module]
            if module.removeprefix("persipubsub.") in _MODULES:
                pass
            elif module.split(".")[0] == "persipubsub":
                targets = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue

        for target in targets:
            package, _, name = target.partition(".")
            if package == "persipubsub" and name:
                yield node.lineno, name


@pytest.mark.parametrize("name", sorted(set(_FILES) - set(_MODULES) - {"__init__"}))
def test_rooms_hold_only_a_description(name: str) -> None:
    # Imports there would run for whoever needs a single module of the room.
    body = _parse(name).body
    assert len(body) == 1 and ast.get_docstring(_parse(name))


@pytest.mark.parametrize("name", _MODULES)
def test_imports_only_point_down(name: str) -> None:
    rank, row = _rank(name)
    for line, target in _imported(_parse(name)):
        other, other_row = _rank(target)
        assert other < rank or (other_row == row and row not in _FILES), (
            f"{name}:{line}: expected imports only from below, but got: {target!r}")


@pytest.mark.parametrize("name", _PUBLIC)
def test_public_modules_say_what_is_public(name: str) -> None:
    module = importlib.import_module(f"persipubsub.{name}")
    assert "__all__" in vars(module), f"Expected __all__ in persipubsub: {name}"

    public: list[str] = module.__all__
    assert len(public) == len(set(public))
    for item in public:
        assert hasattr(module, item), item

    defined = {
        node.name
        for node in _parse(name).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
    }
    # What only persipubsub.control calls of an engine is no interface for users.
    assert defined <= set(public) or name == "queue", "Expected these in __all__, or private"


def test_all_errors_are_public_and_have_one_root() -> None:
    errors = {
        name
        for name, value in vars(persipubsub.errors).items()
        if inspect.isclass(value) and issubclass(value, BaseException)
    }
    assert errors == set(persipubsub.errors.__all__)
    for name in errors:
        assert issubclass(getattr(persipubsub.errors, name), persipubsub.errors.PersipubsubError)


def test_errors_are_drawn_as_they_are() -> None:
    drawn: list[tuple[str, str]] = []
    above: list[tuple[int, str]] = []
    for line in (persipubsub.errors.__doc__ or "").splitlines():
        match = re.match(r"^(    [ |]*)(\+-- )?(\w+Error)\b", line)
        if match is None or (match.group(2) is None and above):
            continue

        indentation = match.start(3)
        above = [(other, name) for other, name in above if other < indentation]
        drawn.append((match.group(3), above[-1][1] if above else "Exception"))
        above.append((indentation, match.group(3)))

    actual = [(name, getattr(persipubsub.errors, name).__bases__[0].__name__)
              for name in persipubsub.errors.__all__]
    assert sorted(drawn) == sorted(actual)


def test_version_is_in_one_place() -> None:
    stated = re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"$',
                        (_PACKAGE / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert stated == [persipubsub.__version__]

    # A second place would be forgotten at the next release. Not the changelog: it is a history.
    for pth in [
            _ROOT / "setup.py", _ROOT / "pyproject.toml", _ROOT / "docs" / "conf.py",
            *_FILES.values()
    ]:
        if pth != _PACKAGE / "__init__.py":
            assert persipubsub.__version__ not in pth.read_text(encoding="utf-8"), pth


def test_changelog_starts_with_the_version() -> None:
    titles = re.findall(r"^(\d+\.\d+\.\d+) \(.*\)\n-+$",
                        (_ROOT / "CHANGELOG.rst").read_text(encoding="utf-8"), re.MULTILINE)
    assert titles[0] == persipubsub.__version__


def test_import_of_the_package_is_cheap() -> None:
    code = ("import sys, persipubsub; assert set(persipubsub.__all__) <= set(dir(persipubsub)); "
            "print([name for name in sys.modules "
            "if name.startswith(('persipubsub.', 'lmdb', 'asyncio'))])")
    out = subprocess.check_output([sys.executable, "-c", code], cwd=_ROOT, timeout=60, text=True)
    assert out.strip() == "[]"


@pytest.mark.parametrize("name", persipubsub.__all__)
def test_what_is_public_is_an_attribute(name: str) -> None:
    code = (f"import persipubsub; print(repr(persipubsub.{name})); "
            f"assert persipubsub.{name} is vars(persipubsub)['{name}']")
    out = subprocess.check_output([sys.executable, "-c", code], cwd=_ROOT, timeout=60, text=True)
    modules = {
        "Pub": "publisher.Pub",
        "Sub": "subscriber.Sub",
        "AsyncPub": "aio.Pub",
        "AsyncSub": "aio.Sub"
    }
    assert f"'persipubsub.{modules.get(name, name)}'" in out


def test_module_that_needs_an_extra() -> None:
    assert persipubsub.metrics.Collector.__module__ == "persipubsub.metrics"
    code = ("import sys; sys.modules['prometheus_client'] = None; from persipubsub import *; "
            "import inspect, persipubsub; inspect.getmembers(persipubsub); persipubsub.metrics")
    assert support.run_python(code).stderr.splitlines()[-1] == (
        "ModuleNotFoundError: persipubsub.metrics needs prometheus_client. Install it with: "
        "pip install 'persipubsub[metrics]'")


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_this_name'"):
        getattr(persipubsub, "nothing_of_this_name")


def test_continuous_integration_runs_the_command_of_the_readme() -> None:
    command = "python3 -m venv venv3 && venv3/bin/pip install -e '.[dev]' && venv3/bin/tox"
    for name in ["README.rst", "CONTRIBUTING.rst", ".ci/run"]:
        lines = (_ROOT / name).read_text(encoding="utf-8").splitlines()
        assert command in [line.strip() for line in lines], name
