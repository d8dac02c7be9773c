"""Delete or rename the directory of a queue while processes use it: no hang, no crash, no loss."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

import persipubsub.errors
import persipubsub.queue
from persipubsub import Pub, Sub, config, control
from tests import stores, support

MESSAGES: Final = 100


def work(pipe: support.Connection, config_pth: Path) -> None:
    """Have the queue open, send when told to and tell what came of it."""
    with Pub("pub", config_pth) as pub, Sub("sub", config_pth) as sub:
        with sub.receive(timeout=0) as msg:
            assert msg == b"first"
        pipe.send("ready")
        pipe.recv()
        sent: list[bytes] = []
        received: list[bytes] = []

        def send() -> None:
            msg = b"%d" % len(sent)
            pub.send(msg=msg)
            sent.append(msg)

        def receive() -> None:
            with sub.receive(timeout=0) as msg:
                if msg is not None:
                    received.append(msg)

        errors = {
            support.outcome(function)
            for _ in range(MESSAGES)
            for function in (send, receive, sub.front, sub.pop_to_top)
        }
        pipe.send((sent, received, errors))
    pipe.send("closed")


@pytest.mark.parametrize("durability", ["fsync", "os"])
@pytest.mark.parametrize("change", [shutil.rmtree, lambda path: os.rename(path, f"{path!s}2")],
                         ids=["deleted", "renamed"])
def test_directory_goes_away(tmp_path: Path, durability: str, change: Callable[[Path],
                                                                               object]) -> None:
    config_pth = support.make_queue(tmp_path, durability=durability, checkpoint_secs=0.05)
    with Pub("pub", config_pth) as pub:
        pub.send(msg=b"first")
    with support.Child(work, config_pth) as child:
        assert child.get() == "ready"
        change(tmp_path / "queue")
        child.pipe.send("go on")
        sent, received, errors = child.get()
        assert errors <= {"", *persipubsub.errors.__all__}, errors
        # Another process finds nothing, and says so.
        with pytest.raises(persipubsub.errors.NotInitializedError):
            Pub("pub", config_pth)
        # It can be made anew meanwhile.
        control.initialize_all_dbs(config_pth=config_pth)
        with Pub("pub", config_pth) as pub, Sub("sub", config_pth) as sub:
            pub.send(msg=b"new")
            with sub.receive(timeout=0) as msg:
                assert msg == b"new"
            assert sub.front() is None
        assert child.get() == "closed"
        child.end()

    renamed = tmp_path / "queue2"
    if renamed.exists():
        # What was sent or received before or after the rename is in the books.
        with persipubsub.queue.Queue(str(renamed),
                                     config.read(config_pth).queues["queue"]) as queue:
            assert not queue.check()
            assert queue.statistics().next_number >= len(sent) + 2
            assert not set(received) & set(stores.take_all(queue))
