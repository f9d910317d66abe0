"""`python -m trainkit.options > docs/flags.md`"""

import sys

from trainkit.errors import plain_output
from trainkit.options import PRESETS, TRAINERS
from trainkit.options.config_text import markdown

plain_output()
sys.stdout.write(markdown(TRAINERS, PRESETS))
