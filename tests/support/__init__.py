"""What test modules share. No test module imports another one."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.register_assert_rewrite("tests.support.compare")  # its assertions show what differs, as a test's own do
