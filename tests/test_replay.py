"""Test where subscribers begin, what stays for them, and going to another place."""

import datetime
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import persipubsub.queue
from persipubsub import Pub, Sub, control, errors
from tests import stores, support


def numbered(count: int, start: int = 0) -> list[bytes]:
    return [b"%d" % index for index in range(start, start + count)]


def put_each(queue: persipubsub.queue.Queue, messages: list[bytes]) -> None:
    for message in messages:
        queue.put([message])


# Retaining


def test_finished_messages_go_first_when_the_map_is_full(tmp_path: Path) -> None:
    with stores.opened(tmp_path, max_db_size_bytes=1 << 20, retain_secs=3600) as queue:
        for _ in range(200):
            queue.put([bytes(20000)])
            assert stores.take(queue) == bytes(20000)
        queue.put([b"waits"])
        for _ in range(20):
            queue.put([bytes(20000)])
        assert stores.figures(queue).dropped_by_mark == 0
        assert stores.take(queue) == b"waits"


def test_cleared_messages_stay_away_after_a_power_failure(tmp_path: Path) -> None:
    with stores.opened(tmp_path, retain_secs=3600, durability=stores.FSYNC) as queue:
        queue.put([b"1"])
        queue.put([b"2"])
        queue.clear()
    stores.lose_power(queue.path)
    with stores.again(queue) as rebuilt:
        rebuilt.seek("sub", "beginning")
        assert not stores.take_all(rebuilt)


# Beginning


def test_new_subscriber_begins_where_it_is_told(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path, retain_secs=600)
    with support.open_queue(config_pth) as queue:
        put_each(queue, numbered(20))
        assert len(stores.take_all(queue)) == 20
        queue.put([b"for sub"], ("sub", ))

        support.write_config(tmp_path, subscribers=["sub", "late", "later"], retain_secs=600)
        text = config_pth.read_text(encoding="utf-8")
        config_pth.write_text(text.replace('"late": {', '"late": {"start_from": "beginning", '))
        for _ in range(2):
            control.initialize_all_dbs(config_pth=config_pth)
            queue.put([b"new"])
        assert stores.take_all(queue, "late") == numbered(20) + [b"new", b"new"]
        assert stores.take_all(queue, "later") == [b"new", b"new"]
        # It is a matter of new subscribers: the others stay where they are.
        control.initialize_all_dbs(config_pth=config_pth)
        assert stores.take(queue, "late") is None
        assert queue.check() == []


# Going to another place


@pytest.mark.parametrize("to, position, rest", [("beginning", 1, 0), ("end", 11, 10), (1, 1, 0),
                                                (4, 4, 3), (11, 11, 10), (0, 1, 0), (-5, 1, 0),
                                                (1 << 80, 11, 10)])
def test_seek(tmp_path: Path, to: Any, position: int, rest: int) -> None:
    taken = 6
    with stores.opened(tmp_path, retain_secs=3600) as queue:
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


def test_seek_to_a_time(tmp_path: Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, retain_secs=3600, msg_timeout_secs=3600) as queue:
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
def test_wrong_place(tmp_path: Path, to: Any, error: "type[Exception]") -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"x"])
        with pytest.raises(error, match="Expected .*, but got: "):
            queue.seek("sub", to)
        assert stores.take(queue) == b"x"


def test_seek_wakes_consumers_that_wait(tmp_path: Path) -> None:
    with stores.opened(tmp_path, retain_secs=3600) as queue:
        queue.put([b"x"])
        assert stores.take(queue) == b"x"
        received: list[bytes] = []

        def receive() -> None:
            lease = queue.consumer("sub").take(timeout=support.HANG_SECS,
                                               poll_secs=10 * support.HANG_SECS)
            assert lease is not None
            received.extend(lease.messages)
            lease.ack()

        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        stores.until_somebody_waits(queue.path)
        queue.seek("sub", "beginning")
        thread.join(support.HANG_SECS / 2)
        assert received == [b"x"]


# Going back behind a clear


def test_control(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path, retain_secs=600)
    with Pub("pub", config_pth) as pub, Sub("sub", config_pth) as sub:
        pub.send_many(numbered(3))
        for to in ("beginning", 1, time.time() - 300):  # type: Any
            for expected in numbered(3):
                with sub.receive(timeout=0) as msg:
                    assert msg == expected
            assert control.seek(config_pth, "sub", to=to) == 1
        assert control.seek(config_pth, "sub", to="end", queue_key="queue") == 4
        with sub.receive(timeout=0) as msg:
            assert msg is None
    with pytest.raises(errors.ConfigError, match="nobody"):
        control.seek(config_pth, "nobody", to="end")
    with pytest.raises(errors.ConfigError, match="no queue"):
        control.seek(config_pth, "sub", to="end", queue_key="no queue")
