"""
Show what is in queues: the command ``stat``.

``_plain.py`` beside it runs its plainest forms without loading this. What is printed is in
``_figures.py``, for both.
"""

import os
import pathlib
import sys
import time
from typing import Final

import click

import persipubsub.config
from persipubsub.cli import _figures, _shared

#: Values of TERM for terminals that can not be drawn over, as rich has them: it shows nothing there
#: until the last look.
_DUMB: Final = ("dumb", "unknown")


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
              help="Also write the last view as a picture; not with --json.")
def stat(  # pylint: disable=too-many-arguments,too-many-positional-arguments
        config: pathlib.Path, queue_key: str | None, as_json: bool, watch: bool, interval: float,
        count: int, svg: pathlib.Path | None) -> None:
    """
    Show what is in the queues of CONFIG, and how far their subscribers are.

    It is cheap, whatever waits, and holds up nobody. With --watch it shows rates, too. With --watch
    and --json it writes a line of JSON for each look.

    Examples:
        persipubsub stat config.json
        persipubsub stat config.json --json | jq '.greetings.subscribers[].lag'
        persipubsub stat config.json --watch
    """
    if as_json and svg is not None:
        raise click.UsageError("Expected --svg without --json, which draws nothing.")
    found = persipubsub.config.read(config)
    keys = _shared.choose(found, config, queue_key)
    is_dumb = os.environ.get("TERM", "").lower() in _DUMB
    is_drawn = not as_json and (svg is not None or (sys.stdout.isatty() and not is_dumb))
    if is_drawn:
        from persipubsub.cli import _view  # pylint: disable=import-outside-toplevel
        failed = _view.show(lambda: _figures.collect(persipubsub.config.read(config), keys),
                            interval=interval,
                            looks=count if watch else 1,
                            svg=svg)
    else:
        looks = 0
        while True:
            failed = not _figures.tell(found, keys, as_json, is_stream=watch)
            looks += 1
            if not watch or looks == count:
                break
            time.sleep(interval)
            found = persipubsub.config.read(config)
    if failed:
        sys.exit(1)
