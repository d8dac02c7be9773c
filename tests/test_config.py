"""Test reading the configuration file."""

import copy
import json
import math
import os
import pickle
import socket
import tempfile
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jsonschema
import msgspec
import pytest

import persipubsub.config
from persipubsub import errors
from tests import support

CONFIG_PTH = "/somewhere/config.json"

# The example of the documentation
EXAMPLE = b"""{
    "pub": {"out_queue": "/home/user/queues/queue", "subscribers": ["sub"]},
    "sub": {"in_queue": "/home/user/queues/queue"},
    "queues": {
        "/home/user/queues/queue": {
            "path": "/home/user/queues/queue",
            "max_reader_num": 1024,
            "max_db_num": 1024,
            "max_db_size_bytes": 34359738368,
            "subscribers": ["sub"],
            "high-water-mark": {
                "MSG_TIMEOUT_SECS": 600,
                "MAX_MSGS_NUM": 10000,
                "HWM_LMDB_SIZE_BYTES": 1000000,
                "strategy": "prune_first"
            }
        }
    }
}"""


def make(subscribers: Sequence[str] = ("sub", )) -> dict[str, Any]:
    """Return the content of a small correct file."""
    text = EXAMPLE.replace(b"/home/user/queues/queue", b"/q").replace(b"34359738368", b"1048576")
    content: dict[str, Any] = json.loads(text)
    content["queues"]["/q"]["subscribers"] = list(subscribers)
    return content


SHORT = json.loads(b"""{
    "pub": {"out_queue": "greetings"},
    "sub": {"in_queue": "greetings"},
    "queues": {"greetings": {"subscribers": ["sub", "other"]}}
}""")

ABSENT = object()


def change(place: Sequence[str], value: Any,
           subscribers: Sequence[str] = ("sub", )) -> dict[str, Any]:
    """Return a correct file with one value exchanged, added or (``ABSENT``) taken away."""
    content = make(subscribers)
    target = content
    for key in place[:-1]:
        target = target[key]
    if value is ABSENT:
        del target[place[-1]]
    else:
        target[place[-1]] = value
    return content


