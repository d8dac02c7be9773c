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
import re
import types
from typing import Annotated, Any, Final, Iterable, Mapping, NoReturn, Sequence, Union, get_args

import msgspec
import msgspec.structs

from persipubsub import _json_file as json_file
from persipubsub.jetstream import _address

__all__ = [
    "Strategy", "Durability", "HighWaterMark", "Queue", "Publisher", "Subscriber", "Config",
    "RESERVED_SUBSCRIBER_IDS", "read", "parse", "check_identifier"
]

#: Names of the sub-databases that the store needs for itself; no subscriber can have them.
RESERVED_SUBSCRIBER_IDS: Final = frozenset(
    {"data_db", "meta_db", "pending_db", "ahead_db", "attempts_db", "once_db"})

_QUEUES_KEY = "queues"
# A large file that is something else altogether would fill the memory with its problems.
_MAX_PROBLEMS = 1000
_MAX_IDENTIFIER_SIZE = 255  # bytes in UTF-8
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# Neither the operating system nor UTF-8 (and hence no C++ or Go program) takes any other.
_Text = Annotated[str, msgspec.Meta(min_length=1, pattern=r"^[^\x00\ud800-\udfff]*$")]
_Texts = tuple[_Text, ...]


class Strategy(enum.Enum):
    """Choose what happens when a queue passes its high-water mark."""

    #: Drop the oldest messages.
    PRUNE_FIRST = "prune_first"
    #: Drop the newest messages.
    PRUNE_LAST = "prune_last"


class Durability(enum.Enum):
    """Choose how safe a message is when ``send`` returns."""

    #: On the disk: it survives a power failure.
    FSYNC = "fsync"
    #: With the operating system: it survives its process; a power failure, from a checkpoint on.
    OS = "os"


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
        gt=0, le=3_200_000_000, description="age at which a message is dropped, in seconds")]
    max_msgs_num: Annotated[int, msgspec.Meta(
        ge=1, le=2**48, description="size of the queue, in messages")]
    size_bytes: Annotated[int, msgspec.Meta(
        ge=1, le=2**46, description="size of the queue, in bytes")]
    strategy: Annotated[Strategy, msgspec.Meta(description="what is dropped above the mark")]


class Queue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    Describe one queue.

    >>> mark = HighWaterMark(600, 10000, 1000000, Strategy.PRUNE_FIRST)
    >>> Queue("/q", 1024, 1024, 1024**2, ("sub", ), mark).durability
    <Durability.FSYNC: 'fsync'>
    """

    path: Annotated[_Text, msgspec.Meta(
        description="directory of the queue; relative to the one of the configuration file")]
    max_reader_num: Annotated[int, msgspec.Meta(
        ge=1, le=65535, description="limit of the reader table, in readers at the same time")]
    max_db_num: Annotated[int, msgspec.Meta(
        ge=8, le=32768, description="limit of the store, in sub-databases")]
    max_db_size_bytes: Annotated[int, msgspec.Meta(
        ge=2**18, le=2**46, description="limit of the store, in bytes")]
    subscribers: Annotated[_Texts, msgspec.Meta(
        description="all subscribers of the queue, each once; identifiers of 1 to 255 bytes")]
    high_water_mark: Annotated[
        HighWaterMark,
        msgspec.Meta(description="when messages are dropped unread"),
    ] = msgspec.field(name="high-water-mark")
    durability: Annotated[Durability, msgspec.Meta(
        description="how safe a message is when send returns")] = Durability.FSYNC
    checkpoint_secs: Annotated[float, msgspec.Meta(
        ge=0, le=86400, description="time between checkpoints, in seconds; 0: none")] = 1.0
    busy_timeout_secs: Annotated[float, msgspec.Meta(
        gt=0, le=86400,
        description="wait of a write for another process that holds the queue, in seconds")] = 30.0


class Publisher(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    Describe one publisher.

    >>> Publisher(identifier="pub", out_queue="/q", subscribers=("sub", )).out_queue
    '/q'
    """

    identifier: Annotated[_Text, msgspec.Meta(description="key of the entry, 1 to 255 bytes")]
    out_queue: Annotated[_Text, msgspec.Meta(description="key in queues, to publish to")]
    subscribers: Annotated[_Texts, msgspec.Meta(
        min_length=1, description="those of the queue that get the messages, each once")]


