"""Test that a check of the store finds each kind of damage."""

# pylint: disable=missing-function-docstring
# pylint: disable=protected-access

import pathlib
import shutil
import struct
import typing
from collections.abc import Callable, Iterator
from typing import TypeAlias

import pytest

import persipubsub.errors
import persipubsub.queue
from persipubsub.store import _blocks, _layout, _log, _positions
from persipubsub.store._databases import Databases
from tests import stores

if typing.TYPE_CHECKING:
    import lmdb

Txn: TypeAlias = "lmdb.Transaction[memoryview]"

Damage: TypeAlias = Callable[[Txn, Databases], None]

#: All damage is done to a store with the blocks of test_sound_store_has_no_findings.
NAME = b"sub"


@pytest.fixture(name="store", scope="module")
def fixture_store(tmp_path_factory: pytest.TempPathFactory) -> persipubsub.queue.Settings:
    """Make a store with blocks of several audiences, gaps, ranges ahead and two subscribers."""
    made = stores.settings(tmp_path_factory.mktemp("sound"),
                           max_messages=8,
                           strategy=stores.pruning(True))
    persipubsub.queue.Queue.ensure(made, subscribers=["sub", "other"])
    with persipubsub.queue.Queue(made, clock=stores.Clock()) as queue:
        queue.put([b"one", b"two", b"three"])
        for message in (b"four", b"five", b"six"):
            queue.put([message], ("sub", ))
        queue.put([b"seven", b"eight"])
        # Half of the messages is dropped, numbers stay taken.
        queue.put([b"nine"])
        queue.put([b"ten"], ("other", ))
        held = [queue.consumer("sub").take(timeout=0) for _ in range(4)]
        for lease in held[1::2]:
            assert lease is not None
            lease.acknowledge()
        assert queue.check() == []
        assert len(stores.ranges(queue)) == 2
    return made


@pytest.fixture(name="copy")
def fixture_copy(store: persipubsub.queue.Settings,
                 tmp_path: pathlib.Path) -> Iterator[persipubsub.queue.Queue]:
    """Open a copy of the store that may be damaged."""
    path = tmp_path / "queue"
    shutil.copytree(store.path, path)
    with persipubsub.queue.Queue(store._replace(path=str(path))) as queue:
        yield queue


def test_sound_store_has_no_findings(copy: persipubsub.queue.Queue) -> None:
    assert copy.check() == []
    assert [len(block) for block in stores.blocks(copy) if block] == [3, 1, 1,
                                                                      1], stores.blocks(copy)


def blocks_of(txn: Txn, databases: Databases) -> list[_log.Found]:
    """List the blocks with messages."""
    return [
        found for found in _log.list_blocks(txn.cursor(db=databases.data)) if found.block.messages
    ]


def rewrite(txn: Txn, databases: Databases, index: int, **changes: int) -> None:
    """Change the record of a block, with a checksum that is right."""
    first, block, value = blocks_of(txn, databases)[index]
    fields = block._asdict()
    fields["count"] = fields.pop("messages")
    for name in ("audiences", "crc"):
        del fields[name]
    fields.update(changes)
    record = _blocks.pack_block(totals=_blocks.unpack_totals(value, block), **fields)
    txn.put(_layout.pack_number(first), record + bytes(value[len(record):]), db=databases.data)


def patch_block(txn: Txn, databases: Databases, index: int, offset: int, changed: bytes) -> None:
    """Overwrite bytes of a block."""
    first, _, value = blocks_of(txn, databases)[index]
    data = bytearray(value)
    offset %= len(data)
    data[offset:offset + len(changed)] = changed
    txn.put(_layout.pack_number(first), bytes(data), db=databases.data)


def change_subscriber(txn: Txn, databases: Databases, **changes: int) -> None:
    subscriber = _positions.require(txn, databases, NAME)
    _positions.write(txn, databases, NAME, subscriber._replace(**changes))


def ordinal_of(txn: Txn, databases: Databases, key: bytes = NAME) -> int:
    return _positions.require(txn, databases, key).ordinal


def put_range(txn: Txn, databases: Databases, begin: int, end: int) -> None:
    key = _layout.pack_ahead_key(ordinal_of(txn, databases), begin)
    txn.put(key, _layout.pack_ahead_value(end), db=databases.ahead)


def message_flipped(txn: Txn, databases: Databases) -> None:
    patch_block(txn, databases, 0, -1, b"E")


