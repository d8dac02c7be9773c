"""Take from a configuration what a queue that is a stream has to know."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import persipubsub.config
import persipubsub.errors
from persipubsub.jetstream import _address

#: The server remembers the ids of messages that long, so that a repeated publish is stored once.
_DUPLICATE_WINDOW_SECS: Final = 120.0

#: Subject, headers and frame of a message, which the server counts as its bytes, in bytes.
_FRAME_BYTES: Final = 512

_MARK: Final = "persipubsub"


class Settings(NamedTuple):
    """Say where a stream is and what it does with its messages."""

    path: str  #: as it is in the configuration file
    address: _address.Address  #: that is in it
    timeout_ns: int  #: age at which a message is dropped, in nanoseconds
    max_messages: int  #: high-water mark
    max_message_bytes: int  #: high-water mark, in bytes
    strategy: str  #: what is done at a high-water mark
    wait_secs: float  #: how long one call waits for the servers
    subscribers: tuple[str, ...]  #: ids of all subscribers
    audiences: frozenset[tuple[str, ...]]  #: of the publishers that name those they address

    @classmethod
    def of(cls, config: persipubsub.config.Config, queue_key: str) -> "Settings":
        """
        Take the settings from a configuration.

        :param config: that describes the queue
        :param queue_key: of the queue in ``queues``
        :return: its settings
        :raise ConfigError: if its path is none of a stream
        """
        queue = config.queues[queue_key]
        mark = queue.high_water_mark
        path = queue.path or queue_key
        try:
            address = _address.parse(path)
        except ValueError as error:
            text = f"{config.path}: queues.{queue_key}.path: {error}"
            raise persipubsub.errors.ConfigError(text) from None
        everybody = set(queue.subscribers)
        audiences = frozenset(
            tuple(sorted(publisher.subscribers)) for publisher in config.publishers.values()
            if publisher.out_queue == queue_key and (
                set(publisher.subscribers) != everybody
                or publisher.identifier.startswith(persipubsub.config.MADE_UP)))
        return cls(
            path=path,
            address=address,
            timeout_ns=int((mark.msg_timeout_secs or 3.2e9) * 1e9),  # transitional
            max_messages=mark.max_msgs_num or 2**48,
            max_message_bytes=mark.size_bytes or 2**46,
            strategy=mark.strategy.value,
            wait_secs=queue.busy_timeout_secs,
            subscribers=tuple(queue.subscribers),
            audiences=audiences)

    def subject(self, audience: Sequence[str] | None) -> str:
        """
        Name the subject of the messages for some subscribers.

        :param audience: their ids; None for everybody
        :return: subject
        """
        return _address.subject_of(self.address.stream, audience)

    def filters(self, subscriber: str) -> tuple[str, ...]:
        """
        Name the subjects of the messages that a subscriber gets.

        :param subscriber: its id
        :return: subjects, each once
        """
        return (self.subject(None), ) + tuple(
            sorted(self.subject(audience) for audience in self.audiences if subscriber in audience))

    def stream_config(self) -> dict[str, Any]:
        """
        Describe the stream for the server.

        ``discard`` is ``new``: the server refuses what is above a mark, and the strategy is ours.

        :return: configuration
        """
        # The server wants a tenth of a second at least.
        age_ns = max(self.timeout_ns, 100_000_000)
        return {
            "name": self.address.stream,
            "description": "A queue of persipubsub",
            "subjects": [f"persipubsub.{self.address.stream}.>"],
            "retention": "interest",
            "storage": "file",
            "discard": "new",
            "max_msgs": self.max_messages if self.max_messages < 2**48 else -1,
            "max_bytes": (self.max_message_bytes +
                          _FRAME_BYTES if self.max_message_bytes < 2**46 else -1),
            "max_age": age_ns,
            "max_consumers": -1,
            "num_replicas": self.address.replicas,
            "duplicate_window": min(age_ns, int(_DUPLICATE_WINDOW_SECS * 1e9)),
            "metadata": {
                _MARK: "1"
            },
        }

    def consumer_config(self, subscriber: str) -> dict[str, Any]:
        """
        Describe the durable consumer of a subscriber for the server.

        :param subscriber: its id
        :return: configuration
        """
        name = _address.durable_of(subscriber)
        return {
            "name": name,
            "durable_name": name,
            "ack_policy": "explicit",
            "deliver_policy": "new",
            "ack_wait": int(self.address.ack_wait_secs * 1e9),
            "max_deliver": -1,
            "max_ack_pending": -1,
            "max_waiting": 4096,
            "filter_subjects": list(self.filters(subscriber)),
            "metadata": {
                _MARK: subscriber
            },
        }

    def check_size(self, messages: Sequence[bytes]) -> None:
        """
        Check that the queue could hold messages if it were empty.

        :param messages: to be put in one call
        :raise MessageTooLargeError: if it could not
        """
        sizes = list(map(len, messages))
        if max(sizes, default=0) > self.max_message_bytes:
            raise persipubsub.errors.MessageTooLargeError(
                "Expected a message of at most {} bytes for the queue {} (HWM_LMDB_SIZE_BYTES), "
                "but got: {} bytes".format(self.max_message_bytes, self.path, max(sizes)))
        if sum(sizes) > self.max_message_bytes or len(sizes) > self.max_messages:
            raise persipubsub.errors.MessageTooLargeError(
                "Expected a batch of at most {} messages (MAX_MSGS_NUM) and {} bytes "
                "(HWM_LMDB_SIZE_BYTES) for the queue {}, but got: {} messages, {} bytes".format(
                    self.max_messages, self.max_message_bytes, self.path, len(sizes), sum(sizes)))


def is_ours(stream_config: dict[str, Any]) -> bool:
    """
    Tell the streams of this library from others.

    :param stream_config: of a stream, as the server tells it
    :return: True if this library made it
    """
    return bool((stream_config.get("metadata") or {}).get(_MARK) == "1")


def subscriber_of(consumer_config: dict[str, Any]) -> str | None:
    """
    Find out whose consumer it is.

    :param consumer_config: of a consumer, as the server tells it
    :return: id of the subscriber; None if this library did not make it
    """
    return (consumer_config.get("metadata") or {}).get(_MARK)
