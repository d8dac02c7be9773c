"""
Do what no process may fork in the middle of: imports at the first use, and opening descriptors.

A child that is forked while another thread imports a module would wait for ever for that thread
when it imports the module as well, and one that is forked while a descriptor is opened would share
it unknown to anybody.
"""

import os
import threading
from typing import Final

#: To be held meanwhile, for a moment; nothing is waited for, and no queue used, with it. Not needed
#: where the registry's lock is held. Re-entrant: a signal handler may fork. Who forks with other
#: locks held, as ``environment/_registry`` does, has it already when it comes to what is below.
LOCK: Final = threading.RLock()

os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)
