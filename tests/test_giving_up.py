"""Test what becomes of messages whose deliveries are exhausted."""

# pylint: disable=contextmanager-generator-missing-cleanup

import contextlib
import datetime
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import persipubsub.queue
from persipubsub import errors
from persipubsub.lmdb_engine import attempts, locks, maintenance
from persipubsub.message import DeadLetter
from persipubsub.statistics import Progress
from tests import stores, support

ERROR = ValueError("no greeting")


def letters_path(directory: Path) -> str:
    return os.path.join(directory, "letters")


def retries(directory: Path | None, max_deliveries: int) -> Mapping[str, persipubsub.queue.Retries]:
    """Give messages up after so many deliveries; without a directory, drop them."""
    target = None if directory is None else functools.partial(
        persipubsub.queue.Queue, letters_path(directory), stores.settings())
    policy = attempts.Policy(max_deliveries=max_deliveries)
    return {"sub": persipubsub.queue.Retries(policy, "greetings", target)}


def make_letters(directory: Path) -> persipubsub.queue.Queue:
    persipubsub.queue.Queue.ensure(letters_path(directory), stores.settings(), ["dead_letters"])
    return persipubsub.queue.Queue(letters_path(directory), stores.settings())


@contextlib.contextmanager
def opened(directory: Path,
           max_deliveries: int = 2,
           **changes: Any) -> Iterator[tuple[persipubsub.queue.Queue, persipubsub.queue.Queue]]:
    """Open a queue and that of its dead letters; check both at the end."""
    with make_letters(directory) as target, stores.opened(directory,
                                                          subscribers=["sub", "other"],
                                                          retries=retries(
                                                              directory, max_deliveries),
                                                          **changes) as queue:
        yield queue, target
        assert target.check() == []


def fail(queue: persipubsub.queue.Queue, times: int = 2) -> None:
    for _ in range(times):
        stores.lease(queue).nack(ERROR)


def letters_in(target: persipubsub.queue.Queue) -> list[DeadLetter]:
    return [DeadLetter.decode(msg) for msg in stores.take_all(target, "dead_letters")]


def test_message_is_moved_with_all_that_is_known_of_it(tmp_path: Path) -> None:
    with opened(tmp_path) as (queue, target):
        begin = datetime.datetime.now(datetime.UTC)
        number = queue.put([b"\x00hello", b"2"])
        fail(queue)
        end = datetime.datetime.now(datetime.UTC)
        assert stores.take_all(queue) == [b"2"]
        assert stores.take_all(queue, "other") == [b"\x00hello", b"2"]
        found, = letters_in(target)
        assert (found.queue, found.subscriber, found.number, found.attempts, found.error,
                found.data) == ("greetings", "sub", number, 2, "ValueError: no greeting",
                                b"\x00hello")
        # The two clocks are read one after the other.
        slack = datetime.timedelta(seconds=1)
        assert begin - slack <= found.sent_at <= found.moved_at <= end + slack
        figures = stores.figures(queue)
        assert (figures.dead_lettered, figures.failed, figures.acknowledged, figures.lag) == (1, 2,
                                                                                              1, 0)
        assert stores.attempts(queue) == {}


