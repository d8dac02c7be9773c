"""Test how works of several threads share transactions; see also test_environment.py."""

import pathlib
import threading

import pytest

import persipubsub.control
import persipubsub.errors
import persipubsub.publisher
import persipubsub.queue
import persipubsub.subscriber
from persipubsub.environment import _line, _transactions
from tests import stores, support

THREADS = 8


@pytest.mark.parametrize("largest", [1, 3, 512])
def test_group_smaller_than_the_crowd(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
                                      largest: int) -> None:
    """A thread that leads a group in which its own work has no place goes on until it is done."""
    monkeypatch.setattr(_transactions, "_LARGEST_GROUP", largest)
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    failed: list[BaseException] = []
    barrier = threading.Barrier(THREADS)

    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)

        def send() -> None:
            try:
                barrier.wait(support.HANG_SECS)
                for _ in range(40):
                    pub.send(b"message")
            except BaseException as error:  # pylint: disable=broad-exception-caught
                failed.append(error)

        threads = [threading.Thread(target=send) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * support.HANG_SECS)
            assert not thread.is_alive()
        assert not failed
    figures = persipubsub.control.statistics(config_pth)["queue"]
    assert figures.messages == 40 * THREADS


@pytest.mark.parametrize("kind", ["read", "write"])
def test_errors_of_works_name_the_queue(tmp_path: pathlib.Path, kind: str) -> None:

    def work(*_: object) -> None:
        raise persipubsub.errors.CorruptMessageError("Expected a, but got: b.", number=3)

    with stores.opened(tmp_path) as queue:
        environment = queue._environment  # pylint: disable=protected-access
        with pytest.raises(persipubsub.errors.CorruptMessageError) as caught:
            getattr(environment, kind)(work)
        assert str(caught.value) == f"Expected a, but got: b; queue {queue.settings.path}"
        assert caught.value.number == 3


def test_who_is_no_subscriber_is_told_of_which_queue(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    path = persipubsub.control.statistics(config_pth)["queue"].path
    assert persipubsub.control.remove_subscriber(config_pth, "queue", "sub") == 0
    for function in (
            lambda: persipubsub.control.remove_subscriber(config_pth, "queue", "sub"),
            lambda: persipubsub.control.seek(config_pth, "sub", "end"),
            lambda: persipubsub.subscriber.Sub().init("sub", config_pth),
    ):
        with pytest.raises(persipubsub.errors.NotInitializedError, match="'sub'") as caught:
            function()
        assert path in str(caught.value)


def test_work_without_a_change_takes_no_flush_from_the_next_one(
        tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LMDB uses up no id for a transaction that changed nothing."""
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)
        environment = support.queue_of(pub)._environment  # pylint: disable=protected-access
        pub.send(b"message")
        flushes: list[int] = []
        flush = environment._sync  # pylint: disable=protected-access

        def count() -> None:
            flush()
            flushes.append(1)

        monkeypatch.setattr(environment, "_sync", count)
        environment.write(lambda txn, databases: None, is_flushed=True)
        del flushes[:]
        pub.send(b"message")
        assert flushes == [1]
        environment.write(lambda txn, databases: None)
        pub.send(b"message")
        assert flushes == [1, 1]


def send_in_child(pipe: support.Connection, config_pth: pathlib.Path) -> None:
    """Send a message from another process."""
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)
        pub.send(b"from the child")
    pipe.send("sent")


@pytest.mark.parametrize("is_put", [True, False])
def test_end_of_the_log_is_not_taken_from_a_transaction_without_a_change(
        tmp_path: pathlib.Path, is_put: bool) -> None:
    """Another process gets the id that LMDB did not use up, and moves the end of the log."""
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="pub", config_pth=config_pth)
        pub.send(b"message")
        queue = support.queue_of(pub)
        if is_put:
            queue.put([])
        else:
            # As where a signal handler committed all works of the code that it interrupted.
            # pylint: disable=protected-access
            environment = queue._environment
            environment._run_group(environment._open_handles(), [])
        with support.Child(send_in_child, config_pth) as child:
            assert child.get() == "sent"
            child.end()
        pub.send(b"message")
    assert persipubsub.control.statistics(config_pth)["queue"].messages == 3


def test_work_is_not_taken_for_committed_when_another_process_gets_the_id(
        tmp_path: pathlib.Path) -> None:
    """It would never be run: a message would be lost."""
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    with persipubsub.queue.Queue(support.settings(config_pth)) as queue:
        queue.put([b"ours"])
        # pylint: disable=protected-access
        environment = queue._environment
        handles = environment._open_handles()
        # As an interrupt leaves it that comes in front of the commit.
        request = _line.Request(lambda txn, databases: None)
        request.commit = handles.environment.info()["last_txnid"] + 1
        environment._recognize_committed(handles, [request])
        with support.Child(send_in_child, config_pth) as child:
            assert child.get() == "sent"
            child.end()
        environment._recognize_committed(handles, [request])
        assert not request.done
