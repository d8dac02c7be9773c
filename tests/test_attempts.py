"""Test how deliveries are counted, how messages rest, and that no record is left behind."""

# pylint: disable=missing-function-docstring
# pylint: disable=protected-access

import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import persipubsub.queue
from persipubsub import _delivery, _wakeup
from persipubsub._settings import Retries
from persipubsub.maintenance import _upkeep
from persipubsub.store import _attempts, _layout, _positions
from persipubsub.store._databases import Databases
from tests import stores, support

ERROR = ValueError("no")


def retries(**policy: Any) -> "dict[str, Retries]":
    return {"sub": Retries(_attempts.Policy(**policy), "the queue", None)}


def take(queue: persipubsub.queue.Queue, most: int = 1) -> _delivery.Lease:
    lease = queue.consumer("sub").take(timeout=0, max_messages=most)
    assert lease is not None
    return lease


def attempts_of(lease: _delivery.Lease) -> list[int]:
    return [message.attempts for message in lease.details()]


def kill(lease: _delivery.Lease) -> None:
    """Leave what is left of a consumer that was killed."""
    lease._claim.release()


# Counting


def test_deliveries_that_succeed_leave_no_record(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1"])
        lease = take(queue)
        assert attempts_of(lease) == [1]
        assert stores.attempts(queue) == {}
        lease.acknowledge()


def test_without_a_limit_failures_count_and_crashes_do_not(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        number = queue.put([b"1"])
        take(queue).give_back(ERROR)
        kill(take(queue))
        assert stores.attempts(queue)[number].deliveries == 1
        lease = take(queue)
        assert attempts_of(lease) == [2]
        lease.acknowledge()
        assert stores.attempts(queue) == {}


def test_with_a_limit_crashes_count(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, retries=retries(max_deliveries=4)) as queue:
        number = queue.put([b"1"])
        kill(take(queue))
        take(queue).give_back(ERROR)
        lease = take(queue)
        assert attempts_of(lease) == [3]
        assert stores.attempts(queue)[number][:2] == (3, _layout.FLAG_IS_BEGUN)
        assert stores.attempts(queue)[number].error == "ValueError: no"
        lease.acknowledge()
        assert stores.attempts(queue) == {}


def test_crash_under_a_limit_that_is_gone_is_not_taken_for_the_next_failure(
        tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, retries=retries(max_deliveries=4)) as queue:
        number = queue.put([b"1"])
        kill(take(queue))
    with stores.opened(tmp_path) as queue:
        for count in (2, 3):
            lease = take(queue)
            assert attempts_of(lease) == [count]
            lease.give_back(ERROR)
            assert stores.attempts(queue)[number].deliveries == count


def test_spent_message_that_is_too_old_is_neither_delivered_nor_moved(
        tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path,
                       clock=clock,
                       timeout_ns=10 * stores.SECOND_NS,
                       retries=retries(max_deliveries=1)) as queue:
        number = queue.put([b"1"])
        kill(take(queue))
        clock.advance(11)
        assert queue.consumer("sub").take_at(number) is None
        assert stores.figures(queue).dead_lettered == 0


def test_count_is_committed_before_the_message_is_seen(tmp_path: pathlib.Path) -> None:
    made = stores.settings(tmp_path, retries=retries(max_deliveries=4))
    persipubsub.queue.Queue.ensure(made, subscribers=["sub"])

    def consume(pipe: support.Connection) -> None:
        with persipubsub.queue.Queue(made) as queue:
            lease = take(queue)
            pipe.send(lease.numbers[0])
            pipe.recv()

    with persipubsub.queue.Queue(made) as queue:
        queue.put([b"1"])
        for count in (1, 2):
            with support.Child(consume) as child:
                number = child.get()
                assert stores.attempts(queue)[number].deliveries == count
                child.kill(9)
                child.end(-9)


def test_message_that_nobody_worked_on_was_not_delivered(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, retries=retries(max_deliveries=2)) as queue:
        queue.put([b"1"])
        for _ in range(5):
            take(queue).give_back()
        assert stores.attempts(queue) == {}
        take(queue).give_back(ERROR)
        take(queue).give_back()
        assert attempts_of(take(queue)) == [2]


def test_failing_batch_counts_for_each_of_its_messages(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, retries=retries(max_deliveries=3)) as queue:
        queue.put([b"1", b"2", b"3"])
        take(queue, most=2).give_back(ERROR)
        lease = take(queue, most=3)
        assert attempts_of(lease) == [2, 2, 1]
        lease.acknowledge()
        assert stores.attempts(queue) == {}


def test_failure_of_what_was_dropped_meanwhile_leaves_no_record(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, retries=retries(max_deliveries=3, delay_ns=1)) as queue:
        queue.put([b"1", b"2"])
        lease = take(queue, most=2)
        queue.clear()
        assert stores.attempts(queue) == {}
        lease.give_back(ERROR)
        assert stores.attempts(queue) == {}
        assert stores.figures(queue).failed == 2


# Resting


def test_delay_doubles_up_to_an_hour(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path,
                       clock=clock,
                       timeout_ns=10**6 * stores.SECOND_NS,
                       retries=retries(delay_ns=1000 * stores.SECOND_NS)) as queue:
        queue.put([b"1"])
        for delay in (1000, 2000, 3600, 3600):
            take(queue).give_back(ERROR)
            clock.advance(delay - 1)
            assert queue.consumer("sub").take(timeout=0) is None
            assert queue.front("sub") is None
            clock.advance(1)
        take(queue).acknowledge()


def test_longest_first_delay_is_kept() -> None:
    policy = _attempts.Policy(delay_ns=7200 * stores.SECOND_NS)
    assert [policy.delay_after(count) for count in (1, 2, 1000000)] == [policy.delay_ns] * 3


def test_later_messages_are_not_held_up(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, retries=retries(delay_ns=stores.SECOND_NS)) as queue:
        queue.put([b"1", b"2"])
        queue.put([b"3"])
        take(queue).give_back(ERROR)
        assert stores.take_all(queue) == [b"2", b"3"]
        clock.advance(1)
        queue.put([b"4"])
        assert stores.take_all(queue) == [b"1", b"4"]
        assert stores.ranges(queue) == []


def test_batch_ends_in_front_of_what_rests(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, retries=retries(delay_ns=stores.SECOND_NS)) as queue:
        queue.put([b"1", b"2", b"3"])
        held, failing = take(queue), take(queue)
        failing.give_back(ERROR)
        held.give_back()
        lease = take(queue, most=9)
        assert lease.messages == [b"1"]
        rest = take(queue, most=9)
        assert rest.messages == [b"3"]
        clock.advance(1)
        again = take(queue, most=9)
        assert again.messages == [b"2"]
        for one in (lease, rest, again):
            one.acknowledge()


def test_what_rests_and_is_too_old_is_dropped(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path,
                       clock=clock,
                       timeout_ns=2 * stores.SECOND_NS,
                       retries=retries(delay_ns=10 * stores.SECOND_NS)) as queue:
        queue.put([b"1"])
        take(queue).give_back(ERROR)
        clock.advance(3)
        assert queue.consumer("sub").take(timeout=0) is None
        assert stores.figures(queue).dropped_by_timeout == 1
        assert stores.attempts(queue) == {}


def test_waiting_consumer_wakes_when_a_message_is_due(tmp_path: pathlib.Path) -> None:
    delay_secs = 0.3
    with stores.opened(tmp_path,
                       retries=retries(delay_ns=int(delay_secs * stores.SECOND_NS))) as queue:
        queue.put([b"1"])
        begin = time.monotonic()
        take(queue).give_back(ERROR)
        lease = queue.consumer("sub").take(timeout=support.HANG_SECS, longest_pause=60)
        assert lease is not None
        # Not before, and not a second later, when everybody looks anyhow.
        assert time.monotonic() - begin >= delay_secs
        lease.acknowledge()


@pytest.fixture(name="pauses")
def fixture_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Collect how long waiting consumers meant to sleep."""
    pauses: list[float] = []
    original = _wakeup.Ticket.wait

    def wait(self: Any, timeout: float) -> bool:
        pauses.append(timeout)
        return bool(original(self, timeout))

    monkeypatch.setattr(_wakeup.Ticket, "wait", wait)
    return pauses


def test_nobody_sleeps_longer_than_until_the_next_message_is_due(tmp_path: pathlib.Path,
                                                                 pauses: list[float]) -> None:
    with stores.opened(tmp_path, retries=retries(delay_ns=2 * stores.SECOND_NS)) as queue:
        queue.put([b"1"])
        take(queue).give_back(ERROR)
        lease = queue.consumer("sub").take(timeout=support.HANG_SECS, longest_pause=60)
        assert lease is not None
        assert pauses and max(pauses) <= 2
        lease.acknowledge()


def test_competing_consumers_share_what_is_due(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, retries=retries(max_deliveries=50, delay_ns=10**6)) as queue:
        queue.put([bytes((index, )) for index in range(20)])
        done: list[bytes] = []

        def consume(index: int) -> None:
            consumer = queue.consumer("sub")
            while True:
                lease = consumer.take(timeout=1)
                if lease is None:
                    return
                if attempts_of(lease)[0] <= 1 + index % 3:
                    lease.give_back(ERROR)
                else:
                    done.extend(lease.messages)
                    lease.acknowledge()

        threads = [threading.Thread(target=consume, args=(index, )) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(support.HANG_SECS)
        assert sorted(done) == [bytes((index, )) for index in range(20)]
        assert stores.attempts(queue) == {}


# Forgetting


def fail_all(queue: persipubsub.queue.Queue) -> None:
    """Fail with everything, and acknowledge all but the first message ahead of it."""
    take(queue, most=100).give_back(ERROR)


def acknowledge_all(queue: persipubsub.queue.Queue) -> None:
    assert stores.take_all(queue)


def skip_and_acknowledge(queue: persipubsub.queue.Queue) -> None:
    assert queue.skip_to_newest("sub") == 3
    acknowledge_all(queue)


def fill(queue: persipubsub.queue.Queue) -> None:
    queue.put([b"x"] * 9)


def remove(queue: persipubsub.queue.Queue) -> None:
    _upkeep.remove_subscriber(queue.settings, "sub")
    persipubsub.queue.Queue.ensure(queue.settings, subscribers=["sub"])


@pytest.mark.parametrize("leave", [
    acknowledge_all,
    lambda queue: queue.clear(),
    skip_and_acknowledge,
    fill,
    remove,
])
def test_record_leaves_with_its_message(tmp_path: pathlib.Path,
                                        leave: Callable[[persipubsub.queue.Queue], object]) -> None:
    with stores.opened(tmp_path, max_messages=9) as queue:
        queue.put([b"1", b"2", b"3", b"4"])
        fail_all(queue)
        assert len(stores.attempts(queue)) == 4
        leave(queue)
        assert stores.attempts(queue) == {}
        # The plain path is plain again.
        stores.take_all(queue)
        queue.put([b"5"])
        assert stores.take_all(queue) == [b"5"]
        record = queue._environment.read(
            lambda txn, databases: _positions.require(txn, databases, b"sub"))
        assert record.flags == 0


def test_record_of_a_message_that_is_acknowledged_ahead_leaves(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        first = queue.put([b"1", b"2", b"3"])
        fail_all(queue)
        held = take(queue)
        take(queue).acknowledge()
        assert sorted(stores.attempts(queue)) == [first, first + 2]
        held.acknowledge()
        assert sorted(stores.attempts(queue)) == [first + 2]


def test_many_records_leave_little_by_little(tmp_path: pathlib.Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    with stores.opened(tmp_path, subscribers=["other", "sub"]) as queue:
        queue.put([b"x"] * 10)
        fail_all(queue)
        monkeypatch.setattr(_attempts, "_MOST_DELETED", 4)
        queue.clear()
        assert len(stores.attempts(queue)) == 6
        assert queue.check() == []
        for left in (2, 0):
            queue.put([b"1"])
            assert stores.take(queue) == b"1"
            assert len(stores.attempts(queue)) == left
            assert queue.check() == []


def test_message_that_is_sought_begins_anew(tmp_path: pathlib.Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not its record had left yet."""
    with stores.opened(tmp_path, subscribers=["other", "sub"],
                       retries=retries(max_deliveries=2)) as queue:
        first = queue.put([b"x"] * 10)
        fail_all(queue)
        monkeypatch.setattr(_attempts, "_MOST_DELETED", 2)
        queue.seek("sub", first + 7)
        assert sorted(stores.attempts(queue)) == list(range(first + 2, first + 10))
        queue.seek("sub", first + 5)
        # What was pending all the time keeps what was counted.
        assert sorted(stores.attempts(queue)) == list(range(first + 7, first + 10))
        lease = take(queue, most=10)
        assert attempts_of(lease) == [1, 1, 2, 2, 2]
        lease.acknowledge()


@pytest.fixture(name="scratch")
def fixture_scratch(tmp_path: pathlib.Path) -> Iterator[stores.Scratch]:
    scratch = stores.Scratch(tmp_path)
    yield scratch
    scratch.environment.close()


def test_records_of_others_stay(scratch: stores.Scratch) -> None:
    record = _layout.Attempts(1, 0, 2, 3, "an error: ü")
    with scratch.begin() as txn:
        for ordinal in (0, 1, 2):
            for number in (1, 2, 1 << 40):
                _attempts.write(txn, scratch.databases, ordinal, number, record)
        assert _attempts.forget_before(txn, scratch.databases, 1, 2)
        _attempts.forget(txn, scratch.databases, 1, 2)
        assert list(_attempts.between(txn, scratch.databases, 1, 0, 1 << 48)) == [(1 << 40, record)]
        assert not _attempts.forget_before(txn, scratch.databases, 1, 1 << 48)
        for ordinal in (0, 2):
            assert [
                number
                for number, _ in _attempts.between(txn, scratch.databases, ordinal, 2, 1 << 48)
            ] == [2, 1 << 40]
        _attempts.forget_all(txn, scratch.databases, 2)
        assert _attempts.read(txn, scratch.databases, 2, 1) is None
        assert _attempts.read(txn, scratch.databases, 0, 1) == record


# The check of the store


def damage(queue: persipubsub.queue.Queue,
           change: "Callable[[Any, Databases, int], None]") -> list[str]:

    def work(txn: "Any", databases: Databases) -> None:
        change(txn, databases,
               _layout.unpack_subscriber(txn.get(b"sub", db=databases.pending)).ordinal)

    queue._environment.write(work)
    return queue.check()


RECORD = _layout.Attempts(1, 0, 0, 0, "")


@pytest.mark.parametrize("ordinal, number, record, finding", [
    (5, 1, RECORD, "flagged"),
    (0, 99, RECORD, "in front of"),
    (0, 1, RECORD._replace(deliveries=0), "count something"),
])
def test_check_finds_records_that_should_not_be(tmp_path: pathlib.Path, ordinal: int, number: int,
                                                record: _layout.Attempts, finding: str) -> None:
    made = stores.settings(tmp_path)
    persipubsub.queue.Queue.ensure(made, subscribers=["sub"])
    with persipubsub.queue.Queue(made) as queue:
        queue.put([b"1", b"2"])
        fail_all(queue)
        assert queue.check() == []
        findings = damage(
            queue, lambda txn, databases, own: _attempts.write(txn, databases, own + ordinal,
                                                               number, record))
        assert len(findings) == 1 and finding in findings[0]
