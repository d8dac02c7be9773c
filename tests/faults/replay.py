"""
Record a queue at work, cut its power at many places, and look at what is left.

Workers take turns, so that a ledger can say after each operation what the queue is like. What is
left has to be explained by two operations: one whose state is found (counters, positions, settings)
and not earlier than the last state that was flushed; and one up to which messages are found: the last
one whose send returned, where sends are flushed.
"""

import dataclasses
import faulthandler
import fcntl
import json
import logging
import os
import random
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import persipubsub.config
import persipubsub.queue
from persipubsub import Pub, Sub, control
from persipubsub.lmdb_engine import environment, files, journal
from tests import support
from tests.faults import disk, tracing

#: So many images a test; the enlarged form takes every place and many images of each.
IMAGES: Final = int(os.environ.get("PERSIPUBSUB_REPLAYS", "30"))

_SETTLING = ("write", "pwrite64", "writev", "pwritev", "pwritev2", "fsync", "fdatasync", "rename",
             "unlink", "unlinkat", "mkdir", "rmdir", "ftruncate", "fallocate", "sendfile")

_FLUSHES = ("fsync", "fdatasync")

#: Subscribers; the first publisher sends to both, the second one to the first.
SUBSCRIBERS: Final = ("sub", "other")

#: Figures of a subscriber that only a state record brings back.
_FIGURES: Final = ("acknowledged", "failed", "dropped_by_mark", "cleared", "skipped",
                   "dead_lettered", "is_paused")

#: Number of the boot in which the first image of a survey is opened.
FIRST_BOOT: Final = 10**9

#: Kind of a record of the journal, see docs/format.rst.
_STATE_KIND: Final = 3


class State(NamedTuple):
    """What can be seen of a queue between two operations."""

    next_number: int
    settings: Any  #: one of them, as it is stored
    figures: dict[str, list[int]]  #: by subscriber
    waiting: dict[str, list[int]]  #: which messages, by subscriber

    def explains(self, other: "State") -> bool:
        """Tell whether two states have the same in them but messages."""
        return (self.settings, self.figures) == (other.settings, other.figures)


def content(seed: int, index: int) -> bytes:
    chance = random.Random(seed * 1000003 + index)
    size = chance.choice((0, 10, 100, 300, 1000, 3000, 5000, 20000))
    return b"%d " % index + chance.randbytes(chance.randrange(size + 1))


def write_config(directory: Path,
                 durability: str,
                 mark: int = 60,
                 strategy: str = "prune_first",
                 name: str = "config.json") -> Path:
    """Write the configuration of a queue that drops messages from time to time."""
    publishers = {"pub": SUBSCRIBERS, "some": SUBSCRIBERS[:1]}
    return support.write_config(directory,
                                publishers,
                                SUBSCRIBERS,
                                name,
                                durability=durability,
                                checkpoint_secs=0.02,
                                once_window_secs=3600.0,
                                max_db_size_bytes=1 << 22,
                                MAX_MSGS_NUM=mark,
                                strategy=strategy)


def state_of(config_pth: Path) -> State:
    statistics = control.statistics(config_pth)["queue"]
    names = [one.subscriber for one in statistics.subscribers]
    known = [name for name in names if name in SUBSCRIBERS]
    waiting = {
        name: [
            int(message.content.split(b" ", 1)[0])
            for message in control.peek(config_pth, name, count=1000) if message.content is not None
        ]
        for name in known
    }
    for one in statistics.subscribers:
        assert one.subscriber not in waiting or one.lag == len(waiting[one.subscriber]), \
            f"Expected {one.lag} waiting messages, but got: {waiting}"
    stored = control.stored_settings(config_pth, "queue")
    return State(
        statistics.next_number, [str(dict(stored))], {
            one.subscriber: [int(getattr(one, name)) for name in _FIGURES]
            for one in statistics.subscribers
        }, waiting)


