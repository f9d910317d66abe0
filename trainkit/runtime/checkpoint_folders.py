"""The checkpoint folders of one run on disk: find them, prove them, put new ones among them, clear old ones away."""

from __future__ import annotations

import logging
import secrets
import shutil
import time
from pathlib import Path

from trainkit import files
from trainkit.errors import Problem, UserError, refuse, shell_word
from trainkit.runtime import manifest
from trainkit.runtime.weight_files import DIFFUSERS_FILE, at_step, step_of

log = logging.getLogger(__name__)

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}  # endings of files of weights
FOREIGN = ("optimizer.bin", "scheduler.bin", "random_states_0.pkl")  # in a checkpoint of accelerate's own

Found = tuple[Path, dict[str, files.Json]]  # a whole checkpoint and its manifest


def pointed(out_dir: Path) -> str | None:
    """Name of the checkpoint that latest.json points to, for messages (resume trusts only manifests)."""
    name = files.read_object(out_dir / "latest.json").get("checkpoint")
    return name if isinstance(name, str) else None


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


def problems(out_dir: Path, which: str | None) -> list[Problem]:
    """What keeps --resume_from_checkpoint from naming a checkpoint, as far as a look at names tells."""
    if which in (None, "latest"):
        return []
    path, flag = named_path(out_dir, str(which)), f"--resume_from_checkpoint {which}"
    if path.is_file():
        return [a_file(path, flag)]
    if not path.is_dir():
        return [Problem(f"{flag}: no such checkpoint", str(path), there(out_dir), newest_or_anew(out_dir))]
    if (path / manifest.NAME).exists() or (path / "state.json").exists():
        return []
    if any((path / name).exists() for name in FOREIGN):
        return [Problem(f"{flag} is a checkpoint of another trainer", str(path),
                        "its state is pickled, and belongs to another layout of the training", newest_or_anew(out_dir))]
    if (lora := path / DIFFUSERS_FILE).is_file():
        return [a_file(lora, flag)]
    why = f"it holds checkpoints: {there(path)}" if CheckpointFolders(path).all() else "it has no manifest.json"
    return [Problem(f"{flag} is a folder, and not a checkpoint", str(path), why, newest_or_anew(path, out_dir))]


def named_path(out_dir: Path, which: str) -> Path:
    """The place that a name in `out_dir`, a path, or RUN@STEP means; a path is never taken for a name."""
    asked = Path(which)
    path = out_dir / which if asked.name == which and not asked.is_file() else asked
    run, step = at_step(path)
    return path if step is None else run / f"checkpoint-{step}"


def a_file(path: Path, flag: str) -> Problem:
    """Somebody has named a file where a folder is asked for."""
    what = "a file of weights" if path.suffix.lower() in WEIGHTS else "a file"
    go_on = newest_or_anew(path.parent, path.parent.parent)
    if path.suffix.lower() == ".safetensors":
        go_on += f"; or --network_weights {shell_word(path)}, which starts a new run from the LoRA"
    return Problem(
        f"{flag} is {what}, and a run goes on from a checkpoint folder", str(path),
        "a LoRA file holds weights only: a run that goes on also needs the optimizer's state and its place in the data",
        go_on)


def there(folder: Path) -> str:
    names = [path.name for path in CheckpointFolders(folder).all()]
    return f"checkpoints in {folder}: {', '.join(names) or 'none'}"


def newest_or_anew(*folders: Path) -> str:
    """The next command: the checkpoint that is, or the newest of those that are, in the first of these folders."""
    for folder in folders:
        found = [folder] if (folder / manifest.NAME).exists() else CheckpointFolders(folder).all()
        if found:
            return f"--resume_from_checkpoint {found[-1]}"
    return "leave --resume_from_checkpoint out: the training starts anew"


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
        self._proven.discard(final)
        files.sync_folder(self.dir)

    def prune(self, newest: Path, keep: int | None) -> None:
        """Leave the newest `keep` whole checkpoints; `newest` is read back before any older one goes."""
        self._empty_trash()
        if keep is None:
            return
        if not self._is_proven(newest):
            log.warning("%s does not read back as written; older checkpoints are kept", newest.name)
            return
        whole = 0
        for folder in reversed(self.all()):
            if whole >= keep:
                self._discard(folder)
            elif self._is_proven(folder):
                whole += 1

    def discard_files(self, paths: list[Path]) -> None:
        """Delete files beside the checkpoints."""
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("could not delete %s (%s); the next save tries again", path, error)

    def sweep(self) -> None:
        """Clear what a killed save left; a draft that is whole and whose place is empty is put there instead."""
        for draft in self.dir.glob(".tmp-checkpoint-*"):
            final = self.dir / draft.name.removeprefix(".tmp-").rpartition(".")[0]
            if is_whole(draft) and not final.exists():
                draft.rename(final)
            else:
                _delete(draft)
        self._empty_trash()

    def set_aside(self, paths: list[Path]) -> None:
        """Move checkpoints and files of steps that this run will pass again to earlier/<time>/, and say so."""
        if not paths:
            return
        place = self.dir / "earlier" / f"{time.strftime('%Y%m%d-%H%M%S')}-{self.id}"
        place.mkdir(parents=True)
        for path in paths:
            path.rename(place / path.name)
        log.warning("%s: not on the way of this run, moved to %s", ", ".join(p.name for p in paths), place)

    def latest(self) -> Found | None:
        """The newest whole checkpoint and its manifest; None when there is none at all.

        Raises UserError when all are damaged.
        """
        skipped = []
        for folder in reversed(self.all()):
            try:
                return self._checked(folder)
            except manifest.Damaged as error:
                skipped.append(f"{folder.name}: {error}")
                log.warning("skipping %s", skipped[-1])
        if skipped:
            raise UserError(Problem(
                what=f"none of the {len(skipped)} checkpoints is whole", where=str(self.dir), why="; ".join(skipped),
                fix="restore one from a backup, or start anew without --resume_from_checkpoint", kind="disk",
            ))
        log.info("no checkpoint in %s yet: --resume_from_checkpoint latest starts from step 0", self.dir)
        return None

    def named(self, which: str) -> Found:
        """A checkpoint by name, in this folder, or by path, and its manifest.

        Raises UserError when it is missing, damaged or no checkpoint at all.
        """
        refuse(problems(self.dir, which))
        folder = named_path(self.dir, which)
        try:
            return self._checked(folder)
        except manifest.Damaged as error:
            raise UserError(Problem(
                what=f"{folder.name} is damaged: {error}", where=str(folder), kind="disk",
                why="resuming from it would continue from other weights than were trained",
                fix="use --resume_from_checkpoint latest, which takes the newest whole one",
            )) from error

    def _checked(self, folder: Path) -> Found:
        """Raises Damaged."""
        facts = check(folder)
        self._proven.add(folder)
        return folder, facts

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
