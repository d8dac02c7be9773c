"""
Look after queues for the people on call: look at messages, verify, back up, compact, restore.

:py:mod:`persipubsub.control` is the public face of it.
"""
