"""Test receiving: what stays, what goes, what waits."""

# pylint: disable=missing-function-docstring

import math
import pathlib
import sys
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest

import persipubsub.control
import persipubsub.errors
import persipubsub.publisher
import persipubsub.queue
import persipubsub.subscriber
from tests import support


@pytest.fixture(name="config_pth")
def fixture_config_pth(tmp_path: pathlib.Path) -> pathlib.Path:
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    return config_pth


@pytest.fixture(name="pub")
def fixture_pub(config_pth: pathlib.Path) -> Iterator[persipubsub.publisher.Pub]:
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)
        yield pub


@pytest.fixture(name="sub")
def fixture_sub(config_pth: pathlib.Path) -> Iterator[persipubsub.subscriber.Sub]:
    with persipubsub.subscriber.Sub() as sub:
        sub.init(sub_id="sub", config_pth=config_pth)
        yield sub


def receive(sub: persipubsub.subscriber.Sub, timeout: float = 0) -> bytes | None:
    with sub.receive(timeout=timeout) as message:
        return message


def acknowledged(config_pth: pathlib.Path) -> int:
    with support.open_queue(config_pth) as queue:
        return queue.statistics().subscribers[0].acknowledged


# Acknowledging and giving back


def test_messages_come_in_order_and_once(config_pth: pathlib.Path, pub: persipubsub.publisher.Pub,
                                         sub: persipubsub.subscriber.Sub) -> None:
    pub.send(b"one")
    pub.send_many([b"two", b""])
    assert [receive(sub) for _ in range(4)] == [b"one", b"two", b"", None]
    assert acknowledged(config_pth) == 3


class Own(BaseException):
    """Be neither an error nor anything that Python knows."""


@pytest.mark.parametrize("kind", [
    ValueError, OSError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, Own,
    persipubsub.errors.ClosedError, AssertionError, MemoryError
])
def test_any_exception_leaves_the_message(config_pth: pathlib.Path, pub: persipubsub.publisher.Pub,
                                          sub: persipubsub.subscriber.Sub,
                                          kind: type[BaseException]) -> None:
    pub.send_many([b"one", b"two"])
    for _ in range(3):
        with pytest.raises(kind) as caught:
            with sub.receive(timeout=0) as message:
                assert message == b"one"
                raise kind("mine")
        assert caught.value.args == ("mine", )
        assert sub.front() == b"one"
    assert acknowledged(config_pth) == 0
    assert [receive(sub) for _ in range(3)] == [b"one", b"two", None]


def test_generator_that_is_closed_leaves_the_message(pub: persipubsub.publisher.Pub,
                                                     sub: persipubsub.subscriber.Sub) -> None:

    def generate() -> Generator[bytes | None, None, None]:
        with sub.receive(timeout=0) as message:
            yield message

    pub.send(b"message")
    generator = generate()
    assert next(generator) == b"message"
    assert sub.front() is None
    generator.close()
    assert sub.front() == b"message"
    for message in generate():
        assert message == b"message"
    assert sub.front() is None


def test_leaving_early_acknowledges(pub: persipubsub.publisher.Pub,
                                    sub: persipubsub.subscriber.Sub) -> None:
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


def test_nested_receives_give_different_messages(config_pth: pathlib.Path,
                                                 pub: persipubsub.publisher.Pub,
                                                 sub: persipubsub.subscriber.Sub) -> None:
    pub.send_many([b"%d" % number for number in range(4)])
    with sub.receive(timeout=0) as first:
        with sub.receive(timeout=0) as second:
            with pytest.raises(KeyError):
                with sub.receive(timeout=0) as third:
                    assert (first, second, third) == (b"0", b"1", b"2")
                    assert sub.front() == b"3"
                    raise KeyError
            assert sub.front() == b"2"
        assert receive(sub) == b"2"
        assert sub.front() == b"3"
    assert acknowledged(config_pth) == 3
    assert [receive(sub), receive(sub)] == [b"3", None]


def test_outer_receive_fails_alone(pub: persipubsub.publisher.Pub,
                                   sub: persipubsub.subscriber.Sub) -> None:
    pub.send_many([b"one", b"two"])
    with pytest.raises(KeyError):
        with sub.receive(timeout=0):
            assert receive(sub) == b"two"
            raise KeyError
    assert [receive(sub), receive(sub)] == [b"one", None]


def test_exception_without_a_message(sub: persipubsub.subscriber.Sub) -> None:
    with pytest.raises(KeyError):
        with sub.receive(timeout=0) as message:
            assert message is None
            raise KeyError


