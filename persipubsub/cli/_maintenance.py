"""Verify, compact, back up, restore, change subscribers, drop: the commands for maintenance."""

import json
import pathlib

import click

import persipubsub.control
from persipubsub.cli import _shared, _text


def _tell(as_json: bool, line: str, **described: object) -> None:
    """
    Tell what came of a command.

    :param as_json: True for machines
    :param line: for people
    :param described: for machines
    """
    print(json.dumps(described) if as_json else _text.printable(line), flush=True)


@_shared.command()
@_shared.config_argument
@_shared.queue_option("Verify only this queue.")
@_shared.json_option
def verify(config: pathlib.Path, queue_key: str | None, as_json: bool) -> None:
    """
    Verify every page, record and checksum of the queues of CONFIG, while they are in use.

    It holds up nobody, but a queue that is in full use grows meanwhile. The exit code is 1 if
    anything is wrong.

    Example:
        persipubsub verify config.json --queue greetings
    """
    report = _shared.Report(as_json)

    def work(key: str) -> tuple[str, ...]:
        return _shared.with_progress(
            key, lambda progress: persipubsub.control.verify(config, key, progress)[key])

    def tell(key: str, findings: tuple[str, ...]) -> None:
        report.done(key, {"findings": findings},
                    f"{key}: {_text.count(len(findings), 'finding') if findings else 'sound'}")
        for finding in findings:
            report.exit_code = 1
            _text.complain(f"{key}: {finding}")

    report.each(_shared.select(config, queue_key), work, tell)


@_shared.command()
@_shared.config_argument
@_shared.queue_option("Compact only this queue.")
@_shared.json_option
def compact(config: pathlib.Path, queue_key: str | None, as_json: bool) -> None:
    """
    Give the room on the disk back that the queues of CONFIG do not need any more.

    It refuses while any process has the queue open, and needs room for a copy of what is waiting.

    Example:
        persipubsub compact config.json --queue greetings
    """
    report = _shared.Report(as_json)

    def work(key: str) -> persipubsub.control.Sizes:
        return _shared.with_progress(
            key, lambda progress: persipubsub.control.compact(config, key, progress)[key])

    report.each(
        _shared.select(config, queue_key), work, lambda key, sizes: report.done(
            key, {
                "before_bytes": sizes.before,
                "after_bytes": sizes.after
            }, f"{key}: {_text.show_bytes(sizes.after)}, was {_text.show_bytes(sizes.before)}"))


@_shared.command()
@_shared.config_argument
@click.argument("target", type=click.Path(path_type=pathlib.Path))
@_shared.queue_option("Which queue; needed if CONFIG has several.")
@_shared.json_option
def backup(config: pathlib.Path, target: pathlib.Path, queue_key: str | None,
           as_json: bool) -> None:
    """
    Copy a queue, as it is at one moment, to the new file TARGET. It may be in full use.

    All that was acknowledged before is in it. The file is verified and on the disk when the command
    ends; if it fails, there is no such file.

    Example:
        persipubsub backup config.json /backup/greetings.mdb --queue greetings
    """
    key = _shared.select_one(config, queue_key)
    size = _shared.with_progress(
        key, lambda progress: persipubsub.control.backup(config, key, target, progress))
    _tell(as_json,
          f"{key}: {_text.show_bytes(size)} in {target}, verified",
          queue=key,
          target=str(target),
          bytes=size)


@_shared.command()
@_shared.config_argument
@click.argument("source", type=click.Path(path_type=pathlib.Path))
@_shared.queue_option("Which queue; needed if CONFIG has several.")
@_shared.json_option
@_shared.yes_option
def restore(config: pathlib.Path, source: pathlib.Path, queue_key: str | None, as_json: bool,
            yes: bool) -> None:
    """
    Let the backup SOURCE take the place of a queue, or create the queue from it.

    It refuses while any process has the queue open. SOURCE is verified before anything is changed.
    Messages keep their age: what is older than the timeout of the queue is dropped.

    Example:
        persipubsub restore config.json /backup/greetings.mdb --queue greetings
    """
    key = _shared.select_one(config, queue_key)
    if not yes:
        _shared.ask(f"Replace all that is in the queue {key} by {source}?")
    _shared.with_progress(
        key, lambda progress: persipubsub.control.restore(config, key, source, progress))
    figures = persipubsub.control.statistics(config, key)[key]
    _tell(as_json,
          f"{key}: restored, with {_text.count(figures.messages, 'message')}",
          queue=key,
          messages=figures.messages)


