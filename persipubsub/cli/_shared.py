"""Share between the commands: options, which queues they are about, what they report of each."""

import dataclasses
import inspect
import json
import math
import pathlib
import re
import sys
import threading
import types
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

import persipubsub.config
import persipubsub.errors
from persipubsub._progress import Progress
from persipubsub.cli import _text

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

ResultT = TypeVar("ResultT")


class _Command(click.Command):
    """Show the examples of a command as they are written, instead of filling their lines."""

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """
        Write the text of the help.

        :param ctx: of the command
        :param formatter: to be written to
        """
        # The mark of click for a paragraph that is not to be filled.
        self.help = re.sub(r"\n\n(?=Examples?:\n)", "\n\n\b\n", inspect.cleandoc(self.help or ""))
        super().format_help_text(ctx, formatter)

    def get_short_help_str(self, limit: int = 45) -> str:
        """
        Describe the command in the list of all commands.

        :param limit: would cut the sentence, and is ignored
        :return: its first sentence
        """
        del limit
        paragraph = " ".join(inspect.cleandoc(self.help or "").partition("\n\n")[0].split())
        return f"{paragraph.partition('. ')[0].rstrip('.')}."


def command(name: str | None = None) -> Callable[[Callable[..., None]], click.Command]:
    """
    Make a function a command.

    :param name: of the command; that of the function if not given
    :return: decorator
    """
    return click.command(name, cls=_Command)


def config_argument(function: CommandT) -> CommandT:
    """
    Let a command take the configuration file.

    :param function: of the command
    :return: decorated function
    """
    return click.argument("config", type=click.Path(path_type=pathlib.Path))(function)


def queue_option(text: str) -> Callable[[CommandT], CommandT]:
    """
    Let a command take the key of a queue.

    :param text: what it means to the command
    :return: decorator
    """
    return click.option("--queue", "queue_key", metavar="KEY", help=text)


def json_option(function: CommandT) -> CommandT:
    """
    Let a command write JSON.

    :param function: of the command
    :return: decorated function
    """
    return click.option("--json", "as_json", is_flag=True,
                        help="Write JSON, for machines.")(function)


def yes_option(function: CommandT) -> CommandT:
    """
    Let a command be told not to ask.

    :param function: of the command
    :return: decorated function
    """
    return click.option("--yes", is_flag=True, help="Do not ask.")(function)


def ask(text: str) -> None:
    """
    Ask whether to go on; end the command unless the answer is yes.

    A closed input answers no, and so does who can not be asked. Ctrl-C interrupts the command.

    :param text: of the question
    """
    if sys.stdin is None:
        raise click.Abort()
    try:
        click.confirm(_text.printable(text), abort=True, err=True)
        # It ignores that the question could not be written.
        sys.stderr.flush()
    except click.Abort as error:
        # What click makes of Ctrl-C is no answer.
        if isinstance(error.__context__, KeyboardInterrupt):
            _text.tell("")
            raise KeyboardInterrupt from None
        raise
    except OSError:
        _text.silence(sys.stderr)
        raise click.Abort() from None


class Seconds(click.FloatRange):
    """Take a time, which "nan" is not, although it is a number for Python."""

    def convert(self, value: Any, param: click.Parameter | None,
                ctx: click.Context | None) -> float:
        """
        Convert what was given on the command line.

        :param value: that was given
        :param param: that it was given for
        :param ctx: of the command
        :return: time in seconds
        """
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a time.", param, ctx)
        return seconds


def select(config_pth: pathlib.Path, queue_key: str | None) -> list[str]:
    """
    List the queues that a command is about.

    :param config_pth: path to the configuration file
    :param queue_key: that was given; None for all
    :return: keys of the queues
    """
    return choose(persipubsub.config.read(config_pth), config_pth, queue_key)


def choose(config: persipubsub.config.Config, config_pth: pathlib.Path,
           queue_key: str | None) -> list[str]:
    """
    List the queues of a file that was read.

    :param config: that was read
    :param config_pth: path to the file, as it was given
    :param queue_key: that was given; None for all
    :return: keys of the queues
    """
    queues = config.queues
    if queue_key is None:
        return list(queues)
    if queue_key not in queues:
        raise click.BadParameter("{!r} is not a queue of {}. There {}.".format(
            queue_key, config_pth, "is none" if not queues else f"are: {', '.join(queues)}"),
                                 param_hint="--queue")
    return [queue_key]


