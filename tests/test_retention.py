"""Test what may leave the log and what has to."""

# pylint: disable=missing-function-docstring
# pylint: disable=protected-access

import functools
import pathlib
from collections.abc import Iterable

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import persipubsub.queue
from persipubsub.maintenance import _upkeep
from persipubsub.store import _layout, _log, _retention
from tests import stores


def floor_of(queue: persipubsub.queue.Queue,
             known: _retention.Floor | None = None) -> _retention.Floor:
    """Look at the positions, or only at what may have changed."""
    return queue._environment.write(lambda txn, databases: _retention.find_floor(
        txn, databases, _log.read_tail(txn.cursor(db=databases.data)), known=known))


def position_of(queue: persipubsub.queue.Queue, name: str) -> int:
    return stores.figures(queue, name).position


def test_floor_is_the_first_number_that_anybody_needs(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["a", "b"]) as queue:
        first = queue.put([b"1"])
        queue.put([b"22"])
        stores.take_all(queue, "a")
        stores.take(queue, "b")
        floor = floor_of(queue)
        assert (floor.number, floor.everyone) == (first + 1, first + 1)
        assert (floor.messages, floor.size, floor.subscribers) == (1, 1, 2)
        stores.take(queue, "b")
        assert floor_of(queue).number == queue.statistics().next_number


def test_floor_of_each_audience(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["a", "b", "c"]) as queue:
        first = queue.put([b"1"])
        queue.put([b"2"], ("a", "b"))
        queue.put([b"3"], ("c", ))
        queue.put([b"4"])
        stores.take_all(queue, "a")
        stores.take(queue, "b")
        stores.take(queue, "c")
        floor = floor_of(queue)
        # b still needs its second message, c the third one of the queue.
        assert floor.audiences == {1: first + 1, 2: first + 2}
        assert (floor.number, floor.everyone) == (first + 1, first + 1)


def test_nobody_needs_anything_without_subscribers(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=[], max_messages=3) as queue:
        for _ in range(20):
            queue.put([b"x"])
        assert floor_of(queue).number == queue.statistics().next_number
        assert queue.statistics().messages == 0
        queue.delete_finished()
        assert len(stores.blocks(queue)) == 1


@pytest.mark.parametrize("others", [1, 5, 1000])
def test_position_passes_all_messages_for_others(tmp_path: pathlib.Path, others: int) -> None:
    with stores.opened(tmp_path, subscribers=["a", "b"], keeps_os=True) as queue:
        queue.put([b"x"])
        for _ in range(others):
            queue.put([b"for a"], ("a", ))
        queue.put([b"y"], ("b", ))
        # Only the last message waits for b; what a finished is not its business.
        stores.take_all(queue, "a")
        stores.take(queue, "b")
        assert queue.statistics().messages == 1
        assert floor_of(queue).number == queue.statistics().next_number - 1
        assert position_of(queue, "b") == queue.statistics().next_number - 1
        assert stores.take_all(queue, "b") == [b"y"]


def test_messages_for_others_are_no_reason_to_drop_one(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path,
                       subscribers=["a", "b"],
                       max_messages=1500,
                       strategy=stores.pruning(True),
                       keeps_os=True) as queue:
        queue.put([b"x"], ("b", ))
        for _ in range(1400):
            queue.put([b"for a"], ("a", ))
        queue.put([b"y"], ("b", ))
        stores.take_all(queue, "a")
        assert stores.take(queue, "b") == b"x"
        # One message waits, so that there is room for a lot.
        queue.put([b"z"] * 1000)
        assert stores.figures(queue, "b").dropped_by_mark == 0
        assert stores.take_all(queue, "b") == [b"y"] + [b"z"] * 1000


@given(subscribers=st.integers(min_value=0, max_value=5000))
def test_looks_are_spread_over_sends(subscribers: int) -> None:
    interval = _retention.interval_of(subscribers)
    assert 16 <= interval <= max(16, subscribers)
    # Each send pays for a constant number of subscribers.
    assert subscribers / interval <= 8


