"""Test that others can read a queue from what docs/format.rst says."""

import fcntl
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import lmdb
import pytest

import persipubsub.queue
from persipubsub import config
from persipubsub.lmdb_engine import files
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import journal
from tests import stores, support

_ROOT = Path(__file__).resolve().parent.parent
_FOREIGN = _ROOT / "examples" / "foreign"
_DUMP = _ROOT / "docs" / "format-dump.txt"
_FORMAT = (_ROOT / "docs" / "format.rst").read_text(encoding="utf-8")


def _open(directory: Path) -> persipubsub.queue.Queue:
    """Open a queue with a clock that stands still, and create it if it is not there."""
    settings = config.Queue(subscribers=())
    path = str(directory / "queue")
    persipubsub.queue.Queue.ensure(path, settings, ("alarm", "archive"))
    return persipubsub.queue.Queue(path, settings, clock=lambda: 10**18)


@pytest.fixture(name="queue_pth")
def make_queue(tmp_path: Path) -> Path:
    with _open(tmp_path) as queue:
        queue.put([b"hello", b"", b"world"])
        queue.put([b"psst"], recipients=("alarm", ))
        first = stores.lease(queue, name="archive")
        # The second is acknowledged ahead of the position, which stays at the first.
        stores.take(queue, "archive")
        first.nack()
    return tmp_path / "queue"


@pytest.fixture(name="program",
                scope="module",
                params=[("list_queue", "list_queue.c", "cc", "gcc"),
                        ("list_queue_cpp", "list_queue.cpp", "g++", "g++")],
                ids=["c", "cpp"])
def build_program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a program as its Makefile says: what one of them does, the other has to do, too."""
    name, source, compiler, package = request.param
    if shutil.which(compiler) is None or shutil.which("make") is None:
        pytest.skip(f"no {compiler} or no make: install {package} and make")
    if not Path("/usr/include/lmdb.h").exists():
        pytest.skip("no header of LMDB: install liblmdb-dev")
    directory = tmp_path_factory.mktemp("foreign")
    for copied in ("Makefile", source):
        shutil.copy(_FOREIGN / copied, directory)
    process = support.run(["make", name], cwd=directory)
    assert process.returncode == 0, process.stderr
    built = directory / name
    assert isinstance(built, Path)
    return built


def _run(*command: object) -> tuple[int, str, str]:
    process = support.run(command)
    return process.returncode, process.stdout, process.stderr


def test_program_reads_a_queue(program: Path, queue_pth: Path) -> None:
    expected = """\
