#!/usr/bin/env python3
"""
Send every file of Python's standard library through a queue, and check that all of them arrive.

Two publisher processes share the files; each file is sent once, as a protobuf message. There are
three subscribers; two competing processes do the work of one of them. On the way, the process of
another subscriber is killed (SIGKILL) and started again. At the end, the sha256 of everything that
each subscriber got is compared with the files.

Everything is in a temporary directory, unless ``--queue`` says where the queue is to be. The exit
code is 0 if nothing was lost, and 1 otherwise.
"""

import argparse
import faulthandler
import functools
import json
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import pathlib
import platform
import secrets
import signal
import sys
import sysconfig
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import bookkeeping
import google.protobuf.any_pb2
import rich.console
import rich.progress

import persipubsub.control
import persipubsub.errors
import persipubsub.publisher
import persipubsub.subscriber

_PUBLISHERS = ["publisher_1", "publisher_2"]

#: How many processes do the work of each subscriber.
_SUBSCRIBERS = {"archive": 1, "index": 1, "checksums": 2}

#: The subscriber whose process is killed. It is its only one: nobody else does its work meanwhile.
_VICTIM = "archive"

#: A server of NATS takes messages up to 1 MiB, headers included, unless it is configured otherwise.
_LARGEST_FOR_SERVERS = 10**6

#: All children end by themselves after that many seconds, and so do we.
_LIMIT_SECS = 300


class Child(NamedTuple):
    """Hold a process that was started."""

    name: str
    process: multiprocessing.context.SpawnProcess
    leash: multiprocessing.connection.Connection  #: the process ends when this is closed


class Failure(Exception):
    """Report that the example could not be run to its end."""


# What the processes do


def publish(leash: multiprocessing.connection.Connection, pub_id: str, config_pth: pathlib.Path,
            ledger_pth: pathlib.Path, paths: dict[str, pathlib.Path]) -> None:
    """
    Send files, one message and one commit each.

    :param leash: ready when the process is to end
    :param pub_id: of the publisher in the configuration file
    :param config_pth: configuration file
    :param ledger_pth: where to note down what was sent
    :param paths: of the files, by the names that their messages get
    """
    ledger = os.open(ledger_pth, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id=pub_id, config_pth=config_pth)
        for name, path in paths.items():
            if leash.poll():
                break
            content = path.read_bytes()
            message = google.protobuf.any_pb2.Any(type_url=name, value=content)
            start_ns = time.monotonic_ns()
            pub.send(msg=message.SerializeToString())
            bookkeeping.note(ledger, start_ns, name, content)


def subscribe(leash: multiprocessing.connection.Connection, sub_id: str, config_pth: pathlib.Path,
              ledger_pth: pathlib.Path) -> None:
    """
    Receive messages until the leash is let go.

    :param leash: ready when the process is to end
    :param sub_id: of the subscriber in the configuration file
    :param config_pth: configuration file
    :param ledger_pth: where to note down what was received
    """
    ledger = os.open(ledger_pth, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with persipubsub.subscriber.Sub() as sub:
        sub.init(sub_id=sub_id, config_pth=config_pth)
        while not leash.poll():
            with sub.receive(timeout=0.2, retries=1) as msg:
                if msg is None:
                    continue
                now_ns = time.monotonic_ns()
                message = google.protobuf.any_pb2.Any.FromString(msg)
                # Inside of the block, hence before the acknowledgement: if we are killed between
                # the two, the message comes again, and is never missing. That is "at least once".
                bookkeeping.note(ledger, now_ns, message.type_url, message.value)


def _run_child(target: Callable[..., None], *arguments: object) -> None:
    """
    Run the function of a child, and make sure that the child ends when it should, and only then.

    :param target: function
    :param arguments: of the function
    """
    # Ctrl-C goes to all processes of the terminal; the parent sees to it that we end in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The leash is only looked at between messages.
    faulthandler.dump_traceback_later(_LIMIT_SECS, exit=True)
    try:
        target(*arguments)
    except persipubsub.errors.PersipubsubError as error:
        sys.exit(f"{type(error).__name__}: {error}")


# What the parent does


class Crew:
    """Start, watch, kill and end the processes."""

    def __init__(self) -> None:
        """Initialize without any process."""
        self.children: list[Child] = []
        # Not forked: a child starts with nothing of ours, as a program of its own would.
        self._context = multiprocessing.get_context("spawn")

    def start(self, name: str, target: Callable[..., None], *arguments: object) -> None:
        """
        Start a process.

        :param name: of the publisher or subscriber
        :param target: function that it runs
        :param arguments: of the function, after the leash and the name
        """
        reader, writer = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_run_child,
                                        args=(target, reader, name) + arguments,
                                        name=name)
        process.start()
        # The child has its own copy. It sees the end of the pipe even if we are killed.
        reader.close()
        self.children.append(Child(name, process, writer))

    def is_running(self, names: Sequence[str]) -> bool:
        """
        Look for processes that did not end yet.

        :param names: of publishers or subscribers
        :return: True if there is one
        :raise Failure: if any process failed
        """
        for child in self.children:
            if child.process.exitcode not in (None, 0):
                raise Failure(
                    f"The process of {child.name} (PID {child.process.pid}) ended with the exit "
                    f"code {child.process.exitcode}")
        return any(child.name in names and child.process.is_alive() for child in self.children)

    def kill(self, name: str) -> int | None:
        """
        Kill a process with SIGKILL.

        :param name: of the publisher or subscriber
        :return: PID that the process had
        """
        child = next(child for child in self.children if child.name == name)
        self.children.remove(child)
        child.process.kill()
        child.process.join()
        return child.process.pid

    def end(self) -> None:
        """Let all processes end, and kill those that do not."""
        for child in self.children:
            child.leash.close()
        deadline = time.monotonic() + 15
        for child in self.children:
            child.process.join(timeout=max(0.0, deadline - time.monotonic()))
            if child.process.is_alive():
                child.process.kill()
                child.process.join()


