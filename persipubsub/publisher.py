"""Publish messages to a queue."""

from collections.abc import Sequence

from persipubsub import face
from persipubsub.config import ConfigLike
from persipubsub.face import BytesLike, MessageId

__all__ = ["Pub", "BytesLike", "MessageId"]


class Pub(face.Blocking[face.Target]):
    """
    Send messages to the queue of a publisher.

    Many threads may use one object at the same time. With ``fsync``, threads that send at the same
    moment share a transaction and a flush; the main thread commits alone. A forked child may use
    the object, too. It can not be pickled.

    >>> import tempfile
    >>> import persipubsub.control
    >>> directory = tempfile.TemporaryDirectory()
    >>> config = {"pub": {"out_queue": "q"}, "sub": {"in_queue": "q"},
    ...           "queues": {"q": {"path": directory.name, "subscribers": ["sub"]}}}
    >>> persipubsub.control.initialize_all_dbs(config)
    >>> with Pub("pub", config) as pub:
    ...     pub.send(b"hello")
    ...     pub.send_many([b"one", b"two"])
    ...     for _ in range(2):
    ...         pub.send(b"an order", msg_id="order 17")  # stored once
    >>> directory.cleanup()
    """

    _kind = face.Target

    def __init__(self,
                 pub_id: str | None = None,
                 config_pth: ConfigLike | None = None,
                 autosync: bool = False) -> None:
        """
        Open the queue of a publisher. Without arguments, call :py:meth:`init` for that.

        :param pub_id: key of the publisher in the configuration
        :param config_pth: see :py:meth:`init`
        :param autosync: True to let ``send_many`` commit each message by itself
        :raise PersipubsubError: as :py:meth:`init` does
        :raise TypeError: if only one of id and configuration is given
        """
        super().__init__(pub_id, config_pth, autosync)

    def init(self, pub_id: str, config_pth: ConfigLike, autosync: bool = False) -> None:
        """
        Open the queue of a publisher. A queue that was open before is closed.

        :param pub_id: key of the publisher in the configuration
        :param config_pth: path to the configuration file, a dictionary with its content, or a
            :py:class:`persipubsub.config.Config`
        :param autosync: True to let ``send_many`` commit each message by itself
        :raise ConfigError: if the configuration is wrong or has no such publisher
        :raise NotInitializedError: if the queue, or one of its subscribers, was not initialized
        :raise FormatError: if the queue's directory holds something else
        :raise StoreCorruptError: if the store is damaged
        """
        self._open(pub_id, config_pth, autosync)

    def send(self,
             msg: BytesLike,
             timeout: float | None = None,
             msg_id: MessageId | None = None) -> None:
        """
        Send a message to all subscribers of the publisher.

        When the call returns, the message is as safe as the queue's ``durability`` says. It waits
        for another process's write for at most about twice ``busy_timeout_secs``.

        With an id, the call may be repeated, also by another process after this one was killed: the
        queue stores one message for an id within ``once_window_secs`` seconds. All publishers of a
        queue share one namespace of ids.

        :param msg: to be sent; may be empty
        :param timeout:
            how long to wait for room where the queue's strategy is ``block``, in seconds; 0: not at
            all; None: for ever
        :param msg_id:
            of the message, 1 to 255 bytes (of a string, in UTF-8); if the queue knows it, nothing
            is sent, and the stored message is safe when the call returns
        :raise TypeError: if the message is not bytes-like, or the id neither a string nor bytes
        :raise ValueError: if the id has another length, or the timeout is no number from 0 on
        :raise MessageTooLargeError: if the queue could never hold the message
        :raise QueueFullError:
            if there is no room, and the queue's strategy is ``reject``, or it is ``block`` and the
            time is over; nothing is sent
        :raise BusyTimeoutError: if another process is in the middle of a write for too long
        :raise DiskFullError: if the disk, or the store, has no room
        """
        target = self._opened or self._require()
        # Not isinstance: an object of a derived class might change.
        if type(msg) is not bytes:  # pylint: disable=unidiomatic-typecheck
            msg = face.encode(msg)
        if timeout is None and msg_id is None:
            target.queue.put((msg, ), target.recipients)
        else:
            target.queue.put((msg, ), target.recipients, face.seconds_of(timeout),
                             face.encode_ids((msg_id, ), count=1))

    def send_many(self,
                  msgs: Sequence[BytesLike],
                  timeout: float | None = None,
                  msg_ids: Sequence[MessageId | None] | None = None) -> None:
        """
        Send messages in one commit: all of them or none.

        With ``autosync``, each message has a commit of its own, in order. After an error, earlier
        messages stay sent.

        A message is left out if the queue knows its id. If an id comes twice, only the first
        message is sent.

        Servers (``nats://...``) have no such commit: after an error, the first messages may be
        sent. Repeating the call with the same ids completes the batch.

        :param msgs: to be sent
        :param timeout:
            how long to wait for room where the queue's strategy is ``block``, in seconds; 0: not at
            all; None: for ever. With ``autosync`` it is for each message.
        :param msg_ids: of the messages, see :py:meth:`send`; an id, or None, for each message
        :raise TypeError:
            if one of them is not bytes-like, or an id is neither a string nor bytes; nothing is
            sent
        :raise ValueError:
            if an id has another length, there are more or fewer ids than messages, or the timeout
            is no number from 0 on
        :raise MessageTooLargeError: if the queue could never hold one of them, or all together
        :raise QueueFullError:
            if there is no room, and the queue's strategy is ``reject``, or it is ``block`` and the
            time is over; nothing is sent
        :raise BusyTimeoutError:
            if another process is in the middle of a write for too long, at most about twice
            ``busy_timeout_secs``
        :raise DiskFullError: if the disk, or the store, has no room
        """
        target = self._require()
        seconds = face.seconds_of(timeout)
        for messages, ids in target.batches(msgs, msg_ids):
            target.queue.put(messages, target.recipients, seconds, ids)
