"""Make the tests independent of how they were started; start servers for those that need them."""

import signal
from typing import Iterator

import pytest

from tests import jetstream_server

# A shell starts what runs in the background with SIGINT ignored, and processes inherit that: those
# that the tests interrupt would go on for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(name="servers", scope="module")
def _servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[jetstream_server.Servers]:
    with jetstream_server.running(tmp_path_factory.mktemp("servers")) as servers:
        yield servers
