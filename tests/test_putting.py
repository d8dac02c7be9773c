"""Test the strategies that drop nothing: refuse a message, or wait for room."""

# pylint: disable=missing-function-docstring
# pylint: disable=protected-access

import pathlib
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import lmdb
import pytest

import persipubsub.config
import persipubsub.control
import persipubsub.errors
import persipubsub.publisher
import persipubsub.queue
import persipubsub.subscriber
from persipubsub import _addition
from persipubsub.environment import _environment
from persipubsub.maintenance import _upkeep
from persipubsub.store._databases import Databases
from tests import stores, support

REJECT = persipubsub.config.Strategy.REJECT
BLOCK = persipubsub.config.Strategy.BLOCK


class Blocked:
    """Put messages in a thread of their own, which is expected to wait."""

    def __init__(self, queue: persipubsub.queue.Queue, *args: Any, **kwargs: Any) -> None:
        """Start the thread, and wait until it sleeps."""
        self.outcome: Any = None
        self._queue = queue
        self._thread = threading.Thread(target=self._run, args=args, kwargs=kwargs, daemon=True)
        self._thread.start()
        support.until(lambda: self._sleeps() or not self._thread.is_alive(),
                      what="the thread waits for room")

    def _sleeps(self) -> bool:
        file = self._queue._bell._file
        return file is not None and bool(file.tickets) and bool(file.page[0])

    def _run(self, *args: Any, **kwargs: Any) -> None:
        try:
            self.outcome = self._queue.put(*args, **kwargs)
        except persipubsub.errors.PersipubsubError as error:
            self.outcome = error

    def is_waiting(self) -> bool:
        """Tell whether the call did not return yet."""
        return self._thread.is_alive()

    def end(self) -> Any:
        """Wait for the end of the call."""
        self._thread.join(support.HANG_SECS)
        assert not self._thread.is_alive(), "Expected the call to return, but it waits."
        return self.outcome


@pytest.mark.parametrize("strategy", [REJECT, BLOCK])
@pytest.mark.parametrize("changes, messages", [({
    "max_messages": 3
}, [b"3"]), ({
    "max_messages": 4
}, [b"3", b"4"]), ({
    "max_message_bytes": 4
}, [b"34"])])
def test_full_queue_refuses_and_keeps_all(tmp_path: pathlib.Path,
                                          strategy: persipubsub.config.Strategy, changes: Any,
                                          messages: list[bytes]) -> None:
    with stores.opened(tmp_path, strategy=strategy, **changes) as queue:
        queue.put([b"0", b"1", b"2"])
        for _ in range(3):
            with pytest.raises(persipubsub.errors.QueueFullError):
                queue.put(messages, timeout=0)
        assert stores.take(queue) == b"0"
        # Numbers are not used up by what was refused.
        assert queue.put(messages, timeout=0) == 4
        assert stores.take_all(queue) == [b"1", b"2"] + messages
        assert stores.figures(queue).dropped_by_mark == 0


def test_error_names_the_slowest_subscriber(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path,
                       subscribers=["fast", "slow", "unaddressed"],
                       max_messages=4,
                       max_message_bytes=1000,
                       max_bytes=1 << 20,
                       strategy=REJECT) as queue:
        queue.put([b"0", b"1", b"2", b"3"], ("fast", "slow"))
        assert len(stores.take_all(queue, "fast")) == 4
        assert stores.take(queue, "slow") == b"0"
        with pytest.raises(persipubsub.errors.QueueFullError) as info:
            queue.put([b"four", b"five"])
        assert str(info.value) == (
            "Expected room for 2 more message(s) of 8 bytes in the queue {}, but got: 3 of 4 "
            "messages (MAX_MSGS_NUM) and 3 of 1000 bytes (HWM_LMDB_SIZE_BYTES) wait in a store of "
            "at most 1048576 bytes (max_db_size_bytes). The slowest subscriber is 'slow' with 3 of "
            "them.".format(queue.settings.path))