def new_boot(number: int) -> None:
    """Let this process believe that the machine has just been started."""
    started = time.monotonic_ns()
    setattr(files, "boot_id", lambda: b"boot %11d" % number)
    setattr(files, "ticks_ns", lambda: time.monotonic_ns() - started + 10**9)
    setattr(environment.Environment, "now_ns", lambda self: files.ticks_ns() + self.clock_offset_ns)


def small_segments() -> None:
    """Let segments and records be so small that they are used again and again."""
    setattr(journal, "_SMALLEST_BYTES", 1 << 15)
    setattr(journal, "_RECORD_BYTES", 1 << 13)


class _Worker:
    """Work with a queue, and tell in a ledger what was begun and what was done."""

    OPERATIONS: Final = {
        "send": 40, "send_many": 8, "send_some": 8, "send_known": 3, "receive": 25,
        "receive_many": 8, "fail": 3, "skip": 1, "clear": 1, "seek": 2, "pause": 2, "delete": 2,
        "reopen": 3, "wait": 8, "subscribe": 2, "change": 2, "prune": 1
    }  # yapf: disable

    def __init__(self, directory: Path, config_pth: Path, seed: int, number: int) -> None:
        self.config_pth = config_pth
        self.ledger = os.open(directory / "ledger", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.turn = os.open(directory / "turn", os.O_RDWR | os.O_CREAT, 0o600)
        self.backup = directory / "backup"
        self.seed = seed
        self.chance = random.Random(seed + number)
        # Workers number their messages apart from each other.
        self.sent = number * 100000
        self.pub = Pub()
        self.some = Pub()
        self.subs = [Sub() for _ in SUBSCRIBERS]
        self.mark = 60

    def tell(self, **fields: Any) -> None:
        """Write a line of the ledger, in one call."""
        os.write(self.ledger, (f"{json.dumps(fields)}\n").encode("ascii"))

    def open(self) -> None:
        self.pub.init(pub_id="pub", config_pth=self.config_pth)
        self.some.init(pub_id="some", config_pth=self.config_pth)
        for name, sub in zip(SUBSCRIBERS, self.subs):
            sub.init(sub_id=name, config_pth=self.config_pth)

    def close(self) -> None:
        self.pub.close()
        self.some.close()
        for sub in self.subs:
            sub.close()

    def do(self, name: str, operation: Callable[[], object]) -> None:
        """Do something in turn with other processes."""
        fcntl.flock(self.turn, fcntl.LOCK_EX)
        sent = self.sent
        self.tell(begin=name)
        is_durable = bool(operation())
        self.tell(state=state_of(self.config_pth),
                  sent=list(range(sent, self.sent)),
                  name=name,
                  durable=is_durable)
        fcntl.flock(self.turn, fcntl.LOCK_UN)

    def run(self, operations: int | Sequence[str]) -> None:
        """Do operations by name, or some at random."""
        self.do("open", self.open)
        if isinstance(operations, int):
            operations = self.chance.choices(list(self.OPERATIONS),
                                             list(self.OPERATIONS.values()),
                                             k=operations)
        for name in operations:
            self.do(name, getattr(self, name))
        self.do("close", self.close)

    def messages(self, count: int) -> list[bytes]:
        made = [content(self.seed, self.sent + index) for index in range(count)]
        self.sent += count
        return made

    def any_sub(self) -> Sub:
        """Choose a subscriber; the second one is behind."""
        return self.chance.choice((self.subs[0], self.subs[0], self.subs[1]))

    # Operations; those that are durable when they return say so

    def send(self) -> None:
        self.pub.send(self.messages(1)[0])

    def send_many(self) -> None:
        self.pub.send_many(self.messages(self.chance.randrange(2, 15)))

    def send_some(self) -> None:
        self.some.send(self.messages(1)[0])

    def send_known(self) -> None:
        """Send a message with an id, which names it."""
        self.pub.send(content(self.seed, self.sent), msg_id=f"id {self.sent}")
        self.sent += 1

    def receive(self) -> None:
        with self.any_sub().receive(timeout=0):
            pass

    def receive_many(self) -> None:
        with self.any_sub().receive_many(max_msgs=7, timeout=0):
            pass

    def fail(self) -> None:
        try:
            with self.any_sub().receive(timeout=0):
                raise KeyError("fails on purpose")
        except KeyError:
            pass

    def skip(self) -> None:
        self.any_sub().pop_to_top()

    def clear(self) -> bool:
        control.clear_all_subs(config_pth=self.config_pth)
        return True

    def prune(self) -> None:
        control.prune_dangling_messages(config_pth=self.config_pth)

    def seek(self) -> bool:
        end = control.statistics(self.config_pth)["queue"].next_number
        to = self.chance.choice(("beginning", "end", max(0, end - self.chance.randrange(10))))
        control.seek(self.config_pth, SUBSCRIBERS[0], to)
        return True

    def pause(self) -> bool:
        if not control.pause(self.config_pth, SUBSCRIBERS[1]):
            control.resume(self.config_pth, SUBSCRIBERS[1])
        return True

    def delete(self) -> bool:
        waiting = control.peek(self.config_pth, SUBSCRIBERS[0], count=5)
        if waiting:
            control.delete(self.config_pth, SUBSCRIBERS[0], waiting[-1].number)
        return bool(waiting)

    def subscribe(self) -> bool:
        """Add a subscriber to whom nothing is sent, or remove it."""
        if not control.add_subscriber(self.config_pth, "queue", "third"):
            control.remove_subscriber(self.config_pth, "queue", "third")
        return True

    def change(self) -> bool:
        self.mark = 121 - self.mark
        changed = write_config(self.config_pth.parent,
                               self._durability(),
                               mark=self.mark,
                               name="changed.json")
        before = state_of(self.config_pth).settings
        control.initialize_all_dbs(config_pth=changed)
        return bool(state_of(self.config_pth).settings != before)

    def _durability(self) -> str:
        return str(json.loads(self.config_pth.read_bytes())["queues"]["queue"]["durability"])

    def reopen(self) -> bool:
        self.close()
        # What it has acknowledged so far is recorded, whoever has the queue open as well.
        self.tell(durable=True)
        self.open()
        return True

    def wait(self) -> None:
        """Wait a little, for the next state record perhaps."""
        time.sleep(0.03)

    def compact(self) -> bool:
        self.close()
        control.compact(self.config_pth)
        self.open()
        return True

    def save(self) -> None:
        control.backup(self.config_pth, "queue", self.backup)

    def restore(self) -> bool:
        self.close()
        control.restore(self.config_pth, "queue", self.backup)
        self.open()
        return True


@dataclasses.dataclass
class Recording:
    """What processes did to the files of a queue, and what they say that they did."""

    root: Path  #: directory that was recorded
    events: list[disk.Event]
    seed: int
    initial: Path  #: directory with what was there before
    durability: str
    mark: int  #: the queue drops messages if more of them wait
    strategy: str  #: which of them it drops
    before: "Progress | None" = None  #: what was known at the power failure before it


def record(  # pylint: disable=too-many-arguments,too-many-positional-arguments
        directory: Path,
        seed: int,
        durability: str,
        operations: int | Sequence[str] = 100,
        processes: int = 1,
        mark: int = 60,
        strategy: str = "prune_first",
        prepare: Callable[[], None] = lambda: None,
        options: Sequence[str] = (),
        work: Callable[[Path, Path], None] | None = None) -> Recording:
    root = directory / "root"
    root.mkdir()
    config_pth = write_config(root, durability, mark, strategy)
    initial = directory / "initial"
    shutil.copytree(root, initial)

    def run() -> None:
        new_boot(0)
        prepare()
        small_segments()
        control.initialize_all_dbs(config_pth=config_pth)
        if work is not None:
            work(directory, config_pth)
        else:
            run_workers(directory, config_pth, seed, operations, processes)

    events = disk.record(run, directory / "trace", options)
    return Recording(root, events, seed, initial, durability, mark, strategy)


def run_workers(directory: Path,
                config_pth: Path,
                seed: int,
                operations: int | Sequence[str],
                processes: int,
                first: int = 0) -> None:
    """Let processes work on a queue, in turns."""

    def work(number: int) -> None:
        _Worker(directory, config_pth, seed, first + number).run(operations)

    in_processes(work, processes)


def in_processes(work: Callable[[int], None], count: int) -> None:
    """Call a function with numbers from 0 on, each in a process of its own, the first one here."""
    # A process of the tests is a daemon, which may start none with multiprocessing.
    others = []
    for number in range(1, count):
        other = os.fork()
        if other == 0:
            code = 1
            try:
                work(number)
                code = 0
            except BaseException:  # pylint: disable=broad-exception-caught
                traceback.print_exc()
            finally:
                os._exit(code)
        others.append(other)
    work(0)
    for other in others:
        assert os.waitpid(other, 0)[1] == 0


def record_recovery(directory: Path, recording: Recording, image: "Image",
                    operations: int | Sequence[str]) -> Recording:
    """Record a queue that goes on after a power failure."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    root = directory / "root"
    shutil.copytree(image.path, root)
    config_pth = write_config(root, recording.durability, recording.mark, recording.strategy)
    initial = directory / "initial"
    shutil.copytree(root, initial)
    boot = int.from_bytes(os.urandom(3), "big") + 1000

    def work() -> None:
        new_boot(boot)
        small_segments()
        run_workers(directory, config_pth, recording.seed, operations, 1, first=boot)

    events = disk.record(work, directory / "trace")
    return dataclasses.replace(recording,
                               root=root,
                               events=events,
                               initial=initial,
                               before=dataclasses.replace(image.progress))


class Operation(NamedTuple):
    state: State  #: behind it
    sent: list[int]
    only: list[str]  #: subscribers to which it was sent
    ids: list[int]  #: messages that were sent with an id


@dataclasses.dataclass
class Progress:
    """What is known of a queue at a place of a recording."""

    is_initialized: bool = False
    operations: list[Operation] = dataclasses.field(default_factory=list)
    upcoming: Operation | None = None  #: the one that is running
    promised: int = 0  #: index of the last operation of which all messages must be there
    lower: int = 0  #: index of the earliest operation whose state may be found
    next_number: int = 0  #: no number below it may be given again
    before: "Progress | None" = None  #: as long as nothing is known of this one
    lines: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    covered: int = 0  #: lines of the ledger before the last state that was flushed
    states: int = 0  #: state records that were flushed


class _Follower:
    """Follow a recording: the disk, the ledger and the state records."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.disk = disk.Disk(recording.root, recording.initial)
        self.progress = Progress(is_initialized=recording.before is not None,
                                 before=recording.before)
        self.ledger = str(recording.root.parent / "ledger")
        lines = Path(self.ledger).read_text("ascii").splitlines()
        self.following = [_operation(line) for line in map(json.loads, lines) if "state" in line]
        # By thread: what the ledger said when it locked the journal, and whether it wrote a state.
        self.locked: dict[int, tuple[int, int]] = {}
        self.written: dict[int, tuple[int, int]] = {}

    def feed(self, event: disk.Event) -> None:
        call, progress = event.call, self.progress
        self.disk.feed(event)
        if event.result is None or not call.paths or event.result < 0:
            return
        path = call.paths[0]
        if path == self.ledger and call.name == "write":
            self._read_ledger(json.loads(call.strings[0]))
        elif call.name == "flock" and path.endswith("/journal.lock"):
            self.locked[event.thread] = (len(progress.operations) - 1, len(progress.lines))
        elif "/journal/" in path and call.name == "pwrite64":
            if int.from_bytes(call.strings[0][4:8], "little") == _STATE_KIND:
                self.written[event.thread] = self.locked[event.thread]
        elif "/journal/" in path and call.name in _FLUSHES and event.thread in self.written:
            lower, progress.covered = self.written.pop(event.thread)
            progress.lower = max(progress.lower, lower)
            progress.states += 1

    def _read_ledger(self, line: dict[str, Any]) -> None:
        progress = self.progress
        progress.lines.append(line)
        progress.is_initialized = True
        if "state" in line:
            operation = self.following[len(progress.operations)]
            progress.operations.append(operation)
            progress.before = None
            progress.next_number = max(progress.next_number, operation.state.next_number)
            if self.recording.durability == "fsync":
                progress.promised = len(progress.operations) - 1
        if line.get("durable") or len(progress.operations) == 1:
            progress.lower = max(progress.lower, len(progress.operations) - 1)
        progress.promised = max(progress.promised, progress.lower)
        progress.upcoming = next(iter(self.following[len(progress.operations):]), None)


def _operation(line: dict[str, Any]) -> Operation:
    only = SUBSCRIBERS[:1] if line["name"] == "send_some" else SUBSCRIBERS
    return Operation(State(*line["state"]), line["sent"], list(only),
                     line["sent"] if line["name"] == "send_known" else [])


class Image(NamedTuple):
    place: int
    path: Path
    progress: Progress
    how: disk.Survival


def images(recording: Recording, target: Path, count: int,
           chance: random.Random) -> Iterator[Image]:
    places = [
        index for index, event in enumerate(recording.events) if event.call.name in _SETTLING and (
            event.result is not None or event.call.name in _FLUSHES)
    ]
    chosen = sorted(places * (count // len(places)) + chance.sample(places, count % len(places)))
    follower = _Follower(recording)
    fed = 0
    for place in chosen:
        while fed <= place:
            follower.feed(recording.events[fed])
            fed += 1
        how = disk.Survival.choose(chance)
        path = target / "image"
        follower.disk.materialize(path, chance, how)
        shared = path / "queue" / files.SHARED
        if shared.exists() and chance.random() < 0.5:
            # It is mapped, and may have reached the disk in any state.
            shared.write_bytes((recording.root / "queue" / files.SHARED).read_bytes())
        progress = dataclasses.replace(follower.progress,
                                       operations=list(follower.progress.operations),
                                       lines=list(follower.progress.lines))
        yield Image(place, path, progress, how)
        shutil.rmtree(path)


def follow_to_end(recording: Recording) -> Progress:
    follower = _Follower(recording)
    for event in recording.events:
        follower.feed(event)
    return follower.progress


def find_fault(image: Image, recording: Recording, boot: int) -> str:
    """Open an image after a power failure, and use it."""
    new_boot(boot)
    config_pth = write_config(image.path, recording.durability, recording.mark, recording.strategy)
    if not image.progress.is_initialized:
        control.initialize_all_dbs(config_pth=config_pth)
    findings = find_damage(config_pth)
    if findings:
        return findings
    found = state_of(config_pth)
    progress = image.progress
    while not progress.operations and progress.before is not None:
        progress = progress.before
    if progress.operations:
        if found.next_number < progress.next_number:
            return (f"Expected no number below {progress.next_number}, but got: "
                    f"{found.next_number}")
        # A send at a high-water mark may drop messages in a commit before that of its own.
        reasons = [
            explain(found, progress, index, is_half)
            for index in range(progress.lower,
                               len(progress.operations) + (progress.upcoming is not None))
            for is_half in (False, True)
        ]
        if all(reasons):
            return (f"{recording.durability}: {len(progress.operations)} operations, "
                    f"{progress.lower} recorded, {progress.promised} promised. Found {found}. "
                    f"{reasons}")
    kept = progress.operations[:max(progress.promised, progress.lower) + 1]
    return _use(config_pth, recording, found, [index for one in kept for index in one.ids])


def find_damage(config_pth: Path) -> str:
    config = persipubsub.config.read(config_pth)
    with persipubsub.queue.open_queue(config, "queue") as queue:
        findings = queue.check()
    return "; ".join([*findings, *control.verify(config_pth)["queue"]])


def explain(found: State, progress: Progress, index: int, is_half: bool) -> str:
    """Tell why what was found is not the state behind an operation, with messages of later ones."""
    operations = [*progress.operations, *([progress.upcoming] if progress.upcoming else [])]
    base = operations[index]
    if not base.state.explains(found):
        return f"{index}: other figures: {base.state.settings} {base.state.figures}"
    for name, waiting in found.waiting.items():
        # Acknowledgements and drops behind the state are forgotten: such messages may come again.
        begin = index + (not is_half)
        may = [
            message for message in base.state.waiting[name]
            if not is_half or message not in base.sent
        ]
        must = set(may)
        later = [one for one in operations[begin:] if name in one.only]
        for number, one in enumerate(operations[begin:], start=begin):
            if name in one.only:
                may += one.sent
                must.update(one.sent if number <= progress.promised else ())
            # What was taken since then may be gone.
            must &= set(one.state.waiting[name]) | set(message for other in operations[number + 1:]
                                                       for message in other.sent)
        there = set(waiting)
        if must - there or waiting != [message for message in may if message in there]:
            return (f"{index}: {name} lost {sorted(must - there)}, got more "
                    f"{sorted(there - set(may))}, or in another order: {waiting}")
        # Neither half of a batch, nor a message without those in front of it.
        is_over = False
        for one in later:
            kept = set(one.sent) & set(operations[-1].state.waiting[name])
            if kept & there and (is_over or not kept <= there):
                return f"{index}: {name} lost a part of {one.sent}, or what is in front of it"
            is_over = is_over or bool(kept - there)
    return ""


def _use(config_pth: Path, recording: Recording, found: State, ids: Sequence[int]) -> str:
    """Receive all messages of an image, send those with ids again, and another one."""
    for name in found.waiting:
        control.resume(config_pth, name)
        with Sub(name, config_pth) as sub:
            for index in (*found.waiting[name], None):
                with sub.receive(timeout=0) as received:
                    if received != (None if index is None else content(recording.seed, index)):
                        return f"Expected the message {index}, but got: {(received or b'')[:20]!r}"
    with Pub("pub", config_pth) as pub, Sub(SUBSCRIBERS[0], config_pth) as sub:
        for index in ids:
            pub.send(b"again", msg_id=f"id {index}")
        pub.send(b"afterwards")
        with sub.receive(timeout=0) as received:
            if received != b"afterwards":
                return f"Expected another message, but got: {received!r}"
    return find_damage(config_pth)


class Summary(NamedTuple):
    images: int
    faults: list[str]

    def assert_sound(self) -> None:
        """Fail if anything is wrong with any image."""
        print(f"{self.images} images")
        assert not self.faults, "{} of {} images:\n{}".format(len(self.faults), self.images,
                                                              "\n".join(self.faults[:3]))


def survey(recording: Recording,
           count: int,
           chance: random.Random,
           find: Callable[[Image, Recording, int], str] = find_fault,
           is_over_at_first: bool = False) -> Summary:
    """Open many images, in a process that may crash."""

    def run(pipe: support.Connection) -> None:
        logging.getLogger("persipubsub").setLevel(logging.CRITICAL)
        # Without a protection an image may crash the process; the parent reports it.
        faulthandler.disable()
        faults: list[str] = []
        done = 0
        with tracing.fast_directory() as name:
            for image in images(recording, Path(name), count, chance):
                # Said before it is opened: what kills this process is what was said last.
                pipe.send(f"image {image.place} {image.how}")
                try:
                    fault = find(image, recording, FIRST_BOOT + done)
                except Exception:  # pylint: disable=broad-exception-caught
                    fault = traceback.format_exc()
                done += 1
                if fault:
                    faults.append(f"image {image.place} {image.how}: {fault}")
                    if is_over_at_first:
                        break
        pipe.send(Summary(done, faults))

    with support.Child(run) as child:
        last = ""
        said: Any = ""
        while isinstance(said, str):
            last = said
            try:
                said = child.get()
            except AssertionError as error:
                raise AssertionError(f"{last}: {error}") from error
        child.end()
        assert isinstance(said, Summary)
        return said
