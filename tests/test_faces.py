"""Test what the blocking classes and those for tasks have in common, on both engines."""

import asyncio
import contextlib
import copy
import datetime
import gc
import json
import math
import pickle
import re
import signal
import time
from pathlib import Path
from typing import Any, Optional

import pytest

import persipubsub.config
from persipubsub import control, errors
from tests import faces, support
from tests.faces import (deploy, drain, figures, fixture_config_pth, fixture_lmdb_pth, on_faces,
                         opened, receive, receive_newest, scenario)

assert fixture_config_pth and fixture_lmdb_pth  # pytest finds them here

pytestmark = on_faces


@scenario
async def test_messages_come_in_order_and_once(face: faces.Face, config_pth: Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        assert await receive(sub) is None
        await pub.send(b"one")
        await pub.send_many([bytearray(b"two"), memoryview(b""), b"three"])
        await pub.send_many([])
        assert await sub.front() == b"one"
        assert await drain(sub) == [b"one", b"two", b"", b"three"]
        assert await sub.front() is None
    assert figures(config_pth).lag == 0


@scenario
async def test_audience(face: faces.Face, config_pth: Path) -> None:
    async with opened(face, config_pth) as (pub, sub), face.pub() as pub_other:
        await pub_other.init("pub_other", config_pth)
        await pub_other.send(b"for other")
        await pub.send(b"for all")
        assert await drain(sub) == [b"for all"]
        await sub.init("other", config_pth)
        assert await drain(sub) == [b"for other", b"for all"]


@pytest.mark.parametrize("kind", [ValueError, GeneratorExit, asyncio.CancelledError, MemoryError])
@scenario
async def test_exception_leaves_the_message(face: faces.Face, config_pth: Path, kind: Any) -> None:
    async with opened(face, config_pth) as (pub, sub):
        await pub.send_many([b"one", b"two"])
        for _ in range(2):
            with pytest.raises(kind):
                async with sub.receive(timeout=0) as msg:
                    assert msg == b"one"
                    raise kind()
        with pytest.raises(kind):
            async with sub.receive_many(10, timeout=0) as msgs:
                assert msgs == [b"one", b"two"]
                raise kind()
        assert await drain(sub) == [b"one", b"two"]


@scenario
async def test_batches(face: faces.Face, config_pth: Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        async with sub.receive_many(3, timeout=0) as msgs:
            assert msgs == []
        await pub.send_many([b"%d" % number for number in range(5)])
        # A batch is not waited for until it is full.
        for expected, timeout in (([b"0", b"1", b"2"], support.HANG_SECS),
                                  ([b"3", b"4"], support.HANG_SECS), ([], 0)):
            async with sub.receive_many(3, timeout=timeout) as msgs:
                assert msgs == expected
        for wrong in (0, -1, True, 1.5, None, "1"):
            with pytest.raises(ValueError, match="max_msgs"):
                sub.receive_many(wrong)
    assert figures(config_pth).lag == 0


@scenario
async def test_pop_to_top(face: faces.Face, config_pth: Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        await pub.send_many([b"one", b"two", b"three"])
        await sub.pop_to_top()
        assert await drain(sub) == [b"three"]


@scenario
async def test_wrong_arguments(face: faces.Face, config_pth: Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        for wrong in ("text", None, 1, 5.0, True, [b"bytes"], (b"bytes", ), {}, object(), bytes):
            with pytest.raises(TypeError):
                await pub.send(wrong)
            for place in range(3):
                with pytest.raises(TypeError):
                    await pub.send_many([b"good"] * place + [wrong] + [b"good"] * (2 - place))
        for wrong in (b"bytes", bytearray(b"b"), memoryview(b"b"), "text", 5, None):
            with pytest.raises(TypeError):
                await pub.send_many(wrong)
        timeouts: list[Any] = [-1, -0.001, "1", b"1", [], 1j, math.nan, -math.inf]
        for timeout in timeouts:
            with pytest.raises(ValueError, match="timeout"):
                sub.receive(timeout=timeout)
            with pytest.raises(ValueError, match="timeout"):
                await pub.send(b"", timeout=timeout)
            with pytest.raises(ValueError, match="timeout"):
                await pub.send(b"", timeout=timeout, msg_id="1")
            with pytest.raises(ValueError, match="timeout"):
                await pub.send_many([b""], timeout=timeout)
        for retries in (0, -1, 1.5, "1", None, True, math.inf):
            with pytest.raises(ValueError, match="retries"):
                sub.receive(retries=retries)
        assert await receive(sub) is None


@scenario
async def test_not_open(face: faces.Face, config_pth: Path, tmp_path: Path) -> None:
    pub, sub = face.pub(), face.sub()
    for _ in range(2):
        for call in (lambda: pub.send(b""), lambda: pub.send_many([]), sub.front, sub.pop_to_top,
                     lambda: receive(sub)):
            with pytest.raises(errors.ClosedError, match="init"):
                await call()
        await pub.init("pub", config_pth)
        await sub.init("sub", config_pth)
        await pub.send(b"one")
        assert await receive(sub, timeout=support.HANG_SECS) == b"one"
        for _ in range(2):
            await pub.close()
            await sub.close()
    other_pth = support.write_config(tmp_path, name="other.json", path=str(tmp_path / "nothing"))
    with pytest.raises(errors.NotInitializedError):
        await pub.init("pub", other_pth)
    with pytest.raises(errors.NotInitializedError):
        await sub.init("sub", other_pth)
    with pytest.raises(errors.ConfigError):
        await sub.init("nobody", config_pth)


@scenario
async def test_message_that_is_too_large(face: faces.Face, tmp_path: Path) -> None:
    config_pth = deploy(tmp_path, HWM_LMDB_SIZE_BYTES=100)
    async with opened(face, config_pth) as (pub, sub):
        for msgs in ([bytes(101)], [b"small", bytes(101)], [bytes(60)] * 2):
            with pytest.raises(errors.MessageTooLargeError):
                await pub.send_many(msgs)
        with pytest.raises(errors.MessageTooLargeError):
            await pub.send(bytes(101))
        await pub.init("pub", config_pth, autosync=True)
        with pytest.raises(errors.MessageTooLargeError):
            await pub.send_many([b"small", bytes(101)])
        await pub.send_many([bytes(60), bytes(40)])
        assert await drain(sub) == [bytes(60), bytes(40)]


@scenario
async def test_one_message_is_at_fault(face: faces.Face, tmp_path: Path) -> None:
    config_pth = deploy(tmp_path, HWM_LMDB_SIZE_BYTES=10000)
    async with opened(face, config_pth) as (pub, sub):
        msgs = [b"%d" % number for number in range(20)]
        msgs[13] = bytes(20000)
        outcomes = await asyncio.gather(*map(pub.send, msgs), return_exceptions=True)
        error = outcomes.pop(13)
        assert isinstance(error, errors.MessageTooLargeError)
        assert outcomes == [None] * 19
        assert sorted(await drain(sub)) == sorted(msgs[:13] + msgs[14:])


@scenario
async def test_waiting_ends_with_the_timeout(face: faces.Face, config_pth: Path) -> None:
    async with opened(face, config_pth) as (_, sub):
        begin = time.monotonic()
        outcomes = await asyncio.gather(receive(sub, 0.3), receive(sub, 0.2))
        assert list(outcomes) == [None, None]
        # uvloop counts in whole milliseconds.
        assert 0.29 <= time.monotonic() - begin < support.HANG_SECS


@scenario
async def test_waiting_is_ended_by_a_message(face: faces.Face, config_pth: Path) -> None:
    times: list[float] = []
    async with opened(face, config_pth) as (pub, sub):
        for number in range(10):
            waiting = asyncio.ensure_future(receive(sub, None))
            await asyncio.sleep(0.02)
            begin = time.monotonic()
            await pub.send(b"%d" % number)
            assert await waiting == b"%d" % number
            times.append(time.monotonic() - begin)
    # Nobody waited for the look once a second; the machine may be busy now and then.
    assert sorted(times)[5] < 0.4, times


@scenario
async def test_waiting_goes_on_while_others_are_served(face: faces.Face, config_pth: Path) -> None:
    times: list[float] = []
    async with opened(face, config_pth) as (pub, sub):
        waiting: set["asyncio.Future[Optional[bytes]]"] = {
            asyncio.ensure_future(receive(sub, None))
            for _ in range(6)
        }
        while waiting:
            # Longer than others look while a message is claimed.
            await asyncio.sleep(0.15)
            begin = time.monotonic()
            await pub.send(b"one")
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            times.append(time.monotonic() - begin)
    assert sorted(times)[3] < 0.4, times


@scenario
async def test_tasks_share_the_messages(face: faces.Face, config_pth: Path) -> None:
    received: list[bytes] = []

    async def consume(sub: Any) -> None:
        while (msg := await receive(sub, timeout=0.5)) is not None:
            received.append(msg)

    async with opened(face, config_pth) as (pub, sub):
        consuming = asyncio.gather(*(consume(sub) for _ in range(10)))
        for first in range(0, 200, 20):
            await asyncio.gather(*(pub.send(b"%d" % number) for number in range(first, first + 20)))
        await consuming
    assert sorted(map(int, received)) == list(range(200))
    assert figures(config_pth).lag == 0


@scenario
async def test_message_given_back_goes_to_who_waits(face: faces.Face, config_pth: Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        await pub.send(b"one")
        with pytest.raises(ValueError):
            async with sub.receive(timeout=0) as msg:
                assert msg == b"one"
                waiting = asyncio.ensure_future(receive(sub, None))
                await asyncio.sleep(0.1)
                assert not waiting.done()
                raise ValueError()
        assert await waiting == b"one"


@pytest.mark.parametrize("is_closed", [True, False])
@scenario
async def test_closing_while_tasks_wait(face: faces.Face, config_pth: Path,
                                        is_closed: bool) -> None:
    async with opened(face, config_pth) as (pub, sub):
        waiting = [asyncio.ensure_future(receive(sub, None)) for _ in range(3)]
        await asyncio.sleep(0.05)
        if is_closed:
            await sub.close()
        else:
            await sub.init("sub", config_pth)
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [errors.ClosedError] * 3
        await pub.send(b"one")
        if is_closed:
            await sub.init("sub", config_pth)
        assert await receive(sub, None) == b"one"


@scenario
async def test_consumer_in_another_process_is_killed(face: faces.Face, config_pth: Path) -> None:
    faces.shorten_ack_wait(config_pth)

    def hold(pipe: support.Connection) -> None:
        with persipubsub.subscriber.Sub() as sub:
            sub.init("sub", config_pth)
            with sub.receive(timeout=support.HANG_SECS) as msg:
                pipe.send(msg)
                time.sleep(2 * support.HANG_SECS)

    with support.Child(hold) as child:
        async with opened(face, config_pth) as (pub, sub):
            await pub.send(b"one")
            assert await asyncio.to_thread(child.get) == b"one"
            waiting = asyncio.ensure_future(receive(sub, None))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            child.kill(signal.SIGKILL)
            assert await waiting == b"one"


@scenario
async def test_details(face: faces.Face, config_pth: Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        begin = datetime.datetime.now(datetime.UTC)
        await pub.send_many([b"one", b"two", b"three"])
        async with sub.receive(timeout=0, details=True) as message:
            assert (message.data, message.attempts, message.dropped_before) == (b"one", 1, 0)
            slack = datetime.timedelta(milliseconds=100)
            end = datetime.datetime.now(datetime.UTC)
            assert message.sent_at.tzinfo is datetime.UTC
            assert begin - slack <= message.sent_at <= end + slack
            number = message.number
        async with sub.receive_many(1, timeout=0, details=True) as messages:
            assert [(found.data, found.number) for found in messages] == [(b"two", number + 1)]
        async for message in sub.messages(timeout=0, details=True):
            assert (message.data, message.number) == (b"three", number + 2)


@scenario
async def test_receive_to_top(face: faces.Face, config_pth: Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        await pub.send_many([b"one", b"two", b"three"])
        with pytest.raises(ValueError):
            async with sub.receive_to_top(timeout=0) as msg:
                assert msg == b"three"
                raise ValueError()
        async with sub.receive_to_top(timeout=0, details=True) as message:
            assert message.data == b"three"
        async with sub.receive_to_top(timeout=0) as msg:
            assert msg is None
        waiting = asyncio.ensure_future(receive_newest(sub))
        await asyncio.sleep(0.05)
        await pub.send(b"four")
        assert await waiting == b"four"
    assert figures(config_pth).lag == 0


# What sends can ask for


@scenario
async def test_message_of_an_id_is_stored_once(face: faces.Face, config_pth: Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        await pub.send(b"one", msg_id="1")
        await asyncio.gather(pub.send(b"again", msg_id=b"1"), pub.send(b"two", msg_id="2"),
                             pub.send(b"three"))
        await pub.send_many([b"again", b"four"], msg_ids=["2", None])
        received = await drain(sub)
        assert (received[0], set(received[1:3]), received[3:]) == (b"one", {b"two",
                                                                            b"three"}, [b"four"])
        for wrong, kind in ((1, TypeError), ("", ValueError), ("x" * 256, ValueError)):
            with pytest.raises(kind):
                await pub.send(b"", msg_id=wrong)
        with pytest.raises(ValueError):
            await pub.send_many([b"", b""], msg_ids=["1"])


@pytest.mark.parametrize("strategy", ["reject", "block"])
@scenario
async def test_queue_that_is_full(face: faces.Face, tmp_path: Path, strategy: str) -> None:
    config_pth = support.write_config(tmp_path, MAX_MSGS_NUM=3, strategy=strategy)
    control.initialize_all_dbs(config_pth)
    async with opened(face, config_pth) as (pub, sub):
        outcomes = await asyncio.gather(*(pub.send(b"one", timeout=0.1) for _ in range(5)),
                                        return_exceptions=True)
        kinds = [type(outcome) for outcome in outcomes]
        assert kinds.count(type(None)) == 3
        assert kinds.count(errors.QueueFullError) == 2
        with pytest.raises(errors.QueueFullError, match="'sub'"):
            await pub.send_many([b"two"], timeout=0)
        if strategy == "block":
            # More seconds than a float has room for: for ever.
            waiting = asyncio.ensure_future(pub.send(b"waited", timeout=10**400))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            assert await receive(sub) == b"one"
            await waiting
            assert await drain(sub) == [b"one", b"one", b"waited"]
        else:
            assert await drain(sub) == [b"one"] * 3
        await pub.send(b"last")
        assert await drain(sub) == [b"last"]


# Iteration


@scenario
async def test_message_is_acknowledged_when_the_next_is_asked_for(face: faces.Face,
                                                                  config_pth: Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        await pub.send_many([b"1", b"2", b"3"])
        seen: list[bytes] = []
        async for msg in sub.messages(timeout=0):
            assert figures(config_pth).lag == 3 - len(seen)
            seen.append(msg)
        assert seen == [b"1", b"2", b"3"]
    assert figures(config_pth).lag == 0


@scenario
async def test_iteration_left_early_leaves_the_message(face: faces.Face, config_pth: Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        await pub.send_many([b"1", b"2"])
        with pytest.raises(ValueError):
            async with contextlib.aclosing(sub.messages(timeout=0)) as messages:
                async for msg in messages:
                    assert msg == b"1"
                    raise ValueError()
        async with contextlib.aclosing(sub.messages()) as messages:
            async for msg in messages:
                if msg == b"2":
                    break
                assert msg == b"1"
        async for msg in sub.messages():
            assert msg == b"2"
            break
        # Without aclosing() it comes back a moment later.
        assert await receive(sub, support.HANG_SECS) == b"2"
    assert figures(config_pth).lag == 0


@pytest.mark.parametrize("prefetch", [2, 100])
@scenario
async def test_several_are_taken_at_once(face: faces.Face, config_pth: Path, prefetch: int) -> None:
    msgs = [b"%d" % number for number in range(5)]
    async with opened(face, config_pth) as (pub, sub):
        await pub.send_many(msgs)
        seen: list[bytes] = []
        async for msg in sub.messages(timeout=0.1, prefetch=prefetch):
            assert figures(config_pth).lag == 5 - len(seen) // prefetch * prefetch
            seen.append(msg)
        assert seen == msgs
        assert figures(config_pth).lag == 0

        await pub.send_many(msgs)
        with pytest.raises(ValueError):
            async with contextlib.aclosing(sub.messages(timeout=0.1,
                                                        prefetch=prefetch)) as messages:
                async for msg in messages:
                    if msg == b"3":
                        raise ValueError()
        async for msg in sub.messages(timeout=support.HANG_SECS, prefetch=prefetch):
            assert msg == b"3"
            break
        assert [await receive(sub, support.HANG_SECS) for _ in range(2)] == [b"3", b"4"]
    assert figures(config_pth).lag == 0
    async with opened(face, config_pth) as (_, sub):
        for wrong in (0, -1, True, 1.5, "1", None):
            with pytest.raises(ValueError, match="Expected prefetch to be an integer from 1 on"):
                async for _ in sub.messages(prefetch=wrong):
                    pass


# What a new user tries


@scenario
async def test_opening_in_the_constructor(face: faces.Face, config_pth: Path) -> None:
    given: list[Any] = [str(config_pth), config_pth, persipubsub.config.read(config_pth)]
    content = json.loads(config_pth.read_text())
    for config in given + [content]:
        async with face.pub("pub", config) as pub, face.sub("sub", config) as sub:
            await pub.send(b"hello")
            assert await receive(sub, support.HANG_SECS) == b"hello"
            for used in (pub, sub):
                assert " of the queue 'queue', open>" in repr(used)
        for used in (pub, sub):
            assert re.fullmatch(
                r"<persipubsub\.[a-z]+\.(Pub 'pub'|Sub 'sub') of the queue 'queue', closed>",
                repr(used))
        with pytest.raises(errors.ClosedError, match="'pub' of the queue 'queue'"):
            await pub.send(b"late")
    assert re.fullmatch(r"<persipubsub\.[a-z]+\.Sub closed>", repr(face.sub()))
    for given_in_part in (("pub", ), (None, config_pth)):
        with pytest.raises(TypeError, match="Expected an id and a configuration"):
            face.pub(*given_in_part)
        with pytest.raises(TypeError, match="Expected an id and a configuration"):
            face.sub(*given_in_part)


@scenario
async def test_constructor_that_can_not_open(face: faces.Face, tmp_path: Path) -> None:
    queue = {"path": str(tmp_path), "subscribers": ["sub"]}
    config = {"pub": {"out_queue": "q"}, "queues": {"q": queue}}
    with pytest.raises(errors.NotInitializedError, match="initialize_all_dbs"):
        async with face.pub("pub", config):
            pass
    with pytest.raises(errors.ConfigError, match="did you mean 'pub'"):
        async with face.pub("puub", config):
            pass
    with pytest.raises(FileNotFoundError) as caught:
        async with face.sub("sub", tmp_path / "nothing.json"):
            pass
    assert isinstance(caught.value, errors.ConfigError)


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
@scenario
async def test_pickling(face: faces.Face, lmdb_pth: Path, protocol: int) -> None:
    async with opened(face, lmdb_pth) as opened_now:
        for used in opened_now:
            with pytest.raises(TypeError, match="to be opened in each process") as caught:
                pickle.dumps(used, protocol)
            assert "open>" in str(caught.value)
            with pytest.raises(TypeError, match="to be opened in each process"):
                copy.copy(used)


@scenario
async def test_receipt_tells_that_it_is_no_message(face: faces.Face, lmdb_pth: Path) -> None:
    async with opened(face, lmdb_pth) as (pub, sub):
        await pub.send(b"message")
        for name, arguments in (("receive", ()), ("receive_to_top", ()), ("receive_many", (1, ))):
            with pytest.warns(ResourceWarning, match="never entered, and received nothing"):
                with pytest.raises(TypeError, match=r"with sub\.receive") as caught:
                    bool(getattr(sub, name)(*arguments))
                assert ("async with" in str(caught.value)) == (face is not faces.BLOCKING)
                assert "\n" not in str(caught.value)
                del caught
                gc.collect()
        assert await drain(sub) == [b"message"]


@scenario
async def test_statistics_of_the_subscriber(face: faces.Face, config_pth: Path) -> None:
    async with opened(face, config_pth) as (pub, sub):
        await pub.send_many([b"one", b"two"])
        async with sub.receive(timeout=support.HANG_SECS):
            found = await sub.statistics()
            assert (found.subscriber, found.lag, found.in_flight) == ("sub", 2, 1)
        found, others = await sub.statistics(), figures(config_pth)
        assert (found.lag, found.position) == (others.lag, others.position) == (1, found.position)


@scenario
async def test_losses_are_counted(face: faces.Face, tmp_path: Path) -> None:
    config_pth = deploy(tmp_path, MAX_MSGS_NUM=10, strategy="prune_first")
    async with opened(face, config_pth) as (pub, sub):
        for number in range(25):
            await pub.send(b"%d" % number)
        dropped = (await sub.statistics()).dropped_by_mark
        assert 0 < dropped <= 20
        async with sub.receive_many(3, timeout=0, details=True) as messages:
            assert messages[0].data == b"%d" % dropped
            assert [message.dropped_before for message in messages] == [dropped, 0, 0]
        async with sub.receive(timeout=0, details=True) as message:
            assert message.dropped_before == 0
