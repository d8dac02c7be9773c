"""Earlier place of :py:class:`persipubsub.message.DeadLetter`."""

from persipubsub.message import DeadLetter

__all__ = ["DeadLetter"]
