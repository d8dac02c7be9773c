"""Test that the documentation speaks of what is there, and that what it shows works."""

import doctest
import re
from pathlib import Path

import pytest

import persipubsub
from persipubsub import Pub, Sub, config, control, errors
from tests import doc_pages, support

_ROOT = Path(__file__).resolve().parent.parent
_DOCS = _ROOT / "docs"
_CONFIG_KEYS = _DOCS / "_ext" / "config_keys.py"
_ABOUT = "".join(
    pth.read_text(encoding="utf-8")
    for pth in (_ROOT / "CONTRIBUTING.rst", _DOCS / "guarantees.rst", _DOCS / "inside.rst",
                _DOCS / "tested.rst"))

_PAGES = [_ROOT / "README.rst", *sorted(_DOCS.rglob("*.rst"))]

#: Beginnings of commands that the tests do not type, with the reason.
_SKIPPED: dict[str, str] = {
    "$ python3 -m venv": "installs from the network; .ci/run does it",
    "$ . venv3/bin/activate": "the tests run in such an environment",
    "$ pip install": "installs from the network",
    "$ cd \"$(mktemp -d)\"": "the test has an empty directory already",
}

#: Languages of blocks that are not run, with the reason.
_LANGUAGES: dict[str, str] = {
    "text": "drawings and output",
    "": "drawings, output, and commands that install or take long",
    "ini": "units of systemd: they need a machine that is theirs",
    "yaml": "containers: they need images and a daemon",
    "c": "tests/test_foreign.py builds and runs it",
    "go": "no compiler for it is at hand",
}

#: Beginnings of blocks and commands that show what a test of docs can not bring about, with the
#: reason: they need servers, or messages with a history.
_PICTURES: dict[str, str] = {
    "$ nats-server": "tests/test_jetstream.py starts servers",
    "$ persipubsub migrate": "tests/test_migration.py runs it with a server",
    "$ persipubsub dead-letters": "tests/test_dead_letters.py runs it with messages that failed",
    "$ persipubsub seek": "tests/test_cli.py runs it with messages that stay",
    "$ persipubsub stat config.json | tail -2": "shows a consumer that has hung for hours",
    "$ man ": "opens a pager; tox builds the page",
    "$ python -m sphinx": "tox builds the pages",
    "$ export PERSIPUBSUB_CONFIG": "tests/test_cli.py sets it",
    "$ persipubsub stat\n": "needs the variable that is set above it",
    "$ persipubsub peek sub": "needs the variable that is set above it",
}

#: Beginnings of commands of operations.rst that are not typed, with the reason. tests/test_cli.py
#: runs each command, these too.
_ENDLESS: dict[str, str] = {
    "$ pip install": "installs from the network",
    "$ persipubsub stat config.json --json | jq": "jq may be missing",
    "$ persipubsub stat config.json --watch": "goes on until Ctrl-C",
    "$ persipubsub stat /etc/app/config.json --watch": "goes on until Ctrl-C",
    "$ persipubsub tail": "goes on until Ctrl-C",
    "$ journalctl": "goes on until Ctrl-C",
    "$ persipubsub receive config.json sub --number 0": "goes on until Ctrl-C",
    "$ persipubsub receive config.json sub --number 100": "waits for a hundred messages",
    "$ persipubsub metrics": "goes on until Ctrl-C",
}


def _name(page: Path) -> str:
    return str(page.relative_to(_ROOT))


@pytest.mark.parametrize("page", [
    page for page in _PAGES if any(block.language not in _LANGUAGES or block.is_typed
                                   for block in doc_pages.blocks_of(page))
],
                         ids=_name)
def test_page_works_word_for_word(page: Path, tmp_path: Path) -> None:
    blocks = doc_pages.blocks_of(page)
    unknown = {
        block.place: block.language
        for block in blocks
        if block.language not in _LANGUAGES and not block.is_typed and block.language not in (
            "python", "pycon", "json")
    }
    assert not unknown, "Expected a language that is run, or that is excused in _LANGUAGES"

    if page.name == "operations.rst":
        # The blocks do not follow from each other: each has a test of its own below.
        blocks = [block for block in blocks if not block.is_typed]
    with doc_pages.Shell(tmp_path) as shell:
        doc_pages.Reader(shell).follow(blocks, (*_SKIPPED, *_PICTURES))


_OPERATIONS = {
    block.place: block
    for block in doc_pages.blocks_of(_DOCS / "operations.rst") if block.is_typed
}

#: What has to be done before a command, by its beginning.
_BEFORE = {
    "persipubsub restore": "persipubsub backup config.json backup/greetings.mdb --queue greetings",
    "persipubsub remove-sub": "persipubsub add-subscriber config.json index --queue greetings",
}


