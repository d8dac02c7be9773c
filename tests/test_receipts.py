"""Test what a subscriber's loops and blocks do with what was received, on both engines."""

import collections
import gc
import itertools
import threading
import warnings
from pathlib import Path

import pytest

import persipubsub.config
from persipubsub import Pub, Sub, errors
from tests import support
from tests.faces import figures, fixture_config_pth, fixture_lmdb_pth

assert fixture_config_pth and fixture_lmdb_pth  # pytest finds them here


def drain(sub: Sub) -> list[bytes]:
    return list(sub.messages(timeout=0.3))


# Iteration


def test_nothing_is_taken_before_the_first_one_is_asked_for(config_pth: Path, pub: Pub,
                                                            sub: Sub) -> None:
    pub.send(b"1")
    msgs = sub.messages(timeout=0.1)
    assert not figures(config_pth).in_flight
    assert next(msgs) == b"1"
    assert figures(config_pth).in_flight == 1
    msgs.close()


def test_loop_over_the_subscriber_goes_on_with_what_comes(pub: Pub, sub: Sub) -> None:
    expected = [b"%d" % index for index in range(50)]
    thread = threading.Thread(target=lambda: collections.deque(map(pub.send, expected), maxlen=0))
    thread.start()
    received: list[bytes] = []
    for msg in sub:
        received.append(msg)
        if len(received) == 50:
            break
    assert received == expected
    thread.join()
    assert drain(sub) == [b"49"]


def test_end_is_the_end(pub: Pub, sub: Sub) -> None:
    msgs = sub.messages(timeout=0)
    assert not list(msgs)
    pub.send(b"1")
    assert not list(msgs)


@pytest.mark.parametrize("prefetch", [1, 2, 100])
def test_block_around_the_loop_tells_how_it_was_left(config_pth: Path, pub: Pub, sub: Sub,
                                                     prefetch: int) -> None:
    pub.send_many([b"1", b"2", b"3", b"4", b"5"])
    with sub.messages(timeout=0.1, prefetch=prefetch) as msgs:
        assert list(itertools.islice(msgs, 2)) == [b"1", b"2"]
    assert figures(config_pth).lag == 3
    with pytest.raises(ValueError):
        with sub.messages(timeout=0.1, prefetch=prefetch) as msgs:
            for msg in msgs:
                if msg == b"4":
                    raise ValueError("no")
    assert not list(msgs)
    assert figures(config_pth).lag == 2
    with sub.receive_many(5, timeout=support.HANG_SECS, details=True) as messages:
        found = [(message.data, message.attempts) for message in messages]
    # On servers, what was taken and given back unread was delivered, too.
    assert found[0][0] == b"4" and found[0][1] >= 2
    assert [data for data, _ in found[1:] + [(msg, 1) for msg in drain(sub)]] == [b"5"]


def test_loop_of_a_closed_subscriber(pub: Pub, config_pth: Path) -> None:
    pub.send_many([b"1", b"2"])
    with Sub("sub", config_pth) as sub:
        msgs = sub.messages(timeout=0.1)
        next(msgs)
    with pytest.raises(errors.ClosedError):
        next(msgs)
    with pytest.raises(errors.ClosedError):
        sub.messages()


# Several at once


def test_what_was_handled_is_acknowledged_before_the_loop_waits(config_pth: Path, pub: Pub,
                                                                sub: Sub) -> None:
    pub.send_many([b"1", b"2"])
    received: list[bytes] = []

    def consume() -> None:
        with pytest.raises(errors.ClosedError):
            for msg in sub.messages(timeout=support.HANG_SECS, prefetch=100):
                received.append(msg)

    thread = threading.Thread(target=consume, daemon=True)
    thread.start()
    support.until(lambda: figures(config_pth).lag == 0, "both are acknowledged")
    pub.send(b"3")
    support.until(lambda: figures(config_pth).lag == 0, "the third one is acknowledged")
    sub.close()
    thread.join(support.HANG_SECS)
    assert not thread.is_alive() and received == [b"1", b"2", b"3"]


@pytest.mark.parametrize("handled", [1, 2, 3])
def test_several_are_acknowledged_by_hand(config_pth: Path, pub: Pub, sub: Sub,
                                          handled: int) -> None:
    pub.send_many([b"1", b"2", b"3"])
    with pytest.raises(ValueError):
        with sub.messages(timeout=0.1, prefetch=3) as msgs:
            assert len(list(itertools.islice(msgs, handled))) == handled
            msgs.acknowledge()
            msgs.acknowledge()
            assert figures(config_pth).lag == 3 - handled
            raise ValueError("no")
    assert drain(sub) == [b"1", b"2", b"3"][handled:]


