"""
Measure one thing in a process of its own: ``python -m benchmarks.tasks < request > result``.

The request is a JSON object: ``task``, one of :py:data:`TASKS`, and its arguments. The result maps
each figure that was measured to a number. An exception ends the process with an error.
"""

import importlib
import json
import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import contender, roster

#: Figures by name; numbers, or lists of numbers.
Result = dict[str, Any]

#: Sends between two looks at the clock.
_STRIDE = 20

#: So many messages are sent one by one to be received in batches.
_FEW = 3000

_ALPHABET = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


class WrongDelivery(Exception):
    """Say that a queue did not deliver what was sent."""


def make_messages(count: int, size: int, first: int = 0) -> list[bytes]:
    """
    Make messages that are all different, of ASCII letters and digits.

    :param count: how many
    :param size: bytes of each, at least 16
    :param first: number of the first one, which is in its first 16 bytes
    :return: messages
    """
    filling = (_ALPHABET * (size // len(_ALPHABET) + 1))[:max(0, size - 16)]
    return [b"%016d%b" % (number, filling) for number in range(first, first + count)]


def number_of(message: bytes) -> int:
    """
    Read the number of a message.

    :param message: made by :py:func:`make_messages`
    :return: its number
    """
    return int(message[:16])


def check(received: list[bytes], sent: list[bytes]) -> None:
    """
    Check that everything was delivered, and nothing twice.

    :param received: messages, in any order: not every peer promises one
    :param sent: messages
    """
    if received != sent and sorted(received) != sorted(sent):
        raise WrongDelivery(
            f"{len(set(received) & set(sent))} of {len(sent)} messages were delivered rightly, "
            f"{len(received)} in all")


def open_contender(name: str, directory: str, durability: str, **options: Any) -> Any:
    """
    Open a contender.

    :param name: as in tables
    :param directory: of the queue
    :param durability: class of durability
    :param options: of the contender
    :return: open contender
    """
    return roster.find(name)(pathlib.Path(directory), durability, **options)


def send_for(queue: contender.Contender, encoded: list[Any], seconds: float) -> tuple[int, float]:
    """
    Send one by one until the time is over.

    :param queue: to send to
    :param encoded: what to send, at most
    :param seconds: how long
    :return: how many were sent, seconds it took
    """
    send = queue.send
    begin = time.perf_counter()
    deadline = begin + seconds
    sent = 0
    while sent < len(encoded):
        for message in encoded[sent:sent + _STRIDE]:
            send(message)
        sent += _STRIDE
        if time.perf_counter() >= deadline:
            break
    return min(sent, len(encoded)), time.perf_counter() - begin


def throughput(name: str, durability: str, directory: str, seconds: float, count: int,
               batches: int) -> Result:
    """
    Send and receive, one by one and then in batches of 1,000.

    :param name: of the contender
    :param durability: class of durability
    :param directory: to work in
    :param seconds: how long to send one by one
    :param count: how many messages to send one by one at most
    :param batches: how many batches to send
    :return: messages in a second
    """
    result: Result = {}
    queue = open_contender(name, directory, durability)
    messages = make_messages(count, 256)
    encoded = queue.encode(messages)

    warm = encoded[:_STRIDE]
    for message in warm:
        queue.send(message)
    check(queue.decode(queue.receive(len(warm))), messages[:len(warm)])

    sent, took = send_for(queue, encoded, seconds)
    result["send"] = sent / took
    begin = time.perf_counter()
    received = queue.receive(sent)
    result["receive"] = sent / (time.perf_counter() - begin)
    check(queue.decode(received), messages[:sent])

    messages = make_messages(1000 * batches, 256)
    encoded = queue.encode(messages)
    groups = [encoded[first:first + 1000] for first in range(0, len(encoded), 1000)]
    if queue.sends_batches:
        begin = time.perf_counter()
        for group in groups:
            queue.send_many(group)
        result["send_many(1000)"] = len(messages) / (time.perf_counter() - begin)
    if queue.receives_batches:
        if not queue.sends_batches:
            # Sent one by one, and flushed, all of them would take longer than all that is measured.
            messages, encoded = messages[:_FEW], encoded[:_FEW]
            for message in encoded:
                queue.send(message)
        begin = time.perf_counter()
        received = queue.receive_many(len(messages), 1000)
        result["receive_many(1000)"] = len(messages) / (time.perf_counter() - begin)
        check(queue.decode(received), messages)
    queue.close()
    return result


def fan_out(name: str, durability: str, directory: str, subscribers: int, seconds: float,
            count: int) -> Result:
    """
    Send to many subscribers.

    :param name: of the contender
    :param durability: class of durability
    :param directory: to work in
    :param subscribers: how many
    :param seconds: how long to send
    :param count: how many messages to send at most
    :return: messages in a second, each for all subscribers
    """
    queue = open_contender(name, directory, durability, subscribers=subscribers)
    messages = make_messages(count, 256)
    sent, took = send_for(queue, queue.encode(messages), seconds)
    # Some of them, among them the first and the last one: to drain all 500 takes far longer than
    # what is measured.
    last = 0 if name == roster.BARE else subscribers - 1
    for subscriber in sorted({round(step * last / 9) for step in range(10)}):
        check(queue.decode(queue.drain(subscriber, sent)), messages[:sent])
    queue.close()
    return {"rate": sent / took}


def fill(name: str, durability: str, directory: str, backlog: int, options: Mapping[str,
                                                                                    Any]) -> Result:
    """
    Fill a queue.

    :param name: of the contender
    :param durability: class of durability
    :param directory: to work in
    :param backlog: how many messages
    :param options: of the contender
    :return: nothing
    """
    queue = open_contender(name, directory, durability, **options)
    for first in range(0, backlog, 1000):
        queue.send_many(queue.encode(make_messages(min(1000, backlog - first), 256, first)))
    queue.close()
    return {}


def backlogged(name: str, durability: str, directory: str, backlog: int, count: int, first: int,
               options: Mapping[str, Any]) -> Result:
    """
    Send to a queue that holds many messages, and receive as many.

    :param name: of the contender
    :param durability: class of durability
    :param directory: of the queue
    :param backlog: how many messages there are
    :param count: how many to send and to receive
    :param first: number of the next message to be received
    :param options: of the contender
    :return: messages in a second
    """
    queue = open_contender(name, directory, durability, **options)
    messages = queue.encode(make_messages(count, 256, first + backlog))
    begin = time.perf_counter()
    for message in messages:
        queue.send(message)
    took = time.perf_counter() - begin
    begin = time.perf_counter()
    received = queue.receive(count)
    took_receiving = time.perf_counter() - begin
    check(queue.decode(received), make_messages(count, 256, first))
    queue.close()
    return {"send": count / took, "receive": count / took_receiving}


def sizes(name: str, durability: str, directory: str, limits: list[list[int]]) -> Result:
    """
    Send and receive messages of several sizes.

    :param name: of the contender
    :param durability: class of durability
    :param directory: to work in
    :param limits: sizes in bytes, and how many messages of each to send
    :return: megabytes (10^6 bytes) in a second
    """
    result: Result = {}
    for size, count in limits:
        with tempfile.TemporaryDirectory(dir=directory) as subdirectory:
            queue = open_contender(name, subdirectory, durability)
            messages = make_messages(count, size)
            encoded = queue.encode(messages)
            begin = time.perf_counter()
            for message in encoded:
                queue.send(message)
            result[f"send {size}"] = size * count / 1e6 / (time.perf_counter() - begin)
            begin = time.perf_counter()
            received = queue.receive(count)
            result[f"receive {size}"] = size * count / 1e6 / (time.perf_counter() - begin)
            check(queue.decode(received), messages)
            queue.close()
    return result


def file_size(name: str, durability: str, directory: str, backlog: int, total: int,
              samples: int) -> Result:
    """
    Send and receive batches of 1,000 at a steady backlog, and look at the disk.

    :param name: of the contender
    :param durability: class of durability
    :param directory: to work in
    :param backlog: how many messages wait all the time
    :param total: how many messages to send
    :param samples: how often to look
    :return: ``messages`` sent, and bytes on the disk at that time in MB (10^6 bytes)
    """
    queue = open_contender(name, directory, durability)
    for first in range(0, backlog, 1000):
        queue.send_many(queue.encode(make_messages(1000, 256, first)))
    counts, occupied = [], []  # type: list[int], list[float]
    for first in range(backlog, backlog + total, 1000):
        queue.send_many(queue.encode(make_messages(1000, 256, first)))
        received = queue.decode(queue.receive_many(1000, 1000))
        if [number_of(message) for message in (received[0], received[-1])
            ] != [first - backlog, first - backlog + 999]:
            raise WrongDelivery(f"the messages from {first} on did not come in order")
        if (first - backlog) // 1000 % max(1, total // 1000 // samples) == 0:
            counts.append(first - backlog)
            occupied.append(_occupied(pathlib.Path(directory)) / 1e6)
    queue.close()
    return {"messages": counts, "size": occupied}


def _occupied(directory: pathlib.Path) -> int:
    """
    Measure a directory.

    :param directory: to be measured
    :return: bytes that its files take on the disk; holes take none
    """
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            pass  # a checkpoint that was just renamed
    return total


def memory(name: str, durability: str, directory: str, count: int) -> Result:
    """
    Send and receive, then see how much memory the process takes.

    :param name: of the contender; empty: only Python, to compare
    :param durability: class of durability
    :param directory: to work in
    :param count: how many messages to send and receive
    :return: resident memory in MB (10^6 bytes): all, and without pages of files
    """
    if name:
        queue = open_contender(name, directory, durability)
        for first in range(0, count, 100):
            messages = make_messages(100, 256, first)
            for message in queue.encode(messages):
                queue.send(message)
            check(queue.decode(queue.receive(100)), messages)
    fields = dict(
        line.split(":", 1)
        for line in pathlib.Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {
        "all": int(fields["VmRSS"].split()[0]) * 1024 / 1e6,
        "own": int(fields["RssAnon"].split()[0]) * 1024 / 1e6,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    }


#: What can be asked for, by module, so that only what is needed is imported.
TASKS = {
    "throughput": "benchmarks.tasks",
    "fan_out": "benchmarks.tasks",
    "fill": "benchmarks.tasks",
    "backlogged": "benchmarks.tasks",
    "sizes": "benchmarks.tasks",
    "file_size": "benchmarks.tasks",
    "memory": "benchmarks.tasks",
    "concurrency": "benchmarks.together",
    "latency": "benchmarks.together",
    "pause": "benchmarks.together",
}


def main() -> None:
    """Do what the standard input asks for."""
    request = json.loads(sys.stdin.readline())
    name = request.pop("task")
    task: Callable[..., Result] = getattr(importlib.import_module(TASKS[name]), name)
    print(json.dumps(task(**request)))


if __name__ == "__main__":
    main()
