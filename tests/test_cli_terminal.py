"""Test what the command line shows, in pseudo-terminals, and that nothing changes a terminal."""

import base64
import functools
import json
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest

from persipubsub import Pub, control, statistics
from persipubsub.cli import text, view
from tests import support, test_cli
from tests.terminals import Terminal

terminal_of = functools.partial(Terminal, test_cli.start)

#: What a terminal would do something for, or take for the end of a line.
HOSTILE = "\x1b[31m\x1b]0;owned\x07\x9b2J\r\n\b\u202e\x00"

#: All that a command may send to a terminal beside text: colors, the other screen, the cursor, what
#: is cleared, the ends of lines, and what becomes of lines that are too long.
HARMLESS = re.compile(r"\x1b\[(\?1049[hl]|\?25[hl]|\?7[hl]|[HKJ]|[0-9;]*m)|\r|\n|\t|\x08")


def is_harmless(shown: str) -> bool:
    rest = HARMLESS.sub("", shown)
    return not any(
        unicodedata.category(char) == "Cc" or unicodedata.bidirectional(char) in DIRECTIONS
        for char in rest)


DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def test_what_would_change_a_terminal_is_escaped() -> None:
    marks = {"\u061c", "\u200e", "\u200f"}
    for one in map(chr, range(sys.maxunicode + 1)):
        expected = one
        if (unicodedata.category(one) in ("Cc", "Zl", "Zp")
                or unicodedata.bidirectional(one) in DIRECTIONS or one in marks):
            expected = one.encode("unicode_escape").decode("ascii")
        assert text.printable(f"a{one}") == f"a{expected}", hex(ord(one))


# Hostile names and messages


def hostile_queue(directory: Path) -> Path:
    """Make a queue whose key, publisher and subscriber are hostile, with hostile messages."""
    name = HOSTILE.replace("\x00", "")
    config_pth = support.write_config(directory)
    with support.edited(config_pth) as config:
        config["queues"][name] = {**config["queues"].pop("queue"), "subscribers": [name]}
        config[f"p{name}"] = {"out_queue": name, "subscribers": [name]}
        config[name] = {"in_queue": name}
        del config["pub"], config["sub"]
    control.initialize_all_dbs(config_pth)
    with Pub(f"p{name}", config_pth) as pub:
        pub.send_many([HOSTILE.encode(), b"\xff\xfe\x1b[2J", b"\xed\xa0\x80"])
    return config_pth


@pytest.mark.parametrize("exit_code, command", [
    *((0, command)
      for command in ("stat", "stat --watch --count 2 --interval 0.1", "check", "verify",
                      "peek NAME", "receive NAME --number 3", "init", "prune", "clear --yes",
                      "seek NAME --to beginning", "stat --queue NAME --json", "compact",
                      "remove-subscriber NAME --yes", "drop-queue --yes",
                      "send pNAME --message NAME", "dead-letters", "pause NAME", "resume NAME",
                      "delete NAME --number 1 --yes", "check-config")),
    (1, "peek nobody"),
    *((2, command) for command in ("seek NAME --to NAME", "stat --queue nobody", "NAME",
                                   "send pNAME --queue x", "receive NAME --format raw",
                                   "stat --NAME")),
])  # yapf: disable
def test_hostile_names_and_messages(tmp_path: Path, exit_code: int, command: str) -> None:
    config_pth = hostile_queue(tmp_path)
    name = HOSTILE.replace("\x00", "")
    words = [word.replace("NAME", name) for word in command.split()]
    with terminal_of(*words, variables={"PERSIPUBSUB_CONFIG": str(config_pth)}) as terminal:
        shown = terminal.end(exit_code)
    assert shown and is_harmless(shown), shown


def test_file_with_a_hostile_name(tmp_path: Path) -> None:
    for name in ("\x1b[31m.json", "\udcff\n.json"):
        for words in (["stat"], ["check"], ["peek", "sub"]):
            with terminal_of(words[0], tmp_path / name, *words[1:]) as terminal:
                shown = terminal.end(3 if words[0] == "check" else 1)
            assert is_harmless(shown) and "31m" in shown or "udcff" in shown


