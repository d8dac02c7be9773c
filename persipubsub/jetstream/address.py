"""
Read the path of a queue that is a stream: ``nats://host:4222,other/STREAM?replicas=3``.

The names of subjects and of durable consumers are made here as well. Nothing of NATS is imported,
so that a configuration can be checked where the extra is not installed.
"""

import hashlib
import ipaddress
import re
from collections.abc import Sequence
from typing import Final, NamedTuple

_PREFIX: Final = "nats://"
_DEFAULT_PORT: Final = 4222

_STREAM: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HOST: Final = re.compile(r"(?P<host>(?:[A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?|"
                          r"\[(?P<ip>[0-9A-Fa-f:.]+)\])(?::(?P<port>[0-9]{1,5}))?")

#: Options of a path: what fits, and how it is described.
_OPTIONS: Final = {
    "replicas": (r"[1-5]", "an integer from 1 to 5"),
    "ack_wait": (r"0\.[1-9][0-9]{0,8}|[1-9][0-9]{0,4}(\.[0-9]{1,9})?",
                 "a number of seconds from 0.1 to 99999"),
    "monitor": (r"https?://[^\s/?#@]+/?", "like http://host:8222"),
}

#: Longest name that is made of an id as it is; the server takes it for the name of a directory.
_LONGEST_NAME: Final = 120

#: Bytes allowed in a consumer's name, without '=', which begins our escapes.
_PLAIN: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


class Address(NamedTuple):
    """
    Say where a stream is.

    >>> parse("nats://one,two:4223/orders?replicas=3").servers
    ('nats://one:4222', 'nats://two:4223')
    """

    servers: tuple[str, ...]  #: addresses of some servers; they tell the others
    stream: str  #: its name
    replicas: int  #: servers that keep each message
    ack_wait_secs: float  #: after which the message of a dead consumer is delivered again
    monitor: str | None  #: address of a server's monitoring port, if it is known


def parse(path: str) -> Address:
    """Read a path."""
    if not path.startswith(_PREFIX):
        raise ValueError(f"Expected nats://..., but got: {path!r}")
    location, _, query = path[len(_PREFIX):].partition("?")
    hosts, _, stream = location.partition("/")
    if "@" in hosts:
        # Not shown: it may be a password, and errors are logged.
        raise ValueError("Expected servers without credentials (they belong into the environment), "
                         "but got: a name in front of '@'")
    if not _STREAM.fullmatch(stream):
        raise ValueError("Expected the name of a stream behind the servers (1 to 64 of A-Z, a-z, "
                         f"0-9, '_' and '-'), but got: {stream!r}")
    options = _parse_query(query)
    return Address(servers=tuple(map(_parse_server, hosts.split(","))),
                   stream=stream,
                   replicas=int(options.get("replicas", "1")),
                   ack_wait_secs=float(options.get("ack_wait", "30")),
                   monitor=options.get("monitor", "").rstrip("/") or None)


def names_of(path: str) -> Sequence[str]:
    """
    Name a stream, so that two paths of the same one have a name in common.

    >>> names_of("nats://one,two:4223/orders?replicas=3")
    ['nats://one:4222/orders', 'nats://two:4223/orders']
    """
    address = parse(path)
    return [f"{server.lower()}/{address.stream}" for server in address.servers]


def _parse_server(text: str) -> str:
    """Read one server."""
    match = _HOST.fullmatch(text)
    try:
        if match is None or not 0 < int(match["port"] or _DEFAULT_PORT) < 65536:
            raise ValueError
        if match["ip"] is not None:
            ipaddress.IPv6Address(match["ip"])
    except ValueError:
        raise ValueError(f"Expected servers as host or host:port, with commas between them, but "
                         f"got: {text!r}") from None
    return f"nats://{match['host']}:{int(match['port'] or _DEFAULT_PORT)}"


def _parse_query(query: str) -> dict[str, str]:
    """Read the options of a path."""
    options: dict[str, str] = {}
    for pair in query.split("&") if query else ():
        name, sign, value = pair.partition("=")
        if not sign or name not in _OPTIONS:
            raise ValueError("Expected name=value behind the question mark, with the names "
                             f"{', '.join(_OPTIONS)}, but got: {pair!r}")
        pattern, described = _OPTIONS[name]
        if not re.fullmatch(pattern, value):
            raise ValueError(f"Expected {name} to be {described}, but got: {value!r}")
        if name in options:
            raise ValueError(f"Expected each option once, but got: {query!r}")
        options[name] = value
    return options


# Names


def subject_of(stream: str, audience: Sequence[str] | None) -> str:
    """
    Name the subject of the messages for some subscribers.

    >>> subject_of("orders", None)
    'persipubsub.orders.all'
    """
    if audience is None:
        return f"persipubsub.{stream}.all"
    digest = hashlib.sha256("\0".join(sorted(audience)).encode("utf-8")).hexdigest()
    return f"persipubsub.{stream}.some.{digest[:32]}"


def nobodys_subject(stream: str) -> str:
    """Name a subject that is part of the stream, and that no subscriber wants."""
    return f"persipubsub.{stream}.nobody"


def durable_of(subscriber: str) -> str:
    """
    Name the durable consumer of a subscriber.

    >>> durable_of("sub.1")
    'sub=2e1'
    """
    key = subscriber.encode("utf-8")
    name = "".join(chr(byte) if byte in _PLAIN else f"={byte:02x}" for byte in key)
    if len(name) <= _LONGEST_NAME:
        return name
    # "h" is no hexadecimal digit, so that no id that is escaped looks like this.
    return f"=h{hashlib.sha256(key).hexdigest()}"


def guard_of(subscriber: str) -> str:
    """Name the consumer that keeps a subscriber's messages while its own one is replaced."""
    # No id is escaped like this.
    return f"=g{hashlib.sha256(subscriber.encode('utf-8')).hexdigest()}"
