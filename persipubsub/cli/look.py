"""Show what is in queues, check it for monitoring, serve it to Prometheus."""

import collections
import contextlib
import itertools
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import click

import persipubsub.control
from persipubsub.cli import options, text, view
from persipubsub.errors import PersipubsubError
from persipubsub.statistics import QueueStatistics

_STDIN: Final = 0


def _look(call: options.Call) -> tuple[dict[str, QueueStatistics], dict[str, str]]:
    """Look at queues: figures and errors, by queue."""
    statistics: dict[str, QueueStatistics] = {}
    errors: dict[str, str] = {}
    for key in call.keys():
        try:
            statistics.update(persipubsub.control.statistics(call.config, key))
        except PersipubsubError as error:
            errors[key] = str(error)
    return statistics, errors


@options.command("Look only at this queue.")
@click.option("--watch", is_flag=True, help="Look again and again, until q or Ctrl-C.")
@options.option("--interval", options.seconds, "1", "Time between two looks.")
@options.option("--count", click.IntRange(0), 0, "End after so many looks; 0: never.")
def stat(call: options.Call, watch: bool, interval: float, count: int) -> None:
    """
    Show what is in the queues of CONFIG, how far their subscribers are, and what is in flight.

    It is fast, however many messages wait, and blocks no other process. With --watch it shows
    rates, too. With --watch and --json it writes a line of JSON for each look.

    Examples:
        persipubsub stat config.json
        persipubsub stat config.json --json | jq '.greetings.subscribers[].lag'
        persipubsub stat config.json --watch
    """
    if not 0.1 <= interval <= 3600:
        raise click.BadParameter("Expected from 0.1s to 1h.", param_hint="--interval")
    is_terminal = sys.stdout.isatty()
    is_dumb = not is_terminal or os.environ.get("TERM", "dumb") in ("dumb", "unknown")
    paint = click.unstyle if is_dumb or os.environ.get("NO_COLOR") else str
    is_drawn_over = watch and not call.as_json and not is_dumb and os.isatty(_STDIN)
    histories: dict[str, view.History] = collections.defaultdict(view.History)
    statistics: dict[str, QueueStatistics] = {}
    errors: dict[str, str] = {}

    def show() -> None:
        # On a terminal all rows, too, but with names that fit.
        for line in view.draw(statistics, histories, sys.maxsize if is_terminal else None):
            print(paint(line), flush=True)
        for error in errors.values():
            text.complain(error)

    with contextlib.ExitStack() as stack:
        if is_drawn_over:
            # The last look stays on the first screen.
            stack.callback(show)
            stack.enter_context(_screen())
        for looks in itertools.count(1):
            statistics, errors = _look(call)
            for key, figures in statistics.items():
                histories[key].add(figures)
            if call.as_json:
                found = {**statistics, **{key: {"error": one} for key, one in errors.items()}}
                print(options.to_json(found, indent=None if watch else 2), flush=True)
            elif is_drawn_over:
                _draw_over(statistics, errors, histories, paint)
            else:
                show()
            if not watch or looks == count or _is_over(interval, is_drawn_over):
                break
            # The file may have changed.
            del call.config
    call.exit_code = 1 if errors else 0


@contextlib.contextmanager
def _screen() -> Iterator[None]:
    """Use the second screen of the terminal in the block, and get its keys one by one."""
    modes = termios.tcgetattr(_STDIN)
    try:
        tty.setcbreak(_STDIN)
        # Without a cursor. The terminal cuts lines that are too long.
        print("\x1b[?1049h\x1b[?25l\x1b[?7l", end="", flush=True)
        yield
    finally:
        termios.tcsetattr(_STDIN, termios.TCSADRAIN, modes)
        print("\x1b[?7h\x1b[?25h\x1b[?1049l", end="", flush=True)


