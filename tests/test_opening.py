"""Test opening what is, was or never was a queue: nothing crashes, hangs, or is changed."""

import contextlib
import functools
import logging
import os
import random
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lmdb
import pytest

from persipubsub import Pub, control, errors
from tests import stores, support
from tests.faults import tracing
from tests.support import receive_all, send_each

PAGE = 4096

#: A user without rights.
NOBODY = 65534

FILES = [
    "data.mdb", "lock.mdb", "write.lock", "open.lock", "users.lock", "claims.lock", "journal.lock",
    "shared", "running", "reserve", "data.mdb.new", "journal"
]


def make(directory: Path, *messages: bytes, **changes: Any) -> Path:
    config_pth = support.make_queue(directory, **changes)
    send_each(config_pth, *messages)
    return config_pth


def every_use(config_pth: Path) -> list[Callable[[], object]]:
    return [
        lambda: send_each(config_pth, b"message"), lambda: receive_all(config_pth),
        lambda: control.initialize_all_dbs(config_pth), lambda: control.statistics(config_pth),
        lambda: control.clear_all_subs(config_pth), lambda: control.compact(config_pth)
    ]


# What is in the place of a file


def directory_with_a_file(path: Path, _: Path) -> None:
    path.mkdir()
    (path / "precious").write_bytes(b"precious")


PUTS: Mapping[str, Callable[[Path, Path], object]] = {
    "symbolic link": lambda path, outside: path.symlink_to(outside),
    "dangling link": lambda path, outside: path.symlink_to(outside.parent / "nothing"),
    "link to a directory": lambda path, outside: path.symlink_to(outside.parent),
    "hard link": lambda path, outside: path.hardlink_to(outside),
    "fifo": lambda path, _: os.mkfifo(path),
    "directory with a file": directory_with_a_file,
}


@pytest.mark.parametrize("put", PUTS)
@pytest.mark.parametrize("name", FILES)
def test_whatever_is_in_the_place_of_a_file_is_not_followed(tmp_path: Path, name: str,
                                                            put: str) -> None:
    config_pth = make(tmp_path, b"message")
    receive_all(config_pth)
    path = tmp_path / "queue" / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    (tmp_path / "elsewhere").mkdir()
    outside = tmp_path / "elsewhere" / "outside"
    outside.write_bytes(bytes(1000))
    PUTS[put](path, outside)
    # None of them hangs either, which the end of the child says.
    outcomes = support.outcomes_in_child(*every_use(config_pth))
    assert set(outcomes) <= {"", "AccessError", "FormatError", "StoreError"}, outcomes
    # A lock, or a page that is shared, must not be in two places.
    if name not in ("reserve", "data.mdb.new", "journal"):
        # Sending needs no claims.
        assert "" not in outcomes[1 if name == "claims.lock" else 0:2]
    assert os.listdir(outside.parent) == ["outside"]
    assert outside.read_bytes() == bytes(1000)
    if put == "directory with a file" and path.is_dir() and name != "journal":
        assert os.listdir(path) in ([], ["precious"])


# Damage