def _prepare_operations(directory: Path) -> None:
    """Make the queue that operations.rst is about: two messages wait, one of them for one only."""
    config_pth = support.write_config(directory, {
        "pub": ("sub", "log"),
        "other": ("sub", )
    }, ("sub", "log"),
                                      path="queues/greetings")
    with support.edited(config_pth) as entries:
        entries["queues"]["greetings"] = entries["queues"].pop("queue")
        for entry in entries.values():
            for key in {"in_queue", "out_queue"} & set(entry):
                entry[key] = "greetings"
    control.initialize_all_dbs(config_pth)
    with Pub("pub", config_pth) as pub:
        pub.send_many(msgs=[b"gone", b"hello", b"again"])
    for name, count in (("sub", 1), ("log", 2)):
        with Sub(name, config_pth) as sub:
            with sub.receive_many(max_msgs=count, timeout=0) as msgs:
                assert len(msgs) == count
    (directory / "report.pb").write_bytes(b"report")
    (directory / "backup").mkdir()


def _as_on_page(printed: str) -> str:
    """Loosen what is measured and differs from run to run: times and sizes on the disk."""
    return re.sub(r" *\d+\.\d (s|[kM]B)\b", "...", printed)


@pytest.mark.parametrize("place", sorted(_OPERATIONS))
def test_commands_of_operations_work(place: str, tmp_path: Path) -> None:
    _prepare_operations(tmp_path)
    with doc_pages.Shell(tmp_path) as shell:
        for command, shown in doc_pages.commands_of(_OPERATIONS[place]):
            if f"$ {command}\n".startswith((*_ENDLESS, *_PICTURES)):
                continue
            command = command.replace("/etc/app/", "").replace("/backup/", "backup/")
            for beginning, before in _BEFORE.items():
                if command.startswith(beginning):
                    shell.type(before)
            if shown is not None and re.search(r"\]: y$", shown, re.MULTILINE):
                command = f"echo y | {command}"
            printed, exit_code = shell.type(command)
            assert exit_code == 0, (command, printed)
            if shown is not None:
                # On a terminal, the answer ends the line of the question.
                shown = _as_on_page(shown.replace("]: y\n", "]: ")).replace("/backup/", "backup/")
                printed = printed.replace(str(tmp_path), "/srv/app")
                assert doc_pages.matches(shown, printed), (command, printed)


