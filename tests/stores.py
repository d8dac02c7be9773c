"""Help the tests of the LMDB engine with queues in temporary directories."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import persipubsub.queue
from persipubsub import config, statistics
from persipubsub.lmdb_engine import attempts as attempts_module
from persipubsub.lmdb_engine import consuming
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log, positions, retention
from persipubsub.lmdb_engine.files import SharedPage
from persipubsub.lmdb_engine.format import Cursor
from tests import support

#: An injected clock begins here: ahead of the queue's own, by which nothing is too old then.
START_NS = 4 * 10**18

SECOND_NS = 10**9

_MARK = ("msg_timeout_secs", "max_msgs_num", "size_bytes", "strategy")

REJECT = config.Strategy.REJECT
BLOCK = config.Strategy.BLOCK
PRUNE_FIRST = config.Strategy.PRUNE_FIRST
PRUNE_LAST = config.Strategy.PRUNE_LAST
FSYNC = config.Durability.FSYNC
OS = config.Durability.OS


class Clock:

    def __init__(self) -> None:
        self.now_ns = START_NS

    def __call__(self) -> int:
        return self.now_ns

    def advance(self, seconds: float) -> None:
        self.now_ns += int(seconds * SECOND_NS)


def settings(**changes: Any) -> config.Queue:
    """Make settings of a queue, with the strategy ``prune_first`` and the durability ``os``."""
    mark = {key: changes.pop(key) for key in _MARK if key in changes}
    mark.setdefault("strategy", PRUNE_FIRST)
    changes.setdefault("durability", OS)
    # Tests that want something of the background thread say so.
    changes.setdefault("checkpoint_secs", 3600)
    changes.setdefault("max_db_size_bytes", 1 << 28)
    return config.Queue(subscribers=(), high_water_mark=config.HighWaterMark(**mark), **changes)


def path_of(directory: Path) -> str:
    return os.path.join(directory, "queue")


@contextlib.contextmanager
def opened(directory: Path,
           subscribers: Sequence[str] = ("sub", ),
           clock: Callable[[], int] | None = None,
           retries: Mapping[str, persipubsub.queue.Retries] | None = None,
           **changes: Any) -> Iterator[persipubsub.queue.Queue]:
    """Create a queue in ``directory/queue`` and open it; check the whole store at the end."""
    made, path = settings(**changes), path_of(directory)
    persipubsub.queue.Queue.ensure(path, made, subscribers)
    with persipubsub.queue.Queue(path, made, retries or {}, clock) as queue:
        yield queue
        assert queue.check() == []


def again(queue: persipubsub.queue.Queue,
          clock: Callable[[], int] | None = None) -> persipubsub.queue.Queue:
    """Open a queue a second time, with whatever settings are stored in it."""
    return persipubsub.queue.Queue(queue.path, settings(), clock=clock)


def lease(queue: persipubsub.queue.Queue, most: int = 1, name: str = "sub") -> consuming.Lease:
    """Take messages of a subscriber, of which there have to be some."""
    taken = queue.consumer(name).take(timeout=0, max_messages=most)
    assert taken is not None
    return taken


def take(queue: persipubsub.queue.Queue, name: str = "sub") -> bytes | None:
    taken = queue.consumer(name).take(timeout=0)
    if taken is None:
        return None
    taken.ack()
    return taken.messages[0]


def take_all(queue: persipubsub.queue.Queue, name: str = "sub") -> list[bytes]:
    consumer = queue.consumer(name)
    messages: list[bytes] = []
    while (taken := consumer.take(timeout=0)) is not None:
        messages.extend(taken.messages)
        taken.ack()
    return messages


def figures(queue: persipubsub.queue.Queue, name: str = "sub") -> statistics.SubscriberStatistics:
    return next(entry for entry in queue.statistics().subscribers if entry.subscriber == name)


def until_somebody_waits(path: str | Path) -> None:
    """Wait until a thread or a process sleeps until a queue changes."""
    page = os.path.join(path, "shared")

    def is_flagged() -> bool:
        with open(page, "rb") as file:
            file.seek(SharedPage.FLAG * 8)
            return any(file.read(8))

    support.until(is_flagged, what="somebody waits")


# What is in the store, for tests of what is deleted and when: no user sees it.


def read(queue: persipubsub.queue.Queue, work: Callable[[fmt.Tx], Any]) -> Any:
    """Run a function in a read transaction."""
    return queue._environment.read(work)


def write(queue: persipubsub.queue.Queue, work: Callable[[fmt.Tx], Any]) -> Any:
    """Run a function in a write transaction, as a test that damages a store has to."""
    return queue._environment.write(work)


def list_blocks(cursor: Cursor) -> list[log.Found]:
    blocks: list[log.Found] = []
    found = log.head(cursor)
    while found is not None:
        blocks.append(found)
        found = log.following(cursor)
    return blocks


def blocks(queue: persipubsub.queue.Queue) -> list[range]:
    """List the numbers of all blocks that are stored; an empty range is a placeholder."""
    found: list[range] = read(
        queue, lambda tx:
        [range(first, first + block.messages) for first, block, _ in list_blocks(tx.cursor())])
    return found


def _ordinal(tx: fmt.Tx, name: str) -> int:
    return positions.require(tx, name.encode("utf-8")).ordinal


def ranges(queue: persipubsub.queue.Queue, name: str = "sub") -> list[range]:
    """List what a subscriber acknowledged ahead of its position."""
    found: list[range] = read(
        queue, lambda tx: [range(*one) for one in positions.ranges(tx, _ordinal(tx, name))])
    return found


def attempts(queue: persipubsub.queue.Queue, name: str = "sub") -> dict[int, fmt.Attempts]:
    """List the records of attempts of a subscriber by the numbers of the messages."""
    found: dict[int, fmt.Attempts] = read(
        queue, lambda tx: dict(attempts_module.between(tx, _ordinal(tx, name), 0, 1 << 60)))
    return found


def begin_to_clear(queue: persipubsub.queue.Queue) -> int:
    """Do what is left of a ``clear`` that was killed behind its transaction."""
    dropped: list[retention.Dropped] = write(queue, retention.clear)
    return sum(one.messages for one in dropped)


def lose_power(path: str | Path) -> None:
    """Let a queue that nobody has open be found as after a power failure: it is rebuilt then."""
    with open(os.path.join(path, "running"), "wb") as mark:
        mark.write(bytes(range(16)))  # the id of another boot
