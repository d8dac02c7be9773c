"""Test that a check of the store finds each kind of damage."""

import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec.structs
import pytest

import persipubsub.queue
from persipubsub.lmdb_engine import attempts
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log, positions
from persipubsub.lmdb_engine.format import Tx
from tests import stores

#: All damage is done to a store with the blocks of test_sound_store_has_no_findings.
NAME = b"sub"

ATTEMPTS = fmt.Attempts(1, 0, 0, 0, "")


@pytest.fixture(name="store", scope="module")
def fixture_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
def fixture_copy(store: Path, tmp_path: Path) -> Iterator[persipubsub.queue.Queue]:
    shutil.copytree(store / "queue", tmp_path / "queue")
    with persipubsub.queue.Queue(str(tmp_path / "queue"), stores.settings()) as queue:
        yield queue


def test_sound_store_has_no_findings(copy: persipubsub.queue.Queue) -> None:
    assert copy.check() == []
    assert [len(block) for block in stores.blocks(copy) if block] == [3, 1, 1,
                                                                      1], stores.blocks(copy)


def blocks_of(tx: Tx) -> list[log.Found]:
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
    first, _, value = blocks_of(tx)[index]
    data = bytearray(value)
    offset %= len(data)
    data[offset:offset + len(changed)] = changed
    tx.txn.put(fmt.pack_number(first), bytes(data), db=tx.db.data)


def shorten_block(tx: Tx, size: int | None) -> None:
    first, _, value = blocks_of(tx)[1]
    tx.txn.put(fmt.pack_number(first), bytes(value[:size]), db=tx.db.data)


def table_of(tx: Tx, index: int) -> int:
    """Return where in a block the table of its messages begins."""
    return 40 + 8 * blocks_of(tx)[index].block.audiences


def change_subscriber(tx: Tx, **changes: int) -> None:
    positions.write(tx, msgspec.structs.replace(positions.require(tx, NAME), **changes))


def ordinal_of(tx: Tx, key: bytes = NAME) -> int:
    return positions.require(tx, key).ordinal


def end_of(tx: Tx) -> int:
    return log.read_end(tx.cursor()).next_number


def put_range(tx: Tx, begin: int, end: int) -> None:
    key = fmt.pack_ahead_key(ordinal_of(tx), begin)
    tx.txn.put(key, fmt.pack_ahead_value(end), db=tx.db.ahead)


def first_range(tx: Tx) -> int:
    return list(positions.ranges(tx, ordinal_of(tx)))[0][0]


def overlap_blocks(tx: Tx) -> None:
    bodies = fmt.encode_bodies([b"x", b"y"])
    tail = log.append(tx, log.read_end(tx.cursor()), 1, fmt.EVERYONE, bodies)
    log.append(tx, tail._replace(next_number=tail.next_number - 1), 1, fmt.EVERYONE, bodies)


def flip_message(tx: Tx) -> None:
    patch_block(tx, 0, -1, b"E")


def range_of_nobody(tx: Tx) -> None:
    tx.txn.put(fmt.pack_ahead_key(17, 2), fmt.pack_ahead_value(3), db=tx.db.ahead)


