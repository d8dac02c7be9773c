"""
Run ``stat`` in its plain forms without loading click.

It is a shortcut and no second definition of the command line: these forms are recognised as a
whole, and everything else is left to click, errors of usage included.
"""

import os
import sys
from collections.abc import Sequence

# Of the 56 ms that these forms took beyond the start of Python (10^6 messages, 100 subscribers;
# "docs/performance.rst" has the machine), click and what is defined with it took 10.
#
# To read all options without click was rejected: there would be two command lines, which differ in
# the end. argparse knows these forms, too, and takes 4 ms.


def run(arguments: Sequence[str]) -> int | None:
    """
    Run the command if it is ``stat`` in a plain form, and nothing is to be drawn.

    :param arguments: of the command line
    :return: exit code; None if the command is left to click, and nothing was done or printed
    """
    recognised = _recognise(arguments)
    if recognised is None or "_PERSIPUBSUB_COMPLETE" in os.environ:
        return None

    config, queue_key, as_json = recognised
    if sys.stdout is None or (not as_json and sys.stdout.isatty()):
        # Closed, or a terminal, for which it is drawn.
        return None

    if not os.access(config, os.R_OK):
        # Click has words of its own for a file that may not be read.
        return None

    from persipubsub.cli import _ending  # pylint: disable=import-outside-toplevel
    return _ending.exit_code_of(lambda: _stat(config, queue_key, as_json))


def _recognise(arguments: Sequence[str]) -> tuple[str, str | None, bool] | None:
    """
    Recognise ``stat CONFIG [--queue KEY | --queue=KEY] [--json]``, in this order.

    :param arguments: of the command line
    :return: path to the configuration file, key of the queue, True for JSON; None for all else
    """
    if len(arguments) < 2 or arguments[0] != "stat":
        return None

    config, *options = arguments[1:]
    queue_key: str | None = None
    as_json = options[-1:] == ["--json"]
    if as_json:
        options.pop()
    if len(options) == 1 and options[0].startswith("--queue="):
        queue_key = options[0].partition("=")[2]
    elif len(options) == 2 and options[0] == "--queue":
        queue_key = options[1]
    elif options:
        return None

    if config.startswith("-") or (queue_key or "").startswith("-"):
        # An option, or what click takes for one.
        return None
    return config, queue_key, as_json


def _stat(config_pth: str, queue_key: str | None, as_json: bool) -> int | None:
    """
    Print what is in queues.

    :param config_pth: path to the configuration file
    :param queue_key: of the queue to look at; None for all
    :param as_json: True for JSON
    :return: exit code; None if there is no such queue, of which click tells: it reads the file
        again, which is never a pipe
    """
    # pylint: disable=import-outside-toplevel
    # Whoever calls another command loads nothing in vain.
    import pathlib

    import persipubsub.config
    from persipubsub.cli import _figures

    found = persipubsub.config.read(pathlib.Path(config_pth))
    if queue_key is not None and queue_key not in found.queues:
        return None
    keys = list(found.queues) if queue_key is None else [queue_key]
    return 0 if _figures.tell(found, keys, as_json) else 1
