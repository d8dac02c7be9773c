"""
Find all the problems of a configuration file, not only the first.

What the file may hold is told by the structs of :py:mod:`persipubsub.config`; here is how a value
is compared with them, and what holds between entries: references, repetitions, identifiers.
"""

import enum
import functools
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, NamedTuple, get_args

import msgspec
import msgspec.structs

from persipubsub import _json_file as json_file

#: The subscriber of each queue of dead letters, on whose behalf operators look at it.
DEAD_LETTERS: Final = "dead_letters"

#: Names of the sub-databases that the store needs for itself, and that subscriber's.
RESERVED_SUBSCRIBER_IDS: Final = frozenset(
    {"data_db", "meta_db", "pending_db", "ahead_db", "attempts_db", "once_db", DEAD_LETTERS})

QUEUES_KEY: Final = "queues"

#: What a path of a queue may begin with that is no directory; the engines have one for each.
SCHEMES: Final = ("nats", )

#: Ids of publishers that the library makes up for itself begin with it: no file can have them. They
#: name their subscribers even if these are all of the file, since a queue may have more.
MADE_UP: Final = "\0"

# A large file that is something else altogether would fill the memory with its problems.
_MAX_PROBLEMS = 1000

# Of a subscriber: what only a queue in a directory does, and the values that ask for nothing. To
# ignore them on servers would be to break a promise in silence.
_SUBSCRIBER_OF_DIRECTORY: Final = {
    "start_from": "end",
    "max_deliveries": None,
    "retry_delay_secs": 0
}

_MAX_IDENTIFIER_SIZE = 255  # bytes in UTF-8
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# Neither the operating system nor UTF-8 (and hence no C++ or Go program) takes any other.
Text = Annotated[str, msgspec.Meta(min_length=1, pattern=r"^[^\x00\ud800-\udfff]*$")]
Texts = tuple[Text, ...]


class Kinds(NamedTuple):
    """Hold what the entries of a file are to become."""

    queue: type[msgspec.Struct]
    publisher: type[msgspec.Struct]
    subscriber: type[msgspec.Struct]


def scheme_of(path: str) -> str:
    """Return the scheme of a queue's path, empty if it is a directory."""
    match = _SCHEME.match(path)
    return match[1] if match else ""


def resolve(directory: pathlib.Path, path: str) -> str:
    """Return the path of a queue independent of the working directory."""
    return path if scheme_of(path) else str(directory / path)


@functools.cache
def _fields(kind: type[msgspec.Struct]) -> Mapping[str, msgspec.structs.FieldInfo]:
    """Return the fields by their keys; to compute them takes longer than to read a small file."""
    return {field.encode_name: field for field in msgspec.structs.fields(kind)}


@functools.cache
def entry_fields(kind: type[msgspec.Struct]) -> Mapping[str, msgspec.structs.FieldInfo]:
    """Return the fields that an entry of the file has by its keys; its own key is not in it."""
    return {key: field for key, field in _fields(kind).items() if key != "identifier"}


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


