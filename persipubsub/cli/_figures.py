"""
Look at queues, and print their figures where nothing is drawn.

Scripts and people call ``stat`` again and again: it loads nothing of what sends, receives and
maintains, and so not :py:mod:`persipubsub.control` either, but what that has its function from;
and nothing of click, since its plain forms run without.
"""

import json
from typing import Any

import msgspec

import persipubsub.config
import persipubsub.errors
import persipubsub.statistics
from persipubsub import _counting
from persipubsub.cli import _text

Statistics = dict[str, persipubsub.statistics.QueueStatistics]


def collect(config: persipubsub.config.Config,
            keys: list[str]) -> "tuple[Statistics, dict[str, str]]":
    """
    Look at queues.

    :param config: that describes them
    :param keys: of the queues
    :return: figures and errors, by queue
    """
    statistics: Statistics = {}
    errors: dict[str, str] = {}
    for key in keys:
        try:
            statistics[key] = _counting.statistics_of(config, key)
        except persipubsub.errors.PersipubsubError as error:
            errors[key] = str(error)
    return statistics, errors


def tell(config: persipubsub.config.Config,
         keys: list[str],
         as_json: bool,
         is_stream: bool = False) -> bool:
    """
    Look at queues once, and print their figures and errors.

    :param config: that describes them
    :param keys: of the queues
    :param as_json: True for JSON
    :param is_stream: True for a line of JSON
    :return: True if all of them could be looked at
    """
    statistics, errors = collect(config, keys)
    _print(statistics, errors, as_json, is_stream)
    return not errors


def _print(statistics: Statistics, errors: dict[str, str], as_json: bool, is_stream: bool) -> None:
    """
    Print figures for what is not a terminal.

    :param statistics: by queue
    :param errors: by queue
    :param as_json: True for JSON
    :param is_stream: True for a line of JSON
    """
    if as_json:
        found: dict[str, Any] = {
            key: msgspec.to_builtins(figures)
            for key, figures in statistics.items()
        }
        found.update({key: {"error": text} for key, text in errors.items()})
        print(json.dumps(found, indent=None if is_stream else 2), flush=True)
        return
    if statistics:
        print(
            _text.table([
                "QUEUE", "MESSAGES", "OF MARK", "BYTES", "OF MARK", "OLDEST", "OF TIMEOUT", "FILE",
                "OF LIMIT", "COMMITS"
            ], [[
                key, f"{figures.messages:,}",
                _text.show_share(figures.message_share),
                _text.show_bytes(figures.message_bytes),
                _text.show_share(figures.byte_share),
                _text.show_seconds(figures.oldest_age_seconds),
                _text.show_share(figures.age_share),
                _text.show_bytes(figures.file_bytes),
                _text.show_share(figures.file_share), f"{figures.commits:,}"
            ] for key, figures in statistics.items()]))
        print()
        print(_text.table([
            "SUBSCRIBER", "QUEUE", "LAG", "IN FLIGHT", "RECEIVED", "FAILED", "BY TIMEOUT",
            "BY MARK", "CLEARED", "SKIPPED", "CORRUPT", "DEAD LETTERS", "LAST"
        ], [[
            one.subscriber, key, f"{one.lag:,}",
            "?" if one.in_flight is None else f"{one.in_flight:,}", "{:,}".format(one.acknowledged),
            f"{one.failed:,}", f"{one.dropped_by_timeout:,}", f"{one.dropped_by_mark:,}",
            f"{one.cleared:,}", f"{one.skipped:,}", f"{one.corrupt:,}", f"{one.dead_lettered:,}",
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
        str(claim.number), f"{claim.count:,}",
        "?" if claim.process_id is None else str(claim.process_id),
        _text.show_seconds(claim.seconds)
    ] for key, figures in statistics.items() for one in figures.subscribers for claim in one.claims]
    if rows:
        print()
        print(_text.table(["IN FLIGHT", "QUEUE", "NUMBER", "MESSAGES", "PROCESS", "SINCE"], rows),
              flush=True)
