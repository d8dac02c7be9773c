"""Make queues ready, clean them up, serve their figures: the commands about whole queues."""

import contextlib
import json
import pathlib
import sys
import time
from typing import Any

import click

import persipubsub.config
import persipubsub.control
import persipubsub.errors
from persipubsub.cli import _shared, _text


@_shared.command()
@_shared.config_argument
@_shared.queue_option("Make only this queue ready.")
@_shared.json_option
def init(config: pathlib.Path, queue_key: str | None, as_json: bool) -> None:
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

    report.each(_shared.select(config, queue_key), work,
                lambda key, path: report.done(key, {"path": path}, f"{key}: ready in {path}"))


@_shared.command("check-config")
@_shared.config_argument
@_shared.queue_option("Also check that there is this queue.")
@_shared.json_option
def check_config(config: pathlib.Path, queue_key: str | None, as_json: bool) -> None:
    """
    Check CONFIG and list all its problems, not only the first. No queue is touched.

    For queues on servers (nats://...?monitor=http://host:8222), it warns if a server flushes less
    than their durability promises.

    Example:
        persipubsub check-config config.json
    """
    problems: Any = ()
    warnings: list[str] = []
    try:
        found = persipubsub.config.read(config)
        _shared.select(config, queue_key)
        # Only servers are asked; a directory is what this library makes it.
        for key in [
                key for key, queue in found.queues.items()
                if persipubsub.config.scheme_of(queue.path or key)
        ]:
            warnings += [
                f"{key}: {text}" for text in persipubsub.control.check_durability(config, key)[key]
            ]
    except persipubsub.errors.ConfigError as error:
        problems = error.problems
    if not as_json:
        for warning in warnings:
            _text.complain(f"warning: {warning}")
    if as_json:
        print(json.dumps({"problems": list(problems), "warnings": warnings}, indent=2))
    elif problems:
        for problem in problems:
            _text.tell(_text.printable(problem))
        _text.complain(f"{_text.count(len(problems), 'problem')} in {config}")
    else:
        print("{}: fine: {}, {}, {}".format(_text.printable(str(config)),
                                            _text.count(len(found.queues), "queue"),
                                            _text.count(len(found.publishers), "publisher"),
                                            _text.count(len(found.subscribers), "subscriber")))
    if problems:
        sys.exit(1)


@_shared.command()
@_shared.config_argument
@_shared.queue_option("Prune only this queue.")
@_shared.json_option
def prune(config: pathlib.Path, queue_key: str | None, as_json: bool) -> None:
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
            key, {"dropped": dropped},
            f"{key}: {_text.count(dropped, 'delivery')} dropped for being too old"))


@_shared.command()
@_shared.config_argument
@_shared.queue_option("Clear only this queue.")
@_shared.json_option
@_shared.yes_option
def clear(config: pathlib.Path, queue_key: str | None, as_json: bool, yes: bool) -> None:
    """
    Drop all messages of the queues of CONFIG, unread; their subscribers stay.

    Example:
        persipubsub clear config.json --queue greetings --yes
    """
    keys = _shared.select(config, queue_key)
    if not yes:
        waiting = sum(figures.messages for key in keys
                      for figures in persipubsub.control.statistics(config, key).values())
        _shared.ask(f"Drop {_text.count(waiting, 'message')} of {', '.join(keys)}?")
    report = _shared.Report(as_json)
    report.each(
        keys, lambda key: persipubsub.control.clear_all_subs(config, key)[key],
        lambda key, dropped: report.done(
            key, {"dropped": dropped}, f"{key}: cleared, {_text.count(dropped, 'delivery')} unread"
        ))


@_shared.command()
@_shared.config_argument
@_shared.queue_option("Serve only this queue.")
@click.option("--port",
              type=click.IntRange(min=0, max=65535),
              default=9464,
              show_default=True,
              help="TCP port on the loopback address; 0: any that is free.")
@_shared.json_option
def metrics(config: pathlib.Path, queue_key: str | None, port: int, as_json: bool) -> None:
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
            f"The command metrics needs {error.name}. Install it with: pip install "
            f"'persipubsub[metrics]'") from None
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(persipubsub.metrics.serve(config, queue_key, port=port))
        except OSError as error:
            raise click.ClickException(
                f"Expected to serve at 127.0.0.1:{port}, but got: {error.strerror}") from None
        print(json.dumps({"url": url}) if as_json else f"Serving {url}", flush=True)
        while True:
            time.sleep(3600)
