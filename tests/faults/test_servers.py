"""
Let a server die, forget, stand still, or be reached over a bad connection.

:py:mod:`tests.faults.test_cluster` kills the servers of a cluster.
"""

import contextlib
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from persipubsub import config, control, errors
from persipubsub.jetstream import engine
from tests import jetstream_server
from tests.faults import tracing
from tests.support import HANG_SECS, Child, Connection, outcome, until, write_config
from tests.test_behaviour import drain, numbered, open_pub, open_sub

pytestmark = [jetstream_server.needs_server, pytest.mark.slow, pytest.mark.timeout(180)]

LARGE: Final = bytes(900_000)


@pytest.fixture(name="server")
def _server(tmp_path: Path) -> Iterator[jetstream_server.Servers]:
    with jetstream_server.running(tmp_path) as servers:
        yield servers


@contextlib.contextmanager
def proxy(servers: jetstream_server.Servers) -> Iterator[jetstream_server.Proxy]:
    with contextlib.closing(jetstream_server.Proxy(servers.servers[0].port)) as one:
        yield one


def open_queue(config_pth: Path) -> engine.Queue:
    return engine.open_queue(config.read(config_pth), "queue")


class Calls:
    """Make calls in threads, and collect how they end."""

    def __init__(self, function: Callable[[], Any], count: int = 1) -> None:
        self.ends: list[str] = []
        self._threads = [
            threading.Thread(target=lambda: self.ends.append(outcome(function)))
            for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def join(self, seconds: float = HANG_SECS) -> list[str]:
        """Wait until they end, but not longer than that."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return self.ends


# Servers that die


def test_server_that_dies_and_comes_back(server: jetstream_server.Servers, tmp_path: Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server, busy_timeout_secs=1.5)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send(b"before")
        server.servers[0].kill()

        def receive() -> None:
            with sub.receive(timeout=HANG_SECS):
                pass

        # Nobody waits for the others.
        calls = [
            Calls(lambda: pub.send(b"lost"), 20),
            Calls(lambda: pub.send_many([b"lost"] * 2), 20),
            Calls(receive, 5),
            Calls(sub.front)
        ]
        for one in calls:
            assert set(one.join(HANG_SECS / 4)) == {"UnavailableError"}
        assert outcome(lambda: open_pub(config_pth)) == "UnavailableError"
        # A call that receives in a loop does not fail for a moment without servers.
        assert not drain(sub, timeout=0.2)
        server.servers[0].start()
        server.wait()
        pub.send(b"after")
        received = drain(sub, timeout=2)
    assert [one for one in received if one != b"lost"] == [b"before", b"after"]


def test_closing_while_a_server_is_away(server: jetstream_server.Servers, tmp_path: Path) -> None:
    """That the messages at work can not be given back is no reason to let others wait."""
    config_pth = jetstream_server.deploy(tmp_path, server)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(6))
        taken = [sub.receive(timeout=HANG_SECS) for _ in range(6)]
        # pylint: disable-next=unnecessary-dunder-call
        assert [one.__enter__() for one in taken] == numbered(6)

        def receive() -> None:
            with sub.receive(timeout=None):
                pass

        calls = Calls(receive)
        server.servers[0].kill()
        begin = time.monotonic()
        sub.close()
        assert time.monotonic() - begin < HANG_SECS / 10
        assert calls.join() == ["ClosedError"]


@contextlib.contextmanager
def forgetting(servers: jetstream_server.Servers, store: Path) -> Iterator[None]:
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
def test_server_that_forgot_its_deliveries(server: jetstream_server.Servers, tmp_path: Path,
                                           is_worked_on: bool) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server, busy_timeout_secs=15)
    with open_pub(config_pth) as pub:
        pub.send_many(numbered(7))
    with open_queue(config_pth) as one, open_queue(config_pth) as other:
        with forgetting(server, tmp_path / "node0"):
            first = one.consumer("sub").take(timeout=HANG_SECS, max_messages=2)
            second = other.consumer("sub").take(timeout=HANG_SECS, max_messages=3)
        assert first is not None and first.messages == numbered(7)[:2]
        assert second is not None and second.messages == numbered(7)[2:5]
        if not is_worked_on:
            first.nack()
        # Nobody pulls, and it would ignore them for ever.
        second.ack()
        if is_worked_on:
            first.ack()
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
            rest.ack()
        assert sorted(received) == expected
        assert one.statistics().messages == 0


def test_acknowledging_what_a_server_lost(server: jetstream_server.Servers, tmp_path: Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server, busy_timeout_secs=2)
    with open_queue(config_pth) as queue, open_pub(config_pth) as pub:
        with forgetting(server, tmp_path / "node0"):
            pub.send(b"lost")
            lease = queue.consumer("sub").take(timeout=HANG_SECS)
        assert lease is not None
        assert outcome(lease.ack) == "UnavailableError"
        pub.send(b"later")
        with open_sub(config_pth) as sub:
            assert drain(sub, timeout=2) == [b"later"]


def test_acknowledgement_of_a_removed_subscriber(server: jetstream_server.Servers,
                                                 tmp_path: Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server)
    with open_queue(config_pth) as queue:
        queue.put([b"hello"])
        lease = queue.consumer("sub").take(timeout=HANG_SECS)
        assert lease is not None
        control.remove_subscriber(config.read(config_pth), "queue", "sub")
        begin = time.monotonic()
        assert outcome(lease.ack) == "NotInitializedError"
        assert outcome(lambda: queue.consumer("sub")) == "NotInitializedError"
        assert time.monotonic() - begin < 8


# Servers that stand still


def test_calls_end_while_a_server_stands_still(server: jetstream_server.Servers,
                                               tmp_path: Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server, busy_timeout_secs=2)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send(b"")
        assert drain(sub) == [b""]
        with jetstream_server.stopped(server.servers[0]):
            calls = Calls(lambda: pub.send(LARGE), 50)
            time.sleep(0.5)
            assert not drain(sub, timeout=0.5)
            assert calls.join(HANG_SECS / 4) == ["UnavailableError"] * 50
            begin = time.monotonic()
            pub.close()
            assert time.monotonic() - begin < HANG_SECS / 10
    until(lambda: server.servers[0].look("connz").get("connections") == [], "the last connection")
    with open_pub(config_pth) as pub:
        assert outcome(lambda: pub.send(b"again")) == ""


@pytest.fixture(name="impatient")
def fixture_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a silent connection up sooner than users want it."""
    monkeypatch.setattr("persipubsub.jetstream.connection._SILENCE_SECS", 4.0)
    monkeypatch.setattr("persipubsub.jetstream.connection._PING_SECS", 1.0)


@pytest.mark.usefixtures("impatient")
def test_server_that_reads_nothing_is_left_for_another_one(server: jetstream_server.Servers,
                                                           tmp_path: Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server, busy_timeout_secs=HANG_SECS / 2)
    with proxy(server) as used, proxy(server) as other:
        with open_pub(used.config(config_pth, other)) as pub:
            pub.send(b"")
            # One of them is chosen at random.
            used, other = (used, other) if used.count else (other, used)
            assert (used.count, other.count) == (1, 0)
            used.is_open.clear()
            assert Calls(lambda: pub.send(LARGE), 20).join() == [""] * 20
            assert other.count == 1


def test_message_that_can_not_be_acknowledged_comes_again(server: jetstream_server.Servers,
                                                          tmp_path: Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server, ack_wait=1.5, busy_timeout_secs=1)
    with open_queue(config_pth) as queue:
        queue.put([b"hello"])
        lease = queue.consumer("sub").take(timeout=HANG_SECS)
        assert lease is not None
        with jetstream_server.stopped(server.servers[0]):
            assert outcome(lease.ack) == "UnavailableError"
        # Or what the server reads at last is the acknowledgement.
        with open_sub(config_pth) as sub:
            assert drain(sub, timeout=3) in ([b"hello"], [])
        assert queue.statistics().subscribers[0].lag == 0


# Bad connections


def test_connections_that_are_reset_while_they_are_made(server: jetstream_server.Servers,
                                                        tmp_path: Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server)
    with proxy(server) as between:
        between.resets = 20
        proxy_pth = between.config(config_pth)
        with open_pub(proxy_pth) as pub, open_sub(proxy_pth) as sub:
            pub.send(b"hello")
            assert drain(sub, timeout=2) == [b"hello"]
        assert between.count > 20


@pytest.mark.parametrize("has_ids", [True, False])
def test_batch_whose_beginning_was_stored(server: jetstream_server.Servers, tmp_path: Path,
                                          has_ids: bool) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server)
    messages = [b"%03d" % number + bytes(1000) for number in range(100)]
    ids = [message[:3] for message in messages] if has_ids else None
    with proxy(server) as between:
        text = between.config(config_pth).read_text()
        hasty_pth = tmp_path / "hasty.json"
        hasty_pth.write_text(text.replace('"busy_timeout_secs": 10', '"busy_timeout_secs": 1'))
        with open_queue(hasty_pth) as queue:
            queue.consumer("sub")
            between.limits = [0] * 1000 + [50000]
            between.cut()
            assert outcome(lambda: queue.put(messages, msg_ids=ids)) == "UnavailableError"
    with open_queue(config_pth) as queue, open_sub(config_pth) as sub:
        stored = queue.statistics().messages
        assert 0 < stored < 100
        # With ids that are the program's own it is completed, and otherwise sent anew.
        first = queue.put(messages, msg_ids=ids)
        assert first == (1 if has_ids else stored + 1)
        assert drain(sub, timeout=2) == ([] if has_ids else messages[:stored]) + messages


