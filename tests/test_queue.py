"""Test putting, audiences, the timeout, the end of the log, the file's size."""

import random
from pathlib import Path

import pytest

import persipubsub.queue
from tests import stores, support

MEGABYTE = 1000000


def numbered(count: int, begin: int = 0) -> list[bytes]:
    return [b"%06d" % index for index in range(begin, begin + count)]


# Putting and taking


@pytest.mark.parametrize("size", [1, 255, 4000, 4096, 65536, 65537, MEGABYTE, 10 * MEGABYTE])
def test_message_of_any_size_arrives(tmp_path: Path, size: int) -> None:
    message = random.Random(size).randbytes(size)
    with stores.opened(tmp_path) as queue:
        queue.put([message])
        queue.put([b"between"])
        queue.put([message, message[::-1]])
        assert queue.statistics().message_bytes == 3 * size + 7
        assert stores.take_all(queue) == [message, b"between", message, message[::-1]]


# Audiences


def test_send_that_fails_leaves_no_recipients_to_be_mixed_up(tmp_path: Path) -> None:
    with stores.opened(tmp_path,
                       subscribers=["a", "b"],
                       max_db_size_bytes=1 << 18,
                       strategy=stores.REJECT) as queue, stores.again(queue) as other:
        while support.outcome(lambda: queue.put([bytes(10000)])) == "":
            pass
        # One that fails in the middle of the transaction: its list of recipients goes back, too.
        while support.outcome(lambda: queue.put([b"x"], ("a", ))) == "":
            pass
        for name in "ab":
            stores.take_all(queue, name)
        other.put([b"for b"], ("b", ))
        queue.put([b"for a"], ("a", ))
        assert stores.take_all(queue, "a") == [b"for a"]
        assert stores.take_all(queue, "b") == [b"for b"]


# The timeout


def test_old_messages_are_dropped_by_a_send(tmp_path: Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, msg_timeout_secs=10) as queue:
        queue.put(numbered(5))
        clock.advance(11)
        for _ in range(16):
            queue.put([b"new"])
        figures = stores.figures(queue)
        assert (figures.dropped_by_timeout, figures.lag) == (5, 16)


# Keeping the file small


@pytest.mark.parametrize("backlog, size", [(0, 200), (100, 200), (10, 100000)])
def test_file_stays_small_at_a_steady_backlog(tmp_path: Path, backlog: int, size: int) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([bytes(size)] * backlog)
        sizes = []
        for _ in range(10):
            for _ in range(200):
                queue.put([bytes(size)])
                assert stores.take(queue) is not None
            sizes.append(queue.statistics().file_bytes)
        assert queue.statistics().messages == backlog
        assert len(stores.blocks(queue)) <= backlog + 40
        # It does not grow any more, and is not much larger than what it holds.
        assert sizes[-1] <= 1.5 * sizes[4]
        assert sizes[-1] <= 400000 + 5 * size * (backlog + 8)


def send_when_told(pipe: support.Connection, queue: persipubsub.queue.Queue) -> None:
    while pipe.recv():
        queue.put([b"theirs"])
        pipe.send(None)


@pytest.mark.parametrize("turns", ["otto", "oott", "totot"])
def test_end_of_the_log_is_where_another_process_left_it(tmp_path: Path, turns: str) -> None:
    with stores.opened(tmp_path) as queue:
        with support.Child(send_when_told, queue) as child:
            for turn in turns:
                if turn == "o":
                    queue.put([b"ours"])
                else:
                    child.pipe.send(True)
                    child.get()
            child.pipe.send(False)
            child.end()
        expected = [b"ours" if turn == "o" else b"theirs" for turn in turns]
        assert stores.take_all(queue) == expected


def test_no_send_deletes_much(tmp_path: Path) -> None:
    # The background thread deletes what is finished as well.
    with stores.opened(tmp_path, checkpoint_secs=3600) as queue:
        for message in numbered(1000):
            queue.put([message])
        stores.take_all(queue)
        lengths = [len(stores.blocks(queue))]
        for _ in range(1100):
            queue.put([b"x"])
            assert stores.take(queue) is not None
            lengths.append(len(stores.blocks(queue)))
        assert max(before - after for before, after in zip(lengths, lengths[1:])) <= 36
        # About twice as many leave as come.
        assert lengths[-1] <= 36
