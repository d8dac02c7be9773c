"""
Kill publishers at random that repeat what they do not know to be sent: each message is stored once.

``PERSIPUBSUB_STORM_SECS`` is how long each storm lasts, ``PERSIPUBSUB_SEED`` repeats its choices.
"""

import os
import random
import time
from pathlib import Path
from typing import Final

import pytest

from persipubsub import Pub
from tests import stores, support
from tests.faults import tracing, workers

STORM_SECS: Final = float(os.environ.get("PERSIPUBSUB_STORM_SECS", "2"))

#: Jobs that are shared by two processes, and jobs of one of its own.
SOURCES: Final = ("shared", "shared", "own")


def read(ledger: workers.Ledger, kind: str, place: int | None = None) -> set[str]:
    """Read what the processes of a place, or of all places, tried to send, or sent for certain."""
    return {
        name
        for record in ledger.records()
        if record[1:2] == [kind] and (place is None or int(record[2]) == place)
        for name in record[3:]
    }


def publish(pipe: support.Connection, config_pth: Path, ledger: workers.Ledger, place: int,
            seed: int) -> None:
    """Go on where the process before was killed, and repeat some of what it sent."""
    rng = random.Random(seed)
    sent = read(ledger, "sent", place)
    number = max(0, len(sent) - rng.randint(0, 30))
    with Pub("pub", config_pth) as pub:
        while not pipe.poll():
            count = rng.choice((1, 1, rng.randint(2, 20)))
            ids = [f"{SOURCES[place]}:{number + index}" for index in range(count)]
            ledger.note("try", place, *ids)
            if count == 1:
                pub.send(ids[0].encode("ascii"), msg_id=ids[0])
            else:
                pub.send_many([name.encode("ascii") for name in ids], msg_ids=ids)
            ledger.note("sent", place, *ids)
            number += count
    pipe.send("ended")


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_each_message_is_stored_once(  # pylint: disable=too-many-locals
        tmp_path: Path, durability: str) -> None:
    rng = random.Random(tracing.seed())
    config_pth = support.make_queue(tmp_path,
                                    durability=durability,
                                    checkpoint_secs=0.2,
                                    MAX_MSGS_NUM=10**8)
    ledger = workers.Ledger(tmp_path / "ledger")

    def start(place: int) -> support.Child:
        return support.Child(publish, config_pth, ledger, place, rng.randrange(1 << 60))

    children = [start(place) for place in range(len(SOURCES))]
    kills = 0
    try:
        deadline = time.monotonic() + STORM_SECS
        while time.monotonic() < deadline:
            time.sleep(rng.uniform(0.02, 0.2))
            place = rng.randrange(len(children))
            children[place].__exit__()
            children[place] = start(place)
            kills += 1
        for child in children:
            child.pipe.send("end")
        for child in children:
            assert child.get() == "ended"
            child.end()
    finally:
        for child in children:
            child.__exit__()

    tried, sent = read(ledger, "try"), read(ledger, "sent")
    with support.open_queue(config_pth) as queue:
        assert queue.check() == []
        numbers = queue.statistics().next_number - 1
        stored = [message.decode("ascii") for message in stores.take_all(queue)]
    print(f"{durability}: {kills} kills, {len(sent)} messages sent")
    assert len(stored) == len(set(stored)) == numbers
    assert sent <= set(stored) <= tried
    for source in set(SOURCES):
        mine = [int(name.partition(":")[2]) for name in stored if name.startswith(source)]
        expected: list[int] = list(range(len(mine)))
        assert mine == expected
    assert kills > STORM_SECS
    assert len(sent) > 20 * STORM_SECS
