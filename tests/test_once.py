"""Test that a message with an id is stored once."""

import threading
from pathlib import Path
from typing import Any

import pytest

from persipubsub import Pub
from tests import stores, support


@pytest.mark.parametrize("size", [1 << 18, 1 << 20])
def test_full_map(tmp_path: Path, size: int) -> None:
    with stores.opened(tmp_path, max_db_size_bytes=size) as queue:
        count = 3 * size // 4000
        for index in range(count):
            queue.put([bytes(4000)], msg_ids=[b"%d" % index])
            assert queue.put([bytes(4000)], msg_ids=[b"%d" % index]) == 1 + index
        figures = stores.figures(queue)
        assert figures.dropped_by_mark > 0
        assert figures.dropped_by_mark + figures.lag == count


def test_threads_that_send_the_same_id_store_it_once(tmp_path: Path) -> None:
    numbers: list[list[int]] = []
    with stores.opened(tmp_path) as queue:
        barrier = threading.Barrier(8)

        def send() -> None:
            barrier.wait(support.HANG_SECS)
            numbers.append([queue.put([b"%d" % index], msg_ids=[b"%d" % index])
                            for index in range(50)])  # yapf: disable

        support.in_threads([send] * 8)
        assert len(numbers) == 8
        assert all(found == numbers[0] for found in numbers)
        assert sorted(stores.take_all(queue)) == sorted(b"%d" % index for index in range(50))


def test_publishers_of_a_queue_share_their_ids(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path, {"pub": ["sub"], "other": ["sub"]})
    with Pub("pub", config_pth) as pub, Pub("other", config_pth, autosync=True) as other:
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
def test_wrong_id(tmp_path: Path, msg_id: Any, error: "type[Exception]") -> None:
    config_pth = support.make_queue(tmp_path)
    with Pub("pub", config_pth) as pub:
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
