"""Run commands in a pseudo-terminal."""

import codecs
import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from typing import Any

from tests import support


class Terminal:

    def __init__(self,
                 start: "Callable[..., subprocess.Popen[bytes]]",
                 *arguments: object,
                 columns: int = 100,
                 lines: int = 40,
                 **options: Any) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.modes = termios.tcgetattr(slave)
        # Its own session, so that Ctrl-C reaches it and nobody else.
        self.process = start(*arguments,
                             stdin=slave,
                             stdout=slave,
                             stderr=slave,
                             start_new_session=True,
                             preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),
                             **options)
        self._slave = slave
        # A read may end in the middle of a character. Ctrl-C throws away what the terminal still
        # holds, so half a character may be lost for good: it is replaced, no command is at fault.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._slave)
        os.close(self._master)

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def modes_now(self) -> list[Any]:
        return termios.tcgetattr(self._slave)

    def _read(self, timeout: float) -> bool:
        """Read what is there; return False if nothing came in time."""
        if not select.select([self._master], [], [], timeout)[0]:
            return False
        self.text += self._decoder.decode(os.read(self._master, 1 << 16))
        return True

    def wait_for(self, pattern: str) -> None:
        deadline = time.monotonic() + support.HANG_SECS
        while not re.search(pattern, self.text):
            assert time.monotonic() < deadline, f"Waited in vain for {pattern!r} in {self.text!r}"
            self._read(0.1)

    def end(self, exit_code: int) -> str:
        """Wait for the end; return all that was shown."""
        deadline = time.monotonic() + support.HANG_SECS
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"Waited in vain for the end: {self.text!r}"
            self._read(0.1)
        with contextlib.suppress(OSError):
            while self._read(0.1):
                pass
        assert self.process.returncode == exit_code, self.text
        assert "Traceback" not in self.text
        return self.text