def test_a_page_that_lies_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.rst"
    for text in [
            ".. code-block:: console\n\n    $ echo yes\n    no\n",
            ".. code-block:: console\n\n    $ false\n",
            ".. code-block:: python\n\n    raise SystemExit(1)\n",
            ".. code-block:: python\n\n    print(1)\n\nIt prints::\n\n    2\n",
            ".. code-block:: python\n\n    >>> 1\n    2\n",
            ".. code-block:: json\n\n    {\"a\": }\n",
            ".. code-block:: json\n\n    {\n    \"queues\": {\"a\": {}}}\n",
            ".. code-block:: json\n    :caption: b.json\n\n    1\n\n"
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
    listed: set[str] = set()
    for page in sorted(_DOCS.rglob("*.rst")):
        for tree in re.findall(r"^\.\. toctree::\n((?:    .*\n|\n)+)",
                               page.read_text(encoding="utf-8"), re.MULTILINE):
            listed |= {
                line.strip()
                for line in tree.splitlines() if line.strip() and not line.strip().startswith(":")
            }
    pages = {str(page.relative_to(_DOCS).with_suffix("")) for page in _DOCS.rglob("*.rst")}
    assert pages - {"index"} == listed


def test_examples_in_docstrings_here_and_in_the_docs() -> None:
    for module in (support.import_file(_CONFIG_KEYS), doc_pages):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed, module.__name__


def test_every_key_of_the_configuration_is_explained() -> None:
    page = (_DOCS / "configuration.rst").read_text(encoding="utf-8")
    text = support.import_file(_CONFIG_KEYS).expand(page)
    rows = re.findall(r"^    \* - ``(.+)``\n      - (.+)\n      - (.+)\n      - (.+)$", text,
                      re.MULTILINE)
    parts = config.schema()["$defs"]
    keys = [key for part in parts.values() for key in part.get("properties", ())]
    assert sorted(row[0] for row in rows) == sorted(keys)
    found = {row[0]: row[1:] for row in rows}
    assert found["max_reader_num"][:2] == ("integer from 1 to 65,535", "``1024``")
    assert found["strategy"][1] == "``reject``"
    assert found["MAX_MSGS_NUM"][:2] == ("integer from 1 to 2\\ :sup:`48` or null", "none")
    assert found["checkpoint_secs"][:2] == ("number more than 0 to 86,400", "``1``")
    assert found["durability"][:2] == ("``fsync``, ``os``", "``fsync``")
    for kind in (config.Strategy, config.Durability):
        for member in kind:
            assert f"``{member.value}``" in text


def test_every_public_module_is_in_the_reference() -> None:
    text = (_DOCS / "reference.rst").read_text(encoding="utf-8")
    listed = re.findall(r"^\.\. automodule:: persipubsub\.(\w+)$", text, re.MULTILINE)
    modules = [name for name in persipubsub.__all__ if name.islower()]
    assert sorted(listed) == sorted([*modules, "metrics"])


def test_every_error_is_explained() -> None:
    text = (_DOCS / "errors.rst").read_text(encoding="utf-8")
    explained = re.findall(r"^    \* - :py:class:`~persipubsub\.errors\.(\w+)`$", text,
                           re.MULTILINE)
    assert sorted(explained) == sorted(errors.__all__)
    # A row without the reason, or without what to do, explains nothing.
    rows = re.findall(r"^    \* - :py:class:.*\n      - \S.*(?:\n        .*)*\n      - \S", text,
                      re.MULTILINE)
    assert len(rows) == len(explained)


def test_named_files_are_there() -> None:
    named = set(
        re.findall(r"``((?:tests|docs|persipubsub|examples|benchmarks)/[\w/-]+\.\w+)``", _ABOUT))
    assert len(named) > 40
    assert [path for path in sorted(named) if not (_ROOT / path).exists()] == []


def test_named_functions_are_there() -> None:
    text = (_DOCS / "inside.rst").read_text(encoding="utf-8")
    engine = _ROOT / "persipubsub" / "lmdb_engine"
    named = re.findall(r"``(\w+)``: ((?:``[\w.]+``(?:, )?)+)", text)
    # Of the path of a message: functions, perhaps what they do, and modules in brackets.
    for names, modules in re.findall(
            r"^ +((?:[A-Z]\w+\.|[a-z]+_)\w+(?:, [\w.]+)*).* \[([\w, ]+)\]$", text, re.MULTILINE):
        sources = "".join(
            pth.read_text(encoding="utf-8") for module in modules.split(", ")
            for pth in (_ROOT / "persipubsub").rglob(f"{module}.py"))
        for name in names.split(", "):
            assert re.search(rf"^ *(def|class) {name.rpartition('.')[2]}\b", sources,
                             re.MULTILINE), (modules, name)
    assert len(named) > 15
    for module, names in named:
        source = (engine / f"{module}.py").read_text(encoding="utf-8")
        for name in re.findall(r"``([\w.]+)``", names):
            assert re.search(rf"^ *(def|class) {name.rpartition('.')[2]}\b|^{name}\b", source,
                             re.MULTILINE), (module, name)


def test_every_module_is_in_the_tree() -> None:
    text = (_DOCS / "inside.rst").read_text(encoding="utf-8")
    tree = text.partition("Modules\n-------")[2].partition("\nFrom ``")[0]
    for pth in sorted((_ROOT / "persipubsub").rglob("*.py")):
        name = pth.stem if pth.parent.name != "jetstream" else "jetstream"
        if not name.startswith("__"):
            assert re.search(rf"\b{name}\b", tree), pth


def test_every_fault_test_is_named() -> None:
    tested = (_DOCS / "tested.rst").read_text(encoding="utf-8")
    for pth in (_ROOT / "tests" / "faults").glob("test_*.py"):
        assert f"``tests/faults/{pth.name}``" in tested


@pytest.mark.parametrize("name", sorted(set(re.findall(r"PERSIPUBSUB_[A-Z_]*[A-Z]", _ABOUT))))
def test_named_variable_is_used(name: str) -> None:
    sources = [*(_ROOT / "tests").rglob("*.py"), *(_ROOT / "persipubsub").rglob("*.py")]
    assert any(name in source.read_text(encoding="utf-8") for source in sources)


def test_every_variable_of_the_library_is_named() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in _PAGES)
    for source in sorted((_ROOT / "persipubsub").rglob("*.py")):
        # One that begins with an underscore is click's: the shell's completion.
        for name in re.findall(r"(?<!_)PERSIPUBSUB_[A-Z_]*[A-Z]",
                               source.read_text(encoding="utf-8")):
            assert name in pages, f"{name} of {source}"


def test_named_errors_are_there() -> None:
    named = set(re.findall(r"``(\w+Error)``", _ABOUT)) - {"TypeError", "ValueError"}
    assert named <= set(errors.__all__)
