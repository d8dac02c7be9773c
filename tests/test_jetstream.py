"""Test what is peculiar to queues on NATS JetStream: its traps, and what bad input gets."""

import asyncio
import contextlib
import datetime
import functools
import gc
import itertools
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import nats
import pytest

import persipubsub.config
import persipubsub.jetstream
import persipubsub.message
from persipubsub import Sub, control, errors
from persipubsub.jetstream import engine
from tests import jetstream_server
from tests.jetstream_server import Servers
from tests.support import (HANG_SECS, Child, Connection, edited, in_threads, outcome, run_python,
                           send, until, write_config)
from tests.test_behaviour import drain, lags, numbered, open_pub, open_sub

pytestmark = jetstream_server.needs_server

_COUNTER = itertools.count()


@pytest.fixture(name="config_pth")
def _config_pth(tmp_path: Path, servers: Servers) -> Path:
    return make(tmp_path, servers)


#: Makes a queue that no other test has, with changes of its configuration.
Deploy: TypeAlias = Callable[..., Path]


@pytest.fixture(name="deploy")
def _deploy(tmp_path: Path, servers: Servers) -> Deploy:
    return functools.partial(make, tmp_path, servers)


def make(tmp_path: Path, servers: Servers, **changes: Any) -> Path:
    changes.setdefault("busy_timeout_secs", 10)
    changes.setdefault("path", servers.path(f"stream{next(_COUNTER)}", ack_wait=1))
    return jetstream_server.create(tmp_path, **changes)


def open_queue(config_pth: Path) -> engine.Queue:
    return engine.open_queue(persipubsub.config.read(config_pth), "queue")


def ask(servers: Servers, verb: str, **body: Any) -> dict[str, Any]:
    """Ask the API of JetStream, behind the library's back."""
    return jetstream_server.ask(servers.servers[0].port, verb, **body)


def path_of(config_pth: Path) -> str:
    return persipubsub.config.read(config_pth).queue_path("queue")


def stream_of(config_pth: Path) -> str:
    return path_of(config_pth).partition("?")[0].rpartition("/")[2]


def test_no_private_name_of_nats_is_used() -> None:
    """Attributes of other objects that begin with one underscore are ours, or of nobody."""
    directory = Path(persipubsub.jetstream.__file__).parent
    for path in directory.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        found = set(re.findall(r"(?<!self)(?<!\bcls)\.(_[a-z]\w*)", text))
        # Of a named tuple.
        assert found <= {"_replace"}, path
        assert "getattr" not in text and "vars(" not in text and "__dict__" not in text, path
        assert not re.search(r"nats\.\w*[\w.]*\._|from nats\S* import _", text), path


# Paths


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
def test_wrong_paths(path: str, what: str, tmp_path: Path) -> None:
    config_pth = write_config(tmp_path, path=path)
    with pytest.raises(errors.ConfigError, match=what) as info:
        persipubsub.config.read(config_pth)
    assert "config.json: queues.queue.path: Expected" in str(info.value)
    assert "secret" not in str(info.value)


def test_no_two_ids_have_one_name(deploy: Deploy) -> None:
    ids = ["a", "A", "a.b", "a=2eb", "a b", "a/b", "a\\b", "a*", "a>", "=h", "\xe9", "\xe9" * 127]
    ids += ["a" * length for length in (119, 120, 121, 255)] + [f"{'a' * 254}b"]
    config_pth = deploy(publishers={"pub": ids}, subscribers=ids)
    send(config_pth, b"hello")
    assert lags(config_pth) == dict.fromkeys(ids, 1)
    for number, name in enumerate(ids):
        with open_sub(config_pth, name) as sub:
            assert drain(sub) == [b"hello"]
        assert sum(lags(config_pth).values()) == len(ids) - number - 1


# What bad input gets


def test_server_that_is_down(tmp_path: Path) -> None:
    port = jetstream_server.free_ports(1)[0]
    config_pth = write_config(tmp_path, path=f"nats://127.0.0.1:{port}/S", busy_timeout_secs=0.5)
    for function in (lambda: control.initialize_all_dbs(config_pth), lambda: open_pub(config_pth),
                     lambda: open_sub(config_pth), lambda: control.statistics(config_pth)):
        begin = time.monotonic()
        with pytest.raises(errors.UnavailableError, match="127.0.0.1"):
            function()
        assert time.monotonic() - begin < HANG_SECS / 4


