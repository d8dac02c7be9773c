"""List messages that were given up, send them back, drop them: the command dead-letters."""

import base64
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click
import msgspec

import persipubsub.config
import persipubsub.control
import persipubsub.errors
from persipubsub.cli import _shared, _text
from persipubsub.maintenance import _dead_letters

_ACTIONS = ("list", "send-back", "drop")

_Found = dict[str, tuple[persipubsub.control.ListedDeadLetter, ...]]


@_shared.command("dead-letters")
@_shared.config_argument
@click.argument("action", type=click.Choice(_ACTIONS), default="list")
@_shared.queue_option("Queue of dead letters; all of them if not given.")
@click.option("--number",
              "numbers",
              type=click.IntRange(min=1),
              multiple=True,
              metavar="NUMBER",
              help="Send back or drop only this one; may be repeated.")
@_shared.yes_option
@_shared.json_option
def dead_letters(  # pylint: disable=too-many-arguments,too-many-positional-arguments
        config: pathlib.Path, action: str, queue_key: str | None, numbers: tuple[int, ...],
        yes: bool, as_json: bool) -> None:
    """
    List messages that were given up, send them back to their subscriber, or drop them.

    They are those that a subscriber with max_deliveries and a dead_letter_queue failed to work on.
    The exit code is 1 if one of the numbers is not there, or just in use.

    Examples:
        persipubsub dead-letters config.json
        persipubsub dead-letters config.json send-back --queue letters --number 7 --number 9
        persipubsub dead-letters config.json drop --queue letters --yes
    """
    keys = _shared.select(config, queue_key)
    if queue_key is None:
        keys = _dead_letters.queues_of(persipubsub.config.read(config))
    report = _shared.Report(as_json)
    if action == "list":
        if numbers:
            raise click.UsageError("Expected --number only with send-back and drop.")
        _list(config, keys, report)
        return
    if numbers and queue_key is None and len(keys) != 1:
        raise click.UsageError(
            "Expected --queue with --number, since numbers are those of a queue.")
    if action == "drop" and not yes:
        # Nobody can agree to what could not be counted.
        found = _look(config, keys, report)
        keys = list(found)
        if keys:
            waiting = sum(map(len, found.values()))
            _shared.ask(
                f"Drop {_text.count(len(numbers) or waiting, 'dead letter')} of {', '.join(keys)}?")
    work = (persipubsub.control.send_back
            if action == "send-back" else persipubsub.control.drop_dead_letters)
    _change(config, keys, numbers, work, "sent back" if action == "send-back" else "dropped",
            report)


def _look(config: pathlib.Path, keys: Sequence[str], report: _shared.Report) -> _Found:
    """
    Look at dead letters, and tell which queues can not be looked at.

    :param config: path to the configuration file
    :param keys: of the queues
    :param report: to be told
    :return: letters, by queue; without those that failed
    """
    found: _Found = {}
    for key in keys:
        try:
            found[key] = persipubsub.control.dead_letters(config, key)[key]
        except persipubsub.errors.PersipubsubError as error:
            report.failed(key, error)
    return found


def _list(config: pathlib.Path, keys: Sequence[str], report: _shared.Report) -> None:
    """
    List dead letters.

    :param config: path to the configuration file
    :param keys: of the queues
    :param report: of all queues
    """
    rows: list[list[str]] = []
    for key, letters in _look(config, keys, report).items():
        described: list[dict[str, Any]] = []
        for listed in letters:
            letter = listed.letter
            fields = msgspec.to_builtins(letter)
            fields["data"] = base64.b64encode(letter.data).decode("ascii")
            described.append({"number": listed.number, "letter": fields})
            rows.append([
                key,
                str(listed.number), letter.queue, letter.subscriber,
                str(letter.number),
                str(letter.attempts),
                letter.moved_at.astimezone().strftime("%Y-%m-%d %H:%M:%S"),
                _text.show_bytes(len(letter.data)), letter.error
            ])
        report.done(key, described)
    if not report.as_json:
        if rows:
            print(
                _text.table([
                    "DEAD LETTERS", "NUMBER", "FROM QUEUE", "SUBSCRIBER", "ITS NUMBER", "ATTEMPTS",
                    "MOVED", "SIZE", "ERROR"
                ], rows))
        elif report.exit_code == 0:
            print("There are no dead letters.")
    report.finish()


def _change(  # pylint: disable=too-many-arguments,too-many-positional-arguments
        config: pathlib.Path, keys: Sequence[str], numbers: tuple[int, ...],
        work: Callable[..., tuple[int, ...]], done: str, report: _shared.Report) -> None:
    """
    Send dead letters back, or drop them.

    :param config: path to the configuration file
    :param keys: of the queues
    :param numbers: of those in the only queue; all of them if empty
    :param work: to be done with each queue
    :param done: what it does, in the past
    :param report: of all queues, also of those that failed before
    """
    missing = False

    def tell(key: str, changed: tuple[int, ...]) -> None:
        nonlocal missing
        missing = missing or not set(numbers) <= set(changed)
        report.done(key, {"numbers": list(changed)},
                    f"{key}: {_text.count(len(changed), 'dead letter')} {done}")

    try:
        report.each(keys, lambda key: work(config, key, numbers or None), tell)
    finally:
        if missing:
            _text.complain(
                f"not there, or in use: some of the numbers {', '.join(map(str, numbers))}")
            sys.exit(1)
