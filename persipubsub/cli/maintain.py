"""Steer subscribers; clean up, verify, compact, back up, restore, move and drop queues."""

import concurrent.futures
import datetime
import pathlib
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import click

from persipubsub import control
from persipubsub.cli import options, text

ResultT = TypeVar("ResultT")


@options.one_subscriber
@options.subscriber
def pause(call: options.Call, key: str, subscriber: str) -> options.Told:
    """
    Let the consumers of SUBSCRIBER wait until "resume". Nothing is lost.

    They finish the messages that they have taken already. New messages wait, and the limits of the
    queue apply to them as if no consumer was there. "stat" shows that the subscriber is paused.

    Example:
        persipubsub pause config.json archive
    """
    is_new = control.pause(call.config, subscriber, key)
    line = f"{subscriber} {'is paused' if is_new else 'was paused already'}"
    return line, {"subscriber": subscriber, "paused": True, "changed": is_new}


@options.one_subscriber
@options.subscriber
def resume(call: options.Call, key: str, subscriber: str) -> options.Told:
    """
    Let the consumers of SUBSCRIBER go on after "pause".

    Example:
        persipubsub resume config.json archive
    """
    is_new = control.resume(call.config, subscriber, key)
    line = f"{subscriber} {'goes on' if is_new else 'was not paused'}"
    return line, {"subscriber": subscriber, "paused": False, "changed": is_new}


def _place(value: str) -> int | str | datetime.datetime:
    """Convert a place to what :py:func:`control.seek` takes."""
    if value in ("beginning", "end"):
        return value
    try:
        return int(value) if value.isascii() and value.isdigit() else text.parse_time(value)
    except (ValueError, OverflowError, OSError):
        raise click.BadParameter(
            f"Expected 'beginning', 'end', a number, a time ago (-1h30m), a time "
            f"(2026-11-30T06:00, 06:00), or @ and seconds since 1970, but got: {value!r}") from None


@options.one_subscriber
@options.subscriber
@click.option("--to",
              "place",
              type=_place,
              metavar="PLACE",
              required=True,
              help="'beginning', 'end', the number of a message, a time ago (-1h30m), a time "
              "(2026-11-30T06:00, or 06:00 for the last one; local unless it ends with a zone such "
              "as +01:00), or @ and seconds since 1970.")
def seek(call: options.Call, key: str, subscriber: str, place: Any) -> options.Told:
    """
    Let SUBSCRIBER go on from another place of its queue, also while it is at work.

    Messages from there on are delivered again, also those that it acknowledged, as far as the queue
    still has them (see retain_secs). Messages that are passed unread count as skipped.

    Examples:
        persipubsub seek config.json archive --to beginning
        persipubsub seek config.json archive --to -1h
        persipubsub seek config.json archive --to 2026-11-30T06:00
    """
    position = control.seek(call.config, subscriber, to=place, queue_key=key)
    found = control.statistics(call.config, key)[key].subscribers
    lag = sum(one.lag for one in found if one.subscriber == subscriber)
    waiting = text.count(lag, "message")
    line = f"{subscriber} goes on from number {position}, with {waiting} to receive"
    return line, {"subscriber": subscriber, "position": position, "lag": lag}


def _watched(work: Callable[..., ResultT], call: options.Call, key: str, *more: object) -> ResultT:
    """Do something long with a queue, and show on a terminal how far it has come."""
    progress = control.Progress()
    is_done = threading.Event()

    def show() -> None:
        while not is_done.wait(timeout=0.1):
            click.echo(f"\r{text.printable(key)}: {progress.share():4.0%}", err=True, nl=False)
        click.echo("\r\x1b[K", err=True, nl=False)

    # The work stays in the main thread, where Ctrl-C interrupts it. If the terminal goes away, the
    # work goes on: nobody asks the pool for the error.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        if sys.stderr.isatty():
            pool.submit(show)
        try:
            return work(call.config, key, *more, progress=progress)
        finally:
            is_done.set()


@options.each_queue("Prune only this queue.")
def prune(call: options.Call, key: str) -> options.Told:
    """
    Drop messages that are too old, and delete those that all subscribers acknowledged.

    Sends do the same little by little. This command is for queues that nobody sends to.

    Example:
        persipubsub prune config.json
    """
    dropped = control.prune_dangling_messages(call.config, key)[key]
    line = f"{text.count(dropped, 'delivery')} dropped for being too old"
    return line, {"dropped": dropped}


