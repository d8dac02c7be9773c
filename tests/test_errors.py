"""Test that all that goes wrong below comes out as an error of the tree, with a useful message."""

import os
import pickle
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from persipubsub import Pub, Sub, control, errors
from tests import support


def make_own(name: str) -> errors.PersipubsubError:
    if name == "CorruptMessageError":
        return errors.CorruptMessageError("what went wrong", number=5)
    if name == "ConfigError":
        return errors.ConfigError("what went wrong", problems=["one", "two"])
    error = getattr(errors, name)("what went wrong")
    assert isinstance(error, errors.PersipubsubError)
    return error


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_can_be_caught_shown_and_copied(name: str) -> None:
    error = make_own(name)
    assert str(error) == "what went wrong"
    with pytest.raises(errors.PersipubsubError):
        raise error
    # Processes hand errors to each other (multiprocessing, concurrent.futures).
    copy = pickle.loads(pickle.dumps(error))
    assert copy.__class__ is error.__class__
    assert (str(copy), vars(copy)) == (str(error), vars(error))


# What the whole library raises when something fails below it


def uses(config_pth: Path) -> list[Callable[[], object]]:
    """Return each thing that a user can do with a queue; all of them may be repeated."""

    def send() -> None:
        with Pub("pub", config_pth) as pub:
            pub.send(bytes(1000))

    def send_many() -> None:
        with Pub("pub", config_pth) as pub:
            pub.send_many([bytes(10000)] * 10)

    def receive() -> None:
        with Sub("sub", config_pth) as sub:
            with sub.receive(timeout=0.01):
                pass

    def look() -> None:
        with Sub("sub", config_pth) as sub:
            sub.front()
            sub.pop_to_top()

    def inspect() -> None:
        with support.open_queue(config_pth) as queue:
            queue.statistics()
            queue.check()

    return [
        send, send_many, receive, look, inspect, lambda: control.initialize_all_dbs(config_pth),
        lambda: control.prune_dangling_messages(config_pth),
        lambda: control.clear_all_subs(config_pth)
    ]


TREE = set(errors.__all__)
ALLOWED = TREE | {"", "MapFullError"}


@pytest.mark.parametrize("limit", [0, 1, 100, 4096, 10000, 50000])
def test_nothing_but_the_tree_with_small_files(tmp_path: Path, limit: int) -> None:
    config_pth = support.make_queue(tmp_path)
    fresh = support.write_config(tmp_path, name="fresh.json", path=str(tmp_path / "fresh"))

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    results = support.outcomes_in_child(restrict, *uses(config_pth), *uses(fresh))
    assert set(results) <= ALLOWED, results
    assert set(results) & TREE
    assert not set(support.outcomes_in_child(*uses(config_pth))) - {""}
    control.initialize_all_dbs(config_pth=fresh)
    assert not set(support.outcomes_in_child(*uses(fresh))) - {""}


@pytest.mark.parametrize("left", range(0, 14, 2))
def test_nothing_but_the_tree_without_descriptors(tmp_path: Path, left: int) -> None:
    config_pth = support.make_queue(tmp_path)

    def restrict() -> None:
        # Modules that are imported when they are needed first want to be read.
        for use in uses(config_pth):
            use()
        used = {int(name) for name in os.listdir("/proc/self/fd")}
        lowest = min(number for number in range(1000) if number not in used)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + left, 4096))

    results = support.outcomes_in_child(restrict, *uses(config_pth))
    assert set(results) <= ALLOWED, results
    if left == 0:
        assert set(results[1:]) & TREE


def test_nothing_but_the_tree_with_a_tiny_map(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path, max_db_size_bytes=1 << 18)
    for _ in range(5):
        results = support.outcomes_in_child(*(uses(config_pth)[:3] * 10))
        assert set(results) <= ALLOWED, results
        assert results[-1] == ""
    assert set(support.outcomes_in_child(*uses(config_pth)[2:])) == {""}


@pytest.mark.parametrize("what", ["directory", "data.mdb", "lock.mdb", "all files"])
def test_nothing_but_the_tree_when_files_disappear(tmp_path: Path, what: str) -> None:
    config_pth = support.make_queue(tmp_path)

    def run(pipe: support.Connection) -> None:
        with Pub("pub", config_pth) as pub, Sub("sub", config_pth) as sub:
            if what == "directory":
                shutil.rmtree(tmp_path / "queue")
            elif what == "all files":
                shutil.rmtree(tmp_path / "queue" / "journal")
                for path in (tmp_path / "queue").iterdir():
                    path.unlink()
            else:
                (tmp_path / "queue" / what).unlink()

            def receive() -> None:
                with sub.receive(timeout=0.01):
                    pass

            pipe.send([
                support.outcome(use)
                for use in (lambda: pub.send(b"message"), receive, sub.front, sub.pop_to_top)
            ])
            pipe.send([support.outcome(use) for use in uses(config_pth)])
            pipe.send([support.outcome(use) for use in (pub.close, sub.close)])

    with support.Child(run) as child:
        for _ in range(2):
            assert set(child.get()) <= ALLOWED
        assert child.get() == ["", ""]
        child.end()


def test_texts_say_what_was_expected_and_what_was_found() -> None:
    """All texts of the package, as far as they can be read from its source."""
    texts: list[str] = []
    package = Path(errors.__file__).parent
    pattern = re.compile(rf"\b(?:{'|'.join(errors.__all__)})\(\s*((?:f?\"[^\"]*\"\s*)+)")
    for path in sorted(package.rglob("*.py")):
        for match in pattern.finditer(path.read_text("utf-8")):
            texts.append("".join(re.findall(r"\"([^\"]*)\"", match.group(1))))
    assert len(texts) > 50
    for text in texts:
        # But those that complete the text of another error.
        if not text.startswith("{"):
            assert re.search(r"^([\w.{}]+: )?Expected .* but (got|it is)", text), text
