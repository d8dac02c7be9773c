"""Make the tests independent of how they were started; start servers for those that need them."""

import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from persipubsub import Pub, Sub
from tests import jetstream_server, support

# A shell starts what runs in the background with SIGINT ignored, and processes inherit that: those
# that the tests interrupt would go on for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# An example that takes long, or is drawn slowly, says that the machine is busy: one of thousands
# takes more than the 200 ms that it may by default. What hangs is ended as any other test is.
hypothesis.settings.register_profile("busy",
                                     deadline=None,
                                     suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")


@pytest.fixture(name="servers", scope="module")
def _servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[jetstream_server.Servers]:
    with jetstream_server.running(tmp_path_factory.mktemp("servers")) as servers:
        yield servers


# Modules of tests with other queues have one of their own, which the two below go by.
@pytest.fixture(name="config_pth")
def _config_pth(tmp_path: Path) -> Path:
    return support.make_queue(tmp_path)


@pytest.fixture(name="pub")
def _pub(config_pth: Path) -> Iterator[Pub]:
    with Pub("pub", config_pth) as pub:
        yield pub


@pytest.fixture(name="sub")
def _sub(config_pth: Path) -> Iterator[Sub]:
    with Sub("sub", config_pth) as sub:
        yield sub
