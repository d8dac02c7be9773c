"""Test what is peculiar to queues on NATS JetStream: its traps, and what bad input gets."""

import asyncio
import contextlib
import gc
import inspect
import itertools
import json
import math
import os
import pathlib
import shutil
import signal
import socket
import struct
import threading
import time
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import nats
import nats.aio.transport
import nats.errors
import nats.js.errors
import pytest

import persipubsub.config
import persipubsub.control
import persipubsub.errors
import persipubsub.publisher
import persipubsub.subscriber
from persipubsub.jetstream import (_address, _calls, _delivery, _errors, _holding, _link, _loop,
                                   _settings, engine)
from tests import jetstream_server
from tests.support import HANG_SECS, Child, Connection, outcome, run_python, until, write_config
from tests.test_behaviour import drain, numbered, open_pub, open_sub

pytestmark = jetstream_server.needs_server

_COUNTER = itertools.count()


@pytest.fixture(name="config_pth")
def _config_pth(tmp_path: pathlib.Path, servers: jetstream_server.Servers) -> pathlib.Path:
    return deploy(tmp_path, servers)


def deploy(tmp_path: pathlib.Path, servers: jetstream_server.Servers,
           **changes: Any) -> pathlib.Path:
    changes.setdefault("busy_timeout_secs", 10)
    changes.setdefault("path", servers.path(f"stream{next(_COUNTER)}", ack_wait=1))
    return jetstream_server.create(tmp_path, **changes)


def settings_of(config_pth: pathlib.Path) -> _settings.Settings:
    return _settings.Settings.of(persipubsub.config.read(config_pth), "queue")


def open_queue(config_pth: pathlib.Path, **changes: Any) -> engine.Queue:
    """Open a queue, with settings that no configuration file can have yet."""
    queue = engine.Queue(settings_of(config_pth)._replace(**changes))
    queue.run(queue.connect)
    return queue


def ask(servers: jetstream_server.Servers, verb: str, **body: Any) -> dict[str, Any]:
    """Ask the API of JetStream, behind the library's back."""

    async def work() -> dict[str, Any]:
        client = await nats.connect(f"nats://127.0.0.1:{servers.servers[0].port}")
        answer = await client.request(f"$JS.API.{verb}", json.dumps(body).encode(), timeout=10)
        await client.close()
        found: dict[str, Any] = json.loads(answer.data)
        assert "error" not in found, found
        return found

    return asyncio.run(work())


# Paths


@pytest.mark.parametrize("path, expected", [
    ("nats://h/S", _address.Address(("nats://h:4222", ), "S", 1, 30, None)),
    ("nats://h1:1,[::1]:2/a_B-9?replicas=3&ack_wait=0.5&monitor=http://m:8222/",
     _address.Address(("nats://h1:1", "nats://[::1]:2"), "a_B-9", 3, 0.5, "http://m:8222")),
    ("nats://a-1.b_c.D.,10.0.0.1,[::ffff:1.2.3.4]/S",
     _address.Address(
         ("nats://a-1.b_c.D.:4222", "nats://10.0.0.1:4222", "nats://[::ffff:1.2.3.4]:4222"), "S", 1,
         30, None)),
])
def test_paths(path: str, expected: _address.Address) -> None:
    assert _address.parse(path) == expected


@pytest.mark.parametrize("path, what", [
    ("nats://", "the name of a stream"),
    ("nats://host", "the name of a stream"),
    ("nats://host/", "the name of a stream"),
    ("nats://host/a.b", "the name of a stream"),
    ("nats://host/a/b", "the name of a stream"),
    (f"nats://host/{'a' * 65}", "the name of a stream"),
    ("nats:///S", "servers"),
    ("nats://a,,b/S", "servers"),
    ("nats://a:0/S", "servers"),
    ("nats://a:65536/S", "servers"),
    ("nats://a b/S", "servers"),
    ("nats://a..b/S", "servers"),
    ("nats://.a/S", "servers"),
    (f"nats://{'a' * 64}/S", "servers"),
    ("nats://[:]/S", "servers"),
    ("nats://[1.2.3.4]/S", "servers"),
    ("nats://user:secret@host/S", "without credentials"),
    ("nats://host/S?replicas", "name=value"),
    ("nats://host/S?replicas=0", "replicas"),
    ("nats://host/S?replicas=2.5", "replicas"),
    ("nats://host/S?replicas=1&replicas=3", "each option once"),
    ("nats://host/S?ack_wait=nan", "ack_wait"),
    ("nats://host/S?ack_wait=0", "ack_wait"),
    ("nats://host/S?monitor=file:///etc/passwd", "monitor"),
    ("nats://host/S?color=red", "color"),
])
def test_wrong_paths(path: str, what: str, tmp_path: pathlib.Path) -> None:
    config_pth = write_config(tmp_path, path=path)
    with pytest.raises(persipubsub.errors.ConfigError, match=what) as info:
        persipubsub.config.read(config_pth)
    assert "config.json: queues.queue.path: Expected" in str(info.value)
    assert "secret" not in str(info.value)


def test_no_two_ids_have_one_name() -> None:
    ids = ["a", "A", "a.b", "a=2eb", "a b", "a/b", "a\\b", "a*", "a>", "=h", "\xe9", "\xe9" * 127]
    ids += ["a" * length for length in (119, 120, 121, 255)] + [f"{'a' * 254}b"]
    names = [_address.durable_of(one) for one in ids]
    assert len(set(names)) == len(ids)
    assert all(len(name) <= 120 and not set(name) & set(" .*>/\\\t\r\n") for name in names)


# What bad input gets


