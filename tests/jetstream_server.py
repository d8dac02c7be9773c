"""
Start and end real servers of NATS with JetStream, on free ports of the loopback address.

:py:class:`Proxy` stands between clients and a server, and makes connections slow, silent or short.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from persipubsub import control
from tests.support import until, write_config

#: Another version than the installed one: PERSIPUBSUB_NATS_SERVER is the path of its program.
_PROGRAM = os.environ.get("PERSIPUBSUB_NATS_SERVER") or shutil.which(
    "nats-server", path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin")

#: What somebody forgets is never seen again by a test.
FOR_EVER_SECS: Final = 3600

# Of queues, which the tests of a process call by different names.
_COUNTER = itertools.count()

#: For whole modules: without a server, they can not be run.
needs_server = pytest.mark.skipif(_PROGRAM is None,
                                  reason="nats-server is missing: apt install nats-server")


def free_ports(count: int) -> list[int]:
    ports: list[int] = []
    # Below those that the system gives to connections, which could take one before it is used.
    for port in random.SystemRandom().sample(range(10000, 32768), 1000):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise AssertionError(f"Expected {count} free ports, but got: {len(ports)}")


class Server:
    """Be one server, which can be killed and started again with the same store."""

    def __init__(self, directory: Path, name: str, ports: Sequence[int],
                 lines: Sequence[str]) -> None:
        self.name = name
        self.port, self.monitor_port = ports
        self._log = directory / f"{name}.log"
        self._config = directory / f"{name}.conf"
        self._config.write_text("\n".join([
            f'server_name: "{name}"', 'host: "127.0.0.1"', f"port: {self.port}",
            f'http: "127.0.0.1:{self.monitor_port}"', *lines
        ]))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Server":
        """Start the process, and do not wait until it is ready."""
        assert _PROGRAM is not None
        with self._log.open("ab") as log:
            self.process = subprocess.Popen([_PROGRAM, "-c", str(self._config)],
                                            stdout=log,
                                            stderr=log,
                                            stdin=subprocess.DEVNULL)
        return self

    def kill(self, number: int = signal.SIGKILL) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(number)
            process.wait(timeout=30)

    def look(self, page: str) -> dict[str, Any]:
        try:
            url = f"http://127.0.0.1:{self.monitor_port}/{page}"
            # One that is not there refuses at once, and one that is busy takes its time.
            with urllib.request.urlopen(url, timeout=10) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except (OSError, ValueError):
            return {}

    def is_ready(self) -> bool:
        assert self.process is not None and self.process.poll() is None, self._log.read_text()
        return bool(self.look("healthz").get("status") == "ok")

    def peers(self) -> list[dict[str, Any]]:
        return list(self.look("jsz").get("meta_cluster", {}).get("replicas") or [])


class Servers:

    def __init__(self, servers: list[Server]) -> None:
        self.servers = servers

    def path(self, stream: str, **options: object) -> str:
        query = "&".join(f"{name}={value}" for name, value in options.items())
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in self.servers)
        return f"nats://{hosts}/{stream}" + (f"?{query}" if query else "")

    def wait(self) -> None:
        until(lambda: all(server.is_ready() for server in self.servers), "the servers")

    def leader(self, stream: str) -> Server | None:
        for server in self.servers:
            for account in server.look("jsz?streams=1").get("account_details") or []:
                for one in account.get("stream_detail") or []:
                    name = (one.get("cluster") or {}).get("leader")
                    if one["name"] == stream and name:
                        return next(other for other in self.servers if other.name == name)
        return None


@contextlib.contextmanager
def running(directory: Path,
            nodes: int = 1,
            lines: Sequence[str] = (),
            jetstream: Sequence[str] = ()) -> Iterator[Servers]:
    ports = free_ports(3 * nodes)
    servers = []
    for index in range(nodes):
        name = f"node{index}"
        own = list(lines)
        if list(jetstream) != ["off"]:
            own += [
                "jetstream {", f'  store_dir: "{directory / name}"',
                *(f"  {line}" for line in jetstream), "}"
            ]
        if nodes > 1:
            # With a route to itself: by the number of routes, a server knows how many there are to
            # be. Two of three that find each other first would be a cluster of two otherwise.
            own.append(
                "cluster {{ name: tests, listen: 127.0.0.1:{}, pool_size: -1, routes: [{}] }}".
                format(ports[2 * nodes + index],
                       ", ".join(f"nats://127.0.0.1:{port}" for port in ports[2 * nodes:])))
        servers.append(Server(directory, name, ports[2 * index:2 * index + 2], own))
    cluster = Servers(servers)
    try:
        until(lambda: _start_together(directory, servers), "servers that know of each other")
        yield cluster
    finally:
        for server in servers:
            server.kill()


def _start_together(directory: Path, servers: list[Server]) -> bool:
    """Start servers, and wait until they are ready."""
    for server in servers:
        # One after the other: servers that find each other at the same moment were seen to lose one
        # of them for good.
        server.start()
        wait_for_port(server)
    # It takes half a second, or, once in hundreds of times, for ever.
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        # The leader takes new streams only when it knows of its peers; only it tells them.
        if all(server.is_ready() for server in servers) and (len(servers) == 1 or any(
                len(server.peers()) == len(servers) - 1 for server in servers)):
            return True
        time.sleep(0.001)
    for server in servers:
        server.kill()
        shutil.rmtree(directory / server.name, ignore_errors=True)
    return False


def deploy(directory: Path,
           servers: Servers,
           ack_wait: float = FOR_EVER_SECS,
           **changes: Any) -> Path:
    path = servers.path(f"queue{next(_COUNTER)}", ack_wait=ack_wait)
    return create(directory, path=path, **{"busy_timeout_secs": 10, **changes})


def create(directory: Path, **described: Any) -> Path:
    """Create a queue, however soon those who use it give up."""
    patient = {**described, "busy_timeout_secs": 30}
    control.initialize_all_dbs(write_config(directory, **patient))
    return write_config(directory, **described)


def wait_for_port(server: Server) -> None:
    """Wait until a server takes connections, whatever else is wrong with it."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), 1):
            return
        time.sleep(0.01)
    raise AssertionError(f"Expected a server at port {server.port}")


