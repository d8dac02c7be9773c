"""Measure several processes or threads that use one queue at the same time."""

import concurrent.futures
import functools
import math
import multiprocessing
import pathlib
import subprocess
import sys
import threading
import time
from typing import Any

import persipubsub.control
from benchmarks import library, tasks

_SPAWN = multiprocessing.get_context("spawn")

#: Longer than anything here takes, so that nothing hangs for ever; in seconds.
_HANG_SECS = 120


def quantiles(values: list[float], names: tuple[str, ...] = ("p50", "p99", "p99.9", "max")) -> Any:
    """
    Look quantiles up.

    :param values: not sorted
    :param names: ``p`` and a percentage, or ``max``
    :return: values by name
    """
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        name: ordered[last if name == "max" else min(last, math.ceil(last * float(name[1:]) / 100))]
        for name in names
    }


def _send_in_turn(name: str, durability: str, directory: str, worker: int, seconds: float,
                  count: int, barrier: Any) -> tuple[int, float, float]:
    """
    Send as one of several processes or threads.

    :param name: of the contender
    :param durability: class of durability
    :param directory: of the queue
    :param worker: number of the worker
    :param seconds: how long to send
    :param count: how many messages at most
    :param barrier: where all workers begin
    :return: how many were sent, begin and end on the monotonic clock
    """
    queue = tasks.open_contender(name, directory, durability)
    encoded = queue.encode(tasks.make_messages(count, 256, worker * count))
    barrier.wait(_HANG_SECS)
    begin = time.monotonic()
    sent, _ = tasks.send_for(queue, encoded, seconds)
    end = time.monotonic()
    queue.close()
    return sent, begin, end


def _process_main(pipe: Any, *arguments: Any) -> None:
    """
    Run a worker process.

    :param pipe: gets the result
    :param arguments: of the worker
    """
    pipe.send(_send_in_turn(*arguments))


def concurrency(name: str, durability: str, directory: str, kind: str, workers: int, seconds: float,
                count: int) -> tasks.Result:
    """
    Send from several processes or threads at the same time.

    :param name: of the contender
    :param durability: class of durability
    :param directory: to work in
    :param kind: ``processes`` or ``threads``
    :param workers: how many
    :param seconds: how long to send
    :param count: how many messages each sends at most
    :return: messages in a second, of all together
    """
    # Created before anybody is in a hurry.
    tasks.open_contender(name, directory, durability).close()
    arguments = (name, durability, directory)
    results: list[tuple[int, float, float]] = []
    if kind == "processes":
        barrier = _SPAWN.Barrier(workers)
        running = []
        for worker in range(workers):
            ours, theirs = _SPAWN.Pipe()
            process = _SPAWN.Process(target=_process_main,
                                     args=(theirs, *arguments, worker, seconds, count, barrier))
            process.start()
            theirs.close()
            running.append((process, ours))
        for process, pipe in running:
            results.append(pipe.recv())
            process.join(_HANG_SECS)
    else:
        results = _send_from_threads(arguments, workers, seconds, count)

    queue = tasks.open_contender(name, directory, durability)
    sent = [
        message for worker, (number, _, _) in enumerate(results)
        for message in tasks.make_messages(number, 256, worker * count)
    ]
    tasks.check(queue.decode(queue.receive_many(len(sent), 1000)), sent)
    queue.close()
    took = max(end for _, _, end in results) - min(begin for _, begin, _ in results)
    return {"rate": len(sent) / took}


