"""
Keep queues on the servers of NATS JetStream, for processes of more than one machine.

Nothing here is imported before a queue with the path ``nats://...`` is used; it needs the extra
``nats``.
"""
