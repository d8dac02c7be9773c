"""Test what subscribers have acknowledged, against sets of numbers."""

# pylint: disable=missing-function-docstring
# pylint: disable=redefined-outer-name

from collections.abc import Callable

import hypothesis.strategies as st
import lmdb
import pytest
from hypothesis import example, given

import persipubsub.errors
from persipubsub.store import _blocks, _header, _layout, _log, _positions
from tests import stores

SPANS = st.lists(st.tuples(st.integers(min_value=1, max_value=30),
                           st.integers(min_value=1, max_value=8)),
                 max_size=12)

ORDINAL = 5

EMPTY = _layout.Subscriber(ORDINAL, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> stores.Scratch:
    return stores.Scratch(tmp_path_factory.mktemp("positions"))


def surround(txn: "lmdb.Transaction[memoryview]", scratch: stores.Scratch) -> Callable[[], None]:
    """Add ranges of the neighbours, and return a check that nobody touched them."""
    for ordinal in (ORDINAL - 1, ORDINAL + 1):
        for begin in (1, 10, 1 << 40):
            _positions.add_range(txn, scratch.databases, ordinal, begin, begin + 5)

    def check() -> None:
        for ordinal in (ORDINAL - 1, ORDINAL + 1):
            assert list(_positions.ranges(txn, scratch.databases,
                                          ordinal)) == [(1, 6), (10, 15), (1 << 40, (1 << 40) + 5)]

    return check


def runs(numbers: set[int]) -> list[tuple[int, int]]:
    """Describe a set by its runs, as begin and end."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


def add_all(txn: "lmdb.Transaction[memoryview]", scratch: stores.Scratch,
            spans: list[tuple[int, int]]) -> set[int]:
    """Add ranges and check each against a set."""
    known: set[int] = set()
    for begin, length in spans:
        added = set(range(begin, begin + length))
        assert _positions.add_range(txn, scratch.databases, ORDINAL, begin,
                                    begin + length) == len(added & known)
        known |= added
        assert list(_positions.ranges(txn, scratch.databases, ORDINAL)) == runs(known)
    return known


@given(spans=SPANS)
@example(spans=[(1, 2), (5, 2), (3, 2)])
def test_ranges_are_a_set(scratch: stores.Scratch, spans: list[tuple[int, int]]) -> None:
    with scratch.begin() as txn:
        check = surround(txn, scratch)
        known = add_all(txn, scratch, spans)
        for number in range(0, 42):
            free = number
            while free in known:
                free += 1
            assert _positions.skip_ahead(txn, scratch.databases, ORDINAL, number) == free
            assert _positions.next_range(txn, scratch.databases, ORDINAL, number) == next(
                (begin for begin, _ in runs(known) if begin > number), _layout.MAX_NUMBER + 1)
        check()


@given(spans=SPANS, position=st.integers(min_value=1, max_value=40))
def test_position_skips_the_ranges_that_it_reaches(scratch: stores.Scratch, spans: list[tuple[int,
                                                                                              int]],
                                                   position: int) -> None:
    with scratch.begin() as txn:
        check = surround(txn, scratch)
        known = add_all(txn, scratch, spans)
        expected = position
        while expected in known:
            expected += 1
        assert _positions.trim_ranges(txn, scratch.databases, ORDINAL, position) == expected
        left = {number for number in known if number >= expected}
        assert list(_positions.ranges(txn, scratch.databases, ORDINAL)) == runs(left)
        check()


@given(spans=SPANS, begin=st.integers(min_value=1, max_value=40))
def test_ranges_are_dropped_from_a_number_on(scratch: stores.Scratch, spans: list[tuple[int, int]],
                                             begin: int) -> None:
    with scratch.begin() as txn:
        check = surround(txn, scratch)
        known = add_all(txn, scratch, spans)
        _positions.drop_ranges(txn, scratch.databases, ORDINAL, begin)
        left = {number for number in known if number < begin}
        assert list(_positions.ranges(txn, scratch.databases, ORDINAL)) == runs(left)
        check()


@given(spans=SPANS, position=st.integers(min_value=1, max_value=10))
def test_acknowledgements_are_a_set(scratch: stores.Scratch, spans: list[tuple[int, int]],
                                    position: int) -> None:
    with scratch.begin() as txn:
        check = surround(txn, scratch)
        subscriber = EMPTY._replace(position=position)
        done = set(range(0, position))
        for begin, length in spans:
            added = set(range(begin, begin + length))
            subscriber, fresh = _positions.acknowledge(txn, scratch.databases, subscriber, begin,
                                                       begin + length)
            # In front of the range, everything is done: a consumer says so.
            assert fresh == len(added - done)
            done |= added
            expected = position
            while expected in done:
                expected += 1
            assert subscriber.position == expected
            ahead = runs({number for number in done if number > expected})
            assert list(_positions.ranges(txn, scratch.databases, ORDINAL)) == ahead
            assert subscriber.flags or not ahead
        check()


def test_flag_goes_with_the_last_range(scratch: stores.Scratch) -> None:
    with scratch.begin() as txn:
        subscriber, _ = _positions.acknowledge(txn, scratch.databases, EMPTY, 2, 3)
        assert subscriber.flags == _layout.FLAG_MAY_HAVE_RANGES
        subscriber, fresh = _positions.acknowledge(txn, scratch.databases, subscriber, 1, 2)
        assert (subscriber, fresh) == (EMPTY._replace(position=3), 1)


def build_log(txn: "lmdb.Transaction[memoryview]", scratch: stores.Scratch,
              audiences: list[int]) -> _log.Tail:
    """Add a message for each audience; what is negative is dropped again and leaves a gap."""
    tail = _log.EMPTY
    cursor = txn.cursor(db=scratch.databases.data)
    for audience in audiences:
        tail = _log.append(txn, scratch.databases, tail, 1, max(0, audience),
                           _blocks.encode_batches([b"x"]))
        if audience < 0:
            tail = _log.truncate(cursor, tail, tail.next_number - 1)
    return tail


@given(audiences=st.lists(st.integers(min_value=-1, max_value=2), max_size=40),
       spans=SPANS,
       position=st.integers(min_value=1, max_value=12))
@example(audiences=[1] + [2] * 30 + [1], spans=[], position=2)
@example(audiences=[1] + [2] * 30, spans=[], position=2)
@example(audiences=[2, 1, 1, 2, 1], spans=[(2, 2)], position=1)
def test_pending_messages_are_those_of_a_walk(scratch: stores.Scratch, audiences: list[int],
                                              spans: list[tuple[int, int]], position: int) -> None:
    with scratch.begin() as txn:
        tail = build_log(txn, scratch, audiences)
        position = min(position, tail.next_number)
        known = add_all(txn, scratch, [span for span in spans if span[0] > position])
        subscriber = EMPTY._replace(position=position, flags=_layout.FLAG_MAY_HAVE_RANGES)
        pending = [
            number for number, audience in enumerate(audiences, start=1)
            if audience in (0, 1) and number >= position and number not in known
        ]
        for begin in range(0, tail.next_number + 1):
            for end in range(begin, tail.next_number + 1):
                assert _positions.count_pending(txn, scratch.databases, subscriber, [1], begin,
                                                end) == sum(begin <= number < end
                                                            for number in pending)
        assert _positions.first_pending(txn, scratch.databases, subscriber, [1],
                                        tail.next_number) == (pending + [tail.next_number])[0]


def write_header(txn: "lmdb.Transaction[memoryview]", scratch: stores.Scratch) -> None:
    txn.put(_layout.HEADER_KEY,
            _layout.pack_header(_layout.Header(_layout.FORMAT, 0, 0, bytes(16), 3)),
            db=scratch.databases.meta)


def test_subscribers_are_added_at_the_end_with_ordinals_of_their_own(
        scratch: stores.Scratch) -> None:
    with scratch.begin() as txn:
        write_header(txn, scratch)
        tail = build_log(txn, scratch, [0, 0, 0])
        _positions.add(txn, scratch.databases, [b"a", b"b"])
        _positions.add(txn, scratch.databases, [b"b", b"c"])
        records: dict[bytes, _layout.Subscriber] = dict(_positions.read_all(txn, scratch.databases))
        assert {
            key: (record.ordinal, record.position)
            for key, record in records.items()
        } == {
            b"a": (3, tail.next_number),
            b"b": (4, tail.next_number),
            b"c": (5, tail.next_number)
        }
        assert _header.read(txn, scratch.databases, "").next_ordinal == 6
        assert _positions.lacks(txn, scratch.databases, [b"a", b"d"])
        assert not _positions.lacks(txn, scratch.databases, [b"a", b"c"])


def test_no_more_subscribers_than_ordinals(scratch: stores.Scratch) -> None:
    with scratch.begin() as txn:
        header = _layout.Header(_layout.FORMAT, 0, 0, bytes(16), _layout.MAX_SUBSCRIBER_ORDINAL)
        txn.put(_layout.HEADER_KEY, _layout.pack_header(header), db=scratch.databases.meta)
        _positions.add(txn, scratch.databases, [b"a"])
        with pytest.raises(persipubsub.errors.StoreError, match="32767"):
            _positions.add(txn, scratch.databases, [b"b"])


def test_missing_subscriber_is_named(scratch: stores.Scratch) -> None:
    with scratch.begin() as txn:
        assert _positions.read(txn, scratch.databases, b"x") is None
        with pytest.raises(persipubsub.errors.NotInitializedError, match="'nobody'"):
            _positions.require(txn, scratch.databases, b"nobody")


def test_audiences_of_a_subscriber() -> None:
    audiences = {1: ("a", "b"), 2: ("b", ), 3: ("ä", )}
    assert _positions.audiences_of(audiences, b"b") == (1, 2)
    assert _positions.audiences_of(audiences, "ä".encode()) == (3, )
    assert not _positions.audiences_of(audiences, b"c")
