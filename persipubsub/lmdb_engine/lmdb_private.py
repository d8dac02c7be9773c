"""
All that is used of py-lmdb beyond its documented interface, and a check that it is there.

Releases of lmdb 3 up to now: 3.0.0. The requirement in ``setup.py`` allows later ones: what they lack
is named when this module is imported, or by ``verify``. Rejected: to allow checked releases only,
which would keep applications from an update of lmdb for reasons of another library.
"""

import os
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeAlias

import lmdb

from persipubsub.errors import PersipubsubError

#: Releases of lmdb with which this module was checked.
_CHECKED: Final = ("3.0.0", )

if TYPE_CHECKING:
    Database: TypeAlias = lmdb._Database  # pylint: disable=protected-access
else:
    Database = Any


class IncompatibleLmdbError(PersipubsubError, ImportError):
    """Report a release of lmdb that lacks what this library uses of it."""


def _incompatible(name: str) -> IncompatibleLmdbError:
    """Describe what is missing."""
    return IncompatibleLmdbError(
        f"Expected lmdb to have {name} as in {', '.join(_CHECKED)}, but got: lmdb "
        f"{getattr(lmdb, '__version__', 'of no version')} without it. Install a release that was "
        f"checked with this version of persipubsub: pip install lmdb=={_CHECKED[-1]}")


def _takes(function: object, count: int) -> bool:
    """Tell whether a function of Python takes so many arguments; ``inspect`` is slow to import."""
    return getattr(getattr(function, "__code__", None), "co_argcount", -1) == count


try:
    from lmdb import _envid
except ImportError as _error:
    raise _incompatible("lmdb._envid") from _error
if not _takes(getattr(_envid, "env_keys", None), 2):
    raise _incompatible("lmdb._envid.env_keys(path, subdir)")


def forget_open_files() -> None:
    """
    Make py-lmdb open files in a forked child that its parent has open.

    It refuses to open files, known by device and inode, twice in a process, and counts those that a
    child inherits. Rejected: to close these, which waits for threads that only the parent has.
    """
    keys = _envid.env_keys
    process_id = os.getpid()

    def keys_of_child(path: bytes, subdir: int) -> tuple[object, ...]:
        return tuple(
            (process_id, key) for key in keys(path, subdir))  # type: ignore[no-untyped-call]

    _envid.env_keys = keys_of_child


def find_damage(pages: BinaryIO, size: int) -> tuple[list[str], int]:
    """
    Walk through all pages of a data file.

    Not ``lmdb.verify.verify``: it looks only at the first page of a large value, so that it finds
    nothing wrong with a file that was cut in the middle of one.

    :return: what is wrong; number of pages in use beyond the end of the file
    :raise IncompatibleLmdbError: if lmdb has no such verifier
    """
    try:
        # The import is slow, and hardly ever needed.
        from lmdb import verify  # pylint: disable=import-outside-toplevel
    except ImportError as error:
        raise _incompatible("lmdb.verify") from error
    kind = getattr(verify, "_Verifier", None)
    failure = getattr(verify, "VerifyError", None)
    if not (_takes(getattr(kind, "__init__", None), 3) and _takes(getattr(kind, "verify", None), 1)
            and failure is not None):
        raise _incompatible("lmdb.verify._Verifier(file, size).verify()")
    assert kind is not None
    verifier = kind(pages, size)
    try:
        findings = list(verifier.verify())
    except failure as error:
        return [str(error)], 0
    try:
        return findings, sum(verifier.live[size // verifier.psize:])
    except AttributeError as error:
        raise _incompatible("lmdb.verify._Verifier.live and psize") from error
