"""Test publishing: what is taken, what is refused, and how a publisher lives and ends."""

import array
import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union

import pytest

from persipubsub import Pub, Sub, control, errors
from tests import support
from tests.support import receive_all


class Bytes(bytes):
    """Be bytes, and more."""


@pytest.mark.parametrize("message", [
    b"", b"\x00", b"bytes",
    Bytes(b"bytes"),
    bytearray(b"bytes"),
    memoryview(b"bytes"),
    memoryview(b"b-y-t-e-s")[::2],
    memoryview(array.array("i", [1, 2, 3])),
    bytes(range(256)) * 1000
],
                         ids=lambda message: type(message).__name__)
def test_bytes_like_messages(config_pth: Path, pub: Pub, message: Any) -> None:
    pub.send(msg=message)
    pub.send_many(msgs=[message, message])
    received = receive_all(config_pth)
    assert received == [bytes(message)] * 3 and {type(one) for one in received} == {bytes}


def test_any_iterable_of_messages(config_pth: Path, pub: Pub) -> None:
    pub.send_many(msgs=[])
    pub.send_many(msgs=())
    pub.send_many(msgs=(b"%d" % number for number in range(3)))  # type: ignore[arg-type]
    pub.send_many(msgs=tuple([b"3", b"4"]))
    assert receive_all(config_pth) == [b"0", b"1", b"2", b"3", b"4"]


def test_iterable_that_fails_sends_nothing(config_pth: Path, pub: Pub) -> None:

    def generate() -> Iterator[bytes]:
        yield b"good"
        raise KeyError("mine")

    with pytest.raises(KeyError):
        pub.send_many(msgs=generate())  # type: ignore[arg-type]
    assert not receive_all(config_pth)


def test_changed_buffer_changes_nothing(config_pth: Path, pub: Pub) -> None:
    buffer = bytearray(b"before")
    pub.send(msg=buffer)
    pub.send_many(msgs=[buffer, memoryview(buffer)])
    buffer[:] = b"behind"
    assert receive_all(config_pth) == [b"before"] * 3


def last_transaction(pub: Pub) -> int:
    return support.queue_of(pub).statistics().commits


@pytest.mark.parametrize("autosync, commits", [(False, 1), (True, 5)])
def test_commits_of_a_batch(config_pth: Path, autosync: bool, commits: int) -> None:
    with Pub("pub", config_pth, autosync=autosync) as pub:
        before = last_transaction(pub)
        pub.send_many(msgs=[b"%d" % number for number in range(5)])
        assert last_transaction(pub) - before == commits
    assert receive_all(config_pth) == [b"0", b"1", b"2", b"3", b"4"]


# Life of a publisher


def test_init_again(tmp_path: Path, config_pth: Path, pub: Pub) -> None:
    other = support.write_config(tmp_path,
                                 name="other.json",
                                 publishers={"other": ["sub"]},
                                 path=str(tmp_path / "other"))
    pub.init(pub_id="pub", config_pth=config_pth)
    with pytest.raises(errors.NotInitializedError):
        pub.init(pub_id="other", config_pth=other)
    pub.send(b"still there")
    control.initialize_all_dbs(config_pth=other)
    pub.init(pub_id="other", config_pth=other)
    pub.send(b"elsewhere")
    assert receive_all(config_pth) == [b"still there"]
    assert receive_all(other) == [b"elsewhere"]


def test_not_initialized(tmp_path: Path) -> None:
    config_pth = support.write_config(tmp_path)
    for _ in range(2):
        with pytest.raises(errors.NotInitializedError, match="initialize_all_dbs"):
            Pub("pub", config_pth)
    assert sorted(os.listdir(tmp_path)) == ["config.json"]
    (tmp_path / "queue").mkdir()
    with pytest.raises(errors.NotInitializedError, match="initialize_all_dbs"):
        Pub("pub", config_pth)
    assert not os.listdir(tmp_path / "queue")


def test_paths_of_any_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "with spaces and ümläuts"
    directory.mkdir()
    config_pth = support.write_config(directory, path="queues/queue of mine")
    control.initialize_all_dbs(config_pth=str(config_pth))
    assert (directory / "queues" / "queue of mine" / "data.mdb").exists()
    monkeypatch.chdir(directory)
    # A relative path of a queue belongs to the file, not to the working directory.
    paths: list[Union[str,
                      Path]] = [config_pth,
                                str(config_pth), "config.json",
                                Path("config.json")]
    for path, (pub_path, sub_path) in enumerate(itertools.product(paths, paths)):
        with Pub("pub", pub_path) as pub, Sub("sub", sub_path) as sub:
            pub.send(b"%d" % path)
            with sub.receive(timeout=0) as message:
                assert message == b"%d" % path
    monkeypatch.chdir(tmp_path)
    with Pub("pub", config_pth) as pub:
        pub.send(b"message")
    assert receive_all(config_pth) == [b"message"]


@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_send_after_the_interpreter_was_left(tmp_path: Path, durability: str) -> None:
    config_pth = support.make_queue(tmp_path, durability=durability)
    code = """if True:
        import atexit, sys

        def send_late():
            try:
                pub.send(b"late")
                print("sent")
            except persipubsub.errors.ClosedError:
                print("closed")
            pub.close()

        atexit.register(send_late)
        import persipubsub.errors, persipubsub.publisher
        pub = persipubsub.publisher.Pub()
        pub.init(pub_id="pub", config_pth=sys.argv[1])
        pub.send(b"in time")
        """
    done = support.run_python(code, config_pth)
    assert (done.returncode, done.stderr) == (0, "")
    # The queue was left as closed: what came then would be in no journal.
    assert done.stdout == "closed\n"
    assert not (tmp_path / "queue" / "running").exists()
    assert receive_all(config_pth) == [b"in time"]


def test_many_threads_send_batches(tmp_path: Path) -> None:
    """Commits that threads share keep batches together, and apart whom each is for."""
    publishers = {"all": ["a", "b"], "to_a": ["a"], "to_b": ["b"]}
    config_pth = support.make_queue(tmp_path, publishers, ["a", "b"])
    with Pub("all", config_pth) as first, Pub("to_a", config_pth) as second, \
            Pub("to_b", config_pth) as third:
        pubs = [first, second, third] * 3

        def send(name: int) -> None:
            for number in range(20):
                pubs[name].send_many([b"%d-%d-%d" % (name, number, place) for place in range(5)])

        support.in_threads([functools.partial(send, name) for name in range(9)])

    for sub_id, other in (("a", 2), ("b", 1)):
        received = [
            tuple(int(part) for part in message.split(b"-"))
            for message in receive_all(config_pth, sub_id)
        ]
        assert len(received) == 6 * 20 * 5
        for start in range(0, len(received), 5):
            # Batches stay together, and each thread's are in its order.
            name, number, _ = received[start]
            assert name % 3 != other
            assert received[start:start + 5] == [(name, number, place) for place in range(5)]
        for name in range(9):
            own = [each for each in received if each[0] == name]
            assert own == sorted(own)
    assert control.verify(config_pth) == {"queue": ()}