def test_server_without_jetstream(tmp_path: Path) -> None:
    with jetstream_server.running(tmp_path, jetstream=["off"]) as servers:
        config_pth = write_config(tmp_path, path=servers.path("S"))
        with pytest.raises(errors.UnavailableError, match="nats-server -js"):
            control.initialize_all_dbs(config_pth)


def test_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
            with pytest.raises(errors.AccessError) as info:
                control.initialize_all_dbs(config_pth)
            assert password is None or password not in str(info.value)
        monkeypatch.setenv("NATS_USER", "all")
        control.initialize_all_dbs(config_pth)
        send(config_pth, b"hello")


def make_certificate(directory: Path, name: str) -> tuple[Path, Path]:
    """Make a certificate for the loopback address that is its own authority, and its key."""
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    subprocess.run([
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
        "-nodes", "-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1",
        "-keyout", key, "-out", certificate
    ],
                   check=True,
                   capture_output=True)
    return certificate, key


def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = make_certificate(tmp_path, "server")
    own_certificate, own_key = make_certificate(tmp_path, "client")
    lines = [
        f'tls {{ cert_file: "{certificate}", key_file: "{key}", ca_file: "{own_certificate}", '
        f'verify: true }}'
    ]
    with jetstream_server.running(tmp_path, lines=lines) as servers:
        config_pth = write_config(tmp_path, path=servers.path("S"), busy_timeout_secs=5)
        for authority, is_known in ((None, False), (own_certificate, False), (certificate, True)):
            if authority is not None:
                monkeypatch.setenv("NATS_CA", str(authority))
            # The server wants one of the client as well, and closes the connection without it.
            expected = ("AccessError", "UnavailableError") if is_known else ("AccessError", )
            begin = outcome(lambda: control.initialize_all_dbs(config_pth))
            assert begin in expected, authority
        monkeypatch.setenv("NATS_CERT", str(own_certificate))
        monkeypatch.setenv("NATS_KEY", str(own_key))
        control.initialize_all_dbs(config_pth)
        with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
            pub.send(b"hello")
            servers.servers[0].kill()
            servers.servers[0].start()
            pub.send(b"again")
            assert drain(sub, timeout=2) == [b"hello", b"again"]


@pytest.mark.parametrize("timeout", [0.0, 2.0])
def test_without_the_right_to_pull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   timeout: float) -> None:
    """It does not look like an empty queue."""
    users = ('authorization { users: [{user: all, password: x}, {user: some, password: x, '
             'permissions: {publish: {deny: ["$JS.API.CONSUMER.MSG.NEXT.>"]}}}] }')
    monkeypatch.setenv("NATS_USER", "all")
    monkeypatch.setenv("NATS_PASSWORD", "x")
    with jetstream_server.running(tmp_path, lines=[users]) as servers:
        config_pth = make(tmp_path, servers)
        send(config_pth, b"hello")
        monkeypatch.setenv("NATS_USER", "some")
        with open_sub(config_pth) as sub:
            for take in (sub.receive, sub.receive_to_top):
                with pytest.raises(errors.AccessError, match="rights"), \
                        take(timeout=timeout):
                    pass
            with pytest.raises(errors.AccessError, match="rights"):
                sub.pop_to_top()
        monkeypatch.setenv("NATS_USER", "all")
        with open_sub(config_pth) as sub, sub.receive(timeout=HANG_SECS) as msg:
            assert msg == b"hello"


