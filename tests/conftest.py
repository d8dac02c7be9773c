"""Make the tests independent of how they were started."""

import signal

# A shell starts what runs in the background with SIGINT ignored, and processes inherit that: those
# that the tests interrupt would go on for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
