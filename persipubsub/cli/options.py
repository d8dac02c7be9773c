"""What the commands share: their options, and the call that the command line makes of them."""

import contextlib
import functools
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias

import click
import msgspec

from persipubsub import config as configuration
from persipubsub.cli import text
from persipubsub.errors import PersipubsubError

#: The environment variable that names the configuration file.
CONFIG_VARIABLE: Final = "PERSIPUBSUB_CONFIG"

#: What came of a command with a queue: a line for people, and something for machines.
Told: TypeAlias = tuple[str, Any]


class Call:
    """What a command is asked to do: with which file and queue, for people or for machines."""

    def __init__(self, path: pathlib.Path, queue_key: str | None, as_json: bool) -> None:
        """Initialize without reading the file."""
        self.path = path
        self.queue_key = queue_key
        self.as_json = as_json
        self.exit_code = 0

    @functools.cached_property
    def config(self) -> configuration.Config:
        """Read the configuration file, once."""
        return configuration.read(self.path)

    def keys(self) -> list[str]:
        """List the keys of the queues that the command is about."""
        queues = self.config.queues
        if self.queue_key is None:
            return list(queues)
        if self.queue_key not in queues:
            raise click.BadParameter(
                f"Expected a queue of {self.path} ({', '.join(queues) or 'there is none'}), but "
                f"got: {self.queue_key!r}.",
                param_hint="--queue")
        return [self.queue_key]

    def key(self) -> str:
        """Return the key of the only queue that the command can be about."""
        keys = self.keys()
        if len(keys) != 1:
            raise click.UsageError(f"Expected --queue, since {self.path} has {len(keys)} queues: "
                                   f"{', '.join(keys)}.")
        return keys[0]

    def tell(self, *lines: str, **described: object) -> None:
        """Tell what came of the command: lines for people, or JSON for machines."""
        if self.as_json:
            print(to_json(described), flush=True)
        elif lines:
            print("\n".join(map(text.printable, lines)), flush=True)

    def fail(self, line: str) -> None:
        """Complain, and let the command end with exit code 1."""
        self.exit_code = 1
        text.complain(line)

    def each(self, keys: Sequence[str], work: Callable[[str], Told]) -> None:
        """
        Do something with each queue, and tell what came of it.

        One queue that fails does not stop the others. This holds for ``ConfigError`` too: the file
        was read before, so the error is about one queue.

        :param keys: of the queues
        :param work: to be done with a queue
        """
        results: dict[str, object] = {}
        for key in keys:
            try:
                line, results[key] = work(key)
                if line and not self.as_json:
                    self.tell(f"{key}: {line}")
            except PersipubsubError as error:
                results[key] = {"error": str(error)}
                self.fail(str(error))
        if self.as_json:
            print(to_json(results, indent=2), flush=True)

    @staticmethod
    def ask(question: str) -> None:
        """
        Ask before something that cannot be undone, on the standard error.

        :raise ClickException: if the answer is no, or nobody could be asked
        """
        # Rejected: click.confirm. It takes Ctrl-C for an answer, and does not notice that the
        # question could not be written.
        answer = ""
        with contextlib.suppress(OSError, ValueError):
            print(text.printable(f"{question} [y/N]: "), end="", file=sys.stderr, flush=True)
            answer = sys.stdin.readline() if sys.stdin is not None else ""
        if answer.strip().lower() not in ("y", "yes"):
            text.tell("")
            raise click.ClickException("nothing was done")


def to_json(value: object, indent: int | None = None) -> str:
    """Write JSON; times and bytes become text."""
    return json.dumps(msgspec.to_builtins(value), indent=indent)


