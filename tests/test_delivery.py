"""Test taking messages: claims, leases, batches, failures, damage."""

# pylint: disable=unbalanced-tuple-unpacking

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import persipubsub.queue
from persipubsub import errors
from persipubsub.lmdb_engine import attempts, consuming
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log
from tests import stores


def take(consumer: consuming.Consumer, most: int = 1) -> consuming.Lease:
    lease = consumer.take(timeout=0, max_messages=most)
    assert lease is not None
    return lease


def test_batch_of_large_messages_ends_early(tmp_path: Path) -> None:
    with stores.opened(tmp_path) as queue:
        for _ in range(4):
            queue.put([bytes(7 << 20)])
        assert len(take(queue.consumer("sub"), most=4).messages) == 2


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
def opened_unchecked(directory: Path,
                     subscribers: Sequence[str]) -> Iterator[persipubsub.queue.Queue]:
    """Open a queue that is to be damaged."""
    path, made = stores.path_of(directory), stores.settings()
    persipubsub.queue.Queue.ensure(path, made, subscribers)
    with persipubsub.queue.Queue(path, made) as queue:
        yield queue


def test_damaged_message_is_shown_to_one_consumer(tmp_path: Path) -> None:
    with opened_unchecked(tmp_path, ["sub"]) as queue:
        first = queue.put([b"1", b"2", b"3"])
        held = take(queue.consumer("sub"))
        flip(queue, first, offset=-2)
        with pytest.raises(errors.CorruptMessageError):
            queue.consumer("sub").take(timeout=0)
        assert stores.take_all(queue) == [b"3"]
        held.ack()
        figures = stores.figures(queue)
        assert (figures.corrupt, figures.acknowledged, figures.lag) == (1, 2, 0)
        # When nobody needs it any more, it leaves like any other message.
        queue.put([b"4"])
        queue.prune()
        assert queue.check() == []


def test_damaged_record_stops_the_queue_and_loses_nothing(tmp_path: Path) -> None:
    with opened_unchecked(tmp_path, ["sub"]) as queue:
        first = queue.put([b"1"])
        flip(queue, first, offset=3)
        for _ in range(2):
            with pytest.raises(errors.StoreCorruptError):
                queue.consumer("sub").take(timeout=0)
            with pytest.raises(errors.StoreCorruptError):
                queue.put([b"2"])
        assert queue.check() != []


def test_delivery_that_ends_behind_a_close_judges_no_other_one(tmp_path: Path) -> None:
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