@pytest.mark.parametrize("name", ["NATS_CREDS", "NATS_NKEY", "NATS_CA", "NATS_CERT"])
def test_credentials_that_are_no_file(config_pth: Path, name: str,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    # A server that asks for none gets no credentials, and their file is not read.
    for value in ("/nonexistent", str(config_pth))[:1 if name == "NATS_CREDS" else 2]:
        monkeypatch.setenv(name, value)
        with pytest.raises(errors.AccessError):
            open_pub(config_pth)


def test_stream_of_somebody_else(tmp_path: Path, servers: Servers) -> None:
    ask(servers, "STREAM.CREATE.theirs", name="theirs", subjects=["their.subject"])
    config_pth = write_config(tmp_path, path=servers.path("theirs"))
    for function in (lambda: control.initialize_all_dbs(config_pth), lambda: open_pub(config_pth),
                     lambda: open_sub(config_pth), lambda: control.clear_all_subs(config_pth)):
        with pytest.raises(errors.FormatError, match="somebody else"):
            function()
    assert ask(servers, "STREAM.INFO.theirs")["config"]["subjects"] == ["their.subject"]


def test_subjects_of_somebody_else(tmp_path: Path, servers: Servers) -> None:
    ask(servers, "STREAM.CREATE.taken", name="taken", subjects=["persipubsub.mine.>"])
    config_pth = write_config(tmp_path, path=servers.path("mine"))
    with pytest.raises(errors.FormatError, match="overlap"):
        control.initialize_all_dbs(config_pth)


def test_more_replicas_than_servers(tmp_path: Path, servers: Servers) -> None:
    config_pth = write_config(tmp_path, path=servers.path("many", replicas=3))
    with pytest.raises(errors.ConfigError, match="replicas"):
        control.initialize_all_dbs(config_pth)


def test_server_without_room(tmp_path: Path) -> None:
    with jetstream_server.running(tmp_path, jetstream=["max_file_store: 1MB"]) as servers:
        config_pth = write_config(tmp_path, path=servers.path("S"), HWM_LMDB_SIZE_BYTES=1 << 30)
        with pytest.raises(errors.DiskFullError):
            control.initialize_all_dbs(config_pth)


def test_payload_limit_of_the_server(config_pth: Path) -> None:
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        with pytest.raises(errors.MessageTooLargeError, match="max_payload.* 1048576"):
            pub.send(bytes(1 << 20))
        largest = bytes((1 << 20) - 192)
        pub.send(largest)
        assert drain(sub, timeout=1) == [largest]


def test_without_the_extra(tmp_path: Path) -> None:
    config_pth = write_config(tmp_path, path="nats://localhost/S")
    run = run_python(
        "import sys; sys.modules['nats'] = None\n"
        "import persipubsub.control, persipubsub.errors\n"
        "try: persipubsub.control.initialize_all_dbs(sys.argv[1])\n"
        "except persipubsub.errors.ConfigError as error: print(error)", config_pth)
    assert "pip install 'persipubsub[nats]'" in run.stdout, run.stderr


# Traps


@contextlib.contextmanager
def impostor(servers: Servers, config_pth: Path,
             answers: Sequence[bytes]) -> Iterator[list[tuple[str, str]]]:
    """Answer in place of a stream, which does not listen any more."""
    name = stream_of(config_pth)
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


def test_answer_without_a_number_is_none(config_pth: Path, servers: Servers) -> None:
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


def test_message_that_nobody_wants_is_refused(deploy: Deploy, servers: Servers) -> None:
    config_pth = deploy(publishers={"pub": ("a", "b")}, subscribers=("a", "b"))
    name = stream_of(config_pth)
    with open_pub(config_pth) as pub:
        pub.send(b"hello")
        ask(servers, f"CONSUMER.DELETE.{name}.b")
        until(lambda: outcome(lambda: pub.send(b"hello")) == "NotInitializedError", "an error")
        control.initialize_all_dbs(config_pth)
        pub.send(b"again")


def test_audience_that_consumers_do_not_know(deploy: Deploy, tmp_path: Path) -> None:
    config_pth = deploy(publishers={"pub": ("a", "b")}, subscribers=("a", "b"))
    changed = write_config(tmp_path, {"pub": ("a", )}, ("a", "b"),
                           name="changed.json",
                           path=path_of(config_pth))
    with open_pub(changed) as pub:
        # It would be acknowledged and dropped.
        with pytest.raises(errors.NotInitializedError, match="initialize_all_dbs"):
            pub.send(b"hello")
        control.initialize_all_dbs(changed)
        pub.send(b"hello")
    with open_sub(changed, "a") as sub:
        assert drain(sub) == [b"hello"]


def test_old_message_that_the_server_still_has(deploy: Deploy, servers: Servers) -> None:
    config_pth = deploy(MSG_TIMEOUT_SECS=0.5)
    name = stream_of(config_pth)
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
        assert control.prune_dangling_messages(config_pth) == {"queue": 1}
        assert ask(servers, f"STREAM.INFO.{name}")["state"]["messages"] == 0


def test_late_message_is_not_kept_in_the_process(tmp_path: Path, servers: Servers) -> None:
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
        assert control.statistics(config_pth)["queue"].subscribers[0].lag == 0


def test_dropped_messages_are_told(deploy: Deploy, caplog: pytest.LogCaptureFixture) -> None:
    config_pth = deploy(MAX_MSGS_NUM=10)
    with caplog.at_level("WARNING", logger="persipubsub"), open_pub(config_pth) as pub:
        for message in numbered(11):
            pub.send(message)
    assert "dropped unread: 6 of sub" in caplog.text


def test_limits_are_brought_up_to_date(deploy: Deploy, servers: Servers) -> None:
    config_pth = deploy(MAX_MSGS_NUM=10)
    deploy(MAX_MSGS_NUM=20, path=path_of(config_pth).replace("ack_wait=1", "ack_wait=2"))
    name = stream_of(config_pth)
    assert ask(servers, f"STREAM.INFO.{name}")["config"]["max_msgs"] == 20
    assert ask(servers, f"CONSUMER.INFO.{name}.sub")["config"]["ack_wait"] == 2 * 10**9


@pytest.mark.parametrize("strategy, expected", [("reject", "QueueFullError"),
                                                ("block", "QueueFullError"), ("prune_first", ""),
                                                ("prune_last", "")])
def test_limits_that_are_lowered_under_a_publisher(deploy: Deploy, strategy: str,
                                                   expected: str) -> None:
    config_pth = deploy(strategy=strategy)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(4))
        # Beside a new file, an edit of the stream by hand does the same.
        deploy(path=path_of(config_pth),
               name="lower.json",
               strategy=strategy,
               MAX_MSGS_NUM=4,
               HWM_LMDB_SIZE_BYTES=3000)
        assert outcome(lambda: pub.send(b"4", timeout=0.2)) == expected
        assert outcome(lambda: pub.send_many(numbered(4), timeout=0.2)) == expected
        assert outcome(lambda: pub.send_many(numbered(5))) == "MessageTooLargeError"
        assert outcome(lambda: pub.send(bytes(5000))) == "MessageTooLargeError"
        assert drain(sub) == numbered(4)


