"""
Kill consumers whose deliveries are limited, and count what became of each message.

The storm grows with ``PERSIPUBSUB_STORM_SECS``, ``PERSIPUBSUB_SEED`` repeats its choices (not the
scheduling of the machine); with ``PERSIPUBSUB_EVERY_CALL=1`` a process is killed at each system
call of a move, and not at a sample of them.
"""

import collections
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from persipubsub import Sub, control
from persipubsub.letters import ListedDeadLetter
from tests import support
from tests.faults import tracing, workers

STORM_SECS: Final = float(os.environ.get("PERSIPUBSUB_STORM_SECS", "2"))
IS_EVERY: Final = bool(int(os.environ.get("PERSIPUBSUB_EVERY_CALL", "0")))

#: So many kills of a sample, fewer after so many seconds.
SAMPLE: Final = 12
BUDGET_SECS: Final = 5.0

MAX_DELIVERIES: Final = 3

CONSUMERS: Final = 3


def make(directory: Path, **changes: object) -> Path:
    directory.mkdir(exist_ok=True)
    config_pth = support.add_dead_letters(support.write_config(directory),
                                          max_deliveries=MAX_DELIVERIES,
                                          **changes)
    control.initialize_all_dbs(config_pth)
    return config_pth


def letters(config_pth: Path) -> list[ListedDeadLetter]:
    return list(control.dead_letters(config_pth)["letters"])


def check_stores(config_pth: Path) -> None:
    for key, findings in control.verify(config_pth).items():
        assert findings == (), key


def consume(_: support.Connection, config_pth: Path, ledger: workers.Ledger, batch: int) -> None:
    """Work on messages: some fail, some kill their process, the others take a moment."""
    with Sub("sub", config_pth) as sub:
        while True:
            try:
                with sub.receive_many(batch, timeout=support.HANG_SECS, details=True) as messages:
                    for message in messages:
                        ledger.note("take", message.number, message.attempts)
                        if message.data == b"fail":
                            raise ValueError("no")
                        if message.data == b"kill":
                            os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(0.001)
                for message in messages:
                    ledger.note("done", message.number)
            except ValueError:
                pass


def rage(places: dict[int, support.Child], start: Callable[[int], support.Child],
         rng: random.Random, is_over: Callable[[], bool]) -> int:
    """Kill consumers at random, and start others, until all is done."""
    kills = 0
    deadline = time.monotonic() + support.HANG_SECS + 10 * STORM_SECS
    while not is_over():
        assert time.monotonic() < deadline, "Expected an end of the storm"
        time.sleep(rng.uniform(0.01, 0.1))
        index = rng.randrange(CONSUMERS)
        for place, child in list(places.items()):
            # Those that a message killed are started again, too.
            if child.process.exitcode is not None or place == index:
                kills += 1
                child.__exit__()
                places[place] = start(place)
    return kills


@pytest.mark.parametrize("delay_secs", [0, 0.02])
def test_every_message_is_acknowledged_or_a_dead_letter(tmp_path: Path, delay_secs: float) -> None:
    seed = tracing.seed()
    rng = random.Random(seed)
    config_pth = make(tmp_path, retry_delay_secs=delay_secs)
    ledger = workers.Ledger(tmp_path / "ledger")
    kinds = rng.choices([b"fail", b"kill", b"work"],
                        weights=[1, 1, 8],
                        k=int(60 * max(1.0, STORM_SECS)))
    support.send_each(config_pth, *kinds)

    def start(place: int) -> support.Child:
        # A batch fails as a whole: only one of the consumers takes more than a message.
        return support.Child(consume, config_pth, ledger, 3 if place == 0 else 1)

    places = {place: start(place) for place in range(CONSUMERS)}
    try:
        kills = rage(places, start, rng, lambda: not lag(config_pth))
    finally:
        for child in places.values():
            child.__exit__()
    check_stores(config_pth)
    check_books(config_pth, ledger, kinds)
    found = letters(config_pth)
    print(f"{len(kinds)} messages, {kills} kills, {len(found)} dead letters")


def lag(config_pth: Path) -> int:
    return control.statistics(config_pth, "queue")["queue"].subscribers[0].lag


