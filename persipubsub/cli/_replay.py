"""Let a subscriber go on from another place: the command ``seek``."""

import datetime
import json
import pathlib
from typing import Any

import click

import persipubsub.config
import persipubsub.control
from persipubsub.cli import _shared, _text


def _place(ctx: click.Context, param: click.Parameter, value: str) -> Any:
    """
    Convert a place that was given on the command line.

    :param ctx: of the command
    :param param: that it was given for
    :param value: that was given
    :return: place, as :py:func:`persipubsub.control.seek` takes it
    """
    if value in ("beginning", "end"):
        return value
    try:
        if value.isascii() and value.isdigit():
            return int(value)
        if value.startswith("@"):
            return datetime.datetime.fromtimestamp(float(value[1:]), datetime.UTC)
        # Without a time zone it is a time on the clock of whoever types it.
        return datetime.datetime.fromisoformat(value).astimezone()
    except (ValueError, OverflowError, OSError):
        raise click.BadParameter(
            f"Expected 'beginning', 'end', a number, a time (2026-11-24T18:30:00), or @ and "
            f"seconds since 1970, but got: {value!r}",
            ctx=ctx,
            param=param) from None


@_shared.command()
@_shared.config_argument
@click.argument("subscriber")
@click.option("--to",
              "place",
              callback=_place,
              metavar="PLACE",
              required=True,
              help="'beginning', 'end', the number of a message, or a time: 2026-11-24T18:30:00 "
              "(local, unless it ends with a zone such as +01:00), or @ and seconds since 1970.")
@_shared.queue_option("Which queue; that of the subscriber's entry if not given.")
@_shared.json_option
def seek(config: pathlib.Path, subscriber: str, place: Any, queue_key: str | None,
         as_json: bool) -> None:
    """
    Let SUBSCRIBER go on from another place of its queue, also while it is at work.

    What it acknowledged from there on is delivered again, as far as the queue still has it; see
    retain_secs. What it passes unread counts as skipped.

    Examples:
        persipubsub seek config.json archive --to beginning
        persipubsub seek config.json archive --to 2026-11-24T18:30:00
    """
    key = queue_key
    if key is None:
        key = persipubsub.config.read(config).subscriber(subscriber).in_queue
    _shared.select_one(config, key)
    position = persipubsub.control.seek(config, subscriber, to=place, queue_key=key)
    lag = {
        one.subscriber: one.lag
        for one in persipubsub.control.statistics(config, key)[key].subscribers
    }.get(subscriber, 0)
    if as_json:
        print(json.dumps({
            "queue": key,
            "subscriber": subscriber,
            "position": position,
            "lag": lag
        }))
    else:
        print(
            _text.printable(f"{key}: {subscriber} goes on from number {position}, with "
                            f"{_text.count(lag, 'message')} to receive"))
