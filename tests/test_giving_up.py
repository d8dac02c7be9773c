"""Test what becomes of messages whose deliveries are exhausted."""

# pylint: disable=missing-function-docstring
# pylint: disable=contextmanager-generator-missing-cleanup

import contextlib
import datetime
import functools
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

import persipubsub.errors
import persipubsub.queue
from persipubsub.lmdb_engine import attempts, consuming, dead_letters
from persipubsub.message import DeadLetter
from tests import stores, support

ERROR = ValueError("no greeting")


def letters_path(directory: pathlib.Path) -> str:
    return os.path.join(directory, "letters")


def retries(directory: pathlib.Path | None,
            max_deliveries: int) -> Mapping[str, persipubsub.queue.Retries]:
    """Give messages up after so many deliveries; without a directory, drop them."""
    target = None if directory is None else functools.partial(
        persipubsub.queue.Queue, letters_path(directory), stores.settings())
    policy = attempts.Policy(max_deliveries=max_deliveries)
    return {"sub": persipubsub.queue.Retries(policy, "greetings", target)}


def make_letters(directory: pathlib.Path) -> persipubsub.queue.Queue:
    """Create and open the queue of dead letters."""
    persipubsub.queue.Queue.ensure(letters_path(directory), stores.settings(), ["dead_letters"])
    return persipubsub.queue.Queue(letters_path(directory), stores.settings())