def check_books(config_pth: Path, ledger: workers.Ledger, kinds: list[bytes]) -> None:
    taken: dict[int, list[int]] = collections.defaultdict(list)
    done: dict[int, int] = collections.Counter()
    for _, word, number, *rest in filter(None, ledger.records()):
        if word == "take":
            taken[int(number)].append(int(rest[0]))
        else:
            done[int(number)] += 1
    found = [one.letter for one in letters(config_pth)]
    given_up = {letter.number for letter in found}
    first = min(taken)
    # Exactly once: no letter is there twice, and what was given up was not acknowledged.
    assert len(found) == len(given_up)
    assert max(done.values(), default=1) == 1
    assert not given_up & set(done)
    figures = control.statistics(config_pth, "queue")["queue"].subscribers[0]
    assert figures.dead_lettered == len(found)
    assert figures.acknowledged == len(kinds) - len(found)
    for letter in found:
        assert letter.attempts == MAX_DELIVERIES
        assert letter.data == kinds[letter.number - first]
    # What can not succeed did not.
    hopeless = {first + index for index, kind in enumerate(kinds) if kind != b"work"}
    assert hopeless <= given_up
    # No delivery was counted twice, and none was made that the limit forbids; one may be missing in
    # the ledger, whose consumer was killed before it could write.
    for attempts in taken.values():
        assert attempts == sorted(set(attempts)) and attempts[-1] <= MAX_DELIVERIES
    assert {letter.error
            for letter in found
            } <= {"ValueError: no", "its process ended, or dropped it, before it was done"}


# Each system call of a move


def prepare(directory: Path) -> Path:
    """Make a queue with a message of which one more delivery is allowed, and one behind it."""
    config_pth = make(directory)
    support.send_each(config_pth, b"fail", b"work")
    with Sub("sub", config_pth) as sub:
        for _ in range(MAX_DELIVERIES - 1):
            with pytest.raises(ValueError):
                with sub.receive(timeout=0):
                    raise ValueError("no")
    return config_pth


def start_last_delivery(config_pth: Path) -> Callable[[], None]:
    """Fail with the message for the last time: strace comes when all but the end is done."""
    sub = Sub("sub", config_pth)
    receipt = sub.receive(timeout=0)
    assert receipt.__enter__() == b"fail"  # pylint: disable=unnecessary-dunder-call
    error = ValueError("no")
    return lambda: receipt.__exit__(ValueError, error, None)


def kill_at(config_pth: Path, place: tuple[str, int]) -> bool:
    """Kill a move at a system call; the next consumer finishes what is left of it."""
    code = tracing.kill_at(lambda: start_last_delivery(config_pth), place)
    assert code in (0, -signal.SIGKILL)
    with Sub("sub", config_pth) as sub:
        with sub.receive(timeout=5, details=True) as message:
            assert message is not None
            assert (message.data, message.attempts) == (b"work", 1)
        with sub.receive(timeout=0) as nothing:
            assert nothing is None
    found, = letters(config_pth)
    assert (found.letter.data, found.letter.attempts) == (b"fail", MAX_DELIVERIES)
    figures = control.statistics(config_pth, "queue")["queue"].subscribers[0]
    assert (figures.dead_lettered, figures.acknowledged, figures.lag) == (1, 1, 0)
    check_stores(config_pth)
    return code != 0


def test_move_that_is_killed_at_any_call(tmp_path: Path) -> None:
    tracing.require()
    chance = random.Random(tracing.seed())
    config_pth = prepare(tmp_path / "count")
    places = tracing.list_calls(lambda: start_last_delivery(config_pth), tmp_path / "trace")
    assert [one.letter.data for one in letters(config_pth)] == [b"fail"]
    total = len(places)
    if not IS_EVERY:
        places = chance.sample(places, min(SAMPLE, total))
    killed = done = 0
    deadline = time.monotonic() + BUDGET_SECS
    for place in places:
        if done >= 3 and not IS_EVERY and time.monotonic() > deadline:
            break
        done += 1
        try:
            killed += kill_at(prepare(tmp_path / "{}-{}".format(*place)), place)
        except AssertionError as error:
            raise AssertionError(f"Killed at {place}: {error}") from error
    print(f"{killed} kills at {total} calls")
    assert killed >= done // 2