@pytest.mark.parametrize("strategy", [REJECT, BLOCK])
def test_message_that_never_fits_is_too_large(tmp_path: pathlib.Path,
                                              strategy: persipubsub.config.Strategy) -> None:
    with stores.opened(tmp_path, strategy=strategy, max_messages=2, max_message_bytes=9) as queue:
        for messages in ([bytes(10)], [b"", b"", b""]):
            with pytest.raises(persipubsub.errors.MessageTooLargeError):
                queue.put(messages)


@pytest.mark.parametrize("strategy", [REJECT, BLOCK])
def test_what_is_too_old_makes_room(tmp_path: pathlib.Path,
                                    strategy: persipubsub.config.Strategy) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path,
                       clock=clock,
                       strategy=strategy,
                       max_messages=2,
                       timeout_ns=10 * stores.SECOND_NS) as queue:
        queue.put([b"0"])
        clock.advance(6)
        queue.put([b"1"])
        clock.advance(6)
        # What is dropped stays dropped although there is not room for both.
        with pytest.raises(persipubsub.errors.QueueFullError):
            queue.put([b"2", b"3"], timeout=0)
        assert stores.figures(queue).dropped_by_timeout == 1
        queue.put([b"2"], timeout=0)
        assert stores.take_all(queue) == [b"1", b"2"]


def test_known_id_needs_no_room(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, strategy=REJECT, max_messages=2) as queue:
        first = queue.put([b"0", b"1"], msg_ids=[b"a", b"b"])
        for _ in range(2):
            with pytest.raises(persipubsub.errors.QueueFullError):
                queue.put([b"1", b"2"], msg_ids=[b"b", b"c"])
            assert queue.put([b"1", b"0"], msg_ids=[b"b", b"a"]) == first + 1
        stores.take_all(queue)
        # Nothing was remembered of what was refused.
        assert queue.put([b"1", b"2"], msg_ids=[b"b", b"c"]) == first + 1
        assert stores.take_all(queue) == [b"2"]


def test_refused_put_does_not_spoil_those_of_other_threads(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, strategy=REJECT, max_messages=60) as queue:
        outcomes: list[str] = []
        barrier = threading.Barrier(4)

        def send() -> None:
            barrier.wait(support.HANG_SECS)
            for _ in range(30):
                outcomes.append(support.outcome(lambda: queue.put([b"x"])))

        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(support.HANG_SECS)
        assert sorted(outcomes) == [""] * 60 + ["QueueFullError"] * 60
        assert len(stores.take_all(queue)) == 60


