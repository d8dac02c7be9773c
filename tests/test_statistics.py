"""Test the figures of a queue."""

# pylint: disable=missing-function-docstring

import os
import pathlib

import msgspec.structs
import pytest

import persipubsub.queue
import persipubsub.statistics
from tests import stores


def test_new_queue_has_nothing(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["b", "a"]) as queue:
        statistics = queue.statistics()
        assert (statistics.messages, statistics.message_bytes) == (0, 0)
        assert (statistics.message_share, statistics.byte_share, statistics.age_share) == (0, 0, 0)
        assert statistics.oldest_age_seconds is None
        assert statistics.path == queue.settings.path
        assert [entry.subscriber for entry in statistics.subscribers] == ["a", "b"]
        for entry in statistics.subscribers:
            assert entry.seconds_since_acknowledged is None
            assert (entry.lag, entry.acknowledged, entry.failed, entry.dropped_by_timeout,
                    entry.dropped_by_mark, entry.cleared, entry.skipped, entry.corrupt) == (0, ) * 8


def test_first_message_is_as_old_as_it_is(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, timeout_ns=10 * stores.SECOND_NS) as queue:
        queue.put([b"x"])
        assert queue.statistics().oldest_age_seconds == 0
        clock.advance(5)
        statistics = queue.statistics()
        assert (statistics.oldest_age_seconds, statistics.age_share) == (5, 0.5)


def test_age_is_that_of_the_oldest_message_that_waits(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, subscribers=["a", "b"], clock=clock) as queue:
        queue.put([b"1"])
        clock.advance(1)
        queue.put([b"2"], ("a", ))
        clock.advance(1)
        queue.put([b"3"])
        clock.advance(1)
        assert queue.statistics().oldest_age_seconds == 3
        stores.take(queue, "a")
        assert queue.statistics().oldest_age_seconds == 3
        stores.take(queue, "b")
        assert queue.statistics().oldest_age_seconds == 2
        stores.take_all(queue, "a")
        # The second message is not for b.
        assert queue.statistics().oldest_age_seconds == 1
        assert (queue.statistics().messages, queue.statistics().message_bytes) == (1, 1)


def test_gap_in_front_of_the_oldest_message_has_no_age(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, max_messages=4,
                       strategy=stores.pruning(True)) as queue:
        queue.put([b"1", b"2", b"3", b"4"])
        clock.advance(1)
        # The messages 3 and 4 are dropped.
        queue.put([b"5"])
        stores.take(queue)
        stores.take(queue)
        clock.advance(1)
        statistics = queue.statistics()
        assert (statistics.messages, statistics.oldest_age_seconds) == (1, 1)


def test_shares_are_those_of_the_settings(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, max_messages=8, max_message_bytes=100, max_bytes=1 << 24) as queue:
        queue.put([bytes(25), b""])
        statistics = queue.statistics()
        assert (statistics.message_share, statistics.byte_share) == (0.25, 0.25)
        assert statistics.file_bytes == os.stat(os.path.join(queue.settings.path,
                                                             "data.mdb")).st_size
        assert statistics.file_share == statistics.file_bytes / (1 << 24)


def test_each_end_of_a_message_is_counted_for_itself(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path,
                       subscribers=["sub", "other"],
                       clock=clock,
                       timeout_ns=10 * stores.SECOND_NS,
                       max_messages=6) as queue:
        queue.put([b"1", b"2", b"3", b"4", b"5", b"6"])
        stores.take(queue)
        # Half of six is dropped: two of them for the subscriber that took one.
        queue.put([b"7"])
        lease = queue.consumer("sub").take(timeout=0)
        assert lease is not None
        lease.give_back(ValueError())
        assert queue.skip_to_newest("sub") == 3
        clock.advance(11)
        queue.prune()
        queue.put([b"8"])
        queue.clear()
        clock.advance(1)
        expected = persipubsub.statistics.SubscriberStatistics(
            subscriber="sub",
            lag=0,
            in_flight=stores.figures(queue).in_flight,
            position=queue.statistics().next_number,
            acknowledged=1,
            failed=1,
            dropped_by_timeout=1,
            dropped_by_mark=2,
            cleared=1,
            skipped=3,
            corrupt=0,
            dead_lettered=0,
            seconds_since_acknowledged=12)
        assert stores.figures(queue) == expected
        assert stores.figures(queue,
                              "other") == msgspec.structs.replace(expected,
                                                                  subscriber="other",
                                                                  acknowledged=0,
                                                                  failed=0,
                                                                  dropped_by_timeout=4,
                                                                  dropped_by_mark=3,
                                                                  skipped=0,
                                                                  seconds_since_acknowledged=None)


def test_messages_in_flight_are_those_that_were_taken(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["sub", "other"]) as queue:
        if stores.figures(queue).in_flight is None:
            pytest.skip("this system does not tell")
        queue.put([b"1", b"2", b"3", b"4"])
        one = queue.consumer("sub").take(timeout=0)
        many = queue.consumer("sub").take(timeout=0, max_messages=2)
        assert one is not None and many is not None
        assert stores.figures(queue).in_flight == 3
        assert stores.figures(queue, "other").in_flight == 0
        many.acknowledge()
        assert stores.figures(queue).in_flight == 1
        one.give_back()
        assert stores.figures(queue).in_flight == 0


def test_later_subscriber_counts_from_its_beginning(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1", b"2"])
        persipubsub.queue.Queue.ensure(queue.settings, subscribers=["sub", "late"])
        queue.put([b"3"])
        assert stores.figures(queue, "late").lag == 1
        assert stores.figures(queue).lag == 3
        assert stores.take_all(queue, "late") == [b"3"]
        assert stores.take_all(queue) == [b"1", b"2", b"3"]


def test_every_write_is_a_commit(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        before = queue.statistics().commits
        queue.put([b"1", b"2"])
        queue.put([b"3"])
        stores.take(queue)
        assert queue.statistics().commits == before + 3
