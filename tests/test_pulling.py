"""Test that no message is lost with the pull that it came for, whatever comes late."""

# pylint: disable=missing-function-docstring,redefined-outer-name
# Receipts are entered and left by hand where a test needs that.
# pylint: disable=unnecessary-dunder-call
# pylint: disable=protected-access

import asyncio
import contextlib
import pathlib
import random
import signal
import socket
import threading
import time
import types
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import pytest

import persipubsub.aio
import persipubsub.control
import persipubsub.errors
import persipubsub.message
from persipubsub.jetstream import _inboxes, _loop, _pulling, _returns, _waiting
from tests import jetstream_server
from tests.support import HANG_SECS, Child, Connection, outcome, until
from tests.test_begun import until_waiting
from tests.test_behaviour import drain, lags, numbered, open_pub, open_sub

pytestmark = jetstream_server.needs_server


class Slow:
    """Stand between one client and a server, and hold messages of streams back."""

    def __init__(self, port: int) -> None:
        """
        Initialize without holding anything back.

        :param port: of the server
        """
        self.is_holding = False
        self.held: list[bytes] = []
        #: Subscriptions that the client ended.
        self.ended = 0
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._client: socket.socket | None = None
        self._subscriptions: set[bytes] = set()
        # Guards what is sent to the client, and what is held back.
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def config(self, config_pth: pathlib.Path) -> pathlib.Path:
        """Write a configuration of the same queue that leads through here."""
        path = config_pth.with_name("slow.json")
        old, new = f":{self._port}/", f":{self.port}/"
        path.write_text(config_pth.read_text().replace(old, new))
        return path

    def release(self, count: int | None = None) -> None:
        """Send what was held back: all of it, or the first ones, and hold back what comes then."""
        assert self._client is not None
        with self._lock:
            if count is None:
                self._release(self._client)
                return
            frames, self.held = self.held[:count], self.held[count:]
            self._subscriptions -= {frame.split()[2] for frame in frames}
            self._client.sendall(b"".join(frames))

    def close(self) -> None:
        """End the connection and the threads."""
        # Wakes the one that accepts; closing alone does not.
        self._listener.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError, AttributeError):
            self._client.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
        self._thread.join(HANG_SECS)
        self._listener.close()

    def _release(self, client: socket.socket) -> None:
        self.is_holding = False
        self._subscriptions.clear()
        frames, self.held = self.held, []
        client.sendall(b"".join(frames))

    def _serve(self) -> None:
        # Connecting may take more than one attempt.
        with contextlib.suppress(OSError):
            while True:
                with self._listener.accept()[0] as client, \
                        socket.create_connection(("127.0.0.1", self._port)) as server:
                    self._client = client
                    self._serve_one(client, server)

    def _serve_one(self, client: socket.socket, server: socket.socket) -> None:
        thread = threading.Thread(target=self._pass_on, args=(client, server), daemon=True)
        thread.start()
        with contextlib.suppress(OSError), client.makefile("rb") as lines:
            for line in lines:
                self.ended += line.startswith(b"UNSUB ")
                server.sendall(line)
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        thread.join(HANG_SECS)

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
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
                        self._release(client)
                    client.sendall(line)


@pytest.fixture()
def config_pth(tmp_path: pathlib.Path, servers: jetstream_server.Servers) -> pathlib.Path:
    return jetstream_server.deploy(tmp_path, servers)