def test_what_a_server_did_not_read_yet_is_not_sent_again(server: jetstream_server.Servers,
                                                          tmp_path: Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server)
    with proxy(server) as between, open_pub(between.config(config_pth)) as pub:
        pub.send(b"before")
        before = server.servers[0].look("varz")["in_bytes"]
        between.is_open.clear()
        calls = Calls(lambda: pub.send(LARGE))
        # Longer than an answer is waited for.
        assert not calls.join(3)
        between.is_open.set()
        assert calls.join() == [""]
        assert server.servers[0].look("varz")["in_bytes"] - before < 2.5 * len(LARGE)


@pytest.mark.usefixtures("impatient")
def test_slow_connection_is_not_taken_for_dead(server: jetstream_server.Servers,
                                               tmp_path: Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server, busy_timeout_secs=2)
    with proxy(server) as between, open_pub(config_pth) as pub:
        with open_sub(between.config(config_pth)) as sub:
            pub.send_many([bytes(5000)] * 800)
            between.pause = 0.1
            received = 0
            # It takes longer than a silent connection is kept.
            while received < 800:
                with sub.receive_many(800, timeout=HANG_SECS) as msgs:
                    assert set(msgs) == {bytes(5000)}
                    received += len(msgs)
            assert (received, between.count) == (800, 1)
            between.pause = 0.0


