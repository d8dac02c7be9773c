"""
End a command: turn whatever goes wrong into a line and an exit code.

It knows nothing of options: ``stat`` in its plain forms ends here, too, and runs without click.
"""

import io
import os
import sys
from collections.abc import Callable
from typing import Any, Optional, TextIO, TypeVar

import persipubsub.errors
from persipubsub.cli import _text

CodeT = TypeVar("CodeT", bound=Optional[int])


class _Whole(io.FileIO):
    """Wait for room where a non-blocking output has none."""

    def write(self, content: Any) -> int:
        """
        Write what there is room for.

        :param content: to be written
        :return: how many bytes were written
        """
        # None, and not an error, is what it says of an output without room.
        while (written := super().write(content)) is None:
            import select  # pylint: disable=import-outside-toplevel

            poll = select.poll()
            poll.register(self.fileno(), select.POLLOUT)
            poll.poll()
        return written


def _whole(stream: TextIO) -> TextIO:
    """
    Let a standard output write all that it is given, or fail.

    With PYTHONUNBUFFERED, as in most containers, nothing is between a write and the system: what
    the system did not take was left out without an error, and a message that was not written was
    acknowledged. Making a non-blocking output blocking was rejected: others may share it.

    :param stream: the standard output
    :return: the stream if it does so already, or another one for the same output
    """
    buffer = getattr(stream, "buffer", None)
    is_raw = isinstance(buffer, io.RawIOBase)
    try:
        if isinstance(getattr(buffer, "raw", None),
                      _Whole) or (not is_raw and os.get_blocking(stream.fileno())):
            return stream
        raw = _Whole(stream.fileno(), "wb", closefd=False)
    except OSError:
        return stream  # of a test, without a descriptor
    return io.TextIOWrapper(io.BufferedWriter(raw),
                            encoding=stream.encoding,
                            errors=stream.errors,
                            newline="\n",
                            line_buffering=is_raw or bool(stream.line_buffering))


def exit_code_of(work: Callable[[], CodeT]) -> CodeT | int:
    """
    Do the work of a command, and turn whatever goes wrong into a line and an exit code.

    :param work: returns an exit code; None if it did nothing, and somebody else is to do it
    :return:
        what the work returned; 1 if it failed, 130 if it was interrupted, 0 if nobody reads the
        output any more
    """
    if sys.stderr is None:
        # Closed: print would take the standard output instead.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    if sys.stdout is None:
        # Before anything is done: a message that was received would be lost.
        _text.complain(
            f"Expected an open standard output, but got: it is closed. To do without, send it "
            f"to {os.devnull}.")
        return 1
    for stream in (sys.stdout, sys.stderr):
        # What a terminal can not show is no reason to fail.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = _whole(sys.stdout)
    try:
        code = _try(work)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Who reads our output has seen enough.
        _text.silence(sys.stdout)
        return 0
    except KeyboardInterrupt:
        _text.complain("interrupted")
        return 130
    except OSError as error:
        # Of the output, or of a file that was named; those of queues are translated.
        _text.silence(sys.stdout)
        _text.complain(f"Expected to write the output, but got: {error}")
        return 1


def _try(work: Callable[[], CodeT]) -> CodeT | int:
    """
    Do the work of a command, and tell what the library says of it.

    :param work: returns an exit code
    :return: what the work returned; 1 if it failed
    """
    try:
        return work()
    except persipubsub.errors.PersipubsubError as error:
        _text.complain(str(error))
        return 1
