"""
Take messages for one subscriber: find, claim, look again, deliver, acknowledge, give back.

A message is found in a read transaction, then claimed, then looked at again in another one: between
the two, another consumer of the same subscriber may have acknowledged it. Only what is claimed and
still pending is delivered. It is acknowledged in a write transaction before the claim is released,
so that no consumer can claim it in between. If a process is killed, the kernel gives its claims
back (see ``claims``).

Where deliveries are limited, the second look is a write transaction that counts the delivery before
the user's code sees the message: so the delivery to a consumer that is killed counts, too. A
message whose deliveries are exhausted is moved away, by the consumer whose delivery failed, or by
the next one that comes across it.
"""

import contextlib
import datetime
import functools
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec

from persipubsub.errors import CorruptMessageError, PersipubsubError, StoreCorruptError
from persipubsub.lmdb_engine import dead_letters, positions
from persipubsub.lmdb_engine.claims import Claim, Claims, Held, note_claim
from persipubsub.lmdb_engine.environment import Environment
from persipubsub.lmdb_engine.files import SharedPage
from persipubsub.lmdb_engine.pending import Copied, Look, Pending
from persipubsub.message import Message, text_of

#: A waiting consumer looks at the queue again after this time, in seconds, even without a
#: notification: a publisher may die between its commit and its notification.
LONGEST_PAUSE_SECS: Final = 1.0

#: While other consumers hold claims, it looks this often: the kernel gives claims back without a
#: notification. After this time, it also looks again at messages that it passed over.
CLAIMED_PAUSE_SECS: Final = 0.05

#: So often a message is found to be too old, and is dropped.
_MOST_ROUNDS: Final = 5

_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


class Lease(msgspec.Struct, eq=False):
    """Messages that one consumer holds and no other consumer gets."""

    _consumer: "Consumer"
    _claim: Claim
    copied: Copied
    messages: list[bytes]
    numbers: list[int]  #: those not yet acknowledged or given back

    def __del__(self) -> None:
        """Give back messages of which the user's code lost hold, for example by a ``break``."""
        if self._claim.file is not None:
            with contextlib.suppress(Exception):  # the interpreter may be about to end
                self._consumer.claims.release(self._claim)

    def details(self) -> list[Message]:
        """Tell what is known of the messages. No file is touched."""
        return self._consumer.describe(self.copied)

    def ack(self, count: int | None = None) -> None:
        """
        Acknowledge the messages for this subscriber, all at once, without a wait for the disk.

        :param count: of the first messages, if not all; the others stay claimed
        :raise ClosedError: if the queue was closed, which gave them back
        """
        self._end(count, self._consumer.acknowledge)

    def nack(self, error: BaseException | None = None, count: int | None = None) -> None:
        """
        Leave the messages where they were; they are delivered again, perhaps to another consumer.

        :param error: with which the user's code ended; None: the delivery does not count
        :param count: of the first messages, if not all; the others stay claimed
        """
        self._end(count, self._consumer.record, error)
        # Otherwise consumers would look after ``CLAIMED_PAUSE_SECS``.
        with contextlib.suppress(PersipubsubError):
            self._consumer.environment.notifier.notify()

    def _end(self, count: int | None, write: Callable[..., None], *args: Any) -> None:
        """Write how the delivery of the first messages ended, and then give back their claim."""
        claim, claims, numbers = self._claim, self._consumer.claims, self.numbers[:count]
        if claim.file is None:
            return  # it was given back, or belongs to the parent of this process
        rest = self.numbers[len(numbers):]
        is_kept = False
        try:
            write(numbers, *args)
            if rest:
                self.numbers = rest
                with claims.ending_lock:
                    if not claims.is_closed:
                        claims.narrow(claim, rest[0], claim.stop)
                        environment = self._consumer.environment
                        note_claim(environment.page, claim, environment.process_id)
                is_kept = True
        finally:
            # Also if a signal handler has raised, at any place.
            if not is_kept:
                claims.release(claim)


