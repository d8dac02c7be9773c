"""
Publish and subscribe between the processes of one machine, persistently and without a broker.

Make the queues of a configuration ready with :py:mod:`persipubsub.control`, send with
:py:class:`persipubsub.publisher.Pub`, receive with :py:class:`persipubsub.subscriber.Sub`; tasks of
``asyncio`` use :py:mod:`persipubsub.aio`. The four classes are here as ``Pub``, ``Sub``,
``AsyncPub`` and ``AsyncSub``.

Importing the package is cheap: everything is imported when it is used first.

>>> import persipubsub
>>> persipubsub.errors.ConfigError.__mro__[1].__name__
'PersipubsubError'
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from persipubsub import (aio, config, control, errors, message, metrics, publisher, queue,
                             statistics, subscriber)
    from persipubsub.aio import Pub as AsyncPub
    from persipubsub.aio import Sub as AsyncSub
    from persipubsub.publisher import Pub
    from persipubsub.subscriber import Sub

__version__ = "2.0.0"

__all__ = [
    "AsyncPub", "AsyncSub", "Pub", "Sub", "aio", "config", "control", "errors", "message",
    "publisher", "queue", "statistics", "subscriber"
]

#: Modules of the classes.
_CLASSES: typing.Final = {
    "Pub": "publisher",
    "Sub": "subscriber",
    "AsyncPub": "aio",
    "AsyncSub": "aio"
}

# It needs an extra: ``import *`` has to work without it.
_WITH_EXTRA: typing.Final = "metrics"

# Type checkers would take any name for one of the package.
if not typing.TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """
        Import a public module, or a class of one, at its first use.

        A small subscriber does not pay for the publisher and the deployment. Safe from many
        threads, as imports are.

        :param name: of the attribute that was not found in the package
        :return: module or class, which then stays as the package's attribute
        :raise AttributeError: if there is nothing public of that name
        :raise ImportError: if it needs an extra that is not installed
        """
        if name in _CLASSES:
            module = importlib.import_module(f"{__name__}.{_CLASSES[name]}")
            return globals().setdefault(name, getattr(module, name.removeprefix("Async")))
        if name not in __all__ and name != _WITH_EXTRA:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    """Return the names in the package with those of the modules that were not imported yet."""
    return sorted(set(globals()) | set(__all__))
