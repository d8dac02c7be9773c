"""Look at messages that were given up, send them back to where they come from, or drop them."""

import contextlib
import dataclasses
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import persipubsub.config
import persipubsub.errors
import persipubsub.queue
from persipubsub import _delivery, _moving
from persipubsub.maintenance import _looking
from persipubsub.message import DeadLetter

#: So many are read at once.
_PAGE: Final = 100


@dataclasses.dataclass(frozen=True)
class ListedDeadLetter:
    """Hold a dead letter that was looked at."""

    number: int  #: in the queue of dead letters
    letter: DeadLetter  #: what is in its envelope


def queues_of(config: persipubsub.config.Config) -> list[str]:
    """
    List the queues of dead letters.

    :param config: that describes the queues
    :return: their keys, in the order of the file
    """
    used = {subscriber.dead_letter_queue for subscriber in config.subscribers.values()}
    return [key for key in config.queues if key in used]


def look(config: persipubsub.config.Config, queue_key: str) -> Iterator[ListedDeadLetter]:
    """
    Look at the dead letters of a queue, in order, without taking them.

    :param config: that describes the queue
    :param queue_key: of the queue of dead letters
    :return: those that were neither sent back nor dropped; damaged ones are left out
    """
    settings = persipubsub.queue.Settings.of(config, queue_key)
    start = 0
    while True:
        page = _looking.peek(settings, persipubsub.config.DEAD_LETTERS, count=_PAGE, start=start)
        for message in page:
            if message.content is not None:
                yield ListedDeadLetter(message.number, DeadLetter.decode(message.content))
        if not page:
            return
        start = page[-1].number + 1


def drop(config: persipubsub.config.Config, queue_key: str,
         numbers: Sequence[int] | None) -> tuple[int, ...]:
    """
    Let dead letters leave their queue.

    :param config: that describes the queue
    :param queue_key: of the queue of dead letters
    :param numbers: in that queue; None: all that are there now
    :return: numbers of those that left
    """
    return _each(config, queue_key, numbers, lambda number, letter: None, lambda: None)


def send_back(config: persipubsub.config.Config, queue_key: str,
              numbers: Sequence[int] | None) -> tuple[int, ...]:
    """
    Send dead letters to the subscriber that failed to work on them, and to nobody else.

    Each is put there, durably whatever the durability, before it leaves the queue of dead letters,
    under an id that is the same when it is repeated: whenever the process is killed or the power
    fails, it is in one of the two.

    :param config: that describes the queues
    :param queue_key: of the queue of dead letters
    :param numbers: in that queue; None: all that are there now
    :return: numbers of those that were sent back
    :raise ConfigError: if the file does not have a letter's queue any more
    :raise NotInitializedError: if that queue does not have its subscriber any more
    """
    path = os.path.realpath(config.queue_path(queue_key))
    with contextlib.ExitStack() as stack:
        targets: dict[str, persipubsub.queue.Queue] = {}

        def put(number: int, letter: DeadLetter) -> None:
            target = targets.get(letter.queue)
            if target is None:
                config.queue_path(letter.queue)
                target = stack.enter_context(persipubsub.queue.open_queue(config, letter.queue))
                targets[letter.queue] = target
            target.require_subscribers([letter.subscriber])
            msg_id = _moving.make_id("send back", path, number, letter.moved_at.isoformat())
            target.put([letter.data], (letter.subscriber, ), timeout=0, msg_ids=[msg_id])

        def secure() -> None:
            for target in targets.values():
                target.secure()

        return _each(config, queue_key, numbers, put, secure)


def _each(config: persipubsub.config.Config, queue_key: str, numbers: Sequence[int] | None,
          work: Callable[[int, DeadLetter], None], secure: Callable[[], None]) -> tuple[int, ...]:
    """
    Do something with dead letters, and let each leave its queue afterwards.

    Many leave together, since to secure the work may be to copy a queue.

    :param config: that describes the queue
    :param queue_key: of the queue of dead letters
    :param numbers: in that queue; None: all that are there now
    :param work: to be done, given the number and the letter
    :param secure: makes the work durable
    :return: numbers of those that left; another process may be at work on the others
    """
    done: list[int] = []
    with persipubsub.queue.open_queue(config, queue_key) as queue:
        consumer = queue.consumer(persipubsub.config.DEAD_LETTERS)
        # Those that come back meanwhile are not sent back again.
        end = queue.statistics().next_number
        if numbers is None:
            numbers = [listed.number for listed in look(config, queue_key)]
        # No other can be there, and a claim has no room for any number.
        numbers = [number for number in map(operator.index, numbers) if 0 < number < end]
        leases: list[_delivery.Lease] = []
        try:
            for number in numbers:
                lease = consumer.take_at(number)
                if lease is not None:
                    _begin(lease, work)
                    leases.append(lease)
                if len(leases) == _PAGE:
                    done += _finish(leases, secure)
        finally:
            # What came before an error leaves all the same.
            done += _finish(leases, secure)
    return tuple(done)


def _begin(lease: _delivery.Lease, work: Callable[[int, DeadLetter], None]) -> None:
    """
    Do something with a dead letter.

    :param lease: on it; given back if the work fails
    :param work: to be done
    """
    try:
        work(lease.numbers[0], DeadLetter.decode(lease.messages[0]))
    except BaseException:
        lease.give_back()
        raise


def _finish(leases: list[_delivery.Lease], secure: Callable[[], None]) -> list[int]:
    """
    Let dead letters leave their queue.

    :param leases: on them; none of them is left in the list
    :param secure: makes what was done with them durable
    :return: their numbers
    """
    numbers: list[int] = []
    try:
        if leases:
            secure()
        while leases:
            lease = leases.pop(0)
            lease.acknowledge()
            numbers.append(lease.numbers[0])
    except BaseException:
        while leases:
            leases.pop().give_back()
        raise
    return numbers
