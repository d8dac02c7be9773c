"""All commands by name, the help of all of them, and how a command ends."""

import collections
import importlib
import io
import os
import sys
from typing import Any, Final

import click

import persipubsub
from persipubsub.cli import text
from persipubsub.errors import PersipubsubError

#: Commands by the headings of the help. The module with the commands has the name of the heading,
#: and a function has the name of its command, with underscores.
_GROUPS: Final = {
    "Messages": ["send", "receive", "peek", "tail", "delete", "dead-letters"],
    "Look": ["stat", "check", "metrics"],
    "Maintain": [
        "pause", "resume", "seek", "prune", "clear", "verify", "compact", "backup", "restore",
        "drop-queue", "migrate"
    ],
    "Deploy": ["new", "init", "check-config", "add-subscriber", "remove-subscriber", "completion"]
}

_MODULES: Final = {name: heading.lower() for heading, names in _GROUPS.items() for name in names}


class _Commands(collections.UserDict[str, Any]):
    """
    Import a command from its module, which is stored here, when it is asked for.

    Importing all of them takes longer than most of them run. Rejected: a group whose
    ``get_command`` imports. click suggests names from this mapping when one is mistyped.
    """

    def __getitem__(self, name: str) -> Any:
        module = importlib.import_module(f"persipubsub.cli.{self.data[name]}")
        return getattr(module, name.replace("-", "_"))


class _Group(click.Group):
    """List the commands under their headings."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the headings, the names and what each command does."""
        for heading, names in _GROUPS.items():
            with formatter.section(heading):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(limit=200))
                                    for name in names])


@click.group(cls=_Group,
             commands=_Commands(_MODULES),
             context_settings={
                 "help_option_names": ["-h", "--help"],
                 "max_content_width": 100
             })
@click.version_option(persipubsub.__version__, prog_name="persipubsub")
def commands() -> None:
    """
    Deploy, watch and maintain the queues of a configuration file.

    For example: persipubsub stat config.json

    If PERSIPUBSUB_CONFIG names the file, it can be left out: persipubsub stat

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted by Ctrl-C. The command "check" has
    others: see its help.
    """


def main(arguments: list[str]) -> int:
    """
    Run a command, and turn whatever goes wrong into a line and an exit code.

    :param arguments: of the command line
    :return: exit code
    """
    if "_PERSIPUBSUB_COMPLETE" in os.environ:
        # A shell asks for completions; click answers and exits.
        commands.main(prog_name="persipubsub")
    # Monitoring takes 1 for a warning and 2 for an alarm.
    failed = 3 if arguments[:1] == ["check"] else 1
    if sys.stderr is None:
        # Closed: print would use the standard output instead.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    if sys.stdout is None:
        # Checked before anything is done: a message that was received would be lost.
        text.complain(f"Expected an open standard output, but got: it is closed. If you do not "
                      f"need the output, send it to {os.devnull}.")
        return failed
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal does not have is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # Not by commands.main: it exits with 1 for a closed pipe and for Ctrl-C.
        with commands.make_context("persipubsub", arguments) as context:
            code: int = commands.invoke(context) or 0
        sys.stdout.flush()
        return code
    except click.exceptions.Exit as stop:
        # Of --help and --version.
        return stop.exit_code
    except KeyboardInterrupt:
        text.complain("interrupted")
        return 130
    except click.UsageError as error:
        if error.ctx is not None:
            text.tell(f"{error.ctx.get_usage()}\nTry '{error.ctx.command_path} --help' for help.\n")
        # The message may contain keys of the file.
        text.tell(f"Error: {text.printable(error.format_message())}")
        failed = max(failed, error.exit_code)
    except (click.ClickException, PersipubsubError, ModuleNotFoundError) as error:
        text.complain(str(error))
    except OSError as error:
        text.silence(sys.stdout)
        if isinstance(error, BrokenPipeError):
            # The program that read our output has seen enough.
            return 0
        # Of a file that was named, or of an output that is full; those of queues are translated.
        text.complain(f"Expected to use {error.filename or 'the standard streams'}, but got: "
                      f"{error.strerror or error}")
    return failed
