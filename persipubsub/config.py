"""
Read the configuration file as typed, frozen objects.

The file is checked as a whole: you get either a :py:class:`Config` in which every reference leads
somewhere, or a :py:class:`persipubsub.errors.ConfigError` with all the problems of the file. Only
:py:func:`read` and :py:func:`parse` check; objects that you construct on your own are not checked.
"""

import collections.abc
import enum
import functools
import os
import pathlib
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, NoReturn, TypeVar, Union

import msgspec
import msgspec.structs

from persipubsub import _config_checks
from persipubsub import _json_file as json_file
from persipubsub._config_checks import Text, Texts

__all__ = [
    "Strategy", "Durability", "StartFrom", "HighWaterMark", "Queue", "Publisher", "Subscriber",
    "Config", "RESERVED_SUBSCRIBER_IDS", "DEAD_LETTERS", "read", "parse", "check_identifier"
]

#: Identifiers that no publisher and no subscriber can have.
RESERVED_SUBSCRIBER_IDS: Final = _config_checks.RESERVED_SUBSCRIBER_IDS
#: The subscriber of each queue of dead letters, on whose behalf operators look at it.
DEAD_LETTERS: Final = _config_checks.DEAD_LETTERS


class Strategy(enum.Enum):
    """Choose what happens when a queue passes its high-water mark."""

    #: Drop the oldest messages.
    PRUNE_FIRST = "prune_first"
    #: Drop the newest messages.
    PRUNE_LAST = "prune_last"
    #: Drop nothing: ``send`` raises ``QueueFullError`` at once.
    REJECT = "reject"
    #: Drop nothing: ``send`` waits for room, and raises ``QueueFullError`` after its timeout.
    BLOCK = "block"


class Durability(enum.Enum):
    """Choose how safe a message is when ``send`` returns."""

    #: On the disk: it survives a power failure.
    FSYNC = "fsync"
    #: With the operating system: it survives its process; a power failure, from a checkpoint on.
    OS = "os"


class StartFrom(enum.Enum):
    """Choose what a new subscriber gets of the messages that are in the queue already."""

    #: Nothing: only what is sent from then on.
    END = "end"
    #: All that is still stored and addressed to it.
    BEGINNING = "beginning"


# yapf: disable
_MARK_KEYS = {
    "msg_timeout_secs": "MSG_TIMEOUT_SECS",
    "max_msgs_num": "MAX_MSGS_NUM",
    "size_bytes": "HWM_LMDB_SIZE_BYTES",
}


class HighWaterMark(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename=_MARK_KEYS):
    """
    Limit the age, the number and the size of the messages that a queue holds.

    >>> HighWaterMark(600, 10000, 1000000, Strategy.PRUNE_FIRST).max_msgs_num
    10000
    """

    msg_timeout_secs: Annotated[float, msgspec.Meta(
        ge=1e-9, le=3_200_000_000, description="age at which a message is dropped, in seconds")]
    max_msgs_num: Annotated[int, msgspec.Meta(
        ge=1, le=2**48, description="size of the queue, in messages")]
    size_bytes: Annotated[int, msgspec.Meta(
        ge=1, le=2**46, description="size of the queue, in bytes")]
    strategy: Annotated[Strategy, msgspec.Meta(description="what happens above the mark")]


