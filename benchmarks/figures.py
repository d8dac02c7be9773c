"""Say what is measured: one function for each figure."""

import contextlib
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import roster, rounds
from benchmarks.contender import DURABILITIES, FSYNC
from benchmarks.roster import BARE, OURS
from benchmarks.rounds import Request, Row, Runner

#: To be compared where a figure has many cases: the fastest peers that can do it at all.
FEW = (OURS, BARE, "localqueue", "diskcache")


class Profile(NamedTuple):
    """Say how long to measure."""

    name: str
    rounds: int
    seconds: float  #: of one measurement of sends
    sends: int  #: most messages of one measurement of sends
    batches: int
    subscribers: tuple[int, ...]
    backlogs: tuple[int, ...]
    size_bytes: int  #: most bytes of one measurement of one size
    workers: dict[str, tuple[int, ...]]
    latency_secs: float
    pruned: int
    total: int  #: messages through a queue whose file is looked at
    memory_count: int
    timeout_secs: float

    @property
    def few_rounds(self) -> int:
        """Return the number of rounds of a figure that has many cases."""
        return (self.rounds + 1) // 2


QUICK = Profile(name="quick",
                rounds=1,
                seconds=0.1,
                sends=2000,
                batches=3,
                subscribers=(1, 10, 100, 500),
                backlogs=(0, 10**5, 10**6),
                size_bytes=1 << 24,
                workers={
                    "processes": (1, 4),
                    "threads": (1, 16)
                },
                latency_secs=0.3,
                pruned=10**5,
                total=5 * 10**5,
                memory_count=500,
                timeout_secs=60)

#: The default: medians of five rounds, and of three where a figure has many cases.
FULL = Profile(name="full",
               rounds=5,
               seconds=0.3,
               sends=10000,
               batches=10,
               subscribers=(1, 10, 100, 500),
               backlogs=(0, 10**5, 10**6, 10**7),
               size_bytes=1 << 25,
               workers={
                   "processes": (1, 2, 4, 8),
                   "threads": (1, 2, 4, 8, 16)
               },
               latency_secs=2.0,
               pruned=10**6,
               total=10**7,
               memory_count=500,
               timeout_secs=300)

LONG = FULL._replace(name="long",
                     rounds=9,
                     seconds=0.5,
                     sends=20000,
                     batches=30,
                     size_bytes=1 << 26,
                     latency_secs=5.0,
                     memory_count=5000)


def _requests(names: Sequence[str], task: str, arguments: Mapping[str, Any],
              cases: Mapping[str, str], **positions: float) -> list[Request]:
    """
    Ask for the same of several contenders, at each durability that they offer.

    :param names: of the contenders
    :param task: to be run
    :param arguments: of the task
    :param cases: names of the rows, by what the task returns
    :param positions: on a horizontal axis, by name of the row
    :return: requests
    """
    return [
        Request(name, durability, task, dict(arguments), dict(cases), positions)
        for durability in DURABILITIES for name in names
        if durability in roster.find(name).durabilities
    ]


def throughput(runner: Runner, profile: Profile) -> list[Row]:
    """Send and receive, one by one and in batches, with everybody."""
    cases = ("send", "receive", "send_many(1000)", "receive_many(1000)")
    return runner.in_turn(
        _requests(roster.ALL, "throughput", {
            "seconds": profile.seconds,
            "count": profile.sends,
            "batches": profile.batches
        }, {case: case
            for case in cases}), profile.rounds)


def fan_out(runner: Runner, profile: Profile) -> list[Row]:
    """Send to more and more subscribers."""
    requests: list[Request] = []
    for subscribers in profile.subscribers:
        names = [
            name for name in roster.ALL if roster.find(name).max_subscribers >= max(2, subscribers)
        ]
        case = str(subscribers)
        requests.extend(
            _requests(
                names, "fan_out", {
                    "subscribers": subscribers,
                    "seconds": profile.seconds,
                    "count": min(profile.sends, 5000)
                }, {"rate": case}, **{case: subscribers}))
    return runner.in_turn(requests, profile.few_rounds)