class Subscriber(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    Describe one subscriber.

    >>> Subscriber(identifier="sub", in_queue="/q").in_queue
    '/q'
    """

    identifier: Annotated[_Text, msgspec.Meta(description="key of the entry, 1 to 255 bytes")]
    in_queue: Annotated[_Text, msgspec.Meta(description="key in queues, to receive from")]


# yapf: enable
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
        return _resolve(self.path.parent, self.queues[queue_key].path)

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
    checker = _Checker(json_file.absolute(config_pth))
    if not checker.check_identifier(identifier, "subscribers"):
        json_file.raise_error(checker.path, checker.problems)


def _resolve(directory: pathlib.Path, path: str) -> str:
    """Return the path of a queue independent of the working directory."""
    return path if _SCHEME.match(path) else str(directory / path)


def _parse(path: pathlib.Path, read_text: collections.abc.Callable[[], bytes]) -> Config:
    """Return the checked configuration."""
    try:
        found = json_file.load(read_text(), path)
        checker = _Checker(path)
        checker.check_file(found)
    except MemoryError:
        json_file.raise_error(
            path, ["Expected a file that fits into the memory, but got one that does not"])
    if checker.problems:
        json_file.raise_error(path, checker.problems)

    queues = msgspec.convert(found.pop(_QUEUES_KEY), dict[str, Queue], strict=True)
    pubs = {
        key: Publisher(key, entry["out_queue"], tuple(entry["subscribers"]))
        for key, entry in found.items() if "out_queue" in entry
    }
    subs = {
        key: Subscriber(key, entry["in_queue"])
        for key, entry in found.items() if "in_queue" in entry
    }
    frozen = types.MappingProxyType
    return Config(path, publishers=frozen(pubs), subscribers=frozen(subs), queues=frozen(queues))


@functools.lru_cache(maxsize=None)
def _fields(kind: type[msgspec.Struct]) -> Mapping[str, msgspec.structs.FieldInfo]:
    """Return the fields by their keys; to compute them takes longer than to read a small file."""
    return {field.encode_name: field for field in msgspec.structs.fields(kind)}


def _expected(annotation: Any) -> str:
    """Return what a value of the type has to be."""
    kind, meta = get_args(annotation)[:2]
    if kind is str:
        return "a non-empty string without NUL and lone surrogates"
    if issubclass(kind, enum.Enum):
        return " or ".join(repr(member.value) for member in kind)
    noun = "an integer" if kind is int else "a number"
    bounds = f"between {meta.ge} and" if meta.gt is None else f"greater than {meta.gt} and at most"
    return f"{noun} {bounds} {meta.le}"


class _Checker:
    """Collect the problems of a file."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.problems: list[str] = []
        # Subscribers by queue, None if unknown: looked up once for each reference, of which there
        # may be as many as subscribers.
        self._known: dict[str, Any] = {}

    def add(self, place: str, expected: str, found: object, hint: str = "") -> None:
        """Add a problem."""
        where = f"{place}: " if place else ""
        self.problems.append(f"{where}Expected {expected}, but got: {json_file.shown(found)}{hint}")
        if len(self.problems) == _MAX_PROBLEMS:
            json_file.raise_error(self.path,
                                  self.problems + ["The rest of the file was not checked"])

    def check_file(self, found: Any) -> None:
        """Add the problems of the whole file."""
        if not isinstance(found, dict):
            return self.add("", "an object", found)

        self.check_repeated(found, "")
        queues = found.get(_QUEUES_KEY, json_file.Literal("no such key"))
        if isinstance(queues, dict):
            self.check_queues(queues)
        else:
            self.add(_QUEUES_KEY, "an object", queues)
        for key, entry in found.items():
            if key != _QUEUES_KEY:
                self.check_identifier(key, json_file.at("", key))
                self.check_entry(key, entry, queues)
        return None

    def check_repeated(self, found: Any, place: str) -> None:
        """Add the keys that are there more than once, at any level."""
        if isinstance(found, json_file.Object):
            for key in found.repeated:
                self.add(place, "each key once", key, " more than once")
            for key, value in found.items():
                self.check_repeated(value, json_file.at(place, key))
        elif isinstance(found, list):
            for index, value in enumerate(found):
                if isinstance(value, (dict, list)):
                    self.check_repeated(value, f"{place}[{index}]")

    def check_queues(self, queues: Mapping[str, Any]) -> None:
        """Add the problems of the queues."""
        places: dict[str, str] = {}
        for key, queue in queues.items():
            place = json_file.at(_QUEUES_KEY, key)
            self.check_value(_Text, key, place)
            self.check_struct(Queue, queue, place)
            path = queue.get("path") if isinstance(queue, dict) else None
            if isinstance(path, str):
                if problem := _address.problem_of(path):
                    self.problems.append(f"{place}.path: {problem}")
                # By name: what is right must not depend on the links that are on the disk now.
                resolved = _resolve(self.path.parent, path)
                if not _SCHEME.match(path):
                    resolved = "/" + os.path.normpath(resolved).lstrip("/")
                other = places.setdefault(resolved, place)
                if other != place:
                    self.add(f"{place}.path", f"another path than that of {other}", path)

    def check_struct(self, kind: type[msgspec.Struct], found: Any, place: str) -> None:
        """Add the problems of what is to become a struct."""
        if not isinstance(found, dict):
            return self.add(place, "an object", found)

        fields = _fields(kind)
        self.check_keys(found, list(fields), [k for k in fields if fields[k].required], place)
        for key in fields:
            if key in found:
                self.check_value(fields[key].type, found[key], json_file.at(place, key))
        return None

    def check_keys(self, found: Mapping[str, Any], known: Sequence[str], required: Sequence[str],
                   place: str) -> None:
        """Add the keys that must not be there, and the ones that must."""
        for key in found:
            if key not in known:
                # Imported late: few need it, and it would slow down each start of a program.
                import difflib  # pylint: disable=import-outside-toplevel

                alike = {name.casefold().replace("-", "_"): name for name in known}
                folded = key[:100].casefold().replace("-", "_")
                closest = difflib.get_close_matches(folded, alike, n=1)
                hint = f" (did you mean {alike[closest[0]]!r}?)" if closest else ""
                self.add(place, "only the keys " + ", ".join(map(repr, known)), key, hint)

        for key in required:
            if key not in found:
                self.add(place, f"the key {key!r}", json_file.Literal("no such key"))

    def check_value(self, annotation: Any, found: Any, place: str) -> None:
        """Add the problems of the value of a key."""
        kind = get_args(annotation)[0]
        if kind == _Texts:
            self.check_subscribers(found, place)
        elif issubclass(kind, msgspec.Struct):
            self.check_struct(kind, found, place)
        else:
            try:
                msgspec.convert(found, annotation, strict=True)
            except msgspec.ValidationError:
                self.add(place, _expected(annotation), found)

    def check_subscribers(self, found: Any, place: str, known: Any = None) -> None:
        """Add the problems of a list of subscribers; not all of the known ones have to be in it."""
        if not isinstance(found, list):
            return self.add(place, "a list of subscribers", found)

        seen = set()
        for index, subscriber in enumerate(found):
            there = f"{place}[{index}]"
            if self.check_identifier(subscriber, there):
                if subscriber in seen:
                    self.add(there, "each subscriber once", subscriber, " again")
                elif known is not None and subscriber not in known:
                    self.add(there, f"a subscriber of the queue ({json_file.listed(known)})",
                             subscriber)
                seen.add(subscriber)
        return None

    def check_identifier(self, found: Any, place: str) -> bool:
        """Add the problem of the identifier of a publisher or a subscriber, return True if none."""
        try:
            size = len(msgspec.convert(found, _Text, strict=True).encode("utf-8"))
        except msgspec.ValidationError:
            size = 0
        count = len(self.problems)
        if not 0 < size <= _MAX_IDENTIFIER_SIZE:
            limits = f"1 to {_MAX_IDENTIFIER_SIZE} bytes in UTF-8, no NUL, no lone surrogates"
            self.add(place, f"an identifier ({limits})", found)
        elif found in RESERVED_SUBSCRIBER_IDS or found == _QUEUES_KEY:
            # A subscriber with the name of the key of the queues could not have an entry.
            self.add(place, "an identifier that is not reserved", found)
        return len(self.problems) == count

    def check_entry(self, identifier: str, entry: Any, queues: Any) -> None:
        """Add the problems of a publisher, of a subscriber, or of both in one."""
        place = json_file.at("", identifier)
        keys = entry.keys() if isinstance(entry, dict) else set()
        required = ["out_queue", "subscribers"] if keys & {"out_queue", "subscribers"} else []
        required += ["in_queue"] if "in_queue" in keys else []
        if not required:
            kinds = "a publisher ('out_queue', 'subscribers'), a subscriber ('in_queue') or both"
            self.add(place, kinds, entry)
        if keys:
            self.check_keys(entry, ["out_queue", "subscribers", "in_queue"], required, place)
        known = self.check_reference("out_queue", entry, queues, place) if keys else None
        if "subscribers" in keys:
            there = f"{place}.subscribers"
            self.check_subscribers(entry["subscribers"], there, known)
            if entry["subscribers"] == []:
                self.add(there, "at least one subscriber", [])
        known = self.check_reference("in_queue", entry, queues, place) if keys else None
        if known is not None and identifier not in known:
            expected = f"a queue with the subscriber {json_file.shown(identifier, limit=100)}"
            self.add(f"{place}.in_queue", expected, entry["in_queue"],
                     f" ({json_file.listed(known)})")

    def check_reference(self, key: str, entry: Any, queues: Any, place: str) -> Any:
        """Add the problem of a reference, return the subscribers of the queue, None if unknown."""
        # With the queues missing, each reference would be a problem that is not its own.
        if key not in entry or not isinstance(queues, dict):
            return None
        found = entry[key]
        if not isinstance(found, str) or found not in queues:
            return self.add(json_file.at(place, key),
                            f"a key of queues ({json_file.listed(queues)})", found)

        if found not in self._known:
            queue = queues[found]
            listed = queue.get("subscribers") if isinstance(queue, dict) else None
            self._known[found] = None
            if isinstance(listed, list):
                self._known[found] = dict.fromkeys(name for name in listed if isinstance(name, str))
        return self._known[found]
