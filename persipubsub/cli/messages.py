"""Send, receive, look at and delete messages; look after those that were given up."""

import base64
import datetime
import os
import pathlib
import select
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import click
import msgspec.structs

from persipubsub import control, errors, letters
from persipubsub.cli import options, text
from persipubsub.config import Subscriber, check_identifier
from persipubsub.lmdb_engine import files
from persipubsub.message import Message, Peeked
from persipubsub.publisher import Pub
from persipubsub.subscriber import Sub

#: Largest part of a stream of lines that is read at once, and sent in one commit, in bytes.
_CHUNK_BYTES: Final = 1 << 16

_DIRECTORY: Final = click.Path(path_type=pathlib.Path, file_okay=False, exists=True)

#: How to show a message in one line.
_FORMATS: Final[Mapping[str, Callable[[bytes], str]]] = {
    "text": lambda content: text.printable(content.decode("utf-8", "backslashreplace")),
    "hex": bytes.hex,
    "base64": lambda content: base64.b64encode(content).decode("ascii")
}


def _format_option(*more: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the option --format to a command."""
    kinds = click.Choice([*_FORMATS, *more])
    return options.option("--format style", kinds, "text", "How to write messages.")


def _look_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options for messages that are only looked at."""
    function = click.option("--age", is_flag=True, help="Show ages instead of times.")(function)
    function = click.option("--utc", is_flag=True, help="Show times in UTC.")(function)
    return _format_option()(function)


def _print_look(call: options.Call, message: Peeked, style: str, utc: bool, age: bool) -> None:
    """Print a message that was looked at: number, time, content."""
    described = msgspec.to_builtins(message)
    described["base64"] = described.pop("content")
    shown = text.show_seconds(message.age_seconds) if age else _time_of(message.age_seconds, utc)
    content = "(damaged)" if message.content is None else _FORMATS[style](message.content)
    call.tell(f"{message.number:>10}  {shown:>{9 if age else 12}}  {content}", **described)


def _time_of(age_seconds: float, utc: bool) -> str:
    """Show when a message was sent: the time of the day, with the date unless it is today."""
    now = datetime.datetime.now(datetime.UTC if utc else None).replace(tzinfo=None)
    moment = (now - datetime.timedelta(seconds=age_seconds)).isoformat(" ", "milliseconds")
    return moment.removeprefix(f"{now:%Y-%m-%d} ") + "Z" * utc


@options.one_subscriber
@options.subscriber
@options.option("--number", click.IntRange(1), 10, "How many messages at most.")
@options.option("--from start", click.IntRange(0), 0, "Begin at the message with this number.")
@_look_options
def peek(call: options.Call, key: str, subscriber: str, number: int, start: int,
         **looks: Any) -> None:
    """
    Look at the next messages of SUBSCRIBER without taking them.

    It prints number, time and content of each. Messages that are being received right now are
    shown, too. Control characters are escaped.

    Examples:
        persipubsub peek config.json sub --number 3
        persipubsub peek config.json sub --from 4711 --number 1 --format hex
    """
    for message in control.peek(call.config, subscriber, number, start, key):
        _print_look(call, message, **looks)


@options.one_queue
@options.option("--number", click.IntRange(0), 0, "Begin with so many of the newest messages.")
@_look_options
def tail(call: options.Call, key: str, number: int, **looks: Any) -> None:
    """
    Follow what is sent to a queue, until Ctrl-C. It takes nothing.

    It prints number, time and content of each message. A message that all its subscribers
    acknowledged at once may be deleted before it is seen; this is noted on stderr.

    Example:
        persipubsub tail config.json --queue greetings --number 10
    """
    expected = 0
    poll = select.poll()
    poll.register(sys.stdout, 0)
    for messages in control.follow(call.config, key, last=number):
        for message in messages:
            # ``expected`` is 0 before the first message; then nothing is missing.
            if (missing := message.number - (expected or message.number)) > 0:
                text.complain(f"{text.count(missing, 'number')} passed unseen")
            expected = message.number + 1
            _print_look(call, message, **looks)
        if poll.poll(0):
            # The reader of the output went away, although there is nothing to write.
            raise BrokenPipeError()


@options.command("Fail unless this is the queue of the publisher.")
@options.publisher
@click.argument("paths", nargs=-1, metavar="[FILE]...", type=click.Path(allow_dash=True))
@click.option("--message", "texts", multiple=True, help="Send this text; may be repeated.")
@click.option("--lines", is_flag=True, help="Send each line as a message, without its end.")
def send(call: options.Call, publisher: str, paths: Sequence[str], texts: Sequence[str],
         lines: bool) -> None:
    """
    Send messages as PUBLISHER: files, texts, lines, or the standard input.

    Each FILE is one message; the file - is the standard input. Without a file or a text, the
    standard input is one message. With --lines, each line is a message. Lines that are there at
    once are sent in one commit; those of a slow stream are sent as they come.

    Examples:
        persipubsub send config.json pub --message hello
        persipubsub send config.json pub report.pb
        journalctl --follow | persipubsub send config.json pub --lines
    """
    queue_key = call.config.publisher(publisher).out_queue
    if call.queue_key not in (None, queue_key):
        raise click.BadParameter(f"The publisher {publisher!r} sends to {queue_key!r}.",
                                 param_hint="--queue")
    sent = 0
    with Pub(publisher, call.config) as pub:
        try:
            for messages in _read_messages(paths, texts, lines):
                try:
                    pub.send_many(messages)
                    sent += len(messages)
                except errors.MessageTooLargeError:
                    # The queue could never hold them together.
                    for message in messages:
                        pub.send(message)
                        sent += 1
        finally:
            if call.as_json:
                call.tell(sent=sent)
            else:
                text.tell(f"{text.count(sent, 'message')} sent")


def _read_messages(paths: Sequence[str], texts: Sequence[str],
                   lines: bool) -> Iterator[list[bytes]]:
    """Read what is to be sent, each list in one commit."""
    if texts:
        yield [os.fsencode(one) for one in texts]
    for name in paths or ([] if texts else ["-"]):
        if name == "-" and sys.stdin is None:
            raise click.ClickException("Expected to read the standard input, but got: it is closed")
        with click.open_file(name, "rb") as file:
            # A file that does not block would seem to end where nothing came yet.
            os.set_blocking(file.fileno(), True)
            yield from _split(file) if lines else [[file.read()]]


def _split(file: Any) -> Iterator[list[bytes]]:
    """Split a stream into lines without their ends: all that were there at once."""
    rest = b""
    while chunk := file.read1(_CHUNK_BYTES):
        *complete, rest = (rest + chunk).split(b"\n")
        yield complete
    if rest:
        yield [rest]


@options.one_subscriber
@options.subscriber
@options.option("--number", click.IntRange(0), 1, "How many messages; 0: all that come.")
@options.option("--timeout", options.seconds, "0", "How long to wait for each: 10, 1h30m, inf.")
@click.option("--directory", type=_DIRECTORY, help="Write each message to a file there.")
@_format_option("raw")
def receive(call: options.Call, key: str, subscriber: str, number: int, timeout: float,
            directory: pathlib.Path | None, style: str) -> None:
    """
    Receive messages as SUBSCRIBER, and write them to stdout or to files.

    A message is acknowledged when it was written; if writing fails, it stays in the queue. The
    directory of --directory has to exist. The name of a file is the number of its message. The exit
    code is 1 if there were fewer messages than asked for.

    Examples:
        persipubsub receive config.json sub
        persipubsub receive config.json sub --number 0 --timeout inf --json
        persipubsub receive config.json sub --number 100 --timeout 1m --directory inbox
    """
    if style == "raw" and sys.stdout.isatty():
        raise click.UsageError("Expected --format raw with a pipe or a file: a message could "
                               "change the terminal.")
    # The queue may have subscribers that the file has no entry for, or one for another queue.
    check_identifier(subscriber, call.path)
    entry = call.config.subscribers.get(subscriber) or Subscriber(subscriber, key)
    entries = {**call.config.subscribers, subscriber: msgspec.structs.replace(entry, in_queue=key)}
    config = msgspec.structs.replace(call.config, subscribers=entries)
    received = 0
    os.set_blocking(sys.stdout.fileno(), True)
    # Not through ``sys.stdout``: without a buffer (PYTHONUNBUFFERED), it drops what the system did
    # not take, without an error, and the message would be lost.
    with Sub(subscriber, config) as sub, open(sys.stdout.fileno(), "wb", closefd=False) as output:
        while number == 0 or received < number:
            try:
                with sub.receive(timeout, details=True) as message:
                    if message is None:
                        break
                    output.write(_line_of(call, message, directory, style))
                    output.flush()
                received += 1
            except errors.CorruptMessageError as error:
                call.fail(str(error))
    if received < number:
        found = f"only {text.count(received, 'message')}" if received else "no message"
        call.fail(f"{found} for {subscriber} within {timeout:g} seconds")


def _line_of(call: options.Call, message: Message, directory: pathlib.Path | None,
             style: str) -> bytes:
    """Write a message to its file, if it is to have one; return what goes to the output."""
    if directory is not None:
        name, line = "path", str(directory / f"{message.number:020}")
        # Durably, and as a whole or not at all.
        with files.replacing(os.path.abspath(line)) as (_, descriptor):
            with open(descriptor, "wb", closefd=False) as file:
                file.write(message.data)
    elif style == "raw" and not call.as_json:
        return message.data
    else:
        name, line = "base64", _FORMATS["base64" if call.as_json else style](message.data)
    if call.as_json:
        line = options.to_json({"number": message.number, name: line})
    return line.encode(errors="surrogateescape") + b"\n"


@options.one_subscriber
@options.subscriber
@click.option("--number", type=click.IntRange(1), required=True, help="As peek and stat show it.")
@options.yes
def delete(call: options.Call, key: str, subscriber: str, number: int, yes: bool) -> options.Told:
    """
    Delete one message for SUBSCRIBER, unread, also while its consumers are at work.

    Other subscribers still get the message. It counts as cleared. The exit code is 1 if the message
    does not wait for the subscriber.

    Example:
        persipubsub delete config.json sub --number 4711
    """
    if not yes:
        call.ask(f"Delete message {number} of {subscriber} in {key}?")
    if not control.delete(call.config, subscriber, number, key):
        raise click.ClickException(
            f"Expected a message {number} that waits for {subscriber} in {key}, but got: none")
    line = f"message {number} of {subscriber} was deleted"
    return line, {"subscriber": subscriber, "number": number}


_HEAD: Final = ("DEAD LETTERS", "NUMBER", "FROM QUEUE", "SUBSCRIBER", "ITS NUMBER", "ATTEMPTS",
                "MOVED", "SIZE", "ERROR")


@options.command("Queue of dead letters; all of them if not given.")
@click.argument("action", type=click.Choice(["list", "send-back", "drop"]), default="list")
@click.option("--number",
              type=click.IntRange(1),
              multiple=True,
              help="Only this one; may be repeated.")
@options.yes
def dead_letters(call: options.Call, action: str, number: Sequence[int], yes: bool) -> None:
    """
    List messages that were given up, send them back to their subscriber, or drop them.

    A subscriber with max_deliveries and a dead_letter_queue failed to work on these messages. The
    exit code is 1 if one of the numbers is not there, or in use.

    Examples:
        persipubsub dead-letters config.json
        persipubsub dead-letters config.json send-back --queue letters --number 7 --number 9
        persipubsub dead-letters config.json drop --queue letters --yes
    """
    is_any = call.queue_key is None
    keys = letters.queues_of(call.config) if is_any else call.keys()
    if number and (action == "list" or is_any and len(keys) != 1):
        raise click.UsageError("Expected --number only with send-back and drop, and with --queue "
                               "if there are several queues of dead letters.")
    if action == "list":
        if not keys and not call.as_json:
            print("There are no queues of dead letters.")
        call.each(keys, lambda key: _list(call, key))
        return
    change, done = control.send_back, "sent back"
    if action == "drop":
        change, done = control.drop_dead_letters, "dropped"
        if keys and not yes:
            # Count first: if that fails, do not ask.
            found = [control.dead_letters(call.config, key)[key] for key in keys]
            count = text.count(len(number) or sum(map(len, found)), "dead letter")
            call.ask(f"Drop {count} of {', '.join(keys)}?")

    def work(key: str) -> options.Told:
        changed = change(call.config, key, number or None)
        if failed := [one for one in number if one not in changed]:
            call.fail(f"not there, or in use: {', '.join(map(str, failed))}")
        return f"{text.count(len(changed), 'dead letter')} {done}", {"numbers": changed}

    call.each(keys, work)


def _list(call: options.Call, key: str) -> options.Told:
    """List the dead letters of a queue."""
    listed = control.dead_letters(call.config, key)[key]
    rows = [[
        key, f"{one.number}", one.letter.queue, one.letter.subscriber, f"{one.letter.number}",
        f"{one.letter.attempts}", f"{one.letter.moved_at.astimezone():%Y-%m-%d %H:%M:%S}",
        text.show_bytes(len(one.letter.data)), one.letter.error
    ] for one in listed]
    if rows and not call.as_json:
        print("\n".join(text.table([_HEAD, *rows], left=(0, 2, 3, 8))), flush=True)
    return "" if rows else "there are no dead letters", listed
