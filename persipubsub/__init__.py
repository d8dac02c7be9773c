"""
Publish and subscribe between the processes of one machine, persistently and without a broker.

Make the queues of a configuration file ready with :py:mod:`persipubsub.control`, send with
:py:class:`persipubsub.publisher.Pub`, receive with :py:class:`persipubsub.subscriber.Sub`.

Importing the package is cheap: the modules below are imported when they are used first.

>>> import persipubsub
>>> persipubsub.errors.ConfigError.__mro__[1].__name__
'PersipubsubError'
"""

import importlib
import types
import typing

if typing.TYPE_CHECKING:
    from persipubsub import (aio, config, control, dead_letter, errors, message, publisher, queue,
                             statistics, subscriber)

__version__ = "1.0.0"

__all__ = [
    "aio", "config", "control", "dead_letter", "errors", "message", "publisher", "queue",
    "statistics", "subscriber"
]

# It needs an extra: not for an import of everything, nor for who looks at all attributes.
_WITH_EXTRA = "metrics"


def __getattr__(name: str) -> types.ModuleType:
    """
    Import a public module at its first use.

    Nobody needs all of them: an import of everything would make each start of a small subscriber
    pay for the publisher and the deployment. Safe from many threads, as imports are.

    :param name: of the attribute that was not found in the package
    :return: the module, which Python then keeps as the package's attribute
    :raise AttributeError: if there is no public module of that name
    :raise ImportError: if it needs an extra that is not installed
    """
    if name not in __all__ and name != _WITH_EXTRA:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    """Return the names in the package with those of the modules that were not imported yet."""
    return sorted(set(globals()) | set(__all__))
