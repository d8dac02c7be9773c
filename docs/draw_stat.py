"""
Draw docs/stat-watch.svg: what "persipubsub stat --watch" shows of a queue in use.

The queue is a real one, of examples/tutorial, with a publisher and three subscribing threads that
are not equally fast. Run it after a change of the view: ``python docs/draw_stat.py``.
"""

import io
import pathlib
import re
import shutil
import tempfile
import threading
import time

import msgspec.structs
import rich.console
import rich.text

import persipubsub.control
import persipubsub.publisher
import persipubsub.subscriber
from persipubsub.cli import view

_DOCS = pathlib.Path(__file__).resolve().parent
_CONFIG = _DOCS.parent / "examples" / "tutorial" / "config.json"

_INTERVAL_SECS = 0.5
_LOOKS = 22

#: So many messages wait at the beginning.
_BACKLOG = 30000


def _publish(config_pth: pathlib.Path, stop: threading.Event) -> None:
    """
    Publish lines, in waves.

    :param config_pth: of the queue
    :param stop: is set when it is enough
    """
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="reader", config_pth=config_pth)
        pub.send_many(msgs=[b"GET /item/1 200"] * _BACKLOG)
        begin = time.monotonic()
        while not stop.is_set():
            phase = (time.monotonic() - begin) % 4.0
            pub.send_many(msgs=[b"GET /item/1 200"] * (8 if phase < 2.0 else 3))
            time.sleep(0.01)


def _receive(config_pth: pathlib.Path, sub_id: str, batch: int, pause: float,
             stop: threading.Event) -> None:
    """
    Receive lines, and take some time for each batch.

    :param config_pth: of the queue
    :param sub_id: of the subscriber
    :param batch: messages at once
    :param pause: time for a batch, in seconds
    :param stop: is set when it is enough
    """
    with persipubsub.subscriber.Sub() as sub:
        sub.init(sub_id=sub_id, config_pth=config_pth)
        while not stop.is_set():
            with sub.receive_many(max_msgs=batch, timeout=0.1):
                time.sleep(pause)


def main() -> None:
    """Draw the picture."""
    with tempfile.TemporaryDirectory() as directory:
        config_pth = pathlib.Path(shutil.copy(_CONFIG, directory))
        persipubsub.control.initialize_all_dbs(config_pth=config_pth)
        stop = threading.Event()
        threads = [threading.Thread(target=_publish, args=(config_pth, stop))] + [
            threading.Thread(target=_receive, args=(config_pth, sub_id, batch, pause, stop))
            for sub_id, batch, pause in (("alarm", 500, 0.01), ("archive", 20, 0.03),
                                         ("archive", 20, 0.03))
        ]
        for thread in threads:
            thread.start()

        histories = {"lines": view.History()}
        for _ in range(_LOOKS):
            found = persipubsub.control.statistics(config_pth)["lines"]
            histories["lines"].add(found)
            time.sleep(_INTERVAL_SECS)
        figures = msgspec.structs.replace(found, path="/srv/app/queues/lines")
        stop.set()
        for thread in threads:
            thread.join()
    console = rich.console.Console(record=True, width=100, file=io.StringIO())
    for line in view.draw({"lines": figures}, histories, limit=10):
        # Spaces in front by themselves: some programs leave them out, and shift the rest.
        rest = line.lstrip(" ")
        drawn = rich.text.Text(" " * (len(line) - len(rest)), style="bold")
        console.print(drawn.append_text(rich.text.Text.from_ansi(rest)))
    target = _DOCS / "stat-watch.svg"
    console.save_svg(str(target), title="persipubsub stat --watch")
    # Fonts would be fetched from the network by whoever looks at the page.
    text = re.sub(r"@font-face \{.*?\}\n", "", target.read_text(encoding="utf-8"), flags=re.DOTALL)
    target.write_text(text.replace("Fira Code, monospace", "monospace"), encoding="utf-8")


if __name__ == "__main__":
    main()