def backlog(runner: Runner, profile: Profile) -> list[Row]:
    """Send to and receive from queues that hold more and more messages."""
    requests: list[Request] = []
    for waiting in profile.backlogs:
        for durability in DURABILITIES:
            for name in (OURS, BARE):
                cases = {case: f"{case} {waiting}" for case in ("send", "receive")}
                requests.append(
                    Request(
                        name, durability, "backlogged", {
                            "backlog": waiting,
                            "count": profile.sends // (10 if durability == FSYNC else 1),
                            "options": {}
                        }, cases, {case: waiting
                                   for case in cases.values()}))
    with contextlib.ExitStack() as stack:
        directories: dict[int, pathlib.Path] = {}
        firsts: dict[int, int] = {}

        def run(request: Request, turn: int) -> dict[str, Any]:
            del turn
            key = id(request)
            if key not in directories:
                directories[key] = stack.enter_context(runner.directory())
                firsts[key] = 0
                fill = {name: request.arguments[name] for name in ("backlog", "options")}
                runner.run(request._replace(task="fill", arguments=fill), directories[key])
                # What the kernel still has to write of it shall not be measured.
                os.sync()
            result = runner.run(request, directories[key], first=firsts[key])
            firsts[key] += request.arguments["count"]
            return result

        return runner.in_turn(requests, profile.few_rounds, run=run)


