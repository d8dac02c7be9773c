"""
The command ``persipubsub``: deploy, watch and maintain queues. It needs the extra ``cli``.

Most commands call one function of :py:mod:`persipubsub.control`.
"""
