"""Show what is in queues, check it for monitoring, serve it to Prometheus."""

import contextlib
import importlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import click

import persipubsub.control
import persipubsub.errors
import persipubsub.statistics
from persipubsub.cli import options, text, view

__all__ = ["stat", "check", "metrics"]

Found = tuple[dict[str, persipubsub.statistics.QueueStatistics], dict[str, str]]


def _look(call: options.Call, keys: Sequence[str]) -> Found:
    """Look at queues: figures and errors, by queue."""
    statistics: dict[str, persipubsub.statistics.QueueStatistics] = {}
    errors: dict[str, str] = {}
    for key in keys:
        try:
            statistics[key] = persipubsub.control.statistics(call.config, key)[key]
        except persipubsub.errors.PersipubsubError as error:
            errors[key] = str(error)
    return statistics, errors


@options.command("Look only at this queue.")
@click.option("--watch", is_flag=True, help="Look again and again, until q or Ctrl-C.")
@options.option("--interval", options.seconds, "1", "Time between two looks.")
@options.option("--count", options.ANY, 0, "End after so many looks; 0: never.")
def stat(call: options.Call, watch: bool, interval: float, count: int) -> None:
    """
    Show what is in the queues of CONFIG, how far their subscribers are, and what is in flight.

    It is fast, however many messages wait, and holds up nobody. With --watch it shows rates, too.
    With --watch and --json it writes a line of JSON for each look.

    Examples:
        persipubsub stat config.json
        persipubsub stat config.json --json | jq '.greetings.subscribers[].lag'
        persipubsub stat config.json --watch
    """
    if not 0.1 <= interval <= 3600:
        raise click.BadParameter("Expected from 0.1s to 1h.", param_hint="--interval")
    histories: dict[str, view.History] = {}
    looks = 0
    with _Screen(is_watched=watch and not call.as_json) as screen:
        while True:
            statistics, errors = found = _look(call, call.keys())
            if call.as_json:
                failed = {key: {"error": error} for key, error in errors.items()}
                found_all = {**statistics, **failed}
                print(options.to_json(found_all, indent=None if watch else 2), flush=True)
            else:
                if watch:
                    for key, figures in statistics.items():
                        histories.setdefault(key, view.History()).add(figures)
                screen.show(found, histories)
            looks += 1
            if not watch or looks == count or screen.wait(interval):
                break
            # The file may have changed.
            call = options.Call(call.path, call.queue_key, call.as_json)
    if errors:
        raise click.exceptions.Exit(1)


