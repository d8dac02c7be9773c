"""Test tasks on an engine that has a loop of its own: waiting without threads, and cancelling."""

# pylint: disable=missing-function-docstring
# Receipts are entered and left by hand where a test needs that.
# pylint: disable=unnecessary-dunder-call
# pylint: disable=protected-access

import asyncio
import concurrent.futures
import contextlib
import gc
import pathlib
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, NamedTuple

import pytest

import persipubsub.aio
import persipubsub.config
import persipubsub.control
import persipubsub.errors
from persipubsub import _begun
from persipubsub.jetstream import _loop, _publishing, _pulling, _settings, _stream
from tests import jetstream_server
from tests.support import HANG_SECS, Child, Connection, outcome
from tests.test_behaviour import drain, lags, numbered, open_pub, open_sub
from tests.test_jetstream import ask, open_queue

#: Threads of an object and of the engine, however many tasks wait.
_FEW_THREADS = 4


@pytest.fixture(autouse=True)
def _long_pulls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pulling, "LONGEST_PULL_SECS", 3600.0)


@pytest.fixture(name="config_pth")
def _config_pth(tmp_path: pathlib.Path, servers: jetstream_server.Servers) -> pathlib.Path:
    return jetstream_server.deploy(tmp_path, servers)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 2 * HANG_SECS))


