"""Test walking, extending and shortening the log against a plain list of messages."""

# pylint: disable=missing-function-docstring
# pylint: disable=redefined-outer-name
# pylint: disable=unbalanced-tuple-unpacking

import dataclasses

import hypothesis.strategies as st
import lmdb
import pytest
from hypothesis import example, given

from persipubsub.store import _blocks, _layout, _log
from tests import stores

#: Nothing was committed later.
NO_TIME_NS = 1 << 63

AUDIENCES = st.integers(min_value=0, max_value=3)

SIZES = st.lists(st.integers(min_value=0, max_value=5), min_size=1, max_size=4)


@dataclasses.dataclass(frozen=True)
class Send:
    """Add blocks."""

    sizes: list[list[int]]  #: of the messages of each block
    audience: int
    step_ns: int


@dataclasses.dataclass(frozen=True)
class Cut:
    """Remove a share of the messages at the end."""

    share: float


SENDS = st.builds(Send,
                  sizes=st.lists(SIZES, min_size=1, max_size=3),
                  audience=AUDIENCES,
                  step_ns=st.integers(min_value=-1, max_value=2))

CUTS = st.builds(Cut, share=st.floats(min_value=0, max_value=1))

STEPS = st.lists(st.one_of(SENDS, SENDS, SENDS, CUTS), max_size=8)


@dataclasses.dataclass(frozen=True)
class Message:
    """Hold what the model knows of a message."""

    number: int
    size: int
    audience: int
    time_ns: int


class Model:
    """Build a log, and a list beside it."""

    def __init__(self, txn: "lmdb.Transaction[memoryview]", scratch: stores.Scratch) -> None:
        self.txn, self.databases = txn, scratch.databases
        self.cursor = txn.cursor(db=scratch.databases.data)
        self.messages: list[Message] = []
        self.tail = _log.EMPTY
        self.now_ns = 100

    def run(self, steps: list[object]) -> "Model":
        for step in steps:
            if isinstance(step, Send):
                self.send(step)
            elif isinstance(step, Cut) and self.messages:
                self.cut(self.messages[int(step.share * (len(self.messages) - 1))].number)
        assert _log.read_tail(self.cursor) == self.tail
        return self

    def send(self, step: Send) -> None:
        self.now_ns += step.step_ns
        number = self.tail.next_number
        # A clock that goes back does not take the log's times back.
        time_ns = max(self.now_ns, self.tail.time_ns)
        for sizes in step.sizes:
            for size in sizes:
                self.messages.append(Message(number, size, step.audience, time_ns))
                number += 1
        batches = [
            batch for sizes in step.sizes
            for batch in _blocks.encode_batches([bytes(size) for size in sizes])
        ]
        self.tail = _log.append(self.txn, self.databases, self.tail, self.now_ns, step.audience,
                                batches)
        assert self.tail.next_number == number

    def cut(self, number: int) -> None:
        self.tail = _log.truncate(self.cursor, self.tail, number)
        self.messages = [message for message in self.messages if message.number < number]

    def numbers(self) -> range:
        return range(0, self.tail.next_number + 2)

    def place(self, number: int) -> tuple[int, int]:
        before = [message for message in self.messages if message.number < number]
        return len(before), sum(message.size for message in before)

    def count(self, begin: int, end: int, audiences: set[int]) -> int:
        return sum(begin <= message.number < end and message.audience in audiences | {0}
                   for message in self.messages)

    def first(self, begin: int, audiences: set[int] | None = None) -> Message | None:
        return next((message for message in self.messages if message.number >= begin and (
            audiences is None or message.audience in audiences | {0})), None)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> stores.Scratch:
    return stores.Scratch(tmp_path_factory.mktemp("log"))


def sends(*sizes: int, audience: int = 0) -> list[object]:
    """Send each message in a block of its own."""
    return [Send([[size]], audience, 1) for size in sizes]


@given(steps=STEPS)
@example(steps=[])
@example(steps=[Send([[1, 2, 3]], 1, 1), Cut(0.5), Send([[4]], 2, 1), Cut(0.0)])
def test_places_are_those_of_a_count(scratch: stores.Scratch, steps: list[object]) -> None:
    with scratch.begin() as txn:
        model = Model(txn, scratch).run(steps)
        for number in model.numbers():
            place = _log.place_of(model.cursor, number)
            assert (place.messages, place.size) == model.place(number)


@given(steps=STEPS, audiences=st.sets(st.integers(min_value=1, max_value=3)))
def test_messages_between_places_are_counted(scratch: stores.Scratch, steps: list[object],
                                             audiences: set[int]) -> None:
    with scratch.begin() as txn:
        model = Model(txn, scratch).run(steps)
        places = [_log.place_of(model.cursor, number) for number in model.numbers()]
        for begin in model.numbers():
            for end in range(begin, len(places)):
                count = _log.count_between(places[begin], places[end], sorted(audiences))
                assert count == model.count(begin, end, audiences)


