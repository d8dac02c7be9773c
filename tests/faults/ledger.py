"""Check the ledger of a storm exactly."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, DefaultDict, Final, NamedTuple

from tests.faults import workers

_SECOND_NS: Final = 10**9


class Receipt(NamedTuple):
    record: int  #: its number in the ledger
    time_ns: int
    consumer: str


class Batch(NamedTuple):
    ids: tuple[str, ...]
    subscribers: tuple[str, ...]
    is_sent: bool  #: the call returned


class Books:

    def __init__(self, ledger: workers.Ledger, audiences: Mapping[str, Sequence[str]]) -> None:
        self.batches: list[Batch] = []
        self.received: DefaultDict[str, dict[str, list[Receipt]]] = collections.defaultdict(dict)
        self.lines: DefaultDict[str, DefaultDict[str, list[str]]] = collections.defaultdict(
            lambda: collections.defaultdict(list))
        self.killed: dict[str, tuple[int, int]] = {}
        self.disturbed: DefaultDict[str, list[int]] = collections.defaultdict(list)
        self.stopped_ns: list[int] = []
        self.done: set[tuple[str, str]] = set()
        self.failed: collections.Counter[tuple[str, str]] = collections.Counter()
        self.failures: collections.Counter[str] = collections.Counter()
        self.errors: list[str] = []
        self._audiences = audiences
        self._tries: dict[tuple[str, int], int] = {}
        records = ledger.records()
        self.torn = records.count([])
        for index, record in enumerate(records):
            if record:
                self._enter(index, int(record[0]), record[1], record[2:])

    def _enter(self, index: int, time_ns: int, kind: str, fields: list[str]) -> None:
        if kind == "try":
            publisher, source, first, end = fields
            self._tries[source, int(first)] = len(self.batches)
            self.batches.append(
                Batch(ids=tuple(f"{source}:{number}" for number in range(int(first), int(end))),
                      subscribers=tuple(self._audiences[publisher]),
                      is_sent=False))
        elif kind == "sent":
            place = self._tries[fields[1], int(fields[2])]
            self.batches[place] = self.batches[place]._replace(is_sent=True)
        elif kind == "received":
            subscriber, consumer, *ids = fields
            for identifier in ids:
                self.received[subscriber].setdefault(identifier,
                                                     []).append(Receipt(index, time_ns, consumer))
            self.lines[subscriber][consumer].extend(ids)
        elif kind == "done":
            self.done.update((fields[1], identifier) for identifier in fields[2:])
        elif kind == "failed":
            self.failed.update((fields[1], identifier) for identifier in fields[2:])
            self.failures[fields[0]] += len(fields) - 2
        elif kind == "killed":
            self.killed[fields[1]] = (index, time_ns)
            self.disturbed[fields[0]].append(time_ns)
        elif kind == "stopped":
            self.disturbed[fields[0]].append(time_ns)
            self.stopped_ns.append(time_ns)
        else:
            self.errors.append(" ".join(fields))

    # What must hold

    def lost(self) -> list[str]:
        """List what was sent, and not received by somebody whom it is for."""
        return [
            f"{identifier} by {subscriber}" for batch in self.batches if batch.is_sent
            for subscriber in batch.subscribers for identifier in batch.ids
            if identifier not in self.received[subscriber]
        ]

    def unknown(self) -> list[str]:
        """List what was received, and nobody tried to send it to that subscriber."""
        addressed: DefaultDict[str, set[str]] = collections.defaultdict(set)
        for batch in self.batches:
            for subscriber in batch.subscribers:
                addressed[subscriber].update(batch.ids)
        return [
            f"{identifier} by {subscriber}" for subscriber, received in self.received.items()
            for identifier in received if identifier not in addressed[subscriber]
        ]

    def halves(self) -> list[str]:
        """List batches of killed publishers of which a part was received, or by some only."""
        found: list[str] = []
        for batch in self.batches:
            counts = [
                sum(identifier in self.received[subscriber] for identifier in batch.ids)
                for subscriber in batch.subscribers
            ]
            if not batch.is_sent and set(counts) not in ({0}, {len(batch.ids)}):
                found.append(f"{batch.ids[0]}: {counts} of {len(batch.ids)}")
        return found

    def twice(self) -> list[str]:
        """
        List what was received again although it was neither given back nor its consumer killed.

        Whoever received it before must have been killed, before it was received again, and not have
        acknowledged it.
        """
        found: list[str] = []
        for received in self.received.values():
            for identifier, receipts in received.items():
                used: collections.Counter[str] = collections.Counter()
                for before, after in zip(receipts, receipts[1:]):
                    consumer = before.consumer
                    used[consumer] += 1
                    if used[consumer] <= self.failed[consumer, identifier]:
                        continue
                    killed, _ = self.killed.get(consumer, (after.record, 0))
                    if killed >= after.record or (consumer, identifier) in self.done:
                        found.append(f"{identifier} by {consumer} and {after.consumer}")
        return found

    def unfinished(self) -> list[str]:
        """List what was received, and then neither finished nor was its consumer killed."""
        return [
            f"{identifier} by {receipts[-1].consumer}" for received in self.received.values()
            for identifier, receipts in received.items()
            if (receipts[-1].consumer,
                identifier) not in self.done and receipts[-1].consumer not in self.killed
        ]

    def disordered(self, subscriber: str, is_shared: bool) -> list[str]:
        """
        List what one process of a subscriber received after something that was sent later.

        What is delivered again does not count. Nor does what another process of the subscriber had
        claimed, and was killed (or stopped for a while) before it noted that.
        """
        found: list[str] = []
        everything = self.received[subscriber]
        for consumer, ids in self.lines[subscriber].items():
            latest: dict[str, tuple[int, int]] = {}
            for identifier in ids:
                source, _, text = identifier.partition(":")
                number, receipt = int(text), everything[identifier][0]
                highest, passed_ns = latest.get(source, (-1, 0))
                if number > highest:
                    latest[source] = (number, receipt.time_ns)
                elif receipt.consumer == consumer and ids.count(identifier) == 1:
                    if not (is_shared
                            and self._is_disturbed(subscriber, passed_ns, receipt.time_ns)):
                        found.append(f"{identifier} by {consumer}")
        return found

    def _is_disturbed(self, subscriber: str, begin_ns: int, end_ns: int) -> bool:
        """Tell whether somebody was killed or stopped while a message was passed over."""
        return any(begin_ns - _SECOND_NS < time_ns < end_ns
                   for time_ns in self.disturbed[subscriber])

    # Figures

    def count_sent(self) -> int:
        return sum(len(batch.ids) for batch in self.batches if batch.is_sent)

    def bounds(self, subscriber: str) -> tuple[int, int]:
        """Return how many messages a subscriber was sent at least and at most."""
        mine = [batch for batch in self.batches if subscriber in batch.subscribers]
        return (sum(len(batch.ids) for batch in mine
                    if batch.is_sent), sum(len(batch.ids) for batch in mine))

    def takeovers_ms(self, subscriber: str) -> list[float]:
        """
        List how long it took from each kill until another process had the message, in order.

        Of a batch, the first message counts: those behind it wait until somebody is free. There has
        to be somebody else who was at work all the time, neither killed nor stopped.
        """
        found: dict[str, tuple[float, int]] = {}
        working_ns: dict[str, int] = {}
        for receipts in self.received[subscriber].values():
            for receipt in receipts:
                working_ns[receipt.consumer] = min(
                    receipt.time_ns, working_ns.get(receipt.consumer, receipt.time_ns))
            for before, after in zip(receipts, receipts[1:]):
                record, time_ns = self.killed.get(before.consumer, (after.record, 0))
                if record < after.record and before.consumer != after.consumer:
                    taken = ((after.time_ns - time_ns) / 1e6, after.time_ns)
                    found[before.consumer] = min(taken, found.get(before.consumer, taken))
        never = (0, 1 << 63)
        return sorted(taken_ms for consumer, (taken_ms, taken_ns) in found.items() if not any(
            self.killed[consumer][1] < time_ns < taken_ns for time_ns in self.stopped_ns) and any(
                begin_ns < self.killed[consumer][1] and self.killed.get(other, never)[1] > taken_ns
                for other, begin_ns in working_ns.items() if other != consumer))

    def again(self) -> int:
        """Count deliveries of what had been delivered before."""
        return sum(
            len(receipts) - 1 for received in self.received.values()
            for receipts in received.values())


def percentile(values: Sequence[Any], percent: float) -> Any:
    return values[min(len(values) - 1, int(len(values) * percent / 100))] if values else None
