"""
Begin deliveries that are counted, and record how those end that are not acknowledged.

Everything is inside of a transaction. This includes taking the newest message, which skips all
messages before it, and removing a message that is not delivered any more.
"""

from collections.abc import Callable, Sequence, Set

from persipubsub.lmdb_engine import attempts
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import positions
from persipubsub.lmdb_engine.format import Tx
from persipubsub.lmdb_engine.pending import Copied, Pending


def begin_delivery(tx: Tx, pending: Pending, number: int, end: int,
                   is_guess: bool = False) -> Copied:
    """Copy claimed messages, and count their delivery before it begins, so that crashes count."""
    copied = pending.copy(tx, number, end, is_guess)
    if copied.is_exhausted or not copied.numbers:
        return copied
    for found in copied.numbers:
        record = _record_of(tx, pending, found)
        copied.attempts[found] = record._replace(deliveries=record.deliveries + 1,
                                                 flags=fmt.FLAG_IS_BEGUN)
        attempts.write(tx, pending.ordinal, found, copied.attempts[found])
    subscriber = positions.require(tx, pending.key)
    if not subscriber.flags & fmt.FLAG_MAY_HAVE_ATTEMPTS:
        subscriber.flags |= fmt.FLAG_MAY_HAVE_ATTEMPTS
        positions.write(tx, subscriber)
    return copied


def _record_of(tx: Tx, pending: Pending, number: int) -> fmt.Attempts:
    """Read the record of a message, or begin one."""
    return (attempts.read(tx, pending.ordinal, number)
            or fmt.Attempts(0, 0, pending.now_ns(), 0, ""))


def take_newest(tx: Tx, pending: Pending, number: int, tried: Set[int],
                claim: Callable[[], bool]) -> Copied | None:
    """
    Claim and copy a message if it still is the newest one, and skip all messages before it.

    The message is claimed here, in the transaction. If it were claimed earlier, and given back
    because there is a newer one, other consumers would pass over it meanwhile and get it after
    later ones.
    """
    if pending.find_newest(tx, tried).number != number or not claim():
        return None
    copied = (begin_delivery(tx, pending, number, number + 1)
              if pending.policy.max_deliveries else pending.copy(tx, number, number + 1))
    if copied.numbers and not copied.is_exhausted:
        positions.skip_before(tx, pending.key, number)
    return copied


def fail(tx: Tx, pending: Pending, numbers: Sequence[int], error: str) -> list[int]:
    """Record that a delivery failed; return the messages that it exhausted."""
    exhausted: list[int] = []
    subscriber = pending.read(tx)
    if subscriber is None:
        return exhausted
    policy = pending.policy
    for number in numbers:
        if not positions.is_pending(tx, subscriber, number):
            continue
        before = _record_of(tx, pending, number)
        # With a limit, ``begin_delivery`` has counted this delivery already. Without one, a set
        # flag is left over from a time with a limit, so count now.
        is_counted = policy.max_deliveries and before.flags & fmt.FLAG_IS_BEGUN
        count = before.deliveries + (0 if is_counted else 1)
        is_exhausted = policy.is_exhausted(count)
        retry_at_ns = 0
        if policy.delay_ns and not is_exhausted:
            retry_at_ns = pending.now_ns() + policy.delay_after(count)
        # Only a dead letter shows the text, and without a limit there is none.
        text = error if policy.max_deliveries else ""
        attempts.write(tx, pending.ordinal, number,
                       fmt.Attempts(count, 0, before.since_ns, retry_at_ns, text))
        subscriber.flags |= fmt.FLAG_MAY_HAVE_ATTEMPTS
        if is_exhausted:
            exhausted.append(number)
    subscriber.failed += len(numbers)
    positions.write(tx, subscriber)
    return exhausted


def read_pending(tx: Tx, pending: Pending, number: int) -> fmt.Attempts | None:
    """Read the record of a message; None if the message left."""
    subscriber = pending.read(tx)
    if subscriber is None or not positions.is_pending(tx, subscriber, number):
        return None
    return attempts.read(tx, pending.ordinal, number)


def take_back(tx: Tx, pending: Pending, numbers: Sequence[int]) -> None:
    """Take the count of a delivery back: no consumer worked on the messages."""
    subscriber = pending.read(tx)
    if subscriber is None:
        return
    for number in numbers:
        before = attempts.read(tx, pending.ordinal, number)
        if before is None or not before.flags & fmt.FLAG_IS_BEGUN:
            continue
        if before.deliveries > 1:
            attempts.write(tx, pending.ordinal, number,
                           before._replace(deliveries=before.deliveries - 1, flags=0))
        else:
            attempts.forget(tx, pending.ordinal, number, number + 1)
    positions.write(tx, subscriber)


def remove(tx: Tx, pending: Pending, number: int, counter: str) -> None:
    """Let a claimed message leave that is damaged, or not delivered any more."""
    subscriber = pending.read(tx)
    if subscriber is not None:
        positions.leave(tx, subscriber, number, number + 1, counter)
