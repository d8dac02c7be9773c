"""
Read the code blocks of a page of the documentation, and do what it says in an empty directory.

A page is followed word for word, from top to bottom:

* A block with a ``:caption:`` is a file of that name. So is one in JSON behind a paragraph that
  ends with the name: ``here ``config.json``:``. Any other one in JSON only has to be well-formed.
* Any other block in Python is a script, which has to end with exit code 0. If the paragraph behind
  it ends with ``prints:``, the block that follows is what it prints. One with prompts (``>>>``) is
  a doctest, which knows what those above it have assigned.
* A block whose first line begins with ``$`` is typed into a shell, the same one for the whole page.
  What stands below a command is what it prints; a command with nothing below may print what it
  likes.

In what is printed, ``...`` stands for anything, also for several lines.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import threading
from typing import Dict, Final, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from tests import support

_DIRECTIVE = re.compile(
    r"^(?P<indent> *)\.\. (?P<name>code-block|literalinclude|code):: *(?P<rest>.*)$")
_OPTION = re.compile(r"^ *:(?P<key>[\w-]+): *(?P<value>.*)$")
_NAMED = re.compile(r"``([\w./-]+\.\w+)``:{1,2}$")

_NOTICE = re.compile(r"bash: line \d+: +\d+ Killed")

#: Ends the output of a command; nothing that a page runs prints it.
_END_OF_COMMAND: Final = "--end-of-command--"


class Block(NamedTuple):
    """Hold a block of code."""

    page: str  #: name of the file it is in
    line: int  #: where it begins, from 1
    language: str
    code: str
    caption: str  #: name of the file it is; empty: none
    introduction: str  #: the paragraph in front of it

    @property
    def place(self) -> str:
        """Return where it is."""
        return "{}:{}".format(self.page, self.line)

    @property
    def is_typed(self) -> bool:
        """Return True if it is typed into a shell."""
        return self.code.startswith("$ ") and not self.caption


def blocks_of(page: pathlib.Path) -> List[Block]:
    """
    Read the blocks of a page.

    :param page: in reStructuredText
    :return: blocks from top to bottom
    """
    lines = page.read_text(encoding="utf-8").splitlines()
    found = []  # type: List[Block]
    index = 0
    while index < len(lines):
        directive = _DIRECTIVE.match(lines[index])
        is_comment = lines[index].lstrip().startswith("..")
        if directive is None and (is_comment or not lines[index].endswith("::")):
            index += 1
            continue

        begin = index
        indent = len(lines[index]) - len(lines[index].lstrip())
        options = {}  # type: Dict[str, str]
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


def _indented(lines: Sequence[str], index: int, indent: int) -> Tuple[str, int]:
    """Return what is indented by more from a line on, without its indentation, and what follows."""
    body = []  # type: List[str]
    while index < len(lines) and (not lines[index].strip()
                                  or lines[index].startswith(" " * (indent + 1))):
        body.append(lines[index])
        index += 1
    return textwrap.dedent("\n".join(body)).strip("\n") + "\n", index


def _paragraph(lines: Sequence[str], end: int) -> str:
    """Return the paragraph in front of a line."""
    while end > 0 and not lines[end - 1].strip():
        end -= 1
    begin = end
    while begin > 0 and lines[begin - 1].strip():
        begin -= 1
    return " ".join(line.strip() for line in lines[begin:end])


def matches(expected: str, found: str) -> bool:
    """
    Compare what was printed with what a page shows.

    :param expected: with ellipses
    :param found: that was printed
    :return: True if it is as shown

    >>> matches("a\\n...\\nb", "a\\nany\\nthing\\nb")
    True
    >>> matches("took ... s", "took 0.3 ms")
    False
    """

    def tidy(text: str) -> str:
        return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())

    pattern = ".*".join(map(re.escape, tidy(expected).split("...")))
    return re.fullmatch(pattern, tidy(found), re.DOTALL) is not None


class Shell:
    """Type commands into one shell, as a reader does. Whatever it has started ends with it."""

    def __init__(self, directory: pathlib.Path) -> None:
        """
        Start the shell.

        :param directory: where to
        """
        environment = dict(os.environ, LC_ALL="C.UTF-8", COLUMNS="120", TERM="dumb")
        # The environment that the tests run in is the one that the reader installed the library in.
        environment["PATH"] = os.pathsep.join(
            [str(pathlib.Path(sys.executable).parent), environment["PATH"]])
        environment["PYTHONPATH"] = os.pathsep.join(
            path for path in sys.path if "site-packages" not in path and path.startswith("/"))
        self._process = subprocess.Popen(["bash", "--noprofile", "--norc"],
                                         cwd=directory,
                                         env=environment,
                                         stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE,
                                         stderr=subprocess.STDOUT,
                                         text=True,
                                         process_group=0)

    def __enter__(self) -> "Shell":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.killpg(self._process.pid, 9)
        except ProcessLookupError:
            pass
        self._process.communicate()

    def type(self, command: str) -> Tuple[str, int]:
        """
        Type a command and wait for its end.

        :param command: to be run; one that ends with ``&`` is not waited for
        :return: what it printed, its exit code
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        alarm = threading.Timer(2 * support.HANG_SECS, os.killpg, (self._process.pid, 9))
        alarm.start()
        try:
            # Without input: a command that reads it would take what is typed next.
            self._process.stdin.write("{{ {}\n}} </dev/null; echo {} $?\n".format(
                command, _END_OF_COMMAND))
            self._process.stdin.flush()
            printed = []  # type: List[str]
            for line in self._process.stdout:
                text, end, code = line.partition(_END_OF_COMMAND)
                # What a shell says when a job was killed differs between shells and terminals.
                printed.append("" if _NOTICE.match(text) else text)
                if end:
                    return "".join(printed), int(code)
        finally:
            alarm.cancel()
        raise AssertionError("Expected an end of {!r}, but got: {!r}".format(
            command, "".join(printed)))


