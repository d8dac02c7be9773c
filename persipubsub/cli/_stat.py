"""
Show what is in queues: the command ``stat``.

Scripts and people call it again and again: it loads nothing of what sends, receives and maintains,
and so not :py:mod:`persipubsub.control` either, but what that has its function from.
"""

import json
import pathlib
import sys
import time
from typing import Any, Dict, List, Optional

import click
import msgspec

import persipubsub.config
import persipubsub.errors
import persipubsub.statistics
from persipubsub import _counting
from persipubsub.cli import _shared, _text

Statistics = Dict[str, persipubsub.statistics.QueueStatistics]


@_shared.command()
@_shared.config_argument
@_shared.queue_option("Look only at this queue.")
@_shared.json_option
@click.option("--watch", is_flag=True, help="Look again and again, until Ctrl-C.")
@click.option("--interval",
              type=_shared.Seconds(min=0.1, max=3600),
              default=1.0,
              metavar="SECONDS",
              show_default=True,
              help="Time between two looks.")
@click.option("--count",
              type=click.IntRange(min=0),
              default=0,
              metavar="NUMBER",
              help="End after so many looks; 0: never.")
@click.option("--svg",
              type=click.Path(path_type=pathlib.Path, dir_okay=False),
              help="Also write the last view as a picture.")
def stat(  # pylint: disable=too-many-arguments,too-many-positional-arguments
        config: pathlib.Path, queue_key: Optional[str], as_json: bool, watch: bool, interval: float,
        count: int, svg: Optional[pathlib.Path]) -> None:
    """
    Show what is in the queues of CONFIG, and how far their subscribers are.

    It is cheap, whatever waits, and holds up nobody. With --watch it shows rates, too. With --watch
    and --json it writes a line of JSON for each look.

    Examples:
        persipubsub stat config.json
        persipubsub stat config.json --json | jq '.greetings.subscribers[].lag'
        persipubsub stat config.json --watch
    """
    found = persipubsub.config.read(config)
    keys = _shared.choose(found, config, queue_key)
    is_drawn = not as_json and (svg is not None or sys.stdout.isatty())
    if is_drawn:
        from persipubsub.cli import _view  # pylint: disable=import-outside-toplevel
        failed = _view.show(lambda: _collect(persipubsub.config.read(config), keys),
                            interval=interval,
                            looks=count if watch else 1,
                            svg=svg)
    else:
        looks = 0
        while True:
            statistics, errors = _collect(found, keys)
            _print(statistics, errors, as_json, watch)
            failed = bool(errors)
            looks += 1
            if not watch or looks == count:
                break
            time.sleep(interval)
            found = persipubsub.config.read(config)
    if failed:
        sys.exit(1)


def _collect(config: persipubsub.config.Config,
             keys: List[str]) -> "tuple[Statistics, Dict[str, str]]":
    """
    Look at queues.

    :param config: that describes them
    :param keys: of the queues
    :return: figures and errors, by queue
    """
    statistics = {}  # type: Statistics
    errors = {}  # type: Dict[str, str]
    for key in keys:
        try:
            statistics[key] = _counting.statistics_of(config, key)
        except persipubsub.errors.ConfigError:
            raise
        except persipubsub.errors.PersipubsubError as error:
            errors[key] = str(error)
    return statistics, errors


def _print(statistics: Statistics, errors: Dict[str, str], as_json: bool, is_stream: bool) -> None:
    """
    Print figures for what is not a terminal.

    :param statistics: by queue
    :param errors: by queue
    :param as_json: True for JSON
    :param is_stream: True for a line of JSON
    """
    if as_json:
        found = {
            key: msgspec.to_builtins(figures)
            for key, figures in statistics.items()
        }  # type: Dict[str, Any]
        found.update({key: {"error": text} for key, text in errors.items()})
        print(json.dumps(found, indent=None if is_stream else 2), flush=True)
        return
    if statistics:
        print(
            _text.table([
                "QUEUE", "MESSAGES", "OF MARK", "BYTES", "OF MARK", "OLDEST", "OF TIMEOUT", "FILE",
                "OF LIMIT", "COMMITS"
            ], [[
                key, "{:,}".format(figures.messages),
                _text.show_share(figures.message_share),
                _text.show_bytes(figures.message_bytes),
                _text.show_share(figures.byte_share),
                _text.show_seconds(figures.oldest_age_seconds),
                _text.show_share(figures.age_share),
                _text.show_bytes(figures.file_bytes),
                _text.show_share(figures.file_share), "{:,}".format(figures.commits)
            ] for key, figures in statistics.items()]))
        print()
        print(_text.table([
            "SUBSCRIBER", "QUEUE", "LAG", "IN FLIGHT", "RECEIVED", "FAILED", "BY TIMEOUT",
            "BY MARK", "CLEARED", "SKIPPED", "CORRUPT", "DEAD LETTERS", "LAST"
        ], [[
            one.subscriber, key, "{:,}".format(one.lag),
            "?" if one.in_flight is None else "{:,}".format(one.in_flight), "{:,}".format(
                one.acknowledged), "{:,}".format(one.failed), "{:,}".format(one.dropped_by_timeout),
            "{:,}".format(one.dropped_by_mark), "{:,}".format(one.cleared), "{:,}".format(
                one.skipped), "{:,}".format(one.corrupt), "{:,}".format(one.dead_lettered),
            _text.show_seconds(one.seconds_since_acknowledged)
        ] for key, figures in statistics.items() for one in figures.subscribers]),
              flush=True)
        _print_claims(statistics)
    for text in errors.values():
        _text.complain(text)


def _print_claims(statistics: Statistics) -> None:
    """
    Print what is in flight, if anything is.

    :param statistics: by queue
    """
    rows = [[
        claim.subscriber, key,
        str(claim.number), "{:,}".format(claim.count),
        "?" if claim.process_id is None else str(claim.process_id),
        _text.show_seconds(claim.seconds)
    ] for key, figures in statistics.items() for one in figures.subscribers for claim in one.claims]
    if rows:
        print()
        print(_text.table(["IN FLIGHT", "QUEUE", "NUMBER", "MESSAGES", "PROCESS", "SINCE"], rows),
              flush=True)