def _draw_over(statistics: Mapping[str, QueueStatistics], errors: Mapping[str, str],
               histories: Mapping[str, view.History], paint: Callable[[str], str]) -> None:
    """Draw a look over the last one, as much as fits."""
    height = os.get_terminal_size(sys.stdout.fileno()).lines
    lines = view.draw(statistics, histories, max(2, height // max(1, len(statistics)) - 12))
    lines += [click.style(text.printable(error), fg="red") for error in errors.values()]
    if (hidden := len(lines) - height + 2) > 1:
        lines[-hidden:] = [click.style(f"{hidden} more lines; --queue shows one queue", dim=True)]
    drawn = "\x1b[K\n".join(map(paint, [*lines, click.style("q ends", dim=True)]))
    print(f"\x1b[H{drawn}\x1b[J", end="", flush=True)


def _is_over(seconds: float, has_keys: bool) -> bool:
    """Wait for the next look; return True if q was pressed. Any other key looks at once."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        # In steps: a Ctrl-C that comes just before a system call does not end it.
        if select.select([_STDIN] if has_keys else [], [], [], min(left, 1.0))[0]:
            return os.read(_STDIN, 1) in (b"q", b"Q", b"")
    return False


def limits(value: str) -> tuple[float, float]:
    """Convert the limit of an alarm, or those of a warning and of an alarm."""
    with contextlib.suppress(ValueError):
        *first, last = map(text.parse_seconds, value.split(","))
        if len(first) <= 1 and last == max([last, *first]):
            return first[0] if first else float("inf"), last
    raise click.BadParameter(f"Expected a limit, or two in ascending order, but got: {value!r}")


_SEVERITIES: Final = ("OK", "WARNING", "CRITICAL", "UNKNOWN")


@options.command("Check only this queue.")
@options.option("--max-lag", limits, "inf", "Messages that may wait for a subscriber.")
@options.option("--max-age", limits, "inf", "Age of the oldest message: 10m.")
@options.option("--max-share", limits, "inf", "Used share of each limit of a queue: 0.8.")
def check(call: options.Call, **allowed: tuple[float, float]) -> None:
    """
    Check queues for monitoring: print a line with performance data, and set the exit code.

    Exit codes are those of monitoring plugins: 0 fine, 1 warning, 2 critical, 3 unknown, also for
    wrong usage. A value above a limit is critical. Of two limits, such as 500,1000, the first one
    is for a warning. A queue that cannot be looked at is unknown.

    Example:
        persipubsub check config.json --max-lag 500,1000 --max-age 10m --max-share 0.8
    """
    statistics, errors = _look(call)
    worst = 3 if errors else 0
    findings = [f"{key}: {error}" for key, error in errors.items()]
    data: list[str] = []
    for key, figures in statistics.items():
        for name, value, unit, option in _measures(figures):
            warning, critical = allowed[option]
            severity = 2 if value > critical else 1 if value > warning else 0
            worst = max(worst, severity, key=(0, 1, 3, 2).index)
            if severity:
                most = critical if severity == 2 else warning
                findings.append(f"{key}: {name} is {value:.10g}{unit}, more than {most:.10g}{unit}")
            # Monitoring does not allow these characters in a label.
            label = f"{key} {name}".replace("'", "''").translate(str.maketrans("=|", "_/"))
            shown = ["" if one == float("inf") else f"{one:.10g}" for one in (warning, critical)]
            data.append(f"'{label}'={value:.10g}{unit};{';'.join(shown)};0")
        findings += [
            f"{key}: {one.subscriber} is paused" for one in figures.subscribers if one.is_paused
        ]
    told = "; ".join(findings) or f"{text.count(len(statistics), 'queue')} fine"
    line = f"PERSIPUBSUB {_SEVERITIES[worst]} - {told}".replace("|", "/")
    line = f"{line} | {' '.join(data)}" if data else line
    call.tell(line, status=_SEVERITIES[worst], findings=findings, performance=data)
    call.exit_code = worst


def _measures(figures: QueueStatistics) -> Iterator[tuple[str, float, str, str]]:
    """Yield what is checked: name, value, unit, and the option with its limits."""
    for one in figures.subscribers:
        yield f"lag of {one.subscriber}", one.lag, "", "max_lag"
    yield "age", round(figures.oldest_age_seconds or 0.0, 3), "s", "max_age"
    for name, share in (("messages", figures.message_share), ("bytes", figures.byte_share),
                        ("timeout", figures.age_share), ("store", figures.file_share)):
        if share is not None:
            yield f"share of {name}", round(share, 6), "", "max_share"


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
        # The attribute loads the module, and tells how to install the extra.
        with persipubsub.metrics.serve(call.path, call.queue_key, port, address) as url:
            if not address.startswith("127.") and address not in ("::1", "localhost"):
                text.complain(f"warning: all who can reach {address} can read ids and figures: "
                              f"there is no password and no TLS")
            call.tell(f"Serving {url}", url=url)
            while True:
                # In steps: a Ctrl-C that comes just before a system call does not end it.
                time.sleep(1)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise click.ClickException(
            f"Expected to serve at {address}:{port}, but got: {reason}") from None
