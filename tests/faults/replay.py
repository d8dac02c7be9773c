"""Record a queue at work, cut its power at many places, and look at what is left."""

import dataclasses
import faulthandler
import json
import logging
import os
import pathlib
import random
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import persipubsub.config
import persipubsub.control
import persipubsub.errors
import persipubsub.publisher
import persipubsub.queue
import persipubsub.subscriber
from persipubsub.environment import _checkpoint, _files
from persipubsub.store import _clock
from tests import support
from tests.faults import disk, tracing

#: So many images a test; the enlarged form takes every place and many images of each.
IMAGES: Final = int(os.environ.get("PERSIPUBSUB_REPLAYS", "100"))

_SETTLING = ("write", "pwrite64", "writev", "pwritev", "fsync", "fdatasync", "rename", "unlink",
             "mkdir", "rmdir", "ftruncate", "fallocate", "sendfile")


class State(NamedTuple):
    """Hold what can be seen of a queue between two operations."""

    sent: int  #: messages so far
    next_number: int
    lag: int
    position: int
    acknowledged: int
    failed: int
    dropped: int
    cleared: int
    skipped: int

    def is_seen_as(self, other: "State") -> bool:
        """Tell whether two states differ in nothing but how many numbers were skipped."""
        return self._replace(sent=0, next_number=0) == other._replace(sent=0, next_number=0)


def state_of(queue: persipubsub.queue.Queue, sent: int) -> State:
    """Look at a queue."""
    statistics = queue.statistics()
    subscriber = statistics.subscribers[0]
    return State(sent, statistics.next_number, subscriber.lag, subscriber.position,
                 subscriber.acknowledged, subscriber.failed, subscriber.dropped_by_mark,
                 subscriber.cleared, subscriber.skipped)


def content(seed: int, index: int) -> bytes:
    """Make the bytes of a message."""
    chance = random.Random(seed * 1000003 + index)
    size = chance.choice((0, 10, 100, 300, 1000, 3000, 5000, 20000))
    return b"%d " % index + chance.randbytes(chance.randrange(size + 1))


def write_config(directory: pathlib.Path,
                 durability: str,
                 checkpoint_secs: float = 0.01) -> pathlib.Path:
    """Write the configuration of a queue that drops messages from time to time."""
    return support.write_config(directory,
                                durability=durability,
                                checkpoint_secs=checkpoint_secs,
                                MAX_MSGS_NUM=60)


class _Worker:
    """Work with a queue, and tell in a ledger what was begun and what was done."""

    def __init__(self, config_pth: pathlib.Path, ledger: pathlib.Path, seed: int,
                 sent: int) -> None:
        self.config_pth = config_pth
        self.ledger = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        self.seed = seed
        self.chance = random.Random(seed)
        self.sent = sent
        self.pub = persipubsub.publisher.Pub()
        self.sub = persipubsub.subscriber.Sub()
        # It has always another handle, so that the state can be read while the others are closed.
        self.settings = support.settings(config_pth)

    def tell(self, **fields: Any) -> None:
        """Write a line of the ledger, in one call."""
        os.write(self.ledger, (f"{json.dumps(fields)}\n").encode("ascii"))

    def queue(self) -> persipubsub.queue.Queue:
        """Return the open queue."""
        return support.queue_of(self.pub)

    def open(self) -> None:
        """Open the queue."""
        self.pub.init(pub_id="pub", config_pth=self.config_pth)
        self.sub.init(sub_id="sub", config_pth=self.config_pth)

    def run(self, operations: int, closes: bool = True) -> None:
        """Do some operations at random."""
        self.open()
        self.tell(state=state_of(self.queue(), self.sent))
        for _ in range(operations):
            operation = self.chance.choices(
                (self.send, self.send_many, self.receive, self.receive_many, self.fail, self.skip,
                 self.clear, self.reopen, self.wait),
                weights=(40, 8, 25, 5, 3, 1, 1, 3, 8))[0]
            self.tell(begin=operation.__name__)
            operation()
            self.tell(state=state_of(self.queue(), self.sent),
                      closed=operation.__name__ == "reopen")
        if closes:
            self.pub.close()
            self.sub.close()
            self.tell(closed=True)

    def messages(self, count: int) -> list[bytes]:
        """Make the next messages."""
        made = [content(self.seed, self.sent + index) for index in range(count)]
        self.sent += count
        return made

    def send(self) -> None:
        """Send a message."""
        self.pub.send(self.messages(1)[0])

    def send_many(self) -> None:
        """Send some messages in one commit."""
        self.pub.send_many(self.messages(self.chance.randrange(2, 15)))

    def receive(self) -> None:
        """Receive a message, if there is one."""
        with self.sub.receive(timeout=0):
            pass

    def receive_many(self) -> None:
        """Receive some messages."""
        with self.sub.receive_many(max_msgs=7, timeout=0):
            pass

    def fail(self) -> None:
        """Fail while receiving."""
        try:
            with self.sub.receive(timeout=0):
                raise KeyError("fails on purpose")
        except KeyError:
            pass

    def skip(self) -> None:
        """Skip to the newest message."""
        self.sub.pop_to_top()

    def clear(self) -> None:
        """Clear the queue."""
        persipubsub.control.clear_all_subs(config_pth=self.config_pth)

    def reopen(self) -> None:
        """Close the queue and open it again."""
        self.pub.close()
        self.sub.close()
        self.tell(closed=True)
        self.open()

    def wait(self) -> None:
        """Wait for the next checkpoint."""
        if not (self.settings.keeps_os and self.settings.checkpoint_secs):
            return
        handles = self.queue()._environment._handles  # pylint: disable=protected-access
        assert handles is not None
        last = handles.environment.info()["last_txnid"]
        deadline = time.monotonic() + support.HANG_SECS
        while _checkpoint.covered_transaction(self.settings.path) < last:
            assert time.monotonic() < deadline, "Waited in vain for a checkpoint"
            time.sleep(0.005)


