"""Messages with what is known of them, messages that were given up, places in a queue."""

import contextlib
import dataclasses
import datetime
import math
from typing import Final, Literal, TypeAlias

import msgspec

from persipubsub.errors import CorruptMessageError

__all__ = [
    "Message", "Peeked", "DeadLetter", "Place", "give_up", "text_of", "retry_delay_ns", "time_ns_of"
]

#: Largest number of characters of an error that is stored.
ERROR_CHARACTERS: Final = 500

#: The delay between two deliveries grows up to this, in nanoseconds.
_LONGEST_DELAY_NS: Final = 3600 * 10**9


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """
    Message that was received, with what is known of it.

    >>> import datetime
    >>> sent_at = datetime.datetime(2026, 11, 24, tzinfo=datetime.timezone.utc)
    >>> Message(data=b"hello", number=1, sent_at=sent_at, attempts=1).data
    b'hello'
    """

    data: bytes  #: that was sent
    number: int  #: of the message in its queue; it never changes, and no other message has it
    sent_at: datetime.datetime  #: when it was committed, in UTC
    attempts: int  #: how often it was delivered to this subscriber, this time included
    #: How many messages for this subscriber were dropped unread between the one before and this.
    dropped_before: int = 0


@dataclasses.dataclass(frozen=True)
class Peeked:
    """Message that was looked at but not received, see :py:func:`persipubsub.control.peek`."""

    number: int  #: in its queue
    age_seconds: float  #: since it was sent
    subscribers: tuple[str, ...] | None  #: whom it was sent to; None: all of the queue
    content: bytes | None  #: None if the message is damaged


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """
    Message that was given up, and why.

    A message that was delivered as often as its subscriber's ``max_deliveries`` allows, and never
    acknowledged, is moved into the subscriber's ``dead_letter_queue``. There it is a message like
    any other, whose bytes are an envelope in MessagePack: a map with the fields of this class as
    keys, of which ``version`` is 1, and times are MessagePack's timestamps.

    >>> import datetime
    >>> now = datetime.datetime(2026, 11, 24, tzinfo=datetime.timezone.utc)
    >>> letter = DeadLetter(queue="greetings", subscriber="sub", number=7, sent_at=now, attempts=3,
    ...                     error="ValueError: no greeting", moved_at=now, data=b"?")
    >>> DeadLetter.decode(letter.encode()) == letter
    True
    """

    queue: str  #: key of the queue that it comes from
    subscriber: str  #: id of the subscriber that it could not be delivered to
    number: int  #: of the message in that queue
    sent_at: datetime.datetime  #: when it was committed there, in UTC
    attempts: int  #: how often it was delivered
    error: str  #: type and text of what the last delivery ended with, at most 500 characters
    moved_at: datetime.datetime  #: when it was given up, in UTC
    data: bytes  #: that was sent
    version: Literal[1] = 1  #: of the envelope

    def encode(self) -> bytes:
        """
        Encode the envelope.

        :return: bytes of a message
        """
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, msg: bytes) -> "DeadLetter":
        """
        Decode a message that was received from a queue of dead letters. No file is touched.

        :param msg: bytes of the message
        :return: what is in the envelope
        :raise CorruptMessageError: if it is no envelope of this version
        """
        try:
            return msgspec.msgpack.decode(msg, type=cls)
        except msgspec.DecodeError as error:
            raise CorruptMessageError(
                f"Expected a dead letter of version 1, but got {len(msg)} bytes: {error}"
            ) from error


#: The error of a delivery whose end nobody recorded.
NO_WORD: Final = "its process ended, or dropped it, before it was done"


def give_up(message: Message, queue: str, subscriber: str, attempts: int, error: str) -> DeadLetter:
    """
    Make the dead letter of a message, now.

    :param queue: its key
    :param attempts: how often it was delivered
    :param error: with which the last delivery ended
    """
    return DeadLetter(queue=queue,
                      subscriber=subscriber,
                      number=message.number,
                      sent_at=message.sent_at,
                      attempts=attempts,
                      error=error,
                      moved_at=datetime.datetime.now(datetime.UTC),
                      data=message.data)


def text_of(error: BaseException) -> str:
    """
    Describe an error of the user's code, even if its ``__str__`` fails.

    >>> text_of(ValueError("no greeting"))
    'ValueError: no greeting'
    """
    text = ""
    with contextlib.suppress(Exception):
        text = str(error)
    name = type(error).__qualname__
    return (f"{name}: {text}" if text else name)[:ERROR_CHARACTERS]


def retry_delay_ns(first_ns: int, deliveries: int) -> int:
    """
    Compute how long a message that failed waits for its next delivery, in nanoseconds.

    >>> hour_ns = 3600 * 10**9
    >>> retry_delay_ns(10, 1), retry_delay_ns(10, 3), retry_delay_ns(2 * hour_ns, 2) // hour_ns
    (10, 40, 2)

    :param first_ns: delay after the first delivery; each further one doubles it, up to an hour
    :param deliveries: so far
    """
    # 42 doublings bring any delay of at least a nanosecond to the limit.
    return min(first_ns << min(deliveries - 1, 42), max(_LONGEST_DELAY_NS, first_ns))


#: Where a subscriber goes on, see :py:func:`persipubsub.control.seek`: the beginning, the end, the
#: number of a message, or a time.
Place: TypeAlias = str | int | float | datetime.datetime

_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def time_ns_of(to: Place) -> int | None:
    """
    Check a place; convert it if it is a time.

    >>> time_ns_of("end"), time_ns_of(7), time_ns_of(1.5)
    (None, None, 1500000000)

    :param to: given by the user
    :return: a time in nanoseconds since 1970; None if it is no time
    :raise TypeError: if it is of another type
    :raise ValueError: if it is another text, or a time without a time zone
    """
    if isinstance(to, datetime.datetime):
        if to.utcoffset() is None:
            raise ValueError(f"Expected a time with its time zone, but got: {to!r}")
        return (to - _EPOCH) // datetime.timedelta(microseconds=1) * 1000
    if isinstance(to, float):
        if not math.isfinite(to * 1e9):
            raise ValueError(f"Expected a time in seconds since 1970, but got: {to!r}")
        return int(to * 1e9)
    if not isinstance(to, (str, int)) or isinstance(to, bool):
        raise TypeError("Expected a place of type str, int, float or datetime, but got: "
                        f"{type(to).__name__}")
    if isinstance(to, str) and to not in ("beginning", "end"):
        raise ValueError(f"Expected 'beginning', 'end', a number or a time, but got: {to!r}")
    return None
