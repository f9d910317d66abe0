"""Does distribution matching by frequency help? Runs with it and without, and what their errors share: run.py."""
