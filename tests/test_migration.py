"""Test that a queue moves to servers exactly, while it is in use and when the move is killed."""

import contextlib
import itertools
import json
import os
import signal
import threading
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from persipubsub import control, errors, migration
from persipubsub.control import Progress
from tests import jetstream_server
from tests.support import (HANG_SECS, Child, Connection, edited, make_queue, outcome, run_python,
                           send, until, write_config)
from tests.test_behaviour import drain, lags, numbered, open_pub, open_sub

pytestmark = jetstream_server.needs_server

PUBLISHERS = {"pub": ("a", "b", "c"), "two": ("a", "b")}

_COUNTER = itertools.count()


class Scene:
    """Hold a queue on this machine, and the same queue where it is to be."""

    def __init__(self, tmp_path: Path, servers: jetstream_server.Servers, **changes: Any) -> None:
        self.target = servers.path(f"moved{next(_COUNTER)}",
                                   ack_wait=jetstream_server.FOR_EVER_SECS)
        described: dict[str, Any] = {
            "publishers": PUBLISHERS,
            "subscribers": ("a", "b", "c"),
            **changes
        }
        self.old = write_config(tmp_path, **described)
        self.new = write_config(tmp_path, path=self.target, name="new.json", **described)
        control.initialize_all_dbs(self.old)


@pytest.fixture(name="scene")
def _scene(tmp_path: Path, servers: jetstream_server.Servers) -> Scene:
    return Scene(tmp_path, servers)


def received(config_pth: Path) -> dict[str, list[bytes]]:
    found = {}
    for name in ("a", "b", "c"):
        with open_sub(config_pth, name) as sub:
            found[name] = drain(sub, timeout=0.3)
    return found


@contextlib.contextmanager
def receiving(config_pth: Path) -> Iterator[dict[str, list[bytes]]]:
    """Receive for all subscribers in the ``with`` block, until they have everything."""
    is_over = threading.Event()
    found: dict[str, list[bytes]] = {name: [] for name in "abc"}

    def receive() -> None:
        while not is_over.is_set():
            for name, messages in received(config_pth).items():
                found[name] += messages

    thread = threading.Thread(target=receive)
    thread.start()
    try:
        yield found
        until(lambda: set(lags(config_pth).values()) == {0}, "the subscribers")
    finally:
        is_over.set()
        thread.join(HANG_SECS)


def test_everyone_gets_what_it_did_not_have_yet(scene: Scene) -> None:
    with open_pub(scene.old) as pub, open_pub(scene.old, "two") as two:
        for number in range(0, 600, 2):
            pub.send(b"%d" % number)
            two.send(b"%d" % (number + 1))
    with open_sub(scene.old, "a") as sub, sub.receive_many(max_msgs=100, timeout=HANG_SECS) as msgs:
        assert len(msgs) == 100
    with open_sub(scene.old, "c") as sub:
        sub.pop_to_top()
    progress = Progress()
    counts = control.migrate(scene.old, "queue", scene.target, progress)
    assert counts == {"a": (500, 0), "b": (600, 0), "c": (1, 0)}
    assert progress.share() == 1.0
    assert lags(scene.old) == {"a": 0, "b": 0, "c": 0}
    assert received(scene.new) == {"a": numbered(600)[100:], "b": numbered(600), "c": [b"598"]}
    # Once more: there is nothing left.
    assert control.migrate(scene.old, "queue", scene.target) == {name: (0, 0) for name in "abc"}


def test_publishers_first(scene: Scene) -> None:
    send(scene.old, b"old")
    control.initialize_all_dbs(scene.new)
    with open_pub(scene.new) as pub:
        pub.send(b"new")
        control.migrate(scene.old, "queue", scene.target)
        pub.send(b"newer")
    # What was sent to the servers before the move is in front of what was moved.
    assert received(scene.new) == {name: [b"new", b"old", b"newer"] for name in "abc"}


def test_only_subscriber(tmp_path: Path, servers: jetstream_server.Servers) -> None:
    scene = Scene(tmp_path, servers, publishers={"pub": ("a", )}, subscribers=("a", ))
    # By now there is one more at the servers, which is not to get what was not sent to it.
    more = make_queue(tmp_path, {"pub": ("a", "b")}, ("a", "b"), "more.json", path=scene.target)
    with open_pub(scene.old) as pub, open_pub(more) as new:
        pub.send_many(numbered(3))
        new.send(b"new")
    assert control.migrate(scene.old, "queue", scene.target) == {"a": (3, 0)}
    for name, expected in (("a", [b"new"] + numbered(3)), ("b", [b"new"])):
        with open_sub(more, name) as sub:
            assert drain(sub, timeout=0.3) == expected


