"""Test what is done with the files of a queue before and beside LMDB."""

# pylint: disable=missing-function-docstring
# pylint: disable=protected-access

import errno
import os
import pathlib
import random
import re
import shutil
import stat
import struct
import threading

import lmdb
import pytest

import persipubsub.errors
from persipubsub.environment import _files
from persipubsub.store import _clock
from tests import support


def make_data_file(directory: pathlib.Path) -> pathlib.Path:
    """Create a sound LMDB environment whose last page is in use."""
    with lmdb.open(str(directory), map_size=1 << 20, lib_version=0) as environment:
        with environment.begin(write=True) as txn:
            txn.put(b"key", b"v" * (10 * 4096 - 16))
    return directory / _files.DATA


@pytest.mark.parametrize("number, expected", [
    (errno.EACCES, persipubsub.errors.AccessError),
    (errno.EPERM, persipubsub.errors.AccessError),
    (errno.EROFS, persipubsub.errors.AccessError),
    (errno.ENOSPC, persipubsub.errors.DiskFullError),
    (errno.EDQUOT, persipubsub.errors.DiskFullError),
    (errno.EFBIG, persipubsub.errors.DiskFullError),
    (errno.ENOENT, persipubsub.errors.NotInitializedError),
    (errno.ENOTDIR, persipubsub.errors.NotInitializedError),
    (errno.EIO, persipubsub.errors.StoreError),
    (errno.EMFILE, persipubsub.errors.StoreError),
])
def test_errors_of_the_system_are_translated(
        number: int, expected: type[persipubsub.errors.PersipubsubError]) -> None:
    with pytest.raises(persipubsub.errors.PersipubsubError) as caught:
        with _files.translated(path="/somewhere", doing="open"):
            raise OSError(number, os.strerror(number))
    assert caught.type is expected
    assert isinstance(caught.value.__cause__, OSError)
    assert str(caught.value) == f"Expected to open /somewhere, but got: {os.strerror(number)}"


@pytest.mark.parametrize("mask", [0o000, 0o022])
def test_directories_are_private_unless_they_exist(tmp_path: pathlib.Path, mask: int) -> None:
    there = tmp_path / "there"
    there.mkdir()
    there.chmod(0o755)
    path = there / "one" / "two"

    def run(pipe: support.Connection) -> None:
        os.umask(mask)
        _files.make_directories(str(path))
        _files.make_directories(str(path))
        descriptor = _files.open_own_file(str(path / "bell"))
        os.close(descriptor)
        _files.write_durably(str(path / "running"), b"content")
        pipe.send(None)

    with support.Child(run) as child:
        child.get()
        child.end()

    modes = [stat.S_IMODE(each.stat().st_mode) for each in (there, path.parent, path)]
    assert modes == [0o755, 0o700, 0o700]
    for name in ("bell", "running"):
        assert stat.S_IMODE((path / name).stat().st_mode) == 0o600


