"""Skip to the newest message of a subscriber."""

import functools

import persipubsub.errors
from persipubsub import _delivery, _late_claim
from persipubsub.store import _newest, _pending


class Consumer(_delivery.Consumer):
    """Take the next message of one subscriber, or the newest one, from any number of threads."""

    def take_newest(self,
                    timeout: float | None,
                    longest_pause: float = _delivery.LONGEST_PAUSE_SECS) -> _delivery.Lease | None:
        """
        Take the newest message and acknowledge all older ones as skipped; wait if there is none.

        The older ones are skipped in the transaction that sees that the message still is the newest
        one; while another consumer has that one there is none to take, and nothing is skipped. What
        was delivered often enough is moved away, or passed over as long as it can not be.

        :param timeout: how long to wait, in seconds; None: for ever
        :param longest_pause: time between two looks at the queue without a wake-up, in seconds
        :return: message; None if there was none in time
        :raise CorruptMessageError: if the newest message is damaged; it is set aside
        """
        lease = self._take_newest_now()[0]
        if lease is not None or (timeout is not None and timeout <= 0):
            return lease
        return self._wait(self._take_newest_now, timeout, longest_pause)

    def _take_newest_now(self) -> _delivery.Taken:
        """
        Take the newest message if it is free.

        :return: what was taken, and what was passed over
        """
        stuck: set[int] = set()
        while True:
            newest = self._environment.read(
                functools.partial(_newest.find, pending=self._pending, stuck=stuck))
            if isinstance(newest, _pending.Expired):
                self._expire()
                continue
            if not isinstance(newest, _pending.Candidate):
                return None, False, 0 if newest is None else newest.due_ns
            if self._claims.is_claimed(self._pending.ordinal, newest.number):
                return None, True, 0
            lease = self._skip_to_newest(stuck)
            if lease is not None:
                return lease, False, 0

    def _skip_to_newest(self, stuck: set[int]) -> _delivery.Lease | None:
        """
        Claim the newest message, and skip all in front of it.

        It is claimed in the transaction, see :py:mod:`persipubsub._late_claim`.

        :param stuck: numbers of newer ones that are not to be delivered; this one is added if so
        :return: message; None if it is not free any more, or is not to be delivered
        """
        late = _late_claim.LateClaim(self._claims, self._pending.ordinal)
        lease: _delivery.Lease | None = None
        try:
            copied = self._environment.write(lambda txn, databases: _newest.skip_to(
                txn, databases, self._pending, stuck, late.take),
                                             may_grow=True)
            if copied is not None and copied.is_spent:
                stuck.add(copied.numbers[0])
                self._move(copied)
            elif copied is not None and copied.numbers:
                if self._rings:
                    self.ring()
                lease = self._lease(late.keep(), 0, copied)
        except persipubsub.errors.CorruptMessageError as error:
            raise self._set_aside(0, error) from None
        finally:
            if lease is None:
                late.drop()
        return lease
