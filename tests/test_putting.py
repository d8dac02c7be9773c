"""Test the strategies that drop nothing: refuse a message, or wait for room."""

import concurrent.futures
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import persipubsub.queue
from persipubsub import Pub, Sub, errors
from tests import stores, support

REJECT = stores.REJECT
BLOCK = stores.BLOCK


class Blocked:
    """Put messages in a thread of their own, which is expected to wait."""

    def __init__(self, queue: persipubsub.queue.Queue, *args: Any, **kwargs: Any) -> None:
        self.outcome: Any = None
        self._queue = queue
        self._thread = threading.Thread(target=self._run, args=args, kwargs=kwargs, daemon=True)
        self._thread.start()
        stores.until_somebody_waits(queue.path)

    def _run(self, *args: Any, **kwargs: Any) -> None:
        try:
            self.outcome = self._queue.put(*args, **kwargs)
        except errors.PersipubsubError as error:
            self.outcome = error

    def is_waiting(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> Any:
        self._thread.join(support.HANG_SECS)
        assert not self._thread.is_alive(), "Expected the call to return, but it waits."
        return self.outcome


def test_error_names_the_slowest_subscriber(tmp_path: Path) -> None:
    with stores.opened(tmp_path,
                       subscribers=["fast", "slow", "unaddressed"],
                       max_msgs_num=4,
                       size_bytes=1000,
                       max_db_size_bytes=1 << 20,
                       strategy=REJECT) as queue:
        queue.put([b"0", b"1", b"2", b"3"], ("fast", "slow"))
        assert len(stores.take_all(queue, "fast")) == 4
        assert stores.take(queue, "slow") == b"0"
        with pytest.raises(errors.QueueFullError) as info:
            queue.put([b"four", b"five"])
        assert str(info.value) == (
            "Expected room for 2 more message(s) of 8 bytes in the queue {}, but got: 3 of 4 "
            "messages (MAX_MSGS_NUM) and 3 of 1000 bytes (HWM_LMDB_SIZE_BYTES) wait in a store of "
            "at most 1048576 bytes (max_db_size_bytes). The slowest subscriber is 'slow' with 3 of "
            "them.".format(queue.path))


def come_upon_what_is_too_old(queue: persipubsub.queue.Queue, clock: stores.Clock) -> bytes | None:
    clock.advance(10**6)
    # The publisher may be faster than the second look of the consumer.
    return stores.take(queue)


MAKES_ROOM: dict[str, Callable[[persipubsub.queue.Queue, stores.Clock], object]] = {
    "acknowledgement": lambda queue, _: stores.take(queue),
    "batch": lambda queue, _: stores.lease(queue, most=9).ack(),
    "pop to top": lambda queue, _: queue.skip_to_newest("sub"),
    "clear": lambda queue, _: queue.clear(),
    "removal of a subscriber": lambda queue, _: queue.remove_subscriber("slow"),
    "timeout": come_upon_what_is_too_old,
}


@pytest.mark.parametrize("name", sorted(MAKES_ROOM))
def test_whoever_makes_room_wakes_the_publisher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                name: str) -> None:
    # Nobody looks without a notification within the time of this test.
    monkeypatch.setattr("persipubsub.lmdb_engine.sending._LONGEST_PAUSE_SECS",
                        10 * support.HANG_SECS)
    clock = stores.Clock()
    with stores.opened(tmp_path,
                       subscribers=["sub", "slow"],
                       clock=clock,
                       msg_timeout_secs=10,
                       strategy=BLOCK,
                       max_msgs_num=2) as queue:
        queue.put([b"0", b"1"], ("slow" if name == "removal of a subscriber" else "sub", ))
        blocked = Blocked(queue, [b"2"], ("sub", ))
        assert blocked.is_waiting()
        made = MAKES_ROOM[name](queue, clock)
        assert blocked.end() == 3
        assert made == b"2" or stores.take_all(queue)[-1] == b"2"


def test_publisher_sees_by_himself_that_messages_are_too_old(tmp_path: Path) -> None:
    with stores.opened(tmp_path, strategy=BLOCK, max_msgs_num=1, msg_timeout_secs=0.5) as queue:
        queue.put([b"0"])
        # It would wait for ever if it did not look: there is nobody else.
        assert queue.put([b"1"], timeout=support.HANG_SECS) == 2


