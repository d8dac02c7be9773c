"""Test the commands that new functions of the library are behind, each as a process of its own."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from persipubsub import control
from tests import support, test_cli


def figures(config_pth: Path, name: str = "sub") -> dict[str, Any]:
    found = json.loads(test_cli.run("stat", config_pth, "--json").stdout)["queue"]
    one: dict[str, Any] = {one["subscriber"]: one for one in found["subscribers"]}[name]
    return one


# Pause and resume


def test_paused_subscriber_gets_nothing_and_loses_nothing(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path,
                                    subscribers=["sub", "log"],
                                    publishers={"pub": ["sub", "log"]})
    assert test_cli.run("pause", config_pth, "sub").stdout == "queue: sub is paused\n"
    assert test_cli.run("pause", config_pth, "sub").stdout == "queue: sub was paused already\n"
    support.send(config_pth, b"1", b"2")
    test_cli.run("receive", config_pth, "sub", "--timeout", "300ms", exit_code=1)
    assert test_cli.run("receive", config_pth, "log").stdout == "1\n"
    assert figures(config_pth)["is_paused"] and not figures(config_pth, "log")["is_paused"]
    text = test_cli.run("stat", config_pth).stdout
    assert re.search(r"^  sub .*  paused", text, re.MULTILINE)
    assert "sub is paused" in test_cli.run("check", config_pth).stdout
    found = json.loads(test_cli.run("resume", config_pth, "sub", "--json").stdout)
    assert found == {"queue": "queue", "subscriber": "sub", "paused": False, "changed": True}
    assert test_cli.run("resume", config_pth, "sub").stdout == "queue: sub was not paused\n"
    assert test_cli.run("receive", config_pth, "sub", "--number", "2").stdout == "1\n2\n"


def test_waiting_consumer_goes_on_after_resume(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    test_cli.run("pause", config_pth, "sub")
    with test_cli.start("receive", config_pth, "sub", "--timeout", "1m") as process:
        support.send(config_pth, b"1")
        time.sleep(0.5)  # so long, it would have received it, and ended
        assert process.poll() is None
        test_cli.run("resume", config_pth, "sub")
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        assert process.wait(timeout=support.HANG_SECS) == 0


def test_pause_survives_init_and_later_processes(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    test_cli.run("pause", config_pth, "sub")
    test_cli.run("init", config_pth)
    assert figures(config_pth)["is_paused"]


@pytest.mark.parametrize("name", ["pause", "resume"])
def test_pause_of_nobody(tmp_path: Path, name: str) -> None:
    config_pth = support.make_queue(tmp_path)
    for options in ([], ["--queue", "queue"]):
        process = test_cli.run(name, config_pth, "nobody", *options, exit_code=1)
        assert "'nobody'" in process.stderr and len(process.stderr.splitlines()) == 1


# One message


def test_delete_takes_one_message_from_one_subscriber(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path,
                                    subscribers=["sub", "log"],
                                    publishers={"pub": ["sub", "log"]})
    support.send(config_pth, b"1", b"poison", b"3")
    number = control.peek(config_pth, "sub", 2)[1].number
    process = test_cli.run("delete",
                           config_pth,
                           "sub",
                           "--number",
                           number,
                           stdin=b"n\n",
                           exit_code=1)
    assert f"Delete message {number} of sub in queue?" in process.stderr
    assert figures(config_pth)["lag"] == 3
    process = test_cli.run("delete", config_pth, "sub", "--number", number, stdin=b"y\n")
    assert process.stdout == f"queue: message {number} of sub was deleted\n"
    assert (figures(config_pth)["lag"], figures(config_pth)["cleared"]) == (2, 1)
    for missing in (number, 10**6, 10**18):
        process = test_cli.run("delete",
                               config_pth,
                               "sub",
                               "--number",
                               missing,
                               "--yes",
                               exit_code=1)
        assert "but got: none" in process.stderr
    assert test_cli.run("receive", config_pth, "sub", "--number", "2").stdout == "1\n3\n"
    assert test_cli.run("receive", config_pth, "log", "--number", "3").stdout == "1\npoison\n3\n"


def test_delete_of_a_message_that_a_consumer_holds(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, b"poison", b"2")
    with test_cli.receiving(config_pth, 1):
        test_cli.run("delete", config_pth, "sub", "--number", "1", "--yes")
        assert figures(config_pth)["lag"] == 1
    assert test_cli.run("receive", config_pth, "sub", "--number", "1").stdout == "2\n"


# Configuration


def test_new_file_is_short_names_its_schema_and_works(tmp_path: Path) -> None:
    config_pth = tmp_path / "config.json"
    process = test_cli.run("new", config_pth, "--queue", "greetings", "--subscriber", "print",
                           "--subscriber", "archive")
    assert "persipubsub init" in process.stdout
    found = json.loads(config_pth.read_text(encoding="utf-8"))
    assert found == {
        "$schema": "./persipubsub.schema.json",
        "pub": {
            "out_queue": "greetings"
        },
        "print": {
            "in_queue": "greetings"
        },
        "archive": {
            "in_queue": "greetings"
        },
        "queues": {
            "greetings": {
                "subscribers": ["print", "archive"]
            }
        }
    }
    schema = json.loads((tmp_path / "persipubsub.schema.json").read_text(encoding="utf-8"))
    assert "$schema" in schema and "queues" in json.dumps(schema)
    test_cli.run("init", config_pth)
    test_cli.run("send", config_pth, "pub", "--message", "hello")
    assert test_cli.run("receive", config_pth, "archive").stdout == "hello\n"


def test_new_file_replaces_nothing(tmp_path: Path) -> None:
    config_pth = tmp_path / "config.json"
    config_pth.write_text("precious", encoding="utf-8")
    process = test_cli.run("new", config_pth, exit_code=1)
    assert "exists" in process.stderr and config_pth.read_text(encoding="utf-8") == "precious"
    process = test_cli.run("new", tmp_path / "missing" / "config.json", exit_code=1)
    assert "missing" in process.stderr
    for options in (["--subscriber", "queues"], ["--publisher", ""]):
        test_cli.run("new", tmp_path / "other.json", *options, exit_code=1)
        assert not (tmp_path / "other.json").exists()


def test_check_config_lists_all_problems(tmp_path: Path) -> None:
    config_pth = support.write_config(tmp_path, max_db_num=-1, MAX_MSGS_NUM=True)
    process = test_cli.run("check-config", config_pth, exit_code=1)
    assert process.stdout == ""
    lines = process.stderr.splitlines()
    assert len(lines) == 3 and lines[2].endswith(f"2 problems in {config_pth}")
    assert "max_db_num" in lines[0] and "MAX_MSGS_NUM" in lines[1]
    found = json.loads(test_cli.run("check-config", config_pth, "--json", exit_code=1).stdout)
    assert len(found["problems"]) == 2 and found["warnings"] == []


def test_check_config_of_a_queue_that_is_not_there_or_as_it_should_be(tmp_path: Path) -> None:
    config_pth = support.write_config(tmp_path)
    fine = f"{config_pth}: fine: 1 queue, 1 publisher, 1 subscriber\n"
    assert test_cli.run("check-config", config_pth).stdout == fine
    assert not (tmp_path / "queue").exists()
    control.initialize_all_dbs(config_pth)
    process = test_cli.run("check-config", config_pth)
    assert (process.stdout, process.stderr) == (fine, "")


def test_check_config_compares_with_what_is_stored(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path,
                                    subscribers=["sub", "old"],
                                    publishers={"pub": ["sub"]})
    support.write_config(tmp_path,
                         subscribers=["sub", "fresh"],
                         publishers={"pub": ["sub"]},
                         MAX_MSGS_NUM=7)
    process = test_cli.run("check-config", config_pth)
    assert "fine" in process.stdout
    lines = process.stderr.splitlines()
    assert len(lines) == 3 and all("warning: queue: " in line for line in lines)
    for part in ("MAX_MSGS_NUM is 7 in the file, and 1000000 in the queue",
                 "subscriber fresh is only in the file", "subscriber old is only in the queue"):
        assert part in process.stderr
    found = json.loads(test_cli.run("check-config", config_pth, "--json").stdout)
    assert len(found["warnings"]) == 3 and found["problems"] == []
    test_cli.run("init", config_pth)
    lines = test_cli.run("check-config", config_pth).stderr.splitlines()
    assert len(lines) == 1 and "old" in lines[0]


# Speed

#: What takes long to load, and is for other commands.
SLOW = {
    "aiohttp", "asyncio", "concurrent", "hashlib", "icontract", "multiprocessing", "nats",
    "prometheus_client", "rich", "socket", "ssl", "subprocess", "tempfile"
}


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_stat_loads_nothing_slow(tmp_path: Path, options: list[str]) -> None:
    process = test_cli.run("stat",
                           support.make_queue(tmp_path),
                           *options,
                           variables={"PYTHONVERBOSE": "1"})
    names = set(re.findall(r"^import '([\w.]+)' #", process.stderr, re.MULTILINE))
    assert "click" in names and "persipubsub.cli.look" in names
    assert {name.partition(".")[0] for name in names} & SLOW == set()
    own = {name for name in names if name.startswith("persipubsub.cli.")}
    assert own == {
        f"persipubsub.cli.{name}"
        for name in ("commands", "look", "options", "text", "view")
    }