class Checker:
    """Collect the problems of a file."""

    def __init__(self, path: pathlib.Path, kinds: Kinds) -> None:
        """Initialize without problems."""
        self.path = path
        self.kinds = kinds
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
        queues = found.get(QUEUES_KEY, json_file.Literal("no such key"))
        if isinstance(queues, dict):
            self.check_queues(queues)
        else:
            self.add(QUEUES_KEY, "an object", queues)
        for key, entry in found.items():
            if key != QUEUES_KEY:
                self.check_identifier(key, json_file.at("", key))
                self.check_entry(key, entry, queues)
                if isinstance(entry, dict) and "dead_letter_queue" in entry:
                    self.check_dead_letters(found, key, queues)
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
            place = json_file.at(QUEUES_KEY, key)
            self.check_value(Text, key, place)
            self.check_struct(self.kinds.queue, queue, place)
            path = queue.get("path") if isinstance(queue, dict) else None
            if isinstance(path, str):
                # By name: what is right must not depend on the links that are on the disk now.
                names: Sequence[str] = [
                    f"/{os.path.normpath(resolve(self.path.parent, path)).lstrip('/')}"
                ]
                if scheme_of(path):
                    names = self.check_address(path, place)
                    self.check_only_in_directories({"retain_secs": 0}, queue, path, place)
                others = [places.setdefault(name, place) for name in names]
                if other := next((other for other in others if other != place), None):
                    self.add(f"{place}.path", f"another path than that of {other}", path)

    def check_address(self, path: str, place: str) -> Sequence[str]:
        """Add the problem of a path to servers, return the names of the stream."""
        scheme = scheme_of(path)
        if scheme not in SCHEMES:
            # Nothing behind it is shown: it may be a password, and errors are logged.
            known = " or ".join(f"{name}://..." for name in SCHEMES)
            self.add(f"{place}.path", f"a directory or {known}", f"{scheme}://")
            return []
        # Only here: it loads OpenSSL for its digests, which a queue in a directory has no use for.
        from persipubsub.jetstream import _address  # pylint: disable=import-outside-toplevel
        if problem := _address.problem_of(path):
            self.problems.append(f"{place}.path: {problem}")
        return _address.names_of(path)

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
                self.add(place, f"only the keys {', '.join(map(repr, known))}", key, hint)

        for key in required:
            if key not in found:
                self.add(place, f"the key {key!r}", json_file.Literal("no such key"))

    def check_value(self, annotation: Any, found: Any, place: str) -> None:
        """Add the problems of the value of a key."""
        kind = get_args(annotation)[0]
        if kind == Texts:
            self.check_subscribers(found, place)
        elif issubclass(kind, msgspec.Struct):
            self.check_struct(kind, found, place)
        else:
            try:
                msgspec.convert(found, annotation, strict=True)
            except (msgspec.ValidationError, UnicodeEncodeError):
                # The latter for a string with a lone surrogate in the place of anything else.
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
            size = len(msgspec.convert(found, Text, strict=True).encode("utf-8"))
        except msgspec.ValidationError:
            size = 0
        count = len(self.problems)
        if not 0 < size <= _MAX_IDENTIFIER_SIZE:
            limits = f"1 to {_MAX_IDENTIFIER_SIZE} bytes in UTF-8, no NUL, no lone surrogates"
            self.add(place, f"an identifier ({limits})", found)
        elif found in RESERVED_SUBSCRIBER_IDS or found == QUEUES_KEY:
            # A subscriber with the name of the key of the queues could not have an entry.
            self.add(place, "an identifier that is not reserved", found)
        return len(self.problems) == count

    def check_entry(self, identifier: str, entry: Any, queues: Any) -> None:
        """Add the problems of a publisher, of a subscriber, or of both in one."""
        place = json_file.at("", identifier)
        keys = entry.keys() if isinstance(entry, dict) else set()
        known_keys: list[str] = []
        required: list[str] = []
        for kind in (self.kinds.publisher, self.kinds.subscriber):
            fields = entry_fields(kind)
            known_keys += fields
            if keys & fields.keys():
                required += [key for key in fields if fields[key].required]
        if not required:
            kinds = "a publisher ('out_queue', 'subscribers'), a subscriber ('in_queue') or both"
            self.add(place, kinds, entry)
        if keys:
            self.check_keys(entry, known_keys, required, place)
            self.check_options(entry, place)
        known = self.check_reference("out_queue", entry, queues, place) if keys else None
        if "subscribers" in keys:
            there = f"{place}.subscribers"
            self.check_subscribers(entry["subscribers"], there, known)
            if entry["subscribers"] == []:
                self.add(there, "at least one subscriber", [])
        known = self.check_reference("in_queue", entry, queues, place) if keys else None
        if known is not None:
            path = queues[entry["in_queue"]].get("path")
            if isinstance(path, str) and scheme_of(path):
                self.check_only_in_directories(_SUBSCRIBER_OF_DIRECTORY, entry, path, place)
        if known is not None and identifier not in known:
            expected = f"a queue with the subscriber {json_file.shown(identifier, limit=100)}"
            self.add(f"{place}.in_queue", expected, entry["in_queue"],
                     f" ({json_file.listed(known)})")

    def check_only_in_directories(self, unused: Mapping[str, Any], found: Mapping[str, Any],
                                  path: str, place: str) -> None:
        """Add the keys that a queue on servers would ignore, unless they ask for nothing."""
        for key, nothing in unused.items():
            if found.get(key, nothing) != nothing:
                self.add(json_file.at(place, key), "it only with a queue that is a directory", path)

    def check_options(self, entry: Mapping[str, Any], place: str) -> None:
        """Add the problems of the optional keys of an entry."""
        for kind in (self.kinds.publisher, self.kinds.subscriber):
            for key, field in entry_fields(kind).items():
                if not field.required and key in entry:
                    self.check_value(field.type, entry[key], json_file.at(place, key))

    def check_dead_letters(self, entries: Mapping[str, Any], identifier: str, queues: Any) -> None:
        """Add the problems of where a subscriber's messages go that it fails to work on."""
        entry = entries[identifier]
        place = json_file.at("", identifier)
        there = f"{place}.dead_letter_queue"
        found = entry["dead_letter_queue"]
        if "max_deliveries" not in entry:
            self.add(place, "the key 'max_deliveries' beside 'dead_letter_queue'",
                     json_file.Literal("no such key"))
        if self.check_reference("dead_letter_queue", entry, queues, place) is None:
            return
        if found == entry.get("in_queue"):
            self.add(there, "another queue than 'in_queue'", found)
        for key in (found, entry.get("in_queue")):
            queue = queues.get(key) if isinstance(key, str) else None
            path = queue.get("path") if isinstance(queue, dict) else None
            if isinstance(path, str) and scheme_of(path):
                self.add(there, "queues that are directories, this one and 'in_queue'", path)
        for key, other in entries.items():
            if isinstance(other, dict) and other.get("out_queue") == found:
                # Its messages would be taken for dead letters.
                self.add(there, "a queue that nobody publishes to", found,
                         f" (which {json_file.shown(key)} does)")

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
