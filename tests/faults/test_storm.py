"""
Kill publishers and subscribers at random, again and again, and check an exact ledger at the end.

``PERSIPUBSUB_STORM_SECS`` is how long each storm lasts, ``PERSIPUBSUB_SEED`` repeats its choices
(not the scheduling of the machine). The enlarged form, which prints what it did:

    PERSIPUBSUB_STORM_SECS=300 python -m pytest -s tests/faults/test_storm.py
"""

import os
import random
import time
from pathlib import Path
from typing import Final

import pytest

from persipubsub import statistics
from tests import support
from tests.faults import ledger, tracing, workers

STORM_SECS: Final = float(os.environ.get("PERSIPUBSUB_STORM_SECS", "4"))
CLEAR_SECS: Final = float(os.environ.get("PERSIPUBSUB_STORM_SECS", "3"))

AUDIENCES: Final = {"pub": ("alpha", "beta"), "pub_alpha": ("alpha", )}

ROLES: Final = {
    "p0": workers.Role(kind="publish", id="pub", batch=1),
    "p1": workers.Role(kind="publish", id="pub", batch=20, threads=4),
    "p2": workers.Role(kind="publish", id="pub_alpha", batch=5),
    "a0": workers.Role(kind="subscribe", id="alpha", batch=1),
    "a1": workers.Role(kind="subscribe", id="alpha", batch=1),
    "a2": workers.Role(kind="subscribe", id="alpha", batch=30),
    "b0": workers.Role(kind="subscribe", id="beta", batch=10),
    "c0": workers.Role(kind="control", id="", batch=1),
}


def rage(places: dict[str, workers.Worker], rng: random.Random, seconds: float) -> tuple[int, int]:
    kills = stops = 0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(rng.uniform(0.05, 0.5))
        # Now and then all at once, so that nobody is left who has the queue open.
        count = len(places) if rng.random() < 0.05 else rng.choice((1, 1, 1, 2, 3))
        chosen = rng.sample(sorted(places), count)
        if rng.random() < 0.1:
            stops += 1
            places[chosen[0]].stop(rng.uniform(0, 0.2))
            continue
        for place in chosen:
            places[place].kill()
            kills += 1
        time.sleep(rng.choice((0, 0, 0.1)))
        for place in chosen:
            places[place].start()
    return kills, stops


def drain(places: dict[str, workers.Worker], board: workers.Board, config_pth: Path) -> None:
    """Let publishers end, and subscribers when there is nothing left for them."""
    board.publishers_end = True
    subscribers = [worker for worker in places.values() if worker.role.kind == "subscribe"]
    for worker in places.values():
        if worker not in subscribers:
            worker.end()
    with support.open_queue(config_pth) as queue:
        support.until(lambda: all(entry.lag == 0 for entry in queue.statistics().subscribers),
                      what="the subscribers receive everything")
    board.subscribers_end = True
    for worker in subscribers:
        worker.end()


def figures(
    config_pth: Path
) -> tuple[statistics.QueueStatistics, dict[str, statistics.SubscriberStatistics]]:
    """Check the store, and return its figures."""
    with support.open_queue(config_pth) as queue:
        assert not queue.check()
        found = queue.statistics()
    return found, {entry.subscriber: entry for entry in found.subscribers}


def storm(tmp_path: Path, durability: str, seconds: float,
          roles: dict[str, workers.Role]) -> tuple[Path, ledger.Books, int]:
    """Run a storm, and check what holds for each of them."""
    rng = random.Random(tracing.seed())
    config_pth = support.make_queue(tmp_path,
                                    publishers=AUDIENCES,
                                    subscribers=("alpha", "beta"),
                                    durability=durability,
                                    checkpoint_secs=0.2,
                                    MAX_MSGS_NUM=10**8)
    scene = workers.Scene(config_pth)
    places: dict[str, workers.Worker] = {}
    try:
        for place, role in roles.items():
            places[place] = workers.Worker(scene, role, place, rng)
        kills, stops = rage(places, rng, seconds)
        drain(places, scene.board, config_pth)
    finally:
        for worker in places.values():
            worker.destroy()
    books = ledger.Books(scene.ledger, AUDIENCES)
    takeovers = books.takeovers_ms("alpha")
    print("{}: {} kills, {} stops, {} messages sent, {} delivered again, {} torn records, "
          "takeover p50 {} ms, p99 {} ms of {}".format(durability, kills, stops, books.count_sent(),
                                                       books.again(), books.torn,
                                                       ledger.percentile(takeovers, 50),
                                                       ledger.percentile(takeovers, 99),
                                                       len(takeovers)))
    assert not books.errors
    assert books.torn <= kills
    assert not books.unknown()
    assert not books.twice()
    assert not books.disordered("alpha", is_shared=True)
    assert not books.disordered("beta", is_shared=False)
    return config_pth, books, kills


@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_nothing_is_lost(tmp_path: Path, durability: str) -> None:
    config_pth, books, kills = storm(tmp_path, durability, STORM_SECS, ROLES)
    assert not books.lost()
    assert not books.unfinished()
    assert not books.halves()
    # The test has tested something.
    assert kills > STORM_SECS
    assert books.count_sent() > 100 * STORM_SECS

    found, subscribers = figures(config_pth)
    assert found.messages == found.message_bytes == 0
    for name, entry in subscribers.items():
        assert entry.lag == 0
        assert entry.acknowledged == len(books.received[name])
        assert entry.failed <= books.failures[name]
        assert (entry.dropped_by_timeout, entry.dropped_by_mark, entry.cleared, entry.skipped,
                entry.corrupt) == (0, 0, 0, 0, 0)
        # Kills between the note of a failure and its count are the only difference.
        assert entry.failed >= books.failures[name] - 30 * kills


@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_clearing_beside(tmp_path: Path, durability: str) -> None:
    roles = {**ROLES, "x0": workers.Role(kind="clear", id="alpha", batch=1)}
    config_pth, books, _ = storm(tmp_path, durability, CLEAR_SECS, roles)
    _, subscribers = figures(config_pth)
    gone: list[int] = []
    for name, entry in subscribers.items():
        assert entry.lag == 0
        assert (entry.dropped_by_timeout, entry.dropped_by_mark, entry.corrupt) == (0, 0, 0)
        at_least, at_most = books.bounds(name)
        assert at_least <= entry.acknowledged + entry.cleared + entry.skipped <= at_most
        # A message that was cleared while it was being received is not acknowledged.
        assert entry.acknowledged <= len(books.received[name])
        gone.append(entry.cleared + entry.skipped)
    assert sum(gone) > 0