@options.command("Clear only this queue.")
@options.yes
def clear(call: options.Call, yes: bool) -> None:
    """
    Drop all messages of the queues of CONFIG, unread; their subscribers stay.

    Example:
        persipubsub clear config.json --queue greetings --yes
    """
    keys = call.keys()
    if not yes:
        found = [control.statistics(call.config, key)[key] for key in keys]
        waiting = text.count(sum(figures.messages for figures in found), "message")
        call.ask(f"Drop {waiting} of {', '.join(keys)}?")

    def work(key: str) -> options.Told:
        dropped = control.clear_all_subs(call.config, key)[key]
        return f"cleared, {text.count(dropped, 'delivery')} unread", {"dropped": dropped}

    call.each(keys, work)


@options.each_queue("Verify only this queue.")
def verify(call: options.Call, key: str) -> options.Told:
    """
    Verify every page, record and checksum of the queues of CONFIG, while they are in use.

    It blocks no other process, but a busy queue grows meanwhile. The exit code is 1 if anything is
    wrong.

    Example:
        persipubsub verify config.json --queue greetings
    """
    found = _watched(control.verify, call, key)[key]
    for finding in found:
        call.fail(f"{key}: {finding}")
    return text.count(len(found), "finding") if found else "sound", {"findings": found}


@options.each_queue("Compact only this queue.")
def compact(call: options.Call, key: str) -> options.Told:
    """
    Give back room on the disk that the queues of CONFIG do not need any more.

    It fails while any process has the queue open. It needs room for a copy of the waiting messages.

    Example:
        persipubsub compact config.json --queue greetings
    """
    sizes = _watched(control.compact, call, key)[key]
    line = f"{text.show_bytes(sizes.after)}, was {text.show_bytes(sizes.before)}"
    return line, {"before_bytes": sizes.before, "after_bytes": sizes.after}


@options.one_queue
@click.argument("target", type=click.Path(path_type=pathlib.Path))
def backup(call: options.Call, key: str, target: pathlib.Path) -> options.Told:
    """
    Copy a queue, as it is at one moment, to the new file TARGET. The queue may be in use.

    Everything that was sent or acknowledged before is in the file. The file is verified and on the
    disk when the command ends. If the command fails, there is no such file.

    Example:
        persipubsub backup config.json /backup/greetings.mdb --queue greetings
    """
    size = _watched(control.backup, call, key, target)
    line = f"{text.show_bytes(size)} in {target}, verified"
    return line, {"target": str(target), "bytes": size}


@options.one_queue
@click.argument("source", type=click.Path(path_type=pathlib.Path))
@options.yes
def restore(call: options.Call, key: str, source: pathlib.Path, yes: bool) -> options.Told:
    """
    Replace a queue with the backup SOURCE, or create the queue from it.

    It fails while any process has the queue open. SOURCE is verified before anything is changed.
    Messages keep their age: those that are older than the timeout of the queue are dropped.

    Example:
        persipubsub restore config.json /backup/greetings.mdb --queue greetings
    """
    if not yes:
        call.ask(f"Replace all that is in the queue {key} by {source}?")
    _watched(control.restore, call, key, source)
    count = control.statistics(call.config, key)[key].messages
    return f"restored, with {text.count(count, 'message')}", {"messages": count}


@options.one_queue
@options.yes
def drop_queue(call: options.Call, key: str, yes: bool) -> options.Told:
    """
    Remove a queue from the disk, with all its messages.

    It fails while any process has the queue open. Only files of this library are removed. CONFIG is
    not changed: "init" creates the queue again.

    Example:
        persipubsub drop-queue config.json --queue greetings
    """
    if not yes:
        call.ask(f"Remove the queue {key} with all its messages from the disk?")
    others = control.drop_queue(call.config, key)
    stays = f"; its directory stays, with files of others: {', '.join(others[:5])}"
    return f"dropped{stays if others else ''}", {"others": others}


@options.one_queue
@click.option("--to",
              "target",
              required=True,
              metavar="PATH",
              help="Path of the stream: nats://host:4222,other/STREAM?replicas=3")
def migrate(call: options.Call, key: str, target: str) -> None:
    """
    Move the waiting messages of a queue to a stream of NATS JetStream, while both are in use.

    First restart the publishers with the stream, then run this, then restart the subscribers with
    the stream. It may be interrupted and repeated. The exit code is 1 if something is left; then
    run it again.

    Example:
        persipubsub migrate config.json --queue greetings --to nats://127.0.0.1:4222/greetings
    """
    counts = _watched(control.migrate, call, key, target)
    rows = [[name, f"{one.moved:,}", f"{one.left:,}"] for name, one in counts.items()]
    described = {name: one._asdict() for name, one in counts.items()}
    call.tell(*text.table([["SUBSCRIBER", "MOVED", "LEFT"], *rows]), **described)
    if left := sum(one.left for one in counts.values()):
        call.fail(f"{text.count(left, 'delivery')} left in {key}; run it again")
