"""Test where subscribers begin, what stays for them, and going to another place."""

# pylint: disable=missing-function-docstring
# pylint: disable=protected-access

import datetime
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import persipubsub.config
import persipubsub.control
import persipubsub.errors
import persipubsub.publisher
import persipubsub.queue
import persipubsub.subscriber
from persipubsub.store import _retention
from tests import stores, support

HOUR_NS = 3600 * stores.SECOND_NS


def numbered(count: int, start: int = 0) -> list[bytes]:
    return [b"%d" % index for index in range(start, start + count)]


def put_each(queue: persipubsub.queue.Queue, messages: list[bytes]) -> None:
    for message in messages:
        queue.put([message])


# Retaining


def test_finished_messages_stay(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, retain_ns=HOUR_NS, max_messages=50) as queue:
        for round_ in range(10):
            put_each(queue, numbered(20, start=20 * round_))
            assert len(stores.take_all(queue)) == 20
            clock.advance(360)
        queue.prune()
        # They do not count: nothing was dropped although there are more of them than the mark.
        assert stores.figures(queue).dropped_by_mark == 0
        assert queue.statistics().messages == 0
        assert len(stores.blocks(queue)) == 200 - 20
        clock.advance(3600)
        queue.prune()
        assert len(stores.blocks(queue)) == 1


def test_sends_delete_what_stayed_long_enough(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, retain_ns=10 * stores.SECOND_NS,
                       keeps_os=True) as queue:
        for _ in range(1000):
            queue.put([b"x"])
            assert stores.take(queue) == b"x"
            clock.advance(0.1)
        assert 100 <= len(stores.blocks(queue)) <= 100 + 64


def test_finished_messages_go_first_when_the_map_is_full(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, max_bytes=1 << 20, retain_ns=HOUR_NS, keeps_os=True) as queue:
        for _ in range(200):
            queue.put([bytes(20000)])
            assert stores.take(queue) == bytes(20000)
        queue.put([b"waits"])
        for _ in range(20):
            queue.put([bytes(20000)])
        assert stores.figures(queue).dropped_by_mark == 0
        assert stores.take(queue) == b"waits"


def test_clearing_leaves_nothing_to_go_back_to(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, retain_ns=HOUR_NS) as queue:
        put_each(queue, numbered(5))
        stores.take(queue)
        assert queue.clear() == 4
        queue.seek("sub", "beginning")
        assert stores.take(queue) is None


# Beginning


def test_new_subscriber_begins_where_it_is_told(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, retain_secs=600)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        put_each(queue, numbered(20))
        assert len(stores.take_all(queue)) == 20
        queue.put([b"for sub"], ("sub", ))

        support.write_config(tmp_path, subscribers=["sub", "late", "later"], retain_secs=600)
        text = config_pth.read_text(encoding="utf-8")
        config_pth.write_text(text.replace('"late": {', '"late": {"start_from": "beginning", '))
        for _ in range(2):
            persipubsub.control.initialize_all_dbs(config_pth=config_pth)
            queue.put([b"new"])
        assert stores.take_all(queue, "late") == numbered(20) + [b"new", b"new"]
        assert stores.take_all(queue, "later") == [b"new", b"new"]
        # It is a matter of new subscribers: the others stay where they are.
        persipubsub.control.initialize_all_dbs(config_pth=config_pth)
        assert stores.take(queue, "late") is None
        assert queue.check() == []


def test_beginning_is_not_in_front_of_the_timeout(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, retain_ns=HOUR_NS,
                       timeout_ns=10 * stores.SECOND_NS) as queue:
        put_each(queue, numbered(3))
        stores.take_all(queue)
        clock.advance(6)
        put_each(queue, numbered(3, start=3))
        stores.take_all(queue)
        clock.advance(6)
        assert queue.seek("sub", time.time() - 3600) == 4
        assert queue.seek("sub", "beginning") == 4
        assert stores.take_all(queue) == numbered(3, start=3)
        # Nothing was dropped by that.
        assert stores.figures(queue).dropped_by_timeout == 0