def test_server_that_is_down(tmp_path: pathlib.Path) -> None:
    port = jetstream_server.free_ports(1)[0]
    config_pth = write_config(tmp_path, path=f"nats://127.0.0.1:{port}/S", busy_timeout_secs=0.5)
    for function in (lambda: persipubsub.control.initialize_all_dbs(config_pth),
                     lambda: open_pub(config_pth), lambda: open_sub(config_pth),
                     lambda: persipubsub.control.statistics(config_pth)):
        begin = time.monotonic()
        with pytest.raises(persipubsub.errors.UnavailableError, match="127.0.0.1"):
            function()
        assert time.monotonic() - begin < HANG_SECS / 4


def test_server_that_dies_and_comes_back(tmp_path: pathlib.Path) -> None:
    with jetstream_server.running(tmp_path) as servers:
        config_pth = deploy(tmp_path, servers, busy_timeout_secs=3)
        with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
            pub.send(b"before")
            servers.servers[0].kill()
            assert outcome(lambda: pub.send(b"lost")) == "UnavailableError"
            assert outcome(sub.front) == "UnavailableError"

            def receive() -> None:
                with sub.receive(timeout=HANG_SECS):
                    pass

            assert outcome(receive) == "UnavailableError"
            servers.servers[0].start()
            servers.wait()
            pub.send(b"after")
            received = drain(sub, timeout=2)
        assert [one for one in received if one != b"lost"] == [b"before", b"after"]


@contextlib.contextmanager
def forgetting(servers: jetstream_server.Servers, store: pathlib.Path) -> Iterator[None]:
    """
    Let a server forget what it delivered in the ``with`` block, as killed servers do.

    Deliveries are noted after they were made: the test does not race with that, but puts the store
    back to what it was before.
    """
    server = servers.servers[0]
    server.kill(signal.SIGTERM)
    shutil.copytree(store, store.with_name("before"))
    server.start()
    servers.wait()
    yield
    server.kill()
    shutil.rmtree(store)
    store.with_name("before").rename(store)
    server.start()
    servers.wait()


@pytest.mark.parametrize("is_worked_on", [True, False])
def test_server_that_forgot_its_deliveries(tmp_path: pathlib.Path, is_worked_on: bool) -> None:
    with jetstream_server.running(tmp_path) as servers:
        config_pth = deploy(tmp_path,
                            servers,
                            path=servers.path("forgetful", ack_wait=HANG_SECS),
                            busy_timeout_secs=15)
        with open_pub(config_pth) as pub:
            pub.send_many(numbered(7))
        with open_queue(config_pth) as one, open_queue(config_pth) as other:
            with forgetting(servers, tmp_path / "node0"):
                first = one.consumer("sub").take(timeout=HANG_SECS, max_messages=2)
                second = other.consumer("sub").take(timeout=HANG_SECS, max_messages=3)
            assert first is not None and first.messages == numbered(7)[:2]
            assert second is not None and second.messages == numbered(7)[2:5]
            if not is_worked_on:
                first.give_back()
            # Nobody pulls, and it would ignore them for ever.
            second.acknowledge()
            if is_worked_on:
                first.acknowledge()
            expected = [(number, 1) for number in (6, 7)]
            if not is_worked_on:
                # They were pulled beside what was asked for, and not kept until ack_wait is over.
                expected = [(1, 2), (2, 2)] + expected
            assert one.statistics().subscribers[0].lag == len(expected)
            received: list[tuple[int, int]] = []
            while len(received) < len(expected):
                rest = one.consumer("sub").take(timeout=HANG_SECS / 4, max_messages=9)
                assert rest is not None, received
                received += [(message.number, message.attempts) for message in rest.details()]
                rest.acknowledge()
            assert sorted(received) == expected
            assert one.statistics().messages == 0


def test_acknowledgement_that_was_noted_and_not_answered(config_pth: pathlib.Path) -> None:
    with open_queue(config_pth, wait_secs=3.0) as queue, open_pub(config_pth) as pub:
        pub.send_many(numbered(3))
        consumer = queue.consumer("sub")
        for is_noted in (True, False):
            lease = consumer.take(timeout=HANG_SECS)
            assert lease is not None
            if is_noted:
                lease.acknowledge()
            # As if its server had died: nobody answers at this subject.
            lease.pulled = [one._replace(reply="nowhere") for one in lease.pulled]
            assert outcome(lease.acknowledge) == ("" if is_noted else "UnavailableError")
        with open_sub(config_pth) as sub:
            assert sorted(drain(sub, timeout=2)) == numbered(3)[1:]


def test_acknowledgements_do_not_wait_for_thousands_of_others(
        tmp_path: pathlib.Path, servers: jetstream_server.Servers,
        monkeypatch: pytest.MonkeyPatch) -> None:
    # A batch ends early where what came first has waited for long.
    config_pth = deploy(tmp_path, servers, path=servers.path("thousands", ack_wait=HANG_SECS))
    request = _link.Link.request
    waiting = most = count = 0

    async def count_requests(link: _link.Link, subject: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal waiting, most, count
        count += subject.startswith("$JS.ACK.")
        waiting += 1
        most = max(most, waiting)
        try:
            return await request(link, subject, *args, **kwargs)
        finally:
            waiting -= 1

    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(3000))
        with sub.receive_many(3000, timeout=HANG_SECS) as msgs:
            assert msgs == numbered(3000)
            monkeypatch.setattr(_link.Link, "request", count_requests)
        monkeypatch.undo()
        assert count >= 3000 and most < 1000
        assert not drain(sub)


def test_acknowledging_what_a_server_lost(tmp_path: pathlib.Path) -> None:
    with jetstream_server.running(tmp_path) as servers:
        config_pth = deploy(tmp_path, servers, busy_timeout_secs=2)
        with open_queue(config_pth) as queue, open_pub(config_pth) as pub:
            with forgetting(servers, tmp_path / "node0"):
                pub.send(b"lost")
                lease = queue.consumer("sub").take(timeout=HANG_SECS)
            assert lease is not None
            assert outcome(lease.acknowledge) == "UnavailableError"
            pub.send(b"later")
            with open_sub(config_pth) as sub:
                assert drain(sub, timeout=2) == [b"later"]