def _send_from_threads(arguments: tuple[str, str, str], workers: int, seconds: float,
                       count: int) -> list[tuple[int, float, float]]:
    """
    Send from threads that share one open queue, as an application would.

    :param arguments: name of the contender, durability, directory
    :param workers: how many threads
    :param seconds: how long to send
    :param count: how many messages each sends at most
    :return: of each thread: how many were sent, begin and end on the monotonic clock
    """
    queue = tasks.open_contender(arguments[0], arguments[2], arguments[1])
    barrier = threading.Barrier(workers)

    def work(worker: int) -> tuple[int, float, float]:
        encoded = queue.encode(tasks.make_messages(count, 256, worker * count))
        barrier.wait(_HANG_SECS)
        begin = time.monotonic()
        sent, _ = tasks.send_for(queue, encoded, seconds)
        return sent, begin, time.monotonic()

    with concurrent.futures.ThreadPoolExecutor(workers) as executor:
        results = list(executor.map(work, range(workers)))
    queue.close()
    return results


def _note_delay(delays: list[int], message: Any) -> bool:
    """
    Note how long a message was on its way.

    :param delays: to be extended, in nanoseconds
    :param message: begins with the time when it was sent; 0: the last one
    :return: False if it was the last one
    """
    now = time.monotonic_ns()
    sent_ns = int(message[:16])
    if sent_ns:
        delays.append(now - sent_ns)
    return bool(sent_ns)


def _receiver_main(pipe: Any, name: str, durability: str, directory: str, rounds: int) -> None:
    """
    Receive until a message says that it is the last one, and note when each arrived.

    :param pipe: gets a word when the receiver is about to sleep, and the delays
    :param name: of the contender
    :param durability: class of durability
    :param directory: of the queue
    :param rounds: how often
    """
    queue = tasks.open_contender(name, directory, durability)
    for _ in range(rounds):
        delays: list[int] = []

        pipe.send("ready")
        queue.sleep_and_receive(functools.partial(_note_delay, delays))
        pipe.send(delays)
    queue.close()


def _send_paced(queue: Any, rate: float, count: int) -> None:
    """
    Send messages that say when they were sent, then one that ends the round.

    :param queue: to send to
    :param rate: messages in a second; 0: as fast as it goes
    :param count: how many messages
    """
    filling = tasks.make_messages(1, 256)[0][16:]
    clock = time.monotonic_ns
    is_text = isinstance(queue.encode([filling])[0], str)
    text = filling.decode("ascii")
    interval = 1 / rate if rate else 0.0
    due = time.monotonic()
    for _ in range(count):
        due += interval
        early = due - time.monotonic()
        if early > 0:
            time.sleep(early)
        if is_text:
            queue.send("%016d%s" % (clock(), text))
        else:
            queue.send(b"%016d%b" % (clock(), filling))
    queue.send(queue.encode([b"0" * 256])[0])


def latency(name: str, durability: str, directory: str, seconds: float) -> tasks.Result:
    """
    Measure the time from a send's call until another, sleeping process has the message.

    :param name: of the contender
    :param durability: class of durability
    :param directory: to work in
    :param seconds: how long for each load
    :return: quantiles in microseconds at 200 messages a second, and at half of what gets through;
        and that number
    """
    queue = tasks.open_contender(name, directory, durability)
    queue.wake_with_sends()
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_receiver_main, args=(theirs, name, durability, directory, 3))
    process.start()
    result: dict[str, Any] = {}
    rate = 200.0
    try:
        for load in ("low", "all", "half"):
            assert ours.poll(_HANG_SECS), "The receiver does not answer."
            ours.recv()
            time.sleep(0.05)  # until it sleeps; nothing is wrong if it does not
            count = max(50, int(seconds * (rate or 1000)))
            begin = time.monotonic()
            _send_paced(queue, rate, count)
            assert ours.poll(_HANG_SECS), "The receiver does not get the last message."
            delays = ours.recv()
            took = time.monotonic() - begin
            if len(delays) != count:
                raise tasks.WrongDelivery(f"{len(delays)} of {count} messages arrived")
            if load == "all":
                result["rate"] = count / took
                rate = count / took / 2
            else:
                for quantile, value in quantiles([delay / 1e3 for delay in delays]).items():
                    result[f"{load} load, {quantile}"] = value
                rate = 0.0
    finally:
        process.join(5)
        process.kill()
    queue.close()
    return result


