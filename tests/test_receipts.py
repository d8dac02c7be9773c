"""Test what a subscriber's loops and blocks do with what was received."""

# pylint: disable=missing-function-docstring

import asyncio
import datetime
import gc
import itertools
import pathlib
import threading
from collections.abc import Iterator
from typing import Any, Union

import pytest

import persipubsub.aio
import persipubsub.control
import persipubsub.errors
import persipubsub.message
import persipubsub.publisher
import persipubsub.subscriber
from persipubsub import _claims, _receipts
from tests import stores, support


@pytest.fixture(name="queue_and_sub")
def fixture_queue_and_sub(
        tmp_path: pathlib.Path
) -> Iterator[tuple[persipubsub.queue.Queue, persipubsub.subscriber.Sub]]:
    config_pth = support.write_config(tmp_path, subscribers=["sub", "other"])
    persipubsub.control.initialize_all_dbs(config_pth)
    with persipubsub.subscriber.Sub() as sub:
        sub.init(sub_id="sub", config_pth=config_pth)
        yield support.queue_of(sub), sub
        assert support.queue_of(sub).check() == []


Pair = tuple[persipubsub.queue.Queue, persipubsub.subscriber.Sub]

# Iteration


def test_message_is_acknowledged_when_the_next_one_is_asked_for(queue_and_sub: Pair) -> None:
    queue, sub = queue_and_sub
    queue.put([b"1", b"2", b"3"])
    lags: list[int] = []
    msgs: list[bytes] = []
    for msg in sub.messages(timeout=0):
        msgs.append(msg)
        lags.append(stores.figures(queue).lag)
    assert (msgs, lags) == ([b"1", b"2", b"3"], [3, 2, 1])
    assert stores.figures(queue).lag == 0
    assert stores.figures(queue, "other").lag == 3


def test_nothing_is_taken_before_the_first_one_is_asked_for(queue_and_sub: Pair) -> None:
    queue, sub = queue_and_sub
    queue.put([b"1"])
    msgs = sub.messages(timeout=0)
    assert stores.figures(queue).in_flight in (0, None)
    assert next(msgs) == b"1"
    msgs.close()


def test_loop_goes_on_with_what_comes(queue_and_sub: Pair) -> None:
    queue, sub = queue_and_sub

    def send() -> None:
        for index in range(50):
            queue.put([b"%d" % index])

    thread = threading.Thread(target=send)
    thread.start()
    # Without a timeout it goes on for ever.
    assert list(itertools.islice(sub.messages(), 50)) == [b"%d" % index for index in range(50)]
    thread.join()
    assert stores.take_all(queue) == [b"49"]


def test_end_is_the_end(queue_and_sub: Pair) -> None:
    queue, sub = queue_and_sub
    msgs = sub.messages(timeout=0)
    assert not list(msgs)
    queue.put([b"1"])
    assert not list(msgs)


@pytest.mark.parametrize("how", ["raise", "break"])
def test_message_at_which_the_loop_is_left_stays(queue_and_sub: Pair, how: str) -> None:
    queue, sub = queue_and_sub
    queue.put([b"1", b"2"])

    def leave() -> None:
        for msg in sub.messages(timeout=0):
            if msg == b"2":
                if how == "raise":
                    raise ValueError("no")
                break

    if how == "raise":
        with pytest.raises(ValueError):
            leave()
    else:
        leave()
    gc.collect()  # where the iterator does not leave with its last reference
    assert stores.take_all(queue) == [b"2"]


def test_block_around_the_loop_tells_how_it_was_left(queue_and_sub: Pair) -> None:
    queue, sub = queue_and_sub
    queue.put([b"1", b"2", b"3"])
    with sub.messages(timeout=0) as msgs:
        for _ in msgs:
            break
    assert stores.figures(queue).acknowledged == 1
    with pytest.raises(ValueError):
        with sub.messages(timeout=0) as msgs:
            for _ in msgs:
                raise ValueError("no")
    assert stores.figures(queue).failed == 1
    assert not list(msgs)
    with sub.receive(timeout=0, details=True) as message:
        assert message is not None
        assert (message.data, message.attempts) == (b"2", 2)


def test_message_is_acknowledged_or_given_back_by_hand(queue_and_sub: Pair) -> None:
    queue, sub = queue_and_sub
    queue.put([b"1", b"2"])
    msgs = sub.messages(timeout=0)
    assert next(msgs) == b"1"
    msgs.acknowledge()
    msgs.acknowledge()
    assert stores.figures(queue).acknowledged == 1
    assert next(msgs) == b"2"
    msgs.close()
    msgs.close()
    assert stores.figures(queue).failed == 0
    assert stores.take_all(queue) == [b"2"]


