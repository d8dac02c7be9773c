"""Verify and back up a queue while others send: nobody waits for more than one step."""

import concurrent.futures
import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from persipubsub import Pub, control
from tests import support

MESSAGES = 1_500_000

#: Sends that have to end in each part of the work; one or two do if a sender waits for the part.
SENDS = 3


def send_meanwhile(config_pth: Path, work: Callable[[control.Progress],
                                                    object]) -> dict[tuple[str, int], int]:
    """Send while something works on the queue; count the sends in each part of the work."""
    counts: dict[tuple[str, int], int] = {}
    progress = control.Progress()
    with Pub("pub", config_pth) as pub, concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, progress)
        while not future.done():
            begun = (progress.what, progress.total)
            is_begun = 0 < progress.share() < 1
            pub.send(b"meanwhile")
            # Count only a send that began and ended in the same part.
            counts.setdefault(begun, 0)
            if is_begun and begun == (progress.what, progress.total) and progress.share() < 1:
                counts[begun] += 1
        future.result(support.HANG_SECS)
    counts.pop(("", 0), None)  # before the first part
    return counts


@pytest.fixture(name="config_pth")
def fixture_config_pth(tmp_path: Path) -> Path:
    config_pth = support.make_queue(tmp_path,
                                    durability="fsync",
                                    MAX_MSGS_NUM=None,
                                    HWM_LMDB_SIZE_BYTES=None)
    with Pub("pub", config_pth) as pub:
        for _ in range(MESSAGES // 1000):
            pub.send_many([b"message %d" % number for number in range(1000)])
    return config_pth


def test_senders_do_not_wait_for_verify(config_pth: Path) -> None:
    counts = send_meanwhile(config_pth,
                            lambda progress: control.verify(config_pth, "queue", progress=progress))
    assert [what for what, _ in counts] == ["bytes", "messages"]
    assert min(counts.values()) >= SENDS, counts


def test_senders_do_not_wait_for_backup(config_pth: Path, tmp_path: Path) -> None:
    counts = send_meanwhile(config_pth, functools.partial(back_up, config_pth, tmp_path / "backup"))
    # The pages of the queue come first, then the copy's pages and messages.
    assert [what for what, _ in counts] == ["bytes", "bytes", "messages"]
    assert next(iter(counts.values())) >= SENDS, counts
    with support.open_queue(config_pth) as queue:
        assert queue.check() == []


def back_up(config_pth: Path, target: Path, progress: control.Progress) -> None:
    control.backup(config_pth, "queue", target, progress=progress)