class Run:
    """Hold one run of the example."""

    def __init__(self, directory: pathlib.Path, config_pth: pathlib.Path,
                 files: Sequence[bookkeeping.File]) -> None:
        """
        Initialize without starting anything.

        :param directory: for what is temporary
        :param config_pth: configuration file
        :param files: to be sent
        """
        # The name of a file need not be text. The prefix tells this run from earlier ones.
        prefix = f"persipubsub.quickstart/{secrets.token_hex(8)}/"
        self.files = {prefix + urllib.parse.quote(os.fsencode(file.path)): file for file in files}
        ledger = functools.partial(bookkeeping.Ledger, expected=self.files)
        self.sent = [ledger(directory / name) for name in _PUBLISHERS]
        self.received = {name: ledger(directory / name) for name in _SUBSCRIBERS}
        self.remark = ""
        self._config_pth = config_pth
        self._crew = Crew()

    def do(self, progress: rich.progress.Progress, patience_secs: float) -> None:
        """
        Send and receive everything.

        :param progress: to be drawn
        :param patience_secs: how long to wait when nothing moves any more, in seconds
        :raise Failure: if a process failed, or the time is over
        """
        try:
            for name, count in _SUBSCRIBERS.items():
                for _ in range(count):
                    self._start_subscriber(name)
            for position, ledger in enumerate(self.sent):
                names = list(self.files)[position::len(self.sent)]
                self._crew.start(_PUBLISHERS[position], publish, self._config_pth, ledger.path,
                                 {name: self.files[name].path
                                  for name in names})
            self._follow(progress, patience_secs)
        finally:
            self._crew.end()
            self._read()

    def _start_subscriber(self, name: str) -> None:
        """
        Start a process of a subscriber.

        :param name: of the subscriber
        """
        self._crew.start(name, subscribe, self._config_pth, self.received[name].path)

    def _follow(self, progress: rich.progress.Progress, patience_secs: float) -> None:
        """
        Wait until everything was received, or nothing comes any more.

        :param progress: to be drawn
        :param patience_secs: how long to wait when nothing moves any more, in seconds
        :raise Failure: if a process failed, or the time is over
        """
        total = len(self.files)
        sent_task = progress.add_task("sent", total=total)
        tasks = {name: progress.add_task(name, total=total) for name in _SUBSCRIBERS}
        start = time.monotonic()
        # Before the first message, there is the start of the processes: nothing to be patient with.
        moved = math.inf
        while True:
            is_sending = self._crew.is_running(_PUBLISHERS)
            now = time.monotonic()
            if self._read():
                moved = now
            progress.update(sent_task, completed=sum(len(one.first_ns) for one in self.sent))
            for name, task in tasks.items():
                progress.update(task, completed=len(self.received[name].first_ns))
            if not self.remark and len(self.received[_VICTIM].first_ns) > total // 4:
                self._kill_victim()
            done = all(len(one.first_ns) == total for one in self.received.values())
            if (done and self.remark and not is_sending) or now - moved > patience_secs:
                return
            if now - start > _LIMIT_SECS - 30:
                raise Failure(f"Not done after {now - start:.0f} s")
            # Short until the victim is dead: it is to be killed in the middle of its work.
            time.sleep(0.05 if self.remark else 0.002)

    def _kill_victim(self) -> None:
        """Kill the process of a subscriber and start it again."""
        pid = self._crew.kill(_VICTIM)
        self._read()
        self.remark = (f"{_VICTIM} (PID {pid}) with SIGKILL after "
                       f"{len(self.received[_VICTIM].first_ns)} messages, and started again")
        self._start_subscriber(_VICTIM)

    def _read(self) -> bool:
        """
        Read all ledgers.

        :return: True if there was something new
        """
        return sum(ledger.read() for ledger in [*self.sent, *self.received.values()]) > 0