def test_subscribers_that_are_in_the_file_no_more(deploy: Deploy, servers: Servers) -> None:
    gone = tuple(f"gone.{number}" for number in range(150))
    path = servers.path("gone")
    deploy(path=path, subscribers=("sub", ) + gone)
    config_pth = deploy(path=path, MAX_MSGS_NUM=2, strategy="reject")
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(2))
        assert drain(sub) == numbered(2)
        with pytest.raises(errors.QueueFullError, match="2 of them for 'gone"):
            pub.send(b"2")
    # Of somebody else: it is no subscriber.
    config = {"name": "other", "durable_name": "other", "ack_policy": "explicit"}
    ask(servers, "CONSUMER.CREATE.gone.other", stream_name="gone", config=config)
    figures = control.statistics(config_pth)["queue"].subscribers
    assert {one.subscriber: one.lag for one in figures} == {"sub": 0, **dict.fromkeys(gone, 2)}
    ask(servers, "CONSUMER.DELETE.gone.other")
    for name in gone:
        assert control.remove_subscriber(persipubsub.config.read(config_pth), "queue", name) == 2
    send(config_pth, b"2")


# Threads, fork, exit


def test_connections_end_with_the_parent(tmp_path: Path) -> None:

    def idle(pipe: Connection) -> None:
        pipe.send("there")
        pipe.recv()

    with jetstream_server.running(tmp_path) as servers:
        config_pth = make(tmp_path, servers)
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


def test_queues_share_a_connection_and_a_thread(tmp_path: Path) -> None:
    with jetstream_server.running(tmp_path) as servers:
        config_pth = make(tmp_path, servers)
        with open_pub(config_pth), open_pub(config_pth), open_sub(config_pth):
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
def test_exit_without_close(tmp_path: Path, code: str) -> None:
    with jetstream_server.running(tmp_path) as servers:
        config_pth = make(tmp_path, servers)
        process = servers.servers[0].process
        assert process is not None
        run = run_python(
            "import sys; SERVER = int(sys.argv[2])\n"
            "from persipubsub import Pub, Sub\n"
            "pub = Pub('pub', sys.argv[1])\n"
            "sub = Sub('sub', sys.argv[1])\n" + code, config_pth, process.pid)
        process.send_signal(signal.SIGCONT)
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