@pytest.fixture()
def slow(servers: jetstream_server.Servers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    # What is held back is no sign of servers that are away, however long it takes to release it.
    monkeypatch.setattr(_pulling, "_ANSWER_SECS", HANG_SECS)
    monkeypatch.setattr(_pulling, "_HEARTBEAT_SECS", HANG_SECS)
    with contextlib.closing(Slow(servers.servers[0].port)) as slow:
        yield slow


@pytest.fixture()
def slow_pth(config_pth: pathlib.Path, slow: Slow) -> pathlib.Path:
    return slow.config(config_pth)


@pytest.mark.parametrize("is_newest", [False, True])
def test_message_that_comes_after_nobody_listens(config_pth: pathlib.Path, slow_pth: pathlib.Path,
                                                 slow: Slow, is_newest: bool) -> None:
    """A server says that it knows, and only then sends what it had begun to send."""
    with open_pub(config_pth) as pub, open_sub(slow_pth) as sub:
        take = sub.receive_to_top if is_newest else sub.receive
        ends: list[str] = []
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
            received: list[bytes] = []
            while len(received) < 5:
                async with sub.receive_many(5, timeout=HANG_SECS) as msgs:
                    assert msgs
                    received.extend(msgs)
            assert (sorted(received), slow.ended) == (numbered(5), 0)

    with open_pub(config_pth) as pub:
        pub.send_many(numbered(5))
    asyncio.run(asyncio.wait_for(main(), 2 * HANG_SECS))
    assert lags(config_pth) == {"sub": 0}


def test_batch_that_comes_slowly_is_in_order(tmp_path: pathlib.Path,
                                             servers: jetstream_server.Servers, slow: Slow) -> None:
    """What comes first waits for the rest for longer than half of the time that it has."""
    config_pth = jetstream_server.deploy(tmp_path, servers, ack_wait=8)
    slow_pth = slow.config(config_pth)
    found: list[persipubsub.message.Message] = []

    def receive() -> None:
        with sub.receive_many(7, timeout=HANG_SECS, details=True) as msgs:
            found.extend(msgs)

    with open_pub(config_pth) as pub, open_sub(slow_pth) as sub:
        pub.send_many(numbered(7))
        slow.is_holding = True
        thread = threading.Thread(target=receive)
        thread.start()
        until(lambda: len(slow.held) == 7, "the batch")
        for _ in range(6):
            slow.release(1)
            time.sleep(0.8)
        slow.release()
        thread.join(HANG_SECS)
        assert [one.data for one in found] == numbered(7)
        assert {one.attempts for one in found} == {1}
    assert lags(config_pth) == {"sub": 0}


def test_batch_that_is_too_late_comes_again_in_front(tmp_path: pathlib.Path,
                                                     servers: jetstream_server.Servers,
                                                     slow: Slow) -> None:
    """Nothing is heard for longer than half of the time that the first message has."""
    # The servers may come to know in time by chance.
    for index in range(3):
        directory = tmp_path / str(index)
        directory.mkdir()
        config_pth = jetstream_server.deploy(directory, servers, ack_wait=4)
        slow_pth = slow.config(config_pth)
        received: list[bytes] = []

        def receive(sub: Any, received: list[bytes]) -> None:
            while len(received) < 20:
                with sub.receive_many(7, timeout=HANG_SECS) as msgs:
                    received.extend(msgs)

        with open_pub(config_pth) as pub, open_sub(slow_pth) as sub:
            pub.send_many(numbered(20))
            slow.is_holding = True
            thread = threading.Thread(target=receive, args=(sub, received))
            thread.start()
            until(lambda: len(slow.held) == 7, "the batch")
            slow.release(1)
            time.sleep(2.5)
            slow.release()
            thread.join(HANG_SECS)
            assert received == numbered(20)


@pytest.mark.parametrize("ack_wait, kept", [(4, 7), (8, 20)])
def test_batch_stays_with_its_consumer_while_more_of_it_comes_slowly(
        tmp_path: pathlib.Path, servers: jetstream_server.Servers, slow: Slow, ack_wait: int,
        kept: int) -> None:
    """What a first pull brought waits for a second one, and that is under way for 6 seconds."""
    config_pth = jetstream_server.deploy(tmp_path, servers, ack_wait=ack_wait)
    slow_pth = slow.config(config_pth)
    ends: list[str] = []

    def receive() -> None:
        with sub.receive_many(20, timeout=HANG_SECS) as msgs:
            # Now the rest would come again that was under way for longer than ack_wait.
            time.sleep(3)
            with open_sub(config_pth) as other:
                found = drain(other)
            assert msgs == numbered(20) and not set(msgs[:kept]) & set(found)

    with open_pub(config_pth) as pub, open_sub(slow_pth) as sub:
        pub.send_many(numbered(20))
        slow.is_holding = True
        thread = threading.Thread(target=lambda: ends.append(outcome(receive)))
        thread.start()
        until(lambda: len(slow.held) == 7, "the first pull")
        slow.release(7)
        until(lambda: len(slow.held) >= 13, "the second pull")
        time.sleep(6)
        slow.release()
        thread.join(HANG_SECS)
        assert ends == [""]


def test_call_that_ends_while_slow_messages_are_kept_gives_all_of_them_back(
        tmp_path: pathlib.Path, servers: jetstream_server.Servers,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cancelled when all has come, slowly, and the servers are told that it is at work."""
    config_pth = jetstream_server.deploy(tmp_path, servers, ack_wait=8)
    take_now, keep = _waiting.Waiting.take_now, _inboxes.keep
    came: list[int] = []

    async def take_slowly(self: _waiting.Waiting, max_messages: int) -> list[_inboxes.Pulled]:
        found = await take_now(self, max_messages)
        if found:
            await asyncio.sleep(2.5)
            came.append(len(found))
        return found

    async def keep_unless_cancelled(client: Any, pulled: Sequence[_inboxes.Pulled]) -> None:
        if came:
            raise asyncio.CancelledError
        await keep(client, pulled)

    with open_pub(config_pth) as pub, open_sub(config_pth) as sub, open_sub(config_pth) as other:
        ends: list[str] = []
        thread = threading.Thread(target=lambda: ends.append(
            outcome(lambda: sub.receive_many(20, timeout=HANG_SECS).__enter__())))
        with monkeypatch.context() as context:
            context.setattr(_waiting.Waiting, "take_now", take_slowly)
            context.setattr(_inboxes, "keep", keep_unless_cancelled)
            thread.start()
            asyncio.run(until_waiting(config_pth, servers, 1))
            pub.send_many(numbered(20))
            thread.join(HANG_SECS)
        assert (ends, came) == (["ClosedError"], [19])
        # Long before ack_wait.
        assert drain(other, timeout=1) == numbered(20)


async def until_left(sub: Any, is_left: bool) -> None:
    """Wait until a pull is left to whoever waits next, or is not any more."""
    waiting = sub._sub._consumer._ahead.waiting
    await asyncio.to_thread(until, lambda: bool(waiting._left) == is_left, "the pull")


def test_batch_that_waits_is_taken_over(config_pth: pathlib.Path, slow_pth: pathlib.Path,
                                        slow: Slow, servers: jetstream_server.Servers) -> None:
    """What comes for the pull of a task that was cancelled is for the next one that waits."""

    async def main() -> None:
        async with persipubsub.aio.Sub() as sub:
            await sub.init(sub_id="sub", config_pth=slow_pth)
            for take in (lambda: sub.receive_many(5, timeout=HANG_SECS, details=True),
                         lambda: sub.receive_to_top(timeout=HANG_SECS, details=True)):
                task = asyncio.ensure_future(take().__aenter__())
                await until_waiting(config_pth, servers, 1)
                slow.is_holding = True
                await asyncio.to_thread(pub.send, b"hello")
                await asyncio.to_thread(until, lambda: slow.held, "the message")
                task.cancel()
                await asyncio.wait([task])
                await until_left(sub, True)
                receipt = take()
                entering = asyncio.ensure_future(receipt.__aenter__())
                # Somebody takes it over.
                await until_left(sub, False)
                slow.release()
                found = await entering
                one: Any = found[0] if isinstance(found, list) else found
                assert (one.data, one.attempts) == (b"hello", 1)
                await receipt.__aexit__(None, None, None)
            assert slow.ended == 0

    with open_pub(config_pth) as pub:
        asyncio.run(asyncio.wait_for(main(), 2 * HANG_SECS))


_TAKES: dict[str, Callable[[Any, float], Any]] = {
    "one": lambda sub, timeout: sub.receive(timeout=timeout),
    "many": lambda sub, timeout: sub.receive_many(3, timeout=timeout),
    "now": lambda sub, _: sub.receive(timeout=0),
    "many now": lambda sub, _: sub.receive_many(3, timeout=0),
}


@pytest.mark.parametrize("seconds", [0.0, 0.02])
@pytest.mark.parametrize(("first", "second"), [("one", "one"), ("one", "many"), ("many", "one"),
                                               ("many", "many"), ("one", "now"),
                                               ("many", "many now")])
def test_cancelling_leaves_the_order(config_pth: pathlib.Path, first: str, second: str,
                                     seconds: float) -> None:
    """In the middle of a pull of what is there, or when it waits."""
    source = random.Random(seconds)

    async def main() -> None:
        async with persipubsub.aio.Sub() as sub:
            await sub.init(sub_id="sub", config_pth=config_pth)
            for _ in range(15 if seconds else 40):
                if not seconds:
                    await asyncio.to_thread(pub.send_many, numbered(6))
                receipts = [_TAKES[first](sub, HANG_SECS) for _ in range(3 if seconds else 1)]
                tasks = [asyncio.ensure_future(receipt.__aenter__()) for receipt in receipts]
                await asyncio.sleep(seconds or source.uniform(0, 0.0006))
                for task, receipt in zip(tasks, receipts):
                    task.cancel()
                    await asyncio.wait([task])
                    if not task.cancelled():
                        # It was faster. An error gives the messages back.
                        await receipt.__aexit__(KeyError, KeyError(), None)
                sending = asyncio.ensure_future(
                    asyncio.to_thread(pub.send_many,
                                      numbered(6) if seconds else []))
                received: list[bytes] = []
                while len(received) < 6:
                    async with _TAKES[second](sub, HANG_SECS) as found:
                        received.extend(
                            found if isinstance(found, list) else [found] if found else [])
                await sending
                assert received == numbered(6)

    with open_pub(config_pth) as pub:
        asyncio.run(asyncio.wait_for(main(), 2 * HANG_SECS))


def test_what_comes_for_several_that_were_left(config_pth: pathlib.Path, slow_pth: pathlib.Path,
                                               slow: Slow,
                                               servers: jetstream_server.Servers) -> None:
    """Two of three messages come together, and the third one after they were given back."""

    async def main() -> None:
        async with persipubsub.aio.Sub() as sub:
            await sub.init(sub_id="sub", config_pth=slow_pth)
            tasks = [
                asyncio.ensure_future(sub.receive(timeout=None).__aenter__()) for _ in range(3)
            ]
            await until_waiting(config_pth, servers, 3)
            slow.is_holding = True
            await asyncio.to_thread(pub.send_many, numbered(3))
            await asyncio.to_thread(until, lambda: len(slow.held) == 3, "the messages")
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await until_left(sub, True)
            slow.release(2)
            returns = sub._sub._consumer._ahead.puller.returns  # type: ignore[union-attr]
            await asyncio.to_thread(until, lambda: len(returns.given) > 1, "their giving back")
            slow.release()
            received: list[bytes] = []
            while len(received) < 3:
                async with sub.receive(timeout=0) as found:
                    received.extend([found] if found else [])
            assert (received, slow.ended) == (numbered(3), 0)

    with open_pub(config_pth) as pub:
        asyncio.run(asyncio.wait_for(main(), 2 * HANG_SECS))
    assert lags(config_pth) == {"sub": 0}


def until_pulling(sub: Any) -> None:
    until(lambda: sub._consumer._ahead and sub._consumer._ahead.puller._pulls, "a pull")


def _receive_for_ever(sub: Any, received: list[bytes | None]) -> None:
    """Note the message when it is received, and once more when it is acknowledged."""
    with contextlib.suppress(persipubsub.errors.ClosedError):
        with sub.receive(timeout=None) as msg:
            received.append(msg)
        received.append(msg)


def test_message_that_comes_while_its_receiver_is_closed(config_pth: pathlib.Path) -> None:
    """It is with another one at once, whether it was received or not."""
    source = random.Random(7)
    with open_pub(config_pth) as pub:
        for _ in range(60):
            with open_sub(config_pth) as sub:
                received: list[bytes | None] = []
                thread = threading.Thread(target=_receive_for_ever, args=(sub, received))
                thread.start()
                until_pulling(sub)
                closing = threading.Timer(source.uniform(0, 0.0012), sub.close)
                closing.start()
                pub.send(b"hello")
                closing.join(HANG_SECS)
                thread.join(HANG_SECS)
            if len(received) < 2:
                with open_sub(config_pth) as other, other.receive(timeout=HANG_SECS) as msg:
                    assert msg == b"hello"
    assert lags(config_pth) == {"sub": 0}


def test_message_that_comes_at_each_step_of_closing(config_pth: pathlib.Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    really_take = _inboxes.Inbox._take
    closings: list[Callable[[], Coroutine[Any, Any, None]]] = []

    async def take(inbox: _inboxes.Inbox, message: Any) -> None:
        await really_take(inbox, message)
        if message.reply and closings:
            _loop.current().start(closings.pop()())

    monkeypatch.setattr(_inboxes.Inbox, "_take", take)
    with open_pub(config_pth) as pub:
        for steps in range(10):
            sub = open_sub(config_pth)
            engine = sub._consumer.calls  # type: ignore[union-attr]

            async def close(steps: int = steps, engine: Any = engine) -> None:
                for _ in range(steps):
                    await asyncio.sleep(0)
                engine._is_closed = True
                await engine._close(engine._ports)

            def receive(sub: Any = sub) -> None:
                with contextlib.suppress(persipubsub.errors.ClosedError):
                    with sub.receive(timeout=None):
                        pass

            closings.append(close)
            thread = threading.Thread(target=receive)
            thread.start()
            until_pulling(sub)
            pub.send(b"hello")
            thread.join(HANG_SECS)
            until(lambda: not closings, "the end of the queue")
            if lags(config_pth)["sub"]:
                with open_sub(config_pth) as other, other.receive(timeout=HANG_SECS) as msg:
                    assert msg == b"hello"


def test_pull_that_is_done_comes_first() -> None:
    """Its place in the line is over, but what it brought is in front of what others bring."""

    async def bring(number: int) -> list[_inboxes.Pulled]:
        return [_inboxes.to_pulled(b"", f"$JS.ACK.Q.sub.1.{number}.1.1.0")]

    async def fail() -> list[_inboxes.Pulled]:
        raise KeyError

    async def main() -> None:
        stream: Any = types.SimpleNamespace(name="Q", link=None)
        puller: Any = _pulling.Puller(stream, None, "sub")  # type: ignore[arg-type]
        waiting = _waiting.Waiting(puller)
        tasks = [asyncio.ensure_future(one) for one in (bring(8), fail(), bring(7))]
        await asyncio.wait(tasks)
        tasks += [asyncio.ensure_future(asyncio.sleep(HANG_SECS, [])) for _ in range(3)]
        puller._pulls.update({tasks[4]: 1, tasks[3]: 2})
        found = sorted(tasks, key=waiting._place)
        assert found[:4] == [tasks[2], tasks[0], tasks[4], tasks[3]]
        assert tasks[1].exception() is not None

    asyncio.run(main())


def test_first_delivery_comes_behind_what_was_given_back_before_it_was_asked_for() -> None:
    returns = _returns.Returns(None, None)  # type: ignore[arg-type]
    returns.given = {1: 5.0, 2: 7.0, 3: 8.0}
    pulled = _inboxes.Pulled(b"", "", 9, 1, 0, 0.0, 0)
    returns.note(pulled, asked=6.0)
    assert [*returns.given] == [2, 3]
    returns.note(pulled._replace(number=2, attempts=2), asked=6.0)
    assert [*returns.given] == [3]


def test_what_is_given_back_when_the_last_was(config_pth: pathlib.Path) -> None:
    """In the step in which that ends."""
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(2))
        with sub.receive(timeout=HANG_SECS), sub.receive(timeout=HANG_SECS):
            puller = sub._consumer._ahead.puller  # type: ignore[union-attr]
            pulled = [lease.pulled for lease in sub._consumer.leases]  # type: ignore[union-attr]

            async def give_back() -> None:
                puller.returns.give_back(pulled[0])
                puller.returns._giver.add_done_callback(
                    lambda _: puller.returns.give_back(pulled[1]))
                await puller.returns._giver
                await puller.returns.settle()

            _loop.current().call(give_back)
            with open_sub(config_pth) as other:
                assert {*drain(other, timeout=1)} == {*numbered(2)}


def test_child_does_not_wait_for_what_its_parent_takes(config_pth: pathlib.Path) -> None:
    with open_sub(config_pth) as sub:
        takes = sub._consumer._takes  # type: ignore[union-attr]

        def count(pipe: Connection) -> None:
            with sub.receive(timeout=0.1) as nothing:
                pipe.send(nothing)

            async def count_own() -> int:
                return len(takes._own())

            pipe.send((len(takes._tasks), _loop.current().call(count_own)))

        thread = threading.Thread(target=_receive_for_ever, args=(sub, []))
        thread.start()
        until_pulling(sub)
        with Child(count) as child:
            assert child.get() is None
            assert child.get() == (1, 0)
            child.end()
        sub.close()
        thread.join(HANG_SECS)


def test_end_of_a_subscription_that_no_server_answers(tmp_path: pathlib.Path) -> None:
    """It is forgotten, and not made anew with each connection."""
    with jetstream_server.running(tmp_path) as servers:
        config_pth = jetstream_server.deploy(tmp_path, servers)
        process = servers.servers[0].process
        assert process is not None
        with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
            with sub.receive(timeout=0.1) as nothing:
                assert nothing is None
            client = sub._consumer._ahead.puller._stream.link._client  # type: ignore[union-attr]
            # With one of the client for answers, which it makes when it asks for the first time.
            before = len(client._subs) + 1
            process.send_signal(signal.SIGSTOP)
            try:
                for _ in range(4):
                    with sub.receive(timeout=0.1) as nothing:
                        assert nothing is None
            finally:
                process.send_signal(signal.SIGCONT)
            pub.send(b"hello")
            with sub.receive(timeout=HANG_SECS) as msg:
                assert msg == b"hello"
            until(lambda: len(client._subs) <= before, "the end of the subscriptions")


def test_subscription_of_a_connection_that_is_lost(tmp_path: pathlib.Path) -> None:
    """It is used again, or forgotten."""
    with jetstream_server.running(tmp_path) as servers:
        config_pth = jetstream_server.deploy(tmp_path, servers)
        with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
            with sub.receive(timeout=0.1) as nothing:
                assert nothing is None
            puller = sub._consumer._ahead.puller  # type: ignore[union-attr]
            client = puller._stream.link._client
            # With one of the client for answers, which it makes when it asks for the first time.
            before = len(client._subs) + 1
            for _ in range(3):
                thread = threading.Thread(target=lambda: sub.receive(timeout=2).__enter__())
                thread.start()
                until(lambda: puller._pulls, "a pull")
                servers.servers[0].kill()
                thread.join(HANG_SECS)
                servers.servers[0].start()
                servers.wait()
            pub.send(b"hello")
            with sub.receive(timeout=HANG_SECS) as msg:
                assert msg == b"hello"
            until(lambda: len(client._subs) <= before, "the end of the subscriptions")


@pytest.mark.parametrize("kind", ["many", "pop", "top"])
def test_more_than_a_connection_bears(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
                                      kind: str) -> None:
    """A server drops a connection with what was delivered over it."""
    monkeypatch.setattr(_pulling, "_MOST_BYTES", (1 << 20) - 3)
    with jetstream_server.running(tmp_path, lines=["max_pending: 3000000"]) as servers:
        config_pth = jetstream_server.deploy(tmp_path, servers, HWM_LMDB_SIZE_BYTES=1 << 26)
        sent = [b"%03d" % number + bytes(250_000) for number in range(80)]
        with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
            for message in sent:
                pub.send(message)
            received: list[bytes] = []
            if kind == "many":
                while len(received) < len(sent):
                    with sub.receive_many(1000, timeout=HANG_SECS) as msgs:
                        assert 0 < sum(map(len, msgs)) < (16 << 20) + 300_000
                        received.extend(msgs)
                assert received == sent
            elif kind == "pop":
                sub.pop_to_top()
                assert lags(config_pth) == {"sub": 1}
                assert drain(sub) == sent[-1:]
            else:
                with sub.receive_to_top(timeout=HANG_SECS) as msg:
                    assert msg == sent[-1]
            assert lags(config_pth) == {"sub": 0}


def test_large_batches_come_again_in_order(config_pth: pathlib.Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that does not fit is not put behind others, and one that never fits comes."""
    monkeypatch.setattr(_pulling, "_MOST_BYTES", 300_007)
    sizes = [10, 290_000, 20, 30, 200_000, 150_000, 400_000, 40, 500_000, 50]
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        sent = [b"%03d" % number + bytes(sizes[number % 10]) for number in range(40)]
        for message in sent:
            pub.send(message)
        for _ in range(3):
            with contextlib.suppress(KeyError), sub.receive_many(25, timeout=HANG_SECS) as msgs:
                assert msgs == sent[:25]
                raise KeyError
        for first in range(0, 40, 10):
            with sub.receive_many(10, timeout=HANG_SECS) as msgs:
                assert msgs == sent[first:first + 10]
    assert lags(config_pth) == {"sub": 0}


def test_more_tasks_than_pulls(config_pth: pathlib.Path, servers: jetstream_server.Servers,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait in line, and are not forgotten when the queue is closed."""
    monkeypatch.setattr(_waiting, "_MOST_PULLS", 4)

    async def receive(sub: persipubsub.aio.Sub, timeout: float | None) -> bytes | None:
        async with sub.receive(timeout=timeout) as msg:
            return msg

    async def main() -> None:
        async with persipubsub.aio.Sub() as sub:
            await sub.init(sub_id="sub", config_pth=config_pth)
            tasks = [asyncio.ensure_future(receive(sub, HANG_SECS)) for _ in range(20)]
            await until_waiting(config_pth, servers, 4)
            assert await receive(sub, 0.1) is None
            await asyncio.to_thread(pub.send_many, numbered(20))
            assert sorted([await task for task in tasks], key=lambda msg: int(msg or -1)) == \
                numbered(20)
            tasks = [asyncio.ensure_future(receive(sub, None)) for _ in range(20)]
            await until_waiting(config_pth, servers, 4)
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(found, persipubsub.errors.ClosedError)

    with open_pub(config_pth) as pub:
        asyncio.run(asyncio.wait_for(main(), 2 * HANG_SECS))
    assert lags(config_pth) == {"sub": 0}
