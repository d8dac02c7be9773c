"""
Test that costs do not grow: flushes with senders, takes with what is held, files with use.

Where it can be, things are counted: counts do not wobble as times do.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import persipubsub.queue
from persipubsub import Pub, errors
from persipubsub.lmdb_engine import attempts, consuming, environment, positions
from tests import stores, support
from tests.faults import tracing

_FLUSHES = "fsync,fdatasync,msync,sync_file_range,syncfs,sync"


def count_flushes(directory: Path, start: Callable[[], Callable[[], None]]) -> int:
    """Count how often a function waits for the disk."""
    trace = directory / "trace"
    assert tracing.run(start, ["-o", str(trace), "-e", f"trace={_FLUSHES}"]) == 0
    # Not the ends of those that other threads interrupted.
    return len(re.findall(r"^\d+ +\w+\(", trace.read_text("utf-8"), re.MULTILINE))


def test_threads_share_flushes(tmp_path: Path) -> None:
    tracing.require()
    config_pth = support.make_queue(tmp_path, checkpoint_secs=3600)

    def start() -> Callable[[], None]:
        pub = Pub("pub", config_pth)
        pub.send(b"first")

        def send() -> None:
            for _ in range(25):
                pub.send(b"x" * 256)

        def work() -> None:
            support.in_threads([send] * 8)
            os._exit(0)

        return work

    # Under strace, threads take turns more often than otherwise.
    assert 25 <= count_flushes(tmp_path, start) < 190


def test_threads_share_transactions(tmp_path: Path) -> None:
    with stores.opened(tmp_path, durability=stores.FSYNC) as queue:
        before = queue.statistics().commits

        def send() -> None:
            for _ in range(50):
                queue.put([b"x" * 256])

        support.in_threads([send] * 8)
        assert 25 <= queue.statistics().commits - before < 380
        assert len(stores.take_all(queue)) == 400


def test_processes_share_flushes(tmp_path: Path) -> None:
    tracing.require()
    config_pth = support.make_queue(tmp_path, checkpoint_secs=3600)

    def send(ready: int, go: int) -> None:
        with Pub("pub", config_pth) as pub:
            os.write(ready, b"x")
            os.read(go, 1)
            for _ in range(60):
                pub.send(b"x" * 256)

    def start() -> Callable[[], None]:

        def work() -> None:
            ready, go = os.pipe(), os.pipe()
            children = []
            for _ in range(3):
                children.append(os.fork())
                if children[-1] == 0:
                    send(ready[1], go[0])
                    os._exit(0)
            for _ in children:
                os.read(ready[0], 1)
            os.write(go[1], b"xxx")
            for child in children:
                assert os.waitpid(child, 0)[1] == 0
            os._exit(0)

        return work

    # Those of opening and closing the queue are among them.
    assert 60 <= count_flushes(tmp_path, start) < 180


@pytest.fixture(name="counts")
def fixture_counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Count transactions, and how often a search looks at a message or at a record of attempts."""
    counts = {"reads": 0, "writes": 0, "looks": 0, "records": 0}

    def count(owner: object, name: str, what: str) -> None:
        function = getattr(owner, name)

        def counted(*arguments: object, **named: object) -> object:
            counts[what] += 1
            return function(*arguments, **named)

        monkeypatch.setattr(owner, name, counted)

    count(environment.Environment, "read", "reads")
    count(environment.Environment, "write", "writes")
    count(positions, "next_run", "looks")
    count(attempts, "skip_retries", "records")
    yield counts


@pytest.mark.parametrize("held", [10, 300])
def test_take_does_not_cost_more_the_more_is_held(tmp_path: Path, counts: dict[str, int],
                                                  held: int) -> None:
    with stores.opened(tmp_path) as queue:
        consumer = queue.consumer("sub")
        for index in range(held + 50):
            queue.put([b"%d" % index])
        leases = [consumer.take(timeout=0) for _ in range(held)]
        counts.update(reads=0, looks=0)
        begin = time.monotonic()
        more = [consumer.take(timeout=0) for _ in range(50)]
        # Each time that this pause is over, a take looks whether others gave something back: at all
        # that is held, and with a further read. A take that always did so would look 50 times.
        again = 1 + int((time.monotonic() - begin) / consuming.CLAIMED_PAUSE_SECS)
        assert [lease.messages[0] for lease in more
                if lease] == [b"%d" % index for index in range(held, held + 50)]
        assert counts["reads"] <= 100 + 2 * again
        assert counts["looks"] <= 50 * 3 + (3 + again) * held
        for lease in leases + more:
            assert lease is not None
            lease.ack()


def test_take_does_not_walk_through_messages_that_are_retried_later(tmp_path: Path,
                                                                    counts: dict[str, int]) -> None:
    policy = attempts.Policy(delay_ns=3600 * stores.SECOND_NS)
    with stores.opened(tmp_path, retries={"sub": persipubsub.queue.Retries(policy, "q")}) as queue:
        for index in range(350):
            queue.put([b"%d" % index])
        consumer = queue.consumer("sub")
        stores.lease(queue, most=300).nack(ValueError("no"))
        counts.update(records=0)
        found = [consumer.take(timeout=0) for _ in range(50)]
        assert counts["records"] <= 50 * 3 + 4 * 300
        for lease in found:
            assert lease is not None
            lease.ack()


# Room


def test_small_queue_with_ids_and_seeks_stays_small(tmp_path: Path) -> None:
    limit = 1 << 20
    clock = stores.Clock()
    with stores.opened(tmp_path,
                       clock=clock,
                       max_db_size_bytes=limit,
                       once_window_secs=100,
                       retain_secs=100) as queue:
        sizes = []
        for round_ in range(40):
            for index in range(50):
                try:
                    queue.put([bytes(500)], msg_ids=[b"%d-%d" % (round_, index)])
                except errors.DiskFullError:
                    break  # full of ids
            stores.take_all(queue)
            if round_ % 3 == 0:
                queue.seek("sub", "beginning")
            clock.advance(20)
            sizes.append(queue.statistics().file_bytes)
        # Mapped is an eighth more than the limit, at least 1 MiB.
        assert max(sizes) <= 2 * limit
        assert queue.statistics().disk_bytes < 6 * limit