def test_large_batch_waits_for_all_its_room(tmp_path: Path) -> None:
    with stores.opened(tmp_path, strategy=BLOCK, max_msgs_num=4) as queue:
        queue.put([b"0", b"1", b"2", b"3"])
        blocked = Blocked(queue, [b"4", b"5", b"6"])
        stores.take(queue)
        stores.take(queue)
        assert blocked.is_waiting()
        stores.take(queue)
        assert blocked.end() == 5
        assert stores.take_all(queue) == [b"3", b"4", b"5", b"6"]


def test_full_map_is_waited_for(tmp_path: Path) -> None:
    with stores.opened(tmp_path, max_db_size_bytes=1 << 20, strategy=BLOCK) as queue:
        while support.outcome(lambda: queue.put([bytes(20000)], timeout=0)) == "":
            pass
        lag = stores.figures(queue).lag
        blocked = Blocked(queue, [bytes(100000)])
        for _ in range(10):
            stores.take(queue)
        blocked.end()
        assert len(stores.take_all(queue)) == lag - 10 + 1


def test_full_map_makes_room_of_what_is_too_old(tmp_path: Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path,
                       clock=clock,
                       msg_timeout_secs=10,
                       max_db_size_bytes=1 << 20,
                       strategy=REJECT) as queue:
        while support.outcome(lambda: queue.put([bytes(20000)])) == "":
            pass
        clock.advance(10**6)
        queue.put([bytes(20000)])
        assert stores.take_all(queue) == [bytes(20000)]


def interrupted(pipe: support.Connection, config_pth: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Pub("pub", config_pth) as pub:
        pipe.send("ready")
        try:
            pub.send(b"blocked")
        except KeyboardInterrupt:
            pipe.send("interrupted")
        # It goes on as if nothing had been.
        pub.send(b"sent", timeout=support.HANG_SECS)
        pipe.send("sent")


def test_interrupt_while_waiting_sends_nothing(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path, strategy="block", MAX_MSGS_NUM=1)
    with support.open_queue(config_pth) as queue:
        queue.put([b"first"])
        with support.Child(interrupted, config_pth) as child:
            assert child.get() == "ready"
            stores.until_somebody_waits(queue.path)
            child.kill(signal.SIGINT)
            assert child.get() == "interrupted"
            assert stores.take(queue) == b"first"
            assert child.get() == "sent"
            child.end()
        assert stores.take_all(queue) == [b"sent"]


def send_in_child(pipe: support.Connection, config_pth: Path) -> None:
    with Pub("pub", config_pth) as pub:
        pipe.send("ready")
        for index in range(100):
            pub.send_many([b"%d" % index, b""])
        pipe.send("sent")


def test_subscriber_wakes_a_publisher_of_another_process(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path, strategy="block", MAX_MSGS_NUM=2)
    with support.Child(send_in_child, config_pth) as child, Sub() as sub:
        assert child.get() == "ready"
        sub.init(sub_id="sub", config_pth=config_pth)
        received: list[bytes] = []
        begin = time.monotonic()
        while len(received) < 200:
            with sub.receive(timeout=support.HANG_SECS) as msg:
                assert msg is not None
                received.append(msg)
        # Without a ring each batch takes the second until the publisher looks by himself.
        assert time.monotonic() - begin < support.HANG_SECS
        assert received[::2] == [b"%d" % index for index in range(100)]
        assert child.get() == "sent"
        child.end()


def test_threads_that_fill_a_queue_together(tmp_path: Path) -> None:
    with stores.opened(tmp_path, strategy=stores.REJECT, max_msgs_num=20) as queue:

        def send() -> list[bool]:
            sent = []
            for index in range(10):
                try:
                    # A known id takes no room.
                    queue.put([b"x"], msg_ids=[b"same"] if index == 5 else None)
                    sent.append(index != 5)
                except errors.QueueFullError:
                    sent.append(False)
            return sent

        queue.put([b"x"], msg_ids=[b"same"])
        with concurrent.futures.ThreadPoolExecutor(8) as executor:
            outcomes = [executor.submit(send) for _ in range(8)]
            assert sum(sum(one.result(support.HANG_SECS)) for one in outcomes) == 19
        assert len(stores.take_all(queue)) == 20
