"""
Make, look at and empty the stream of a queue: what is asked of the API of JetStream.

All of it runs in the thread of :py:mod:`persipubsub.jetstream.loop`.
"""

import asyncio
import base64
import datetime
import json
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, TypeAlias

from persipubsub.errors import FormatError, NotInitializedError
from persipubsub.jetstream import address, connection, errors, settings
from persipubsub.message import Peeked

#: Messages that are deleted at the same time.
_WINDOW: Final = 128

#: Interval at which publishers check whether all consumers still exist, in seconds.
_INTEREST_SECS: Final = 1.0

#: A cluster that was restarted does not know all of its consumers for a moment, and answers that
#: they do not exist; that is believed after this time, in seconds. The same holds on any server
#: while seek replaces a consumer.
_RECOVERY_SECS: Final = 5.0
_REPLACED_SECS: Final = 1.0

#: Steps of :py:meth:`Stream.drop_expired`, at most.
_MOST_STEPS: Final = 1000

Info: TypeAlias = dict[str, Any]


class Stream:
    """One stream, which may not exist yet."""

    def __init__(self, own: connection.Connection, described: settings.Settings) -> None:
        """Initialize without asking anything."""
        self.connection = own
        self.settings = described
        self.name = described.address.stream
        is_cluster = len(described.address.servers) > 1 or described.address.replicas > 1
        self._recovery_secs = _RECOVERY_SECS if is_cluster else _REPLACED_SECS
        # Time of the servers minus ours, as far as we know.
        self._offset = datetime.timedelta()
        # By recipients: when the consumers of these recipients were last checked.
        self._interest: dict[tuple[str, ...] | None, float] = {}

    def deadline(self) -> float:
        """Bound the wait of one call for the servers, on the monotonic clock."""
        return time.monotonic() + self.settings.wait_secs

    async def _api(self,
                   verb: str,
                   body: Info | None = None,
                   consumer: str = "",
                   confirms: bool = True) -> Info:
        """
        Ask the API of JetStream; raise ApiError at a refusal that waiting does not change.

        Without ``confirms``, an answer that a stream or a consumer is missing is believed at once.
        """
        subject = f"$JS.API.{verb}.{self.name}" + (f".{consumer}" if consumer else "")
        payload = b"" if body is None else json.dumps(body).encode("utf-8")
        deadline = self.deadline()
        until = min(deadline, time.monotonic() + self._recovery_secs)
        while True:  # until the deadline
            message = await self.connection.ask(subject, payload, deadline)
            answer: Info = json.loads(message.data)
            if "error" not in answer:
                return answer
            error = errors.ApiError(answer["error"])
            is_doubted = confirms and error.is_missing() and time.monotonic() < until
            if not is_doubted and not (error.is_temporary() and time.monotonic() < deadline):
                raise error
            await asyncio.sleep(connection.PAUSE_SECS)

    # Making

    async def ensure(self) -> None:
        """Create the stream and its consumers, or update them."""
        wanted = self.settings.stream_config()
        try:
            await self._api("STREAM.CREATE", wanted)
        except errors.ApiError as error:
            if error.err_code != errors.NAME_IN_USE:
                raise
            # It exists with other settings, or is somebody else's.
            found = await self.info()
            await self._api("STREAM.UPDATE", {**found["config"], **wanted})
        for subscriber in self.settings.subscribers:
            await self.ensure_consumer(subscriber)

    async def ensure_consumer(self, subscriber: str) -> bool:
        """Create the consumer of a subscriber, or update it; return True if it was created."""
        wanted = self.settings.consumer_config(subscriber)
        name = address.durable_of(subscriber)
        found = await self._find("CONSUMER.INFO", consumer=name, confirms=False)
        if found is not None:
            config = found["config"]
            # Its old subjects stay: they may have messages that no other consumer needs.
            filters = sorted(set(wanted["filter_subjects"]) | set(filters_of(config)))
            if filters == sorted(filters_of(config)) and config["ack_wait"] == wanted["ack_wait"]:
                return False
            # The server does not change the start of a consumer.
            wanted = {**config, "ack_wait": wanted["ack_wait"], "filter_subjects": filters}
        await self._create_consumer(wanted)
        return found is None

    async def _create_consumer(self, config: Info) -> Info:
        wanted = {**config, "filter_subjects": filters_of(config)}
        wanted.pop("filter_subject", None)
        body = {"stream_name": self.name, "config": wanted}
        return await self._api("CONSUMER.CREATE", body, str(config["name"]))

    async def delete_consumer(self, subscriber: str) -> int:
        """Delete the consumer of a subscriber; return how many messages it did not acknowledge."""
        found = await self.consumer_info(subscriber)
        await self._api("CONSUMER.DELETE", consumer=address.durable_of(subscriber))
        return lag_of(found)

    async def seek(self, subscriber: str, start: Info) -> int:
        """
        Let a subscriber go on from a place; return the number of the next message from there on.

        The start of a consumer can not be changed: it is deleted and made again; a guard consumer
        keeps the messages meanwhile.

        :param start: ``deliver_policy``, and what belongs to it
        """
        found = await self.consumer_info(subscriber)
        config = {key: value for key, value in found["config"].items() if "opt_start" not in key}
        name = address.guard_of(subscriber)
        guard = {**config, **start, "name": name, "durable_name": name, "metadata": {}}
        # Left by a call that was killed.
        await self._find("CONSUMER.DELETE", consumer=name, confirms=False)
        # The server finds the place.
        number = int((await self._create_consumer(guard))["delivered"]["stream_seq"]) + 1
        await self._api("CONSUMER.DELETE", consumer=address.durable_of(subscriber))
        found_place = {"deliver_policy": "by_start_sequence", "opt_start_seq": number}
        await self._create_consumer({**config, **found_place})
        await self._api("CONSUMER.DELETE", consumer=name, confirms=False)
        return number

    # Looking

    async def info(self) -> Info:
        """Ask for ``config``, ``state`` and more of the stream; raise if there is none of ours."""
        before = datetime.datetime.now(datetime.UTC)
        answer = await self._api("STREAM.INFO")
        if not settings.is_ours(answer["config"]):
            raise FormatError(f"Expected the stream {self.name} of {self.settings.path} to be made "
                              "by persipubsub, but got: one of somebody else, with the subjects "
                              f"{answer['config'].get('subjects')!r}")
        if answer.get("ts"):
            after = datetime.datetime.now(datetime.UTC)
            self._offset = to_time(answer["ts"]) - before - (after - before) / 2
        return answer

    async def state(self) -> Info:
        """Ask for ``messages``, ``bytes``, ``first_seq``, ``last_seq`` and more."""
        found: Info = (await self.info())["state"]
        return found

    def age_secs(self, sent_at: datetime.datetime) -> float:
        """Tell the age of something, by the clock of the servers."""
        age = datetime.datetime.now(datetime.UTC) + self._offset - sent_at
        return max(0.0, age.total_seconds())

    def is_expired(self, sent_at: datetime.datetime) -> bool:
        """Tell whether a message is too old; the servers drop it a bit late."""
        timeout_secs = self.settings.queue.high_water_mark.msg_timeout_secs
        return timeout_secs is not None and self.age_secs(sent_at) > timeout_secs

    async def _find(self, verb: str, body: Info | None = None, **named: Any) -> Info | None:
        """Ask for a consumer or a message; None if it is not there."""
        try:
            return await self._api(verb, body, **named)
        except errors.ApiError as error:
            if error.err_code not in errors.NOTHING_FOUND:
                raise
            return None

    async def consumer_info(self, subscriber: str) -> Info:
        """Ask for the consumer of a subscriber; raise NotInitializedError if there is none."""
        found = await self._find("CONSUMER.INFO", consumer=address.durable_of(subscriber))
        if found is None:
            raise self.missing(subscriber)
        return found

    async def require_interest(self, recipients: tuple[str, ...] | None) -> None:
        """
        Check that every recipient wants its messages.

        The server acknowledges and drops a message that no consumer wants: a message to a
        subscriber without a consumer would be lost without an error. The servers are asked once a
        second, and not each time: only an operator removes consumers.
        """
        now = time.monotonic()
        seen = self._interest.get(recipients)
        if seen is not None and now - seen < _INTEREST_SECS:
            return
        self._interest.pop(recipients, None)
        # The subjects of a consumer are checked once; later only whether it exists.
        names = await self._names() if seen is not None else ()
        subject = self.settings.subject(recipients)

        async def check(subscriber: str) -> None:
            if subject not in filters_of((await self.consumer_info(subscriber))["config"]):
                raise self.missing(subscriber)

        subscribers = self.settings.queue.subscribers if recipients is None else recipients
        await asyncio.gather(*(check(one) for one in subscribers
                               if address.durable_of(one) not in names))
        self._interest[recipients] = now

    async def _names(self) -> list[str]:
        """List the names of all consumers, page by page."""
        names: list[str] = []
        while True:  # each page begins behind the one before, up to an empty one
            answer = await self._api("CONSUMER.NAMES", {"offset": len(names)})
            page = answer.get("consumers") or []
            names += page
            if not page or len(names) >= answer["total"]:
                return names

    def missing(self, subscriber: str) -> NotInitializedError:
        """Describe a subscriber that is not there."""
        return NotInitializedError(
            f"Expected the subscriber {subscriber!r} in the queue {self.settings.path}, but got: "
            f"no consumer for these messages (call persipubsub.control.initialize_all_dbs)")

    async def infos(self) -> dict[str, Info]:
        """
        Ask for what the servers know of all subscribers, by id.

        Subscribers that the configuration no longer has are among them: their consumers hold
        messages until they are removed.
        """
        names = [*map(address.durable_of, self.settings.subscribers), *await self._names()]
        infos = await asyncio.gather(*(self._find("CONSUMER.INFO", consumer=name)
                                       for name in dict.fromkeys(names)))
        # None: somebody else's, or the guard of a seek.
        found = {settings.subscriber_of(info["config"]): info for info in infos if info is not None}
        return {subscriber: info for subscriber, info in found.items() if subscriber is not None}

    async def lags(self) -> dict[str, int]:
        """Count the messages that subscribers still have to acknowledge, by id."""
        return {one: lag_of(info) for one, info in (await self.infos()).items()}

    async def next_stored(self, subjects: Sequence[str], start: int) -> Peeked | None:
        """Find the first message from a number on that has one of the subjects, and is not old."""
        while True:  # each round begins behind the message before
            queries = [{"seq": max(1, start), "next_by_subj": subject} for subject in subjects]
            answers = [await self._find("STREAM.MSG.GET", query) for query in queries]
            found = [answer["message"] for answer in answers if answer is not None]
            if not found:
                return None
            message = min(found, key=lambda one: int(one["seq"]))
            number, subject = int(message["seq"]), message["subject"]
            sent_at = to_time(message["time"])
            # With retain_secs, messages that no consumer wants are stored as well.
            if subject != address.nobodys_subject(self.name) and not self.is_expired(sent_at):
                recipients = {self.settings.subject(one): one for one in self.settings.audiences}
                data = base64.b64decode(message.get("data") or b"")
                return Peeked(number, self.age_secs(sent_at), recipients.get(subject), data)
            start = number + 1

    # Dropping

    async def purge(self, **limits: int) -> None:
        """Drop all messages, all but the ``keep`` newest, or those in front of ``seq``."""
        await self._api("STREAM.PURGE", limits or None)

    async def drop_finished(self) -> None:
        """Drop what everybody has acknowledged, where that is retained."""
        infos = (await self.infos()).values()
        floors = [int(info["ack_floor"]["stream_seq"]) for info in infos]
        await self.purge(seq=1 + min(floors, default=0))

    async def delete_newest(self, count: int) -> None:
        """Drop messages from the newest one on, one after the other."""
        state = await self.state()
        number, first = int(state["last_seq"]), int(state["first_seq"])
        while count > 0 and number >= first:  # ``number`` goes back each round
            numbers = range(number, max(first - 1, number - min(_WINDOW, count)), -1)
            queries: list[Info] = [{"seq": one, "no_erase": True} for one in numbers]
            deleted = await asyncio.gather(*(self._find("STREAM.MSG.DELETE", one)
                                             for one in queries))
            count -= len(numbers) - deleted.count(None)
            number = numbers[-1] - 1

    async def drop_expired(self) -> None:
        """Drop the messages that are too old, which the servers do as well, but not at once."""
        age_ns = self.settings.stream_config()["max_age"]
        for _ in range(_MOST_STEPS):
            state = await self.state()
            if (not age_ns or not state["messages"]
                    or self.age_secs(to_time(state["first_ts"])) * 1e9 <= age_ns):
                break
            await self.purge(seq=state["first_seq"] + 1)

    async def count_dropped(self, drop: Callable[[], Coroutine[Any, Any, None]]) -> dict[str, int]:
        """Drop messages; count those that subscribers still had to acknowledge, by id."""
        before = await self.lags()
        await drop()
        after = await self.lags()
        lost = {one: lag - after.get(one, 0) for one, lag in before.items()}
        return {one: count for one, count in lost.items() if count > 0}


def filters_of(config: Info) -> list[str]:
    """Find the subjects that a consumer gets."""
    single = config.get("filter_subject")
    return [single] if single else list(config.get("filter_subjects") or [])


def lag_of(info: Info) -> int:
    """Count the messages that a subscriber still has to acknowledge."""
    return int(info["num_pending"]) + int(info["num_ack_pending"])


#: Read a time of the server.
to_time = datetime.datetime.fromisoformat


def to_text(time_ns: int) -> str:
    """
    Write a time as the server reads it.

    >>> to_text(1500000000)
    '1970-01-01T00:00:01.500000000Z'
    """
    # What does not fit into 64 bits, the server does not take.
    seconds, nanoseconds = divmod(min(max(0, time_ns), 2**63 - 1), 10**9)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{nanoseconds:09}Z"