CHANGES: Mapping[str, Callable[[persipubsub.queue.Queue], object]] = {
    "clear": lambda queue: queue.clear(),
    "skip": lambda queue: queue.seek("sub", "end"),
    "seek back": lambda queue: (queue.seek("sub", "end"), queue.seek("sub", "beginning")),
    "fill": lambda queue: queue.put([b"3"]),
    "remove": lambda queue: queue.remove_subscriber("sub"),
    "add again": lambda queue: (queue.remove_subscriber("sub"), queue.add_subscriber("sub")),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_message_that_left_meanwhile_is_not_moved(tmp_path: Path, change: str) -> None:
    """All of a batch are counted at once, and then moved one by one."""
    with make_letters(tmp_path) as target:
        queues: list[persipubsub.queue.Queue] = []

        class Target:
            """Something happens to the queue while the first message is moved."""

            def put(self, *arguments: Any, **named: Any) -> int:
                if not target.statistics().messages:
                    CHANGES[change](queues[0])
                return target.put(*arguments, **named)

            def secure(self) -> None:
                """Flush what was put."""
                target.secure()

            def close(self) -> None:
                """Leave the queue open."""

        policy = attempts.Policy(max_deliveries=1)
        found: Any = persipubsub.queue.Retries(policy, "greetings", Target)
        with stores.opened(tmp_path,
                           max_msgs_num=2,
                           strategy=stores.PRUNE_LAST,
                           retries={"sub": found}) as queue:
            queues.append(queue)
            queue.put([b"1", b"2"])
            stores.lease(queue, most=2).nack(ERROR)
            assert [letter.data for letter in letters_in(target)] == [b"1"]


def die_in_the_last_delivery(queue: persipubsub.queue.Queue, count: int) -> None:
    """Let consumers die that have the last messages; those need not be blocks of their own."""
    consumer = queue.consumer("sub")
    end = queue.statistics().next_number
    for number in range(end - count, end):
        lease = consumer.take_at(number)
        assert lease is not None
        del lease


@pytest.mark.parametrize("sends", [[[b"1", b"2", b"3", b"4"]], [[b"1"], [b"2"], [b"3"], [b"4"]]])
def test_exhausted_newest_messages_that_can_not_be_moved_are_passed_over(
        tmp_path: Path, sends: list[list[bytes]]) -> None:
    # The queue of dead letters is not initialized.
    with stores.opened(tmp_path, retries=retries(tmp_path, 1)) as queue:
        for messages in sends:
            queue.put(messages)
        die_in_the_last_delivery(queue, count=2)
        lease = queue.consumer("sub").take(timeout=0, is_newest=True)
        assert lease is not None and lease.messages == [b"2"]
        lease.ack()
        assert queue.consumer("sub").take(timeout=0, is_newest=True) is None
        figures = stores.figures(queue)
        # They stay, and are moved when that is possible.
        assert (figures.skipped, figures.dead_lettered, figures.lag) == (1, 0, 2)
        make_letters(tmp_path).close()
        support.until(lambda: queue.consumer("sub").take(timeout=0, is_newest=True) is None and
                      stores.figures(queue).lag == 0,
                      what="the messages are moved at last")
        with make_letters(tmp_path) as target:
            # The pause after a refusal may end between the two.
            assert {letter.data for letter in letters_in(target)} == {b"3", b"4"}


def test_without_a_queue_of_dead_letters_it_is_dropped_with_a_warning(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with stores.opened(tmp_path, retries=retries(None, 2)) as queue:
        number = queue.put([b"1", b"2"])
        fail(queue)
        assert stores.take_all(queue) == [b"2"]
        assert stores.figures(queue).dead_lettered == 1
    warning, = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert warning.name == "persipubsub.queue"
    text = warning.getMessage()
    assert f"message {number} " in text and "sub" in text and "no greeting" in text


def test_queue_of_dead_letters_that_takes_none_holds_up_nobody(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # The queue of dead letters is not initialized.
    with stores.opened(tmp_path, retries=retries(tmp_path, 1)) as queue:
        queue.put([b"1", b"2", b"3"])
        fail(queue, times=1)
        # It is not lost, and is not delivered again.
        assert stores.take_all(queue) == [b"2", b"3"]
        assert (stores.figures(queue).lag, stores.figures(queue).dead_lettered) == (1, 0)
        assert len([one for one in caplog.records if "stays with sub" in one.getMessage()]) == 1
        make_letters(tmp_path).close()
        support.until(lambda: stores.take(queue) is None and stores.figures(queue).lag == 0,
                      what="the message is moved at last")
        with make_letters(tmp_path) as target:
            assert [letter.data for letter in letters_in(target)] == [b"1"]


def test_move_that_waits_holds_up_no_acknowledgement(tmp_path: Path) -> None:
    make_letters(tmp_path).close()
    with stores.opened(tmp_path, retries=retries(tmp_path, 1)) as queue:
        queue.put([b"1", b"2"])
        first, second = stores.lease(queue), stores.lease(queue)
        mover = threading.Thread(target=first.nack, args=(ERROR, ))
        with locks.open_lock(letters_path(tmp_path), busy_timeout_secs=1):
            mover.start()
            support.until(lambda: stores.figures(queue).failed, what="the failure is recorded")
            second.ack()
            assert mover.is_alive() and stores.figures(queue).dead_lettered == 0
        mover.join(support.HANG_SECS)
        assert stores.figures(queue).dead_lettered == 1


def test_close_during_a_move_closes_the_queue_of_dead_letters(tmp_path: Path) -> None:
    make_letters(tmp_path).close()
    with stores.opened(tmp_path, retries=retries(tmp_path, 1)) as queue:
        other = persipubsub.queue.Queue(queue.path, stores.settings(), retries(tmp_path, 1))
        queue.put([b"1"])
        mover = threading.Thread(target=stores.lease(other).nack, args=(ERROR, ))
        closer = threading.Thread(target=other.close)
        with locks.open_lock(letters_path(tmp_path), busy_timeout_secs=1):
            mover.start()
            support.until(lambda: stores.figures(queue).failed, what="the failure is recorded")
            closer.start()
            support.until(lambda: "closed" in repr(other), what="the queue is being closed")
        mover.join(support.HANG_SECS)
        closer.join(support.HANG_SECS)
        # This fails if the queue is open.
        maintenance.compact(letters_path(tmp_path), stores.settings(), Progress())
        assert stores.take(queue) is None
        assert stores.figures(queue).dead_lettered == 1
    with make_letters(tmp_path) as target:
        assert [letter.data for letter in letters_in(target)] == [b"1"]


class _Silent(Exception):

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("error, text", [
    (KeyError("x"), "KeyError: 'x'"),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
    (_Silent(), "_Silent"),
    (ValueError("ü" * 10**6), f"ValueError: {'ü' * 488}"),
    (ValueError("\ud800"), "ValueError: "),
])
def test_whatever_the_error_is_the_message_is_moved(tmp_path: Path, error: BaseException,
                                                    text: str) -> None:
    with opened(tmp_path, max_deliveries=1) as (queue, target):
        queue.put([b"1"])
        stores.lease(queue).nack(error)
        letter, = letters_in(target)
        assert letter.data == b"1" and letter.error.startswith(text)


@pytest.mark.parametrize("msg", [b"", b"hello", b"\xc1", b"\x80"])
def test_what_is_no_letter_is_refused(msg: bytes) -> None:
    with pytest.raises(errors.CorruptMessageError, match="Expected a dead letter"):
        DeadLetter.decode(msg)


def test_letter_of_another_version_is_refused() -> None:
    now = datetime.datetime.now(datetime.UTC)
    version: Any = 2
    letter = DeadLetter(queue="q",
                        subscriber="sub",
                        number=1,
                        sent_at=now,
                        attempts=1,
                        error="",
                        moved_at=now,
                        data=b"",
                        version=version)
    with pytest.raises(errors.CorruptMessageError, match="version 1, but got .* 2"):
        DeadLetter.decode(letter.encode())
