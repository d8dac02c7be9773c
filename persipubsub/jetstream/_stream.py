"""
Make, look at and empty the stream of a queue: what is asked of the API of JetStream.

All of it runs in the thread of :py:mod:`persipubsub.jetstream._loop`.
"""

import asyncio
import datetime
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

import persipubsub.errors
from persipubsub.jetstream import _address, _errors, _link, _settings

#: Requests that are under way at the same time.
_WINDOW: Final = 128

#: It is looked this often whether all consumers are still there, in seconds.
_INTEREST_SECS: Final = 1.0

#: Steps of :py:meth:`Stream.drop_expired`, at most.
_MOST_STEPS: Final = 1000


class Stream:
    """Be one stream, which may not exist yet."""

    def __init__(self, link: _link.Link, settings: _settings.Settings) -> None:
        """
        Initialize without asking anything.

        :param link: to its servers
        :param settings: of the queue
        """
        self.link = link
        self.settings = settings
        self.name = settings.address.stream
        #: Time of the servers minus ours, in nanoseconds, as far as we know.
        self.offset_ns = 0
        # Consumers of the stream when it was looked at last.
        self._consumer_count = 0
        # By audience: when it was seen that each of its subscribers wants its subject.
        self._interest: dict[tuple[str, ...] | None, float] = {}

    # Making

    async def ensure(self, deadline: float) -> None:
        """
        Make the stream and its consumers, as far as they are not there, and bring them up to date.

        :param deadline: on the monotonic clock
        """
        wanted = self.settings.stream_config()
        found = await self._find(deadline)
        if found is None:
            try:
                await self.link.api(f"STREAM.CREATE.{self.name}", wanted, deadline)
            except _errors.ApiError as error:
                # Another process may make it at the same time.
                if error.err_code != _errors.NAME_IN_USE:
                    raise
                found = await self._find(deadline)
        if found is not None and any(found["config"].get(key) != value
                                     for key, value in wanted.items() if key != "metadata"):
            await self.link.api(f"STREAM.UPDATE.{self.name}", {
                **found["config"],
                **wanted
            }, deadline)
        await self._each(self.settings.subscribers,
                         lambda subscriber: self._ensure_consumer(subscriber, deadline))

    async def _find(self, deadline: float) -> dict[str, Any] | None:
        """
        Look the stream up.

        :param deadline: on the monotonic clock
        :return: what the servers know of it; None if there is none
        """
        try:
            return await self.info(deadline, confirms=False)
        except persipubsub.errors.NotInitializedError:
            return None

    async def _ensure_consumer(self, subscriber: str, deadline: float) -> None:
        """
        Make the consumer of a subscriber, or let it get what the configuration says.

        :param subscriber: its id
        :param deadline: on the monotonic clock
        """
        wanted = self.settings.consumer_config(subscriber)
        found = await self.consumer_info(subscriber, deadline, confirms=False)
        if found is not None:
            config = found["config"]
            # What it was to get stays: messages may be under way that nobody else wants.
            filters = sorted(set(wanted["filter_subjects"]) | set(_filters(config)))
            if (filters == sorted(_filters(config)) and config["ack_wait"] == wanted["ack_wait"]):
                return
            # Where it began can not be changed.
            wanted = {**config, "ack_wait": wanted["ack_wait"], "filter_subjects": filters}
            wanted.pop("filter_subject", None)
        await self.link.api(f"CONSUMER.CREATE.{self.name}.{_address.durable_of(subscriber)}", {
            "stream_name": self.name,
            "config": wanted
        }, deadline)

    # Looking

    async def info(self, deadline: float, confirms: bool = True) -> dict[str, Any]:
        """
        Ask for what the servers know of the stream.

        :param deadline: on the monotonic clock
        :param confirms: False to believe at once that it is not there
        :return: ``config``, ``state`` and more
        :raise NotInitializedError: if there is none
        :raise FormatError: if it is somebody else's
        """
        before_ns = time.time_ns()
        try:
            answer = await self.link.api(f"STREAM.INFO.{self.name}", None, deadline, confirms)
        except _errors.ApiError as error:
            raise _errors.translate(error, self.settings.path) from None
        if not _settings.is_ours(answer["config"]):
            raise persipubsub.errors.FormatError(
                "Expected the stream {} of {} to be made by persipubsub, but got: one of somebody "
                "else, with the subjects {!r}".format(self.name, self.settings.path,
                                                      answer["config"].get("subjects")))
        if answer.get("ts"):
            self.offset_ns = to_ns(answer["ts"]) - (before_ns + time.time_ns()) // 2
        self._consumer_count = int(answer["state"].get("consumer_count", 0))
        return answer

    def now_ns(self) -> int:
        """
        Tell the time of the servers.

        :return: in nanoseconds since 1970
        """
        return time.time_ns() + self.offset_ns

    async def consumer_info(self,
                            subscriber: str,
                            deadline: float,
                            confirms: bool = True) -> dict[str, Any] | None:
        """
        Ask for what the servers know of a subscriber.

        :param subscriber: its id
        :param deadline: on the monotonic clock
        :param confirms: False to believe at once that it is not there
        :return: ``config``, ``num_pending`` and more; None if there is no such consumer
        """
        verb = f"CONSUMER.INFO.{self.name}.{_address.durable_of(subscriber)}"
        try:
            return await self.link.api(verb, None, deadline, confirms)
        except _errors.ApiError as error:
            if error.err_code != _errors.CONSUMER_NOT_FOUND:
                raise
            return None

    async def require(self, subscribers: Iterable[str], deadline: float) -> None:
        """
        Check that subscribers have consumers.

        :param subscribers: ids
        :param deadline: on the monotonic clock
        :raise NotInitializedError: if one of them has none
        """

        async def check(subscriber: str) -> None:
            if await self.consumer_info(subscriber, deadline) is None:
                raise self._missing(subscriber)

        await self._each(subscribers, check)

    async def require_interest(self, audience: tuple[str, ...] | None, deadline: float) -> None:
        """
        Check that every subscriber of an audience wants its messages.

        A stream of this kind acknowledges what nobody wants, and drops it: a message to a
        subscriber without a consumer would be lost without an error. The servers are asked once a
        second, and not each time: only an operator takes consumers away.

        :param audience: ids; None for all subscribers
        :param deadline: on the monotonic clock
        :raise NotInitializedError: if one of them does not
        """
        now = time.monotonic()
        seen = self._interest.get(audience)
        if seen is not None and now - seen < _INTEREST_SECS:
            return
        subscribers = self.settings.subscribers if audience is None else audience
        if seen is None:
            subject = self.settings.subject(audience)

            async def check(subscriber: str) -> None:
                found = await self.consumer_info(subscriber, deadline)
                if found is None or subject not in _filters(found["config"]):
                    raise self._missing(subscriber)

            await self._each(subscribers, check)
        else:
            names = set(await self._consumers("NAMES", deadline))
            for subscriber in subscribers:
                if (_address.durable_of(subscriber) not in names
                        and await self.consumer_info(subscriber, deadline) is None):
                    del self._interest[audience]
                    raise self._missing(subscriber)
        self._interest[audience] = now

    async def _consumers(self, verb: str, deadline: float) -> list[Any]:
        """
        List the consumers, page by page.

        :param verb: ``NAMES`` for their names, ``LIST`` for what the servers know of them
        :param deadline: on the monotonic clock
        :return: names, or what is known of each
        """
        consumers: list[Any] = []
        while True:
            answer = await self.link.api(f"CONSUMER.{verb}.{self.name}", {"offset": len(consumers)},
                                         deadline)
            page = answer.get("consumers") or []
            consumers += page
            if not page or len(consumers) >= answer["total"]:
                return consumers

    def _missing(self, subscriber: str) -> persipubsub.errors.NotInitializedError:
        """
        Describe a subscriber that is not there.

        :param subscriber: its id
        :return: error to be raised
        """
        return persipubsub.errors.NotInitializedError(
            "Expected the subscriber {!r} in the queue {}, but got: no consumer for these messages "
            "(call persipubsub.control.initialize_all_dbs)".format(subscriber, self.settings.path))

    async def infos(self, deadline: float) -> dict[str, dict[str, Any]]:
        """
        Ask for what the servers know of all subscribers.

        Those that were taken out of the configuration are among them: they hold messages as long as
        they have a consumer.

        :param deadline: on the monotonic clock
        :return: by id; those without a consumer are left out
        """
        found: dict[str, dict[str, Any]] = {}

        async def ask(subscriber: str) -> None:
            info = await self.consumer_info(subscriber, deadline)
            if info is not None:
                found[subscriber] = info

        await self._each(self.settings.subscribers, ask)
        if self._consumer_count > len(found):
            # Not in the first place: a page of all takes the server longer than one of them.
            for info in await self._consumers("LIST", deadline):
                subscriber = _settings.subscriber_of(info["config"])
                if subscriber is not None:
                    found.setdefault(subscriber, info)
        return found

    async def lags(self, deadline: float) -> dict[str, int]:
        """
        Count the messages that subscribers still have to acknowledge.

        :param deadline: on the monotonic clock
        :return: by id
        """
        return {
            subscriber: lag_of(info)
            for subscriber, info in (await self.infos(deadline)).items()
        }

    async def next_message(self, subjects: Sequence[str], start: int,
                           deadline: float) -> dict[str, Any] | None:
        """
        Find a message in the stream.

        :param subjects: one of which it has
        :param start: first number to look at
        :param deadline: on the monotonic clock
        :return: its ``seq``, ``data`` and more; None if there is none
        """
        messages: list[dict[str, Any]] = []
        for subject in subjects:
            try:
                answer = await self.link.api(f"STREAM.MSG.GET.{self.name}", {
                    "seq": max(1, start),
                    "next_by_subj": subject
                }, deadline)
            except _errors.ApiError as error:
                if error.err_code not in _errors.MESSAGE_NOT_FOUND:
                    raise
                continue
            messages.append(answer["message"])
        return min(messages, key=lambda message: int(message["seq"]), default=None)

    # Dropping

    async def purge(self, deadline: float, **limits: int) -> int:
        """
        Drop messages from the oldest one on.

        :param deadline: on the monotonic clock
        :param limits: ``keep``, how many of the newest to keep, or ``seq``, the first one to keep
        :return: how many were dropped
        """
        answer = await self.link.api(f"STREAM.PURGE.{self.name}", limits or None, deadline)
        return int(answer.get("purged", 0))

    async def delete_newest(self, count: int, deadline: float) -> int:
        """
        Drop messages from the newest one on, one after the other.

        :param count: how many
        :param deadline: on the monotonic clock
        :return: how many were dropped
        """
        state = (await self.info(deadline))["state"]
        number, first = state["last_seq"], state["first_seq"]
        deleted = 0
        while deleted < count and number >= first:
            numbers = range(number, max(first - 1, number - min(_WINDOW, count - deleted)), -1)
            deleted += sum(await asyncio.gather(*(self._delete(one, deadline) for one in numbers)))
            number = numbers[-1] - 1
        return deleted

    async def _delete(self, number: int, deadline: float) -> bool:
        """
        Drop one message.

        :param number: of the message
        :param deadline: on the monotonic clock
        :return: False if it was not there
        """
        try:
            await self.link.api(f"STREAM.MSG.DELETE.{self.name}", {
                "seq": number,
                "no_erase": True
            }, deadline)
        except _errors.ApiError as error:
            if error.err_code not in _errors.MESSAGE_NOT_FOUND:
                raise
            return False
        return True

    async def drop_expired(self, deadline: float) -> int:
        """
        Drop the messages that are too old, which the servers do as well, but not at once.

        :param deadline: on the monotonic clock
        :return: how many deliveries were dropped
        """
        before = await self.lags(deadline)
        for _ in range(_MOST_STEPS):
            state = (await self.info(deadline))["state"]
            age_ns = self.now_ns() - to_ns(state["first_ts"])
            if not state["messages"] or age_ns <= self.settings.timeout_ns:
                break
            await self.purge(deadline, seq=state["first_seq"] + 1)
        after = await self.lags(deadline)
        return sum(max(0, before[key] - after.get(key, 0)) for key in before)

    async def _each(self, subscribers: Iterable[str], work: Any) -> None:
        """
        Do something for many subscribers, some of them at the same time.

        :param subscribers: ids
        :param work: makes a coroutine, given the id
        """
        pending = list(subscribers)
        for begin in range(0, len(pending), _WINDOW):
            await asyncio.gather(*(work(one) for one in pending[begin:begin + _WINDOW]))


def _filters(config: dict[str, Any]) -> list[str]:
    """
    Find the subjects that a consumer gets.

    :param config: of the consumer, as the server tells it
    :return: subjects
    """
    single = config.get("filter_subject")
    return [single] if single else list(config.get("filter_subjects") or [])


def lag_of(info: dict[str, Any]) -> int:
    """
    Count the messages that a subscriber still has to acknowledge.

    :param info: of its consumer
    :return: how many
    """
    return int(info["num_pending"]) + int(info["num_ack_pending"])


def to_ns(text: str) -> int:
    """
    Read a time of the server.

    :param text: such as ``2026-11-24T18:31:04.097665065Z``
    :return: nanoseconds since 1970

    >>> to_ns("1970-01-01T00:00:01.5Z")
    1500000000
    """
    whole, _, fraction = text.rstrip("Z").partition(".")
    moment = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
    return int(moment.timestamp()) * 10**9 + int(fraction.ljust(9, "0")[:9] or 0)