def select_one(config_pth: pathlib.Path, queue_key: str | None) -> str:
    """
    Choose the queue that a command is about.

    :param config_pth: path to the configuration file
    :param queue_key: that was given; None if the file has only one
    :return: key of the queue
    """
    keys = select(config_pth, queue_key)
    if len(keys) != 1:
        raise click.UsageError("Expected --queue, since {} has {} queues{}.".format(
            config_pth, len(keys), f": {', '.join(keys)}" if keys else ""))
    return keys[0]


class Report:
    """
    Tell what came of each queue, and go on with the next one when one fails.

    >>> report = Report(as_json=True)
    >>> report.done("queue", {"dropped": 3}, "queue: 3 dropped")
    >>> report.exit_code
    0
    """

    def __init__(self, as_json: bool) -> None:
        """
        Initialize without a result.

        :param as_json: True to write one JSON object at the end, False for a line each
        """
        self.as_json = as_json
        self._results: dict[str, Any] = {}
        self.exit_code = 0

    def done(self, key: str, result: Any, line: str | None = None) -> None:
        """
        Tell what came of a queue.

        :param key: of the queue
        :param result: for machines
        :param line: for people; None if they are told otherwise
        """
        self._results[key] = result
        if line is not None and not self.as_json:
            print(_text.printable(line), flush=True)

    def failed(self, key: str, error: persipubsub.errors.PersipubsubError) -> None:
        """
        Tell that a queue failed.

        :param key: of the queue
        :param error: why
        """
        self._results[key] = {"error": str(error)}
        self.exit_code = 1
        _text.complain(str(error))

    def finish(self) -> None:
        """Write what machines wait for, and end with the exit code."""
        if self.as_json:
            print(json.dumps(self._results, indent=2, default=to_json), flush=True)
        sys.exit(self.exit_code)

    def each(self, keys: Iterable[str], work: Callable[[str], ResultT],
             tell: Callable[[str, ResultT], None]) -> None:
        """
        Do something with each queue, and finish.

        A ``ConfigError`` ends nothing, either: of a file that was read, it is about one queue.

        :param keys: of the queues
        :param work: to be done, given the key
        :param tell: calls :py:meth:`done`, given the key and what came of the work
        """
        for key in keys:
            try:
                result = work(key)
            except persipubsub.errors.PersipubsubError as error:
                self.failed(key, error)
            else:
                tell(key, result)
        self.finish()


def to_json(value: object) -> Any:
    """
    Turn an object of the library into what JSON has.

    :param value: that JSON does not know
    :return: that it knows
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, types.MappingProxyType):
        return dict(value)
    raise TypeError(f"Expected something for JSON, but got: {value!r}")


def with_progress(title: str, work: Callable[[Progress], ResultT]) -> ResultT:
    """
    Do something that takes long, and show how far it has come if somebody may look at it.

    :param title: of what is done
    :param work: to be done in this thread, so that Ctrl-C reaches it
    :return: what the work returned
    """
    progress = Progress()
    if not sys.stderr.isatty():
        return work(progress)

    import rich.console  # pylint: disable=import-outside-toplevel
    import rich.progress  # pylint: disable=import-outside-toplevel

    drawing = rich.progress.Progress(rich.progress.TextColumn("{task.description}", markup=False),
                                     rich.progress.BarColumn(),
                                     rich.progress.TaskProgressColumn(),
                                     console=rich.console.Console(stderr=True),
                                     transient=True)
    task = drawing.add_task(_text.printable(title), total=1.0)
    is_done = threading.Event()

    def draw() -> None:
        while not is_done.wait(timeout=0.1):
            drawing.update(task,
                           completed=progress.share(),
                           description=_text.printable(f"{title} ({progress.what or 'copy'})"))

    with drawing:
        drawer = threading.Thread(target=draw, name="persipubsub-progress", daemon=True)
        drawer.start()
        try:
            return work(progress)
        finally:
            is_done.set()
            drawer.join()