def test_receipt_that_is_not_entered_takes_nothing(pub: persipubsub.publisher.Pub,
                                                   sub: persipubsub.subscriber.Sub) -> None:
    pub.send(b"message")
    for _ in range(3):
        sub.receive(timeout=0)
    assert receive(sub) == b"message"


def test_two_objects_share_the_work(config_pth: pathlib.Path, pub: persipubsub.publisher.Pub,
                                    sub: persipubsub.subscriber.Sub) -> None:
    pub.send_many([b"one", b"two"])
    with persipubsub.subscriber.Sub() as other:
        other.init(sub_id="sub", config_pth=config_pth)
        with sub.receive(timeout=0) as first, other.receive(timeout=0) as second:
            assert (first, second) == (b"one", b"two")
            assert receive(other) is None
    assert sub.front() is None


def test_close_inside_of_a_receive(config_pth: pathlib.Path,
                                   pub: persipubsub.publisher.Pub) -> None:
    pub.send(b"message")
    sub = persipubsub.subscriber.Sub()
    sub.init(sub_id="sub", config_pth=config_pth)
    pub.close()
    with pytest.raises(persipubsub.errors.ClosedError):
        with sub.receive(timeout=0) as message:
            assert message == b"message"
            sub.close()
    sub.init(sub_id="sub", config_pth=config_pth)
    assert receive(sub) == b"message"
    sub.close()


def test_close_inside_of_a_receive_beside_another_user(config_pth: pathlib.Path,
                                                       pub: persipubsub.publisher.Pub) -> None:
    """The store stays open for the publisher: what was given back must not be acknowledged."""
    pub.send(b"message")
    sub = persipubsub.subscriber.Sub()
    sub.init(sub_id="sub", config_pth=config_pth)
    with persipubsub.subscriber.Sub() as other:
        other.init(sub_id="sub", config_pth=config_pth)
        with pytest.raises(persipubsub.errors.ClosedError, match="queue"):
            with sub.receive(timeout=0):
                sub.close()
                assert receive(other) == b"message"
                pub.send(b"next")
        assert receive(other) == b"next"


@pytest.mark.parametrize("how", ["receive", "receive_many", "receive_to_top", "front", "wait"])
def test_subscriber_that_was_removed_and_added_again(config_pth: pathlib.Path,
                                                     pub: persipubsub.publisher.Pub,
                                                     sub: persipubsub.subscriber.Sub,
                                                     how: str) -> None:
    """Who was there before is another subscriber: they would have the same message at once."""

    def again() -> None:
        persipubsub.control.remove_subscriber(config_pth, "queue", "sub")
        persipubsub.control.initialize_all_dbs(config_pth)

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


@pytest.mark.parametrize("name", ["receive", "receive_to_top"])
def test_subscriber_that_was_added_again_to_an_empty_queue(config_pth: pathlib.Path,
                                                           sub: persipubsub.subscriber.Sub,
                                                           name: str) -> None:
    persipubsub.control.remove_subscriber(config_pth, "queue", "sub")
    persipubsub.control.initialize_all_dbs(config_pth)
    with pytest.raises(persipubsub.errors.NotInitializedError, match="added again"):
        with getattr(sub, name)(timeout=0):
            pass


def test_exception_beside_a_close_is_the_one_that_is_seen(config_pth: pathlib.Path,
                                                          pub: persipubsub.publisher.Pub) -> None:
    pub.send(b"message")
    sub = persipubsub.subscriber.Sub()
    sub.init(sub_id="sub", config_pth=config_pth)
    pub.close()
    with pytest.raises(KeyError):
        with sub.receive(timeout=0):
            sub.close()
            raise KeyError
    sub.init(sub_id="sub", config_pth=config_pth)
    assert receive(sub) == b"message"
    sub.close()


def test_receive_many(config_pth: pathlib.Path, pub: persipubsub.publisher.Pub,
                      sub: persipubsub.subscriber.Sub) -> None:
    sent = [b"%d" % number for number in range(10)]
    pub.send_many(sent)
    with pytest.raises(KeyError):
        with sub.receive_many(max_msgs=4, timeout=0) as messages:
            assert messages == sent[:4]
            raise KeyError
    assert acknowledged(config_pth) == 0
    received: list[bytes] = []
    while True:
        with sub.receive_many(max_msgs=4, timeout=0) as messages:
            if not messages:
                break
            received.extend(messages)
    assert received == sent
    assert acknowledged(config_pth) == 10
    for wrong in (0, -1, 1.0, None, True, "1"):
        with pytest.raises(ValueError, match="max_msgs"):
            sub.receive_many(max_msgs=wrong)  # type: ignore[arg-type]


