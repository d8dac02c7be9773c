"""
Test what every engine has to do, through what users call.

Each test runs on a queue in a directory and on a stream of a real server.
"""

# Receipts are entered and left by hand where a test needs that.
# pylint: disable=unnecessary-dunder-call

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

import persipubsub.subscriber
from persipubsub import Pub, Sub, config, control, errors
from tests import jetstream_server
from tests.support import (HANG_SECS, Child, Connection, count_descriptors, make_queue, outcome,
                           until, write_config)

#: Writes a configuration file, initializes its queue, and returns the path of the file.
Deploy: TypeAlias = Callable[..., Path]

_COUNTER = itertools.count()


@pytest.fixture(name="deploy",
                params=["lmdb", pytest.param("nats", marks=jetstream_server.needs_server)])
def _deploy(request: pytest.FixtureRequest, tmp_path: Path) -> Deploy:

    def deploy(ack_wait: float = jetstream_server.FOR_EVER_SECS, **arguments: Any) -> Path:
        if request.param == "nats":
            servers = request.getfixturevalue("servers")
            arguments.setdefault("busy_timeout_secs", 10)
            arguments["path"] = servers.path(f"queue{next(_COUNTER)}", ack_wait=ack_wait)
        return make_queue(tmp_path, **arguments)

    return deploy


def open_pub(config_pth: Path, pub_id: str = "pub") -> Pub:
    return Pub(pub_id, config_pth)


def open_sub(config_pth: Path, sub_id: str = "sub") -> Sub:
    return Sub(sub_id, config_pth)


def drain(sub: Sub, timeout: float = 0.15) -> list[bytes]:
    received: list[bytes] = []
    while True:
        with sub.receive(timeout=timeout) as msg:
            if msg is None:
                return received
            received.append(msg)


def lags(config_pth: Path) -> dict[str, int]:
    figures = control.statistics(config_pth)["queue"]
    return {one.subscriber: one.lag for one in figures.subscribers}


def numbered(count: int) -> list[bytes]:
    return [str(number).encode() for number in range(count)]


def test_every_subscriber_gets_every_message(deploy: Deploy) -> None:
    names = [
        "a", "b.with *> odd/\\name", "\xe4" * 100, "ü" * 127, "..", "{}", "data", "\n", "漢字",
        "x" * 255
    ]
    config_pth = deploy(publishers={"pub": names}, subscribers=names)
    with open_pub(config_pth) as pub:
        pub.send_many(numbered(5))
        pub.send(b"last")
    assert lags(config_pth) == {name: 6 for name in names}
    for name in names:
        with open_sub(config_pth, name) as sub:
            assert drain(sub) == numbered(5) + [b"last"]
    assert lags(config_pth) == {name: 0 for name in names}


def test_publishers_address_some_subscribers(deploy: Deploy) -> None:
    publishers = {"pub": ("a", "b", "c"), "two": ("a", "b"), "one": ("c", )}
    config_pth = deploy(publishers=publishers, subscribers=["a", "b", "c"])
    for identifier, number in itertools.product(publishers, range(2)):
        with open_pub(config_pth, identifier) as pub:
            pub.send(f"{identifier}{number}".encode())
    for name, expected in (("a", ["pub", "two"]), ("b", ["pub", "two"]), ("c", ["pub", "one"])):
        with open_sub(config_pth, name) as sub:
            assert drain(sub) == [
                f"{one}{number}".encode() for one in expected for number in range(2)
            ]


def test_competing_consumers_share(deploy: Deploy) -> None:
    config_pth = deploy()
    with open_pub(config_pth) as pub, open_sub(config_pth) as one, open_sub(config_pth) as two:
        pub.send_many(numbered(3))
        with one.receive(timeout=HANG_SECS) as first, two.receive(timeout=HANG_SECS) as second:
            assert (first, second) == (b"0", b"1")
            assert one.front() == b"2"
            with two.receive_many(max_msgs=10, timeout=HANG_SECS) as rest:
                assert rest == [b"2"]
                assert one.front() is None
                with one.receive(timeout=0.05) as nothing:
                    assert nothing is None
        assert not drain(one)


def test_message_stays_with_a_consumer_that_takes_its_time(deploy: Deploy) -> None:
    config_pth = deploy(ack_wait=1)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub, open_sub(config_pth) as other:
        pub.send(b"hello")
        with sub.receive(timeout=HANG_SECS) as msg:
            assert msg == b"hello"
            # Longer than ack_wait of the stream.
            assert not drain(other, timeout=2)
        assert not drain(other)


def test_closing_gives_back_what_is_received(deploy: Deploy) -> None:
    config_pth = deploy()
    with open_pub(config_pth) as pub, open_sub(config_pth) as other:
        pub.send(b"hello")
        sub = open_sub(config_pth)
        receipt = sub.receive(timeout=HANG_SECS)
        assert receipt.__enter__() == b"hello"
        sub.close()
        with other.receive(timeout=HANG_SECS) as msg:
            assert msg == b"hello"


