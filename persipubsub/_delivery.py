"""
Take messages for one subscriber: find, claim, look again, deliver, acknowledge, give back.

A message is found in a read transaction, then claimed, then looked at again in another one: between
the two, another consumer of the same subscriber may have acknowledged it. Only what is claimed and
still pending is delivered. It is acknowledged in a write transaction before the claim is released,
so that nobody can claim it in between.
"""

import contextlib
import functools
import os
import time
from typing import Callable, Final, List, Optional, Tuple

import persipubsub.errors
from persipubsub import _claims, _wakeup
from persipubsub.environment import _environment
from persipubsub.store import _pending, _positions

#: A waiting consumer looks at the queue this often whatever happens, in seconds: a publisher may
#: die between its commit and its ring.
_LONGEST_PAUSE_SECS: Final = 1.0

#: ... and this often while others hold claims, which the kernel gives back without a ring.
_CLAIMED_PAUSE_SECS: Final = 0.05

#: The table of readers is searched for dead processes this often by somebody who waits anyhow.
_READER_CHECK_SECS: Final = 5.0


class Lease:
    """
    Hold messages that one consumer has and nobody else gets.

    Exactly one of :py:meth:`acknowledge` and :py:meth:`give_back` is to be called, once.
    """

    __slots__ = ("messages", "numbers", "_consumer", "_begin", "_claim", "_process_id")

    def __init__(self, consumer: "Consumer", claim: _claims.Claim, begin: int, numbers: List[int],
                 messages: List[bytes]) -> None:
        """
        Initialize with what was claimed.

        :param consumer: that took the messages
        :param claim: on them
        :param begin: everything from here to the first message is done or not for the subscriber
        :param numbers: of the messages
        :param messages: their bytes
        """
        self.messages = messages
        self.numbers = numbers
        self._consumer = consumer
        self._begin = begin
        self._claim = claim
        # A forked child inherits the object, but the claim stays with its parent.
        self._process_id = os.getpid()

    def acknowledge(self) -> None:
        """
        Let the messages leave the queue for this subscriber, all at once.

        :raise BusyTimeoutError: if another process is in the middle of a write for too long; the
            messages are given back
        """
        try:
            if self._process_id == os.getpid():
                self._consumer.acknowledge(self._begin, self.numbers)
        finally:
            self._claim.release()

    def give_back(self, error: Optional[BaseException] = None) -> None:
        """
        Leave the messages where they were; they are delivered again, perhaps to another.

        :param error: why; None if they were not worked on
        """
        del error
        self._claim.release()
        if self._process_id == os.getpid():
            self._consumer.count_failure(len(self.numbers))

    def touch(self) -> None:
        """Do nothing: the kernel knows that this process is alive, however long it works."""


