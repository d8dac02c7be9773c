"""Test that connections end for good, and that no call waits longer for a server than it may."""

# pylint: disable=missing-function-docstring,redefined-outer-name
# pylint: disable=protected-access

import asyncio
import contextlib
import math
import os
import pathlib
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import nats.aio.transport
import pytest

import persipubsub.aio
import persipubsub.errors
from persipubsub.jetstream import _acknowledging, _link, _loop
from tests import jetstream_server
from tests.faults.test_storm import choose_seed
from tests.support import HANG_SECS, Child, Connection, open_files, outcome, until
from tests.test_behaviour import drain, lags, numbered, open_pub, open_sub

pytestmark = jetstream_server.needs_server

#: More of them than a socket takes, and than are kept for a server that reads nothing.
LARGE = bytes(500000)


@pytest.fixture()
def server(tmp_path: pathlib.Path) -> Iterator[jetstream_server.Servers]:
    with jetstream_server.running(tmp_path) as servers:
        yield servers


@contextlib.contextmanager
def stopped(servers: jetstream_server.Servers) -> Iterator[None]:
    """Stop the server as long as the ``with`` block: it reads nothing, and closes nothing."""
    process = servers.servers[0].process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


def until_nobody_is_connected(servers: jetstream_server.Servers) -> None:
    until(lambda: servers.servers[0].look("connz").get("connections") == [], "the last connection")


def count_sockets() -> int:
    return sum(path.startswith("socket:") for path in open_files())


def links() -> list[_link.Link]:
    return list(_link._LINKS.get(_loop.current(), {}).values())


async def outcome_of(coroutine: Any) -> str:
    try:
        await coroutine
    except persipubsub.errors.PersipubsubError as error:
        return type(error).__name__
    return ""


def test_calls_end_while_a_server_reads_nothing(server: jetstream_server.Servers,
                                                tmp_path: pathlib.Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server, busy_timeout_secs=2)

    async def main() -> None:
        async with persipubsub.aio.Pub() as pub, persipubsub.aio.Sub() as sub:
            await pub.init("pub", config_pth)
            await sub.init("sub", config_pth)
            await pub.send(b"")
            async with sub.receive(timeout=HANG_SECS) as msg:
                assert msg == b""
            link, = links()
            with stopped(server):
                sending = [asyncio.ensure_future(outcome_of(pub.send(LARGE))) for _ in range(50)]
                await asyncio.sleep(0.5)
                async with sub.receive(timeout=0.5) as msg:
                    assert msg is None
                assert await asyncio.gather(*sending) == ["UnavailableError"] * 50
                # It is given up as dead after 15 seconds, and nobody waited for that.
                assert link._client is not None and link._client.is_connected

    asyncio.run(asyncio.wait_for(main(), HANG_SECS))
    until_nobody_is_connected(server)


def test_thousands_of_calls_end_while_a_server_reads_nothing(server: jetstream_server.Servers,
                                                             tmp_path: pathlib.Path) -> None:
    with open_pub(jetstream_server.deploy(tmp_path, server)):
        link, = links()

        async def ask() -> list[str]:
            deadline = time.monotonic() + 2
            # More than a socket takes, and not more than is kept for the server.
            return await asyncio.gather(*(outcome_of(link.request("one", bytes(5000), deadline))
                                          for _ in range(3000)))

        with stopped(server):
            begun = _loop.current().begin(ask)
            assert begun.result(HANG_SECS) == ["UnavailableError"] * 3000


