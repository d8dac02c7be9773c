"""Look at messages that were given up, send them back to where they come from, or drop them."""

import contextlib
import dataclasses
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from persipubsub.config import DEAD_LETTERS, Config
from persipubsub.lmdb_engine import dead_letters
from persipubsub.message import DeadLetter
from persipubsub.queue import Queue, open_queue, peek

#: Number of dead letters read at once.
_PAGE: Final = 100


@dataclasses.dataclass(frozen=True)
class ListedDeadLetter:
    """A dead letter that was looked at."""

    number: int  #: in the queue of dead letters
    letter: DeadLetter  #: what is in its envelope


def queues_of(config: Config) -> list[str]:
    """List the queues of dead letters."""
    used = {subscriber.dead_letter_queue for subscriber in config.subscribers.values()}
    return [key for key in config.queues if key in used]


def look(config: Config, queue_key: str) -> Iterator[ListedDeadLetter]:
    """Look at the dead letters of a queue, in order, without taking them."""
    start = 0
    # Each page begins behind the one before.
    while page := peek(config, queue_key, DEAD_LETTERS, _PAGE, start):
        for message in page:
            if message.content is not None:
                yield ListedDeadLetter(message.number, DeadLetter.decode(message.content))
        start = page[-1].number + 1


def drop(config: Config, queue_key: str, numbers: Sequence[int] | None) -> tuple[int, ...]:
    """Let dead letters leave their queue; return their numbers."""
    return _each(config, queue_key, numbers, lambda number, letter: None)


def send_back(config: Config, queue_key: str, numbers: Sequence[int] | None) -> tuple[int, ...]:
    """Send dead letters to the subscriber that failed to work on them, and to nobody else."""
    path = os.path.realpath(config.queue_path(queue_key))
    targets: dict[str, Queue] = {}

    def put(number: int, letter: DeadLetter) -> None:
        if letter.queue not in targets:
            targets[letter.queue] = stack.enter_context(open_queue(config, letter.queue))
        target = targets[letter.queue]
        target.require_subscribers([letter.subscriber])
        msg_id = dead_letters.make_id("send back", path, number, letter.moved_at.isoformat())
        target.put([letter.data], (letter.subscriber, ), timeout=0, msg_ids=[msg_id])
        target.secure()

    with contextlib.ExitStack() as stack:
        return _each(config, queue_key, numbers, put)


def _each(config: Config, queue_key: str, numbers: Sequence[int] | None,
          work: Callable[[int, DeadLetter], None]) -> tuple[int, ...]:
    """Do something with dead letters, and let each leave its queue afterwards."""
    done: list[int] = []
    with open_queue(config, queue_key) as queue:
        consumer = queue.consumer(DEAD_LETTERS)
        # A letter that comes back meanwhile is not sent back again.
        end = queue.statistics().next_number
        if numbers is None:
            numbers = [listed.number for listed in look(config, queue_key)]
        for number in list(map(operator.index, numbers)):  # all of them are checked first
            # Only numbers from 1 to end - 1 were used.
            lease = consumer.take_at(number) if 0 < number < end else None
            if lease is not None:
                # After an error, closing the queue gives it back.
                work(number, DeadLetter.decode(lease.messages[0]))
                lease.ack()
                done.append(number)
    return tuple(done)