class Consumer:
    """
    Take messages of one subscriber, from any number of threads.

    Consumers of the same subscriber, in whatever processes, share its messages.
    """

    def __init__(self, environment: _environment.Environment, claims: _claims.Claims,
                 bell: _wakeup.Bell, pending: _pending.Pending, expire: Callable[[], int],
                 rings: bool) -> None:
        """
        Look the subscriber up.

        :param environment: of the queue
        :param claims: of the queue
        :param bell: of the queue
        :param pending: messages of the subscriber
        :param expire: drops messages that are too old
        :param rings: True to wake publishers that wait for room at each acknowledgement
        :raise NotInitializedError: if the queue has no such subscriber
        """
        self._environment = environment
        self._claims = claims
        self._bell = bell
        self._pending = pending
        self._expire = expire
        self._rings = rings

        # What the last acknowledgement saw behind itself; a guess that is checked before it counts.
        self._guess = 0
        # When somebody who looks in vain is to look after the table of readers.
        self._next_check = time.monotonic() + _READER_CHECK_SECS
        pending.ordinal = environment.read(
            lambda txn, databases: _positions.require(txn, databases, pending.key)).ordinal

    # Taking

    def take(self,
             timeout: Optional[float],
             longest_pause: float = _LONGEST_PAUSE_SECS,
             max_messages: int = 1) -> Optional[Lease]:
        """
        Take the next message, or several; wait if there is none.

        :param timeout: how long to wait, in seconds; None: for ever
        :param longest_pause: time between two looks at the queue without a wake-up, in seconds
        :param max_messages: how many to take at most; all that are there at once, at least one
        :return: messages; None if there was none in time
        :raise CorruptMessageError: if the next message is damaged; it is set aside
        """
        lease, _ = self._take_now(max_messages)
        if lease is not None or (timeout is not None and timeout <= 0):
            return lease

        deadline = None if timeout is None else time.monotonic() + timeout
        next_check = time.monotonic() + _READER_CHECK_SECS
        with self._bell.prepare() as ticket:
            while True:
                ticket.arm()
                lease, is_claimed = self._take_now(max_messages)
                now = time.monotonic()
                if lease is not None or (deadline is not None and now >= deadline):
                    return lease
                if now >= next_check:
                    self._environment.check_readers()
                    next_check = now + _READER_CHECK_SECS
                pause = _CLAIMED_PAUSE_SECS if is_claimed else min(longest_pause,
                                                                   _LONGEST_PAUSE_SECS)
                ticket.wait(pause if deadline is None else min(pause, deadline - now))

    def take_now(self, max_messages: int = 1) -> Tuple[Optional[Lease], float]:
        """
        Take the next message, or several, if there is one.

        It may still block: where messages are too old and have to be dropped, where the next one is
        damaged and has to be set aside, or where the table of readers is full.

        :param max_messages: how many to take at most; all that are there at once, at least one
        :return: messages or None; after how many seconds to look again without a wake-up
        :raise CorruptMessageError: if the next message is damaged; it is set aside
        """
        lease, is_claimed = self._take_now(max_messages)
        if lease is None and time.monotonic() >= self._next_check:
            self._environment.check_readers()
            self._next_check = time.monotonic() + _READER_CHECK_SECS
        return lease, _CLAIMED_PAUSE_SECS if is_claimed else _LONGEST_PAUSE_SECS

    def prepare_wait(self) -> _wakeup.Ticket:
        """
        Begin to wait. What comes after this, or after the ticket was armed, rings it.

        :return: to be armed before each further look, and to be closed by the caller
        """
        return self._bell.prepare()

    def _take_now(self, max_messages: int) -> Tuple[Optional[Lease], bool]:
        """
        Take what is there.

        :param max_messages: how many to take at most
        :return: messages or None; whether some were passed over that others have claimed
        """
        guess = self._guess
        if guess:
            self._guess = 0
            lease = self._claim(guess, guess, max_messages)
            if lease is not None:
                return lease, False

        start = 0
        is_claimed = False
        while True:
            candidate = self._environment.read(functools.partial(self._pending.find, start=start))
            if candidate is None:
                return None, is_claimed
            if isinstance(candidate, _pending.Expired):
                self._expire()
                continue
            lease = self._claim(candidate.begin, candidate.number, max_messages)
            if lease is not None:
                return lease, is_claimed
            # Claimed, or acknowledged a moment ago.
            is_claimed = True
            start = candidate.number + 1

    def _claim(self, begin: int, number: int, max_messages: int) -> Optional[Lease]:
        """
        Claim messages and look at them again.

        :param begin: everything from here to the first message is done or not for the subscriber
        :param number: of the first message
        :param max_messages: how many to take at most
        :return: messages; None if somebody else has or had the first one
        """
        ordinal = self._pending.ordinal
        if max_messages == 1:
            claim = self._claims.claim(ordinal, number)
        else:
            claim = self._claims.claim_prefix(ordinal, number, max_messages)
        if claim is None:
            return None
        messages = None  # type: Optional[List[bytes]]
        try:
            numbers, messages = self._environment.read(
                functools.partial(self._pending.copy, number=number, end=number + claim.count))
            if messages and claim.count > 1:
                claim.narrow(number, numbers[-1] + 1 - number)
        except persipubsub.errors.CorruptMessageError as error:
            self._environment.write(functools.partial(self._pending.set_aside,
                                                      begin=begin,
                                                      number=error.number),
                                    may_grow=True)
            if self._rings:
                self._ring()
            raise persipubsub.errors.CorruptMessageError("{}. It was set aside; queue {}".format(
                error, self._environment.directory),
                                                         number=error.number) from None
        finally:
            if not messages:
                claim.release()
        return Lease(self, claim, begin, numbers, messages) if messages else None

    def front(self) -> Optional[bytes]:
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

    def acknowledge(self, begin: int, numbers: List[int]) -> None:
        """
        Acknowledge messages that this consumer has claimed, in one transaction.

        :param begin: everything from here to the first message is done or not for the subscriber
        :param numbers: of the messages
        """
        self._guess = self._environment.write(functools.partial(self._pending.acknowledge,
                                                                begin=begin,
                                                                numbers=numbers),
                                              may_grow=True)
        if self._rings:
            self._ring()

    def _ring(self) -> None:
        """Wake those who wait, for messages or for room."""
        with contextlib.suppress(persipubsub.errors.PersipubsubError):
            self._bell.ring()  # those who are not woken look once a second anyhow

    def count_failure(self, count: int) -> None:
        """
        Count deliveries that failed, and wake others that may take the messages.

        :param count: how many
        """
        try:
            self._environment.write(functools.partial(self._pending.count_failure, count=count),
                                    may_grow=True)
        except persipubsub.errors.PersipubsubError:
            # The message is where it was; the user's own exception matters more than the count.
            pass
        self._ring()