def test_stopped_server_is_not_waited_for_longer_than_allowed(tmp_path: pathlib.Path) -> None:
    with jetstream_server.running(tmp_path) as servers:
        config_pth = deploy(tmp_path, servers, busy_timeout_secs=1)
        process = servers.servers[0].process
        assert process is not None
        with open_pub(config_pth) as pub:
            process.send_signal(signal.SIGSTOP)
            # Its threads stop one after the other.
            tasks = pathlib.Path(f"/proc/{process.pid}/task")
            until(
                lambda: all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T"
                            for task in tasks.iterdir()), "all threads to stop")
            try:
                assert outcome(lambda: pub.send(b"hello")) == "UnavailableError"
            finally:
                process.send_signal(signal.SIGCONT)
            until(lambda: outcome(lambda: pub.send(b"again")) == "", "the server")


@contextlib.contextmanager
def proxy(port: int,
          is_over: Callable[[], bool] = lambda: True,
          most_bytes: float = math.inf) -> Iterator[tuple[int, list[str]]]:
    """
    Stand between clients and a server.

    :param port: of the server
    :param is_over: False while connections are to be reset, in the middle of their beginning
    :param most_bytes: of a connection that are passed on to the server; the rest is swallowed
    :return: port to connect to, and what became of each connection
    """
    fates: list[str] = []
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def copy(source: socket.socket, target: socket.socket, left: float) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 12):
                    target.sendall(data[:int(min(left, len(data)))])
                    left -= min(left, len(data))
                target.shutdown(socket.SHUT_WR)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client = stack.enter_context(listener.accept()[0])
                    server = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                    if not is_over():
                        fates.append("reset")
                        # A client that gives up in the middle resets on its own.
                        with contextlib.suppress(ConnectionError):
                            client.sendall(server.recv(1 << 16))
                            client.recv(1)
                        # Without lingering, closing resets.
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                          struct.pack("ii", 1, 0))
                        client.close()
                    else:
                        fates.append("passed on")
                        for pair in ((client, server, most_bytes), (server, client, math.inf)):
                            threading.Thread(target=copy, args=pair, daemon=True).start()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield int(listener.getsockname()[1]), fates
        finally:
            # Wakes the one that accepts; closing alone does not.
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(HANG_SECS)


