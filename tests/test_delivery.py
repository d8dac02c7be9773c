"""Test taking messages: claims, leases, batches, failures, damage."""

# pylint: disable=missing-function-docstring
# pylint: disable=unbalanced-tuple-unpacking

import contextlib
import gc
import pathlib
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

import persipubsub.errors
import persipubsub.queue
from persipubsub.lmdb_engine import attempts, consuming
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log
from tests import stores, support


def take(consumer: consuming.Consumer, most: int = 1) -> consuming.Lease:
    lease = consumer.take(timeout=0, max_messages=most)
    assert lease is not None
    return lease


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
            lease.nack()


def test_two_queues_on_a_store_are_as_two_processes(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue, stores.again(queue) as other:
        queue.put([b"1", b"2"])
        first = take(queue.consumer("sub"))
        second = take(other.consumer("sub"))
        assert second.messages == [b"2"]
        second.ack()
        assert stores.ranges(queue) == [range(second.numbers[0], second.numbers[0] + 1)]
        assert other.consumer("sub").take(timeout=0) is None
        first.ack()
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
            lease.ack()
            assert stores.figures(queue).lag == 3 - int(expected) + 1
        held.nack()
        assert stores.take_all(queue) == [b"1"]


def test_message_that_was_given_back_comes_again_first(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1", b"2", b"3"])
        consumer = queue.consumer("sub")
        first, second = take(consumer), take(consumer)
        second.ack()
        first.nack(ValueError("no"))
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
        with stores.again(queue) as other:
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
        lease.ack()
        assert stores.figures(queue).acknowledged == 4
        assert stores.figures(queue, "other").lag == 4


def test_batch_does_not_claim_what_comes_later(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1", b"2"])
        lease = take(queue.consumer("sub"), most=10)
        queue.put([b"3"])
        assert take(queue.consumer("sub")).messages == [b"3"]
        assert lease.messages == [b"1", b"2"]


def test_batch_ends_where_somebody_else_is_at_work(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1", b"2", b"3", b"4"])
        consumer = queue.consumer("sub")
        held = [take(consumer) for _ in range(3)]
        held[0].nack()
        held[1].nack()
        batch = take(consumer, most=4)
        assert batch.messages == [b"1", b"2"]
        assert take(consumer, most=4).messages == [b"4"]


def test_batch_ends_at_what_was_acknowledged_ahead(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1", b"2", b"3", b"4"])
        consumer = queue.consumer("sub")
        held = [take(consumer) for _ in range(3)]
        held[2].ack()
        held[0].nack()
        held[1].nack()
        batch = take(consumer, most=4)
        assert batch.messages == [b"1", b"2"]
        batch.ack()
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
        lease.nack()
        assert queue.front("sub") == b"1"
        assert stores.figures(queue).lag == 2


@pytest.mark.parametrize("seconds, arrives", [(10.0, True), (10.000000001, False)])
def test_message_of_just_the_timeout_is_delivered(tmp_path: pathlib.Path, seconds: float,
                                                  arrives: bool) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, msg_timeout_secs=10) as queue:
        queue.put([b"old"])
        clock.now_ns += round(seconds * stores.SECOND_NS)
        assert queue.front("sub") == (b"old" if arrives else None)
        assert stores.take_all(queue) == ([b"old"] if arrives else [])
        assert stores.figures(queue).dropped_by_timeout == (not arrives)


def test_guess_does_not_deliver_what_is_too_old(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, msg_timeout_secs=10) as queue:
        for message in (b"1", b"2"):
            queue.put([message])
        clock.advance(5)
        queue.put([b"3"])
        consumer = queue.consumer("sub")
        take(consumer).ack()
        clock.advance(6)
        assert take(consumer).messages == [b"3"]
        assert stores.figures(queue).dropped_by_timeout == 1


def test_message_that_expired_at_work_is_not_acknowledged_too(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, msg_timeout_secs=10) as queue:
        queue.put([b"1"])
        lease = take(queue.consumer("sub"))
        clock.advance(11)
        queue.prune()
        lease.ack()
        figures = stores.figures(queue)
        assert (figures.acknowledged, figures.dropped_by_timeout, figures.lag) == (0, 1, 0)
        assert figures.seconds_since_acknowledged is None


def test_cleared_message_is_acknowledged_into_the_void(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1"])
        lease = take(queue.consumer("sub"))
        assert queue.clear() == 1
        lease.ack()
        assert (stores.figures(queue).acknowledged, stores.figures(queue).cleared) == (0, 1)


def test_waiting_ends_with_the_timeout(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        begin = time.monotonic()
        assert queue.consumer("sub").take(timeout=0.2) is None
        assert 0.2 <= time.monotonic() - begin < support.HANG_SECS


@pytest.mark.parametrize("is_given_back", [True, False])
def test_waiting_consumer_is_woken(tmp_path: pathlib.Path, is_given_back: bool) -> None:
    with stores.opened(tmp_path) as queue:
        held: consuming.Lease | None = None
        if is_given_back:
            queue.put([b"1"])
            held = take(queue.consumer("sub"))
        found: list[consuming.Lease | None] = []
        consumer = queue.consumer("sub")
        thread = threading.Thread(
            target=lambda: found.append(consumer.take(timeout=support.HANG_SECS)))
        thread.start()
        if held is not None:
            held.nack()
        else:
            queue.put([b"1"])
        thread.join(support.HANG_SECS)
        lease, = found
        assert lease is not None and lease.messages == [b"1"]
        lease.ack()


def test_part_of_a_batch_is_acknowledged(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        for message in (b"1", b"2", b"3", b"4"):
            queue.put([message])
        lease = take(queue.consumer("sub"), most=9)
        lease.ack(2)
        assert stores.figures(queue).lag == 2
        # Nobody else gets what is left of it.
        assert queue.consumer("sub").take(timeout=0) is None
        lease.nack(ValueError("no"), 1)
        assert stores.take_all(queue) == [b"3"]
        lease.ack()
        assert (stores.figures(queue).acknowledged, stores.figures(queue).failed) == (4, 1)


def test_batch_tells_what_is_known_of_each_message(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, max_msgs_num=4) as queue:
        consumer = queue.consumer("sub")
        queue.put([b"0"] * 4)
        first = queue.put([b"1"]) - 1
        clock.advance(100)
        queue.put([b"2", b"3"])
        lease = take(consumer, most=9)
        told = lease.details()
        assert [message.number for message in told] == list(range(first, first + 4))
        assert [message.data for message in told] == [b"0", b"1", b"2", b"3"]
        assert [message.dropped_before for message in told] == [3, 0, 0, 0]
        ages = [(told[-1].sent_at - message.sent_at).total_seconds() for message in told]
        assert ages == pytest.approx([100, 100, 0, 0], abs=1)
        lease.ack()


def test_paused_consumers_get_nothing_and_end_what_they_have(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["sub", "other"]) as queue:
        for message in (b"1", b"2", b"3"):
            queue.put([message])
        consumer = queue.consumer("sub")
        take(consumer).ack()
        held = take(consumer)
        assert queue.pause("sub") and not queue.pause("sub")
        assert stores.figures(queue).is_paused and not stores.figures(queue, "other").is_paused
        held.ack()
        for again in (consumer, queue.consumer("sub")):
            assert again.take(timeout=0) is None
            assert again.take(timeout=0, max_messages=9) is None
            assert again.take(timeout=0, is_newest=True) is None
            assert again.front() is None
        assert stores.take_all(queue, "other") == [b"1", b"2", b"3"]
        assert stores.figures(queue).lag == 1
        found: list[consuming.Lease | None] = []
        thread = threading.Thread(
            target=lambda: found.append(consumer.take(timeout=support.HANG_SECS)))
        thread.start()
        stores.until_somebody_waits(queue.path)
        assert queue.pause("sub", False) and not queue.pause("sub", False)
        thread.join(support.HANG_SECS)
        lease, = found
        assert lease is not None and lease.messages == [b"3"]
        lease.ack()


def test_single_message_is_deleted_for_one_subscriber(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["sub", "other"]) as queue:
        first = queue.put([b"1", b"2", b"3"])
        alone = queue.put([b"for other"], ("other", ))
        held = take(queue.consumer("sub"))
        assert queue.delete("sub", first + 1) and not queue.delete("sub", first + 1)
        for number in (0, alone, alone + 1, 1 << 47):
            assert not queue.delete("sub", number)
        # A consumer that works on it may end its work.
        assert queue.delete("sub", first)
        held.ack()
        figures = stores.figures(queue)
        assert (figures.cleared, figures.acknowledged, figures.lag) == (2, 0, 1)
        assert stores.take_all(queue) == [b"3"]
        assert stores.take_all(queue, "other") == [b"1", b"2", b"3", b"for other"]


# Damage


def flip(queue: persipubsub.queue.Queue, number: int, offset: int = -1) -> None:
    """Flip a bit of a message in the store: by default of the last byte of its block."""

    def work(tx: fmt.Tx) -> None:
        cursor = tx.cursor()
        found = log.seek(cursor, number)
        assert found is not None
        value = bytearray(found.value)
        value[offset] ^= 1
        cursor.put(fmt.pack_number(found.first), bytes(value))

    stores.write(queue, work)


@contextlib.contextmanager
def opened_unchecked(directory: pathlib.Path,
                     subscribers: Sequence[str]) -> Iterator[persipubsub.queue.Queue]:
    """Open a queue that is to be damaged."""
    path, made = stores.path_of(directory), stores.settings()
    persipubsub.queue.Queue.ensure(path, made, subscribers)
    with persipubsub.queue.Queue(path, made) as queue:
        yield queue


def collect(queue: persipubsub.queue.Queue, most: int) -> tuple[list[bytes], list[int]]:
    """Take everything; return messages, and the numbers of those that were damaged."""
    consumer = queue.consumer("sub")
    messages: list[bytes] = []
    damaged: list[int] = []
    while True:
        try:
            lease = consumer.take(timeout=0, max_messages=most)
        except persipubsub.errors.CorruptMessageError as error:
            assert queue.path in str(error)
            damaged.append(error.number)
            continue
        if lease is None:
            return messages, damaged
        messages.extend(lease.messages)
        lease.ack()


@pytest.mark.parametrize("most", [1, 2, 10])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_damaged_message_is_set_aside_once(tmp_path: pathlib.Path, most: int, index: int) -> None:
    messages = [b"one", b"two", b"three"]
    with opened_unchecked(tmp_path, ["sub", "other"]) as queue:
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
    with opened_unchecked(tmp_path, ["sub"]) as queue:
        first = queue.put([b"1", b"2", b"3"])
        held = take(queue.consumer("sub"))
        flip(queue, first, offset=-2)
        with pytest.raises(persipubsub.errors.CorruptMessageError):
            queue.consumer("sub").take(timeout=0)
        assert stores.take_all(queue) == [b"3"]
        held.ack()
        figures = stores.figures(queue)
        assert (figures.corrupt, figures.acknowledged, figures.lag) == (1, 2, 0)
        # When nobody needs it any more, it leaves like any other message.
        queue.put([b"4"])
        queue.prune()
        assert queue.check() == []


def test_damaged_record_stops_the_queue_and_loses_nothing(tmp_path: pathlib.Path) -> None:
    with opened_unchecked(tmp_path, ["sub"]) as queue:
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
        assert support.outcomes_in_child(lease.ack, lease.nack) == ["", ""]
        figures = stores.figures(queue)
        assert (figures.acknowledged, figures.failed, figures.lag) == (0, 0, 1)
        assert queue.consumer("sub").take(timeout=0) is None
        lease.ack()
        assert stores.figures(queue).acknowledged == 1


def test_delivery_that_ends_behind_a_close_judges_no_other_one(tmp_path: pathlib.Path) -> None:
    policy = attempts.Policy(max_deliveries=2)
    retries = {"sub": persipubsub.queue.Retries(policy, "queue")}
    with stores.opened(tmp_path, retries=retries) as queue:
        queue.put([b"1"])
        with stores.again(queue) as other:
            lease = take(other.consumer("sub"))
        # The close gave it back.
        last = take(queue.consumer("sub"))
        lease.nack(ValueError("too late"))
        assert stores.figures(queue).dead_lettered == 0 and stores.figures(queue).lag == 1
        last.ack()
        assert stores.figures(queue).acknowledged == 1
