"""Send, receive and look at messages: the commands about single messages."""

import base64
import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Final

import click

import persipubsub.config
import persipubsub.control
import persipubsub.engine
import persipubsub.errors
import persipubsub.publisher
from persipubsub import _selection
from persipubsub.cli import _shared, _text

#: So much of a stream of lines is read, and so sent in one commit, at most.
_CHUNK_BYTES: Final = 1 << 16

_FORMATS: Final = ("text", "hex", "base64")


def _show(content: bytes, style: str) -> str:
    """
    Show a message in one line.

    :param content: of the message
    :param style: one of the formats
    :return: line without its end
    """
    if style == "hex":
        return content.hex()
    if style == "base64":
        return base64.b64encode(content).decode("ascii")
    return _text.printable(content.decode("utf-8", "backslashreplace"))


def _print_look(message: persipubsub.control.Message, style: str, as_json: bool) -> None:
    """
    Print a message that was looked at.

    :param message: to be printed
    :param style: one of the formats
    :param as_json: True for a line of JSON, with the content in base64
    """
    if as_json:
        found = {
            "number": message.number,
            "age_seconds": message.age_seconds,
            "subscribers": message.subscribers,
            "base64": None if message.content is None else _show(message.content, "base64")
        }
        print(json.dumps(found), flush=True)
        return
    content = "(damaged)" if message.content is None else _show(message.content, style)
    print(f"{message.number:>10}  {_text.show_seconds(message.age_seconds):>9}  {content}",
          flush=True)


@_shared.command()
@_shared.config_argument
@click.argument("subscriber")
@_shared.queue_option("Queue of the subscriber, if CONFIG has no entry for it.")
@click.option("--number",
              type=click.IntRange(min=1),
              default=10,
              show_default=True,
              help="How many messages at most.")
@click.option("--from",
              "start",
              type=click.IntRange(min=0),
              default=0,
              metavar="NUMBER",
              help="Begin at the message of this number.")
@click.option("--format",
              "style",
              type=click.Choice(_FORMATS),
              default="text",
              show_default=True,
              help="How to show the messages.")
@_shared.json_option
def peek(  # pylint: disable=too-many-arguments,too-many-positional-arguments
        config: pathlib.Path, subscriber: str, queue_key: str | None, number: int, start: int,
        style: str, as_json: bool) -> None:
    """
    Look at the next messages of SUBSCRIBER without taking them.

    It prints number, age and content of each. Messages that are just being received are shown, too.

    Examples:
        persipubsub peek config.json sub --number 3
        persipubsub peek config.json sub --from 4711 --number 1 --format hex
    """
    if queue_key is not None:
        _shared.select_one(config, queue_key)
    for message in persipubsub.control.peek(config, subscriber, number, start, queue_key):
        _print_look(message, style, as_json)


@_shared.command()
@_shared.config_argument
@_shared.queue_option("Which queue; needed if CONFIG has several.")
@click.option("--number",
              type=click.IntRange(min=0),
              default=0,
              show_default=True,
              help="Begin with so many of the newest messages.")
@click.option("--format",
              "style",
              type=click.Choice(_FORMATS),
              default="text",
              show_default=True,
              help="How to show the messages.")
@_shared.json_option
def tail(config: pathlib.Path, queue_key: str | None, number: int, style: str,
         as_json: bool) -> None:
    """
    Follow what is sent to a queue, until Ctrl-C. A look: nobody loses a message by it.

    It prints number, age and content of each message. A message that all its subscribers
    acknowledged at once may be deleted before it was seen; that is noted on stderr.

    Example:
        persipubsub tail config.json --queue greetings --number 10
    """
    key = _shared.select_one(config, queue_key)
    expected: int | None = None
    found = persipubsub.control.follow(config, key, last=number)
    with contextlib.closing(found):
        for messages in found:
            for message in messages:
                if expected is not None and message.number > expected:
                    _text.complain(
                        f"{_text.count(message.number - expected, 'number')} passed unseen")
                expected = message.number + 1
                _print_look(message, style, as_json)
            _fail_if_nobody_reads()


def _fail_if_nobody_reads() -> None:
    """
    Notice that whoever read our output went away, although there is nothing to write.

    :raise BrokenPipeError: if so
    """
    import select  # pylint: disable=import-outside-toplevel

    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        raise BrokenPipeError()


