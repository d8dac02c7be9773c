"""Test deploying, pruning and clearing queues, also while they are used."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import persipubsub.publisher
import persipubsub.statistics
import persipubsub.subscriber
from persipubsub import Pub, Sub, config, control, errors
from tests import support, test_config
from tests.support import receive_all, send

ALL: list[Callable[[control.ConfigPath], object]] = [
    control.initialize_all_dbs, control.prune_dangling_messages, control.clear_all_subs
]


def statistics(config_pth: Path) -> persipubsub.statistics.QueueStatistics:
    with support.open_queue(config_pth) as queue:
        assert not queue.check()
        return queue.statistics()


# Deploy, publish, receive: the calls as they are described, each in a program of its own.
DEPLOY = """
import sys
import persipubsub.control

persipubsub.control.initialize_all_dbs(config_pth=sys.argv[1])
persipubsub.control.prune_dangling_messages(config_pth=sys.argv[1])
"""

PUBLISH = """
import sys
import persipubsub.publisher

pub = persipubsub.publisher.Pub()
pub.init(pub_id="pub", config_pth=sys.argv[1], autosync=False)
pub.send(msg=b"one")
pub.send_many(msgs=[b"two", b"three", b"four", b"five"])
"""

RECEIVE = """
import pathlib, sys
import persipubsub.subscriber

sub = persipubsub.subscriber.Sub()
sub.init(sub_id="sub", config_pth=pathlib.Path(sys.argv[1]))
with sub.receive(timeout=60, retries=10) as msg:
    print(msg)
try:
    with sub.receive(timeout=60, retries=10) as msg:
        raise ValueError(msg)
except ValueError as error:
    print("failed", error)
with sub.receive(timeout=60, retries=10) as msg:
    print(msg)
sub.pop_to_top()
print(sub.front())
with sub.receive(timeout=60, retries=10) as msg:
    print(msg)
with sub.receive(timeout=0.01, retries=10) as msg:
    print(msg)
"""

CLEAR = """
import sys
import persipubsub.control