def on_server(function: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make a test of a coroutine function that needs a server; it does not hang."""

    @jetstream_server.needs_server
    def test(config_pth: pathlib.Path, servers: jetstream_server.Servers) -> None:
        run(function(config_pth, servers))

    test.__name__ = function.__name__
    return test


@contextlib.asynccontextmanager
async def opened(config_pth: pathlib.Path) -> AsyncIterator["tuple[Any, Any]"]:
    async with persipubsub.aio.Pub() as pub, persipubsub.aio.Sub() as sub:
        await pub.init(pub_id="pub", config_pth=config_pth)
        await sub.init(sub_id="sub", config_pth=config_pth)
        yield pub, sub


async def receive(sub: Any, timeout: float | None = HANG_SECS) -> bytes | None:
    async with sub.receive(timeout=timeout) as msg:
        message: bytes | None = msg
    return message


async def until_waiting(config_pth: pathlib.Path, servers: jetstream_server.Servers,
                        count: int) -> None:
    """Wait until so many pulls are at the server."""
    name = _settings.Settings.of(persipubsub.config.read(config_pth), "queue").address.stream
    async with asyncio.timeout(HANG_SECS):
        while (await asyncio.to_thread(ask, servers,
                                       f"CONSUMER.INFO.{name}.sub"))["num_waiting"] != count:
            await asyncio.sleep(0.01)


# Futures


def test_result_and_error_of_what_was_begun() -> None:

    async def main() -> None:
        begun: "concurrent.futures.Future[int]" = concurrent.futures.Future()
        waiting = asyncio.ensure_future(_begun.result_of(begun))
        await asyncio.to_thread(begun.set_result, 7)
        assert await waiting == 7
        failing: "concurrent.futures.Future[int]" = concurrent.futures.Future()
        waiting = asyncio.ensure_future(_begun.result_of(failing, lambda _: None))
        await asyncio.to_thread(failing.set_exception, KeyError("why"))
        with pytest.raises(KeyError):
            await waiting

    run(main())


def test_what_was_begun_is_cancelled_with_its_task() -> None:

    async def main() -> None:
        undone: list[int] = []
        begun: "concurrent.futures.Future[int]" = concurrent.futures.Future()
        waiting = asyncio.ensure_future(_begun.result_of(begun, undone.append))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert begun.cancelled() and not undone

    run(main())


def test_what_was_begun_is_done_to_its_end() -> None:

    async def main() -> None:
        begun: "concurrent.futures.Future[int]" = concurrent.futures.Future()
        waiting = asyncio.ensure_future(_begun.result_of(begun))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not begun.cancelled()
        begun.set_result(7)

    run(main())


def test_result_that_comes_while_the_task_is_cancelled_is_undone_once() -> None:

    async def main() -> None:
        for rounds_before_cancel in range(3):
            undone: list[int] = []
            begun: "concurrent.futures.Future[int]" = concurrent.futures.Future()
            waiting = asyncio.ensure_future(_begun.result_of(begun, undone.append))
            await asyncio.sleep(0)
            begun.set_result(7)
            # None: the loop was not told yet; one: it was, but the task did not go on yet.
            for _ in range(rounds_before_cancel):
                await asyncio.sleep(0)
            is_in_time = waiting.cancel()
            await asyncio.wait([waiting])
            # At once: the next thing may be that the queue is closed.
            assert undone == ([7] if is_in_time else [])
            await asyncio.sleep(0)
            assert undone == ([7] if is_in_time else [])
            assert is_in_time == (rounds_before_cancel < 2)

    run(main())


def test_result_that_comes_after_the_loop_was_closed_is_undone() -> None:
    undone: list[int] = []
    begun: "concurrent.futures.Future[int]" = concurrent.futures.Future()
    loop = asyncio.new_event_loop()
    waiting = loop.create_task(_begun.result_of(begun, undone.append))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    begun.set_result(7)
    assert undone == [7]
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]
    del waiting
    gc.collect()
    assert undone == [7]


def test_what_is_stopped_at_the_exit_is_an_error() -> None:

    async def main() -> None:
        begun: "concurrent.futures.Future[int]" = concurrent.futures.Future()
        waiting = asyncio.ensure_future(_begun.result_of(begun))
        await asyncio.sleep(0)
        begun.cancel()
        with pytest.raises(persipubsub.errors.ClosedError):
            await waiting

    run(main())


# Both objects on a server


@on_server
async def test_what_the_objects_do(config_pth: pathlib.Path, _: jetstream_server.Servers) -> None:
    async with opened(config_pth) as (pub, sub):
        assert await receive(sub, timeout=0) is None
        await pub.send(b"0")
        await pub.send_many([b"1", b"2", b"3", b"4", b"5", b"6"])
        with pytest.raises(KeyError):
            async with sub.receive(timeout=HANG_SECS) as msg:
                assert msg == b"0"
                raise KeyError
        async with sub.receive(timeout=HANG_SECS, details=True) as message:
            assert (message.data, message.number, message.attempts) == (b"0", 1, 2)
        async with sub.receive_many(2, timeout=HANG_SECS) as msgs:
            assert msgs == [b"1", b"2"]
        assert [msg async for msg in sub.messages(timeout=0)] == numbered(7)[3:]
        await pub.send_many([b"7", b"8"])
        async with sub.receive_to_top(timeout=HANG_SECS) as msg:
            assert msg == b"8"
        await pub.send_many([b"9", b"10"])
        await sub.pop_to_top()
        assert await sub.front() == b"10"
        assert await receive(sub) == b"10"
        with pytest.raises(persipubsub.errors.MessageTooLargeError):
            await pub.send(bytes(1 << 21))
    assert lags(config_pth) == {"sub": 0}


@on_server
async def test_each_message_by_itself(config_pth: pathlib.Path,
                                      _: jetstream_server.Servers) -> None:
    async with persipubsub.aio.Pub() as pub:
        await pub.init(pub_id="pub", config_pth=config_pth, autosync=True)
        await pub.send_many([b"a", b"b"], msg_ids=["one", None])
        await pub.send(b"a", msg_id="one")
    with open_sub(config_pth) as sub:
        assert drain(sub) == [b"a", b"b"]


@on_server
async def test_waiting_needs_no_threads(config_pth: pathlib.Path,
                                        servers: jetstream_server.Servers) -> None:
    count = 50
    async with opened(config_pth) as (pub, sub):
        before = threading.active_count()
        tasks = [asyncio.ensure_future(receive(sub)) for _ in range(count)]
        await until_waiting(config_pth, servers, count)
        # Of the test's own calls there are some in threads.
        asked = sum(thread.name.startswith("asyncio_") for thread in threading.enumerate())
        assert threading.active_count() <= before + asked + _FEW_THREADS
        await pub.send_many(numbered(count))
        assert set(await asyncio.gather(*tasks)) == set(numbered(count))
        asked = sum(thread.name.startswith("asyncio_") for thread in threading.enumerate())
        assert threading.active_count() <= before + asked + _FEW_THREADS
    assert lags(config_pth) == {"sub": 0}


@on_server
async def test_sending_needs_no_threads(config_pth: pathlib.Path,
                                        _: jetstream_server.Servers) -> None:
    count = 1000
    async with opened(config_pth) as (pub, sub):
        before = threading.active_count()
        tasks = [asyncio.ensure_future(pub.send(message)) for message in numbered(count)]
        while not tasks[-1].done():
            assert threading.active_count() <= before + _FEW_THREADS
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        async with sub.receive_many(2 * count, timeout=HANG_SECS) as msgs:
            assert msgs == numbered(count)


@jetstream_server.needs_server
@pytest.mark.parametrize("mark", [1000000, 2000])
def test_batches_and_messages_are_in_the_order_of_the_calls(tmp_path: pathlib.Path,
                                                            servers: jetstream_server.Servers,
                                                            mark: int) -> None:
    """With the lower mark, the server is asked for each message of the larger batch by itself."""
    config_pth = jetstream_server.deploy(tmp_path, servers, MAX_MSGS_NUM=mark)
    messages = numbered(1000)

    async def main() -> None:
        async with opened(config_pth) as (pub, sub):
            await asyncio.gather(pub.send_many(messages[:3]), pub.send(messages[3]),
                                 pub.send(messages[4]), pub.send_many(messages[5:900]),
                                 pub.send(messages[900]), pub.send_many(messages[901:903]),
                                 *map(pub.send, messages[903:]))
            async with sub.receive_many(2000, timeout=HANG_SECS) as msgs:
                assert msgs == messages

    run(main())


@jetstream_server.needs_server
def test_batch_that_waits_for_room_holds_nobody_up(tmp_path: pathlib.Path,
                                                   servers: jetstream_server.Servers) -> None:
    config_pth = jetstream_server.deploy(tmp_path, servers, MAX_MSGS_NUM=4, strategy="block")

    async def main() -> None:
        async with opened(config_pth) as (pub, sub):
            await pub.send_many(numbered(3))
            waiting = asyncio.ensure_future(pub.send_many([b"a", b"b"]))
            # Its call comes first, and there is room for this one only.
            await asyncio.sleep(0)
            await asyncio.wait_for(pub.send(b"3"), HANG_SECS)
            assert not waiting.done()
            async with sub.receive_many(4, timeout=HANG_SECS) as msgs:
                assert msgs == numbered(4)
            await asyncio.wait_for(waiting, HANG_SECS)
            assert [await receive(sub), await receive(sub)] == [b"a", b"b"]

    run(main())


@jetstream_server.needs_server
def test_call_that_comes_when_a_batch_is_begun_is_behind_it(
        config_pth: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_room = _publishing.Publishing._make_room

    async def make_room_late(publishing: _publishing.Publishing, *arguments: Any) -> Any:
        room = await make_room(publishing, *arguments)
        # In front of the tasks of the batch, the loop runs this one.
        others.append(asyncio.ensure_future(publishing.put([b"3"], None, None, None)))
        return room

    others: list[asyncio.Future[int]] = []
    monkeypatch.setattr(_publishing.Publishing, "_make_room", make_room_late)
    with open_queue(config_pth) as queue, open_sub(config_pth) as sub:
        assert queue.put(numbered(3)) == 1

        async def other() -> int:
            return await others[0]

        assert queue.run(other) == 4
        assert drain(sub) == numbered(4)


@jetstream_server.needs_server
def test_who_is_behind_others_that_are_served_waits_for_servers_as_long_as_they(
        config_pth: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float] = []

    async def require_interest(_: object, __: object, deadline: float) -> None:
        left.append(deadline - time.monotonic())

    with open_queue(config_pth, wait_secs=1.5) as queue:
        monkeypatch.setattr(_stream.Stream, "require_interest", require_interest)

        async def work() -> None:
            publishing = queue._publishing
            assert publishing is not None
            for is_served in (False, True):
                async with publishing._order:
                    put = asyncio.ensure_future(publishing.put([b"hello"], None, None, None))
                    await asyncio.sleep(1.6)
                    if is_served:
                        await publishing._publish(queue.settings.subject(None), b"", "id", None)
                await put

        queue.run(work)
    assert left[0] < 0 < left[1]


@on_server
async def test_closing_while_tasks_wait(config_pth: pathlib.Path,
                                        servers: jetstream_server.Servers) -> None:
    # The other one keeps the connection open.
    async with opened(config_pth) as (_, sub), persipubsub.aio.Sub() as other:
        await other.init(sub_id="sub", config_pth=config_pth)
        tasks = [asyncio.ensure_future(receive(sub, timeout=None)) for _ in range(3)]
        await until_waiting(config_pth, servers, 3)
        await sub.close()
        for task in tasks:
            with pytest.raises(persipubsub.errors.ClosedError):
                await task
        await until_waiting(config_pth, servers, 0)


@on_server
async def test_closing_while_threads_wait(config_pth: pathlib.Path,
                                          servers: jetstream_server.Servers) -> None:
    with open_sub(config_pth) as sub, open_sub(config_pth):

        def work() -> None:
            with sub.receive(timeout=None):
                pass

        waiting = asyncio.ensure_future(asyncio.to_thread(outcome, work))
        await until_waiting(config_pth, servers, 1)
        await asyncio.to_thread(sub.close)
        assert await waiting == "ClosedError"


@jetstream_server.needs_server
def test_closing_while_threads_wait_for_servers_that_are_away(tmp_path: pathlib.Path) -> None:
    """That the messages at work can not be given back is no reason to let them wait."""

    async def main(servers: jetstream_server.Servers) -> None:
        config_pth = await asyncio.to_thread(jetstream_server.deploy, tmp_path, servers)
        with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
            pub.send_many(numbered(6))
            taken = [sub.receive(timeout=HANG_SECS) for _ in range(6)]
            assert [one.__enter__() for one in taken] == numbered(6)

            def work() -> None:
                with sub.receive(timeout=None):
                    pass

            waiting = asyncio.ensure_future(asyncio.to_thread(outcome, work))
            await until_waiting(config_pth, servers, 1)
            servers.servers[0].kill()
            await asyncio.to_thread(sub.close)
            assert await waiting == "ClosedError"

    with jetstream_server.running(tmp_path) as servers:
        run(main(servers))


@jetstream_server.needs_server
def test_who_sends_does_not_wait_for_each_other_where_servers_are_away(
        tmp_path: pathlib.Path) -> None:
    """One after the other, they would take some minutes."""

    async def main(servers: jetstream_server.Servers) -> None:
        config_pth = await asyncio.to_thread(jetstream_server.deploy,
                                             tmp_path,
                                             servers,
                                             busy_timeout_secs=3)
        async with persipubsub.aio.Pub() as pub:
            await pub.init(pub_id="pub", config_pth=config_pth)
            await pub.send(b"hello")
            servers.servers[0].kill()
            async with asyncio.timeout(HANG_SECS):
                found = await asyncio.gather(*(pub.send(b"lost") for _ in range(50)),
                                             *(pub.send_many([b"lost"] * 2) for _ in range(50)),
                                             return_exceptions=True)
            assert {type(one) for one in found} == {persipubsub.errors.UnavailableError}

    with jetstream_server.running(tmp_path) as servers:
        run(main(servers))


# Cancelling


@on_server
async def test_pull_of_who_was_cancelled_is_taken_over(config_pth: pathlib.Path,
                                                       servers: jetstream_server.Servers) -> None:
    # The pulls do not end by themselves.
    assert _pulling.LONGEST_PULL_SECS >= 3600
    async with opened(config_pth) as (pub, sub):
        for message in numbered(20):
            for _ in range(2):
                task = asyncio.ensure_future(receive(sub))
                await until_waiting(config_pth, servers, 1)
                task.cancel()
                await asyncio.wait([task])
            assert await receive(sub, timeout=0.01) is None
            taking = sub.receive(timeout=HANG_SECS, details=True)
            entering = asyncio.ensure_future(taking.__aenter__())
            await asyncio.sleep(0.01)
            await pub.send(message)
            found = await entering
            await taking.__aexit__(None, None, None)
            assert (found.data, found.attempts) == (message, 1)


@on_server
async def test_message_does_not_stay_with_who_was_cancelled(
        config_pth: pathlib.Path, servers: jetstream_server.Servers) -> None:
    async with opened(config_pth) as (pub, sub), persipubsub.aio.Sub() as other:
        await other.init(sub_id="sub", config_pth=config_pth)
        tasks = [asyncio.ensure_future(receive(sub)) for _ in range(20)]
        await until_waiting(config_pth, servers, 20)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await pub.send(b"hello")
        async with other.receive(timeout=HANG_SECS, details=True) as found:
            # Not one of the twenty after the other, but the first and the last.
            assert found is not None and (found.data, found.attempts) == (b"hello", 3)


@on_server
async def test_pull_that_is_done_before_it_is_cancelled(config_pth: pathlib.Path,
                                                        servers: jetstream_server.Servers) -> None:
    """What it brings is given back with the message for which it was to be cancelled."""
    async with opened(config_pth) as (pub, sub):
        task = asyncio.ensure_future(receive(sub))
        await until_waiting(config_pth, servers, 1)
        task.cancel()
        await asyncio.wait([task])
        waiting = sub._sub._consumer._ahead.waiting

        async def pull() -> "list[Any]":
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                pass  # the message came first
            pulled: "list[Any]" = await waiting._puller.pull_one(HANG_SECS)
            return pulled

        async def leave() -> None:
            waiting._leave(asyncio.ensure_future(pull()))

        await asyncio.wrap_future(_loop.current().begin(leave))
        await pub.send_many(numbered(2))
        # Nobody may take this one over, which would wait for ever.
        await _steps(lambda: not waiting._left)
        assert sorted([await receive(sub) or b"" for _ in range(2)]) == numbered(2)


async def _steps(condition: Callable[[], object]) -> None:
    """Let the running loop go on, step by step, until a condition holds."""
    async with asyncio.timeout(HANG_SECS):
        while not condition():
            await asyncio.sleep(0)


@on_server
async def test_pull_that_is_cancelled_is_not_taken_over(config_pth: pathlib.Path,
                                                        servers: jetstream_server.Servers) -> None:
    """A message that comes for nobody ends the other pulls, while somebody begins to wait."""
    async with opened(config_pth) as (pub, sub):
        for steps in range(8):
            tasks = [asyncio.ensure_future(receive(sub)) for _ in range(3)]
            await until_waiting(config_pth, servers, 3)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            waiting = sub._sub._consumer._ahead.waiting

            async def take(steps: int = steps, waiting: Any = waiting) -> "list[Any]":
                await _steps(lambda: waiting._givers)
                for _ in range(steps):
                    await asyncio.sleep(0)
                pulled: "list[Any]" = await waiting.take(HANG_SECS)
                await waiting._puller.returns.refuse(pulled, HANG_SECS)
                return pulled

            taking = _loop.current().begin(take)
            await pub.send(b"hello")
            pulled = await asyncio.wrap_future(taking)
            assert [one.data for one in pulled] == [b"hello"]
            assert await receive(sub) == b"hello"


class _Storm(NamedTuple):
    """Say what came of the messages of a storm."""

    messages: int
    unfinished: list[int]  #: whose last block was not left without an exception


async def _storm(config_pth: pathlib.Path,
                 take: Callable[[Any], Any],
                 longest: float = 0.008) -> _Storm:
    """Receive in tasks that are cancelled at any moment, then without; nobody has any then."""
    source = random.Random(7)
    outcomes: "dict[int, bool]" = {}
    begun, completed = [], []
    count = 0

    async def consume(sub: Any) -> None:
        async with take(sub) as msgs:
            numbers = [int(msg) for msg in (msgs if isinstance(msgs, list) else [msgs])]
            outcomes.update(dict.fromkeys(numbers, False))
            begun.append(numbers)
            await asyncio.sleep(source.choice((0, 0, 0.001)))
            outcomes.update(dict.fromkeys(numbers, True))
            completed.append(numbers)

    async with opened(config_pth) as (pub, sub):
        # How far the tasks come depends on the machine: it goes on until some were cancelled in
        # their blocks, and some were not.
        while count < 300 or not 0 < len(completed) < len(begun):
            tasks = [asyncio.ensure_future(consume(sub)) for _ in range(5)]
            sending = asyncio.ensure_future(
                pub.send_many([str(number).encode() for number in range(count, count + 5)]))
            count += 5
            await asyncio.sleep(source.uniform(0, longest))
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await sending
            if count % 50 == 0 and not completed:
                longest *= 2
    with open_sub(config_pth) as sub:
        rest = list(map(int, await asyncio.to_thread(drain, sub, 1)))
    # What is with a task that does not know of it would be missing here.
    assert lags(config_pth) == {"sub": 0}
    outcomes.update(dict.fromkeys(rest, True))
    assert outcomes.keys() <= set(range(count))
    return _Storm(count, [number for number in range(count) if not outcomes.get(number)])


@on_server
async def test_cancellation_loses_nothing(config_pth: pathlib.Path,
                                          _: jetstream_server.Servers) -> None:
    storm = await _storm(config_pth, lambda sub: sub.receive(timeout=HANG_SECS))
    assert not storm.unfinished


@on_server
async def test_cancelled_batches_lose_nothing(config_pth: pathlib.Path,
                                              _: jetstream_server.Servers) -> None:
    storm = await _storm(config_pth, lambda sub: sub.receive_many(3, timeout=HANG_SECS))
    assert not storm.unfinished


@on_server
async def test_cancelled_skipping_forgets_nothing(config_pth: pathlib.Path,
                                                  _: jetstream_server.Servers) -> None:
    storm = await _storm(config_pth,
                         lambda sub: sub.receive_to_top(timeout=HANG_SECS),
                         longest=0.03)
    # The others, if their blocks were left or not, were skipped.
    assert storm.messages - 1 not in storm.unfinished


@on_server
async def test_error_of_the_block_is_raised_although_the_queue_was_closed(
        config_pth: pathlib.Path, _: jetstream_server.Servers) -> None:
    """Closing gave the message back: nothing is wrong with that."""
    async with opened(config_pth) as (pub, sub):
        await pub.send_many(numbered(2))
        with pytest.raises(KeyError):
            async with sub.receive(timeout=HANG_SECS):
                await sub.close()
                raise KeyError("why")
        await sub.init(sub_id="sub", config_pth=config_pth)
        async with sub.messages(timeout=HANG_SECS) as messages:
            assert await anext(messages) is not None
            await sub.close()
            await messages.aclose()
    assert await asyncio.to_thread(lags, config_pth) == {"sub": 2}


@on_server
async def test_iteration_left_early_leaves_no_message_claimed(config_pth: pathlib.Path,
                                                              _: jetstream_server.Servers) -> None:

    async def iterate() -> None:
        async for _ in sub.messages(timeout=HANG_SECS):
            is_inside.set()
            await asyncio.Event().wait()

    async with opened(config_pth) as (pub, sub):
        await pub.send_many(numbered(1))
        async for _ in sub.messages(timeout=HANG_SECS):
            break
        is_inside = asyncio.Event()
        task = asyncio.ensure_future(iterate())
        async with asyncio.timeout(HANG_SECS):
            await is_inside.wait()
        task.cancel()
        await asyncio.wait([task])
        del task
        gc.collect()  # the error of the task refers to its frames
        assert await receive(sub) == b"0"
    assert await asyncio.to_thread(lags, config_pth) == {"sub": 0}


@on_server
async def test_cancelled_acknowledgement_is_made_anyway(config_pth: pathlib.Path,
                                                        _: jetstream_server.Servers) -> None:
    async with opened(config_pth) as (pub, sub):
        await pub.send(b"hello")
        receipt = sub.receive(timeout=HANG_SECS)
        assert await receipt.__aenter__() == b"hello"
        leaving = asyncio.ensure_future(receipt.__aexit__(None, None, None))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        async with asyncio.timeout(HANG_SECS):
            while (await asyncio.to_thread(lags, config_pth))["sub"]:
                await asyncio.sleep(0.01)


@jetstream_server.needs_server
def test_loop_that_ends_leaves_nothing_claimed(config_pth: pathlib.Path) -> None:

    async def main() -> None:
        pub, sub = persipubsub.aio.Pub(), persipubsub.aio.Sub()
        await pub.init(pub_id="pub", config_pth=config_pth)
        await sub.init(sub_id="sub", config_pth=config_pth)
        objects.extend([pub, sub])
        tasks.extend(asyncio.ensure_future(receive(sub)) for _ in range(5))
        await pub.send_many(numbered(2))

    objects: list[Any] = []
    tasks: list[Any] = []
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        asyncio.run(main())
        pub.send_many(numbered(5)[2:])
        received = drain(sub, timeout=1)
    assert sorted(set(received) | {b"0", b"1"}) == numbered(5)
    assert lags(config_pth) == {"sub": 0}


# Fork


def _use(pipe: Connection, pub: persipubsub.aio.Pub, sub: persipubsub.aio.Sub) -> None:

    async def main() -> None:
        await pub.send(b"child")
        pipe.send(await receive(sub))

    asyncio.run(main())


@jetstream_server.needs_server
def test_objects_work_in_a_forked_child(config_pth: pathlib.Path) -> None:

    async def begin() -> "tuple[persipubsub.aio.Pub, persipubsub.aio.Sub]":
        pub, sub = persipubsub.aio.Pub(), persipubsub.aio.Sub()
        await pub.init(pub_id="pub", config_pth=config_pth)
        await sub.init(sub_id="sub", config_pth=config_pth)
        await pub.send(b"parent")
        assert await receive(sub) == b"parent"
        return pub, sub

    async def end() -> None:
        await pub.send(b"again")
        assert await receive(sub) == b"again"
        await pub.close()
        await sub.close()

    pub, sub = asyncio.run(begin())
    with Child(_use, pub, sub) as child:
        assert child.get() == b"child"
        child.end()
    asyncio.run(end())
