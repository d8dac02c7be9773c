"""Mark an ``os`` store as one that is in use, for the first who opens it after a power failure."""

import contextlib
import os
from typing import Final

from persipubsub.environment import _files
from persipubsub.store import _clock

#: Behind the id of the boot in the mark of a store in use, if no checkpoints are written.
_NO_CHECKPOINTS: Final = b"without"


def was_interrupted(directory: str) -> bool:
    """
    Tell whether an ``os`` store was in use when the machine went down.

    :param directory: of the store
    :return: True if its last pages may never have reached the disk
    """
    mark = _read_mark(directory)
    return mark is not None and not mark.startswith(_clock.boot_id())


def _read_mark(directory: str) -> bytes | None:
    """
    Read the mark of an ``os`` store that is in use.

    :param directory: of the store
    :return:
        id of the boot in which it is, or was, in use, and a word behind it if no checkpoints are
        written; None if it was closed cleanly
    """
    path = os.path.join(directory, _files.RUNNING)
    with _files.translated(path=path, doing="read"):
        try:
            with open(path, "rb") as fid:
                return fid.read()
        except FileNotFoundError:
            return None


def is_marked(directory: str) -> bool:
    """
    Tell whether an ``os`` store is marked as in use in this boot.

    :param directory: of the store
    :return: True if it is
    """
    return (_read_mark(directory) or b"").startswith(_clock.boot_id())


def is_checkpointed(directory: str) -> bool:
    """
    Tell whether an ``os`` store is marked as one of which checkpoints are written.

    :param directory: of the store
    :return: True if it is, in this boot or an earlier one
    """
    mark = _read_mark(directory)
    return mark is not None and mark[16:] != _NO_CHECKPOINTS


def mark_running(directory: str, has_checkpoints: bool) -> None:
    """
    Leave a durable mark, before anything is written, that the last pages may not reach the disk.

    :param directory: of an ``os`` store
    :param has_checkpoints: True if a checkpoint is to take its place then
    """
    mark = _clock.boot_id() + (b"" if has_checkpoints else _NO_CHECKPOINTS)
    path = os.path.join(directory, _files.RUNNING)
    with _files.translated(path=path, doing="write"):
        if _read_mark(directory) != mark:
            _files.write_durably(path, mark)
        else:
            # Whoever left it may have been killed before that.
            _files.flush_directory(directory)


def mark_clean(directory: str) -> None:
    """
    Take the mark of a running store away, after everything was flushed.

    :param directory: of an ``os`` store
    """
    with _files.translated(path=directory, doing="write to"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, _files.RUNNING))
        # Also if it is gone: whoever removed it may have been killed before that.
        _files.flush_directory(directory)
