"""Test that the package keeps the rules that no other tool checks."""

import ast
import importlib
import inspect
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

import persipubsub
import persipubsub.errors

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_PACKAGE = _ROOT / "persipubsub"

# A module imports only from rows below its own: a room (a directory) as a whole, and inside of the
# room by the rows of the room. The package itself (__init__) is above them all.
_ROWS: list[set[str]] = [
    {"__main__"},
    {"cli._plain", "cli.commands"},
    {
        "cli._dead_letters", "cli._maintenance", "cli._messages", "cli._migrate", "cli._queues",
        "cli._replay", "cli._stat"
    },
    {"cli._figures", "cli._view"},
    {"cli._ending", "cli._shared", "metrics"},
    {"cli._text"},
    {"aio"},
    {"_async_publisher", "_async_receipts"},
    {"_inbox", "_outbox"},
    {"_begun"},
    {"_workers"},
    {"control", "publisher", "subscriber"},
    {"_counting"},
    {"_receipts", "_selection"},
    {"_migration"},
    {"_engines"},
    {"jetstream.engine"},
    {"jetstream._delivery", "jetstream._publishing"},
    {"jetstream._holding"},
    {"jetstream._ahead"},
    {"jetstream._acknowledging", "jetstream._waiting"},
    {"jetstream._calls", "jetstream._pulling"},
    {"jetstream._keeping", "jetstream._returns"},
    {"jetstream._stream"},
    {"jetstream._link"},
    {
        "jetstream._durability", "jetstream._errors", "jetstream._inboxes", "jetstream._loop",
        "jetstream._settings"
    },
    {"jetstream._asking"},
    {"jetstream._clients"},
    {"maintenance._dead_letters"},
    {"maintenance._looking"},
    {"queue"},
    {"maintenance._alone", "maintenance._upkeep"},
    {"maintenance._verification"},
    {"_putting_together", "_waking"},
    {"_skipping"},
    {"_delivery", "_putting", "statistics"},
    {"_replay", "_tidying"},
    {"_addition", "_late_claim", "_losses", "_moving"},
    {"_settings"},
    {"environment._registry"},
    {"environment._environment"},
    {"environment._transactions"},
    {"environment._map"},
    {"environment._opening"},
    {
        "environment._checkpoint", "environment._gate", "environment._line", "environment._mark",
        "_wakeup", "_claims", "_in_flight"
    },
    {"environment._files", "_inotify"},
    {"environment._standard_streams"},
    {"store._newest", "store._batches"},
    {"store._deliveries"},
    {"store._acknowledging"},
    {"store._retention", "store._check", "store._pending"},
    {"store._once", "store._positions"},
    {"store._attempts", "store._header", "store._log"},
    {"store._databases"},
    {"store._layout", "store._blocks", "store._clock"},
    {"config"},
    {"_fork_guard", "_progress", "_slot", "dead_letter", "message", "jetstream._address"},
    {"errors"},
]

_RANKS = {name: rank for rank, row in enumerate(reversed(_ROWS)) for name in row}

_FILES = {
    ".".join(pth.relative_to(_PACKAGE).with_suffix("").parts): pth
    for pth in sorted(_PACKAGE.rglob("*.py"))
}

_MODULES = [name for name in _FILES if name.rpartition(".")[2] != "__init__"]


def _is_private(name: str) -> bool:
    return name.rpartition(".")[2].startswith("_")


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
            if module.removeprefix("persipubsub.") in _RANKS:
                pass
            elif module.split(".")[0] == "persipubsub":
                targets = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue

        for target in targets:
            package, _, name = target.partition(".")
            if package == "persipubsub" and name:
                yield node.lineno, name


def test_there_are_modules() -> None:
    assert "errors" in _MODULES
    assert "store._layout" in _MODULES


@pytest.mark.parametrize("name", sorted(set(_FILES) - set(_MODULES) - {"__init__"}))
def test_rooms_hold_only_a_description(name: str) -> None:
    # Imports there would run for whoever needs a single module of the room.
    body = _parse(name).body
    assert len(body) == 1 and ast.get_docstring(_parse(name))


@pytest.mark.parametrize("name", _MODULES)
def test_imports_only_point_down(name: str) -> None:
    advice = "Expected each module to have a rank; add {!r} to _ROWS in {}"
    assert name in _RANKS, advice.format(name, __file__)

    for line, target in _imported(_parse(name)):
        assert target in _RANKS, advice.format(target, __file__)
        assert _RANKS[target] < _RANKS[name], (
            f"{name}:{line}: expected imports only from below, but got: {target!r}")


@pytest.mark.parametrize("name", [name for name in _MODULES if not _is_private(name)])
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
    assert defined <= set(public), "Expected these in __all__, or private"


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
def test_public_modules_are_attributes(name: str) -> None:
    code = f"import persipubsub; print(persipubsub.{name}.__name__)"
    out = subprocess.check_output([sys.executable, "-c", code], cwd=_ROOT, timeout=60, text=True)
    assert out.strip() == f"persipubsub.{name}"


def test_module_that_needs_an_extra() -> None:
    assert persipubsub.metrics.Collector.__module__ == "persipubsub.metrics"
    code = ("import sys; sys.modules['prometheus_client'] = None; from persipubsub import *; "
            "import inspect, persipubsub; inspect.getmembers(persipubsub); persipubsub.metrics")
    run = subprocess.run([sys.executable, "-c", code],
                         cwd=_ROOT,
                         timeout=60,
                         text=True,
                         check=False,
                         capture_output=True)
    assert run.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: persipubsub.metrics needs prometheus_client. Install it with: "
        "pip install 'persipubsub[metrics]'")


def test_public_modules_are_listed() -> None:
    public = {name for name in _MODULES if not _is_private(name)}
    assert set(persipubsub.__all__) == public - {"cli.commands", "metrics", "jetstream.engine"}


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_this_name'"):
        getattr(persipubsub, "nothing_of_this_name")


def test_continuous_integration_runs_the_command_of_the_readme() -> None:
    command = "python3 -m venv venv3 && venv3/bin/pip install -e '.[dev]' && venv3/bin/tox"
    for name in ["README.rst", "CONTRIBUTING.rst", ".ci/run"]:
        lines = (_ROOT / name).read_text(encoding="utf-8").splitlines()
        assert command in [line.strip() for line in lines], name
