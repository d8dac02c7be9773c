"""
Read the configuration file as typed, frozen objects.

The file is checked as a whole: you get either a :py:class:`Config` in which every reference leads
somewhere, or a :py:class:`persipubsub.errors.ConfigError` with all the problems of the file. Only
:py:func:`read` and :py:func:`parse` check; objects that you construct on your own are not checked.
"""

import collections
import enum
import functools
import importlib
import json
import os
import pathlib
import re
import reprlib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, NoReturn, TypeAlias, TypeVar, get_args

import msgspec
import msgspec.structs

from persipubsub.errors import ConfigError, ConfigNotFoundError

__all__ = [
    "Strategy", "Durability", "StartFrom", "HighWaterMark", "Queue", "Publisher", "Subscriber",
    "Config", "ConfigLike", "RESERVED_SUBSCRIBER_IDS", "DEAD_LETTERS", "read", "parse", "schema",
    "check_identifier", "scheme_of", "at", "fail"
]

#: The subscriber of each queue of dead letters, on whose behalf operators look at it.
DEAD_LETTERS: Final = "dead_letters"

#: Identifiers that no publisher and no subscriber can have: the store uses these names itself.
RESERVED_SUBSCRIBER_IDS: Final = frozenset(
    {"data_db", "meta_db", "pending_db", "ahead_db", "attempts_db", "once_db", DEAD_LETTERS})

#: ``migrate`` adds publishers; their ids begin with this prefix, which no file can have. They
#: always list their recipients, since the queue may have subscribers that the file lacks.
MADE_UP: Final = "\0"

_MAX_IDENTIFIER_SIZE: Final = 255  # bytes in UTF-8
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")

# A path cannot hold NUL. UTF-8 cannot hold lone surrogates.
_TEXT: Final = re.compile(r"^[^\x00\ud800-\udfff]+$")
Text: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, pattern=_TEXT.pattern)]
Texts: TypeAlias = tuple[Text, ...]


class Strategy(enum.StrEnum):
    """Choose what happens when a queue passes its high-water mark."""

    #: Drop the oldest messages.
    PRUNE_FIRST = "prune_first"
    #: Drop the newest messages.
    PRUNE_LAST = "prune_last"
    #: Drop nothing: ``send`` raises ``QueueFullError`` at once.
    REJECT = "reject"
    #: Drop nothing: ``send`` waits for room, and raises ``QueueFullError`` after its timeout.
    BLOCK = "block"


class Durability(enum.StrEnum):
    """Choose how safe a message is when ``send`` returns."""

    #: On the disk: it survives a power failure.
    FSYNC = "fsync"
    #: With the operating system: it survives its process, and a power failure after
    #: ``checkpoint_secs``.
    OS = "os"


class StartFrom(enum.StrEnum):
    """Choose what a new subscriber gets of the messages that are in the queue already."""

    #: Nothing: only what is sent from then on.
    END = "end"
    #: All that is still stored and addressed to it.
    BEGINNING = "beginning"


