"""Flip a byte of a message on the disk: that one is reported, all others are delivered."""

from pathlib import Path
from typing import Any, Final

import pytest

from persipubsub import Pub, Sub, errors
from tests import support

MARK: Final = b"the message whose byte is flipped"
BATCH: Final = [b"zero", b"one", MARK, b"three", b"four"]
EXPECTED: Final = [b"before", b"zero", b"one", b"three", b"four", b"behind"]


def receive(pipe: support.Connection, config_pth: Path, name: str, count: int) -> None:
    """Receive until there is nothing left; note errors in their place."""
    received: list[Any] = []
    with Sub(name, config_pth) as sub:
        while not received or received[-1] is not None:
            try:
                if count == 1:
                    with sub.receive(timeout=0) as msg:
                        received.append(msg)
                else:
                    with sub.receive_many(max_msgs=count, timeout=0) as msgs:
                        received.extend(msgs or [None])
            except errors.CorruptMessageError as error:
                received.append(error.number)
    pipe.send(received[:-1])


@pytest.mark.parametrize("durability", ["fsync", "os"])
@pytest.mark.parametrize("is_large", [False, True])
def test_flipped_byte(tmp_path: Path, durability: str, is_large: bool) -> None:
    config_pth = support.make_queue(tmp_path,
                                    publishers={"pub": ["one", "two"]},
                                    subscribers=["one", "two"],
                                    durability=durability)
    # A large message has pages of its own.
    batch = [msg + bytes(20000) * (is_large and msg == MARK) for msg in BATCH]
    with Pub("pub", config_pth) as pub:
        pub.send(msg=b"before")
        pub.send_many(msgs=batch)
        pub.send(msg=b"behind")
    data = tmp_path / "queue" / "data.mdb"
    content = bytearray(data.read_bytes())
    place = content.find(MARK)
    assert place > 0
    while place >= 0:
        content[place + 5] ^= 1
        place = content.find(MARK)
    with open(data, "r+b") as file:
        file.write(content)

    results: dict[str, list[Any]] = {}
    for name, count in (("one", 1), ("two", 100)):
        with support.Child(receive, config_pth, name, count) as child:
            results[name] = child.get()
            child.end()
    for received in results.values():
        number, = (entry for entry in received if isinstance(entry, int))
        assert [entry for entry in received if entry != number] == EXPECTED
        # In its place: in front of what was sent behind it.
        assert received[3] == number
    with support.open_queue(config_pth) as queue:
        for entry in queue.statistics().subscribers:
            assert (entry.lag, entry.acknowledged, entry.corrupt) == (0, len(EXPECTED), 1)
        # The block goes with its last message, and with it the damage.
        queue.put([b"next"])
        queue.prune()
        assert not queue.check()
