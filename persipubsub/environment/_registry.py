"""
Share one open environment between all users of a store in this process.

LMDB's file locks belong to the process: opening the same files twice and closing one of the two
drops the locks of the other. One registry, keyed by device and inode of the data file, therefore
hands out a single environment for each store and counts its users.
"""

import atexit
import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import ContextManager, Final

import persipubsub.errors
from persipubsub import _fork_guard
from persipubsub.environment import _environment, _files, _opening

#: How long the end of the interpreter waits for a thread that is still at work, in seconds.
_LEAVE_SECS: Final = 5.0

#: How long who forks waits for a lock while it holds others, at first, and how long it lets others
#: go on then, in seconds.
_FORK_SECS: Final = 0.5
_FORK_PAUSE_SECS: Final = 0.01

#: After all finalizers of multiprocessing itself (its lowest is -100), and those of most others.
_FINALIZER_PRIORITY: Final = -1000

# Guards the registry, and with it opening and closing; the first lock to be taken.
_REGISTRY_LOCK = threading.RLock()
_REGISTRY: dict[_files.Identity, _environment.Environment] = {}
_USERS: dict[_files.Identity, int] = {}


def acquire(directory: str,
            options: _opening.Options,
            adopts_durability: bool = False,
            is_look: bool = False) -> _environment.Environment:
    """
    Open a store, or share it if this process has it open already.

    :param directory: of the store
    :param options:
        how to open it; those of the first user in the process hold, but for a larger map
    :param adopts_durability: True to change the store's durability to that of the options
    :param is_look:
        True for who reads a little and is gone: checkpoints and the mark of a running store are
        left to others, and nothing is to be written
    :return: environment, to be given to :py:func:`release` once
    """
    used = None
    try:
        with _REGISTRY_LOCK:
            identity = _files.identify_store(directory)
            environment = _REGISTRY.get(identity)
            if environment is None:
                identity, environment = _open(directory, options, adopts_durability, is_look)
            elif environment.options.keeps_os != options.keeps_os:
                raise persipubsub.errors.ConfigError(
                    f"Expected one durability for the queue {directory} in this process, but "
                    f"got two")
            if options.map_size > environment.options.map_size:
                environment.enlarge(options.map_size)
            if environment.is_look and not is_look:
                with _opening.open_gate(directory, options):
                    environment.begin_work()
            # With no call between: a KeyboardInterrupt comes in behind calls, such as that at the
            # end of the block.
            if identity not in _USERS:
                _USERS[identity] = 0
            _USERS[identity] += 1
            used = _REGISTRY[identity] = environment
            return environment
    except BaseException:
        if used is not None:
            release(used)
        raise


def _open(directory: str, options: _opening.Options, adopts_durability: bool,
          is_look: bool) -> tuple[_files.Identity, _environment.Environment]:
    """
    Open a store that this process has not open; hold the registry's lock.

    :param directory: of the store
    :param options: how to open it
    :param adopts_durability: see :py:func:`acquire`
    :param is_look: see :py:func:`acquire`
    :return: what to register it by, and the environment
    """
    environment = _environment.Environment(directory=directory, options=options)
    environment.reopener = functools.partial(_reopen, environment)
    environment.is_look = is_look
    _watch_end_of_child()
    try:
        with _opening.open_gate(directory, options):
            environment.open(adopts_durability=adopts_durability)
            # A checkpoint may have taken the place of the file.
            return _files.identify_store(directory), environment
    except BaseException:
        # Interrupted behind its opening: nobody else would ever close it.
        environment.close()
        raise


def release(environment: _environment.Environment) -> None:
    """
    Give back one use of an environment; the last one closes it.

    :param environment: that was acquired
    """
    with _REGISTRY_LOCK:
        for identity, other in list(_REGISTRY.items()):
            if other is environment:
                _USERS[identity] -= 1
                if _USERS[identity] == 0:
                    del _REGISTRY[identity], _USERS[identity]
                    try:
                        environment.close()
                    except BaseException:
                        # Interrupted before it had closed the files, perhaps.
                        environment.close()
                        raise


@contextlib.contextmanager
def opened(directory: str,
           options: _opening.Options,
           is_look: bool = False) -> Iterator[_environment.Environment]:
    """
    Have a store open in a ``with`` block.

    :param directory: of the store
    :param options: how to open it; those of the first user in the process hold
    :param is_look: True for who reads a little and is gone
    """
    environment = acquire(directory, options, is_look=is_look)
    try:
        yield environment
    finally:
        release(environment)


def _reopen(environment: _environment.Environment) -> None:
    """
    Open an environment in a forked child, or when LMDB refuses to work with it.

    :param environment: that was open
    """
    with _REGISTRY_LOCK:
        if not environment.is_usable():
            _watch_end_of_child()
            with _opening.open_gate(environment.directory, environment.options):
                environment.open()
                _register_again(environment)


def _register_again(environment: _environment.Environment) -> None:
    """
    Register an environment by the files that it has now; hold the registry's lock.

    Its store may have been compacted or restored before it was opened again, and another user in
    this process would open the same files once more, which LMDB refuses.

    :param environment: that was opened again
    """
    identity = _files.identify_store(environment.directory)
    for before, other in list(_REGISTRY.items()):
        if other is environment and before != identity:
            _USERS[identity] = _USERS[before]
            _REGISTRY[identity] = environment
            del _REGISTRY[before], _USERS[before]