def test_only_the_message_that_failed_counts_as_failed(lmdb_pth: Path) -> None:
    config = persipubsub.config.read(lmdb_pth)
    with Pub("pub", config) as pub:
        pub.send_many([b"%d" % index for index in range(5)])
    with Sub("sub", config) as sub:
        with pytest.raises(ValueError):
            with sub.messages(timeout=0, prefetch=5) as msgs:
                for msg in msgs:
                    if msg == b"2":
                        raise ValueError("no")
        assert (sub.statistics().failed, sub.statistics().acknowledged) == (1, 2)
        assert [(message.data, message.attempts)
                for message in sub.messages(timeout=0, details=True)] == [(b"2", 2), (b"3", 1),
                                                                          (b"4", 1)]


def test_queue_that_was_closed_gave_several_back(config_pth: Path, pub: Pub) -> None:
    pub.send_many([b"1", b"2", b"3"])
    with pytest.raises(KeyError):  # not the ClosedError
        with Sub("sub", config_pth) as sub:
            with sub.messages(timeout=0.1, prefetch=3) as msgs:
                for msg in msgs:
                    if msg == b"2":
                        sub.close()
                        raise KeyError("mine")
    with Sub("sub", config_pth) as sub:
        assert drain(sub) == [b"1", b"2", b"3"]


@pytest.mark.parametrize("prefetch", [1, 3])
def test_child_that_was_forked_in_a_loop_has_no_say_in_it(config_pth: Path, pub: Pub, sub: Sub,
                                                          prefetch: int) -> None:
    msgs = sub.messages(timeout=0.1, prefetch=prefetch)

    def leave(pipe: support.Connection) -> None:
        nonlocal msgs
        del msgs
        gc.collect()
        pipe.send("left")

    pub.send_many([b"1", b"2", b"3"])
    assert next(msgs) == b"1"
    with support.Child(leave) as child:
        assert child.get() == "left"
        child.end()
    found = figures(config_pth)
    assert (found.lag, found.in_flight) == (3, prefetch)
    with Sub("sub", config_pth) as other:
        with other.receive(timeout=0.1) as msg:
            assert msg == (b"2" if prefetch == 1 else None)
    assert list(msgs) == ([b"3"] if prefetch == 1 else [b"2", b"3"])
    assert figures(config_pth).lag == 0


# Receipts that are not used as they should be


def test_receipt_that_is_used_warns_of_nothing(pub: Pub, sub: Sub) -> None:
    pub.send(b"message")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with sub.receive(timeout=0.1) as msg:
            assert msg == b"message"
        with sub.receive(timeout=0) as msg:
            assert msg is None
        with sub.receive_many(3, timeout=0) as msgs:
            assert msgs == []
        gc.collect()


def test_receipt_is_for_one_block(pub: Pub, sub: Sub) -> None:
    pub.send_many([b"one", b"two"])
    receipt = sub.receive(timeout=0.1)
    with receipt as msg:
        assert msg == b"one"
    with pytest.raises(ValueError, match="to be entered once"):
        with receipt:
            pass
    assert drain(sub) == [b"two"]


# Only the latest


def test_competitors_for_the_newest_message_never_have_an_older_one_later(lmdb_pth: Path) -> None:
    seen: list[list[int]] = [[], [], []]
    is_done = threading.Event()

    def consume(mine: list[int]) -> None:
        while True:
            was_done = is_done.is_set()
            with sub.receive_to_top(timeout=0.05) as msg:
                if msg is not None:
                    mine.append(int(msg))
                elif was_done:
                    return

    with (Pub("pub", lmdb_pth) as pub, Sub("sub", lmdb_pth) as sub):
        threads = [threading.Thread(target=consume, args=(mine, )) for mine in seen]
        for thread in threads:
            thread.start()
        for index in range(300):
            pub.send(b"%d" % index)
        is_done.set()
        for thread in threads:
            thread.join(support.HANG_SECS)
        found = sub.statistics()
    for mine in seen:
        assert mine == sorted(mine)
    received = sorted(sum(seen, []))
    assert len(received) == len(set(received))
    assert received[-1] == 299
    assert (found.lag, found.acknowledged + found.skipped) == (0, 300)