_PRUNER = """\
import sys
import persipubsub.control
sys.stdin.readline()
persipubsub.control.prune_dangling_messages(config_pth=sys.argv[1])
print("done", flush=True)
"""

_CROSSER = """\
import sys
import persipubsub.publisher
with persipubsub.publisher.Pub() as pub:
    pub.init(pub_id="pub", config_pth=sys.argv[1])
    sys.stdin.readline()
    pub.send_many([b"x" * 256] * 1000)
print("done", flush=True)
"""


def pause(name: str, durability: str, directory: str, backlog: int, kind: str,
          seconds: float) -> tasks.Result:
    """
    Measure sends while another process prunes half of the queue.

    :param name: of the contender: this library
    :param durability: class of durability
    :param directory: to work in
    :param backlog: how many messages there are, each from a commit of its own
    :param kind: ``timeout``: an operator prunes what is too old; ``mark``: another sender passes
        the high-water mark
    :param seconds: how long to measure before, and at least during and after
    :return: quantiles in microseconds of the sends before and during; duration of the pruning
    """
    del name
    path = pathlib.Path(directory)
    # Without flushes, so that filling does not take minutes; the durability is changed afterwards.
    queue = library.Library(path, "os")
    messages = tasks.make_messages(backlog, 256)
    middle = 0.0
    for number, message in enumerate(messages):
        if number == backlog // 2:
            middle = time.monotonic()
        queue.send(message)
    queue.close()
    config_pth = library.write_config(path, durability)
    changes: dict[str, Any] = {}
    if kind == "timeout":
        changes["MSG_TIMEOUT_SECS"] = time.monotonic() - middle + 0.5 + 2 * seconds
        code = _PRUNER
    else:
        changes["MAX_MSGS_NUM"] = backlog
        code = _CROSSER
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    other_pth = library.write_config(path, durability, name="other.json", **changes)
    queue = library.Library(path, durability, config_pth=config_pth)
    # Who has the queue open keeps its settings; the other process gets what is stored now.
    persipubsub.control.initialize_all_dbs(config_pth=other_pth)
    with subprocess.Popen([sys.executable, "-c", code, str(other_pth)],
                          stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE,
                          text=True) as other:
        result = _send_beside(queue, other, seconds)
    queue.close()
    return result


def _send_beside(queue: library.Library, other: "subprocess.Popen[str]",
                 seconds: float) -> tasks.Result:
    """
    Send all the time and let another process prune in the middle of it.

    :param queue: to send to
    :param other: process that prunes when it gets a line, and answers with one
    :param seconds: how long to measure before, and at least during and after
    :return: quantiles in microseconds of the sends before and during; duration of the pruning
    """
    message = tasks.make_messages(1, 256)[0]
    sends: list[tuple[float, float]] = []
    done: list[float] = []

    def wait_for_other() -> None:
        assert other.stdout is not None
        if other.stdout.readline().strip() == "done":
            done.append(time.perf_counter())

    waiter = threading.Thread(target=wait_for_other)
    waiter.start()
    start = now = time.perf_counter()
    begun = 0.0
    while now < start + _HANG_SECS and not (done and now > max(done[0], begun + seconds)):
        before = time.perf_counter()
        queue.send(message)
        now = time.perf_counter()
        sends.append((before, (now - before) * 1e6))
        if not begun and now > start + 2 * seconds:
            begun = now
            assert other.stdin is not None
            other.stdin.write("\n")
            other.stdin.flush()
    if not done:
        other.kill()
    waiter.join(_HANG_SECS)
    if not done:
        raise tasks.WrongDelivery("the other process did not prune")
    result: tasks.Result = {"duration": done[0] - begun}
    # The first half warms up: the other process starts then.
    for when, low, high in (("before", start + seconds, begun), ("during", begun, math.inf)):
        values = [duration for before, duration in sends if low <= before < high]
        for quantile, value in quantiles(values).items():
            result[f"{when}, {quantile}"] = value
    return result