class _Screen:
    """The output of ``stat``: a pipe, or a terminal that is drawn over while it is watched."""

    def __init__(self, is_watched: bool) -> None:
        """Initialize without touching the terminal."""
        is_dumb = os.environ.get("TERM", "dumb") in ("dumb", "unknown")
        self._is_terminal = sys.stdout.isatty()
        self._has_color = self._is_terminal and not is_dumb and not os.environ.get("NO_COLOR")
        self._is_watched = is_watched and self._is_terminal and not is_dumb
        self._has_keys = self._is_watched and sys.stdin is not None and sys.stdin.isatty()
        self._modes: list[Any] = []
        self._last: tuple[list[str], Mapping[str, str]] = ([], {})

    def __enter__(self) -> "_Screen":
        if self._has_keys:
            self._modes = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
        if self._is_watched:
            # The other screen, without a cursor.
            print("\x1b[?1049h\x1b[?25l", end="", flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._has_keys:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._modes)
        if self._is_watched:
            print("\x1b[?25h\x1b[?1049l", end="")
            lines, errors = self._last
            print("\n".join(lines), flush=True)
            for error in errors.values():
                text.complain(error)

    def show(self, found: Found, histories: Mapping[str, view.History]) -> None:
        """Show a look."""
        statistics, errors = found
        if not self._is_watched:
            lines = view.draw(statistics, histories, 1 << 30 if self._is_terminal else None)
            if lines:
                print("\n".join(self._paint(line, 1 << 30) for line in lines), flush=True)
            for error in errors.values():
                text.complain(error)
            return
        size = os.get_terminal_size(sys.stdout.fileno())
        lines = view.draw(statistics, histories, max(2, size.lines // max(1, len(statistics)) - 12))
        self._last = [self._paint(line, size.columns) for line in lines], errors
        lines += [[(text.printable(error), "red")] for error in errors.values()]
        if len(lines) >= size.lines:
            hidden = len(lines) - size.lines + 2
            lines[-hidden:] = [[(f"{hidden} more lines; --queue shows one queue", "dim")]]
        lines.append([("q ends", "dim")])
        drawn = "\x1b[K\n".join(self._paint(line, size.columns) for line in lines)
        print(f"\x1b[H{drawn}\x1b[J", end="", flush=True)

    def wait(self, seconds: float) -> bool:
        """Wait for the next look; return True if q was pressed. Any other key looks at once."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            # In steps: a Ctrl-C that comes just before a system call does not end it.
            if not self._has_keys:
                time.sleep(min(left, 1.0))
            elif select.select([sys.stdin], [], [], min(left, 1.0))[0]:
                return os.read(sys.stdin.fileno(), 1) in (b"q", b"Q", b"")
        return False

    def _paint(self, line: view.Line, width: int) -> str:
        """Color a line, and cut off what does not fit."""
        shown = ""
        for piece, color in line:
            while text.width_of(piece) > width:
                piece = piece[:-1]
            width -= text.width_of(piece)
            if piece and color and self._has_color:
                is_color = color not in ("bold", "dim")
                piece = click.style(piece, **({"fg": color} if is_color else {color: True}))
            shown += piece
        return shown


def _limits(parse: Callable[[str], float]) -> Callable[[str], tuple[float, float]]:
    """Let an option take the limit of an alarm, or those of a warning and of an alarm."""

    def convert(value: str) -> tuple[float, float]:
        try:
            *first, last = map(parse, value.split(","))
            if len(first) <= 1 and 0 <= min([last, *first]) and last == max([last, *first]):
                return first[0] if first else float("inf"), last
        except ValueError:
            pass
        raise click.BadParameter(f"Expected a limit, or two that do not fall, but got: {value!r}")

    return convert


_SEVERITIES: Final = ("OK", "WARNING", "CRITICAL", "UNKNOWN")


@options.command("Check only this queue.")
@options.option("--max-lag", _limits(float), "inf", "Messages that may wait for a subscriber.")
@options.option("--max-age", _limits(text.parse_seconds), "inf", "Age of the oldest message: 10m.")
@options.option("--max-share", _limits(float), "inf", "Used share of each limit of a queue: 0.8.")
def check(call: options.Call, **limits: tuple[float, float]) -> None:
    """
    Check queues for monitoring: print a line with performance data, and set the exit code.

    Exit codes are those of monitoring plugins: 0 fine, 1 warning, 2 critical, 3 unknown, also for
    wrong usage. A value above a limit is critical. Of two limits, such as 500,1000, the first one
    is for a warning. A queue that can not be looked at is unknown.

    Example:
        persipubsub check config.json --max-lag 500,1000 --max-age 10m --max-share 0.8
    """
    statistics, errors = _look(call, call.keys())
    worst = 3 if errors else 0
    findings = [f"{key}: {error}" for key, error in errors.items()]
    data: list[str] = []
    for key, figures in statistics.items():
        for name, value, unit, limit in _measures(figures):
            warning, critical = limits[limit]
            severity = 2 if value > critical else 1 if value > warning else 0
            worst = max(worst, severity, key=(0, 1, 3, 2).index)
            if severity:
                most = critical if severity == 2 else warning
                findings.append(f"{key}: {name} is {value:.10g}{unit}, more than {most:.10g}{unit}")
            data.append(_performance(f"{key} {name}", value, unit, warning, critical))
        findings += [
            f"{key}: {one.subscriber} is paused" for one in figures.subscribers if one.is_paused
        ]
    told = "; ".join(findings) or f"{text.count(len(statistics), 'queue')} fine"
    line = f"PERSIPUBSUB {_SEVERITIES[worst]} - {told}".replace("|", "/")
    line = f"{line} | {' '.join(data)}" if data else line
    call.tell(line, status=_SEVERITIES[worst], findings=findings, performance=data)
    raise click.exceptions.Exit(worst)


def _measures(
        figures: persipubsub.statistics.QueueStatistics) -> Iterator[tuple[str, float, str, str]]:
    """Yield what is checked: name, value, unit, and the option with its limits."""
    for one in figures.subscribers:
        yield f"lag of {one.subscriber}", one.lag, "", "max_lag"
    yield "age", round(figures.oldest_age_seconds or 0.0, 3), "s", "max_age"
    for name, share in (("messages", figures.message_share), ("bytes", figures.byte_share),
                        ("timeout", figures.age_share), ("store", figures.file_share)):
        if share is not None:
            yield f"share of {name}", round(share, 6), "", "max_share"


def _performance(label: str, value: float, unit: str, warning: float, critical: float) -> str:
    """Write a value as performance data; its label can not have every character."""
    for old, new in (("'", "''"), ("=", "_"), ("|", "/")):
        label = label.replace(old, new)
    shown = ["" if limit == float("inf") else f"{limit:.10g}" for limit in (warning, critical)]
    return f"'{label}'={value:.10g}{unit};{';'.join(shown)};0"


@options.command("Serve only this queue.")
@options.option("--port", click.IntRange(0, 65535), 9464, "TCP port; 0: any that is free.")
@options.option("--address", str, "127.0.0.1", "Where to listen; 0.0.0.0 or :: for all.")
def metrics(call: options.Call, port: int, address: str) -> None:
    """
    Serve the statistics to Prometheus at http://127.0.0.1:9464/metrics, until Ctrl-C.

    It needs the extra: pip install 'persipubsub[metrics]'. Queues are opened for each scrape only.

    Examples:
        persipubsub metrics config.json --port 9464
        persipubsub metrics config.json --address 10.0.0.7
    """
    call.keys()
    try:
        module = importlib.import_module("persipubsub.metrics")
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"The command metrics needs {error.name}. Install it with: pip install "
            f"'persipubsub[metrics]'") from None
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(
                module.serve(call.path, call.queue_key, port=port, address=address))
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise click.ClickException(
                f"Expected to serve at {address}:{port}, but got: {reason}") from None
        if not module.is_loopback(address):
            text.complain(f"warning: whoever reaches {address} can read ids and figures; there is "
                          f"neither a password nor TLS")
        call.tell(f"Serving {url}", url=url)
        while True:
            # In steps: a Ctrl-C that comes just before a system call does not end it.
            time.sleep(1)