def test_batch_that_comes_slowly_stays_with_its_consumer(server: jetstream_server.Servers,
                                                         tmp_path: Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server, ack_wait=6)
    is_over = threading.Event()
    others: list[bytes] = []

    def receive() -> None:
        with open_sub(config_pth) as other:
            while not is_over.is_set():
                others.extend(drain(other, timeout=0.1))

    with proxy(server) as between, open_pub(config_pth) as pub:
        with open_sub(between.config(config_pth)) as sub:
            pub.send_many([b"%04d" % number + bytes(5000) for number in range(400)])
            between.pause = 0.1
            with sub.receive_many(400, timeout=HANG_SECS) as msgs:
                count = len(msgs)
                calls = Calls(receive)
                # Longer than ack_wait.
                time.sleep(7)
            between.pause = 0.0
            assert [int(msg[:4]) for msg in msgs] == list(range(count))
            until(lambda: len(others) >= 400 - count, "the rest")
            is_over.set()
            assert calls.join() == [""]
    assert sorted(int(msg[:4]) for msg in others) == list(range(count, 400))


def test_what_is_lost_with_a_connection_stays_in_front(server: jetstream_server.Servers,
                                                       tmp_path: Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server, busy_timeout_secs=HANG_SECS / 2)
    rng = random.Random(tracing.seed())
    is_over = threading.Event()
    count = 0
    with proxy(server) as between, open_pub(between.config(config_pth)) as pub:

        def publish() -> None:
            nonlocal count
            while not is_over.is_set():
                pub.send_many(numbered(count + 200)[count:])
                count += 200

        calls = Calls(publish)
        between.limits = [rng.randrange(40000) for _ in range(20)]
        # Those of before have no limit.
        between.cut()
        until(lambda: not between.limits, "the last connection that is cut")
        is_over.set()
        assert calls.join() == [""]
    with open_sub(config_pth) as sub:
        assert drain(sub) == numbered(count)


