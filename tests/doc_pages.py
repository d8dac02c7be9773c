"""
Read the code blocks of a page of the documentation, and do what it says in an empty directory.

A page is followed word for word, from top to bottom:

* A block with a ``:caption:`` is a file of that name, and a whole configuration is ``config.json``.
  Any other block in JSON only has to be well-formed.
* Any other block in Python is run. All of a page share one interpreter, so that what was assigned
  above is known below. If the paragraph behind it ends with ``prints:``, the block that follows is
  what it prints. One with prompts (``>>>``) is a doctest.
* A block whose first line begins with ``$`` is typed into a shell, the same one for the whole page.
  What stands below a command is what it prints; a command with nothing below may print what it
  likes.
* A page that speaks of ``config.json`` without showing one means the queue of *Start*, which then
  is there, with a publisher that sends something now and then.

In what is printed, ``...`` stands for anything, also for several lines.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import persipubsub.config
from persipubsub import errors
from tests import support

_DIRECTIVE = re.compile(
    r"^(?P<indent> *)\.\. (?P<name>code-block|literalinclude|code):: *(?P<rest>.*)$")
_OPTION = re.compile(r"^ *:(?P<key>[\w-]+): *(?P<value>.*)$")

_IS_CONFIG = re.compile(r'^ *"queues": \{', re.MULTILINE)
_NOTICE = re.compile(r"bash: line \d+: +\d+ Killed")

#: Ends the output of a command; nothing that a page runs prints it.
_END_OF_COMMAND: Final = "--end-of-command--"


class Block(NamedTuple):
    page: str  #: name of the file it is in
    line: int  #: where it begins, from 1
    language: str
    code: str
    caption: str  #: name of the file it is; empty: none
    introduction: str  #: the paragraph in front of it

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_typed(self) -> bool:
        return self.code.startswith("$ ") and not self.caption


def blocks_of(page: Path) -> list[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    found: list[Block] = []
    index = 0
    while index < len(lines):
        directive = _DIRECTIVE.match(lines[index])
        is_comment = lines[index].lstrip().startswith("..")
        if directive is None and (is_comment or not lines[index].endswith("::")):
            index += 1
            continue

        begin = index
        indent = len(lines[index]) - len(lines[index].lstrip())
        options: dict[str, str] = {}
        index += 1
        while directive is not None and index < len(lines):
            option = _OPTION.match(lines[index])
            if option is None:
                break
            options[option.group("key")] = option.group("value")
            index += 1
        body, index = _indented(lines, index, indent)
        introduction = _paragraph(lines, begin if directive is not None else begin + 1)
        language = directive.group("rest") if directive is not None else ""
        if directive is not None and directive.group("name") == "literalinclude":
            included = page.parent / language
            language, body = options.get("language", ""), included.read_text(encoding="utf-8")
        found.append(
            Block(page.name, begin + 1, language, body, options.get("caption", ""), introduction))
    return found


def _indented(lines: Sequence[str], index: int, indent: int) -> tuple[str, int]:
    """Return what is indented by more from a line on, without its indentation, and what follows."""
    body: list[str] = []
    while index < len(lines) and (not lines[index].strip()
                                  or lines[index].startswith(" " * (indent + 1))):
        body.append(lines[index])
        index += 1
    return textwrap.dedent("\n".join(body)).strip("\n") + "\n", index


def _paragraph(lines: Sequence[str], end: int) -> str:
    while end > 0 and not lines[end - 1].strip():
        end -= 1
    begin = end
    while begin > 0 and lines[begin - 1].strip():
        begin -= 1
    return " ".join(line.strip() for line in lines[begin:end])


def _file_name(block: Block) -> str:
    """Return the name of the file that a block is; empty if it is none."""
    if block.caption or block.is_typed:
        return block.caption
    return "config.json" if block.language == "json" and _IS_CONFIG.search(block.code) else ""


def _check_config(block: Block) -> None:
    """Check a whole configuration, also one that the page goes on to do nothing with."""
    try:
        persipubsub.config.parse(block.code.encode("utf-8"), config_pth=_file_name(block))
    except errors.ConfigError as error:
        raise AssertionError(f"{block.place}: {error}") from error


def _check_json(block: Block) -> None:
    """Check that a part of a file is well-formed."""
    text = block.code.strip().rstrip(",")
    try:
        json.loads(text if text.startswith(("{", "[")) else "{" + text + "}")
    except ValueError as error:
        raise AssertionError(f"{block.place}: Expected JSON, but got: {error}") from error


def matches(expected: str, found: str) -> bool:
    """
    Compare what was printed with what a page shows.

    >>> matches("a\\n...\\nb", "a\\nany\\nthing\\nb")
    True
    >>> matches("took ... s", "took 0.3 ms")
    False
    """

    def tidy(text: str) -> str:
        return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())

    pattern = ".*".join(map(re.escape, tidy(expected).split("...")))
    return re.fullmatch(pattern, tidy(found), re.DOTALL) is not None


def _environment() -> dict[str, str]:
    """Return the environment in which the reader has installed the library."""
    environment = dict(os.environ, LC_ALL="C.UTF-8", COLUMNS="120", TERM="dumb")
    # Of two programs that print a line at the same time, one line each would not be certain.
    environment.pop("PYTHONUNBUFFERED", None)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    environment["PYTHONPATH"] = os.pathsep.join(
        path for path in sys.path if "site-packages" not in path and path.startswith("/"))
    return environment


#: Runs what comes in on the standard input, a line of JSON each, and says whether it went well.
_INTERPRETER: Final = """\
import doctest, json, os, sys, traceback

