"""
Say in plain Python what a queue promises, for tests to compare the real one with.

Nothing of the package is used here, and nothing is fast: messages are a list, what a subscriber has
before it is a set of numbers.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass
class Message:
    number: int
    data: bytes
    audience: frozenset[str] | None  #: None: every subscriber there was at that time
    time_ns: int


@dataclasses.dataclass
class Subscriber:
    """Hold what is before a subscriber, and what became of all the rest."""

    addressed: int = 0
    pending: set[int] = dataclasses.field(default_factory=set)
    acknowledged: int = 0
    failed: int = 0
    dropped_by_timeout: int = 0
    dropped_by_mark: int = 0
    cleared: int = 0
    skipped: int = 0
    dead_lettered: int = 0
    acknowledged_ns: int | None = None
    max_deliveries: int = 0  #: 0: any number
    delay_ns: int = 0
    attempts: dict[int, int] = dataclasses.field(default_factory=dict)
    due_ns: dict[int, int] = dataclasses.field(default_factory=dict)
    begun: set[int] = dataclasses.field(default_factory=set)  #: counted before they began
    is_paused: bool = False

    def forget(self) -> None:
        """Begin anew with messages that are not pending, if they ever are again."""
        self.attempts = {key: found for key, found in self.attempts.items() if key in self.pending}
        self.due_ns = {key: due for key, due in self.due_ns.items() if key in self.pending}
        self.begun &= self.pending

    def delays(self, number: int, now_ns: int) -> None:
        if self.delay_ns:
            self.due_ns[number] = now_ns + min(
                3600 * 10**9, self.delay_ns * 2**(self.attempts.get(number, 1) - 1))

    def is_resting(self, number: int, now_ns: int) -> bool:
        return self.due_ns.get(number, 0) > now_ns

    def is_spent(self, number: int) -> bool:
        return bool(self.max_deliveries) and self.attempts.get(number, 0) >= self.max_deliveries


class Twin:

    def __init__(self, subscribers: Sequence[str], next_number: int, timeout_ns: int,
                 max_messages: int, max_message_bytes: int, strategy: str, window_ns: int) -> None:
        self.subscribers = {name: Subscriber() for name in subscribers}
        self.log: list[Message] = []
        self.next_number = next_number
        self.timeout_ns = timeout_ns
        self.max_messages = max_messages
        self.max_message_bytes = max_message_bytes
        self.strategy = strategy
        self.window_ns = window_ns
        # Number and time of the messages that were sent with an id
        self.ids: dict[bytes, tuple[int, int]] = {}
        self.letters: list[tuple[str, int, int, bytes]] = []

    # Looking

    def waiting(self) -> list[Message]:
        """Return all messages from the oldest one on that somebody still has to acknowledge."""
        oldest = min((min(subscriber.pending)
                      for subscriber in self.subscribers.values() if subscriber.pending),
                     default=self.next_number)
        return [message for message in self.log if message.number >= oldest]

    def message(self, number: int) -> Message:
        return next(message for message in self.log if message.number == number)

    def is_expired(self, message: Message, now_ns: int) -> bool:
        """Tell whether a message is too old; one of just the age is not."""
        return now_ns - message.time_ns > self.timeout_ns

    def is_too_large(self, messages: Sequence[bytes]) -> bool:
        """Tell whether an empty queue could not hold the messages."""
        return (len(messages) > self.max_messages
                or sum(map(len, messages)) > self.max_message_bytes)

    def is_over(self, messages: Sequence[bytes]) -> bool:
        waiting = self.waiting()
        return (len(waiting) + len(messages) > self.max_messages
                or sum(len(message.data)
                       for message in waiting) + sum(map(len, messages)) > self.max_message_bytes)

    def timeouts(self) -> int:
        return sum(subscriber.dropped_by_timeout for subscriber in self.subscribers.values())

    def next_of(self,
                name: str,
                claimed: set[int],
                now_ns: int,
                most: int = 1,
                is_look: bool = False) -> list[Message]:
        """
        Find what a consumer gets next.

        What is too old is passed over; what was delivered often enough is moved away, but by a mere
        look.
        """
        subscriber = self.subscribers[name]
        found: list[Message] = []
        if subscriber.is_paused:
            return found
        for number in sorted(subscriber.pending):
            message = self.message(number)
            if self.is_expired(message, now_ns):
                continue
            is_free = number not in claimed and not subscriber.is_resting(number, now_ns)
            if is_free and not found and subscriber.is_spent(number) and not is_look:
                self.move(name, number)
            elif is_free and (is_look or not subscriber.is_spent(number)):
                found.append(message)
            elif found:
                break
            if len(found) == most:
                break
        return found

    def newest_of(self, name: str, claimed: set[int], now_ns: int) -> Message | None:
        """Find what a consumer gets that wants the newest message; what is older is skipped."""
        subscriber = self.subscribers[name]
        while subscriber.pending and not subscriber.is_paused:
            message = self.message(max(subscriber.pending))
            if self.is_expired(message, now_ns):
                return None
            if message.number in claimed or subscriber.is_resting(message.number, now_ns):
                return None
            if subscriber.is_spent(message.number):
                self.move(name, message.number)
                continue
            subscriber.skipped += len(subscriber.pending) - 1
            subscriber.pending = {message.number}
            return message
        return None

    # Changing

    def deliver(self, name: str, numbers: Sequence[int]) -> list[int]:
        """Count a delivery before it begins; return which one it is, for each message."""
        subscriber = self.subscribers[name]
        counts = [subscriber.attempts.get(number, 0) + 1 for number in numbers]
        if subscriber.max_deliveries:
            subscriber.attempts.update(zip(numbers, counts))
            subscriber.begun.update(numbers)
        return counts

    def fail(self, name: str, numbers: Sequence[int], now_ns: int) -> None:
        """Count a delivery that ended with an exception."""
        subscriber = self.subscribers[name]
        subscriber.failed += len(numbers)
        for number in numbers:
            if number not in subscriber.pending:
                continue
            if number not in subscriber.begun:
                subscriber.attempts[number] = subscriber.attempts.get(number, 0) + 1
            subscriber.begun.discard(number)
            if subscriber.is_spent(number):
                self.move(name, number)
            else:
                subscriber.delays(number, now_ns)

    def take_back(self, name: str, numbers: Sequence[int]) -> None:
        subscriber = self.subscribers[name]
        for number in subscriber.begun & set(numbers):
            subscriber.attempts[number] -= 1
            subscriber.begun.remove(number)

    def move(self, name: str, number: int) -> None:
        subscriber = self.subscribers[name]
        self.letters.append((name, number, subscriber.attempts[number], self.message(number).data))
        subscriber.pending.remove(number)
        subscriber.dead_lettered += 1

    def add(self, name: str) -> None:
        self.subscribers[name] = Subscriber()

    def send(self,
             messages: Sequence[bytes],
             audience: Sequence[str] | None,
             now_ns: int,
             ids: Sequence[bytes | None] | None = None) -> int | None:
        """
        Send; what is too old is dropped before anything else is.

        Return the number of the first message, None if the queue is full.
        """
        fresh: list[bytes] = []
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
                self._halve(len(fresh))
        self.ids = known
        self._append(fresh, audience, now_ns)
        return number

    def _append(self, messages: Sequence[bytes], audience: Sequence[str] | None,
                now_ns: int) -> None:
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

    def _halve(self, added: int) -> None:
        """Drop messages, so that half are left together with those to be added."""
        waiting = self.waiting()
        kept = max(0, (len(waiting) + added) // 2 - added)
        drops_newest = self.strategy == "prune_last"
        dropped = waiting[kept:] if drops_newest else waiting[:len(waiting) - kept]
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

    def delete(self, name: str, number: int) -> bool:
        """Let one message leave a subscriber; return False if it is not before it."""
        subscriber = self.subscribers[name]
        if number not in subscriber.pending:
            return False
        subscriber.pending.remove(number)
        subscriber.cleared += 1
        subscriber.forget()
        return True

    def seek(self, name: str, position: int) -> None:
        subscriber = self.subscribers[name]
        subscriber.forget()
        passed = {number for number in subscriber.pending if number < position}
        subscriber.skipped += len(passed)
        again = {
            message.number
            for message in self.log
            if message.number >= position and (message.audience is None or name in message.audience)
        }
        # What was done before is before it once more.
        subscriber.addressed += len(again - subscriber.pending)
        subscriber.pending = again

    def skip_to_newest(self, name: str) -> int:
        subscriber = self.subscribers[name]
        newest = max(subscriber.pending, default=0)
        skipped = {number for number in subscriber.pending if number < newest}
        subscriber.pending -= skipped
        subscriber.skipped += len(skipped)
        return len(skipped)

    def clear(self, deletes: bool = True) -> int:
        """Drop everything; return how many deliveries will not be. Who seeks back gets the rest."""
        cleared: dict[str, int] = {}
        for name, subscriber in self.subscribers.items():
            cleared[name] = len(subscriber.pending)
            subscriber.cleared += cleared[name]
            subscriber.pending.clear()
        if deletes:
            self.log = []
        return sum(cleared.values())
