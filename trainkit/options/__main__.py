"""`python -m trainkit.options > docs/flags.md`"""

import sys

from trainkit.errors import accept_all_text
from trainkit.options import PRESETS, TRAINERS
from trainkit.options.config_text import markdown

accept_all_text()
sys.stdout.write(markdown(TRAINERS, PRESETS))