# What is forgotten


def forget_batch(sub: Sub, count: int) -> None:
    batch = sub.receive_many(count, timeout=HANG_SECS)
    # pylint: disable-next=unnecessary-dunder-call
    assert len(batch.__enter__()) == count
    cycle: list[Any] = [batch]
    cycle.append(cycle)


@pytest.mark.parametrize("is_in_loop", [False, True])
def test_forgotten_batch(tmp_path: Path, servers: Servers, is_in_loop: bool) -> None:
    config_pth = jetstream_server.deploy(tmp_path, servers)

    async def collect() -> None:
        gc.collect()

    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(5))
        forget_batch(sub, 3)
        if is_in_loop:
            with open_queue(config_pth) as queue:
                queue.run(collect)
        else:
            gc.collect()
        assert drain(sub) == numbered(5)


def test_message_that_is_forgotten_right_before_the_exit(tmp_path: Path, servers: Servers) -> None:
    config_pth = jetstream_server.deploy(tmp_path, servers)
    send(config_pth, b"0")
    run = run_python(
        "import sys; from persipubsub import Sub\n"
        "sub = Sub('sub', sys.argv[1])\n"
        "for msg in sub.messages(timeout=60): break\n", config_pth)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    with open_sub(config_pth) as sub:
        assert drain(sub, timeout=1) == [b"0"]


@pytest.mark.parametrize("how", ["ack", "nack", "close"])
def test_lease_that_ended_is_not_given_back_again(config_pth: Path, how: str) -> None:
    with open_queue(config_pth) as queue, open_queue(config_pth) as other:
        queue.put(numbered(2))
        lease = queue.consumer("sub").take(timeout=HANG_SECS)
        assert lease is not None
        getattr(queue if how == "close" else lease, how)()
        taken = other.consumer("sub").take(timeout=HANG_SECS)
        assert taken is not None and taken.messages == [b"1" if how == "ack" else b"0"]
        del lease
        gc.collect()
        rest = other.consumer("sub").take(timeout=0.3, max_messages=9)
        assert rest is None if how == "ack" else rest is not None and rest.messages == [b"1"]


def _forget_in_child(pipe: Connection, leases: list[Any]) -> None:
    leases.clear()
    gc.collect()
    pipe.send("forgotten")


def test_child_does_not_give_back_what_its_parent_has(tmp_path: Path, servers: Servers) -> None:
    config_pth = jetstream_server.deploy(tmp_path, servers)
    with open_queue(config_pth) as queue, open_sub(config_pth) as sub:
        queue.put(numbered(2))
        leases = [queue.consumer("sub").take(timeout=HANG_SECS)]
        with Child(_forget_in_child, leases) as child:
            assert child.get() == "forgotten"
            child.end()
        assert drain(sub) == [b"1"]
        queue.close()
        # Too late: closing gave it back.
        leases.clear()
        assert drain(sub) == [b"0"]


def test_two_threads_begin_at_once(config_pth: Path) -> None:
    in_threads([lambda: send(config_pth, b"hello")] * 16)


# Full queues


def test_full_queue_that_drops_nothing(deploy: Deploy, tmp_path: Path) -> None:
    config_pth = deploy(MAX_MSGS_NUM=3, strategy="reject")
    with open_pub(config_pth) as pub:
        pub.send_many(numbered(2))
        with pytest.raises(errors.QueueFullError, match="2 of them for 'sub'"):
            pub.send_many(numbered(2))
        pub.send(b"2")
        with pytest.raises(errors.QueueFullError, match="3 of them for 'sub'"):
            pub.send(b"3")
    blocking = write_config(tmp_path,
                            path=path_of(config_pth),
                            MAX_MSGS_NUM=3,
                            strategy="block",
                            name="block.json")
    with open_pub(blocking) as pub, open_sub(config_pth) as sub:
        assert outcome(lambda: pub.send(b"3", timeout=0.1)) == "QueueFullError"
        receipt = sub.receive(timeout=HANG_SECS)
        assert receipt.__enter__() == b"0"  # pylint: disable=unnecessary-dunder-call
        timer = threading.Timer(0.2, receipt.__exit__, (None, None, None))
        timer.start()
        pub.send(b"3", timeout=HANG_SECS)
        timer.join()
        assert drain(sub) == [b"1", b"2", b"3"]