def checksum_flipped(txn: Txn, databases: Databases) -> None:
    first = 40 + 8 * blocks_of(txn, databases)[0].block.audiences
    patch_block(txn, databases, 0, first + 4, b"\0\0\0\0")


def end_flipped(txn: Txn, databases: Databases) -> None:
    first = 40 + 8 * blocks_of(txn, databases)[0].block.audiences
    patch_block(txn, databases, 0, first, struct.pack("<I", 2))


def record_flipped(txn: Txn, databases: Databases) -> None:
    patch_block(txn, databases, 1, 0, b"\xff")


def totals_of_audience_flipped(txn: Txn, databases: Databases) -> None:
    patch_block(txn, databases, 1, 40, b"\xff")


def block_shortened_in_record(txn: Txn, databases: Databases) -> None:
    first, _, value = blocks_of(txn, databases)[1]
    txn.put(_layout.pack_number(first), bytes(value[:20]), db=databases.data)


def block_shortened_in_table(txn: Txn, databases: Databases) -> None:
    first, block, value = blocks_of(txn, databases)[1]
    txn.put(_layout.pack_number(first),
            bytes(value[:40 + 8 * block.audiences + 4]),
            db=databases.data)


def block_shortened_in_messages(txn: Txn, databases: Databases) -> None:
    first, _, value = blocks_of(txn, databases)[1]
    txn.put(_layout.pack_number(first), bytes(value[:-1]), db=databases.data)


def block_emptied(txn: Txn, databases: Databases) -> None:
    first, _, _ = blocks_of(txn, databases)[1]
    txn.put(_layout.pack_number(first), b"", db=databases.data)


def block_missing(txn: Txn, databases: Databases) -> None:
    first, _, _ = blocks_of(txn, databases)[1]
    txn.delete(_layout.pack_number(first), db=databases.data)


def block_inside_another(txn: Txn, databases: Databases) -> None:
    first, _, value = blocks_of(txn, databases)[0]
    txn.put(_layout.pack_number(first + 1), bytes(value), db=databases.data)


def block_overlaps(txn: Txn, databases: Databases) -> None:
    cursor = txn.cursor(db=databases.data)
    batches = _blocks.encode_batches([b"x", b"y"])
    tail = _log.append(txn, databases, _log.read_tail(cursor), 1, _layout.EVERYONE, batches)
    _log.append(txn, databases, tail._replace(next_number=tail.next_number - 1), 1,
                _layout.EVERYONE, batches)


def key_of_another_kind(txn: Txn, databases: Databases) -> None:
    _, _, value = blocks_of(txn, databases)[0]
    txn.put(b"stranger", bytes(value), db=databases.data)


def time_went_back(txn: Txn, databases: Databases) -> None:
    rewrite(txn, databases, 1, time_ns=1)


def count_is_wrong(txn: Txn, databases: Databases) -> None:
    rewrite(txn, databases, 1, total_count=1000)


def bytes_are_wrong(txn: Txn, databases: Databases) -> None:
    rewrite(txn, databases, 1, total_bytes=1000)


def audience_is_unknown(txn: Txn, databases: Databases) -> None:
    rewrite(txn, databases, 0, audience=7)


def audience_is_another(txn: Txn, databases: Databases) -> None:
    rewrite(txn, databases, 1, audience=0)


def audience_is_gone(txn: Txn, databases: Databases) -> None:
    txn.delete(_layout.audience_key(1), db=databases.meta)


def audience_is_cut(txn: Txn, databases: Databases) -> None:
    txn.put(_layout.audience_key(1), b"\x07s\xff", db=databases.meta)


def position_behind_the_end(txn: Txn, databases: Databases) -> None:
    tail = _log.read_tail(txn.cursor(db=databases.data))
    change_subscriber(txn, databases, position=tail.next_number + 1)


def position_zero(txn: Txn, databases: Databases) -> None:
    change_subscriber(txn, databases, position=0)


def ordinal_of_another(txn: Txn, databases: Databases) -> None:
    change_subscriber(txn, databases, ordinal=ordinal_of(txn, databases, b"other"))


def ordinal_never_given(txn: Txn, databases: Databases) -> None:
    change_subscriber(txn, databases, ordinal=17)


def subscriber_cut(txn: Txn, databases: Databases) -> None:
    txn.put(NAME, b"\0" * 79, db=databases.pending)


def subscriber_of_no_text(txn: Txn, databases: Databases) -> None:
    value = txn.get(NAME, db=databases.pending)
    txn.put(b"\xff", bytes(value or b""), db=databases.pending)


