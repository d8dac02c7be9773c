"""Test how deliveries are counted, when messages are retried, and that no record is left behind."""

import time
from collections.abc import Mapping
from pathlib import Path
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


# Retrying


def test_delay_doubles_up_to_an_hour(tmp_path: Path) -> None:
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


def test_waiting_consumer_wakes_when_a_message_is_due(tmp_path: Path) -> None:
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


# Forgetting


def fail_all(queue: persipubsub.queue.Queue) -> None:
    """Fail with everything, and acknowledge all but the first message ahead of it."""
    take(queue, most=100).nack(ERROR)


RECORD = fmt.Attempts(1, 0, 0, 0, "")


@pytest.mark.parametrize("ordinal, number, record, finding", [
    (5, 1, RECORD, "flagged"),
    (0, 99, RECORD, "in front of"),
    (0, 1, RECORD._replace(deliveries=0), "count something"),
])
def test_check_finds_records_that_should_not_be(tmp_path: Path, ordinal: int, number: int,
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