def test_directories_are_made_by_many_at_once(tmp_path: pathlib.Path) -> None:
    errors: list[BaseException] = []
    barrier = threading.Barrier(8)

    def make(round_number: int) -> None:
        barrier.wait(support.HANG_SECS)
        try:
            _files.make_directories(str(tmp_path / str(round_number) / "b" / "c" / "d"))
        except BaseException as error:  # pylint: disable=broad-exception-caught
            errors.append(error)

    for round_number in range(20):
        threads = [threading.Thread(target=make, args=(round_number, )) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(support.HANG_SECS)
        assert (tmp_path / str(round_number) / "b" / "c" / "d").is_dir()
    assert not errors


def test_relative_directories(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _files.make_directories("a/b")
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is needed to see the flushes")
def test_writing_removing_and_making_are_flushed(tmp_path: pathlib.Path) -> None:
    trace = tmp_path / "trace"
    done = support.run_python("""if True:
        import sys
        from persipubsub.environment import _files
        _files.make_directories(sys.argv[1] + "/one/two")
        _files.write_durably(sys.argv[1] + "/one/two/running", b"content")
        _files.remove_durably(sys.argv[1] + "/one/two/running")
        _files.remove_durably(sys.argv[1] + "/one/two/running")
        """,
                              tmp_path,
                              prefix=[
                                  "strace", "-f", "-y", "-o",
                                  str(trace), "-e",
                                  "trace=mkdir,mkdirat,write,fsync,rename,renameat,unlink,unlinkat"
                              ])
    assert done.returncode == 0, done.stderr
    lines = [line for line in trace.read_text("utf-8").splitlines() if str(tmp_path) in line]
    seen: list[str] = []
    for line in lines:
        call = re.sub(r"^\d+ +", "", line).partition("(")[0].replace("at", "")
        seen.append("{} {}".format(call,
                                   re.findall(re.escape(str(tmp_path)) + r"([^\">]*)", line)[-1]))
    assert seen == [
        "mkdir /one", "fsync ", "mkdir /one/two", "fsync /one", "write /one/two/running.new",
        "fsync /one/two/running.new", "rename /one/two/running", "fsync /one/two",
        "unlink /one/two/running", "fsync /one/two", "unlink /one/two/running"
    ]


def test_own_file_is_no_link(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    (tmp_path / "bell").symlink_to(target)
    with pytest.raises(persipubsub.errors.AccessError, match="a symbolic link"):
        _files.open_own_file(str(tmp_path / "bell"))
    assert target.read_bytes() == b"precious"


def test_own_file_in_a_missing_directory(tmp_path: pathlib.Path) -> None:
    with pytest.raises(persipubsub.errors.NotInitializedError, match="bell"):
        _files.open_own_file(str(tmp_path / "nowhere" / "bell"))


def test_own_file_is_closed_on_exec(tmp_path: pathlib.Path) -> None:
    descriptor = _files.open_own_file(str(tmp_path / "bell"))
    try:
        assert not os.get_inheritable(descriptor)
    finally:
        os.close(descriptor)


def test_foreign_names(tmp_path: pathlib.Path) -> None:
    for name in list(_files.OWN) + ["running.new", ".nfs000000001", "lost+found"]:
        (tmp_path / name).touch()
    assert not _files.foreign_names(str(tmp_path))
    for name in ["data.mdb.old", "notes.txt", ".hidden", "x.new", ".new"]:
        (tmp_path / name).touch()
    assert _files.foreign_names(
        str(tmp_path)) == [".hidden", ".new", "data.mdb.old", "notes.txt", "x.new"]


def test_identity_is_that_of_the_file(tmp_path: pathlib.Path) -> None:
    one = tmp_path / "one"
    one.mkdir()
    make_data_file(one)
    (tmp_path / "link").symlink_to(one)
    two = tmp_path / "two"
    shutil.copytree(one, two)

    identity = _files.identify_store(str(one))
    assert identity == _files.identify_store(str(tmp_path / "link"))
    assert identity == _files.identify_store(os.path.join(str(one), ".", "..", "one"))
    assert identity != _files.identify_store(str(two))


def test_nothing_to_identify(tmp_path: pathlib.Path) -> None:
    with pytest.raises(persipubsub.errors.NotInitializedError, match="nothing there.*initialize"):
        _files.identify_store(str(tmp_path / "nowhere"))
    with pytest.raises(persipubsub.errors.NotInitializedError, match="an empty directory"):
        _files.identify_store(str(tmp_path))


@pytest.mark.parametrize("kind", ["file", "file above", "link", "hard link", "directory", "fifo"])
def test_other_kinds_of_data_files_are_refused(tmp_path: pathlib.Path, kind: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    data = make_data_file(elsewhere)
    directory = tmp_path / "queue"
    directory.mkdir()
    found = "Expected"
    if kind == "file":
        directory = data
        found = "not a directory"
    elif kind == "file above":
        directory = data / "queue"
    elif kind == "link":
        (directory / _files.DATA).symlink_to(data)
        found = "a symbolic link"
    elif kind == "hard link":
        os.link(data, directory / _files.DATA)
        found = "2 hard links"
    elif kind == "directory":
        (directory / _files.DATA).mkdir()
        found = "not a regular file"
    else:
        os.mkfifo(directory / _files.DATA)
        found = "not a regular file"

    before = data.read_bytes()
    expected = (persipubsub.errors.NotInitializedError
                if kind == "file above" else persipubsub.errors.FormatError)
    with pytest.raises(expected, match=found):
        _files.identify_store(str(directory))
    assert data.read_bytes() == before


def test_missing_bytes_of_a_truncated_file(tmp_path: pathlib.Path) -> None:
    data = make_data_file(tmp_path)
    size = data.stat().st_size
    assert _files.missing_bytes(str(data)) == 0
    for missing in (1, 4096, size // 2, size - 8192):
        os.truncate(data, size - missing)
        assert _files.missing_bytes(str(data)) == missing
        with pytest.raises(persipubsub.errors.StoreCorruptError, match=r"but got \d+ finding"):
            _files.verify_data_file(str(data))

    for kept in (8191, 4096, 4000, 152, 1, 0):
        os.truncate(data, kept)
        with pytest.raises(persipubsub.errors.StoreCorruptError, match="truncated"):
            _files.missing_bytes(str(data))


def test_free_pages_at_the_end_may_be_missing(tmp_path: pathlib.Path) -> None:
    data = make_data_file(tmp_path)
    with lmdb.open(str(tmp_path), map_size=1 << 20, lib_version=0) as environment:
        with environment.begin(write=True) as txn:
            txn.delete(b"key")
        # The pages in front are used again, those at the end stay free.
        for _ in range(4):
            with environment.begin(write=True) as txn:
                txn.put(b"other", b"value")
    used = lmdb.open(str(tmp_path), readonly=True, lock=False, lib_version=0)
    pages = used.info()["last_pgno"] + 1
    used.close()
    assert pages >= 13
    os.truncate(data, (pages - 3) * 4096)
    assert _files.missing_bytes(str(data)) == 3 * 4096
    _files.verify_data_file(str(data))


def test_file_that_is_longer_is_sound(tmp_path: pathlib.Path) -> None:
    data = make_data_file(tmp_path)
    with open(data, "ab") as fid:
        fid.write(bytes(10000))
    assert _files.missing_bytes(str(data)) == 0
    _files.verify_data_file(str(data))


def test_damaged_meta_pages(tmp_path: pathlib.Path) -> None:
    data = make_data_file(tmp_path)
    sound = data.read_bytes()

    for page in (0, 1):
        damaged = bytearray(sound)
        damaged[page * 4096:(page + 1) * 4096] = bytes(4096)
        data.write_bytes(damaged)
        with pytest.raises(persipubsub.errors.StoreCorruptError):
            _files.missing_bytes(str(data))

    for size in (0, 1, 100, 4095, 1 << 20):
        damaged = bytearray(sound)
        struct.pack_into("=I", damaged, 16 + 24, size)
        data.write_bytes(damaged)
        with pytest.raises(persipubsub.errors.StoreCorruptError, match="power of two"):
            _files.missing_bytes(str(data))

    for version in (0, 2, 999):
        damaged = bytearray(sound)
        struct.pack_into("=I", damaged, 16 + 4, version)
        data.write_bytes(damaged)
        with pytest.raises(persipubsub.errors.FormatError, match="data version"):
            _files.missing_bytes(str(data))

    data.write_text("Dear diary, today nothing happened.\n" * 1000, encoding="utf-8")
    with pytest.raises(persipubsub.errors.FormatError, match="to be a data file of LMDB"):
        _files.missing_bytes(str(data))


def test_any_start_of_a_file_is_refused_or_measured(tmp_path: pathlib.Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    generator = random.Random(seed)
    data = make_data_file(tmp_path)
    sound = data.read_bytes()
    measured = 0
    for _ in range(300):
        damaged = bytearray(sound[:generator.choice([len(sound), generator.randrange(10000)])])
        for _ in range(generator.randrange(4)):
            place = generator.randrange(16, 168) + generator.choice([0, 4096])
            if place < len(damaged):
                damaged[place] = generator.randrange(256)
        data.write_bytes(damaged)
        try:
            assert _files.missing_bytes(str(data)) >= 0
            measured += 1
        except (persipubsub.errors.StoreCorruptError, persipubsub.errors.FormatError):
            pass
        assert data.read_bytes() == damaged
    assert measured > 0


def test_verify_finds_a_damaged_page(tmp_path: pathlib.Path) -> None:
    data = make_data_file(tmp_path)
    _files.verify_data_file(str(data))
    damaged = bytearray(data.read_bytes())
    damaged[2 * 4096:] = bytes(len(damaged) - 2 * 4096)
    data.write_bytes(damaged)
    assert _files.missing_bytes(str(data)) == 0
    with pytest.raises(persipubsub.errors.StoreCorruptError, match="finding"):
        _files.verify_data_file(str(data))


def test_boot_and_clock() -> None:
    assert len(_clock.boot_id()) == 16
    assert _clock.boot_id() == _clock.boot_id()
    ticks = [_clock.ticks_ns() for _ in range(1000)]
    assert ticks == sorted(ticks)
