"""Test how deliveries are counted, when messages are retried, and that no record is left behind."""

# pylint: disable=missing-function-docstring

import pathlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

import persipubsub.queue
from persipubsub.lmdb_engine import attempts, consuming
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import positions
from tests import stores, support

ERROR = ValueError("no")


def retries(**policy: Any) -> Mapping[str, persipubsub.queue.Retries]:
    return {"sub": persipubsub.queue.Retries(attempts.Policy(**policy), "the queue")}


def take(queue: persipubsub.queue.Queue, most: int = 1) -> consuming.Lease:
    lease = queue.consumer("sub").take(timeout=0, max_messages=most)
    assert lease is not None
    return lease


def attempts_of(lease: consuming.Lease) -> list[int]:
    return [message.attempts for message in lease.details()]


# Counting


def test_deliveries_that_succeed_leave_no_record(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1"])
        lease = take(queue)
        assert attempts_of(lease) == [1]
        assert stores.attempts(queue) == {}
        lease.ack()


def test_without_a_limit_failures_count_and_crashes_do_not(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        number = queue.put([b"1"])
        take(queue).nack(ERROR)
        take(queue)  # and drop the lease: as much is left of a consumer that is killed
        assert stores.attempts(queue)[number].deliveries == 1
        lease = take(queue)
        assert attempts_of(lease) == [2]
        lease.ack()
        assert stores.attempts(queue) == {}


def test_with_a_limit_crashes_count(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, retries=retries(max_deliveries=4)) as queue:
        number = queue.put([b"1"])
        take(queue)  # and drop the lease: as much is left of a consumer that is killed
        take(queue).nack(ERROR)
        lease = take(queue)
        assert attempts_of(lease) == [3]
        assert stores.attempts(queue)[number][:2] == (3, fmt.FLAG_IS_BEGUN)
        assert stores.attempts(queue)[number].error == "ValueError: no"
        lease.ack()
        assert stores.attempts(queue) == {}


def test_crash_under_a_limit_that_is_gone_is_not_taken_for_the_next_failure(
        tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, retries=retries(max_deliveries=4)) as queue:
        number = queue.put([b"1"])
        take(queue)  # and drop the lease: as much is left of a consumer that is killed
    with stores.opened(tmp_path) as queue:
        for count in (2, 3):
            lease = take(queue)
            assert attempts_of(lease) == [count]
            lease.nack(ERROR)
            assert stores.attempts(queue)[number].deliveries == count


def test_exhausted_message_that_is_too_old_is_neither_delivered_nor_moved(
        tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path,
                       clock=clock,
                       msg_timeout_secs=10,
                       retries=retries(max_deliveries=1)) as queue:
        number = queue.put([b"1"])
        take(queue)  # and drop the lease: as much is left of a consumer that is killed
        clock.advance(11)
        assert queue.consumer("sub").take_at(number) is None
        assert stores.figures(queue).dead_lettered == 0


def test_count_is_committed_before_the_message_is_seen(tmp_path: pathlib.Path) -> None:

    def consume(pipe: support.Connection) -> None:
        with persipubsub.queue.Queue(stores.path_of(tmp_path), stores.settings(),
                                     retries(max_deliveries=4)) as queue:
            lease = take(queue)
            pipe.send(lease.numbers[0])
            pipe.recv()

    with stores.opened(tmp_path) as queue:
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
            take(queue).nack()
        assert stores.attempts(queue) == {}
        take(queue).nack(ERROR)
        take(queue).nack()
        assert attempts_of(take(queue)) == [2]


def test_failing_batch_counts_for_each_of_its_messages(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, retries=retries(max_deliveries=3)) as queue:
        queue.put([b"1", b"2", b"3"])
        take(queue, most=2).nack(ERROR)
        lease = take(queue, most=3)
        assert attempts_of(lease) == [2, 2, 1]
        lease.ack()
        assert stores.attempts(queue) == {}


def test_failure_of_what_was_dropped_meanwhile_leaves_no_record(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, retries=retries(max_deliveries=3, delay_ns=1)) as queue:
        queue.put([b"1", b"2"])
        lease = take(queue, most=2)
        queue.clear()
        assert stores.attempts(queue) == {}
        lease.nack(ERROR)
        assert stores.attempts(queue) == {}
        assert stores.figures(queue).failed == 2


# Retrying


def test_delay_doubles_up_to_an_hour(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path,
                       clock=clock,
                       msg_timeout_secs=10**6,
                       retries=retries(delay_ns=1000 * stores.SECOND_NS)) as queue:
        queue.put([b"1"])
        for delay in (1000, 2000, 3600, 3600):
            take(queue).nack(ERROR)
            clock.advance(delay - 1)
            assert queue.consumer("sub").take(timeout=0) is None
            assert queue.front("sub") is None
            clock.advance(1)
        take(queue).ack()


def test_longest_first_delay_is_kept() -> None:
    policy = attempts.Policy(delay_ns=7200 * stores.SECOND_NS)
    assert [policy.delay_after(count) for count in (1, 2, 1000000)] == [policy.delay_ns] * 3


def test_later_messages_are_not_held_up(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, retries=retries(delay_ns=stores.SECOND_NS)) as queue:
        queue.put([b"1", b"2"])
        queue.put([b"3"])
        take(queue).nack(ERROR)
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
        failing.nack(ERROR)
        held.nack()
        lease = take(queue, most=9)
        assert lease.messages == [b"1"]
        rest = take(queue, most=9)
        assert rest.messages == [b"3"]
        clock.advance(1)
        again = take(queue, most=9)
        assert again.messages == [b"2"]
        for one in (lease, rest, again):
            one.ack()


def test_what_rests_and_is_too_old_is_dropped(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path,
                       clock=clock,
                       msg_timeout_secs=2,
                       retries=retries(delay_ns=10 * stores.SECOND_NS)) as queue:
        queue.put([b"1"])
        take(queue).nack(ERROR)
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
        take(queue).nack(ERROR)
        lease = queue.consumer("sub").take(timeout=support.HANG_SECS, poll_secs=60)
        assert lease is not None
        # Not before, and not a second later, when everybody looks anyhow.
        assert time.monotonic() - begin >= delay_secs
        lease.ack()


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
                    lease.nack(ERROR)
                else:
                    done.extend(lease.messages)
                    lease.ack()

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
    take(queue, most=100).nack(ERROR)


def acknowledge_all(queue: persipubsub.queue.Queue) -> None:
    assert stores.take_all(queue)


def skip_and_acknowledge(queue: persipubsub.queue.Queue) -> None:
    assert queue.skip_to_newest("sub") == 3
    acknowledge_all(queue)


def fill(queue: persipubsub.queue.Queue) -> None:
    queue.put([b"x"] * 9)


def remove(queue: persipubsub.queue.Queue) -> None:
    queue.remove_subscriber("sub")
    queue.add_subscriber("sub")


@pytest.mark.parametrize("leave", [
    acknowledge_all,
    lambda queue: queue.clear(),
    skip_and_acknowledge,
    fill,
    remove,
])
def test_record_leaves_with_its_message(tmp_path: pathlib.Path,
                                        leave: Callable[[persipubsub.queue.Queue], object]) -> None:
    with stores.opened(tmp_path, max_msgs_num=9) as queue:
        queue.put([b"1", b"2", b"3", b"4"])
        fail_all(queue)
        assert len(stores.attempts(queue)) == 4
        leave(queue)
        assert stores.attempts(queue) == {}
        # The plain path is plain again.
        stores.take_all(queue)
        queue.put([b"5"])
        assert stores.take_all(queue) == [b"5"]
        assert stores.read(queue, lambda tx: positions.require(tx, b"sub").flags) == 0


def test_record_of_a_message_that_is_acknowledged_ahead_leaves(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        first = queue.put([b"1", b"2", b"3"])
        fail_all(queue)
        held = take(queue)
        take(queue).ack()
        assert sorted(stores.attempts(queue)) == [first, first + 2]
        held.ack()
        assert sorted(stores.attempts(queue)) == [first + 2]


def test_many_records_leave_little_by_little(tmp_path: pathlib.Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    with stores.opened(tmp_path, subscribers=["other", "sub"]) as queue:
        queue.put([b"x"] * 10)
        fail_all(queue)
        monkeypatch.setattr(attempts, "_MOST_DELETED", 4)
        queue.clear()
        assert len(stores.attempts(queue)) == 6
        assert queue.check() == []
        for left in (2, 0):
            queue.put([b"1"])
            assert stores.take(queue) == b"1"
            assert len(stores.attempts(queue)) == left
            assert queue.check() == []


def test_message_that_is_sought_begins_anew(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, retries=retries(max_deliveries=2)) as queue:
        first = queue.put([b"x"] * 10)
        fail_all(queue)
        queue.seek("sub", first + 7)
        queue.seek("sub", first + 5)
        # What was pending all the time keeps what was counted.
        lease = take(queue, most=10)
        assert attempts_of(lease) == [1, 1, 2, 2, 2]
        lease.ack()


RECORD = fmt.Attempts(1, 0, 0, 0, "")


@pytest.mark.parametrize("ordinal, number, record, finding", [
    (5, 1, RECORD, "flagged"),
    (0, 99, RECORD, "in front of"),
    (0, 1, RECORD._replace(deliveries=0), "count something"),
])
def test_check_finds_records_that_should_not_be(tmp_path: pathlib.Path, ordinal: int, number: int,
                                                record: fmt.Attempts, finding: str) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1", b"2"])
        fail_all(queue)
        own = stores.read(queue, lambda tx: positions.require(tx, b"sub").ordinal)
        before = stores.attempts(queue).get(number)
        stores.write(queue, lambda tx: attempts.write(tx, own + ordinal, number, record))
        findings = queue.check()
        assert len(findings) == 1 and finding in findings[0]
        if before is None or ordinal:
            stores.write(queue, lambda tx: attempts.forget(tx, own + ordinal, number, number + 1))
        else:
            stores.write(queue, lambda tx: attempts.write(tx, own, number, before))
