"""Test putting, audiences, the timeout, numbers that survive everything, the file's size."""

# pylint: disable=missing-function-docstring

import pathlib
import random
import threading

import pytest

import persipubsub.control
import persipubsub.errors
import persipubsub.queue
from persipubsub.lmdb_engine import format as fmt
from tests import stores, support

MEGABYTE = 1000000


def numbered(count: int, begin: int = 0) -> list[bytes]:
    """Make messages that all differ."""
    return [b"%06d" % index for index in range(begin, begin + count)]


# Putting and taking


def test_all_subscribers_get_all_messages_in_order(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["a", "b"]) as queue:
        first = queue.put([b"1"])
        assert queue.put([b"2", b"3"]) == first + 1
        assert queue.put((b"4", )) == first + 3
        assert stores.take_all(queue, "b") == [b"1", b"2", b"3", b"4"]
        queue.put([b"5"])
        assert stores.take_all(queue, "a") == [b"1", b"2", b"3", b"4", b"5"]
        assert stores.take_all(queue, "b") == [b"5"]


def test_nothing_is_put(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        number = queue.put([])
        assert queue.put([b"x"]) == number
        assert stores.take_all(queue) == [b"x"]


def test_empty_messages_are_messages(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b""])
        queue.put([b"", b"x", b"", b""])
        assert queue.statistics().messages == 5
        assert queue.front("sub") == b""
        assert stores.take_all(queue) == [b"", b"", b"x", b"", b""]


@pytest.mark.parametrize("size", [1, 255, 4000, 4096, 65536, 65537, MEGABYTE, 10 * MEGABYTE])
def test_message_of_any_size_arrives(tmp_path: pathlib.Path, size: int) -> None:
    message = random.Random(size).randbytes(size)
    with stores.opened(tmp_path) as queue:
        queue.put([message])
        queue.put([b"between"])
        queue.put([message, message[::-1]])
        assert queue.statistics().message_bytes == 3 * size + 7
        assert stores.take_all(queue) == [message, b"between", message, message[::-1]]


@pytest.mark.parametrize("distance", [-1, 0, 1])
def test_batches_around_the_end_of_a_block(tmp_path: pathlib.Path, distance: int) -> None:
    # Two messages fill a block but for their entries in its table.
    size = fmt.BLOCK_BYTES // 2 - fmt.ENTRY_BYTES
    messages = [bytes(size), b"\1" * (size + distance), b"third"]
    with stores.opened(tmp_path) as queue:
        queue.put(messages)
        lengths = [len(block) for block in stores.blocks(queue) if block]
        assert lengths == ([2, 1] if distance <= 0 else [1, 2])
        assert stores.take_all(queue) == messages


def test_batch_of_many_blocks_is_one_commit(tmp_path: pathlib.Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fmt, "BLOCK_BYTES", 100)
    with stores.opened(tmp_path) as queue:
        commits = queue.statistics().commits
        messages = numbered(100)
        first = queue.put(messages)
        assert queue.statistics().commits == commits + 1
        assert [block for block in stores.blocks(queue) if block] == [
            range(number, min(number + 7, first + 100)) for number in range(first, first + 100, 7)
        ]
        assert stores.take_all(queue) == messages


def test_closed_queue_refuses_everything(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path):
        queue = persipubsub.queue.Queue(stores.path_of(tmp_path), stores.settings())
        queue.close()
        queue.close()
    for function in (lambda: queue.put([b"x"]), lambda: queue.consumer("sub"),
                     lambda: queue.front("sub"), lambda: queue.skip_to_newest("sub"), queue.prune,
                     queue.clear, queue.statistics, queue.check,
                     lambda: queue.require_subscribers(["sub"])):
        assert support.outcome(function) == "ClosedError"


def test_missing_subscribers_are_named(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["a", "b"]) as queue:
        queue.require_subscribers(["b", "a"])
        with pytest.raises(persipubsub.errors.NotInitializedError, match="'c'"):
            queue.require_subscribers(["a", "c"])


def test_ensure_may_be_repeated(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, clock=stores.Clock()) as queue:
        queue.put([b"x"])
        before = queue.statistics()
        persipubsub.queue.Queue.ensure(queue.path, stores.settings(), ["sub"])
        after = queue.statistics()
        assert (after.messages, after.subscribers) == (before.messages, before.subscribers)


# Audiences


def test_messages_go_to_those_addressed(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["a", "b", "c"]) as queue:
        queue.put([b"1"], ("a", "b"))
        queue.put([b"2"])
        queue.put([b"3", b"4"], ("c", ))
        queue.put([b"5"], ("b", "a"))
        assert [stores.figures(queue, name).lag for name in "abc"] == [3, 3, 3]
        assert stores.take_all(queue, "a") == [b"1", b"2", b"5"]
        assert stores.take_all(queue, "c") == [b"2", b"3", b"4"]
        assert stores.take_all(queue, "b") == [b"1", b"2", b"5"]
        queue.prune()
        assert len(stores.blocks(queue)) == 1


