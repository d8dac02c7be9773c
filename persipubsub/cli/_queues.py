"""Make queues ready, look at them, and clean them up: the commands about whole queues."""

import contextlib
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any, Dict, List, Optional

import click

import persipubsub.config
import persipubsub.control
import persipubsub.errors
import persipubsub.statistics
from persipubsub.cli import _shared

Statistics = Dict[str, persipubsub.statistics.QueueStatistics]


@_shared.command()
@_shared.config_argument
@_shared.queue_option("Make only this queue ready.")
@_shared.json_option
def init(config: pathlib.Path, queue_key: Optional[str], as_json: bool) -> None:
    """
    Create the queues of CONFIG, and add their subscribers.

    It may be repeated at any time: what is there stays as it is. Run it as the user whose programs
    use the queues.

    Example:
        persipubsub init /etc/app/config.json
    """
    report = _shared.Report(as_json)

    def work(key: str) -> str:
        persipubsub.control.initialize_all_dbs(config, key)
        return persipubsub.config.read(config).queue_path(key)

    report.each(
        _shared.select(config, queue_key), work,
        lambda key, path: report.done(key, {"path": path}, "{}: ready in {}".format(key, path)))


@_shared.command("check-config")
@_shared.config_argument
@_shared.queue_option("Also check that there is this queue.")
@_shared.json_option
def check_config(config: pathlib.Path, queue_key: Optional[str], as_json: bool) -> None:
    """
    Check CONFIG and list all its problems, not only the first. No queue is touched.

    Example:
        persipubsub check-config config.json
    """
    problems = ()  # type: Any
    try:
        found = persipubsub.config.read(config)
        _shared.select(config, queue_key)
    except persipubsub.errors.ConfigError as error:
        problems = error.problems
    if as_json:
        print(json.dumps({"problems": list(problems)}, indent=2))
    elif problems:
        for problem in problems:
            print(_shared.printable(problem), file=sys.stderr)
        _shared.complain("{} in {}".format(_shared.count(len(problems), "problem"), config))
    else:
        print("{}: fine: {}, {}, {}".format(_shared.printable(str(config)),
                                            _shared.count(len(found.queues), "queue"),
                                            _shared.count(len(found.publishers), "publisher"),
                                            _shared.count(len(found.subscribers), "subscriber")))
    if problems:
        sys.exit(1)


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
    keys = _shared.select(config, queue_key)
    is_drawn = not as_json and (svg is not None or sys.stdout.isatty())
    if is_drawn:
        from persipubsub.cli import _view  # pylint: disable=import-outside-toplevel
        failed = _view.show(lambda: _collect(config, keys),
                            interval=interval,
                            looks=count if watch else 1,
                            svg=svg)
    else:
        looks = 0
        while True:
            statistics, errors = _collect(config, keys)
            _print(statistics, errors, as_json, watch)
            failed = bool(errors)
            looks += 1
            if not watch or looks == count:
                break
            time.sleep(interval)
    if failed:
        sys.exit(1)


def _collect(config: pathlib.Path, keys: List[str]) -> "tuple[Statistics, Dict[str, str]]":
    """
    Look at queues.

    :param config: path to the configuration file
    :param keys: of the queues
    :return: figures and errors, by queue
    """
    statistics = {}  # type: Statistics
    errors = {}  # type: Dict[str, str]
    for key in keys:
        try:
            statistics.update(persipubsub.control.statistics(config, key))
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
            key: dataclasses.asdict(figures)
            for key, figures in statistics.items()
        }  # type: Dict[str, Any]
        found.update({key: {"error": text} for key, text in errors.items()})
        print(json.dumps(found, indent=None if is_stream else 2), flush=True)
        return
    if statistics:
        print(
            _shared.table([
                "QUEUE", "MESSAGES", "OF MARK", "BYTES", "OF MARK", "OLDEST", "OF TIMEOUT", "FILE",
                "OF LIMIT", "COMMITS"
            ], [[
                key, "{:,}".format(figures.messages),
                _shared.show_share(figures.message_share),
                _shared.show_bytes(figures.message_bytes),
                _shared.show_share(figures.byte_share),
                _shared.show_seconds(figures.oldest_age_seconds),
                _shared.show_share(figures.age_share),
                _shared.show_bytes(figures.file_bytes),
                _shared.show_share(figures.file_share), "{:,}".format(figures.commits)
            ] for key, figures in statistics.items()]))
        print()
        print(_shared.table([
            "SUBSCRIBER", "QUEUE", "LAG", "IN FLIGHT", "RECEIVED", "FAILED", "BY TIMEOUT",
            "BY MARK", "CLEARED", "SKIPPED", "CORRUPT", "DEAD LETTERS", "LAST"
        ], [[
            one.subscriber, key, "{:,}".format(one.lag),
            "?" if one.in_flight is None else "{:,}".format(one.in_flight), "{:,}".format(
                one.acknowledged), "{:,}".format(one.failed), "{:,}".format(one.dropped_by_timeout),
            "{:,}".format(one.dropped_by_mark), "{:,}".format(one.cleared), "{:,}".format(
                one.skipped), "{:,}".format(one.corrupt), "{:,}".format(one.dead_lettered),
            _shared.show_seconds(one.seconds_since_acknowledged)
        ] for key, figures in statistics.items() for one in figures.subscribers]),
              flush=True)
        _print_claims(statistics)
    for text in errors.values():
        _shared.complain(text)


