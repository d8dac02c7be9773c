"""Test the encoding of blocks of messages."""

# pylint: disable=missing-function-docstring

import itertools
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

import persipubsub.errors
from persipubsub.store import _blocks

MESSAGES = st.lists(st.binary(max_size=40), min_size=1, max_size=8)

TOTALS = st.lists(st.integers(min_value=0, max_value=(1 << 64) - 1), max_size=4)

FIRST = 77


class Made(NamedTuple):
    """Hold an encoded block."""

    value: memoryview
    block: _blocks.Block


def make(messages: list[bytes], totals: tuple[int, ...] = (), **changes: int) -> Made:
    """Encode a block with the messages."""
    body = b""
    if messages:
        batch, = _blocks.encode_batches(messages)
        body = batch.body
    fields = {
        "time_ns": 5,
        "total_count": 100,
        "total_bytes": 1000,
        "count": len(messages),
        "audience": 0,
        "generation": 3
    }
    fields.update(changes)
    value = memoryview(_blocks.pack_block(totals=totals, **fields) + body)
    return Made(value, _blocks.unpack_block(value, FIRST))


@given(messages=MESSAGES,
       totals=TOTALS,
       time_ns=st.integers(min_value=0, max_value=(1 << 64) - 1),
       audience=st.integers(min_value=0, max_value=0xffff),
       generation=st.integers(min_value=0, max_value=0xffffffff))
def test_block_is_decoded_as_it_was(messages: list[bytes], totals: list[int], time_ns: int,
                                    audience: int, generation: int) -> None:
    value, block = make(messages,
                        tuple(totals),
                        time_ns=time_ns,
                        audience=audience,
                        generation=generation)
    assert (block.time_ns, block.audience, block.generation) == (time_ns, audience, generation)
    assert (block.messages, block.total_count, block.total_bytes) == (len(messages), 100, 1000)
    assert _blocks.unpack_totals(value, block) == tuple(totals)
    assert _blocks.end_of(FIRST, block) == FIRST + len(messages)
    sizes = [0, *itertools.accumulate(map(len, messages))]
    for index, message in enumerate(messages):
        assert _blocks.copy_message(value, block, index, FIRST + index) == message
    assert [_blocks.size_before(value, block, index) for index in range(len(messages) + 1)] == sizes


@given(messages=MESSAGES, totals=TOTALS, data=st.data())
def test_run_of_messages_is_copied(messages: list[bytes], totals: list[int],
                                   data: st.DataObject) -> None:
    value, block = make(messages, tuple(totals))
    begin = data.draw(st.integers(min_value=0, max_value=len(messages) - 1))
    stop = data.draw(st.integers(min_value=begin + 1, max_value=len(messages)))
    assert _blocks.copy_messages(value, block, FIRST, begin, stop) == messages[begin:stop]


@given(messages=MESSAGES, totals=TOTALS, data=st.data())
def test_block_is_cut_behind_any_message(messages: list[bytes], totals: list[int],
                                         data: st.DataObject) -> None:
    value, block = make(messages, tuple(totals))
    count = data.draw(st.integers(min_value=1, max_value=len(messages)))
    batch = _blocks.truncate_body(value, block, count)
    expected, = _blocks.encode_batches(messages[:count])
    assert batch == expected


def test_placeholder_takes_one_number() -> None:
    _, block = make([])
    assert block.messages == 0
    assert _blocks.end_of(FIRST, block) == FIRST + 1


