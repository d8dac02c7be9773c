"""Test what operators do with messages that were given up, in Python and on the command line."""

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import persipubsub.queue
from persipubsub import Pub, Sub, config, control, errors
from tests import stores, support, test_cli


def write_config(directory: Path, **subscriber: Any) -> Path:
    """Write a file with a queue, its two subscribers and a queue of dead letters."""
    return support.add_dead_letters(
        support.write_config(directory,
                             publishers={"pub": ("sub", "other")},
                             subscribers=["sub", "other"]), **subscriber)


def fail(config_pth: Path, *messages: bytes) -> None:
    with Pub("pub", config_pth) as pub, Sub("sub", config_pth) as sub:
        for message in messages:
            pub.send(message)
            with pytest.raises(ValueError):
                with sub.receive(timeout=0) as msg:
                    assert msg == message
                    raise ValueError(f"not {message.decode()}")


@pytest.fixture(name="config_pth")
def fixture_config_pth(tmp_path: Path) -> Path:
    config_pth = write_config(tmp_path)
    control.initialize_all_dbs(config_pth)
    return config_pth


def listed(config_pth: Path) -> dict[int, bytes]:
    found = control.dead_letters(config_pth)
    assert list(found) == ["letters"]
    return {one.number: one.letter.data for one in found["letters"]}


def received(config_pth: Path, name: str) -> list[bytes]:
    with persipubsub.queue.open_queue(config.read(config_pth), "queue") as queue:
        assert queue.check() == []
        return stores.take_all(queue, name)


def test_letters_are_listed_without_taking_them(config_pth: Path) -> None:
    assert listed(config_pth) == {}
    fail(config_pth, b"1", b"2")
    for _ in range(2):
        assert list(listed(config_pth).values()) == [b"1", b"2"]
    one = control.dead_letters(config_pth, "letters")["letters"][0]
    assert (one.letter.queue, one.letter.subscriber, one.letter.error) == ("queue", "sub",
                                                                           "ValueError: not 1")
    figures = control.statistics(config_pth)["letters"]
    assert [entry.subscriber for entry in figures.subscribers] == ["dead_letters"]


def test_letters_are_sent_back_to_whom_they_failed(config_pth: Path) -> None:
    fail(config_pth, b"1", b"2", b"3")
    numbers = list(listed(config_pth))
    assert control.send_back(config_pth, "letters", numbers[1:2]) == (numbers[1], )
    assert received(config_pth, "sub") == [b"2"]
    assert control.send_back(config_pth, "letters") == (numbers[0], numbers[2])
    assert received(config_pth, "sub") == [b"1", b"3"]
    # The other one had all of them once.
    assert received(config_pth, "other") == [b"1", b"2", b"3"]
    assert listed(config_pth) == {}
    assert not control.send_back(config_pth, "letters", numbers)


def test_letters_are_dropped(config_pth: Path) -> None:
    fail(config_pth, b"1", b"2", b"3")
    numbers = list(listed(config_pth))
    dropped = control.drop_dead_letters(config_pth, "letters", [numbers[0], 99])
    assert dropped == (numbers[0], )
    assert list(listed(config_pth).values()) == [b"2", b"3"]
    assert control.drop_dead_letters(config_pth, "letters") == tuple(numbers[1:])
    assert not received(config_pth, "sub")


def test_numbers_that_are_not_there(config_pth: Path) -> None:
    fail(config_pth, b"1")
    for function in (control.send_back, control.drop_dead_letters):
        assert not function(config_pth, "letters", [0, -1, 2, 2**48, 2**70])
        number: Any = 1.5
        with pytest.raises(TypeError, match="integer"):
            function(config_pth, "letters", [1, number])
    assert listed(config_pth) == {1: b"1"}


def test_many_letters_are_read_in_pages(config_pth: Path) -> None:
    messages = [b"%d" % index for index in range(250)]
    fail(config_pth, *messages)
    assert list(listed(config_pth).values()) == messages
    assert len(control.send_back(config_pth, "letters")) == 250
    assert received(config_pth, "sub") == messages


@pytest.mark.parametrize("name", ["Queue.put", "Lease.ack"])
def test_letter_is_in_one_of_the_queues_whenever_the_process_is_killed(config_pth: Path,
                                                                       name: str) -> None:
    fail(config_pth, b"1")
    code = """if True:
        import os, sys
        import persipubsub.control, persipubsub.queue
        from persipubsub.lmdb_engine import consuming
        owner = {"Queue": persipubsub.queue.Queue, "Lease": consuming.Lease}
        kind, name = sys.argv[2].split(".")
        setattr(owner[kind], name, lambda *_, **__: os._exit(7))
        persipubsub.control.send_back(sys.argv[1], "letters")
    """
    assert support.run_python(code, config_pth, name).returncode == 7
    assert list(listed(config_pth).values()) == [b"1"]
    assert len(control.send_back(config_pth, "letters")) == 1
    assert listed(config_pth) == {}
    assert received(config_pth, "sub") == [b"1"]


