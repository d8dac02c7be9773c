"""
Import late, where nobody forks meanwhile.

A child that is forked while another thread imports a module would wait for ever for that thread
when it imports the module as well. Who forks holds the lock, see ``environment/_registry``.
"""

import threading
from typing import Final

#: To be held around an import that is not at the beginning of a module, unless the registry's lock
#: is held. What is imported must not use a queue. Re-entrant: a signal handler may fork.
LOCK: Final = threading.RLock()
