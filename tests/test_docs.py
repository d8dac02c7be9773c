"""Test that the documentation speaks of what is there, and that what it shows works."""

import inspect
import pathlib
import re
from typing import Dict, List, Set, Tuple, Type

import msgspec
import pytest

import persipubsub
import persipubsub.cli.commands
import persipubsub.config
import persipubsub.errors
from tests import doc_pages

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_DOCS = _ROOT / "docs"
_GUARANTEES = (_DOCS / "guarantees.rst").read_text(encoding="utf-8")

_PAGES = [_ROOT / "README.rst", *sorted(_DOCS.rglob("*.rst"))]

#: Beginnings of commands that the tests do not type, with the reason.
_SKIPPED: Dict[str, str] = {
    "$ python3 -m venv": "installs from the network; .ci/run does it",
    "$ . venv3/bin/activate": "the tests run in such an environment",
    "$ pip install": "installs from the network",
    "python3 -m venv": "installs from the network; .ci/run does it",
    "pip install": "installs from the network",
    "$ cd \"$(mktemp -d)\"": "the test has an empty directory already",
}

#: Languages of blocks that are not run, with the reason.
_LANGUAGES: Dict[str, str] = {
    "text": "drawings and output",
    "": "drawings, output, and commands that take long: tests/test_readme.py compares them",
    "ini": "units of systemd: they need a machine that is theirs",
    "yaml": "containers: they need images and a daemon",
    "c": "tests/test_foreign.py builds and runs it",
    "go": "no compiler for it is at hand",
}

#: Pages whose commands are about the queues of an installation, which the tests do not have.
_NOT_TYPED: Dict[str, str] = {
    "operations.rst": "tests/test_cli.py compares each command and option, and runs them all",
}


def _name(page: pathlib.Path) -> str:
    return str(page.relative_to(_ROOT))


@pytest.mark.parametrize("page", [
    page for page in _PAGES if any(block.language not in _LANGUAGES or block.is_typed
                                   for block in doc_pages.blocks_of(page))
],
                         ids=_name)
def test_page_works_word_for_word(page: pathlib.Path, tmp_path: pathlib.Path) -> None:
    blocks = doc_pages.blocks_of(page)
    unknown = {
        block.place: block.language
        for block in blocks
        if block.language not in _LANGUAGES and not block.is_typed and block.language not in (
            "python", "pycon", "json")
    }
    assert not unknown, "Expected a language that is run, or that is excused in _LANGUAGES"

    if page.name in _NOT_TYPED:
        blocks = [block for block in blocks if not block.is_typed]
    with doc_pages.Shell(tmp_path) as shell:
        doc_pages.Reader(shell).follow(blocks, tuple(_SKIPPED))


def test_a_page_that_lies_is_found(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.rst"
    for text in [
            ".. code-block:: console\n\n    $ echo yes\n    no\n",
            ".. code-block:: console\n\n    $ false\n",
            ".. code-block:: python\n\n    raise SystemExit(1)\n",
            ".. code-block:: python\n\n    print(1)\n\nIt prints::\n\n    2\n",
            ".. code-block:: python\n\n    >>> 1\n    2\n",
            ".. code-block:: json\n\n    {\"a\": }\n",
            "Here ``a.txt``:\n\n.. code-block:: json\n    :caption: b.json\n\n    1\n\n"
            ".. code-block:: console\n\n    $ cat b.json\n    2\n",
    ]:
        page.write_text(text, encoding="utf-8")
        with doc_pages.Shell(tmp_path) as shell, pytest.raises(AssertionError, match="page.rst:"):
            doc_pages.Reader(shell).follow(doc_pages.blocks_of(page))


def test_excuses_are_used() -> None:
    blocks = [block for page in _PAGES for block in doc_pages.blocks_of(page)]
    for beginning in _SKIPPED:
        assert any(
            line.startswith(beginning) for block in blocks
            for line in block.code.splitlines()), beginning
    # The integrator of a page may need the others.
    assert {"ini", "yaml"} <= {block.language for block in blocks}


def test_every_page_is_in_the_table_of_contents() -> None:
    listed: Set[str] = set()
    for page in sorted(_DOCS.rglob("*.rst")):
        for tree in re.findall(r"^\.\. toctree::\n((?:    .*\n|\n)+)",
                               page.read_text(encoding="utf-8"), re.MULTILINE):
            listed |= {
                line.strip()
                for line in tree.splitlines() if line.strip() and not line.strip().startswith(":")
            }
    pages = {str(page.relative_to(_DOCS).with_suffix("")) for page in _DOCS.rglob("*.rst")}
    assert pages - {"index"} == listed


def test_every_kind_of_entry_of_the_configuration_is_in_the_reference() -> None:
    text = (_DOCS / "reference-config.rst").read_text(encoding="utf-8")
    shown = re.findall(r"^\.\. config-keys:: (\w+)$", text, re.MULTILINE)
    kinds: List[str] = [
        name for name in persipubsub.config.__all__
        if inspect.isclass(kind := getattr(persipubsub.config, name))
        and issubclass(kind, msgspec.Struct) and name != "Config"
    ]
    assert sorted(shown) == sorted(kinds)


def test_every_public_module_is_in_the_reference() -> None:
    text = (_DOCS / "reference.rst").read_text(encoding="utf-8")
    listed = re.findall(r"^\.\. automodule:: persipubsub\.(\w+)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(persipubsub.__all__ + ["metrics"])


def test_every_error_is_explained() -> None:
    text = (_DOCS / "errors.rst").read_text(encoding="utf-8")
    explained = re.findall(r"^    \* - :py:class:`~persipubsub\.errors\.(\w+)`$", text,
                           re.MULTILINE)
    assert sorted(explained) == sorted(persipubsub.errors.__all__)
    # A row without the reason, or without what to do, explains nothing.
    rows = re.findall(r"^    \* - :py:class:.*\n      - \S.*(?:\n        .*)*\n      - \S", text,
                      re.MULTILINE)
    assert len(rows) == len(explained)


def test_named_tests_are_there() -> None:
    named = set(re.findall(r"``(tests/[\w/]+\.py)``", _GUARANTEES))
    assert len(named) > 15
    assert [path for path in sorted(named) if not (_ROOT / path).is_file()] == []


def test_every_fault_test_proves_a_promise() -> None:
    files = {"tests/faults/" + pth.name for pth in (_ROOT / "tests" / "faults").glob("test_*.py")}
    unnamed = {path for path in files if path not in _GUARANTEES}
    # These try sizes and ends of the interpreter, which no single promise is about.
    assert unnamed <= {
        "tests/faults/test_sizes.py", "tests/faults/test_exit.py", "tests/faults/test_directory.py"
    }


@pytest.mark.parametrize(
    "name",
    sorted(
        set(re.findall(r"``(PERSIPUBSUB_[A-Z_]+)``", _GUARANTEES))
        | set(re.findall(r"(PERSIPUBSUB_[A-Z_]+)=", _GUARANTEES))))
def test_named_variable_is_used(name: str) -> None:
    sources = [pth.read_text(encoding="utf-8") for pth in (_ROOT / "tests").rglob("*.py")]
    assert any('"{}"'.format(name) in source for source in sources)


def test_named_errors_are_there() -> None:
    named = set(re.findall(r"``(\w+Error)``", _GUARANTEES))
    assert named <= set(persipubsub.errors.__all__)
