"""Test taking messages: claims, leases, batches, failures, damage."""

# pylint: disable=contextmanager-generator-missing-cleanup
# pylint: disable=missing-function-docstring
# pylint: disable=protected-access
# pylint: disable=unbalanced-tuple-unpacking

import contextlib
import gc
import mmap
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import persipubsub.errors
import persipubsub.queue
from persipubsub import _claims, _delivery, _in_flight, _late_claim, _settings, _wakeup
from persipubsub.environment import _environment
from persipubsub.store import _attempts, _batches, _blocks, _deliveries, _layout, _log, _pending
from tests import stores, support


def take(consumer: _delivery.Consumer, most: int = 1) -> _delivery.Lease:
    lease = consumer.take(timeout=0, max_messages=most)
    assert lease is not None
    return lease


def retrying(policy: _attempts.Policy) -> dict[str, _settings.Retries]:
    return {"sub": _settings.Retries(policy, "queue", None)}


def test_one_message_is_never_with_two_consumers(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1", b"2"])
        consumers = [queue.consumer("sub") for _ in range(3)]
        leases = [take(consumers[0]), take(consumers[1])]
        assert [lease.messages for lease in leases] == [[b"1"], [b"2"]]
        assert consumers[2].take(timeout=0) is None
        # Even a consumer does not get what it has itself.
        assert consumers[0].take(timeout=0) is None
        for lease in leases:
            lease.give_back()


def test_two_queues_on_a_store_are_as_two_processes(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue, persipubsub.queue.Queue(queue.settings) as other:
        queue.put([b"1", b"2"])
        first = take(queue.consumer("sub"))
        second = take(other.consumer("sub"))
        assert second.messages == [b"2"]
        second.acknowledge()
        assert stores.ranges(queue) == [range(second.numbers[0], second.numbers[0] + 1)]
        assert other.consumer("sub").take(timeout=0) is None
        first.acknowledge()
        assert stores.ranges(queue) == []
        assert stores.figures(queue).acknowledged == 2


@pytest.mark.parametrize("is_one_block", [True, False])
def test_message_at_work_is_not_acknowledged_by_those_behind(tmp_path: pathlib.Path,
                                                             is_one_block: bool) -> None:
    with stores.opened(tmp_path) as queue:
        if is_one_block:
            queue.put([b"1", b"2", b"3"])
        else:
            for message in (b"1", b"2", b"3"):
                queue.put([message])
        held = take(queue.consumer("sub"))
        for expected in (b"2", b"3"):
            lease = take(queue.consumer("sub"))
            assert lease.messages == [expected]
            lease.acknowledge()
            assert stores.figures(queue).lag == 3 - int(expected) + 1
        held.give_back()
        assert stores.take_all(queue) == [b"1"]


def test_message_is_looked_at_again_when_it_is_claimed(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        first = queue.put([b"1", b"2", b"3"])
        slow, quick = queue.consumer("sub"), queue.consumer("sub")
        held, ahead = take(quick), take(quick)
        ahead.acknowledge()
        # The slow one found it a moment ago; meanwhile it was acknowledged ahead of the position.
        assert slow._claim(begin=first + 1, number=first + 1, max_messages=1) is None
        held.acknowledge()
        assert slow._claim(begin=first, number=first, max_messages=1) is None
        assert stores.take_all(queue) == [b"3"]
        assert slow._claim(begin=first + 3, number=first + 3, max_messages=1) is None


def test_message_that_was_given_back_comes_again_first(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1", b"2", b"3"])
        consumer = queue.consumer("sub")
        first, second = take(consumer), take(consumer)
        second.acknowledge()
        first.give_back(ValueError("no"))
        assert stores.figures(queue).failed == 1
        assert stores.take_all(queue) == [b"1", b"3"]


def test_message_of_a_forgotten_lease_comes_again(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1"])
        lease = take(queue.consumer("sub"))
        assert queue.consumer("sub").take(timeout=0) is None
        del lease
        gc.collect()
        assert stores.take_all(queue) == [b"1"]


def test_claims_of_a_closed_queue_are_given_back(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1"])
        with persipubsub.queue.Queue(queue.settings) as other:
            held = take(other.consumer("sub"))
            assert queue.consumer("sub").take(timeout=0) is None
        assert held.messages == [b"1"]
        assert stores.take_all(queue) == [b"1"]


def test_batch_goes_over_blocks_and_over_messages_for_others(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["sub", "other"]) as queue:
        first = queue.put([b"1", b"2"])
        queue.put([b"x"], ("other", ))
        queue.put([b"3"])
        queue.put([b"4", b"5"], ("sub", ))
        lease = take(queue.consumer("sub"), most=5)
        assert lease.messages == [b"1", b"2", b"3", b"4"]
        assert lease.numbers == [first, first + 1, first + 3, first + 4]
        # Nobody is kept from what lies behind.
        assert take(queue.consumer("sub")).messages == [b"5"]
        lease.acknowledge()
        assert stores.figures(queue).acknowledged == 4
        assert stores.figures(queue, "other").lag == 4


def test_batch_does_not_claim_what_comes_later(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1", b"2"])
        lease = take(queue.consumer("sub"), most=10)
        queue.put([b"3"])
        assert take(queue.consumer("sub")).messages == [b"3"]
        assert lease.messages == [b"1", b"2"]


def test_batch_claims_no_numbers_that_are_not_there_yet(tmp_path: pathlib.Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that gets one of them meanwhile would be passed over, and come after later ones."""
    with stores.opened(tmp_path) as queue:
        first, second = queue.consumer("sub"), queue.consumer("sub")
        queue.put([b"1", b"2"])
        queue.put([b"3"])
        copy = first._copy
        leases: list[_delivery.Lease | None] = []

        def copy_later(number: int, end: int, is_guess: bool) -> Any:
            queue.put([b"4"])
            leases.append(second.take(timeout=0))
            return copy(number, end, is_guess)

        monkeypatch.setattr(first, "_copy", copy_later)
        lease = take(first, most=100)
        assert lease.messages == [b"1", b"2", b"3"]
        assert leases[0] is not None and leases[0].messages == [b"4"]
        leases[0].acknowledge()
        lease.acknowledge()


def test_batch_ends_where_somebody_else_is_at_work(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1", b"2", b"3", b"4"])
        consumer = queue.consumer("sub")
        held = [take(consumer) for _ in range(3)]
        held[0].give_back()
        held[1].give_back()
        batch = take(consumer, most=4)
        assert batch.messages == [b"1", b"2"]
        assert take(consumer, most=4).messages == [b"4"]


def test_batch_ends_at_what_was_acknowledged_ahead(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1", b"2", b"3", b"4"])
        consumer = queue.consumer("sub")
        held = [take(consumer) for _ in range(3)]
        held[2].acknowledge()
        held[0].give_back()
        held[1].give_back()
        batch = take(consumer, most=4)
        assert batch.messages == [b"1", b"2"]
        batch.acknowledge()
        assert stores.take_all(queue) == [b"4"]


def test_batch_of_large_messages_ends_early(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        for _ in range(4):
            queue.put([bytes(7 << 20)])
        assert len(take(queue.consumer("sub"), most=4).messages) == 2


def test_consumer_of_nobody_is_refused(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        with pytest.raises(persipubsub.errors.NotInitializedError, match="'nobody'"):
            queue.consumer("nobody")
        with pytest.raises(persipubsub.errors.NotInitializedError):
            queue.skip_to_newest("nobody")


def test_front_takes_nothing_and_sees_what_is_free(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        assert queue.front("sub") is None
        queue.put([b"1", b"2"])
        assert queue.front("sub") == queue.front("sub") == b"1"
        lease = take(queue.consumer("sub"))
        assert queue.front("sub") == b"2"
        lease.give_back()
        assert queue.front("sub") == b"1"
        assert stores.figures(queue).lag == 2


@pytest.mark.parametrize("seconds, arrives", [(10.0, True), (10.000000001, False)])
def test_message_of_just_the_timeout_is_delivered(tmp_path: pathlib.Path, seconds: float,
                                                  arrives: bool) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, timeout_ns=10 * stores.SECOND_NS) as queue:
        queue.put([b"old"])
        clock.now_ns += round(seconds * stores.SECOND_NS)
        assert queue.front("sub") == (b"old" if arrives else None)
        assert stores.take_all(queue) == ([b"old"] if arrives else [])
        assert stores.figures(queue).dropped_by_timeout == (not arrives)


def test_guess_does_not_deliver_what_is_too_old(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, timeout_ns=10 * stores.SECOND_NS) as queue:
        for message in (b"1", b"2"):
            queue.put([message])
        clock.advance(5)
        queue.put([b"3"])
        consumer = queue.consumer("sub")
        take(consumer).acknowledge()
        clock.advance(6)
        assert take(consumer).messages == [b"3"]
        assert stores.figures(queue).dropped_by_timeout == 1


def test_message_that_expired_at_work_is_not_acknowledged_too(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, timeout_ns=10 * stores.SECOND_NS) as queue:
        queue.put([b"1"])
        lease = take(queue.consumer("sub"))
        clock.advance(11)
        queue.prune()
        lease.acknowledge()
        figures = stores.figures(queue)
        assert (figures.acknowledged, figures.dropped_by_timeout, figures.lag) == (0, 1, 0)
        assert figures.seconds_since_acknowledged is None


def test_cleared_message_is_acknowledged_into_the_void(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1"])
        lease = take(queue.consumer("sub"))
        assert queue.clear() == 1
        lease.acknowledge()
        assert (stores.figures(queue).acknowledged, stores.figures(queue).cleared) == (0, 1)


def test_waiting_ends_with_the_timeout(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        begin = time.monotonic()
        assert queue.consumer("sub").take(timeout=0.2) is None
        assert 0.2 <= time.monotonic() - begin < support.HANG_SECS


@pytest.mark.parametrize("is_given_back", [True, False])
def test_waiting_consumer_is_woken(tmp_path: pathlib.Path, is_given_back: bool) -> None:
    with stores.opened(tmp_path) as queue:
        held: _delivery.Lease | None = None
        if is_given_back:
            queue.put([b"1"])
            held = take(queue.consumer("sub"))
        found: list[_delivery.Lease | None] = []
        consumer = queue.consumer("sub")
        thread = threading.Thread(
            target=lambda: found.append(consumer.take(timeout=support.HANG_SECS)))
        thread.start()
        if held is not None:
            held.give_back()
        else:
            queue.put([b"1"])
        thread.join(support.HANG_SECS)
        lease, = found
        assert lease is not None and lease.messages == [b"1"]
        lease.acknowledge()


def wait_in_thread(
    queue: persipubsub.queue.Queue,
    most: int,
    consumer: _delivery.Consumer | None = None
) -> tuple[threading.Thread, list[_delivery.Lease | None], mmap.mmap]:
    """Take in a thread that is only woken by the bell; return what it will have, and the bell."""
    consumer = consumer or queue.consumer("sub")
    found: list[_delivery.Lease | None] = []
    thread = threading.Thread(target=lambda: found.append(
        consumer.take(support.HANG_SECS, support.HANG_SECS, max_messages=most)))
    queue._bell.ring()
    bell = queue._bell._file
    assert bell is not None
    thread.start()
    support.until(lambda: bell.page[_wakeup._FLAG], "asleep")
    return thread, found, bell.page


@pytest.mark.parametrize("most", [1, 3])
def test_woken_consumer_lets_the_next_publisher_not_ring(tmp_path: pathlib.Path,
                                                         monkeypatch: pytest.MonkeyPatch,
                                                         most: int) -> None:
    monkeypatch.setattr(_delivery, "LONGEST_PAUSE_SECS", support.HANG_SECS)
    with stores.opened(tmp_path) as queue:
        thread, found, page = wait_in_thread(queue, most)
        queue.put([b"1", b"2"])
        thread.join(support.HANG_SECS)
        lease, = found
        assert lease is not None and lease.messages == [b"1", b"2"][:most]
        lease.acknowledge()
        assert page[_wakeup._FLAG] == 0


def test_consumer_that_was_woken_in_vain_waits_again(tmp_path: pathlib.Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_delivery, "LONGEST_PAUSE_SECS", support.HANG_SECS)
    with stores.opened(tmp_path) as queue:
        thread, found, page = wait_in_thread(queue, most=1)
        for _ in range(3):
            queue._bell.ring()
            support.until(lambda: page[_wakeup._FLAG], "asleep")
        queue.put([b"1"])
        thread.join(support.HANG_SECS)
        lease, = found
        assert lease is not None and lease.messages == [b"1"]
        lease.acknowledge()


def test_woken_consumer_knows_what_there_is(tmp_path: pathlib.Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_delivery, "LONGEST_PAUSE_SECS", support.HANG_SECS)
    done: list[str] = []

    def note(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def noted(*arguments: Any, **named: Any) -> Any:
            done.append(name)
            return function(*arguments, **named)

        monkeypatch.setattr(owner, name, noted)

    note(_batches, "search")
    note(_claims.Claims, "claim")
    with stores.opened(tmp_path) as queue:
        consumer = queue.consumer("sub")
        queue.put([b"1"])
        take(consumer).acknowledge()
        thread, found, page = wait_in_thread(queue, most=1, consumer=consumer)

        def is_asleep() -> bool:
            return bool(page[_wakeup._FLAG]) and _wakeup._hub.leader is not None

        support.until(is_asleep, "asleep")
        done.clear()
        # One that says nothing of what there is: a number that is not there must not be claimed.
        queue._bell.ring()
        support.until(is_asleep, "asleep")
        assert done and set(done) == {"search"}
        done.clear()
        queue.put([b"2"])
        thread.join(support.HANG_SECS)
        assert done == ["claim"]
        lease, = found
        assert lease is not None and lease.messages == [b"2"]
        lease.acknowledge()


@pytest.fixture(name="claimed")
def fixture_claimed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Note where each claim of a batch begins, and how many numbers it asks for."""
    claimed: list[tuple[int, int]] = []
    claim_prefix = _claims.Claims.claim_prefix

    def noted(self: _claims.Claims, subscriber: int, first: int, count: int) -> Any:
        claimed.append((first, count))
        return claim_prefix(self, subscriber, first, count)

    monkeypatch.setattr(_claims.Claims, "claim_prefix", noted)
    return claimed


@pytest.mark.parametrize("sizes", [[1000] * 30, [10] * 5, [3000] + [1] * 9, [200] * 7 + [3000, 5]])
def test_no_more_is_claimed_than_is_taken(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
                                          claimed: list[tuple[int, int]], sizes: list[int]) -> None:
    monkeypatch.setattr(_pending, "BATCH_BYTES", 5000)
    monkeypatch.setattr(_pending, "_COPIED_BYTES", 5000 + _blocks.BLOCK_BYTES)
    messages = [bytes(size) for size in sizes]
    with stores.opened(tmp_path) as queue:
        queue.put(messages[:3])
        for message in messages[3:]:
            queue.put([message])
        consumer = queue.consumer("sub")
        taken: list[bytes] = []
        while len(taken) < len(messages):
            lease = take(consumer, most=100)
            assert claimed.pop()[1] == len(lease.messages)
            assert len(lease.messages) == 1 or sum(map(len, lease.messages)) <= 5000
            # As many as fit.
            rest = messages[len(taken) + len(lease.messages):]
            assert not rest or sum(map(len, lease.messages)) + len(rest[0]) > 5000
            taken += lease.messages
            lease.acknowledge()
        assert taken == messages


def test_no_more_is_claimed_than_what_is_in_front_of_finished_messages(
        tmp_path: pathlib.Path, claimed: list[tuple[int, int]]) -> None:
    with stores.opened(tmp_path) as queue:
        for index in range(6):
            queue.put([str(index).encode()])
        consumer = queue.consumer("sub")
        leases = [take(consumer) for _ in range(4)]
        leases[3].acknowledge()
        for lease in leases[:3]:
            lease.give_back()
        first = take(consumer, most=10)
        assert first.messages == [b"0", b"1", b"2"]
        last = take(consumer, most=10)
        assert last.messages == [b"4", b"5"]
        assert claimed[0] == (first.numbers[0], 3) and claimed[-1] == (last.numbers[0], 2)
        for lease in (first, last):
            lease.acknowledge()


def test_no_more_is_claimed_than_what_is_in_front_of_resting_messages(
        tmp_path: pathlib.Path, claimed: list[tuple[int, int]]) -> None:
    policy = _attempts.Policy(delay_ns=int(support.HANG_SECS * 1e9))
    with stores.opened(tmp_path, retries=retrying(policy)) as queue:
        for index in range(6):
            queue.put([str(index).encode()])
        consumer = queue.consumer("sub")
        leases = [take(consumer) for _ in range(4)]
        leases[3].give_back(ValueError("not now"))
        for lease in leases[:3]:
            lease.give_back()
        lease = take(consumer, most=10)
        assert lease.messages == [b"0", b"1", b"2"]
        assert claimed == [(lease.numbers[0], 3)]
        lease.acknowledge()


@pytest.mark.parametrize("max_deliveries", [0, 3])
def test_batch_whose_beginning_is_gone_stays_claimed(tmp_path: pathlib.Path,
                                                     monkeypatch: pytest.MonkeyPatch,
                                                     max_deliveries: int) -> None:
    claim_prefix = _claims.Claims.claim_prefix
    others: list[bytes] = []

    def receive(count: int) -> None:
        for _ in range(count):
            lease = take(other)
            others.extend(lease.messages)
            lease.acknowledge()

    def claim_beside_another(*arguments: Any) -> _claims.Claim | None:
        # Between the search and the claim, and between the claim and the second look.
        receive(2)
        claim = claim_prefix(*arguments)
        receive(1)
        return claim

    monkeypatch.setattr(_claims.Claims, "claim_prefix", claim_beside_another)
    policy = _attempts.Policy(max_deliveries=max_deliveries)
    with stores.opened(tmp_path, retries=retrying(policy)) as queue:
        for index in range(8):
            queue.put([str(index).encode()])
        consumer, other = queue.consumer("sub"), queue.consumer("sub")
        lease = take(consumer, most=4)
        assert lease.messages == [b"2", b"3"]
        # Given back for a moment, they would have come to the other one behind later ones.
        assert others == [b"0", b"1", b"4"]
        lease.acknowledge()
        receive(3)
        assert others[3:] == [b"5", b"6", b"7"]


@contextlib.contextmanager
def taken_around(tmp_path: pathlib.Path,
                 monkeypatch: pytest.MonkeyPatch,
                 max_deliveries: int,
                 damaged: int = -1) -> Iterator[tuple[persipubsub.queue.Queue, _delivery.Lease]]:
    """
    Take a batch while another consumer acknowledges message 3, before it is claimed.

    :param tmp_path: for the queue
    :param monkeypatch: to come in between
    :param max_deliveries: of the subscriber
    :param damaged: index of a message that is damaged
    :return: queue of the messages 0 to 7, and a batch of what is there up to message 5
    """
    claim_prefix = _claims.Claims.claim_prefix
    in_the_middle: list[_delivery.Lease] = []

    def claim_behind_another(*arguments: Any) -> _claims.Claim | None:
        if in_the_middle:
            in_the_middle.pop().acknowledge()
        return claim_prefix(*arguments)

    monkeypatch.setattr(_claims.Claims, "claim_prefix", claim_behind_another)
    policy = _attempts.Policy(max_deliveries=max_deliveries)
    with stores.opened(tmp_path, retries={"sub": _settings.Retries(policy, "queue",
                                                                   None)}) as queue:
        numbers = [queue.put([str(index).encode()]) for index in range(8)]
        other = queue.consumer("sub")
        leases = [take(other) for _ in range(4)]
        if damaged >= 0:
            flip(queue, numbers[damaged])
        for lease in leases[:3]:
            lease.give_back()
        in_the_middle.append(leases[3])
        yield queue, take(queue.consumer("sub"), most=6)


@pytest.mark.parametrize("max_deliveries", [0, 3])
def test_batch_around_what_another_acknowledged_stays_claimed(tmp_path: pathlib.Path,
                                                              monkeypatch: pytest.MonkeyPatch,
                                                              max_deliveries: int) -> None:
    with taken_around(tmp_path, monkeypatch, max_deliveries) as (queue, lease):
        assert lease.messages == [b"0", b"1", b"2", b"4", b"5"]
        assert [message.data for message in lease.details()] == lease.messages
        # Given back for a moment, the last of them would come to this one behind later ones.
        last = take(queue.consumer("sub"), most=10)
        assert last.messages == [b"6", b"7"]
        lease.acknowledge()
        last.acknowledge()
        assert queue.check() == []
        figures = stores.figures(queue)
        assert (figures.acknowledged, figures.lag, figures.failed) == (8, 0, 0)


@pytest.mark.parametrize("max_deliveries", [0, 3])
def test_batch_leaves_what_a_seek_brought_back_in_its_middle(tmp_path: pathlib.Path,
                                                             monkeypatch: pytest.MonkeyPatch,
                                                             max_deliveries: int) -> None:
    with taken_around(tmp_path, monkeypatch, max_deliveries) as (queue, lease):
        assert queue.seek("sub", to="beginning") == 1
        lease.acknowledge()
        assert queue.check() == []
        assert collect(queue, most=10) == ([b"3", b"6", b"7"], [])
        assert queue.check() == [] and stores.figures(queue).lag == 0


@pytest.mark.parametrize("max_deliveries", [0, 3])
def test_batch_ends_in_front_of_a_damaged_message_behind_a_finished_one(
        tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, max_deliveries: int) -> None:
    with taken_around(tmp_path, monkeypatch, max_deliveries, damaged=4) as (queue, lease):
        assert lease.messages == [b"0", b"1", b"2"]
        lease.acknowledge()
        assert collect(queue, most=10) == ([b"5", b"6", b"7"], [lease.numbers[0] + 4])
        queue.delete_finished()


@pytest.mark.parametrize("max_deliveries", [0, 3])
def test_batch_ends_in_front_of_a_damaged_message_and_a_finished_one(
        tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, max_deliveries: int) -> None:
    with taken_around(tmp_path, monkeypatch, max_deliveries, damaged=1) as (queue, lease):
        assert lease.messages == [b"0"]
        lease.acknowledge()
        assert collect(queue, most=10) == ([b"2", b"4", b"5", b"6", b"7"], [lease.numbers[0] + 1])
        queue.delete_finished()


@pytest.mark.parametrize("method", ["take", "take_newest"])
def test_interrupt_between_the_claim_and_the_lease(tmp_path: pathlib.Path,
                                                   monkeypatch: pytest.MonkeyPatch,
                                                   method: str) -> None:

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with stores.opened(tmp_path) as queue:
        queue.put([b"message"])
        consumer, other = queue.consumer("sub"), queue.consumer("sub")
        with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt) as caught:
            context.setattr(_in_flight.Board, "note", interrupt)
            getattr(consumer, method)(timeout=0)
        # As an interpreter does that shows where it was: nothing of it is collected.
        assert caught.value.__traceback__ is not None
        lease = take(other)
        assert lease.messages == [b"message"]
        lease.acknowledge()


def test_batch_is_not_guessed(tmp_path: pathlib.Path, claimed: list[tuple[int, int]]) -> None:
    with stores.opened(tmp_path) as queue:
        for message in (b"1", b"2", b"3", b"4"):
            queue.put([message])
        late, other = queue.consumer("sub"), queue.consumer("sub")
        take(late).acknowledge()
        take(other).acknowledge()
        # The guess is out of date: whoever claims a range from there on keeps others from it.
        assert late._next == 2
        lease = take(late, most=10)
        assert lease.messages == [b"3", b"4"]
        lease.acknowledge()
        assert [first for first, _ in claimed] == [3]


# Damage


def flip(queue: persipubsub.queue.Queue, number: int, offset: int = -1) -> None:
    """Flip a bit of a message in the store: by default of the last byte of its block."""

    def work(txn, databases):  # type: ignore[no-untyped-def]
        cursor = txn.cursor(db=databases.data)
        found = _log.seek(cursor, number)
        assert found is not None
        value = bytearray(found.value)
        value[offset] ^= 1
        cursor.put(_layout.pack_number(found.first), bytes(value))

    queue._environment.write(work)


def collect(queue: persipubsub.queue.Queue, most: int) -> tuple[list[bytes], list[int]]:
    """Take everything; return messages, and the numbers of those that were damaged."""
    consumer = queue.consumer("sub")
    messages: list[bytes] = []
    damaged: list[int] = []
    while True:
        try:
            lease = consumer.take(timeout=0, max_messages=most)
        except persipubsub.errors.CorruptMessageError as error:
            assert str(queue.settings.path) in str(error)
            damaged.append(error.number)
            continue
        if lease is None:
            return messages, damaged
        messages.extend(lease.messages)
        lease.acknowledge()


@pytest.mark.parametrize("most", [1, 2, 10])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_damaged_message_is_set_aside_once(tmp_path: pathlib.Path, most: int, index: int) -> None:
    messages = [b"one", b"two", b"three"]
    made = stores.settings(tmp_path)
    persipubsub.queue.Queue.ensure(made, subscribers=["sub", "other"])
    with persipubsub.queue.Queue(made) as queue:
        first = queue.put(messages)
        queue.put([b"behind"])
        # From the end of the block: one byte into the message.
        flip(queue, first, offset=-len(b"".join(messages[index:])))
        assert len(queue.check()) == 1 and str(first + index) in queue.check()[0]
        others = messages[:index] + messages[index + 1:] + [b"behind"]
        assert collect(queue, most) == (others, [first + index])
        figures = stores.figures(queue)
        assert (figures.corrupt, figures.acknowledged, figures.lag) == (1, 3, 0)
        # The other subscriber has yet to meet it.
        assert stores.figures(queue, "other").corrupt == 0
        assert stores.figures(queue, "other").lag == 4


def test_damaged_message_is_shown_to_one_consumer(tmp_path: pathlib.Path) -> None:
    made = stores.settings(tmp_path)
    persipubsub.queue.Queue.ensure(made, subscribers=["sub"])
    with persipubsub.queue.Queue(made) as queue:
        first = queue.put([b"1", b"2", b"3"])
        held = take(queue.consumer("sub"))
        flip(queue, first, offset=-2)
        with pytest.raises(persipubsub.errors.CorruptMessageError):
            queue.consumer("sub").take(timeout=0)
        assert stores.take_all(queue) == [b"3"]
        held.acknowledge()
        figures = stores.figures(queue)
        assert (figures.corrupt, figures.acknowledged, figures.lag) == (1, 2, 0)
        # When nobody needs it any more, it leaves like any other message.
        queue.put([b"4"])
        queue.prune()
        assert queue.check() == []


@pytest.mark.parametrize("drops_newest", [False, True])
def test_damaged_message_that_was_dropped_is_not_set_aside(tmp_path: pathlib.Path,
                                                           drops_newest: bool) -> None:
    with stores.opened(tmp_path, max_messages=2, strategy=stores.pruning(drops_newest)) as queue:
        first = queue.put([b"1", b"2"])
        pending = queue.consumer("sub")._pending
        # Somebody sends between the look at the damaged message and its setting aside.
        queue.put([b"3"])
        number = first + drops_newest
        queue._environment.write(
            lambda txn, databases: _deliveries.set_aside(txn, databases, pending, number, number))
        figures = stores.figures(queue)
        assert (figures.corrupt, figures.dropped_by_mark, figures.lag) == (0, 1, 2)


def test_damaged_record_stops_the_queue_and_loses_nothing(tmp_path: pathlib.Path) -> None:
    made = stores.settings(tmp_path)
    persipubsub.queue.Queue.ensure(made, subscribers=["sub"])
    with persipubsub.queue.Queue(made) as queue:
        first = queue.put([b"1"])
        flip(queue, first, offset=3)
        for _ in range(2):
            with pytest.raises(persipubsub.errors.StoreCorruptError):
                queue.consumer("sub").take(timeout=0)
            with pytest.raises(persipubsub.errors.StoreCorruptError):
                queue.put([b"2"])
        assert queue.check() != []


def test_lease_of_an_inherited_process_is_its_parents(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1"])
        lease = take(queue.consumer("sub"))
        assert support.outcomes_in_child(lease.acknowledge, lease.give_back) == ["", ""]
        figures = stores.figures(queue)
        assert (figures.acknowledged, figures.failed, figures.lag) == (0, 0, 1)
        assert queue.consumer("sub").take(timeout=0) is None
        lease.acknowledge()
        assert stores.figures(queue).acknowledged == 1


def test_message_that_is_not_the_newest_any_more_is_not_passed_over(
        tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = _environment.Environment.write
    others: list[bytes] = []

    def write_beside_another(environment: _environment.Environment, *arguments: Any,
                             **named: Any) -> Any:
        # Between the look for the newest message and the transaction that skips to it.
        monkeypatch.setattr(_environment.Environment, "write", write)
        queue.put([b"2"])
        lease = take(other)
        others.extend(lease.messages)
        lease.acknowledge()
        return write(environment, *arguments, **named)

    with stores.opened(tmp_path) as queue:
        queue.put([b"1"])
        consumer, other = queue.consumer("sub"), queue.consumer("sub")
        monkeypatch.setattr(_environment.Environment, "write", write_beside_another)
        lease = consumer.take_newest(timeout=0)
        assert lease is not None and lease.messages == [b"2"] and others == [b"1"]
        assert stores.figures(queue).skipped == 0
        lease.acknowledge()


def test_newest_message_is_claimed_again_where_the_transaction_is_repeated(
        tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        consumer = queue.consumer("sub")
        late = _late_claim.LateClaim(consumer._claims, 0)
        other = _late_claim.LateClaim(consumer._claims, 0)
        # The first of them is what a transaction wanted that was taken back.
        assert late.take(1) and late.take(2) and late.take(2)
        assert not other.take(2) and other.take(1)
        other.drop()
        late.keep().release()
        late.drop()
        assert not consumer._claims.is_claimed(0, 1, count=2)


def test_newest_message_of_a_queue_that_was_closed_meanwhile(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue, persipubsub.queue.Queue(queue.settings) as other:
        late = _late_claim.LateClaim(other.consumer("sub")._claims, 0)
        assert late.take(1)
        other.close()
        with pytest.raises(persipubsub.errors.ClosedError):
            late.keep()
        late.drop()
        assert not queue.consumer("sub")._claims.is_claimed(0, 1)


def test_message_stays_claimed_while_it_is_acknowledged(tmp_path: pathlib.Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    with stores.opened(tmp_path) as queue, persipubsub.queue.Queue(queue.settings) as other:
        queue.put([b"1"])
        consumer = other.consumer("sub")
        acknowledge = consumer.acknowledge

        def close_and_acknowledge(begin: int, numbers: list[int]) -> None:
            # As another thread does.
            other.close()
            assert queue.consumer("sub").take(timeout=0) is None
            acknowledge(begin, numbers)

        monkeypatch.setattr(consumer, "acknowledge", close_and_acknowledge)
        lease = take(consumer)
        lease.acknowledge()
        assert stores.figures(queue).acknowledged == 1
        assert not queue.consumer("sub")._claims.is_claimed(0, lease.numbers[0])


def test_delivery_that_ends_behind_a_close_judges_no_other_one(tmp_path: pathlib.Path) -> None:
    policy = _attempts.Policy(max_deliveries=2)
    with stores.opened(tmp_path, retries=retrying(policy)) as queue:
        queue.put([b"1"])
        with persipubsub.queue.Queue(queue.settings) as other:
            lease = take(other.consumer("sub"))
        # The close gave it back.
        last = take(queue.consumer("sub"))
        lease.give_back(ValueError("too late"))
        assert stores.figures(queue).dead_lettered == 0 and stores.figures(queue).lag == 1
        last.acknowledge()
        assert stores.figures(queue).acknowledged == 1


@pytest.mark.parametrize("max_deliveries", [0, 3])
def test_batch_whose_beginning_becomes_too_old_stays_claimed(tmp_path: pathlib.Path,
                                                             monkeypatch: pytest.MonkeyPatch,
                                                             max_deliveries: int) -> None:
    claim_prefix = _claims.Claims.claim_prefix
    claims: list[int] = []

    def claim_and_wait(*arguments: Any) -> _claims.Claim | None:
        claim = claim_prefix(*arguments)
        if not claims:
            clock.advance(6)
        claims.append(0 if claim is None else claim.count)
        return claim

    monkeypatch.setattr(_claims.Claims, "claim_prefix", claim_and_wait)
    clock = stores.Clock()
    policy = _attempts.Policy(max_deliveries=max_deliveries)
    with stores.opened(tmp_path, clock=clock, timeout_ns=10 * 10**9,
                       retries=retrying(policy)) as queue:
        queue.put([b"0", b"1"])
        clock.advance(5)
        queue.put([b"2", b"3"])
        lease = take(queue.consumer("sub"), most=10)
        assert lease.messages == [b"2", b"3"]
        # Given back for a moment, others would have passed over it.
        assert claims == [4]
        assert queue.drop_expired() == 2
        lease.acknowledge()
        assert (stores.figures(queue).acknowledged, stores.figures(queue).lag) == (2, 0)