# Waiting


@pytest.mark.parametrize("timeout", [-1, -0.001, math.nan, -math.inf, "1", b"1", [], 1j], ids=repr)
def test_wrong_timeout(sub: persipubsub.subscriber.Sub, timeout: Any) -> None:
    with pytest.raises(ValueError, match="timeout"):
        sub.receive(timeout=timeout)


@pytest.mark.parametrize("retries", [0, -1, 1.5, "1", None, True, math.inf], ids=repr)
def test_wrong_retries(sub: persipubsub.subscriber.Sub, retries: Any) -> None:
    with pytest.raises(ValueError, match="retries"):
        sub.receive(retries=retries)


@pytest.mark.parametrize("timeout", [0, 0.0, 1e-9, 1, 1e9, 1e300, 10**400, math.inf, None],
                         ids=lambda timeout: repr(timeout)[:10])
@pytest.mark.parametrize("retries", [1, 10, 10**9])
def test_message_that_is_there_is_not_waited_for(pub: persipubsub.publisher.Pub,
                                                 sub: persipubsub.subscriber.Sub,
                                                 timeout: float | None, retries: int) -> None:
    pub.send(b"message")
    with sub.receive(timeout=timeout, retries=retries) as message:
        assert message == b"message"


@pytest.mark.parametrize("retries", [1, 10, 1000])
def test_timeout_ends_the_wait(sub: persipubsub.subscriber.Sub, retries: int) -> None:
    start = time.monotonic()
    with sub.receive(timeout=0.15, retries=retries) as message:
        assert message is None
    assert 0.15 <= time.monotonic() - start < support.HANG_SECS / 2


@pytest.mark.parametrize("timeout", [None, math.inf, 1e300, support.HANG_SECS], ids=repr)
def test_message_ends_the_wait(pub: persipubsub.publisher.Pub, sub: persipubsub.subscriber.Sub,
                               timeout: float | None) -> None:
    received: list[bytes | None] = []

    def wait() -> None:
        with sub.receive(timeout=timeout) as message:
            received.append(message)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    pub.send(b"message")
    thread.join(support.HANG_SECS)
    assert received == [b"message"]


def test_close_ends_the_wait(config_pth: pathlib.Path) -> None:
    sub = persipubsub.subscriber.Sub()
    sub.init(sub_id="sub", config_pth=config_pth)
    results: list[str] = []
    is_waiting = threading.Event()

    def wait() -> None:

        def enter() -> None:
            receipt = sub.receive(timeout=support.HANG_SECS)
            is_waiting.set()
            with receipt:
                pass

        results.append(support.outcome(enter))

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert is_waiting.wait(support.HANG_SECS)
    sub.close()
    thread.join(support.HANG_SECS / 2)
    assert results == ["ClosedError"]


# Looking and skipping


def test_front_takes_nothing(pub: persipubsub.publisher.Pub,
                             sub: persipubsub.subscriber.Sub) -> None:
    assert sub.front() is None
    pub.send_many([b"", b"two"])
    assert [sub.front(), sub.front()] == [b"", b""]
    assert receive(sub) == b""
    assert sub.front() == b"two"


def test_pop_to_top(pub: persipubsub.publisher.Pub, sub: persipubsub.subscriber.Sub) -> None:
    sub.pop_to_top()
    assert sub.front() is None
    pub.send(b"single")
    sub.pop_to_top()
    assert sub.front() == b"single"
    pub.send_many([b"%d" % number for number in range(100)])
    sub.pop_to_top()
    sub.pop_to_top()
    assert [receive(sub), receive(sub)] == [b"99", None]
    sub.pop_to_top()
    assert receive(sub) is None


def test_pop_to_top_for_one_of_two(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path,
                                      publishers={
                                          "pub": ["one", "two"],
                                          "other": ["two"]
                                      },
                                      subscribers=["one", "two"])
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    with persipubsub.publisher.Pub() as pub, persipubsub.publisher.Pub() as other:
        pub.init(pub_id="pub", config_pth=config_pth)
        other.init(pub_id="other", config_pth=config_pth)
        pub.send_many([b"a", b"b"])
        other.send(b"not for one")
    with persipubsub.subscriber.Sub() as one, persipubsub.subscriber.Sub() as two:
        one.init(sub_id="one", config_pth=config_pth)
        two.init(sub_id="two", config_pth=config_pth)
        one.pop_to_top()
        assert [receive(one), receive(one)] == [b"b", None]
        assert [receive(two) for _ in range(4)] == [b"a", b"b", b"not for one", None]


