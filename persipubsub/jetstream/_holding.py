"""
Give messages back that somebody forgets: in a loop left by ``break``, in a task that is cancelled.

A finalizer does it. It may run in any thread, in the middle of any code, in the loop's own thread
as well, in a forked child, and when the interpreter exits. So it only leaves word for the loop.
"""

import os

from persipubsub.jetstream import _ahead, _inboxes, _loop


class Hold:
    """
    Be with who holds messages, and nobody else: if it goes without :py:meth:`end`, they come back.

    Not a finalizer of the lease itself: that would live again for others who refer to it weakly.
    """

    __slots__ = ("_ahead", "_loop", "_pulled", "_is_over")

    def __init__(self, ahead: _ahead.Ahead, loop: _loop.Loop,
                 pulled: list[_inboxes.Pulled]) -> None:
        """
        Initialize with what is held.

        :param ahead: of its consumer
        :param loop: of this process
        :param pulled: messages
        """
        self._ahead = ahead
        self._loop = loop
        self._pulled = pulled
        self._is_over = False

    def end(self) -> None:
        """Leave the messages to whoever calls this; it may be repeated."""
        self._is_over = True

    def __del__(self) -> None:
        """Have the messages given back, unless somebody did that, or acknowledged them."""
        try:
            if not self._is_over and self._loop.process_id == os.getpid():
                ahead, pulled = self._ahead, self._pulled
                self._loop.post(lambda: _give_back(ahead, pulled))
        except Exception:  # pylint: disable=broad-exception-caught
            pass  # at the exit, modules may be torn down already


def _give_back(ahead: _ahead.Ahead, pulled: list[_inboxes.Pulled]) -> None:
    """
    Give messages back, and those behind them, before whoever asks next is served.

    :param ahead: of their consumer
    :param pulled: messages
    """
    ahead.begin_give_back(pulled)
