"""Leave the interpreter while other threads are in the middle of a send or a receive."""

import random
from pathlib import Path
from typing import Final

import pytest

from tests import support
from tests.faults import tracing, workers

ATTEMPTS: Final = 8

PROGRAM: Final = """
import pathlib, sys, threading, time
import persipubsub.errors
from tests.faults import workers

config_pth, ledger_pth, seconds, is_closed = sys.argv[1:]
ledger = workers.Ledger(pathlib.Path(ledger_pth))
pub, sub = persipubsub.Pub("pub", config_pth), persipubsub.Sub("sub", config_pth)
started = threading.Semaphore(0)

def send(source):
    number = 0
    while True:
        msg = "{}:{}".format(source, number)
        pub.send(msg=msg.encode("ascii"))
        ledger.note("sent", msg)
        started.release()
        number += 1

def quietly(target, *args):
    # A traceback that a daemon thread writes while the interpreter ends can abort it.
    try:
        target(*args)
    except persipubsub.errors.ClosedError:
        pass

def receive():
    while True:
        with sub.receive(timeout=1) as msg:
            if msg is not None:
                ledger.note("received", msg.decode("ascii"))
        started.release()

for index in range(2):
    threading.Thread(target=quietly, args=(send, "{}.{}".format(ledger_pth[-3:], index)), daemon=True).start()
    threading.Thread(target=quietly, args=(receive, ), daemon=True).start()
for _ in range(4):
    started.acquire()
time.sleep(float(seconds))
if is_closed == "True":
    pub.close()
    sub.close()
sys.exit(7)
"""


@pytest.mark.parametrize("durability", ["fsync", "os"])
def test_exit_in_a_send_and_in_a_receive(tmp_path: Path, durability: str) -> None:
    rng = random.Random(tracing.seed())
    config_pth = support.make_queue(tmp_path, durability=durability, checkpoint_secs=0.01)
    found: dict[str, set[str]] = {"sent": set(), "received": set()}
    for attempt in range(ATTEMPTS):
        ledger_pth = tmp_path / f"ledger{attempt:03}"
        process = support.run_python(PROGRAM, config_pth, ledger_pth, rng.uniform(0, 0.03),
                                     rng.random() < 0.3)
        assert process.returncode == 7, process.stderr
        assert process.stderr == "", process.stderr
        # It was left as closed.
        assert not (tmp_path / "queue" / "running").exists()
        for _, kind, msg in filter(None, workers.Ledger(ledger_pth).records()):
            found[kind].add(msg)
    with support.open_queue(config_pth) as queue:
        assert not queue.check()
    received = {msg.decode("ascii") for msg in support.receive_all(config_pth)} | found["received"]
    assert found["sent"]
    assert found["sent"] <= received