def test_front_takes_nothing(deploy: Deploy) -> None:
    config_pth = deploy()
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        assert sub.front() is None
        pub.send_many(numbered(2))
        assert [sub.front(), sub.front()] == [b"0", b"0"]
        with sub.receive(timeout=HANG_SECS) as msg:
            assert msg == b"0"
            assert sub.front() == b"1"
        assert sub.front() == b"1"
        assert drain(sub) == [b"1"]
        assert sub.front() is None


def test_pop_to_top_leaves_the_newest(deploy: Deploy) -> None:
    config_pth = deploy(publishers={"pub": ("sub", "other")}, subscribers=("sub", "other"))
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        sub.pop_to_top()
        pub.send_many(numbered(600))
        sub.pop_to_top()
        assert sub.front() == b"599"
        sub.pop_to_top()
        assert drain(sub) == [b"599"]
    assert lags(config_pth) == {"sub": 0, "other": 600}


@pytest.mark.parametrize("strategy", ["prune_first", "prune_last"])
def test_mark_of_messages_drops_half(deploy: Deploy, strategy: str) -> None:
    config_pth = deploy(MAX_MSGS_NUM=10, strategy=strategy)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        for message in numbered(11):
            pub.send(message)
        # As the original: half are left, the new one included.
        kept = numbered(10)[6:] if strategy == "prune_first" else numbered(4)
        assert drain(sub) == kept + [b"10"]


@pytest.mark.parametrize("strategy", ["prune_first", "prune_last"])
def test_mark_of_bytes_makes_room(deploy: Deploy, strategy: str) -> None:
    config_pth = deploy(HWM_LMDB_SIZE_BYTES=100000, strategy=strategy)
    messages = [number + b"." * 20000 for number in numbered(10)]
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        for message in messages:
            pub.send(message)
        received = drain(sub)
    assert received[-1] == messages[-1]
    assert 2 <= len(received) <= 5
    assert received == [message for message in messages if message in received]
    assert (messages[0] in received) == (strategy == "prune_last")


def test_batch_makes_room_for_itself(deploy: Deploy) -> None:
    config_pth = deploy(MAX_MSGS_NUM=10)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(8))
        batch = [b"batch" + message for message in numbered(10)]
        pub.send_many(batch)
        assert drain(sub)[-10:] == batch


def test_old_messages_are_dropped(deploy: Deploy) -> None:
    config_pth = deploy(MSG_TIMEOUT_SECS=1.5)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send(b"old")
        time.sleep(1.6)  # as old as that takes time
        assert sub.front() is None
        is_slow = True
        while is_slow:
            begin = time.monotonic()
            pub.send(b"new")
            received = drain(sub, timeout=0.1)
            # On a machine that is very busy, it may be old before it is received.
            is_slow = time.monotonic() - begin > 1.4
        assert received == [b"new"]
        pub.send(b"old")
        time.sleep(1.6)  # as old as that takes time
        control.prune_dangling_messages(config_pth)
        assert lags(config_pth) == {"sub": 0}


def test_clear_drops_all(deploy: Deploy) -> None:
    config_pth = deploy(publishers={"pub": ("a", "b")}, subscribers=("a", "b"))
    with open_pub(config_pth) as pub, open_sub(config_pth, "a") as sub:
        pub.send_many(numbered(5))
        with sub.receive(timeout=HANG_SECS):
            pass
        number = control.statistics(config_pth)["queue"].next_number
        assert control.clear_all_subs(config_pth) == {"queue": 9}
        assert not drain(sub)
        assert lags(config_pth) == {"a": 0, "b": 0}
        pub.send(b"after")
        assert drain(sub) == [b"after"]
    # No number is used twice.
    assert control.statistics(config_pth)["queue"].next_number == number + 1


def test_statistics_tell_who_is_behind(deploy: Deploy) -> None:
    config_pth = deploy(publishers={"pub": ("a", "b")}, subscribers=("a", "b"), MAX_MSGS_NUM=20)
    with open_pub(config_pth) as pub, open_sub(config_pth, "a") as sub:
        pub.send_many(numbered(10))
        with sub.receive_many(max_msgs=4, timeout=HANG_SECS):
            pass
        with sub.receive(timeout=HANG_SECS):
            figures = control.statistics(config_pth)["queue"]
    assert (figures.messages, figures.message_share, figures.next_number) == (10, 0.5, 11)
    assert figures.oldest_age_seconds is not None and 0 <= figures.oldest_age_seconds < HANG_SECS
    assert [(one.subscriber, one.lag, one.position, one.in_flight)
            for one in figures.subscribers] == [("a", 6, 5, 1), ("b", 10, 1, 0)]