class Consumer:  # pylint: disable=too-many-instance-attributes
    """Takes messages of one subscriber. Any thread may use it."""

    def __init__(self, environment: Environment, claims: Claims, pending: Pending,
                 expire: Callable[[], int], writer: dead_letters.DeadLetterWriter,
                 notifies: bool) -> None:
        """
        Look the subscriber up.

        :param pending: searches and copies its messages
        :param expire: drops messages that are too old
        :param writer: moves messages whose deliveries are exhausted
        :param notifies: True if publishers wait for room
        """
        self.environment = environment
        self.claims = claims
        self.pending = pending
        self._expire = expire
        self._writer = writer
        self._notifies = notifies
        #: True to count each delivery before it begins.
        self.counts = pending.policy.max_deliveries > 0

        # Where the last acknowledgement left the position; checked again before it counts.
        self._position = 0
        subscriber = environment.read(positions.require, pending.key)
        pending.ordinal = subscriber.ordinal
        self._held = environment.held.setdefault(subscriber.ordinal, Held())
        # How many messages were dropped unread before the last one was taken.
        self._dropped = subscriber.dropped

    # Taking

    def take(self,
             timeout: float | None,
             poll_secs: float = LONGEST_PAUSE_SECS,
             max_messages: int = 1,
             is_newest: bool = False) -> Lease | None:
        """
        Take the next message, or several, or the newest one, skipping all older ones; or wait.

        :param is_newest: True to take the newest message and skip all older ones
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        lease, _ = self.try_take(max_messages, is_newest)
        if lease is not None or timeout == 0:
            return lease
        look = functools.partial(self.try_take, max_messages, is_newest)
        return self.environment.notifier.wait_for(look, deadline, poll_secs)

    def take_at(self, number: int) -> Lease | None:
        """Take the message of a number, without waiting."""
        return self._claim(number, number + 1)

    def try_take(self,
                 max_messages: int = 1,
                 is_newest: bool = False) -> tuple[Lease | None, float]:
        """Take without waiting; return the seconds after which to look again, too."""
        if self.claims.is_closed:
            raise self.claims.closed_error()
        if is_newest:
            return self._try_newest()
        number = self._position
        # The message at the position is claimed without a search, if the last sender has told that
        # it exists. Claiming a number that no message has yet would hide the future message from
        # other consumers. Only one message is claimed so: if the position has moved on, claiming
        # more would hide the messages after it from other consumers meanwhile.
        if number and max_messages == 1 and number < self.environment.page.words[SharedPage.END]:
            self._position = 0
            lease = self._claim(number, number + 1, is_guess=True)
            if lease is not None:
                return lease, LONGEST_PAUSE_SECS

        held = self._held
        now = time.monotonic()
        if now >= held.start_until or 0 < held.retry_at_ns <= self.pending.now_ns():
            held.start, held.start_until, held.retry_at_ns = 0, now + CLAIMED_PAUSE_SECS, 0
        # ``start > 0`` means that messages before it were passed over a moment ago.
        is_claimed = bool(held.ends) or held.start > 0
        # Each round ends the search, or ``start`` goes forward. It goes back only if another thread
        # has given a message back, which may be taken then.
        while True:
            start = held.start
            look = self._search(self.pending.find, start, max_messages, held.ends)
            if look.retry_at_ns:
                held.retry_at_ns = min(held.retry_at_ns or look.retry_at_ns, look.retry_at_ns)
            if not look.number:
                return None, self._pause(is_claimed, held.retry_at_ns)
            lease = self._claim(look.number, look.stop)
            # If ``start`` changed, a message before it was given back: keep the lower start.
            if held.start == start:
                # The next search starts after the last claimed message. Inside of the range it would
                # not see that messages are claimed: ``Held.ends`` has only first numbers as keys.
                held.start = (look.number if lease is None else lease.numbers[-1]) + 1
            if lease is not None:
                return lease, LONGEST_PAUSE_SECS
            # The message was claimed by another process, acknowledged, or moved away a moment ago.
            is_claimed = True

    def _try_newest(self) -> tuple[Lease | None, float]:
        """Take the newest message if it is free."""
        tried: set[int] = set()
        # A round that ends with nothing was too late for a message: another consumer has taken it, it
        # became too old, or it is exhausted. The next round passes over it.
        while True:
            newest = self._search(self.pending.find_newest, tried)
            if not newest.number:
                return None, self._pause(False, newest.retry_at_ns)
            if self.claims.is_claimed(self.pending.ordinal, newest.number):
                return None, self._pause(True, 0)
            lease = self._claim(newest.number, newest.stop, tried=tried)
            if lease is not None:
                self.notify_room()
                return lease, LONGEST_PAUSE_SECS

    def _search(self, find: Callable[..., Look], *args: Any) -> Look:
        """Search for a message, and drop those that are too old."""
        expired, rounds = 0, 0
        while (look := self.environment.read(find, *args)).is_expired:
            # A round drops all that is too old, and with it the message that it has found, unless the
            # log is not in the order of time. An operator may seek back to the message meanwhile, but
            # hardly several times.
            rounds = rounds + 1 if look.number == expired else 1
            if rounds > _MOST_ROUNDS:
                raise StoreCorruptError(
                    f"Expected the messages of the queue {self.environment.directory} in the order of "
                    f"their times, but got: the message {look.number} is older than one before it. "
                    "Run 'persipubsub verify', and restore a backup.")
            expired = look.number
            self._expire()
        return look

    def _pause(self, is_claimed: bool, retry_at_ns: int) -> float:
        """Choose when to look again without a notification, in seconds."""
        pause = CLAIMED_PAUSE_SECS if is_claimed else LONGEST_PAUSE_SECS
        if retry_at_ns:
            pause = min(pause, max(0, retry_at_ns - self.pending.now_ns()) / 1e9)
        return pause

    def _claim(self,
               number: int,
               stop: int,
               is_guess: bool = False,
               tried: set[int] | None = None) -> Lease | None:
        """
        Claim messages and look at them again.

        :param is_guess: True to deliver nothing unless the position is at the first message
        :param tried: if given: claim the message that is the newest one then, whatever its number;
            the search passes over these numbers if their deliveries are exhausted. The number is
            added if nothing is delivered.
        """
        environment, pending, claims = self.environment, self.pending, self.claims
        claim = Claim(pending.ordinal, number, stop, self._held)
        lease = None

        def claim_newest(newest: int) -> bool:
            # The transaction may be run again after a message was claimed: perhaps another one.
            if claim.file is not None and claim.first == newest:
                return True
            claims.release(claim)
            claim.first, claim.stop = newest, newest + 1
            return claims.claim(claim)

        try:
            if tried is not None:
                copied = environment.write(pending.begin_newest,
                                           tried,
                                           claim_newest,
                                           makes_room=True)
                number = claim.first
            elif not claims.claim(claim):
                return None
            elif self.counts:
                # Where deliveries are limited, this one is counted.
                copied = environment.write(pending.begin,
                                           number,
                                           claim.stop,
                                           is_guess,
                                           makes_room=True)
            else:
                copied = environment.read(pending.copy, number, claim.stop, is_guess)
            if copied is None:
                return None
            if not copied.numbers:
                if tried is not None:
                    tried.add(number)
                if not is_guess:
                    self._move(number)
                return None
            if claim.stop > number + 1:
                claims.narrow(claim, copied.numbers[0], copied.numbers[-1] + 1)
            copied.dropped = self._count_dropped(copied.dropped)
            lease = Lease(self, claim, copied, copied.messages, copied.numbers)
            note_claim(environment.page, claim, environment.process_id)
            return lease
        except CorruptMessageError as error:
            self._remove(error.number, "corrupt")
            raise CorruptMessageError(f"{error}. It was set aside.", number=error.number) from None
        finally:
            if lease is None:
                claims.release(claim)

    def _count_dropped(self, total: int) -> int:
        """Return how many messages were dropped since the last call, of all that ever were."""
        # Another thread that looked at the store later may have come first: then it has counted
        # them. Most calls find nothing new, and take no lock.
        if total <= self._dropped:
            return 0
        with self.claims.counting_lock:
            count = max(0, total - self._dropped)
            self._dropped += count
            return count

    def front(self) -> bytes | None:
        """Look at the next message without taking it."""
        stop = 0
        # Each look begins behind the message before.
        while (look := self._search(self.pending.find, stop, 1, {})).number:
            stop = look.stop
            if not self.claims.is_claimed(self.pending.ordinal, look.number):
                copied = self.environment.read(self.pending.copy_one, look.number)
                if copied is not None:
                    return copied.messages[0]
        return None

    # Ending a lease

    def acknowledge(self, numbers: list[int]) -> None:
        """Let claimed messages be done."""
        environment, pending = self.environment, self.pending
        with self.claims.ending_lock:
            if self.claims.is_closed:
                raise self.claims.closed_error()
            self._position = environment.write(positions.acknowledge,
                                               pending.key,
                                               pending.ordinal,
                                               numbers,
                                               pending.now_ns(),
                                               makes_room=True)
        if self._notifies:
            environment.notifier.notify()

    def record(self, numbers: list[int], error: BaseException | None) -> None:
        """Record how an unacknowledged delivery ended: that it failed, or that it does not count."""
        # Errors are suppressed: the message stays in the queue anyhow, and the exception of the
        # user's code matters more than the count.
        with contextlib.suppress(PersipubsubError):
            exhausted: list[int] = []
            with self.claims.ending_lock:
                # After a close, another consumer may work on the messages: a record written now
                # would end its delivery.
                if not self.claims.is_closed and (error is not None or self.counts):
                    text = None if error is None else text_of(error)
                    exhausted = self.environment.write(self.pending.nack,
                                                       numbers,
                                                       text,
                                                       makes_room=True)
            # Messages are moved without the ending lock: a move may open the queue of dead letters,
            # whose locks come first (see ``locks``). If this queue is closed meanwhile, another
            # consumer may move a message, too: it is put once, and leaves once.
            for number in exhausted:
                self._move(number)

    def _move(self, number: int) -> None:
        """Move a claimed message away if its deliveries are exhausted."""
        copied = self.environment.read(self.pending.copy_one, number)
        record = copied and copied.attempts.get(number)
        if (copied and record and self.pending.policy.is_exhausted(record.deliveries)
                and self._writer.move(self.pending.ordinal,
                                      self.describe(copied)[0], record)):
            self._remove(number, "dead_lettered")

    def _remove(self, number: int, counter: str) -> None:
        """Let a claimed message leave unread."""
        self.environment.write(positions.leave_one,
                               self.pending.key,
                               number,
                               counter,
                               self.pending.ordinal,
                               makes_room=True)
        self.notify_room()

    def notify_room(self) -> None:
        """Wake publishers that wait for room."""
        if self._notifies:
            self.environment.notifier.notify()

    def call_once(self, callback: Callable[[], object]) -> None:
        """Call a function when there may be a message, see ``Notifier.call_once``."""
        self.environment.notifier.call_once(callback)

    def describe(self, copied: Copied) -> list[Message]:
        """Tell what is known of messages."""
        # The times are computed from the age of messages: the wall clock may have been set.
        offset_ns = time.time_ns() - self.pending.now_ns()
        is_counted = self.pending.policy.max_deliveries > 0
        described: list[Message] = []
        for number, data, time_ns in zip(copied.numbers, copied.messages, copied.times_ns):
            record = copied.attempts.get(number)
            count = 0 if record is None else record.deliveries
            sent_at = _EPOCH + datetime.timedelta(microseconds=(time_ns + offset_ns) // 1000)
            described.append(
                Message(data=data,
                        number=number,
                        sent_at=sent_at,
                        attempts=count if is_counted else count + 1,
                        dropped_before=0 if described else copied.dropped))
        return described
