#!/usr/bin/env python3
"""
Measure a queue on this machine beside one on a local server of NATS JetStream, in one run.

    nats-server -js --store_dir /var/tmp/jetstream
    python benchmarks/engines.py --queue nats://127.0.0.1:4222/benchmark

The rounds of the two alternate, so that both see the same machine; the median of each is printed,
and its ratio to the first column. Messages have 256 bytes.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable

import persipubsub.control
import persipubsub.publisher
import persipubsub.subscriber

_MESSAGE = bytes(256)
_ROUNDS = 5


def write_config(directory: pathlib.Path, path: str, durability: str) -> pathlib.Path:
    """
    Write a configuration file with one queue, and initialize it.

    :param directory: where to write it
    :param path: of the queue
    :param durability: of the queue
    :return: path of the file
    """
    mark = {
        "MSG_TIMEOUT_SECS": 3600,
        "MAX_MSGS_NUM": 10**6,
        "HWM_LMDB_SIZE_BYTES": 2**30,
        "strategy": "prune_first"
    }
    queue = {
        "path": path,
        "max_reader_num": 64,
        "max_db_num": 64,
        "max_db_size_bytes": 2**32,
        "subscribers": ["sub"],
        "high-water-mark": mark,
        "durability": durability
    }
    config_pth = directory / f"{len(list(directory.iterdir()))}.json"
    config_pth.write_text(
        json.dumps({
            "pub": {
                "out_queue": "q",
                "subscribers": ["sub"]
            },
            "sub": {
                "in_queue": "q"
            },
            "queues": {
                "q": queue
            }
        }))
    persipubsub.control.initialize_all_dbs(config_pth=config_pth)
    persipubsub.control.clear_all_subs(config_pth=config_pth)
    return config_pth


class Bench:
    """Measure one queue."""

    def __init__(self, config_pth: pathlib.Path, count: int) -> None:
        """
        Open the queue.

        :param config_pth: path to its configuration file
        :param count: of single messages in each round
        """
        self._pub = persipubsub.publisher.Pub()
        self._pub.init(pub_id="pub", config_pth=config_pth)
        self._sub = persipubsub.subscriber.Sub()
        self._sub.init(sub_id="sub", config_pth=config_pth)
        self._count = count

    def run(self) -> dict[str, float]:
        """
        Measure one round; the queue is empty before and after it.

        :return: messages in a second, by what was done
        """
        threads = [
            threading.Thread(target=self._send, args=(self._count // 16, )) for _ in range(16)
        ]
        batch = [_MESSAGE] * 1000
        return {
            "send": self._rate(self._count, lambda: self._send(self._count)),
            "receive": self._rate(self._count, lambda: self._receive(self._count)),
            "send, 16 threads": self._rate(self._count // 16 * 16, lambda: _run(threads)),
            "(drain)": self._rate(1, lambda: self._receive_many(self._count // 16 * 16)),
            "send_many(1000)": self._rate(10000, lambda: self._send_many(batch, 10)),
            "receive_many(1000)": self._rate(10000, lambda: self._receive_many(10000)),
        }

    @staticmethod
    def _rate(count: int, work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return count / (time.perf_counter() - start)

    def _send(self, count: int) -> None:
        for _ in range(count):
            self._pub.send(_MESSAGE)

    def _send_many(self, batch: list[bytes], count: int) -> None:
        for _ in range(count):
            self._pub.send_many(batch)

    def _receive(self, count: int) -> None:
        for _ in range(count):
            with self._sub.receive(timeout=60) as msg:
                assert msg is not None

    def _receive_many(self, count: int) -> None:
        while count > 0:
            with self._sub.receive_many(max_msgs=1000, timeout=60) as msgs:
                assert msgs
                count -= len(msgs)


def _run(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="Measure two engines in one run.")
    parser.add_argument("--queue",
                        required=True,
                        help="nats://host:4222/STREAM, used for this only")
    parser.add_argument("--durability", choices=["fsync", "os"], default="fsync")
    parser.add_argument("--count", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="persipubsub-engines-", dir=".") as name:
        directory = pathlib.Path(name).resolve()
        benches = [
            Bench(write_config(directory, path, args.durability), args.count)
            for path in (str(directory / "queue"), args.queue)
        ]
        rounds = [[bench.run() for bench in benches] for _ in range(_ROUNDS)]
    print(f"{'messages/s':20} {'directory':>12} {'server':>12} {'ratio':>7}")
    for what in rounds[0][0]:
        here, there = (statistics.median(one[index][what] for one in rounds) for index in (0, 1))
        if not what.startswith("("):
            print(f"{what:20} {here:12,.0f} {there:12,.0f} {there / here:7.2f}")


if __name__ == "__main__":
    main()