def test_later_subscriber_is_not_in_an_audience(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["a"]) as queue:
        queue.put([b"1"], ("a", ))
        persipubsub.queue.Queue.ensure(queue.path, stores.settings(), ["a", "late"])
        queue.put([b"2"], ("a", ))
        queue.put([b"3"])
        assert stores.take_all(queue, "late") == [b"3"]
        assert stores.take_all(queue, "a") == [b"1", b"2", b"3"]


def test_send_that_fails_leaves_no_recipients_to_be_mixed_up(tmp_path: pathlib.Path) -> None:
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


def test_many_audiences(tmp_path: pathlib.Path) -> None:
    names = [f"s{index}" for index in range(8)]
    generator = random.Random(1)
    with stores.opened(tmp_path, subscribers=names) as queue:
        sent: list[tuple[bytes, list[str]]] = []
        for message in numbered(300):
            audience = generator.sample(names, generator.randint(1, 8))
            sent.append((message, audience))
            queue.put([message], tuple(audience))
        for name in names:
            assert stores.take_all(
                queue, name) == [message for message, audience in sent if name in audience]
        assert queue.statistics().messages == 0


# The timeout


def test_old_messages_are_dropped_by_a_send(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, msg_timeout_secs=10) as queue:
        queue.put(numbered(5))
        clock.advance(11)
        for _ in range(16):
            queue.put([b"new"])
        figures = stores.figures(queue)
        assert (figures.dropped_by_timeout, figures.lag) == (5, 16)


def test_old_messages_make_room_before_young_ones_are_dropped(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, max_msgs_num=6, msg_timeout_secs=10) as queue:
        queue.put([b"old", b"old"])
        clock.advance(6)
        queue.put([b"1", b"2", b"3", b"4"])
        clock.advance(6)
        queue.put([b"5", b"6"])
        figures = stores.figures(queue)
        assert (figures.dropped_by_timeout, figures.dropped_by_mark) == (2, 0)
        assert stores.take_all(queue) == [b"1", b"2", b"3", b"4", b"5", b"6"]


def test_prune_drops_just_what_is_too_old(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, subscribers=["a", "b"], clock=clock, msg_timeout_secs=10) as queue:
        queue.put([b"1", b"2"])
        clock.advance(5)
        queue.put([b"3"])
        stores.take(queue, "a")
        clock.advance(5)
        assert queue.prune() == 0
        clock.advance(0.1)
        assert queue.prune() == 3
        assert queue.prune() == 0
        assert stores.take_all(queue, "a") == stores.take_all(queue, "b") == [b"3"]


def test_clock_that_goes_back_takes_nothing_back(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, msg_timeout_secs=10) as queue:
        queue.put([b"1"])
        clock.advance(-100)
        queue.put([b"2"])
        assert queue.statistics().oldest_age_seconds == 0
        clock.advance(111)
        assert queue.prune() == 2


# Numbers


@pytest.mark.parametrize("drops_newest", [False, True])
def test_numbers_survive_everything(tmp_path: pathlib.Path, drops_newest: bool) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path,
                       clock=clock,
                       msg_timeout_secs=10,
                       max_msgs_num=8,
                       strategy=stores.pruning(drops_newest)) as queue:
        expected = queue.put([b"x"]) + 1
        for forget in (lambda: stores.take_all(queue), queue.clear, lambda: clock.advance(11),
                       queue.prune, lambda: queue.skip_to_newest("sub"),
                       lambda: queue.put([b"z"] * 8)):
            forget()
            before = queue.statistics().next_number
            assert before in (expected, expected + 8)
            assert queue.put([b"x", b"y"]) == before
            expected = before + 2
            queue.prune()
            assert queue.check() == []


@pytest.mark.parametrize("drops_newest", [False, True])
def test_numbers_go_on_behind_dropped_messages(tmp_path: pathlib.Path, drops_newest: bool) -> None:
    with stores.opened(tmp_path, max_msgs_num=1, strategy=stores.pruning(drops_newest)) as queue:
        first = queue.put([b"0"])
        for index in range(1, 50):
            assert queue.put([b"x"]) == first + index
            assert queue.statistics().messages == 1
        assert len([block for block in stores.blocks(queue) if block]) <= 20


def test_numbers_go_on_in_another_process(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth)
    code = """
import sys
import persipubsub.config, persipubsub.queue
with persipubsub.queue.open_queue(persipubsub.config.read(sys.argv[1]), "queue") as queue:
    print(queue.put([b"x", b"y"]))
    if sys.argv[2] == "clear":
        queue.clear()
"""
    numbers = []
    for what in ("keep", "clear", "clear", "keep"):
        result = support.run_python(code, config_pth, what)
        assert result.returncode == 0, result.stderr
        numbers.append(int(result.stdout))
    assert numbers == list(range(numbers[0], numbers[0] + 8, 2))
    with support.open_queue(config_pth) as queue:
        assert queue.put([b"z"]) == numbers[0] + 8
        assert stores.take_all(queue) == [b"x", b"y", b"z"]
        assert stores.figures(queue).cleared == 6


