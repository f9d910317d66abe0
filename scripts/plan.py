#!/usr/bin/env python
"""Show how much memory a training needs, and which flags make it fit your card: trainkit/tools/plan.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainkit.errors import exit_with_message
from trainkit.tools.plan import main

if __name__ == "__main__":
    exit_with_message(main)