def test_letters_that_are_sent_back_survive_a_power_failure(config_pth: Path) -> None:
    """Also in a queue of the durability os: they left the other one for good."""
    with support.edited(config_pth) as found:
        found["queues"]["queue"].update(durability="os", checkpoint_secs=3600)
    control.initialize_all_dbs(config_pth)
    fail(config_pth, b"1", b"2", b"3")
    # Another user of the queue keeps it from being closed, which would write all of it.
    with support.open_queue(config_pth) as queue:
        assert len(control.send_back(config_pth, "letters")) == 3
        assert queue.statistics().journal_lag_bytes == 0


def test_letters_before_one_that_fails_are_sent_back(config_pth: Path) -> None:
    fail(config_pth, b"1", b"2", b"3")
    assert received(config_pth, "other") == [b"1", b"2", b"3"]
    with support.edited(config_pth) as found:
        found["queues"]["queue"]["high-water-mark"].update(MAX_MSGS_NUM=1, strategy="reject")
    control.initialize_all_dbs(config_pth)
    with pytest.raises(errors.QueueFullError):
        control.send_back(config_pth, "letters")
    assert list(listed(config_pth).values()) == [b"2", b"3"]
    assert received(config_pth, "sub") == [b"1"]


def test_letter_of_a_subscriber_that_is_gone_stays(config_pth: Path) -> None:
    fail(config_pth, b"1")
    control.remove_subscriber(config_pth, "queue", "sub")
    with pytest.raises(errors.NotInitializedError, match="'sub'"):
        control.send_back(config_pth, "letters")
    assert list(listed(config_pth).values()) == [b"1"]


def test_letter_of_a_queue_that_is_gone_stays(config_pth: Path) -> None:
    fail(config_pth, b"1")
    text = config_pth.read_text()
    config_pth.write_text(
        text.replace('"queue":', '"renamed":').replace('": "queue"', '": "renamed"'))
    with pytest.raises(errors.ConfigError, match="'queue'"):
        control.send_back(config_pth, "letters")
    config_pth.write_text(text)
    assert list(listed(config_pth).values()) == [b"1"]


def test_queue_of_something_else_has_no_letters(config_pth: Path) -> None:
    with pytest.raises(errors.NotInitializedError, match="dead_letters"):
        control.dead_letters(config_pth, "queue")
    with pytest.raises(errors.ConfigError):
        control.drop_dead_letters(config_pth, "nothing")


def test_queue_on_servers_has_no_letters(tmp_path: Path) -> None:
    config_pth = support.write_config(tmp_path, path="nats://localhost/S")
    for function in (control.dead_letters, control.send_back, control.drop_dead_letters):
        with pytest.raises(errors.ConfigError, match="is a directory of this machine"):
            function(config_pth, "queue")


# The configuration file


def problems(config_pth: Path) -> Sequence[str]:
    with pytest.raises(errors.ConfigError) as info:
        config.read(config_pth)
    return info.value.problems


@pytest.mark.parametrize("key, value, problem", [
    ("max_deliveries", 0, "sub.max_deliveries: Expected an integer between 1 and 2147483648"),
    ("max_deliveries", True, "sub.max_deliveries: Expected an integer"),
    ("max_deliveries", 1.0, "sub.max_deliveries: Expected an integer"),
    ("retry_delay_secs", -1, "sub.retry_delay_secs: Expected a number between 0 and 86400"),
    ("retry_delay_secs", "1", "sub.retry_delay_secs: Expected a number"),
    ("dead_letter_queue", "nothing", "sub.dead_letter_queue: Expected a key of queues"),
    ("dead_letter_queue", 1, "sub.dead_letter_queue: Expected"),
    ("dead_letter_queue", "queue", "sub.dead_letter_queue: Expected another queue than 'in_queue'"),
])
def test_wrong_value_is_a_problem(tmp_path: Path, key: str, value: object, problem: str) -> None:
    assert any(problem in found for found in problems(write_config(tmp_path, **{key: value})))


def test_queue_of_dead_letters_needs_a_limit(tmp_path: Path) -> None:
    config_pth = write_config(tmp_path)
    with support.edited(config_pth) as found:
        del found["sub"]["max_deliveries"]
    assert problems(config_pth) == (
        "sub: Expected the key 'max_deliveries' beside 'dead_letter_queue', "
        "but got: no such key", )


def test_nobody_else_publishes_to_a_queue_of_dead_letters(tmp_path: Path) -> None:
    config_pth = write_config(tmp_path)
    with support.edited(config_pth) as found:
        found["queues"]["letters"]["subscribers"] = ["reader"]
        found["reader"] = {"in_queue": "letters"}
        found["writer"] = {"out_queue": "letters", "subscribers": ["reader"]}
    problem, = problems(config_pth)
    assert "a queue that nobody publishes to" in problem and "writer" in problem


def test_queue_of_another_engine_takes_no_letters(tmp_path: Path) -> None:
    config_pth = write_config(tmp_path)
    config_pth.write_text(config_pth.read_text().replace(str(tmp_path / "letters"),
                                                         "nats://localhost/letters"))
    assert any("this and 'in_queue' both in directories" in problem
               for problem in problems(config_pth))