def test_everything_is_there_after_reopening(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["sub", "other"]) as queue:
        queue.put(numbered(4))
        held = [queue.consumer("sub").take(timeout=0) for _ in range(2)]
        assert held[1] is not None
        held[1].ack()
        before = queue.statistics()
    with persipubsub.queue.Queue(stores.path_of(tmp_path), stores.settings()) as queue:
        after = queue.statistics()
        assert (after.messages, after.message_bytes,
                after.next_number) == (before.messages, before.message_bytes, before.next_number)
        assert stores.take_all(queue) == [b"000000", b"000002", b"000003"]
        assert stores.take_all(queue, "other") == numbered(4)


# Keeping the file small


@pytest.mark.parametrize("backlog, size", [(0, 200), (100, 200), (10, 100000)])
def test_file_stays_small_at_a_steady_backlog(tmp_path: pathlib.Path, backlog: int,
                                              size: int) -> None:
    with stores.opened(tmp_path) as queue:
        consumer = queue.consumer("sub")
        queue.put([bytes(size)] * backlog)
        sizes = []
        for _ in range(10):
            for _ in range(200):
                queue.put([bytes(size)])
                lease = consumer.take(timeout=0)
                assert lease is not None
                lease.ack()
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
def test_end_of_the_log_is_where_another_process_left_it(tmp_path: pathlib.Path,
                                                         turns: str) -> None:
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


def test_end_of_the_log_after_other_works(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1"])
        queue.clear()
        queue.put([b"2"])
        queue.prune()
        queue.put([b"3"])
        assert stores.take_all(queue) == [b"2", b"3"]
        assert queue.put([b"4"]) == 4


def test_no_send_deletes_much(tmp_path: pathlib.Path) -> None:
    # The background thread deletes what is finished as well.
    with stores.opened(tmp_path, checkpoint_secs=3600) as queue:
        for message in numbered(1000):
            queue.put([message])
        stores.take_all(queue)
        consumer = queue.consumer("sub")
        lengths = [len(stores.blocks(queue))]
        for _ in range(1100):
            queue.put([b"x"])
            lease = consumer.take(timeout=0)
            assert lease is not None
            lease.ack()
            lengths.append(len(stores.blocks(queue)))
        assert max(before - after for before, after in zip(lengths, lengths[1:])) <= 36
        # About twice as many leave as come.
        assert lengths[-1] <= 36


def test_prune_deletes_all_that_is_finished(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["a", "b"]) as queue:
        for message in numbered(700):
            queue.put([message])
        stores.take_all(queue, "a")
        queue.prune()
        assert len([block for block in stores.blocks(queue) if block]) == 700
        stores.take_all(queue, "b")
        queue.prune()
        assert len(stores.blocks(queue)) == 1


def test_clear_deletes_all(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["a", "b"]) as queue:
        for message in numbered(700):
            queue.put([message])
        stores.take(queue, "a")
        assert queue.clear() == 1399
        assert stores.blocks(queue)[0] == range(queue.statistics().next_number - 1,
                                                queue.statistics().next_number - 1)
        assert (queue.statistics().messages, queue.statistics().message_bytes) == (0, 0)
        assert not stores.take_all(queue, "a")
        assert queue.clear() == 0


# Many threads


def test_threads_share_commits_and_lose_nothing(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["a", "b"]) as queue:
        audiences = [None, ("a", ), ("b", ), ("a", "b")]

        def send(name: int) -> None:
            for index in range(100):
                queue.put([b"%d %d" % (name, index)], audiences[name])

        threads = [threading.Thread(target=send, args=(name, )) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(support.HANG_SECS)
        for name, others in (("a", 2), ("b", 1)):
            found = stores.take_all(queue, name)
            for sender in range(4):
                prefix = b"%d " % sender
                expected = [prefix + b"%d" % index for index in range(100)]
                assert [message for message in found
                        if message.startswith(prefix)] == (expected if sender != others else [])


def test_threads_of_one_subscriber_share_its_messages(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        messages = numbered(300)
        queue.put(messages)
        consumer = queue.consumer("sub")
        found: list[list[bytes]] = [[] for _ in range(4)]

        def receive(mine: list[bytes]) -> None:
            while len(mine) < len(messages):
                lease = consumer.take(timeout=0)
                if lease is None:
                    return
                mine.extend(lease.messages)
                lease.ack()

        threads = [threading.Thread(target=receive, args=(mine, )) for mine in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(support.HANG_SECS)
        assert sorted(message for mine in found for message in mine) == messages
        # Each one gets them in order.
        assert all(mine == sorted(mine) for mine in found)
        assert stores.figures(queue).acknowledged == 300
        assert stores.ranges(queue) == []
