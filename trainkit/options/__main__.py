"""`python -m trainkit.options > docs/flags.md`"""

import sys

from trainkit.options import PRESETS, TRAINERS
from trainkit.options.config_text import markdown

sys.stdout.write(markdown(TRAINERS, PRESETS))
