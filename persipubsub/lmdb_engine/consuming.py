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
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

from persipubsub.errors import ClosedError, CorruptMessageError, PersipubsubError, StoreError
from persipubsub.lmdb_engine import dead_letters, deliveries
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import positions
from persipubsub.lmdb_engine.claims import Claim, Claims, note_claim
from persipubsub.lmdb_engine.environment import Environment
from persipubsub.lmdb_engine.files import SharedPage
from persipubsub.lmdb_engine.pending import Copied, Pending
from persipubsub.message import Message, text_of

#: A waiting consumer looks at the queue again after this time, in seconds, even without a
#: notification: a publisher may die between its commit and its notification.
LONGEST_PAUSE_SECS: Final = 1.0

#: ... and after this time while others hold claims, which the kernel gives back without a
#: notification. After this time, it also looks again at messages that it passed over.
CLAIMED_PAUSE_SECS: Final = 0.05

ResultT = TypeVar("ResultT")

_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


class Lease:
    """Messages that one consumer holds and no other consumer gets."""

    __slots__ = ("messages", "numbers", "_consumer", "_claim", "_copied")

    def __init__(self, consumer: "Consumer", claim: Claim, copied: Copied) -> None:
        """Initialize with what was claimed."""
        self.messages = copied.messages
        self.numbers = copied.numbers  # those not yet acknowledged or given back
        self._consumer = consumer
        self._claim = claim
        self._copied = copied

    def __del__(self) -> None:
        """Give back messages of which the user's code lost hold, for example by a ``break``."""
        if self._claim.file is not None:
            with contextlib.suppress(Exception):  # the interpreter may be about to end
                self._consumer.claims.release(self._claim)

    def times_ns(self) -> list[int]:
        """Tell when the messages were sent, by the queue's clock: it never changes."""
        return self._copied.times_ns

    def details(self) -> list[Message]:
        """Tell what is known of the messages. No file is touched."""
        return self._consumer.describe(self._copied)

    def ack(self, count: int | None = None) -> None:
        """
        Acknowledge the messages for this subscriber, all at once, without a wait for the disk.

        :param count: of the first messages, if not all; the others stay claimed
        :raise ClosedError: if the queue was closed, which gave them back
        """
        claim, consumer, pending = self._claim, self._consumer, self._consumer.pending
        if claim.file is None:
            return
        numbers = self.numbers[:count]
        try:
            with consumer.ending.lock:
                if consumer.ending.is_closed:
                    raise consumer.closed_error()
                # In a forked child, the messages are with its parent.
                if claim.file is not None and not claim.file.closed:
                    consumer.position = consumer.environment.write(positions.acknowledge,
                                                                   pending.key, pending.ordinal,
                                                                   numbers, pending.now_ns(),
                                                                   makes_room=True)
            self._release(len(numbers))
        except BaseException:
            # A signal handler, too, may have raised, at any place.
            consumer.claims.release(claim)
            raise
        consumer.notify_room()

    def nack(self, error: BaseException | None = None, count: int | None = None) -> None:
        """
        Leave the messages where they were; they are delivered again, perhaps to another consumer.

        :param error: with which the user's code ended; None: the delivery does not count
        :param count: of the first messages, if not all; the others stay claimed
        """
        claim, consumer = self._claim, self._consumer
        if claim.file is None:
            return
        numbers = self.numbers[:count]
        try:
            # Record it before the claim is released, so that the next delivery counts it.
            consumer.record(claim, self._copied, numbers, error)
            self._release(len(numbers))
        except BaseException:
            consumer.claims.release(claim)
            raise
        consumer.notify_free()

    def _release(self, count: int) -> None:
        """Release the claim of the first messages, and keep the rest."""
        claim, consumer = self._claim, self._consumer
        if count == len(self.numbers):
            consumer.claims.release(claim)
            return
        self.numbers = self.numbers[count:]
        with consumer.ending.lock:
            if claim.file is not None and not claim.file.closed:
                first = self.numbers[0]
                consumer.claims.narrow(claim, first, claim.first + claim.count - first)
                note_claim(consumer.environment.page, claim, consumer.environment.process_id)


class Ending:
    """Lets a close wait for acknowledgements that are on the way, of one open queue."""

    def __init__(self) -> None:
        """Initialize as open."""
        # It keeps a close from giving a claim back while the acknowledgement is written: another
        # consumer would get the message a second time.
        self.lock = threading.RLock()
        self.is_closed = False

    def forget_parent(self) -> None:
        """Begin with a lock that no thread of the parent holds."""
        self.lock = threading.RLock()