def new_boot(number: int) -> None:
    """Let this process believe that the machine has just been started."""
    started = time.monotonic_ns()
    setattr(_clock, "boot_id", lambda: b"boot %11d" % number)
    setattr(_files, "ticks_ns", lambda: time.monotonic_ns() - started + 10**9)


@dataclasses.dataclass
class Recording:
    """Hold what a process did to the files of a queue, and what it says that it did."""

    root: pathlib.Path  #: directory that was recorded
    config_pth: pathlib.Path
    events: list[disk.Event]
    seed: int
    initial: pathlib.Path | None  #: directory with what was there before
    checkpoint_secs: float
    is_os: bool
    before: Sequence[bytes] = ()  #: messages that waited at the beginning
    sent_before: int = 0  #: messages that were sent before it

    def pending(self, state: State) -> list[bytes]:
        """List the messages that wait in a state."""
        later = (content(self.seed, at) for at in range(self.sent_before, state.sent))
        messages = [*self.before, *later]
        return messages[len(messages) - state.lag:]


def record(directory: pathlib.Path,
           seed: int,
           durability: str,
           checkpoint_secs: float = 0.01,
           operations: int = 120,
           prepare: Callable[[], None] = lambda: None,
           work: Callable[[pathlib.Path, pathlib.Path], None] | None = None) -> Recording:
    """
    Record a queue at work, from its creation to its end.

    :param directory: to work in
    :param seed: of what it does
    :param durability: of the queue
    :param checkpoint_secs: of the queue
    :param operations: how many
    :param prepare: run in the recorded process first
    :param work: to be recorded instead; gets the configuration file and the ledger
    :return: recording
    """
    root = directory / "root"
    root.mkdir()
    config_pth = write_config(root, durability, checkpoint_secs)
    new = directory / "initial"
    shutil.copytree(root, new)

    def run() -> None:
        new_boot(0)
        prepare()
        if work is not None:
            work(config_pth, directory / "ledger")
            return
        worker = _Worker(config_pth, directory / "ledger", seed, sent=0)
        persipubsub.control.initialize_all_dbs(config_pth=config_pth)
        worker.tell(initialized=True)
        worker.run(operations)

    events = disk.record(run, directory / "trace")
    return Recording(root, config_pth, events, seed, new, checkpoint_secs, durability == "os")


def record_recovery(directory: pathlib.Path, recording: Recording, image: "Image",
                    operations: int) -> Recording:
    """
    Record a queue that goes on after a power failure.

    :param directory: to work in
    :param recording: that was cut
    :param image: what the power failure left behind; it is taken away
    :param operations: how many follow
    :return: recording
    """
    root = directory / "root"
    shutil.copytree(image.path, root)
    config_pth = write_config(root, "os")
    initial = directory / "initial"
    shutil.copytree(root, initial)
    sent = 1000

    def work() -> None:
        new_boot(1)
        _Worker(config_pth, directory / "ledger", recording.seed, sent=sent).run(operations)

    events = disk.record(work, directory / "trace")
    result = Recording(root, config_pth, events, recording.seed, initial, 0.01, True)
    found = _find_state(follow_to_end(result).states[0], image)
    assert found is not None, "Expected an earlier state"
    state = [*image.progress.states, image.upcoming][found]
    assert state is not None
    result.before = recording.pending(state)
    result.sent_before = sent
    return result