@_shared.command()
@_shared.config_argument
@click.argument("publisher")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@_shared.queue_option("Fail unless it is the queue of the publisher.")
@click.option("--message",
              "texts",
              multiple=True,
              metavar="TEXT",
              help="Send this text. It may be given several times.")
@click.option("--lines", is_flag=True, help="Send each line as a message, without its end.")
@_shared.json_option
def send(  # pylint: disable=too-many-arguments,too-many-positional-arguments
        config: pathlib.Path, publisher: str, files: tuple[str, ...], queue_key: str | None,
        texts: tuple[str, ...], lines: bool, as_json: bool) -> None:
    """
    Send messages as PUBLISHER: each FILE is one; without any, the standard input is one.

    The file - is the standard input. With --lines, each line is a message: those that are there at
    once are sent in one commit, so that a slow stream is sent line by line.

    Examples:
        persipubsub send config.json pub --message hello
        persipubsub send config.json pub report.pb
        journalctl --follow | persipubsub send config.json pub --lines
    """
    found = persipubsub.config.read(config).publisher(publisher)
    if queue_key is not None and queue_key != found.out_queue:
        raise click.BadParameter(f"The publisher {publisher!r} sends to {found.out_queue!r}.",
                                 param_hint="--queue")
    sent = 0
    with persipubsub.publisher.Pub() as pub:
        pub.init(pub_id=publisher, config_pth=config)
        try:
            for messages in _read_messages(files, texts, lines):
                sent += _send(pub, messages)
        finally:
            if as_json:
                print(json.dumps({"sent": sent}), flush=True)
            else:
                _text.tell(f"{_text.count(sent, 'message')} sent")


def _send(pub: persipubsub.publisher.Pub, messages: Sequence[bytes]) -> int:
    """
    Send messages in one commit, or in several if the queue could never hold them together.

    :param pub: publisher
    :param messages: to be sent
    :return: how many were sent
    """
    try:
        pub.send_many(messages)
    except persipubsub.errors.MessageTooLargeError:
        if len(messages) == 1:
            raise
        half = len(messages) // 2
        return _send(pub, messages[:half]) + _send(pub, messages[half:])
    return len(messages)


def _read_messages(files: Sequence[str], texts: Sequence[str],
                   lines: bool) -> Iterator[list[bytes]]:
    """
    Read what is to be sent.

    :param files: names; - is the standard input
    :param texts: messages from the command line
    :param lines: True if each line is a message
    :return: messages, each list for one commit
    """
    if texts:
        yield [text.encode("utf-8", "surrogateescape") for text in texts]
    for name in files or ([] if texts else ["-"]):
        if name == "-" and sys.stdin is None:
            raise click.ClickException("Expected to read the standard input, but got: it is closed")
        with contextlib.ExitStack() as stack:
            try:
                file = sys.stdin.buffer if name == "-" else stack.enter_context(open(name, "rb"))
                yield from _read_lines(file) if lines else [[_read_all(file)]]
            except OSError as error:
                raise click.ClickException(
                    f"Expected to read {name}, but got: {error.strerror}") from None


def _read_all(file: BinaryIO) -> bytes:
    """
    Read a file or a stream to its end.

    :param file: to be read
    :return: content
    """
    # Not read(): of a stream that does not block, that returns what is there, or None.
    return b"".join(iter(lambda: _read_some(file), b""))


def _read_some(file: BinaryIO) -> bytes:
    """
    Read what is there, and wait until there is something.

    :param file: to be read; whether it blocks is as the process got it, and stays so: it may be
        shared with others
    :return: content; empty at the end
    """
    while True:
        try:
            return os.read(file.fileno(), _CHUNK_BYTES)
        except BlockingIOError:
            import select  # pylint: disable=import-outside-toplevel

            poll = select.poll()
            poll.register(file.fileno(), select.POLLIN)
            poll.poll()


def _read_lines(file: BinaryIO) -> Iterator[list[bytes]]:
    """
    Read lines as they come.

    :param file: to be read
    :return: lines without their ends: all that were there at once
    """
    rest = b""
    while chunk := _read_some(file):
        *complete, rest = (rest + chunk).split(b"\n")
        if complete:
            yield complete
    if rest:
        yield [rest]