def test_connection_that_is_reset_while_it_is_made(tmp_path: pathlib.Path,
                                                   servers: jetstream_server.Servers,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    path = servers.path(f"reset{next(_COUNTER)}")
    deploy(tmp_path, servers, path=path)
    port = servers.servers[0].port
    # The client itself tries again ten times a second, as long as we let it: not long enough here.
    monkeypatch.setattr(_link, "_CONNECT_SECS", 2.0)
    calls: list[int] = []
    connect = _link.Link._connect

    async def connect_counted(link: _link.Link, deadline: float) -> nats.aio.client.Client:
        calls.append(1)
        if len(calls) > 1:
            monkeypatch.setattr(_link, "_CONNECT_SECS", HANG_SECS)
        return await connect(link, deadline)

    monkeypatch.setattr(_link.Link, "_connect", connect_counted)
    with proxy(port, is_over=lambda: len(calls) > 1) as (other_port, fates):
        config_pth = write_config(tmp_path,
                                  path=path.replace(str(port), str(other_port)),
                                  busy_timeout_secs=HANG_SECS / 2)
        with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
            pub.send(b"hello")
            assert drain(sub, timeout=2) == [b"hello"]
        assert "reset" in fates and fates[-1] == "passed on"


def test_given_up_connection_that_is_made_at_that_moment(tmp_path: pathlib.Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    connect = nats.aio.transport.TcpTransport.connect
    is_late: list[bool] = []

    async def connect_late(*args: Any, **kwargs: Any) -> None:
        """Connect at the moment in which it is given up, as a wait of Python 3.11 may."""
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(HANG_SECS)
        is_late.append(True)
        await connect(*args, **kwargs)

    with jetstream_server.running(tmp_path) as servers:
        config_pth = write_config(tmp_path, path=servers.path("S"), busy_timeout_secs=1)
        with monkeypatch.context() as patch:
            patch.setattr(nats.aio.transport.TcpTransport, "connect", connect_late)
            with pytest.raises(persipubsub.errors.UnavailableError):
                open_pub(config_pth)
        assert is_late
        until(lambda: servers.servers[0].look("connz").get("num_connections") == 0, "its end")


def test_server_without_jetstream(tmp_path: pathlib.Path) -> None:
    with jetstream_server.running(tmp_path, jetstream=["off"]) as servers:
        config_pth = write_config(tmp_path, path=servers.path("S"))
        with pytest.raises(persipubsub.errors.UnavailableError, match="nats-server -js"):
            persipubsub.control.initialize_all_dbs(config_pth)


def test_account_without_jetstream(tmp_path: pathlib.Path) -> None:
    lines = ["accounts { A { users: [{user: a, password: a}] } }", "no_auth_user: a"]
    with jetstream_server.running(tmp_path, lines=lines) as servers:
        config_pth = write_config(tmp_path, path=servers.path("S"))
        with pytest.raises(persipubsub.errors.UnavailableError, match="nats-server -js"):
            persipubsub.control.initialize_all_dbs(config_pth)


def test_credentials(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        'authorization { users: [{user: "all", password: "pass"}, {user: "some", password: "pass", '
        'permissions: {publish: ["_INBOX.>"], subscribe: ">"}}] }'
    ]
    with jetstream_server.running(tmp_path, lines=lines) as servers:
        config_pth = write_config(tmp_path, path=servers.path("S"), busy_timeout_secs=3)
        for user, password in ((None, None), ("all", "wrong"), ("some", "pass")):
            for name, value in (("NATS_USER", user), ("NATS_PASSWORD", password)):
                if value is not None:
                    monkeypatch.setenv(name, value)
            with pytest.raises(persipubsub.errors.AccessError) as info:
                persipubsub.control.initialize_all_dbs(config_pth)
            assert password is None or password not in str(info.value)
        monkeypatch.setenv("NATS_USER", "all")
        persipubsub.control.initialize_all_dbs(config_pth)
        with open_pub(config_pth) as pub:
            pub.send(b"hello")


@pytest.mark.parametrize("timeout", [0.0, 2.0])
def test_without_the_right_to_pull(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
                                   timeout: float) -> None:
    """It does not look like an empty queue."""
    users = ('authorization { users: [{user: all, password: x}, {user: some, password: x, '
             'permissions: {publish: {deny: ["$JS.API.CONSUMER.MSG.NEXT.>"]}}}] }')
    monkeypatch.setenv("NATS_USER", "all")
    monkeypatch.setenv("NATS_PASSWORD", "x")
    with jetstream_server.running(tmp_path, lines=[users]) as servers:
        config_pth = deploy(tmp_path, servers)
        with open_pub(config_pth) as pub:
            pub.send(b"hello")
        monkeypatch.setenv("NATS_USER", "some")
        with open_sub(config_pth) as sub:
            for take in (sub.receive, sub.receive_to_top):
                with pytest.raises(persipubsub.errors.AccessError, match="rights"), \
                        take(timeout=timeout):
                    pass
            with pytest.raises(persipubsub.errors.AccessError, match="rights"):
                sub.pop_to_top()
        monkeypatch.setenv("NATS_USER", "all")
        with open_sub(config_pth) as sub, sub.receive(timeout=HANG_SECS) as msg:
            assert msg == b"hello"


@pytest.mark.parametrize("name", ["NATS_CREDS", "NATS_NKEY", "NATS_CA", "NATS_CERT"])
def test_credentials_that_are_no_file(config_pth: pathlib.Path, name: str,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    # A server that asks for none gets no credentials, and their file is not read.
    for value in ("/nonexistent", str(config_pth))[:1 if name == "NATS_CREDS" else 2]:
        monkeypatch.setenv(name, value)
        with pytest.raises(persipubsub.errors.AccessError):
            open_pub(config_pth)


def test_stream_of_somebody_else(tmp_path: pathlib.Path, servers: jetstream_server.Servers) -> None:
    ask(servers, "STREAM.CREATE.theirs", name="theirs", subjects=["their.subject"])
    config_pth = write_config(tmp_path, path=servers.path("theirs"))
    for function in (lambda: persipubsub.control.initialize_all_dbs(config_pth),
                     lambda: open_pub(config_pth), lambda: open_sub(config_pth),
                     lambda: persipubsub.control.clear_all_subs(config_pth)):
        with pytest.raises(persipubsub.errors.FormatError, match="somebody else"):
            function()
    assert ask(servers, "STREAM.INFO.theirs")["config"]["subjects"] == ["their.subject"]


def test_subjects_of_somebody_else(tmp_path: pathlib.Path,
                                   servers: jetstream_server.Servers) -> None:
    ask(servers, "STREAM.CREATE.taken", name="taken", subjects=["persipubsub.mine.>"])
    config_pth = write_config(tmp_path, path=servers.path("mine"))
    with pytest.raises(persipubsub.errors.FormatError, match="overlap"):
        persipubsub.control.initialize_all_dbs(config_pth)


def test_more_replicas_than_servers(tmp_path: pathlib.Path,
                                    servers: jetstream_server.Servers) -> None:
    config_pth = write_config(tmp_path, path=servers.path("many", replicas=3))
    with pytest.raises(persipubsub.errors.ConfigError, match="replicas"):
        persipubsub.control.initialize_all_dbs(config_pth)


def test_server_without_room(tmp_path: pathlib.Path) -> None:
    with jetstream_server.running(tmp_path, jetstream=["max_file_store: 1MB"]) as servers:
        config_pth = write_config(tmp_path, path=servers.path("S"), HWM_LMDB_SIZE_BYTES=1 << 30)
        with pytest.raises(persipubsub.errors.DiskFullError):
            persipubsub.control.initialize_all_dbs(config_pth)


def test_payload_limit_of_the_server(config_pth: pathlib.Path) -> None:
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        with pytest.raises(persipubsub.errors.MessageTooLargeError, match="max_payload.* 1048576"):
            pub.send(bytes(1 << 20))
        largest = bytes((1 << 20) - 192)
        pub.send(largest)
        assert drain(sub, timeout=1) == [largest]


def test_without_the_extra(tmp_path: pathlib.Path) -> None:
    config_pth = write_config(tmp_path, path="nats://localhost/S")
    run = run_python(
        "import sys; sys.modules['nats'] = None\n"
        "import persipubsub.control, persipubsub.errors\n"
        "try: persipubsub.control.initialize_all_dbs(sys.argv[1])\n"
        "except persipubsub.errors.ConfigError as error: print(error)", config_pth)
    assert "pip install 'persipubsub[nats]'" in run.stdout, run.stderr


@pytest.mark.parametrize("name", ["compact", "verify"])
def test_what_needs_a_directory(config_pth: pathlib.Path, name: str) -> None:
    with pytest.raises(persipubsub.errors.ConfigError, match="is a directory of this machine"):
        getattr(persipubsub.control, name)(config_pth)


def test_other_things_that_need_a_directory(config_pth: pathlib.Path,
                                            tmp_path: pathlib.Path) -> None:
    control = persipubsub.control
    for function in (lambda: control.peek(config_pth, "sub"),
                     lambda: control.follow(config_pth, "queue"),
                     lambda: control.backup(config_pth, "queue", tmp_path / "backup"),
                     lambda: control.restore(config_pth, "queue", tmp_path / "backup"),
                     lambda: control.add_subscriber(config_pth, "queue", "new"),
                     lambda: control.remove_subscriber(config_pth, "queue", "sub"),
                     lambda: control.drop_queue(config_pth, "queue")):
        assert outcome(function) == "ConfigError"


@pytest.mark.parametrize("kind", [
    kind for module in (nats.errors, nats.js.errors) for kind in vars(module).values()
    if inspect.isclass(kind) and issubclass(kind, nats.errors.Error)
])
def test_no_error_of_nats_leaves(kind: "type[nats.errors.Error]") -> None:
    error = kind.__new__(kind)
    with contextlib.suppress(TypeError):
        error = kind()
    with contextlib.suppress(Exception):
        str(error)
        assert isinstance(_errors.translate(error, "nats://h/S"),
                          persipubsub.errors.PersipubsubError)


# Traps


@contextlib.contextmanager
def impostor(servers: jetstream_server.Servers, config_pth: pathlib.Path,
             answers: Sequence[bytes]) -> Iterator[list[tuple[str, str]]]:
    """
    Answer in place of a stream, which does not listen any more.

    :param servers: of the stream
    :param config_pth: of the queue
    :param answers: one after the other; nothing at all where it is empty
    :return: what was published so far: the last part of the subject, and the id
    """
    name = settings_of(config_pth).address.stream
    config = ask(servers, f"STREAM.INFO.{name}")["config"]
    ask(servers, f"STREAM.UPDATE.{name}", **{**config, "subjects": [f"elsewhere.{name}"]})
    published: list[tuple[str, str]] = []
    is_listening, is_over = threading.Event(), threading.Event()

    async def answer() -> None:
        client = await nats.connect(f"nats://127.0.0.1:{servers.servers[0].port}")

        async def take(message: Any) -> None:
            published.append((message.subject.split(".")[-1], (message.headers
                                                               or {}).get("Nats-Msg-Id", "")))
            if answers[len(published) - 1]:
                await message.respond(answers[len(published) - 1])

        await client.subscribe(f"persipubsub.{name}.>", cb=take)
        await client.flush()
        is_listening.set()
        while not is_over.is_set():
            await asyncio.sleep(0.01)
        await client.close()

    thread = threading.Thread(target=asyncio.run, args=(answer(), ))
    thread.start()
    assert is_listening.wait(HANG_SECS)
    try:
        yield published
    finally:
        is_over.set()
        thread.join(HANG_SECS)


def test_answer_without_a_number_is_none(config_pth: pathlib.Path,
                                         servers: jetstream_server.Servers) -> None:
    # After its leader died, a stream was seen to answer like this to a message that it lost.
    answers = [
        b'{"stream": "S", "seq": 0, "duplicate": true}', b'{"stream": "S", "seq": 0}',
        b'{"stream": "S", "seq": 7, "duplicate": true}'
    ]
    with open_pub(config_pth) as pub:
        pub.send(b"before")
        with impostor(servers, config_pth, answers) as published:
            pub.send(b"hello")
    assert len(published) == 3
    assert len(set(published)) == 1


def test_leader_catches_up_before_a_message_is_published_again(tmp_path: pathlib.Path) -> None:
    with jetstream_server.running(tmp_path, nodes=3) as servers:
        config_pth = deploy(tmp_path, servers, path=servers.path("replicated", replicas=3))
        stored, none = b'{"stream": "S", "seq": 7}', b""
        with open_queue(config_pth) as queue:
            assert queue.put([b"first"]) == 1
            numbers = [int(queue.run(lambda: nobody(queue))["seq"]) for _ in range(2)]
            # The stream itself answers, and keeps nothing.
            assert numbers == [2, 3] and queue.statistics().messages == 1
            with impostor(servers, config_pth, [none, none, stored, stored, stored]) as published:
                queue.put([b"a", b"b"])
    both = published[:2]
    assert both[0] != both[1]
    # Once for both.
    assert published == both + [("nobody", "")] + both


async def nobody(queue: engine.Queue) -> dict[str, Any]:
    """Publish what nobody wants."""
    link = (await queue.ports()).link
    return await link.ask(_address.nobodys_subject(queue.settings.address.stream), b"",
                          time.monotonic() + HANG_SECS)


def test_message_that_nobody_wants_is_refused(tmp_path: pathlib.Path,
                                              servers: jetstream_server.Servers) -> None:
    config_pth = deploy(tmp_path, servers, publishers={"pub": ("a", "b")}, subscribers=("a", "b"))
    name = settings_of(config_pth).address.stream
    with open_pub(config_pth) as pub:
        pub.send(b"hello")
        ask(servers, f"CONSUMER.DELETE.{name}.b")
        until(lambda: outcome(lambda: pub.send(b"hello")) == "NotInitializedError", "an error")
        persipubsub.control.initialize_all_dbs(config_pth)
        pub.send(b"again")


def test_audience_that_consumers_do_not_know(tmp_path: pathlib.Path,
                                             servers: jetstream_server.Servers) -> None:
    config_pth = deploy(tmp_path, servers, publishers={"pub": ("a", "b")}, subscribers=("a", "b"))
    path = persipubsub.config.read(config_pth).queues["queue"].path
    changed = write_config(tmp_path,
                           path=path,
                           publishers={"pub": ("a", )},
                           subscribers=("a", "b"),
                           name="changed.json")
    with open_pub(changed) as pub:
        # It would be acknowledged and dropped.
        with pytest.raises(persipubsub.errors.NotInitializedError, match="initialize_all_dbs"):
            pub.send(b"hello")
        persipubsub.control.initialize_all_dbs(changed)
        pub.send(b"hello")
    with open_sub(changed, "a") as sub:
        assert drain(sub) == [b"hello"]


def test_old_message_that_the_server_still_has(tmp_path: pathlib.Path,
                                               servers: jetstream_server.Servers) -> None:
    config_pth = deploy(tmp_path, servers, MSG_TIMEOUT_SECS=0.5)
    name = settings_of(config_pth).address.stream
    config = ask(servers, f"STREAM.INFO.{name}")["config"]
    ask(servers, f"STREAM.UPDATE.{name}", **{**config, "max_age": 3600 * 10**9})
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send(b"old")
        time.sleep(0.6)
        assert sub.front() is None
        assert not drain(sub)
        pub.send(b"old")
        time.sleep(0.6)
        assert ask(servers, f"STREAM.INFO.{name}")["state"]["messages"] == 1
        assert persipubsub.control.prune_dangling_messages(config_pth) == {"queue": 1}
        assert ask(servers, f"STREAM.INFO.{name}")["state"]["messages"] == 0


def test_late_message_is_not_kept_in_the_process(tmp_path: pathlib.Path,
                                                 servers: jetstream_server.Servers) -> None:
    # A pull that ends right when a message comes: nobody may sit on it for ack_wait.
    config_pth = jetstream_server.deploy(tmp_path, servers)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub, open_sub(config_pth) as other:
        for _ in range(20):
            thread = threading.Thread(target=drain, args=(sub, 0.01))
            thread.start()
            time.sleep(0.01)
            pub.send(b"hello")
            thread.join(HANG_SECS)
        assert all(message == b"hello" for message in drain(other, timeout=1))
        assert persipubsub.control.statistics(config_pth)["queue"].subscribers[0].lag == 0


def test_dropped_messages_are_told(tmp_path: pathlib.Path, servers: jetstream_server.Servers,
                                   caplog: pytest.LogCaptureFixture) -> None:
    config_pth = deploy(tmp_path, servers, MAX_MSGS_NUM=10)
    with caplog.at_level("WARNING", logger="persipubsub"), open_pub(config_pth) as pub:
        for message in numbered(11):
            pub.send(message)
    assert "dropped unread: 5 of sub" in caplog.text


def test_limits_are_brought_up_to_date(tmp_path: pathlib.Path,
                                       servers: jetstream_server.Servers) -> None:
    config_pth = deploy(tmp_path, servers, MAX_MSGS_NUM=10)
    path = persipubsub.config.read(config_pth).queues["queue"].path
    deploy(tmp_path, servers, MAX_MSGS_NUM=20, path=path.replace("ack_wait=1", "ack_wait=2"))
    name = settings_of(config_pth).address.stream
    assert ask(servers, f"STREAM.INFO.{name}")["config"]["max_msgs"] == 20
    assert ask(servers, f"CONSUMER.INFO.{name}.sub")["config"]["ack_wait"] == 2 * 10**9


@pytest.mark.parametrize("strategy, expected", [("reject", "QueueFullError"),
                                                ("block", "QueueFullError"), ("prune_first", ""),
                                                ("prune_last", "")])
def test_limits_that_are_lowered_under_a_publisher(tmp_path: pathlib.Path,
                                                   servers: jetstream_server.Servers, strategy: str,
                                                   expected: str) -> None:
    config_pth = deploy(tmp_path, servers, strategy=strategy)
    path = persipubsub.config.read(config_pth).queues["queue"].path
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(4))
        # Beside a new file, an edit of the stream by hand does the same.
        deploy(tmp_path,
               servers,
               path=path,
               name="lower.json",
               strategy=strategy,
               MAX_MSGS_NUM=4,
               HWM_LMDB_SIZE_BYTES=3000)
        assert outcome(lambda: pub.send(b"4", timeout=0.2)) == expected
        assert outcome(lambda: pub.send_many(numbered(4), timeout=0.2)) == expected
        assert outcome(lambda: pub.send_many(numbered(5))) == "MessageTooLargeError"
        assert outcome(lambda: pub.send(bytes(5000))) == "MessageTooLargeError"
        assert drain(sub) == numbered(4)


def test_limit_that_we_do_not_know(tmp_path: pathlib.Path,
                                   servers: jetstream_server.Servers) -> None:
    config_pth = deploy(tmp_path, servers, busy_timeout_secs=1)
    name = settings_of(config_pth).address.stream
    config = ask(servers, f"STREAM.INFO.{name}")["config"]
    ask(servers, f"STREAM.UPDATE.{name}", **{
        **config, "max_msgs_per_subject": 1,
        "discard_new_per_subject": True
    })
    with open_pub(config_pth) as pub:
        pub.send(b"hello")
        begin = time.process_time()
        # The latter if the server is slow in the end.
        assert outcome(lambda: pub.send(b"more")) in ("QueueFullError", "UnavailableError")
        assert time.process_time() - begin < 0.5


def test_subscribers_that_are_in_the_file_no_more(tmp_path: pathlib.Path,
                                                  servers: jetstream_server.Servers) -> None:
    gone = tuple(f"gone.{number}" for number in range(300))
    path = servers.path("gone")
    deploy(tmp_path, servers, path=path, subscribers=("sub", ) + gone)
    config_pth = deploy(tmp_path, servers, path=path, MAX_MSGS_NUM=2, strategy="reject")
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(2))
        assert drain(sub) == numbered(2)
        with pytest.raises(persipubsub.errors.QueueFullError, match="2 of them for 'gone"):
            pub.send(b"2")
    # Of somebody else: it is no subscriber.
    ask(servers,
        "CONSUMER.CREATE.gone.other",
        stream_name="gone",
        config={
            "name": "other",
            "durable_name": "other",
            "ack_policy": "explicit"
        })
    figures = persipubsub.control.statistics(config_pth)["queue"].subscribers
    assert {one.subscriber: one.lag for one in figures} == {"sub": 0, **dict.fromkeys(gone, 2)}
    for name in ["other", *map(_address.durable_of, gone)]:
        ask(servers, f"CONSUMER.DELETE.gone.{name}")
    with open_pub(config_pth) as pub:
        pub.send(b"2")


# What the boundary has beside


def test_details(config_pth: pathlib.Path) -> None:
    with open_queue(config_pth) as queue:
        assert queue.put([b"first", b"second"]) == 1
        consumer = queue.consumer("sub")
        for attempts in (1, 2):
            lease = consumer.take(timeout=HANG_SECS)
            assert lease is not None
            lease.touch()
            found = lease.details()[0]
            assert (found.data, found.number, found.attempts) == (b"first", 1, attempts)
            assert abs(found.sent_at.timestamp() - time.time()) < HANG_SECS
            lease.give_back(KeyError("why"))


def test_newest(config_pth: pathlib.Path) -> None:
    with open_queue(config_pth) as queue:
        consumer = queue.consumer("sub")
        assert consumer.take_newest(timeout=0.05) is None
        queue.put(numbered(300))
        lease = consumer.take_newest(timeout=HANG_SECS)
        assert lease is not None and lease.messages == [b"299"]
        lease.acknowledge()
        assert consumer.take(timeout=0.05) is None


def test_same_id_is_stored_once(config_pth: pathlib.Path) -> None:
    with open_queue(config_pth) as queue:
        first = queue.put([b"a", b"b"], msg_ids=[b"one\r\n", b"two"])
        assert queue.put([b"a"], msg_ids=[b"one\r\n"]) == first
        assert queue.put([b"c"]) == first + 2


@pytest.mark.parametrize("has_ids", [True, False])
def test_batch_whose_beginning_was_stored(tmp_path: pathlib.Path, servers: jetstream_server.Servers,
                                          has_ids: bool) -> None:
    path = servers.path(f"half{next(_COUNTER)}")
    config_pth = deploy(tmp_path, servers, path=path)
    messages = [b"%03d" % number + bytes(1000) for number in range(100)]
    ids = [message[:3] for message in messages] if has_ids else None
    port = servers.servers[0].port
    with proxy(port, most_bytes=50000) as (other_port, _):
        cut_pth = write_config(tmp_path,
                               name="cut.json",
                               path=path.replace(str(port), str(other_port)),
                               busy_timeout_secs=2)
        with open_queue(cut_pth) as queue:
            assert outcome(lambda: queue.put(messages, msg_ids=ids)) == "UnavailableError"
    with open_queue(config_pth) as queue, open_sub(config_pth) as sub:
        stored = queue.statistics().messages
        assert 0 < stored < 100
        # With ids that are the program's own it is completed, and otherwise sent anew.
        first = queue.put(messages, msg_ids=ids)
        assert first == (1 if has_ids else stored + 1)
        assert drain(sub, timeout=2) == ([] if has_ids else messages[:stored]) + messages


def test_full_queue_that_drops_nothing(tmp_path: pathlib.Path,
                                       servers: jetstream_server.Servers) -> None:
    config_pth = deploy(tmp_path, servers, MAX_MSGS_NUM=3)
    with open_queue(config_pth, strategy="reject") as queue:
        queue.put(numbered(2))
        with pytest.raises(persipubsub.errors.QueueFullError, match="2 of them for 'sub'"):
            queue.put(numbered(2))
        queue.put([b"2"])
        with pytest.raises(persipubsub.errors.QueueFullError, match="3 of them for 'sub'"):
            queue.put([b"3"])
    with open_queue(config_pth, strategy="block") as queue, open_sub(config_pth) as sub:
        assert outcome(lambda: queue.put([b"3"], timeout=0.1)) == "QueueFullError"

        def receive() -> None:
            time.sleep(0.2)
            with sub.receive(timeout=HANG_SECS):
                pass

        thread = threading.Thread(target=receive)
        thread.start()
        queue.put([b"3"], timeout=HANG_SECS)
        thread.join(HANG_SECS)
        assert drain(sub) == [b"1", b"2", b"3"]


# Threads, fork, exit


def test_connections_end_with_the_parent(tmp_path: pathlib.Path) -> None:

    def idle(pipe: Connection) -> None:
        pipe.send("there")
        pipe.recv()

    with jetstream_server.running(tmp_path) as servers:
        config_pth = deploy(tmp_path, servers)
        pub = open_pub(config_pth)
        pub.send(b"hello")
        server = servers.servers[0]
        # A server may see the end of the one before after the beginning of this one.
        until(lambda: server.look("connz").get("num_connections") == 1, "a single connection")
        with Child(idle) as child:
            assert child.get() == "there"
            pub.close()
            until(lambda: server.look("connz").get("num_connections") == 0, "the connection's end")
            child.pipe.send("end")
            child.end()


def test_queues_share_a_connection_and_a_thread(tmp_path: pathlib.Path) -> None:
    with jetstream_server.running(tmp_path) as servers:
        config_pth = deploy(tmp_path, servers)
        with open_pub(config_pth), open_pub(config_pth), open_sub(config_pth):
            # A server may see the end of the one before after the beginning of this one.
            until(lambda: servers.servers[0].look("connz").get("num_connections") == 1,
                  "a single connection")
            threads = [one for one in threading.enumerate() if one.name == "persipubsub-nats"]
            assert len(threads) == 1


@pytest.mark.parametrize("code", [
    "pub.send(b'hello')",
    "pub.send(b'hello'); lease = sub.receive(timeout=10).__enter__()",
    "import threading; threading.Thread(target=lambda: sub.receive(timeout=None).__enter__(), "
    "daemon=True).start(); import time; time.sleep(0.2)",
    "import os, signal; os.kill(SERVER, signal.SIGSTOP)",
])
def test_exit_without_close(tmp_path: pathlib.Path, code: str) -> None:
    with jetstream_server.running(tmp_path) as servers:
        config_pth = deploy(tmp_path, servers)
        process = servers.servers[0].process
        assert process is not None
        run = run_python(
            "import sys; SERVER = int(sys.argv[2])\n"
            "import persipubsub.publisher, persipubsub.subscriber\n"
            "pub = persipubsub.publisher.Pub(); pub.init('pub', sys.argv[1])\n"
            "sub = persipubsub.subscriber.Sub(); sub.init('sub', sys.argv[1])\n" + code, config_pth,
            process.pid)
        process.send_signal(signal.SIGCONT)
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_interrupted_wait_gives_back_what_came_meanwhile(config_pth: pathlib.Path) -> None:
    handover: _calls.Handover[_delivery.Lease] = _calls.Handover()
    with open_queue(config_pth) as queue:
        queue.put([b"hello"])
        consumer = queue.consumer("sub")
        lease = consumer.take(timeout=HANG_SECS)
        assert lease is not None
        assert handover.leave() is None
        assert not handover.give(lease)
        lease.give_back()
        again = consumer.take(timeout=HANG_SECS)
        assert again is not None and again.messages == [b"hello"]


# What is forgotten


def forget_batch(sub: persipubsub.subscriber.Sub, count: int) -> None:
    """Leave messages to the garbage collector."""
    batch = sub.receive_many(count, timeout=HANG_SECS)
    # pylint: disable-next=unnecessary-dunder-call
    assert len(batch.__enter__()) == count
    cycle: list[Any] = [batch]
    cycle.append(cycle)


@pytest.mark.parametrize("is_in_loop", [False, True])
def test_forgotten_batch(tmp_path: pathlib.Path, servers: jetstream_server.Servers,
                         is_in_loop: bool) -> None:
    config_pth = jetstream_server.deploy(tmp_path, servers)

    async def collect() -> None:
        gc.collect()

    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(5))
        forget_batch(sub, 3)
        if is_in_loop:
            _loop.current().call(collect)
        else:
            gc.collect()
        assert drain(sub) == numbered(5)


