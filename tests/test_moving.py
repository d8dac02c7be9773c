"""Test how messages are moved that were delivered too often."""

# pylint: disable=missing-function-docstring
# pylint: disable=protected-access
# pylint: disable=contextmanager-generator-missing-cleanup

import contextlib
import datetime
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import persipubsub.config
import persipubsub.errors
import persipubsub.queue
from persipubsub import _delivery, _moving
from persipubsub._settings import Retries, Settings
from persipubsub.message import DeadLetter
from persipubsub.maintenance import _upkeep
from persipubsub.store import _attempts, _deliveries, _positions
from tests import stores, support

ERROR = ValueError("no greeting")


@contextlib.contextmanager
def opened(directory: pathlib.Path,
           max_deliveries: int = 2,
           clock: stores.Clock | None = None,
           **changes: Any) -> "Iterator[tuple[persipubsub.queue.Queue, persipubsub.queue.Queue]]":
    """Open a queue and that of its dead letters; check both at the end."""
    letters = stores.settings(directory, path=str(directory / "letters"), **changes)
    persipubsub.queue.Queue.ensure(letters, subscribers=["dead_letters"])
    with persipubsub.queue.Queue(letters) as target, stores.opened(directory,
                                                                   subscribers=["sub", "other"],
                                                                   clock=clock,
                                                                   retries=retries(
                                                                       letters,
                                                                       max_deliveries)) as queue:
        yield queue, target
        assert target.check() == []


def retries(letters: Settings | None, max_deliveries: int) -> "dict[str, Retries]":
    return {"sub": Retries(_attempts.Policy(max_deliveries=max_deliveries), "greetings", letters)}


def take(queue: persipubsub.queue.Queue, most: int = 1) -> _delivery.Lease:
    lease = queue.consumer("sub").take(timeout=0, max_messages=most)
    assert lease is not None
    return lease


def fail(queue: persipubsub.queue.Queue, times: int = 2) -> None:
    for _ in range(times):
        take(queue).give_back(ERROR)


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
        take(queue, most=2).give_back(ERROR)
        take(queue, most=3).give_back(ERROR)
        assert [letter.data for letter in letters_in(target)] == [b"1", b"2"]
        lease = take(queue, most=3)
        assert [message.attempts for message in lease.details()] == [2]
        lease.acknowledge()


@pytest.mark.parametrize("most", [1, 2])
def test_message_that_got_too_old_in_its_last_delivery_is_moved(tmp_path: pathlib.Path,
                                                                most: int) -> None:
    clock = stores.Clock()
    with opened(tmp_path, max_deliveries=1, clock=clock) as (queue, target):
        number = queue.put([b"1", b"2"][:most])
        lease = take(queue, most=most)
        clock.now_ns += queue.settings.timeout_ns + 1
        lease.give_back(ERROR)
        assert [
            (found.number, found.attempts, found.data, found.error) for found in letters_in(target)
        ] == [(number + index, 1, msg, "ValueError: no greeting")
              for index, msg in enumerate(lease.messages)]
        figures = stores.figures(queue)
        assert (figures.dead_lettered, figures.failed, figures.dropped_by_timeout,
                figures.lag) == (most, most, 0, 0)
        assert stores.attempts(queue) == {}


def clear(queue: persipubsub.queue.Queue) -> None:
    queue.clear()


def skip_and_seek(queue: persipubsub.queue.Queue) -> None:
    queue.seek("sub", "end")
    queue.seek("sub", "beginning")


def fill(queue: persipubsub.queue.Queue) -> None:
    queue.put([b"3"])


def remove(queue: persipubsub.queue.Queue) -> None:
    _upkeep.remove_subscriber(queue.settings, "sub")


def remove_and_add(queue: persipubsub.queue.Queue) -> None:
    remove(queue)
    persipubsub.queue.Queue.ensure(queue.settings, subscribers=["sub"])


@pytest.mark.parametrize("change", [clear, skip_and_seek, fill, remove, remove_and_add])
def test_message_that_is_not_spent_any_more_is_not_moved(
        tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
        change: Callable[[persipubsub.queue.Queue], None]) -> None:
    """All of a batch are counted at once, and then moved one by one."""
    letters = stores.settings(tmp_path, path=str(tmp_path / "letters"))
    persipubsub.queue.Queue.ensure(letters, subscribers=["dead_letters"])
    with persipubsub.queue.Queue(letters) as target, stores.opened(
            tmp_path,
            max_messages=2,
            strategy=persipubsub.config.Strategy.PRUNE_LAST,
            retries=retries(letters, 1)) as queue:
        queue.put([b"1", b"2"])
        lease = take(queue, most=2)
        move = _moving.Mover.move

        def change_and_move(*args: Any) -> bool:
            change(queue)
            return move(*args)

        monkeypatch.setattr(_moving.Mover, "move", change_and_move)
        # The record of the second one may be left for a while.
        monkeypatch.setattr(_attempts, "_MOST_DELETED", 1)
        lease.give_back(ERROR)
        assert [letter.data for letter in letters_in(target)] == [b"1"]


