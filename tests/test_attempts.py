"""Test when messages are retried that failed."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import persipubsub.queue
from persipubsub.lmdb_engine import attempts
from tests import stores, support

ERROR = ValueError("no")


def retries(**policy: Any) -> Mapping[str, persipubsub.queue.Retries]:
    return {"sub": persipubsub.queue.Retries(attempts.Policy(**policy), "the queue")}


def test_delay_doubles_up_to_an_hour(tmp_path: Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path,
                       clock=clock,
                       msg_timeout_secs=10**6,
                       retries=retries(delay_ns=1000 * stores.SECOND_NS)) as queue:
        queue.put([b"1"])
        for delay in (1000, 2000, 3600, 3600):
            stores.lease(queue).nack(ERROR)
            clock.advance(delay - 1)
            assert queue.consumer("sub").take(timeout=0) is None
            assert queue.consumer("sub").front() is None
            clock.advance(1)
        stores.lease(queue).ack()


def test_waiting_consumer_wakes_when_a_message_is_due(tmp_path: Path) -> None:
    delay_secs = 0.3
    with stores.opened(tmp_path,
                       retries=retries(delay_ns=int(delay_secs * stores.SECOND_NS))) as queue:
        queue.put([b"1"])
        begin = time.monotonic()
        stores.lease(queue).nack(ERROR)
        lease = queue.consumer("sub").take(timeout=support.HANG_SECS, poll_secs=60)
        assert lease is not None
        # Not before, and not a second later, when everybody looks anyhow.
        assert time.monotonic() - begin >= delay_secs
        lease.ack()
