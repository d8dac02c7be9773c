"""Tell how far a long walk has come, without a call into somebody else's code."""


class Progress:
    """
    Be counted up by a walk, and looked at by another thread that draws it.

    A callback was rejected: it would run inside a transaction, where a program that waits for its
    terminal keeps old pages from being used again.

    >>> progress = Progress()
    >>> progress.begin("messages", total=10)
    >>> progress.done += 3
    >>> progress.share()
    0.3
    """

    __slots__ = ("what", "done", "total")

    def __init__(self) -> None:
        """Initialize with nothing to do."""
        self.what = ""
        self.done = 0
        self.total = 0

    def begin(self, what: str, total: int) -> None:
        """
        Begin a part of the work.

        :param what: is gone through
        :param total: how much there is of it, in units of its own
        """
        self.done = 0
        self.total = total
        self.what = what

    def share(self) -> float:
        """
        Compute how much of the part is done.

        :return: from 0 to 1
        """
        return min(1.0, self.done / self.total) if self.total else 1.0
