"""
Test what sending and receiving cost, by counting: transactions, flushes, system calls.

Counts do not wobble as times do, so that a slower design does not slip in unseen. Whoever means to
change what an operation costs changes the table below, in the same commit.
"""

import collections
import functools
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from persipubsub import Pub, Sub
from persipubsub.lmdb_engine import environment
from tests import support
from tests.faults import tracing

#: So many single messages are sent and received, and so many are in the batch.
_SINGLES: Final = 100
_BATCH: Final = 200

_FLUSHES: Final = {
    "flushed write", "fsync", "fdatasync", "msync", "sync_file_range", "syncfs", "sync"
}
_LOCKS: Final = {"flock", "fcntl", "fcntl64"}
_WRITES: Final = {"pwrite64", "pwritev", "pwritev2", "writev", "write"}

# The memory of the process is the business of its allocator.
_MEMORY: Final = {"brk", "mmap", "munmap", "mremap", "madvise"}


class Cost(NamedTuple):
    """
    Say what some operations cost in all, with nobody waiting and nobody else at work.

    What is done once in a while, such as deleting a few finished blocks, is included: it has to be
    part of transactions that are made anyhow.
    """

    transactions: int  #: that write
    reads: int  #: read transactions, which make no system call
    flushes: int  #: waits for the disk
    locks: int  #: the gate between processes is locked and unlocked, and so is a claim
    most_writes: int  #: of LMDB: a page or a run of pages, and the meta page
    most_others: int  #: any other system call


# A send with fsync writes its messages to the journal and flushes that once. Nothing else waits for the
# disk. Whoever receives one message after the other finds the next one by what it knows of the end: one
# read transaction, in which the message is copied.
_RECEIVE: Final = Cost(100, 100, 0, 400, 400, 5)
_RECEIVE_MANY: Final = Cost(1, 2, 0, 4, 4, 4)
_COSTS: Final = {
    "fsync": {
        # transactions, reads, flushes, locks, most_writes, most_others
        "send": Cost(100, 100, 100, 400, 580, 5),
        "receive": _RECEIVE,
        "send_many": Cost(1, 1, 1, 4, 9, 5),
        "receive_many": _RECEIVE_MANY,
    },
    "os": {
        "send": Cost(100, 0, 0, 200, 480, 5),
        "receive": _RECEIVE,
        "send_many": Cost(1, 0, 0, 2, 8, 1),
        "receive_many": _RECEIVE_MANY,
    },
}


def last_transaction(sub: Sub) -> int:
    return support.queue_of(sub)._environment.committed


def count_reads() -> list[None]:
    """Make a list longer by each read transaction of this process, which is a forked child."""
    reads: list[None] = []
    read = environment.Environment.read

    def counted(self: environment.Environment, work: Callable[..., Any], *args: Any) -> Any:
        reads.append(None)
        return read(self, work, *args)

    environment.Environment.read = counted  # type: ignore[method-assign]
    return reads


def send_and_receive(config_pth: Path) -> None:
    """Do everything that is counted. Between two operations a look for a file is left as a mark."""
    reads = count_reads()
    with Pub("pub", config_pth) as pub, Sub("sub", config_pth) as sub:

        def mark(name: str) -> None:
            os.access(f"/mark/{name}/{last_transaction(sub)}/{len(reads)}", os.F_OK)

        def receive(count: int) -> None:
            for _ in range(count):
                with sub.receive(timeout=support.HANG_SECS) as msg:
                    assert msg == b"x" * 256

        # A segment of the journal that is large enough for all that follows.
        for _ in range(3):
            pub.send_many([b"x" * 256] * 5 * _BATCH)
            with sub.receive_many(5 * _BATCH) as msgs:
                assert len(msgs) == 5 * _BATCH
        # What os copies now and then is copied.
        support.queue_of(pub).secure()
        # Files that are opened at their first use.
        for _ in range(20):
            pub.send(b"x" * 256)
            receive(1)
        mark("send")
        for _ in range(_SINGLES):
            pub.send(b"x" * 256)
        mark("receive")
        receive(_SINGLES)
        mark("send_many")
        pub.send_many([b"x" * 256] * _BATCH)
        mark("receive_many")
        with sub.receive_many(_BATCH, timeout=support.HANG_SECS) as msgs:
            assert len(msgs) == _BATCH
        mark("end")


