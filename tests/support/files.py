"""Changes to the files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path


def edit_json(file: Path, **changes: object) -> None:
    """Give keys of a JSON file other values."""
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **changes}), "utf-8")