def create(directory: str, options: _opening.Options) -> bool:
    """
    Create a store unless it is there.

    The store is built aside and renamed into place, so that whatever happens there is either a
    whole store or none. It is durable when the function returns.

    :param directory: of the store; created with its parents
    :param options: how to create it
    :return: True if it was created
    :raise FormatError: if the directory holds something else
    """
    with _REGISTRY_LOCK:
        with _files.translated(path=directory, doing="create"):
            try:
                _files.make_directories(directory)
            except (FileNotFoundError, NotADirectoryError) as error:
                # In /proc, say, or below a file: it is not that somebody forgot to create it.
                raise persipubsub.errors.AccessError(
                    f"Expected to create the directory {directory}, but got: {error.strerror}"
                ) from error
        path = os.path.join(directory, _files.DATA)
        if os.path.lexists(path):
            return False
        if not os.path.isdir(directory):
            raise persipubsub.errors.FormatError(
                f"Expected {directory} to be the directory of a queue, but got: not a directory")
        with _files.translated(path=directory, doing="list"):
            foreign = _files.foreign_names(directory)
        if foreign:
            _files.identify_store(directory)
        with _opening.open_gate(directory, options):
            if os.path.lexists(path):
                return False
            with _files.translated(path=directory, doing="create a queue in"):
                _opening.build(directory, options)
            return True


def still() -> ContextManager[bool]:
    """
    Keep this process from opening, closing and creating stores, and from forking.

    :return: lock, to be held in a ``with`` block
    """
    return _REGISTRY_LOCK


def _leave() -> None:
    """Close at the end of the interpreter what nobody closed, so that nothing of it is lost."""
    if _REGISTRY_LOCK.acquire(timeout=_LEAVE_SECS):
        for environment in _REGISTRY.values():
            environment.leave(_LEAVE_SECS)
        _REGISTRY_LOCK.release()


# Process that watches already for its end as a child of multiprocessing.
_WATCHED = 0


def _watch_end_of_child() -> None:
    """
    Leave the stores at the end of a child of multiprocessing as well; hold the registry's lock.

    Where it forks, it ends by ``os._exit``, so that ``atexit`` does nothing. Not at the import:
    the child forgets the finalizers that it inherits.
    """
    global _WATCHED  # pylint: disable=global-statement
    multiprocessing = sys.modules.get("multiprocessing")
    # Not imported for it: that is slow. A child of it has it.
    if (multiprocessing is None or _WATCHED == os.getpid()
            or multiprocessing.process.parent_process() is None):
        return
    import multiprocessing.util  # pylint: disable=import-outside-toplevel
    multiprocessing.util.Finalize(None, _leave_child, exitpriority=_FINALIZER_PRIORITY)
    _WATCHED = os.getpid()


def _leave_child() -> None:
    """
    Leave the stores at the end of a child of multiprocessing, as far as it is the end.

    A spawned child has functions of ``atexit`` and threads to come, and a forked one may have
    threads, which shall not get ClosedError: what was sent so far is made safe, no more. To wait
    for the threads was rejected: those of ``concurrent.futures`` end only after this.
    """
    import multiprocessing  # pylint: disable=import-outside-toplevel
    others = [
        thread for thread in threading.enumerate()
        if thread is not threading.current_thread() and not thread.daemon
    ]
    if not others and multiprocessing.get_start_method(allow_none=True) != "spawn":
        _leave()
    elif _REGISTRY_LOCK.acquire(timeout=_LEAVE_SECS):
        try:
            for environment in _REGISTRY.values():
                environment.save()
        finally:
            _REGISTRY_LOCK.release()


def _before_fork() -> None:
    """Hold everything still, so that the child inherits no transaction and no held lock."""
    patience = _FORK_SECS
    while not _hold_still(patience):
        # Who has a lock that we wait for may be in a signal handler that waits for one of ours.
        time.sleep(_FORK_PAUSE_SECS)
        patience *= 2


def _hold_still(seconds: float) -> bool:
    """
    Take all locks, or none.

    :param seconds: how long to wait for one while others are held
    :return: True if all were taken
    """
    _REGISTRY_LOCK.acquire()
    held = []
    for environment in _REGISTRY.values():
        if not environment.before_fork(seconds):
            break
        held.append(environment)
    else:
        if _fork_guard.LOCK.acquire(timeout=seconds):
            return True
    _go_on(held)
    return False


def _go_on(environments: Iterable[_environment.Environment]) -> None:
    """
    Give back what is held for a fork but the guard.

    :param environments: whose locks are held
    """
    for environment in environments:
        environment.after_fork_in_parent()
    _REGISTRY_LOCK.release()


def _after_fork_in_parent() -> None:
    """Let the other threads go on."""
    _fork_guard.LOCK.release()
    _go_on(_REGISTRY.values())


def _after_fork_in_child() -> None:
    """Close what belongs to the parent."""
    _fork_guard.LOCK.release()
    for environment in _REGISTRY.values():
        environment.after_fork_in_child()
    _REGISTRY_LOCK.release()


atexit.register(_leave)
os.register_at_fork(before=_before_fork,
                    after_in_parent=_after_fork_in_parent,
                    after_in_child=_after_fork_in_child)
