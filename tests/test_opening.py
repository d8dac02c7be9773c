"""Test opening what is, was or never was a queue: nothing crashes, nothing is changed."""

# pylint: disable=missing-function-docstring
# pylint: disable=protected-access

import contextlib
import functools
import os
import pathlib
import random
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator

import lmdb
import pytest

import persipubsub.control
import persipubsub.errors
import persipubsub.publisher
import persipubsub.queue
import persipubsub.subscriber
from persipubsub.environment import _files, _opening
from persipubsub.store import _clock, _layout
from tests import support

PAGE = 4096
ANOTHER_BOOT = b"another boot----"


def send(config_pth: pathlib.Path, *messages: bytes) -> None:
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)
        for message in messages:
            pub.send(msg=message)


def receive_all(config_pth: pathlib.Path) -> list[bytes]:
    result: list[bytes] = []
    with persipubsub.subscriber.Sub() as sub:
        sub.init(sub_id="sub", config_pth=config_pth)
        while True:
            with sub.receive(timeout=0) as message:
                if message is None:
                    return result
                result.append(message)


def open_and_close(config_pth: pathlib.Path) -> None:
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)


def check(config_pth: pathlib.Path) -> None:
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        assert not queue.check()


def every_use(config_pth: pathlib.Path) -> list[str]:
    """Open the queue in each possible way, in a process that may crash; return the errors."""
    return support.outcomes_in_child(
        lambda: open_and_close(config_pth), lambda: receive_all(config_pth),
        lambda: persipubsub.control.initialize_all_dbs(config_pth=config_pth),
        lambda: persipubsub.control.prune_dangling_messages(config_pth=config_pth),
        lambda: persipubsub.control.clear_all_subs(config_pth=config_pth))


# Damage


def truncate(path: pathlib.Path, size: int) -> None:
    os.truncate(path, size)


