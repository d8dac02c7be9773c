"""Test what is pulled ahead of a queue on servers: that it helps, is bounded, and is given back."""

# pylint: disable=missing-function-docstring
# pylint: disable=protected-access
# Receipts are entered and left by hand where a test needs that.
# pylint: disable=unnecessary-dunder-call

import asyncio
import contextlib
import json
import pathlib
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import nats
import pytest

import persipubsub.aio
import persipubsub.config
import persipubsub.control
import persipubsub.subscriber
from persipubsub.jetstream import _ahead, _delivery, _settings
from tests import jetstream_server
from tests.support import HANG_SECS, Child, Connection, run_python, until
from tests.test_behaviour import drain, lags, numbered, open_pub, open_sub
from tests.test_jetstream import ask

pytestmark = jetstream_server.needs_server


@pytest.fixture(name="config_pth")
def _config_pth(tmp_path: pathlib.Path, servers: jetstream_server.Servers) -> pathlib.Path:
    return jetstream_server.deploy(tmp_path, servers)


@pytest.fixture(name="quick")
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everybody be quick, however slow the machine is."""
    monkeypatch.setattr(_ahead, "_QUICK_SECS", 1e6)


@pytest.fixture(name="holding")
def _holding(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold what is held as well, until it is given back for another reason."""
    del quick
    monkeypatch.setattr(_ahead, "_HOLD_SECS", 1e6)


def stream_of(config_pth: pathlib.Path) -> str:
    return _settings.Settings.of(persipubsub.config.read(config_pth), "queue").address.stream


@contextlib.contextmanager
def tap(config_pth: pathlib.Path,
        servers: jetstream_server.Servers) -> Iterator[list[dict[str, Any]]]:
    """Listen to what is asked of the server, and yield the pulls."""
    pulls: list[dict[str, Any]] = []
    is_listening, is_over = threading.Event(), threading.Event()

    async def listen() -> None:
        client = await nats.connect(f"nats://127.0.0.1:{servers.servers[0].port}")

        async def take(message: Any) -> None:
            pulls.append(json.loads(message.data))

        await client.subscribe(f"$JS.API.CONSUMER.MSG.NEXT.{stream_of(config_pth)}.>", cb=take)
        await client.flush()
        is_listening.set()
        while not is_over.is_set():
            await asyncio.sleep(0.01)
        await client.drain()

    thread = threading.Thread(target=asyncio.run, args=(listen(), ))
    thread.start()
    assert is_listening.wait(HANG_SECS)
    try:
        yield pulls
    finally:
        is_over.set()
        thread.join(HANG_SECS)


def receive(sub: persipubsub.subscriber.Sub, timeout: float = HANG_SECS) -> Any:
    with sub.receive(timeout=timeout, details=True) as message:
        return message


def receive_until_held(sub: persipubsub.subscriber.Sub) -> list[int]:
    """Receive as much as is needed until some more messages are held, and return it."""
    received = []
    while len(held(sub)) < 3:
        received.append(int(receive(sub).data))
    return received


def held(sub: persipubsub.subscriber.Sub) -> list[int]:
    return list(attempts_of_held(sub))


def attempts_of_held(sub: persipubsub.subscriber.Sub) -> dict[int, int]:
    """Return how often each of the messages that are held was delivered, in order."""
    consumer = sub._consumer
    assert isinstance(consumer, _delivery.Consumer)
    return {int(one.data): one.attempts for one in consumer._ahead._held} if consumer._ahead else {}


# What it is good for