# Retries and dead letters


def write_letters(tmp_path: Path, servers: Servers, letters: str = "", **entries: Any) -> Path:
    """Write the configuration of a queue whose subscriber has limits, and initialize it."""
    config_pth = write_config(tmp_path, path=servers.path(f"stream{next(_COUNTER)}", ack_wait=1))
    path = letters or servers.path(f"letters{next(_COUNTER)}")
    with edited(config_pth) as content:
        content["sub"].update(entries)
        content["operator"] = {"in_queue": "letters"}
        described = {**content["queues"]["queue"], "path": path, "subscribers": ["operator"]}
        content["queues"]["letters"] = described
    control.initialize_all_dbs(config_pth)
    return config_pth


def fail(sub: Sub, timeout: float = HANG_SECS) -> bytes | None:
    """Receive a message, and fail to work on it."""
    received: list[bytes | None] = []
    with contextlib.suppress(KeyError), sub.receive(timeout=timeout) as msg:
        received.append(msg)
        if msg is not None:
            raise KeyError("why")
    return received[0]


def letters_of(config_pth: Path) -> list[persipubsub.message.DeadLetter]:
    with open_sub(config_pth, "operator") as sub:
        return list(map(persipubsub.message.DeadLetter.decode, drain(sub, timeout=1)))


def test_message_that_fails_too_often_becomes_a_dead_letter(tmp_path: Path,
                                                            servers: Servers) -> None:
    config_pth = write_letters(tmp_path,
                               servers,
                               max_deliveries=2,
                               dead_letter_queue="letters",
                               retry_delay_secs=0)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many([b"poison", b"fine"])
        assert [fail(sub), fail(sub)] == [b"poison"] * 2
        assert drain(sub) == [b"fine"]
    letter, = letters_of(config_pth)
    assert (letter.queue, letter.subscriber, letter.number) == ("queue", "sub", 1)
    assert (letter.attempts, letter.error, letter.data) == (2, "KeyError: 'why'", b"poison")
    assert abs(letter.sent_at.timestamp() - time.time()) < HANG_SECS
    # Operators look at it on behalf of a subscriber of its own.
    config = persipubsub.config.read(config_pth)
    looked = engine.peek(config, "letters", persipubsub.config.DEAD_LETTERS, 9)
    assert len(looked) == 1 and lags(config_pth) == {"sub": 0}


def _receive_and_hang(pipe: Connection, config_pth: Path) -> None:
    with open_sub(config_pth) as sub:
        while True:
            with sub.receive(timeout=HANG_SECS) as msg:
                pipe.send(msg)
                pipe.recv()


def test_kills_count_as_deliveries(tmp_path: Path, servers: Servers) -> None:
    config_pth = write_letters(tmp_path, servers, max_deliveries=2, dead_letter_queue="letters")
    send(config_pth, b"poison", b"fine")
    for _ in range(2):
        with Child(_receive_and_hang, config_pth) as child:
            while child.get() != b"poison":
                child.pipe.send("go on")
            child.kill(signal.SIGKILL)
            child.end(exit_code=-signal.SIGKILL)
    with open_sub(config_pth) as sub:
        until(lambda: drain(sub) or lags(config_pth) == {"sub": 0}, "the message")
        until(lambda: not drain(sub) and lags(config_pth) == {"sub": 0}, "the dead letter")
    letter, = letters_of(config_pth)
    assert (letter.data, letter.attempts) == (b"poison", 2)
    assert "its process ended" in letter.error


def test_message_without_a_queue_of_dead_letters_is_dropped(
        tmp_path: Path, servers: Servers, caplog: pytest.LogCaptureFixture) -> None:
    config_pth = write_letters(tmp_path, servers, max_deliveries=1)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many([b"poison", b"fine"])
        with caplog.at_level("WARNING", logger="persipubsub"):
            assert fail(sub) == b"poison"
        assert drain(sub) == [b"fine"]
    assert "The message 1 of the queue" in caplog.text and "KeyError" in caplog.text


