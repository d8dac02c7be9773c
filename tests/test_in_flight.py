"""Test what is told of messages in flight: which, in which process, and since when."""

import os
import signal
import time
from pathlib import Path

import persipubsub.queue
from persipubsub import control, statistics
from tests import stores, support


def claims(queue: persipubsub.queue.Queue, name: str = "sub") -> tuple[statistics.InFlight, ...]:
    return stores.figures(queue, name).claims


def test_claims_are_told_with_process_and_time(tmp_path: Path) -> None:
    with stores.opened(tmp_path, subscribers=["other", "sub"]) as queue:
        assert claims(queue) == ()
        first = queue.put([b"1", b"2", b"3"])
        before_ns = time.monotonic_ns()
        one, many = stores.lease(queue), stores.lease(queue, most=2)
        found = claims(queue)
        assert [(claim.subscriber, claim.number, claim.count, claim.process_id)
                for claim in found] == [("sub", first, 1, os.getpid()),
                                        ("sub", first + 1, 2, os.getpid())]
        for claim in found:
            assert claim.seconds is not None
            assert 0 <= claim.seconds <= (time.monotonic_ns() - before_ns) / 1e9
        assert claims(queue, "other") == ()
        many.ack()
        assert [claim.number for claim in claims(queue)] == [first]
        one.nack()
        assert claims(queue) == ()


def test_rest_of_a_batch_is_told_with_its_process(tmp_path: Path) -> None:
    with stores.opened(tmp_path) as queue:
        first = queue.put([b"1", b"2", b"3"])
        lease = stores.lease(queue, most=3)
        lease.ack(1)
        found, = claims(queue)
        assert (found.number, found.count, found.process_id) == (first + 1, 2, os.getpid())
        lease.ack()


def test_hung_consumer_is_seen_and_ending_it_helps_at_once(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    with support.open_queue(config_pth) as queue:
        number = queue.put([b"1"])
        with support.Child(support.hold_message, config_pth) as child:
            assert child.get() == b"1"
            child.kill(signal.SIGSTOP)
            claim, = control.in_flight(config_pth)["queue"]
            assert (claim.number, claim.process_id) == (number, child.process.pid)
            # It is not robbed.
            consumer = queue.consumer("sub")
            assert consumer.take(timeout=0.2) is None
            child.kill(signal.SIGKILL)
            child.end(-signal.SIGKILL)
            lease = consumer.take(timeout=support.HANG_SECS)
            assert lease is not None and lease.messages == [b"1"]
            claim, = control.in_flight(config_pth)["queue"]
            assert claim.process_id == os.getpid()
            lease.ack()


def test_claim_that_is_held_for_long_keeps_its_note(tmp_path: Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"x"] * 5000)
        held = stores.lease(queue)
        assert len(stores.take_all(queue)) == 4999
        assert [claim.process_id for claim in claims(queue)] == [os.getpid()]
        held.ack()


def test_note_of_a_process_that_ended_is_not_believed(tmp_path: Path) -> None:
    with stores.opened(tmp_path) as queue:
        number = queue.put([b"1"])

        def note(pipe: support.Connection) -> None:
            pipe.send(queue.consumer("sub").take(timeout=0).numbers)  # type: ignore[union-attr]

        with support.Child(note) as child:
            assert child.get() == [number]
            child.end()
        # Numbers of other consumers use the same place after a while; nobody has this one now.
        assert claims(queue) == ()
