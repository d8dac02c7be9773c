"""Test what is told of messages in flight: which, in which process, and since when."""

# pylint: disable=missing-function-docstring

import os
import pathlib
import signal
import time

import persipubsub.control
import persipubsub.queue
import persipubsub.statistics
import persipubsub.subscriber
from tests import stores, support


def claims(queue: persipubsub.queue.Queue,
           name: str = "sub") -> tuple[persipubsub.statistics.InFlight, ...]:
    return stores.figures(queue, name).claims


def test_claims_are_told_with_process_and_time(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["other", "sub"]) as queue:
        assert claims(queue) == ()
        first = queue.put([b"1", b"2", b"3"])
        before_ns = time.monotonic_ns()
        one = queue.consumer("sub").take(timeout=0)
        many = queue.consumer("sub").take(timeout=0, max_messages=2)
        assert one is not None and many is not None
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


def test_rest_of_a_batch_is_told_with_its_process(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        first = queue.put([b"1", b"2", b"3"])
        lease = queue.consumer("sub").take(timeout=0, max_messages=3)
        assert lease is not None
        lease.ack(1)
        found, = claims(queue)
        assert (found.number, found.count, found.process_id) == (first + 1, 2, os.getpid())
        lease.ack()


def test_hung_consumer_is_seen_and_ending_it_helps_at_once(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth)

    def hang(pipe: support.Connection) -> None:
        with persipubsub.subscriber.Sub() as sub:
            sub.init(sub_id="sub", config_pth=config_pth)
            with sub.receive(timeout=support.HANG_SECS) as msg:
                pipe.send(msg)
                pipe.recv()

    with support.open_queue(config_pth) as queue:
        number = queue.put([b"1"])
        with support.Child(hang) as child:
            assert child.get() == b"1"
            child.kill(signal.SIGSTOP)
            claim, = persipubsub.control.in_flight(config_pth)["queue"]
            assert (claim.number, claim.process_id) == (number, child.process.pid)
            # It is not robbed.
            consumer = queue.consumer("sub")
            assert consumer.take(timeout=0.2) is None
            child.kill(signal.SIGKILL)
            child.end(-signal.SIGKILL)
            lease = consumer.take(timeout=support.HANG_SECS)
            assert lease is not None and lease.messages == [b"1"]
            claim, = persipubsub.control.in_flight(config_pth)["queue"]
            assert claim.process_id == os.getpid()
            lease.ack()


def test_claim_that_is_held_for_long_keeps_its_note(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"x"] * 5000)
        consumer = queue.consumer("sub")
        held = consumer.take(timeout=0)
        assert held is not None
        for _ in range(4999):
            lease = consumer.take(timeout=0)
            assert lease is not None
            lease.ack()
        assert [claim.process_id for claim in claims(queue)] == [os.getpid()]
        held.ack()


def test_without_a_note_the_rest_is_still_told(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        number = queue.put([b"1"])
        lease = queue.consumer("sub").take(timeout=0)
        assert lease is not None
        # Notes are hints: of a damaged one nothing is believed.
        with open(os.path.join(queue.path, "shared"), "r+b") as file:
            file.seek(4096)
            content = bytearray(file.read())
            for index in range(0, len(content), 32):
                content[index + 9] ^= 1
            file.seek(4096)
            file.write(content)
        assert claims(queue) == (persipubsub.statistics.InFlight("sub", number, 1, None, None), )
        lease.ack()


def test_note_of_a_process_that_ended_is_not_believed(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        number = queue.put([b"1"])

        def note(pipe: support.Connection) -> None:
            pipe.send(queue.consumer("sub").take(timeout=0).numbers)  # type: ignore[union-attr]

        with support.Child(note) as child:
            assert child.get() == [number]
            child.end()
        # Numbers of other consumers use the same place after a while; nobody has this one now.
        assert claims(queue) == ()
