"""Test what is told of messages in flight: which, in which process, and since when."""

# pylint: disable=missing-function-docstring
# pylint: disable=protected-access

import os
import pathlib
import signal
import stat

import pytest

import persipubsub.control
import persipubsub.queue
import persipubsub.statistics
import persipubsub.subscriber
from persipubsub import _in_flight
from persipubsub.store import _clock
from tests import stores, support


@pytest.fixture(autouse=True)
def fixture_need_locks_of_descriptions() -> None:
    if _in_flight._GETLK < 0:
        pytest.skip("this system does not tell")


def claims(queue: persipubsub.queue.Queue,
           name: str = "sub") -> tuple[persipubsub.statistics.InFlight, ...]:
    return stores.figures(queue, name).claims


def test_claims_are_told_with_process_and_time(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path, subscribers=["other", "sub"]) as queue:
        assert claims(queue) == ()
        first = queue.put([b"1", b"2", b"3"])
        before_ns = _clock.ticks_ns()
        one = queue.consumer("sub").take(timeout=0)
        many = queue.consumer("sub").take(timeout=0, max_messages=2)
        assert one is not None and many is not None
        found = claims(queue)
        assert [(claim.subscriber, claim.number, claim.count, claim.process_id)
                for claim in found] == [("sub", first, 1, os.getpid()),
                                        ("sub", first + 1, 2, os.getpid())]
        for claim in found:
            assert claim.seconds is not None
            assert 0 <= claim.seconds <= (_clock.ticks_ns() - before_ns) / 1e9
        assert claims(queue, "other") == ()
        many.acknowledge()
        assert [claim.number for claim in claims(queue)] == [first]
        one.give_back()
        assert claims(queue) == ()


def test_hung_consumer_is_seen_and_ending_it_helps_at_once(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth)

    def hang(pipe: support.Connection) -> None:
        with persipubsub.subscriber.Sub() as sub:
            sub.init(sub_id="sub", config_pth=config_pth)
            with sub.receive(timeout=support.HANG_SECS) as msg:
                pipe.send(msg)
                pipe.recv()

    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        number = queue.put([b"1"])
        with support.Child(hang) as child:
            assert child.get() == b"1"
            child.kill(signal.SIGSTOP)
            claim, = persipubsub.control.in_flight(config_pth)["queue"]
            assert (claim.number, claim.process_id) == (number, child.process.pid)
            # It is not robbed.
            consumer = queue.consumer("sub")
            assert consumer.take(timeout=0.2) is None
            child.kill(signal.SIGKILL)
            child.end(-signal.SIGKILL)
            lease = consumer.take(timeout=0)
            assert lease is not None and lease.messages == [b"1"]
            claim, = persipubsub.control.in_flight(config_pth)["queue"]
            assert claim.process_id == os.getpid()
            lease.acknowledge()


def test_without_a_note_the_rest_is_still_told(tmp_path: pathlib.Path) -> None:
    with stores.opened(tmp_path) as queue:
        number = queue.put([b"1"])
        lease = queue.consumer("sub").take(timeout=0)
        assert lease is not None
        with open(os.path.join(queue.settings.path, "board"), "r+b") as fid:
            fid.write(bytes(_in_flight._BOARD_BYTES))
        assert claims(queue) == (persipubsub.statistics.InFlight("sub", number, 1, None, None), )
        os.unlink(os.path.join(queue.settings.path, "board"))
        assert claims(queue)[0].process_id is None
        lease.acknowledge()


def board(directory: pathlib.Path, is_look: bool = False) -> _in_flight.Board:
    return _in_flight.Board(str(directory / "board"), is_look=is_look)


def test_notes_are_seen_by_others(tmp_path: pathlib.Path) -> None:
    writer = board(tmp_path)
    assert not (tmp_path / "board").exists()
    writer.note(ordinal=3, number=1 << 40, process_id=os.getpid())
    assert stat.S_IMODE((tmp_path / "board").stat().st_mode) == 0o600
    reader = board(tmp_path, is_look=True)
    found = reader.find(3, 1 << 40)
    assert found is not None and found.process_id == os.getpid()
    for ordinal, number in ((2, 1 << 40), (3, (1 << 40) + 1), (3, (1 << 40) + _in_flight._NOTES)):
        assert reader.find(ordinal, number) is None


def test_note_that_was_written_over_is_not_believed(tmp_path: pathlib.Path) -> None:
    one = board(tmp_path)
    one.note(ordinal=0, number=1, process_id=os.getpid())
    one.note(ordinal=0, number=1 + _in_flight._NOTES, process_id=os.getpid())
    assert one.find(0, 1) is None
    assert one.find(0, 1 + _in_flight._NOTES) is not None


@pytest.mark.parametrize("offset", [4, 9, 17, 25])
def test_note_that_is_half_written_is_not_believed(tmp_path: pathlib.Path, offset: int) -> None:
    one = board(tmp_path)
    one.note(ordinal=0, number=1, process_id=os.getpid())
    with (tmp_path / "board").open("r+b") as fid:
        fid.seek(_in_flight._NOTE.size + offset)
        byte = fid.read(1)[0]
        fid.seek(-1, os.SEEK_CUR)
        fid.write(bytes((byte ^ 1, )))
    assert one.find(0, 1) is None


def test_note_of_a_process_that_ended_is_not_believed(tmp_path: pathlib.Path) -> None:
    one = board(tmp_path)

    def note(pipe: support.Connection) -> None:
        one.note(ordinal=0, number=1, process_id=os.getpid())
        pipe.send(os.getpid())
        pipe.recv()

    with support.Child(note) as child:
        process_id = child.get()
        found = one.find(0, 1)
        assert found is not None and found.process_id == process_id
        child.kill(signal.SIGKILL)
        child.end(-signal.SIGKILL)
        assert one.find(0, 1) is None


def test_look_makes_no_board(tmp_path: pathlib.Path) -> None:
    assert board(tmp_path, is_look=True).find(0, 1) is None
    assert not list(tmp_path.iterdir())
    (tmp_path / "board").write_bytes(b"short")
    assert board(tmp_path, is_look=True).find(0, 1) is None
    assert (tmp_path / "board").read_bytes() == b"short"


@pytest.mark.parametrize("kind", ["link", "directory", "missing directory"])
def test_without_a_board_nothing_fails(tmp_path: pathlib.Path, kind: str) -> None:
    if kind == "link":
        (tmp_path / "board").symlink_to(tmp_path / "elsewhere")
    elif kind == "directory":
        (tmp_path / "board").mkdir()
    one = board(tmp_path / "nothing" if kind == "missing directory" else tmp_path)
    one.note(ordinal=0, number=1, process_id=os.getpid())
    assert one.find(0, 1) is None
    assert not (tmp_path / "elsewhere").exists()
