#!/usr/bin/env python3
"""
Run every check of the project and fail on any finding.

All checks run even if an early one finds something; the last line says what failed. The exit code
is 0 if there was no finding, 1 if there was one, and 2 for wrong arguments.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence

_ROOT = pathlib.Path(__file__).resolve().parent

_PACKAGE = "persipubsub"

# Everything with Python in it. Missing ones are left out, but never all of them.
_SOURCES = [_PACKAGE, "tests", "examples", "benchmarks", "precommit.py", "setup.py", "docs"]

# Run by "python -c" in a directory of its own, so that doctests leave nothing behind. The modules
# are imported by name: run as scripts, they would find queue.py of the package in the place of the
# standard module.
_DOCTESTS = """\
import doctest, importlib, pathlib, pkgutil, sys

failed = attempted = 0
package = importlib.import_module(sys.argv[1])
names = [package.__name__] + [
    info.name for info in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    result = doctest.testmod(importlib.import_module(name))
    failed, attempted = failed + result.failed, attempted + result.attempted
for pth in sys.argv[2:]:
    result = doctest.testfile(pth, module_relative=False, encoding="utf-8")
    failed, attempted = failed + result.failed, attempted + result.attempted
print("{} examples in {} modules and {} documents, {} failed".format(
    attempted, len(names), len(sys.argv) - 2, failed))
sys.exit(1 if failed else 0)
"""


def _run(command: Sequence[str],
         cwd: pathlib.Path = _ROOT,
         env: Mapping[str, str] | None = None) -> bool:
    """
    Run a command and wait for its end, its output going where ours goes.

    :param command: program and arguments
    :param cwd: directory to run it in
    :param env: all its environment variables; ours if not given
    :return: True if it ended with the exit code 0
    """
    return subprocess.run(command, cwd=cwd, env=env, check=False,
                          stdin=subprocess.DEVNULL).returncode == 0


def _run_module(*arguments: str) -> bool:
    """
    Run a module of this Python's environment.

    :param arguments: name of the module and its arguments
    :return: True if there was no finding
    """
    return _run([sys.executable, "-m", *arguments])


def _sources(excluding: Sequence[str] = ()) -> list[str]:
    """
    Return what is to be checked.

    :param excluding: sources to leave out
    :return: files and directories, relative to the root of the project
    """
    return [name for name in _SOURCES if name not in excluding and (_ROOT / name).exists()]


def _check_yapf(overwrite: bool) -> bool:
    """Check the format, or correct it."""
    return _run_module("yapf", "--recursive", "--in-place" if overwrite else "--diff", *_sources())


def _check_isort(overwrite: bool) -> bool:
    """Check the order of imports, or correct it."""
    mode = [] if overwrite else ["--check-only", "--diff"]
    return _run_module("isort", *mode, *_sources())


def _check_pydocstyle(overwrite: bool) -> bool:
    """Check docstrings, except those of tests: a test's name is its description."""
    del overwrite
    return _run_module("pydocstyle", *_sources(excluding=["tests"]))


def _check_mypy(overwrite: bool) -> bool:
    """Check types."""
    del overwrite
    return _run_module("mypy", "--strict", *_sources())


def _check_pylint(overwrite: bool) -> bool:
    """Check with pylint, tests by rules of their own."""
    del overwrite
    clean = _run_module("pylint", "--rcfile=pylint.rc", *_sources(excluding=["tests"]))

    # A test's name is its description; fixtures are used by the name of an argument; a module's
    # private functions are tested by its tests; a long list of cases makes a long file.
    relaxed = ("missing-function-docstring,missing-class-docstring,redefined-outer-name,"
               "protected-access,too-many-lines,too-many-public-methods,duplicate-code")
    return _run_module("pylint", "--rcfile=pylint.rc", f"--disable={relaxed}", "tests") and clean


def _check_codespell(overwrite: bool) -> bool:
    """Look for common misspellings in code and prose."""
    del overwrite
    return _run_module("codespell_lib", *_sources(),
                       *sorted(pth.name for pth in _ROOT.glob("*.rst")))


def _check_doctest(overwrite: bool) -> bool:
    """Run the examples in docstrings and in those documents that have a Python prompt."""
    del overwrite
    documents = [
        str(pth) for pth in [_ROOT / "README.rst", *sorted((_ROOT / "docs").glob("*.rst"))]
        if pth.exists() and ">>> " in pth.read_text(encoding="utf-8")
    ]
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([str(_ROOT)] + env.get("PYTHONPATH", "").split(os.pathsep))
    with tempfile.TemporaryDirectory() as tmp:
        return _run([sys.executable, "-c", _DOCTESTS, _PACKAGE, *documents],
                    cwd=pathlib.Path(tmp),
                    env=env)


def _check_icontract_lint(overwrite: bool) -> bool:
    """
    Check contracts in a tox environment of its own, as tox.ini explains.

    The first run makes the environment, later ones use it again. When tox called this script, what
    that tox left in the environment variables would be taken for options of this one.
    """
    del overwrite
    env = {key: value for key, value in os.environ.items() if not key.startswith("TOX_")}
    env.pop("VIRTUAL_ENV", None)
    return _run([sys.executable, "-m", "tox", "run", "-q", "-e", "icontract-lint"], env=env)


def _check_tests(overwrite: bool) -> bool:
    """Run the quick part of the tests."""
    del overwrite
    return _run_module("pytest", "-q", "-m", "not slow")


def _ignore_made(directory: str, names: list[str]) -> set[str]:
    """
    Name what is made by tools and so no part of the project.

    :param directory: that is copied
    :param names: of its entries
    :return: those that are to be left out
    """
    made = shutil.ignore_patterns(".git", ".tox", ".hypothesis", ".*_cache", "__pycache__",
                                  "_build", "*.egg-info", "build", "dist")(directory, names)
    return made | {
        name
        for name in names if os.path.exists(os.path.join(directory, name, "pyvenv.cfg"))
    }


def _check_build(overwrite: bool) -> bool:
    """
    Build the distribution from a copy, as setuptools writes into the directory it builds in.

    The wheel must hold the package and the mark that it is typed, and no other package.
    """
    del overwrite
    with tempfile.TemporaryDirectory() as tmp:
        source, dist = pathlib.Path(tmp) / "source", pathlib.Path(tmp) / "dist"
        shutil.copytree(_ROOT, source, ignore=_ignore_made)
        built = subprocess.run([sys.executable, "-m", "build", "--outdir",
                                str(dist)],
                               cwd=source,
                               check=False,
                               stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT,
                               text=True)
        if built.returncode != 0:
            # Only now: a good build has hundreds of lines, too.
            print(built.stdout)
            return False

        clean = _run_module("twine", "check", "--strict", *map(str, sorted(dist.iterdir())))

        with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
            found = set(wheel.namelist())
        expected = {
            pth.relative_to(source).as_posix()
            for pth in (source / _PACKAGE).rglob("*") if pth.suffix in (".py", ".typed")
        }
        packed = {name for name in found if ".dist-info/" not in name}
        if packed != expected:
            print(f"Expected {sorted(expected)} in the wheel, but got: {sorted(packed)!r}")
            clean = False

        return clean


# In this order: formatters first, so that the others see what will be committed; slow ones last.
_CHECKS: Mapping[str, Callable[[bool], bool]] = {
    "yapf": _check_yapf,
    "isort": _check_isort,
    "pydocstyle": _check_pydocstyle,
    "mypy": _check_mypy,
    "pylint": _check_pylint,
    "codespell": _check_codespell,
    "doctest": _check_doctest,
    "icontract-lint": _check_icontract_lint,
    "build": _check_build,
    "tests": _check_tests,
}


def _parse_names(text: str) -> list[str]:
    """
    Parse a list of checks.

    :param text: names separated by commas
    :return: the names
    :raise argparse.ArgumentTypeError: if there is no such check
    """
    names = text.split(",")
    for name in names:
        if name not in _CHECKS:
            raise argparse.ArgumentTypeError(
                f"Expected names out of {','.join(_CHECKS)}, but got: {name!r}")
    return names


def main() -> int:
    """
    Run the checks that were asked for.

    :return: exit code
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--overwrite", action="store_true", help="format the code in place")
    parser.add_argument("--select",
                        type=_parse_names,
                        metavar="NAMES",
                        help="run only these checks")
    parser.add_argument("--skip", type=_parse_names, metavar="NAMES", help="leave these checks out")
    parser.add_argument("--list", action="store_true", help="print the names of the checks and end")
    args = parser.parse_args()

    if args.list:
        print("\n".join(_CHECKS))
        return 0

    names = [
        name for name in _CHECKS
        if (args.select is None or name in args.select) and name not in (args.skip or [])
    ]
    if not names:
        parser.error("Expected at least one check to be left, but all are skipped.")

    failed = []
    for name in names:
        print(f"== {name}", flush=True)
        start = time.monotonic()
        if not _CHECKS[name](args.overwrite):
            failed.append(name)
        print(
            f"== {name}: {'FAILED' if name in failed else 'OK'} ({time.monotonic() - start:.1f} s)",
            flush=True)

    if failed:
        print(f"precommit: {len(failed)} of {len(names)} checks FAILED: {', '.join(failed)}")
        return 1

    print(f"precommit: all {len(names)} checks passed: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