def test_full_queue_is_only_looked_at(tmp_path: pathlib.Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is refused again and again keeps nobody from the write lock."""
    with stores.opened(tmp_path, strategy=REJECT, max_messages=1) as queue:
        queue.put([b"0"])
        assert support.outcome(lambda: queue.put([b"1"])) == "QueueFullError"
        with monkeypatch.context() as patch:
            patch.setattr(_environment.Environment, "write", lambda *_, **__: pytest.fail("wrote"))
            for _ in range(10):
                assert support.outcome(lambda: queue.put([b"1"])) == "QueueFullError"
        take(queue)
        queue.put([b"1"])


def take(queue: persipubsub.queue.Queue) -> None:
    assert stores.take(queue) is not None


MAKES_ROOM = {
    "acknowledgement": take,
    "batch": lambda queue: queue.consumer("sub").take(timeout=0, max_messages=9).acknowledge(),
    "pop to top": lambda queue: queue.skip_to_newest("sub"),
    "clear": lambda queue: queue.clear(),
}


@pytest.mark.parametrize("name", sorted(MAKES_ROOM))
def test_whoever_makes_room_wakes_the_publisher(tmp_path: pathlib.Path,
                                                monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # Nobody looks by himself within the time of this test.
    monkeypatch.setattr("persipubsub._putting._LONGEST_PAUSE_SECS", 10 * support.HANG_SECS)
    with stores.opened(tmp_path, strategy=BLOCK, max_messages=2) as queue:
        queue.put([b"0", b"1"])
        blocked = Blocked(queue, [b"2"])
        assert blocked.is_waiting()
        work: Callable[[persipubsub.queue.Queue], object] = MAKES_ROOM[name]
        work(queue)
        assert blocked.end() == 3
        assert stores.take_all(queue)[-1] == b"2"


def test_removal_of_a_subscriber_wakes_the_publisher(tmp_path: pathlib.Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persipubsub._putting._LONGEST_PAUSE_SECS", 10 * support.HANG_SECS)
    with stores.opened(tmp_path, subscribers=["sub", "slow"], strategy=BLOCK,
                       max_messages=2) as queue:
        queue.put([b"0", b"1"])
        stores.take_all(queue)
        blocked = Blocked(queue, [b"2"])
        assert blocked.is_waiting()
        assert _upkeep.remove_subscriber(queue.settings, "slow") == 2
        assert blocked.end() == 3
        assert stores.take_all(queue) == [b"2"]


def test_timeout_of_messages_wakes_the_publisher(tmp_path: pathlib.Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persipubsub._putting._LONGEST_PAUSE_SECS", 10 * support.HANG_SECS)
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, strategy=BLOCK, max_messages=2) as queue:
        queue.put([b"0", b"1"])
        blocked = Blocked(queue, [b"2"])
        clock.advance(10**6)
        # A subscriber that comes upon what is too old drops it.
        assert queue.consumer("sub").take(timeout=0) is None or blocked.outcome is None
        assert blocked.end() == 3


def test_publisher_sees_by_himself_that_messages_are_too_old(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, strategy=BLOCK, max_messages=1,
                       timeout_ns=stores.SECOND_NS // 2) as queue:
        queue.put([b"0"])
        # It would wait for ever if it did not look: there is nobody else.
        assert queue.put([b"1"], timeout=support.HANG_SECS) == 2


def test_time_is_over(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, strategy=BLOCK, max_messages=1) as queue:
        queue.put([b"0"])
        begin = time.monotonic()
        with pytest.raises(persipubsub.errors.QueueFullError, match="'sub' with 1 of them"):
            queue.put([b"1"], timeout=0.2)
        assert 0.2 <= time.monotonic() - begin < support.HANG_SECS
        for timeout in (0, -1):
            with pytest.raises(persipubsub.errors.QueueFullError):
                queue.put([b"1"], timeout=timeout)
        assert stores.take_all(queue) == [b"0"]


def test_large_batch_waits_for_all_its_room(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, strategy=BLOCK, max_messages=4) as queue:
        queue.put([b"0", b"1", b"2", b"3"])
        blocked = Blocked(queue, [b"4", b"5", b"6"])
        take(queue)
        take(queue)
        assert blocked.is_waiting()
        take(queue)
        assert blocked.end() == 5
        assert stores.take_all(queue) == [b"3", b"4", b"5", b"6"]


def test_many_publishers_wait(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, strategy=BLOCK, max_messages=2, keeps_os=True) as queue:
        threads = [
            threading.Thread(target=lambda: [queue.put([b"x"]) for _ in range(20)], daemon=True)
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        consumer = queue.consumer("sub")
        for _ in range(160):
            lease = consumer.take(timeout=support.HANG_SECS)
            assert lease is not None
            lease.acknowledge()
        for thread in threads:
            thread.join(support.HANG_SECS)
            assert not thread.is_alive()
        assert stores.take(queue) is None


@pytest.mark.parametrize("is_together", [False, True])
def test_subscribers_wake_up_before_the_flush(tmp_path: pathlib.Path, is_together: bool) -> None:
    with stores.opened(tmp_path) as queue, queue._bell.prepare() as ticket:

        def put() -> None:
            if is_together:
                queue.put_each([([b"0"], None, None), ([b"1"], None, None)])
            else:
                queue.put([b"0"])

        thread = threading.Thread(target=put, daemon=True)
        # Nobody gets past a flush.
        with queue._environment._flush_lock:
            thread.start()
            assert ticket.wait(support.HANG_SECS), "Expected a ring, but the flush came first."
            assert stores.take(queue) == b"0"
            assert thread.is_alive(), "Expected it to wait for the flush."
        thread.join(support.HANG_SECS)
        assert not thread.is_alive()


@pytest.mark.parametrize("strategy", [REJECT, BLOCK])
def test_full_map_drops_nothing(tmp_path: pathlib.Path,
                                strategy: persipubsub.config.Strategy) -> None:
    with stores.opened(tmp_path, max_bytes=1 << 20, strategy=strategy, keeps_os=True) as queue:
        sent: list[bytes] = []
        with pytest.raises(persipubsub.errors.QueueFullError, match="1048576 bytes"):
            while True:
                message = b"%06d" % len(sent) + bytes(20000)
                queue.put([message], timeout=0)
                sent.append(message)
        assert len(sent) > 20
        assert stores.figures(queue).dropped_by_mark == 0
        for message in sent[:10]:
            assert stores.take(queue) == message
        queue.put([b"fits again"], timeout=0)
        assert stores.take_all(queue) == sent[10:] + [b"fits again"]
        # A map that is full of nothing that waits is another matter, and full of what is finished.
        for _ in range(100):
            queue.put([bytes(400000)], timeout=0)
            take(queue)


def test_floor_of_a_transaction_that_failed_is_not_remembered(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, strategy=REJECT, keeps_os=True) as queue:
        queue.put([b"x"])
        put = _addition.Put([b"y"], None)

        def work(txn: "lmdb.Transaction[memoryview]", databases: Databases) -> None:
            queue._putter._put(txn, databases, put)
            assert put.floor is not None
            raise _environment.MapFullError("on purpose")

        queue._putter._put_into_full_map(put, work)
        assert put.is_full
        assert put.floor is None
        assert stores.take_all(queue) == [b"x"]


def test_full_map_is_waited_for(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, max_bytes=1 << 20, strategy=BLOCK, keeps_os=True) as queue:
        while support.outcome(lambda: queue.put([bytes(20000)], timeout=0)) == "":
            pass
        lag = stores.figures(queue).lag
        blocked = Blocked(queue, [b"last"])
        for _ in range(10):
            take(queue)
        blocked.end()
        assert len(stores.take_all(queue)) == lag - 10 + 1


def test_full_map_makes_room_of_what_is_too_old(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, max_bytes=1 << 20, strategy=REJECT,
                       keeps_os=True) as queue:
        while support.outcome(lambda: queue.put([bytes(20000)])) == "":
            pass
        clock.advance(10**6)
        queue.put([bytes(20000)])
        assert stores.take_all(queue) == [bytes(20000)]


def test_error_of_the_disk_is_not_taken_for_a_full_queue(tmp_path: pathlib.Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    with stores.opened(tmp_path, strategy=REJECT) as queue:

        def fail(*_: object, **__: object) -> None:
            raise persipubsub.errors.DiskFullError("the disk")

        with monkeypatch.context() as patch:
            patch.setattr(_environment.Environment, "write", fail)
            with pytest.raises(persipubsub.errors.DiskFullError, match="the disk"):
                queue.put([b"x"])


def interrupted(pipe: support.Connection, config_pth: pathlib.Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)
        pipe.send("ready")
        try:
            pub.send(b"blocked")
        except KeyboardInterrupt:
            pipe.send("interrupted")
        # It goes on as if nothing had been.
        pub.send(b"sent", timeout=support.HANG_SECS)
        pipe.send("sent")


def test_interrupt_while_waiting_sends_nothing(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, strategy="block", MAX_MSGS_NUM=1)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        queue.put([b"first"])
        with support.Child(interrupted, config_pth) as child:
            assert child.get() == "ready"
            support.until(lambda: queue._bell._open().page[0], what="the child waits")
            child.kill(signal.SIGINT)
            assert child.get() == "interrupted"
            assert stores.take(queue) == b"first"
            assert child.get() == "sent"
            child.end()
        assert stores.take_all(queue) == [b"sent"]


def send_in_child(pipe: support.Connection, config_pth: pathlib.Path) -> None:
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)
        pipe.send("ready")
        for index in range(100):
            pub.send_many([b"%d" % index, b""])
        pipe.send("sent")


def test_subscriber_wakes_a_publisher_of_another_process(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, strategy="block", MAX_MSGS_NUM=2)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    with support.Child(send_in_child, config_pth) as child, persipubsub.subscriber.Sub() as sub:
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