def write_config(config_pth: pathlib.Path, queue: str, durability: str,
                 files: Sequence[bookkeeping.File]) -> None:
    """
    Write a configuration file.

    The marks are above everything that is sent, so that nothing is dropped even if nobody receives.

    :param config_pth: to be written
    :param queue: path of the queue
    :param durability: ``fsync`` or ``os``
    :param files: that will be sent
    """
    size = sum(file.size for file in files)
    subscribers = list(_SUBSCRIBERS)
    config: dict[str, object] = {
        name: {
            "out_queue": "files",
            "subscribers": subscribers
        }
        for name in _PUBLISHERS
    }
    config.update({name: {"in_queue": "files"} for name in subscribers})
    config["queues"] = {
        "files": {
            "path": queue,
            "max_reader_num": 64,
            "max_db_num": 64,
            "max_db_size_bytes": 4 * size + 2**30,
            "subscribers": subscribers,
            "high-water-mark": {
                "MSG_TIMEOUT_SECS": 3600,
                "MAX_MSGS_NUM": 2 * len(files) + 1000,
                "HWM_LMDB_SIZE_BYTES": 2 * size + 2**26,
                "strategy": "prune_first"
            },
            "durability": durability
        }
    }
    config_pth.write_text(json.dumps(config, indent=4), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """
    Parse the command line.

    :return: options
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--durability",
                        choices=["fsync", "os"],
                        default="fsync",
                        help="how safe a message is when send returns (default: %(default)s)")
    parser.add_argument("--files",
                        type=int,
                        metavar="N",
                        help="send only the first N files (default: all)")
    parser.add_argument("--queue",
                        metavar="PATH",
                        help="where the queue is, a directory or nats://host:4222/STREAM; it stays "
                        "(default: in a temporary directory)")
    parser.add_argument("--patience",
                        type=float,
                        default=30,
                        metavar="SECS",
                        help="give up when nothing moves for so long (default: %(default)s)")
    args = parser.parse_args()
    if args.files is not None and args.files < 1:
        parser.error(f"Expected --files to be at least 1, but got: {args.files}")
    return args


def main() -> int:
    """
    Run the example.

    :return: exit code
    """
    args = parse_arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        # As an exception, so that processes are ended and the temporary directory is removed; but
        # "nohup" is to have its way.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    standard_library = pathlib.Path(sysconfig.get_path("stdlib"))
    files, others = bookkeeping.find_files(standard_library, args.files)
    if "://" in (args.queue or ""):
        small = [file for file in files if file.size <= _LARGEST_FOR_SERVERS]
        print(f"Too large for servers: {len(files) - len(small)} files")
        files = small
    if not files:
        print(f"No files in {standard_library}", file=sys.stderr)
        return 1

    print("Files: {} of Python {}, {:.1f} MB, from {}".format(
        len(files), platform.python_version(),
        sum(file.size for file in files) / 1e6, standard_library))
    print(f"Skipped: the directories {', '.join(sorted(bookkeeping.SKIPPED_DIRECTORIES))}; "
          f"{others} links and unreadable files")
    with tempfile.TemporaryDirectory(prefix="persipubsub-quickstart-") as directory:
        queue = args.queue or os.path.join(directory, "queue")
        # A relative path would start at the configuration file, and be removed with it.
        queue = queue if "://" in queue else os.path.abspath(queue)
        print(f"Queue: {queue}, durability {args.durability}", flush=True)
        config_pth = pathlib.Path(directory) / "config.json"
        write_config(config_pth, queue, args.durability, files)
        persipubsub.control.initialize_all_dbs(config_pth=config_pth)
        run = Run(pathlib.Path(directory), config_pth, files)
        try:
            console = rich.console.Console()
            with rich.progress.Progress(*rich.progress.Progress.get_default_columns(),
                                        rich.progress.MofNCompleteColumn(),
                                        console=console,
                                        disable=not console.is_terminal) as progress:
                run.do(progress, args.patience)
        except Failure as error:
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
        lost = bookkeeping.report(run.files, run.sent, run.received, run.remark)
    if lost:
        print(f"FAILED: {lost} deliveries did not arrive", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except persipubsub.errors.PersipubsubError as exception:
        sys.exit(f"{type(exception).__name__}: {exception}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
