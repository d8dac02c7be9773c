"""Hold what is known of a message beside its bytes."""

import dataclasses
import datetime

__all__ = ["Message"]


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """
    Hold a message that was received, with what is known of it.

    >>> import datetime
    >>> sent_at = datetime.datetime(2026, 11, 24, tzinfo=datetime.timezone.utc)
    >>> Message(data=b"hello", number=1, sent_at=sent_at, attempts=1).data
    b'hello'
    """

    data: bytes  #: that was sent
    number: int  #: of the message in its queue; it never changes, and no other message has it
    sent_at: datetime.datetime  #: when it was committed, in UTC
    attempts: int  #: how often it was delivered to this subscriber, this time included