def test_loop_of_a_closed_subscriber(queue_and_sub: Pair) -> None:
    queue, sub = queue_and_sub
    queue.put([b"1", b"2"])
    msgs = sub.messages(timeout=0)
    next(msgs)
    with persipubsub.subscriber.Sub() as closed, pytest.raises(persipubsub.errors.ClosedError):
        closed.messages()
    msgs.close()


# Details


def test_details_are_those_of_the_message(queue_and_sub: Pair) -> None:
    queue, sub = queue_and_sub
    begin = datetime.datetime.now(datetime.UTC)
    first = queue.put([b"1", b"2"])
    queue.put([b"3"])
    end = datetime.datetime.now(datetime.UTC)
    with sub.receive_many(9, timeout=0, details=True) as messages:
        assert [message.number for message in messages] == [first, first + 1, first + 2]
        assert [message.data for message in messages] == [b"1", b"2", b"3"]
        assert [message.attempts for message in messages] == [1, 1, 1]
        slack = datetime.timedelta(milliseconds=100)
        for message in messages:
            assert message.sent_at.tzinfo is datetime.UTC
            assert begin - slack <= message.sent_at <= end + slack
        assert messages[0].sent_at == messages[1].sent_at <= messages[2].sent_at
    queue.put([b"4"])
    assert [message.number for message in sub.messages(timeout=0, details=True)] == [first + 3]
    with sub.receive(timeout=0, details=True) as nothing:
        assert nothing is None
    with sub.receive_many(2, timeout=0, details=True) as none:
        assert none == []


@pytest.mark.parametrize("details", [False, True])
def test_details_may_be_a_variable(queue_and_sub: Pair, details: bool) -> None:
    # What matters here is that mypy knows the types of it.
    queue, sub = queue_and_sub
    queue.put([b"1", b"2", b"3", b"4", b"5"])

    def data(content: bytes | persipubsub.message.Message | None) -> bytes | None:
        return content.data if isinstance(content, persipubsub.message.Message) else content

    with sub.receive(timeout=0, details=details) as one:
        assert isinstance(one, bytes) != details and data(one) == b"1"
    with sub.receive_many(2, timeout=0, details=details) as many:
        assert [data(content) for content in many] == [b"2", b"3"]
    with sub.messages(timeout=0, details=details) as messages:
        for content in messages:
            assert data(content) == b"4"
            break
    with sub.receive_to_top(timeout=0, details=details) as newest:
        assert data(newest) == b"5"


async def _data_of(sub: persipubsub.aio.Sub, details: bool) -> list[bytes]:
    found: list[Union[bytes, persipubsub.message.Message, None]] = []
    async with sub.receive(timeout=0, details=details) as one:
        found.append(one)
    async with sub.receive_many(2, timeout=0, details=details) as many:
        found.extend(many)
    async with sub.messages(timeout=0, details=details) as messages:
        found.append(await anext(messages))
    async with sub.receive_to_top(timeout=0, details=details) as newest:
        found.append(newest)
    return [
        one.data if isinstance(one, persipubsub.message.Message) else one or b"" for one in found
    ]


@pytest.mark.parametrize("details", [False, True])
def test_details_may_be_a_variable_in_a_task(tmp_path: pathlib.Path, details: bool) -> None:
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth)

    async def main() -> list[bytes]:
        async with persipubsub.aio.Pub() as pub, persipubsub.aio.Sub() as sub:
            await pub.init(pub_id="pub", config_pth=config_pth)
            await sub.init(sub_id="sub", config_pth=config_pth)
            await pub.send_many([b"1", b"2", b"3", b"4", b"5"])
            return await _data_of(sub, details)

    assert asyncio.run(main()) == [b"1", b"2", b"3", b"4", b"5"]


def test_time_of_sending_follows_the_wall_clock(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock) as queue:
        queue.put([b"1"])
        clock.advance(100)
        lease = queue.consumer("sub").take(timeout=0)
        assert lease is not None
        # The queue's clock says 2001; the message is 100 seconds old.
        age = datetime.datetime.now(datetime.UTC) - lease.details()[0].sent_at
        assert abs(age.total_seconds() - 100) < support.HANG_SECS
        lease.acknowledge()


