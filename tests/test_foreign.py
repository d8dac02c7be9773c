"""Test that others can read a queue from what docs/format.rst says."""

import fcntl
import importlib.util
import os
import pathlib
import re
import shutil
import struct
import subprocess
import types
from typing import Tuple

import lmdb
import pytest

from persipubsub.environment import _files
from persipubsub.store import _databases, _layout
from tests import stores, support

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_FOREIGN = _ROOT / "examples" / "foreign"
_DUMP = _ROOT / "docs" / "format-dump.txt"
_FORMAT = (_ROOT / "docs" / "format.rst").read_text(encoding="utf-8")


@pytest.fixture(name="queue_pth")
def make_queue(tmp_path: pathlib.Path) -> pathlib.Path:
    """Make the queue that docs/format.rst shows."""
    with stores.opened(tmp_path, ("alarm", "archive"), stores.Clock()) as queue:
        queue.put([b"hello", b"", b"world"])
        queue.put([b"psst"], audience=("alarm", ))
        first = queue.consumer("archive").take(timeout=0)
        second = queue.consumer("archive").take(timeout=0)
        assert first is not None and second is not None
        # The second is acknowledged ahead of the position, which stays at the first.
        second.acknowledge()
        first.give_back()
    return tmp_path / "queue"


@pytest.fixture(name="program", scope="module")
def build_program(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Build the program in C as its Makefile says."""
    if shutil.which("cc") is None or shutil.which("make") is None:
        pytest.skip("no C compiler or no make: install gcc and make")
    if not pathlib.Path("/usr/include/lmdb.h").exists():
        pytest.skip("no header of LMDB: install liblmdb-dev")
    directory = tmp_path_factory.mktemp("foreign")
    for name in ("Makefile", "list_queue.c"):
        shutil.copy(_FOREIGN / name, directory)
    process = subprocess.run(["make"],
                             cwd=directory,
                             capture_output=True,
                             text=True,
                             timeout=support.HANG_SECS,
                             check=False)
    assert process.returncode == 0, process.stderr
    return directory / "list_queue"


def _run(program: pathlib.Path, *arguments: object) -> Tuple[int, str, str]:
    process = subprocess.run([program, *map(str, arguments)],
                             capture_output=True,
                             text=True,
                             timeout=support.HANG_SECS,
                             check=False)
    return process.returncode, process.stdout, process.stderr


def test_program_in_c_reads_a_queue(program: pathlib.Path, queue_pth: pathlib.Path) -> None:
    expected = """\
format 1, durability fsync
subscriber alarm: position 1, acknowledged 0
subscriber archive: position 1, acknowledged 1
message 1 for audience 0, 5 bytes, sound: hello
message 2 for audience 0, 0 bytes, sound: \n\
message 3 for audience 0, 5 bytes, sound: world
message 4 for audience 1, 4 bytes, sound: psst
"""
    assert _run(program, queue_pth) == (0, expected, "")


def test_program_in_c_reads_while_the_queue_is_used(program: pathlib.Path,
                                                    tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, ("alarm", "archive")) as queue:
        queue.put([b"one"])
        code, out, err = _run(program, tmp_path / "queue")
        assert (code, err) == (0, ""), err
        assert out.endswith("message 1 for audience 0, 3 bytes, sound: one\n")
        queue.put([b"two"])
        assert stores.take_all(queue, "alarm") == [b"one", b"two"]


def test_program_in_c_counts_as_a_user(program: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"x" * 1000] * 1000)
    with subprocess.Popen([program, tmp_path / "queue"], stdout=subprocess.PIPE) as process:
        try:
            # It has begun, and waits: a megabyte does not fit into a pipe.
            assert process.stdout is not None and process.stdout.read(1) == b"f"
            with open(tmp_path / "queue" / _files.USERS, "rb") as users:
                with pytest.raises(BlockingIOError):
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            process.kill()
    with stores.opened(tmp_path) as queue:
        assert len(stores.take_all(queue)) == 1000


def test_program_in_c_refuses_another_format(program: pathlib.Path,
                                             queue_pth: pathlib.Path) -> None:
    with lmdb.open(str(queue_pth), max_dbs=16, lib_version=0) as environment:
        meta = environment.open_db(b"meta_db", create=False)
        with environment.begin(write=True, db=meta) as txn:
            header = txn.get(b"header")
            assert header is not None
            txn.put(b"header", header[:8] + (2).to_bytes(4, "little") + header[12:])
    assert _run(program,
                queue_pth) == (1, "",
                               "list_queue: header: a format that this program does not know\n")


def test_program_in_c_refuses_what_is_not_a_queue(program: pathlib.Path,
                                                  tmp_path: pathlib.Path) -> None:
    code, out, err = _run(program, tmp_path)
    assert (code, out) == (1, "")
    assert "not a queue, or no rights" in err
    assert sorted(tmp_path.iterdir()) == []


def test_program_in_c_finds_damage(program: pathlib.Path, queue_pth: pathlib.Path) -> None:
    data = queue_pth / "data.mdb"
    data.write_bytes(data.read_bytes().replace(b"helloworld", b"jelloworld"))
    code, out, _ = _run(program, queue_pth)
    assert code == 0
    assert "message 1 for audience 0, 5 bytes, DAMAGED: jello\n" in out
    assert "message 3 for audience 0, 5 bytes, sound: world\n" in out


def _dump_queue() -> types.ModuleType:
    """Import examples/foreign/dump_queue.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("dump_queue", _FOREIGN / "dump_queue.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dump_is_that_of_the_docs(queue_pth: pathlib.Path) -> None:
    found = "\n".join(_dump_queue().dump(queue_pth)) + "\n"
    if os.environ.get("PERSIPUBSUB_WRITE_DUMP"):
        _DUMP.write_text(found, encoding="utf-8")

    def mask(text: str) -> str:
        # The clock and the boot are those of the machine.
        return re.sub(r"^.*(  offset of the queue's clock|  id of the boot).*$",
                      r"\1",
                      text,
                      flags=re.MULTILINE)

    assert mask(_DUMP.read_text(encoding="utf-8")) == mask(found)
    assert "more than this program knows" not in found


def test_dump_knows_what_only_some_queues_have() -> None:
    describe = _dump_queue()._describe
    attempts = struct.pack("<IIQQ", 3, 1, 5, 7) + b"no"
    assert [meaning
            for _, meaning in describe("attempts_db", struct.pack(">IQ", 1, 2), attempts)] == [
                "ordinal: 1", "number of the message: 2", "deliveries so far: 3",
                "flags; 1: the last one goes on, or its process died: 1",
                "first recorded, ns on the queue's clock: 5",
                "due again, ns on the queue's clock: 7", "last error: 'no'"
            ]
    assert [meaning for _, meaning in describe("once_db", b"iorder", struct.pack("<QQ", 4, 9))] == [
        "key: i and an id: 'iorder'", "number of the message: 4", "time, ns on the queue's clock: 9"
    ]
    assert [
        meaning for _, meaning in describe("once_db", b"t" + struct.pack(">Q", 9) + b"order", b"")
    ] == ["key: 't'", "time: 9", "id: 'order'"]


def test_every_file_of_a_queue_is_described() -> None:
    for name in _files.OWN:
        assert "``{}``".format(name) in _FORMAT, name


def test_every_sub_database_is_described() -> None:
    for name in _databases.NAMES:
        title = name.decode("ascii")
        assert "\n{}\n{}\n".format(title, "-" * len(title)) in _FORMAT, title


@pytest.mark.parametrize("name, packed", [
    ("meta_db", _layout._HEADER.size),
    ("pending_db", _layout._SUBSCRIBER.size),
])
def test_size_of_a_record_is_that_of_its_table(name: str, packed: int) -> None:
    section = re.search(r"\n{}\n-+\n(.*?)(?=\n[^\n]+\n---+\n|\Z)".format(name), _FORMAT, re.DOTALL)
    assert section is not None
    rows = re.findall(r"^(\d+) +(\d+) ", section.group(1), re.MULTILINE)
    end = 0
    for offset, size in rows:
        assert int(offset) == end
        end += int(size)
    assert end == packed
