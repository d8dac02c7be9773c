"""
End a command: turn whatever goes wrong into a line and an exit code.

It knows nothing of options: ``stat`` in its plain forms ends here, too, and runs without click.
"""

import os
import sys
from typing import Callable, Optional, TypeVar, Union

import persipubsub.errors
from persipubsub.cli import _text

CodeT = TypeVar("CodeT", bound=Optional[int])


def exit_code_of(work: Callable[[], CodeT]) -> Union[CodeT, int]:
    """
    Do the work of a command, and turn whatever goes wrong into a line and an exit code.

    :param work: returns an exit code; None if it did nothing, and somebody else is to do it
    :return:
        what the work returned; 1 if it failed, 130 if it was interrupted, 0 if nobody reads the
        output any more
    """
    if sys.stderr is None:
        # Closed: print would take the standard output instead.
        sys.stderr = open(os.devnull, "wt", encoding="utf-8")
    if sys.stdout is None:
        # Before anything is done: a message that was received would be lost.
        _text.complain("Expected an open standard output, but got: it is closed. To do without, "
                       "send it to {}.".format(os.devnull))
        return 1
    for stream in (sys.stdout, sys.stderr):
        # What a terminal can not show is no reason to fail.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
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
        _text.complain("Expected to write the output, but got: {}".format(error))
        return 1


def _try(work: Callable[[], CodeT]) -> Union[CodeT, int]:
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