def parse(content: Any) -> persipubsub.config.Config:
    """Return the configuration of the JSON-able or textual content."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return persipubsub.config.parse(text=text, config_pth=CONFIG_PTH)


def problems(content: Any) -> tuple[str, ...]:
    """Return the problems of the content; check what is common to all errors."""
    with pytest.raises(errors.ConfigError) as info:
        parse(content)
    return checked(info.value, CONFIG_PTH)


def checked(error: errors.ConfigError, config_pth: str) -> tuple[str, ...]:
    """Return the problems of the error; check what is common to all errors."""
    more = len(error.problems) - 1
    tail = f" (and {more} more problem{'s' if more > 1 else ''})" if more else ""
    assert str(error) == f"{config_pth}: {error.problems[0]}{tail}"
    for text in (str(error), *error.problems):
        assert text.isprintable(), "a terminal must not be controlled by the file"
    return error.problems


def read_error(config_pth: Path) -> str:
    """Return the only problem of a file."""
    with pytest.raises(errors.ConfigError) as info:
        persipubsub.config.read(config_pth)
    text, = checked(info.value, str(config_pth))
    return text


# --- correct files


@pytest.mark.parametrize("as_path", [str, Path])
def test_example(tmp_path: Path, as_path: Any) -> None:
    config_pth = tmp_path / "config.json"
    config_pth.write_bytes(EXAMPLE)
    config = persipubsub.config.read(config_pth=as_path(config_pth))

    key = "/home/user/queues/queue"
    mark = persipubsub.config.HighWaterMark(msg_timeout_secs=600,
                                            max_msgs_num=10000,
                                            size_bytes=1000000,
                                            strategy=persipubsub.config.Strategy.PRUNE_FIRST)
    queue = persipubsub.config.Queue(path=key,
                                     max_reader_num=1024,
                                     max_db_num=1024,
                                     max_db_size_bytes=34359738368,
                                     subscribers=("sub", ),
                                     high_water_mark=mark,
                                     durability=persipubsub.config.Durability.FSYNC,
                                     checkpoint_secs=1,
                                     busy_timeout_secs=30,
                                     once_window_secs=3600,
                                     retain_secs=0)
    assert config.path == config_pth
    assert dict(config.queues) == {key: queue}
    assert config.publisher("pub") == persipubsub.config.Publisher("pub", key, ("sub", ))
    assert config.subscriber("sub") == persipubsub.config.Subscriber("sub", key)
    assert list(config.publishers) == ["pub"] and list(config.subscribers) == ["sub"]
    assert config.queue_path(key) == key


def test_stage_of_a_pipeline_is_both() -> None:
    content = make()
    content["sub"].update(out_queue="/q", subscribers=["sub"])
    config = parse(content)
    assert config.publisher("sub").subscribers == ("sub", )
    assert config.subscriber("sub").in_queue == "/q"


def test_queue_without_subscribers_and_subscriber_without_entry() -> None:
    content = make(subscribers=[])
    del content["pub"], content["sub"]
    assert parse(content).queues["/q"].subscribers == ()

    content = make(subscribers=["elsewhere", "sub"])
    assert "elsewhere" not in parse(content).subscribers


def test_schema_describes_all_keys_and_accepts_what_is_right() -> None:
    schema = persipubsub.config.schema()
    assert schema == json.loads(json.dumps(schema))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for definition in schema["$defs"].values():
        for name, value in definition.get("properties", {}).items():
            assert value.get("description"), name
            bounds = {**value, **(value.get("anyOf") or [{}])[0]}
            if name.lower().endswith(("_secs", "_bytes", "_num")):
                assert "minimum" in bounds or "exclusiveMinimum" in bounds
                assert "maximum" in bounds
    for right in (json.loads(EXAMPLE), SHORT, make(), {"$schema": "x.json", "queues": {}}):
        validator.validate(right)


@pytest.mark.parametrize("place, value", [
    (["queues", "/q", "max_db_nums"], 1),
    (["queues", "/q", "checkpoint_secs"], 0),
    (["queues", "/q", "subscribers"], "sub"),
    (["queues", "/q", "high-water-mark", "strategy"], "wait"),
    (["pub", "in_que"], "/q"),
    (["sub", "max_deliveries"], 0),
    (["sub", "subscribers"], ["sub"]),
    (["x"], {}),
    (["queues"], []),
])
def test_schema_refuses_what_is_wrong(place: Sequence[str], value: Any) -> None:
    wrong = change(place, value)
    assert problems(wrong)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, persipubsub.config.schema())


def test_short_configuration() -> None:
    config = parse(SHORT)
    assert config.queue_path("greetings") == "/somewhere/greetings"
    assert config.publisher("pub").subscribers == ("sub", "other")
    assert config.queues["greetings"] == persipubsub.config.Queue(
        path="greetings",
        max_reader_num=1024,
        max_db_num=1024,
        max_db_size_bytes=34359738368,
        subscribers=("sub", "other"),
        high_water_mark=persipubsub.config.HighWaterMark(None, None, None,
                                                         persipubsub.config.Strategy.REJECT),
        durability=persipubsub.config.Durability.FSYNC,
        checkpoint_secs=1.0,
        busy_timeout_secs=30.0,
        once_window_secs=3600.0,
        retain_secs=0.0)
    assert parse({"$schema": "https://example.com/schema.json", **SHORT}) == config


def test_half_a_high_water_mark() -> None:
    mark = parse(change(MARK, {"MAX_MSGS_NUM": 7})).queues["/q"].high_water_mark
    assert mark == persipubsub.config.HighWaterMark(max_msgs_num=7)
    nothing = {"MSG_TIMEOUT_SECS": None, "MAX_MSGS_NUM": None, "HWM_LMDB_SIZE_BYTES": None}
    assert parse(change(MARK, nothing)).queues["/q"].high_water_mark == mark.__class__()


def test_publisher_without_anybody_to_send_to() -> None:
    assert problems(b'{"pub": {"out_queue": "q"}, "queues": {"q": {"subscribers": []}}}') == (
        "pub.out_queue: Expected a queue that has subscribers, but got: 'q'", )


def test_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = persipubsub.config.read(SHORT)
    assert persipubsub.config.read(config) is config
    monkeypatch.chdir("/")
    assert config.queue_path("greetings") == str(tmp_path / "greetings")
    assert persipubsub.config.read(types.MappingProxyType(SHORT)).queues == config.queues
    # What Python has beside JSON: tuples, members of enumerations, paths.
    queue = {
        "path": tmp_path / "q",
        "subscribers": ("sub", ),
        "durability": persipubsub.config.Durability.OS
    }
    config = persipubsub.config.read({"queues": {"q": queue}})
    assert config.queue_path("q") == str(tmp_path / "q")
    assert config.queues["q"].durability is persipubsub.config.Durability.OS


@pytest.mark.parametrize("content, problem", [
    ({}, "queues: Expected an object, but got: no such key"),
    ({"queue": {}}, "queues: Expected an object, but got: no such key (did you mean 'queue'?)"),
    ({"queues": object()}, "Expected what JSON can express, but got: "),
    ({"queues": math.nan}, "queues: Expected an object, but got: nan"),
    ({"queues": {"q": {}}}, "queues.q: Expected the key 'subscribers', but got: no such key"),
])  # yapf: disable
def test_wrong_dictionary(content: Any, problem: str) -> None:
    with pytest.raises(errors.ConfigError) as info:
        persipubsub.config.read(content)
    # Relative paths start at the working directory.
    assert checked(info.value, f"{os.getcwd()}/<dictionary>")[0].startswith(problem)


@pytest.mark.parametrize("path, expected", [
    ("/q", "/q"),
    ("q", "/somewhere/q"),
    ("./q", "/somewhere/q"),
    ("../q", "/somewhere/../q"),
    ("nats://host:4222/q", "nats://host:4222/q"),
    ("a:/b", "/somewhere/a:/b"),
    ("a/b://c", "/somewhere/a/b:/c"),
    ("~/q", "/somewhere/~/q"),
])
def test_queue_path(path: str, expected: str) -> None:
    assert parse(change(["queues", "/q", "path"], path)).queue_path("/q") == expected


def test_relative_config_pth_is_independent_of_working_directory(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(change(["queues", "/q", "path"], "q")))
    monkeypatch.chdir(tmp_path)
    config = persipubsub.config.read("config.json")
    monkeypatch.chdir("/")
    assert config.queue_path("/q") == str(tmp_path / "q")


def test_asking_for_what_is_not_there() -> None:
    config = parse(make())
    expected = {
        config.publisher: "Expected a publisher of this file ('pub'), but got: 'x\\x1b'",
        config.subscriber: "Expected a subscriber of this file ('sub'), but got: 'x\\x1b'",
        config.queue_path: "Expected a queue of this file ('/q'), but got: 'x\\x1b'",
    }
    for method, text in expected.items():
        with pytest.raises(errors.ConfigError) as info:
            method("x\x1b")
        assert checked(info.value, CONFIG_PTH) == (text, )

    with pytest.raises(errors.ConfigError, match="there is none"):
        parse({"queues": {}}).publisher("pub")


# --- types and bounds of values

NOT_INTEGERS: list[Any] = [
    True, "8", "\ud800", math.nan, 8.0, 8.5, -1, 0, 10**19, 10**60, 10**400, [], {}
]
NOT_SECONDS: list[Any] = [
    True, "8", "\ud800", math.nan, math.inf, -1, -0.5, 10**19, 10**400, [], {}
]
NOT_TEXTS: list[Any] = [True, 1, "", "a\0", "\ud800", "\udc80a", [], {}]
QUEUE = ["queues", "/q"]
MARK = [*QUEUE, "high-water-mark"]
VALUES: list[tuple[Sequence[str], list[Any], list[Any], str]] = [
    ([*QUEUE, "path"], NOT_TEXTS, ["a", "\U0001f600"],
     "a non-empty string without NUL and lone surrogates"),
    ([*QUEUE, "max_reader_num"], [*NOT_INTEGERS, 65536], [1, 65535],
     "an integer between 1 and 65535"),
    ([*QUEUE, "max_db_num"], [*NOT_INTEGERS, 7, 32769], [8, 32768],
     "an integer between 8 and 32768"),
    ([*QUEUE, "max_db_size_bytes"], [*NOT_INTEGERS, 2**18 - 1, 2**46 + 1], [2**18, 2**46],
     "an integer between 262144 and 70368744177664"),
    ([*QUEUE, "durability"], [None, True, 1, "FSYNC", "", "\ud800", []], ["fsync", "os"],
     "'fsync' or 'os'"),
    ([*QUEUE, "checkpoint_secs"], [*NOT_SECONDS, 0, 86400.5], [0.1, 86400],
     "a number greater than 0 and at most 86400"),
    ([*QUEUE, "once_window_secs"], [*NOT_SECONDS, 0, 9e-10, 3_200_000_001],
     [1e-9, 0.1, 3_200_000_000], "a number between 1e-09 and 3200000000"),
    ([*QUEUE, "retain_secs"], [*NOT_SECONDS, 3_200_000_001], [0, 1.5, 3_200_000_000],
     "a number between 0 and 3200000000"),
    ([*QUEUE, "busy_timeout_secs"], [*NOT_SECONDS, 0, 86401], [0.1, 86400],
     "a number greater than 0 and at most 86400"),
    ([*QUEUE, "subscribers"], [None, "sub", {}, 1], [["sub"]], "a list of subscribers"),
    (MARK, [None, [], 1, "x"], [], "an object"),
    ([*MARK, "MSG_TIMEOUT_SECS"], [*NOT_SECONDS, 0, 0.0, 1e-10, 3.2e9 + 1], [1e-9, 1, 3.2e9],
     "a number between 1e-09 and 3200000000"),
    ([*MARK, "MAX_MSGS_NUM"], [*NOT_INTEGERS, 2**48 + 1], [1, 2**48],
     "an integer between 1 and 281474976710656"),
    ([*MARK, "HWM_LMDB_SIZE_BYTES"], [*NOT_INTEGERS, 2**46 + 1], [1, 2**46],
     "an integer between 1 and 70368744177664"),
    ([*MARK, "strategy"], [None, 1, "PRUNE_FIRST", "wait", "\ud800", []],
     ["prune_first", "prune_last", "reject", "block"],
     "'prune_first' or 'prune_last' or 'reject' or 'block'"),
    (QUEUE, [None, [], 1], [], "an object"),
]  # yapf: disable


def in_config(config: persipubsub.config.Config, place: Sequence[str]) -> Any:
    found: Any = config.queues["/q"]
    for key in place[2:]:
        fields = {field.encode_name: field.name for field in msgspec.structs.fields(found)}
        found = getattr(found, fields[key])
    if isinstance(found, tuple):
        return list(found)
    return getattr(found, "value", found)


@pytest.mark.parametrize("place, wrong, right, expected", VALUES, ids=lambda value: None)
def test_values(place: Sequence[str], wrong: list[Any], right: list[Any], expected: str) -> None:
    for value in right:
        assert in_config(parse(change(place, value)), place) == value
    for value in wrong:
        found = [text for text in problems(change(place, value)) if ": Expected" in text]
        assert found[0].startswith(f"{'.'.join(place)}: Expected {expected}, but got: "), value


def test_message_of_the_contract() -> None:
    with pytest.raises(errors.ConfigError) as info:
        parse(change([*QUEUE, "max_db_num"], True))
    assert str(info.value) == ("/somewhere/config.json: queues./q.max_db_num: "
                               "Expected an integer between 8 and 32768, but got: True")


@pytest.mark.parametrize("place, key, meant", [
    (QUEUE, "max_db_nums", "max_db_num"),
    (QUEUE, "high_water_mark", "high-water-mark"),
    (QUEUE, "subscriber", "subscribers"),
    (MARK, "msg_timeout_secs", "MSG_TIMEOUT_SECS"),
    (["pub"], "out-queue", "out_queue"),
    (["sub"], "in_que", "in_queue"),
    (QUEUE, "identifier", None),
    (MARK, "size_bytes", None),
    (["pub"], "\x1b[2J", None),
])
def test_unknown_keys(place: Sequence[str], key: str, meant: str | None) -> None:
    problem, = problems(change([*place, key], 1))
    assert problem.startswith(f"{'.'.join(place)}: Expected only the keys '")
    assert f", but got: {key!r}" in problem
    if meant is not None:
        assert problem.endswith(f"(did you mean {meant!r}?)")


@pytest.mark.parametrize("old, new, problem", [
    ('"pub": {', '"pub": {}, "pub": {', "Expected each key once, but got: 'pub' more than once"),
    ('"queues": {', '"queues": {}, "queues": {',
     "Expected each key once, but got: 'queues' more than once"),
    ('"/q": {', '"/q": 1, "/q": 2, "/q": {',
     "queues: Expected each key once, but got: '/q' more than once"),
    ('"path": ', '"path": "/q", "path": ',
     "queues./q: Expected each key once, but got: 'path' more than once"),
    ('"strategy": ', '"strategy": "prune_last", "strategy": ',
     "queues./q.high-water-mark: Expected each key once, but got: 'strategy' more than once"),
    ('"in_queue": ', '"in_queue": "/q", "in_\\u0071ueue": ',
     "sub: Expected each key once, but got: 'in_queue' more than once"),
])
def test_duplicate_keys(old: str, new: str, problem: str) -> None:
    assert problems(json.dumps(make()).replace(old, new, 1).encode()) == (problem, )


# --- publishers, subscribers and references

ENTRY = "a publisher ('out_queue', 'subscribers'), a subscriber ('in_queue') or both"

NO_KEY = "but got: no such key"

NO_ENTRIES: list[Any] = [None, 1, "x", [], {}]

#: What is wrong in a file whose queue has the subscribers "sub" and "b", and the only problem.
REFERENCES: list[tuple[Sequence[str], Any, str]] = [
    *((["x"], entry, f"x: Expected {ENTRY}, but got: {entry!r}") for entry in NO_ENTRIES),
    *(([*place], value, f"{'.'.join(place)}: Expected a key of queues ('/q'), but got: ")
      for place in (("pub", "out_queue"), ("sub", "in_queue"))
      for value in ("/", "", None, 1, True, ["/q"], {"/q": 1})),
    (["pub", "out_queue"], ABSENT, f"pub: Expected the key 'out_queue', {NO_KEY}"),
    (["sub"], {"in_queue": "/q", "subscribers": ["sub"]},
     f"sub: Expected the key 'out_queue', {NO_KEY}"),
    (["x"], {"in_queue": "/q"},
     "x.in_queue: Expected a queue with the subscriber 'x', but got: '/q' ('sub', 'b')"),
    (["pub", "subscribers"], [], "pub.subscribers: Expected at least one subscriber, but got: []"),
    (["pub", "subscribers"], "sub",
     "pub.subscribers: Expected a list of subscribers, but got: 'sub'"),
    (["pub", "subscribers"], ["sub", "x"],
     "pub.subscribers[1]: Expected a subscriber of the queue ('sub', 'b'), but got: 'x'"),
    (["pub", "subscribers"], ["sub", "b", "sub"],
     "pub.subscribers[2]: Expected each subscriber once, but got: 'sub' again"),
    ([*QUEUE, "subscribers"], ["sub", "a", "a"],
     "queues./q.subscribers[2]: Expected each subscriber once, but got: 'a' again"),
    # Without queues, references to them are no problem of their own.
    (["queues"], ABSENT, f"queues: Expected an object, {NO_KEY}"),
    (["queues"], [], "queues: Expected an object, but got: []"),
]  # yapf: disable


@pytest.mark.parametrize("place, value, problem", REFERENCES, ids=lambda value: None)
def test_references(place: Sequence[str], value: Any, problem: str) -> None:
    found, = problems(change(place, value, subscribers=["sub", "b"]))
    assert found.startswith(problem)


def test_reference_to_no_queue_lists_few() -> None:
    content = make()
    for number in range(100):
        queue = copy.deepcopy(content["queues"]["/q"])
        content["queues"][f"/q{number}"] = {**queue, "path": f"/q{number}"}
    content["pub"]["out_queue"] = "x"
    assert problems(content) == ("pub.out_queue: Expected a key of queues ('/q', '/q0', '/q1', "
                                 "'/q2', '/q3' and 96 more), but got: 'x'", )
    assert "there is none" in problems(change(["queues"], {}))[0]


@pytest.mark.parametrize("path, other", [
    *(("/somewhere/q", other)
      for other in ("/somewhere/q", "/somewhere/./q", "/somewhere//q/", "//somewhere/q",
                    "/somewhere/b/../q", "q", "../somewhere/q")),
    *(("nats://a,b:1/S", other)
      for other in ("nats://a,b:1/S?replicas=1", "nats://A:4222/S", "nats://c,b:1/S")),
    ("nats://h/S", "nats://H:4222/S?ack_wait=5"),
    ("nats://h1:1,[::1]:2/a_B-9?replicas=3&ack_wait=0.5&monitor=http://m:8222/",
     "nats://[::1]:2/a_B-9"),
    ("nats://a-1.b_c.D.,10.0.0.1,[::ffff:1.2.3.4]/S", "nats://10.0.0.1:4222/S"),
])  # yapf: disable
def test_two_queues_at_one_place(path: str, other: str) -> None:
    content = change([*QUEUE, "path"], path)
    assert parse(content).queue_path("/q") == path
    content["queues"]["other"] = {**content["queues"]["/q"], "path": other}
    assert problems(content) == (
        f"queues.other.path: Expected another path than that of queues./q, but got: {other!r}", )


@pytest.mark.parametrize("other", ["nats://a/T", "nats://b/S"])
def test_two_streams(other: str) -> None:
    content = change([*QUEUE, "path"], "nats://a,b:1/S")
    content["queues"]["other"] = {**content["queues"]["/q"], "path": other}
    parse(content)


@pytest.mark.parametrize("scheme", ["nat", "NATS", "http", "file", "nats+tls"])
def test_unknown_scheme(scheme: str) -> None:
    # What is behind it may have a password.
    assert problems(change([*QUEUE, "path"], f"{scheme}://user:word@host/S")) == (
        f"queues./q.path: Expected a directory or nats://..., but got: '{scheme}://'", )


WRONG_IDENTIFIERS = [
    "", "a\0b", "\ud800", "a\udfff", "a" * 256, "\xe9" * 128,
    *sorted(persipubsub.config.RESERVED_SUBSCRIBER_IDS)
]


def test_identifiers() -> None:
    for identifier in [*WRONG_IDENTIFIERS, "queues"]:
        problem, = problems(make(subscribers=["sub", identifier]))
        assert problem.startswith("queues./q.subscribers[1]: Expected an identifier ")
    for identifier in WRONG_IDENTIFIERS:
        for entry in (make()["pub"], {"out_queue": "/q"}):
            problem, = problems(change([identifier], entry))
            assert ": Expected an identifier " in problem
    no_strings: list[Any] = [None, 1, True, [], {}]
    for no_string in no_strings:
        problem, = problems(change(["pub", "subscribers"], ["sub", no_string]))
        assert problem.startswith("pub.subscribers[1]: Expected an identifier (1 to 255 bytes")
    for identifier in ("a", "a" * 255, "\xe9" * 127, "a b", "\x1b\n", ".", "/", "__class__",
                       "\U0001f600", "data_db2"):
        content = change(["sub"], ABSENT, subscribers=[identifier])
        content["pub"]["subscribers"] = [identifier]
        content[identifier] = {"in_queue": "/q"}
        assert parse(content).subscriber(identifier).identifier == identifier
    for key in ("", "a\0", "\ud800"):
        content = make()
        content["queues"][key] = {**content["queues"]["/q"], "path": "/other"}
        problem, = problems(content)
        assert problem.startswith(f"queues.{key!r}: Expected a non-empty string")


# --- all problems, and how they are told


def test_all_problems_are_listed() -> None:
    content = make()
    content["queues"]["/q"].update(max_db_num="1", max_reader_num=True, durability="x", y=1)
    content["queues"]["/q"]["high-water-mark"].update(MAX_MSGS_NUM=0, strategy=None)
    content["pub"].update(out_queue="/r", subscribers=[1, "sub", "sub"])
    content["z"] = 1
    del content["queues"]["/q"]["subscribers"]
    places = [problem.split(": Expected")[0] for problem in problems(content)]
    assert sorted(places) == sorted([
        "queues./q", "queues./q", "queues./q.max_db_num", "queues./q.max_reader_num",
        "queues./q.durability", "queues./q.high-water-mark.MAX_MSGS_NUM",
        "queues./q.high-water-mark.strategy", "pub.out_queue", "pub.subscribers[0]",
        "pub.subscribers[2]", "z"
    ])


@pytest.mark.parametrize("value", [
    "x" * 10**6, ["x" * 10**5] * 10, {
        "x" * 10**5: "y" * 10**5
    }, "\0" * 10**5, "\U000e0001" * 10**5
])
def test_long_values_are_cut(value: Any) -> None:
    for place in ([*QUEUE, "max_db_num"], ["pub", "out_queue"], ["x"]):
        assert all(len(text) < 500 for text in problems(change(place, value)))
    if isinstance(value, str):
        for place in ([*QUEUE, value], [value], ["queues", value], [*MARK, value]):
            assert all(len(text) < 600 for text in problems(change(place, [])))


def test_control_characters_in_places() -> None:
    found = problems({"a\x1b[2J": 1, "b c": 1, "": 1, "queues": {"\n": {"\x07": 1}}})
    assert any(text.startswith("'a\\x1b[2J': ") for text in found)
    assert any(text.startswith("queues.'\\n': ") for text in found)
    assert any(text.startswith("'b c': ") for text in found)


def test_control_characters_in_the_name_of_the_file() -> None:
    with pytest.raises(errors.ConfigError) as info:
        persipubsub.config.parse(text=b"", config_pth="/a\x1b[2J")
    assert str(info.value).startswith("'/a\\x1b[2J': Expected JSON")


# --- texts that are no correct JSON


@pytest.mark.parametrize("text, problem", [
    (b"", "line 1 column 1 "),
    (b" \n\t", "line 2 column 2 "),
    (b"1" * 10**6, "Exceeds the limit"),
    (b"\xef\xbb\xbf{}", "line 1 column 1 "),
    (b'{\n"a": "\xff"}', "byte 0xff in position 8"),
    (b"\xed\xa0\x80", "byte 0xed"),
    ("{}".encode("utf-16"), "byte 0xff"),
    (b'{"a": 1', "line 1 column 8 "),
    (b'{} {}', "Extra data: line 1 column 4 "),
    (b'{"a": "\x00"}', "line 1 column 8 "),
    (b'{"a": "' + b'\\"' * 10**5, "line 1 column 7 "),
    (b'{"a": tru}', "line 1 column 7 "),
    (b"[" * 10**5, "recursion"),
    (b'{"queues":' * 10**5, "recursion"),
    (b"[" * 10**5 + b"]" * 10**5, "recursion"),
])
def test_text_is_no_json(text: bytes, problem: str) -> None:
    found, = problems(text)
    assert found.startswith("Expected JSON in UTF-8, but got: ") and problem in found


@pytest.mark.parametrize("text, shown", [(b"[]", "[]"), (b"null", "None"), (b"NaN", "nan"),
                                         (b'"queues"', "'queues'"), (b"1e400", "inf")])
def test_json_is_no_object(text: bytes, shown: str) -> None:
    assert problems(text) == (f"Expected an object, but got: {shown}", )


# --- files that can not be read


def test_missing_file(tmp_path: Path) -> None:
    for config_pth in (tmp_path / "x.json", tmp_path / "x" / "y.json", Path("/x.json")):
        with pytest.raises(errors.ConfigNotFoundError) as info:
            persipubsub.config.read(config_pth)
        copied: Any = pickle.loads(pickle.dumps(info.value))
        for error in (info.value, copied):
            assert issubclass(type(error), FileNotFoundError)
            assert checked(error, str(config_pth)) == (
                "Expected a file that can be read, but got: No such file or directory", )


def test_file_without_rights() -> None:
    # In a process without privileges, as root may read everything.
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        config_pth = Path(directory) / "config.json"
        config_pth.write_bytes(EXAMPLE)
        config_pth.chmod(0)
        code = ("import os, sys, persipubsub.config, persipubsub.errors\n"
                "if os.getuid() == 0: os.setuid(65534)\n"
                "try: persipubsub.config.read(sys.argv[1])\n"
                "except persipubsub.errors.ConfigError as error: print(error)")
        done = support.run_python(code, config_pth)
        assert (done.returncode, done.stdout) == (
            0, f"{config_pth}: Expected a file that can be read, but got: Permission denied\n")


def test_not_a_regular_file(tmp_path: Path) -> None:
    assert read_error(tmp_path) == "Expected a file that can be read, but got: Is a directory"
    assert "line 1 column 1" in read_error(Path("/dev/null"))

    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        assert read_error(tmp_path / "s").startswith("Expected a file that can be read, but got: ")

    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "symbolic links" in read_error(loop)
    with pytest.raises(errors.ConfigError, match="File name too long"):
        persipubsub.config.read("a" * 5000)


def test_fifo_as_shells_make_them(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    thread = threading.Thread(target=fifo.write_bytes, args=[EXAMPLE])
    thread.start()
    assert persipubsub.config.read(fifo).queues == parse(EXAMPLE).queues
    thread.join()


@pytest.mark.parametrize("config_pth", ["a\0b", "\ud800"])
def test_impossible_paths(config_pth: str) -> None:
    with pytest.raises(errors.ConfigError, match="Expected a file that can be read"):
        persipubsub.config.read(config_pth)


@pytest.mark.parametrize("config_pth", [0, True, None, b"/x", 1.5, []])
def test_config_pth_is_no_path(config_pth: Any) -> None:
    with pytest.raises(TypeError, match="Expected config_pth as a path, a dictionary or"):
        persipubsub.config.read(config_pth)
    with pytest.raises(TypeError, match="Expected config_pth as a path, a dictionary or"):
        persipubsub.config.parse(b"{}", config_pth)


# --- any content

KEYS = st.one_of(
    st.sampled_from([
        "queues", "/q", "path", "subscribers", "in_queue", "out_queue", "max_db_num", "sub", "pub",
        "high-water-mark", "durability", "MAX_MSGS_NUM", "strategy", "data_db"
    ]), st.text(st.characters(), max_size=3))
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), KEYS,
              st.sampled_from([10**400, "prune_first"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=15)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(VALUE, st.data())
def test_any_json(value: Any, data: st.DataObject) -> None:
    """Put the value at any place of a correct file, or take it for the whole file."""
    content: Any = make()
    places = [[], ["pub"], ["sub"], ["new"], ["queues"], QUEUE, ["queues", "/r"], MARK,
              [*QUEUE, "subscribers"], ["pub", "subscribers"], ["pub", "out_queue"]]
    place = data.draw(st.sampled_from(places))
    content = change(place, value) if place else value
    try:
        assert isinstance(parse(content), persipubsub.config.Config)
    except errors.ConfigError as error:
        checked(error, CONFIG_PTH)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.one_of(st.binary(),
                            st.text(alphabet='{}[]",:\\0e-.n').map(str.encode)),
                  st.integers(0, len(EXAMPLE)), st.integers(0, 20))
def test_any_bytes(junk: bytes, start: int, length: int) -> None:
    """Put the bytes anywhere into a correct file."""
    for text in (junk, EXAMPLE[:start] + junk + EXAMPLE[start + length:]):
        try:
            assert isinstance(parse(text), persipubsub.config.Config)
        except errors.ConfigError as error:
            checked(error, CONFIG_PTH)
