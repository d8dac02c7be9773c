#!/usr/bin/env python3
"""
Measure a queue on this machine, one on a local server of NATS JetStream, and nats-py alone.

    nats-server -js --store_dir /var/tmp/jetstream
    python benchmarks/engines.py --queue nats://127.0.0.1:4222/benchmark

The rounds alternate, so that all see the same machine; the median of each is printed. Messages have
256 bytes. With nats-py alone, a loop does the same: each message is published with an id, and
acknowledged with ``ack_sync``; of batches, all are under way at once.
"""

import argparse
import asyncio
import itertools
import json
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import nats
import nats.js.errors

import persipubsub.control
import persipubsub.publisher
import persipubsub.subscriber

_MESSAGE = bytes(256)


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
        batch, many = [_MESSAGE] * 1000, max(1000, self._count * 10 // 1000 * 1000)
        return {
            "send": self._rate(self._count, lambda: self._send(self._count)),
            "receive": self._rate(self._count, lambda: self._receive(self._count)),
            "send, 16 threads": self._rate(self._count // 16 * 16, lambda: _run(threads)),
            "(drain)": self._rate(1, lambda: self._receive_many(self._count // 16 * 16)),
            "send_many(1000)": self._rate(many, lambda: self._send_many(batch, many // 1000)),
            "receive_many(1000)": self._rate(many, lambda: self._receive_many(many)),
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


class Raw:
    """Measure a loop of nats-py with a stream of the same kind."""

    def __init__(self, queue: str, count: int) -> None:
        """
        Connect, and make the stream.

        :param queue: address of the queue; the stream has another name
        :param count: of single messages in each round
        """
        self._loop = asyncio.new_event_loop()
        self._count = count
        self._ids = itertools.count()
        address, _, name = queue.partition("?")[0].rpartition("/")
        self._loop.run_until_complete(self._connect(address, f"{name}-raw"))

    async def _connect(self, address: str, name: str) -> None:
        self._js = (await nats.connect(address)).jetstream()
        try:
            await self._js.delete_stream(name)
        except nats.js.errors.NotFoundError:
            pass
        await self._js.add_stream(name=name, subjects=[f"{name}.all"], retention="interest")
        self._subject = f"{name}.all"
        self._sub = await self._js.pull_subscribe(self._subject, durable="sub")

    def run(self) -> dict[str, float]:
        """
        Measure one round; the stream is empty before and after it.

        :return: messages in a second, by what was done
        """
        many = max(1000, self._count * 10 // 1000 * 1000)
        return {
            "send": self._rate(self._count, self._send(self._count)),
            "receive": self._rate(self._count, self._receive(self._count)),
            "send, 16 threads": self._rate(self._count // 16 * 16, self._send_at_once(self._count)),
            "(drain)": self._rate(1, self._receive_many(self._count // 16 * 16)),
            "send_many(1000)": self._rate(many, self._send_many(many // 1000)),
            "receive_many(1000)": self._rate(many, self._receive_many(many)),
        }

    def _rate(self, count: int, work: Coroutine[Any, Any, None]) -> float:
        start = time.perf_counter()
        self._loop.run_until_complete(work)
        return count / (time.perf_counter() - start)

    async def _publish(self) -> None:
        headers = {"Nats-Msg-Id": str(next(self._ids))}
        await self._js.publish(self._subject, _MESSAGE, timeout=60, headers=headers)

    async def _send(self, count: int) -> None:
        for _ in range(count):
            await self._publish()

    async def _send_at_once(self, count: int) -> None:
        await asyncio.gather(*(self._send(count // 16) for _ in range(16)))

    async def _send_many(self, count: int) -> None:
        for _ in range(count):
            await asyncio.gather(*(self._publish() for _ in range(1000)))

    async def _receive(self, count: int) -> None:
        for _ in range(count):
            for msg in await self._sub.fetch(1, timeout=60):
                await msg.ack_sync(timeout=60)

    async def _receive_many(self, count: int) -> None:
        while count > 0:
            msgs = await self._sub.fetch(1000, timeout=60)
            await asyncio.gather(*(msg.ack_sync(timeout=60) for msg in msgs))
            count -= len(msgs)


def _run(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="Measure two engines, and nats-py, in one run.")
    parser.add_argument("--queue",
                        required=True,
                        help="nats://host:4222/STREAM, used for this only")
    parser.add_argument("--durability", choices=["fsync", "os"], default="fsync")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="persipubsub-engines-", dir=".") as name:
        directory = pathlib.Path(name).resolve()
        benches: list[Bench | Raw] = [
            Bench(write_config(directory, path, args.durability), args.count)
            for path in (str(directory / "queue"), args.queue)
        ]
        benches.append(Raw(args.queue, args.count))
        rounds = [[bench.run() for bench in benches] for _ in range(args.rounds)]
    print(f"{'messages/s':20} {'directory':>12} {'server':>12} {'nats-py':>12} "
          f"{'server/directory':>17} {'server/nats-py':>15}")
    for what in rounds[0][0]:
        if not what.startswith("("):
            here, there, raw = (statistics.median(one[index][what] for one in rounds)
                                for index in range(3))
            print(f"{what:20} {here:12,.0f} {there:12,.0f} {raw:12,.0f} {there / here:17.2f} "
                  f"{there / raw:15.2f}")


if __name__ == "__main__":
    main()