def test_failed_message_rests_longer_each_time(tmp_path: Path, servers: Servers) -> None:
    config_pth = write_letters(tmp_path, servers, retry_delay_secs=0.4)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many([b"slow", b"fine"])
        assert fail(sub) == b"slow"
        begin = time.monotonic()
        # Others go on meanwhile.
        assert fail(sub) == b"fine"
        assert sub.front() is None
        assert fail(sub) == b"slow"
        assert 0.3 < time.monotonic() - begin
        begin = time.monotonic()
        while fail(sub) != b"slow":
            pass
        assert 0.7 < time.monotonic() - begin


def test_dead_letter_that_can_not_be_written(tmp_path: Path, servers: Servers,
                                             caplog: pytest.LogCaptureFixture) -> None:
    config_pth = write_letters(tmp_path, servers, max_deliveries=1, dead_letter_queue="letters")
    path = persipubsub.config.read(config_pth).queue_path("letters")
    ask(servers, f"STREAM.DELETE.{path.rpartition('/')[2]}")
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many([b"poison", b"fine"])
        with caplog.at_level("WARNING", logger="persipubsub"):
            assert fail(sub) == b"poison"
            assert drain(sub) == [b"fine"]
        assert "stays with sub" in caplog.text
        # It comes again, and is not delivered: it is moved as soon as that can be done.
        assert not drain(sub, timeout=1.5)
        with open_queue(config_pth) as queue:
            assert queue.statistics().subscribers[0].lag == 1
        control.initialize_all_dbs(config_pth)
        until(lambda: not drain(sub) and lags(config_pth) == {"sub": 0}, "the dead letter")
    assert [letter.data for letter in letters_of(config_pth)] == [b"poison"]


def test_dead_letters_to_a_directory_are_refused(tmp_path: Path, servers: Servers) -> None:
    with pytest.raises(errors.ConfigError, match="dead_letter_queue: .*both on servers"):
        write_letters(tmp_path,
                      servers,
                      letters=str(tmp_path / "letters"),
                      max_deliveries=1,
                      dead_letter_queue="letters")


# Places


def test_seek(deploy: Deploy) -> None:
    config_pth = deploy(publishers={"pub": ("sub", "b")}, subscribers=("sub", "b"))
    config = persipubsub.config.read(config_pth)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub, open_sub(config_pth, "b") as b:
        pub.send_many(numbered(5))
        middle = time.time()
        time.sleep(0.01)
        pub.send_many(numbered(10)[5:])
        assert drain(sub) == numbered(10)
        # The other one keeps them.
        for to, expected in (("beginning", 1), (4, 4), (middle, 6), ("end", 11), (1000, 11), (0, 1),
                             (datetime.datetime.fromtimestamp(middle, datetime.UTC), 6)):
            assert control.seek(config, "sub", to) == expected
            assert drain(sub, timeout=0.3) == numbered(10)[expected - 1:], to
        assert control.seek(config, "b", 8) == 8
        assert drain(b) == numbered(10)[7:]
        # What everybody passed is gone, and what is sent from now on comes to all.
        assert control.statistics(config_pth)["queue"].messages == 0
        control.seek(config, "sub", "beginning")
        pub.send(b"new")
        assert (drain(sub), drain(b)) == ([b"new"], [b"new"])
    for to, kind in (("middle", ValueError), (True, TypeError), (float("nan"), ValueError),
                     (datetime.datetime(2026, 1, 1), ValueError)):
        with pytest.raises(kind):
            control.seek(config, "sub", to)
    assert outcome(lambda: control.seek(config, "nobody", 1, "queue")) == "NotInitializedError"


def test_seek_while_everybody_is_at_work(deploy: Deploy) -> None:
    config_pth = deploy(retain_secs=600)
    config = persipubsub.config.read(config_pth)
    ends: list[str] = []
    is_over = threading.Event()
    received: list[bytes] = []

    def receive() -> None:
        with open_sub(config_pth) as sub:
            while not is_over.is_set():
                received.extend(drain(sub, timeout=0.05))

    def send_all() -> None:
        with open_pub(config_pth) as pub:
            for message in numbered(300):
                pub.send(message)

    receiving = threading.Thread(target=lambda: ends.append(outcome(receive)))
    sending = threading.Thread(target=lambda: ends.append(outcome(send_all)))
    receiving.start()
    sending.start()
    while sending.is_alive():
        control.seek(config, "sub", "beginning")
    sending.join(HANG_SECS)
    until(lambda: set(received) == set(numbered(300)), "all messages")
    is_over.set()
    receiving.join(HANG_SECS)
    assert ends == ["", ""]
    control.seek(config, "sub", "beginning")
    with open_sub(config_pth) as sub:
        assert drain(sub, timeout=2) == numbered(300)


