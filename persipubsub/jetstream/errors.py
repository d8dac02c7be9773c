"""Translate errors of NATS into errors of this library; no other error leaves the package."""

import re
import ssl
from typing import Any, Final, TypeAlias

import nats.errors

from persipubsub.errors import (AccessError, ClosedError, ConfigError, DiskFullError, FormatError,
                                MessageTooLargeError, NotInitializedError, PersipubsubError,
                                QueueFullError, StoreError, UnavailableError)

STREAM_NOT_FOUND: Final = 10059
CONSUMER_NOT_FOUND: Final = 10014
#: No such consumer, no message found (10037), message not deleted (10057), no such number (10043).
NOTHING_FOUND: Final = (CONSUMER_NOT_FOUND, 10037, 10057, 10043)
NAME_IN_USE: Final = 10058
LIMIT_REACHED: Final = 10077
_NO_PEERS: Final = 10005

_Kind: TypeAlias = type[PersipubsubError]

_NO_JETSTREAM: Final = "servers of {} with JetStream (nats-server -js)"

#: The error for each code of an answer, and what was expected.
_ANSWERS: Final[dict[int, tuple[_Kind, str]]] = {
    code: (kind, expected)
    for kind, expected, *codes in (
        (NotInitializedError, "a queue at {} (persipubsub.control.initialize_all_dbs makes it)",
         STREAM_NOT_FOUND, CONSUMER_NOT_FOUND),
        (UnavailableError, _NO_JETSTREAM, 10039, 10076),
        (FormatError, "to make the stream of {}, and none of somebody else in its place", 10065,
         NAME_IN_USE),
        (MessageTooLargeError, "a message that the servers of {} take", 10054),
        (QueueFullError, "room in the queue {}", LIMIT_REACHED),
        (DiskFullError, "room on the servers of {}", 10023, 10028, 10047),
        (ConfigError, "as many servers as replicas of {}", _NO_PEERS, 10074),
    )
    for code in codes
}

#: The same for errors of nats-py; the first that fits.
_ERRORS: Final[tuple[tuple[type[BaseException], _Kind, str], ...]] = (
    (ssl.SSLError, AccessError, "a TLS connection to {} (NATS_CA, NATS_CERT, NATS_KEY)"),
    (nats.errors.NoRespondersError, UnavailableError, _NO_JETSTREAM),
    (BaseException, UnavailableError, "an answer of the servers of {}"),
)


class ApiError(Exception):
    """An answer by which a server refuses a request."""

    def __init__(self, answer: dict[str, Any]) -> None:
        """Initialize with the answer."""
        super().__init__(f"{answer.get('description', 'no description')} "
                         f"({answer.get('err_code', answer.get('code'))})")
        self.code = int(answer.get("code", 0))
        self.err_code = int(answer.get("err_code", 0))

    def is_missing(self) -> bool:
        """Tell whether a stream or a consumer was not found."""
        return self.err_code in (STREAM_NOT_FOUND, CONSUMER_NOT_FOUND)

    def is_temporary(self) -> bool:
        """Tell whether the same request may be answered otherwise a moment later."""
        # There are too few servers in all, or some are away at the moment: only the words tell
        # (2.10.27: "no suitable peers for placement, peer offline"). Other answers with the code
        # 503 change after a while, unless their own code is in the table.
        is_somebody_away = self.err_code == _NO_PEERS and "offline" in str(self)
        return is_somebody_away or (self.code == 503 and self.err_code not in _ANSWERS)


def translate(error: BaseException, path: str) -> PersipubsubError:
    """Translate an error."""
    if isinstance(error, PersipubsubError):
        return error
    kind: _Kind
    if isinstance(error, ApiError) and error.is_temporary():
        kind, expected = UnavailableError, "the servers of {} to be ready"
    elif isinstance(error, ApiError):
        kind, expected = _ANSWERS.get(error.err_code, (StoreError, "the servers of {} to do it"))
    elif is_refusal(error):
        kind, expected = AccessError, (
            "servers of {} that let us in (NATS_CREDS, NATS_USER and NATS_PASSWORD, NATS_TOKEN or "
            "NATS_NKEY)")
    else:
        kind, expected = next(one[1:] for one in _ERRORS if isinstance(error, one[0]))
    return kind(f"Expected {expected.format(path)}, but got: {describe(error)}")


def closed(path: str) -> ClosedError:
    """Describe a queue that was closed while it was in use."""
    return ClosedError(f"Expected the queue {path} to be open, but got: it was closed")


def is_refusal(error: BaseException) -> bool:
    """Tell whether a server refuses our credentials, so that a retry is of no use."""
    # nats-py mostly raises the base class of its errors, with the words of the server.
    words = "authorization|authentication|user credentials"
    return (isinstance(error, nats.errors.Error)
            and re.search(words, str(error), re.IGNORECASE) is not None)


def describe(error: BaseException) -> str:
    """Describe an error that may have no text."""
    if isinstance(error, TimeoutError):
        return "none in time"
    return str(error) or type(error).__name__