def test_connections_that_are_cut_lose_nothing_of_subscribers(server: jetstream_server.Servers,
                                                              tmp_path: Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server, ack_wait=1)
    rng = random.Random(tracing.seed())
    received: list[bytes] = []
    with proxy(server) as between, open_pub(config_pth) as pub:
        with open_sub(between.config(config_pth)) as sub:
            pub.send_many(numbered(2000))

            def receive() -> None:
                while len(set(received)) < 2000:
                    with contextlib.suppress(errors.UnavailableError):
                        with sub.receive_many(rng.choice((1, 7)), timeout=0.5) as msgs:
                            received.extend(msgs)

            calls = Calls(receive)
            for _ in range(20):
                time.sleep(rng.random() * 0.2)
                between.cut()
            assert calls.join() == [""]
    assert set(received) == set(numbered(2000))


def test_thousands_of_acknowledgements_are_not_repeated(server: jetstream_server.Servers,
                                                        tmp_path: Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(5000))
        with sub.receive_many(5000, timeout=HANG_SECS) as msgs:
            assert msgs == numbered(5000)
            before = server.servers[0].look("varz")["in_msgs"]
        assert server.servers[0].look("varz")["in_msgs"] - before < 5200
        assert not drain(sub)


def test_batches_larger_than_a_connection_bears(tmp_path: Path) -> None:
    with jetstream_server.running(tmp_path, lines=["max_pending: 12MB"]) as server:
        config_pth = jetstream_server.deploy(tmp_path, server)
        with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
            messages = [b"%02d" % number + LARGE for number in range(40)]
            pub.send_many(messages)
            received: list[bytes] = []
            while len(received) < 40:
                with sub.receive_many(40, timeout=HANG_SECS) as msgs:
                    received += msgs
            assert [one[:2] for one in received] == [one[:2] for one in messages]


# Processes that die


def _work(pipe: Connection, config_pth: Path) -> None:
    with open_sub(config_pth) as sub:
        for msg in sub.messages(timeout=None):
            pipe.send(msg)


def test_killed_consumers_lose_nothing(server: jetstream_server.Servers, tmp_path: Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server, ack_wait=0.5)
    rng = random.Random(tracing.seed())
    received: set[bytes] = set()
    with open_pub(config_pth) as pub:
        pub.send_many(numbered(1000))
    for _ in range(20):
        with Child(_work, config_pth) as child:
            for _ in range(rng.randrange(1, 20)):
                received.add(child.get())
            child.kill(signal.SIGKILL)
            child.end(exit_code=-signal.SIGKILL)
            with contextlib.suppress(EOFError):
                while child.pipe.poll():
                    received.add(child.pipe.recv())
    with open_sub(config_pth) as sub:
        received |= set(drain(sub, timeout=2))
    assert received == set(numbered(1000))


def test_hosts_that_are_not_there(server: jetstream_server.Servers, tmp_path: Path) -> None:
    config_pth = jetstream_server.deploy(tmp_path, server)
    port = server.servers[0].port
    free = jetstream_server.free_ports(1)[0]
    text = config_pth.read_text().replace(f"127.0.0.1:{port}", f"127.0.0.1:{free},127.0.0.1:{port}")
    config_pth.write_text(text)
    for _ in range(5):
        with open_pub(config_pth) as pub:
            pub.send(b"hello")
    none = write_config(tmp_path, path=f"nats://127.0.0.1:{free}/S", busy_timeout_secs=0.5)
    begin = time.monotonic()
    assert outcome(lambda: open_pub(none)) == "UnavailableError"
    assert time.monotonic() - begin < HANG_SECS / 10
