"""Test that threads which stand in line to write are woken, whatever happens in front of them."""

# pylint: disable=missing-function-docstring
# pylint: disable=protected-access

import functools
import os
import pathlib
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

import persipubsub.control
import persipubsub.errors
from persipubsub.environment import _environment, _line, _registry, _transactions
from tests import stores, support

THREADS = 6


@pytest.fixture(name="no_second_look", autouse=True)
def fixture_no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody wake by himself: whoever is not woken hangs."""
    monkeypatch.setattr(_line, "_LONGEST_SLEEP_SECS", 10 * support.HANG_SECS)


@pytest.fixture(name="environment", params=["fsync", "os"])
def fixture_environment(request: pytest.FixtureRequest,
                        tmp_path: pathlib.Path) -> Iterator[_environment.Environment]:
    config_pth = support.write_config(tmp_path,
                                      durability=request.param,
                                      busy_timeout_secs=2 * support.HANG_SECS)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    settings = support.settings(config_pth)
    opened = _registry.acquire(settings.path, settings.options())
    yield opened
    _registry.release(opened)


class Crowd:
    """Write in threads; daemons, so that a hanging one fails its test and not the whole run."""

    def __init__(self, environment: _environment.Environment) -> None:
        self.environment = environment
        self.results: dict[int, object] = {}
        self._threads: list[threading.Thread] = []

    def start(self, count: int, write: Callable[[], object]) -> None:
        """Call a function in so many threads."""

        def call(index: int) -> None:
            try:
                self.results[index] = write()
            except BaseException as error:  # pylint: disable=broad-exception-caught
                self.results[index] = error

        for _ in range(count):
            thread = threading.Thread(target=call, args=(len(self._threads), ), daemon=True)
            self._threads.append(thread)
            thread.start()

    def until_waiting(self, count: int) -> None:
        """Wait until so many are in line, each with its alarm."""
        requests = self.environment._line.requests
        support.until(
            lambda: len(requests) == count and all(request.alarm for request in list(requests)),
            "waiting threads")

    def join(self) -> list[object]:
        """Wait for all; return what came of them."""
        for thread in self._threads:
            thread.join(support.HANG_SECS)
            assert not thread.is_alive(), "Expected all threads to be woken, but one sleeps on."
        return [self.results[index] for index in sorted(self.results)]


def write_flushed(environment: _environment.Environment) -> Callable[[], int]:
    return lambda: environment.write(stores.rewrite, is_flushed=True)


def write(environment: _environment.Environment) -> Callable[[], int]:
    return lambda: environment.write(stores.rewrite)


# Nobody is left asleep


@pytest.mark.parametrize("largest", [1, 2, 512])
@pytest.mark.parametrize("writes", [(write_flushed, ), (write, ), (write_flushed, write)])
def test_all_are_woken(environment: _environment.Environment, monkeypatch: pytest.MonkeyPatch,
                       largest: int, writes: Any) -> None:
    """Many rounds, as it depends on who comes when."""
    monkeypatch.setattr(_transactions, "_LARGEST_GROUP", largest)

    def write_often(turn: int) -> None:
        for number in range(40):
            writes[(number + turn) % len(writes)](environment)()

    crowd = Crowd(environment)
    for turn in range(THREADS):
        crowd.start(1, lambda turn=turn: write_often(turn))  # type: ignore[misc]
    assert crowd.join() == [None] * THREADS


@pytest.mark.parametrize("writes", [(write_flushed, ), (write, ), (write, write_flushed)])
def test_all_of_a_group_are_woken(environment: _environment.Environment, writes: Any) -> None:
    """One leads for all of the others, and flushes for them, or one of them does."""
    crowd = Crowd(environment)
    with environment._line:
        for index in range(THREADS):
            crowd.start(1, writes[index % len(writes)](environment))
        crowd.until_waiting(THREADS)
    assert len(set(crowd.join())) == 1


def test_one_flush_for_a_group(environment: _environment.Environment,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    flushes: list[int] = []
    sync = environment._sync

    def count() -> None:
        flushes.append(1)
        sync()

    monkeypatch.setattr(environment, "_sync", count)
    crowd = Crowd(environment)
    with environment._line:
        # Whoever leads, all others find their flush done.
        crowd.start(1, write(environment))
        crowd.start(THREADS, write_flushed(environment))
        crowd.until_waiting(THREADS + 1)
    crowd.join()
    assert len(flushes) == (0 if environment.options.keeps_os else 1)


def test_error_of_one_wakes_all(environment: _environment.Environment) -> None:

    def fail(*_: object) -> int:
        raise persipubsub.errors.StoreError("on purpose")

    crowd = Crowd(environment)
    with environment._line:
        crowd.start(2, write_flushed(environment))
        crowd.start(1, lambda: environment.write(fail, is_flushed=True))
        crowd.start(2, write_flushed(environment))
        crowd.until_waiting(5)
    found = [type(result) for result in crowd.join()]
    assert found == [int, int, persipubsub.errors.StoreError, int, int]


# Those who come back from a flush


class Alarm:
    """Be the alarm of a thread that sleeps; note whether it was woken."""

    def __init__(self) -> None:
        self.is_woken = False

    def release(self) -> None:
        self.is_woken = True


class Sleep:
    """Call a function whenever a thread falls asleep, in that thread, and wake it after that."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.timeouts: list[float] = []
        self._function = function

    def acquire(self, timeout: float | None = None) -> bool:
        if timeout is not None:
            self.timeouts.append(timeout)
            self._function()
        return True

    def release(self) -> None:
        """Do nothing: it is woken anyhow."""