def cut_in_half(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_a_page(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size - PAGE)


def overwrite(path: pathlib.Path, start: int, content: bytes) -> None:
    with open(path, "r+b") as fid:
        fid.seek(start)
        fid.write(content)


def overwrite_all(path: pathlib.Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    path.write_bytes(random.Random(seed).randbytes(path.stat().st_size))


def write_text(path: pathlib.Path) -> None:
    path.write_text("Dear diary, today nothing happened.\n" * 1000, encoding="utf-8")


def claim_too_much(path: pathlib.Path) -> None:
    # The last page that is in use, in both meta pages.
    for page in (0, PAGE):
        overwrite(path, page + 16 + 24 + 96, struct.pack("=Q", 1 << 40))


def set_format(path: pathlib.Path, number: int) -> None:
    with lmdb.open(str(path.parent), max_dbs=16, lib_version=0) as environment:
        meta = environment.open_db(_layout.META_DB, create=False)
        with environment.begin(write=True, db=meta) as txn:
            header = bytearray(txn.get(_layout.HEADER_KEY, b""))
            struct.pack_into("<I", header, 8, number)
            txn.put(_layout.HEADER_KEY, bytes(header))


def use_newer_engine(path: pathlib.Path) -> None:
    for name in (_files.DATA, _files.LOCK):
        (path.parent / name).unlink()
    with lmdb.open(str(path.parent), max_dbs=16, lib_version=1) as environment:
        environment.open_db(b"data_db")


DAMAGES: dict[str, tuple[Callable[[pathlib.Path], None], str]] = {
    "0 bytes": (functools.partial(truncate, size=0), "StoreCorruptError"),
    "1 byte": (functools.partial(truncate, size=1), "StoreCorruptError"),
    "1 page": (functools.partial(truncate, size=PAGE), "StoreCorruptError"),
    "2 pages": (functools.partial(truncate, size=2 * PAGE), "StoreCorruptError"),
    "half": (cut_in_half, "StoreCorruptError"),
    "minus a page": (cut_a_page, "StoreCorruptError"),
    "zeros in meta page 0": (functools.partial(overwrite, start=0,
                                               content=bytes(PAGE)), "StoreCorruptError"),
    "zeros in meta page 1": (functools.partial(overwrite, start=PAGE,
                                               content=bytes(PAGE)), "StoreCorruptError"),
    "zeros in both": (functools.partial(overwrite, start=0,
                                        content=bytes(2 * PAGE)), "StoreCorruptError"),
    "garbage": (overwrite_all, "FormatError"),
    "text": (write_text, "FormatError"),
    "last page far away": (claim_too_much, "StoreCorruptError"),
    "format 0": (functools.partial(set_format, number=0), "FormatError"),
    "format 99": (functools.partial(set_format, number=99), "FormatError"),
    "newer engine": (use_newer_engine, "FormatError"),
}


@pytest.mark.parametrize("durability", ["fsync", "os"])
@pytest.mark.parametrize("has_lock", [True, False], ids=["lock", "no lock"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_and_left_alone(tmp_path: pathlib.Path, damage: str, has_lock: bool,
                                          durability: str) -> None:
    config_pth = support.write_config(tmp_path, durability=durability)

    def prepare() -> None:
        persipubsub.control.initialize_all_dbs(config_pth=config_pth)
        # The last one needs pages of its own, so that the end of the file is in use.
        send(config_pth, *(bytes(1000) for _ in range(30)), bytes(30 * PAGE))

    assert support.outcomes_in_child(prepare) == [""]
    directory = tmp_path / "queue"
    data = directory / _files.DATA
    apply, expected = DAMAGES[damage]
    apply(data)
    if not has_lock:
        (directory / _files.LOCK).unlink(missing_ok=True)

    before = support.snapshot(directory)
    assert every_use(config_pth) == [expected] * 5
    after = support.snapshot(directory)
    # LMDB itself initializes its lock file; who wrote the data is only known after that.
    after.pop(_files.LOCK, None)
    before.pop(_files.LOCK, None)
    assert after == before


def fill_foreign(directory: pathlib.Path, names: list[bytes]) -> None:
    directory.mkdir()
    with lmdb.open(str(directory), max_dbs=16, lib_version=0) as environment:
        with environment.begin(write=True) as txn:
            txn.put(b"key", b"value")
        for name in names:
            with environment.begin(write=True, db=environment.open_db(name)) as txn:
                txn.put(b"key", b"value")


OUR_NAMES = [_layout.DATA_DB, _layout.PENDING_DB, _layout.META_DB, b"ahead_db"]


@pytest.mark.parametrize("has_lock", [True, False], ids=["lock", "no lock"])
@pytest.mark.parametrize("names", [[], [b"users"], OUR_NAMES[:2], OUR_NAMES],
                         ids=["none", "other", "some of ours", "ours"])
def test_environment_of_another_program(tmp_path: pathlib.Path, names: list[bytes],
                                        has_lock: bool) -> None:
    config_pth = support.write_config(tmp_path)
    directory = tmp_path / "queue"
    fill_foreign(directory, names)
    if not has_lock:
        (directory / _files.LOCK).unlink()
    # Under names that we use as well.
    (directory / (f"{_files.DATA}.new")).write_bytes(b"all my work")
    (directory / _files.CREATING).mkdir()
    before = support.snapshot(directory)
    assert every_use(config_pth) == ["FormatError"] * 5
    for end in (persipubsub.control.drop_queue, persipubsub.control.compact):
        with pytest.raises(persipubsub.errors.FormatError):
            end(config_pth=config_pth, queue_key="queue")
    after = support.snapshot(directory)
    assert (_files.LOCK in after) == has_lock, "Expected no lock file beside another's data."
    for found in (before, after):
        for name in (_files.LOCK, _files.OPEN_GATE):
            found.pop(name, None)
    assert after == before
    assert (directory / _files.CREATING).is_dir()
    with lmdb.open(str(directory), max_dbs=16, lib_version=0) as environment:
        with environment.begin() as txn:
            assert txn.get(b"key") == b"value"


def test_value_of_another_program_in_the_place_of_a_database(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path)
    (tmp_path / "queue").mkdir()
    with lmdb.open(str(tmp_path / "queue"), max_dbs=16, lib_version=0) as environment:
        with environment.begin(write=True) as txn:
            txn.put(b"data_db", b"value")
    assert every_use(config_pth) == ["FormatError"] * 5
    (tmp_path / "queue" / _files.LOCK).unlink()
    assert every_use(config_pth) == ["FormatError"] * 5


@pytest.mark.parametrize("kind", ["directory with files", "text file", "dangling link"])
def test_something_else_is_there(tmp_path: pathlib.Path, kind: str) -> None:
    config_pth = support.write_config(tmp_path)
    path = tmp_path / "queue"
    if kind == "directory with files":
        path.mkdir()
        (path / "thesis.txt").write_bytes(b"all my work")
    elif kind == "text file":
        path.write_bytes(b"all my work")
    else:
        path.symlink_to(tmp_path / "nowhere")

    assert every_use(config_pth) == ["FormatError"] * 5
    if kind == "directory with files":
        assert support.snapshot(path) == {"thesis.txt": b"all my work"}
    elif kind == "text file":
        assert path.read_bytes() == b"all my work"
    else:
        assert not path.exists()


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_data_file_with_two_names(tmp_path: pathlib.Path, kind: str) -> None:
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    send(config_pth, b"message")
    original = tmp_path / "queue" / _files.DATA
    other = tmp_path / "other"
    other.mkdir()
    other_config = support.write_config(tmp_path, name="other.json", path=str(other))
    if kind == "symbolic":
        (other / _files.DATA).symlink_to(original)
    else:
        os.link(original, other / _files.DATA)

    before = original.read_bytes()
    assert every_use(other_config) == ["FormatError"] * 5
    assert original.read_bytes() == before
    if kind == "hard":
        assert every_use(config_pth) == ["FormatError"] * 5
        (other / _files.DATA).unlink()
    assert receive_all(config_pth) == [b"message"]


@pytest.mark.parametrize("name", [_files.LOCK, _files.WRITE_GATE, _files.OPEN_GATE, _files.USERS])
def test_lock_file_that_was_deleted_or_is_garbage(tmp_path: pathlib.Path, name: str) -> None:
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    send(config_pth, b"message")
    path = tmp_path / "queue" / name
    path.unlink()
    assert support.outcomes_in_child(lambda: send(config_pth, b"again")) == [""]
    path.write_bytes(b"\xff" * 10000)
    assert support.outcomes_in_child(lambda: send(config_pth, b"and again")) == [""]
    assert receive_all(config_pth) == [b"message", b"again", b"and again"]


def test_any_damaged_byte_of_a_meta_page_crashes_nothing(tmp_path: pathlib.Path) -> None:
    rounds = int(os.environ.get("PERSIPUBSUB_DAMAGE_ROUNDS", "40"))
    seed = random.randrange(1 << 32)
    print("seed", seed)
    generator = random.Random(seed)
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    send(config_pth, *(bytes(1000) for _ in range(30)))
    data = tmp_path / "queue" / _files.DATA
    sound = data.read_bytes()

    # Everything up to the size of a page: what lies behind it is the roots of the trees.
    for _ in range(rounds):
        damaged = bytearray(sound)
        for page in (0, PAGE):
            damaged[page + 16 + generator.randrange(28)] ^= 1 << generator.randrange(8)
        data.write_bytes(damaged)
        results = every_use(config_pth)[:2]
        allowed = {"", "FormatError", "StoreCorruptError", "StoreError", "AccessError"}
        assert set(results) <= allowed, (results, [
            index for index in range(2 * PAGE) if damaged[index] != sound[index]
        ])


# Creation


def test_modes(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, durability="os", path=str(tmp_path / "new" / "q"))

    def use() -> None:
        os.umask(0)
        persipubsub.control.initialize_all_dbs(config_pth=config_pth)
        send(config_pth, b"message")
        receive_all(config_pth)

    assert support.outcomes_in_child(use) == [""]
    for directory in (tmp_path / "new", tmp_path / "new" / "q"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    names = set()
    for path in (tmp_path / "new" / "q").iterdir():
        names.add(path.name)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert {_files.DATA, _files.LOCK, _files.WRITE_GATE, _files.OPEN_GATE, _files.USERS} <= names
    assert names <= _files.OWN | {f"{name}.new" for name in _files.OWN} | {"checkpoint"}


def test_modes_of_what_is_there_stay(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path)
    (tmp_path / "queue").mkdir()
    (tmp_path / "queue").chmod(0o755)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    data = tmp_path / "queue" / _files.DATA
    data.chmod(0o640)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    send(config_pth, b"message")
    assert stat.S_IMODE((tmp_path / "queue").stat().st_mode) == 0o755
    assert stat.S_IMODE(data.stat().st_mode) == 0o640


@pytest.mark.parametrize("leftover", ["empty", "data", "text", "both"])
def test_leftover_of_a_killed_creator(tmp_path: pathlib.Path, leftover: str) -> None:
    config_pth = support.write_config(tmp_path)
    aside = tmp_path / "queue" / _files.CREATING
    aside.mkdir(parents=True)
    if leftover in ("data", "both"):
        (aside / _files.DATA).write_bytes(bytes(5000))
    if leftover in ("text", "both"):
        (aside / _files.LOCK).write_bytes(b"text")
    assert support.outcomes_in_child(lambda: send(config_pth, b"early")) == ["NotInitializedError"]
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    assert not aside.exists()
    send(config_pth, b"message")
    assert receive_all(config_pth) == [b"message"]


def test_leftover_that_is_a_link_deletes_nothing(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_bytes(b"all my work")
    (tmp_path / "queue").mkdir()
    (tmp_path / "queue" / _files.CREATING).symlink_to(precious)
    with pytest.raises(persipubsub.errors.PersipubsubError):
        persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    assert (precious / "thesis.txt").read_bytes() == b"all my work"


def trace(config_pth: pathlib.Path, output: pathlib.Path, calls: str, *options: str) -> int:
    done = support.run_python(
        "import sys, persipubsub.control\n"
        "persipubsub.control.initialize_all_dbs(config_pth=sys.argv[1])",
        config_pth,
        prefix=["strace", "-f", "-y", "-o",
                str(output), "-e", f"trace={calls}", *options])
    return done.returncode


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is needed to see the flushes")
def test_creation_is_flushed(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path)
    output = tmp_path / "trace"
    assert trace(config_pth, output, "mkdir,rename,fsync,fdatasync,msync") == 0
    lines = output.read_text("utf-8").splitlines()
    directory = str(tmp_path / "queue")

    def places(*parts: str) -> list[int]:
        return [index for index, line in enumerate(lines) if all(part in line for part in parts)]

    made = places("mkdir(", f'"{directory}"')[0]
    assert any(place > made for place in places("fsync(", f"<{tmp_path}>"))
    renamed = places("rename(", f"{directory}/{_files.DATA}")[0]
    assert any(place < renamed for place in places("sync(", "/creating/data.mdb>"))
    assert any(place > renamed for place in places("fsync(", f"<{directory}>"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is needed to kill at a call")
def test_creator_killed_at_any_call(tmp_path: pathlib.Path) -> None:
    stride = int(os.environ.get("PERSIPUBSUB_CREATION_STRIDE", "3"))
    calls = "mkdir,rename,fsync,fdatasync,ftruncate,pwrite64,pwritev,unlink,rmdir,flock"
    killed = 0
    for place in range(1, 200, stride):
        directory = tmp_path / str(place)
        directory.mkdir()
        config_pth = support.write_config(directory)
        code = trace(config_pth, tmp_path / "trace", calls, "-e",
                     f"inject={calls}:signal=KILL:when={place}")
        killed += code != 0
        opened = support.outcomes_in_child(lambda path=config_pth: send(path, b"x"))  # type: ignore
        assert opened in ([""], ["NotInitializedError"])
        persipubsub.control.initialize_all_dbs(config_pth=config_pth)
        send(config_pth, b"message")
        assert receive_all(config_pth)[-1] == b"message"
        check(config_pth)
        shutil.rmtree(directory)
        if code == 0:
            break
    assert killed >= 10 // stride


def test_gate_that_is_removed_while_somebody_waits_for_it(tmp_path: pathlib.Path) -> None:
    """As drop-queue does it: the next ones would pass another gate at the same time."""
    options = support.settings(support.write_config(tmp_path)).options()
    path = str(tmp_path)

    def wait(pipe: support.Connection) -> None:
        pipe.send("waiting")
        with _opening.open_gate(path, options):
            pipe.send("in")
            pipe.recv()

    file = tmp_path / _files.OPEN_GATE
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(_opening.open_gate(path, options))
        child = second.enter_context(support.Child(wait))
        assert child.get() == "waiting"
        # Whoever tried in vain leaves a mark in the file.
        support.until(lambda: file.read_bytes()[0], "the other process waits")
        file.unlink()
        with _opening.open_gate(path, options):
            first.close()
            support.until(lambda: child.pipe.poll() or file.read_bytes()[0], "it goes on")
            assert not child.pipe.poll(), "Expected one of us in the gate, but got: both."
        assert child.get() == "in"
        child.pipe.send("leave")
        child.end()


@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_many_processes_initialize_at_once(tmp_path: pathlib.Path, durability: str) -> None:
    config_pth = support.write_config(tmp_path,
                                      path=str(tmp_path / "a" / "b" / "queue"),
                                      durability=durability)

    def run(pipe: support.Connection) -> None:
        pipe.recv()
        pipe.send(
            support.outcome(lambda: persipubsub.control.initialize_all_dbs(config_pth=config_pth)))
        pipe.send(support.outcome(lambda: send(config_pth, b"message")))

    children = [support.Child(run) for _ in range(20)]
    try:
        for child in children:
            child.pipe.send("go")
        for child in children:
            assert (child.get(), child.get()) == ("", "")
            child.end()
    finally:
        for child in children:
            child.__exit__()
    # The subscriber was added only once: afterwards it would miss what was sent before.
    assert receive_all(config_pth) == [b"message"] * 20
    check(config_pth)
    assert not (tmp_path / "a" / "b" / "queue" / _files.CREATING).exists()


# Durability


def mark_of(directory: pathlib.Path) -> pathlib.Path:
    return directory / "queue" / _files.RUNNING


def opener(pipe: support.Connection, config_pth: pathlib.Path) -> None:
    """Open the queue, and close it when told."""
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)
        pipe.send("open")
        pipe.recv()
    pipe.send("closed")
    pipe.recv()


def test_another_durability_is_refused(tmp_path: pathlib.Path) -> None:
    on_disk = support.write_config(tmp_path, name="fsync.json")
    in_system = support.write_config(tmp_path, name="os.json", durability="os")
    for made, other in ((on_disk, in_system), (in_system, on_disk)):
        persipubsub.control.initialize_all_dbs(config_pth=made)
        send(made, b"message")
        with pytest.raises(persipubsub.errors.ConfigError, match="'(os|fsync)'.*initialize"):
            send(other, b"refused")
        with persipubsub.publisher.Pub() as pub:
            pub.init(pub_id="pub", config_pth=made)
            with pytest.raises(persipubsub.errors.ConfigError, match="one durability"):
                send(other, b"refused")
            with pytest.raises(persipubsub.errors.PersipubsubError):
                persipubsub.control.initialize_all_dbs(config_pth=other)
            pub.send(b"message")
        assert receive_all(made) == [b"message"] * 2


@pytest.mark.parametrize("first, then", [("fsync", "os"), ("os", "fsync")])
def test_durability_is_changed_when_nobody_uses_it(tmp_path: pathlib.Path, first: str,
                                                   then: str) -> None:
    made = support.write_config(tmp_path, name="first.json", durability=first)
    other = support.write_config(tmp_path, name="then.json", durability=then)
    persipubsub.control.initialize_all_dbs(config_pth=made)
    send(made, b"message")
    before = support.snapshot(tmp_path / "queue")[_files.DATA]
    with support.Child(opener, made) as child:
        assert child.get() == "open"
        with pytest.raises(persipubsub.errors.QueueInUseError, match="no other process"):
            persipubsub.control.initialize_all_dbs(config_pth=other)
        assert support.snapshot(tmp_path / "queue")[_files.DATA] == before
        child.pipe.send("close")
        assert child.get() == "closed"
        persipubsub.control.initialize_all_dbs(config_pth=other)
        child.pipe.send("end")
        child.end()
    with pytest.raises(persipubsub.errors.ConfigError):
        send(made, b"refused")
    send(other, b"again")
    assert receive_all(other) == [b"message", b"again"]
    assert not mark_of(tmp_path).exists()


def test_killed_user_does_not_count(tmp_path: pathlib.Path) -> None:
    made = support.write_config(tmp_path, name="first.json", durability="os")
    other = support.write_config(tmp_path, name="then.json", durability="fsync")
    persipubsub.control.initialize_all_dbs(config_pth=made)
    with support.Child(opener, made) as child:
        assert child.get() == "open"
        child.kill(9)
        child.end(-9)
    persipubsub.control.initialize_all_dbs(config_pth=other)
    assert not mark_of(tmp_path).exists()


def test_last_user_takes_the_mark_away(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, durability="os")
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    assert not mark_of(tmp_path).exists()
    with support.Child(opener, config_pth) as first, support.Child(opener, config_pth) as second:
        assert (first.get(), second.get()) == ("open", "open")
        assert mark_of(tmp_path).read_bytes() == _clock.boot_id()
        first.pipe.send("close")
        assert first.get() == "closed"
        assert mark_of(tmp_path).read_bytes() == _clock.boot_id()
        with persipubsub.publisher.Pub() as pub:
            pub.init(pub_id="pub", config_pth=config_pth)
            second.pipe.send("close")
            assert second.get() == "closed"
            assert mark_of(tmp_path).exists()
        assert not mark_of(tmp_path).exists()


def test_mark_is_removed_after_the_flush(tmp_path: pathlib.Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is needed to see the flushes")
    config_pth = support.write_config(tmp_path, durability="os", checkpoint_secs=0)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    output = tmp_path / "trace"
    done = support.run_python("""if True:
        import os, sys
        import persipubsub.publisher
        pub = persipubsub.publisher.Pub()
        pub.init(pub_id="pub", config_pth=sys.argv[1])
        pub.send(b"message")
        os.write(2, b"sent")
        pub.close()
        """,
                              config_pth,
                              prefix=[
                                  "strace", "-f", "-y", "-o",
                                  str(output), "-e", "trace=fsync,fdatasync,unlink,write"
                              ])
    assert done.returncode == 0, done.stderr
    lines = output.read_text("utf-8").splitlines()
    sent = [index for index, line in enumerate(lines) if '"sent"' in line][0]
    assert not any("data.mdb>" in line and "sync(" in line for line in lines[:sent])
    rest = [line for line in lines[sent:] if "sync(" in line or "unlink(" in line]
    places = [
        next(index for index, line in enumerate(rest) if part in line)
        for part in ("data.mdb>", "unlink(", "fsync(")
    ]
    unlinked = places[1]
    assert "/running" in rest[unlinked]
    assert places[0] < unlinked
    assert any("/queue>" in line for line in rest[unlinked:])


@pytest.mark.parametrize("is_damaged", [False, True])
def test_unclean_store_of_another_boot(tmp_path: pathlib.Path, is_damaged: bool) -> None:
    config_pth = support.write_config(tmp_path, durability="os", checkpoint_secs=0)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    send(config_pth, *(bytes([number]) * 3000 for number in range(20)))
    mark_of(tmp_path).write_bytes(ANOTHER_BOOT + b"without")
    data = tmp_path / "queue" / _files.DATA
    if is_damaged:
        # As many bytes as before, but the pages never reached the disk.
        with lmdb.open(str(tmp_path / "queue"), max_dbs=16, readonly=True, lib_version=0) as env:
            with env.begin() as txn:
                last = txn.stat(env.open_db(_layout.DATA_DB, txn=txn, create=False))
        assert last["leaf_pages"] > 0
        size = data.stat().st_size
        overwrite(data, 2 * PAGE, bytes(size - 2 * PAGE))
    before = support.snapshot(tmp_path / "queue")

    results = every_use(config_pth)
    if is_damaged:
        assert results == ["StoreCorruptError"] * 5
        after = support.snapshot(tmp_path / "queue")
        assert after[_files.DATA] == before[_files.DATA]
        assert after[_files.RUNNING] == ANOTHER_BOOT + b"without"
    else:
        assert results == [""] * 5
        assert not mark_of(tmp_path).exists()


def test_checkpoint_takes_the_place_for_all_users(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, durability="os")
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    send(config_pth, b"message")
    with support.Child(opener, config_pth) as child:
        assert child.get() == "open"
        child.kill(9)
        child.end(-9)
    mark_of(tmp_path).write_bytes(ANOTHER_BOOT)

    def use() -> None:
        with persipubsub.publisher.Pub() as pub, persipubsub.subscriber.Sub() as sub:
            pub.init(pub_id="pub", config_pth=config_pth)
            sub.init(sub_id="sub", config_pth=config_pth)
            pub.send(msg=b"again")
            for expected in (b"message", b"again"):
                with sub.receive(timeout=0) as message:
                    assert message == expected

    use()
    check(config_pth)


def test_mark_of_this_boot_needs_no_check(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, durability="os")
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    with support.Child(opener, config_pth) as child:
        assert child.get() == "open"
        child.kill(9)
        child.end(-9)
    assert mark_of(tmp_path).read_bytes() == _clock.boot_id()
    send(config_pth, b"message")
    assert receive_all(config_pth) == [b"message"]
    assert not mark_of(tmp_path).exists()


# Rights

NOBODY = 65534


@pytest.fixture(name="open_path")
def fixture_open_path() -> Iterator[pathlib.Path]:
    """Give a directory whose parents everybody may enter."""
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name)
        path.chmod(0o755)
        yield path
        for each in path.rglob("*"):
            if each.is_dir():
                each.chmod(0o700)


def uses_of_an_unprivileged_process(config_pth: pathlib.Path) -> list[str]:

    def drop() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        else:
            raise LookupError("It has no privileges that it could give up.")

    results = support.outcomes_in_child(
        drop, lambda: send(config_pth, b"message"), lambda: receive_all(config_pth),
        lambda: persipubsub.control.initialize_all_dbs(config_pth=config_pth),
        lambda: persipubsub.control.prune_dangling_messages(config_pth=config_pth),
        lambda: persipubsub.control.clear_all_subs(config_pth=config_pth))
    assert results[0] in ("", "LookupError")
    return results[1:]


def give(path: pathlib.Path) -> None:
    """Let the files belong to the unprivileged process; they do if this one is unprivileged."""
    if os.getuid() == 0:
        for each in [path, *path.iterdir()]:
            os.chown(each, NOBODY, NOBODY)


@pytest.mark.parametrize("kind", [
    "all modes 0444", "data mode 0444", "lock mode 0444", "gate mode 0444", "claims mode 0000",
    "bell mode 0000", "directory mode 0000", "directory mode 0444", "all modes 0000"
])
def test_missing_rights(open_path: pathlib.Path, kind: str) -> None:
    config_pth = support.write_config(open_path)
    directory = open_path / "queue"

    def prepare() -> None:
        persipubsub.control.initialize_all_dbs(config_pth=config_pth)
        send(config_pth, b"message")
        receive_all(config_pth)

    assert support.outcomes_in_child(prepare) == [""]
    give(directory)
    which, _, mode = kind.rpartition(" ")
    files = {
        "all modes": list(directory.iterdir()),
        "data mode": [directory / _files.DATA],
        "lock mode": [directory / _files.LOCK],
        "gate mode": [directory / _files.WRITE_GATE],
        "claims mode": [directory / _files.CLAIMS],
        "bell mode": [directory / _files.BELL],
        "directory mode": [directory],
    }[which]
    for path in files:
        path.chmod(int(mode, 8))
    results = uses_of_an_unprivileged_process(config_pth)
    if which == "bell mode":
        # Without the bell, subscribers look from time to time.
        assert set(results) == {""}, results
    elif which == "claims mode":
        # Only receiving needs them.
        assert results == ["", "AccessError", "", "", ""]
    else:
        assert set(results) == {"AccessError"}, results
    for path in files:
        path.chmod(0o700)
    assert set(uses_of_an_unprivileged_process(config_pth)) == {""}


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_queue_of_another_owner(open_path: pathlib.Path, mode: int) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can make a queue of another owner")
    config_pth = support.write_config(open_path)
    assert support.outcomes_in_child(
        lambda: persipubsub.control.initialize_all_dbs(config_pth=config_pth)) == [""]
    (open_path / "queue").chmod(mode)
    assert set(uses_of_an_unprivileged_process(config_pth)) == {"AccessError"}
    for path in (open_path / "queue").iterdir():
        path.chmod(0o644)
    assert set(uses_of_an_unprivileged_process(config_pth)) == {"AccessError"}


def test_directory_that_can_not_be_made(open_path: pathlib.Path) -> None:
    above = open_path / "above"
    above.mkdir()
    give(above)
    above.chmod(0o555)
    config_pth = support.write_config(open_path, path=str(above / "queue"))
    results = uses_of_an_unprivileged_process(config_pth)
    assert results[2] == "AccessError"
    assert set(results[:2] + results[3:]) == {"NotInitializedError"}


def test_directory_that_is_read_only(open_path: pathlib.Path) -> None:
    config_pth = support.write_config(open_path)
    (open_path / "queue").mkdir()
    give(open_path / "queue")
    (open_path / "queue").chmod(0o555)
    results = uses_of_an_unprivileged_process(config_pth)
    assert results[2] == "AccessError"
    assert set(results[:2] + results[3:]) == {"NotInitializedError"}


# Full disk


@pytest.mark.parametrize("deleted", ["", _files.LOCK, _files.WRITE_GATE, _files.USERS])
def test_full_disk_kills_nobody(tmp_path: pathlib.Path, deleted: str) -> None:
    code = """if True:
        import errno, os, pathlib, subprocess, sys
        import persipubsub.control, persipubsub.errors
        from persipubsub.environment import _registry
        from tests import support, test_opening

        directory = pathlib.Path(sys.argv[1])
        subprocess.check_call(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(directory)])
        config_pth = support.write_config(directory, max_reader_num=1024)
        persipubsub.control.initialize_all_dbs(config_pth)
        test_opening.send(config_pth, b"first")
        if sys.argv[2]:
            (directory / "queue" / sys.argv[2]).unlink()
        with open(directory / "full", "wb", buffering=0) as fid:
            try:
                while True:
                    fid.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC
        outcomes = []
        outcomes.append(support.outcome(lambda: test_opening.send(config_pth, bytes(100000))))

        def read_many_times():
            environment = _registry.acquire(
                str(directory / "queue"), support.settings(config_pth).options())
            handle = environment._handles.environment
            transactions = [handle.begin() for _ in range(600)]
            for transaction in transactions:
                transaction.abort()
            _registry.release(environment)

        outcomes.append(support.outcome(read_many_times))
        (directory / "full").unlink()
        test_opening.send(config_pth, b"last")
        print(*outcomes, test_opening.receive_all(config_pth))
        """
    namespace = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run(
            namespace + ["true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("user namespaces are needed for a small disk")
    done = support.run_python(code, tmp_path, deleted, prefix=namespace)
    assert done.returncode == 0, done.stderr
    expected = "DiskFullError"
    if deleted in (_files.LOCK, _files.WRITE_GATE):
        expected = "DiskFullError DiskFullError"
    assert done.stdout.split("[")[0].split() == expected.split(), done.stdout
    assert done.stdout.endswith("[b'first', b'last']\n")


def test_options_name_what_is_too_long_ago(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, busy_timeout_secs=0.2)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    settings = support.settings(config_pth)
    with _opening.open_gate(settings.path, settings.options()):
        assert support.outcomes_in_child(
            lambda: send(config_pth, b"message"),
            lambda: receive_all(config_pth)) == ["BusyTimeoutError"] * 2
    assert not receive_all(config_pth)


@pytest.mark.parametrize("numbers", [[0, 1, 2], [1], [2], [0]])
@pytest.mark.parametrize("closed", ["at first", "initialized", "open", "before a backup"])
def test_what_is_printed_never_gets_into_a_queue(tmp_path: pathlib.Path, numbers: list[int],
                                                 closed: str) -> None:
    """Daemons close their standard streams, and the next file that is opened gets their numbers."""
    config_pth = support.write_config(tmp_path, durability="os", checkpoint_secs=0.01)
    code = """if True:
        import os, pathlib, sys
        import persipubsub.control
        from tests import support, test_opening
        directory, closed, *numbers = sys.argv[1:]
        directory, numbers = pathlib.Path(directory), [int(number) for number in numbers]
        config_pth, checkpoint = directory / "config.json", directory / "queue" / "checkpoint.mdb"
        closed_now = []

        def close(when):
            if when == closed:
                for number in numbers:
                    os.close(number)
                    closed_now.append(number)

        def print_something():
            # As a library in C does, or the interpreter when it crashes.
            for number in closed_now:
                try:
                    os.write(number, b"Fatal error: " * 1000)
                except OSError:
                    pass

        def flush(descriptor, flush=os.fsync):
            # In the midst of writing whatever file.
            print_something()
            flush(descriptor)

        os.fsync = flush
        close("at first")
        persipubsub.control.initialize_all_dbs(config_pth=config_pth)
        close("initialized")
        with persipubsub.publisher.Pub() as pub, persipubsub.subscriber.Sub() as sub:
            pub.init(pub_id="pub", config_pth=config_pth)
            pub.send(b"first")
            close("open")
            sub.init(sub_id="sub", config_pth=config_pth)
            before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
            pub.send(b"second")
            support.until(lambda: checkpoint.exists() and checkpoint.stat().st_mtime_ns > before,
                          "a checkpoint")
            with sub.receive(timeout=0) as message:
                assert message == b"first"
                print_something()
            close("before a backup")
            persipubsub.control.backup(config_pth, "queue", directory / "backup")
            print_something()
            found = [number for number in numbers if support.is_writable(number)]
        (directory / "found").write_text(repr(found))
        """
    done = support.run_python(code, tmp_path, closed, *numbers)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "found").read_text() == "[]"
    assert persipubsub.control.verify(config_pth)["queue"] == ()
    assert receive_all(config_pth) == [b"second"]
    for copy in tmp_path / "backup", tmp_path / "queue" / _files.CHECKPOINT:
        persipubsub.control.restore(config_pth, "queue", copy)
        assert persipubsub.control.verify(config_pth)["queue"] == ()


def test_queue_opens_with_nothing_in_place_of_closed_streams(tmp_path: pathlib.Path) -> None:
    """Nor are descriptors used up."""
    config_pth = support.write_config(tmp_path)
    done = support.run_python(
        """if True:
        import os, sys
        from tests import test_opening
        import persipubsub.control
        real = os.open
        os.open = lambda path, *rest: real(path if path != "/" else "/missing", *rest)
        os.close(0)
        before = len(os.listdir("/proc/self/fd"))
        persipubsub.control.initialize_all_dbs(config_pth=sys.argv[1])
        test_opening.send(sys.argv[1], b"first")
        print(test_opening.receive_all(sys.argv[1]), len(os.listdir("/proc/self/fd")) - before)
        """, config_pth)
    assert (done.returncode, done.stdout) == (0, "[b'first'] 0\n"), done.stderr
