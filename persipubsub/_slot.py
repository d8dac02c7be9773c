"""Hold what an object has open, while any number of threads open and close it."""

from typing import Generic, TypeVar

ContentT = TypeVar("ContentT")


class Slot(Generic[ContentT]):
    """
    Hold one thing, or none. Each that was put is taken out by exactly one thread.

    To look at it takes no lock, and neither does the rest: a forked child, or a signal handler that
    interrupts it, would wait for ever. Single operations of a dictionary are atomic.

    >>> slot = Slot()
    >>> slot.put("first"), slot.put("second")
    ([], ['first'])
    >>> slot.content, slot.take(), slot.content, slot.take()
    ('second', 'second', None, None)
    """

    __slots__ = ("_contents", )

    def __init__(self) -> None:
        """Initialize with nothing."""
        # Under the key None, if there is something.
        self._contents: dict[None, ContentT] = {}

    @property
    def content(self) -> ContentT | None:
        """
        Look at what is there, and leave it there.

        :return: it; None if there is nothing
        """
        return self._contents.get(None)

    def take(self) -> ContentT | None:
        """
        Take out what is there.

        :return: it; None if there is nothing
        """
        return self._contents.pop(None, None)

    def put(self, content: ContentT) -> list[ContentT]:
        """
        Put something in the place of what is there.

        :param content: to be there
        :return: what was there, and is with the caller alone
        """
        taken: list[ContentT] = []
        while True:
            old = self.take()
            if old is not None:
                taken.append(old)
            # Another thread may have put something there meanwhile.
            if self._contents.setdefault(None, content) is content:
                return taken
