"""
Claim a message inside of a write transaction, which says which one.

One that is claimed before, and given back since the transaction wants another one, is passed over
by others meanwhile: they receive it after what lies behind it.
"""

from persipubsub import _claims


class LateClaim:
    """
    Be able to claim a message, for one consumer.

    After the transaction, one of :py:meth:`keep` and :py:meth:`drop` is to be called, or both if
    what was kept came to nothing.
    """

    def __init__(self, claims: _claims.Claims, subscriber: int) -> None:
        """
        Open what is needed.

        Not in the transaction: opening may wait for another thread's import.

        :param claims: of the queue
        :param subscriber: its index
        """
        self._claims = claims
        self._subscriber = subscriber
        self._holder = claims.take_idle()
        self._number = 0  # 0: nothing is claimed
        self._claim: _claims.Claim | None = None

    def take(self, number: int) -> bool:
        """
        Claim a message, in the transaction; instead of another one if that had to be repeated.

        :param number: of the message
        :return: False if somebody else has it
        """
        if self._number != number:
            self._holder.unlock_all()
            self._number = 0
            if self._holder.lock(self._claims.start_of(self._subscriber, number, 1), 1):
                self._number = number
        return self._number == number

    def keep(self) -> _claims.Claim:
        """
        Make a claim of it, like any other.

        :return: on the message
        :raise ClosedError: if the queue was closed meanwhile
        """
        base = self._claims.start_of(self._subscriber, self._number, 1) - self._number
        claim = self._claim = _claims.Claim(self._claims, self._holder, base, self._number, 1)
        self._holder.ticket = claim.ticket
        if self._claims.closed:
            # Another thread called close, maybe before it could see this ticket. This raises:
            claim.release()
            self._claims.take_idle()
        return claim

    def drop(self) -> None:
        """Give back."""
        if self._claim is not None:
            self._claim.release()
        else:
            self._holder.unlock_all()
            self._claims.put_idle(self._holder)
