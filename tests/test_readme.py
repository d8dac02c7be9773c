"""Test that what README.rst shows and says is true."""

import re
import sys
from pathlib import Path

from tests import support

_ROOT = Path(__file__).resolve().parent.parent
_TEXT = (_ROOT / "README.rst").read_text(encoding="utf-8")


def _section(title: str) -> str:
    match = re.search(fr"^{re.escape(title)}\n-+\n(.*?)(?=^[^\n]+\n---+\n|\Z)", _TEXT,
                      re.MULTILINE | re.DOTALL)
    assert match is not None, f"Expected a section {title!r} in README.rst"
    return match.group(1)


def _example() -> str:
    match = re.search(r"code-block:: python\n\n((?:    [^\n]*\n|\n)+)", _section("Example"))
    assert match is not None
    return f"{re.sub('^    ', '', match.group(1), flags=re.MULTILINE).strip()}\n"


def test_is_short() -> None:
    assert len(_TEXT.splitlines()) <= 120


def test_sections_are_in_order() -> None:
    assert re.findall(r"^([^\n]+)\n---+$", _TEXT, re.MULTILINE) == [
        "Install", "Example", "Try it", "Is it for you?", "Guarantees", "How fast?",
        "Related projects", "Development", "Versioning"
    ]


def test_command_of_the_quickstart() -> None:
    command = ("python3 -m venv venv3 && venv3/bin/pip install '.[examples]' "
               "&& venv3/bin/python examples/quickstart.py")
    assert command in [line.strip() for line in _section("Try it").splitlines()]


def test_example_is_the_one_in_the_examples() -> None:
    program = (_ROOT / "examples" / "hello.py").read_text(encoding="utf-8")
    without_comments = re.sub(r'^""".*"""\n|  # yapf: disable$', "", program, flags=re.MULTILINE)
    assert _example() == without_comments
    assert len(_example().splitlines()) <= 10


def test_example_runs(tmp_path: Path) -> None:
    for _ in range(2):
        # Twice: the message was acknowledged, and initializing may be repeated.
        process = support.run([sys.executable, "-c", _example()], cwd=tmp_path)
        assert (process.returncode, process.stderr) == (0, "")
        assert f"It prints ``{process.stdout.strip()}``." in _TEXT
    assert sorted(pth.name for pth in tmp_path.iterdir()) == ["greetings"]


def test_files_that_are_linked_exist() -> None:
    linked = re.findall(r"<(?!https?:)([^>\s]+)>`_", _TEXT)
    assert {"CONTRIBUTING.rst", "docs/guarantees.rst", "docs/comparison.rst"} <= set(linked)
    for name in linked:
        assert (_ROOT / name).is_file(), name


def test_address_is_in_one_place() -> None:
    address, = re.findall(r'^_URL = "(https://[^"]+)"$', (_ROOT / "setup.py").read_text("utf-8"),
                          re.MULTILINE)
    for pth in [*_ROOT.glob("*.rst"), *(_ROOT / "docs").rglob("*.rst"), _ROOT / "docs" / "conf.py"]:
        assert address not in pth.read_text(encoding="utf-8"), pth