def test_numbers_that_no_message_has(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, b"x")
    huge = "9" * 30
    for exit_code, shown, line in ((0, "from number 2",
                                    f"seek sub --to {huge}"), (0, "", f"peek sub --from {huge}"),
                                   (2, "", f"seek sub --to -{huge}h"), (2, "",
                                                                        f"seek sub --to @{huge}"),
                                   (2, "", f"seek sub --to {'9' * 5000}"),
                                   (2, "", f"receive sub --timeout {huge}"),
                                   (3, "", f"check --max-age {huge}")):
        name, *arguments = line.split()
        done = test_cli.call(capfd, name, config_pth, *arguments)
        assert done.returncode == exit_code and shown in done.stdout, line


# Messages


def test_tail_in_a_terminal(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, b"one", b"two")
    with terminal_of("tail", config_pth, "--number", "1") as terminal:
        terminal.wait_for("two")
        assert "one" not in terminal.text
        support.send(config_pth, HOSTILE.encode())
        terminal.wait_for(r"\\x1b\[31m.*\\u202e")
        terminal.type(b"\x03")
        shown = terminal.end(exit_code=130)
    assert is_harmless(shown) and "persipubsub: interrupted" in shown
    assert re.search(r"^ +2  \d\d:\d\d:\d\d\.\d{3}  two\r?$", shown, re.MULTILINE)
    assert test_cli.lag(config_pth) == 3


def test_raw_messages_are_for_pipes(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, HOSTILE.encode())
    with terminal_of("receive", config_pth, "sub", "--format", "raw") as terminal:
        assert "pipe or a file" in terminal.end(exit_code=2)
    assert test_cli.lag(config_pth) == 1
    found = json.loads(test_cli.run("receive", config_pth, "sub", "--json").stdout)
    assert base64.b64decode(found["base64"]) == HOSTILE.encode()


def test_question_in_a_terminal(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, b"x")
    for answer, exit_code in ((b"n\n", 1), (b"y\n", 0)):
        with terminal_of("clear", config_pth) as terminal:
            terminal.wait_for(r"\[y/N\]: ")
            terminal.type(answer)
            terminal.end(exit_code)
    assert test_cli.lag(config_pth) == 0


