"""Set the clock one year forward or back while the queue is used: nobody notices."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from persipubsub import Sub, control
from tests import support

YEAR_SECS: Final = 366 * 86400


def at(seconds: int, function: Callable[..., object], *arguments: Any) -> Any:
    """Call a function in a process whose wall clock is wrong."""

    def run(pipe: support.Connection) -> None:
        wall_ns, wall = time.time_ns, time.time
        time.time_ns = lambda: wall_ns() + seconds * 10**9
        time.time = lambda: wall() + seconds
        pipe.send(function(*arguments))

    with support.Child(run) as child:
        result = child.get()
        child.end()
    return result


def initialize(config_pth: Path) -> None:
    control.initialize_all_dbs(config_pth=config_pth)


def prune(config_pth: Path) -> None:
    control.prune_dangling_messages(config_pth=config_pth)


def receive(config_pth: Path, count: int) -> list[bytes]:
    received: list[bytes] = []
    with Sub("sub", config_pth) as sub:
        while len(received) < count:
            with sub.receive(timeout=0) as msg:
                if msg is None:
                    break
                received.append(msg)
    return received


def wait_until_dropped(config_pth: Path) -> int:
    with support.open_queue(config_pth) as queue:
        support.until(lambda: queue.consumer("sub").front() is None, what="messages are too old")
        assert not queue.check()
        return queue.statistics().subscribers[0].dropped_by_timeout


@pytest.mark.parametrize("maker", [-YEAR_SECS, 0, YEAR_SECS])
@pytest.mark.parametrize("user", [-YEAR_SECS, YEAR_SECS])
def test_wall_clock(tmp_path: Path, maker: int, user: int) -> None:
    config_pth = support.write_config(tmp_path, durability="os")
    at(maker, initialize, config_pth)
    support.send(config_pth, b"0")
    at(user, support.send, config_pth, b"1", b"2")
    support.send(config_pth, b"3")
    # Nobody drops anything as too old, and the order is that of the commits.
    at(user, prune, config_pth)
    prune(config_pth)
    assert receive(config_pth, count=1) == [b"0"]
    assert at(user, receive, config_pth, 2) == [b"1", b"2"]
    assert receive(config_pth, count=9) == [b"3"]

    # Too old is too old, whatever the clock on the wall says.
    short_pth = support.write_config(tmp_path, name="short.json", durability="os",
                                     MSG_TIMEOUT_SECS=0.05)  # yapf: disable
    initialize(short_pth)
    at(user, support.send, short_pth, b"4", b"5")
    assert wait_until_dropped(short_pth) == 2
    support.send(short_pth, b"6")
    assert at(user, wait_until_dropped, short_pth) == 3
