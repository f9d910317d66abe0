"""The checkpoint folders of one run on disk: find them, prove them, put new ones among them, clear old ones away."""

from __future__ import annotations

import logging
import re
import secrets
import shutil
import time
from pathlib import Path

from trainkit import files
from trainkit.errors import Problem, UserError
from trainkit.runtime import manifest

log = logging.getLogger(__name__)

NAME = re.compile(r"checkpoint-(\d+)")

Found = tuple[Path, dict[str, files.Json]]  # a whole checkpoint and its manifest


def step_of(folder: Path) -> int | None:
    """Step in a name `checkpoint-<step>`; None for any other name."""
    match = NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def pointed(out_dir: Path) -> str | None:
    """Name of the checkpoint that latest.json points to, for messages (resume trusts only manifests)."""
    try:
        return files.read_json(out_dir / "latest.json")["checkpoint"]
    except (OSError, ValueError):
        return None


def check(folder: Path) -> dict[str, files.Json]:
    """Manifest of a whole checkpoint. Raises Damaged, also when a folder carries the name of another step."""
    facts = manifest.check(folder)
    if step_of(folder) not in (None, facts["step"]):
        raise manifest.Damaged(f"it holds step {facts['step']}")
    return facts


def is_whole(folder: Path) -> bool:
    try:
        check(folder)
    except manifest.Damaged:
        return False
    return True


class CheckpointFolders:
    """`checkpoint-<step>/` folders in `out_dir`, and the hidden names a save passes through on its way."""

    def __init__(self, out_dir: Path):
        self.dir = out_dir
        self.id = secrets.token_hex(4)
        self._proven: set[Path] = set()  # read back whole by this process: not read again at every save

    def all(self) -> list[Path]:
        """Folders named checkpoint-<step>, oldest step first; links are left out."""
        found = {p: step_of(p) for p in self.dir.glob("checkpoint-*") if not p.is_symlink()}
        return [p for _, p in sorted((step, p) for p, step in found.items() if step is not None)]

    def place(self, step: int) -> Path:
        return self.dir / f"checkpoint-{step}"

    def draft(self, step: int) -> Path:
        return self.dir / f".tmp-checkpoint-{step}.{self.id}"

    def publish(self, draft: Path, final: Path) -> None:
        """Rename into place. A checkpoint of the same step waits in .trash until the new one stands there."""
        aside = self._trash_name(final)
        replaced = final.exists()
        if replaced:
            final.rename(aside)
        try:
            draft.rename(final)
        except OSError:
            if replaced:
                aside.rename(final)
            raise
        files.sync_folder(self.dir)

    def prune(self, newest: Path, keep: int | None) -> None:
        """Leave the newest `keep` whole checkpoints; `newest` is read back before any older one goes."""
        self._empty_trash()
        if keep is None:
            return
        self._proven.discard(newest)
        if not self._is_proven(newest):
            log.warning("%s does not read back as written; older checkpoints are kept", newest.name)
            return
        whole = 0
        for folder in reversed(self.all()):
            if whole >= keep:
                self._discard(folder)
            elif self._is_proven(folder):
                whole += 1

    def sweep(self) -> None:
        """Clear what a killed save left; a draft that is whole and whose place is empty is put there instead."""
        for draft in self.dir.glob(".tmp-checkpoint-*"):
            final = self.dir / draft.name.removeprefix(".tmp-").rpartition(".")[0]
            if is_whole(draft) and not final.exists():
                draft.rename(final)
            else:
                _delete(draft)
        self._empty_trash()

    def set_aside(self, folders: list[Path]) -> None:
        """Move checkpoints that this run will not pass again to earlier/<time>/, and say so."""
        if not folders:
            return
        place = self.dir / "earlier" / f"{time.strftime('%Y%m%d-%H%M%S')}-{self.id}"
        place.mkdir(parents=True)
        for folder in folders:
            folder.rename(place / folder.name)
        log.warning("%s: not on the way of this run, moved to %s", ", ".join(p.name for p in folders), place)

    def latest(self) -> Found | None:
        """The newest whole checkpoint and its manifest; None when there is none at all.

        Raises UserError when all are damaged.
        """
        skipped = []
        for folder in reversed(self.all()):
            try:
                return folder, check(folder)
            except manifest.Damaged as error:
                skipped.append(f"{folder.name}: {error}")
                log.warning("skipping %s", skipped[-1])
        if skipped:
            raise UserError(Problem(
                what=f"none of the {len(skipped)} checkpoints is whole", where=str(self.dir), why="; ".join(skipped),
                fix="restore one from a backup, or start anew without --resume_from_checkpoint", kind="disk",
            ))
        log.warning("NO CHECKPOINT in %s yet: --resume_from_checkpoint latest starts from step 0", self.dir)
        return None

    def named(self, which: str) -> Found:
        """A checkpoint by name, in this folder, or by path, and its manifest.

        Raises UserError when it is missing or damaged. A path that leads nowhere is never taken for a name.
        """
        folder = self.dir / which if Path(which).name == which else Path(which)
        if not folder.is_dir():
            known = ", ".join(p.name for p in self.all()) or "none"
            raise UserError(Problem(
                what=f"--resume_from_checkpoint {which}: no such checkpoint", where=str(folder),
                why=f"checkpoints in {self.dir}: {known}",
                fix="name one of these, or use --resume_from_checkpoint latest",
            ))
        try:
            return folder, check(folder)
        except manifest.Damaged as error:
            raise UserError(Problem(
                what=f"{folder.name} is damaged: {error}", where=str(folder), kind="disk",
                why="resuming from it would continue from other weights than were trained",
                fix="use --resume_from_checkpoint latest, which takes the newest whole one",
            )) from error

    def _is_proven(self, folder: Path) -> bool:
        if folder not in self._proven and is_whole(folder):
            self._proven.add(folder)
        return folder in self._proven

    def _discard(self, folder: Path) -> None:
        """Delete a checkpoint of ours (it has a manifest); anything else under that name is somebody's, and stays."""
        if not (folder / manifest.NAME).is_file():
            log.warning("%s has no %s, so it is not deleted", folder, manifest.NAME)
            return
        trash = self._trash_name(folder)
        try:
            folder.rename(trash)
        except OSError as error:
            log.warning("could not delete %s (%s); the next save tries again", folder, error)
        else:
            _delete(trash)

    def _trash_name(self, folder: Path) -> Path:
        return self.dir / f".trash-{folder.name}.{secrets.token_hex(4)}"

    def _empty_trash(self) -> None:
        for trash in self.dir.glob(".trash-checkpoint-*"):
            _delete(trash)


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("could not delete %s (%s); the next save tries again", folder, error)