def committed(count: int) -> list[_line.Request]:
    """Make requests of threads that sleep, and whose works were committed together."""
    requests = [_line.Request(stores.rewrite, is_flushed=True) for _ in range(count)]
    for request in requests:
        request.alarm = Alarm()  # type: ignore[assignment]
        request.done = True
    return requests


def flushed(line: _line.Line, count: int) -> list[_line.Request]:
    """Flush a group of one leader and so many followers, which sleep; return these."""
    leader, *followers = committed(count + 1)
    line.share_flush([leader, *followers], leader)
    assert not any(is_woken(follower) for follower in followers)
    line.pass_on(leader)
    return followers


def is_woken(request: _line.Request) -> bool:
    return cast(Alarm, request.alarm).is_woken


@pytest.mark.parametrize("count", [1, 2, 3, 4, 15])
@pytest.mark.parametrize("is_first", [True, False])
def test_next_commit_waits_for_those_who_were_flushed(monkeypatch: pytest.MonkeyPatch, count: int,
                                                      is_first: bool) -> None:
    monkeypatch.setattr(_line, "_HOLD_SECS", support.HANG_SECS)
    line = _line.Line()
    followers = flushed(line, count)
    awake = _line._MOST_AWAKE
    comers = iter(followers)

    def come_back() -> None:
        nonlocal awake
        assert is_free_for_others(line)
        assert sum(map(is_woken, followers)) == min(count, awake)
        awake += 1
        line.pass_on(next(comers))

    sleep = Sleep(come_back)
    monkeypatch.setattr(_line, "threading", types.SimpleNamespace(Lock=lambda: sleep))
    newcomer = _line.Request(stores.rewrite)
    line.requests.extend([newcomer] if is_first else [_line.Request(stores.rewrite), newcomer])
    assert line.wait(newcomer, 2 * support.HANG_SECS)
    assert not is_free_for_others(line)
    assert len(sleep.timeouts) == count
    # Who is first looks by himself when the time is over; others are woken by him.
    assert all((timeout > support.HANG_SECS * 1.01) != is_first for timeout in sleep.timeouts)
    assert all(map(is_woken, followers))


def test_who_comes_meanwhile_stands_in_line(environment: _environment.Environment,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_line, "_HOLD_SECS", 2 * support.HANG_SECS)
    [follower] = flushed(environment._line, 1)
    crowd = Crowd(environment)
    crowd.start(THREADS, write(environment))
    crowd.until_waiting(THREADS)
    environment._line.pass_on(follower)
    assert len(set(crowd.join())) == 1


def test_last_one_who_comes_back_wakes_the_first_in_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_line, "_HOLD_SECS", support.HANG_SECS)
    line = _line.Line()
    followers = flushed(line, 5)
    first = _line.Request(stores.rewrite)
    first.alarm = Alarm()  # type: ignore[assignment]
    line.requests.append(first)
    for follower in followers:
        assert not is_woken(first)
        line.pass_on(follower)
    assert is_woken(first)


def test_who_never_comes_back_is_waited_for_a_moment() -> None:
    """He was interrupted, for example."""
    line = _line.Line()
    flushed(line, 15)
    newcomer = _line.Request(stores.rewrite)
    line.requests.append(newcomer)
    taken: list[bool] = []
    thread = threading.Thread(target=lambda: taken.append(line.wait(newcomer, support.HANG_SECS)),
                              daemon=True)
    thread.start()
    thread.join(support.HANG_SECS / 2)
    assert taken == [True]
    # And nobody waits for him a second time.
    assert line.held_until == 0.0


def test_who_has_no_time_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_line, "_HOLD_SECS", support.HANG_SECS)
    line = _line.Line()
    flushed(line, 2)
    assert line.wait(_line.Request(stores.rewrite), 0)


def test_who_woke_by_himself_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_line, "_MOST_AWAKE", 1)
    line = _line.Line()
    first, second, third = flushed(line, 3)
    line.pass_on(second)
    assert is_woken(first) and is_woken(third)


