"""Test that no message is lost with the pull that it came for, whatever comes late."""

# pylint: disable=missing-function-docstring,redefined-outer-name
# Receipts are entered and left by hand where a test needs that.
# pylint: disable=unnecessary-dunder-call

import asyncio
import contextlib
import itertools
import pathlib
import signal
import socket
import threading
from typing import Iterator, List, Set

import pytest

import persipubsub.aio
import persipubsub.control
from tests import jetstream_server
from tests.support import HANG_SECS, outcome, until, write_config
from tests.test_begun import until_waiting
from tests.test_behaviour import lags, numbered, open_pub, open_sub

pytestmark = jetstream_server.needs_server

_COUNTER = itertools.count()


@pytest.fixture(name="servers", scope="module")
def _servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[jetstream_server.Servers]:
    with jetstream_server.running(tmp_path_factory.mktemp("servers")) as servers:
        yield servers


class Slow:
    """Stand between one client and a server, and hold messages of streams back."""

    def __init__(self, port: int) -> None:
        """
        Initialize without holding anything back.

        :param port: of the server
        """
        self.is_holding = False
        self.held = []  # type: List[bytes]
        #: Subscriptions that the client ended.
        self.ended = 0
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._client = socket.socket()
        self._subscriptions = set()  # type: Set[bytes]
        # Guards what is sent to the client, and what is held back.
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def release(self) -> None:
        """Send what was held back."""
        with self._lock:
            self._release()

    def close(self) -> None:
        """End the connection and the threads."""
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(HANG_SECS)

    def _release(self) -> None:
        self.is_holding = False
        self._subscriptions.clear()
        frames, self.held = self.held, []
        self._client.sendall(b"".join(frames))

    def _serve(self) -> None:
        with self._listener.accept()[0] as self._client, \
                socket.create_connection(("127.0.0.1", self._port)) as server:
            self._threads.append(threading.Thread(target=self._pass_on, args=(server, )))
            self._threads[1].start()
            with contextlib.suppress(OSError), self._client.makefile("rb") as lines:
                for line in lines:
                    self.ended += line.startswith(b"UNSUB ")
                    server.sendall(line)
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            self._threads[1].join(HANG_SECS)

    def _pass_on(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError), server.makefile("rb") as lines:
            for line in lines:
                fields = line.split()
                if fields[0] in (b"MSG", b"HMSG"):
                    line += lines.read(int(fields[-1]) + 2)
                with self._lock:
                    if self.is_holding and fields[0] in (b"MSG", b"HMSG") and (
                            b" $JS.ACK." in line or fields[2] in self._subscriptions):
                        # What comes behind it for the same subscription stays behind it.
                        self._subscriptions.add(fields[2])
                        self.held.append(line)
                        continue
                    if b" 400 Bad Request" in line:
                        # A server may send what it had begun to send after any number of answers
                        # (PONG), but before those to later pulls, which come the same way.
                        self._release()
                    self._client.sendall(line)


def deploy(tmp_path: pathlib.Path, servers: jetstream_server.Servers) -> pathlib.Path:
    # A message that somebody forgets is never seen again by a test.
    path = servers.path("pulling{}".format(next(_COUNTER)), ack_wait=3600)
    config_pth = write_config(tmp_path, path=path, busy_timeout_secs=10)
    persipubsub.control.initialize_all_dbs(config_pth)
    return config_pth


@pytest.fixture()
def config_pth(tmp_path: pathlib.Path, servers: jetstream_server.Servers) -> pathlib.Path:
    return deploy(tmp_path, servers)


@pytest.fixture()
def slow(servers: jetstream_server.Servers) -> Iterator[Slow]:
    with contextlib.closing(Slow(servers.servers[0].port)) as slow:
        yield slow


@pytest.fixture()
def slow_pth(config_pth: pathlib.Path, tmp_path: pathlib.Path, slow: Slow,
             servers: jetstream_server.Servers) -> pathlib.Path:
    port, text = str(servers.servers[0].port), config_pth.read_text()
    slow_pth = tmp_path / "slow.json"
    slow_pth.write_text(text.replace(":{}/".format(port), ":{}/".format(slow.port)))
    return slow_pth


