"""
The command ``persipubsub``: deploy, watch and maintain queues. It needs the extra ``cli``.

Each command is a thin face of a function of :py:mod:`persipubsub.control`.
"""
