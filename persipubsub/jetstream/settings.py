"""Describe a queue of a configuration for the servers of NATS."""

from collections.abc import Sequence
from typing import Any, Final

from persipubsub.config import DEAD_LETTERS, MADE_UP, Config, StartFrom, Subscriber
from persipubsub.errors import ConfigError
from persipubsub.jetstream import address

#: Time for which the server remembers ids, in seconds: a repeated publish is stored once.
_DUPLICATE_WINDOW_SECS: Final = 120.0

#: What the server counts for a message beside its bytes, at most: subject, headers and frame.
FRAME_BYTES: Final = 512

#: Key in the metadata of our streams and consumers.
_MARK: Final = "persipubsub"


class Settings:
    """The address of a stream, and the settings of its queue."""

    def __init__(self, config: Config, queue_key: str) -> None:
        """Take the settings; raise ConfigError if the path is wrong."""
        self.config = config
        self.key = queue_key
        self.queue = config.queues[queue_key]
        self.path = config.queue_path(queue_key)
        try:
            self.address = address.parse(self.path)
        except ValueError as error:
            text = f"{config.path}: queues.{queue_key}.path: {error}"
            raise ConfigError(text) from None
        mark = self.queue.high_water_mark
        self.strategy = mark.strategy.value
        self.wait_secs = self.queue.busy_timeout_secs
        self.retain_secs = self.queue.retain_secs
        everybody = set(self.queue.subscribers)
        #: Recipients of publishers that list them.
        self.audiences = {
            tuple(sorted(publisher.subscribers))
            for publisher in config.publishers.values() if publisher.out_queue == queue_key and (
                set(publisher.subscribers) != everybody or publisher.identifier.startswith(MADE_UP))
        }

    @property
    def subscribers(self) -> tuple[str, ...]:
        """All subscribers of the queue, and the one of dead letters if the queue receives them."""
        is_for_letters = any(one.dead_letter_queue == self.key
                             for one in self.config.subscribers.values())
        letters = (DEAD_LETTERS, ) if is_for_letters else ()
        return tuple(self.queue.subscribers) + letters

    def entry(self, subscriber: str) -> Subscriber:
        """Return the subscriber's entry in the file; a default entry if it has none."""
        found = self.config.subscribers.get(subscriber)
        if found is None or found.in_queue != self.key:
            return Subscriber(subscriber, self.key)
        return found

    def subject(self, recipients: Sequence[str] | None) -> str:
        """Name the subject of the messages for some subscribers; None for everybody."""
        return address.subject_of(self.address.stream, recipients)

    def filters(self, subscriber: str) -> list[str]:
        """Name the subjects of the messages that a subscriber gets, each once."""
        return [self.subject(None)] + sorted(
            self.subject(one) for one in self.audiences if subscriber in one)

    def stream_config(self) -> dict[str, Any]:
        """
        Describe the stream for the server.

        ``discard`` is ``new``: the server refuses messages above a mark, and the publisher applies
        the strategy.
        """
        mark = self.queue.high_water_mark
        age_ns = 0
        if mark.msg_timeout_secs is not None:
            # The server wants a tenth of a second at least.
            age_ns = int(max(mark.msg_timeout_secs, self.retain_secs, 0.1) * 1e9)
        window_ns = int(_DUPLICATE_WINDOW_SECS * 1e9)
        return {
            "name": self.address.stream,
            "description": "A queue of persipubsub",
            "subjects": [f"persipubsub.{self.address.stream}.>"],
            # With "interest", the server drops a message that every consumer has acknowledged.
            "retention": "limits" if self.retain_secs else "interest",
            "storage": "file",
            "discard": "new",
            "max_msgs": -1 if mark.max_msgs_num is None else mark.max_msgs_num,
            "max_bytes": -1 if mark.size_bytes is None else mark.size_bytes + FRAME_BYTES,
            "max_age": age_ns,
            "num_replicas": self.address.replicas,
            "duplicate_window": min(age_ns or window_ns, window_ns),
            "metadata": {
                _MARK: "1"
            },
        }

    def consumer_config(self, subscriber: str) -> dict[str, Any]:
        """Describe the durable consumer of a subscriber for the server."""
        name = address.durable_of(subscriber)
        beginning = StartFrom.BEGINNING
        return {
            "name": name,
            "durable_name": name,
            "ack_policy": "explicit",
            "deliver_policy": "all" if self.entry(subscriber).start_from is beginning else "new",
            "ack_wait": int(self.address.ack_wait_secs * 1e9),
            # Not max_deliveries: the server would stop delivering, but keep the message.
            "max_deliver": -1,
            "max_ack_pending": -1,
            "max_waiting": 4096,
            "filter_subjects": self.filters(subscriber),
            "metadata": {
                _MARK: subscriber
            },
        }


def is_ours(stream_config: dict[str, Any]) -> bool:
    """Tell the streams of this library from others."""
    return bool((stream_config.get("metadata") or {}).get(_MARK) == "1")


def subscriber_of(consumer_config: dict[str, Any]) -> str | None:
    """Return the subscriber of a consumer; None if it has none, like the guard of a seek."""
    return (consumer_config.get("metadata") or {}).get(_MARK)