space = {"__name__": "__main__"}
answers = open(int(sys.argv[1]), "w", buffering=1)
for line in sys.stdin:
    directory, code = json.loads(line)
    os.chdir(directory)
    failed = 0
    try:
        if ">>> " in code:
            test = doctest.DocTestParser().get_doctest(code, {}, "page", "page", 0)
            test.globs = space
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            failed = runner.run(test, clear_globs=False).failed
        else:
            exec(compile(code, "page", "exec"), space)
    except SystemExit as stop:
        failed = bool(stop.code)
    except BaseException:
        traceback.print_exc()
        failed = 1
    sys.stdout.flush()
    print(int(failed), file=answers)
"""


class Interpreter:
    """Run the Python of a page in one process, which ends with it."""

    def __init__(self) -> None:
        answers, theirs = os.pipe()
        self._answers = open(answers, encoding="ascii")
        self._printed = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _INTERPRETER, str(theirs)],
            env=_environment(),
            pass_fds=[theirs],
            stdin=subprocess.PIPE,
            stdout=self._printed,
            stderr=subprocess.STDOUT,
            text=True)
        os.close(theirs)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._answers.close()
        self._printed.close()

    def run(self, directory: Path, code: str) -> tuple[str, bool]:
        assert self._process.stdin is not None
        begin = self._printed.seek(0, os.SEEK_END)
        alarm = threading.Timer(2 * support.HANG_SECS, self._process.kill)
        alarm.start()
        self._process.stdin.write(json.dumps([str(directory), code]) + "\n")
        self._process.stdin.flush()
        answer = self._answers.readline()
        alarm.cancel()
        # The process shares the offset: it goes on writing at the end.
        self._printed.seek(begin)
        return self._printed.read().decode("utf-8"), answer == "0\n"


class Shell:
    """Type commands into one shell, as a reader does. Whatever it has started ends with it."""

    def __init__(self, directory: Path) -> None:
        self._process = subprocess.Popen(["bash", "--noprofile", "--norc"],
                                         cwd=directory,
                                         env=_environment(),
                                         stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE,
                                         stderr=subprocess.STDOUT,
                                         text=True,
                                         process_group=0)

    def __enter__(self) -> "Shell":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.communicate()

    def type(self, command: str) -> tuple[str, int]:
        assert self._process.stdin is not None and self._process.stdout is not None
        alarm = threading.Timer(2 * support.HANG_SECS, os.killpg, (self._process.pid, 9))
        alarm.start()
        try:
            # Without input: a command that reads it would take what is typed next.
            self._process.stdin.write(f"{{ {command}\n}} </dev/null; echo {_END_OF_COMMAND} $?\n")
            self._process.stdin.flush()
            printed: list[str] = []
            for line in self._process.stdout:
                text, end, code = line.partition(_END_OF_COMMAND)
                # What a shell says when a job was killed differs between shells and terminals.
                printed.append("" if _NOTICE.match(text) else text)
                if end:
                    return "".join(printed), int(code)
        finally:
            alarm.cancel()
        raise AssertionError(f"Expected an end of {command!r}, but got: {''.join(printed)!r}")


def commands_of(block: Block) -> Iterator[tuple[str, str | None]]:
    """
    Split a block that is typed into a shell; lines that begin with ``>`` go on with a command.
    """
    for part in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        count = 1
        while count < len(lines) and (lines[count - 1].endswith("\\")
                                      or lines[count].startswith("> ")):
            lines[count] = lines[count].removeprefix("> ")
            count += 1
        printed = "\n".join(lines[count:]).strip("\n")
        yield "\n".join(lines[:count]), printed or None


#: What is published on a page that shows no queue of its own.
_PUBLISHER: Final = """\
import itertools, time
import persipubsub.publisher

