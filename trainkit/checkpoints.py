"""Checkpoints that a kill at any moment cannot spoil, and that are read only when every byte is as it was written.

A save passes eight stages, in this order, and each leaves the checkpoints before it intact:

    preflight  is there room?
    reserve    .tmp-checkpoint-<step>.<id>/ is made beside its final place, so that the rename is atomic
    write      <part>.safetensors for each part, state.json, and whatever `extra` writes; no pickle
    flush      every file and folder to the disk
    manifest   manifest.json: size and SHA-256 of every file, step, fingerprint, versions
    publish    renamed to checkpoint-<step>/, parent folder flushed
    point      latest.json, replaced atomically
    prune      only now, and only when the new one reads back whole: older ones become .trash-*, then are deleted
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from trainkit import files
from trainkit.errors import Problem, UserError
from trainkit.files import Json
from trainkit.runtime import checkpoint_folders, manifest, ranks
from trainkit.runtime.record import timestamp, versions

log = logging.getLogger(__name__)

UNKNOWN_BEFORE = "base model contents"  # in the fingerprint: what older checkpoints lack, and resume without
Stage = Literal["preflight", "reserve", "write", "flush", "manifest", "publish", "point", "prune"]
Packed = tuple[dict[str, Tensor], dict[str, Json]]


class Stateful(Protocol):
    """Anything that outlives a restart: bits as tensors, the rest as JSON."""

    def pack(self) -> Packed: ...

    def unpack(self, tensors: dict[str, Tensor], data: dict[str, Json]) -> None: ...


def reached(stage: Stage, step: int) -> None:
    """Called when a stage of a save is done. Tests replace it to stop a process at a named moment."""
    log.debug("checkpoint-%d: %s done", step, stage)


class Checkpoints:
    """`<out_dir>/checkpoint-<step>/`, where step counts finished optimizer steps.

    keep         newest whole checkpoints that stay (None: all)
    fingerprint  what a checkpoint and the run that resumes it must agree on (rank, base model, data, ...)
    extra        writes more files into the folder, e.g. the adapters as a file that other programs load
    parts        what is saved and restored, by name
    On several ranks every rank calls `save` and `resume`; rank 0 writes, all read (from a file system they share).
    """

    def __init__(
        self, out_dir: Path | str, *, keep: int | None = None, fingerprint: Mapping[str, Json],
        extra: Callable[[Path], None] | None = None, **parts: Stateful,
    ):
        assert keep is None or keep >= 1, "keep at least one checkpoint"
        self.folders = checkpoint_folders.CheckpointFolders(Path(out_dir))
        self.keep, self.fingerprint, self.extra, self.parts = keep, fingerprint, extra, parts
        self.saved: int | None = None

    def save(self, step: int, *, prune: bool = True) -> Path:
        """Save after `step` finished steps -> its folder. Saving the same step twice in a row does nothing.

        prune  whether older checkpoints may go; not while the run may be diverging (Run.healthy), because then one of
               them is the last good one
        Raises UserError(kind="disk") when the disk refuses; older checkpoints are intact then.
        """
        final = self.folders.place(step)
        if ranks.is_main() and self.saved != step:
            with files.disk_errors(final):
                self._save(step, final, prune=prune)
        self.saved = step
        ranks.barrier()
        return final

    def resume(self, which: str | None, *, stop: int | None = None) -> int:
        """Restore the parts from `which` -> finished steps, 0 when fresh.

        stop   finished steps at which this session ends
        which  None (start anew) | "latest" (the newest whole one, else anew) | "checkpoint-N" | a path
        Checkpoints this run will not pass again (newer than the one resumed from, or of an earlier run when starting
        anew) move to earlier/ once every part is restored, so that "latest" and the pruning of old ones keep their
        meaning. A resume that is refused moves nothing.
        Raises UserError: a named one is missing or damaged, all are damaged, the fingerprint differs, or more than
        `stop` steps are finished.
        """
        found = ranks.from_main(lambda: self._choose(which))
        folder, step = found or (None, 0)
        if folder is not None and stop is not None and step > stop:
            raise UserError(Problem(
                what=f"{folder.name} is past the end of this run, which ends after {stop} steps",
                where="--max_train_steps, --num_train_epochs, --stop_after_steps", why="there is no step left to train",
                fix="raise them, or resume from an earlier checkpoint"))
        if folder is not None:
            self._load(folder)
            log.info("resumed from %s: %d steps are done", folder, step)
        ranks.barrier()  # every rank has all of it
        if ranks.is_main():
            self._clear_the_way(folder, step)
        return step

    def _save(self, step: int, final: Path, *, prune: bool) -> None:
        packed = {name: part.pack() for name, part in self.parts.items()}
        self.folders.dir.mkdir(parents=True, exist_ok=True)
        files.require_space(self.folders.dir, sum(files.tensor_bytes(tensors) for tensors, _ in packed.values()))
        reached("preflight", step)
        draft = self.folders.draft(step)
        try:
            self._fill(draft, packed, step)
            self.folders.publish(draft, final)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        reached("publish", step)
        files.write_json(self.folders.dir / "latest.json", {"checkpoint": final.name, "step": step})
        reached("point", step)
        self.folders.prune(final, self.keep if prune else None)
        reached("prune", step)

    def _fill(self, draft: Path, packed: dict[str, Packed], step: int) -> None:
        draft.mkdir()
        reached("reserve", step)
        for name, (tensors, _) in packed.items():
            files.save_tensors(draft / f"{name}.safetensors", tensors)
        files.write_json(draft / "state.json", {name: data for name, (_, data) in packed.items()})
        if self.extra:
            self.extra(draft)
        reached("write", step)
        files.sync_tree(draft)
        reached("flush", step)
        manifest.seal(draft, {
            "format": 1, "step": step, "saved": timestamp(),
            "fingerprint": dict(self.fingerprint), "versions": versions(),
        })
        reached("manifest", step)

    def _choose(self, which: str | None) -> tuple[Path, int] | None:
        """Rank 0: the checkpoint to load and its step, compared with this run."""
        self.folders.sweep()
        found = None if which is None else self.folders.latest() if which == "latest" else self.folders.named(which)
        if found is None:
            return None
        folder, facts = found
        self._refuse_differences(folder, facts["fingerprint"])
        return folder, facts["step"]

    def _clear_the_way(self, folder: Path | None, step: int) -> None:
        """Rank 0, when nothing can refuse any more: set aside what is not on the way from `folder`."""
        here = folder is not None and folder.parent.resolve() == self.folders.dir.resolve()
        with files.disk_errors(self.folders.dir):
            later = [p for p in self.folders.all() if (checkpoint_folders.step_of(p) or 0) > step]
            self.folders.set_aside(later if here else self.folders.all())
        self.saved = step if here else None

    def _refuse_differences(self, folder: Path, fingerprint: Json) -> None:
        ours = flatten(dict(self.fingerprint))
        theirs = {key.replace("picture", "image"): value for key, value in flatten(fingerprint).items()}  # an old word
        ours = {key: value for key, value in ours.items() if key in theirs or not key.startswith(UNKNOWN_BEFORE)}
        keys = [k for k in sorted(theirs.keys() | ours.keys()) if theirs.get(k) != ours.get(k)]
        if keys:
            raise UserError(Problem(
                what=f"{folder.name} belongs to a run with other settings", where=str(folder),
                why="; ".join(f"{k}: checkpoint {theirs.get(k)!r}, now {ours.get(k)!r}" for k in keys),
                fix="repeat the settings of the checkpoint, or give a new --output_dir",
            ))

    def _load(self, folder: Path) -> None:
        data = files.read_json(folder / "state.json")
        if data.keys() != self.parts.keys():
            raise UserError(Problem(
                what=f"{folder.name} holds other parts than this run has", where=str(folder),
                why=f"checkpoint: {', '.join(sorted(data))}; now: {', '.join(sorted(self.parts))}",
                fix="repeat the settings of the checkpoint, or give a new --output_dir",
            ))
        for name, part in self.parts.items():
            part.unpack(files.load_tensors(folder / f"{name}.safetensors"), data[name])


def flatten(tree: Json, prefix: str = "") -> dict[str, Json]:
    """Nested dicts -> one level with dotted keys; tuples compare as lists, as JSON stores them."""
    if not isinstance(tree, dict):
        return {prefix: list(tree) if isinstance(tree, tuple) else tree}
    flat: dict[str, Json] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