format 2
subscriber alarm: position 1, acknowledged 0
subscriber archive: position 1, acknowledged 1
message 1 for audience 0, 5 bytes, sound: hello
message 2 for audience 0, 0 bytes, sound: \n\
message 3 for audience 0, 5 bytes, sound: world
message 4 for audience 1, 4 bytes, sound: psst
"""
    assert _run(program, queue_pth) == (0, expected, "")


def test_program_reads_while_the_queue_is_used(program: Path, tmp_path: Path) -> None:
    with _open(tmp_path) as queue:
        queue.put([b"zero\0byte"])
        code, out, err = _run(program, tmp_path / "queue")
        assert (code, err) == (0, ""), err
        assert out.endswith("message 1 for audience 0, 9 bytes, sound: zero\0byte\n")
        queue.put([b"two"])
        assert stores.take_all(queue, "alarm") == [b"zero\0byte", b"two"]


def test_program_counts_as_a_user(program: Path, tmp_path: Path) -> None:
    with _open(tmp_path) as queue:
        queue.put([b"x" * 1000] * 1000)
    with subprocess.Popen([program, tmp_path / "queue"], stdout=subprocess.PIPE) as process:
        try:
            # It has begun, and waits: a megabyte does not fit into a pipe.
            assert process.stdout is not None and process.stdout.read(1) == b"f"
            with open(tmp_path / "queue" / files.USERS, "rb") as users:
                with pytest.raises(BlockingIOError):
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            process.kill()
    with _open(tmp_path) as queue:
        assert len(stores.take_all(queue, "alarm")) == 1000


def test_program_refuses_another_format(program: Path, queue_pth: Path) -> None:
    with lmdb.open(str(queue_pth), max_dbs=16, lib_version=0) as environment:
        meta = environment.open_db(b"meta_db", create=False)
        with environment.begin(write=True, db=meta) as txn:
            header = txn.get(b"header")
            assert header is not None
            txn.put(b"header", header[:8] + (3).to_bytes(4, "little") + header[12:])
    assert _run(program,
                queue_pth) == (1, "",
                               "list_queue: header: a format that this program does not know\n")


def test_program_refuses_what_was_in_use_when_the_machine_went_down(program: Path,
                                                                    tmp_path: Path) -> None:
    """Pages may be missing, and LMDB may crash on what is in their place."""
    mark = tmp_path / "queue" / files.RUNNING
    with _open(tmp_path) as queue:
        queue.put([b"one"])
        assert mark.read_bytes() == files.boot_id()
        assert _run(program, tmp_path / "queue")[0] == 0
    for content in (b"", b"another boot id.", files.boot_id()[:15]):
        mark.write_bytes(content)
        assert _run(program, tmp_path / "queue") == (
            1, "", f"list_queue: {mark}: of another boot: let the library open the queue first\n")


def test_program_refuses_what_is_not_a_queue(program: Path, tmp_path: Path) -> None:
    code, out, err = _run(program, tmp_path)
    assert (code, out) == (1, "")
    assert "not a queue, or no rights" in err
    assert sorted(tmp_path.iterdir()) == []


def test_program_finds_damage(program: Path, queue_pth: Path) -> None:
    data = queue_pth / "data.mdb"
    data.write_bytes(data.read_bytes().replace(b"helloworld", b"jelloworld"))
    code, out, _ = _run(program, queue_pth)
    assert code == 0
    assert "message 1 for audience 0, 5 bytes, DAMAGED: jello\n" in out
    assert "message 3 for audience 0, 5 bytes, sound: world\n" in out


@pytest.mark.parametrize("sound, damaged, listed, reason", [
    pytest.param(struct.pack("<QQIHH", 3, 10, 3, 0, 0),
                 struct.pack("<QQIHH", 3, 10, 3, 1, 0),
                 0,
                 "block: its checksum is wrong",
                 id="header of the block"),
    pytest.param(struct.pack("<II", 10, zlib.crc32(b"world")),
                 struct.pack("<II", 11, zlib.crc32(b"world")),
                 2,
                 "message: damaged",
                 id="end behind the block"),
    pytest.param(struct.pack("<II", 5, zlib.crc32(b"")),
                 struct.pack("<II", 4, zlib.crc32(b"")),
                 1,
                 "message: damaged",
                 id="end before the start"),
])
def test_program_stops_at_a_damaged_block(program: Path, queue_pth: Path, sound: bytes,
                                          damaged: bytes, listed: int, reason: str) -> None:
    data = queue_pth / "data.mdb"
    content = data.read_bytes()
    assert sound in content
    data.write_bytes(content.replace(sound, damaged))
    code, out, err = _run(program, queue_pth)
    assert (code, err) == (1, f"list_queue: {reason}\n")
    assert out.count("\nmessage ") == listed, out


def test_program_does_not_take_a_damaged_page_for_the_end(program: Path, tmp_path: Path) -> None:
    with _open(tmp_path) as queue:
        for _ in range(12):
            queue.put([b"x" * 1000])
    data = tmp_path / "queue" / "data.mdb"
    content = bytearray(data.read_bytes())
    branches = 0
    for page in range(0, len(content), 4096):
        # A branch page of LMDB has the flag 1, and offsets of its children from the byte 16 on.
        flags, lower = struct.unpack_from("<HH", content, page + 10)
        if flags == 1 and lower >= 20:
            node, = struct.unpack_from("<H", content, page + 18)
            struct.pack_into("<I", content, page + node, 0xFFFFFFF)
            branches += 1
    assert branches > 0
    data.write_bytes(content)
    code, out, err = _run(program, tmp_path / "queue")
    assert code == 1
    assert err.startswith("list_queue: data_db: MDB_PAGE_NOTFOUND"), err
    assert "message 1 for" in out and "message 12 for" not in out


def test_program_says_how_it_is_used(program: Path) -> None:
    assert _run(program) == (2, "", "usage: list_queue QUEUE_DIRECTORY\n")


TRUNCATED = pytest.mark.parametrize("size", [0, 100, 4096, 5000, 9000, -4096, -1])


@TRUNCATED
def test_program_refuses_a_truncated_store(program: Path, queue_pth: Path, size: int) -> None:
    data = queue_pth / "data.mdb"
    os.truncate(data, size if size >= 0 else data.stat().st_size + size)
    assert _run(program, queue_pth) == (1, "", f"list_queue: {data}: truncated\n")


@TRUNCATED
def test_dump_refuses_a_truncated_store(queue_pth: Path, size: int) -> None:
    data = queue_pth / "data.mdb"
    os.truncate(data, size if size >= 0 else data.stat().st_size + size)
    # In a process of its own: without the look at the size, LMDB kills it.
    assert _run(sys.executable, _FOREIGN / "dump_queue.py",
                queue_pth) == (1, "", f"dump_queue: {data}: truncated\n")


def test_dump_is_that_of_the_docs(queue_pth: Path) -> None:
    found = "\n".join(support.import_file(_FOREIGN / "dump_queue.py").dump(queue_pth)) + "\n"
    if os.environ.get("PERSIPUBSUB_WRITE_DUMP"):
        _DUMP.write_text(found, encoding="utf-8")

    def mask(text: str) -> str:
        # The clock, the boot and the journal are those of the machine.
        return re.sub(r"^.*(  offset of the queue's clock|  id of the (boot|journal)).*$",
                      r"\1",
                      text,
                      flags=re.MULTILINE)

    assert mask(_DUMP.read_text(encoding="utf-8")) == mask(found)
    assert "more than this program knows" not in found


def test_dump_knows_what_only_some_queues_have() -> None:
    describe = support.import_file(_FOREIGN / "dump_queue.py")._describe
    attempts = struct.pack("<IIQQ", 3, 1, 5, 7) + b"no"
    assert [meaning
            for _, meaning in describe("attempts_db", struct.pack(">IQ", 1, 2), attempts)] == [
                "ordinal: 1", "number of the message: 2", "deliveries so far: 3",
                "flags; 1: the last one goes on, or its process died: 1",
                "first recorded, ns on the queue's clock: 5",
                "retry at, ns on the queue's clock: 7", "last error: 'no'"
            ]
    assert [meaning for _, meaning in describe("once_db", b"iorder", struct.pack("<QQ", 4, 9))] == [
        "key: i and an id: 'iorder'", "number of the message: 4", "time, ns on the queue's clock: 9"
    ]
    assert [
        meaning for _, meaning in describe("once_db", b"t" + struct.pack(">Q", 9) + b"order", b"")
    ] == ["key: 't'", "time: 9", "id: 'order'"]


def test_journal_is_read(tmp_path: Path) -> None:
    with _open(tmp_path) as queue:
        queue.put([b"hello", b"", b"world"])
        queue.put([b"psst"], recipients=("alarm", ), msg_ids=[b"an id"])
        for number in range(20):
            queue.put([b"x" * 50_000, str(number).encode()])
    lines = list(support.import_file(_FOREIGN / "list_journal.py").list_journal(tmp_path / "queue"))
    assert [line for line in lines if line.startswith("    ")][:5] == [
        "    message 1: b'hello'", "    message 2: b''", "    message 3: b'world'",
        "    message 4: b'psst'", "    id of message 4: b'an id'"
    ]
    messages = [line for line in lines if line.startswith("    message") and len(line) < 40]
    assert messages[4:] == [f"    message {6 + 2 * number}: b'{number}'" for number in range(20)]
    # A message is in the journal when its send returns; the last close writes a state record.
    assert any(line.endswith(": lists, up to message 3") for line in lines), lines
    assert lines[-1].endswith(": state, up to message 44"), lines[-1]
    assert sum(line.startswith("segment") for line in lines) > 2


def test_journal_that_is_not_there(tmp_path: Path) -> None:
    assert _run(sys.executable, _FOREIGN / "list_journal.py",
                tmp_path) == (1, "", "list_journal: no journal\n")


def test_every_file_of_a_queue_is_described() -> None:
    for name in files.OWN:
        assert f"``{name}``" in _FORMAT, name


def test_every_sub_database_is_described() -> None:
    for name in fmt.DATABASE_NAMES:
        title = name.decode("ascii")
        assert f"\n{title}\n{'-' * len(title)}\n" in _FORMAT, title


@pytest.mark.parametrize("name, packed", [
    ("meta_db", fmt._HEADER.size),
    ("pending_db", fmt.SUBSCRIBER.size),
    ("Segments", journal._HEADER.size + journal._CRC.size),
    ("Records", journal._RECORD_HEAD_BYTES),
])
def test_size_of_a_record_is_that_of_its_table(name: str, packed: int) -> None:
    section = re.search(fr"\n{name}\n-+\n(.*?)(?=\n[^\n]+\n---+\n|\Z)", _FORMAT, re.DOTALL)
    assert section is not None
    rows = re.findall(r"^(\d+) +(\d+) ", section.group(1), re.MULTILINE)
    end = 0
    for offset, size in rows:
        assert int(offset) == end
        end += int(size)
    assert end == packed
