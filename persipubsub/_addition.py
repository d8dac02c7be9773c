"""Hold what one call of ``put`` adds to a queue, encoded before any lock is taken."""

from collections.abc import Sequence

import lmdb

from persipubsub.store import _blocks, _once, _retention
from persipubsub.store._databases import Databases


class Put:
    """Hold what one call of ``put`` adds, and what came of it."""

    __slots__ = ("messages", "msg_ids", "batches", "count", "size", "audience", "first", "floor",
                 "losses", "is_full")

    def __init__(self,
                 messages: Sequence[bytes],
                 audience: tuple[str, ...] | None,
                 msg_ids: Sequence[bytes | None] | None = None) -> None:
        """
        Encode messages, before any lock is taken.

        :param messages: of the call
        :param audience: ids of the subscribers that get them; everybody if not given
        :param msg_ids: of the messages, None for those without
        """
        self.messages = messages
        self.msg_ids = msg_ids
        self.audience = audience
        self.first = 0
        self.floor: _retention.Floor | None = None
        self.losses: list[_retention.Loss] = []
        self.is_full = False
        if len(messages) == 1:
            # Most calls are of one, and this is done for each of them.
            single = _blocks.encode_single(messages[0])
            self.count, self.size, _ = single
            self.batches: Sequence[tuple[int, int, bytes]] = (single, )
        else:
            self.encode(messages)

    def encode(self, messages: Sequence[bytes]) -> None:
        """
        Choose what to add.

        :param messages: of the call, or some of them
        """
        self.batches = batches = _blocks.encode_batches(messages)
        self.count = sum(batch.messages for batch in batches)
        self.size = sum(batch.size for batch in batches)

    def leave_out_known(self, txn: "lmdb.Transaction[memoryview]", databases: Databases,
                        oldest_ns: int) -> "tuple[dict[bytes, int], dict[bytes, int]]":
        """
        Choose the messages whose ids are not known; of an id that comes twice, the first.

        :param txn: any transaction
        :param databases: handles
        :param oldest_ns: ids that were given before are not known any more
        :return: numbers of the messages of known ids; indices of the others among those to be added
        """
        msg_ids = self.msg_ids or ()
        given = list(dict.fromkeys(msg_id for msg_id in msg_ids if msg_id is not None))
        found = _once.find(txn, databases, given, oldest_ns)
        known = {msg_id: number for msg_id, number in zip(given, found) if number is not None}
        places: dict[bytes, int] = {}
        chosen: list[bytes] = []
        for message, msg_id in zip(self.messages, msg_ids):
            if msg_id is not None:
                if msg_id in known or msg_id in places:
                    continue
                places[msg_id] = len(chosen)
            chosen.append(message)
        self.encode(chosen)
        return known, places
