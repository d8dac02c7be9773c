"""Test that the documentation speaks of what is there, and that what it shows works."""

import doctest
import importlib.util
import inspect
import json
import pathlib
import re
import types

import msgspec
import msgspec.structs
import pytest

import persipubsub
import persipubsub.cli.commands
import persipubsub.config
import persipubsub.control
import persipubsub.errors
import persipubsub.publisher
import persipubsub.subscriber
from tests import doc_pages, support

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_DOCS = _ROOT / "docs"
_GUARANTEES = (_DOCS / "guarantees.rst").read_text(encoding="utf-8")

_CONTRIBUTING = (_ROOT / "CONTRIBUTING.rst").read_text(encoding="utf-8")

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

#: Classes of the configuration whose fields are keys in the file.
_KINDS: dict[str, type[msgspec.Struct]] = {
    name: kind
    for name in persipubsub.config.__all__
    if inspect.isclass(kind := getattr(persipubsub.config, name))
    and issubclass(kind, msgspec.Struct) and name != "Config"
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


def _prepare_operations(directory: pathlib.Path) -> None:
    """Make the queue that operations.rst is about: two messages wait, one of them for one only."""
    config_pth = support.write_config(directory, {
        "pub": ("sub", "log"),
        "other": ("sub", )
    }, ("sub", "log"),
                                      path="queues/greetings")
    entries = json.loads(config_pth.read_text(encoding="utf-8"))
    entries["queues"]["greetings"] = entries["queues"].pop("queue")
    for entry in entries.values():
        for key in {"in_queue", "out_queue"} & set(entry):
            entry[key] = "greetings"
    config_pth.write_text(json.dumps(entries), encoding="utf-8")
    persipubsub.control.initialize_all_dbs(config_pth)
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)
        pub.send_many(msgs=[b"gone", b"hello", b"again"])
    for name, count in (("sub", 1), ("log", 2)):
        with persipubsub.subscriber.Sub() as sub:
            sub.init(sub_id=name, config_pth=config_pth)
            with sub.receive_many(max_msgs=count, timeout=0) as msgs:
                assert len(msgs) == count
    (directory / "report.pb").write_bytes(b"report")
    (directory / "backup").mkdir()


def _as_on_page(printed: str) -> str:
    """Loosen what is measured and differs from run to run: times and sizes on the disk."""
    return re.sub(r" *\d+\.\d (s|kB)\b", r"... \1", printed)


@pytest.mark.parametrize("place", sorted(_OPERATIONS))
def test_commands_of_operations_work(place: str, tmp_path: pathlib.Path) -> None:
    _prepare_operations(tmp_path)
    with doc_pages.Shell(tmp_path) as shell:
        for command, shown in doc_pages.commands_of(_OPERATIONS[place]):
            if (f"$ {command}").startswith((*_ENDLESS, *_PICTURES)):
                continue
            command = command.replace("/etc/app/", "").replace("/backup/", "backup/")
            for beginning, before in _BEFORE.items():
                if command.startswith(beginning):
                    shell.type(before)
            if shown is None or not re.search(r"\]: y$", shown, re.MULTILINE):
                printed, exit_code = shell.type(command)
            else:
                printed, exit_code = shell.type(f"echo y | {command}")
            assert exit_code == 0, (command, printed)
            if shown is not None:
                # Who types the answer sees it, and goes on in a line of its own.
                shown = _as_on_page(shown.replace("]: y\n", "]: ")).replace("/backup/", "backup/")
                printed = printed.replace(str(tmp_path), "/srv/app")
                assert doc_pages.matches(shown, printed), (command, printed)