@pytest.mark.parametrize("how", ["acknowledge", "give_back", "close"])
def test_lease_that_ended_is_not_forgotten(tmp_path: pathlib.Path,
                                           servers: jetstream_server.Servers,
                                           monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    given_back: list[Any] = []
    monkeypatch.setattr(_holding, "_give_back", lambda _, pulled: given_back.extend(pulled))
    config_pth = jetstream_server.deploy(tmp_path, servers)
    with open_queue(config_pth) as queue, open_queue(config_pth) as other:
        queue.put(numbered(2))
        consumer = queue.consumer("sub")
        lease = consumer.take(timeout=HANG_SECS)
        assert lease is not None
        getattr(queue if how == "close" else lease, how)()
        del lease
        gc.collect()
        other.statistics()  # the loop has come to what it was told before
        assert not given_back
        taken = other.consumer("sub").take(timeout=HANG_SECS)
        assert taken is not None
        assert taken.messages == [b"1" if how == "acknowledge" else b"0"]
        del taken
        gc.collect()
        other.statistics()
        assert len(given_back) == 1


def _forget_in_child(pipe: Connection, leases: list[Any]) -> None:
    posted: list[Any] = []
    with unittest.mock.patch.object(_loop.Loop, "post", lambda _, call: posted.append(call)):
        leases.clear()
        gc.collect()
    pipe.send(len(posted))


def test_child_does_not_give_back_what_its_parent_has(tmp_path: pathlib.Path,
                                                      servers: jetstream_server.Servers) -> None:
    config_pth = jetstream_server.deploy(tmp_path, servers)
    with open_queue(config_pth) as queue:
        queue.put(numbered(2))
        consumer = queue.consumer("sub")
        leases = [consumer.take(timeout=HANG_SECS)]
        with Child(_forget_in_child, leases) as child:
            assert child.get() == 0
            child.end()
        second = consumer.take(timeout=HANG_SECS)
        assert second is not None and second.messages == [b"1"]
        assert consumer.take(timeout=0.2) is None
        queue.close()
        # Too late: closing gave it back.
        leases.clear()
    with open_sub(config_pth) as sub:
        assert drain(sub) == numbered(2)


def test_message_that_is_forgotten_right_before_the_exit(tmp_path: pathlib.Path,
                                                         servers: jetstream_server.Servers) -> None:
    config_pth = jetstream_server.deploy(tmp_path, servers)
    with open_pub(config_pth) as pub:
        pub.send(b"0")
    run = run_python(
        "import sys, persipubsub.subscriber\n"
        "sub = persipubsub.subscriber.Sub(); sub.init('sub', sys.argv[1])\n"
        "for msg in sub.messages(timeout=60): break\n", config_pth)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    with open_sub(config_pth) as sub:
        assert drain(sub, timeout=1) == [b"0"]


def test_two_threads_begin_at_once(config_pth: pathlib.Path) -> None:
    results: list[str] = []

    def work() -> None:

        def use() -> None:
            with open_pub(config_pth) as pub:
                pub.send(b"hello")

        results.append(outcome(use))

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECS)
    assert results == [""] * 16


def test_child_that_forks_in_the_middle(config_pth: pathlib.Path) -> None:
    # Another thread of the parent is inside of the library when it forks.
    is_over = threading.Event()
    results: list[str] = []

    def send_on() -> None:
        with open_pub(config_pth) as pub:
            while not is_over.is_set():
                results.append(outcome(lambda: pub.send(b"parent")))

    def use(pipe: Connection, function: Callable[[], persipubsub.publisher.Pub]) -> None:
        with function() as pub:
            pub.send(b"child")
        pipe.send(os.getpid())

    thread = threading.Thread(target=send_on)
    thread.start()
    try:
        for _ in range(5):
            with Child(use, lambda: open_pub(config_pth)) as child:
                child.get()
                child.end()
    finally:
        is_over.set()
        thread.join(HANG_SECS)
    assert set(results) == {""}
