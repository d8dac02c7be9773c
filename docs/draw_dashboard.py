"""
Draw docs/dashboard.png: the panels of contrib/grafana/persipubsub.json over two minutes of a queue.

The figures are real: a Prometheus server scrapes them, and evaluates the expressions of the panels.
It needs the program ``prometheus`` (Debian has it) and matplotlib, and is run by hand after a
change of the metrics or of the dashboard: ``python docs/draw_dashboard.py``.
"""

import contextlib
import functools
import json
import pathlib
import socket
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

import persipubsub.control
import persipubsub.metrics
import persipubsub.publisher
import persipubsub.subscriber

_DOCS = pathlib.Path(__file__).resolve().parent

_SECONDS = 120
_CONFIG = {
    "shop": {
        "out_queue": "orders",
        "subscribers": ["archive", "billing", "mail"]
    },
    "archive": {
        "in_queue": "orders"
    },
    "billing": {
        "in_queue": "orders"
    },
    "mail": {
        "in_queue": "orders"
    },
    "queues": {
        "orders": {
            "path": "orders",
            "max_reader_num": 1024,
            "max_db_num": 1024,
            "max_db_size_bytes": 1 << 26,
            "subscribers": ["archive", "billing", "mail"],
            "high-water-mark": {
                "MSG_TIMEOUT_SECS": 600,
                "MAX_MSGS_NUM": 4000,
                "HWM_LMDB_SIZE_BYTES": 1 << 20,
                "strategy": "prune_first"
            }
        }
    }
}

_CONVERSIONS: dict[str, Callable[[float], str]] = {
    "percentunit": lambda value: f"{100 * value:.0f} %",
    "bytes": lambda value: f"{value / 1e6:.1f} MB",
    "cps": lambda value: f"{value:g}/s",
    "s": lambda value: f"{value:g} s",
    "short": lambda value: f"{value:g}"
}


def _publish(config_pth: pathlib.Path, end: float) -> None:
    """Publish 100 messages a second, and more in the middle."""
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id="shop", config_pth=config_pth)
        begin = time.monotonic()
        while time.monotonic() < end:
            phase = (time.monotonic() - begin) / _SECONDS
            pub.send_many(msgs=[b"x" * 150] * (25 if 0.35 < phase < 0.5 else 10))
            time.sleep(0.1)


def _receive(config_pth: pathlib.Path, sub_id: str, pause: float, end: float) -> None:
    """Receive messages, and take some time for each; fail at every 50th."""
    with persipubsub.subscriber.Sub() as sub:
        sub.init(sub_id=sub_id, config_pth=config_pth)
        count = 0
        while time.monotonic() < end:
            count += 1
            with contextlib.suppress(ValueError), sub.receive(timeout=0.1):
                time.sleep(pause)
                if sub_id == "mail" and count % 50 == 0:
                    raise ValueError("no address")


def _hang(config_pth: pathlib.Path, begin: float, end: float) -> None:
    """Hold a message for a while."""
    time.sleep(max(0.0, begin - time.monotonic()))
    with persipubsub.subscriber.Sub() as sub:
        sub.init(sub_id="billing", config_pth=config_pth)
        with sub.receive(timeout=10):
            time.sleep(end - begin)


def _work(config_pth: pathlib.Path) -> None:
    """Let things happen."""
    begin = time.monotonic()
    end = begin + _SECONDS
    threads = [
        threading.Thread(target=_publish, args=(config_pth, end)),
        threading.Thread(target=_hang, args=(config_pth, begin + 40, begin + 85))
    ]
    threads += [
        threading.Thread(target=_receive, args=(config_pth, *arguments, end))
        for arguments in (("archive", 0.001), ("billing", 0.007), ("mail", 0.011))
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.5 * _SECONDS)
    persipubsub.control.pause(config_pth, "archive")
    time.sleep(0.2 * _SECONDS)
    persipubsub.control.resume(config_pth, "archive")
    for thread in threads:
        thread.join()


@contextlib.contextmanager
def _prometheus(directory: pathlib.Path, url: str) -> Iterator[str]:
    """Let a server scrape the metrics each second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    host = urllib.parse.urlsplit(url).netloc
    (directory / "prometheus.yml").write_text(
        json.dumps({
            "global": {
                "scrape_interval": "1s"
            },
            "scrape_configs": [{
                "job_name": "persipubsub",
                "static_configs": [{
                    "targets": [host]
                }]
            }]
        }))
    with subprocess.Popen([
            "prometheus", f"--config.file={directory}/prometheus.yml",
            f"--storage.tsdb.path={directory}/tsdb", f"--web.listen-address={address}"
    ],
                          stderr=subprocess.DEVNULL) as process:
        try:
            yield f"http://{address}"
        finally:
            process.terminate()


def _query(server: str, expression: str, begin: float, end: float) -> list[dict[str, Any]]:
    """Evaluate an expression of the dashboard."""
    for old, new in (("$__rate_interval", "10s"), ("$queue", ".*")):
        expression = expression.replace(old, new)
    parameters = {"query": expression, "start": begin, "end": end, "step": 1}
    url = f"{server}/api/v1/query_range?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url) as response:
        found: list[dict[str, Any]] = json.load(response)["data"]["result"]
        return found


def _convert(unit: Callable[[float], str], value: float, _: object) -> str:
    """Write a value of an axis, as matplotlib asks for it."""
    return unit(value)


def _draw(server: str, begin: float, end: float) -> None:
    """Draw the panels where the dashboard has them."""
    dashboard = json.loads((_DOCS.parent / "contrib" / "grafana" / "persipubsub.json").read_text())
    plt.style.use("dark_background")
    plt.rcParams.update({"font.size": 8, "axes.titlesize": 9})
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    figure = plt.figure(figsize=(12, rows * 0.34))
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        axes = figure.add_axes(
            (place["x"] / 24 + 0.045, 1 - (place["y"] + place["h"]) / rows + 0.03,
             place["w"] / 24 - 0.06, place["h"] / rows - 0.06))
        axes.set_title(panel["title"])
        unit = _CONVERSIONS[panel["fieldConfig"]["defaults"]["unit"]]
        for target in panel["targets"]:
            for series in _query(server, target["expr"], begin, end):
                name = target["legendFormat"]
                for label, value in series["metric"].items():
                    name = name.replace(f"{{{{{label}}}}}", value)
                values = [(float(moment) - begin, float(value))
                          for moment, value in series["values"]]
                if panel["type"] == "stat":
                    axes.text(0.5,
                              0.4,
                              unit(round(values[-1][1])),
                              ha="center",
                              va="center",
                              size=20)
                elif any(value for _, value in values):
                    axes.plot(*zip(*values), label=name, linewidth=1.2)
        if panel["type"] == "stat":
            axes.set_axis_off()
            continue
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.2)
        axes.xaxis.set_major_formatter("{x:.0f} s")
        axes.yaxis.set_major_formatter(functools.partial(_convert, unit))
        axes.legend(loc="upper left", fontsize=6, frameon=False, ncol=2)
    figure.savefig(_DOCS / "dashboard.png", dpi=75)


def main() -> None:
    """Draw the picture."""
    matplotlib.use("Agg")
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        config_pth = directory / "config.json"
        config_pth.write_text(json.dumps(_CONFIG))
        persipubsub.control.initialize_all_dbs(config_pth=config_pth)
        with persipubsub.metrics.serve(config_pth, port=0) as url, _prometheus(directory,
                                                                               url) as server:
            begin = time.time()
            _work(config_pth)
            _draw(server, begin + 5, time.time())


if __name__ == "__main__":
    main()