@given(steps=STEPS)
def test_seek_lands_on_the_message_or_the_next_one(scratch: stores.Scratch,
                                                   steps: list[object]) -> None:
    with scratch.begin() as txn:
        model = Model(txn, scratch).run(steps)
        for number in model.numbers():
            found = _log.seek(model.cursor, number)
            while found is not None and not found.block.messages:
                found = _log.following(model.cursor)
            expected = model.first(number)
            if expected is None:
                assert found is None
            else:
                assert found is not None
                assert found.first <= expected.number < found.first + found.block.messages
                assert found.first + found.block.messages > number
                assert found.block.time_ns == expected.time_ns


@given(steps=STEPS, data=st.data())
def test_number_at_count_is_that_of_a_linear_search(scratch: stores.Scratch, steps: list[object],
                                                    data: st.DataObject) -> None:
    with scratch.begin() as txn:
        model = Model(txn, scratch).run(steps)
        begin = data.draw(st.integers(min_value=1, max_value=model.tail.next_number))
        count = data.draw(st.integers(min_value=0, max_value=len(model.messages)))
        end = model.tail.next_number
        assert _log.number_at_count(model.cursor, begin, end, count) == next(
            (number for number in range(begin, end) if model.place(number)[0] >= count), end)


@given(steps=STEPS, data=st.data())
def test_number_at_time_is_that_of_a_linear_search(scratch: stores.Scratch, steps: list[object],
                                                   data: st.DataObject) -> None:
    with scratch.begin() as txn:
        model = Model(txn, scratch).run(steps)
        time_ns = data.draw(st.integers(min_value=90, max_value=model.now_ns + 3))
        end = model.tail.next_number
        found = _log.number_at_time(model.cursor, 1, end, time_ns)
        # Numbers without a message may lie on either side.
        assert all(message.time_ns < time_ns for message in model.messages
                   if message.number < found)
        assert all(message.time_ns >= time_ns for message in model.messages
                   if message.number >= found)


@given(steps=STEPS, audiences=st.sets(st.integers(min_value=1, max_value=3)), data=st.data())
def test_next_addressed_message_is_that_of_a_linear_search(scratch: stores.Scratch,
                                                           steps: list[object], audiences: set[int],
                                                           data: st.DataObject) -> None:
    with scratch.begin() as txn:
        model = Model(txn, scratch).run(steps)
        begin = data.draw(st.integers(min_value=1, max_value=model.tail.next_number))
        end = model.tail.next_number
        expected = model.first(begin, audiences)
        assert _log.number_addressed(
            model.cursor, begin, end,
            sorted(audiences)) == (end if expected is None else expected.number)


@given(steps=STEPS)
def test_walk_meets_every_message_once(scratch: stores.Scratch, steps: list[object]) -> None:
    with scratch.begin() as txn:
        model = Model(txn, scratch).run(steps)
        forward = [(found.first + index, found.block.audience)
                   for found in _log.list_blocks(model.cursor)
                   for index in range(found.block.messages)]
        assert forward == [(message.number, message.audience) for message in model.messages]

        backward: list[int] = []
        found = _log.last(model.cursor)
        while found is not None:
            backward.extend(reversed(range(found.first, found.first + found.block.messages)))
            found = _log.preceding(model.cursor)
        assert backward[::-1] == [message.number for message in model.messages]


@given(steps=STEPS, share=st.floats(min_value=0, max_value=1))
def test_cut_keeps_what_is_in_front(scratch: stores.Scratch, steps: list[object],
                                    share: float) -> None:
    with scratch.begin() as txn:
        model = Model(txn, scratch).run(steps)
        if not model.messages:
            return
        before = model.tail
        cut = model.messages[int(share * (len(model.messages) - 1))].number
        kept = [message for message in model.messages if message.number < cut]
        model.cut(cut)
        assert model.tail == _log.read_tail(model.cursor)
        assert model.tail.next_number == before.next_number
        assert model.tail.total_count == len(kept)
        assert model.tail.total_bytes == sum(message.size for message in kept)
        found = _log.list_blocks(model.cursor)
        assert [message.number for message in kept] == [
            block.first + index for block in found for index in range(block.block.messages)
        ]
        for block in found:
            for index in range(block.block.messages):
                message = _blocks.copy_message(block.value, block.block, index, block.first + index)
                assert len(message) == next(one.size for one in kept
                                            if one.number == block.first + index)


@given(steps=st.lists(SENDS, max_size=10),
       floors=st.lists(st.integers(min_value=1, max_value=40), min_size=3, max_size=3),
       everyone=st.integers(min_value=1, max_value=40),
       budget=st.integers(min_value=-1, max_value=12))