class Queue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    Describe one queue.

    >>> mark = HighWaterMark(600, 10000, 1000000, Strategy.PRUNE_FIRST)
    >>> Queue("/q", 1024, 1024, 1024**2, ("sub", ), mark).durability
    <Durability.FSYNC: 'fsync'>
    """

    path: Annotated[Text, msgspec.Meta(
        description="directory of the queue; relative to the one of the configuration file")]
    max_reader_num: Annotated[int, msgspec.Meta(
        ge=1, le=65535, description="limit of the reader table, in readers at the same time")]
    max_db_num: Annotated[int, msgspec.Meta(
        ge=8, le=32768, description="limit of the store, in sub-databases")]
    max_db_size_bytes: Annotated[int, msgspec.Meta(
        ge=2**18, le=2**46, description="limit of the store, in bytes")]
    subscribers: Annotated[Texts, msgspec.Meta(
        description="all subscribers of the queue, each once; identifiers of 1 to 255 bytes")]
    high_water_mark: Annotated[
        HighWaterMark,
        msgspec.Meta(description="when messages are dropped or held back"),
    ] = msgspec.field(name="high-water-mark")
    durability: Annotated[Durability, msgspec.Meta(
        description="how safe a message is when send returns")] = Durability.FSYNC
    checkpoint_secs: Annotated[float, msgspec.Meta(
        ge=0, le=86400, description="time between checkpoints, in seconds; 0: none")] = 1.0
    busy_timeout_secs: Annotated[float, msgspec.Meta(
        gt=0, le=86400,
        description="wait of a write for another process that holds the queue, in seconds")] = 30.0
    once_window_secs: Annotated[float, msgspec.Meta(
        ge=1e-9, le=3_200_000_000,
        description="time for which the ids of messages are remembered, in seconds")] = 3600.0
    retain_secs: Annotated[float, msgspec.Meta(
        ge=0, le=3_200_000_000,
        description="time for which finished messages stay, in seconds since they were sent")] = 0.0


class Publisher(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    Describe one publisher.

    >>> Publisher(identifier="pub", out_queue="/q", subscribers=("sub", )).out_queue
    '/q'
    """

    identifier: Annotated[Text, msgspec.Meta(description="key of the entry, 1 to 255 bytes")]
    out_queue: Annotated[Text, msgspec.Meta(description="key in queues, to publish to")]
    subscribers: Annotated[Texts, msgspec.Meta(
        min_length=1, description="those of the queue that get the messages, each once")]


