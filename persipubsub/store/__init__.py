"""
Say what the bytes of a store mean, and change them inside of a transaction.

Nothing here opens a file, waits or logs: every function is given a transaction, or is pure. Nothing
of it is public; the format itself is.
"""