# yapf: disable
class HighWaterMark(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    Limit the age, the number and the size of the messages that a queue holds; None: no limit.

    >>> HighWaterMark(max_msgs_num=10000).strategy
    <Strategy.REJECT: 'reject'>
    """

    msg_timeout_secs: Annotated[
        Annotated[float, msgspec.Meta(ge=1e-9, le=3_200_000_000)] | None,
        msgspec.Meta(description="age at which a message is dropped, in seconds")
        ] = msgspec.field(name="MSG_TIMEOUT_SECS", default=None)
    max_msgs_num: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=2**48)] | None,
        msgspec.Meta(description="size of the queue, in messages")
        ] = msgspec.field(name="MAX_MSGS_NUM", default=None)
    size_bytes: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=2**46)] | None,
        msgspec.Meta(description="size of the queue, in bytes of messages")
        ] = msgspec.field(name="HWM_LMDB_SIZE_BYTES", default=None)
    strategy: Annotated[Strategy, msgspec.Meta(
        description="what happens above the mark")] = Strategy.REJECT


class Queue(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """
    Describe one queue. Without limits it holds what fits into ``max_db_size_bytes``.

    >>> Queue(subscribers=("sub", )).durability
    <Durability.FSYNC: 'fsync'>
    """

    path: Annotated[Text | None, msgspec.Meta(
        description="directory of the queue, relative to the one of the configuration file, or "
        "nats://...; without it, the key of the queue")] = None
    max_reader_num: Annotated[int, msgspec.Meta(
        ge=1, le=65535, description="limit of the reader table, in readers at the same time"
        )] = 1024
    max_db_num: Annotated[int, msgspec.Meta(
        ge=8, le=32768, description="has no effect; kept for old files")] = 1024
    max_db_size_bytes: Annotated[int, msgspec.Meta(
        ge=2**18, le=2**46, description="limit of the store, in bytes")] = 32 * 1024**3
    subscribers: Annotated[Texts, msgspec.Meta(
        description="all subscribers of the queue, each once; identifiers of 1 to 255 bytes")]
    high_water_mark: Annotated[HighWaterMark, msgspec.Meta(
        description="when messages are dropped or held back"
        )] = msgspec.field(name="high-water-mark", default=HighWaterMark())
    durability: Annotated[Durability, msgspec.Meta(
        description="how safe a message is when send returns")] = Durability.FSYNC
    checkpoint_secs: Annotated[float, msgspec.Meta(
        gt=0, le=86400, description="time between checkpoints, in seconds")] = 1.0
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
        min_length=1, description="those of the queue that get the messages, each once; without "
        "it, all of the queue's")] = ()


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
        ge=0, le=86400, description="pause of a message after its first failed delivery, in "
        "seconds; doubled after each further one, up to an hour")] = 0.0


# yapf: enable
_REFERENCES: Final = frozenset({"out_queue", "in_queue", "dead_letter_queue"})

StructT = TypeVar("StructT", bound=msgspec.Struct)


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    Hold a checked configuration. Nothing of it changes: any thread may use it at any time.

    >>> read({"queues": {"q": {"subscribers": ["sub"]}}}).queues["q"].subscribers
    ('sub',)
    """

    path: pathlib.Path  #: of the file; named in errors, and relative paths start beside it
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
        return self._find("publisher", self.publishers, identifier)

    def subscriber(self, identifier: str) -> Subscriber:
        """
        Return the subscriber with the identifier.

        :param identifier: key of the subscriber's entry; a subscriber that is only in the list of a
            queue is not found
        :return: the subscriber
        :raise ConfigError: if the file has no such subscriber
        """
        return self._find("subscriber", self.subscribers, identifier)

    def queue_path(self, queue_key: str) -> str:
        """
        Return where the queue is.

        A relative path starts at the directory of the configuration file, as that was given to
        :py:func:`read`: links are not followed, ``..`` and ``~`` stay. Where a dictionary was
        given, it starts at the working directory of that moment. A path with a scheme
        (``nats://...``) is returned as it is.

        :param queue_key: key in ``queues``
        :return: path, independent of the working directory
        :raise ConfigError: if the file has no such queue
        """
        path = self._find("queue", self.queues, queue_key).path or queue_key
        return path if scheme_of(path) else str(self.path.parent / path)

    def _find(self, kind: str, known: Mapping[str, StructT], key: str) -> StructT:
        if key not in known:
            fail(self.path, [
                f"Expected a {kind} of this file ({_listed(known)}), but got: {_shown(key)}"
                f"{_meant(key, known)}"
            ])
        return known[key]


#: What every ``config_pth`` may be: the path of a file, the content of one, or what was read.
ConfigLike: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | Config


def read(config_pth: ConfigLike) -> Config:
    """
    Read and check the configuration.

    Any number of threads and processes may read at the same time; nothing is written. Replace the
    file by renaming: one that is overwritten in place may be read half. It blocks as long as the
    disk takes, or the writer of a FIFO.

    >>> config = read({"sub": {"in_queue": "q"}, "queues": {"q": {"subscribers": ["sub"]}}})
    >>> config.subscriber("sub").in_queue
    'q'

    :param config_pth: path to the file, JSON in UTF-8; or a dictionary with the content of a
        file; or a :py:class:`Config`, which is returned
    :return: the checked configuration
    :raise ConfigError: if anything is wrong
    :raise ConfigNotFoundError: if there is no such file; it is a ``FileNotFoundError``, too
    :raise TypeError: if ``config_pth`` is none of these
    """
    if isinstance(config_pth, Config):
        return config_pth
    path = _path_of(config_pth)
    if isinstance(config_pth, Mapping):
        try:
            return parse(json.dumps(dict(config_pth), default=os.fspath).encode(), path)
        except (TypeError, ValueError, RecursionError) as error:
            fail(path, [f"Expected what JSON can express, but got: {error}"])
    try:
        with open(path, "rb") as file:
            return parse(file.read(), path)
    except (OSError, ValueError) as error:
        kind = ConfigNotFoundError if isinstance(error, FileNotFoundError) else ConfigError
        reason = getattr(error, "strerror", None) or error
        fail(path, [f"Expected a file that can be read, but got: {reason}"], kind)


def parse(text: bytes, config_pth: str | os.PathLike[str]) -> Config:
    """
    Check the content of a configuration file. No file is touched.

    >>> config = parse(config_pth="/etc/config.json", text=b'''{
    ...     "pub": {"out_queue": "q"}, "queues": {"q": {"subscribers": ["sub"]}}}''')
    >>> config.publisher("pub").subscribers, config.queue_path("q")
    (('sub',), '/etc/q')
    >>> parse(text=b'{"queues": []}', config_pth="/etc/config.json")
    Traceback (most recent call last):
    ...
    persipubsub.errors.ConfigError: /etc/config.json: queues: Expected an object, but got: []

    :param text: content, JSON in UTF-8
    :param config_pth: named in errors, and where relative paths start; need not exist
    :return: the checked configuration
    :raise ConfigError: if anything is wrong
    :raise TypeError: if ``text`` is not bytes, or ``config_pth`` is not a path
    """
    if not isinstance(text, bytes):
        raise TypeError(f"Expected text as bytes, but got: {_shown(text)}")
    path = _path_of(config_pth)
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_Object)
    except (ValueError, RecursionError) as error:
        # It names line and column.
        fail(path, [f"Expected JSON in UTF-8, but got: {error}"])
    checker = _Checker(path)
    checker.check_file(found)
    if checker.problems:
        fail(path, checker.problems)
    frozen = types.MappingProxyType
    return Config(path, frozen(checker.publishers), frozen(checker.subscribers),
                  frozen(checker.queues or {}))


