"""The engine on LMDB and a journal: queues in directories of this machine."""
