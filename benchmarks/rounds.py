"""Run measurements in rounds: each in a process and a directory of its own, in turn."""

import contextlib
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

_ROOT = pathlib.Path(__file__).resolve().parent.parent


class Broken(Exception):
    """Say that a measurement did not end well."""


class Request(NamedTuple):
    """Ask for one measurement."""

    contender: str
    durability: str
    task: str  #: one of :py:data:`benchmarks.tasks.TASKS`
    arguments: dict[str, Any]
    cases: dict[str, str]  #: names of the rows, by what the task returns
    positions: dict[str, float]  #: on the horizontal axis, by name of the row


class Row(NamedTuple):
    """Hold what all rounds say of one case of one contender."""

    contender: str
    durability: str
    case: str
    values: list[float]  #: of the rounds, in turn; empty if it broke
    position: float | None  #: on a horizontal axis
    error: str  #: why there are no values


class Runner:
    """Run measurements, and clean up behind them."""

    def __init__(self, directory: pathlib.Path, tell: Callable[[str], None],
                 timeout_secs: float) -> None:
        """
        Initialize without running anything.

        :param directory: where directories of queues are made
        :param tell: called with what is being done
        :param timeout_secs: longest time of one measurement
        """
        self._directory = directory
        self._timeout_secs = timeout_secs
        self.tell = tell

    @contextlib.contextmanager
    def directory(self) -> Iterator[pathlib.Path]:
        """
        Make a directory that is removed afterwards.

        :return: its path
        """
        path = pathlib.Path(tempfile.mkdtemp(dir=self._directory))
        try:
            yield path
        finally:
            shutil.rmtree(path)

    def run(self, request: Request, directory: pathlib.Path, **arguments: Any) -> dict[str, Any]:
        """
        Run one measurement.

        :param request: what to measure
        :param directory: to work in
        :param arguments: more of them
        :return: what the task returned
        :raise Broken: if it failed, with the last line that it wrote
        """
        line = json.dumps({
            "task": request.task,
            "name": request.contender,
            "durability": request.durability,
            "directory": str(directory),
            **request.arguments,
            **arguments
        })
        try:
            ended = subprocess.run([sys.executable, "-m", "benchmarks.tasks"],
                                   input=f"{line}\n",
                                   capture_output=True,
                                   text=True,
                                   cwd=_ROOT,
                                   timeout=self._timeout_secs,
                                   check=False)
        except subprocess.TimeoutExpired:
            raise Broken(f"took more than {self._timeout_secs:.0f} s") from None
        if ended.returncode != 0:
            said = ended.stderr.strip().splitlines()
            raise Broken(said[-1] if said else f"exit code {ended.returncode}")
        return json.loads(ended.stdout)  # type: ignore[no-any-return]

    def in_turn(self,
                requests: Sequence[Request],
                rounds: int,
                has_warm_up: bool = True,
                run: Callable[[Request, int], dict[str, Any]] | None = None) -> list[Row]:
        """
        Run measurements A B C A B C ...; the first round warms up and is not counted.

        What broke once is not run again.

        :param requests: what to measure in each round
        :param rounds: how many rounds to count
        :param has_warm_up: False for what is too long to warm up
        :param run: runs one measurement of a request; in an empty directory if not given
        :return: rows
        """
        values: dict[int, dict[str, list[float]]] = {}
        errors: dict[int, str] = {}
        for turn in range(0 if has_warm_up else 1, rounds + 1):
            for index, request in enumerate(requests):
                if index in errors:
                    continue
                what = f"round {turn} of {rounds}" if turn else "warm-up"
                self.tell(f"{what}: {request.contender} {request.durability}")
                try:
                    result = self._run_once(request, turn, run)
                except Broken as error:
                    errors[index] = str(error)
                    continue
                if turn:
                    for name, value in result.items():
                        values.setdefault(index, {}).setdefault(name, []).append(value)
        rows: list[Row] = []
        for index, request in enumerate(requests):
            for name, case in request.cases.items():
                found = [] if index in errors else values.get(index, {}).get(name, [])
                rows.append(
                    Row(contender=request.contender,
                        durability=request.durability,
                        case=case,
                        values=found,
                        position=request.positions.get(case),
                        error=errors.get(index, "" if found else "not offered")))
        return rows

    def _run_once(self, request: Request, turn: int,
                  run: Callable[[Request, int], dict[str, Any]] | None) -> dict[str, Any]:
        """
        Run one measurement.

        :param request: what to measure
        :param turn: number of the round; 0: warming up
        :param run: runs it; in an empty directory if not given
        :return: what the task returned
        """
        if run is not None:
            return run(request, turn)
        with self.directory() as directory:
            return self.run(request, directory)