def test_verify_shows_its_progress(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    support.send(config_pth, *[b"x" * 100] * 100000)
    with terminal_of("verify", config_pth) as terminal:
        shown = terminal.end(exit_code=0)
    assert "queue: sound" in shown and "%" in shown


# stat


def test_stat_in_colors(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path, MAX_MSGS_NUM=10)
    support.send(config_pth, *[b"x"] * 9)
    for name, value, is_colored in (("TERM", "xterm", True), ("NO_COLOR", "1", False),
                                    ("TERM", "dumb", False)):
        with terminal_of("stat", config_pth, variables={name: value}) as terminal:
            shown = terminal.end(exit_code=0)
        assert ("\x1b[" in shown) == is_colored
        assert bool(re.search("\x1b\\[31m +90 %", shown)) == is_colored
        assert "90 %" in shown and "MAX_MSGS_NUM" in shown and is_harmless(shown)


def test_stat_watch(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    with terminal_of("stat", config_pth, "--watch", "--interval", "0.1s") as terminal:
        terminal.wait_for("nothing waits")
        support.send(config_pth, *[b"x"] * 777)
        terminal.wait_for("777")
        terminal.wait_for("[\u2581-\u2588] [^\n]*/s")
        terminal.type(b"x")
        terminal.type(b"q")
        shown = terminal.end(exit_code=0)
        # As it was before, for the shell.
        assert terminal.modes_now() == terminal.modes
    assert shown.count("\x1b[?1049h") == shown.count("\x1b[?1049l") == 1
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    # The last look stays.
    assert "777" in shown[shown.index("\x1b[?1049l"):]


def test_stat_watch_is_interrupted(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    with terminal_of("stat", config_pth, "--watch", "--interval", "1h") as terminal:
        terminal.wait_for("q ends")
        terminal.type(b"\x03")
        shown = terminal.end(exit_code=130)
        assert terminal.modes_now() == terminal.modes
    assert "\x1b[?1049l" in shown and shown.rstrip().endswith("persipubsub: interrupted")


def test_stat_watch_shows_errors_and_goes_on(tmp_path: Path) -> None:
    config_pth = support.write_config(tmp_path)
    with terminal_of("stat", config_pth, "--watch", "--interval", "0.1") as terminal:
        terminal.wait_for("Expected the directory")
        control.initialize_all_dbs(config_pth)
        terminal.wait_for("nothing waits")
        terminal.type(b"q")
        terminal.end(exit_code=0)


def test_stat_watch_fits_a_small_terminal(tmp_path: Path) -> None:
    subscribers = [f"sub{index:02}" for index in range(40)]
    config_pth = support.make_queue(tmp_path,
                                    publishers={"pub": subscribers},
                                    subscribers=subscribers)
    support.send(config_pth, b"x")
    arguments = ("stat", config_pth, "--watch", "--count", "1")
    with terminal_of(*arguments, columns=40, lines=12) as terminal:
        shown = terminal.end(exit_code=0)
    screen = shown[shown.index("\x1b[H"):shown.index("\x1b[?25h")]
    rows = [HARMLESS.sub("", row) for row in screen.split("\n")]
    # The terminal cuts lines that are too long.
    assert len(rows) <= 12 and shown.index("\x1b[?7l") < shown.index("\x1b[H")
    assert shown.index("\x1b[?7h") > shown.index(rows[-1])
    assert re.match(r"\d+ more lines", rows[-2]) and rows[-1] == "q ends"


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_stat_watch_in_a_terminal_that_can_not_be_drawn_over(tmp_path: Path, term: str) -> None:
    config_pth = support.make_queue(tmp_path)
    with terminal_of("stat", config_pth, "--watch", "--interval", "0.1",
                     variables={"TERM": term}) as terminal:
        terminal.wait_for("(?s)SUBSCRIBER.*SUBSCRIBER")
        terminal.type(b"\x03")
        shown = terminal.end(exit_code=130)
    assert "\x1b" not in shown


def figures_of(names: Mapping[str, Mapping[str, Any]],
               **changes: Any) -> statistics.QueueStatistics:
    """Make up figures that a queue of a test can not have soon."""
    nothing: dict[str, Any] = {
        field: 0
        for field in ("lag", "in_flight", "acknowledged", "failed", "dropped_by_timeout",
                      "dropped_by_mark", "cleared", "skipped", "corrupt", "dead_lettered")
    }
    subscribers = tuple(
        statistics.SubscriberStatistics(
            **{
                **nothing, "subscriber": name,
                "position": 1,
                "seconds_since_acknowledged": 119.9,
                "is_paused": False,
                **more
            }) for name, more in names.items())
    found: dict[str, Any] = {
        "path": "/srv/app/queues/greetings",
        "messages": 1234567,
        "message_share": .9,
        "message_bytes": 123456789,
        "byte_share": .3,
        "file_bytes": 1 << 33,
        "file_share": .4,
        "oldest_age_seconds": 1234.,
        "age_share": .1,
        "next_number": 10**9,
        "commits": 987654321,
        "sent": 10**12,
        "journal_bytes": 10**9,
        "journal_lag_bytes": 12345,
        "disk_bytes": 10**10
    }
    return statistics.QueueStatistics(**{**found, **changes}, subscribers=subscribers)


def lines_of(figures: statistics.QueueStatistics, limit: int | None = 10) -> Iterator[str]:
    history = view.History()
    history.add(figures)
    history.add(figures)
    yield from map(click.unstyle, view.draw({"greetings": figures}, {"greetings": history}, limit))


def test_large_figures_fit_into_100_columns() -> None:
    counts = ("lag", "failed", "dropped_by_timeout", "dropped_by_mark", "cleared", "skipped",
              "corrupt", "dead_lettered")
    large = {
        **dict.fromkeys(counts, 12345678), "in_flight": 1234,
        "acknowledged": 987654321012,
        "is_paused": True,
        "claims": (statistics.InFlight("x" * 255, 10**15, 1000, 4194304, 1e7), )
    }
    figures = figures_of({"archive-service-eu": large, "x" * 255: large}, path="/" + "y" * 500)
    lines = list(lines_of(figures))
    assert max(map(len, lines)) <= 100
    shown = "\n".join(lines)
    for figure in ("12,345,678 given up", "987,654,321,012", "paused", "1000000000000000 to",
                   "12.3 kB not yet safe", "archive-service-eu", "90 % of MAX_MSGS_NUM"):
        assert figure in shown
    # In a pipe, names are whole.
    assert "x" * 255 in "\n".join(lines_of(figures, limit=None))


def test_zeros_are_hidden() -> None:
    never = {"a": {"seconds_since_acknowledged": None}}
    figures = figures_of(never,
                         messages=0,
                         journal_bytes=0,
                         journal_lag_bytes=0,
                         disk_bytes=0,
                         sent=0,
                         file_share=None)
    assert list(lines_of(figures)) == [
        "greetings  /srv/app/queues/greetings", "  nothing waits", "  store           8.6 GB", "",
        "  SUBSCRIBER  LAG", "  a             0"
    ]


@pytest.mark.parametrize("positions, slowest", [((5, 7), "a"), ((7, 5), "b"), ((5, 5), None)])
def test_the_slowest_subscriber_is_named(positions: tuple[int, int], slowest: str | None) -> None:
    first, second = positions
    figures = figures_of({"a": {"position": first, "lag": 1}, "b": {"position": second, "lag": 1}})
    named = [line.split()[0] for line in lines_of(figures) if "slowest" in line]
    assert named == ([slowest] if slowest else [])


def test_most_important_rows_are_kept() -> None:
    claims = tuple(
        statistics.InFlight("c", number, 1, None, float(number)) for number in range(1, 6))
    figures = figures_of({"a": {"lag": 0}, "b": {"lag": 1}, "c": {"lag": 9, "claims": claims}})
    shown = "\n".join(lines_of(figures, limit=2))
    assert re.search(r"^  b .*\n  c .*\n  and 1 more, with less lag$", shown, re.MULTILINE)
    assert re.search(r"^  c +5 +\? +5\.0 s\n  c +4 .*\n  and 3 more, for less time$", shown,
                     re.MULTILINE)


# Completion


def completed(shell: str, line: str, **variables: str) -> list[str]:
    """Complete a line as the script of a shell asks for it."""
    words = line.split(" ")
    process = test_cli.run(exit_code=0,
                           variables={
                               "_PERSIPUBSUB_COMPLETE": f"{shell}_complete",
                               "COMP_WORDS": line,
                               "COMP_CWORD": str(len(words) - 1),
                               **variables
                           })
    return [one.partition(",")[2] for one in process.stdout.splitlines() if one]


def test_completion(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path,
                                    subscribers=["sub", "archive", "a\nb"],
                                    publishers={"pub": ["sub"]})
    config = {"PERSIPUBSUB_CONFIG": str(config_pth)}
    assert completed("bash", "persipubsub sta") == ["stat"]
    assert completed("bash", "persipubsub peek ", **config) == ["sub", "archive"]
    assert completed("bash", "persipubsub peek a", **config) == ["archive"]
    assert completed("bash", f"persipubsub peek {config_pth} s") == ["sub"]
    assert completed("bash", f"persipubsub peek {config_pth} s", **config) == ["sub"]
    assert completed("bash", f"persipubsub peek --config {config_pth} s") == ["sub"]
    assert completed("bash", "persipubsub send ", **config) == ["pub"]
    assert completed("bash", "persipubsub stat --queue ", **config) == ["queue"]
    assert completed("bash", "persipubsub stat --qu", **config) == ["--queue"]
    assert completed("bash", "persipubsub completion ") == ["bash", "zsh", "fish"]
    config_pth.write_text("{", encoding="utf-8")
    assert completed("bash", "persipubsub peek ", **config) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    script = test_cli.run("completion", shell).stdout
    assert f"_PERSIPUBSUB_COMPLETE={shell}_complete" in script


def test_bash_completes(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    script = test_cli.run("completion", "bash").stdout
    name = re.search(r"^(_\w+)\(\) \{", script, re.MULTILINE)
    assert name is not None
    function = (f'persipubsub() {{ "{sys.executable}" -m persipubsub "$@"; }}\n'
                f'env() {{ command env "${{@:1:$#-1}}" "{sys.executable}" -m persipubsub; }}\n')
    code = (f"{script}\n{function}\nCOMP_WORDS=(persipubsub peek su)\nCOMP_CWORD=2\n"
            f'{name.group(1)} persipubsub su peek\nprintf "%s\\n" "${{COMPREPLY[@]}}"')
    variables = {
        "PERSIPUBSUB_CONFIG": str(config_pth),
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(Path(__file__).parent.parent)
    }
    process = support.run(["bash", "-c", code], env=variables)
    assert (process.returncode, process.stdout) == (0, "sub\n")