def ask(port: int, verb: str, **body: Any) -> dict[str, Any]:
    """Ask the API of JetStream, behind the library's back."""
    # Not at the top: whole modules of tests are imported where the extra is not installed.
    import nats  # pylint: disable=import-outside-toplevel

    async def work() -> dict[str, Any]:
        client = await nats.connect(f"nats://127.0.0.1:{port}")
        answer = await client.request(f"$JS.API.{verb}", json.dumps(body).encode(), timeout=10)
        await client.close()
        found: dict[str, Any] = json.loads(answer.data)
        assert "error" not in found, found
        return found

    return asyncio.run(work())


@contextlib.contextmanager
def stopped(server: Server) -> Iterator[None]:
    """Stop a server as long as the ``with`` block: it reads nothing, and closes nothing."""
    process = server.process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    # Its threads stop one after the other.
    tasks = Path(f"/proc/{process.pid}/task")
    until(
        lambda: all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T"
                    for task in tasks.iterdir()), "all threads to stop")
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


class Proxy:
    """Stand between clients and a server."""

    def __init__(self, port: int) -> None:
        #: Cleared while nothing is passed on.
        self.is_open = threading.Event()
        self.is_open.set()
        #: After each 64 KiB, in seconds.
        self.pause = 0.0
        #: Connections that were made, and how many of the next are reset in their beginning.
        self.count = 0
        self.resets = 0
        #: Bytes from a client after which the next connections are cut, the last one first.
        self.limits: list[int] = []
        self._server_port = port
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def config(self, config_pth: Path, *others: "Proxy") -> Path:
        """Write a configuration of the same queue that leads through this proxy, or others."""
        path = config_pth.with_name("proxy.json")
        new = ",127.0.0.1".join(f":{proxy.port}" for proxy in (self, *others))
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
        self.is_open.set()
        # Wakes it; closing alone does not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.count += 1
                server = socket.create_connection(("127.0.0.1", self._server_port))
                if self.resets:
                    self.resets -= 1
                    with contextlib.suppress(ConnectionError):
                        client.sendall(server.recv(1 << 16))
                        client.recv(1)
                    # Without lingering, closing resets.
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    client.close()
                    server.close()
                    continue
                self._sockets += [client, server]
                limit = self.limits.pop() if self.limits else float("inf")
                for pair in ((client, server, limit), (server, client, float("inf"))):
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