def _print_claims(statistics: Statistics) -> None:
    """
    Print what is in flight, if anything is.

    :param statistics: by queue
    """
    rows = [[
        claim.subscriber, key,
        str(claim.number), "{:,}".format(claim.count),
        "?" if claim.process_id is None else str(claim.process_id),
        _shared.show_seconds(claim.seconds)
    ] for key, figures in statistics.items() for one in figures.subscribers for claim in one.claims]
    if rows:
        print()
        print(_shared.table(["IN FLIGHT", "QUEUE", "NUMBER", "MESSAGES", "PROCESS", "SINCE"], rows),
              flush=True)


@_shared.command()
@_shared.config_argument
@_shared.queue_option("Prune only this queue.")
@_shared.json_option
def prune(config: pathlib.Path, queue_key: Optional[str], as_json: bool) -> None:
    """
    Drop messages that are too old, and delete those that everybody acknowledged.

    Senders do the same little by little; this is for queues that nobody sends to.

    Example:
        persipubsub prune config.json
    """
    report = _shared.Report(as_json)
    report.each(
        _shared.select(config, queue_key),
        lambda key: persipubsub.control.prune_dangling_messages(config, key)[key],
        lambda key, dropped: report.done(
            key, {"dropped": dropped}, "{}: {} dropped for being too old".format(
                key, _shared.count(dropped, "delivery"))))


@_shared.command()
@_shared.config_argument
@_shared.queue_option("Clear only this queue.")
@_shared.json_option
@_shared.yes_option
def clear(config: pathlib.Path, queue_key: Optional[str], as_json: bool, yes: bool) -> None:
    """
    Drop all messages of the queues of CONFIG, unread; their subscribers stay.

    Example:
        persipubsub clear config.json --queue greetings --yes
    """
    keys = _shared.select(config, queue_key)
    if not yes:
        waiting = sum(figures.messages for key in keys
                      for figures in persipubsub.control.statistics(config, key).values())
        click.confirm("Drop {} of {}?".format(_shared.count(waiting, "message"), ", ".join(keys)),
                      abort=True,
                      err=True)
    report = _shared.Report(as_json)
    report.each(
        keys, lambda key: persipubsub.control.clear_all_subs(config, key)[key],
        lambda key, dropped: report.done(
            key, {"dropped": dropped}, "{}: cleared, {} unread".format(
                key, _shared.count(dropped, "delivery"))))


@_shared.command()
@_shared.config_argument
@_shared.queue_option("Serve only this queue.")
@click.option("--port",
              type=click.IntRange(min=0, max=65535),
              default=9464,
              show_default=True,
              help="TCP port on the loopback address; 0: any that is free.")
@_shared.json_option
def metrics(config: pathlib.Path, queue_key: Optional[str], port: int, as_json: bool) -> None:
    """
    Serve the statistics to Prometheus at http://127.0.0.1:PORT/metrics, until Ctrl-C.

    It needs the extra: pip install 'persipubsub[metrics]'. Queues are opened for each scrape only.

    Example:
        persipubsub metrics config.json --port 9464
    """
    _shared.select(config, queue_key)
    try:
        import persipubsub.metrics  # pylint: disable=import-outside-toplevel,redefined-outer-name
    except ModuleNotFoundError as error:
        raise click.ClickException(
            "The command metrics needs {}. Install it with: pip install 'persipubsub[metrics]'".
            format(error.name)) from None
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(persipubsub.metrics.serve(config, queue_key, port=port))
        except OSError as error:
            raise click.ClickException("Expected to serve at 127.0.0.1:{}, but got: {}".format(
                port, error.strerror)) from None
        print(json.dumps({"url": url}) if as_json else "Serving {}".format(url), flush=True)
        while True:
            time.sleep(3600)
