"""Send what is very large, or very many."""

import hashlib
import os
import resource
import shutil
from pathlib import Path
from typing import Final

import pytest

from persipubsub import Pub, Sub, control
from tests import support

#: Of one message, in bytes; a gigabyte (1 << 30) takes a minute.
LARGE: Final = int(os.environ.get("PERSIPUBSUB_LARGE_BYTES", "40000000"))

#: So many messages wait; a million takes some seconds.
BACKLOG: Final = int(os.environ.get("PERSIPUBSUB_BACKLOG", "100000"))

BATCH: Final = 1000
SINGLES: Final = 300


def available_memory() -> int:
    """Return how many bytes of memory can be used."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def receive_digest(pipe: support.Connection, config_pth: Path) -> None:
    with Sub("sub", config_pth) as sub:
        with sub.receive(timeout=support.HANG_SECS) as msg:
            assert msg is not None
            pipe.send((len(msg), hashlib.sha256(msg).hexdigest()))
        pipe.send(sub.front())
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_large_message(tmp_path: Path, durability: str) -> None:
    """Send and receive one, and then another one into the same room."""
    size = LARGE
    if available_memory() < 8 * size or shutil.disk_usage(tmp_path).free < 8 * size:
        pytest.skip("Not enough memory, or room on the disk")
    config_pth = support.make_queue(tmp_path,
                                    durability=durability,
                                    max_db_size_bytes=3 * size + (1 << 24),
                                    HWM_LMDB_SIZE_BYTES=2 * size,
                                    checkpoint_secs=3600)
    pattern = bytes(range(251)) * 4177
    for number in range(2):
        msg = (b"%d" % number + pattern * (size // len(pattern) + 1))[:size]
        digest = hashlib.sha256(msg).hexdigest()
        with Pub("pub", config_pth) as pub:
            pub.send(msg=msg)
        del msg
        with support.Child(receive_digest, config_pth) as child:
            assert child.get() == (size, digest)
            assert child.get() is None
            print(f"{size} bytes received with {child.get()} bytes of memory")
            child.end()
    with support.open_queue(config_pth) as queue:
        assert not queue.check()
        found = queue.statistics()
        assert found.messages == found.message_bytes == 0
        assert found.file_bytes <= 3 * size + (1 << 24)


def test_backlog(tmp_path: Path) -> None:
    """Let many messages wait, and then receive them all, in order."""
    count = BACKLOG
    config_pth = support.make_queue(tmp_path,
                                    publishers={"pub": ["one", "two"]},
                                    subscribers=["one", "two"],
                                    MAX_MSGS_NUM=2 * count,
                                    max_db_size_bytes=1 << 30)
    with Pub("pub", config_pth) as pub:
        for begin in range(0, count, BATCH):
            pub.send_many(msgs=[b"%d" % number for number in range(begin, begin + BATCH)])
        with support.open_queue(config_pth) as queue:
            assert {entry.lag for entry in queue.statistics().subscribers} == {count}
        # Sending and receiving one by one take no longer than with an empty queue.
        with Sub("one", config_pth) as sub:
            for number in range(SINGLES):
                pub.send(msg=b"%d" % (count + number))
                with sub.receive(timeout=0) as msg:
                    assert msg == b"%d" % number
    for name, begin in (("one", SINGLES), ("two", 0)):
        with Sub(name, config_pth) as sub:
            expected = begin
            while expected < count + SINGLES:
                with sub.receive_many(max_msgs=1500, timeout=0) as msgs:
                    assert msgs == [b"%d" % (expected + index) for index in range(len(msgs))]
                    assert msgs
                    expected += len(msgs)
            assert expected == count + SINGLES
            assert sub.front() is None
    control.prune_dangling_messages(config_pth=config_pth)
    with support.open_queue(config_pth) as queue:
        assert not queue.check()
        found = queue.statistics()
        assert found.messages == found.message_bytes == 0
        for entry in found.subscribers:
            assert (entry.acknowledged, entry.dropped_by_mark) == (count + SINGLES, 0)