# Life of a subscriber


def test_use_before_init_and_after_close(config_pth: pathlib.Path,
                                         pub: persipubsub.publisher.Pub) -> None:
    sub = persipubsub.subscriber.Sub()
    for _ in range(2):
        for use in (sub.receive, sub.front, sub.pop_to_top, lambda: sub.receive_many(1)):
            with pytest.raises(persipubsub.errors.ClosedError, match="but got: init"):
                use()
        sub.close()
        sub.init(sub_id="sub", config_pth=config_pth)
        pub.send(b"message")
        assert receive(sub) == b"message"
        sub.close()
        sub.close()


def test_receipt_of_a_closed_subscriber(config_pth: pathlib.Path,
                                        pub: persipubsub.publisher.Pub) -> None:
    pub.send(b"message")
    sub = persipubsub.subscriber.Sub()
    sub.init(sub_id="sub", config_pth=config_pth)
    receipt = sub.receive(timeout=support.HANG_SECS)
    sub.close()
    with pytest.raises(persipubsub.errors.ClosedError):
        with receipt:
            raise AssertionError("Expected no message from a closed subscriber.")
    sub.init(sub_id="sub", config_pth=config_pth)
    assert receive(sub) == b"message"
    sub.close()


def test_init_again(tmp_path: pathlib.Path, config_pth: pathlib.Path,
                    pub: persipubsub.publisher.Pub, sub: persipubsub.subscriber.Sub) -> None:
    pub.send_many([b"one", b"two"])
    sub.init(sub_id="sub", config_pth=config_pth)
    assert receive(sub) == b"one"
    other = support.write_config(tmp_path, name="other.json", path=str(tmp_path / "other"))
    with pytest.raises(persipubsub.errors.NotInitializedError):
        sub.init(sub_id="sub", config_pth=other)
    assert sub.front() == b"two"
    persipubsub.control.initialize_all_dbs(config_pth=other)
    sub.init(sub_id="sub", config_pth=other)
    assert sub.front() is None


def test_init_while_another_thread_does_so(config_pth: pathlib.Path,
                                           sub: persipubsub.subscriber.Sub,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    support.init_in_between(monkeypatch, lambda: sub.init(sub_id="sub", config_pth=config_pth))
    assert sub.front() is None
    sub.close()
    persipubsub.control.compact(config_pth)  # nobody has it open


@pytest.mark.parametrize("name", ["nobody", "pub", "queue", "queues", ""])
def test_unknown_subscriber(config_pth: pathlib.Path, name: str) -> None:
    with pytest.raises(persipubsub.errors.ConfigError, match="config.json"):
        persipubsub.subscriber.Sub().init(sub_id=name, config_pth=config_pth)


def test_many_threads_open_and_close(config_pth: pathlib.Path,
                                     sub: persipubsub.subscriber.Sub) -> None:

    def use(number: int) -> None:
        for _ in range(20):
            sub.init(sub_id="sub", config_pth=config_pth)
            if number == 0:
                sub.close()

    threads = [threading.Thread(target=use, args=(number, )) for number in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(support.HANG_SECS)
    finally:
        sys.setswitchinterval(interval)
    sub.close()
    persipubsub.control.compact(config_pth)


def test_not_initialized(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path)
    with pytest.raises(persipubsub.errors.NotInitializedError, match="initialize_all_dbs"):
        persipubsub.subscriber.Sub().init(sub_id="sub", config_pth=config_pth)
    assert not (tmp_path / "queue").exists()
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    more = support.write_config(tmp_path, subscribers=["sub", "new"], name="more.json")
    with pytest.raises(persipubsub.errors.NotInitializedError, match="new"):
        persipubsub.subscriber.Sub().init(sub_id="new", config_pth=more)


def test_context_manager_closes(config_pth: pathlib.Path) -> None:
    with persipubsub.subscriber.Sub() as sub:
        sub.init(sub_id="sub", config_pth=config_pth)
    with pytest.raises(persipubsub.errors.ClosedError):
        sub.front()


def test_identifiers_of_any_kind(tmp_path: pathlib.Path) -> None:
    names = ["a", "ü" * 127, "with space", "a/b", "..", "{}", "data", "\n", "漢字", "x" * 255]
    config_pth = support.write_config(tmp_path, publishers={"pub": names}, subscribers=names)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)
        pub.send(b"message")
    for name in names:
        with persipubsub.subscriber.Sub() as sub:
            sub.init(sub_id=name, config_pth=config_pth)
            assert [receive(sub), receive(sub)] == [b"message", None]