def test_consumer_that_dies_in_the_last_delivery(tmp_path: pathlib.Path) -> None:
    with opened(tmp_path) as (queue, target):
        queue.put([b"1", b"2"])
        fail(queue, times=1)
        take(queue)._claim.release()
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
        lease._claim.release()


@pytest.mark.parametrize("sends", [[[b"1", b"2", b"3", b"4"]], [[b"1"], [b"2"], [b"3"], [b"4"]]])
def test_spent_newest_messages_are_moved_and_the_newest_of_the_rest_is_taken(
        tmp_path: pathlib.Path, sends: list[list[bytes]]) -> None:
    with opened(tmp_path, max_deliveries=1) as (queue, target):
        for messages in sends:
            queue.put(messages)
        die_in_the_last_delivery(queue, count=2)
        lease = queue.consumer("sub").take_newest(timeout=0)
        assert lease is not None and lease.messages == [b"2"]
        assert [letter.data for letter in letters_in(target)] == [b"4", b"3"]
        figures = stores.figures(queue)
        assert (figures.skipped, figures.dead_lettered, figures.lag) == (1, 2, 1)
        lease.acknowledge()
        assert queue.consumer("sub").take_newest(timeout=0) is None


@pytest.mark.parametrize("sends", [[[b"1", b"2", b"3", b"4"]], [[b"1"], [b"2"], [b"3"], [b"4"]]])
def test_spent_newest_messages_that_can_not_be_moved_are_passed_over(
        tmp_path: pathlib.Path, sends: list[list[bytes]]) -> None:
    # It is not initialized.
    letters = stores.settings(tmp_path, path=str(tmp_path / "letters"))
    with stores.opened(tmp_path, retries=retries(letters, 1)) as queue:
        for messages in sends:
            queue.put(messages)
        die_in_the_last_delivery(queue, count=2)
        lease = queue.consumer("sub").take_newest(timeout=0)
        assert lease is not None and lease.messages == [b"2"]
        lease.acknowledge()
        assert queue.consumer("sub").take_newest(timeout=0) is None
        figures = stores.figures(queue)
        # They stay, and are moved when that is possible.
        assert (figures.skipped, figures.dead_lettered, figures.lag) == (1, 0, 2)
        persipubsub.queue.Queue.ensure(letters, subscribers=["dead_letters"])
        support.until(lambda: queue.consumer("sub").take_newest(timeout=0) is None and stores.
                      figures(queue).lag == 0,
                      what="the messages are moved at last")
        with persipubsub.queue.Queue(letters) as target:
            # The pause after a refusal may end between the two.
            assert {letter.data for letter in letters_in(target)} == {b"3", b"4"}


def test_newest_message_that_is_in_its_last_delivery_is_not_passed_over(
        tmp_path: pathlib.Path) -> None:
    with opened(tmp_path, max_deliveries=1) as (queue, target):
        queue.put([b"1", b"2", b"3"])
        die_in_the_last_delivery(queue, count=1)
        held = queue.consumer("sub").take_at(queue.statistics().next_number - 2)
        assert held is not None and held.messages == [b"2"]
        assert queue.consumer("sub").take_newest(timeout=0) is None
        assert [letter.data for letter in letters_in(target)] == [b"3"]
        assert stores.figures(queue).skipped == 0
        held.acknowledge()


