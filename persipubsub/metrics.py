"""
Expose the statistics of queues to Prometheus.

It needs the extra ``metrics``. Register a :py:class:`Collector` in a program that serves metrics
anyway, or let :py:func:`serve` (the command ``persipubsub metrics``) do it.
"""

import concurrent.futures
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias

import msgspec.structs

try:
    import prometheus_client
    import prometheus_client.metrics_core
    import prometheus_client.registry
except ModuleNotFoundError as _error:
    raise ModuleNotFoundError(
        f"persipubsub.metrics needs {_error.name}. Install it with: pip install "
        f"'persipubsub[metrics]'",
        name=_error.name) from None

import persipubsub.config
import persipubsub.control
from persipubsub.errors import ConfigError, PersipubsubError
from persipubsub.statistics import QueueStatistics

__all__ = ["Collector", "serve"]

#: Longest wait of a scrape for the queues, in seconds. By default, Prometheus waits 10 for a whole
#: scrape.
_LOOK_SECS: Final = 5.0

_Metric: TypeAlias = prometheus_client.metrics_core.Metric

#: The field of a queue, or of a subscriber, and the help, by the name of the metric. Counters have
#: names that end with "_total". A figure that is None is left out.
_QUEUE: Final = {
    "queue_messages": ("messages", "Messages from the oldest one on that somebody needs."),
    "queue_message_bytes": ("message_bytes", "Bytes of the messages that wait."),
    "queue_oldest_age_seconds": ("oldest_age_seconds", "Age of the oldest message that waits."),
    "queue_store_bytes": ("file_bytes", "Size of LMDB's file; on servers, bytes of messages."),
    "queue_journal_bytes": ("journal_bytes", "Size of the journal."),
    "queue_journal_lag_bytes": ("journal_lag_bytes", "About the bytes not in the journal yet."),
    "queue_disk_bytes": ("disk_bytes", "Room that all files of the queue take."),
    "queue_commits_total": ("commits", "Commits since the store was made; on servers, messages."),
    "messages_sent_total": ("sent", "Messages that were sent."),
}
_SUBSCRIBER: Final = {
    "subscriber_lag_messages": ("lag", "Messages that the subscriber still has to acknowledge."),
    "subscriber_in_flight_messages": ("in_flight", "Messages that consumers hold right now."),
    "subscriber_paused": ("is_paused", "1 while the subscriber is paused."),
    "subscriber_last_acknowledged_age_seconds": ("seconds_since_acknowledged",
                                                 "Time since the last acknowledgement."),
    "messages_acknowledged_total": ("acknowledged", "Messages that were acknowledged."),
    "messages_dead_lettered_total": ("dead_lettered", "Messages given up after max_deliveries."),
    "messages_corrupt_total": ("corrupt", "Damaged messages that were set aside."),
    "messages_skipped_total": ("skipped", "Messages that the subscriber passed unread."),
    "deliveries_failed_total": ("failed", "Deliveries that ended with an exception."),
}
_LIMITS: Final = {
    "MAX_MSGS_NUM": "message_share",
    "HWM_LMDB_SIZE_BYTES": "byte_share",
    "MSG_TIMEOUT_SECS": "age_share",
    "max_db_size_bytes": "file_share"
}
_DROPS: Final = {"timeout": "dropped_by_timeout", "mark": "dropped_by_mark", "clear": "cleared"}