def commands_of(block: Block) -> Iterator[Tuple[str, Optional[str]]]:
    """
    Split a block that is typed into a shell; lines that begin with ``>`` go on with a command.

    :param block: whose first line begins with ``$``
    :return: commands, each with what it prints; None if that is not shown
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


class Reader:
    """Follow a page."""

    def __init__(self, shell: Shell) -> None:
        """
        Initialize with nothing done yet.

        :param shell: into which everything is typed
        """
        self._shell = shell
        self._prompts = ""

    def follow(self, blocks: Sequence[Block], skipped: Sequence[str] = ()) -> int:
        """
        Do what the blocks say.

        :param blocks: of a page
        :param skipped: beginnings of commands and of blocks that are not run
        :return: how many files were written, scripts run and commands typed
        """
        done = 0
        shown = -1
        for index, block in enumerate(blocks):
            if index == shown or any(block.code.startswith(text) for text in skipped):
                continue
            if block.is_typed:
                done += self._type(block, skipped)
            elif block.caption or (block.language == "json" and _NAMED.search(block.introduction)):
                self._write(block)
                done += 1
            elif block.language == "json":
                done += self._parse(block)
            elif block.language in ("python", "pycon"):
                if index + 1 < len(blocks) and re.search(r"\bprints::?$",
                                                         blocks[index + 1].introduction):
                    shown = index + 1
                self._run(block, blocks[shown].code if shown == index + 1 else None)
                done += 1
        return done

    def _directory(self) -> pathlib.Path:
        """Ask where the page has gone to."""
        return pathlib.Path(self._shell.type("pwd")[0].rstrip("\n"))

    def _write(self, block: Block) -> None:
        """Write a file."""
        named = _NAMED.search(block.introduction)
        name = block.caption or (named.group(1) if named is not None else "")
        path = self._directory() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.code, encoding="utf-8")

    def _parse(self, block: Block) -> int:
        """Check that a part of a file is well-formed."""
        text = block.code.strip().rstrip(",")
        try:
            json.loads(text if text.startswith(("{", "[")) else "{" + text + "}")
        except ValueError as error:
            raise AssertionError("{}: Expected JSON, but got: {}".format(block.place,
                                                                         error)) from error
        return 1

    def _run(self, block: Block, shown: Optional[str]) -> None:
        """Run a script or a doctest, and compare what it prints."""
        code = block.code
        if ">>> " in code:
            # One doctest for the page: what was assigned above is known below.
            self._prompts += code + "\n"
            code = ("import doctest, sys\n"
                    "test = doctest.DocTestParser().get_doctest({!r}, {{}}, 'page', 'page', 0)\n"
                    "sys.exit(doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed)"
                    "\n").format(self._prompts)
        script = self._directory() / ".script.py"
        script.write_text(code, encoding="utf-8")
        printed, exit_code = self._shell.type("python .script.py")
        script.unlink()
        assert exit_code == 0, "{}: {}".format(block.place, printed)
        if shown is not None:
            assert matches(shown, printed), "{}: {}".format(block.place, printed)

    def _type(self, block: Block, skipped: Sequence[str]) -> int:
        """Type the commands of a block, and compare what they print."""
        done = 0
        for command, shown in commands_of(block):
            if any(("$ " + command).startswith(text) for text in skipped):
                continue
            printed, exit_code = self._shell.type(command)
            where = "{}: $ {}\n{}".format(block.place, command, printed)
            if shown is None:
                assert exit_code == 0, where
            else:
                assert matches(shown, printed), where
            done += 1
        return done
