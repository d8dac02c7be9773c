"""List messages that were given up, send them back, drop them: the command dead-letters."""

import base64
import json
import pathlib
import sys
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import click
import msgspec

import persipubsub.config
import persipubsub.control
from persipubsub.cli import _shared, _text
from persipubsub.maintenance import _dead_letters

_ACTIONS = ("list", "send-back", "drop")


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
        config: pathlib.Path, action: str, queue_key: Optional[str], numbers: Tuple[int, ...],
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
    if action == "list":
        if numbers:
            raise click.UsageError("Expected --number only with send-back and drop.")
        _list(config, keys, as_json)
        return
    if numbers and queue_key is None and len(keys) != 1:
        raise click.UsageError(
            "Expected --queue with --number, since numbers are those of a queue.")
    if action == "drop" and not yes:
        waiting = sum(
            len(found) for key in keys
            for found in persipubsub.control.dead_letters(config, key).values())
        _shared.ask("Drop {} of {}?".format(_text.count(len(numbers) or waiting, "dead letter"),
                                            ", ".join(keys)))
    work = (persipubsub.control.send_back
            if action == "send-back" else persipubsub.control.drop_dead_letters)
    _change(config, keys, numbers, work, "sent back" if action == "send-back" else "dropped",
            as_json)


def _list(config: pathlib.Path, keys: Sequence[str], as_json: bool) -> None:
    """
    List dead letters.

    :param config: path to the configuration file
    :param keys: of the queues
    :param as_json: True for JSON
    """
    rows = []  # type: List[List[str]]
    found = {}  # type: Dict[str, List[Dict[str, Any]]]
    for key in keys:
        found[key] = []
        for listed in persipubsub.control.dead_letters(config, key)[key]:
            letter = listed.letter
            fields = msgspec.to_builtins(letter)
            fields["data"] = base64.b64encode(letter.data).decode("ascii")
            found[key].append({"number": listed.number, "letter": fields})
            rows.append([
                key,
                str(listed.number), letter.queue, letter.subscriber,
                str(letter.number),
                str(letter.attempts),
                letter.moved_at.astimezone().strftime("%Y-%m-%d %H:%M:%S"),
                _text.show_bytes(len(letter.data)), letter.error
            ])
    if as_json:
        print(json.dumps(found, indent=2))
    elif rows:
        print(
            _text.table([
                "DEAD LETTERS", "NUMBER", "FROM QUEUE", "SUBSCRIBER", "ITS NUMBER", "ATTEMPTS",
                "MOVED", "SIZE", "ERROR"
            ], rows))
    else:
        print("There are no dead letters.")


def _change(  # pylint: disable=too-many-arguments,too-many-positional-arguments
        config: pathlib.Path, keys: Sequence[str], numbers: Tuple[int, ...],
        work: Callable[..., Tuple[int, ...]], done: str, as_json: bool) -> None:
    """
    Send dead letters back, or drop them.

    :param config: path to the configuration file
    :param keys: of the queues
    :param numbers: of those in the only queue; all of them if empty
    :param work: to be done with each queue
    :param done: what it does, in the past
    :param as_json: True for JSON
    """
    report = _shared.Report(as_json)
    missing = False

    def tell(key: str, changed: Tuple[int, ...]) -> None:
        nonlocal missing
        missing = missing or not set(numbers) <= set(changed)
        report.done(key, {"numbers": list(changed)},
                    "{}: {} {}".format(key, _text.count(len(changed), "dead letter"), done))

    try:
        report.each(keys, lambda key: work(config, key, numbers or None), tell)
    finally:
        if missing:
            _text.complain("not there, or in use: some of the numbers {}".format(", ".join(
                map(str, numbers))))
            sys.exit(1)
