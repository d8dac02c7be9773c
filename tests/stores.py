"""Help the tests of the queue's core with stores in temporary directories."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lmdb

import persipubsub.config
import persipubsub.queue
from persipubsub.store import _attempts, _databases, _layout, _log, _positions
from persipubsub.store._databases import Databases
from tests import support

#: An injected clock begins here.
START_NS = 10**18

SECOND_NS = 10**9


class Clock:
    """Be a clock that a test advances."""

    def __init__(self) -> None:
        """Initialize at a time that is not zero."""
        self.now_ns = START_NS

    def __call__(self) -> int:
        """Return the time."""
        return self.now_ns

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now_ns += int(seconds * SECOND_NS)


def settings(directory: pathlib.Path, **changes: Any) -> persipubsub.queue.Settings:
    """
    Make settings of a queue in ``directory/queue``.

    :param directory: where to
    :param changes: what shall differ from a queue with room for nearly everything
    :return: settings
    """
    made = support.settings(support.write_config(directory))
    # Tests that want a checkpoint say so: it is made by a thread at a time of its own.
    return made._replace(checkpoint_secs=0)._replace(**changes)


def pruning(drops_newest: bool) -> persipubsub.config.Strategy:
    """Choose the strategy that drops the newest messages, or the oldest."""
    strategies = persipubsub.config.Strategy
    return strategies.PRUNE_LAST if drops_newest else strategies.PRUNE_FIRST


def rewrite(txn: Any, databases: Any) -> int:
    """Change a page, so that there is something to be committed; return the transaction's id."""
    header = bytes(txn.get(_layout.HEADER_KEY, db=databases.meta))
    txn.put(_layout.HEADER_KEY, header, db=databases.meta)
    return int(txn.id())


@contextlib.contextmanager
def opened(directory: pathlib.Path,
           subscribers: Sequence[str] = ("sub", ),
           clock: Callable[[], int] | None = None,
           **changes: Any) -> Iterator[persipubsub.queue.Queue]:
    """
    Create a queue and open it; check the whole store at the end.

    :param directory: where to
    :param subscribers: of the queue
    :param clock: of the queue; its own one if not given
    :param changes: of the settings
    """
    made = settings(directory, **changes)
    persipubsub.queue.Queue.ensure(made, subscribers=subscribers)
    with persipubsub.queue.Queue(made, clock=clock) as queue:
        yield queue
        assert queue.check() == []


def take(queue: persipubsub.queue.Queue, name: str = "sub") -> bytes | None:
    """Take a message of a subscriber and acknowledge it."""
    lease = queue.consumer(name).take(timeout=0)
    if lease is None:
        return None
    lease.acknowledge()
    return lease.messages[0]


def take_all(queue: persipubsub.queue.Queue, name: str = "sub") -> list[bytes]:
    """Take all messages of a subscriber and acknowledge them."""
    consumer = queue.consumer(name)
    messages: list[bytes] = []
    while (lease := consumer.take(timeout=0)) is not None:
        messages.extend(lease.messages)
        lease.acknowledge()
    return messages


def figures(queue: persipubsub.queue.Queue,
            name: str = "sub") -> "persipubsub.statistics.SubscriberStatistics":
    """Return the figures of a subscriber."""
    return next(entry for entry in queue.statistics().subscribers if entry.subscriber == name)


def blocks(queue: persipubsub.queue.Queue) -> list[range]:
    """List the numbers of all blocks that are stored; an empty range is a placeholder."""

    def work(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> list[range]:
        return [
            range(first, first + block.messages)
            for first, block, _ in _log.list_blocks(txn.cursor(db=databases.data))
        ]

    return queue._environment.read(work)  # pylint: disable=protected-access


def ranges(queue: persipubsub.queue.Queue, name: str = "sub") -> list[range]:
    """List what a subscriber acknowledged ahead of its position."""

    def work(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> list[range]:
        ordinal = _positions.require(txn, databases, name.encode("utf-8")).ordinal
        return [range(*found) for found in _positions.ranges(txn, databases, ordinal)]

    return queue._environment.read(work)  # pylint: disable=protected-access


def attempts(queue: persipubsub.queue.Queue, name: str = "sub") -> dict[int, _layout.Attempts]:
    """List the records of attempts of a subscriber by the numbers of the messages."""

    def work(txn: "lmdb.Transaction[memoryview]",
             databases: Databases) -> dict[int, _layout.Attempts]:
        ordinal = _positions.require(txn, databases, name.encode("utf-8")).ordinal
        return dict(_attempts.between(txn, databases, ordinal, 0, 1 << 60))

    return queue._environment.read(work)  # pylint: disable=protected-access


class Scratch:
    """Be an empty store without a queue, whose transactions are thrown away."""

    def __init__(self, directory: pathlib.Path) -> None:
        """Create the sub-databases."""
        self.environment = lmdb.open(str(directory),
                                     map_size=1 << 26,
                                     max_dbs=8,
                                     sync=False,
                                     lib_version=0)
        self.databases = Databases(*(self.environment.open_db(name) for name in _databases.NAMES))

    @contextlib.contextmanager
    def begin(self) -> "Iterator[lmdb.Transaction[memoryview]]":
        """Run a write transaction and abort it."""
        with self.environment.begin(write=True, buffers=True) as txn:
            yield txn
            txn.abort()
