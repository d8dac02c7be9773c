"""
What became of deliveries that did not end with an acknowledgement, inside of a transaction.

Deliveries that are counted before they begin, those that failed, and messages that are not
delivered any more.
"""

import datetime
import time
from collections.abc import Callable, Sequence, Set
from typing import Final

import persipubsub.message
from persipubsub.lmdb_engine import attempts
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log, positions
from persipubsub.lmdb_engine.format import Tx
from persipubsub.lmdb_engine.pending import Candidate, Copied, Pending, find_newest, skip_before

_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def describe(copied: Copied, pending: Pending,
             dropped_before: int) -> list[persipubsub.message.Message]:
    """Tell what is known of messages. No store is touched."""
    # By their age: the queue's clock is not that of the wall, which somebody may have set.
    offset_ns = time.time_ns() - pending.now_ns()
    is_counted = pending.policy.max_deliveries > 0
    times: list[datetime.datetime] = []
    for count, time_ns in copied.runs:
        times += [_EPOCH + datetime.timedelta(microseconds=(time_ns + offset_ns) // 1000)] * count
    described = []
    for number, data, sent_at in zip(copied.numbers, copied.messages, times):
        record = copied.attempts.get(number)
        count = 0 if record is None else record.deliveries
        described.append(
            persipubsub.message.Message(data=data,
                                        number=number,
                                        sent_at=sent_at,
                                        attempts=count if is_counted else count + 1,
                                        dropped_before=dropped_before))
        dropped_before = 0
    return described


def begin_delivery(tx: Tx,
                   pending: Pending,
                   number: int,
                   end: int,
                   is_guess: bool = False) -> Copied:
    """Copy claimed messages, and count their delivery before it begins: crashes count, too."""
    copied = pending.copy(tx, number, end, is_guess)
    if copied.is_exhausted or not copied.numbers:
        return copied
    counted: dict[int, fmt.Attempts] = {}
    for found in copied.numbers:
        before = copied.attempts.get(found)
        if before is None:
            before = fmt.Attempts(0, 0, pending.now_ns(), 0, "")
        counted[found] = before._replace(deliveries=before.deliveries + 1, flags=fmt.FLAG_IS_BEGUN)
        attempts.write(tx, pending.ordinal, found, counted[found])
    _flag(tx, pending.key)
    return copied._replace(attempts=counted)


def _flag(tx: Tx, key: bytes) -> None:
    """Say that a subscriber has records of attempts."""
    subscriber = positions.require(tx, key)
    if not subscriber.flags & fmt.FLAG_MAY_HAVE_ATTEMPTS:
        positions.write(tx, key,
                        subscriber._replace(flags=subscriber.flags | fmt.FLAG_MAY_HAVE_ATTEMPTS))


def fail(tx: Tx, pending: Pending, numbers: Sequence[int], error: str) -> list[int]:
    """Record that a delivery failed."""
    subscriber = positions.read(tx, pending.key)
    if subscriber is None or subscriber.ordinal != pending.ordinal:
        return []
    exhausted: list[int] = []
    now_ns = pending.now_ns()
    flags = subscriber.flags
    for number in numbers:
        if not positions.is_pending(tx, subscriber, number):
            continue
        before = attempts.read(tx, pending.ordinal, number)
        if before is None:
            before = fmt.Attempts(0, 0, now_ns, 0, "")
        # Counted when it began, unless nothing limits the deliveries. What began when something did
        # was another delivery, of a consumer that was killed.
        is_counted = pending.policy.max_deliveries and before.flags & fmt.FLAG_IS_BEGUN
        count = before.deliveries + (0 if is_counted else 1)
        is_exhausted = pending.policy.is_exhausted(count)
        retry_at_ns = 0
        if pending.policy.delay_ns and not is_exhausted:
            retry_at_ns = now_ns + pending.policy.delay_after(count)
        # Nobody is told the text of what is delivered for ever.
        text = error if pending.policy.max_deliveries else ""
        attempts.write(tx, pending.ordinal, number,
                       fmt.Attempts(count, 0, before.since_ns, retry_at_ns, text))
        flags |= fmt.FLAG_MAY_HAVE_ATTEMPTS
        if is_exhausted:
            exhausted.append(number)
    positions.write(tx, pending.key,
                    subscriber._replace(failed=subscriber.failed + len(numbers), flags=flags))
    return exhausted


def copy_exhausted(tx: Tx, pending: Pending, number: int) -> Copied | None:
    """Copy a message whose last delivery failed, however old it is."""
    record = attempts.read(tx, pending.ordinal, number)
    if record is None:
        # The record left with the message, or with the subscriber.
        return None
    subscriber = positions.require(tx, pending.key)
    if not positions.is_pending(tx, subscriber, number):
        return None
    found = log.seek(tx.cursor(), number)
    assert found is not None, "The message was found in the same snapshot."
    message = fmt.copy_message(found.value, found.block, number - found.first, number)
    return Copied([number], [message], [(1, found.block.time_ns)], {number: record}, True, 0)


def take_back(tx: Tx, pending: Pending, numbers: Sequence[int]) -> None:
    """Take the count of a delivery back: nobody worked on the messages."""
    subscriber = positions.read(tx, pending.key)
    if subscriber is None or subscriber.ordinal != pending.ordinal:
        return
    for number in numbers:
        before = attempts.read(tx, pending.ordinal, number)
        if before is None or not before.flags & fmt.FLAG_IS_BEGUN:
            continue
        if before.deliveries > 1:
            attempts.write(tx, pending.ordinal, number,
                           before._replace(deliveries=before.deliveries - 1, flags=0))
        else:
            attempts.forget(tx, pending.ordinal, number)
    positions.write(tx, pending.key, subscriber)


def set_aside(tx: Tx, pending: Pending, begin_number: int, number: int) -> None:
    """Acknowledge a damaged message."""
    subscriber = positions.read(tx, pending.key)
    if subscriber is None or subscriber.ordinal != pending.ordinal:
        return
    attempts.forget(tx, subscriber.ordinal, number)
    start = positions.begin_of(tx, pending.key, subscriber, begin_number, number)
    moved, fresh = positions.acknowledge_range(tx, subscriber, start, number + 1)
    if fresh:
        positions.write(tx, pending.key, moved._replace(corrupt=moved.corrupt + 1))


def give_up(tx: Tx, pending: Pending, number: int) -> None:
    """Acknowledge a message that is not delivered any more."""
    subscriber = positions.read(tx, pending.key)
    if subscriber is None or subscriber.ordinal != pending.ordinal:
        return
    if not positions.is_pending(tx, subscriber, number):
        return
    attempts.forget(tx, subscriber.ordinal, number)
    # Gaps in front of it are passed: what lies behind a position counts as waiting.
    start = positions.begin_of(tx, pending.key, subscriber, subscriber.position, number)
    moved, _ = positions.acknowledge_range(tx, subscriber, start, number + 1)
    positions.write(tx, pending.key, moved._replace(dead_lettered=moved.dead_lettered + 1))


def take_newest(tx: Tx, pending: Pending, stuck: Set[int], claim: Callable[[int],
                                                                           bool]) -> Copied | None:
    """Claim and copy the newest message, and acknowledge all in front of it."""
    newest = find_newest(tx, pending, stuck)
    if not isinstance(newest, Candidate) or not claim(newest.number):
        return None
    number = newest.number
    if pending.policy.max_deliveries:
        copied = begin_delivery(tx, pending, number, number + 1)
    else:
        copied = pending.copy(tx, number, number + 1)
    if copied.is_exhausted or not copied.numbers:
        return copied
    skip_before(tx, pending.key, number)
    return copied
