"""Test that a check of the store finds each kind of damage."""

import pathlib
import shutil
import struct
from collections.abc import Callable, Iterator
from typing import TypeAlias

import pytest

import persipubsub.queue
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log, positions
from persipubsub.lmdb_engine.format import Tx
from tests import stores

Damage: TypeAlias = Callable[[Tx], None]

#: All damage is done to a store with the blocks of test_sound_store_has_no_findings.
NAME = b"sub"


@pytest.fixture(name="store", scope="module")
def fixture_store(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Make a store with blocks of several audiences, gaps, ranges ahead and two subscribers."""
    directory = tmp_path_factory.mktemp("sound")
    with stores.opened(directory, ["sub", "other"],
                       stores.Clock(),
                       max_msgs_num=10,
                       strategy=stores.PRUNE_LAST) as queue:
        queue.put([b"one", b"two", b"three"])
        for message in (b"four", b"five", b"six"):
            queue.put([message], ("sub", ))
        queue.put([b"seven", b"eight", b"eight", b"eight"])
        # Half of the messages is dropped, numbers stay taken.
        queue.put([b"nine"])
        queue.put([b"ten"], ("other", ))
        held = [queue.consumer("sub").take(timeout=0) for _ in range(4)]
        for lease in held[1::2]:
            assert lease is not None
            lease.ack()
        assert len(stores.ranges(queue)) == 2
    return directory


@pytest.fixture(name="copy")
def fixture_copy(store: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[persipubsub.queue.Queue]:
    """Open a copy of the store that may be damaged."""
    shutil.copytree(store / "queue", tmp_path / "queue")
    with persipubsub.queue.Queue(str(tmp_path / "queue"), stores.settings()) as queue:
        yield queue


def test_sound_store_has_no_findings(copy: persipubsub.queue.Queue) -> None:
    assert copy.check() == []
    assert [len(block) for block in stores.blocks(copy) if block] == [3, 1, 1,
                                                                      1], stores.blocks(copy)


def blocks_of(tx: Tx) -> list[log.Found]:
    """List the blocks with messages."""
    return [found for found in stores.list_blocks(tx.cursor()) if found.block.messages]


def rewrite(tx: Tx, index: int, **changes: int) -> None:
    """Change the record of a block, with a checksum that is right."""
    first, block, value = blocks_of(tx)[index]
    fields = block._asdict()
    fields["count"] = fields.pop("messages")
    for name in ("audiences", "crc"):
        del fields[name]
    fields.update(changes)
    record = fmt.pack_block(totals=fmt.unpack_totals(value, block), **fields)
    tx.txn.put(fmt.pack_number(first), record + bytes(value[len(record):]), db=tx.db.data)


def patch_block(tx: Tx, index: int, offset: int, changed: bytes) -> None:
    """Overwrite bytes of a block."""
    first, _, value = blocks_of(tx)[index]
    data = bytearray(value)
    offset %= len(data)
    data[offset:offset + len(changed)] = changed
    tx.txn.put(fmt.pack_number(first), bytes(data), db=tx.db.data)


def change_subscriber(tx: Tx, **changes: int) -> None:
    subscriber = positions.require(tx, NAME)
    positions.write(tx, NAME, subscriber._replace(**changes))


def ordinal_of(tx: Tx, key: bytes = NAME) -> int:
    return positions.require(tx, key).ordinal


def put_range(tx: Tx, begin: int, end: int) -> None:
    key = fmt.pack_ahead_key(ordinal_of(tx), begin)
    tx.txn.put(key, fmt.pack_ahead_value(end), db=tx.db.ahead)


def message_flipped(tx: Tx) -> None:
    patch_block(tx, 0, -1, b"E")


def checksum_flipped(tx: Tx) -> None:
    first = 40 + 8 * blocks_of(tx)[0].block.audiences
    patch_block(tx, 0, first + 4, b"\0\0\0\0")


def end_flipped(tx: Tx) -> None:
    first = 40 + 8 * blocks_of(tx)[0].block.audiences
    patch_block(tx, 0, first, struct.pack("<I", 2))


def record_flipped(tx: Tx) -> None:
    patch_block(tx, 1, 0, b"\xff")


def totals_of_audience_flipped(tx: Tx) -> None:
    patch_block(tx, 1, 40, b"\xff")


def block_shortened_in_record(tx: Tx) -> None:
    first, _, value = blocks_of(tx)[1]
    tx.txn.put(fmt.pack_number(first), bytes(value[:20]), db=tx.db.data)


def block_shortened_in_table(tx: Tx) -> None:
    first, block, value = blocks_of(tx)[1]
    tx.txn.put(fmt.pack_number(first), bytes(value[:40 + 8 * block.audiences + 4]), db=tx.db.data)


def block_shortened_in_messages(tx: Tx) -> None:
    first, _, value = blocks_of(tx)[1]
    tx.txn.put(fmt.pack_number(first), bytes(value[:-1]), db=tx.db.data)


def block_emptied(tx: Tx) -> None:
    first, _, _ = blocks_of(tx)[1]
    tx.txn.put(fmt.pack_number(first), b"", db=tx.db.data)


def block_missing(tx: Tx) -> None:
    first, _, _ = blocks_of(tx)[1]
    tx.txn.delete(fmt.pack_number(first), db=tx.db.data)


def block_inside_another(tx: Tx) -> None:
    first, _, value = blocks_of(tx)[0]
    tx.txn.put(fmt.pack_number(first + 1), bytes(value), db=tx.db.data)


def block_overlaps(tx: Tx) -> None:
    cursor = tx.cursor()
    batches = fmt.encode_batches([b"x", b"y"])
    tail = log.append(tx, log.read_end(cursor), 1, fmt.EVERYONE, batches)
    log.append(tx, tail._replace(next_number=tail.next_number - 1), 1, fmt.EVERYONE, batches)


def key_of_another_kind(tx: Tx) -> None:
    _, _, value = blocks_of(tx)[0]
    tx.txn.put(b"stranger", bytes(value), db=tx.db.data)


def time_went_back(tx: Tx) -> None:
    rewrite(tx, 1, time_ns=1)


def count_is_wrong(tx: Tx) -> None:
    rewrite(tx, 1, total_count=1000)


def bytes_are_wrong(tx: Tx) -> None:
    rewrite(tx, 1, total_bytes=1000)


def audience_is_unknown(tx: Tx) -> None:
    rewrite(tx, 0, audience=7)


def audience_is_another(tx: Tx) -> None:
    rewrite(tx, 1, audience=0)


def audience_is_gone(tx: Tx) -> None:
    tx.txn.delete(fmt.audience_key(1), db=tx.db.meta)


def audience_is_cut(tx: Tx) -> None:
    tx.txn.put(fmt.audience_key(1), b"\x07s\xff", db=tx.db.meta)


def position_behind_the_end(tx: Tx) -> None:
    tail = log.read_end(tx.cursor())
    change_subscriber(tx, position=tail.next_number + 1)


def position_zero(tx: Tx) -> None:
    change_subscriber(tx, position=0)


def ordinal_of_another(tx: Tx) -> None:
    change_subscriber(tx, ordinal=ordinal_of(tx, b"other"))


def ordinal_never_given(tx: Tx) -> None:
    change_subscriber(tx, ordinal=17)


def subscriber_cut(tx: Tx) -> None:
    tx.txn.put(NAME, b"\0" * 79, db=tx.db.pending)


def subscriber_of_no_text(tx: Tx) -> None:
    value = tx.txn.get(NAME, db=tx.db.pending)
    tx.txn.put(b"\xff", bytes(value or b""), db=tx.db.pending)


def flag_missing(tx: Tx) -> None:
    change_subscriber(tx, flags=0)


def range_in_front_of_the_position(tx: Tx) -> None:
    change_subscriber(tx, position=positions.require(tx, NAME).position + 2)


def range_behind_the_end(tx: Tx) -> None:
    tail = log.read_end(tx.cursor())
    put_range(tx, tail.next_number + 1, tail.next_number + 2)


def range_of_nothing(tx: Tx) -> None:
    begin, _ = list(positions.ranges(tx, ordinal_of(tx)))[0]
    put_range(tx, begin, begin)


def ranges_overlap(tx: Tx) -> None:
    begin, _ = list(positions.ranges(tx, ordinal_of(tx)))[0]
    put_range(tx, begin, begin + 3)


def range_of_nobody(tx: Tx) -> None:
    tx.txn.put(fmt.pack_ahead_key(17, 2), fmt.pack_ahead_value(3), db=tx.db.ahead)


def range_cut(tx: Tx) -> None:
    tx.txn.put(fmt.pack_ahead_key(ordinal_of(tx), 2), b"\0", db=tx.db.ahead)


def header_missing(tx: Tx) -> None:
    tx.txn.delete(fmt.HEADER_KEY, db=tx.db.meta)


def header_damaged(tx: Tx) -> None:
    tx.txn.put(fmt.HEADER_KEY, b"persipub\x01\0\0\0", db=tx.db.meta)


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
    stores.write(copy, damage)
    findings = copy.check()
    assert findings
    for finding in findings:
        assert finding.startswith("Expected ")


def test_findings_name_the_place(copy: persipubsub.queue.Queue) -> None:
    first = next(block[0] for block in stores.blocks(copy) if block)
    stores.write(copy, message_flipped)
    finding, = copy.check()
    assert f"message {first + 2} " in finding


def test_all_damaged_messages_are_named(copy: persipubsub.queue.Queue) -> None:

    def work(tx: Tx) -> None:
        message_flipped(tx)
        patch_block(tx, 1, -1, b"X")
        range_of_nobody(tx)

    stores.write(copy, work)
    assert len(copy.check()) == 3


def test_check_changes_nothing(copy: persipubsub.queue.Queue) -> None:
    before = copy.statistics()
    path = pathlib.Path(copy.path) / "data.mdb"
    content = path.read_bytes()
    copy.check()
    assert path.read_bytes() == content
    assert copy.statistics().commits == before.commits


def test_counters_are_not_a_matter_of_soundness(copy: persipubsub.queue.Queue) -> None:
    counters: dict[str, int] = {"acknowledged": 5, "failed": 7, "acknowledged_ns": 0}
    stores.write(copy, lambda tx: change_subscriber(tx, **counters))
    assert copy.check() == []
