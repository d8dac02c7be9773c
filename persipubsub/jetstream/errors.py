"""Turn what NATS says into errors of this library; no other of its errors leaves the room."""

import re
import ssl
from collections.abc import Sequence
from typing import Any, Final

import nats.errors

import persipubsub.errors

STREAM_NOT_FOUND: Final = 10059
CONSUMER_NOT_FOUND: Final = 10014
MESSAGE_NOT_FOUND: Final = (10037, 10057, 10043)
NAME_IN_USE: Final = 10058
LIMIT_REACHED: Final = 10077

_NOT_ENABLED: Final = (10039, 10076)
_OVERLAP: Final = 10065
_TOO_LARGE: Final = 10054
_NO_ROOM: Final = (10023, 10028, 10047)
_NO_PEERS: Final = 10005
_BAD_REPLICAS: Final = (_NO_PEERS, 10074)

#: Answers with the code 503 that waiting does not change.
_FINAL: Final[frozenset[int]] = frozenset((LIMIT_REACHED, ) + _NOT_ENABLED + _NO_ROOM +
                                          _BAD_REPLICAS)

#: What answers mean: their codes, the error, and what was expected of the path.
_ANSWERS: Final[Sequence[tuple[tuple[
    int, ...], type[persipubsub.errors.PersipubsubError], str]]] = (
        ((STREAM_NOT_FOUND, CONSUMER_NOT_FOUND), persipubsub.errors.NotInitializedError,
         "a queue at {} (persipubsub.control.initialize_all_dbs makes it)"),
        (_NOT_ENABLED, persipubsub.errors.UnavailableError,
         "servers of {} with JetStream (nats-server -js)"),
        ((_OVERLAP, NAME_IN_USE), persipubsub.errors.FormatError,
         "to make the stream of {}, and none of somebody else in its place"),
        ((_TOO_LARGE, ), persipubsub.errors.MessageTooLargeError,
         "a message that the servers of {} take"),
        ((LIMIT_REACHED, ), persipubsub.errors.QueueFullError, "room in the queue {}"),
        (_NO_ROOM, persipubsub.errors.DiskFullError, "room on the servers of {}"),
        (_BAD_REPLICAS, persipubsub.errors.ConfigError, "as many servers as replicas of {}"),
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
    if isinstance(error, ApiError):
        return _translate_answer(error, path)
    if is_refusal(error):
        return persipubsub.errors.AccessError(
            "Expected servers of {} that let us in (NATS_CREDS, NATS_USER and NATS_PASSWORD, "
            "NATS_TOKEN or NATS_NKEY), but got: {}".format(path, describe(error)))
    if isinstance(error, ssl.SSLError):
        return persipubsub.errors.AccessError(
            f"Expected a TLS connection to {path} (NATS_CA, NATS_CERT, NATS_KEY), but got: "
            f"{describe(error)}")
    if isinstance(error, nats.errors.MaxPayloadError):
        return persipubsub.errors.MessageTooLargeError(
            f"Expected a message within max_payload of the servers of {path}, but got: "
            f"{describe(error)}")
    return persipubsub.errors.UnavailableError(
        f"Expected an answer of the servers of {path}, but got: {describe(error)}")


def closed(path: str) -> persipubsub.errors.ClosedError:
    """Describe a queue that was closed while it was in use."""
    return persipubsub.errors.ClosedError(
        f"Expected the queue {path} to be open, but got: it was closed meanwhile")


def _translate_answer(error: ApiError, path: str) -> persipubsub.errors.PersipubsubError:
    """Translate what a server answered."""
    for codes, kind, text in _ANSWERS:
        if error.err_code in codes:
            break
    else:
        kind, text = persipubsub.errors.StoreError, "the servers of {} to do it"
    return kind(f"Expected {text.format(path)}, but got: {error}")


def is_refusal(error: BaseException) -> bool:
    """Tell whether a server does not let us in, so that there is no use in trying again."""
    # Most often the client raises its base class, with the words of the server.
    return isinstance(
        error, (nats.errors.AuthorizationError, nats.errors.InvalidUserCredentialsError)) or (
            isinstance(error, nats.errors.Error)
            and re.search("authorization|authentication", str(error), re.IGNORECASE) is not None)


def describe(error: BaseException) -> str:
    """Describe an error that may have no text."""
    if isinstance(error, TimeoutError):
        return "none in time"
    return str(error) or type(error).__name__
