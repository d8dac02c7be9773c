"""Move a queue to servers: the command for the day on which one machine is not enough."""

import json
import pathlib
import sys

import click

import persipubsub.control
from persipubsub.cli import _shared, _text


@_shared.command()
@_shared.config_argument
@_shared.queue_option("Move this queue.")
@click.option("--to",
              "target",
              required=True,
              metavar="PATH",
              help="Where it is to be: nats://host:4222,other/STREAM?replicas=3")
@_shared.json_option
def migrate(config: pathlib.Path, queue_key: str | None, target: str, as_json: bool) -> None:
    """
    Move what waits in a queue of CONFIG to a stream of NATS JetStream, while both are in use.

    Let publishers use the stream first, then run this, then let subscribers use the stream. It may
    be interrupted and repeated. The exit code is 1 if something is left; then run it again.

    Example:
        persipubsub migrate config.json --queue greetings --to nats://127.0.0.1:4222/greetings
    """
    key = _shared.select_one(config, queue_key)
    counts = _shared.with_progress(
        key, lambda progress: persipubsub.control.migrate(config, key, target, progress))
    left = sum(one.left for one in counts.values())
    if as_json:
        print(json.dumps({name: one._asdict() for name, one in counts.items()}, indent=2))
    else:
        print(
            _text.table(["SUBSCRIBER", "MOVED", "LEFT"], [[name, f"{one.moved:,}", f"{one.left:,}"]
                                                          for name, one in counts.items()]))
    if left:
        _text.complain(f"{_text.count(left, 'delivery')} left in {key}; run it again")
        sys.exit(1)
