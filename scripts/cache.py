#!/usr/bin/env python
"""Show, check and clean up the folders that --latent_cache_dir names: trainkit/tools/cache.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainkit.errors import exit_with_message
from trainkit.tools.cache import main

if __name__ == "__main__":
    exit_with_message(main)
