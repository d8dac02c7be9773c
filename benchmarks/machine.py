"""Describe the machine and the file system that results belong to."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import sqlite3
import subprocess
from collections.abc import Iterable

import lmdb

import persipubsub

#: File systems in memory: a flush costs nothing there, and nothing measured on them is true.
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")

#: Options of a mount that decide what a flush means; the others only describe the machine.
_TELLING = ("barrier", "nobarrier", "commit=", "data=", "dirsync", "journal_async_commit", "sync")

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def file_system(directory: pathlib.Path) -> tuple[str, str]:
    """
    Look a directory up in ``/proc/mounts``.

    :param directory: that exists
    :return: type of its file system, options of the mount
    """
    found = ("", "unknown", "")
    for line in pathlib.Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, place, kind, options, *_ = line.split(" ")
        place = place.replace("\\040", " ")
        # Of several mounts on one place, the last one is seen.
        if directory.resolve().is_relative_to(place) and len(place) >= len(found[0]):
            found = (place, kind, options)
    return found[1], found[2]


def require_disk(directory: pathlib.Path) -> None:
    """
    Refuse to measure in memory.

    :param directory: where queues are going to be
    :raise ValueError: if it is not on a disk
    """
    kind, _ = file_system(directory)
    if kind in _IN_MEMORY:
        raise ValueError(f"Expected a directory on a disk, but got: {directory} is on {kind}")


def _processor() -> str:
    """
    Read the name of the processor.

    :return: as the kernel says it
    """
    text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    match = re.search(r"^(?:model name|Model)\s*:\s*(.*)$", text, re.MULTILINE)
    return match.group(1) if match is not None else platform.machine()


def _commit() -> str:
    """
    Name the commit that was measured.

    :return: short hash, with a plus sign if files were changed since; empty if unknown
    """
    try:
        run = ["git", "-C", str(_ROOT)]
        commit = subprocess.run(run + ["rev-parse", "--short", "HEAD"],
                                capture_output=True,
                                check=True,
                                text=True).stdout.strip()
        changed = subprocess.run(run + ["status", "--porcelain", "persipubsub"],
                                 capture_output=True,
                                 check=True,
                                 text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + ("+" if changed else "")


def describe(directory: pathlib.Path, distributions: Iterable[str]) -> dict[str, str]:
    """
    Describe everything that results depend on.

    :param directory: where queues are
    :param distributions: whose versions are to be told
    :return: descriptions by name, all of them text
    """
    kind, options = file_system(directory)
    telling = [option for option in options.split(",") if option.startswith(_TELLING)]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    described = {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{pages / 1e9:.0f} GB",
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
        "file system": ", ".join([kind, *telling]),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "LMDB": ".".join(map(str, lmdb.version())),
        "SQLite": sqlite3.sqlite_version,
        "persipubsub": " ".join(filter(None, (persipubsub.__version__, _commit()))),
    }
    for distribution in sorted(set(distributions)):
        try:
            described[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            described[distribution] = "missing"
    return described