@given(messages=MESSAGES, totals=TOTALS, data=st.data())
def test_no_flipped_bit_of_a_record_is_overlooked(messages: list[bytes], totals: list[int],
                                                  data: st.DataObject) -> None:
    value, block = make(messages, tuple(totals))
    record = 40 + 8 * len(totals)
    place = data.draw(st.integers(min_value=0, max_value=8 * record - 1))
    damaged = bytearray(value)
    damaged[place // 8] ^= 1 << place % 8
    with pytest.raises(persipubsub.errors.StoreCorruptError, match="message 77"):
        _blocks.unpack_block(memoryview(damaged), FIRST)
    assert block.audiences == len(totals)


@given(messages=MESSAGES, data=st.data())
def test_no_flipped_bit_of_a_message_is_overlooked(messages: list[bytes],
                                                   data: st.DataObject) -> None:
    value, block = make(messages)
    begin = 40 + _blocks.ENTRY_BYTES * len(messages)
    if begin == len(value):
        return
    place = data.draw(st.integers(min_value=8 * begin, max_value=8 * len(value) - 1))
    damaged = bytearray(value)
    damaged[place // 8] ^= 1 << place % 8
    ends = list(itertools.accumulate(map(len, messages)))
    index = next(index for index, end in enumerate(ends) if place // 8 < begin + end)
    for other, message in enumerate(messages):
        if other != index:
            assert _blocks.copy_message(memoryview(damaged), block, other, FIRST + other) == message
    with pytest.raises(persipubsub.errors.CorruptMessageError) as single:
        _blocks.copy_message(memoryview(damaged), block, index, FIRST + index)
    with pytest.raises(persipubsub.errors.CorruptMessageError) as many:
        _blocks.copy_messages(memoryview(damaged), block, FIRST, 0, len(messages))
    assert single.value.number == many.value.number == FIRST + index
    assert str(FIRST + index) in str(single.value)


@given(messages=st.lists(st.binary(max_size=40), max_size=3),
       totals=TOTALS,
       time_ns=st.integers(min_value=0, max_value=(1 << 64) - 1),
       audience=st.integers(min_value=0, max_value=0xffff))
@example(messages=[b"for some"], totals=[], time_ns=5, audience=1)
def test_only_message_of_a_block_is_copied(messages: list[bytes], totals: list[int], time_ns: int,
                                           audience: int) -> None:
    value = make(messages, tuple(totals), time_ns=time_ns, audience=audience).value
    is_single = len(messages) == 1 and not totals and not audience
    assert _blocks.copy_single(value) == ((time_ns, messages[0]) if is_single else None)


@given(message=st.binary(max_size=40), data=st.data())
def test_no_flipped_bit_of_an_only_message_is_overlooked(message: bytes,
                                                         data: st.DataObject) -> None:
    value = make([message]).value
    place = data.draw(st.integers(min_value=0, max_value=8 * len(value) - 1))
    damaged = bytearray(value)
    damaged[place // 8] ^= 1 << place % 8
    # That the message ends behind the block may be overlooked: nothing is lost by it.
    assert _blocks.copy_single(memoryview(damaged)) in (None, (5, message))
    if not 8 * 40 <= place < 8 * 44:
        assert _blocks.copy_single(memoryview(damaged)) is None


@given(message=st.binary(max_size=40), data=st.data())
def test_only_message_of_a_shortened_block_is_not_copied(message: bytes,
                                                         data: st.DataObject) -> None:
    value = make([message]).value
    size = data.draw(st.integers(min_value=0, max_value=len(value) - 1))
    assert _blocks.copy_single(value[:size]) is None


@given(messages=MESSAGES, data=st.data())
def test_damaged_table_gives_no_wrong_message(messages: list[bytes], data: st.DataObject) -> None:
    value, block = make(messages)
    place = data.draw(
        st.integers(min_value=8 * 40, max_value=8 * (40 + _blocks.ENTRY_BYTES * len(messages)) - 1))
    damaged = bytearray(value)
    damaged[place // 8] ^= 1 << place % 8
    # That the last message ends behind the block may be overlooked: nothing is lost by it.
    for index, message in enumerate(messages):
        try:
            copied = _blocks.copy_message(memoryview(damaged), block, index, FIRST + index)
        except persipubsub.errors.CorruptMessageError:
            continue
        assert copied == message
    try:
        run = _blocks.copy_messages(memoryview(damaged), block, FIRST, 0, len(messages))
    except persipubsub.errors.CorruptMessageError:
        return
    assert run == messages


@given(messages=MESSAGES, totals=TOTALS, data=st.data())
def test_shortened_block_is_refused_and_not_read_beyond(messages: list[bytes], totals: list[int],
                                                        data: st.DataObject) -> None:
    value, _ = make(messages, tuple(totals))
    length = data.draw(st.integers(min_value=0, max_value=len(value) - 1))
    shortened = value[:length]
    table_end = 40 + 8 * len(totals) + _blocks.ENTRY_BYTES * len(messages)
    if length < table_end:
        with pytest.raises(persipubsub.errors.StoreCorruptError):
            _blocks.unpack_block(shortened, FIRST)
        return
    block = _blocks.unpack_block(shortened, FIRST)
    with pytest.raises(persipubsub.errors.CorruptMessageError):
        _blocks.copy_messages(shortened, block, FIRST, 0, len(messages))


@given(messages=st.lists(st.binary(max_size=40), max_size=30), limit=st.sampled_from([8, 40, 100]))
def test_batches_keep_order_and_stay_small(messages: list[bytes], limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_blocks, "BLOCK_BYTES", limit)
        batches = _blocks.encode_batches(messages)
    found: list[bytes] = []
    for batch in batches:
        record = _blocks.pack_block(0, 0, 0, batch.messages, 0, 0, ())
        value = memoryview(record + batch.body)
        block = _blocks.unpack_block(value, 1)
        copied = _blocks.copy_messages(value, block, 1, 0, batch.messages)
        assert batch.size == sum(map(len, copied))
        assert len(batch.body) == batch.size + _blocks.ENTRY_BYTES * batch.messages
        assert len(batch.body) <= limit or batch.messages == 1
        found += copied
    assert found == messages
    # No block ends although the next one's first message would have fitted.
    ends = itertools.accumulate(batch.messages for batch in batches[:-1])
    for batch, end in zip(batches, ends):
        assert len(batch.body) + len(messages[end]) + _blocks.ENTRY_BYTES > limit
