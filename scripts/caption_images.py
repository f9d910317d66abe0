#!/usr/bin/env python
"""Write captions of training images with a model: trainkit/tools/caption_images.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainkit.errors import exit_with_message
from trainkit.tools.caption_images import main

if __name__ == "__main__":
    exit_with_message(main)