with persipubsub.publisher.Pub() as pub:
    pub.init(pub_id="pub", config_pth="config.json")
    for message in itertools.cycle([b"hello", b"stop"]):
        pub.send(msg=message)
        time.sleep(0.3)
"""


class Reader:

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    def follow(self, blocks: Sequence[Block], skipped: Sequence[str] = ()) -> int:
        with contextlib.closing(Interpreter()) as interpreter:
            return self._follow(interpreter, blocks, skipped)

    def _follow(self, interpreter: Interpreter, blocks: Sequence[Block],
                skipped: Sequence[str]) -> int:
        """Do what the blocks say, in Python with an interpreter."""
        done = 0
        shown = -1
        if "config.json" not in map(_file_name, blocks) and any(
                '"config.json"' in block.code or (block.is_typed and "config.json" in block.code)
                for block in blocks):
            self._start_publishing()
        for index, block in enumerate(blocks):
            if index == shown or any(block.code.startswith(text) for text in skipped):
                continue
            if block.is_typed:
                done += self._type(block, skipped)
            elif _file_name(block):
                path = self._directory() / _file_name(block)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.code, encoding="utf-8")
                if block.language == "json" and _IS_CONFIG.search(block.code):
                    _check_config(block)
                done += 1
            elif block.language == "json":
                _check_json(block)
                done += 1
            elif block.language in ("python", "pycon"):
                if index + 1 < len(blocks) and re.search(r"\bprints::?$",
                                                         blocks[index + 1].introduction):
                    shown = index + 1
                self._run(interpreter, block, blocks[shown].code if shown == index + 1 else None)
                done += 1
        return done

    def _directory(self) -> Path:
        """Ask where the page has gone to."""
        return Path(self._shell.type("pwd")[0].rstrip("\n"))

    def _start_publishing(self) -> None:
        """Make the queue of the page Start, and let somebody publish."""
        start = blocks_of(Path(__file__).parent.parent / "docs" / "start.rst")
        config = next(block.code for block in start if block.caption == "config.json")
        (self._directory() / "config.json").write_text(config, encoding="utf-8")
        (self._directory() / ".publisher.py").write_text(_PUBLISHER, encoding="utf-8")
        printed, exit_code = self._shell.type("persipubsub init config.json")
        assert exit_code == 0, printed
        self._shell.type("python .publisher.py &")

    def _run(self, interpreter: Interpreter, block: Block, shown: str | None) -> None:
        printed, is_done = interpreter.run(self._directory(), block.code)
        assert is_done, f"{block.place}: {printed}"
        if shown is not None:
            assert matches(shown, printed), f"{block.place}: {printed}"

    def _type(self, block: Block, skipped: Sequence[str]) -> int:
        done = 0
        for command, shown in commands_of(block):
            if any(("$ " + command).startswith(text) for text in skipped):
                continue
            printed, exit_code = self._shell.type(command)
            where = f"{block.place}: $ {command}\n{printed}"
            if shown is None:
                assert exit_code == 0, where
            else:
                assert matches(shown, printed), where
            done += 1
        return done