def test_consumers_keep_what_they_have(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migration, "_PATIENCE_SECS", 0.5)
    with open_pub(scene.old) as pub, open_sub(scene.old, "a") as sub:
        pub.send_many(numbered(3))
        with sub.receive(timeout=HANG_SECS) as msg:
            assert msg == b"0"
            counts = control.migrate(scene.old, "queue", scene.target)
            assert counts == {"a": (2, 1), "b": (3, 0), "c": (3, 0)}
    assert received(scene.new)["a"] == numbered(3)[1:]


def test_full_target_drops_nothing(tmp_path: Path, servers: jetstream_server.Servers,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, servers, MAX_MSGS_NUM=10)
    send(scene.old, *numbered(10))
    monkeypatch.setattr(migration, "_PATIENCE_SECS", 0.5)
    with pytest.raises(errors.QueueFullError, match="start its subscribers there"):
        control.migrate(scene.old, "queue", scene.target)
    found = received(scene.new)
    monkeypatch.undo()
    with receiving(scene.new) as rest:
        control.migrate(scene.old, "queue", scene.target)
    for name in "abc":
        assert found[name] + rest[name] == numbered(10)


@pytest.mark.parametrize("count, size", [(200, 20000), (600, 100000)])
def test_frames_count_at_the_mark_of_bytes(tmp_path: Path, servers: jetstream_server.Servers,
                                           count: int, size: int) -> None:
    scene = Scene(tmp_path, servers, HWM_LMDB_SIZE_BYTES=size)
    send(scene.old, *numbered(count))
    control.initialize_all_dbs(scene.new)
    with receiving(scene.new) as found:
        moved = control.migrate(scene.old, "queue", scene.target)
    assert moved == {name: (count, 0) for name in "abc"}
    assert found == {name: numbered(count) for name in "abc"}


def test_wrong_targets(scene: Scene, tmp_path: Path, servers: jetstream_server.Servers) -> None:
    for target in (str(tmp_path / "other"), "nats://host", "other://host/S", ""):
        with pytest.raises(errors.ConfigError):
            control.migrate(scene.old, "queue", target)
    assert outcome(lambda: control.migrate(scene.new, "queue", servers.path("S"))) == "ConfigError"
    missing = write_config(tmp_path, path=str(tmp_path / "missing"), name="missing.json")
    assert outcome(lambda: control.migrate(missing, "queue", scene.target)) == "NotInitializedError"


def test_killed_in_the_middle(scene: Scene) -> None:
    with open_pub(scene.old) as pub:
        for begin in range(0, 1000, 100):
            pub.send_many(numbered(1000)[begin:begin + 100])

    def move(pipe: Connection) -> None:
        progress = Progress()
        thread = threading.Thread(target=control.migrate,
                                  args=(scene.old, "queue", scene.target, progress))
        thread.start()
        until(lambda: progress.done > 0, "the move begins")
        pipe.send("moving")
        thread.join()
        pipe.send("done")

    kills = 0
    for _ in range(4):
        with Child(move) as child:
            assert child.get() == "moving"
            child.kill(signal.SIGKILL)
            child.process.join(HANG_SECS)
            kills += child.process.exitcode == -signal.SIGKILL
    assert kills
    counts = control.migrate(scene.old, "queue", scene.target)
    assert all(count.left == 0 for count in counts.values())
    assert counts["c"].moved > 0
    assert received(scene.new) == {name: numbered(1000) for name in "abc"}


