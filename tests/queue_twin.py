"""
Say in plain Python what a queue promises, for tests to compare the real one with.

Nothing of the package is used here, and nothing is fast: messages are a list, what a subscriber has
before it is a set of numbers.
"""

import dataclasses
from typing import Dict, FrozenSet, List, Optional, Sequence, Set, Tuple


@dataclasses.dataclass
class Message:
    """Hold what was sent."""

    number: int
    data: bytes
    audience: Optional[FrozenSet[str]]  #: None: every subscriber there was at that time
    time_ns: int


@dataclasses.dataclass
class Subscriber:
    """Hold what is before a subscriber, and what became of all the rest."""

    addressed: int = 0
    pending: Set[int] = dataclasses.field(default_factory=set)
    acknowledged: int = 0
    failed: int = 0
    dropped_by_timeout: int = 0
    dropped_by_mark: int = 0
    cleared: int = 0
    skipped: int = 0
    acknowledged_ns: Optional[int] = None


class Twin:
    """Do what a queue does, to lists."""

    def __init__(self, subscribers: Sequence[str], next_number: int, timeout_ns: int,
                 max_messages: int, max_message_bytes: int, strategy: str, window_ns: int) -> None:
        self.subscribers = {name: Subscriber() for name in subscribers}
        self.log: List[Message] = []
        self.next_number = next_number
        self.timeout_ns = timeout_ns
        self.max_messages = max_messages
        self.max_message_bytes = max_message_bytes
        self.strategy = strategy
        self.window_ns = window_ns
        # Number and time of the messages that were sent with an id
        self.ids: Dict[bytes, Tuple[int, int]] = {}

    # Looking

    def waiting(self) -> List[Message]:
        """Return all messages from the oldest one on that somebody still has to acknowledge."""
        oldest = min((min(subscriber.pending)
                      for subscriber in self.subscribers.values() if subscriber.pending),
                     default=self.next_number)
        return [message for message in self.log if message.number >= oldest]

    def message(self, number: int) -> Message:
        """Return a message."""
        return next(message for message in self.log if message.number == number)

    def is_expired(self, message: Message, now_ns: int) -> bool:
        """Tell whether a message is too old; one of just the age is not."""
        return now_ns - message.time_ns > self.timeout_ns

    def is_too_large(self, messages: Sequence[bytes]) -> bool:
        """Tell whether an empty queue could not hold the messages."""
        return (len(messages) > self.max_messages
                or sum(map(len, messages)) > self.max_message_bytes)

    def is_over(self, messages: Sequence[bytes]) -> bool:
        """Tell whether the messages would pass a high-water mark."""
        waiting = self.waiting()
        return (len(waiting) + len(messages) > self.max_messages
                or sum(len(message.data)
                       for message in waiting) + sum(map(len, messages)) > self.max_message_bytes)

    def timeouts(self) -> int:
        """Count all that was dropped since it was too old."""
        return sum(subscriber.dropped_by_timeout for subscriber in self.subscribers.values())

    def next_of(self, name: str, claimed: Set[int], now_ns: int, most: int = 1) -> List[Message]:
        """Find what a consumer gets next; what is too old is dropped when it is next."""
        found: List[Message] = []
        for number in sorted(self.subscribers[name].pending):
            message = self.message(number)
            if self.is_expired(message, now_ns):
                self.expire(now_ns)
                return self.next_of(name, claimed, now_ns, most)
            if number not in claimed:
                found.append(message)
            elif found:
                break
            if len(found) == most:
                break
        return found

    # Changing

    def add(self, name: str) -> None:
        """Add a subscriber that gets what is sent from now on."""
        self.subscribers[name] = Subscriber()

    def send(self,
             messages: Sequence[bytes],
             audience: Optional[Sequence[str]],
             now_ns: int,
             expires: bool,
             ids: Optional[Sequence[Optional[bytes]]] = None) -> Optional[int]:
        """
        Send; what is too old is dropped at times, and always before anything else is.

        Return the number of the first message, None if the queue is full.
        """
        fresh: List[bytes] = []
        known = dict(self.ids)
        number = self.next_number
        for index, (data, identifier) in enumerate(zip(messages, ids or [None] * len(messages))):
            found, time_ns = known.get(identifier or b"", (0, -self.window_ns))
            if not found or now_ns - time_ns > self.window_ns:
                found = self.next_number + len(fresh)
                fresh.append(data)
                if identifier is not None:
                    known[identifier] = (found, now_ns)
            if index == 0:
                number = found
        if fresh and self.is_over(fresh):
            self.expire(now_ns)
            while self.is_over(fresh):
                if self.strategy in ("reject", "block"):
                    return None
                self._halve()
        self.ids = known
        self._append(fresh, audience, now_ns)
        if expires:
            self.expire(now_ns)
        return number

    def _append(self, messages: Sequence[bytes], audience: Optional[Sequence[str]],
                now_ns: int) -> None:
        """Add messages at the end."""
        names = list(self.subscribers if audience is None else audience)
        for data in messages:
            message = Message(self.next_number, data,
                              None if audience is None else frozenset(audience), now_ns)
            self.next_number += 1
            self.log.append(message)
            for name in names:
                self.subscribers[name].addressed += 1
                self.subscribers[name].pending.add(message.number)

    def expire(self, now_ns: int) -> int:
        """Drop what is too old; return how many deliveries will not be."""
        old = {message.number for message in self.log if self.is_expired(message, now_ns)}
        for subscriber in self.subscribers.values():
            subscriber.dropped_by_timeout += len(subscriber.pending & old)
            subscriber.pending -= old
        return self.timeouts()

    def _halve(self) -> None:
        """Drop half of the waiting messages, rounded up."""
        waiting = self.waiting()
        half = (len(waiting) + 1) // 2
        drops_newest = self.strategy == "prune_last"
        dropped = waiting[len(waiting) - half:] if drops_newest else waiting[:half]
        numbers = {message.number for message in dropped}
        for subscriber in self.subscribers.values():
            subscriber.dropped_by_mark += len(subscriber.pending & numbers)
            subscriber.pending -= numbers
        if drops_newest:
            self.log = [message for message in self.log if message.number not in numbers]

    def acknowledge(self, name: str, number: int, now_ns: int) -> None:
        """Acknowledge a message; one that was dropped meanwhile stays dropped."""
        subscriber = self.subscribers[name]
        if number in subscriber.pending:
            subscriber.pending.remove(number)
            subscriber.acknowledged += 1
            subscriber.acknowledged_ns = now_ns

    def skip_to_newest(self, name: str) -> int:
        """Acknowledge all messages in front of the newest one; return how many."""
        subscriber = self.subscribers[name]
        newest = max(
            (message.number
             for message in self.log if message.audience is None or name in message.audience),
            default=0)
        skipped = {number for number in subscriber.pending if number < newest}
        subscriber.pending -= skipped
        subscriber.skipped += len(skipped)
        return len(skipped)

    def clear(self) -> int:
        """Drop everything; return how many deliveries will not be."""
        cleared: Dict[str, int] = {}
        for name, subscriber in self.subscribers.items():
            cleared[name] = len(subscriber.pending)
            subscriber.cleared += cleared[name]
            subscriber.pending.clear()
        self.log = []
        return sum(cleared.values())
