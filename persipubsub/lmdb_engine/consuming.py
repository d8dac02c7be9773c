"""
Take messages for one subscriber: find, claim, look again, deliver, acknowledge, give back.

A message is found in a read transaction, then claimed, then looked at again in another one: between
the two, another consumer of the same subscriber may have acknowledged it. Only what is claimed and
still pending is delivered. It is acknowledged in a write transaction before the claim is released, so
that nobody can claim it in between.

Where deliveries are limited, the second look is a write transaction that counts the delivery before
the user's code sees the message: a consumer that is killed counts, too. A message whose deliveries
are exhausted is moved away, by the consumer whose delivery failed, or by the next that comes across it.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Final

import persipubsub.errors
from persipubsub.lmdb_engine import dead_letters, deliveries, locks, pending, positions
from persipubsub.lmdb_engine.environment import Environment
from persipubsub.lmdb_engine.format import Tx
from persipubsub.lmdb_engine.notifier import Listener
from persipubsub.message import Message

#: A waiting consumer looks at the queue this often whatever happens, in seconds: a publisher may die
#: between its commit and its notification.
LONGEST_PAUSE_SECS: Final = 1.0

#: ... and this often while others hold claims, which the kernel gives back without a notification.
#: Messages passed over are looked at again as often.
CLAIMED_PAUSE_SECS: Final = 0.05


class Lease:
    """Messages that one consumer holds and nobody else gets."""

    __slots__ = ("messages", "numbers", "_consumer", "_begin", "_claim", "_copied",
                 "_dropped_before")

    def __init__(self, consumer: "Consumer", claim: locks.Claim, begin: int, copied: pending.Copied,
                 dropped_before: int) -> None:
        """Initialize with what was claimed."""
        self.messages = copied.messages
        self.numbers = copied.numbers
        self._consumer = consumer
        self._begin = begin
        self._claim: locks.Claim | None = claim
        self._copied = copied
        self._dropped_before = dropped_before

    def __del__(self) -> None:
        """Give back what was dropped, as by a ``break``, without a word of how it ended."""
        claim, self._claim = self._claim, None
        if claim is not None:
            with contextlib.suppress(Exception):  # the interpreter may be about to end
                self._consumer.release(claim)

    def times_ns(self) -> list[int]:
        """Tell when the messages were sent, by the queue's clock: always the same of a message."""
        return [time_ns for count, time_ns in self._copied.runs for _ in range(count)]

    def details(self) -> list[Message]:
        """Tell what is known of the messages. No file is touched."""
        return self._consumer.describe(self._copied, self._dropped_before)

    def split(self, count: int) -> "Lease":
        """Take the first messages out, as a lease of their own."""
        assert self._claim is not None and 0 < count < len(self.numbers)
        behind = self.numbers[count]
        first, rest = _split(self._copied, count)
        lease = Lease(self._consumer,
                      self._consumer.claims.split(self._claim, behind - self._claim.first),
                      self._begin, first, self._dropped_before)
        self._begin, self._copied, self._dropped_before = behind, rest, 0
        self.messages, self.numbers = rest.messages, rest.numbers
        return lease

    def ack(self) -> None:
        """
        Let the messages leave the queue for this subscriber, all at once. It never waits for the disk.

        :raise ClosedError: if the queue was closed, which gave them back
        """
        claim = self._claim
        if claim is not None:
            try:
                self._consumer.ack(claim, self._begin, self.numbers)
            except BaseException:
                # A signal handler may have raised in front of all that it does.
                self._consumer.release(claim)
                raise
            finally:
                self._claim = None

    def nack(self, error: BaseException | None = None) -> None:
        """
        Leave the messages where they were; they are delivered again, perhaps to another consumer.

        :param error: with which the user's code ended; None: the delivery does not count
        """
        claim = self._claim
        if claim is not None:
            try:
                self._consumer.nack(claim, self._copied, error)
            except BaseException:
                self._consumer.release(claim)
                raise
            finally:
                self._claim = None


def _split(copied: pending.Copied, count: int) -> tuple[pending.Copied, pending.Copied]:
    """Split messages that were copied."""
    first: list[tuple[int, int]] = []
    rest: list[tuple[int, int]] = []
    left = count
    for number, time_ns in copied.runs:
        taken = min(left, number)
        left -= taken
        if taken:
            first.append((taken, time_ns))
        if number > taken:
            rest.append((number - taken, time_ns))
    return (copied._replace(numbers=copied.numbers[:count],
                            messages=copied.messages[:count],
                            runs=first),
            copied._replace(numbers=copied.numbers[count:],
                            messages=copied.messages[count:],
                            runs=rest))