class Plain(click.Command):
    """A command whose examples are shown as they are written."""

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Mark the examples so that click does not fill their lines."""
        self.help = re.sub(r"\n\n( *)(?=Examples?:\n)", "\n\n\\1\b\n\\1", self.help or "")
        super().format_help_text(ctx, formatter)


class _ConfigPath(click.Path):
    """The path of the configuration file."""

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
        """Tell how to name it."""
        return f"Name the file as the first argument, with --config, or in {CONFIG_VARIABLE}."


class Command(Plain):
    """A command that takes the configuration file as its first argument, or from elsewhere."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the configuration file in front of the arguments if it is named elsewhere."""
        names: list[click.Parameter] = [one for one in self.params if isinstance(one, click.Option)]
        found, words, _ = click.Command(None, params=names).make_parser(ctx).parse_args([*args])
        path = found.get("other_config")
        if path is None:
            arguments = [one for one in self.params if isinstance(one, click.Argument)][1:]
            is_named = len(words) > len(arguments)
            # The number of arguments tells nothing if some can be left out, or are not typed yet
            # (completion).
            if ctx.resilient_parsing or not all(one.required for one in arguments):
                is_named = any(map(os.path.isfile, words[:1]))
            path = None if is_named else os.environ.get(CONFIG_VARIABLE)
        return super().parse_args(ctx, [path, *args] if path else args)


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete keys of the configuration file: its publishers, subscribers or queues."""
    found: Iterable[str] = ()
    with contextlib.suppress(PersipubsubError):
        if path := ctx.params.get("config") or os.environ.get(CONFIG_VARIABLE):
            found = getattr(configuration.read(path), f"{param.name}s")
    # A name with an end of a line would be two names for the shell.
    return [one for one in found if one.startswith(incomplete) and one.isprintable()]


def command(about_queue: str, scope: str = "file") -> Callable[[Callable[..., Any]], click.Command]:
    """
    Make a function a command, with the arguments and options that all commands have.

    The function takes a :py:class:`Call` and its own parameters. For other scopes the function gets
    (call, key, own parameters), and its result is printed.

    :param about_queue: help of --queue
    :param scope: "file": the function looks for queues itself; "each": call it for each queue;
        "one": for the only queue; "subscriber": for the queue of its parameter "subscriber"
    :return: decorator
    """
    path_type = _ConfigPath(path_type=pathlib.Path)
    where = f"Use this file instead of CONFIG and {CONFIG_VARIABLE}."
    common: list[click.Parameter] = [
        click.Option(["--queue"], metavar="KEY", help=about_queue, shell_complete=_complete),
        click.Option(["--json", "as_json"], is_flag=True, help="Write JSON, for machines."),
        # Not for the function: Command puts its value in the place of CONFIG.
        click.Option(["--config", "other_config"], type=path_type, help=where, expose_value=False)
    ]

    def decorate(function: Callable[..., Any]) -> click.Command:

        def callback(config: pathlib.Path, queue: str | None, as_json: bool, **others: Any) -> int:
            call = Call(config, queue, as_json)
            if scope == "file":
                function(call, **others)
            elif scope == "each":
                call.each(call.keys(), functools.partial(function, call))
            else:
                if scope == "one" or queue is not None:
                    key = call.key()
                else:
                    key = call.config.subscriber(others["subscriber"]).in_queue
                if told := function(call, key, **others):
                    call.tell(f"{key}: {told[0]}", queue=key, **told[1])
            return call.exit_code

        own = reversed(getattr(function, "__click_params__", []))
        params = [click.Argument(["config"], type=path_type), *own, *common]
        name = function.__name__.replace("_", "-")
        return Command(name, callback=callback, params=params, help=function.__doc__)

    return decorate


each_queue = functools.partial(command, scope="each")
one_queue = command("Which queue; needed if CONFIG has several.", "one")
one_subscriber = command("Queue of the subscriber, if CONFIG has no entry for it.", "subscriber")

#: Arguments of the commands that are about one publisher, or one subscriber.
publisher = click.argument("publisher", shell_complete=_complete)
subscriber = click.argument("subscriber", shell_complete=_complete)

#: The option of the commands that ask.
yes = click.option("--yes", is_flag=True, help="Do not ask.")


def option(names: str, kind: Any, default: Any, description: str,
           **others: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command take an option with a default that the help shows."""
    more = {"type": kind, "default": default, "show_default": True, "help": description}
    return click.option(*names.split(), **{**more, **others})


def seconds(value: str) -> float:
    """Convert a time that was typed to seconds; the type of an option."""
    with contextlib.suppress(ValueError):
        return text.parse_seconds(value)
    raise click.BadParameter(f"Expected a time such as 30, 10m, 1h30m or inf, but got: {value!r}")
