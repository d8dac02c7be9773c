"""Be an engine that offers what every engine has to, and nothing else: LMDB in a veil."""

import persipubsub.config
import persipubsub.queue
from persipubsub import _engines


class Consumer:
    """Take messages, and wait for them in a thread."""

    def __init__(self, consumer: _engines.Consumer) -> None:
        """Wrap a consumer."""
        self._consumer = consumer

    def take(self,
             timeout: float | None,
             longest_pause: float = 1.0,
             max_messages: int = 1) -> _engines.Lease | None:
        """Take messages."""
        return self._consumer.take(timeout, longest_pause, max_messages)

    def take_newest(self,
                    timeout: float | None,
                    longest_pause: float = 1.0) -> _engines.Lease | None:
        """Take the newest message."""
        return self._consumer.take_newest(timeout, longest_pause)

    def front(self) -> bytes | None:
        """Look at the next message."""
        return self._consumer.front()


class Queue:
    """Be one open queue."""

    def __init__(self, queue: persipubsub.queue.Queue) -> None:
        """Wrap a queue."""
        self._queue = queue
        self.put = queue.put
        self.check_sizes = queue.check_sizes
        self.require_subscribers = queue.require_subscribers
        self.skip_to_newest = queue.skip_to_newest
        self.prune = queue.prune
        self.clear = queue.clear
        self.close = queue.close
        self.statistics = queue.statistics

    def consumer(self, subscriber: str) -> Consumer:
        """Take part in the work of a subscriber."""
        return Consumer(self._queue.consumer(subscriber))


ensure_queue = persipubsub.queue.ensure_queue


def open_queue(config: persipubsub.config.Config, queue_key: str) -> Queue:
    """Open a queue."""
    return Queue(persipubsub.queue.open_queue(config, queue_key))