def overwrite(path: Path, start: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(content)


def claim_too_much(path: Path) -> None:
    # The last page that is in use, in both meta pages.
    for page in (0, PAGE):
        overwrite(path, page + 16 + 24 + 96, struct.pack("=Q", 1 << 40))


DAMAGES: Mapping[str, Callable[[Path], object]] = {
    "empty": lambda path: os.truncate(path, 0),
    "a byte": lambda path: os.truncate(path, 1),
    "a page": lambda path: os.truncate(path, PAGE),
    "two pages": lambda path: os.truncate(path, 2 * PAGE),
    "without the last page": lambda path: os.truncate(path,
                                                      path.stat().st_size - PAGE),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "garbage": lambda path: path.write_bytes(random.Random(1).randbytes(100000)),
    "text": lambda path: path.write_bytes(b"Dear diary, today nothing happened.\n" * 1000),
    "too many pages": claim_too_much,
    "page size": lambda path: overwrite(path, 40, struct.pack("=I", 12345)),
    "version": lambda path: overwrite(path, 20, struct.pack("=I", 999)),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_damaged_store_is_refused_and_left_alone(tmp_path: Path, damage: str) -> None:
    config_pth = make(tmp_path, *[bytes(3000)] * 20)
    path = tmp_path / "queue" / "data.mdb"
    DAMAGES[damage](path)
    before = path.read_bytes()
    outcomes = support.outcomes_in_child(*every_use(config_pth))
    assert set(outcomes) <= {"StoreCorruptError", "FormatError"}, outcomes
    assert path.read_bytes() == before


@pytest.mark.parametrize("page", [0, 1])
def test_any_damaged_byte_of_a_meta_page_crashes_nothing(tmp_path: Path, page: int) -> None:
    config_pth = make(tmp_path, b"message")
    path = tmp_path / "queue" / "data.mdb"
    content = path.read_bytes()
    # Up to the size of a page: what lies behind it are the roots of the trees.
    for offset in range(page * PAGE + 16, page * PAGE + 44):
        damaged = bytearray(content)
        damaged[offset] ^= 1 << offset % 8
        path.write_bytes(damaged)
        outcome, = support.outcomes_in_child(lambda: receive_all(config_pth))
        assert outcome in ("", *errors.__all__), f"byte {offset}"


def test_damaged_lock_file_is_made_anew(tmp_path: Path) -> None:
    config_pth = make(tmp_path, b"message")
    for content in (None, b"", b"garbage" * 10000):
        path = tmp_path / "queue" / "lock.mdb"
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        assert set(support.outcomes_in_child(*every_use(config_pth)[:1])) == {""}
    assert receive_all(config_pth) == [b"message"] * 4


# What is no queue of this version


def as_of_version_1(directory: Path) -> None:
    with lmdb.open(str(directory), max_dbs=16, lib_version=0) as environment:
        meta = environment.open_db(b"meta_db", create=False)
        with environment.begin(write=True, db=meta) as txn:
            header = bytearray(txn.get(b"header", b""))
            struct.pack_into("<I", header, 8, 1)
            txn.put(b"header", bytes(header))
    shutil.rmtree(directory / "journal")
    for name in ("journal.lock", "shared", "users.lock"):
        (directory / name).unlink(missing_ok=True)
    (directory / "bell").write_bytes(bytes(PAGE))


def of_another_program(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()
    with lmdb.open(str(directory)) as environment, environment.begin(write=True) as txn:
        txn.put(b"key", b"value")


def of_another_program_with_its_databases(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()
    with lmdb.open(str(directory), max_dbs=16) as environment:
        meta = environment.open_db(b"meta_db")
        with environment.begin(write=True, db=meta) as txn:
            txn.put(b"header", b"something else")


def with_other_files(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()
    (directory / "notes.txt").write_text("precious")


def a_file(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.write_text("precious")


@pytest.mark.parametrize("change", [
    as_of_version_1, of_another_program, of_another_program_with_its_databases, with_other_files,
    a_file
],
                         ids=lambda change: change.__name__)
def test_something_else_is_refused_and_left_alone(tmp_path: Path, change: Callable[[Path],
                                                                                   None]) -> None:
    config_pth = make(tmp_path, b"message")
    directory = tmp_path / "queue"
    change(directory)
    before = support.snapshot(directory) if directory.is_dir() else directory.read_bytes()
    outcomes = support.outcomes_in_child(*every_use(config_pth))
    assert set(outcomes) == {"FormatError"}, outcomes
    assert (support.snapshot(directory) if directory.is_dir() else directory.read_bytes()) == before


def test_queue_whose_data_file_was_removed_is_not_made_again_unseen(tmp_path: Path) -> None:
    config_pth = make(tmp_path, b"message")
    (tmp_path / "queue" / "data.mdb").unlink()
    with pytest.raises(errors.NotInitializedError):
        receive_all(config_pth)
    control.initialize_all_dbs(config_pth)
    # Nothing of the journal comes back, not even after a power failure.
    stores.lose_power(tmp_path / "queue")
    assert not receive_all(config_pth)


# Rights


def test_files_are_private(tmp_path: Path) -> None:
    config_pth = support.write_config(tmp_path, path=str(tmp_path / "new" / "q"))

    def use() -> None:
        os.umask(0)
        control.initialize_all_dbs(config_pth)
        send_each(config_pth, b"message")
        receive_all(config_pth)

    assert support.outcomes_in_child(use) == [""]
    for path in [tmp_path / "new", *(tmp_path / "new").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert {path.name for path in (tmp_path / "new" / "q").iterdir()} <= set(FILES)


def test_modes_of_what_is_there_stay(tmp_path: Path) -> None:
    config_pth = support.write_config(tmp_path)
    (tmp_path / "queue").mkdir()
    (tmp_path / "queue").chmod(0o755)
    control.initialize_all_dbs(config_pth)
    data = tmp_path / "queue" / "data.mdb"
    data.chmod(0o640)
    control.initialize_all_dbs(config_pth)
    send_each(config_pth, b"message")
    assert stat.S_IMODE((tmp_path / "queue").stat().st_mode) == 0o755
    assert stat.S_IMODE(data.stat().st_mode) == 0o640


@pytest.fixture(name="open_path")
def fixture_open_path() -> Iterator[Path]:
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


def uses_of_another_user(config_pth: Path) -> list[str]:

    def drop() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    outcomes = support.outcomes_in_child(drop, *every_use(config_pth)[:5])
    assert outcomes[0] == ""
    return outcomes[1:]


def give(path: Path) -> None:
    for each in [path, *path.rglob("*")]:
        os.chown(each, NOBODY, NOBODY)


@pytest.mark.parametrize("mode", [0, 0o400])
@pytest.mark.parametrize("name", [
    ".", "data.mdb", "lock.mdb", "write.lock", "open.lock", "users.lock", "journal.lock", "shared",
    "journal", "claims.lock"
])
def test_missing_rights(open_path: Path, name: str, mode: int) -> None:
    config_pth = make(open_path, b"message")
    receive_all(config_pth)
    give(open_path / "queue")
    path = open_path / "queue" / name
    before = stat.S_IMODE(path.stat().st_mode)
    path.chmod(mode | (0o100 if path.is_dir() and mode else 0))
    outcomes = uses_of_another_user(config_pth)
    assert set(outcomes) <= {"", "AccessError"}, outcomes
    if not (name == "journal" and mode):
        # There, files are made seldom. Only receiving, and counting what is held, needs the claims.
        assert "AccessError" in (outcomes[1:] if name == "claims.lock" else outcomes[:1])
    path.chmod(before)
    assert set(uses_of_another_user(config_pth)) == {""}


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_queue_of_another_user(open_path: Path, mode: int) -> None:
    config_pth = make(open_path, b"message")
    (open_path / "queue").chmod(mode)
    assert set(uses_of_another_user(config_pth)) == {"AccessError"}
    for path in (open_path / "queue").iterdir():
        path.chmod(0o644)
    assert set(uses_of_another_user(config_pth)) == {"AccessError"}
    assert receive_all(config_pth) == [b"message"]


def test_directory_that_can_not_be_made(open_path: Path) -> None:
    above = open_path / "above"
    above.mkdir()
    above.chmod(0o555)
    give(above)
    outcomes = uses_of_another_user(support.write_config(open_path, path=str(above / "queue")))
    assert outcomes[2] == "AccessError"
    assert set(outcomes[:2] + outcomes[3:]) == {"NotInitializedError"}


# Creating


@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_many_processes_initialize_at_once(tmp_path: Path, durability: str) -> None:
    config_pth = support.write_config(tmp_path,
                                      path=str(tmp_path / "a" / "b" / "queue"),
                                      durability=durability)

    def run(pipe: support.Connection) -> None:
        pipe.recv()
        pipe.send(support.outcome(lambda: control.initialize_all_dbs(config_pth=config_pth)))
        pipe.send(support.outcome(lambda: send_each(config_pth, b"message")))

    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(support.Child(run)) for _ in range(12)]
        for child in children:
            child.pipe.send("go")
        for child in children:
            assert (child.get(), child.get()) == ("", "")
            child.end()
    # The subscriber was added only once: afterwards it would miss what was sent before.
    assert receive_all(config_pth) == [b"message"] * 12
    assert control.verify(config_pth) == {"queue": ()}


def test_creator_that_is_killed_at_any_call(tmp_path: Path) -> None:
    tracing.require()
    stride = int(os.environ.get("PERSIPUBSUB_CREATION_STRIDE", "5"))
    calls = "mkdir,rename,fsync,fdatasync,pwrite64,unlink,rmdir,flock"
    killed = 0
    for place in range(1, 200, stride):
        directory = tmp_path / str(place)
        directory.mkdir()
        config_pth = support.write_config(directory)

        def work(path: Path = config_pth) -> None:
            control.initialize_all_dbs(path)

        code = tracing.inject(
            lambda work=work: work,  # type: ignore[misc]
            calls,
            "signal=KILL",
            place)
        killed += code != 0
        opened = support.outcomes_in_child(functools.partial(send_each, config_pth, b"x"))
        assert opened in ([""], ["NotInitializedError"])
        control.initialize_all_dbs(config_pth)
        send_each(config_pth, b"message")
        assert receive_all(config_pth)[-1] == b"message"
        assert control.verify(config_pth) == {"queue": ()}
        shutil.rmtree(directory)
        if code == 0:
            break
    assert killed >= 20 // stride


# Closed streams


@pytest.mark.parametrize("numbers", [[0], [1, 2], [0, 1, 2]])
def test_what_is_printed_never_gets_into_a_queue(tmp_path: Path, numbers: list[int]) -> None:
    """Daemons close their standard streams, and the next file that is opened gets their numbers."""
    config_pth = support.write_config(tmp_path, durability="os", checkpoint_secs=0.01)
    code = """if True:
        import os, pathlib, sys
        import persipubsub.control
        from tests import support
        directory, *numbers = sys.argv[1:]
        directory, numbers = pathlib.Path(directory), [int(number) for number in numbers]
        config_pth = directory / "config.json"

        def print_something():
            # As a library in C does, or the interpreter when it crashes.
            for number in numbers:
                try:
                    os.write(number, b"Fatal error: " * 1000)
                except OSError:
                    pass

        def flush(descriptor, flush=os.fsync):
            # In the midst of writing whatever file.
            print_something()
            flush(descriptor)

        os.fsync = flush
        for number in numbers:
            os.close(number)
        persipubsub.control.initialize_all_dbs(config_pth=config_pth)
        with persipubsub.Pub("pub", config_pth) as pub:
            with persipubsub.Sub("sub", config_pth) as sub:
                pub.send(b"first")
                pub.send(b"second")
                with sub.receive(timeout=0) as message:
                    assert message == b"first"
                    print_something()
                support.queue_of(pub).secure()
                persipubsub.control.backup(config_pth, "queue", directory / "backup")
                print_something()
                found = [number for number in numbers if support.is_writable(number)]
        (directory / "found").write_text(repr(found))
        """
    done = support.run_python(code, tmp_path, *numbers)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "found").read_text() == "[]"
    assert control.verify(config_pth)["queue"] == ()
    stores.lose_power(tmp_path / "queue")
    assert receive_all(config_pth) == [b"second"]
    control.restore(config_pth, "queue", tmp_path / "backup")
    assert control.verify(config_pth)["queue"] == ()


# Settings


def test_stored_settings_count_and_the_warning_names_what_differs(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config_pth = make(tmp_path, MAX_MSGS_NUM=5, strategy="reject")
    other = support.write_config(tmp_path, name="other.json", MAX_MSGS_NUM=1000, retain_secs=7)
    with caplog.at_level(logging.WARNING, logger="persipubsub.queue"):
        send_each(other, *[b"x"] * 5)
        with pytest.raises(errors.QueueFullError):
            send_each(other, b"x")
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 1
    for name in ("high-water-mark.MAX_MSGS_NUM is 5, not 1000",
                 "high-water-mark.strategy is 'reject', not 'prune_first'",
                 "retain_secs is 0.0, not 7.0", "persipubsub init"):
        assert name in texts[0], name
    assert not control.stored_settings(config_pth, "queue")
    found = control.stored_settings(other, "queue")
    assert set(found) == {"high-water-mark.MAX_MSGS_NUM", "high-water-mark.strategy", "retain_secs"}
    assert found["retain_secs"] == (7, 0)


@pytest.mark.parametrize("is_open", [False, True])
def test_init_stores_settings_also_while_others_use_the_queue(tmp_path: Path,
                                                              caplog: pytest.LogCaptureFixture,
                                                              is_open: bool) -> None:
    config_pth = make(tmp_path, b"1", MAX_MSGS_NUM=1, strategy="reject")
    other = support.write_config(tmp_path, name="other.json", durability="os", MAX_MSGS_NUM=3)

    def run(pipe: support.Connection) -> None:
        with Pub("pub", config_pth) as pub:
            pipe.send("open")
            pipe.recv()
            # It keeps its own until it opens the queue again.
            pipe.send(support.outcome(lambda: pub.send(b"refused")))

    with support.Child(run) as child:
        assert child.get() == "open"
        if is_open:
            control.initialize_all_dbs(other)
        child.pipe.send("go")
        assert child.get() == "QueueFullError"
        child.end()
    if not is_open:
        control.initialize_all_dbs(other)
    with caplog.at_level(logging.WARNING, logger="persipubsub.queue"):
        send_each(other, b"2", b"3")
        assert caplog.records == []
        assert receive_all(other) == [b"1", b"2", b"3"]
        assert not receive_all(config_pth)
        assert "durability is 'os', not 'fsync'" in caplog.text
    assert control.verify(other) == {"queue": ()}


def test_subscribers_that_are_only_in_one_place_are_told(tmp_path: Path) -> None:
    config_pth = make(tmp_path)
    control.add_subscriber(config_pth, "queue", "late")
    found = control.stored_settings(config_pth, "queue")
    assert dict(found) == {"subscribers": (("sub", ), ("late", "sub"))}


def test_clock_goes_on_after_a_restart_of_the_machine(tmp_path: Path) -> None:
    """The clock of the kernel begins at zero then; ages must neither jump nor become negative."""
    config_pth = make(tmp_path, b"message")
    before = control.statistics(config_pth)["queue"].oldest_age_seconds
    stores.lose_power(tmp_path / "queue")
    send_each(config_pth, b"again")
    after = control.statistics(config_pth)["queue"].oldest_age_seconds
    assert before is not None and after is not None
    assert before <= after < before + support.HANG_SECS
    assert receive_all(config_pth) == [b"message", b"again"]
