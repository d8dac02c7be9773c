"""Test receiving: what stays, what goes, what waits."""

import concurrent.futures
import math
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import persipubsub.errors
import persipubsub.queue
from persipubsub import Pub, Sub, control
from tests import support


def receive(sub: Sub, timeout: float = 0) -> bytes | None:
    with sub.receive(timeout=timeout) as message:
        return message


# Acknowledging and giving back


def test_leaving_early_acknowledges(pub: Pub, sub: Sub) -> None:
    pub.send_many([b"one", b"two", b"three"])
    assert receive(sub) == b"one"
    for _ in range(1):
        with sub.receive(timeout=0) as message:
            if message:
                continue
    while True:
        with sub.receive(timeout=0) as message:
            assert message == b"three"
            break
    assert sub.front() is None


def test_exception_without_a_message(sub: Sub) -> None:
    with pytest.raises(KeyError):
        with sub.receive(timeout=0) as message:
            assert message is None
            raise KeyError


@pytest.mark.parametrize("raised", [None, KeyError])
def test_close_inside_of_a_receive(config_pth: Path, pub: Pub,
                                   raised: type[Exception] | None) -> None:
    """An exception beside the close is the one that is seen."""
    pub.send(b"message")
    sub = Sub("sub", config_pth)
    pub.close()
    with pytest.raises(raised or persipubsub.errors.ClosedError):
        with sub.receive(timeout=0) as message:
            assert message == b"message"
            sub.close()
            if raised is not None:
                raise raised
    sub.init(sub_id="sub", config_pth=config_pth)
    assert receive(sub) == b"message"
    sub.close()


def test_close_inside_of_a_receive_beside_another_user(config_pth: Path, pub: Pub) -> None:
    """The store stays open for the publisher: what was given back must not be acknowledged."""
    pub.send(b"message")
    sub = Sub("sub", config_pth)
    with Sub("sub", config_pth) as other:
        with pytest.raises(persipubsub.errors.ClosedError, match="queue"):
            with sub.receive(timeout=0):
                sub.close()
                assert receive(other) == b"message"
                pub.send(b"next")
        assert receive(other) == b"next"


@pytest.mark.parametrize("how", ["receive", "receive_many", "receive_to_top", "front", "wait"])
def test_subscriber_that_was_removed_and_added_again(config_pth: Path, pub: Pub, sub: Sub,
                                                     how: str) -> None:
    """Who was there before is another subscriber: they would have the same message at once."""

    def again() -> None:
        control.remove_subscriber(config_pth, "queue", "sub")
        control.initialize_all_dbs(config_pth)

    errors: list[BaseException] = []

    def use() -> None:
        try:
            if how == "front":
                sub.front()
            elif how == "receive_many":
                with sub.receive_many(10, timeout=support.HANG_SECS):
                    pass
            else:
                with getattr(sub, "receive_to_top" if how == "receive_to_top" else "receive")(
                        timeout=support.HANG_SECS):
                    pass
        except persipubsub.errors.NotInitializedError as error:
            errors.append(error)

    with sub.receive(timeout=0) as message:
        assert message is None
    thread = threading.Thread(target=use)
    if how == "wait":
        thread.start()
        again()
    else:
        again()
        pub.send_many([b"1", b"2"])
        thread.start()
    thread.join(2 * support.HANG_SECS)
    assert not thread.is_alive()
    assert len(errors) == 1 and "'sub'" in str(errors[0])
    if how == "wait":
        pub.send_many([b"1", b"2"])
    sub.init(sub_id="sub", config_pth=config_pth)
    assert [receive(sub), receive(sub)] == [b"1", b"2"]


# Waiting


def test_message_that_is_there_is_not_waited_for(pub: Pub, sub: Sub) -> None:
    for timeout in (0, 0.0, 1e-9, 1, 1e9, 1e300, 10**400, math.inf, None):
        for retries in (1, 10, 10**9):
            pub.send(b"message")
            with sub.receive(timeout=timeout, retries=retries) as message:
                assert message == b"message"


# Life of a subscriber


def test_receipt_of_a_closed_subscriber(config_pth: Path, pub: Pub) -> None:
    pub.send(b"message")
    sub = Sub("sub", config_pth)
    receipt = sub.receive(timeout=support.HANG_SECS)
    sub.close()
    with pytest.raises(persipubsub.errors.ClosedError):
        with receipt:
            raise AssertionError("Expected no message from a closed subscriber.")
    sub.init(sub_id="sub", config_pth=config_pth)
    assert receive(sub) == b"message"
    sub.close()


def test_init_while_another_thread_does_so(config_pth: Path, sub: Sub,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    closing = persipubsub.queue.Queue.close
    others = [threading.Thread(target=sub.init, args=("sub", config_pth))]

    def close(queue: persipubsub.queue.Queue) -> None:
        """While what was open before is closed, another thread opens it."""
        closing(queue)
        if others:
            other = others.pop()
            other.start()
            other.join(support.HANG_SECS)

    with monkeypatch.context() as context:
        context.setattr(persipubsub.queue.Queue, "close", close)
        sub.init(sub_id="sub", config_pth=config_pth)
    assert not others
    assert sub.front() is None
    sub.close()
    control.compact(config_pth)  # nobody has it open


# Details


def run_between(call: Callable[[], object], place: int, other: Callable[[], object]) -> bool:
    """Call a function, and another one in a thread in the middle: before the line of a number."""
    lines = 0
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        begun: list[concurrent.futures.Future[object]] = []

        def trace(_: types.FrameType, event: str, __: object) -> Any:
            nonlocal lines
            lines += event == "line"
            if lines == place and not begun:
                begun.append(executor.submit(other))
                # If this thread holds a lock, the other one goes on when this one does.
                concurrent.futures.wait(begun, 0.01)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            call()
        finally:
            sys.settrace(before)
        for future in begun:
            future.result(support.HANG_SECS)
        return bool(begun)


def test_threads_share_the_count_of_what_was_dropped(tmp_path: Path) -> None:
    """A thread that looked at the queue first may count last: nothing is counted twice, or back."""
    config_pth = support.make_queue(tmp_path, durability="os", MAX_MSGS_NUM=10)
    counts: list[int] = []

    def receive_details() -> None:
        with sub.receive(timeout=0, details=True) as message:
            assert message is not None
            counts.append(message.dropped_before)

    def send_and_receive() -> None:
        pub.send_many([b"message"] * 6)
        receive_details()

    with Pub("pub", config_pth) as pub, Sub("sub", config_pth) as sub:
        pub.send_many([b"message"] * 9)
        place = 1
        while run_between(receive_details, place, send_and_receive):
            pub.send_many([b"message"] * 2)
            place += 1
        print(f"{place} lines, {sum(counts)} messages dropped")
        assert place > 20
        receive_details()
        assert min(counts) >= 0
        assert sum(counts) == sub.statistics().dropped_by_mark > 100