@pytest.mark.usefixtures("holding")
def test_loop_pulls_ahead(config_pth: pathlib.Path, servers: jetstream_server.Servers) -> None:
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(500))
        with tap(config_pth, servers) as pulls:
            received = [receive(sub) for _ in range(500)]
        assert [int(one.data) for one in received] == list(range(500))
        assert {one.attempts for one in received} == {1}
        assert 10 < len(pulls) < 40
        assert max(pull["batch"] for pull in pulls) == 64
        # Half of what waits stays for others.
        taken = 0
        for pull in pulls:
            assert pull["batch"] <= max(1, (500 - taken + 1) // 2)
            taken += pull["batch"]
        assert all(pull["max_bytes"] == _ahead._MOST_BYTES for pull in pulls if pull["batch"] > 1)
    assert lags(config_pth) == {"sub": 0}


@pytest.mark.usefixtures("holding")
def test_large_messages(tmp_path: pathlib.Path, servers: jetstream_server.Servers) -> None:
    config_pth = jetstream_server.deploy(tmp_path, servers, HWM_LMDB_SIZE_BYTES=1 << 26)
    # Some are so large that two, or one, are more than may be held.
    sent = [bytes(10)] * 20 + [bytes(400_000)] * 8 + [bytes((1 << 20) - 192)] * 4 + [b""] * 8
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        for message in sent:
            pub.send(message)
        for message in sent:
            assert receive(sub).data == message
            consumer = sub._consumer
            assert isinstance(consumer, _delivery.Consumer) and consumer._ahead is not None
            assert sum(len(one.data) for one in consumer._ahead._held) < 1 << 20
    assert lags(config_pth) == {"sub": 0}


def test_slow_consumer_pulls_one_at_a_time(config_pth: pathlib.Path,
                                           servers: jetstream_server.Servers) -> None:
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(20))
        with tap(config_pth, servers) as pulls:
            for number in range(10):
                with sub.receive(timeout=HANG_SECS) as msg:
                    assert msg == str(number).encode()
                    # More than half of the time in which a consumer has to handle what it pulls.
                    time.sleep(0.06)
            until(lambda: len(pulls) >= 10, "the last pull")
    assert [pull["batch"] for pull in pulls] == [1] * 10


@pytest.mark.usefixtures("holding")
def test_nothing_is_pulled_ahead_beside_another_at_work(config_pth: pathlib.Path,
                                                        servers: jetstream_server.Servers) -> None:
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(50))
        with tap(config_pth, servers) as pulls, sub.receive(timeout=HANG_SECS) as msg:
            assert msg == b"0"
            assert [int(receive(sub).data) for _ in range(20)] == list(range(1, 21))
            until(lambda: len(pulls) >= 21, "the last pull")
        assert [pull["batch"] for pull in pulls] == [1] * 21


@pytest.mark.usefixtures("holding")
def test_threads_share_what_is_held(config_pth: pathlib.Path) -> None:
    received: list[int] = []

    def work() -> None:
        received.extend(map(int, drain(sub)))

    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(400))
        received.extend(receive_until_held(sub))
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_SECS)
    assert sorted(received) == list(range(400))
    assert lags(config_pth) == {"sub": 0}


@pytest.mark.usefixtures("holding")
def test_batches_begin_with_what_is_held(config_pth: pathlib.Path) -> None:
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(100))
        count = len(receive_until_held(sub))
        with sub.receive_many(1, timeout=HANG_SECS) as msgs:
            assert msgs == [str(count).encode()]
        count += 1 + len(receive_until_held(sub))
        with sub.receive_many(1000, timeout=HANG_SECS) as msgs:
            assert msgs == numbered(100)[-len(msgs):] and len(msgs) > 50
    assert lags(config_pth) == {"sub": 0}


# What others see of it


@pytest.mark.usefixtures("holding")
def test_lag_and_front_are_true(config_pth: pathlib.Path) -> None:
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(50))
        count = len(receive_until_held(sub))
        for number in range(count, 50):
            assert lags(config_pth) == {"sub": 50 - number}
            assert sub.front() == str(number).encode()
            assert receive(sub).data == str(number).encode()


@pytest.mark.parametrize("is_same", [True, False])
@pytest.mark.usefixtures("holding")
def test_skipping_skips_what_is_held(config_pth: pathlib.Path, is_same: bool) -> None:
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub, open_sub(config_pth) as other:
        pub.send_many(numbered(50))
        receive_until_held(sub)
        (sub if is_same else other).pop_to_top()
        assert not held(sub)
        assert receive(sub).data == b"49"
        assert lags(config_pth) == {"sub": 0}
        pub.send_many(numbered(60))
        receive_until_held(sub)
        with (sub if is_same else other).receive_to_top(timeout=HANG_SECS) as msg:
            assert msg == b"59"
        assert receive(sub, timeout=0.1) is None
    assert lags(config_pth) == {"sub": 0}


