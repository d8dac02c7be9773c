"""
Expose the statistics of queues to Prometheus.

It needs the extra ``metrics``. Register a :py:class:`Collector` in a program that serves metrics
anyhow, or let :py:func:`serve` (the command ``persipubsub metrics``) do it.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Union

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
import persipubsub.errors
import persipubsub.statistics
from persipubsub import _counting

__all__ = ["Collector", "serve"]

#: Servers are waited for so long. By default, Prometheus waits for 10 seconds for all figures.
_SERVER_SECS: Final = 5.0

_Family = Union[prometheus_client.metrics_core.GaugeMetricFamily,
                prometheus_client.metrics_core.CounterMetricFamily]


class _Metric(NamedTuple):
    """Describe a metric that is a field of the statistics."""

    name: str
    field: str
    is_counter: bool
    help: str


_QUEUE_METRICS: Final = (
    _Metric("messages", "messages", False, "Messages that somebody still has to acknowledge."),
    _Metric("message_bytes", "message_bytes", False, "Bytes of these messages."),
    _Metric("file_bytes", "file_bytes", False, "Size of the data file."),
    _Metric("oldest_age_seconds", "oldest_age_seconds", False,
            "Age of the oldest waiting message; missing if none waits."),
    _Metric("numbers", "next_number", True,
            "Number of the next message: what was sent, but for gaps."),
    _Metric("commits", "commits", True,
            "Write transactions since the store was created, compacted or restored."),
)

_SHARES: Final = {
    "MAX_MSGS_NUM": "message_share",
    "HWM_LMDB_SIZE_BYTES": "byte_share",
    "MSG_TIMEOUT_SECS": "age_share",
    "max_db_size_bytes": "file_share"
}

_SUBSCRIBER_METRICS: Final = (
    _Metric("lag", "lag", False, "Messages that the subscriber still has to acknowledge."),
    _Metric("in_flight", "in_flight", False, "Of these, how many are being worked on right now."),
    _Metric("acknowledged", "acknowledged", True, "Messages that were received and acknowledged."),
    _Metric("failed", "failed", True, "Deliveries that ended with an exception."),
    _Metric("skipped", "skipped", True,
            "Messages that pop_to_top and receive_to_top acknowledged, or seek passed unread."),
    _Metric("corrupt", "corrupt", True, "Damaged messages that were set aside."),
    _Metric("dead_lettered", "dead_lettered", True,
            "Messages that were given up after max_deliveries."),
    _Metric("seconds_since_acknowledged", "seconds_since_acknowledged", False,
            "Time since the last acknowledgement; missing before the first one."),
)

_DROPS: Final = {"timeout": "dropped_by_timeout", "mark": "dropped_by_mark", "clear": "cleared"}


class Collector(prometheus_client.registry.Collector):
    """
    Collect the statistics of queues at each scrape. Any thread may call it.

    Queues are open only as long as a scrape takes, so that maintenance finds them unused. Those on
    servers are looked at at the same time, for 5 seconds at most.

    >>> import prometheus_client
    >>> registry = prometheus_client.CollectorRegistry()
    >>> registry.register(Collector("/etc/missing.json"))
    >>> registry.get_sample_value("persipubsub_config_up") == 0
    True
    """

    def __init__(self,
                 config_pth: Union[str, "os.PathLike[str]"],
                 queue_key: str | None = None) -> None:
        """
        Initialize without touching a file: the configuration is read at each scrape.

        :param config_pth: path to the configuration file
        :param queue_key: key in ``queues``; all of them if not given
        """
        self._config_pth = config_pth
        self._queue_key = queue_key

    def describe(self) -> Iterator[prometheus_client.metrics_core.Metric]:
        """
        Describe nothing, so that registering does not open the queues.

        :return: nothing
        """
        return iter(())

    def collect(self) -> Iterator[prometheus_client.metrics_core.Metric]:
        """
        Look at the queues.

        :return: metrics
        """
        try:
            config = persipubsub.config.read(self._config_pth)
        except persipubsub.errors.ConfigError:
            config = None
        if self._queue_key is not None:
            keys = [self._queue_key]
        else:
            keys = [] if config is None else list(config.queues)
        found = {} if config is None else _look_at(config, keys)
        statistics = {key: figures for key, figures in found.items() if figures is not None}
        family = prometheus_client.metrics_core.GaugeMetricFamily
        yield family("persipubsub_config_up", "1 if the configuration file is fine.",
                     int(config is not None))
        up = family("persipubsub_up", "1 if the queue can be looked at.", labels=["queue"])
        for key in keys:
            up.add_metric([key], int(key in statistics))
        yield up
        yield from _queue_families(statistics)
        yield from _subscriber_families(statistics)


def _look_at(
    config: persipubsub.config.Config,
    keys: Sequence[str],
) -> dict[str, persipubsub.statistics.QueueStatistics | None]:
    """
    Count what is in queues, in directories right here, on servers in a thread for each.

    One after the other, a few servers that are away would take longer than anybody waits, and the
    figures of all others would be missing, too.

    :param config: that describes the queues
    :param keys: of the queues
    :return: figures by queue; None for those that could not be looked at in time
    """
    deadline = time.monotonic() + _SERVER_SECS
    found: dict[str, persipubsub.statistics.QueueStatistics | None] = {}
    threads: list[threading.Thread] = []

    def look(key: str, config: persipubsub.config.Config) -> None:
        try:
            found[key] = _counting.statistics_of(config, key)
        except persipubsub.errors.PersipubsubError:
            found[key] = None

    on_servers = [
        key for key in keys
        if key in config.queues and persipubsub.config.scheme_of(config.queues[key].path or "")
    ]
    for key in on_servers:
        # A daemon: the exit waits for it no longer than a scrape does.
        threads.append(
            threading.Thread(target=look,
                             args=(key, _impatient(config, key)),
                             name="persipubsub-metrics",
                             daemon=True))
        threads[-1].start()
    for key in keys:
        if key not in on_servers:
            look(key, config)
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    # One that is late may come to its end while this is read.
    return {key: found.get(key) for key in keys}


def _impatient(config: persipubsub.config.Config, key: str) -> persipubsub.config.Config:
    """
    Let nobody wait for servers after the scrape: threads would add up.

    :param config: that describes the queue
    :param key: of the queue
    :return: configuration in which each call for this queue is given up in time
    """
    queue = config.queues[key]
    secs = min(queue.busy_timeout_secs, _SERVER_SECS)
    return msgspec.structs.replace(
        config, queues={key: msgspec.structs.replace(queue, busy_timeout_secs=secs)})


def _make(metric: _Metric, labels: Sequence[str]) -> _Family:
    """
    Make an empty metric.

    :param metric: description
    :param labels: names of the labels
    :return: metric
    """
    kind = (prometheus_client.metrics_core.CounterMetricFamily
            if metric.is_counter else prometheus_client.metrics_core.GaugeMetricFamily)
    return kind(f"persipubsub_{metric.name}", metric.help, labels=labels)


def _queue_families(
    statistics: Mapping[str, persipubsub.statistics.QueueStatistics], ) -> Iterator[_Family]:
    """
    Make the metrics of queues.

    :param statistics: by queue
    :return: metrics
    """
    for metric in _QUEUE_METRICS:
        family = _make(metric, ["queue"])
        for key, figures in statistics.items():
            value = getattr(figures, metric.field)
            if value is not None:
                family.add_metric([key], value)
        yield family
    shares = _make(_Metric("share", "", False, "Share of each limit; 1 is the limit."),
                   ["queue", "limit"])
    for key, figures in statistics.items():
        for limit, field in _SHARES.items():
            shares.add_metric([key, limit], getattr(figures, field))
    yield shares


def _subscriber_families(
    statistics: Mapping[str, persipubsub.statistics.QueueStatistics], ) -> Iterator[_Family]:
    """
    Make the metrics of subscribers.

    :param statistics: by queue
    :return: metrics
    """
    subscribers = [(key, one) for key, figures in statistics.items() for one in figures.subscribers]
    for metric in _SUBSCRIBER_METRICS:
        family = _make(metric, ["queue", "subscriber"])
        for key, one in subscribers:
            value = getattr(one, metric.field)
            if value is not None:
                family.add_metric([key, one.subscriber], value)
        yield family
    drops = _make(_Metric("dropped", "", True, "Messages that were dropped unread."),
                  ["queue", "subscriber", "reason"])
    for key, one in subscribers:
        for reason, field in _DROPS.items():
            drops.add_metric([key, one.subscriber, reason], getattr(one, field))
    yield drops


@contextlib.contextmanager
def serve(config_pth: Union[str, "os.PathLike[str]"],
          queue_key: str | None = None,
          port: int = 9464) -> Iterator[str]:
    """
    Serve the metrics over HTTP, on the loopback address only, while the block runs.

    :param config_pth: path to the configuration file
    :param queue_key: key in ``queues``; all of them if not given
    :param port: TCP port; 0: any that is free
    :return: context manager of the address
    """
    registry = prometheus_client.CollectorRegistry()
    registry.register(Collector(config_pth, queue_key))
    server, thread = prometheus_client.start_http_server(port, addr="127.0.0.1", registry=registry)
    try:
        yield f"http://127.0.0.1:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
