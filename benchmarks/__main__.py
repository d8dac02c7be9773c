"""Measure, and write results: see the package."""

import argparse
import contextlib
import json
import pathlib
import shutil
import sys
import tempfile
import time
from typing import Any

import rich.console

from benchmarks import figures, machine, report, roster, rounds

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def _parse_figures(text: str) -> list[str]:
    """
    Parse a list of figures.

    :param text: names separated by commas
    :return: the names
    :raise argparse.ArgumentTypeError: if there is no such figure
    """
    names = text.split(",")
    for name in names:
        if name not in figures.FIGURES:
            raise argparse.ArgumentTypeError(
                f"Expected names out of {','.join(figures.FIGURES)}, but got: {name!r}")
    return names


def _parse() -> argparse.Namespace:
    """
    Parse the command line.

    :return: arguments
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure this library, its peers and bare LMDB side by side.",
        epilog="Figures: {}. Those that the results have already, of the same profile and machine, "
        "are not measured again, unless named by --only.".format(", ".join(figures.FIGURES)))
    duration = parser.add_mutually_exclusive_group()
    duration.add_argument("--quick",
                          action="store_const",
                          dest="profile",
                          const=figures.QUICK,
                          default=figures.FULL,
                          help="take two minutes, not 25: a sketch that shows that it works")
    duration.add_argument("--long",
                          action="store_const",
                          dest="profile",
                          const=figures.LONG,
                          help="take an hour or more: more rounds, longer measurements")
    parser.add_argument("--only",
                        type=_parse_figures,
                        metavar="FIGURE[,FIGURE]",
                        help="measure only these, even again")
    parser.add_argument("--out",
                        type=pathlib.Path,
                        default=_ROOT / "benchmarks" / "results",
                        metavar="DIR",
                        help="where results go (default: benchmarks/results)")
    parser.add_argument("--dir",
                        type=pathlib.Path,
                        metavar="DIR",
                        help="where queues are, on a disk (default: in build/ of the checkout)")
    parser.add_argument("--rounds", type=int, metavar="N", help="how many rounds are counted")
    return parser.parse_args()


def _load(path: pathlib.Path, profile: figures.Profile, described: dict[str,
                                                                        str]) -> dict[str, Any]:
    """
    Load the results of an earlier run that can be continued.

    :param path: to the file
    :param profile: of this run
    :param described: machine and versions of this run
    :return: earlier results, or empty ones
    """
    empty: dict[str, Any] = {"profile": profile.name, "machine": described, "figures": {}}
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return empty
    if results["profile"] != profile.name or any(results["machine"].get(key) != value
                                                 for key, value in described.items()
                                                 if key != "date"):
        print(f"The results in {path} are of another profile, machine or version: beginning anew.")
        return empty
    return results


def _save(path: pathlib.Path, results: dict[str, Any]) -> None:
    """
    Save results, so that whoever is killed meanwhile can still continue from those before.

    :param path: to the file
    :param results: of this run so far
    """
    temporary = path.with_suffix(".new")
    temporary.write_text(f"{json.dumps(results, indent=1)}\n", encoding="utf-8")
    temporary.replace(path)


def main() -> int:
    """
    Measure what was asked for.

    :return: exit code
    """
    arguments = _parse()
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=160)
    profile: figures.Profile = arguments.profile
    if arguments.rounds is not None:
        profile = profile._replace(rounds=arguments.rounds)
    parent = arguments.dir or _ROOT / "build"
    parent.mkdir(parents=True, exist_ok=True)
    try:
        machine.require_disk(parent)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "results.json"
    results = _load(
        path, profile,
        machine.describe(parent, (roster.find(name).distribution for name in roster.PEERS)))
    directory = pathlib.Path(tempfile.mkdtemp(prefix="benchmarks-", dir=parent))
    try:
        for name in arguments.only or figures.FIGURES:
            if name in results["figures"] and not arguments.only:
                console.print(f"{name}: measured before")
                continue
            begin = time.monotonic()
            with console.status(
                    name) if console.is_terminal else contextlib.nullcontext() as status:

                def tell(text: str, name: str = name, status: Any = status) -> None:
                    if status is not None:
                        status.update(f"{name}: {text}")

                rows = figures.FIGURES[name].measure(
                    rounds.Runner(directory, tell, profile.timeout_secs), profile)
            results["figures"][name] = [row._asdict() for row in rows]
            _save(path, results)
            report.show(console, results, name)
            console.print(f"{name}: {time.monotonic() - begin:.0f} s\n")
    except KeyboardInterrupt:
        console.print("Interrupted; what was measured is kept, the next run goes on behind it.")
        return 130
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    report.write(arguments.out, results)
    report.show_summary(console, results)
    console.print(f"Written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