class Consumer:  # pylint: disable=too-many-instance-attributes
    """Takes messages of one subscriber. Any thread may use it."""

    def __init__(self, environment: Environment, claims: Claims, ending: Ending, pending: Pending,
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
        self.ending = ending
        self.pending = pending
        self._expire = expire
        self._writer = writer
        self.notifies = notifies
        #: True to count each delivery before it begins.
        self.counts = pending.policy.max_deliveries > 0

        #: Where the last acknowledgement left the position; checked again before it counts.
        self.position = 0
        subscriber = environment.read(positions.require, pending.key)
        pending.ordinal = subscriber.ordinal
        # How many messages were dropped unread before the last one was taken.
        self._dropped = subscriber.dropped

    # Taking

    def take(self, timeout: float | None, poll_secs: float = LONGEST_PAUSE_SECS,
             max_messages: int = 1, is_newest: bool = False) -> Lease | None:
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
        return self._claim(number, 1)

    def try_take(self, max_messages: int = 1,
                 is_newest: bool = False) -> tuple[Lease | None, float]:
        """Take without waiting; return the seconds after which to look again, too."""
        if is_newest:
            return self._try_newest()
        number = self.position
        # The message at the position is claimed without a search, if the last search or the last
        # sender has told that it exists. Claiming a number that no message has yet would hide the
        # future message from other consumers. Only one message is claimed so: if the position has
        # moved on, claiming more would hide the messages after it from other consumers meanwhile.
        if (number and max_messages == 1 and
            (number < self.pending.end or number < self.environment.page.words[SharedPage.END])):
            self.position = 0
            lease = self._claim(number, 1, is_guess=True)
            if lease is not None:
                return lease, LONGEST_PAUSE_SECS

        if self.ending.is_closed:
            raise self.closed_error()
        held = self.claims.held[self.pending.ordinal]
        now = time.monotonic()
        if now >= held.start_until or 0 < held.retry_at_ns <= self.pending.now_ns():
            held.start, held.start_until, held.retry_at_ns = 0, now + CLAIMED_PAUSE_SECS, 0
        # ``start > 0`` means that messages before it were passed over a moment ago.
        is_claimed = bool(held.ends) or held.start > 0
        while True:
            start = held.start
            look = self.environment.read(self.pending.find, start, max_messages, held.ends)
            if look.is_expired:
                self._expire()
                continue
            if look.retry_at_ns:
                held.retry_at_ns = min(held.retry_at_ns or look.retry_at_ns, look.retry_at_ns)
            if not look.number:
                return None, self._pause(is_claimed, held.retry_at_ns)
            lease = self._claim(look.number, look.messages)
            # If ``start`` changed, a message before it was given back: keep the lower start.
            if held.start == start:
                held.start = look.number + 1
            if lease is not None:
                return lease, LONGEST_PAUSE_SECS
            # The message was claimed by another process, acknowledged, or moved away a moment ago.
            is_claimed = True

    def _try_newest(self) -> tuple[Lease | None, float]:
        """Take the newest message if it is free."""
        if self.ending.is_closed:
            raise self.closed_error()
        tried: set[int] = set()
        while True:
            newest = self.environment.read(self.pending.find_newest, tried)
            if newest.is_expired:
                self._expire()
                continue
            if not newest.number:
                return None, self._pause(False, newest.retry_at_ns)
            if self.claims.is_claimed(self.pending.ordinal, newest.number):
                return None, self._pause(True, 0)
            lease = self._claim(newest.number, 1, tried=tried)
            if lease is not None:
                self.notify_room()
                return lease, LONGEST_PAUSE_SECS
            tried.add(newest.number)

    def _pause(self, is_claimed: bool, retry_at_ns: int) -> float:
        """Choose when to look again without a notification, in seconds."""
        pause = CLAIMED_PAUSE_SECS if is_claimed else LONGEST_PAUSE_SECS
        if retry_at_ns:
            pause = min(pause, max(0, retry_at_ns - self.pending.now_ns()) / 1e9)
        return pause

    def _claim(self, number: int, count: int, is_guess: bool = False,
               tried: set[int] | None = None) -> Lease | None:
        """
        Claim messages and look at them again.

        :param is_guess: True to deliver nothing unless the position is at the first message
        :param tried: if given: claim only the newest message; the search passes over these numbers
            if their deliveries are exhausted
        """
        environment, pending, claims = self.environment, self.pending, self.claims
        claim = Claim(pending.ordinal, number, count, claims.held[pending.ordinal])
        lease = None
        try:
            if tried is not None:
                # The transaction may be run again, after the message was claimed.
                copied = self._write(deliveries.take_newest, number, tried,
                                     lambda: claim.file is not None or claims.claim(claim))
            elif not (claims.claim(claim) if count == 1 else claims.claim_prefix(claim)):
                return None
            elif self.counts:
                # Where deliveries are limited, this one is counted.
                copied = self._write(deliveries.begin_delivery, number, number + claim.count,
                                     is_guess)
            else:
                copied = environment.read(pending.copy, number, number + claim.count, is_guess)
            if copied is None or not copied.numbers:
                return None
            if copied.is_exhausted:
                self._move(self.describe(copied)[0], copied.attempts[copied.numbers[0]])
                return None
            if claim.count > 1:
                first = copied.numbers[0]
                claims.narrow(claim, first, copied.numbers[-1] + 1 - first)
            copied.dropped, self._dropped = copied.dropped - self._dropped, copied.dropped
            lease = Lease(self, claim, copied)
            note_claim(environment.page, claim, environment.process_id)
            return lease
        except CorruptMessageError as error:
            self._remove(error.number, "corrupt")
            raise CorruptMessageError(f"{error}. It was set aside.", number=error.number) from None
        except (ValueError, StoreError) as error:
            if not claims.is_closed:
                raise
            # Another thread closed the file of the claim, before or during a call for it.
            raise self.closed_error() from error
        finally:
            if lease is None:
                claims.release(claim)

    def front(self) -> bytes | None:
        """Look at the next message without taking it."""
        start = 0
        while True:
            look, message = self.environment.read(self.pending.copy_next, start)
            if look.is_expired:
                self._expire()
            elif not look.number or not self.claims.is_claimed(self.pending.ordinal, look.number):
                return message
            else:
                start = look.number + 1

    def closed_error(self) -> ClosedError:
        """Describe that the queue was closed, which gives back what is claimed."""
        return ClosedError(
            f"Expected the queue {self.environment.directory} to be open until the messages are "
            "acknowledged, but got: it was closed, which gave them back")

    # Ending a lease

    def record(self, claim: Claim, copied: Copied, numbers: list[int],
               error: BaseException | None) -> None:
        """Record how an unacknowledged delivery ended: that it failed, or that it does not count."""
        # Errors are suppressed: the message stays in the queue anyhow, and the exception of the
        # user's code matters more than the count.
        with contextlib.suppress(PersipubsubError):
            exhausted: list[int] = []
            with self.ending.lock:
                # After a close others may have the messages: this must not be taken for the end of
                # their delivery.
                if claim.file is None or claim.file.closed:
                    return
                if error is not None:
                    text = text_of(error)
                    exhausted = self._write(deliveries.fail, numbers, text)
                elif self.counts:
                    self._write(deliveries.take_back, numbers)
            # Messages are moved without the ending lock: a move may open the queue of dead letters,
            # whose locks come first (see ``locks``). If this queue is closed meanwhile, another
            # consumer may move a message, too: it is put once, and leaves once.
            for message in self.describe(copied) if exhausted else ():
                if message.number in exhausted:
                    # The message may have left while the one before it was moved.
                    record = self.environment.read(deliveries.read_pending, self.pending,
                                                   message.number)
                    if record is not None:
                        self._move(message, record)

    def _move(self, message: Message, record: fmt.Attempts) -> None:
        """Move a claimed message away that is not delivered any more."""
        if self._writer.move(self.pending.ordinal, message, record):
            self._remove(message.number, "dead_lettered")

    def _remove(self, number: int, counter: str) -> None:
        """Let a claimed message leave unread."""
        self._write(deliveries.remove, number, counter)
        self.notify_room()

    def _write(self, work: Callable[..., ResultT], *args: object) -> ResultT:
        """Run one of the functions of ``deliveries`` that write."""
        return self.environment.write(work, self.pending, *args, makes_room=True)

    def notify_room(self) -> None:
        """Wake publishers that wait for room."""
        if self.notifies:
            self.environment.notifier.notify()

    def notify_free(self) -> None:
        """Wake consumers: a message was given back. Else they look after ``CLAIMED_PAUSE_SECS``."""
        with contextlib.suppress(PersipubsubError):
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
                Message(data=data, number=number, sent_at=sent_at,
                        attempts=count if is_counted else count + 1,
                        dropped_before=0 if described else copied.dropped))
        return described