def test_who_is_interrupted_does_not_keep_the_others_asleep() -> None:
    line = _line.Line()
    _, *others = followers = flushed(line, 6)
    for follower in others:
        assert is_woken(follower)
        line.pass_on(follower)
    assert all(map(is_woken, followers))
    assert line.held_until > 0


def test_nobody_waits_for_whom_a_former_group_lacks() -> None:
    line = _line.Line()
    flushed(line, 6)
    for follower in flushed(line, 2):
        assert line.held_until > 0
        line.pass_on(follower)
    assert line.held_until == 0.0


def test_others_do_not_end_the_wait() -> None:
    line = _line.Line()
    stragglers = flushed(line, 2)
    followers = flushed(line, 2)
    for request in (*stragglers, *committed(2)):
        # Of the group before, or who flushed for himself alone.
        line.pass_on(request)
        assert line.held_until > 0
    for follower in followers:
        line.pass_on(follower)
    assert line.held_until == 0.0


@pytest.mark.parametrize("is_leader_flushed", [True, False])
@pytest.mark.parametrize("gone", [0, 1, 2, 4, 5])
def test_who_woke_before_he_got_a_part_keeps_nobody_asleep(is_leader_flushed: bool,
                                                           gone: int) -> None:
    """He saw that his work was done as soon as it was, and not that others rely on him."""
    line = _line.Line()
    leader, *others = requests = committed(6)
    leader.is_flushed = is_leader_flushed
    for request in others[:gone]:
        line.pass_on(request)
    line.share_flush(requests, leader)
    if is_leader_flushed:
        line.pass_on(leader)
    for request in others[gone:]:
        assert is_woken(request)
        line.pass_on(request)
    assert line.held_until == 0.0


class LateRequest(_line.Request):
    """Be of a thread that wakes by itself just when it is given a part, and did not see it."""

    __slots__ = ("line", "seen")

    def __init__(self, line: _line.Line, seen: str) -> None:
        super().__init__(stores.rewrite, is_flushed=True)
        self.alarm = Alarm()  # type: ignore[assignment]
        self.done = True
        self.line = line
        self.seen = seen

    def __setattr__(self, name: str, value: object) -> None:
        if name == getattr(self, "seen", None) and value is not None:
            self.line.pass_on(self)
        super().__setattr__(name, value)


@pytest.mark.parametrize("seen", ["leads", "follows"])
def test_who_wakes_while_he_gets_a_part_keeps_nobody_asleep(seen: str) -> None:
    line = _line.Line()
    leader, *others = committed(6)
    leader.is_flushed = seen == "follows"
    late = LateRequest(line, seen)
    line.share_flush([leader, late, *others], leader)
    if leader.is_flushed:
        line.pass_on(leader)
    for request in others:
        assert is_woken(request)
        line.pass_on(request)
    assert line.held_until == 0.0