@dataclasses.dataclass
class Progress:
    """Hold what is known of a queue at a place of a recording."""

    is_initialized: bool = False
    recovers: bool = False  #: there was a queue before the recording
    states: list[State] = dataclasses.field(default_factory=list)
    begun: str = ""  #: operation that is running
    lower: int = -1  #: index of the earliest state that may be found
    checkpoints: int = 0  #: that finished
    lines: list[dict[str, Any]] = dataclasses.field(default_factory=list)  #: of the ledger
    covered_lines: int = 0  #: of them were written before the last finished checkpoint began


class _Follower:
    """Follow a recording: the disk, the ledger and the checkpoints."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.disk = disk.Disk(recording.root, recording.initial)
        recovers = recording.initial is not None and (recording.initial / "queue").exists()
        self.progress = Progress(is_initialized=recovers, recovers=recovers)
        self.ledger = str(recording.root.parent / "ledger")
        self.ledger_descriptor = -1
        self.copying: tuple[int, int] | None = None
        self.renamed: tuple[int, int] | None = None

    def feed(self, event: disk.Event) -> None:
        """Follow one event."""
        call = event.call
        self.disk.feed(event)
        if event.result is None:
            if call.name == "openat" and call.strings[0].endswith(b"/checkpoint.mdb.new"):
                self.copying = (len(self.progress.states) - 1, len(self.progress.lines))
            return
        if call.name == "openat" and call.strings[0].decode() == self.ledger:
            self.ledger_descriptor = event.result
        elif call.name == "write" and int(call.words[0]) == self.ledger_descriptor:
            self._read_ledger(json.loads(call.strings[0]))
        elif call.name == "rename" and call.strings[1].endswith(b"/checkpoint.mdb"):
            self.renamed = self.copying
        elif call.name == "pwrite64" and self.renamed is not None:
            opened = self.disk.descriptors.get(int(call.words[0]))
            if opened is not None and opened.path.endswith("/checkpoint.lock"):
                # That is how the library says that it is finished, after the last flush.
                self.progress.checkpoints += 1
                self.progress.lower = max(self.progress.lower, self.renamed[0])
                self.progress.covered_lines = self.renamed[1]
                self.renamed = None

    def _read_ledger(self, line: dict[str, Any]) -> None:
        """Read a line of the ledger."""
        progress = self.progress
        progress.lines.append(line)
        progress.is_initialized = True
        if "begin" in line:
            progress.begun = line["begin"]
        if "state" in line:
            state = State(*line["state"])
            progress.states.append(state)
            # An acknowledgement may be lost: the message is delivered again.
            if not self.recording.is_os and progress.begun in ("send", "send_many"):
                progress.lower = len(progress.states) - 1
            if len(progress.states) == 1:
                progress.lower = 0
            progress.begun = ""
        if line.get("closed") and self.recording.is_os:
            progress.lower = len(progress.states) - 1


class Image(NamedTuple):
    """Hold one cut: what was known at it, and where its image is."""

    place: int
    path: pathlib.Path
    progress: Progress
    upcoming: State | None  #: state behind the operation that was running
    how: disk.Survival


def images(recording: Recording, target: pathlib.Path, count: int,
           chance: random.Random) -> Iterator[Image]:
    """
    Cut the power at many places.

    :param recording: to be cut
    :param target: directory for the images, one at a time
    :param count: how many images
    :param chance: to choose with
    :return: images; each is removed when the next one is taken
    """
    states = [
        State(*line["state"])
        for line in map(json.loads, (recording.root.parent /
                                     "ledger").read_text("ascii").splitlines()) if "state" in line
    ]
    places = [
        index for index, event in enumerate(recording.events) if event.call.name in _SETTLING and (
            event.result is not None or event.call.name in ("fsync", "fdatasync"))
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
        progress = dataclasses.replace(follower.progress,
                                       states=list(follower.progress.states),
                                       lines=list(follower.progress.lines))
        known = len(progress.states)
        upcoming = states[known] if known < len(states) else None
        yield Image(place, path, progress, upcoming, how)
        shutil.rmtree(path)


def follow_to_end(recording: Recording) -> Progress:
    """Follow a whole recording."""
    follower = _Follower(recording)
    for event in recording.events:
        follower.feed(event)
    return follower.progress


def find_fault(image: Image, recording: Recording, boot: int) -> str:
    """
    Open an image after a power failure, and use it.

    :param image: to be opened
    :param recording: that it is of
    :param boot: number of the boot
    :return: what is wrong; empty if it is sound
    """
    new_boot(boot)
    progress = image.progress
    config_pth = write_config(image.path, "os" if recording.is_os else "fsync",
                              recording.checkpoint_secs)
    if not progress.is_initialized:
        persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        findings = queue.check()
        if findings:
            return "; ".join(findings)
        found = state_of(queue, 0)
        if not progress.states and not progress.recovers:
            return "" if found.lag == 0 else "Expected no message"
        index = _find_state(found, image)
        if index is None:
            return "Expected an earlier state, but got: {}; states: {}; upcoming: {}".format(
                found, progress.states[max(0, progress.lower):], image.upcoming)
        state = progress.states[index] if index < len(progress.states) else image.upcoming
        assert state is not None
        if not recording.is_os and found.next_number != state.next_number:
            return (f"Expected the numbers to go on from {state.next_number}, but got: "
                    f"{found.next_number}")
        # Somebody else may have received what was being sent.
        used = max(known.next_number for known in (*progress.states, image.upcoming or found))
        if recording.is_os and index < len(progress.states) - 1 and found.next_number < used:
            return f"Expected no number below {used}, but got: {found.next_number}"
    return _use(config_pth, recording.pending(state))


def _find_state(found: State, image: Image) -> int | None:
    """Find a state among those that may be there."""
    progress = image.progress
    for index in range(len(progress.states) - 1, max(0, progress.lower) - 1, -1):
        if found.is_seen_as(progress.states[index]):
            return index
    if image.upcoming is not None and found.is_seen_as(image.upcoming):
        return len(progress.states)
    return None


def _use(config_pth: pathlib.Path, expected: Sequence[bytes]) -> str:
    """Receive all messages of an image and send another one."""
    with persipubsub.publisher.Pub() as pub, persipubsub.subscriber.Sub() as sub:
        pub.init(pub_id="pub", config_pth=config_pth)
        sub.init(sub_id="sub", config_pth=config_pth)
        for message in (*expected, None, b"afterwards", None):
            # Not earlier: at its high-water mark the queue would drop messages for it.
            if message == b"afterwards":
                pub.send(message)
            with sub.receive(timeout=0) as received:
                if received != message:
                    return (f"Expected the message {message and message[:20]!r}, but got: "
                            f"{received and received[:20]!r}")
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        return "; ".join(queue.check())


class Summary(NamedTuple):
    """Hold what came of many images."""

    images: int
    refused: list[str]  #: with StoreCorruptError
    faults: list[str]  #: everything else that is wrong

    def assert_sound(self) -> None:
        """Fail if anything is wrong with any image."""
        found = self.faults + self.refused
        print(f"{self.images} images")
        assert not found, "{} of {} images:\n{}".format(len(found), self.images,
                                                        "\n".join(found[:3]))


def survey(recording: Recording,
           count: int,
           chance: random.Random,
           boot: int = 10,
           find: Callable[[Image, Recording, int], str] = find_fault) -> Summary:
    """
    Open many images, in a process that may crash.

    :param recording: to be cut
    :param count: how many images
    :param chance: to choose with
    :param boot: number of the boot; each image has its own
    :param find: finds what is wrong with an image
    :return: number of images, of refusals with StoreCorruptError, faults other than these
    """

    def run(pipe: support.Connection) -> None:
        logging.getLogger("persipubsub").setLevel(logging.CRITICAL)
        # Without a protection an image may crash the process; the parent reports it.
        faulthandler.disable()
        refused: list[str] = []
        faults: list[str] = []
        done = 0
        fault = ""
        with tracing.fast_directory() as name:
            for image in images(recording, pathlib.Path(name), count, chance):
                # Said before it is opened: what kills this process is what was said last.
                pipe.send(f"image {image.place} {image.how}")
                try:
                    fault = find(image, recording, boot + done)
                except persipubsub.errors.StoreCorruptError as error:
                    refused.append(f"image {image.place} {image.how}: {error}")
                except Exception:  # pylint: disable=broad-exception-caught
                    fault = traceback.format_exc()
                if fault:
                    faults.append(f"image {image.place} {image.how}: {fault}")
                fault = ""
                done += 1
        pipe.send(Summary(done, refused, faults))

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