def count(trace_pth: Path) -> dict[str, Counter[str]]:
    """Count the system calls between two marks, by the name of the first one."""
    counts: dict[str, Counter[str]] = {}
    before = transactions, reads = 0, 0
    flushed: set[str] = set()
    current: Counter[str] = collections.Counter()
    for line in trace_pth.read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.search(r'"/mark/(\w+)/(\d+)/(\d+)"', line)
        if match is not None:
            transactions, reads = int(match.group(2)), int(match.group(3))
            current.update(transactions=transactions - before[0], reads=reads - before[1])
            before = transactions, reads
            current = counts[match.group(1)] = collections.Counter()
            continue
        opened = re.search(r"\bO_D?SYNC\b.* = (\d+)$", line)
        if opened is not None:
            flushed.add(opened.group(1))
        call = re.match(r"(?:\d+ +)?(\w+)\((\d*)", line)
        if call is not None:
            # LMDB opens its file for such writes; it must not make any.
            is_flushed = call.group(1) in _WRITES and call.group(2) in flushed
            current["flushed write" if is_flushed else call.group(1)] += 1
    assert list(counts) == ["send", "receive", "send_many", "receive_many", "end"]
    return counts


def cost_of(counts: Counter[str]) -> Cost:
    rest = collections.Counter(counts)
    transactions, reads = rest.pop("transactions"), rest.pop("reads", 0)
    for name in _MEMORY:
        rest.pop(name, None)
    # LMDB seeks in front of each write of a run of pages, and how many runs there are is chance.
    rest["lseek"] -= min(rest["lseek"], rest["writev"])
    flushes, locks, writes = (sum(rest.pop(name, 0) for name in names)
                              for names in (_FLUSHES, _LOCKS, _WRITES))
    return Cost(transactions, reads, flushes, locks, writes, sum(rest.values()))


@pytest.fixture(name="trace", scope="module")
def fixture_trace(
        tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Counter[str]]]:
    tracing.require()

    @functools.cache
    def trace(durability: str) -> dict[str, Counter[str]]:
        directory = tmp_path_factory.mktemp("costs")
        # The background thread works by the clock.
        config_pth = support.make_queue(directory, durability=durability, checkpoint_secs=86400)
        trace_pth = directory / "trace"
        work = functools.partial(send_and_receive, config_pth)
        assert tracing.run(lambda: work, ["-o", str(trace_pth)]) == 0
        return count(trace_pth)

    return trace


@pytest.mark.parametrize("operation", ["send", "receive", "send_many", "receive_many"])
@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_costs(durability: str, operation: str, trace: Callable[[str], dict[str,
                                                                            Counter[str]]]) -> None:
    counts = trace(durability)[operation]
    found, expected = cost_of(counts), _COSTS[durability][operation]
    print(f"{durability} {operation}: {found}, {dict(counts)}")
    assert found[:4] == expected[:4], counts
    # Pages split and merge as the tree grows and shrinks, and neighbours are written in one call:
    # the number of writes is bounded only. From below, too, since a trace that misses some proves
    # nothing.
    assert 0.4 * expected.most_writes <= found.most_writes <= expected.most_writes, counts
    assert found.most_others <= expected.most_others, counts


def send_and_die(pipe: support.Connection, config_pth: Path) -> None:
    pub = Pub("pub", config_pth)
    for number in range(10):
        pub.send(b"%d" % number)
    pipe.send("sent")
    pipe.recv()


@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_what_a_killed_process_sent_is_flushed_by_the_next_opening(tmp_path: Path,
                                                                   durability: str) -> None:
    tracing.require()
    # The background thread does not come to flush.
    config_pth = support.make_queue(tmp_path, durability=durability, checkpoint_secs=86400)
    with support.Child(send_and_die, config_pth) as child:
        assert child.get() == "sent"
        child.kill(signal.SIGKILL)

    def open_and_die() -> None:
        Sub("sub", config_pth)
        os._exit(0)

    trace_pth = tmp_path / "trace"
    assert tracing.run(lambda: open_and_die,
                       ["-y", "-e", "trace=fsync,fdatasync", "-o",
                        str(trace_pth)]) == 0
    flushed = re.findall(r"\d+<([^>]+)>", trace_pth.read_text(encoding="utf-8"))
    assert [path for path in flushed if os.path.isfile(path)], flushed