@pytest.mark.usefixtures("holding")
def test_cleared_messages_are_not_received(config_pth: pathlib.Path) -> None:
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(50))
        received = receive_until_held(sub)
        assert persipubsub.control.clear_all_subs(config_pth) == {"queue": 50 - len(received)}
        assert receive(sub, timeout=0.1) is None
        pub.send(b"7")
        assert receive(sub).data == b"7"


@pytest.mark.usefixtures("holding")
def test_message_that_grows_old_is_not_received(tmp_path: pathlib.Path,
                                                servers: jetstream_server.Servers) -> None:
    config_pth = jetstream_server.deploy(tmp_path, servers, MSG_TIMEOUT_SECS=4)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(50))
        receive_until_held(sub)
        time.sleep(4.1)  # as old as that takes time
        assert sub.front() is None
        assert receive(sub, timeout=0.1) is None
        until(lambda: lags(config_pth) == {"sub": 0}, "the old ones to be gone")


@pytest.mark.usefixtures("holding")
def test_message_comes_again_before_those_behind_it(config_pth: pathlib.Path) -> None:
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(100))
        expected = 0
        for _ in range(5):
            expected += len(receive_until_held(sub))
            with pytest.raises(KeyError), sub.receive(timeout=HANG_SECS) as msg:
                assert msg == str(expected).encode()
                raise KeyError
            assert sub.front() == str(expected).encode()
        assert list(map(int, drain(sub, timeout=1))) == list(range(expected, 100))


@pytest.mark.usefixtures("holding")
def test_message_that_fails_more_than_once(config_pth: pathlib.Path) -> None:
    """What was given back with it at first is not delivered before it."""
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(100))
        expected = len(receive_until_held(sub))
        for _ in range(3):
            with pytest.raises(KeyError), sub.receive(timeout=HANG_SECS, details=True) as message:
                assert message is not None and int(message.data) == expected
                raise KeyError
        assert list(map(int, drain(sub, timeout=1))) == list(range(expected, 100))
    assert lags(config_pth) == {"sub": 0}


@pytest.mark.usefixtures("holding")
def test_forgotten_message_comes_again_before_those_behind_it(config_pth: pathlib.Path) -> None:
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(100))
        expected = 0
        for _ in range(5):
            expected += len(receive_until_held(sub))
            for msg in sub.messages(timeout=HANG_SECS):
                assert msg == str(expected).encode()
                break
            again = receive(sub)
            assert (int(again.data), again.attempts) == (expected, 2)
            expected += 1
        assert list(map(int, drain(sub, timeout=1))) == list(range(expected, 100))
    assert lags(config_pth) == {"sub": 0}


@pytest.mark.usefixtures("holding")
def test_large_messages_that_come_again(tmp_path: pathlib.Path,
                                        servers: jetstream_server.Servers) -> None:
    """One that does not fit beside others is not put behind them."""
    config_pth = jetstream_server.deploy(tmp_path, servers, HWM_LMDB_SIZE_BYTES=1 << 26)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        for number in range(60):
            pub.send(b"%03d" % number + bytes(10 if number < 10 else 400_000))
        with pytest.raises(KeyError), sub.receive_many(30, timeout=HANG_SECS):
            raise KeyError
        assert [int(receive(sub).data[:3]) for _ in range(60)] == list(range(60))


@pytest.mark.usefixtures("holding")
def test_closing_beside_a_message_at_work(config_pth: pathlib.Path) -> None:
    """It comes again before those that were held behind it."""
    with open_pub(config_pth) as pub, open_sub(config_pth) as other:
        pub.send_many(numbered(100))
        with open_sub(config_pth) as sub:
            expected = len(receive_until_held(sub))
            receipt = sub.receive(timeout=HANG_SECS)
            assert receipt.__enter__() == str(expected).encode()
            assert len(held(sub)) > 1
        assert list(map(int, drain(other, timeout=1))) == list(range(expected, 100))


