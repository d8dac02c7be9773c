"""
Acknowledge messages to servers that may have forgotten whom they delivered them to.

Deliveries are noted after they were made, so that servers which were killed may know less than they
delivered. Such a server ignores the acknowledgement of a message that is still to be delivered as
far as it knows; if all consumers wait for its answer, it would do so for ever. So we ask for the
messages again, and then acknowledge them. To raise an error was rejected: all that was worked on
would be worked on again.

All of it runs in the thread of :py:mod:`persipubsub.jetstream._loop`.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Final

import nats.errors

import persipubsub.errors
from persipubsub.jetstream import _errors, _inboxes, _pulling, _stream
from persipubsub.jetstream._inboxes import Pulled

#: An acknowledgement that is not answered is repeated after so many seconds, at first and at most.
_FIRST_ANSWER_SECS: Final = 1.0
_LONGEST_ANSWER_SECS: Final = 5.0

#: So many are acknowledged at the same time: one that waits for thousands of others would be
#: repeated before it is answered, and they would all be repeated until the time is over.
_AT_ONCE: Final = 512


async def acknowledge(puller: _pulling.Puller, stream: _stream.Stream, durable: str,
                      pulled: Sequence[Pulled], deadline: float) -> None:
    """
    Acknowledge messages, and wait until the servers have it.

    :param puller: of the consumer; asks for messages again
    :param stream: of the queue
    :param durable: name of the consumer
    :param pulled: messages
    :param deadline: on the monotonic clock; later as long as the servers answer
    :raise UnavailableError: if there was no answer in time; they are delivered again
    """
    told = time.monotonic()
    wait_secs = deadline - told
    patience = _FIRST_ANSWER_SECS
    while pulled:
        some, rest = pulled[:_AT_ONCE], pulled[_AT_ONCE:]
        if rest and time.monotonic() - told > stream.settings.address.ack_wait_secs / 3:
            # Those whose turn is to come would be with others by then.
            told = time.monotonic()
            await _inboxes.keep(await stream.link.client(deadline), rest)
        until = min(deadline, time.monotonic() + patience)
        # In order: the first one is the next that is delivered again.
        answers = await asyncio.gather(*(stream.link.request(one.reply, b"+ACK", until)
                                         for one in some),
                                       return_exceptions=True)
        errors = [one for one in answers if isinstance(one, BaseException)]
        if not errors:
            pulled = rest
            deadline = max(deadline, time.monotonic() + wait_secs)
            patience = _FIRST_ANSWER_SECS
            continue
        for error in errors:
            if (not isinstance(error, persipubsub.errors.UnavailableError)
                    or time.monotonic() >= deadline):
                raise error
        pulled = [one for one, answer in zip(some, answers) if isinstance(answer, BaseException)]
        pulled = await _ask_again(puller, stream, durable, [*pulled, *rest], deadline)
        patience = min(2 * patience, _LONGEST_ANSWER_SECS)


async def _ask_again(puller: _pulling.Puller, stream: _stream.Stream, durable: str,
                     pulled: Sequence[Pulled], deadline: float) -> Sequence[Pulled]:
    """
    Let the servers deliver messages again, if they do not know that they did so already.

    :param puller: of the consumer
    :param stream: of the queue
    :param durable: name of the consumer
    :param pulled: messages whose acknowledgements were not answered
    :param deadline: on the monotonic clock
    :return: those that are still to be acknowledged
    """
    try:
        until = min(deadline, time.monotonic() + _FIRST_ANSWER_SECS)
        info = await stream.link.api(f"CONSUMER.INFO.{stream.name}.{durable}",
                                     None,
                                     until,
                                     confirms=False)
        # A leader that was elected just now may have noted our deliveries meanwhile, and act on
        # what it knew at its election: what it tells of both has to be asked. If it is merely
        # slow, nothing must be pulled.
        floor = int(info["ack_floor"]["stream_seq"])
        # It may also have noted the acknowledgements, and have died before it answered.
        pulled = [one for one in pulled if one.number > floor]
        if pulled and (int(info["delivered"]["stream_seq"]) < max(one.number for one in pulled)
                       or int(info["num_ack_pending"]) < len(pulled)):
            await _pull_again(puller, pulled, floor, deadline)
    except (persipubsub.errors.PersipubsubError, _errors.ApiError, nats.errors.Error, OSError):
        pass  # the acknowledgement is repeated, and says it if nothing helps
    return pulled


async def _pull_again(puller: _pulling.Puller, forgotten: Sequence[Pulled], number: int,
                      deadline: float) -> None:
    """
    Pull until messages were delivered again, or nothing is left.

    :param puller: of the consumer
    :param forgotten: messages that are with us already
    :param number: up to which everything was acknowledged
    :param deadline: on the monotonic clock
    """
    own = {one.number for one in forgotten}
    last = max(own)
    others: list[Pulled] = []
    try:
        while number < last and time.monotonic() < deadline:
            found = await puller.pull_now(min(len(own), last - number))
            if not found:
                break
            number = max(one.number for one in found)
            others += (one for one in found if one.number not in own)
    finally:
        # Others wait for an answer to their acknowledgements as well: those get it now, and
        # only what nobody has is delivered again. Not sooner: it would come back at once,
        # before what we ask for.
        puller.returns.give_back(others)
