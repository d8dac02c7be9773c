"""
Keep one environment open for each store of this process: files, gates, transactions, checkpoints.

Whoever wants to know what survives a fork, a killed process or a power failure finds it here.
Nothing of it is public.
"""
