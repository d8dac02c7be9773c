"""Turn what NATS says into errors of this library; no other of its errors leaves the room."""

import asyncio
import re
import ssl
from typing import Any, Dict, Final, FrozenSet

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
_BAD_REPLICAS: Final = (10005, 10074)

#: Answers with the code 503 that waiting does not change.
_FINAL: Final = frozenset(
    (LIMIT_REACHED, ) + _NOT_ENABLED + _NO_ROOM + _BAD_REPLICAS)  # type: FrozenSet[int]


class ApiError(Exception):
    """Hold what the server answered instead of doing what it was asked for."""

    def __init__(self, answer: Dict[str, Any]) -> None:
        """
        Initialize with the answer.

        :param answer: its part ``error``
        """
        super().__init__("{} ({})".format(answer.get("description", "no description"),
                                          answer.get("err_code", answer.get("code"))))
        self.code = int(answer.get("code", 0))
        self.err_code = int(answer.get("err_code", 0))

    def is_missing(self) -> bool:
        """
        Tell whether a stream or a consumer was not found.

        :return: True if so
        """
        return self.err_code in (STREAM_NOT_FOUND, CONSUMER_NOT_FOUND)

    def is_temporary(self) -> bool:
        """
        Tell whether the same request may be answered otherwise a moment later.

        :return: True while servers elect a leader, for example
        """
        return self.code == 503 and self.err_code not in _FINAL


def translate(error: BaseException, path: str) -> persipubsub.errors.PersipubsubError:
    """
    Translate an error.

    :param error: of NATS, of asyncio or of the operating system
    :param path: of the queue
    :return: error of this library
    """
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
            "Expected a TLS connection to {} (NATS_CA, NATS_CERT, NATS_KEY), but got: {}".format(
                path, describe(error)))
    if isinstance(error, nats.errors.MaxPayloadError):
        return persipubsub.errors.MessageTooLargeError(
            "Expected a message within max_payload of the servers of {}, but got: {}".format(
                path, describe(error)))
    return persipubsub.errors.UnavailableError(
        "Expected an answer of the servers of {}, but got: {}".format(path, describe(error)))


def _translate_answer(error: ApiError, path: str) -> persipubsub.errors.PersipubsubError:
    """
    Translate what a server answered.

    :param error: that it answered
    :param path: of the queue
    :return: error of this library
    """
    code = error.err_code
    if code in (STREAM_NOT_FOUND, CONSUMER_NOT_FOUND):
        return persipubsub.errors.NotInitializedError(
            "Expected a queue at {} (persipubsub.control.initialize_all_dbs makes it), but got: {}".
            format(path, error))
    if code in _NOT_ENABLED:
        return persipubsub.errors.UnavailableError(
            "Expected servers of {} with JetStream (nats-server -js), but got: {}".format(
                path, error))
    if code in (_OVERLAP, NAME_IN_USE):
        return persipubsub.errors.FormatError(
            "Expected to make the stream of {}, but got one of somebody else: {}".format(
                path, error))
    if code == _TOO_LARGE:
        return persipubsub.errors.MessageTooLargeError(
            "Expected a message that the servers of {} take, but got: {}".format(path, error))
    if code == LIMIT_REACHED:
        return persipubsub.errors.QueueFullError(
            "Expected room in the queue {}, but got: {}".format(path, error))
    if code in _NO_ROOM:
        return persipubsub.errors.DiskFullError(
            "Expected room on the servers of {}, but got: {}".format(path, error))
    if code in _BAD_REPLICAS:
        return persipubsub.errors.ConfigError(
            "Expected as many servers as replicas of {}, but got: {}".format(path, error))
    return persipubsub.errors.StoreError("Expected the servers of {} to do it, but got: {}".format(
        path, error))


def is_refusal(error: BaseException) -> bool:
    """
    Tell whether a server does not let us in, so that there is no use in trying again.

    :param error: of a connection
    :return: True if it is about who we are
    """
    # Most often the client raises its base class, with the words of the server.
    return isinstance(
        error, (nats.errors.AuthorizationError, nats.errors.InvalidUserCredentialsError)) or (
            isinstance(error, nats.errors.Error)
            and re.search("authorization|authentication", str(error), re.IGNORECASE) is not None)


def describe(error: BaseException) -> str:
    """
    Describe an error that may have no text.

    :param error: to be described
    :return: text
    """
    if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
        return "none in time"
    return str(error) or type(error).__name__
