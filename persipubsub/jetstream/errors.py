"""Turn what NATS says into errors of this library; no other of its errors leaves the room."""

import re
import ssl
from typing import Any, Final, TypeAlias

import nats.errors

import persipubsub.errors

STREAM_NOT_FOUND: Final = 10059
CONSUMER_NOT_FOUND: Final = 10014
MESSAGE_NOT_FOUND: Final = (10037, 10057, 10043)
NAME_IN_USE: Final = 10058
LIMIT_REACHED: Final = 10077
_NO_PEERS: Final = 10005

_Kind: TypeAlias = type[persipubsub.errors.PersipubsubError]

_NO_JETSTREAM: Final = "servers of {} with JetStream (nats-server -js)"

#: What answers mean: their codes, the error, and what was expected of the path.
_ANSWERS: Final[tuple[tuple[tuple[int, ...], _Kind, str], ...]] = (
    ((STREAM_NOT_FOUND, CONSUMER_NOT_FOUND), persipubsub.errors.NotInitializedError,
     "a queue at {} (persipubsub.control.initialize_all_dbs makes it)"),
    ((10039, 10076), persipubsub.errors.UnavailableError, _NO_JETSTREAM),
    ((10065, NAME_IN_USE), persipubsub.errors.FormatError,
     "to make the stream of {}, and none of somebody else in its place"),
    ((10054, ), persipubsub.errors.MessageTooLargeError, "a message that the servers of {} take"),
    ((LIMIT_REACHED, ), persipubsub.errors.QueueFullError, "room in the queue {}"),
    ((10023, 10028, 10047), persipubsub.errors.DiskFullError, "room on the servers of {}"),
    ((_NO_PEERS, 10074), persipubsub.errors.ConfigError, "as many servers as replicas of {}"),
)

#: Beside these, answers with the code 503 change when one waits.
_FINAL: Final = frozenset(code for codes, _, _ in _ANSWERS for code in codes)

#: What errors of the client mean, in the same way; the first that fits.
_ERRORS: Final[tuple[tuple[type[BaseException], _Kind, str], ...]] = (
    (ssl.SSLError, persipubsub.errors.AccessError,
     "a TLS connection to {} (NATS_CA, NATS_CERT, NATS_KEY)"),
    (nats.errors.MaxPayloadError, persipubsub.errors.MessageTooLargeError,
     "a message within max_payload of the servers of {}"),
    (nats.errors.NoRespondersError, persipubsub.errors.UnavailableError, _NO_JETSTREAM),
    (BaseException, persipubsub.errors.UnavailableError, "an answer of the servers of {}"),
)


class ApiError(Exception):
    """Hold what the server answered instead of doing what it was asked for."""

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
        # Too few servers by their number, or because some of them are not there right now: only the
        # words tell (2.10.27: "no suitable peers for placement, peer offline").
        is_somebody_away = self.err_code == _NO_PEERS and "offline" in str(self)
        return is_somebody_away or (self.code == 503 and self.err_code not in _FINAL)


def translate(error: BaseException, path: str) -> persipubsub.errors.PersipubsubError:
    """Translate an error."""
    if isinstance(error, persipubsub.errors.PersipubsubError):
        return error
    kind: _Kind
    if isinstance(error, ApiError):
        kind, expected = persipubsub.errors.StoreError, "the servers of {} to do it"
        for codes, kind_of_codes, text in _ANSWERS:
            if error.err_code in codes:
                kind, expected = kind_of_codes, text
    elif is_refusal(error):
        kind, expected = persipubsub.errors.AccessError, (
            "servers of {} that let us in (NATS_CREDS, NATS_USER and NATS_PASSWORD, NATS_TOKEN or "
            "NATS_NKEY)")
    else:
        kind, expected = next(one[1:] for one in _ERRORS if isinstance(error, one[0]))
    return kind(f"Expected {expected.format(path)}, but got: {describe(error)}")


def closed(path: str) -> persipubsub.errors.ClosedError:
    """Describe a queue that was closed while it was in use."""
    return persipubsub.errors.ClosedError(
        f"Expected the queue {path} to be open, but got: it was closed")


def is_refusal(error: BaseException) -> bool:
    """Tell whether a server does not let us in, so that there is no use in trying again."""
    # Most often the client raises its base class, with the words of the server.
    kinds = (nats.errors.AuthorizationError, nats.errors.InvalidUserCredentialsError)
    return isinstance(error, kinds) or (isinstance(error, nats.errors.Error) and re.search(
        "authorization|authentication", str(error), re.IGNORECASE) is not None)


def describe(error: BaseException) -> str:
    """Describe an error that may have no text."""
    if isinstance(error, TimeoutError):
        return "none in time"
    return str(error) or type(error).__name__