def flag_missing(txn: Txn, databases: Databases) -> None:
    change_subscriber(txn, databases, flags=0)


def range_in_front_of_the_position(txn: Txn, databases: Databases) -> None:
    change_subscriber(txn,
                      databases,
                      position=_positions.require(txn, databases, NAME).position + 2)


def range_behind_the_end(txn: Txn, databases: Databases) -> None:
    tail = _log.read_tail(txn.cursor(db=databases.data))
    put_range(txn, databases, tail.next_number + 1, tail.next_number + 2)


def range_of_nothing(txn: Txn, databases: Databases) -> None:
    begin, _ = list(_positions.ranges(txn, databases, ordinal_of(txn, databases)))[0]
    put_range(txn, databases, begin, begin)


def ranges_overlap(txn: Txn, databases: Databases) -> None:
    begin, _ = list(_positions.ranges(txn, databases, ordinal_of(txn, databases)))[0]
    put_range(txn, databases, begin, begin + 3)


def range_of_nobody(txn: Txn, databases: Databases) -> None:
    txn.put(_layout.pack_ahead_key(17, 2), _layout.pack_ahead_value(3), db=databases.ahead)


def range_cut(txn: Txn, databases: Databases) -> None:
    txn.put(_layout.pack_ahead_key(ordinal_of(txn, databases), 2), b"\0", db=databases.ahead)


def header_missing(txn: Txn, databases: Databases) -> None:
    txn.delete(_layout.HEADER_KEY, db=databases.meta)


def header_damaged(txn: Txn, databases: Databases) -> None:
    txn.put(_layout.HEADER_KEY, b"persipub\x01\0\0\0", db=databases.meta)


DAMAGES: list[Damage] = [
    message_flipped, checksum_flipped, end_flipped, record_flipped, totals_of_audience_flipped,
    block_shortened_in_record, block_shortened_in_table, block_shortened_in_messages, block_emptied,
    block_missing, block_inside_another, block_overlaps, key_of_another_kind, time_went_back,
    count_is_wrong, bytes_are_wrong, audience_is_unknown, audience_is_another, audience_is_gone,
    audience_is_cut, position_behind_the_end, position_zero, ordinal_of_another,
    ordinal_never_given, subscriber_cut, subscriber_of_no_text, flag_missing,
    range_in_front_of_the_position, range_behind_the_end, range_of_nothing, ranges_overlap,
    range_of_nobody, range_cut, header_missing, header_damaged
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: str(damage.__name__))
def test_damage_is_found(copy: persipubsub.queue.Queue, damage: Damage) -> None:
    copy._environment.write(damage)
    findings = copy.check()
    assert findings
    for finding in findings:
        assert finding.startswith("Expected ")


def test_findings_name_the_place(copy: persipubsub.queue.Queue) -> None:
    first = next(block[0] for block in stores.blocks(copy) if block)
    copy._environment.write(message_flipped)
    finding, = copy.check()
    assert f"message {first + 2} " in finding


def test_all_damaged_messages_are_named(copy: persipubsub.queue.Queue) -> None:

    def work(txn: Txn, databases: Databases) -> None:
        message_flipped(txn, databases)
        patch_block(txn, databases, 1, -1, b"X")
        range_of_nobody(txn, databases)

    copy._environment.write(work)
    assert len(copy.check()) == 3


def test_check_changes_nothing(copy: persipubsub.queue.Queue) -> None:
    before = copy.statistics()
    path = pathlib.Path(copy.settings.path) / "data.mdb"
    content = path.read_bytes()
    copy.check()
    assert path.read_bytes() == content
    assert copy.statistics().commits == before.commits


def test_closed_queue_is_not_checked(store: persipubsub.queue.Settings,
                                     tmp_path: pathlib.Path) -> None:
    shutil.copytree(store.path, tmp_path / "queue")
    queue = persipubsub.queue.Queue(store._replace(path=str(tmp_path / "queue")))
    queue.close()
    with pytest.raises(persipubsub.errors.ClosedError):
        queue.check()


def test_counters_are_not_a_matter_of_soundness(copy: persipubsub.queue.Queue) -> None:
    counters: dict[str, int] = {"acknowledged": 5, "failed": 7, "acknowledged_ns": 0}
    copy._environment.write(lambda txn, databases: change_subscriber(txn, databases, **counters))
    assert copy.check() == []