@pytest.mark.parametrize("is_newest", [False, True])
def test_message_that_comes_after_nobody_listens(config_pth: pathlib.Path, slow_pth: pathlib.Path,
                                                 slow: Slow, is_newest: bool) -> None:
    """A server says that it knows, and only then sends what it had begun to send."""
    with open_pub(config_pth) as pub, open_sub(slow_pth) as sub:
        take = sub.receive_to_top if is_newest else sub.receive
        ends = []  # type: List[str]
        thread = threading.Thread(
            target=lambda: ends.append(outcome(lambda: take(timeout=None).__enter__())))
        slow.is_holding = True
        thread.start()
        pub.send(b"hello")
        until(lambda: slow.held, "the message")
        sub.close()
        thread.join(HANG_SECS)
        assert (ends, slow.held) == (["ClosedError"], [])
    with open_sub(config_pth) as other, other.receive(timeout=HANG_SECS) as msg:
        assert msg == b"hello"
    assert lags(config_pth) == {"sub": 0}


def test_pull_of_what_is_there_comes_to_its_end(config_pth: pathlib.Path, slow_pth: pathlib.Path,
                                                slow: Slow) -> None:
    """Of a cluster, another server may send to a subscription that this one ended."""

    async def main() -> None:
        async with persipubsub.aio.Sub() as sub:
            await sub.init(sub_id="sub", config_pth=slow_pth)
            for _ in range(3):
                slow.is_holding = True
                task = asyncio.ensure_future(sub.receive_many(5, timeout=HANG_SECS).__aenter__())
                async with asyncio.timeout(HANG_SECS):
                    while not slow.held:
                        await asyncio.sleep(0.001)
                task.cancel()
                await asyncio.wait([task])
                slow.release()
            received = []  # type: List[bytes]
            while len(received) < 5:
                async with sub.receive_many(5, timeout=HANG_SECS) as msgs:
                    assert msgs
                    received.extend(msgs)
            assert (sorted(received), slow.ended) == (numbered(5), 0)

    with open_pub(config_pth) as pub:
        pub.send_many(numbered(5))
    asyncio.run(asyncio.wait_for(main(), 2 * HANG_SECS))
    assert lags(config_pth) == {"sub": 0}


def test_batch_that_waits_is_taken_over(config_pth: pathlib.Path, slow_pth: pathlib.Path,
                                        slow: Slow, servers: jetstream_server.Servers) -> None:
    """What comes for the pull of a task that was cancelled is for the next one that waits."""

    async def main() -> None:
        async with persipubsub.aio.Sub() as sub:
            await sub.init(sub_id="sub", config_pth=slow_pth)
            for take in (lambda: sub.receive_many(5, timeout=HANG_SECS),
                         lambda: sub.receive_to_top(timeout=HANG_SECS)):
                task = asyncio.ensure_future(take().__aenter__())
                await until_waiting(config_pth, servers, 1)
                slow.is_holding = True
                await asyncio.to_thread(pub.send_many, numbered(1))
                async with asyncio.timeout(HANG_SECS):
                    while not slow.held:
                        await asyncio.sleep(0.001)
                task.cancel()
                await asyncio.wait([task])
                receipt = take()
                entering = asyncio.ensure_future(receipt.__aenter__())
                await asyncio.sleep(0)
                slow.release()
                assert await entering in ([b"0"], b"0")
                await receipt.__aexit__(None, None, None)
            assert slow.ended == 0

    with open_pub(config_pth) as pub:
        asyncio.run(asyncio.wait_for(main(), 2 * HANG_SECS))


def test_end_of_a_subscription_that_no_server_answers(tmp_path: pathlib.Path) -> None:
    """It is forgotten, and not made anew with each connection."""
    with jetstream_server.running(tmp_path) as servers:
        config_pth = deploy(tmp_path, servers)
        process = servers.servers[0].process
        assert process is not None
        with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
            with sub.receive(timeout=0.1) as nothing:
                assert nothing is None
            # pylint: disable-next=protected-access
            client = sub._consumer._ahead.puller._stream.link._client  # type: ignore[union-attr]
            before = len(client._subs)
            process.send_signal(signal.SIGSTOP)
            try:
                for _ in range(3):
                    with sub.receive(timeout=0.1) as nothing:
                        assert nothing is None
            finally:
                process.send_signal(signal.SIGCONT)
            pub.send(b"hello")
            with sub.receive(timeout=HANG_SECS) as msg:
                assert msg == b"hello"
            until(lambda: len(client._subs) <= before, "the end of the subscriptions")
