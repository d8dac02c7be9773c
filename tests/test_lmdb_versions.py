"""Test that a release of lmdb that lacks what the library uses is named, and what to do."""

import re
import subprocess
from pathlib import Path

import pytest

from persipubsub import control
from tests import support

#: What an error names: what is missing, the releases that were checked, the one here, what to do.
PATTERN = (r"Expected lmdb to have {name} as in 3\.0\.0, but got: lmdb \d+\.\d+\.\d+ without it\. "
           r"Install .*: pip install lmdb==3\.0\.0")


def run(config_pth: Path, change: str, use: str) -> "subprocess.CompletedProcess[str]":
    """Use a queue after a change of lmdb, in a process of its own."""
    return support.run_python(
        f"""if True:
            import sys, lmdb, lmdb._envid, lmdb.verify, persipubsub
            config_pth = sys.argv[1]
            {change}
            {use}
            """, config_pth)


def use_of(call: str) -> str:
    """Make a call whose error is one of this library, and an ImportError as well."""
    return f"""
            try:
                {call}
            except persipubsub.errors.PersipubsubError as error:
                assert isinstance(error, ImportError)
                print(error)
            """


CHANGES = [("del lmdb._envid.env_keys", r"lmdb\._envid\.env_keys\(path, subdir\)"),
           ("lmdb._envid.env_keys = lambda path: ()", r"lmdb\._envid\.env_keys\(path, subdir\)"),
           ("lmdb._envid.env_keys = 5", r"lmdb\._envid\.env_keys\(path, subdir\)"),
           ("sys.modules['lmdb._envid'] = None; del lmdb._envid", r"lmdb\._envid")]


@pytest.mark.parametrize("change, name", CHANGES, ids=[change for change, _ in CHANGES])
def test_import_names_what_is_missing(tmp_path: Path, change: str, name: str) -> None:
    done = run(support.make_queue(tmp_path), change, use_of("persipubsub.Pub('pub', config_pth)"))
    assert re.search(PATTERN.format(name=name), done.stdout), (done.stdout, done.stderr)


VERIFIER_CHANGES = [
    "del lmdb.verify._Verifier", "del lmdb.verify.VerifyError", "del lmdb.verify._Verifier.verify",
    "lmdb.verify._Verifier.__init__ = lambda self: None",
    "lmdb.verify._Verifier.verify = lambda self: []",
    "sys.modules['lmdb.verify'] = None; del lmdb.verify"
]


@pytest.mark.parametrize("change", VERIFIER_CHANGES)
def test_without_the_verifier_only_verify_fails(tmp_path: Path, change: str) -> None:
    config_pth = support.make_queue(tmp_path)
    use = "persipubsub.Pub('pub', config_pth).send(b'message')" + use_of(
        "print(persipubsub.control.verify(config_pth))")
    done = run(config_pth, change, use)
    assert re.search(PATTERN.format(name=r"lmdb\.verify[^ ]*( and psize|, size\)\.verify\(\))?"),
                     done.stdout), (done.stdout, done.stderr)
    assert support.receive_all(config_pth) == [b"message"]
    assert control.verify(config_pth) == {"queue": ()}


def test_command_says_it_without_a_traceback(tmp_path: Path) -> None:
    config_pth = support.make_queue(tmp_path)
    done = run(
        config_pth, "del lmdb.verify._Verifier",
        "import persipubsub.__main__ as command; sys.argv[1:] = ['verify', config_pth]; "
        "sys.exit(command.main())")
    assert done.returncode != 0
    assert "Expected lmdb to have" in done.stderr and "Traceback" not in done.stderr