@_shared.command("add-subscriber")
@_shared.config_argument
@click.argument("subscriber")
@_shared.queue_option("Which queue; needed if CONFIG has several.")
@_shared.json_option
def add_subscriber(config: pathlib.Path, subscriber: str, queue_key: str | None,
                   as_json: bool) -> None:
    """
    Add SUBSCRIBER to a queue, while it is in use; it gets what is sent from now on.

    CONFIG itself is not changed; what to change there is printed.

    Example:
        persipubsub add-subscriber config.json archive --queue greetings
    """
    key = _shared.select_one(config, queue_key)
    is_new = persipubsub.control.add_subscriber(config, key, subscriber)
    line = (f"{key}: {subscriber} "
            f"{'was added' if is_new else 'is there already, and stays as it is'}.")
    line += (f" See that {config} has it in queues.{key}.subscribers, and an entry "
             f"{json.dumps({subscriber: {'in_queue': key}})[1:-1]}.")
    _tell(as_json, line, queue=key, subscriber=subscriber, added=is_new)


@_shared.command("remove-subscriber")
@_shared.config_argument
@click.argument("subscriber")
@_shared.queue_option("Which queue; needed if CONFIG has several.")
@_shared.json_option
@_shared.yes_option
def remove_subscriber(config: pathlib.Path, subscriber: str, queue_key: str | None, as_json: bool,
                      yes: bool) -> None:
    """
    Remove SUBSCRIBER from a queue, while it is in use, with the messages that nobody else needs.

    CONFIG itself is not changed; what to change there is printed. End the processes of the
    subscriber before: they fail afterwards.

    Example:
        persipubsub remove-subscriber config.json archive --queue greetings
    """
    key = _shared.select_one(config, queue_key)
    figures = persipubsub.control.statistics(config, key)[key]
    lags = {one.subscriber: one.lag for one in figures.subscribers}
    if subscriber in lags and not yes:
        _shared.ask(
            f"Remove {subscriber} from {key}, with {_text.count(lags[subscriber], 'message')} "
            f"that it did not acknowledge?")
    lag = persipubsub.control.remove_subscriber(config, key, subscriber)
    _tell(
        as_json,
        "{key}: {} was removed, with {} that it did not acknowledge. Remove it from {}, too: from "
        "queues.{key}.subscribers, from those of publishers, and its own entry; init adds it "
        "again otherwise.".format(subscriber, _text.count(lag, "message"), config, key=key),
        queue=key,
        subscriber=subscriber,
        unread=lag)


@_shared.command("drop-queue")
@_shared.config_argument
@_shared.queue_option("Which queue; needed if CONFIG has several.")
@_shared.json_option
@_shared.yes_option
def drop_queue(config: pathlib.Path, queue_key: str | None, as_json: bool, yes: bool) -> None:
    """
    Remove a queue from the disk, with all its messages.

    It refuses while any process has the queue open. Only files of this library are removed. CONFIG
    is not changed: init creates the queue again.

    Example:
        persipubsub drop-queue config.json --queue greetings
    """
    key = _shared.select_one(config, queue_key)
    if not yes:
        _shared.ask(f"Remove the queue {key} with all its messages from the disk?")
    others = persipubsub.control.drop_queue(config, key)
    line = f"{key}: dropped"
    if others:
        line += f"; its directory stays, since others put there: {', '.join(others[:5])}"
    _tell(as_json, line, queue=key, others=list(others))