def test_nobody_else_is_called_like_that(tmp_path: Path) -> None:
    config_pth = write_config(tmp_path)
    config_pth.write_text(config_pth.read_text().replace('"other"', '"dead_letters"'))
    assert any("not reserved" in problem for problem in problems(config_pth))


def drop_letters(config_pth: Path) -> None:
    assert len(control.drop_dead_letters(config_pth, "letters")) == 1


def send_letters_back(config_pth: Path) -> None:
    assert len(control.send_back(config_pth, "letters")) == 1


def fail_once_more(config_pth: Path) -> None:
    with Sub("sub", config_pth) as sub:
        with pytest.raises(ValueError):
            with sub.receive(timeout=0) as msg:
                assert msg == b"1"
                raise ValueError("not again")


@pytest.mark.parametrize("leave", [drop_letters, send_letters_back])
def test_what_fails_again_in_a_restored_queue_is_a_letter_again(
        tmp_path: Path, leave: Callable[[Path], None]) -> None:
    config_pth = write_config(tmp_path, max_deliveries=2)
    control.initialize_all_dbs(config_pth)
    fail(config_pth, b"1")
    control.backup(config_pth, "queue", tmp_path / "backup")
    for _ in range(3):
        fail_once_more(config_pth)
        assert list(listed(config_pth).values()) == [b"1"]
        leave(config_pth)
        control.restore(config_pth, "queue", tmp_path / "backup")
        assert listed(config_pth) == {}
        assert control.verify(config_pth, "queue") == {"queue": ()}


def test_there_is_room_for_all_attempts_of_a_restored_queue(tmp_path: Path) -> None:
    config_pth = write_config(tmp_path, max_deliveries=2)
    control.initialize_all_dbs(config_pth)
    with Pub("pub", config_pth) as pub, Sub("sub", config_pth) as sub:
        pub.send_many([b"1"] * 1000)
        with pytest.raises(ValueError), sub.receive_many(1000, timeout=0):
            raise ValueError("\U0001f44b" * 500)
    control.backup(config_pth, "queue", tmp_path / "backup")
    control.restore(config_pth, "queue", tmp_path / "backup")
    assert control.verify(config_pth, "queue") == {"queue": ()}
    with persipubsub.queue.open_queue(config.read(config_pth), "queue") as queue:
        records = list(stores.attempts(queue).values())
    assert [record.deliveries for record in records] == [1] * 1000
    assert all(len(record.error) > 400 for record in records)


def test_queue_of_dead_letters_may_be_behind_a_link(tmp_path: Path) -> None:
    config_pth = write_config(tmp_path)
    (tmp_path / "disk").mkdir()
    (tmp_path / "letters").symlink_to(tmp_path / "disk")
    control.initialize_all_dbs(config_pth)
    fail(config_pth, b"1")
    assert list(listed(config_pth).values()) == [b"1"]


# The command


def test_command_lists(config_pth: Path) -> None:
    assert test_cli.run("dead-letters", config_pth).stdout == "letters: there are no dead letters\n"
    fail(config_pth, b"\x00\xff".decode("latin-1").encode(), b"2")
    head, first, second = test_cli.run("dead-letters", config_pth).stdout.splitlines()
    assert head.split()[-1] == "ERROR"
    assert first.split()[:6] == ["letters", "1", "queue", "sub", "1", "1"]
    assert second.endswith("ValueError: not 2")
    found = json.loads(test_cli.run("dead-letters", config_pth, "list", "--json").stdout)
    assert [base64.b64decode(one["letter"]["data"]) for one in found["letters"]][1] == b"2"
    assert [one["number"] for one in found["letters"]] == [1, 2]


def test_command_sends_back_and_drops(config_pth: Path) -> None:
    fail(config_pth, b"1", b"2", b"3")
    options = ("--queue", "letters", "--number")
    out = test_cli.run("dead-letters", config_pth, "send-back", *options, 2)
    assert out.stdout == "letters: 1 dead letter sent back\n"
    assert received(config_pth, "sub") == [b"2"]
    out = test_cli.run("dead-letters", config_pth, "drop", *options, 2, "--yes", exit_code=1)
    assert "not there" in out.stderr
    asked = test_cli.run("dead-letters", config_pth, "drop", stdin=b"n\n", exit_code=1)
    assert "Drop 2 dead letters of letters?" in asked.stderr
    assert len(listed(config_pth)) == 2
    out = test_cli.run("dead-letters", config_pth, "drop", "--yes", "--json")
    assert json.loads(out.stdout) == {"letters": {"numbers": [1, 3]}}
    assert listed(config_pth) == {}


def test_command_of_wrong_usage(config_pth: Path) -> None:
    test_cli.run("dead-letters", config_pth, "burn", exit_code=2)
    test_cli.run("dead-letters", config_pth, "--number", 1, exit_code=2)
    test_cli.run("dead-letters", config_pth, "--queue", "nothing", exit_code=2)
    test_cli.run("dead-letters", config_pth, "--queue", "queue", exit_code=1)