@pytest.mark.usefixtures("quick")
def test_task_that_cancels_gets_what_waits_in_order(config_pth: pathlib.Path) -> None:
    source = random.Random(5)
    received: list[int] = []

    async def main() -> int:
        cancelled = 0
        async with persipubsub.aio.Sub() as sub:
            await sub.init(sub_id="sub", config_pth=config_pth)
            while len(received) < 500:
                receipt = sub.receive(timeout=HANG_SECS)
                try:
                    async with asyncio.timeout(source.uniform(0, 0.002)):
                        received.append(int(await receipt.__aenter__() or b""))
                except TimeoutError:
                    cancelled += 1
                else:
                    await receipt.__aexit__(None, None, None)
        return cancelled

    with open_pub(config_pth) as pub:
        pub.send_many(numbered(500))
    assert asyncio.run(asyncio.wait_for(main(), 2 * HANG_SECS)) > 20
    assert received == list(range(500))
    assert lags(config_pth) == {"sub": 0}


# Giving back


@pytest.mark.usefixtures("quick")
def test_what_is_not_asked_for_goes_to_others(config_pth: pathlib.Path) -> None:
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub, open_sub(config_pth) as other:
        pub.send_many(numbered(100))
        received = receive_until_held(sub)
        with sub.receive(timeout=HANG_SECS) as msg:
            assert msg is not None
            received.append(int(msg))
            # The other one waits no longer than until it is given back.
            received.extend(int(receive(other).data) for _ in range(100 - len(received)))
        assert not held(sub)
        assert receive(sub, timeout=0.1) is None
    assert sorted(received) == list(range(100))
    assert lags(config_pth) == {"sub": 0}


@pytest.mark.usefixtures("quick")
def test_what_was_held_for_too_long_is_not_handed_out(config_pth: pathlib.Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    # The loop did not come to it: its process was stopped, for example.
    monkeypatch.setattr(_ahead.Ahead, "_let_go", lambda _: None)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(100))
        received = receive_until_held(sub)
        before = attempts_of_held(sub)
        count = len(before)
        time.sleep(_ahead._HOLD_SECS + 0.05)
        assert sub.front() == str(len(received)).encode()
        again = [receive(sub) for _ in range(count)]
        # To look at the first one has not put it behind the others.
        assert [int(one.data) for one in again] == list(range(len(received), len(received) + count))
        # They were given back, and once more by who looked.
        assert [one.attempts for one in again] == [attempts + 2 for attempts in before.values()]
        assert list(map(int, drain(sub, timeout=1))) == list(range(len(received) + count, 100))


@pytest.mark.usefixtures("quick")
def test_what_others_have_by_now_is_not_handed_out(tmp_path: pathlib.Path,
                                                   servers: jetstream_server.Servers,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ahead.Ahead, "_let_go", lambda _: None)
    config_pth = jetstream_server.deploy(tmp_path, servers, ack_wait=1)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub, open_sub(config_pth) as other:
        pub.send_many(numbered(30))
        received = receive_until_held(sub)
        taken = [other.receive(timeout=HANG_SECS) for _ in range(30 - len(received))]
        received.extend(int(one.__enter__() or b"") for one in taken)
        assert receive(sub, timeout=2) is None
        for one in taken:
            one.__exit__(None, None, None)
        assert receive(sub, timeout=0.1) is None
    assert sorted(received) == list(range(30))


@pytest.mark.usefixtures("holding")
def test_closing_gives_back(config_pth: pathlib.Path) -> None:
    with open_pub(config_pth) as pub:
        pub.send_many(numbered(100))
    with open_sub(config_pth) as sub:
        received = receive_until_held(sub)
    with open_sub(config_pth) as sub:
        received.extend(map(int, drain(sub, timeout=1)))
    assert received == list(range(100))


