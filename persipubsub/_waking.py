"""
Take messages for those who wait by themselves: the tasks of :py:mod:`persipubsub.aio`.

How messages are taken is the business of :py:mod:`persipubsub._delivery`. Here is what waiting
needs that is not done by a thread: a look that does not wait, and a ticket of the bell.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import persipubsub.errors
from persipubsub import _delivery, _skipping, _wakeup


class Consumer(_skipping.Consumer):
    """Take messages of one subscriber, for any number of threads and loops."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """
        Look the subscriber up.

        :param arguments: see :py:class:`persipubsub._delivery.Consumer`
        :param named: as well
        """
        super().__init__(*arguments, **named)
        # When somebody who looks in vain is to look after the table of readers.
        self._next_check = time.monotonic() + _delivery.READER_CHECK_SECS

    def take_now(self,
                 max_messages: int = 1,
                 is_newest: bool = False) -> tuple[_delivery.Lease | None, float]:
        """
        Take the next message, or several, if there is one.

        It may still block: where something has to be written, as where messages are too old and
        have to be dropped, or deliveries are counted, or where the table of readers is full.

        :param max_messages: how many to take at most; all that are there at once, at least one
        :param is_newest: True to take the newest message instead, and to skip all older ones
        :return: messages or None; after how many seconds to look again without a wake-up
        :raise CorruptMessageError: if the next message is damaged; it is set aside
        """
        lease, is_claimed, due_ns = (self._take_newest_now()
                                     if is_newest else self._take_now(max_messages))
        if lease is not None:
            return lease, 0.0
        if time.monotonic() >= self._next_check:
            self._environment.check_readers()
            self._next_check = time.monotonic() + _delivery.READER_CHECK_SECS
        pause = _delivery.CLAIMED_PAUSE_SECS if is_claimed else _delivery.LONGEST_PAUSE_SECS
        if due_ns:
            pause = min(pause, max(0, due_ns - self._pending.now_ns()) / 1e9)
        return None, pause

    try_take = take_now  # transitional

    def listen(self, callback: Callable[[], object]) -> "Listener":  # transitional
        """Have the callback called when there may be something."""
        return Listener(self._bell, callback)


class Listener:  # transitional
    """Call back from a thread."""

    def __init__(self, bell: _wakeup.Bell, callback: Callable[[], object]) -> None:
        self._ticket = bell.prepare()
        self._ticket.set_callback(callback)
        self._other = bell.prepare()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(persipubsub.errors.ClosedError):
            while not self._other.closed:
                self._other.wait(0.2)

    def arm(self) -> None:
        """Call back at the next commit."""
        self._ticket.arm()

    def close(self) -> None:
        """Call back no more."""
        self._ticket.set_callback(None)
        self._ticket.close()
        self._other.close()
