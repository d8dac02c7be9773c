"""Test what a queue does at its limits: high-water marks, too large messages, a full map."""

import contextlib
import itertools
import logging
import random
import threading
from pathlib import Path
from typing import Any

import pytest

import persipubsub.queue
from persipubsub import errors
from persipubsub.lmdb_engine import format as fmt
from tests import stores, support


def numbered(count: int, begin: int = 0) -> list[bytes]:
    return [b"%06d" % index for index in range(begin, begin + count)]


# High-water marks


def test_drops_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="persipubsub.queue"):
        with stores.opened(tmp_path, subscribers=["a", "b"], max_msgs_num=4) as queue:
            stores.take(queue, "a")
            for message in numbered(30):
                queue.put([message])
            dropped = stores.figures(queue, "a").dropped_by_mark
    counts = [record.getMessage() for record in caplog.records]
    assert counts and all("dropped unread" in text for text in counts)
    # The warnings name all that was dropped, however few they are.
    named = sum(int(text.rsplit(": ", 1)[1].split(" of ")[0]) for text in counts)
    assert named == dropped > 20 and len(counts) <= 3


def test_drops_for_messages_that_are_refused_are_logged(tmp_path: Path,
                                                        caplog: pytest.LogCaptureFixture) -> None:
    clock = stores.Clock()
    with caplog.at_level(logging.WARNING, logger="persipubsub.queue"):
        with stores.opened(tmp_path,
                           clock=clock,
                           max_msgs_num=4,
                           msg_timeout_secs=10,
                           strategy=stores.REJECT) as queue:
            queue.put([b"old"])
            clock.advance(9)
            queue.put([b"1", b"2"])
            clock.advance(2)
            outcomes = queue.put_each([(numbered(3), None, None), (numbered(3), None, None)])
            assert [type(outcome).__name__ for outcome in outcomes] == 2 * ["QueueFullError"]
            assert stores.figures(queue).dropped_by_timeout == 1
    assert [record.getMessage().rsplit(": ", 1)[1] for record in caplog.records] == ["1 of sub"]


# Too large


@pytest.mark.parametrize("key, limit, messages", [
    ("size_bytes", 10, [bytes(11)]),
    ("size_bytes", 10, [bytes(6), bytes(5)]),
    ("max_msgs_num", 3, [b""] * 4),
    ("max_db_size_bytes", 1 << 20, [bytes(1 << 20)]),
    ("max_db_size_bytes", 1 << 20, [b""] * (1 << 17)),
])
def test_what_never_fits_is_refused_and_nothing_changes(tmp_path: Path, key: str, limit: Any,
                                                        messages: list[bytes]) -> None:
    with stores.opened(tmp_path, clock=stores.Clock(), **{key: limit}) as queue:
        queue.put([b"a", b"b"])
        before, content = queue.statistics(), support.snapshot(tmp_path / "queue")["data.mdb"]
        for _ in range(2):
            with pytest.raises(errors.MessageTooLargeError, match=str(tmp_path)):
                queue.put(messages)
        assert queue.statistics() == before
        assert support.snapshot(tmp_path / "queue")["data.mdb"] == content
        assert stores.take_all(queue) == [b"a", b"b"]


def test_message_of_four_gibibytes_is_refused_before_it_is_encoded(tmp_path: Path) -> None:
    try:
        # Untouched pages of zeros take no memory.
        message = bytes(1 << 32)
    except MemoryError:
        pytest.skip("no room for a message of 4 GiB")
    with stores.opened(tmp_path, size_bytes=1 << 40, max_db_size_bytes=1 << 40) as queue:
        with pytest.raises(errors.MessageTooLargeError, match="4294967296"):
            queue.put([b"x", message])
        assert queue.statistics().messages == 0


# A full store


@pytest.mark.parametrize("strategy", [stores.PRUNE_FIRST, stores.PRUNE_LAST])
@pytest.mark.parametrize("size", [3000, 50000])
def test_full_store_is_a_high_water_mark(tmp_path: Path, strategy: object, size: int) -> None:
    with stores.opened(tmp_path, max_db_size_bytes=1 << 20, strategy=strategy) as queue:
        sent: list[bytes] = []
        while stores.figures(queue).dropped_by_mark == 0:
            sent.append(b"%06d" % len(sent) + bytes(size))
            queue.put(sent[-1:])
        assert len(sent) * size > 600000
        # Nothing but half, although LMDB needs some commits to use freed pages.
        left = len(sent) // 2 - 1
        kept = sent[:left] if strategy is stores.PRUNE_LAST else sent[len(sent) - 1 - left:-1]
        assert queue.check() == []
        assert stores.take_all(queue) == kept + sent[-1:]


