#!/usr/bin/env python3
"""
Work on the messages of a subscriber in threads, until the process is told to end.

On SIGTERM (systemd stops it) or SIGINT (Ctrl-C), the messages at work are finished and
acknowledged, no further ones are taken, and the process ends. Work that may take longer than
systemd waits (``TimeoutStopSec``, 90 s) loses nothing either: a killed process leaves its messages
to the next one.
"""

import signal
import sys
import threading
import time
import traceback

from persipubsub import Sub

_stopping = threading.Event()


def work(msg: bytes) -> None:
    """Do something with a message; it may come again if this process is killed meanwhile."""
    time.sleep(0.05)
    print(f"{msg.decode()}\n", end="", flush=True)


def consume(sub: Sub) -> None:
    """Work on one message after the other."""
    while not _stopping.is_set():
        try:
            # The timeout says how long it takes to notice that the process is to end.
            with sub.receive(timeout=1) as msg:
                if msg is not None:
                    work(msg)
        except ValueError:  # of the work; the message stays, and comes again
            traceback.print_exc()


def main() -> None:
    """Start the threads, and wait for their end."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # Only a flag: a handler must not use the library, which it may have interrupted.
        signal.signal(number, lambda *_: _stopping.set())
    with Sub("sub", sys.argv[1]) as sub:
        threads = [threading.Thread(target=consume, args=(sub, )) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
