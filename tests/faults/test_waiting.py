"""
Measure how soon a message arrives, and what waiting costs; times are printed with ``-s``.

The bounds are far off what is measured on any machine: they find what hangs or polls.
"""

import os
import random
import signal
import time
from pathlib import Path
from typing import Final

import pytest

from persipubsub import Pub, Sub
from persipubsub.lmdb_engine.notifier import Notifier
from tests import support
from tests.faults import ledger, tracing

SENDS: Final = 300
TAKEOVERS: Final = int(os.environ.get("PERSIPUBSUB_TAKEOVERS", "12"))


def receive_at(pipe: support.Connection, config_pth: Path, count: int) -> None:
    """Tell how long each message took to get here, in microseconds."""
    latencies: list[float] = []
    with Sub("sub", config_pth) as sub:
        pipe.send("ready")
        for _ in range(count):
            with sub.receive(timeout=support.HANG_SECS) as msg:
                now = time.monotonic_ns()
                assert msg is not None
                latencies.append((now - int(msg)) / 1e3)
    pipe.send(sorted(latencies))


def send_timed(pub: Pub, rng: random.Random, count: int) -> None:
    """Send the time, each time to a subscriber that has gone to sleep."""
    for _ in range(count):
        time.sleep(rng.uniform(0.001, 0.003))
        pub.send(msg=b"%d" % time.monotonic_ns())


def test_latency(tmp_path: Path) -> None:
    rng = random.Random(tracing.seed())
    config_pth = support.make_queue(tmp_path, durability="os")
    with Pub("pub", config_pth) as pub, support.Child(receive_at, config_pth, SENDS) as child:
        assert child.get() == "ready"
        send_timed(pub, rng, SENDS)
        latencies = child.get()
        child.end()
    median = ledger.percentile(latencies, 50)
    print("send to receive: p50 {:.0f} us, p90 {:.0f} us, p99 {:.0f} us".format(
        median, ledger.percentile(latencies, 90), ledger.percentile(latencies, 99)))
    # Without a wake-up, half a second.
    assert median < 50000


def idle(pipe: support.Connection, config_pth: Path, seconds: float) -> None:
    """Wait in vain, and tell which part of a processor that took."""
    with Sub("sub", config_pth) as sub:
        with sub.receive(timeout=0.05) as msg:
            assert msg is None
        pipe.send("ready")
        begin, cpu = time.monotonic(), time.process_time()
        with sub.receive(timeout=seconds) as msg:
            assert msg is None
        pipe.send((time.process_time() - cpu) / (time.monotonic() - begin))


def test_idle_costs_nothing(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path, durability="os")
    with support.Child(idle, config_pth, 2) as child:
        assert child.get() == "ready"
        share = child.get()
        child.end()
    print(f"idle: {100 * share:.3f} % of a processor")
    assert share < 0.02


def hold_forever(pipe: support.Connection, config_pth: Path) -> None:
    """Receive, tell when, and never finish until told to."""
    with Sub("sub", config_pth) as sub:
        pipe.send("ready")
        while True:
            with sub.receive(timeout=support.HANG_SECS) as msg:
                pipe.send((time.monotonic_ns(), msg))
                pipe.recv()
            pipe.send("done")


@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_message_of_a_killed_consumer(tmp_path: Path, durability: str) -> None:
    rng = random.Random(tracing.seed())
    config_pth = support.make_queue(tmp_path, durability=durability)
    takeovers: list[float] = []
    with Pub("pub", config_pth) as pub:
        one, two = (support.Child(hold_forever, config_pth) for _ in range(2))
        try:
            assert one.get() == two.get() == "ready"
            for number in range(TAKEOVERS):
                msg = b"%d" % number
                pub.send(msg=msg)
                # pylint: disable-next=cell-var-from-loop
                support.until(lambda: one.pipe.poll() or two.pipe.poll(), what="a message")
                if two.pipe.poll():
                    one, two = two, one
                assert one.get()[1] == msg
                # The other one has seen that it is taken, and waits.
                time.sleep(rng.uniform(0.01, 0.1))
                assert not two.pipe.poll()
                begin = time.monotonic_ns()
                one.kill(signal.SIGKILL)
                when, again = two.get()
                assert again == msg
                takeovers.append((when - begin) / 1e6)
                two.pipe.send("finish")
                assert two.get() == "done"
                one.end(-signal.SIGKILL)
                one.pipe.close()
                one = support.Child(hold_forever, config_pth)
                assert one.get() == "ready"
        finally:
            one.__exit__()
            two.__exit__()
    takeovers.sort()
    print("{}: from the kill to the next consumer: p50 {:.1f} ms, p99 {:.1f} ms".format(
        durability, ledger.percentile(takeovers, 50), ledger.percentile(takeovers, 99)))
    # Looked at only once a second, it takes half a second.
    assert ledger.percentile(takeovers, 50) < 300


def die_before_it_notifies(pipe: support.Connection, config_pth: Path) -> None:
    """Be killed between the commit of a message and the notification."""
    pub = Pub("pub", config_pth)
    setattr(Notifier, "notify", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    pub.send(msg=b"%d" % time.monotonic_ns())
    pipe.send("never")


def test_publisher_killed_before_it_notifies(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    with support.Child(receive_at, config_pth, 1) as child:
        assert child.get() == "ready"
        time.sleep(0.2)  # asleep, most probably; it holds anyhow
        with support.Child(die_before_it_notifies, config_pth) as publisher:
            publisher.end(-signal.SIGKILL)
        latency, = child.get()
        child.end()
    print(f"without a notification: {latency / 1e3:.0f} ms")
    # Once a second whatever happens, though the timeout of the receive is much longer.
    assert latency < 1e6 * 4
