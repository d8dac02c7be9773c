"""Test the figures of a queue."""

# pylint: disable=missing-function-docstring

import os
import pathlib

import msgspec.structs

import persipubsub.statistics
from tests import stores


def test_new_queue_has_nothing(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path,
                       subscribers=["b", "a"],
                       msg_timeout_secs=600,
                       max_msgs_num=10,
                       size_bytes=10) as queue:
        statistics = queue.statistics()
        assert (statistics.messages, statistics.message_bytes) == (0, 0)
        assert (statistics.message_share, statistics.byte_share, statistics.age_share) == (0, 0, 0)
        assert statistics.oldest_age_seconds is None
        assert statistics.path == queue.path
        assert [entry.subscriber for entry in statistics.subscribers] == ["a", "b"]
        for entry in statistics.subscribers:
            assert entry.seconds_since_acknowledged is None
            assert (entry.lag, entry.acknowledged, entry.failed, entry.dropped_by_timeout,
                    entry.dropped_by_mark, entry.cleared, entry.skipped, entry.corrupt) == (0, ) * 8


def test_first_message_is_as_old_as_it_is(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path, clock=clock, msg_timeout_secs=10) as queue:
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
    with stores.opened(tmp_path, clock=clock, max_msgs_num=4,
                       strategy=stores.pruning(True)) as queue:
        queue.put([b"1", b"2", b"3", b"4"])
        clock.advance(1)
        # The messages 2 to 4 are dropped.
        queue.put([b"5"])
        stores.take(queue)
        clock.advance(1)
        statistics = queue.statistics()
        assert (statistics.messages, statistics.oldest_age_seconds) == (1, 1)


def test_shares_are_those_of_the_settings(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, max_msgs_num=8, size_bytes=100,
                       max_db_size_bytes=1 << 24) as queue:
        queue.put([bytes(25), b""])
        statistics = queue.statistics()
        assert (statistics.message_share, statistics.byte_share) == (0.25, 0.25)
        assert statistics.file_bytes == os.stat(os.path.join(queue.path, "data.mdb")).st_size
        assert statistics.file_share == statistics.file_bytes / (1 << 24)


def test_each_end_of_a_message_is_counted_for_itself(tmp_path: pathlib.Path) -> None:
    clock = stores.Clock()
    with stores.opened(tmp_path,
                       subscribers=["sub", "other"],
                       clock=clock,
                       msg_timeout_secs=10,
                       max_msgs_num=6) as queue:
        queue.put([b"1", b"2", b"3", b"4", b"5", b"6"])
        stores.take(queue)
        # Three of seven are left: four are dropped, three of them for the one that took one.
        queue.put([b"7"])
        lease = queue.consumer("sub").take(timeout=0)
        assert lease is not None
        lease.nack(ValueError())
        assert queue.skip_to_newest("sub") == 2
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
            dropped_by_mark=3,
            cleared=1,
            skipped=2,
            corrupt=0,
            dead_lettered=0,
            seconds_since_acknowledged=12)
        assert stores.figures(queue) == expected
        assert stores.figures(queue,
                              "other") == msgspec.structs.replace(expected,
                                                                  subscriber="other",
                                                                  acknowledged=0,
                                                                  failed=0,
                                                                  dropped_by_timeout=3,
                                                                  dropped_by_mark=4,
                                                                  skipped=0,
                                                                  seconds_since_acknowledged=None)


def test_messages_in_flight_are_those_that_were_taken(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["sub", "other"]) as queue:
        queue.put([b"1", b"2", b"3", b"4"])
        one = queue.consumer("sub").take(timeout=0)
        many = queue.consumer("sub").take(timeout=0, max_messages=2)
        assert one is not None and many is not None
        assert stores.figures(queue).in_flight == 3
        assert stores.figures(queue, "other").in_flight == 0
        many.ack()
        assert stores.figures(queue).in_flight == 1
        one.nack()
        assert stores.figures(queue).in_flight == 0


def test_later_subscriber_counts_from_its_beginning(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"1", b"2"])
        queue.add_subscriber("late")
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


def test_queue_without_limits_has_no_shares(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        queue.put([b"x"])
        statistics = queue.statistics()
        assert (statistics.message_share, statistics.byte_share,
                statistics.age_share) == (None, ) * 3


def test_journal_and_disk_are_measured(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, durability=stores.FSYNC) as queue:
        for _ in range(10):
            queue.put([bytes(100000)])
        statistics = queue.statistics()
        assert statistics.sent == 10
        assert statistics.journal_lag_bytes == 0
        assert statistics.disk_bytes > statistics.journal_bytes > 1000000
        stores.take_all(queue)
        assert queue.statistics().sent == 10


def test_journal_lags_behind_with_the_durability_os(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, checkpoint_secs=3600) as queue:
        queue.put([bytes(100000)])
        assert queue.statistics().journal_lag_bytes >= 100000
        queue.secure()
        assert queue.statistics().journal_lag_bytes == 0