def test_finished_messages_are_retained(deploy: Deploy) -> None:
    config_pth = deploy(retain_secs=600, MAX_MSGS_NUM=5, strategy="reject")
    config = persipubsub.config.read(config_pth)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(4))
        assert drain(sub) == numbered(4)
        assert control.seek(config, "sub", 2) == 2
        assert drain(sub) == numbered(4)[1:]
        # At the mark, they are dropped first.
        pub.send_many(numbered(4))
        assert lags(config_pth) == {"sub": 4}
        pub.send(b"4")
        assert outcome(lambda: pub.send(b"5")) == "QueueFullError"
        assert drain(sub) == numbered(5)


def test_subscriber_that_starts_from_the_beginning(deploy: Deploy, tmp_path: Path) -> None:
    config_pth = deploy()
    send(config_pth, *numbered(3))
    both = write_config(tmp_path,
                        path=path_of(config_pth),
                        subscribers=("sub", "late"),
                        name="both.json")
    with edited(both) as content:
        content["late"]["start_from"] = "beginning"
    control.initialize_all_dbs(both)
    with open_sub(both, "late") as late:
        assert drain(late) == numbered(3)


# Looking, adding, removing


def test_peek(deploy: Deploy) -> None:
    config_pth = deploy(publishers={"pub": ("a", "b"), "one": ("b", )}, subscribers=("a", "b"))
    config = persipubsub.config.read(config_pth)
    assert engine.peek(config, "queue", "a", 9) == []
    with open_pub(config_pth) as pub, open_pub(config_pth, "one") as one:
        one.send(b"0")
        pub.send_many(numbered(4)[1:])
    with open_sub(config_pth, "b") as sub, sub.receive(timeout=HANG_SECS):
        found = engine.peek(config, "queue", "b", 9)
    expected = [(1, ("b", ), b"0"), (2, None, b"1"), (3, None, b"2"), (4, None, b"3")]
    assert [(one.number, one.subscribers, one.content) for one in found] == expected
    assert all(0 <= one.age_seconds < HANG_SECS for one in found)
    assert [one.number for one in engine.peek(config, "queue", "a", 2)] == [2, 3]
    assert [one.number for one in engine.peek(config, "queue", "b", 9, start=3)] == [3, 4]
    assert lags(config_pth) == {"a": 3, "b": 3}
    assert outcome(lambda: engine.peek(config, "queue", "nobody")) == "NotInitializedError"


def test_follow(config_pth: Path) -> None:
    config = persipubsub.config.read(config_pth)
    with open_pub(config_pth) as pub, \
            contextlib.closing(engine.follow(config, "queue", last=1)) as looks:
        pub.send_many(numbered(2))
        assert [one.content for one in next(looks)] == [b"1"]
        begin = time.monotonic()
        assert next(looks) == []
        assert time.monotonic() - begin < HANG_SECS / 10
        pub.send(b"2")
        while not (found := next(looks)):
            pass
        assert [one.content for one in found] == [b"2"]
    assert lags(config_pth) == {"sub": 3}


def test_subscribers_are_added_and_removed(deploy: Deploy, tmp_path: Path) -> None:
    config_pth = deploy()
    both = write_config(tmp_path,
                        path=path_of(config_pth),
                        subscribers=("sub", "new"),
                        name="both.json")
    config = persipubsub.config.read(both)
    with open_pub(config_pth) as pub:
        pub.send(b"before")
        assert control.add_subscriber(config, "queue", "new")
        assert not control.add_subscriber(config, "queue", "new")
        pub.send(b"after")
        with open_sub(both, "new") as sub:
            assert drain(sub) == [b"after"]
            assert control.remove_subscriber(config, "queue", "sub") == 2
            # Nobody else needs them.
            assert control.statistics(both)["queue"].messages == 0
            # What everybody is to get needs everybody that the file names.
            until(lambda: outcome(lambda: pub.send(b"lost")) == "NotInitializedError", "an error")
            assert outcome(lambda: drain(sub)) == ""
    assert outcome(
        lambda: control.remove_subscriber(config, "queue", "sub")) == "NotInitializedError"