def test_program_that_ends_gives_back(config_pth: pathlib.Path) -> None:
    with open_pub(config_pth) as pub:
        pub.send_many(numbered(100))
    run = run_python(
        "import sys, persipubsub.subscriber\n"
        "from persipubsub.jetstream import _ahead\n"
        "_ahead._HOLD_SECS = _ahead._QUICK_SECS = 1e6\n"
        "sub = persipubsub.subscriber.Sub(); sub.init('sub', sys.argv[1])\n"
        "while not (sub._consumer._ahead and len(sub._consumer._ahead._held) > 2):\n"
        "    with sub.receive(timeout=60) as msg: print(int(msg))\n", config_pth)
    assert run.stderr == ""
    received = list(map(int, run.stdout.split()))
    with open_sub(config_pth) as sub:
        received.extend(map(int, drain(sub, timeout=1)))
    assert received == list(range(100))


def _receive_one(pipe: Connection, sub: persipubsub.subscriber.Sub) -> None:
    pipe.send(int(receive(sub).data))
    sub.close()


@pytest.mark.usefixtures("holding")
def test_forked_child_has_nothing_of_its_parent(config_pth: pathlib.Path) -> None:
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(100))
        received = receive_until_held(sub)
        own = held(sub)
        with Child(_receive_one, sub) as child:
            number = child.get()
            child.end()
        assert number not in own + received
        received += [number] + [int(receive(sub).data) for _ in own]
        assert set(own) <= set(received)
        received.extend(map(int, drain(sub, timeout=1)))
    assert sorted(received) == list(range(100))


def _hold(pipe: Connection, config_pth: pathlib.Path) -> None:
    with open_sub(config_pth) as sub:
        pipe.send((receive_until_held(sub), held(sub)))
        pipe.recv()


@pytest.mark.usefixtures("holding")
def test_what_a_killed_process_held_comes_after_ack_wait(tmp_path: pathlib.Path,
                                                         servers: jetstream_server.Servers) -> None:
    config_pth = jetstream_server.deploy(tmp_path, servers, ack_wait=2)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(50))
        with Child(_hold, config_pth) as child:
            received, _ = child.get()
            child.kill(signal.SIGKILL)
        received += [int(receive(sub).data) for _ in range(50 - len(received))]
    assert sorted(received) == list(range(50))


@pytest.mark.usefixtures("holding")
def test_tasks_that_are_cancelled_while_more_is_pulled(config_pth: pathlib.Path) -> None:
    source = random.Random(3)
    received: list[int] = []

    async def consume(sub: Any) -> None:
        while True:
            async with sub.receive(timeout=HANG_SECS) as msg:
                received.append(int(msg))

    async def main() -> None:
        async with persipubsub.aio.Sub() as sub:
            await sub.init(sub_id="sub", config_pth=config_pth)
            for _ in range(100):
                task = asyncio.ensure_future(consume(sub))
                await asyncio.sleep(source.uniform(0, 0.01))
                task.cancel()
                await asyncio.wait([task])

    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(1000))
        asyncio.run(asyncio.wait_for(main(), 2 * HANG_SECS))
        received.extend(map(int, drain(sub, timeout=1)))
    assert set(received) == set(range(1000))
    assert lags(config_pth) == {"sub": 0}


def test_closed_subscribers_leave_nothing_at_the_server(tmp_path: pathlib.Path) -> None:
    with jetstream_server.running(tmp_path) as servers:
        config_pth = jetstream_server.deploy(tmp_path, servers)
        server = servers.servers[0]
        with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
            pub.send_many(numbered(2))
            receive(sub)
            sub.pop_to_top()
            # Whatever was said to the server before this answer is done.
            assert lags(config_pth) == {"sub": 1}
            # It may see the end of the connection before this one later.
            until(lambda: server.look("connz").get("num_connections") == 1, "a single connection")
            before = server.look("connz")["connections"][0]["subscriptions"]
            for _ in range(5):
                with open_sub(config_pth) as other:
                    assert receive(other).data == b"1"
                    assert other.front() is None
                    other.pop_to_top()
                    pub.send(b"1")
            until(lambda: server.look("connz")["connections"][0]["subscriptions"] == before,
                  "the subscriptions to end")
            info = ask(servers, f"CONSUMER.INFO.{stream_of(config_pth)}.sub")
            assert info["num_waiting"] == 0