def test_new_subscriber_gets_what_is_sent_from_then_on(deploy: Deploy, tmp_path: Path) -> None:
    config_pth = deploy()
    with open_pub(config_pth) as pub:
        pub.send(b"before")
    path = config.read(config_pth).queues["queue"].path
    both = write_config(tmp_path,
                        path=path,
                        publishers={"pub": ("sub", "new")},
                        subscribers=("sub", "new"),
                        name="both.json")
    assert outcome(lambda: open_pub(both)) == "NotInitializedError"
    assert outcome(lambda: open_sub(both, "new")) == "NotInitializedError"
    control.initialize_all_dbs(both)
    with open_pub(both) as pub, open_sub(both, "sub") as sub, open_sub(both, "new") as new:
        pub.send(b"after")
        assert drain(sub) == [b"before", b"after"]
        assert drain(new) == [b"after"]


def test_queue_that_is_not_there(deploy: Deploy, tmp_path: Path) -> None:
    path = config.read(deploy()).queue_path("queue")
    scheme, _, rest = path.rpartition("queue")
    missing = write_config(tmp_path, path=f"{scheme}missing{rest}", name="missing.json")
    for function in (lambda: open_pub(missing), lambda: open_sub(missing),
                     lambda: control.statistics(missing), lambda: control.clear_all_subs(missing)):
        assert outcome(function) == "NotInitializedError"


def test_messages_that_can_not_be_held(deploy: Deploy) -> None:
    config_pth = deploy(MAX_MSGS_NUM=3, HWM_LMDB_SIZE_BYTES=1000)
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        for messages in ([bytes(1001)], [b""] * 4, [bytes(400)] * 3, [b"fine", bytes(1001)]):
            with pytest.raises(errors.MessageTooLargeError):
                pub.send_many(messages)
        pub.send(bytes(1000))
        assert drain(sub) == [bytes(1000)]


def _use(pipe: Connection, pub: Pub, sub: Sub) -> None:
    with sub.receive(timeout=HANG_SECS) as msg:
        pipe.send(msg)
    pub.send(b"child")
    pub.close()
    sub.close()
    pipe.send("closed")


def test_forked_child_uses_what_it_inherited(deploy: Deploy) -> None:
    config_pth = deploy()
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send_many(numbered(2))
        with sub.receive(timeout=HANG_SECS) as msg:
            assert msg == b"0"
            with Child(_use, pub, sub) as child:
                assert child.get() == b"1"
                assert child.get() == "closed"
                child.end()
            pub.send(b"parent")
        assert drain(sub) == [b"child", b"parent"]


def _end_with_a_receipt(pipe: Connection, receipt: persipubsub.subscriber.Receipt[bytes]) -> None:
    receipt.__exit__(None, None, None)
    pipe.send("left")


def test_receipt_stays_with_the_parent(deploy: Deploy) -> None:
    config_pth = deploy()
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        pub.send(b"hello")
        receipt = sub.receive(timeout=HANG_SECS)
        assert receipt.__enter__() == b"hello"
        with Child(_end_with_a_receipt, receipt) as child:
            assert child.get() == "left"
            child.end()
        assert lags(config_pth) == {"sub": 1}
        receipt.__exit__(None, None, None)
        assert lags(config_pth) == {"sub": 0}


def test_ctrl_c_ends_a_wait_and_loses_nothing(deploy: Deploy) -> None:
    config_pth = deploy()
    with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt), sub.receive(timeout=HANG_SECS):
            pass
        timer.join()
        pub.send(b"hello")
        with sub.receive(timeout=HANG_SECS) as msg:
            assert msg == b"hello"


def test_killed_publisher_leaves_what_it_sent(deploy: Deploy) -> None:
    config_pth = deploy()

    def work(pipe: Connection) -> None:
        with open_pub(config_pth) as pub:
            for number in itertools.count():
                pub.send(b"%d" % number)
                pipe.send(number)

    with Child(work) as child:
        acknowledged = [child.get() for _ in range(50)]
        child.kill(signal.SIGKILL)
        child.end(exit_code=-signal.SIGKILL)
        while child.pipe.poll():
            try:
                acknowledged.append(child.pipe.recv())
            except EOFError:
                break
    with open_sub(config_pth) as sub:
        received = drain(sub)
    assert received == numbered(len(received))
    assert len(received) in (len(acknowledged), len(acknowledged) + 1)


def test_nothing_is_left_behind(deploy: Deploy) -> None:
    config_pth = deploy()
    with open_pub(config_pth):
        pass  # the first use opens what stays
    before = count_descriptors()
    for _ in range(5):
        with open_pub(config_pth) as pub, open_sub(config_pth) as sub:
            pub.send(b"hello")
            with sub.receive(timeout=HANG_SECS) as msg:
                assert msg == b"hello"
    until(lambda: count_descriptors() <= before, "descriptors to be closed")
