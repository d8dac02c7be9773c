"""
Drive one queue with several subscribers and several consumers against its twin.

There are always two :py:class:`persipubsub.queue.Queue` on the store, as in two processes: they
remember different things of what the other did.
"""

# pylint: disable=attribute-defined-outside-init
# pylint: disable=too-many-public-methods
import contextlib
import functools
import os
import shutil
import tempfile
import time

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import persipubsub.message
import persipubsub.queue
import persipubsub.statistics
from persipubsub import config, errors
from persipubsub.lmdb_engine import attempts, consuming
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import maintenance
from tests import stores
from tests.queue_twin import Twin

TIMEOUT_NS = 1000

WINDOW_NS = 700

NAMES = ("sub", "another", "später")

#: How often a message is delivered to each of them, and its rest after the first failure.
POLICIES = (attempts.Policy(), attempts.Policy(max_deliveries=2, delay_ns=3),
            attempts.Policy(delay_ns=TIMEOUT_NS // 8), attempts.Policy(max_deliveries=1),
            attempts.Policy(max_deliveries=3))

SIDES = st.integers(min_value=0, max_value=1)

BATCHES = st.sampled_from([1, 1, 2, 5])

MESSAGES = st.lists(st.binary(max_size=12), min_size=1, max_size=7)


class QueueMachine(RuleBasedStateMachine):
    """Do the same to a queue and to its twin, and compare them after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.mkdtemp(prefix="persipubsub-machine-")
        self.patch = pytest.MonkeyPatch()
        self.clock = stores.Clock()
        self.queues: list[persipubsub.queue.Queue] = []
        self.consumers: dict[tuple[int, str], consuming.Consumer] = {}
        # How many messages were dropped unread when a consumer took one last.
        self.drops: dict[tuple[int, str], int] = {}
        self.is_rebuilt = False
        # Side of the consumer, its subscriber, what it took
        self.leases: list[tuple[int, str, consuming.Lease]] = []

    @initialize(subscribers=st.integers(min_value=1, max_value=3),
                max_messages=st.sampled_from([1, 4, 5, 8, 9, 20]),
                max_message_bytes=st.sampled_from([20, 100, 1000, 1000]),
                strategy=st.sampled_from(config.Strategy),
                retain_ns=st.sampled_from([0, 0, 3, TIMEOUT_NS // 2]),
                durability=st.sampled_from(config.Durability),
                block_bytes=st.sampled_from([24, 60, 1 << 20]),
                policies=st.tuples(*[st.sampled_from(POLICIES)] * len(NAMES)))
    def create(self, subscribers: int, max_messages: int, max_message_bytes: int,
               strategy: config.Strategy, retain_ns: int, durability: config.Durability,
               block_bytes: int, policies: tuple[attempts.Policy, ...]) -> None:
        self.patch.setattr(fmt, "BLOCK_BYTES", block_bytes)
        self.policies = dict(zip(NAMES, policies))
        letters_path = os.path.join(self.directory, "letters")
        letters = stores.settings()
        persipubsub.queue.Queue.ensure(letters_path, letters, ["dead_letters"])
        self.letters = persipubsub.queue.Queue(letters_path, letters)
        self.path = os.path.join(self.directory, "queue")
        self.settings = stores.settings(msg_timeout_secs=TIMEOUT_NS / 1e9,
                                        max_msgs_num=max_messages,
                                        size_bytes=max_message_bytes,
                                        strategy=strategy,
                                        retain_secs=retain_ns / 1e9,
                                        once_window_secs=WINDOW_NS / 1e9,
                                        durability=durability)
        self.retain_ns = retain_ns
        self.retries = {
            name: persipubsub.queue.Retries(
                policy, "the queue",
                functools.partial(persipubsub.queue.Queue, letters_path, letters))
            for name, policy in self.policies.items()
        }
        names = NAMES[:subscribers]
        persipubsub.queue.Queue.ensure(self.path, self.settings, names)
        self.queues = [self.open(), self.open()]
        self.twin = Twin(subscribers=names,
                         next_number=self.queues[0].statistics().next_number,
                         timeout_ns=TIMEOUT_NS,
                         max_messages=max_messages,
                         max_message_bytes=max_message_bytes,
                         strategy=strategy.value,
                         window_ns=WINDOW_NS)
        self.apply_policies()

    def apply_policies(self) -> None:
        for name, subscriber in self.twin.subscribers.items():
            subscriber.max_deliveries, subscriber.delay_ns = self.policies[name]

    def open(self) -> persipubsub.queue.Queue:
        return persipubsub.queue.Queue(self.path, self.settings, self.retries, self.clock)

    def teardown(self) -> None:
        try:
            if self.queues:
                self.drain()
        finally:
            for queue in self.queues:
                queue.close()
            if self.queues:
                self.letters.close()
            self.patch.undo()
            shutil.rmtree(self.directory)

    def drain(self) -> None:
        """Take all that is left; the store is as good as empty then."""
        for _, name, held in self.leases:
            held.nack()
            self.twin.take_back(name, held.numbers)
        self.leases = []
        for name, subscriber in self.twin.subscribers.items():
            self.set_paused(0, name, False)
            consumer = self.queues[0].consumer(name)
            # Whatever rests is due then, or too old.
            self.clock.now_ns += TIMEOUT_NS
            while expected := self.twin.next_of(name, set(), self.clock.now_ns):
                lease = consumer.take(timeout=0)
                assert lease is not None, (name, expected)
                assert lease.numbers == [expected[0].number]
                assert lease.messages == [expected[0].data]
                lease.ack()
                subscriber.pending.remove(expected[0].number)
            assert consumer.take(timeout=0) is None
            self.expire(0)
        self.letters_are_equal()
        self.clock.now_ns += self.retain_ns
        self.queues[0].prune()
        self.expire(0)
        assert not any(subscriber.pending for subscriber in self.twin.subscribers.values())
        # The journal is compared as well.
        assert maintenance.verify(self.path, self.settings, persipubsub.statistics.Progress()) == []
        statistics = self.queues[0].statistics()
        assert (statistics.messages, statistics.message_bytes) == (0, 0)
        assert len(stores.blocks(self.queues[0])) <= 1
        assert self.queues[0].put([b"last"]) == self.twin.next_number

    def claimed(self, name: str) -> set[int]:
        return {
            number
            for _, owner, lease in self.leases if owner == name for number in lease.numbers
        }

    def name(self, index: int) -> str:
        return list(self.twin.subscribers)[index % len(self.twin.subscribers)]

    def letters_are_equal(self) -> None:
        found = []
        for msg in stores.take_all(self.letters, "dead_letters"):
            letter = persipubsub.message.DeadLetter.decode(msg)
            found.append((letter.subscriber, letter.number, letter.attempts, letter.data))
        assert found == self.twin.letters

    # Sending

    @rule(side=SIDES, count=st.integers(min_value=2, max_value=12), message=st.binary(max_size=3))
    def send_one_by_one(self, side: int, count: int, message: bytes) -> None:
        for index in range(count):
            self.put(side=side, messages=[message + bytes((index, ))], audience=None)

    @rule(side=SIDES, messages=MESSAGES, chosen=st.sampled_from([0, 0, 0, 1, 2, 3, 4, 6]))
    def send_many(self, side: int, messages: list[bytes], chosen: int) -> None:
        names = [name for index, name in enumerate(self.twin.subscribers) if chosen & 1 << index]
        self.put(side=side, messages=messages, audience=tuple(sorted(names)) or None)

    @rule(side=SIDES,
          messages=MESSAGES,
          ids=st.lists(st.sampled_from([None, b"a", b"b", b"c", b"d"]), min_size=7, max_size=7))
    def send_once(self, side: int, messages: list[bytes], ids: list[bytes | None]) -> None:
        self.put(side=side, messages=messages, audience=None, ids=ids[:len(messages)])

    def put(self,
            side: int,
            messages: list[bytes],
            audience: tuple[str, ...] | None,
            ids: list[bytes | None] | None = None) -> None:
        queue = self.queues[side]
        if self.twin.is_too_large(messages):
            with pytest.raises(errors.MessageTooLargeError):
                queue.put(messages, audience, timeout=0, msg_ids=ids)
            return
        number: int | None = None
        with contextlib.suppress(errors.QueueFullError):
            number = queue.put(messages, audience, timeout=0, msg_ids=ids)
        assert number == self.twin.send(messages, audience, self.clock.now_ns, ids)
        self.expire(side)

    def expire(self, side: int) -> None:
        """Let the twin drop what is too old if the queue did, which looks for it now and then."""
        expired = sum(subscriber.dropped_by_timeout
                      for subscriber in self.queues[side].statistics().subscribers)
        if expired != self.twin.timeouts():
            self.twin.expire(self.clock.now_ns)

    @rule(side=SIDES, sendings=st.lists(MESSAGES, min_size=1, max_size=4))
    def send_each(self, side: int, sendings: list[list[bytes]]) -> None:
        """Let several tasks send at the same time."""
        outcomes = self.queues[side].put_each([(messages, None, None) for messages in sendings])
        for messages, outcome in zip(sendings, outcomes):
            if self.twin.is_too_large(messages):
                assert isinstance(outcome, errors.MessageTooLargeError)
                continue
            number = self.twin.send(messages, None, self.clock.now_ns)
            assert isinstance(outcome, errors.QueueFullError) == (number is None)
        self.expire(side)

    # Receiving

    @rule(side=SIDES, index=st.integers(min_value=0, max_value=3), most=BATCHES)
    def take(self, side: int, index: int, most: int) -> None:
        name = self.name(index)
        consumer = self.consumer(side, name)
        expected = self.twin.next_of(name, self.claimed(name), self.clock.now_ns, most)
        lease = consumer.take(timeout=0, max_messages=most)
        self.expire(side)
        if not expected:
            assert lease is None
            return
        assert lease is not None
        self.hold(side, name, lease)
        # It may end early, where the numbers of other subscribers' messages lie in between.
        count = len(lease.numbers)
        assert lease.numbers == [message.number for message in expected[:count]]
        assert lease.messages == [message.data for message in expected[:count]]
        assert 0 < count <= most
        if count < len(expected):
            assert expected[count].number > expected[0].number + count

    def consumer(self, side: int, name: str) -> consuming.Consumer:
        consumer = self.consumers.get((side, name))
        if consumer is None:
            consumer = self.consumers[(side, name)] = self.queues[side].consumer(name)
            self.drops[(side, name)] = self.dropped(name)
        return consumer

    def dropped(self, name: str) -> int:
        subscriber = self.twin.subscribers[name]
        return subscriber.dropped_by_timeout + subscriber.dropped_by_mark

    def hold(self, side: int, name: str, lease: consuming.Lease) -> None:
        self.leases.append((side, name, lease))
        details = lease.details()
        assert [message.number for message in details] == lease.numbers
        assert [message.data for message in details] == lease.messages
        assert [message.attempts for message in details] == self.twin.deliver(name, lease.numbers)
        dropped, self.drops[(side, name)] = self.drops[(side, name)], self.dropped(name)
        assert ([message.dropped_before for message in details
                 ] == [self.dropped(name) - dropped] + [0] * (len(details) - 1))

    @precondition(lambda self: any(len(entry[2].numbers) > 1 for entry in self.leases))
    @rule(index=st.integers(min_value=0, max_value=20),
          count=st.integers(1, 4),
          how=st.sampled_from(["acknowledge", "fail", "give back"]))
    def end_in_part(self, index: int, count: int, how: str) -> None:
        """Let the first messages of a batch be ended by themselves."""
        _, name, lease = self.leases[index % len(self.leases)]
        count = min(count, len(lease.numbers) - 1)
        ended = lease.numbers[:count]
        if count and how == "acknowledge":
            lease.ack(count)
            for number in ended:
                self.twin.acknowledge(name, number, self.clock.now_ns)
        elif count and how == "fail":
            lease.nack(ValueError("no"), count)
            self.twin.fail(name, ended, self.clock.now_ns)
        elif count:
            lease.nack(count=count)
            self.twin.take_back(name, ended)

    @rule(side=SIDES, index=st.integers(min_value=0, max_value=3))
    def take_newest(self, side: int, index: int) -> None:
        name = self.name(index)
        consumer = self.consumer(side, name)
        expected = self.twin.newest_of(name, self.claimed(name), self.clock.now_ns)
        lease = consumer.take(timeout=0, is_newest=True)
        self.expire(side)
        if expected is None:
            assert lease is None
            return
        assert lease is not None
        assert (lease.numbers, lease.messages) == ([expected.number], [expected.data])
        self.hold(side, name, lease)

    @rule(most=BATCHES)
    def take_on_both_sides(self, most: int) -> None:
        for side in (0, 1):
            self.take(side=side, index=0, most=most)

    @precondition(lambda self: self.leases)
    @rule(index=st.integers(min_value=0, max_value=20))
    def acknowledge(self, index: int) -> None:
        _, name, lease = self.leases.pop(index % len(self.leases))
        lease.ack()
        for number in lease.numbers:
            self.twin.acknowledge(name, number, self.clock.now_ns)

    @rule(side=SIDES, index=st.integers(min_value=0, max_value=3), most=BATCHES)
    def receive(self, side: int, index: int, most: int) -> None:
        before = len(self.leases)
        self.take(side=side, index=index, most=most)
        if len(self.leases) > before:
            self.acknowledge(index=before)

    @rule(side=SIDES, most=BATCHES, messages=MESSAGES)
    def receive_while_others_send(self, side: int, most: int, messages: list[bytes]) -> None:
        """Much may happen to a message while it is being worked on."""
        before = len(self.leases)
        self.take(side=side, index=0, most=most)
        for index, message in enumerate(messages):
            self.put(side=index % 2, messages=[message], audience=None)
        if len(self.leases) > before:
            self.acknowledge(index=before)

    @rule(side=SIDES,
          index=st.integers(min_value=0, max_value=3),
          most=BATCHES,
          how=st.sampled_from(["acknowledge", "fail", "fail", "die", "give back"]))
    def finish_too_late(self, side: int, index: int, most: int, how: str) -> None:
        """Let messages get too old while they are being worked on."""
        before = len(self.leases)
        self.take(side=side, index=index, most=most)
        self.clock.now_ns += TIMEOUT_NS + 1
        if len(self.leases) == before:
            return
        if how == "acknowledge":
            self.acknowledge(index=before)
        else:
            self.fail(index=before, how=how)

    @precondition(lambda self: self.leases)
    @rule(index=st.integers(min_value=0, max_value=20),
          how=st.sampled_from(["fail", "fail", "fail", "die", "give back"]))
    def fail(self, index: int, how: str) -> None:
        _, name, lease = self.leases.pop(index % len(self.leases))
        if how == "fail":
            lease.nack(ValueError("no"))
            self.twin.fail(name, lease.numbers, self.clock.now_ns)
        elif how == "give back":
            lease.nack()
            self.twin.take_back(name, lease.numbers)
        else:
            # As much is left of a consumer that was killed: the kernel gives the claim back.
            del lease

    @rule(side=SIDES, index=st.integers(min_value=0, max_value=3), times=st.integers(1, 4))
    def fail_again(self, side: int, index: int, times: int) -> None:
        for _ in range(times):
            before = len(self.leases)
            self.take(side=side, index=index, most=1)
            if len(self.leases) > before:
                self.fail(index=before, how="fail")

    @rule(side=SIDES, index=st.integers(min_value=0, max_value=3))
    def front(self, side: int, index: int) -> None:
        name = self.name(index)
        expected = self.twin.next_of(name, self.claimed(name), self.clock.now_ns, is_look=True)
        assert self.queues[side].consumer(name).front() == (expected[0].data if expected else None)
        self.expire(side)

    # Looking after the queue

    @rule(step_ns=st.sampled_from([1, 2, 3, TIMEOUT_NS // 2, TIMEOUT_NS, TIMEOUT_NS + 1]))
    def advance_clock(self, step_ns: int) -> None:
        self.clock.now_ns += step_ns

    @rule(side=SIDES,
          index=st.integers(min_value=0, max_value=3),
          what=st.sampled_from([
              "prune", "prune", "pop to top", "pop to top", "clear", "begin to clear", "add", "add",
              "reopen", "reopen", "reopen all", "rebuild", "pause", "resume"
          ]))
    def look_after(self, side: int, index: int, what: str) -> None:
        """Do one of the things that end much of what goes on: one rule, to be chosen seldom."""
        if what == "prune":
            self.prune(side)
        elif what == "pop to top":
            name = self.name(index)
            assert self.queues[side].skip_to_newest(name) == self.twin.skip_to_newest(name)
        elif what == "clear":
            assert self.queues[side].clear() == self.twin.clear()
            assert stores.blocks(self.queues[0]) in ([], [range(end := self.stored()[1] - 1, end)])
        elif what == "begin to clear":
            # All that is left of a clear that was killed behind its transaction.
            assert stores.begin_to_clear(self.queues[side]) == self.twin.clear(deletes=False)
        elif what == "add":
            self.add_subscriber(from_beginning=bool(index % 2))
        elif what in ("pause", "resume"):
            self.set_paused(side, self.name(index), what == "pause")
        elif what == "rebuild":
            self.rebuild()
        else:
            self.reopen((side, ) if what == "reopen" else (0, 1))

    def set_paused(self, side: int, name: str, is_paused: bool) -> None:
        subscriber = self.twin.subscribers[name]
        assert self.queues[side].pause(name, is_paused) == (subscriber.is_paused != is_paused)
        subscriber.is_paused = is_paused

    @rule(side=SIDES,
          index=st.integers(min_value=0, max_value=3),
          back=st.integers(min_value=-1, max_value=12))
    def delete(self, side: int, index: int, back: int) -> None:
        name = self.name(index)
        number = max(0, self.twin.next_number - back)
        assert self.queues[side].delete(name, number) == self.twin.delete(name, number)

    @rule(side=SIDES,
          index=st.integers(min_value=0, max_value=3),
          place=st.sampled_from(["beginning", "beginning", "end", "number", "number", "time"]),
          back=st.integers(min_value=-2, max_value=20))
    def seek(self, side: int, index: int, place: str, back: int) -> None:
        name = self.name(index)
        queue = self.queues[side]
        to: str | int | float = place
        head, end = self.stored()
        expected = {"beginning": 0, "end": end, "number": self.twin.next_number - back}.get(place)
        oldest_ns = self.clock.now_ns - TIMEOUT_NS
        if place == "number":
            to = self.twin.next_number - back
        if place == "time":
            # Half a year ago: the wall clock goes on between here and there.
            to = time.time() - 1.5e7
        if place in ("beginning", "time"):
            expected = min((message.number for message in self.twin.log
                            if message.number >= head and message.time_ns >= oldest_ns),
                           default=end)
        assert expected is not None
        if place == "number":
            # The next one that is stored: who works on one that is gone must not be taken for
            # somebody else.
            stored = sorted(message.number for message in self.twin.log if message.number >= head)
            expected = next((number for number in stored if number >= expected), end)
        position = queue.seek(name, to)
        assert position == expected
        self.twin.seek(name, position)
        # What fails again is another letter, known by the time of its first delivery.
        self.clock.now_ns += 1

    def stored(self) -> tuple[int, int]:
        """Return the first number that is stored, and the next one."""
        blocks = stores.blocks(self.queues[0])
        return blocks[0].start if blocks else self.twin.next_number, self.twin.next_number

    def prune(self, side: int) -> None:
        before = self.twin.timeouts()
        assert self.queues[side].prune() == self.twin.expire(self.clock.now_ns) - before
        # Whatever is at the head now is needed by somebody, or retained, or only keeps its numbers
        # taken.
        blocks = stores.blocks(self.queues[0])
        waiting = self.twin.waiting()
        if len(blocks) > 1 and not (waiting and blocks[0].stop > waiting[0].number):
            if blocks[0]:
                first = self.twin.message(blocks[0].start)
                assert first.time_ns > self.clock.now_ns - self.retain_ns
            else:
                # What was cleared, or a rebuild, left a placeholder: a subscriber is in front of it.
                assert blocks[0].start >= min(
                    stores.figures(self.queues[0], name).position for name in self.twin.subscribers)
        # What is retained is there, but for what was cleared or made room for.
        numbers = {number for block in blocks for number in block}
        assert {
            message.number
            for message in self.twin.log if message.time_ns > self.clock.now_ns - self.retain_ns
        } <= numbers

    def add_subscriber(self, from_beginning: bool) -> None:
        names = NAMES[:1 + len(self.twin.subscribers)]
        # The clock of the queue itself is behind the injected one, until it was rebuilt: nothing is
        # too old by it.
        from_beginning = from_beginning and not self.is_rebuilt
        persipubsub.queue.Queue.ensure(self.path, self.settings, names, names if from_beginning else
                                       ())
        if names[-1] not in self.twin.subscribers:
            self.twin.add(names[-1])
            self.apply_policies()
            if from_beginning:
                self.twin.seek(names[-1], self.stored()[0])
        # The first subscribers of a new queue may cost a number.
        assert self.queues[0].statistics().next_number == self.twin.next_number

    def reopen(self, sides: tuple[int, ...]) -> None:
        """Close queues, perhaps with them the store; what their consumers had is given back."""
        for side in sides:
            self.queues[side].close()
        self.consumers = {
            key: value
            for key, value in self.consumers.items() if key[0] not in sides
        }
        self.leases = [entry for entry in self.leases if entry[0] not in sides]
        for side in sides:
            self.queues[side] = self.open()

    def rebuild(self) -> None:
        """Let the machine go down behind an acknowledgement that is safe."""
        for queue in self.queues:
            queue.close()
        stores.lose_power(self.path)
        self.reopen((0, 1))
        self.twin.next_number += 1 << 32
        self.is_rebuilt = True

    # Comparing

    @invariant()
    def store_is_sound(self) -> None:
        assert self.queues[0].check() == []

    @invariant()
    def attempts_are_those_of_pending_messages(self) -> None:
        """Nothing is left behind, as there is little enough for it to go at once."""
        for name in self.twin.subscribers:
            position = stores.figures(self.queues[0], name).position
            for number in stores.attempts(self.queues[0], name):
                assert number >= position

    @invariant()
    def statistics_are_equal(self) -> None:
        statistics = self.queues[1].statistics()
        waiting = self.twin.waiting()
        assert statistics.messages == len(waiting)
        assert statistics.message_bytes == sum(len(message.data) for message in waiting)
        assert statistics.next_number == self.twin.next_number
        assert statistics.oldest_age_seconds == ((self.clock.now_ns - waiting[0].time_ns) /
                                                 1e9 if waiting else None)
        assert {entry.subscriber for entry in statistics.subscribers} == set(self.twin.subscribers)
        for entry in statistics.subscribers:
            self.compare(entry)

    def compare(self, entry: "persipubsub.statistics.SubscriberStatistics") -> None:
        expected = self.twin.subscribers[entry.subscriber]
        assert entry.lag == len(expected.pending)
        assert (entry.acknowledged, entry.failed, entry.dropped_by_timeout, entry.dropped_by_mark,
                entry.cleared, entry.skipped, entry.dead_lettered,
                entry.corrupt) == (expected.acknowledged, expected.failed,
                                   expected.dropped_by_timeout, expected.dropped_by_mark,
                                   expected.cleared, expected.skipped, expected.dead_lettered, 0)
        assert entry.seconds_since_acknowledged == (None if expected.acknowledged_ns is None else
                                                    (self.clock.now_ns - expected.acknowledged_ns) /
                                                    1e9)
        # Nothing is lost, and nothing counted twice.
        assert expected.addressed == (entry.lag + entry.acknowledged + entry.dropped_by_timeout +
                                      entry.dropped_by_mark + entry.cleared + entry.skipped +
                                      entry.dead_lettered)
        if expected.pending:
            assert entry.position <= min(expected.pending)
