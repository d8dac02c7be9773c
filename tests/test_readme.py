"""Test that what README.rst shows and says is true."""

import json
import pathlib
import re
import subprocess
import sys

import msgspec
import msgspec.structs
import pytest

import persipubsub.config

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_TEXT = (_ROOT / "README.rst").read_text(encoding="utf-8")


def _section(title: str) -> str:
    """Return the text below a title, up to the next title."""
    match = re.search(fr"^{re.escape(title)}\n-+\n(.*?)(?=^[^\n]+\n---+\n|\Z)", _TEXT,
                      re.MULTILINE | re.DOTALL)
    assert match is not None, f"Expected a section {title!r} in README.rst"
    return match.group(1)


def _block(section: str, opening: str) -> str:
    """Return an indented block, without its indentation."""
    match = re.search(fr"{re.escape(opening)}\n\n((?:    [^\n]*\n|\n)+)", section)
    assert match is not None, f"Expected a block after {opening!r}"
    return f"{re.sub('^    ', '', match.group(1), flags=re.MULTILINE).strip()}\n"


def _fields_of_configuration() -> list[tuple[str, bool]]:
    kinds: list[type[msgspec.Struct]] = [
        persipubsub.config.Publisher, persipubsub.config.Subscriber, persipubsub.config.Queue,
        persipubsub.config.HighWaterMark
    ]
    return [(field.encode_name, field.required) for kind in kinds
            for field in msgspec.structs.fields(kind) if field.name != "identifier"]


def _keys_of_configuration() -> set[str]:
    return {"queues"} | {key for key, _ in _fields_of_configuration()}


def test_sections_are_in_order() -> None:
    assert re.findall(r"^([^\n]+)\n---+$", _TEXT, re.MULTILINE) == [
        "Try it", "Example", "Configuration file", "Guarantees", "Related projects", "Install",
        "Development", "Versioning"
    ]


@pytest.mark.parametrize("command", [
    "python3 -m venv venv3 && venv3/bin/pip install '.[examples]' "
    "&& venv3/bin/python examples/quickstart.py",
    "python3 -m venv venv3 && venv3/bin/pip install -e '.[dev]' && venv3/bin/tox",
])
def test_commands(command: str) -> None:
    assert command in [line.strip() for line in _section("Try it").splitlines()]


def test_example_runs(tmp_path: pathlib.Path) -> None:
    section = _section("Example")
    code = _block(section, ".. code-block:: python")
    assert len(code.splitlines()) <= 22
    (tmp_path / "config.json").write_text(_block(section, ".. code-block:: json"))

    for _ in range(2):
        # Twice: every message was acknowledged, and initializing may be repeated.
        process = subprocess.run([sys.executable, "-c", code],
                                 cwd=tmp_path,
                                 capture_output=True,
                                 text=True,
                                 timeout=120,
                                 check=False)
        assert process.stderr == ""
        assert process.stdout == _block(section, "It prints::")
        assert process.returncode == 0

    assert sorted(pth.name for pth in tmp_path.iterdir()) == ["config.json", "queues"]


def test_configuration_of_the_example_is_complete() -> None:
    text = _block(_section("Example"), ".. code-block:: json")
    config = persipubsub.config.parse(text=text.encode("utf-8"), config_pth="/etc/config.json")
    assert config.queue_path("greetings") == "/etc/queues/greetings"

    def keys(found: object) -> set[str]:
        if not isinstance(found, dict):
            return set()
        return set(found).union(*map(keys, found.values()))

    optional = {key for key, is_required in _fields_of_configuration() if not is_required}
    names = {"pub", "sub", "greetings"}
    assert keys(json.loads(text)) - names == _keys_of_configuration() - optional


def test_all_keys_of_the_configuration_are_explained() -> None:
    explained = re.findall(r"^``([^`\n]+)``\n    (.*)$", _section("Configuration file"),
                           re.MULTILINE)
    names = [name for name, _ in explained]
    assert len(names) == len(set(names))
    assert set(names) == _keys_of_configuration()

    optional = {key for key, is_required in _fields_of_configuration() if not is_required}
    for name, text in explained:
        assert text.startswith("Optional. ") == (name in optional), name


def test_values_of_the_configuration_are_explained() -> None:
    section = _section("Configuration file")
    for kind in [persipubsub.config.Strategy, persipubsub.config.Durability]:
        for member in kind:
            assert f"``{member.value}``" in section


def test_files_that_are_named_exist() -> None:
    named = set(re.findall(r"``((?:docs/|examples/)?[A-Za-z_]+\.(?:rst|py))``", _TEXT))
    assert {"CONTRIBUTING.rst", "CHANGELOG.rst"} <= named
    for name in named:
        assert (_ROOT / name).exists(), name
