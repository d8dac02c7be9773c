"""What is in a queue and what happened to it, counted without a walk through the messages."""

from typing import Final

from persipubsub.lmdb_engine import files
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log, positions
from persipubsub.lmdb_engine.claims import find_claims
from persipubsub.lmdb_engine.environment import Environment
from persipubsub.lmdb_engine.format import Tx
from persipubsub.statistics import InFlight, QueueStatistics, SubscriberStatistics, share

#: Counters of a subscriber that are shown as they are.
_COUNTERS: Final = ("position", "acknowledged", "failed", "dropped_by_timeout", "dropped_by_mark",
                    "cleared", "skipped", "corrupt", "dead_lettered")


def collect(opened: Environment, now_ns: int) -> QueueStatistics:
    """Collect the figures in one snapshot."""
    return opened.read(_collect, opened, now_ns)


def _collect(tx: Tx, opened: Environment, now_ns: int) -> QueueStatistics:
    cursor = tx.cursor()
    log_end = log.read_end(cursor)
    oldest = end = log_end.next_number
    records = positions.read_all(tx)
    claims = find_claims(opened.directory, records, end, opened.page)
    subscribers = []
    for record in records:
        lag = positions.count_pending(tx, record, 0, end)
        if lag:
            oldest = min(oldest, positions.first_pending(tx, record, end))
        subscribers.append(_subscriber(record, lag, now_ns, claims[record.ordinal]))
    place = log.place_of(cursor, oldest)
    count, size = log_end.total_count - place.total_count, log_end.total_bytes - place.total_bytes
    found = log.seek(cursor, oldest) if oldest < end else None
    age = None if found is None else max(0, now_ns - found.block.time_ns) / 1e9
    queue, mark, file_bytes = opened.queue, opened.queue.high_water_mark, opened.file_bytes()
    return QueueStatistics(
        path=opened.directory,
        messages=count,
        message_share=share(count, mark.max_msgs_num),
        message_bytes=size,
        byte_share=share(size, mark.size_bytes),
        file_bytes=file_bytes,
        file_share=share(file_bytes, queue.max_db_size_bytes),
        oldest_age_seconds=age,
        age_share=share(age or 0.0, mark.msg_timeout_secs),
        next_number=end,
        commits=tx.txn.id(),
        subscribers=tuple(subscribers),
        sent=log_end.total_count,
        journal_bytes=opened.journal.bytes_on_disk(),
        journal_lag_bytes=opened.journal.lag_bytes(),
        disk_bytes=files.disk_bytes(opened.directory),
    )


def _subscriber(record: fmt.Subscriber, lag: int, now_ns: int,
                claims: list[InFlight]) -> SubscriberStatistics:
    since_ns = record.acknowledged_ns
    return SubscriberStatistics(subscriber=record.name,
                                lag=lag,
                                in_flight=min(lag, sum(claim.count for claim in claims)),
                                seconds_since_acknowledged=max(0, now_ns - since_ns) /
                                1e9 if since_ns else None,
                                claims=tuple(claims),
                                is_paused=bool(record.flags & fmt.FLAG_PAUSED),
                                **{counter: getattr(record, counter)
                                   for counter in _COUNTERS})
