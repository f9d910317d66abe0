"""`python -m trainkit.options > docs/flags.md`"""

import sys

from trainkit.options import CONCERNS, PRESETS
from trainkit.options.text import markdown

sys.stdout.write(markdown(CONCERNS, PRESETS))
