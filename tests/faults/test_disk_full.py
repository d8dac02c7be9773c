"""Test full disks, full maps and disks that fail: clear errors, nothing lost, no restart."""

import errno
import functools
import json
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import pytest

from persipubsub import Pub, Sub, control, errors
from persipubsub.lmdb_engine import files
from tests import support
from tests.faults import replay, tracing

_NAMESPACE: Final = ("unshare", "--map-root-user", "--mount")


def on_small_disk(directory: Path, function: Callable[..., None], size: str, *arguments:
                  object) -> None:
    """Run a function of a module on a small disk of its own."""
    if shutil.which("unshare") is None or subprocess.run(
        [*_NAMESPACE, "mount", "-t", "tmpfs", "none",
         str(directory)],
            capture_output=True,
            check=False).returncode != 0:
        pytest.skip("user namespaces with mounts are needed for a small disk")
    done = support.run_python("""if True:
        import importlib, pathlib, subprocess, sys
        subprocess.check_call(
            ["mount", "-t", "tmpfs", "-o", "size=" + sys.argv[4], "none", sys.argv[1]])
        module = importlib.import_module(sys.argv[2])
        getattr(module, sys.argv[3])(pathlib.Path(sys.argv[1]), *sys.argv[5:])
        print("done")
        """,
                              directory,
                              function.__module__,
                              function.__name__,
                              size,
                              *arguments,
                              prefix=_NAMESPACE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")


class Filler:

    def __init__(self, directory: Path) -> None:
        self.path = directory / "filler"

    def fill(self, leaving: int = 0) -> None:
        """Fill the disk but for some pages."""
        with open(self.path, "ab", buffering=0) as fid:
            try:
                while True:
                    fid.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC
            os.ftruncate(fid.fileno(), max(0, fid.tell() - 4096 * leaving))

    def free(self) -> None:
        self.path.unlink(missing_ok=True)


class Users:

    def __init__(self, config_pth: Path) -> None:
        self.config_pth = config_pth
        self.pub = Pub()
        self.sub = Sub()
        self.open()

    def open(self) -> None:
        self.pub.init(pub_id="pub", config_pth=self.config_pth)
        self.sub.init(sub_id="sub", config_pth=self.config_pth)

    def close(self) -> None:
        self.pub.close()
        self.sub.close()

    def send(self, index: int, size: int = 3000) -> str:
        """Send a message; return the name of the error."""
        return support.outcome(lambda: self.pub.send(b"%d " % index + bytes(size)))

    def send_until_error(self, first: int, size: int = 3000) -> tuple[int, str]:
        """Send until it fails; return the number of the message that failed, and the error."""
        for index in range(first, 1 << 20):
            error = self.send(index, size)
            if error:
                return index, error
        raise AssertionError("Expected the disk to be full")

    def receive(self) -> int | None:
        with self.sub.receive(timeout=0) as message:
            return None if message is None else int(message.split(b" ")[0])

    def receive_all(self) -> list[int]:
        numbers: list[int] = []
        while (number := self.receive()) is not None:
            numbers.append(number)
        return numbers

    def check(self) -> list[str]:
        return support.queue_of(self.pub).check()


def hold_snapshot(pipe: support.Connection, config_pth: Path) -> None:
    """Be in the middle of a read until killed."""
    with support.open_queue(config_pth) as queue:

        def work(*_: object) -> None:
            pipe.send("reading")
            pipe.recv()

        queue._environment.read(work)


# Small disks


def fill_while_messages_wait(directory: Path, durability: str) -> None:
    config_pth = support.make_queue(directory, durability=durability, checkpoint_secs=0.05)
    users = Users(config_pth)
    filler = Filler(directory)
    assert users.send(0) == ""
    filler.fill(leaving=200)
    sent, error = users.send_until_error(1)
    assert error == "DiskFullError" and sent > 10
    filler.fill()
    received: list[int | None] = []
    reserve = directory / "queue" / files.RESERVE
    assert reserve.exists()
    # A backup, say: as long as it reads, no page is free and the file has to grow.
    with support.Child(hold_snapshot, config_pth) as child:
        assert child.get() == "reading"
        received.extend(users.receive() for _ in range(3))
    assert not reserve.exists()
    # Somebody else takes whatever we give back.
    for _ in range(sent // 2 - 3):
        received.append(users.receive())
        filler.fill()
    assert received == list(range(sent // 2))
    assert users.check() == []

    filler.free()
    for index in range(sent, sent + 20):
        assert users.send(index) == ""
    support.until(reserve.exists, "room is kept aside again")
    assert users.receive_all() == list(range(sent // 2, sent + 20))
    assert users.check() == []
    users.close()


def fill_with_finished_messages(directory: Path, durability: str) -> None:
    config_pth = support.make_queue(directory, durability=durability, checkpoint_secs=0.05)
    users = Users(config_pth)
    filler = Filler(directory)
    filler.fill(leaving=200)
    sent, error = users.send_until_error(0)
    assert error == "DiskFullError" and sent > 10
    assert users.receive_all() == list(range(sent))
    # No byte more is free, but all that the store has is finished.
    for index in range(sent, 2 * sent):
        assert users.send(index) == "", index
        assert users.receive() == index
        filler.fill()
    assert users.check() == []
    users.close()


def open_with_few_pages(directory: Path, durability: str) -> None:
    """Use a queue with so little room that one file after the other can not be made."""
    config_pth = support.write_config(directory,
                                      durability=durability,
                                      max_reader_num=100,
                                      checkpoint_secs=0.01)
    queue = directory / "queue"
    filler = Filler(directory)

    def use() -> None:
        users = Users(config_pth)
        users.send(1)
        users.receive()
        users.close()

    seen: list[str] = []
    for pages in (*range(0, 24, 4), *range(24, 240, 24)):
        filler.fill(leaving=pages)
        seen += support.outcomes_in_child(lambda: control.initialize_all_dbs(config_pth=config_pth))
        filler.free()
        control.initialize_all_dbs(config_pth=config_pth)
        for name in os.listdir(queue):
            # As after a restore of the data file by hand; these are the files that are made anew.
            # By the lock of the journal, a queue is told from a store of another program.
            if name == files.JOURNAL:
                shutil.rmtree(queue / name)
            elif name not in (files.DATA, files.JOURNAL_LOCK):
                (queue / name).unlink()
        filler.fill(leaving=pages)
        seen += support.outcomes_in_child(use)
        filler.free()
        users = Users(config_pth)
        users.receive_all()
        assert users.send(2) == "" and users.receive() == 2
        assert users.check() == []
        users.close()
        shutil.rmtree(queue)
    assert set(seen) == {"", "DiskFullError"}, seen


def open_with_unfinished_files(directory: Path, durability: str) -> None:
    """Use a queue whose small files a kill, or a power failure, left without their content."""
    config_pth = support.make_queue(directory, durability=durability, checkpoint_secs=3600)
    queue = directory / "queue"
    users = Users(config_pth)
    assert users.send(0) == "" and users.receive() == 0
    users.close()
    filler = Filler(directory)
    names = sorted(path.name for path in queue.iterdir()
                   if path.name not in (files.DATA, files.JOURNAL))
    assert {files.LOCK, files.RESERVE} <= set(names)
    for name in names:
        os.truncate(queue / name, 0)
        filler.fill()
        # Whether there is room enough for it or not: nobody is killed by SIGBUS.
        assert set(support.outcomes_in_child(lambda: use_once(config_pth))) <= {"", "DiskFullError"}
        filler.free()
        use_once(config_pth)
        assert (queue / files.RESERVE).stat().st_size > 1 << 17
        slots = 192 + 64 * 1023
        assert (queue / files.LOCK).stat().st_blocks * 512 >= slots, name


def recover_without_room(directory: Path, durability: str) -> None:
    """What can not be recovered for lack of room takes none from others."""
    config_pth = support.make_queue(directory, durability=durability, checkpoint_secs=3600)

    def fill(pipe: support.Connection) -> None:
        users = Users(config_pth)
        assert [users.send(index, 5000) for index in range(40)] == [""] * 40
        support.queue_of(users.pub).secure()
        pipe.send("filled")
        pipe.recv()

    def recover() -> None:
        replay.new_boot(1)
        users = Users(config_pth)
        assert users.receive_all() == list(range(40))
        users.close()

    with support.Child(fill) as child:
        assert child.get() == "filled"
    filler = Filler(directory)
    filler.fill(leaving=20)
    outcome, = support.outcomes_in_child(recover)
    assert outcome == "DiskFullError", outcome
    assert os.statvfs(directory).f_bavail == 20
    filler.free()
    assert support.outcomes_in_child(recover) == [""]


def use_once(config_pth: Path) -> None:
    users = Users(config_pth)
    try:
        users.pub.send(b"1")
        assert users.receive() == 1
        assert users.check() == []
    finally:
        users.close()


@pytest.mark.parametrize("durability", ["fsync", "os"])
@pytest.mark.parametrize("function", [
    fill_while_messages_wait, fill_with_finished_messages, open_with_few_pages,
    open_with_unfinished_files, recover_without_room
],
                         ids=lambda function: str(function.__name__))
def test_small_disk(tmp_path: Path, function: Callable[..., None], durability: str) -> None:
    on_small_disk(tmp_path, function, "2m", durability)


# What an error says of the message

IN_QUEUE: Final = "is in the queue"


class Ledger:
    """Messages of threads, and what came of them."""

    def __init__(self) -> None:
        self.stored: set[bytes] = set()
        self.refused: dict[bytes, str] = {}
        self.unsafe: dict[bytes, str] = {}

    def send(self, pub: Pub, message: bytes) -> str:
        """Send a message, and note what the call said; return the name of the error."""
        try:
            pub.send(message)
        except errors.PersipubsubError as error:
            text = f"{type(error).__name__}: {error}"
            (self.unsafe if IN_QUEUE in text else self.refused)[message] = text
            return type(error).__name__
        self.stored.add(message)
        return ""

    def check(self, received: Sequence[bytes]) -> None:
        there = set(received)
        assert len(received) == len(there)
        for message, text in self.unsafe.items():
            assert not text.startswith("DiskFullError"), text
            assert message in there, text
        for message, text in self.refused.items():
            assert message not in there, text
        assert there == self.stored | set(self.unsafe)


def send_until_refused(directory: Path, durability: str, seed: str) -> None:
    """Threads send messages of many sizes and to many lists of subscribers, round after round."""
    rng = random.Random(int(seed))
    names = [f"sub{index}" for index in range(8)]
    lists = {
        f"pub{number}": [name for index, name in enumerate(names) if number >> index & 1]
        for number in range(1, 256, 14)  # all with the first subscriber
    }
    filler = Filler(directory)
    seen: set[str] = set()
    for round_ in range(25):
        config_pth = support.make_queue(directory,
                                        lists,
                                        names,
                                        durability=durability,
                                        path=str(directory / str(round_)),
                                        checkpoint_secs=rng.choice((0.001, 0.001, 0.01)))
        ledger = Ledger()

        def work(name: int, random_: random.Random, config_pth: Path, ledger: Ledger) -> None:
            failures = count = 0
            pubs = [Pub(pub_id, config_pth) for pub_id in random_.sample(sorted(lists), 5)]
            while failures < 5:
                count += 1
                message = b"%d %d " % (name, count) + bytes(
                    random_.choice((1, 300, 3000, 30000, 60000)))
                error = ledger.send(random_.choice(pubs), message)
                seen.add(error)
                failures += bool(error)
            for pub in pubs:
                pub.close()

        with Pub("pub1", config_pth) as pub:
            assert ledger.send(pub, b"first") == ""
            filler.fill(leaving=rng.randrange(250))
            support.in_threads([
                functools.partial(work, name, random.Random(rng.random()), config_pth, ledger)
                for name in range(4)
            ])
        filler.free()
        with support.open_queue(config_pth) as queue:
            assert queue.check() == []
        ledger.check(support.receive_all(config_pth, "sub0"))
        shutil.rmtree(directory / str(round_))
    assert "DiskFullError" in seen and seen <= {"", "DiskFullError", "FlushError"}, seen


def send_to_long_list(directory: Path, durability: str, _: str) -> None:
    """A list of subscribers is stored with the first message to it, and is larger than that."""
    names = ["sub", "other", *(f"{index:04d}" + "z" * 240 for index in range(1200))]
    lists = {"pub": names, "long": names[:-1]}
    filler = Filler(directory)
    for pages in range(25, 200, 50):
        config_pth = support.make_queue(directory,
                                        lists,
                                        names,
                                        durability=durability,
                                        path=str(directory / str(pages)),
                                        checkpoint_secs=3600)
        ledger = Ledger()
        with Pub("pub", config_pth) as pub, Pub("long", config_pth) as long:
            assert ledger.send(pub, b"first") == ""
            filler.fill(leaving=pages)
            for index in range(4):
                ledger.send(long, b"long %d" % index)
                ledger.send(pub, b"short %d" % index)
            filler.free()
            assert ledger.send(long, b"last") == ""

        ledger.check(support.receive_all(config_pth))
        assert control.verify(config_pth) == {"queue": ()}
        shutil.rmtree(directory / str(pages))


@pytest.mark.parametrize("durability", ["fsync", "os"])
@pytest.mark.parametrize("function", [send_until_refused, send_to_long_list],
                         ids=lambda function: str(function.__name__))
def test_error_says_whether_the_message_is_stored(tmp_path: Path, function: Callable[..., None],
                                                  durability: str) -> None:
    on_small_disk(tmp_path, function, "16m", durability, str(tracing.seed()))


# A limit on the size of files


@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_limit_on_the_size_of_files(tmp_path: Path, durability: str) -> None:
    # While a checkpoint is being copied, no page is free: an acknowledgement would have to wait.
    config_pth = support.make_queue(tmp_path, durability=durability, checkpoint_secs=3600)

    def run(pipe: support.Connection) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        users = Users(config_pth)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
        sent, error = users.send_until_error(0)
        pipe.send(error)
        pipe.send([users.receive() for _ in range(sent // 2)] == list(range(sent // 2)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        for index in range(sent, 2 * sent):
            assert users.send(index) == ""
        pipe.send(users.receive_all() == list(range(sent // 2, 2 * sent)))
        pipe.send(users.check())
        users.close()

    with support.Child(run) as child:
        assert child.get() == "DiskFullError"
        assert child.get() is True
        assert child.get() is True
        assert child.get() == []
        child.end()


# Disks that fail

_SENDS: Final = 5


def start_under_errors(config_pth: Path, output: Path) -> Callable[[], None]:
    users = Users(config_pth)
    assert users.send(0) == ""

    def work() -> None:
        outcomes = [users.send(index, 3000 * index) for index in range(1, _SENDS + 1)]
        acknowledged = support.outcome(users.receive)
        users.close()
        users.open()
        # The injected error has come and gone, or never comes.
        last = users.send(_SENDS + 1)
        output.write_text(
            json.dumps([outcomes, acknowledged, last,
                        users.receive_all(),
                        users.check()]))
        users.close()

    return work


DATA: Final = (files.DATA, )

SEGMENTS: Final = tuple(f"{files.JOURNAL}/{number:08d}" for number in range(1, 5))

INJECTIONS = [
    ("fsync", DATA, "pwrite64", "ENOSPC", 6),
    ("fsync", DATA, "writev", "ENOSPC", 2),
    ("fsync", DATA, "pwrite64", "EIO", 4),
    ("fsync", DATA, "pwrite64", "EDQUOT", 3),
    ("fsync", SEGMENTS, "fdatasync", "EIO", 4),
    ("fsync", SEGMENTS, "fdatasync", "ENOSPC", 4),
    ("fsync", SEGMENTS, "pwrite64", "EIO", 4),
    ("os", DATA, "pwrite64", "ENOSPC", 6),
    ("os", DATA, "pwrite64", "EIO", 3),
]


@pytest.mark.parametrize("durability, names, call, error, places", INJECTIONS)
def test_calls_that_fail(tmp_path: Path, durability: str, names: tuple[str, ...], call: str,
                         error: str, places: int) -> None:
    tracing.require()
    failures = set()
    for place in range(1, places + 1):
        directory = tmp_path / str(place)
        directory.mkdir()
        config_pth = support.make_queue(directory, durability=durability, checkpoint_secs=3600)
        output = directory / "output"
        start = functools.partial(start_under_errors, config_pth, output)
        paths = [directory / "queue" / name for name in names]
        assert tracing.inject(start, call, f"error={error}", place, paths) == 0
        outcomes, acknowledged, last, received, findings = json.loads(output.read_text())
        print(place, outcomes, acknowledged, received)
        assert not findings and last == ""
        failures |= set(outcomes) - {""}
        check_outcomes(outcomes, acknowledged, received, is_refused=names == SEGMENTS)
    assert failures <= ({"FlushError"} if error == "EIO" else {"DiskFullError", "FlushError"})
    assert failures or error != "EIO"


def check_outcomes(outcomes: list[str], acknowledged: str, received: list[int],
                   is_refused: bool) -> None:
    """Check that what returned is there, and that what was refused is not."""
    sent = [0] + [index for index, outcome in enumerate(outcomes, start=1) if not outcome]
    sent.append(_SENDS + 1)
    refused = [
        index for index, outcome in enumerate(outcomes, start=1) if outcome == "DiskFullError"
    ]
    # A flush that failed says that nobody knows.
    assert set(sent) - {0} <= set(received)
    assert 0 in received or not acknowledged
    assert not set(refused) & set(received)
    assert received == sorted(set(received))
    if "FlushError" in outcomes and is_refused:
        # Refused until it is opened again.
        place = outcomes.index("FlushError")
        assert set(outcomes[place:]) == {"FlushError"} and acknowledged == "FlushError"


def test_full_disk_at_a_meta_page_is_over_when_there_is_room(tmp_path: Path) -> None:
    """LMDB refuses all further work with the open environment: it is opened again."""
    tracing.require()
    config_pth = support.make_queue(tmp_path)
    output = tmp_path / "output"

    def start() -> Callable[[], None]:
        users = Users(config_pth)
        assert users.send(0) == ""

        def work() -> None:
            outcomes = [users.send(index, 10) for index in range(1, 21)]
            output.write_text(json.dumps([outcomes, users.receive_all(), users.check()]))
            users.close()

        return work

    for place in range(1, 12):
        assert tracing.inject(start, "pwrite64", "error=ENOSPC", f"{place}..{place + 8}",
                              [tmp_path / "queue" / files.DATA]) == 0
        outcomes, received, findings = json.loads(output.read_text())
        sent = [index for index, outcome in enumerate(outcomes, start=1) if not outcome]
        assert set(outcomes) <= {"", "DiskFullError"}
        assert "DiskFullError" in outcomes and outcomes[-1] == ""
        assert received == [0, *sent] and not findings


def test_meta_page_that_never_finds_room_is_given_up(tmp_path: Path) -> None:
    """To spend the reserve, open the store again and keep the reserve would go on for ever."""
    tracing.require()
    config_pth = support.make_queue(tmp_path)
    with Pub("pub", config_pth) as pub:
        pub.send_many([b"0 " + bytes(1000)] * 10)
    # No page is free: those of a transaction are at the end, and written with one other call.
    control.compact(config_pth, "queue")
    output = tmp_path / "output"

    def start() -> Callable[[], None]:
        users = Users(config_pth)

        def work() -> None:
            output.write_text(json.dumps([users.send(1), support.outcome(users.receive)]))
            users.close()

        return work

    for place in range(1, 8):
        assert tracing.inject(start, "pwrite64", "error=ENOSPC", f"{place}+",
                              [tmp_path / "queue" / files.DATA]) == 0
        assert set(json.loads(output.read_text())) <= {"", "DiskFullError"}


# Injected beside that: LMDB can not be opened again, or another process has the write lock.
NOT_OPENED = [("openat", "ENOMEM", files.DATA, range(1, 3), 0),
              ("flock", "EAGAIN", files.WRITE_LOCK, range(2, 8), 100)]


@pytest.mark.parametrize("call, error, name, places, more", NOT_OPENED)
def test_store_that_is_not_opened_again_at_first(tmp_path: Path, call: str, error: str, name: str,
                                                 places: range, more: int) -> None:
    """After a meta page found no room, a call says that the queue could not be opened again."""
    tracing.require()
    config_pth = support.make_queue(tmp_path, busy_timeout_secs=0.02, checkpoint_secs=3600)
    output = tmp_path / "output"

    def text_of(function: Callable[[], object]) -> str:
        try:
            function()
        except BaseException as found:  # pylint: disable=broad-exception-caught
            return f"{type(found).__name__}: {found}"
        return ""

    def start() -> Callable[[], None]:
        users = Users(config_pth)
        assert users.send(0) == ""

        def work() -> None:
            texts = [
                text_of(lambda index=index: users.pub.send(b"%d" % index))  # type: ignore[misc]
                for index in range(1, 21)
            ]
            output.write_text(json.dumps([texts, users.receive_all(), users.check()]))
            users.close()

        return work

    seen = 0
    for place in range(2, 7):
        for other in places:
            assert tracing.run(start, [
                "-o", os.devnull, "-P",
                str(tmp_path / "queue" / files.DATA), "-P",
                str(tmp_path / "queue" / name), "-e", f"trace=pwrite64,{call}", "-e",
                f"inject=pwrite64:error=ENOSPC:when={place}", "-e",
                f"inject={call}:error={error}:when={other}..{other + more}"
            ]) == 0
            texts, received, findings = json.loads(output.read_text())
            print(place, other, [text for text in texts if text])
            failed = [index for index, text in enumerate(texts, start=1) if text]
            assert {text.partition(":")[0]
                    for text in texts} <= {"", "DiskFullError", "BusyTimeoutError", "StoreError"}
            assert texts[-1] == "" and not findings
            assert received == [index for index in range(21) if index not in failed]
            seen += sum("the next call opens the queue again" in text for text in texts)
    assert seen
