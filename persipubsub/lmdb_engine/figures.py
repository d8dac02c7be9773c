"""What is in a queue and what happened to it, counted without a walk through the messages."""

from collections.abc import Sequence
from typing import Final

from persipubsub.lmdb_engine import files
from persipubsub.lmdb_engine import format as fmt
from persipubsub.lmdb_engine import log, positions
from persipubsub.lmdb_engine.claims import Span, find_claims
from persipubsub.lmdb_engine.environment import Environment
from persipubsub.lmdb_engine.format import Tx
from persipubsub.statistics import InFlight, QueueStatistics, SubscriberStatistics, share

#: Counters of a subscriber that are shown as they are.
_COUNTERS: Final = ("position", "acknowledged", "failed", "dropped_by_timeout", "dropped_by_mark",
                    "cleared", "skipped", "corrupt", "dead_lettered")


def collect(opened: Environment, now_ns: int) -> QueueStatistics:
    """Collect the figures in one snapshot."""
    queue, mark = opened.queue, opened.queue.high_water_mark
    end, sent, count, size, age_ns, commits, subscribers = opened.read(_count, now_ns)
    wanted = {record.ordinal: (record.position, end) for record, _ in subscribers}
    # None if the system does not tell.
    claims = find_claims(opened.directory, wanted, opened.page)
    file_bytes = opened.file_bytes()
    age = None if age_ns is None else age_ns / 1e9
    return QueueStatistics(
        path=opened.directory, messages=count, message_share=share(count, mark.max_msgs_num),
        message_bytes=size, byte_share=share(size, mark.size_bytes), file_bytes=file_bytes,
        file_share=share(file_bytes, queue.max_db_size_bytes), oldest_age_seconds=age,
        age_share=share(age or 0.0, mark.msg_timeout_secs), next_number=end, commits=commits,
        subscribers=tuple(
            _subscriber(record, lag, now_ns, None if claims is None else claims[record.ordinal])
            for record, lag in subscribers), sent=sent,
        journal_bytes=opened.journal.bytes_on_disk(), journal_lag_bytes=opened.journal.lag_bytes(),
        disk_bytes=files.disk_bytes(opened.directory))


def _count(
        tx: Tx, now_ns: int
) -> tuple[int, int, int, int, int | None, int, list[tuple[fmt.Subscriber, int]]]:
    """Count in a transaction: end, sent, waiting messages and bytes, age, commits, subscribers."""
    cursor = tx.cursor()
    log_end = log.read_end(cursor)
    oldest = log_end.next_number
    subscribers = []
    for record in positions.read_all(tx):
        lag = positions.count_pending(tx, record, 0, log_end.next_number)
        if lag:
            oldest = min(oldest, positions.first_pending(tx, record, log_end.next_number))
        subscribers.append((record, lag))
    place = log.place_of(cursor, oldest)
    found = log.seek(cursor, oldest) if oldest < log_end.next_number else None
    age_ns = None if found is None else max(0, now_ns - found.block.time_ns)
    return (log_end.next_number, log_end.total_count, log_end.total_count - place.messages,
            log_end.total_bytes - place.size, age_ns, tx.txn.id(), subscribers)


def _subscriber(record: fmt.Subscriber, lag: int, now_ns: int,
                spans: Sequence[Span] | None) -> SubscriberStatistics:
    ticks_ns = files.ticks_ns()
    claims = []
    for first, length, note in spans or ():
        process_id, since_ns = (None, None) if note is None else note
        seconds = None if since_ns is None else max(0, ticks_ns - since_ns) / 1e9
        claims.append(InFlight(record.name, first, length, process_id, seconds))
    since_ns = record.acknowledged_ns
    return SubscriberStatistics(
        subscriber=record.name, lag=lag,
        in_flight=None if spans is None else min(lag, sum(span.length for span in spans)),
        seconds_since_acknowledged=max(0, now_ns - since_ns) / 1e9 if since_ns else None,
        claims=tuple(claims), is_paused=bool(record.flags & fmt.FLAG_PAUSED),
        **{counter: getattr(record, counter)
           for counter in _COUNTERS})