def test_a_page_that_lies_is_found(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.rst"
    for text in [
            ".. code-block:: console\n\n    $ echo yes\n    no\n",
            ".. code-block:: console\n\n    $ false\n",
            ".. code-block:: python\n\n    raise SystemExit(1)\n",
            ".. code-block:: python\n\n    print(1)\n\nIt prints::\n\n    2\n",
            ".. code-block:: python\n\n    >>> 1\n    2\n",
            ".. code-block:: json\n\n    {\"a\": }\n",
            ".. code-block:: json\n\n    {\n    \"queues\": {\"a\": {}}}\n",
            "Here ``a.txt``:\n\n.. code-block:: json\n    :caption: b.json\n\n    1\n\n"
            ".. code-block:: console\n\n    $ cat b.json\n    2\n",
    ]:
        page.write_text(text, encoding="utf-8")
        with doc_pages.Shell(tmp_path) as shell, pytest.raises(AssertionError, match="page.rst:"):
            doc_pages.Reader(shell).follow(doc_pages.blocks_of(page))


def test_a_page_without_a_queue_means_that_of_start(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "page.rst"
    page.write_text("""
.. code-block:: python

    import persipubsub.subscriber

    sub = persipubsub.subscriber.Sub()
    sub.init(sub_id="sub", config_pth="config.json")

.. code-block:: python

    for _ in range(2):
        with sub.receive(timeout=60) as msg:
            print(msg)

It prints::

    b'hello'
    b'stop'
""",
                    encoding="utf-8")
    with doc_pages.Shell(tmp_path) as shell:
        assert doc_pages.Reader(shell).follow(doc_pages.blocks_of(page)) == 2


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


def test_every_kind_of_entry_of_the_configuration_is_in_the_reference() -> None:
    text = (_DOCS / "reference-config.rst").read_text(encoding="utf-8")
    shown = re.findall(r"^\.\. config-keys:: (\w+)$", text, re.MULTILINE)
    assert sorted(shown) == sorted(_KINDS)


def _generated() -> types.ModuleType:
    """Import docs/_ext/generated.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("generated", _DOCS / "_ext" / "generated.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _expanded(name: str) -> str:
    """Return a page as Sphinx gets it, with what docs/_ext writes."""
    text = _generated().expand((_DOCS / name).read_text(encoding="utf-8"))
    assert isinstance(text, str)
    return text


def test_examples_in_docstrings_here_and_in_the_docs() -> None:
    for module in (_generated(), doc_pages):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed, module.__name__


def test_every_key_of_the_configuration_is_in_the_reference() -> None:
    text = _expanded("reference-config.rst")
    rows = re.findall(
        r"^    \* - ``(.+)``\n      - (.+)\n      - (.*)\n      - (.+)\n      - (.+)$", text,
        re.MULTILINE)
    keys = [field.encode_name for kind in _KINDS.values() for field in msgspec.structs.fields(kind)]
    assert sorted(row[0] for row in rows) == sorted(key for key in keys if key != "identifier")
    found = {row[0]: row[1:] for row in rows}
    assert found["max_reader_num"][:3] == ("integer", "from 1 to 65,535", "required")
    assert found["strategy"][1].startswith("``prune_first``, ``prune_last``")
    assert found["checkpoint_secs"][:3] == ("number", "from 0 to 86,400", "``1``")
    assert found["durability"][:3] == ("string", "``fsync``, ``os``", "``fsync``")


def test_every_command_and_option_is_in_the_reference() -> None:
    text = _expanded("reference-commands.rst")
    sections = dict(
        re.findall(r"^([a-z-]+)\n-+\n(.*?)(?=^[a-z-]+\n---|\Z)", text, re.MULTILINE | re.DOTALL))
    commands = persipubsub.cli.commands.commands.commands
    assert sorted(sections) == sorted(commands)
    for name, command in commands.items():
        assert f"    persipubsub {name} [OPTIONS] CONFIG" in sections[name]
        for parameter in command.params:
            for option in parameter.opts:
                assert not option.startswith("-") or f"``{option}" in sections[name]


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
    text = _GUARANTEES + _CONTRIBUTING
    named = set(re.findall(r"``((?:tests|docs|persipubsub)/[\w/-]+\.(?:py|rst))``", text))
    assert len(named) > 25
    assert [path for path in sorted(named) if not (_ROOT / path).is_file()] == []


def test_every_fault_test_proves_a_promise() -> None:
    files = {f"tests/faults/{pth.name}" for pth in (_ROOT / "tests" / "faults").glob("test_*.py")}
    unnamed = {path for path in files if path not in _GUARANTEES}
    # These try sizes and ends of the interpreter, which no single promise is about.
    assert unnamed <= {
        "tests/faults/test_sizes.py", "tests/faults/test_exit.py", "tests/faults/test_directory.py"
    }


@pytest.mark.parametrize(
    "name",
    sorted(
        set(re.findall(r"``(PERSIPUBSUB_[A-Z_]+)``", _GUARANTEES + _CONTRIBUTING))
        | set(re.findall(r"(PERSIPUBSUB_[A-Z_]+)=", _GUARANTEES + _CONTRIBUTING))))
def test_named_variable_is_used(name: str) -> None:
    sources = [pth.read_text(encoding="utf-8") for pth in (_ROOT / "tests").rglob("*.py")]
    assert any(f'"{name}"' in source for source in sources)


def test_every_variable_is_named() -> None:
    named = _CONTRIBUTING + "".join(page.read_text(encoding="utf-8") for page in _PAGES)
    for directory in ("persipubsub", "tests"):
        for source in sorted((_ROOT / directory).rglob("*.py")):
            # One that begins with an underscore is click's: the shell's completion.
            for name in re.findall(r"(?<!_)PERSIPUBSUB_[A-Z_]*[A-Z]",
                                   source.read_text(encoding="utf-8")):
                assert name in named, f"{name} of {source}"


def test_named_errors_are_there() -> None:
    named = set(re.findall(r"``(\w+Error)``", _GUARANTEES))
    assert named <= set(persipubsub.errors.__all__)