# Going to another place


@pytest.mark.parametrize("to, position, rest", [("beginning", 1, 0), ("end", 11, 10), (1, 1, 0),
                                                (4, 4, 3), (11, 11, 10), (0, 1, 0), (-5, 1, 0),
                                                (1 << 80, 11, 10)])
@pytest.mark.parametrize("taken", [0, 6, 10])
def test_seek(tmp_path: pathlib.Path, to: Any, position: int, rest: int, taken: int) -> None:
    with stores.opened(tmp_path, retain_ns=HOUR_NS) as queue:
        queue.put(numbered(4))
        queue.put(numbered(6, start=4))
        for _ in range(taken):
            stores.take(queue)
        assert queue.seek("sub", to) == position
        figures = stores.figures(queue)
        assert figures.lag == 10 - rest
        assert figures.skipped == max(0, rest - taken)
        assert figures.acknowledged == taken
        assert stores.take_all(queue) == numbered(10)[rest:]


def test_seek_to_a_time(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, retain_ns=HOUR_NS, timeout_ns=HOUR_NS) as queue:
        for index in range(10):
            queue.put([b"%d" % index])
            clock.advance(60)
        # The clock of the queue may be years from the wall clock: what counts is the age.
        for minutes, rest in [(0.5, 10), (1.5, 9), (5.5, 5), (9.5, 1), (10.5, 0), (10**6, 0)]:
            moment = time.time() - 60 * minutes
            for to in (moment, datetime.datetime.fromtimestamp(moment, datetime.UTC),
                       datetime.datetime.fromtimestamp(
                           moment, datetime.timezone(datetime.timedelta(hours=-7)))):
                assert queue.seek("sub", to) == 1 + rest
        assert queue.seek("sub", time.time() + 1000) == 11


@pytest.mark.parametrize("to, error", [("start", ValueError), ("", ValueError), (None, TypeError),
                                       (True, TypeError), (float("nan"), ValueError),
                                       (float("inf"), ValueError), (1e300, ValueError),
                                       (b"end", TypeError),
                                       (datetime.datetime(2026, 1, 1), ValueError)])
def test_wrong_place(tmp_path: pathlib.Path, to: Any, error: "type[Exception]") -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"x"])
        with pytest.raises(error, match="Expected .*, but got: "):
            queue.seek("sub", to)
        assert stores.take(queue) == b"x"


