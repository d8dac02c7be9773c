"""
Kill publishers that wait for room and the subscribers that make it, and check the ledger.

``PERSIPUBSUB_STORM_SECS`` is how long each storm lasts, ``PERSIPUBSUB_SEED`` repeats its choices.
"""

import os
import random
from pathlib import Path
from typing import Final

import pytest

from tests import support
from tests.faults import ledger, test_storm, tracing, workers

STORM_SECS: Final = float(os.environ.get("PERSIPUBSUB_STORM_SECS", "3"))

#: Fewer than publishers send in the time of a kill.
MOST: Final = 30

SUBSCRIBERS: Final = [name for name, role in test_storm.ROLES.items() if role.kind == "subscribe"]


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_nothing_is_dropped_and_nobody_waits_for_ever(tmp_path: Path, durability: str) -> None:
    rng = random.Random(tracing.seed())
    config_pth = support.make_queue(tmp_path,
                                    publishers=test_storm.AUDIENCES,
                                    subscribers=("alpha", "beta"),
                                    durability=durability,
                                    checkpoint_secs=0.2,
                                    strategy="block",
                                    MAX_MSGS_NUM=MOST)
    scene = workers.Scene(config_pth)
    places: dict[str, workers.Worker] = {}
    highest = 0
    kills = 0
    try:
        for place, role in test_storm.ROLES.items():
            places[place] = workers.Worker(scene, role, place, rng)
        with support.open_queue(config_pth) as queue:
            for _ in range(4):
                killed, _ = test_storm.rage(places, rng, STORM_SECS / 4)
                kills += killed
                # With no subscriber left, all publishers come to wait.
                for place in SUBSCRIBERS:
                    places[place].kill()
                support.until(lambda: queue.statistics().messages > MOST - 20, "the queue is full")
                highest = max(highest, queue.statistics().messages)
                for place in SUBSCRIBERS:
                    places[place].start()
        test_storm.drain(places, scene.board, config_pth)
    finally:
        for worker in places.values():
            worker.destroy()

    books = ledger.Books(scene.ledger, test_storm.AUDIENCES)
    print(
        f"{durability}: {kills} kills, {books.count_sent()} messages sent, at most {highest} waited"
    )
    assert not books.errors
    assert not books.unknown()
    assert not books.twice()
    assert not books.lost()
    assert not books.unfinished()
    assert not books.halves()
    assert highest <= MOST
    assert books.count_sent() > 10 * STORM_SECS
    found, subscribers = test_storm.figures(config_pth)
    assert found.messages == 0
    for name, entry in subscribers.items():
        assert entry.acknowledged == len(books.received[name])
        assert (entry.dropped_by_timeout, entry.dropped_by_mark, entry.cleared,
                entry.skipped) == (0, 0, 0, 0)
