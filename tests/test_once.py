"""Test that a message with an id is stored once."""

# pylint: disable=missing-function-docstring

import pathlib
import signal
import threading
from typing import Any

import pytest

import persipubsub.control
import persipubsub.errors
import persipubsub.publisher
import persipubsub.queue
from persipubsub import engine
from tests import stores, support

WINDOW_SECS = 100
WINDOW_NS = WINDOW_SECS * stores.SECOND_NS


def test_same_id_is_stored_once(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        first = queue.put([b"one"], msg_ids=[b"a"])
        assert queue.put([b"other"], msg_ids=[b"b"]) == first + 1
        assert queue.put([b"again"], msg_ids=[b"a"]) == first
        assert queue.put([b"without"]) == first + 2
        assert queue.put([b"without"], msg_ids=[None]) == first + 3
        assert stores.take_all(queue) == [b"one", b"other", b"without", b"without"]
        # That it was received makes no difference.
        assert queue.put([b"again"], msg_ids=[b"a"]) == first
        assert stores.take(queue) is None


def test_of_a_batch_the_known_ones_are_left_out(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        first = queue.put([b"0", b"1", b"2"], msg_ids=[b"a", None, b"b"])
        ids: list[bytes | None] = [b"b", None, b"c", b"c", b"a", b"d"]
        assert queue.put([b"2", b"3", b"4", b"4", b"0", b"5"], msg_ids=ids) == first + 2
        assert queue.put([b"5"], msg_ids=[b"d"]) == first + 5
        assert queue.put([b"4"], msg_ids=[b"c"]) == first + 4
        assert queue.put([b"x", b"4"], msg_ids=[None, b"c"]) == first + 6
        assert stores.take_all(queue) == [b"0", b"1", b"2", b"3", b"4", b"5", b"x"]


def test_ids_are_forgotten_behind_the_window(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, once_window_secs=WINDOW_SECS) as queue:
        first = queue.put([b"one"], msg_ids=[b"a"])
        clock.now_ns += WINDOW_NS
        assert queue.put([b"one"], msg_ids=[b"a"]) == first
        clock.now_ns += 1
        assert queue.put([b"one"], msg_ids=[b"a"]) == first + 1
        clock.now_ns += WINDOW_NS
        assert queue.put([b"one"], msg_ids=[b"a"]) == first + 1


def test_each_put_forgets_a_few(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, once_window_secs=WINDOW_SECS) as queue:
        queue.put([b""] * 100, msg_ids=[bytes((index, )) for index in range(100)])
        assert stores.count_ids(queue) == 100
        clock.now_ns += WINDOW_NS + 1
        queue.put([b""])
        assert stores.count_ids(queue) == 100
        # Two are forgotten for the one that is added.
        queue.put([b""], msg_ids=[b"a new one"])
        assert stores.count_ids(queue) == 99
        for index in range(60):
            queue.put([b""], msg_ids=[b"new %d" % index])
        assert stores.count_ids(queue) == 61


def test_pruning_forgets_all_that_are_old(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, once_window_secs=WINDOW_SECS) as queue:
        queue.put([b""] * 1000, msg_ids=[b"%d" % index for index in range(1000)])
        clock.now_ns += WINDOW_NS + 1
        queue.put([b""], msg_ids=[b"young"])
        queue.prune()
        assert stores.count_ids(queue) == 1
        assert queue.put([b""], msg_ids=[b"young"]) == 1001


@pytest.mark.parametrize("durability", [stores.FSYNC, stores.OS])
def test_id_is_remembered_when_the_queue_is_opened_again(tmp_path: pathlib.Path,
                                                         durability: Any) -> None:
    with stores.opened(tmp_path, durability=durability) as queue:
        first = queue.put([b"one"], msg_ids=[b"a"])
    stores.lose_power(queue.path)
    with stores.opened(tmp_path, durability=durability) as queue:
        assert queue.put([b"one"], msg_ids=[b"a"]) == first


def test_nothing_is_remembered_of_what_was_not_sent(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, size_bytes=10) as queue:
        with pytest.raises(persipubsub.errors.MessageTooLargeError):
            queue.put([b"x" * 11], msg_ids=[b"a"])
        first = queue.put([b"x"], msg_ids=[b"a"])
        assert stores.take_all(queue) == [b"x"]
        assert queue.put([b"x"], msg_ids=[b"a"]) == first


def test_what_is_left_out_needs_no_room(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, max_msgs_num=2) as queue:
        queue.put([b"0", b"1"], msg_ids=[b"a", b"b"])
        queue.put([b"0", b"1"], msg_ids=[b"a", b"b"])
        assert stores.take_all(queue) == [b"0", b"1"]


@pytest.mark.parametrize("size", [1 << 18, 1 << 20])
def test_full_map(tmp_path: pathlib.Path, size: int) -> None:
    with stores.opened(tmp_path, max_db_size_bytes=size) as queue:
        count = 3 * size // 4000
        for index in range(count):
            queue.put([bytes(4000)], msg_ids=[b"%d" % index])
            assert queue.put([bytes(4000)], msg_ids=[b"%d" % index]) == 1 + index
        figures = stores.figures(queue)
        assert figures.dropped_by_mark > 0
        assert figures.dropped_by_mark + figures.lag == count


def test_threads_that_send_the_same_id_store_it_once(tmp_path: pathlib.Path) -> None:
    numbers: list[list[int]] = []
    with stores.opened(tmp_path) as queue:
        barrier = threading.Barrier(8)

        def send() -> None:
            barrier.wait(support.HANG_SECS)
            numbers.append([queue.put([b"%d" % index], msg_ids=[b"%d" % index])
                            for index in range(50)])  # yapf: disable

        threads = [threading.Thread(target=send) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(support.HANG_SECS)
        assert len(numbers) == 8
        assert all(found == numbers[0] for found in numbers)
        assert sorted(stores.take_all(queue)) == sorted(b"%d" % index for index in range(50))


def test_publishers_of_a_queue_share_their_ids(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, {"pub": ["sub"], "other": ["sub"]})
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    with persipubsub.publisher.Pub() as pub, persipubsub.publisher.Pub() as other:
        pub.init(pub_id="pub", config_pth=config_pth)
        other.init(pub_id="other", config_pth=config_pth, autosync=True)
        pub.send(b"one", msg_id="ä")
        other.send(b"one", msg_id="ä".encode())
        other.send_many([b"one", b"two", b"three"], msg_ids=["ä", None, "b"])
        pub.send_many([b"three", b"four"], msg_ids=["b", "c"])
        pub.send_many([], msg_ids=[])
        assert stores.take_all(support.queue_of(pub)) == [b"one", b"two", b"three", b"four"]


@pytest.mark.parametrize("msg_id, error", [("", ValueError), (b"", ValueError),
                                           ("x" * 256, ValueError), ("ä" * 128, ValueError),
                                           ("\ud800", ValueError), (1, TypeError),
                                           (bytearray(b"x"), TypeError), (["x"], TypeError)])
def test_wrong_id(tmp_path: pathlib.Path, msg_id: Any, error: "type[Exception]") -> None:
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)
        with pytest.raises(error, match="Expected|surrogates"):
            pub.send(b"x", msg_id=msg_id)
        with pytest.raises(error, match="Expected|surrogates"):
            pub.send_many([b"x", b"y"], msg_ids=["fine", msg_id])
        for wrong in (["a"], ["a", "b", "c"], []):
            with pytest.raises(ValueError, match="for each of 2 messages"):
                pub.send_many([b"x", b"y"], msg_ids=wrong)
        for text in ("ab", b"ab"):
            with pytest.raises(TypeError, match="list of ids"):
                pub.send_many([b"x", b"y"], msg_ids=text)  # type: ignore[arg-type]
        assert not stores.take_all(support.queue_of(pub))


def test_longest_id(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        first = queue.put([b"x"], msg_ids=[b"\xff" * engine.MAX_ID_BYTES])
        assert queue.put([b"x"], msg_ids=[b"\xff" * engine.MAX_ID_BYTES]) == first


def publish_forever(pipe: support.Connection, config_pth: pathlib.Path) -> None:
    """Send one id after the other, and tell what was sent."""
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)
        for index in range(1 << 30):
            pub.send(b"%d" % index, msg_id="%d" % index)
            pipe.send(index)


def test_killed_publisher_may_repeat(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, durability="os", checkpoint_secs=3600)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    last = 0
    with support.Child(publish_forever, config_pth) as child:
        while last < 20:
            last = child.get()
        child.kill(signal.SIGKILL)
        child.end(-signal.SIGKILL)
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)
        for index in range(last + 100):
            pub.send(b"%d" % index, msg_id="%d" % index)
        count = max(last + 100, len(stores.blocks(support.queue_of(pub))))
        assert stores.take_all(support.queue_of(pub)) == [b"%d" % index for index in range(count)]