class Subscriber(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    Describe one subscriber.

    >>> Subscriber(identifier="sub", in_queue="/q").in_queue
    '/q'
    """

    identifier: Annotated[Text, msgspec.Meta(description="key of the entry, 1 to 255 bytes")]
    in_queue: Annotated[Text, msgspec.Meta(description="key in queues, to receive from")]
    start_from: Annotated[StartFrom, msgspec.Meta(
        description="where it begins when it is added to the queue")] = StartFrom.END
    max_deliveries: Annotated[int, msgspec.Meta(
        ge=1, le=2**31, description="how often a message is delivered at most, in deliveries; "
        "without the key there is no limit")] = 0
    dead_letter_queue: Annotated[Text, msgspec.Meta(
        description="key in queues, where messages go then; needs max_deliveries")] = ""
    retry_delay_secs: Annotated[float, msgspec.Meta(
        ge=0, le=86400, description="rest of a message after its first failed delivery, in "
        "seconds; doubled with each further one, up to an hour")] = 0.0


# yapf: enable
_KINDS = _config_checks.Kinds(Queue, Publisher, Subscriber)

EntryT = TypeVar("EntryT", Publisher, Subscriber)


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    Hold a checked configuration file. Nothing of it changes: any thread may use it at any time.

    >>> parse(text=b'{"queues": {}}', config_pth="/etc/config.json").path.name
    'config.json'
    """

    path: pathlib.Path
    publishers: Mapping[str, Publisher]
    subscribers: Mapping[str, Subscriber]
    queues: Mapping[str, Queue]

    def publisher(self, identifier: str) -> Publisher:
        """
        Return the publisher with the identifier.

        :param identifier: key of the publisher's entry
        :return: the publisher
        :raise ConfigError: if the file has no such publisher
        """
        found = self.publishers.get(identifier)
        return found or self._raise_missing("publisher", identifier, self.publishers)

    def subscriber(self, identifier: str) -> Subscriber:
        """
        Return the subscriber with the identifier.

        :param identifier: key of the subscriber's entry; that a queue lists it is not enough
        :return: the subscriber
        :raise ConfigError: if the file has no such subscriber
        """
        found = self.subscribers.get(identifier)
        return found or self._raise_missing("subscriber", identifier, self.subscribers)

    def queue_path(self, queue_key: str) -> str:
        """
        Return where the queue is.

        A relative path starts at the directory of the configuration file, as that was given to
        :py:func:`read`: links are not followed, ``..`` and ``~`` stay. A path with a scheme
        (``nats://...``) is returned as it is.

        :param queue_key: key in ``queues``
        :return: path, independent of the working directory
        :raise ConfigError: if the file has no such queue
        """
        if queue_key not in self.queues:
            self._raise_missing("queue", queue_key, self.queues)
        return _config_checks.resolve(self.path.parent, self.queues[queue_key].path)

    def _raise_missing(self, kind: str, identifier: str, known: Iterable[str]) -> NoReturn:
        """Raise the error about something that was asked for and is not in the file."""
        found = json_file.shown(identifier)
        text = f"Expected a {kind} of this file ({json_file.listed(known)}), but got: {found}"
        json_file.raise_error(self.path, [text])


def read(config_pth: Union[str, "os.PathLike[str]"]) -> Config:
    """
    Read and check the configuration file.

    Any number of threads and processes may read at the same time; nothing is written. Replace the
    file by renaming: one that is overwritten in place may be read half. It blocks as long as the
    disk takes. A FIFO or a device is refused, and never waited for.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     config_pth = pathlib.Path(directory) / "config.json"
    ...     _ = config_pth.write_text('{"queues": {}}')
    ...     read(config_pth=config_pth).path == config_pth
    True

    :param config_pth: path to the file, at most 64 MiB of JSON in UTF-8
    :return: the checked configuration
    :raise ConfigError: if anything is wrong, also if the file is missing or must not be read
    :raise TypeError: if ``config_pth`` is not a path
    """
    path = json_file.absolute(config_pth)
    return _parse(path, functools.partial(json_file.read_bytes, os.fspath(config_pth), path))


def parse(text: bytes, config_pth: Union[str, "os.PathLike[str]"]) -> Config:
    """
    Check the content of a configuration file. No file is touched.

    >>> config = parse(config_pth="/etc/config.json", text=b'''{
    ...     "pub": {"out_queue": "q", "subscribers": ["sub"]},
    ...     "queues": {"q": {
    ...         "path": "queue", "max_reader_num": 1024, "max_db_num": 1024,
    ...         "max_db_size_bytes": 1048576, "subscribers": ["sub"],
    ...         "high-water-mark": {"MSG_TIMEOUT_SECS": 600, "MAX_MSGS_NUM": 10000,
    ...             "HWM_LMDB_SIZE_BYTES": 1000000, "strategy": "prune_first"}}}}''')
    >>> config.publisher("pub").subscribers, config.queue_path("q")
    (('sub',), '/etc/queue')
    >>> parse(text=b'{"queues": []}', config_pth="/etc/config.json")
    Traceback (most recent call last):
    ...
    persipubsub.errors.ConfigError: /etc/config.json: queues: Expected an object, but got: []

    :param text: content, at most 64 MiB of JSON in UTF-8
    :param config_pth: named in errors, and where relative paths start; need not exist
    :return: the checked configuration
    :raise ConfigError: if anything is wrong
    :raise TypeError: if ``text`` is not bytes, or ``config_pth`` is not a path
    """
    if not isinstance(text, bytes):
        raise TypeError(f"Expected text as bytes, but got: {json_file.shown(text)}")

    return _parse(json_file.absolute(config_pth), lambda: text)


def check_identifier(identifier: str, config_pth: Union[str, "os.PathLike[str]"]) -> None:
    """
    Check that an identifier could stand in a configuration file. No file is touched.

    >>> check_identifier("sub", config_pth="/etc/config.json")

    :param identifier: of a publisher or a subscriber
    :param config_pth: named in errors
    :raise ConfigError: if it could not
    """
    checker = _config_checks.Checker(json_file.absolute(config_pth), _KINDS)
    if not checker.check_identifier(identifier, "subscribers"):
        json_file.raise_error(checker.path, checker.problems)


def _parse(path: pathlib.Path, read_text: collections.abc.Callable[[], bytes]) -> Config:
    """Return the checked configuration."""
    try:
        found = json_file.load(read_text(), path)
        checker = _config_checks.Checker(path, _KINDS)
        checker.check_file(found)
    except MemoryError:
        json_file.raise_error(
            path, ["Expected a file that fits into the memory, but got one that does not"])
    if checker.problems:
        json_file.raise_error(path, checker.problems)

    queues = msgspec.convert(found.pop(_config_checks.QUEUES_KEY), dict[str, Queue], strict=True)
    pubs = {
        key: _of_entry(Publisher, key, found[key])
        for key in found if "out_queue" in found[key]
    }
    subs = {
        key: _of_entry(Subscriber, key, found[key])
        for key in found if "in_queue" in found[key]
    }
    frozen = types.MappingProxyType
    return Config(path, publishers=frozen(pubs), subscribers=frozen(subs), queues=frozen(queues))


def _of_entry(kind: type[EntryT], identifier: str, entry: Mapping[str, Any]) -> EntryT:
    """Return what the checked entry is to become; it may be a publisher and a subscriber."""
    fields = _config_checks.entry_fields(kind)
    values = {key: entry[key] for key in fields if key in entry}
    return msgspec.convert({"identifier": identifier, **values}, kind, strict=True)
