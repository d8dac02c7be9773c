"""Test how the next message of a subscriber is found."""

# pylint: disable=missing-function-docstring
# pylint: disable=protected-access

import pathlib
from typing import Any

import pytest

import persipubsub.errors
import persipubsub.queue
from persipubsub import _delivery
from persipubsub.store import _log, _pending
from tests import stores


def take(consumer: _delivery.Consumer) -> _delivery.Lease:
    lease = consumer.take(timeout=0)
    assert lease is not None
    return lease


def search(queue: persipubsub.queue.Queue) -> Any:
    pending = queue.consumer("sub")._pending
    return queue._environment.read(lambda txn, databases: pending.find(txn, databases, start=0))


def test_search_passes_over_what_is_for_others(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=("sub", "other")) as queue:
        queue.put([b"1"], audience=("other", ))
        assert search(queue) is None
        number = queue.put([b"2"])
        assert search(queue) == _pending.Candidate(begin=number - 1, number=number, due_ns=0)


def test_search_finds_nothing_in_a_number_that_is_taken(tmp_path: pathlib.Path) -> None:

    def work(txn, databases):  # type: ignore[no-untyped-def]
        cursor = txn.cursor(db=databases.data)
        _log.truncate(cursor, _log.read_tail(cursor), cut=1)

    with stores.opened(tmp_path) as queue:
        assert queue.put([b"1"]) == 1
        queue._environment.write(work)
        assert search(queue) is None


def test_list_that_was_taken_back_is_not_remembered(tmp_path: pathlib.Path) -> None:
    """Its number goes to the next new list."""
    with stores.opened(tmp_path, subscribers=("a", "b", "c")) as queue:
        consumer = queue.consumer("a")

        def work(txn: Any, databases: Any) -> None:
            audience = _log.ensure_audience(txn, databases, ("b", "c"))
            assert not consumer._pending.is_addressed(txn, databases, audience)
            raise persipubsub.errors.DiskFullError("taken back")

        with pytest.raises(persipubsub.errors.DiskFullError):
            queue._environment.write(work)
        queue.put([b"1"], ("a", "c"))
        queue.put([b"2"], ("b", "c"))
        queue.put([b"3"])
        for message in (b"1", b"3"):
            lease = take(consumer)
            assert lease.messages == [message]
            lease.acknowledge()
        assert consumer.take(timeout=0) is None


@pytest.fixture(name="searches")
def fixture_searches(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Make a list longer by each search for the next message."""
    searches: list[None] = []
    find = _pending.Pending.find

    def counted(self: _pending.Pending, *arguments: Any, **named: Any) -> Any:
        searches.append(None)
        return find(self, *arguments, **named)

    monkeypatch.setattr(_pending.Pending, "find", counted)
    return searches


@pytest.mark.parametrize("sizes", [[1, 1, 1], [3], [2, 1]])
def test_next_message_is_guessed_as_long_as_there_is_one(tmp_path: pathlib.Path,
                                                         searches: list[None],
                                                         sizes: list[int]) -> None:
    with stores.opened(tmp_path) as queue:
        consumer = queue.consumer("sub")
        for size in sizes:
            queue.put([b"x"] * size)
        for _ in range(sum(sizes)):
            take(consumer).acknowledge()
        # The first one has to be searched for, and that there is no other one.
        assert len(searches) == 1
        assert consumer.take(timeout=0) is None
        assert len(searches) == 2


def test_guess_outlives_that_all_is_gone(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        consumer = queue.consumer("sub")
        queue.put([b"1", b"2", b"3"])
        take(consumer).acknowledge()
        queue.clear()
        assert consumer.take(timeout=0) is None
        queue.put([b"4"])
        take(consumer).acknowledge()
        assert stores.figures(queue).acknowledged == 2