def schema() -> dict[str, Any]:
    """
    Describe the configuration file for editors and other tools.

    What holds between entries (references, reserved identifiers) is only checked by
    :py:func:`read`.

    >>> schema()["required"]
    ['queues']

    :return: JSON Schema, draft 2020-12
    """
    _, parts = msgspec.json.schema_components([Queue, Publisher, Subscriber],
                                              ref_template="#/$defs/{name}")
    properties = {**parts.pop("Publisher")["properties"], **parts.pop("Subscriber")["properties"]}
    del properties["identifier"]
    for key in ("subscribers", "max_deliveries", "dead_letter_queue"):
        del properties[key]["default"]  # stands for "no such key", and is no value
    # yapf: disable
    parts["Entry"] = {
        "description": "A publisher, a subscriber, or both; its key is the identifier.",
        "type": "object", "properties": properties, "additionalProperties": False,
        "anyOf": [{"required": ["out_queue"]}, {"required": ["in_queue"]}],
        "dependentRequired": {
            "subscribers": ["out_queue"],
            **{key: ["in_queue"] for key in _fields(Subscriber) if key != "in_queue"},
            "dead_letter_queue": ["in_queue", "max_deliveries"]}}
    queues = {"type": "object", "additionalProperties": {"$ref": "#/$defs/Queue"}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Configuration of persipubsub", "type": "object", "required": ["queues"],
        "properties": {"$schema": {"type": "string"}, "queues": queues},
        "additionalProperties": {"$ref": "#/$defs/Entry"}, "$defs": parts}
    # yapf: enable


def check_identifier(identifier: str, config_pth: ConfigLike) -> None:
    """
    Check that an identifier could stand in a configuration file. No file is touched.

    >>> check_identifier("sub", config_pth="/etc/config.json")

    :param identifier: of a publisher or a subscriber
    :param config_pth: named in errors
    :raise ConfigError: if it could not
    """
    checker = _Checker(_path_of(config_pth))
    if not checker.check_identifier(identifier, "subscribers"):
        fail(checker.path, checker.problems)


def scheme_of(path: str) -> str:
    """
    Return the scheme of a queue's path.

    >>> scheme_of("nats://localhost/GREETINGS"), scheme_of("/home/user/queue")
    ('nats', '')

    :param path: of a queue
    :return: scheme; empty if the path is a directory
    """
    match = _SCHEME.match(path)
    return match[1] if match else ""


