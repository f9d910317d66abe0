"""A folder that can prove it is whole: `manifest.json` holds the size and SHA-256 of every file in it.

Files that a resume reads are listed under "files" and checked; copies for other programs under "exports", as a note.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container
from pathlib import Path

from trainkit.files import Json, sha256, write_json

NAME = "manifest.json"


class Damaged(Exception):
    """A folder is not what its manifest says; the message names the file and the difference."""


def _seal_of(body: dict[str, Json]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def seal(folder: Path, facts: dict[str, Json], *, exports: Container[str] = ()) -> None:
    """Write the manifest of everything in `folder` now, with `facts` beside it, and its own hash.

    exports  names of files that a folder is whole without
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != NAME)
    listed = {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": sha256(p)} for p in files}
    body = {**facts, "files": {name: entry for name, entry in listed.items() if name not in exports},
            "exports": {name: entry for name, entry in listed.items() if name in exports}}
    write_json(folder / NAME, {**body, "seal": _seal_of(body)})


def check(folder: Path) -> dict[str, Json]:
    """The facts of a folder whose every file is as sealed, exports aside.

    Raises Damaged: no manifest, an altered manifest, a file missing, of another size or of another content.
    """
    body = _read(folder / NAME)
    for name, entry in body["files"].items():
        try:
            _check_file(folder / name, name, entry)
        except FileNotFoundError as error:  # gone while we look, as when its folder is being pruned
            raise Damaged(f"{name} is missing") from error
    return body


def _check_file(path: Path, name: str, entry: dict[str, Json]) -> None:
    if not path.is_file():
        raise Damaged(f"{name} is missing")
    if path.stat().st_size != entry["size"]:
        raise Damaged(f"{name} has {path.stat().st_size:,} bytes instead of {entry['size']:,}")
    if sha256(path) != entry["sha256"]:
        raise Damaged(f"{name} has other content than was written (SHA-256 differs)")


def _read(path: Path) -> dict[str, Json]:
    try:
        body = json.loads(path.read_bytes())
    except OSError as error:
        raise Damaged(f"{NAME} is missing or unreadable") from error
    except ValueError as error:
        raise Damaged(f"{NAME} is not JSON") from error
    if not isinstance(body, dict) or body.pop("seal", None) != _seal_of(body):
        raise Damaged(f"{NAME} was altered (its own hash differs)")
    return body
