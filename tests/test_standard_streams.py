"""Test that no file of a queue gets the number of a standard stream."""

# pylint: disable=missing-docstring

import pathlib

import pytest

import persipubsub.control
from tests import support


@pytest.mark.parametrize("durability", ["fsync", "os"])
@pytest.mark.parametrize("numbers", [[0, 1, 2], [0], [2]])
def test_stream_that_is_closed_unseen(tmp_path: pathlib.Path, numbers: list[int],
                                      durability: str) -> None:
    """
    Another thread has a file open in place of a closed stream, and closes it after we looked.

    Whatever is opened to be written to then would get the number.
    """
    config_pth = support.write_config(tmp_path, durability=durability, checkpoint_secs=0)
    done = support.run_python(
        """if True:
        import lmdb, os, pathlib, sys
        import persipubsub.control
        from persipubsub.environment import _standard_streams
        from tests import support, test_opening
        config_pth, *numbers = sys.argv[1:]
        config_pth, numbers = pathlib.Path(config_pth), [int(number) for number in numbers]
        backup = config_pth.parent / "backup"
        calls, found, really_occupy = [], set(), _standard_streams.occupy

        def occupy():
            really_occupy()
            calls.append(1)
            # Each second time, as nobody closes streams for ever.
            if len(calls) % 2 == begin:
                for number in numbers:
                    os.close(number)

        def look(*_):
            found.update(number for number in numbers if support.is_writable(number))

        def profile(frame, event, function):
            # Before LMDB uses what it has open.
            if event == "c_call" and function.__name__ != "close" and isinstance(
                    getattr(function, "__self__", None), (lmdb.Environment, lmdb.Transaction)):
                look()

        def flush(descriptor, flush=os.fsync):
            look()
            flush(descriptor)

        for number in numbers:
            os.close(number)
        really_occupy()
        _standard_streams.occupy = occupy
        os.fsync = flush
        sys.setprofile(profile)
        for begin in range(2):
            # The other half of the openings is met each time.
            calls.clear()
            persipubsub.control.initialize_all_dbs(config_pth)
            test_opening.send(config_pth, b"message")
            with persipubsub.subscriber.Sub() as sub:
                sub.init(sub_id="sub", config_pth=config_pth)
                look()
            persipubsub.control.backup(config_pth, "queue", backup)
            persipubsub.control.compact(config_pth, "queue")
            persipubsub.control.restore(config_pth, "queue", backup)
            backup.unlink()
            assert test_opening.receive_all(config_pth) == [b"message"]
            persipubsub.control.drop_queue(config_pth, "queue")
            really_occupy()
        (config_pth.parent / "found").write_text(repr(found))
        """, config_pth, *numbers)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "found").read_text() == "set()"


def test_file_steps_aside(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    done = support.run_python(
        """if True:
        import os, sys
        from persipubsub.environment import _standard_streams
        before = len(os.listdir("/proc/self/fd"))
        os.close(0)
        descriptor = _standard_streams.step_aside(os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY))
        os.write(descriptor, b"content")
        print(descriptor > 2, os.get_inheritable(descriptor), os.path.exists("/proc/self/fd/0"),
              len(os.listdir("/proc/self/fd")) - before)
        """, path)
    assert (done.stdout, path.read_bytes()) == ("True False False 0\n", b"content"), done.stderr


def test_stream_that_is_replaced_meanwhile() -> None:
    """Another thread closes it, and then puts its own file over what was opened there."""
    done = support.run_python("""if True:
        import os, sys
        from persipubsub.environment import _standard_streams

        def open_file():
            opened.append(1)
            if len(opened) == 1:
                os.close(0)
            file = open(sys.executable, "rb")
            if len(opened) == 1:
                os.dup2(os.open("/", os.O_RDONLY), file.fileno())
            return file

        opened = []
        file = _standard_streams.open_elsewhere(open_file)
        print(len(opened), file.fileno() > 2, os.path.samestat(os.fstat(file.fileno()),
                                                               os.stat(sys.executable)))
        """)
    assert done.stdout == "2 True True\n", done.stderr


def test_stream_that_is_closed_many_times() -> None:
    """In the end it is left alone."""
    done = support.run_python("""if True:
        import os, sys
        from persipubsub.environment import _standard_streams

        def open_file():
            opened.append(1)
            if len(opened) < _standard_streams._MOST_ATTEMPTS:
                os.close(0)
            return open(sys.executable, "rb")

        opened = []
        file = _standard_streams.open_elsewhere(open_file)
        print(len(opened) == _standard_streams._MOST_ATTEMPTS, file.fileno() > 2)
        """)
    assert done.stdout == "True True\n", done.stderr


def test_stream_that_is_one_of_the_files_stays(tmp_path: pathlib.Path) -> None:
    """Somebody may look at a store with it as standard input."""
    config_pth = support.write_config(tmp_path)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    done = support.run_python(
        """if True:
        import os, sys
        from tests import test_opening
        os.dup2(os.open(sys.argv[2], os.O_RDONLY), 0)
        test_opening.send(sys.argv[1], b"message")
        print(test_opening.receive_all(sys.argv[1]), os.readlink("/proc/self/fd/0") == sys.argv[2])
        """, config_pth, tmp_path / "queue" / "data.mdb")
    assert (done.returncode, done.stdout) == (0, "[b'message'] True\n"), done.stderr