def test_head_is_deleted_up_to_what_is_needed(scratch: stores.Scratch, steps: list[object],
                                              floors: list[int], everyone: int,
                                              budget: int) -> None:
    with scratch.begin() as txn:
        model = Model(txn, scratch).run(steps)
        blocks = [(found.first, _blocks.end_of(found.first, found.block), found.block.audience)
                  for found in _log.list_blocks(model.cursor)]
        tail = model.tail
        expected = 0
        for _, end, audience in blocks[:-1]:
            if expected >= budget or end > ([everyone] + floors)[audience]:
                break
            expected += 1
        deleted = _log.delete_head(model.cursor, dict(enumerate(floors, start=1)), everyone, budget,
                                   NO_TIME_NS)
        assert deleted == expected
        assert [found.first for found in _log.list_blocks(model.cursor)
                ] == [first for first, _, _ in blocks[expected:]]
        assert _log.read_tail(model.cursor) == tail


def test_last_block_stays_though_nobody_needs_it(scratch: stores.Scratch) -> None:
    with scratch.begin() as txn:
        model = Model(txn, scratch).run(sends(1, 2))
        assert _log.delete_head(model.cursor, {}, everyone=100, budget=100,
                                retained_ns=NO_TIME_NS) == 1
        assert _log.read_tail(model.cursor) == model.tail


def test_head_is_deleted_though_others_are_behind_it(scratch: stores.Scratch) -> None:
    with scratch.begin() as txn:
        model = Model(txn, scratch).run(sends(1, 2, audience=1))
        assert _log.delete_head(model.cursor, {1: 100},
                                everyone=1,
                                budget=100,
                                retained_ns=NO_TIME_NS) == 1


def test_block_of_an_unknown_audience_is_kept_as_one_for_everybody(scratch: stores.Scratch) -> None:
    with scratch.begin() as txn:
        model = Model(txn, scratch).run(sends(1, 2, audience=2))
        assert _log.delete_head(model.cursor, {1: 100},
                                everyone=1,
                                budget=100,
                                retained_ns=NO_TIME_NS) == 0
        assert _log.delete_head(model.cursor, {1: 1},
                                everyone=2,
                                budget=100,
                                retained_ns=NO_TIME_NS) == 1


def test_placeholder_keeps_numbers_totals_and_time(scratch: stores.Scratch) -> None:
    with scratch.begin() as txn:
        model = Model(txn, scratch).run([Send([[1, 2], [3]], 2, 1)])
        while model.cursor.last():
            model.cursor.delete()
        _log.put_placeholder(model.cursor, model.tail)
        assert _log.read_tail(model.cursor) == model.tail
        assert [(found.first, found.block.messages)
                for found in _log.list_blocks(model.cursor)] == [(3, 0)]
        model.messages = []
        model.send(Send([[4]], 0, 1))
        assert [found.first for found in _log.list_blocks(model.cursor)] == [3, 4]


def test_generation_changes_and_nothing_else(scratch: stores.Scratch) -> None:
    with scratch.begin() as txn:
        model = Model(txn, scratch).run([Send([[1, 2], [3, 0]], 2, 1)])
        _log.change_generation(model.cursor)
        assert _log.read_tail(model.cursor) == model.tail._replace(generation=1)
        first, second = _log.list_blocks(model.cursor)
        assert first.block.generation == 0
        assert _blocks.copy_messages(second.value, second.block, 3, 0, 2) == [bytes(3), b""]


def test_generation_of_an_empty_log_stays(scratch: stores.Scratch) -> None:
    with scratch.begin() as txn:
        model = Model(txn, scratch).run([])
        _log.change_generation(model.cursor)
        assert _log.read_tail(model.cursor) == _log.EMPTY
        assert not _log.list_blocks(model.cursor)


def test_generation_begins_anew_behind_the_last_one(scratch: stores.Scratch) -> None:
    with scratch.begin() as txn:
        model = Model(txn, scratch)
        model.tail = model.tail._replace(generation=0xffffffff)
        model.send(Send([[1]], 0, 1))
        _log.change_generation(model.cursor)
        assert _log.read_tail(model.cursor).generation == 0


def test_audience_is_found_again_in_any_order(scratch: stores.Scratch) -> None:
    with scratch.begin() as txn:
        databases = scratch.databases
        assert _log.ensure_audience(txn, databases, ["b", "a"]) == 1
        assert _log.ensure_audience(txn, databases, ["b"]) == 2
        assert _log.ensure_audience(txn, databases, ["a", "b"]) == 1
        assert _log.read_audiences(txn, databases) == {1: ("a", "b"), 2: ("b", )}


def test_empty_log_has_nothing(scratch: stores.Scratch) -> None:
    with scratch.begin() as txn:
        cursor = txn.cursor(db=scratch.databases.data)
        assert _log.read_tail(cursor) == _log.EMPTY
        assert _log.EMPTY.next_number == _layout.FIRST_NUMBER
        assert (_log.seek(cursor, 1), _log.head(cursor), _log.last(cursor)) == (None, None, None)
        assert _log.place_of(cursor, 5) == _log.Place(0, 0, (), 0)
        assert _log.delete_head(cursor, {}, everyone=5, budget=5, retained_ns=NO_TIME_NS) == 0
