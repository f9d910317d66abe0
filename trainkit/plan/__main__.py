"""`python -m trainkit.plan > docs/memory.md`"""

import sys

from trainkit.errors import plain_output
from trainkit.plan import tables

plain_output()
sys.stdout.write(tables.page())