@pytest.mark.parametrize("strategy", [stores.REJECT, stores.BLOCK])
def test_full_store_refuses_what_is_sent_and_drops_nothing(tmp_path: Path,
                                                           strategy: object) -> None:
    with stores.opened(tmp_path, max_db_size_bytes=1 << 20, strategy=strategy) as queue:
        count = 0
        with pytest.raises(errors.QueueFullError, match="max_db_size_bytes.*'sub'"):
            while True:
                queue.put([b"%06d" % count + bytes(900)], timeout=0)
                count += 1
        assert queue.statistics().messages == count > 400
        # Consumers have room in any case.
        assert [stores.take(queue)
                for _ in range(20)] == [b"%06d" % index + bytes(900) for index in range(20)]
        assert queue.skip_to_newest("sub") == count - 21
        assert len(stores.take_all(queue)) == 1
        queue.prune()
        assert len(stores.blocks(queue)) == 1
        queue.put([bytes(300000)])
        assert stores.figures(queue).dropped_by_mark == 0
        assert queue.clear() == 1


def test_any_message_that_is_not_too_large_fits_at_last(tmp_path: Path) -> None:
    limit = 1 << 20
    with stores.opened(tmp_path, max_db_size_bytes=limit) as queue:
        largest = limit - fmt.BLOCK_BYTES // 8 - fmt.ENTRY_BYTES
        generator = random.Random(1)
        for index in range(60):
            size = generator.choice([100, 5000, 100000, 400000, largest])
            queue.put([b"%06d" % index + bytes(size - 6)])
            assert queue.statistics().messages >= 1
        assert stores.take_all(queue)[-1].startswith(b"000059")
        # The map is a little larger, so that there is room to tidy up.
        assert queue.statistics().file_bytes <= limit + (1 << 20)


def test_nothing_is_sent_into_the_room_of_acknowledgements(tmp_path: Path) -> None:
    """Else there is none left some time later."""
    limit = 1 << 20
    generator = random.Random(1)
    with stores.opened(tmp_path, max_db_size_bytes=limit, strategy=stores.REJECT) as queue:
        msg_ids = (b"%0250d" % number for number in itertools.count())
        with pytest.raises(errors.DiskFullError):
            while True:
                try:
                    queue.put([b"m"] * 50, timeout=0, msg_ids=list(itertools.islice(msg_ids, 50)))
                except errors.QueueFullError:
                    stores.take_all(queue)
        for _ in range(300):
            for given in ([next(msg_ids)], None):
                with contextlib.suppress(errors.QueueFullError, errors.DiskFullError):
                    queue.put([bytes(generator.choice([0, 500, 5000, 60000]))], None, 0, given)
            stores.take(queue)
        stores.take_all(queue)
        queue.clear()
        queue.prune()
        assert queue.statistics().file_bytes <= limit + (1 << 20)


def test_limit_that_is_set_far_below_what_is_written(tmp_path: Path) -> None:
    with stores.opened(tmp_path, max_db_size_bytes=1 << 28) as queue:
        for _ in range(80):
            queue.put([bytes(1 << 20)])
        assert len(stores.take_all(queue)) == 80
        queue.put([b"left"])
    with stores.opened(tmp_path, max_db_size_bytes=1 << 20) as queue:
        queue.prune()
        assert queue.clear() == 1
        queue.put([b"x"])
        assert stores.take_all(queue) == [b"x"]


class _Sender(logging.Handler):
    """Send from a handler of warnings: a program may do that."""

    def __init__(self, queue: persipubsub.queue.Queue) -> None:
        super().__init__()
        self.queue = queue
        self.sent = 0

    def emit(self, record: logging.LogRecord) -> None:
        if self.sent < 3:
            self.sent += 1
            self.queue.put([b"warning"])


@pytest.mark.parametrize("durability", [stores.FSYNC, stores.OS])
@pytest.mark.parametrize("key, limit", [("max_msgs_num", 10), ("max_db_size_bytes", 1 << 20)])
def test_warnings_are_given_outside_of_transactions(tmp_path: Path, key: str, limit: Any,
                                                    durability: object) -> None:
    with stores.opened(tmp_path, durability=durability, **{key: limit}) as queue:
        handler = _Sender(queue)
        logger = logging.getLogger("persipubsub.queue")
        logger.addHandler(handler)

        def send() -> None:
            for _ in range(50):
                queue.put([bytes(50000)])

        try:
            # A transaction inside of another one would hang, and so would a thread that sends for
            # others and waits for itself.
            thread = threading.Thread(target=send, daemon=True)
            thread.start()
            thread.join(support.HANG_SECS)
            assert not thread.is_alive()
        finally:
            logger.removeHandler(handler)
        assert handler.sent >= 1
