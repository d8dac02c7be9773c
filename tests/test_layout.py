"""Test the encoding of names, keys and values."""

# pylint: disable=missing-function-docstring

import struct

import hypothesis.strategies as st
import pytest
from hypothesis import given

import persipubsub.errors
from persipubsub.store import _layout

NUMBERS = st.integers(min_value=0, max_value=_layout.MAX_NUMBER)

COUNTS = st.integers(min_value=0, max_value=(1 << 64) - 1)

ORDINALS = st.integers(min_value=0, max_value=_layout.MAX_SUBSCRIBER_ORDINAL)

HEADERS = st.builds(_layout.Header,
                    format=st.just(_layout.FORMAT),
                    flags=st.integers(min_value=0, max_value=1),
                    clock_offset_ns=st.integers(min_value=-(1 << 63), max_value=(1 << 63) - 1),
                    boot_id=st.binary(min_size=16, max_size=16),
                    next_ordinal=ORDINALS)

SUBSCRIBERS = st.builds(_layout.Subscriber, ORDINALS, st.integers(min_value=0, max_value=1),
                        *[COUNTS] * 10)

IDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1,
              max_size=60).filter(lambda text: len(text.encode("utf-8")) <= 255)


@given(numbers=st.lists(NUMBERS, max_size=20))
def test_keys_of_blocks_sort_as_their_numbers(numbers: list[int]) -> None:
    keys = [_layout.pack_number(number) for number in numbers]
    assert [_layout.unpack_number(key) for key in keys] == numbers
    assert sorted(keys) == [_layout.pack_number(number) for number in sorted(numbers)]


@given(places=st.lists(st.tuples(ORDINALS, NUMBERS), max_size=20), end=NUMBERS)
def test_keys_of_ranges_sort_by_subscriber_and_number(places: list[tuple[int, int]],
                                                      end: int) -> None:
    value = _layout.pack_ahead_value(end)
    keys = [_layout.pack_ahead_key(*place) for place in places]
    assert [_layout.unpack_ahead(key, value) for key in keys] == [(*place, end) for place in places]
    assert sorted(keys) == [_layout.pack_ahead_key(*place) for place in sorted(places)]


@given(header=HEADERS)
def test_header_is_decoded_as_it_was(header: _layout.Header) -> None:
    encoded = _layout.pack_header(header)
    assert _layout.unpack_header(encoded, "queue") == header
    assert _layout.unpack_header(memoryview(encoded), "queue") == header


@pytest.mark.parametrize("value", [
    b"", b"persipub", b"persipu\x00\x01\x00\x00\x00" + bytes(40), b"persipub\x02\x00\x00\x00" +
    bytes(32), b"persipub\x01\x00\x00\x00" + bytes(31), b"persipub\x01\x00\x00\x00" + bytes(33)
])
def test_header_of_another_format_is_refused(value: bytes) -> None:
    with pytest.raises(persipubsub.errors.FormatError, match="/the/queue"):
        _layout.unpack_header(value, "/the/queue")


@given(subscriber=SUBSCRIBERS)
def test_subscriber_is_decoded_as_it_was(subscriber: _layout.Subscriber) -> None:
    assert _layout.unpack_subscriber(_layout.pack_subscriber(subscriber)) == subscriber


@given(subscriber=SUBSCRIBERS.filter(lambda subscriber: max(subscriber) < 1 << 63),
       ordinal_differs=st.booleans(),
       before=st.sampled_from([0, 0, 0, 1]),
       steps=st.lists(st.sampled_from([1, 1, 1, 2]), max_size=5),
       time_ns=NUMBERS)
def test_acknowledgement_in_order_changes_what_it_should(subscriber: _layout.Subscriber,
                                                         ordinal_differs: bool, before: int,
                                                         steps: list[int], time_ns: int) -> None:
    numbers = [subscriber.position + before]
    for step in steps:
        numbers.append(numbers[-1] + step)
    value = memoryview(_layout.pack_subscriber(subscriber))
    changed = _layout.acknowledge_in_order(value, subscriber.ordinal + ordinal_differs, numbers,
                                           time_ns)
    if ordinal_differs or before or subscriber.flags or set(steps) - {1}:
        assert changed is None
        return
    assert changed is not None
    assert _layout.unpack_subscriber(changed) == subscriber._replace(
        position=subscriber.position + len(numbers),
        acknowledged=subscriber.acknowledged + len(numbers),
        acknowledged_ns=time_ns)


@pytest.mark.parametrize("size", [0, 24, _layout.SUBSCRIBER_BYTES + 8])
def test_record_of_another_size_is_not_acknowledged_in(size: int) -> None:
    assert _layout.acknowledge_in_order(memoryview(bytes(size)), 0, [0], 5) is None


@given(ids=st.lists(IDS, max_size=5))
def test_audience_is_decoded_in_sorted_order(ids: list[str]) -> None:
    encoded = _layout.pack_audience(ids)
    assert _layout.unpack_audience(encoded) == tuple(sorted(ids))
    assert encoded == _layout.pack_audience(sorted(ids, reverse=True))


def test_longest_id_fits_into_an_audience() -> None:
    assert _layout.unpack_audience(_layout.pack_audience(["x" * 255])) == ("x" * 255, )


def test_keys_of_meta_db_do_not_collide() -> None:
    keys = {_layout.audience_key(audience) for audience in range(1, 1 << 16)}
    assert len(keys) == (1 << 16) - 1
    assert _layout.HEADER_KEY not in keys


def test_values_have_the_sizes_of_format_1() -> None:
    # Stores on disk depend on it: a change needs another format.
    header = _layout.Header(1, 0, 0, bytes(16), 0)
    assert len(_layout.pack_header(header)) == struct.calcsize("<8sIIq16sI") == 44
    assert len(_layout.pack_ahead_key(1, 2)) == 12
    assert _layout.pack_number(1) == b"\0\0\0\0\0\0\0\1"
    assert len(_layout.pack_subscriber(_layout.Subscriber(*range(12)))) == 88