@given(steps=st.lists(st.tuples(
    st.sampled_from([
        "put", "take", "take", "seek", "remove", "add", "clear", "halve", "newest", "for one"
    ]), st.sampled_from(["a", "b", "c"]), st.integers(min_value=0, max_value=4)),
                      max_size=25))
@settings(max_examples=60, deadline=None)
def test_floor_that_is_known_is_what_a_look_at_all_positions_finds(
        tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, int]]) -> None:
    directory = tmp_path_factory.mktemp("floor")
    with stores.opened(directory, subscribers=["a", "b", "c"], keeps_os=True) as queue:
        known = [floor_of(queue)]
        for what, name, count in steps:
            is_there = name in [found.subscriber for found in queue.statistics().subscribers]
            if what == "put":
                queue.put([b"x"] * (count + 1))
            elif what == "for one":
                queue.put([b"x"], (name, ))
            elif what == "add":
                persipubsub.queue.Queue.ensure(queue.settings, subscribers=[name])
            elif what == "clear":
                queue.clear()
            elif what in ("halve", "newest"):
                # Never of nothing: there is room in an empty queue.
                if queue.statistics().messages:
                    halve(queue, drops_newest=what == "newest")
            elif is_there and what == "take":
                stores.take(queue, name)
            elif is_there and what == "seek":
                queue.seek(name, count)
            elif is_there and what == "remove":
                _upkeep.remove_subscriber(queue.settings, name)
            fresh = floor_of(queue)
            for earlier in known:
                found = floor_of(queue, earlier)
                assert found.generation == fresh.generation
                # Older times are less sharp, and as right.
                assert found.oldest_ns <= fresh.oldest_ns
                assert (found.number, found.everyone, found.audiences, found.messages,
                        found.size) == (fresh.number, fresh.everyone, fresh.audiences,
                                        fresh.messages, fresh.size)
            known.append(fresh)


def test_hindmost_that_stays_is_all_that_is_looked_at(tmp_path: pathlib.Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"sub{index}" for index in range(100)]
    with stores.opened(tmp_path, subscribers=names, keeps_os=True) as queue:
        read: list[int] = []
        unpack = _layout.unpack_positions

        def counted(values: Iterable[memoryview]) -> list[int]:
            positions = unpack(values)
            read.extend(positions)
            return positions

        monkeypatch.setattr(_layout, "unpack_positions", counted)
        for _ in range(1000):
            queue.put([b"x"])
        # The first send reads them all, and one in some reads one.
        assert 100 < len(read) < 100 + 1000 // 16
        # Who moves is not looked at, and who was the last one to move is not forgotten.
        for name in names[1:]:
            stores.take(queue, name)
        assert floor_of(queue).number == 1
        stores.take(queue, names[0])
        assert floor_of(queue).number == 2


def put_numbers(queue: persipubsub.queue.Queue, count: int) -> tuple[int, list[bytes]]:
    """Put messages that all differ, in one block; return the number of the first."""
    messages = [b"%d" % index for index in range(count)]
    return queue.put(messages), messages


def halve(queue: persipubsub.queue.Queue, drops_newest: bool) -> list[_retention.Loss]:

    def work(txn, databases):  # type: ignore[no-untyped-def]
        tail = _log.read_tail(txn.cursor(db=databases.data))
        floor = _retention.find_floor(txn, databases, tail)
        return _retention.halve(txn, databases, floor, tail, drops_newest=drops_newest)[1]

    losses: list[_retention.Loss] = queue._environment.write(work)
    return losses


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10])
@pytest.mark.parametrize("is_one_block", [True, False])
@pytest.mark.parametrize("drops_newest", [True, False])
def test_half_is_dropped_rounded_up(tmp_path: pathlib.Path, count: int, is_one_block: bool,
                                    drops_newest: bool) -> None:
    with stores.opened(tmp_path, subscribers=["sub", "done"]) as queue:
        messages = [b"%d" % index for index in range(count)]
        if is_one_block:
            queue.put(messages)
        else:
            for message in messages:
                queue.put([message])
        stores.take_all(queue, "done")
        before = queue.statistics().next_number
        half = (count + 1) // 2
        assert halve(queue, drops_newest) == [_retention.Loss("sub", half)]
        assert queue.check() == []
        assert queue.statistics().messages == count - half
        # What is dropped is not given a number again.
        assert queue.put([b"next"]) == before
        kept = messages[:count - half] if drops_newest else messages[half:]
        assert stores.take_all(queue) == kept + [b"next"]
        assert stores.figures(queue).dropped_by_mark == half
        assert stores.figures(queue, "done").dropped_by_mark == 0


