"""
Steer queues from the command line. It needs the extra ``cli``.

A thin face of :py:mod:`persipubsub.control`: each command of it is a function there.
"""