def at(place: str, key: str) -> str:
    """
    Return the place of a key's value in a configuration, for an error.

    >>> at("queues", "q")
    'queues.q'

    :param place: of the object; empty for the whole file
    :param key: in the object
    :return: place
    """
    is_plain = 0 < len(key) <= 100 and key.isprintable() and " " not in key
    return f"{place}{'.' if place else ''}{key if is_plain else _shown(key)}"


def fail(path: pathlib.Path,
         problems: Sequence[str],
         kind: type[ConfigError] = ConfigError) -> NoReturn:
    """
    Raise the error about a configuration: the first problem, and how many more there are.

    :param path: of the file
    :param problems: at least one
    :param kind: class of the error
    :raise ConfigError: always
    """
    name = str(path) if str(path).isprintable() else repr(str(path))
    more = len(problems) - 1
    tail = f" (and {more} more problem{'s' if more > 1 else ''})" if more else ""
    raise kind(f"{name}: {problems[0]}{tail}", problems=problems)


# What errors say


def _shown(found: object) -> str:
    """Show a value: without control characters, and cut in the middle if it is long."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 60
    text = shortener.repr(found)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _listed(names: Iterable[str]) -> str:
    """List the first few of the names."""
    known = list(names)
    more = f" and {len(known) - 5} more" if len(known) > 5 else ""
    return ", ".join(map(_shown, known[:5])) + more or "there is none"


def _meant(found: object, known: Iterable[str]) -> str:
    """Suggest the name that is most like the one that was found."""
    if not isinstance(found, str):
        return ""
    # Imported late: it is needed for an error only, and slows down the start of a program.
    import difflib  # pylint: disable=import-outside-toplevel

    alike = {name[:100].casefold().replace("-", "_"): name for name in known}
    closest = difflib.get_close_matches(found[:100].casefold().replace("-", "_"), alike, n=1)
    return f" (did you mean {_shown(alike[closest[0]])}?)" if closest else ""


def _expected(annotation: Any) -> str:
    """Tell what a value of the type has to be."""
    kind, meta = get_args(annotation)[:2]
    if alternatives := get_args(kind):  # or None
        return _expected(alternatives[0])
    if kind is str:
        return "a non-empty string without NUL and lone surrogates"
    if issubclass(kind, enum.Enum):
        return " or ".join(repr(member.value) for member in kind)
    noun = "an integer" if kind is int else "a number"
    bounds = f"between {meta.ge} and" if meta.gt is None else f"greater than {meta.gt} and at most"
    return f"{noun} {bounds} {meta.le}"


# Reading


def _path_of(config_pth: ConfigLike) -> pathlib.Path:
    """Return the path that errors name; relative paths of queues start in its directory."""
    if isinstance(config_pth, Config):
        return config_pth.path
    name: object = "<dictionary>" if isinstance(config_pth, Mapping) else config_pth
    if not isinstance(name, (str, os.PathLike)):
        # An integer would be taken for a descriptor: 0 is the standard input.
        raise TypeError("Expected config_pth as a path, a dictionary or a persipubsub.config.Config"
                        f", but got: {_shown(config_pth)}")
    # Not os.path.abspath: "link/../config.json" would become another file.
    return pathlib.Path(name).absolute()


class _Object(dict[str, Any]):
    """JSON object that remembers its repeated keys."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        counts = collections.Counter(key for key, _ in pairs)
        self.repeated = [key for key, count in counts.items() if count > 1]


@functools.cache
def _fields(*kinds: type[msgspec.Struct]) -> Mapping[str, msgspec.structs.FieldInfo]:
    """Return the fields by key. Cached: to compute them takes longer than to read the file."""
    return {
        field.encode_name: field
        for kind in kinds
        for field in msgspec.structs.fields(kind) if field.encode_name != "identifier"
    }