DAMAGES: dict[str, Callable[[Tx], object]] = {
    "message flipped": flip_message,
    "checksum flipped": lambda tx: patch_block(tx, 0, table_of(tx, 0) + 4, bytes(4)),
    "end flipped": lambda tx: patch_block(tx, 0, table_of(tx, 0), struct.pack("<I", 2)),
    "record flipped": lambda tx: patch_block(tx, 1, 0, b"\xff"),
    "totals of an audience flipped": lambda tx: patch_block(tx, 1, 40, b"\xff"),
    "block cut in its record": lambda tx: shorten_block(tx, 20),
    "block cut in its table": lambda tx: shorten_block(tx, table_of(tx, 1) + 4),
    "block cut in its messages": lambda tx: shorten_block(tx, -1),
    "block emptied": lambda tx: shorten_block(tx, 0),
    "block missing": lambda tx: tx.txn.delete(
        fmt.pack_number(blocks_of(tx)[1].first), db=tx.db.data),
    "block inside of another one": lambda tx: tx.txn.put(
        fmt.pack_number(blocks_of(tx)[0].first + 1), bytes(blocks_of(tx)[0].value), db=tx.db.data),
    "blocks overlap": overlap_blocks,
    "key of another kind": lambda tx: tx.txn.put(
        b"stranger", bytes(blocks_of(tx)[0].value), db=tx.db.data),
    "time went back": lambda tx: rewrite(tx, 1, time_ns=1),
    "count is wrong": lambda tx: rewrite(tx, 1, total_count=1000),
    "bytes are wrong": lambda tx: rewrite(tx, 1, total_bytes=1000),
    "audience is unknown": lambda tx: rewrite(tx, 0, audience=7),
    "audience is another one": lambda tx: rewrite(tx, 1, audience=0),
    "audience is gone": lambda tx: tx.txn.delete(fmt.audience_key(1), db=tx.db.meta),
    "audience is cut": lambda tx: tx.txn.put(fmt.audience_key(1), b"\x07s\xff", db=tx.db.meta),
    "position behind the end": lambda tx: change_subscriber(tx, position=end_of(tx) + 1),
    "position is zero": lambda tx: change_subscriber(tx, position=0),
    "ordinal of another one": lambda tx: change_subscriber(tx, ordinal=ordinal_of(tx, b"other")),
    "ordinal that was never given": lambda tx: change_subscriber(tx, ordinal=17),
    "subscriber is cut": lambda tx: tx.txn.put(NAME, b"\0" * 79, db=tx.db.subscribers),
    "subscriber is no text": lambda tx: tx.txn.put(
        b"\xff", bytes(tx.txn.get(NAME, db=tx.db.subscribers) or b""), db=tx.db.subscribers),
    "flag is missing": lambda tx: change_subscriber(tx, flags=0),
    "range in front of the position": lambda tx: change_subscriber(
        tx, position=positions.require(tx, NAME).position + 2),
    "range behind the end": lambda tx: put_range(tx, end_of(tx) + 1, end_of(tx) + 2),
    "range of nothing": lambda tx: put_range(tx, first_range(tx), first_range(tx)),
    "ranges overlap": lambda tx: put_range(tx, first_range(tx), first_range(tx) + 3),
    "range of nobody": range_of_nobody,
    "range is cut": lambda tx: tx.txn.put(
        fmt.pack_ahead_key(ordinal_of(tx), 2), b"\0", db=tx.db.ahead),
    "attempts of nobody": lambda tx: attempts.write(tx, 17, 1, ATTEMPTS),
    "attempts behind the end": lambda tx: attempts.write(
        tx, ordinal_of(tx), end_of(tx) + 1, ATTEMPTS),
    "attempts that count nothing": lambda tx: attempts.write(
        tx, ordinal_of(tx), positions.require(tx, NAME).position, ATTEMPTS._replace(deliveries=0)),
    "header is missing": lambda tx: tx.txn.delete(fmt.HEADER_KEY, db=tx.db.meta),
    "header is damaged": lambda tx: tx.txn.put(
        fmt.HEADER_KEY, b"persipub\x01\0\0\0", db=tx.db.meta),
}  # yapf: disable


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(copy: persipubsub.queue.Queue, damage: str) -> None:
    stores.write(copy, DAMAGES[damage])
    findings = copy.check()
    assert findings
    for finding in findings:
        assert finding.startswith("Expected ")


def test_findings_name_the_place(copy: persipubsub.queue.Queue) -> None:
    first = next(block[0] for block in stores.blocks(copy) if block)
    stores.write(copy, flip_message)
    finding, = copy.check()
    assert f"message {first + 2} " in finding


def test_all_damaged_messages_are_named(copy: persipubsub.queue.Queue) -> None:

    def work(tx: Tx) -> None:
        flip_message(tx)
        patch_block(tx, 1, -1, b"X")
        range_of_nobody(tx)

    stores.write(copy, work)
    assert len(copy.check()) == 3


def test_check_changes_nothing(copy: persipubsub.queue.Queue) -> None:
    before = copy.statistics()
    path = Path(copy.path) / "data.mdb"
    content = path.read_bytes()
    copy.check()
    assert path.read_bytes() == content
    assert copy.statistics().commits == before.commits


def test_counters_are_not_a_matter_of_soundness(copy: persipubsub.queue.Queue) -> None:
    counters: dict[str, int] = {"acknowledged": 5, "failed": 7, "acknowledged_ns": 0}
    stores.write(copy, lambda tx: change_subscriber(tx, **counters))
    assert copy.check() == []