def test_seek_in_an_empty_queue(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        for to in ("beginning", "end", 1, 5, 0.0):  # type: Any
            assert queue.seek("sub", to) == 1
        queue.put([b"x"])
        assert stores.take_all(queue) == [b"x"]


def test_unknown_subscriber(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        with pytest.raises(persipubsub.errors.NotInitializedError, match="nobody"):
            queue.seek("nobody", "end")


def test_ranges_ahead_are_forgotten(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, retain_ns=HOUR_NS) as queue:
        queue.put(numbered(10))
        consumer = queue.consumer("sub")
        leases = [consumer.take(timeout=0) for _ in range(10)]
        for index in (2, 3, 6):
            lease = leases[index]
            assert lease is not None
            lease.acknowledge()
        assert len(stores.ranges(queue)) == 2
        assert queue.seek("sub", 3) == 3
        assert stores.ranges(queue) == []
        for index in (0, 1, 4, 5, 7, 8, 9):
            lease = leases[index]
            assert lease is not None
            lease.give_back()
        assert stores.take_all(queue) == numbered(8, start=2)


def test_others_see_it_at_once(tmp_path: pathlib.Path) -> None:
    """Positions that went back are not deleted by a publisher that remembers them."""
    with stores.opened(tmp_path,
                       retain_ns=1) as queue, persipubsub.queue.Queue(queue.settings) as other:
        put_each(other, numbered(7))
        assert len(stores.take_all(queue)) == 7
        other.put([b"7"])
        stores.take_all(queue)
        position = queue.seek("sub", "beginning")
        put_each(other, numbered(50, start=8))
        assert stores.take_all(other) == numbered(58)[position - 1:]


def test_marks_count_what_is_sought_again(tmp_path: pathlib.Path) -> None:
    """Nobody goes by the positions of before."""
    with stores.opened(tmp_path,
                       retain_ns=HOUR_NS,
                       max_messages=10,
                       strategy=persipubsub.config.Strategy.REJECT) as queue:
        with persipubsub.queue.Queue(queue.settings) as other:
            for index in range(20):
                other.put([b"%d" % index], msg_ids=[b"%d" % index])
                stores.take(queue)
            queue.seek("sub", 5)
            with pytest.raises(persipubsub.errors.QueueFullError, match="got: 16 of 10 messages"):
                other.put([b"20"])
            # What is stored already needs no room, although there is more than the mark.
            assert other.put([b"19"], msg_ids=[b"19"]) == 20
            assert stores.take_all(queue) == numbered(16, start=4)


def test_it_wakes_who_waits(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nobody looks by himself within the time of this test.
    monkeypatch.setattr("persipubsub._delivery.LONGEST_PAUSE_SECS", 10 * support.HANG_SECS)
    with stores.opened(tmp_path, retain_ns=HOUR_NS) as queue:
        queue.put([b"x"])
        assert stores.take(queue) == b"x"
        received: list[bytes] = []

        def receive() -> None:
            lease = queue.consumer("sub").take(timeout=support.HANG_SECS,
                                               longest_pause=10 * support.HANG_SECS)
            assert lease is not None
            received.extend(lease.messages)
            lease.acknowledge()

        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        support.until(lambda: queue._bell._open().page[0], what="the subscriber waits")
        queue.seek("sub", "beginning")
        thread.join(support.HANG_SECS / 2)
        assert received == [b"x"]


def test_consumer_at_work_goes_on_from_the_new_place(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, retain_ns=HOUR_NS) as queue:
        put_each(queue, numbered(6))
        consumer = queue.consumer("sub")
        for _ in range(3):
            lease = consumer.take(timeout=0)
            assert lease is not None
            lease.acknowledge()
        # It has a guess at what comes next.
        queue.seek("sub", 2)
        received: list[bytes] = []
        while (lease := consumer.take(timeout=0)) is not None:
            received += lease.messages
            lease.acknowledge()
        assert received == numbered(5, start=1)


def test_message_in_flight_stays_with_its_consumer(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, retain_ns=HOUR_NS) as queue:
        put_each(queue, numbered(5))
        first = queue.consumer("sub").take(timeout=0, max_messages=2)
        lease = queue.consumer("sub").take(timeout=0)
        assert first is not None and lease is not None and lease.messages == [b"2"]
        first.acknowledge()
        # Everything in front of it was done when it was taken, and is not any more.
        queue.seek("sub", "beginning")
        other = queue.consumer("sub")
        taken = [other.take(timeout=0) for _ in range(4)]
        assert [found.messages[0] for found in taken if found] == [b"0", b"1", b"3", b"4"]
        for found in taken:
            assert found is not None
            found.give_back()
        lease.acknowledge()
        assert stores.take_all(queue) == [b"0", b"1", b"3", b"4"]


def test_what_was_passed_over_before_is_not_acknowledged_with_it(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, retain_ns=HOUR_NS) as queue:
        queue.put(numbered(5))
        consumer = queue.consumer("sub")
        leases = [consumer.take(timeout=0) for _ in range(4)]
        for index in (1, 2, 3):
            lease = leases[index]
            assert lease is not None
            lease.acknowledge()
        # The first one is given back, the others are done ahead of it.
        assert leases[0] is not None
        leases[0].give_back()
        again = consumer.take(timeout=0)
        late = consumer.take(timeout=0)
        assert again is not None and again.messages == [b"0"]
        assert late is not None and late.messages == [b"4"]
        queue.seek("sub", "beginning")
        late.acknowledge()
        again.give_back()
        assert stores.take_all(queue) == numbered(4)


# Going back behind a clear


def clear_and_meanwhile(queue: persipubsub.queue.Queue, monkeypatch: pytest.MonkeyPatch,
                        work: Callable[[], object]) -> int:
    """Clear a queue, and do something else between its transaction and the deletion behind it."""
    delete = queue._tidier.delete_finished

    def delayed(**arguments: bool) -> int:
        work()
        return delete(**arguments)

    with monkeypatch.context() as patch:
        patch.setattr(queue._tidier, "delete_finished", delayed)
        return queue.clear()


@pytest.mark.parametrize("names", [None, ("sub", ), ("other", "sub")])
@pytest.mark.parametrize("is_interrupted", [False, True])
def test_what_was_cleared_comes_back_as_far_as_it_is_there(tmp_path: pathlib.Path,
                                                           monkeypatch: pytest.MonkeyPatch,
                                                           names: tuple[str, ...] | None,
                                                           is_interrupted: bool) -> None:
    with stores.opened(tmp_path, subscribers=["sub", "other"]) as queue:
        put_each(queue, numbered(10))
        queue.put(numbered(5, start=10), names)
        dropped = 15 + (10 if names == ("sub", ) else 15)
        if is_interrupted:
            # As if it was killed behind its transaction.
            losses = queue._environment.write(_retention.clear)
            assert sum(loss.messages for loss in losses) == dropped
            assert queue.seek("sub", "beginning") == 1
        else:
            assert dropped == clear_and_meanwhile(queue, monkeypatch,
                                                  lambda: queue.seek("sub", "beginning"))
        assert queue.check() == []
        statistics = queue.statistics()
        assert (statistics.messages, statistics.message_bytes) == (15, 20)
        assert [stores.figures(queue, name).lag for name in ("sub", "other")] == [15, 0]
        assert stores.take_all(queue) == numbered(15)
        assert (queue.statistics().messages, stores.figures(queue).lag) == (0, 0)
        queue.clear()
        assert stores.blocks(queue) == [range(15, 15)]
        assert stores.figures(queue).cleared == 15


def test_what_is_sent_meanwhile_is_not_cleared(tmp_path: pathlib.Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    with stores.opened(tmp_path) as queue:
        put_each(queue, numbered(10))
        assert clear_and_meanwhile(queue, monkeypatch, lambda: queue.put(numbered(3))) == 10
        assert stores.blocks(queue) == [range(11, 14)]
        assert (queue.statistics().messages, stores.figures(queue).lag) == (3, 3)
        assert stores.take_all(queue) == numbered(3)
        assert stores.figures(queue).cleared == 10


def test_control(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, retain_secs=600)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    with persipubsub.publisher.Pub() as pub, persipubsub.subscriber.Sub() as sub:
        pub.init(pub_id="pub", config_pth=config_pth)
        sub.init(sub_id="sub", config_pth=config_pth)
        pub.send_many(numbered(3))
        for to in ("beginning", 1, time.time() - 300):  # type: Any
            for expected in numbered(3):
                with sub.receive(timeout=0) as msg:
                    assert msg == expected
            assert persipubsub.control.seek(config_pth, "sub", to=to) == 1
        assert persipubsub.control.seek(config_pth, "sub", to="end", queue_key="queue") == 4
        with sub.receive(timeout=0) as msg:
            assert msg is None
    with pytest.raises(persipubsub.errors.ConfigError, match="nobody"):
        persipubsub.control.seek(config_pth, "nobody", to="end")
    with pytest.raises(persipubsub.errors.ConfigError, match="no queue"):
        persipubsub.control.seek(config_pth, "sub", to="end", queue_key="no queue")