class _Checker:
    """
    Collects the problems of a file, and the objects without problems.

    msgspec checks each value. The objects are walked through here, since msgspec stops at the first
    problem.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.problems: list[str] = []
        self.publishers: dict[str, Publisher] = {}
        self.subscribers: dict[str, Subscriber] = {}
        # By key; None for a queue with a problem. If the file has no queues at all, this is None,
        # and references to queues are not reported.
        self.queues: dict[str, Any] | None = None

    def add(self, place: str, expected: str, found: Any, hint: str = "") -> None:
        """Add a problem."""
        where = f"{place}: " if place else ""
        self.problems.append(f"{where}Expected {expected}, but got: {_shown(found)}{hint}")

    def miss(self, place: str, expected: str, hint: str = "") -> None:
        """Add the problem that a key is not there."""
        self.problems.append(f"{place}: Expected {expected}, but got: no such key{hint}")

    # What stands there

    def check_file(self, found: Any) -> None:
        """Check the whole file."""
        if not self.is_object(found, ""):
            return
        queues = found.get("queues")
        if "queues" not in found:
            self.miss("queues", "an object", _meant("queues", found))
        elif self.is_object(queues, "queues"):
            self.queues = {
                key: self.convert(Queue, queue, at("queues", key), path=key)
                for key, queue in queues.items()
            }
            self.check_paths(self.queues)
        for key, entry in found.items():
            if key not in ("$schema", "queues"):
                self.check_entry(key, entry)
        for publisher in self.publishers.values():
            self.check_publisher(publisher)
        for subscriber in self.subscribers.values():
            self.check_subscriber(subscriber)

    def is_object(self, found: Any, place: str) -> bool:
        """Return whether it is an object; check that no key is repeated."""
        if not isinstance(found, dict):
            self.add(place, "an object", found)
        for key in getattr(found, "repeated", ()):
            self.add(place, "each key once", key, " more than once")
        return isinstance(found, dict)

    def convert(self, kind: type[StructT], found: Any, place: str, **given: str) -> StructT | None:
        """Return the struct of an object; None if it has a problem."""
        count = len(self.problems)
        if self.is_object(found, place):
            self.check_keys(found, _fields(kind), place)
            for key, field in _fields(kind).items():
                if key in _REFERENCES and key in found and self.queues is not None:
                    self.check_name(found[key], self.queues, at(place, key), "a key of queues")
                elif key in found:
                    self.check_value(field.type, found[key], at(place, key))
                elif field.required:
                    self.miss(place, f"the key {key!r}")
        for key in given.values():
            self.check_value(Text, key, place)
        return msgspec.convert({**given, **found}, kind) if len(self.problems) == count else None

    def check_keys(self, found: Mapping[str, Any], known: Iterable[str], place: str) -> None:
        """Check that there is no other key."""
        for key in found:
            if key not in known:
                self.add(place, f"only the keys {', '.join(map(repr, known))}", key,
                         _meant(key, known))

    def check_name(self, found: Any, known: Mapping[str, Any], place: str, kind: str) -> None:
        """Check that something is one of the names that are known."""
        if not isinstance(found, str) or found not in known:
            self.add(place, f"{kind} ({_listed(known)})", found, _meant(found, known))

    def check_value(self, annotation: Any, found: Any, place: str) -> None:
        """Check a value."""
        kind, meta = get_args(annotation)[:2]
        if kind == Texts:
            self.check_identifiers(found, place, at_least=meta.min_length or 0)
        elif kind is HighWaterMark:
            self.convert(kind, found, place)
        else:
            try:
                msgspec.convert(found, annotation)
            except (msgspec.ValidationError, UnicodeEncodeError):
                # A lone surrogate raises UnicodeEncodeError.
                self.add(place, _expected(annotation), found)

    def check_identifiers(self, found: Any, place: str, at_least: int) -> None:
        """Check a list of subscribers."""
        if not isinstance(found, list) or len(found) < at_least:
            kind = "at least one subscriber" if found == [] else "a list of subscribers"
            self.add(place, kind, found)
            return
        for index, identifier in enumerate(found):
            where = f"{place}[{index}]"
            if self.check_identifier(identifier, where) and identifier in found[:index]:
                self.add(where, "each subscriber once", identifier, " again")

    def check_identifier(self, found: Any, place: str) -> bool:
        """Check the identifier of a publisher or a subscriber, return True if it is right."""
        # A subscriber with the name of another key of the file could not have an entry.
        reserved = RESERVED_SUBSCRIBER_IDS | {"queues", "$schema"}
        is_right = (isinstance(found, str) and _TEXT.fullmatch(found) is not None
                    and len(found.encode("utf-8")) <= _MAX_IDENTIFIER_SIZE
                    and found not in reserved)
        if not is_right:
            limits = f"1 to {_MAX_IDENTIFIER_SIZE} bytes in UTF-8, no NUL, no lone surrogates"
            self.add(place, f"an identifier ({limits}, not reserved)", found)
        return is_right

    def check_entry(self, identifier: str, entry: Any) -> None:
        """Check a publisher, a subscriber, or both in one."""
        place = at("", identifier)
        is_right = self.check_identifier(identifier, place)
        known = _fields(Publisher, Subscriber)
        keys = entry.keys() if isinstance(entry, dict) else set()
        if not keys & known.keys():
            kinds = "a publisher ('out_queue', 'subscribers'), a subscriber ('in_queue') or both"
            self.add(place, kinds, entry)
        if not keys or not self.is_object(entry, place):
            return
        self.check_keys(entry, known, place)
        built: Any
        for kind, built in ((Publisher, self.publishers), (Subscriber, self.subscribers)):
            part = {key: entry[key] for key in _fields(kind) if key in entry}
            # A placeholder: the real id is set below, if it is valid.
            struct = part and self.convert(kind, part, place, identifier="-")
            if struct and is_right:
                built[identifier] = msgspec.structs.replace(struct, identifier=identifier)

    # What holds between entries

    def check_paths(self, queues: Mapping[str, Queue | None]) -> None:
        """Check that no two queues are at one place."""
        places: dict[str, str] = {}
        for key, queue in queues.items():
            place = at("queues", key)
            for name in self.names_of(queue.path or key, place) if queue else ():
                if (other := places.setdefault(name, place)) != place:
                    expected = f"another path than that of {other}"
                    self.add(f"{place}.path", expected, queue and queue.path)
                    break

    def names_of(self, path: str, place: str) -> Sequence[str]:
        """Check an address; return what two queues must not have in common."""
        scheme = scheme_of(path)
        if not scheme:
            # Compare names and follow no links: links may change later.
            return [f"/{os.path.normpath(self.path.parent / path).lstrip('/')}"]
        if scheme != "nats":
            # Nothing behind it is shown: it may be a password, and errors are logged.
            self.add(f"{place}.path", "a directory or nats://...", f"{scheme}://")
            return []
        # Only here: it loads OpenSSL for its digests, which a queue in a directory has no use for.
        address: Any = importlib.import_module("persipubsub.jetstream.address")
        try:
            return list(address.names_of(path))
        except ValueError as error:
            self.problems.append(f"{place}.path: {error}")
            return []

    def check_publisher(self, publisher: Publisher) -> None:
        """Check that the queue has the subscribers of a publisher; without any, take all."""
        queue = (self.queues or {}).get(publisher.out_queue)
        if queue is None:
            return
        place = at("", publisher.identifier)
        if not publisher.subscribers:
            self.publishers[publisher.identifier] = msgspec.structs.replace(
                publisher, subscribers=queue.subscribers)
            if not queue.subscribers:
                self.add(f"{place}.out_queue", "a queue that has subscribers", publisher.out_queue)
        known = dict.fromkeys(queue.subscribers)
        for index, subscriber in enumerate(publisher.subscribers):
            self.check_name(subscriber, known, f"{place}.subscribers[{index}]",
                            "a subscriber of the queue")

    def check_subscriber(self, subscriber: Subscriber) -> None:
        """Check that the queue has the subscriber, and where its dead letters go."""
        place = at("", subscriber.identifier)
        queues = self.queues or {}
        queue = queues.get(subscriber.in_queue)
        if queue is not None and subscriber.identifier not in queue.subscribers:
            self.add(f"{place}.in_queue",
                     f"a queue with the subscriber {_shown(subscriber.identifier)}",
                     subscriber.in_queue, f" ({_listed(queue.subscribers)})")
        letters = subscriber.dead_letter_queue
        if not letters:
            return
        if not subscriber.max_deliveries:
            self.miss(place, "the key 'max_deliveries' beside 'dead_letter_queue'")
        place = f"{place}.dead_letter_queue"
        if letters == subscriber.in_queue:
            self.add(place, "another queue than 'in_queue'", letters)
        target = queues.get(letters)
        if queue and target and scheme_of(queue.path or "") != scheme_of(target.path or ""):
            self.add(place, "this and 'in_queue' both in directories, or both on servers", letters)
        for publisher in self.publishers.values():
            if publisher.out_queue == letters:
                # The messages would be taken for dead letters.
                self.add(place, "a queue that nobody publishes to", letters,
                         f" (which {_shown(publisher.identifier)} does)")
