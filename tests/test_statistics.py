"""Test the figures of a queue."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests import stores


def test_new_queue_has_nothing(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("limits, share", [({}, None), ({
    "max_msgs_num": 8,
    "size_bytes": 100
}, 0.25)])
def test_shares_are_those_of_the_settings(tmp_path: Path, limits: dict[str, Any],
                                          share: float | None) -> None:
    with stores.opened(tmp_path, max_db_size_bytes=1 << 24, **limits) as queue:
        queue.put([bytes(25), b""])
        statistics = queue.statistics()
        assert (statistics.message_share, statistics.byte_share) == (share, share)
        assert statistics.age_share is None
        assert statistics.file_bytes == os.stat(os.path.join(queue.path, "data.mdb")).st_size
        assert statistics.file_share == statistics.file_bytes / (1 << 24)


def test_journal_and_disk_are_measured(tmp_path: Path) -> None:
    with stores.opened(tmp_path, durability=stores.FSYNC) as queue:
        for _ in range(10):
            queue.put([bytes(100000)])
        statistics = queue.statistics()
        assert statistics.sent == 10
        assert statistics.journal_lag_bytes == 0
        assert statistics.disk_bytes > statistics.journal_bytes > 1000000
        stores.take_all(queue)
        assert queue.statistics().sent == 10


def test_journal_lags_behind_with_the_durability_os(tmp_path: Path) -> None:
    with stores.opened(tmp_path, checkpoint_secs=3600) as queue:
        queue.put([bytes(100000)])
        assert queue.statistics().journal_lag_bytes >= 100000
        queue.secure()
        assert queue.statistics().journal_lag_bytes == 0
