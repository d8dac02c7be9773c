"""Test taking messages: large batches, damage, a close before the end."""

import concurrent.futures
import itertools
import threading
from pathlib import Path

import pytest

import persipubsub.queue
from persipubsub import errors
from persipubsub.lmdb_engine import attempts, consuming
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log
from tests import stores


def test_batch_of_large_messages_ends_early(tmp_path: Path) -> None:
    with stores.opened(tmp_path) as queue:
        for _ in range(4):
            queue.put([bytes(7 << 20)])
        assert len(stores.lease(queue, most=4).messages) == 2


def test_number_that_a_rebuild_left_empty(tmp_path: Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1"])
    stores.lose_power(queue.path)
    with stores.again(queue) as rebuilt:
        last = rebuilt.put([b"2"]) - 1
        assert [rebuilt.consumer("sub").take_at(number)
                for number in (last, last - 1)] == [None] * 2
        assert stores.take_all(rebuilt) == [b"1", b"2"]


def take_until_closed(consumer: consuming.Consumer, begun: threading.Semaphore) -> None:
    with pytest.raises(errors.ClosedError):
        for is_newest in itertools.cycle([False, False, True]):
            if (lease := consumer.take(timeout=0, is_newest=is_newest)) is not None:
                lease.nack()
            consumer.front()
            begun.release()


def test_close_beside_consumers_is_the_only_error(tmp_path: Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"message"] * 20)
        for _ in range(60):
            other, begun = stores.again(queue), threading.Semaphore(0)
            with concurrent.futures.ThreadPoolExecutor(3) as executor:
                futures = [
                    executor.submit(take_until_closed, other.consumer("sub"), begun)
                    for _ in range(3)
                ]
                begun.acquire()
                other.close()
            assert [future.exception() for future in futures] == [None] * 3


# Damage


def flip(tx: fmt.Tx) -> None:
    """Flip a bit of the record of the first block."""
    cursor = tx.cursor()
    found = log.head(cursor)
    assert found is not None
    value = bytearray(found.value)
    value[3] ^= 1
    cursor.put(fmt.pack_number(found.first), bytes(value))


def test_damaged_record_stops_the_queue_and_loses_nothing(tmp_path: Path) -> None:
    path, made = stores.path_of(tmp_path), stores.settings()
    persipubsub.queue.Queue.ensure(path, made, ["sub"])
    with persipubsub.queue.Queue(path, made) as queue:
        queue.put([b"1"])
        stores.write(queue, flip)
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
            lease = stores.lease(other)
        # The close gave it back.
        last = stores.lease(queue)
        lease.nack(ValueError("too late"))
        assert stores.figures(queue).dead_lettered == 0 and stores.figures(queue).lag == 1
        last.ack()
        assert stores.figures(queue).acknowledged == 1
