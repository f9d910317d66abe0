"""The small machines run.py and checkpoints.py are made of: ranks, signals, locks, records, folders on disk."""