class _Output:
    """Write received messages, each completely before it is acknowledged."""

    def __init__(self, directory: pathlib.Path | None, style: str, as_json: bool) -> None:
        """
        Initialize without a message.

        :param directory: where each message becomes a file; None for the standard output
        :param style: one of the formats, or raw
        :param as_json: True for lines of JSON
        """
        self._directory = directory
        self._style = style
        self._as_json = as_json

    def write(self, number: int, content: bytes) -> None:
        """
        Write a message.

        :param number: of the message
        :param content: of the message
        """
        described: dict[str, Any] = {"number": number}
        if self._directory is not None:
            path = self._directory / f"{number:020}"
            _write_file(path, content)
            if not self._as_json:
                print(path, flush=True)
                return
            described["path"] = str(path)
        elif self._as_json:
            described["base64"] = _show(content, "base64")
        else:
            raw = content if self._style == "raw" else _show(content, self._style).encode() + b"\n"
            sys.stdout.buffer.write(raw)
            sys.stdout.buffer.flush()
            return
        print(json.dumps(described), flush=True)


def _write_file(path: pathlib.Path, content: bytes) -> None:
    """
    Write a file so that it is there durably and completely, or not at all.

    :param path: of the file; replaced, since the message may have been written before
    :param content: of the file
    """
    temporary = path.with_name(f"{path.name}.new")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@_shared.command()
@_shared.config_argument
@click.argument("subscriber")
@_shared.queue_option("Queue of the subscriber, if CONFIG has no entry for it.")
@click.option("--number",
              type=click.IntRange(min=0),
              default=1,
              show_default=True,
              help="How many messages; 0: all that come.")
@click.option("--timeout",
              type=_shared.Seconds(min=0),
              default=0.0,
              show_default=True,
              metavar="SECONDS",
              help="How long to wait for each; inf: for ever.")
@click.option("--directory",
              type=click.Path(path_type=pathlib.Path, file_okay=False, exists=True),
              help="Write each message to a file, named by its number, in this directory, "
              "which has to exist.")
@click.option("--format",
              "style",
              type=click.Choice(_FORMATS + ("raw", )),
              default="text",
              show_default=True,
              help="How to write messages to stdout: a line each, or raw: just their bytes.")
@_shared.json_option
def receive(  # pylint: disable=too-many-arguments,too-many-positional-arguments
        config: pathlib.Path, subscriber: str, queue_key: str | None, number: int, timeout: float,
        directory: pathlib.Path | None, style: str, as_json: bool) -> None:
    """
    Receive messages as SUBSCRIBER, and write them to stdout or to files.

    A message is acknowledged as soon as it was written; if that fails, it stays in the queue. The
    exit code is 1 if there were fewer messages than asked for.

    Examples:
        persipubsub receive config.json sub
        persipubsub receive config.json sub --number 0 --timeout inf --json
        persipubsub receive config.json sub --number 100 --directory inbox
    """
    found = persipubsub.config.read(config)
    key = queue_key
    if key is None:
        key = found.subscriber(subscriber).in_queue
    _shared.select_one(config, key)
    _selection.check_subscriber(config, subscriber)
    output = _Output(directory, style, as_json)
    with contextlib.closing(persipubsub.engine.of(found, key).open_queue(found, key)) as queue:
        received, is_whole = _receive(queue.consumer(subscriber), output, number, timeout)
    if received < number:
        _text.complain("{} for {} within {:g} seconds".format(
            "no message" if not received else "only {}".format(_text.count(received, "message")),
            subscriber, timeout))
    if received < number or not is_whole:
        sys.exit(1)


def _receive(consumer: persipubsub.engine.Consumer, output: _Output, number: int,
             timeout: float) -> tuple[int, bool]:
    """
    Receive messages until there are enough, or none came in time.

    :param consumer: of the subscriber
    :param output: where to write them
    :param number: how many; 0: all that come
    :param timeout: how long to wait for each, in seconds
    :return: how many were received, whether none of them was damaged
    """
    received = 0
    is_whole = True
    while number == 0 or received < number:
        try:
            lease = consumer.take(None if timeout == float("inf") else timeout)
        except persipubsub.errors.CorruptMessageError as error:
            _text.complain(str(error))
            is_whole = False
            continue
        if lease is None:
            break
        try:
            output.write(lease.details()[0].number, lease.messages[0])
        except BaseException as error:
            lease.nack(error)
            raise
        lease.ack()
        received += 1
    return received, is_whole