# Only the latest


def test_newest_message_is_received_and_older_ones_are_skipped(queue_and_sub: Pair) -> None:
    queue, sub = queue_and_sub
    number = queue.put([b"1", b"2"]) + 2
    queue.put([b"3"])
    queue.put([b"for another"], ("other", ))
    with sub.receive_to_top(timeout=0, details=True) as message:
        assert message is not None
        assert (message.data, message.number) == (b"3", number)
        assert stores.figures(queue).lag == 1
        assert stores.figures(queue).skipped == 2
    assert stores.figures(queue).lag == 0
    assert stores.figures(queue, "other").lag == 4
    with sub.receive_to_top(timeout=0) as msg:
        assert msg is None


def test_newest_message_that_fails_comes_again_unless_there_is_a_newer_one(
        queue_and_sub: Pair) -> None:
    queue, sub = queue_and_sub
    queue.put([b"1", b"2"])
    for newer in ([], [b"3"]):
        for message in newer:
            queue.put([message])
        with pytest.raises(ValueError):
            with sub.receive_to_top(timeout=0) as msg:
                assert msg == (newer or [b"2"])[0]
                raise ValueError("no")
    assert stores.take_all(queue) == [b"3"]
    assert stores.figures(queue).skipped == 2


def test_nothing_is_skipped_while_another_has_the_newest_message(queue_and_sub: Pair) -> None:
    queue, sub = queue_and_sub
    queue.put([b"1", b"2"])
    held = queue.consumer("sub").take_newest(timeout=0)
    assert held is not None and held.messages == [b"2"]
    assert queue.consumer("sub").take_newest(timeout=0) is None
    queue.put([b"3"])
    with sub.receive_to_top(timeout=0) as msg:
        assert msg == b"3"
        # What was skipped while it was being worked on stays skipped.
        held.acknowledge()
    figures = stores.figures(queue)
    assert (figures.acknowledged, figures.skipped, figures.lag) == (1, 2, 0)


def test_newest_is_looked_for_again_in_the_transaction(queue_and_sub: Pair,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    queue, sub = queue_and_sub
    queue.put([b"1", b"2"])
    original = _claims.Claims.is_claimed
    newer = [b"3"]

    def is_claimed(*arguments: Any, **options: Any) -> Any:
        # Somebody sends between the look and the transaction.
        if newer:
            queue.put([newer.pop()])
        return original(*arguments, **options)

    monkeypatch.setattr(_claims.Claims, "is_claimed", is_claimed)
    with sub.receive_to_top(timeout=0) as msg:
        assert msg == b"3" and not newer
    assert (stores.figures(queue).skipped, stores.figures(queue).lag) == (2, 0)


def test_newest_message_is_waited_for(queue_and_sub: Pair) -> None:
    queue, sub = queue_and_sub
    timer = threading.Timer(0.1, queue.put, [[b"1", b"2"]])
    timer.start()
    with sub.receive_to_top(timeout=support.HANG_SECS) as msg:
        assert msg == b"2"
    timer.join()


def test_competitors_for_the_newest_message_never_have_an_older_one_later(
        queue_and_sub: Pair) -> None:
    queue, _ = queue_and_sub
    seen: list[list[int]] = [[], [], []]
    is_done = threading.Event()

    def consume(mine: list[int]) -> None:
        consumer = queue.consumer("sub")
        while True:
            was_done = is_done.is_set()
            lease = consumer.take_newest(timeout=0.05)
            if lease is not None:
                mine.extend(lease.numbers)
                lease.acknowledge()
            elif was_done:
                return

    threads = [threading.Thread(target=consume, args=(mine, )) for mine in seen]
    for thread in threads:
        thread.start()
    for index in range(300):
        queue.put([b"%d" % index])
    is_done.set()
    for thread in threads:
        thread.join(support.HANG_SECS)
    for mine in seen:
        assert mine == sorted(mine)
    received = sorted(sum(seen, []))
    assert len(received) == len(set(received))
    assert received[-1] == queue.statistics().next_number - 1
    figures = stores.figures(queue)
    assert (figures.lag, figures.acknowledged + figures.skipped) == (0, 300)


def test_contents_are_made_of_leases(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1"])
        lease = queue.consumer("sub").take(timeout=0)
        assert lease is not None
        assert _receipts.unwrap(lease) == [b"1"]
        message, = _receipts.describe(lease)
        assert isinstance(message, persipubsub.message.Message)
        lease.acknowledge()
