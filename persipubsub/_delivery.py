"""
Take messages for one subscriber: find, claim, look again, deliver, acknowledge, give back.

A message is found in a read transaction, then claimed, then looked at again in another one: between
the two, another consumer of the same subscriber may have acknowledged it. Only what is claimed and
still pending is delivered. It is acknowledged in a write transaction before the claim is released,
so that nobody can claim it in between.

Where deliveries are limited, the second look is a write transaction that counts the delivery before
the user's code sees the message: a consumer that is killed counts, too. What was delivered often
enough is moved away, by the one whose delivery failed, or by the next one that comes across it.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable
from typing import Final, Optional

import persipubsub.errors
import persipubsub.message
from persipubsub import _claims, _in_flight, _moving, _wakeup
from persipubsub.environment import _environment
from persipubsub.store import _acknowledging, _batches, _deliveries, _pending, _positions

#: A waiting consumer looks at the queue this often whatever happens, in seconds: a publisher may
#: die between its commit and its ring.
LONGEST_PAUSE_SECS: Final = 1.0

#: ... and this often while others hold claims, which the kernel gives back without a ring.
CLAIMED_PAUSE_SECS: Final = 0.05

#: The table of readers is searched for dead processes this often by somebody who waits anyhow.
READER_CHECK_SECS: Final = 5.0


class _Shared:  # transitional
    """Give a claim back when all of its leases ended."""

    def __init__(self, claim: _claims.Claim) -> None:
        self.claim, self.users, self.ticket = claim, 1, claim.ticket

    def release(self) -> None:
        """Give back, if it is the last one."""
        self.users -= 1
        if self.users == 0:
            self.claim.release()


class Lease:
    """
    Hold messages that one consumer has and nobody else gets.

    Exactly one of :py:meth:`acknowledge` and :py:meth:`give_back` is to be called, once.
    """

    __slots__ = ("messages", "numbers", "_consumer", "_begin", "_claim", "_copied", "_process_id")

    def __init__(self, consumer: "Consumer", claim: _claims.Claim, begin: int,
                 copied: _pending.Copied, process_id: int) -> None:
        """
        Initialize with what was claimed.

        :param consumer: that took the messages
        :param claim: on them
        :param begin: everything from here to the first message is done or not for the subscriber
        :param copied: messages
        :param process_id: of this process
        """
        self.messages = copied.messages
        self.numbers = copied.numbers
        self._consumer = consumer
        self._begin = begin
        self._claim = claim
        self._copied = copied
        # A forked child inherits the object, but the claim stays with its parent.
        self._process_id = process_id

    def times_ns(self) -> list[int]:
        """
        Tell when the messages were sent, by the queue's clock: always the same of a message.

        :return: times in nanoseconds, in the order of the messages
        """
        return [time_ns for count, time_ns in self._copied.runs for _ in range(count)]

    def details(self) -> list[persipubsub.message.Message]:
        """
        Tell what is known of the messages. No file is touched.

        :return: messages, in order
        """
        return self._consumer.describe(self._copied)

    def acknowledge(self) -> None:
        """
        Let the messages leave the queue for this subscriber, all at once.

        :raise BusyTimeoutError: if another process writes for too long; the messages are given back
        :raise ClosedError: if the queue was closed meanwhile, which gave them back
        """
        is_held = False
        try:
            if self._process_id == os.getpid():
                is_held = self._hold()
                if not is_held:
                    raise self._consumer.closed()
                self._consumer.acknowledge(self._begin, self.numbers)
        finally:
            self._release(is_held)

    def give_back(self, error: BaseException | None = None) -> None:
        """
        Leave the messages where they were; they are delivered again, perhaps to another.

        A message that was delivered often enough is moved away instead.

        :param error: why; None if they were not worked on
        """
        is_held = False
        try:
            # Before the claim is released: the next one shall know what happened.
            if self._process_id == os.getpid():
                is_held = self._hold()
                # Otherwise others may have them already, whose delivery must not be judged.
                if is_held:
                    self._consumer.give_back(self._copied, error)
        finally:
            self._release(is_held)
        if is_held:
            self._consumer.ring()

    def _hold(self) -> bool:
        """
        Keep whoever closes the queue from giving the messages back while their end is recorded.

        :return: False if they were given back
        """
        try:
            self._claim.ticket.pop()
        except IndexError:
            return False
        return True

    def _release(self, is_held: bool) -> None:
        """
        Give the claim back.

        :param is_held: what :py:meth:`_hold` returned
        """
        if is_held:
            self._claim.ticket.append(None)
        self._claim.release()

    ack = acknowledge  # transitional
    nack = give_back  # transitional

    def split(self, count: int) -> "Lease":  # transitional
        """Move the first messages into a lease of their own."""
        copied = self._copied
        times = [(1, time_ns) for time_ns in self.times_ns()]
        claim = self._claim if isinstance(self._claim, _Shared) else _Shared(self._claim)
        claim.users += 1
        parts = [
            _pending.Copied(copied.numbers[part], copied.messages[part], times[part],
                            copied.attempts, False) for part in (slice(count), slice(count, None))
        ]
        self._claim, self._copied = claim, parts[1]  # type: ignore[assignment]
        self.numbers, self.messages = parts[1].numbers, parts[1].messages
        first = Lease(self._consumer, self._claim, self._begin, parts[0], self._process_id)
        self._begin = self.numbers[0]
        return first

    def touch(self) -> None:
        """Do nothing: the kernel knows that this process is alive, however long it works."""


#: What a look at the queue came to: what was taken; whether messages were passed over that others
#: have claimed; when the first of those that rest is due, on the queue's clock, 0 if none rests. A
#: plain tuple, as it is made for each message.
Taken = tuple[Optional[Lease], bool, int]


class Consumer:
    """
    Take messages of one subscriber, from any number of threads.

    Consumers of the same subscriber, in whatever processes, share its messages.
    """

    def __init__(self, environment: _environment.Environment, claims: _claims.Claims,
                 board: _in_flight.Board, bell: _wakeup.Bell, pending: _pending.Pending,
                 expire: Callable[[], int], mover: _moving.Mover, rings: bool) -> None:
        """
        Look the subscriber up.

        :param environment: of the queue
        :param claims: of the queue
        :param board: of the queue, on which claims are noted for people to see
        :param bell: of the queue
        :param pending: messages of the subscriber
        :param expire: drops messages that are too old
        :param mover: takes messages that are not delivered any more
        :param rings: True to wake publishers that wait for room at each acknowledgement
        :raise NotInitializedError: if the queue has no such subscriber
        """
        self._environment = environment
        self._claims = claims
        self._board = board
        self._bell = bell
        self._pending = pending
        self._expire = expire
        self._mover = mover
        self._rings = rings
        #: True to count each delivery before it begins.
        self.counts = pending.policy.max_deliveries > 0

        # Where the last acknowledgement left the position; checked again before it counts.
        self._next = 0
        pending.ordinal = environment.read(
            lambda txn, databases: _positions.require(txn, databases, pending.key)).ordinal

    # Taking

    def take(self,
             timeout: float | None,
             longest_pause: float = LONGEST_PAUSE_SECS,
             max_messages: int = 1) -> Lease | None:
        """
        Take the next message, or several; wait if there is none.

        :param timeout: how long to wait, in seconds; None: for ever
        :param longest_pause: time between two looks at the queue without a wake-up, in seconds
        :param max_messages: how many to take at most; all that are there at once, at least one
        :return: messages; None if there was none in time
        :raise CorruptMessageError: if the next message is damaged; it is set aside
        """
        lease = self._take_now(max_messages)[0]
        if lease is not None or (timeout is not None and timeout <= 0):
            return lease
        return self._wait(functools.partial(self._take_now, max_messages), timeout, longest_pause)

    def take_at(self, number: int) -> Lease | None:
        """
        Take one certain message, whatever else is there. It does not wait.

        :param number: of the message
        :return: message; None if it is not pending, or another consumer has it
        :raise CorruptMessageError: if it is damaged; it is set aside
        """
        return self._claim(0, number, 1)

    def _wait(self, take: Callable[[], Taken], timeout: float | None,
              longest_pause: float) -> Lease | None:
        """
        Take as soon as there is something.

        :param take: takes what is there
        :param timeout: how long to wait, in seconds; None: for ever
        :param longest_pause: time between two looks at the queue without a wake-up, in seconds
        :return: messages; None if there was none in time
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        next_check = time.monotonic() + READER_CHECK_SECS
        with self._bell.prepare() as ticket:
            while True:
                lease, is_claimed, due_ns = take()
                now = time.monotonic()
                if lease is not None or (deadline is not None and now >= deadline):
                    return lease
                if now >= next_check:
                    self._environment.check_readers()
                    next_check = now + READER_CHECK_SECS
                pause = CLAIMED_PAUSE_SECS if is_claimed else min(longest_pause, LONGEST_PAUSE_SECS)
                if due_ns:
                    pause = min(pause, max(0, due_ns - self._pending.now_ns()) / 1e9)
                if ticket.wait(pause if deadline is None else min(pause, deadline - now)):
                    # The publisher says what is there: one look less. And before it is armed again,
                    # which makes the next publisher ring.
                    self._pending.end = max(self._pending.end, ticket.end)
                    lease = take()[0]
                    if lease is not None:
                        return lease
                ticket.arm()

    def _take_now(self, max_messages: int) -> Taken:
        """
        Take what is there.

        :param max_messages: how many to take at most
        :return: what was taken, and what was passed over
        """
        number = self._next
        # Only if it is there, see _batches. Not several: if the position has moved on, others
        # would pass over those behind meanwhile.
        if 0 < number < self._pending.end and max_messages == 1:
            self._next = 0
            lease = self._claim(number, number, max_messages, is_guess=True)
            if lease is not None:
                return lease, False, 0

        start = 0
        is_claimed = False
        due_ns = 0
        while True:
            candidate, count = self._environment.read(
                functools.partial(_batches.search,
                                  pending=self._pending,
                                  start=start,
                                  max_messages=max_messages))
            if isinstance(candidate, _pending.Expired):
                self._expire()
                continue
            if candidate is not None and candidate.due_ns:
                due_ns = min(due_ns or candidate.due_ns, candidate.due_ns)
            if not isinstance(candidate, _pending.Candidate):
                return None, is_claimed, due_ns
            lease = self._claim(candidate.begin, candidate.number, count)
            if lease is not None:
                return lease, is_claimed, due_ns
            # Claimed, acknowledged a moment ago, or just moved away.
            is_claimed = True
            start = candidate.number + 1

    def _claim(self,
               begin: int,
               number: int,
               max_messages: int,
               is_guess: bool = False) -> Lease | None:
        """
        Claim messages and look at them again.

        :param begin: everything from here to the first message is done or not for the subscriber
        :param number: of the first message
        :param max_messages: how many to take at most
        :param is_guess: True if it is the next one only if the position is still there
        :return: messages; None if somebody else has or had the first one, or it was moved away
        """
        ordinal = self._pending.ordinal
        claim = (self._claims.claim(ordinal, number)
                 if max_messages == 1 else self._claims.claim_prefix(ordinal, number, max_messages))
        if claim is None:
            return None
        lease: Lease | None = None
        try:
            copied = self._copy(number, number + claim.count, is_guess)
            if copied.is_spent:
                self._move(copied)
            elif copied.numbers:
                if claim.count > 1:
                    claim.narrow(copied.numbers[0], copied.numbers[-1] + 1 - copied.numbers[0])
                lease = self._lease(claim, begin, copied)
        except persipubsub.errors.CorruptMessageError as error:
            raise self._set_aside(begin, error) from None
        finally:
            if lease is None:
                claim.release()
        return lease

    def _copy(self, number: int, end: int, is_guess: bool) -> _pending.Copied:
        """
        Copy claimed messages, and count the delivery where deliveries are limited.

        :param number: of the first message
        :param end: number behind the last one to look at
        :param is_guess: True if it is the next one only if the position is still there
        :return: messages
        """
        if not self.counts:
            # Not a partial function: with keywords it takes three times as long to be called.
            return self._environment.read(
                lambda txn, databases: self._pending.copy(txn, databases, number, end, is_guess))
        return self._environment.write(lambda txn, databases: _deliveries.begin(
            txn, databases, self._pending, number, end, is_guess),
                                       may_grow=True)

    def _lease(self, claim: _claims.Claim, begin: int, copied: _pending.Copied) -> Lease:
        """
        Hold claimed messages.

        :param claim: on them
        :param begin: everything from here to the first message is done or not for the subscriber
        :param copied: messages
        :return: to be acknowledged or given back
        """
        process_id = os.getpid()
        self._board.note(self._pending.ordinal, copied.numbers[0], process_id)
        return Lease(self, claim, begin, copied, process_id)

    def _set_aside(
            self, begin: int, error: persipubsub.errors.CorruptMessageError
    ) -> persipubsub.errors.CorruptMessageError:
        """
        Acknowledge a damaged message that is claimed.

        :param begin: everything from here to the message is done or not for the subscriber
        :param error: names it
        :return: error to be raised
        """
        self._environment.write(lambda txn, databases: _deliveries.set_aside(
            txn, databases, self._pending, begin, error.number),
                                may_grow=True)
        if self._rings:
            self.ring()
        return persipubsub.errors.CorruptMessageError(f"{error}. It was set aside.",
                                                      number=error.number)

    def front(self) -> bytes | None:
        """
        Look at the next message without taking it.

        :return: message that nobody has acknowledged or claimed; None if there is none
        """
        start = 0
        while True:
            found = self._environment.read(functools.partial(self._pending.copy_next, start=start))
            if found is None:
                return None
            if isinstance(found, _pending.Expired):
                self._expire()
                continue
            number, message = found
            if not self._claims.is_claimed(self._pending.ordinal, number):
                return message
            start = number + 1

    # Acknowledging

    def acknowledge(self, begin: int, numbers: list[int]) -> None:
        """
        Acknowledge messages that this consumer has claimed, in one transaction.

        :param begin: everything from here to the first message was done when they were taken
        :param numbers: of the messages
        """
        self._next = self._environment.write(lambda txn, databases: _acknowledging.acknowledge(
            txn, databases, self._pending, begin, numbers),
                                             may_grow=True)
        if self._rings:
            self.ring()

    def closed(self) -> persipubsub.errors.ClosedError:
        """Describe that messages were given back while they were being worked on."""
        return persipubsub.errors.ClosedError(
            "Expected the queue {} to be open until the messages are acknowledged, but got: it was "
            "closed, which gave them back".format(self._environment.directory))

    def ring(self) -> None:
        """Wake those who wait, for messages or for room."""
        with contextlib.suppress(persipubsub.errors.PersipubsubError):
            self._bell.ring()  # those who are not woken look once a second anyhow

    # Failing

    def give_back(self, copied: _pending.Copied, error: BaseException | None) -> None:
        """
        Record how a delivery ended that was not acknowledged; the messages are still claimed.

        :param copied: messages
        :param error: what it ended with; None if nobody worked on them
        """
        try:
            if error is not None:
                text = _moving.text_of(error)
                spent = self._environment.write(lambda txn, databases: _deliveries.fail(
                    txn, databases, self._pending, copied.numbers, text),
                                                may_grow=True)
                for number in spent:
                    last = self._environment.read(
                        functools.partial(_deliveries.copy_spent,
                                          pending=self._pending,
                                          number=number))
                    if last is not None:
                        self._move(last)
            elif self.counts:
                self._environment.write(lambda txn, databases: _deliveries.take_back(
                    txn, databases, self._pending, copied.numbers),
                                        may_grow=True)
        except persipubsub.errors.PersipubsubError:
            # The message is where it was; the user's own exception matters more than the count.
            pass

    def _move(self, copied: _pending.Copied) -> None:
        """
        Move a claimed message away that is not delivered any more.

        :param copied: the message, with its record
        """
        message = self.describe(copied)[0]
        if self._mover.move(self._pending.ordinal, message, copied.attempts[message.number]):
            self._environment.write(lambda txn, databases: _deliveries.give_up(
                txn, databases, self._pending, message.number),
                                    may_grow=True)
            if self._rings:
                self.ring()

    def describe(self, copied: _pending.Copied) -> list[persipubsub.message.Message]:
        """Tell what is known of messages, see :py:func:`_deliveries.describe`."""
        return _deliveries.describe(copied, self._pending)