@pytest.mark.parametrize("before", [0, 1])
def test_message_at_work_is_dropped_and_not_counted_twice(tmp_path: pathlib.Path,
                                                          before: int) -> None:
    with stores.opened(tmp_path) as queue:
        # With a message in front of them, the position stands right at those at work.
        put_numbers(queue, before)
        assert len(stores.take_all(queue)) == before
        _, messages = put_numbers(queue, 4)
        consumer = queue.consumer("sub")
        lease = consumer.take(timeout=0, max_messages=4)
        assert lease is not None and lease.messages == messages
        assert halve(queue, drops_newest=True) == [_retention.Loss("sub", 2)]
        lease.acknowledge()
        figures = stores.figures(queue)
        assert (figures.acknowledged, figures.dropped_by_mark, figures.lag) == (before + 2, 2, 0)


def test_oldest_message_at_work_is_dropped_and_not_counted_twice(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        put_numbers(queue, 4)
        lease = queue.consumer("sub").take(timeout=0)
        assert lease is not None
        halve(queue, drops_newest=False)
        lease.acknowledge()
        figures = stores.figures(queue)
        assert (figures.acknowledged, figures.dropped_by_mark, figures.lag) == (0, 2, 2)


@pytest.mark.parametrize("drops_newest", [False, True])
def test_range_ahead_is_kept_or_passed(tmp_path: pathlib.Path, drops_newest: bool) -> None:
    with stores.opened(tmp_path) as queue:
        put_numbers(queue, 5)
        consumer = queue.consumer("sub")
        held = [consumer.take(timeout=0) for _ in range(4)]
        for lease in (held[1], held[3]):
            assert lease is not None
            lease.acknowledge()
        # Three of five leave; two or one of them were done.
        assert halve(queue, drops_newest) == [_retention.Loss("sub", 2)]
        assert queue.check() == []
        # All ranges were reached by the position, or become one with what was dropped.
        assert len(stores.ranges(queue)) == (1 if drops_newest else 0)
        for lease in (held[0], held[2]):
            assert lease is not None
            lease.give_back()
        assert stores.take_all(queue) == ([b"0"] if drops_newest else [b"4"])
        figures = stores.figures(queue)
        assert (figures.acknowledged, figures.dropped_by_mark, figures.lag) == (3, 2, 0)


def test_clear_leaves_a_placeholder(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["a", "b"]) as queue:
        first, _ = put_numbers(queue, 3)
        stores.take(queue, "a")
        assert queue.clear() == 5
        assert [stores.figures(queue, name).cleared for name in ("a", "b")] == [2, 3]
        assert stores.blocks(queue) == [range(first + 2, first + 2)]
        assert queue.clear() == 0
        assert stores.blocks(queue) == [range(first + 2, first + 2)]
        assert queue.put([b"x"]) == first + 3


def test_expired_messages_are_found_by_their_time(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, timeout_ns=10 * stores.SECOND_NS) as queue:
        first = queue.put([b"1", b"2"])
        clock.advance(1)
        queue.put([b"3"])

        def find(time_ns: int) -> int:
            return queue._environment.write(functools.partial(_find_expired, time_ns=time_ns))

        assert find(0) <= find(stores.START_NS) <= first
        assert find(stores.START_NS + 1) == first + 2
        assert find(clock()) == first + 2
        assert find(clock() + 1) == first + 3


def _find_expired(txn, databases, time_ns: int) -> int:  # type: ignore[no-untyped-def]
    tail = _log.read_tail(txn.cursor(db=databases.data))
    floor = _retention.find_floor(txn, databases, tail)
    return max(floor.number, _retention.expired_before(txn, databases, floor, tail, time_ns))


def skip(queue: persipubsub.queue.Queue) -> int:
    return queue.skip_to_newest("sub")


def test_newest_message_stays(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["sub", "other"]) as queue:
        assert skip(queue) == 0
        put_numbers(queue, 3)
        queue.put([b"not mine"], ("other", ))
        assert skip(queue) == 2
        assert skip(queue) == 0
        figures = stores.figures(queue)
        assert (figures.skipped, figures.acknowledged, figures.lag) == (2, 0, 1)
        assert stores.figures(queue, "other").lag == 4
        assert stores.take_all(queue) == [b"2"]
        assert skip(queue) == 0


@pytest.mark.parametrize("sends", [[4], [1, 1, 1, 1]])
@pytest.mark.parametrize("done, skipped, left", [
    ([2, 3], 1, [b"1"]),
    ([1, 3], 1, [b"2"]),
    ([1, 2, 3], 0, [b"0"]),
    ([0, 2, 3], 0, [b"1"]),
    ([0, 1, 2, 3], 0, []),
])
def test_newest_message_that_was_not_acknowledged_stays(  # pylint: disable=too-many-arguments
        tmp_path: pathlib.Path, sends: list[int], done: list[int], skipped: int,
        left: list[bytes]) -> None:
    with stores.opened(tmp_path, subscribers=["sub", "other"]) as queue:
        first = queue.statistics().next_number
        messages = iter(range(4))
        for count in sends:
            queue.put([b"%d" % next(messages) for _ in range(count)])
        queue.put([b"not mine"], ("other", ))
        consumer = queue.consumer("sub")
        for index in done:
            lease = consumer.take_at(first + index)
            assert lease is not None
            lease.acknowledge()
        assert skip(queue) == skipped
        assert stores.figures(queue).lag == len(left)
        assert stores.take_all(queue) == left


def test_skipping_passes_dropped_messages(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        put_numbers(queue, 4)
        halve(queue, drops_newest=True)
        assert skip(queue) == 1
        assert stores.take_all(queue) == [b"1"]


def test_store_is_sound_while_cleared_blocks_are_still_there(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["a", "b"]) as queue:
        for _ in range(5):
            queue.put([b"x", b"y"])
        queue._environment.write(_retention.clear)
        assert sum(map(len, stores.blocks(queue))) == 10
        assert queue.check() == []
        queue.put([b"z"])
        assert queue.check() == []
        assert stores.take_all(queue, "a") == [b"z"]
        assert (queue.statistics().messages, queue.statistics().message_bytes) == (1, 1)


@pytest.mark.parametrize("names", [None, ("b", "c"), ("c", )])
@pytest.mark.parametrize("does_seek", [False, True])
def test_last_block_stays_while_somebody_needs_it_or_one_before_it(tmp_path: pathlib.Path,
                                                                   names: tuple[str, ...] | None,
                                                                   does_seek: bool) -> None:
    with stores.opened(tmp_path, subscribers=["a", "b", "c"], keeps_os=True) as queue:
        queue.put([b"1"])
        last = queue.put([b"2", b"3"], names)
        before = stores.blocks(queue)
        queue._environment.write(_retention.empty_last)
        assert stores.blocks(queue) == before
        queue._environment.write(_retention.clear)
        queue._environment.write(_retention.empty_last)
        # Who seeks back to the first one counts what is behind it, too.
        assert stores.blocks(queue) == before
        if does_seek:
            queue.seek("c", last)
        queue.delete_finished()
        queue._environment.write(_retention.empty_last)
        rest = [b"2", b"3"] if does_seek else []
        placeholder = range(last + 1, last + 1)
        assert stores.blocks(queue) == [range(last, last + 2) if rest else placeholder]
        assert (queue.statistics().messages, stores.figures(queue, "c").lag) == (len(rest), ) * 2
        assert stores.take_all(queue, "c") == rest