def test_message_that_was_put_before_the_kill_is_not_put_again(
        scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    send(scene.old, *numbered(5))

    class Killed(Exception):
        pass

    def die(_: object) -> None:
        raise Killed

    # Between putting the messages there and acknowledging them here.
    with monkeypatch.context() as patch:
        patch.setattr("persipubsub.lmdb_engine.consuming.Lease.ack", die)
        with pytest.raises(Killed):
            control.migrate(scene.old, "queue", scene.target)
    control.migrate(scene.old, "queue", scene.target)
    assert received(scene.new) == {name: numbered(5) for name in "abc"}


def test_messages_of_a_queue_that_was_created_again_are_others(scene: Scene) -> None:
    """Its numbers begin anew, and the servers remember ids for two minutes."""
    for begin in (0, 5):
        send(scene.old, *numbered(10)[begin:begin + 5])
        control.migrate(scene.old, "queue", scene.target)
        control.drop_queue(scene.old, "queue")
        control.initialize_all_dbs(scene.old)
    assert received(scene.new) == {name: numbered(10) for name in "abc"}


def limit_deliveries(config_pth: Path, **entries: Any) -> None:
    """Let messages of a subscriber be delivered once, and dropped if that failed."""
    with edited(config_pth) as described:
        for name in "abc":
            described[name].update({"max_deliveries": 1, **entries})


def test_move_that_is_killed_is_no_delivery(scene: Scene) -> None:
    limit_deliveries(scene.old)
    send(scene.old, *numbered(50))

    def move(_: Connection) -> None:
        # Taken, and not put yet.
        with unittest.mock.patch.object(migration, "_put",
                                        lambda *_: os.kill(os.getpid(), signal.SIGKILL)):
            control.migrate(scene.old, "queue", scene.target)

    with Child(move) as child:
        child.end(-signal.SIGKILL)
    assert lags(scene.old) == {name: 50 for name in "abc"}
    assert control.migrate(scene.old, "queue", scene.target) == {name: (50, 0) for name in "abc"}
    assert received(scene.new) == {name: numbered(50) for name in "abc"}


def test_move_that_fails_is_no_delivery(tmp_path: Path, servers: jetstream_server.Servers,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, servers, MAX_MSGS_NUM=10)
    limit_deliveries(scene.old, retry_delay_secs=3600)
    send(scene.old, *numbered(10))
    monkeypatch.setattr(migration, "_PATIENCE_SECS", 0.5)
    for _ in range(2):
        with pytest.raises(errors.QueueFullError, match="start its subscribers there"):
            control.migrate(scene.old, "queue", scene.target)
    monkeypatch.undo()
    assert not any(found.failed for found in control.statistics(scene.old)["queue"].subscribers)
    with receiving(scene.new) as found:
        control.migrate(scene.old, "queue", scene.target)
    assert found == {name: numbered(10) for name in "abc"}


def test_what_was_delivered_often_enough_is_given_up_by_a_move(scene: Scene) -> None:
    limit_deliveries(scene.old)
    send(scene.old, *numbered(3))

    def die(_: Connection) -> None:
        with open_sub(scene.old, "a") as sub, sub.receive(timeout=HANG_SECS) as msg:
            assert msg == b"0"
            os.kill(os.getpid(), signal.SIGKILL)

    with Child(die) as child:
        child.end(-signal.SIGKILL)
    assert control.migrate(scene.old, "queue", scene.target)["a"] == (2, 0)
    assert control.statistics(scene.old)["queue"].subscribers[0].dead_lettered == 1
    assert received(scene.new) == {"a": numbered(3)[1:], "b": numbered(3), "c": numbered(3)}


def test_command(scene: Scene) -> None:
    send(scene.old, *numbered(7))
    code = "import sys; import persipubsub.__main__ as main; sys.exit(main.main())"
    run = run_python(code, "migrate", scene.old, "--to", scene.target)
    assert (run.returncode, run.stderr) == (0, "")
    assert [line.split() for line in run.stdout.splitlines()] == [["SUBSCRIBER", "MOVED", "LEFT"],
                                                                  ["a", "7", "0"], ["b", "7", "0"],
                                                                  ["c", "7", "0"]]
    run = run_python(code, "migrate", scene.old, "--queue", "queue", "--to", scene.target, "--json")
    assert json.loads(run.stdout) == {name: {"moved": 0, "left": 0} for name in "abc"}
    run = run_python(code, "migrate", scene.old, "--to", "elsewhere")
    assert run.returncode == 1 and "nats://" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("lines, expected", [
    ([], "flushes every 120 s"),
    (["sync_interval: always"], ""),
])
def test_durability_of_servers(tmp_path: Path, lines: list[str], expected: str) -> None:
    with jetstream_server.running(tmp_path, jetstream=lines) as servers:
        monitor = f"http://127.0.0.1:{servers.servers[0].monitor_port}"
        config_pth = write_config(tmp_path, path=servers.path("S", monitor=monitor))
        warnings = control.check_durability(config_pth)["queue"]
        assert len(warnings) == bool(expected)
        assert not expected or expected in warnings[0]
        asked_for_less = write_config(tmp_path,
                                      path=servers.path("S", monitor=monitor),
                                      durability="os")
        assert control.check_durability(asked_for_less)["queue"] == ()


def test_durability_that_nobody_tells(tmp_path: Path) -> None:
    port = jetstream_server.free_ports(1)[0]
    for path, expected in (("nats://h/S", "not checked: the path has no monitor"),
                           (f"nats://h/S?monitor=http://127.0.0.1:{port}", "does not answer")):
        config_pth = write_config(tmp_path, path=path)
        assert expected in control.check_durability(config_pth)["queue"][0]
        run = run_python("import sys; import persipubsub.__main__ as main; sys.exit(main.main())",
                         "check-config", config_pth)
        assert run.returncode == 0 and expected in run.stderr
    assert control.check_durability(write_config(tmp_path))["queue"] == ()