class Collector(prometheus_client.registry.Collector):
    """
    Collect the statistics of queues at each scrape. Any thread may call it.

    Queues are open only as long as a scrape takes, so that maintenance finds them unused. A scrape
    looks at all queues at the same time, for 5 seconds at most.

    >>> import prometheus_client
    >>> registry = prometheus_client.CollectorRegistry()
    >>> registry.register(Collector("/etc/missing.json"))
    >>> bool(registry.get_sample_value("persipubsub_config_valid"))
    False
    """

    def __init__(self,
                 config_pth: persipubsub.config.ConfigLike,
                 queue_key: str | None = None) -> None:
        """
        Initialize without touching a file: the configuration is read at each scrape.

        :param config_pth: path to the configuration file, or its content
        :param queue_key: key in ``queues``; all of them if not given
        """
        self._config_pth = config_pth
        self._queue_key = queue_key

    def describe(self) -> Iterator[_Metric]:
        """
        Describe nothing, so that registering does not open the queues.

        :return: nothing
        """
        return iter(())

    def collect(self) -> Iterator[_Metric]:
        """
        Look at the queues.

        :return: metrics
        """
        config = None
        with contextlib.suppress(ConfigError):
            config = persipubsub.config.read(self._config_pth)
        keys = list(config.queues) if config is not None else []
        if self._queue_key is not None:
            keys = [self._queue_key]
        found = {} if config is None else _look_at(config, keys)
        is_valid = int(config is not None)
        yield _metric("config_valid", "1 if the configuration file is fine.", [], [((), is_valid)])
        yield _metric("queue_up", "1 if the queue can be looked at.", ["queue"],
                      [((key, ), int(key in found)) for key in keys])
        queues = [((key, ), figures) for key, figures in found.items()]
        for name, (field, text) in _QUEUE.items():
            yield _metric(name, text, ["queue"],
                          [(labels, getattr(one, field)) for labels, one in queues])
        shares = [((*labels, limit), getattr(one, field)) for labels, one in queues
                  for limit, field in _LIMITS.items()]
        yield _metric("queue_limit_ratio", "Used share of each limit; 1 is the limit.",
                      ["queue", "limit"], shares)

        subscribers = [((key, one.subscriber), one) for key, figures in found.items()
                       for one in figures.subscribers]
        for name, (field, text) in _SUBSCRIBER.items():
            yield _metric(name, text, ["queue", "subscriber"],
                          [(labels, getattr(one, field)) for labels, one in subscribers])
        longest = [(labels, max((claim.seconds or 0.0 for claim in one.claims), default=None))
                   for labels, one in subscribers]
        yield _metric("subscriber_longest_in_flight_seconds",
                      "Longest time for which a consumer has held its messages.",
                      ["queue", "subscriber"], longest)
        drops = [((*labels, reason), getattr(one, field)) for labels, one in subscribers
                 for reason, field in _DROPS.items()]
        yield _metric("messages_dropped_total", "Messages that were dropped unread.",
                      ["queue", "subscriber", "reason"], drops)


def _metric(name: str, text: str, labels: Sequence[str],
            samples: Sequence[tuple[tuple[str, ...], float | None]]) -> _Metric:
    """Make a metric; a figure that is None is left out."""
    families = prometheus_client.metrics_core
    kind = families.CounterMetricFamily if name.endswith("_total") else families.GaugeMetricFamily
    family: Any = kind(f"persipubsub_{name}", text, labels=labels)
    for values, value in samples:
        if value is not None:
            family.add_metric(values, value)
    return family  # type: ignore[no-any-return]


def _look_at(config: persipubsub.config.Config, keys: Sequence[str]) -> dict[str, QueueStatistics]:
    """
    Count what is in queues, in a thread for each.

    One after the other, a few servers that are away would take longer than Prometheus waits, and
    the figures of all others would be missing, too.
    """
    # A thread has to end soon after the scrape: threads would add up.
    queues = {
        key: msgspec.structs.replace(queue,
                                     busy_timeout_secs=min(queue.busy_timeout_secs, _LOOK_SECS))
        for key, queue in config.queues.items()
    }
    impatient = msgspec.structs.replace(config, queues=queues)
    pool = concurrent.futures.ThreadPoolExecutor(len(keys) or 1)
    looks = [pool.submit(persipubsub.control.statistics, impatient, key) for key in keys]
    pool.shutdown(wait=False)
    concurrent.futures.wait(looks, timeout=_LOOK_SECS)
    found: dict[str, QueueStatistics] = {}
    for look in looks:
        with contextlib.suppress(PersipubsubError, TimeoutError):
            found.update(look.result(timeout=0))
    return found


@contextlib.contextmanager
def serve(config_pth: persipubsub.config.ConfigLike,
          queue_key: str | None = None,
          port: int = 9464,
          address: str = "127.0.0.1") -> Iterator[str]:
    """
    Serve the metrics over HTTP while the block runs.

    Without a password and without TLS: an address other than that of the loopback interface shows
    ids and figures to all who can reach it.

    :param config_pth: path to the configuration file, or its content
    :param queue_key: key in ``queues``; all of them if not given
    :param port: TCP port; 0: any that is free
    :param address: of this machine, to listen at
    :return: context manager of the URL
    :raise OSError: if nothing can listen there
    """
    registry = prometheus_client.CollectorRegistry()
    registry.register(Collector(config_pth, queue_key))
    server, _ = prometheus_client.start_http_server(port, addr=address, registry=registry)
    try:
        host = f"[{address}]" if ":" in address else address
        yield f"http://{host}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