@pytest.mark.parametrize("is_put", [False, True])
def test_process_that_is_killed_before_the_message_leaves(tmp_path: pathlib.Path,
                                                          monkeypatch: pytest.MonkeyPatch,
                                                          is_put: bool) -> None:
    """Whatever was done before, there is exactly one letter in the end."""
    with opened(tmp_path) as (queue, target):
        queue.put([b"1", b"2"])

        def die(*_: object, **__: object) -> None:
            raise support_end

        support_end = persipubsub.errors.StoreError("killed")
        with monkeypatch.context() as patch:
            if is_put:
                patch.setattr(_deliveries, "give_up", die)
            else:
                patch.setattr(_moving.Mover, "move", die)
            fail(queue)
        assert target.statistics().messages == int(is_put)
        assert stores.figures(queue).lag == 2
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
    # It is not initialized.
    letters = stores.settings(tmp_path, path=str(tmp_path / "letters"))
    with stores.opened(tmp_path, retries=retries(letters, 1)) as queue:
        queue.put([b"1", b"2", b"3"])
        fail(queue, times=1)
        # It is not lost, and is not delivered again.
        assert stores.take_all(queue) == [b"2", b"3"]
        assert (stores.figures(queue).lag, stores.figures(queue).dead_lettered) == (1, 0)
        assert len([one for one in caplog.records if "stays with sub" in one.getMessage()]) == 1
        persipubsub.queue.Queue.ensure(letters, subscribers=["dead_letters"])
        support.until(lambda: stores.take(queue) is None and stores.figures(queue).lag == 0,
                      what="the message is moved at last")
        with persipubsub.queue.Queue(letters) as target:
            assert [letter.data for letter in letters_in(target)] == [b"1"]


def test_after_a_refusal_the_queue_is_left_alone_for_a_while(tmp_path: pathlib.Path) -> None:
    letters = stores.settings(tmp_path, path=str(tmp_path / "letters"))
    opens = []

    def refuse() -> _moving.Target:
        opens.append(1)
        raise persipubsub.errors.NotInitializedError("no")

    mover = _moving.Mover(_moving.Origin("q", "sub", letters.path), open_target=refuse)
    with stores.opened(tmp_path) as queue:
        queue.put([b"1"])
        take(queue).give_back(ERROR)
        message, = take(queue).details()
        record = stores.attempts(queue)[message.number]
    assert not mover.move(0, message, record) and not mover.move(0, message, record)
    assert len(opens) == 1 and not mover.is_ready()


def test_mover_is_used_by_a_forked_child(tmp_path: pathlib.Path) -> None:
    with opened(tmp_path, max_deliveries=1) as (queue, target):
        queue.put([b"1", b"2"])
        consumer = queue.consumer("sub")

        def work() -> None:
            lease = consumer.take(timeout=0)
            assert lease is not None
            lease.give_back(ERROR)

        work()
        assert support.outcomes_in_child(work) == [""]
        assert [letter.data for letter in letters_in(target)] == [b"1", b"2"]


class _Silent(Exception):

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("error, text", [
    (ValueError("x"), "ValueError: x"),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
    (_Silent(), "_Silent"),
    (ValueError("y" * 10**6), f"ValueError: {'y' * 488}"),
    (ValueError("\ud800"), "ValueError: \ud800"),
])
def test_error_is_told_whatever_it_is(error: BaseException, text: str) -> None:
    assert _moving.text_of(error) == text


@pytest.mark.parametrize("error", [ValueError("\ud800"), _Silent(), ValueError("ü" * 10**6)])
def test_whatever_the_error_is_the_message_is_moved(tmp_path: pathlib.Path,
                                                    error: Exception) -> None:
    with opened(tmp_path, max_deliveries=1) as (queue, target):
        queue.put([b"1"])
        take(queue).give_back(error)
        assert [letter.data for letter in letters_in(target)] == [b"1"]


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


def rest_on(queue: persipubsub.queue.Queue, number: int) -> None:
    """Let the position rest on a number that is gone, as behind a checkpoint that was restored."""
    queue.seek("sub", number)
    queue._environment.write(lambda txn, databases: _positions.write(
        txn, databases, b"sub",
        _positions.require(txn, databases, b"sub")._replace(position=number)))


@pytest.mark.parametrize("how", ["give up", "newest", "at"])
def test_position_passes_the_gap_in_front_of_what_leaves(tmp_path: pathlib.Path, how: str) -> None:
    letters = stores.settings(tmp_path, path=str(tmp_path / "letters"))
    persipubsub.queue.Queue.ensure(letters, subscribers=["dead_letters"])
    with stores.opened(tmp_path,
                       max_messages=4,
                       strategy=persipubsub.config.Strategy.PRUNE_LAST,
                       retries=retries(letters, 1)) as queue:
        queue.put([b"1", b"2", b"3", b"4"])
        # The messages 3 and 4 are dropped.
        number = queue.put([b"5"])
        rest_on(queue, number - 1)
        if how == "give up":
            fail(queue, times=1)
        else:
            consumer = queue.consumer("sub")
            lease = consumer.take_newest(timeout=0) if how == "newest" else consumer.take_at(number)
            assert lease is not None
            lease.acknowledge()
        assert (stores.ranges(queue), stores.figures(queue).position) == ([], number + 1)