@pytest.mark.parametrize("count", [1, 16, 10000])
def test_larger_groups_are_waited_for_longer(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(_line, "_LONGEST_SLEEP_SECS", 0.05)
    line = _line.Line()
    begin = time.monotonic()
    flushed(line, count)
    end = time.monotonic()
    seconds = min(0.05, 0.001 + 0.0001 * count)
    assert begin + seconds <= line.held_until <= end + seconds


def test_who_only_comes_back_wakes_nobody_in_line(environment: _environment.Environment) -> None:
    line = environment._line
    flushed(line, 2)
    first = _line.Request(stores.rewrite)
    first.alarm = Alarm()  # type: ignore[assignment]
    line.requests.append(first)
    [request] = committed(1)
    environment._take_turn(request)
    assert not is_woken(first)
    line.requests.clear()


# Other holders of the lock


def test_who_forks_wakes_the_next(environment: _environment.Environment) -> None:
    crowd = Crowd(environment)
    environment.before_fork()
    crowd.start(THREADS, write(environment))
    crowd.until_waiting(THREADS)
    environment.after_fork_in_parent()
    crowd.join()


def test_nobody_stands_in_line_in_a_forked_child(environment: _environment.Environment) -> None:
    """The threads of the parent do not exist there: nobody would see what comes of their works."""
    crowd = Crowd(environment)
    with environment._line:
        crowd.start(1, write(environment))
        crowd.until_waiting(1)
        # pylint: disable=consider-using-with
        pid = os.fork()
        if pid == 0:
            os._exit(len(environment._line.requests))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    crowd.join()


def write_in_larger_map(environment: _environment.Environment) -> None:
    request = _line.Request(stores.rewrite)
    environment._run_in_larger_map(request)
    assert request.done and request.error is None


def test_who_makes_the_map_larger_wakes_the_next(environment: _environment.Environment) -> None:
    crowd = Crowd(environment)
    with environment._read_lock:
        # It holds the line, and waits for the read lock.
        growing = threading.Thread(target=write_in_larger_map, args=(environment, ), daemon=True)
        growing.start()
        support.until(lambda: not is_free(environment._line), "the map's growth")
        crowd.start(1, write(environment))
        crowd.until_waiting(1)
    growing.join(support.HANG_SECS)
    crowd.join()


class Noted:
    """Be a lock that notes when it is taken."""

    def __init__(self, name: str, lock: Any, taken: list[str]) -> None:
        """Initialize with what it stands for."""
        self._name, self._lock, self._taken = name, lock, taken

    def __enter__(self) -> None:
        self._taken.append(self._name)
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_map_is_not_made_larger_under_a_copy(environment: _environment.Environment,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """It is copied without the interpreter's lock, and would be gone for a moment."""
    taken: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("_copy_lock", "_flush_lock"):
            patch.setattr(environment, name, Noted(name, getattr(environment, name), taken))
        write_in_larger_map(environment)
    # Made larger, and smaller again.
    assert taken == ["_copy_lock", "_flush_lock", "_flush_lock"]


@pytest.mark.parametrize("function",
                         [write_in_larger_map, _environment.Environment._follow_map_size])
def test_interrupt_leaves_the_line_free(environment: _environment.Environment,
                                        function: Callable[[Any], None]) -> None:
    """Wherever it comes in what is not done by the lock itself."""
    # Never, as the first Pythons of 3.12 tell of steps only when they did so before.
    assert not in_thread(functools.partial(interrupt, functools.partial(function, environment), -1))
    point, is_interrupted = 0, True
    while is_interrupted:
        point += 1
        # In a thread of its own: an exception that is raised at any step may leave the interpreter
        # with one that it takes for handled, which would be shown with each later failure.
        is_interrupted = in_thread(
            functools.partial(interrupt, functools.partial(function, environment), point))
        assert in_thread(lambda: is_free(environment._line)), point
    assert point > 1


def in_thread(function: Callable[[], bool]) -> bool:
    """Call a function in a thread of its own; return what it returns."""
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def interrupt(function: Callable[[], object], point: int) -> bool:
    """Call a function; raise a KeyboardInterrupt at so many steps of the module of the line."""
    steps = 0

    def trace(frame: types.FrameType, event: str, _: object) -> Any:
        nonlocal steps
        if frame.f_code.co_filename != _line.__file__:
            return None
        frame.f_trace_opcodes = True
        steps += event == "opcode"
        if steps == point:
            raise KeyboardInterrupt
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(former)
    return False


def is_free_for_others(line: _line.Line) -> bool:
    return in_thread(lambda: is_free(line))


def is_free(line: _line.Line) -> bool:
    if line.lock.acquire(blocking=False):
        line.lock.release()
        return True
    return False


def test_who_gives_up_wakes_the_next(environment: _environment.Environment) -> None:
    """He may have been woken for nothing, just before."""
    line = environment._line
    first, second = _line.Request(stores.rewrite), _line.Request(stores.rewrite)
    line.requests.extend([first, second])
    second.alarm = threading.Lock()
    second.alarm.acquire()  # pylint: disable=consider-using-with
    assert line.withdraw(first)
    assert not second.alarm.locked()
    assert line.withdraw(second) and not line.withdraw(second)


def test_who_waits_too_long_leaves_the_line(tmp_path: pathlib.Path) -> None:
    config_pth = support.write_config(tmp_path, busy_timeout_secs=0.05)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    settings = support.settings(config_pth)
    environment = _registry.acquire(settings.path, settings.options())
    crowd = Crowd(environment)
    with environment._line:
        crowd.start(2, write(environment))
        found = crowd.join()
    assert [type(result) for result in found] == 2 * [persipubsub.errors.BusyTimeoutError]
    assert not environment._line.requests
    _registry.release(environment)


# A failed flush


def test_failed_flush_fails_for_all_that_wait_for_it(tmp_path: pathlib.Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells of a failure once: one more flush would succeed, and mean nothing."""
    config_pth = support.write_config(tmp_path, busy_timeout_secs=2 * support.HANG_SECS)
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    settings = support.settings(config_pth)
    environment = _registry.acquire(settings.path, settings.options())
    sync = environment._sync
    calls: list[int] = []

    def fail_once() -> None:
        calls.append(1)
        if len(calls) > 1:
            sync()
            return
        # As _sync does where the kernel told of an error.
        environment._failure = "Expected to flush, but got: EIO, on purpose"
        raise persipubsub.errors.FlushError(environment._failure)

    monkeypatch.setattr(environment, "_sync", fail_once)
    crowd = Crowd(environment)
    with environment._line:
        crowd.start(THREADS, write_flushed(environment))
        crowd.until_waiting(THREADS)
    found = [type(result) for result in crowd.join()]
    assert found == [persipubsub.errors.FlushError] * THREADS
    assert len(calls) == 1
    _registry.release(environment)
