"""Model cards, written from the measurements and the training records; nothing in them is typed by hand but the words."""

import json
from pathlib import Path

from base_models.export import MODEL_FOLDERS
from base_models.loop import replace_text

DATA = """Trained on {pairs} pictures of {nouns} nouns in three drawing styles (`noto`, `twemoji`, `fluent`), each captioned with noun
and style, composed on white at 64 px. {withheld} (noun, style) pairs were withheld from the UNet; every noun kept at least one
style. The 3-D style of `assets/icons-3d` was shown to no model.

| style | package | version | licence |
|---|---|---|---|
| noto | `emoji-datasource-google` | 16.0.0 | Noto Emoji, Apache-2.0 |
| twemoji | `emoji-datasource-twitter` | 16.0.0 | Twemoji, CC-BY 4.0, (c) Twitter, Inc and other contributors |
| fluent | `@iconify-json/fluent-emoji-flat` | 1.2.6 | Fluent Emoji, MIT, (c) Microsoft Corporation |

The tokenizer is CLIP's byte-pair encoding cut to 3,980 entries (first 3,000 merges and all that the captions' words need, from
`open-clip-torch` 3.3.0, MIT): words it knows get CLIP's own pieces. BOS and EOS ids in the configs are the true ones.
"""
HEAD = "---\nlicense: {licence}\nlibrary_name: {library}\ntags:\n{tags}\n---\n\n"


def read_scores(work_dir: Path) -> dict:
    path = work_dir / "evaluation.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