@contextlib.contextmanager
def opened(directory: pathlib.Path,
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


def take(queue: persipubsub.queue.Queue, most: int = 1) -> consuming.Lease:
    lease = queue.consumer("sub").take(timeout=0, max_messages=most)
    assert lease is not None
    return lease


def fail(queue: persipubsub.queue.Queue, times: int = 2) -> None:
    for _ in range(times):
        take(queue).nack(ERROR)


def letters_in(target: persipubsub.queue.Queue) -> list[DeadLetter]:
    return [DeadLetter.decode(msg) for msg in stores.take_all(target, "dead_letters")]


def test_message_is_moved_with_all_that_is_known_of_it(tmp_path: pathlib.Path) -> None:
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


def test_those_of_a_batch_that_were_delivered_too_often_are_moved(tmp_path: pathlib.Path) -> None:
    with opened(tmp_path) as (queue, target):
        queue.put([b"1", b"2", b"3"])
        take(queue, most=2).nack(ERROR)
        take(queue, most=3).nack(ERROR)
        assert [letter.data for letter in letters_in(target)] == [b"1", b"2"]
        lease = take(queue, most=3)
        assert [message.attempts for message in lease.details()] == [2]
        lease.ack()


@pytest.mark.parametrize("most", [1, 2])
def test_message_that_got_too_old_in_its_last_delivery_is_moved(tmp_path: pathlib.Path,
                                                                most: int) -> None:
    clock = stores.Clock()
    with opened(tmp_path, max_deliveries=1, clock=clock, msg_timeout_secs=10) as (queue, target):
        number = queue.put([b"1", b"2"][:most])
        lease = take(queue, most=most)
        clock.advance(11)
        lease.nack(ERROR)
        assert [
            (found.number, found.attempts, found.data, found.error) for found in letters_in(target)
        ] == [(number + index, 1, msg, "ValueError: no greeting")
              for index, msg in enumerate(lease.messages)]
        figures = stores.figures(queue)
        assert (figures.dead_lettered, figures.failed, figures.dropped_by_timeout,
                figures.lag) == (most, most, 0, 0)
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
def test_message_that_left_meanwhile_is_not_moved(tmp_path: pathlib.Path, change: str) -> None:
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
            take(queue, most=2).nack(ERROR)
            assert [letter.data for letter in letters_in(target)] == [b"1"]


def test_consumer_that_dies_in_the_last_delivery(tmp_path: pathlib.Path) -> None:
    with opened(tmp_path) as (queue, target):
        queue.put([b"1", b"2"])
        fail(queue, times=1)
        take(queue)  # and drop the lease, as much as a process that is killed
        assert letters_in(target) == []
        # The next one that comes across it moves it, and gets the one behind it.
        assert stores.take(queue) == b"2"
        found, = letters_in(target)
        assert (found.data, found.attempts) == (b"1", 2)
        assert "its process ended" in found.error


def die_in_the_last_delivery(queue: persipubsub.queue.Queue, count: int) -> None:
    """Let consumers die that have the last messages; those need not be blocks of their own."""
    consumer = queue.consumer("sub")
    end = queue.statistics().next_number
    for number in range(end - count, end):
        lease = consumer.take_at(number)
        assert lease is not None
        del lease


@pytest.mark.parametrize("sends", [[[b"1", b"2", b"3", b"4"]], [[b"1"], [b"2"], [b"3"], [b"4"]]])
def test_exhausted_newest_messages_are_moved_and_the_newest_of_the_rest_is_taken(
        tmp_path: pathlib.Path, sends: list[list[bytes]]) -> None:
    with opened(tmp_path, max_deliveries=1) as (queue, target):
        for messages in sends:
            queue.put(messages)
        die_in_the_last_delivery(queue, count=2)
        lease = queue.consumer("sub").take(timeout=0, is_newest=True)
        assert lease is not None and lease.messages == [b"2"]
        assert [letter.data for letter in letters_in(target)] == [b"4", b"3"]
        figures = stores.figures(queue)
        assert (figures.skipped, figures.dead_lettered, figures.lag) == (1, 2, 1)
        lease.ack()
        assert queue.consumer("sub").take(timeout=0, is_newest=True) is None


@pytest.mark.parametrize("sends", [[[b"1", b"2", b"3", b"4"]], [[b"1"], [b"2"], [b"3"], [b"4"]]])
def test_exhausted_newest_messages_that_can_not_be_moved_are_passed_over(
        tmp_path: pathlib.Path, sends: list[list[bytes]]) -> None:
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


def test_newest_message_that_is_in_its_last_delivery_is_not_passed_over(
        tmp_path: pathlib.Path) -> None:
    with opened(tmp_path, max_deliveries=1) as (queue, target):
        queue.put([b"1", b"2", b"3"])
        die_in_the_last_delivery(queue, count=1)
        held = queue.consumer("sub").take_at(queue.statistics().next_number - 2)
        assert held is not None and held.messages == [b"2"]
        assert queue.consumer("sub").take(timeout=0, is_newest=True) is None
        assert [letter.data for letter in letters_in(target)] == [b"3"]
        assert stores.figures(queue).skipped == 0
        held.ack()


def die_behind_the_move(pipe: support.Connection, directory: pathlib.Path) -> None:
    """End as by a kill when the letter is there and the message is still where it was."""

    class Target:
        """Ends the process behind a put."""

        def put(self, *arguments: Any, **named: Any) -> int:
            with make_letters(directory) as target:
                target.put(*arguments, **named)
            os._exit(7)

        def secure(self) -> None:
            """Never get here."""

        def close(self) -> None:
            """Never get here."""

    policy = attempts.Policy(max_deliveries=2)
    found: Any = persipubsub.queue.Retries(policy, "greetings", Target)
    with persipubsub.queue.Queue(stores.path_of(directory), stores.settings(),
                                 {"sub": found}) as queue:
        fail(queue)
        pipe.send("Expected to end by now")


def test_process_that_is_killed_before_the_message_leaves(tmp_path: pathlib.Path) -> None:
    """Whatever was done before, there is exactly one letter in the end."""
    with stores.opened(tmp_path) as queue:
        queue.put([b"1", b"2"])
    with support.Child(die_behind_the_move, tmp_path) as child:
        child.end(exit_code=7)
    with opened(tmp_path) as (queue, target):
        assert (target.statistics().messages, stores.figures(queue).lag) == (1, 2)
        assert stores.take(queue) == b"2"
        found, = letters_in(target)
        assert (found.data, found.attempts, found.error) == (b"1", 2, "ValueError: no greeting")


def test_message_that_fails_again_after_it_was_sent_back(tmp_path: pathlib.Path) -> None:
    with opened(tmp_path) as (queue, target):
        for _ in range(2):
            queue.put([b"1"], ("sub", ))
            fail(queue)
        assert len(letters_in(target)) == 2


def test_without_a_queue_of_dead_letters_it_is_dropped_with_a_warning(
        tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
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
        tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
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


def test_after_a_refusal_the_queue_is_left_alone_for_a_while(tmp_path: pathlib.Path) -> None:
    opens = []

    def refuse() -> dead_letters.Target:
        opens.append(1)
        raise persipubsub.errors.NotInitializedError("no")

    policy = attempts.Policy(max_deliveries=1)
    found: Any = persipubsub.queue.Retries(policy, "greetings", refuse)
    with stores.opened(tmp_path, retries={"sub": found}) as queue:
        queue.put([b"1", b"2", b"3"])
        fail(queue, times=3)
        assert len(opens) == 1


def test_dead_letter_writer_is_used_by_a_forked_child(tmp_path: pathlib.Path) -> None:
    with opened(tmp_path, max_deliveries=1) as (queue, target):
        queue.put([b"1", b"2"])
        consumer = queue.consumer("sub")

        def work() -> None:
            lease = consumer.take(timeout=0)
            assert lease is not None
            lease.nack(ERROR)

        work()
        assert support.outcomes_in_child(work) == [""]
        assert [letter.data for letter in letters_in(target)] == [b"1", b"2"]


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
def test_whatever_the_error_is_the_message_is_moved(tmp_path: pathlib.Path, error: BaseException,
                                                    text: str) -> None:
    with opened(tmp_path, max_deliveries=1) as (queue, target):
        queue.put([b"1"])
        take(queue).nack(error)
        letter, = letters_in(target)
        assert letter.data == b"1" and letter.error.startswith(text)


@pytest.mark.parametrize("msg", [b"", b"hello", b"\xc1", b"\x80"])
def test_what_is_no_letter_is_refused(msg: bytes) -> None:
    with pytest.raises(persipubsub.errors.CorruptMessageError, match="Expected a dead letter"):
        DeadLetter.decode(msg)


def test_letter_of_another_version_is_refused() -> None:
    now = datetime.datetime.now(datetime.UTC)
    letter = DeadLetter(queue="q",
                        subscriber="sub",
                        number=1,
                        sent_at=now,
                        attempts=1,
                        error="",
                        moved_at=now,
                        data=b"",
                        version=2)
    with pytest.raises(persipubsub.errors.CorruptMessageError, match="version 1, but got: 2"):
        DeadLetter.decode(letter.encode())


@pytest.mark.parametrize("how", ["give up", "newest", "at"])
def test_position_passes_the_gap_in_front_of_what_leaves(tmp_path: pathlib.Path, how: str) -> None:
    """Numbers without messages are left by a power failure."""
    make_letters(tmp_path).close()
    with stores.opened(tmp_path) as queue:
        stores.take(queue)
    stores.lose_power(queue.path)
    with stores.opened(tmp_path, retries=retries(tmp_path, 1)) as queue:
        number = queue.put([b"1"])
        if how == "give up":
            fail(queue, times=1)
        else:
            consumer = queue.consumer("sub")
            lease = consumer.take(timeout=0,
                                  is_newest=True) if how == "newest" else consumer.take_at(number)
            assert lease is not None
            lease.ack()
        assert (stores.ranges(queue), stores.figures(queue).position) == ([], number + 1)