def size(runner: Runner, profile: Profile) -> list[Row]:
    """Send and receive messages of 16 bytes to 16 MiB."""
    limits = [[length, max(2, min(2000, profile.size_bytes // length))]
              for length in (16, 256, 1 << 12, 1 << 16, 1 << 20, 1 << 24)]
    if profile.name == "quick":
        limits = [[length, max(1, count // 10)] for length, count in limits]
    cases = {
        f"{case} {length}": f"{case} {length}"
        for length, _ in limits
        for case in ("send", "receive")
    }
    return runner.in_turn(
        _requests(FEW, "sizes", {"limits": limits}, cases,
                  **{case: float(case.split()[1])
                     for case in cases}), profile.few_rounds)


def _concurrency(runner: Runner, profile: Profile, kind: str) -> list[Row]:
    """Send from several workers at the same time."""
    names = FEW if profile.name == "long" else FEW[:3]
    requests: list[Request] = []
    for workers in profile.workers[kind]:
        case = str(workers)
        requests.extend(
            _requests(names, "concurrency", {
                "kind": kind,
                "workers": workers,
                "seconds": profile.seconds,
                "count": profile.sends
            }, {"rate": case}, **{case: workers}))
    return runner.in_turn(requests, profile.few_rounds)


def processes(runner: Runner, profile: Profile) -> list[Row]:
    """Send from several processes at the same time."""
    return _concurrency(runner, profile, "processes")


def threads(runner: Runner, profile: Profile) -> list[Row]:
    """Send from several threads of one process at the same time."""
    return _concurrency(runner, profile, "threads")


def latency(runner: Runner, profile: Profile) -> list[Row]:
    """Measure how long a message is on its way to another process, which sleeps."""
    cases = {
        name: name
        for load in ("low", "half")
        for name in [f"{load} load, {part}" for part in ("p50", "p99", "p99.9")]
    }
    names = [name for name in roster.ALL if roster.find(name).can_sleep]
    return runner.in_turn(_requests(names, "latency", {"seconds": profile.latency_secs}, cases),
                          profile.few_rounds)


def pause(runner: Runner, profile: Profile) -> list[Row]:
    """Measure how long sends take while another process prunes half of a large queue."""
    requests: list[Request] = []
    for kind, text in (("timeout", "timeout"), ("mark", "mark")):
        names = [
            f"{when}, {part}" for when in ("before", "during") for part in ("p50", "p99", "max")
        ]
        requests.extend(
            _requests([OURS], "pause", {
                "backlog": profile.pruned,
                "kind": kind,
                "seconds": 6 * profile.seconds
            }, {name: f"{text}: {name}"
                for name in names}))
    return runner.in_turn(requests, profile.few_rounds, has_warm_up=False)


def file_size(runner: Runner, profile: Profile) -> list[Row]:
    """Look at the size of the files while many messages pass through."""
    rows: list[Row] = []
    for request in _requests((OURS, BARE), "file_size", {"backlog": 10**4}, {}):
        # One run each: a size does not wobble.
        runner.tell(f"{request.contender} {request.durability}")
        try:
            with runner.directory() as directory:
                result = runner.run(request, directory, total=profile.total, samples=50)
        except rounds.Broken as error:
            rows.append(Row(request.contender, request.durability, "0", [], None, str(error)))
            continue
        rows.extend(
            Row(request.contender, request.durability, str(sent), [occupied], float(sent), "")
            for sent, occupied in zip(result["messages"], result["size"]))
    return rows


def memory(runner: Runner, profile: Profile) -> list[Row]:
    """Look at the memory of a process that sends and receives."""
    cases = {"all": "resident", "own": "resident, without pages of files"}
    requests = [Request("", "", "memory", {"count": 0}, cases, {})] + _requests(
        roster.ALL, "memory", {"count": profile.memory_count}, cases)
    rows = runner.in_turn(requests, profile.few_rounds, has_warm_up=False)
    return [row._replace(contender=row.contender or "Python alone") for row in rows]


_IMPORTS = {
    "Python alone": "pass",
    OURS: "import persipubsub.publisher, persipubsub.subscriber",
    BARE: "import lmdb",
    "localqueue": "import localqueue",
    "litequeue": "import litequeue",
    "honker": "import honker",
    "persist-queue": "import persistqueue",
    "diskcache": "import diskcache",
    "nque": "import nque",
    "SimpleBroker": "import simplebroker",
}


def import_time(runner: Runner, profile: Profile) -> list[Row]:
    """Start Python and import."""
    root = str(pathlib.Path(__file__).resolve().parent.parent)

    def run(request: Request, turn: int) -> dict[str, Any]:
        del turn
        begin = time.perf_counter()
        ended = subprocess.run([sys.executable, "-c", _IMPORTS[request.contender]],
                               cwd=root,
                               stderr=subprocess.PIPE,
                               check=False,
                               text=True)
        took = (time.perf_counter() - begin) * 1e3
        if ended.returncode:
            raise rounds.Broken(ended.stderr.strip().splitlines()[-1])
        return {"time": took}

    requests = [Request(name, "", "", {}, {"time": "import"}, {}) for name in _IMPORTS]
    return runner.in_turn(requests, 4 * profile.rounds, run=run)


class Figure(NamedTuple):
    """Describe a figure."""

    title: str
    unit: str
    explanation: str
    measure: Callable[[Runner, Profile], list[Row]]
    is_rate: bool = True  #: whether more is better
    axis: str = ""  #: of the cases, if they are numbers
    own_ratio: bool = False  #: whether it matters how the cases compare with the first one


FIGURES: Mapping[str, Figure] = {
    "throughput": Figure(
        "Sending and receiving", "messages/s",
        "One publisher, then one subscriber, each a single thread; 256 bytes a message. "
        "Receiving includes the acknowledgement.", throughput),
    "fan_out": Figure("Number of subscribers",
                      "messages/s",
                      "Sends of 256 bytes, each for all subscribers.",
                      fan_out,
                      axis="subscribers",
                      own_ratio=True),
    "backlog": Figure(
        "Waiting messages",
        "messages/s",
        "Sends and receives of 256 bytes while many messages wait, which were sent in batches of "
        "1,000; os without checkpoints.",
        backlog,
        axis="waiting messages",
        own_ratio=True),
    "size": Figure("Size of the messages",
                   "MB/s",
                   "Sends and receives, one by one.",
                   size,
                   axis="bytes of a message"),
    "processes": Figure("Several publisher processes",
                        "messages/s",
                        "Sends of 256 bytes by all processes together.",
                        processes,
                        axis="processes",
                        own_ratio=True),
    "threads": Figure(
        "Several threads",
        "messages/s",
        "Sends of 256 bytes by all threads of a process together; they share one open queue.",
        threads,
        axis="threads",
        own_ratio=True),
    "latency": Figure(
        "Latency",
        "microseconds",
        "From the call of a send until another process, asleep before, has the message; at 200 "
        "messages a second, and at half of the rate that gets through.",
        latency,
        is_rate=False),
    "pause": Figure(
        "Pause while half of the messages are pruned",
        "microseconds",
        "Sends of one process before and during the pruning by another one: an operator's "
        "(timeout), or a sender's that passes the high-water mark (mark).",
        pause,
        is_rate=False),
    "file_size": Figure(
        "Size on the disk",
        "MB",
        "While messages pass through in batches of 1,000, and 10,000 of them wait; os with its "
        "checkpoint.",
        file_size,
        is_rate=False,
        axis="messages sent"),
    "memory": Figure("Memory", "MB", "A process that sends and receives.", memory, is_rate=False),
    "import_time": Figure("Import",
                          "milliseconds",
                          "Time to start Python, import, and end.",
                          import_time,
                          is_rate=False),
}
