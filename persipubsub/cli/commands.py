"""
Steer queues from the command line.

A thin face of :py:mod:`persipubsub.control`: each command of it is a function there. It needs the
extra ``cli``.
"""

import gc
import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, cast

import click

import persipubsub
from persipubsub.cli import _ending, _text

__all__ = ["commands", "main"]

#: Modules by the name of the command, in the order of the reference. Its function has the same
#: name, with underscores.
_MODULES: Final[dict[str, str]] = {
    "init": "_queues",
    "check-config": "_queues",
    "stat": "_stat",
    "peek": "_messages",
    "tail": "_messages",
    "send": "_messages",
    "receive": "_messages",
    "dead-letters": "_dead_letters",
    "seek": "_replay",
    "prune": "_queues",
    "clear": "_queues",
    "verify": "_maintenance",
    "compact": "_maintenance",
    "backup": "_maintenance",
    "restore": "_maintenance",
    "add-subscriber": "_maintenance",
    "remove-subscriber": "_maintenance",
    "drop-queue": "_maintenance",
    "migrate": "_migrate",
    "metrics": "_queues",
}


class _Commands(Mapping[str, click.Command]):
    """
    Import a command when it is asked for: to load all of them takes longer than most of them run.

    A group whose ``get_command`` imports was rejected: click takes the names that it proposes for
    a mistyped one from here.
    """

    def __getitem__(self, name: str) -> click.Command:
        module = importlib.import_module(f"persipubsub.cli.{_MODULES[name]}")
        if not gc.isenabled():
            # By who started us. What is loaded stays: the first collection would look at all of it,
            # since none was made yet.
            gc.freeze()
            gc.enable()
        return cast(click.Command, getattr(module, name.replace("-", "_")))

    def __iter__(self) -> Iterator[str]:
        return iter(_MODULES)

    def __len__(self) -> int:
        return len(_MODULES)


@click.group(commands=_Commands(),
             context_settings={
                 "help_option_names": ["-h", "--help"],
                 "max_content_width": 100
             })
@click.version_option(persipubsub.__version__, prog_name="persipubsub")
def commands() -> None:
    """
    Deploy, watch and maintain the queues of a configuration file.

    For example: persipubsub stat config.json

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted by Ctrl-C.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run a command, and turn whatever goes wrong into a line and an exit code.

    :param arguments: of the command line; those of the process if not given
    :return: exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted
    """
    if "_PERSIPUBSUB_COMPLETE" in os.environ:
        # A shell asks for completions; click answers and exits.
        commands.main(prog_name="persipubsub")
    return _ending.exit_code_of(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    """
    Run a command, and turn what click says of it into a line and an exit code.

    ``click.Command.main`` was rejected: it exits with 1 for a closed pipe and for Ctrl-C.

    :param arguments: of the command line
    :return: exit code
    """
    code = 1
    try:
        with commands.make_context("persipubsub", list(arguments)) as context:
            commands.invoke(context)
        code = 0
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    except click.Abort:
        _text.tell("")
        _text.complain("nothing was done")
    except click.UsageError as error:
        code = error.exit_code
        try:
            error.show()
        except OSError:
            _text.silence(sys.stderr)
    except click.ClickException as error:
        _text.complain(error.format_message())
    return code