class Ending:
    """Lets a close wait for acknowledgements that are on the way, of one open queue."""

    def __init__(self) -> None:
        """Initialize as open."""
        # Keeps a close from giving a claim back while its acknowledgement is written: another
        # consumer would get the message a second time.
        self.lock = threading.RLock()
        self.is_closed = False

    def forget_parent(self) -> None:
        """Begin with a lock that no thread of the parent holds."""
        self.lock = threading.RLock()


#: Result of a look: what was taken, whether messages that others have claimed were passed over,
#: when the first failed one may be delivered again, on the queue's clock.
_Taken = tuple[Lease | None, bool, int]


class Consumer:  # pylint: disable=too-many-instance-attributes
    """Takes messages of one subscriber. Any thread may use it."""

    def __init__(self, environment: Environment, claims: locks.Claims, ending: Ending,
                 looks: pending.Pending, expire: Callable[[], int],
                 writer: dead_letters.DeadLetterWriter, notifies: bool) -> None:
        """
        Look the subscriber up.

        :param looks: at its messages
        :param expire: drops what is too old
        :param writer: moves what is exhausted
        :param notifies: True if publishers wait for room
        """
        self._environment = environment
        self.claims = claims
        self._ending = ending
        self._looks = looks
        self._expire = expire
        self._writer = writer
        self._notifies = notifies
        #: True to count each delivery before it begins.
        self.counts = looks.policy.max_deliveries > 0

        # Where the last acknowledgement left the position; checked again before it counts.
        self._next = 0
        record = environment.read(positions.require, looks.key)
        looks.ordinal = record.ordinal
        self._dropped = record.dropped_by_timeout + record.dropped_by_mark

    # Taking

    def take(self,
             timeout: float | None,
             poll_secs: float = LONGEST_PAUSE_SECS,
             max_messages: int = 1,
             is_newest: bool = False) -> Lease | None:
        """
        Take the next message, or several, or the newest one, skipping all older ones; or wait.

        :param timeout: seconds to wait at most; None: for ever
        :param poll_secs: look at the queue at least that often
        """
        lease = (self._take_newest() if is_newest else self._take(max_messages))[0]
        if lease is not None or (timeout is not None and timeout <= 0):
            return lease
        return self._wait(max_messages, is_newest, timeout, poll_secs)

    def take_at(self, number: int) -> Lease | None:
        """Take one certain message, whatever else is there. It does not wait."""
        return self._claim(0, number, 1)

    def try_take(self,
                 max_messages: int = 1,
                 is_newest: bool = False) -> tuple[Lease | None, float]:
        """Take without waiting; return the seconds after which to look again, too."""
        lease, is_claimed, retry_at_ns = (self._take_newest()
                                          if is_newest else self._take(max_messages))
        return lease, self._pause(is_claimed, retry_at_ns)

    def listen(self, callback: Callable[[], object]) -> Listener:
        """Have a function called when there may be a message, see ``Notifier.listen``."""
        return self._environment.notifier.listen(callback)

    def _pause(self, is_claimed: bool, retry_at_ns: int) -> float:
        """Choose when to look again without a notification, in seconds."""
        pause = CLAIMED_PAUSE_SECS if is_claimed else LONGEST_PAUSE_SECS
        if retry_at_ns:
            pause = min(pause, max(0, retry_at_ns - self._looks.now_ns()) / 1e9)
        return pause

    def _wait(self, max_messages: int, is_newest: bool, timeout: float | None,
              poll_secs: float) -> Lease | None:
        """Take as soon as there is something."""
        deadline = None if timeout is None else time.monotonic() + timeout
        notifier = self._environment.notifier
        while True:
            stamp = notifier.arm()
            lease, pause = self.try_take(max_messages, is_newest)
            if lease is not None:
                return lease
            pause = min(pause, poll_secs)
            if deadline is not None:
                pause = min(pause, deadline - time.monotonic())
                if pause <= 0:
                    return None
            if notifier.wait(stamp, pause):
                # The sender says what is there, which spares a look.
                self._looks.end = max(self._looks.end, notifier.end)

    def _take(self, max_messages: int) -> _Taken:
        """Take what is there."""
        number = self._next
        # Only if it exists: if a number not yet in use were claimed, others would pass over the
        # message that gets it. Only one: if the position has moved on, others would pass over the
        # rest meanwhile.
        if 0 < number < self._looks.end and max_messages == 1:
            self._next = 0
            lease = self._claim(number, number, 1, is_guess=True)
            if lease is not None:
                return lease, False, 0

        if self._ending.is_closed:
            raise self._closed_error()
        held = self.claims.held(self._looks.ordinal)
        now = time.monotonic()
        if now >= held.start_until or 0 < held.retry_at_ns <= self._looks.now_ns():
            held.start, held.start_until, held.retry_at_ns = 0, now + CLAIMED_PAUSE_SECS, 0
        # What lies in front of the start was passed over a moment ago.
        is_claimed = bool(held.numbers) or held.start > 0
        while True:
            start = held.start
            candidate, count = self._environment.read(pending.search_batch, self._looks, start,
                                                      max_messages, held.numbers)
            if isinstance(candidate, pending.Expired):
                self._expire()
                continue
            if candidate is not None and candidate.retry_at_ns:
                held.retry_at_ns = min(held.retry_at_ns or candidate.retry_at_ns,
                                       candidate.retry_at_ns)
            if not isinstance(candidate, pending.Candidate):
                return None, is_claimed, held.retry_at_ns
            lease = self._claim(candidate.begin, candidate.number, count)
            # A message that was given back meanwhile lies in front of it, perhaps.
            if held.start == start:
                held.start = candidate.number + 1
            if lease is not None:
                return lease, is_claimed, 0
            # Claimed by another process, acknowledged a moment ago, or just moved away.
            is_claimed = True

    def _claim(self,
               begin: int,
               number: int,
               max_messages: int,
               is_guess: bool = False) -> Lease | None:
        """Claim messages and look at them again."""
        ordinal = self._looks.ordinal
        claim = locks.Claim(ordinal, number, max_messages, self.claims.held(ordinal))
        lease = None
        try:
            if not (self.claims.claim(claim)
                    if max_messages == 1 else self.claims.claim_prefix(claim)):
                return None
            # Where deliveries are limited, this one is counted.
            copied = (self._environment.write(deliveries.begin_delivery,
                                              self._looks,
                                              number,
                                              number + claim.count,
                                              is_guess,
                                              makes_room=True)
                      if self.counts else self._environment.read(self._looks.copy, number, number +
                                                                 claim.count, is_guess))
            if copied.is_exhausted:
                self._move(copied)
            elif copied.numbers:
                if claim.count > 1:
                    first = copied.numbers[0]
                    self.claims.narrow(claim, first, copied.numbers[-1] + 1 - first)
                lease = self._lease(claim, begin, copied)
        except persipubsub.errors.CorruptMessageError as error:
            raise self._set_aside(begin, error) from None
        finally:
            if lease is None:
                self.release(claim)
        return lease

    def _lease(self, claim: locks.Claim, begin: int, copied: pending.Copied) -> Lease:
        """Hold claimed messages."""
        environment = self._environment
        dropped_before, self._dropped = copied.dropped - self._dropped, copied.dropped
        lease = Lease(self, claim, begin, copied, dropped_before)
        locks.note_claim(environment.page, claim, environment.process_id)
        return lease

    def _set_aside(
            self, begin: int, error: persipubsub.errors.CorruptMessageError
    ) -> persipubsub.errors.CorruptMessageError:
        """Acknowledge a damaged message that is claimed."""
        self._environment.write(deliveries.set_aside,
                                self._looks,
                                begin,
                                error.number,
                                makes_room=True)
        self._notify()
        return persipubsub.errors.CorruptMessageError(f"{error}. It was set aside.",
                                                      number=error.number)

    # The newest message

    def _take_newest(self) -> _Taken:
        """Take the newest message if it is free."""
        if self._ending.is_closed:
            raise self._closed_error()
        stuck: set[int] = set()
        while True:
            newest = self._environment.read(pending.find_newest, self._looks, stuck)
            if isinstance(newest, pending.Expired):
                self._expire()
                continue
            if not isinstance(newest, pending.Candidate):
                return None, False, 0 if newest is None else newest.retry_at_ns
            if self.claims.is_claimed(self._looks.ordinal, newest.number):
                return None, True, 0
            lease = self._skip_to_newest(stuck)
            if lease is not None:
                return lease, False, 0

    def _skip_to_newest(self, stuck: set[int]) -> Lease | None:
        """
        Claim the newest message, and skip all in front of it.

        It is claimed in the transaction that picks it. Claimed earlier, and given back because the
        transaction finds a newer one, it would be passed over by others and come after later ones.
        """
        claimed: list[locks.Claim] = []
        lease = None
        try:
            copied = self._environment.write(self._skip, stuck, claimed, makes_room=True)
            if copied is not None and copied.is_exhausted:
                stuck.add(copied.numbers[0])
                self._move(copied)
            elif copied is not None and copied.numbers:
                self._notify()
                lease = self._lease(claimed[-1], 0, copied)
        except persipubsub.errors.CorruptMessageError as error:
            raise self._set_aside(0, error) from None
        finally:
            if lease is None:
                for claim in claimed:
                    self.release(claim)
        return lease

    def _skip(self, tx: Tx, stuck: set[int], claimed: list[locks.Claim]) -> pending.Copied | None:
        """Claim and copy the newest message in a transaction."""
        for claim in claimed:  # of an attempt that had to be repeated
            self.claims.release(claim)
        claimed.clear()

        def claim_it(number: int) -> bool:
            ordinal = self._looks.ordinal
            claimed.append(locks.Claim(ordinal, number, 1, self.claims.held(ordinal)))
            return self.claims.claim(claimed[-1])

        return deliveries.take_newest(tx, self._looks, stuck, claim_it)

    def front(self) -> bytes | None:
        """Look at the next message without taking it."""
        start = 0
        while True:
            found = self._environment.read(self._looks.copy_next, start)
            if found is None:
                return None
            if isinstance(found, pending.Expired):
                self._expire()
                continue
            number, message = found
            if not self.claims.is_claimed(self._looks.ordinal, number):
                return message
            start = number + 1

    def _closed_error(self) -> persipubsub.errors.ClosedError:
        """Describe that the queue was closed, which gives back what is claimed."""
        return persipubsub.errors.ClosedError(
            f"Expected the queue {self._environment.directory} to be open until the messages are "
            "acknowledged, but got: it was closed, which gave them back")

    # Ending a lease

    def ack(self, claim: locks.Claim, begin: int, numbers: list[int]) -> None:
        """Acknowledge messages that this consumer has claimed, in one transaction."""
        try:
            with self._ending.lock:
                if self._ending.is_closed:
                    raise self._closed_error()
                if claim.file is None or claim.file.closed:
                    return  # in a forked child: the messages are with its parent
                looks = self._looks
                self._next = self._environment.write(positions.acknowledge,
                                                     looks.key,
                                                     looks.ordinal,
                                                     begin,
                                                     numbers,
                                                     looks.now_ns(),
                                                     makes_room=True)
        finally:
            self.claims.release(claim)
        if self._notifies:
            self._environment.notifier.notify()

    def nack(self, claim: locks.Claim, copied: pending.Copied, error: BaseException | None) -> None:
        """Record how an unacknowledged delivery ended, and give the claim back."""
        try:
            # Before the claim is released: the next delivery shall know what happened. After a
            # close others may have the messages, and that delivery must not be judged.
            with self._ending.lock:
                if claim.file is not None and not claim.file.closed:
                    self._record(copied, error)
        finally:
            self.release(claim)
        # Those that are not woken look once a second anyhow.
        with contextlib.suppress(persipubsub.errors.PersipubsubError):
            self._environment.notifier.notify()

    def release(self, claim: locks.Claim) -> None:
        """Give a claim back."""
        self.claims.release(claim)

    def _record(self, copied: pending.Copied, error: BaseException | None) -> None:
        """Record a failure, or that a delivery does not count."""
        # The message is where it was; the user's own exception matters more than the count.
        with contextlib.suppress(persipubsub.errors.PersipubsubError):
            if error is not None:
                text = persipubsub.message.text_of(error)
                for number in self._environment.write(deliveries.fail,
                                                      self._looks,
                                                      copied.numbers,
                                                      text,
                                                      makes_room=True):
                    last = self._environment.read(deliveries.copy_exhausted, self._looks, number)
                    if last is not None:
                        self._move(last)
            elif self.counts:
                self._environment.write(deliveries.take_back,
                                        self._looks,
                                        copied.numbers,
                                        makes_room=True)

    def _move(self, copied: pending.Copied) -> None:
        """Move a claimed message away that is not delivered any more."""
        message = self.describe(copied, 0)[0]
        if self._writer.move(self._looks.ordinal, message, copied.attempts[message.number]):
            self._environment.write(deliveries.give_up,
                                    self._looks,
                                    message.number,
                                    makes_room=True)
            self._notify()

    def _notify(self) -> None:
        """Wake publishers that wait for room."""
        if self._notifies:
            self._environment.notifier.notify()

    def describe(self, copied: pending.Copied, dropped_before: int) -> list[Message]:
        """Tell what is known of messages."""
        return deliveries.describe(copied, self._looks, dropped_before)