persipubsub.control.clear_all_subs(config_pth=sys.argv[1])
"""


def test_three_programs(tmp_path: Path) -> None:
    config_pth = tmp_path / "config.json"
    path = str(tmp_path / "queues" / "queue").encode()
    config_pth.write_bytes(test_config.EXAMPLE.replace(b"/home/user/queues/queue", path))
    received = "b'one'\nfailed b'two'\nb'two'\nb'five'\nb'five'\nNone\n"
    for program, expected in ((DEPLOY, ""), (PUBLISH, ""), (RECEIVE, received), (DEPLOY, ""),
                              (PUBLISH, ""), (CLEAR, ""), (PUBLISH, ""), (RECEIVE, received)):
        done = support.run_python(program, config_pth)
        assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


def test_initializing_is_idempotent(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    send(config_pth, b"one", b"two")
    before = support.snapshot(tmp_path / "queue")["data.mdb"]
    for _ in range(3):
        control.initialize_all_dbs(config_pth=config_pth)
    assert support.snapshot(tmp_path / "queue")["data.mdb"] == before
    assert receive_all(config_pth) == [b"one", b"two"]


def test_all_queues_of_a_file(tmp_path: Path) -> None:
    config_pth = support.write_config(tmp_path)
    entries = json.loads(config_pth.read_text("utf-8"))
    other = dict(entries["queues"]["queue"], path="deep/below/other", subscribers=["sink"])
    entries["queues"]["other"] = other
    entries["sub"].update({"out_queue": "other", "subscribers": ["sink"]})
    entries["sink"] = {"in_queue": "other"}
    config_pth.write_text(json.dumps(entries), "utf-8")
    control.initialize_all_dbs(config_pth=str(config_pth))

    # A stage of a pipeline receives from one queue and sends to the other.
    send(config_pth, b"one", b"two")
    with Sub("sub", config_pth) as sub, Pub("sub", config_pth) as pub:
        for _ in range(2):
            with sub.receive(timeout=0) as message:
                assert message is not None
                pub.send(b"out of " + message)
    assert receive_all(config_pth, "sink") == [b"out of one", b"out of two"]

    send(config_pth, b"three")
    with Pub("sub", config_pth) as pub:
        pub.send(b"four")
    control.clear_all_subs(config_pth=config_pth)
    assert not receive_all(config_pth) and not receive_all(config_pth, "sink")


def test_directory_whose_name_is_like_an_address(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path, path="queues/a://b")
    send(config_pth, b"1")
    assert receive_all(config_pth) == [b"1"]
    assert (tmp_path / "queues" / "a:" / "b" / "data.mdb").is_file()


@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_directory_that_is_not_utf_8(tmp_path: Path, durability: str) -> None:
    directory = tmp_path / "d\udcffir"
    directory.mkdir()
    config_pth = support.write_config(directory, path="queue", durability=durability)
    found = json.loads(config_pth.read_text("utf-8"))
    found["queues"]["letters"] = dict(found["queues"]["queue"], path="letters", subscribers=[])
    found["sub"].update({"max_deliveries": 1, "dead_letter_queue": "letters"})
    config_pth.write_text(json.dumps(found), "utf-8")
    control.initialize_all_dbs(config_pth)
    send(config_pth, b"1", b"2")
    with Sub("sub", config_pth) as sub, pytest.raises(ValueError):
        with sub.receive(timeout=0):
            raise ValueError("no")
    assert receive_all(config_pth) == [b"2"]
    assert control.send_back(config_pth, "letters") == (1, )
    target = directory / "\udcfe"
    control.backup(config_pth, "queue", target)
    assert receive_all(config_pth) == [b"1"]
    control.compact(config_pth)
    control.restore(config_pth, "queue", target)
    assert receive_all(config_pth) == [b"1"]
    assert set(control.verify(config_pth).values()) == {()}
    assert not control.drop_queue(config_pth, "queue")


@pytest.mark.parametrize("sub_id, expected", [(None, TypeError), (1, TypeError),
                                              (b"sub", TypeError), ("\ud800", errors.ConfigError),
                                              ("", errors.ConfigError),
                                              ("a" * 600, errors.ConfigError),
                                              ("new", errors.NotInitializedError),
                                              (config.DEAD_LETTERS, errors.NotInitializedError)])
def test_ids_that_no_subscriber_has(tmp_path: Path, sub_id: Any, expected: type[Exception]) -> None:
    config_pth = support.make_queue(tmp_path)
    for function in (lambda: control.peek(config_pth, sub_id, queue_key="queue"),
                     lambda: control.seek(config_pth, sub_id, "end", "queue"),
                     lambda: control.remove_subscriber(config_pth, "queue", sub_id)
                     ):  # type: Callable[[], object]
        with pytest.raises(expected, match="Expected"):
            function()
    if expected is TypeError:
        for function in (lambda: control.peek(config_pth, sub_id),
                         lambda: control.add_subscriber(config_pth, "queue", sub_id)):
            with pytest.raises(TypeError, match="Expected"):
                function()


def test_numbers_that_are_none(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    number: Any = 1.5
    for function in (
            lambda: control.peek(config_pth, "sub", number),
            lambda: control.peek(config_pth, "sub", 1, number),
            lambda: control.follow(config_pth, "queue", number)):  # type: Callable[[], object]
        with pytest.raises(TypeError, match="integer"):
            function()


def test_no_queue_is_not_all_of_them(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    queue_key: Any = None
    for function in (lambda: control.drop_queue(config_pth, queue_key),
                     lambda: control.backup(config_pth, queue_key, tmp_path / "copy")
                     ):  # type: Callable[[], object]
        with pytest.raises(errors.ConfigError, match="Expected a queue of this file"):
            function()


def test_empty_file(tmp_path: Path) -> None:
    config_pth = tmp_path / "config.json"
    config_pth.write_text('{"queues": {}}', "utf-8")
    for function in ALL:
        function(config_pth)
    assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("function", ALL, ids=lambda function: function.__name__)
def test_wrong_file(tmp_path: Path, function: Callable[[control.ConfigPath], None]) -> None:
    config_pth = tmp_path / "config.json"
    with pytest.raises(errors.ConfigError, match="config.json"):
        function(config_pth)
    config_pth.write_text("{", "utf-8")
    with pytest.raises(errors.ConfigError, match="config.json"):
        function(str(config_pth))
    for wrong in (None, 5, b"config.json", ["config.json"]):
        with pytest.raises((errors.ConfigError, TypeError)):
            function(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("function", ALL[1:], ids=lambda function: function.__name__)
def test_not_initialized(tmp_path: Path, function: Callable[[control.ConfigPath], object]) -> None:
    config_pth = support.write_config(tmp_path)
    with pytest.raises(errors.NotInitializedError, match="initialize_all_dbs"):
        function(config_pth)
    assert os.listdir(tmp_path) == ["config.json"]


def test_queues_before_a_wrong_one_are_ready(tmp_path: Path) -> None:
    config_pth = support.write_config(tmp_path)
    entries = json.loads(config_pth.read_text("utf-8"))
    entries["queues"]["other"] = dict(entries["queues"]["queue"], path="other")
    config_pth.write_text(json.dumps(entries), "utf-8")
    (tmp_path / "other").write_text("text", "utf-8")
    with pytest.raises(errors.FormatError, match="other"):
        control.initialize_all_dbs(config_pth=config_pth)
    send(config_pth, b"message")
    assert receive_all(config_pth) == [b"message"]


def test_pruning_drops_what_is_too_old(tmp_path: Path) -> None:
    config_pth = support.write_config(tmp_path)
    soon = support.write_config(tmp_path, name="soon.json", MSG_TIMEOUT_SECS=1e-9)
    control.initialize_all_dbs(config_pth=config_pth)
    send(config_pth, *(b"%d" % number for number in range(100)))
    control.prune_dangling_messages(config_pth=config_pth)
    assert statistics(config_pth).messages == 100
    # The settings that are stored in the queue count, until they are stored anew.
    assert control.prune_dangling_messages(config_pth=soon) == {"queue": 0}
    control.initialize_all_dbs(config_pth=soon)
    assert control.prune_dangling_messages(config_pth=soon) == {"queue": 100}
    found = statistics(config_pth)
    assert (found.messages, found.subscribers[0].dropped_by_timeout) == (0, 100)
    control.initialize_all_dbs(config_pth=config_pth)
    send(config_pth, b"after")
    assert receive_all(config_pth) == [b"after"]
    assert statistics(config_pth).next_number > 101