def test_server_that_reads_nothing_is_left_for_another_one(server: jetstream_server.Servers,
                                                           tmp_path: pathlib.Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server, busy_timeout_secs=HANG_SECS / 2)
    monkeypatch.setattr(_link, "_PING_SECS", 1)
    ends: list[str] = []
    with contextlib.ExitStack() as stack:
        used, other = (stack.enter_context(contextlib.closing(Valve(server.servers[0].port)))
                       for _ in range(2))
        with open_pub(used.config(config_pth, other)) as pub:
            pub.send(b"")
            # The client chooses at random.
            used, other = (used, other) if used.count else (other, used)
            assert (used.count, other.count) == (1, 0)
            used.is_open.clear()
            threads = [
                threading.Thread(target=lambda: ends.append(outcome(lambda: pub.send(LARGE))))
                for _ in range(50)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(HANG_SECS)
            assert ends == [""] * 50
            assert other.count == 1


def test_connection_over_which_nothing_is_read_is_closed(server: jetstream_server.Servers,
                                                         tmp_path: pathlib.Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server, busy_timeout_secs=1)

    async def main() -> None:
        async with persipubsub.aio.Pub() as pub:
            before = count_sockets()
            await pub.init("pub", config_pth)
            assert count_sockets() > before
            with stopped(server):
                calls = [outcome_of(pub.send(LARGE)) for _ in range(20)]
                assert await asyncio.gather(*calls) == ["UnavailableError"] * 20
                await pub.close()
                assert count_sockets() == before

    asyncio.run(asyncio.wait_for(main(), HANG_SECS))
    until_nobody_is_connected(server)


def test_connection_that_is_made_again_while_it_is_closed(server: jetstream_server.Servers,
                                                          tmp_path: pathlib.Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    connect = nats.aio.transport.TcpTransport.connect
    begun, is_late = threading.Event(), threading.Event()

    async def connect_late(*args: Any, **kwargs: Any) -> None:
        """Connect at the moment in which it is given up, as a wait of Python 3.11 may."""
        begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(HANG_SECS)
        is_late.set()
        await connect(*args, **kwargs)

    config_pth = jetstream_server.deploy(tmp_path, server)
    with open_pub(config_pth):
        monkeypatch.setattr(nats.aio.transport.TcpTransport, "connect", connect_late)
        server.servers[0].kill()
        assert begun.wait(HANG_SECS)
        server.servers[0].start()
        server.wait()
    assert is_late.is_set()
    # By now the client would have connected, if it were not over.
    monkeypatch.undo()
    with open_pub(config_pth) as pub:
        pub.send(b"hello")
    until_nobody_is_connected(server)


def test_connection_that_is_made_after_it_was_closed(server: jetstream_server.Servers,
                                                     tmp_path: pathlib.Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server)
    pub = open_pub(config_pth)

    def close_early(pipe: Connection) -> None:
        """Close what another thread opens in this process, which was forked."""
        ends: list[str] = []
        thread = threading.Thread(target=lambda: ends.append(outcome(lambda: pub.send(b"late"))))
        thread.start()
        until(lambda: any(not link._line.is_empty() for link in links()), "an attempt to connect")
        pub.close()
        pipe.send("closed")
        thread.join(HANG_SECS)
        pipe.send(ends)
        pipe.recv()

    with stopped(server):
        with Child(close_early) as child:
            assert child.get() == "closed"
            process = server.servers[0].process
            assert process is not None
            os.kill(process.pid, signal.SIGCONT)
            assert child.get() == ["ClosedError"]
            pub.close()
            until_nobody_is_connected(server)
            child.pipe.send("end")
            child.end()


class Valve:
    """Stand between clients and a server, and pass nothing on while it is shut."""

    def __init__(self, port: int) -> None:
        """
        Initialize with the valve open.

        :param port: of the server
        """
        self.is_open = threading.Event()
        self.is_open.set()
        #: After each 64 KiB, in seconds.
        self.pause = 0.0
        #: Connections that were made.
        self.count = 0
        self._server_port = port
        self._sockets: list[socket.socket] = []
        #: Bytes after which the next connections are cut.
        self.limits: list[int] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def config(self, config_pth: pathlib.Path, *others: "Valve") -> pathlib.Path:
        """Write a configuration of the same queue that leads through this valve, or others."""
        path = config_pth.with_name("valve.json")
        new = ",127.0.0.1".join(f":{valve.port}" for valve in (self, *others))
        old = f":{self._server_port}/"
        path.write_text(config_pth.read_text().replace(old, f"{new}/"))
        return path

    def cut(self) -> None:
        """End all connections, with what is under way."""
        sockets, self._sockets = self._sockets, []
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the thread that accepts."""
        self.is_open.set()
        # Wakes it; closing alone does not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                self._sockets += [client, server]
                self.count += 1
                limit = self.limits.pop() if self.limits else math.inf
                for pair in ((client, server, limit), (server, client, math.inf)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, left: float) -> None:
        with contextlib.suppress(OSError):
            while left > 0 and (data := source.recv(1 << 16)):
                self.is_open.wait()
                target.sendall(data[:int(min(left, len(data)))])
                left -= len(data)
                time.sleep(self.pause)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def test_what_a_server_did_not_read_yet_is_not_asked_again(server: jetstream_server.Servers,
                                                           tmp_path: pathlib.Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server)
    with contextlib.closing(Valve(server.servers[0].port)) as valve:
        with open_pub(valve.config(config_pth)) as pub:
            pub.send(b"before")
            before = server.servers[0].look("varz")["in_bytes"]
            ends: list[str] = []
            thread = threading.Thread(target=lambda: ends.append(outcome(lambda: pub.send(LARGE))))
            valve.is_open.clear()
            thread.start()
            # Longer than an answer is waited for.
            thread.join(3)
            assert not ends
            valve.is_open.set()
            thread.join(HANG_SECS)
            assert ends == [""]
            assert server.servers[0].look("varz")["in_bytes"] - before < 2 * len(LARGE)


def test_slow_connection_is_not_taken_for_dead(server: jetstream_server.Servers,
                                               tmp_path: pathlib.Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server, busy_timeout_secs=2)
    # The answers to pings come behind all messages.
    monkeypatch.setattr(_link, "_PING_SECS", 1)
    with contextlib.closing(Valve(server.servers[0].port)) as valve:
        with open_pub(config_pth) as pub, open_sub(valve.config(config_pth)) as sub:
            pub.send_many([bytes(5000)] * 1000)
            valve.pause = 0.1
            with sub.receive_many(1000, timeout=HANG_SECS) as msgs:
                assert len(msgs) == 1000
                valve.pause = 0.0
            assert valve.count == 1


def test_server_that_delivered_a_moment_ago_is_there(server: jetstream_server.Servers,
                                                     tmp_path: pathlib.Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server, busy_timeout_secs=2)
    ends: list[str] = []
    with contextlib.closing(Valve(server.servers[0].port)) as valve:
        with open_pub(config_pth) as pub, open_sub(valve.config(config_pth)) as sub:
            pub.send_many([bytes(5000)] * 1000)
            valve.pause = 0.1

            def receive() -> None:
                with sub.receive_many(1000, timeout=HANG_SECS) as msgs:
                    valve.is_open.set()
                    valve.pause = 0.0
                    assert msgs

            thread = threading.Thread(target=lambda: ends.append(outcome(receive)))
            thread.start()
            # Longer than servers are waited for that say nothing, and not until all is there.
            thread.join(3)
            assert not ends
            valve.is_open.clear()
            thread.join(HANG_SECS)
            assert ends == [""]


def test_what_is_lost_with_a_connection_stays_in_front(server: jetstream_server.Servers,
                                                       tmp_path: pathlib.Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server)
    rng = random.Random(choose_seed())
    is_over = threading.Event()
    ends: list[str] = []
    count = 0
    with contextlib.closing(Valve(server.servers[0].port)) as valve:
        with open_pub(valve.config(config_pth)) as pub:

            def publish() -> None:
                nonlocal count
                while not is_over.is_set():
                    pub.send_many(numbered(count + 200)[count:])
                    count += 200

            thread = threading.Thread(target=lambda: ends.append(outcome(publish)))
            thread.start()
            valve.limits = [rng.randrange(40000) for _ in range(60)]
            # Those of before have no limit.
            valve.cut()
            until(lambda: not valve.limits, "the last connection that is cut")
            is_over.set()
            thread.join(HANG_SECS)
    assert ends == [""]
    with open_sub(config_pth) as sub:
        assert drain(sub) == numbered(count)


def test_what_is_acknowledged_for_long_stays_with_its_consumer(
        server: jetstream_server.Servers, tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_acknowledging, "_AT_ONCE", 20)
    config_pth = jetstream_server.deploy(tmp_path, server, ack_wait=4)
    others: list[bytes] = []
    is_over = threading.Event()

    def receive() -> None:
        while not is_over.is_set():
            with other.receive(timeout=0.1) as msg:
                others.extend([msg] if msg is not None else [])

    with contextlib.closing(Valve(server.servers[0].port)) as valve:
        with open_pub(config_pth) as pub, open_sub(valve.config(config_pth)) as sub, \
                open_sub(config_pth) as other:
            pub.send_many(numbered(500))
            thread = threading.Thread(target=receive)
            with sub.receive_many(500, timeout=HANG_SECS) as msgs:
                assert msgs == numbered(500)
                thread.start()
                # Each of 25 parts is under way for about as long.
                valve.pause = 0.3
            valve.pause = 0.0
            is_over.set()
            thread.join(HANG_SECS)
    assert not others
    assert lags(config_pth) == {"sub": 0}
