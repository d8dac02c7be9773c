"""Keep the books of the quickstart: which files there are, what was sent, what arrived."""

import hashlib
import os
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

#: site-packages is not of the standard library; Python writes into __pycache__ while we run.
SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "__pycache__"}


class File(NamedTuple):
    """Describe a file that is to be sent."""

    path: pathlib.Path
    size: int  #: in bytes
    sha256: str


def note(ledger: int, time_ns: int, name: str, content: bytes) -> None:
    """
    Append a message to a ledger, in one write: several processes may append to the same file.

    :param ledger: descriptor, opened with O_APPEND
    :param time_ns: on the monotonic clock, which is the same for all processes of the machine
    :param name: of the message, without spaces
    :param content: of the file in it
    """
    sha256 = hashlib.sha256(content).hexdigest()
    os.write(ledger, f"{time_ns} {sha256} {name}\n".encode("ascii"))


class Ledger:
    """Follow a ledger that other processes append to."""

    def __init__(self, path: pathlib.Path, expected: dict[str, File]) -> None:
        """
        Initialize as empty.

        :param path: of the ledger; need not exist yet
        :param expected: all files by the names of their messages; other messages are ignored
        """
        self.path = path
        self.first_ns: dict[str, int] = {}
        self.again = 0
        self._expected = expected
        self._wrong: set[str] = set()
        self._offset = 0

    def read(self) -> bool:
        """
        Read what was appended since the last call.

        :return: True if there was something
        """
        if not self.path.exists():
            return False
        with self.path.open("rb") as file:
            file.seek(self._offset)
            found = file.read()
        # The last line may not be there as a whole yet.
        found = found[:found.rfind(b"\n") + 1]
        self._offset += len(found)
        for text in found.decode("ascii").splitlines():
            time_ns, sha256, name = text.split(" ")
            # A queue that is not ours alone may hold messages of an earlier run.
            if name in self._expected:
                if name in self.first_ns:
                    self.again += 1
                self.first_ns.setdefault(name, int(time_ns))
                if sha256 != self._expected[name].sha256:
                    self._wrong.add(name)
        return bool(found)

    def missing(self) -> list[pathlib.Path]:
        """
        Compare with the files.

        :return: those that are not here, or not with their bytes
        """
        return [
            file.path for name, file in self._expected.items()
            if name not in self.first_ns or name in self._wrong
        ]


def find_files(directory: pathlib.Path, limit: int | None) -> tuple[list[File], int]:
    """
    Read all regular files of a directory and of those below it.

    :param directory: to be searched
    :param limit: how many files to return at most
    :return: files ordered by their paths; how many others there were that are no regular files, or
        can not be read
    """
    files: list[File] = []
    others = 0
    for path, directories, names in os.walk(directory):
        directories[:] = sorted(set(directories) - SKIPPED_DIRECTORIES)
        for name in sorted(names):
            if len(files) == limit:
                return files, others
            file = pathlib.Path(path) / name
            try:
                content = file.read_bytes() if file.is_file() and not file.is_symlink() else None
            except OSError:
                content = None
            if content is None:
                others += 1
            else:
                files.append(File(file, len(content), hashlib.sha256(content).hexdigest()))
    return files, others


def report(files: Mapping[str, File], sent: Sequence[Ledger], received: Mapping[str, Ledger],
           remark: str) -> int:
    """
    Print what came of it.

    :param files: all files by the names of their messages
    :param sent: ledgers of the publishers
    :param received: ledgers of the subscribers, by their names
    :param remark: who was killed
    :return: how many deliveries were lost
    """
    sent_ns = {name: time_ns for ledger in sent for name, time_ns in ledger.first_ns.items()}
    lost = {name: ledger.missing() for name, ledger in received.items()}
    count = sum(map(len, lost.values()))
    print(f"sent:        {len(sent_ns)} messages by {len(sent)} processes")
    print(f"killed:      {remark or 'nobody'}")
    print(
        f"received:    "
        f"{', '.join((f'{len(ledger.first_ns)} by {name}' for name, ledger in received.items()))}")
    print(f"redelivered: {sum(ledger.again for ledger in received.values())}")
    print(f"lost:        {count}")
    _report_speed([(sent_ns[name], time_ns, files[name].size) for ledger in received.values()
                   for name, time_ns in ledger.first_ns.items() if name in sent_ns],
                  sum(files[name].size for name in sent_ns))
    for name, paths in lost.items():
        for path in paths[:5]:
            print(f"Lost by {name}: {path!s}", file=sys.stderr)
    return count


def _report_speed(deliveries: Sequence[tuple[int, int, int]], sent_bytes: int) -> None:
    """
    Print throughput and latency.

    :param deliveries: when each was sent and received, in nanoseconds, and its bytes
    :param sent_bytes: bytes of all files that were sent
    """
    if len(deliveries) < 2:
        return
    sent_ns, received_ns, sizes = zip(*deliveries)
    seconds = (max(received_ns) - min(sent_ns)) / 1e9
    print("throughput:  {:.1f} MB/s published, {:.1f} MB/s delivered ({:.1f} s)".format(
        sent_bytes / 1e6 / seconds,
        sum(sizes) / 1e6 / seconds, seconds))
    latencies_ms = [(end - start) / 1e6 for start, end in zip(sent_ns, received_ns)]
    cuts = statistics.quantiles(latencies_ms, n=100, method="inclusive")
    # Publishers do not wait for subscribers: messages wait in the queue, and that is part of it.
    print(f"latency:     p50 {cuts[49]:.1f} ms, p99 {cuts[98]:.1f} ms (from send to receive)")
