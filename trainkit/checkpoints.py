"""Checkpoints that a kill at any moment cannot spoil, and that are read only when every byte is as it was written.

A save passes eight stages, in this order, and each leaves the checkpoints before it intact:

    preflight  is there room?
    reserve    .tmp-checkpoint-<step>.<id>/ is made beside its final place, so that the rename is atomic
    write      <part>.safetensors for each part, state.json, and what `exports` writes for other programs; no pickle
    flush      every file and folder to the disk
    manifest   manifest.json: size and SHA-256 of every file, step, fingerprint, versions
    publish    renamed to checkpoint-<step>/, parent folder flushed
    point      latest.json, replaced atomically
    prune      only now, and only when the new one reads back whole: older ones become .trash-*, then are deleted

A resume reads the parts and state.json. What `exports` wrote may be missing or damaged.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from trainkit import files
from trainkit.errors import Problem, UserError, counted
from trainkit.files import Json
from trainkit.runtime import checkpoint_folders, manifest, previous, ranks
from trainkit.runtime.record import timestamp, versions
from trainkit.runtime.weight_files import step_of

log = logging.getLogger(__name__)

DIGEST = re.compile(r"[0-9a-f]{16,}")
CONTENTS = {  # in the fingerprint, known by digests: what may differ
    "images": "the images, their captions, or their number", "class images": "the class images or their captions",
    "masks": "the masks, or how they weigh the loss,"}
UNKNOWN_BEFORE = "base model contents"  # in the fingerprint: what older checkpoints lack, and resume without
Stage = Literal["preflight", "reserve", "write", "flush", "manifest", "publish", "point", "prune"]
Packed = tuple[dict[str, Tensor], dict[str, Json]]


class ResumeOptions(Protocol):
    """What of a trainer's options is about going on."""

    @property
    def output_dir(self) -> str: ...

    @property
    def resume_from_checkpoint(self) -> str | None: ...


def problems(options: ResumeOptions) -> list[Problem]:
    """What is wrong with --resume_from_checkpoint at a first look. `resume` finds out whether a checkpoint is whole."""
    return checkpoint_folders.problems(Path(options.output_dir), options.resume_from_checkpoint)


class Stateful(Protocol):
    """Anything that outlives a restart: bits as tensors, the rest as JSON."""

    def pack(self) -> Packed: ...

    def unpack(self, tensors: dict[str, Tensor], data: dict[str, Json]) -> None: ...


class Exports(Protocol):
    """The files of a checkpoint that other programs load: in its folder, and beside it in the run's folder.

    keep  whether those beside it stay when the checkpoint goes
    """

    keep: bool

    def bytes_in(self) -> int: ...

    def bytes_beside(self) -> int: ...

    def write(self, folder: Path, step: int) -> None: ...

    def beside(self) -> Mapping[Path, int]: ...


class NoExports:
    """A checkpoint that only a resume reads."""

    keep = True

    def bytes_in(self) -> int:
        return 0

    def bytes_beside(self) -> int:
        return 0

    def write(self, folder: Path, step: int) -> None:
        """Nothing more."""

    def beside(self) -> Mapping[Path, int]:
        """The files beside the checkpoints, with the step of each."""
        return {}


def reached(stage: Stage, step: int) -> None:
    """Called when a stage of a save is done. Tests replace it to stop a process at a named moment."""
    log.debug("checkpoint-%d: %s done", step, stage)


class Checkpoints:
    """`<out_dir>/checkpoint-<step>/`, where step counts finished optimizer steps.

    fingerprint  what a checkpoint and the run that resumes it must agree on (rank, base model, data, ...)
    parts        what is saved and restored, by name
    every        finished steps from one checkpoint to the next; None: only where `save` is called
    keep         newest whole checkpoints that stay (None: all). One that a session ended with on a step that is no
                 multiple of `every` stays beside them until the next one is saved
    after_last   whether the last step of a run is saved in any case
    exports      writes the files that other programs load
    On several ranks every rank calls `save` and `resume`; rank 0 writes, all read (from a file system they share).
    """

    def __init__(
        self, out_dir: Path | str, *, keep: int | None = None, every: int | None = None, after_last: bool = True,
        fingerprint: Mapping[str, Json], exports: Exports | None = None, **parts: Stateful,
    ):
        assert keep is None or keep >= 1, "keep at least one checkpoint"
        self.folders = checkpoint_folders.CheckpointFolders(Path(out_dir))
        self.keep, self.every, self.after_last = keep, every, after_last
        self.fingerprint, self.parts, self.exports = fingerprint, parts, exports or NoExports()
        self.saved: int | None = None

    def due(self, step: int, *, stop: int, total: int) -> bool:
        """Whether a save is due after `step` finished steps: every `every`, and at the end of a session.

        stop, total  finished steps at the end of this session, and of the run
        """
        return self._on_interval(step) or (step == stop and (self.after_last or stop < total))

    def announce(self, start: int, *, stop: int, total: int) -> None:
        """Say in the log what the files beside the checkpoints of this session will take of the disk."""
        steps = [step for step in range(start + 1, stop + 1) if self.due(step, stop=stop, total=total)]
        size, count = self.exports.bytes_beside(), len(steps)
        if not ranks.is_main() or not size or not count:
            return
        if not self.exports.keep and self.keep:
            count = min(count, self.keep)
        log.info("%s a LoRA for WebUIs in %s: %s each, %s together%s",
                 counted(count, "checkpoint of this run leaves", "checkpoints of this run leave"),
                 self.folders.dir, files.size_text(size), files.size_text(count * size),
                 " (--no_keep_loras deletes each with its checkpoint)" if self.exports.keep else "")

    def save(self, step: int, *, prune: bool = True) -> Path:
        """Save after `step` finished steps -> its folder. A step that is saved already is not written again.

        prune  whether older checkpoints may go; not while the run may be diverging (Run.healthy), because then one of
               them is the last good one
        Raises UserError(kind="disk") when the disk refuses; older checkpoints are intact then.
        """
        final = self.folders.place(step)
        if ranks.is_main():
            with files.disk_errors(final):
                if self.saved != step:
                    self._save(step, final)
                self._prune(step, final, allowed=prune)
        self.saved = step
        ranks.barrier()
        return final

    def resume(self, which: str | None, *, stop: int | None = None) -> int:
        """Restore the parts from `which` -> finished steps, 0 when fresh.

        stop   finished steps at which this session ends
        which  None (start anew) | "latest" (the newest whole one, else anew) | "checkpoint-N" | a path
        Once every part is restored, checkpoints of later steps move to earlier/, so that "latest" and the pruning of
        old ones keep their meaning. When the run starts anew here, or from a checkpoint of another folder, all that an
        earlier run has left here moves to previous-N/. A resume that is refused moves nothing.
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
            log.info("resumed from %s: %s done", folder, counted(step, "step is", "steps are"))
        here = folder is not None and folder.parent.resolve() == self.folders.dir.resolve()
        self.saved = step if here else None  # on every rank: `save` is called by all or by none
        ranks.barrier()  # every rank has all of it
        if ranks.is_main():
            self._clear_the_way(step, here=here)
        return step

    def _on_interval(self, step: int) -> bool:
        return self.every is not None and step > 0 and step % self.every == 0

    def _save(self, step: int, final: Path) -> None:
        if self.saved is None:  # later the folder is there, or it was taken away, which must be told
            self.folders.dir.mkdir(parents=True, exist_ok=True)
        packed = {name: part.pack() for name, part in self.parts.items()}
        state = sum(files.tensor_bytes(tensors) for tensors, _ in packed.values())
        files.require_space(self.folders.dir, state + self.exports.bytes_in() + self.exports.bytes_beside())
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

    def _prune(self, step: int, newest: Path, *, allowed: bool) -> None:
        """Leave `keep` checkpoints and, where the session ended between two of them, the one it ended with."""
        extra = self.every is not None and not self._on_interval(step)
        self.folders.prune(newest, self.keep + extra if self.keep and allowed else None)
        if not self.exports.keep:
            steps = {step_of(folder) for folder in self.folders.all()}
            self.folders.discard_files([path for path, at in self.exports.beside().items() if at not in steps])
        reached("prune", step)

    def _fill(self, draft: Path, packed: dict[str, Packed], step: int) -> None:
        draft.mkdir()
        reached("reserve", step)
        for name, (tensors, _) in packed.items():
            files.save_tensors(draft / f"{name}.safetensors", tensors)
        files.write_json(draft / "state.json", {name: data for name, (_, data) in packed.items()})
        needed = {path.name for path in draft.iterdir()}
        self.exports.write(draft, step)
        reached("write", step)
        files.sync_tree(draft)
        reached("flush", step)
        manifest.seal(draft, {
            "format": 1, "step": step, "saved": timestamp(),
            "fingerprint": dict(self.fingerprint), "versions": versions(),
        }, exports={path.name for path in draft.iterdir()} - needed)
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

    def _clear_the_way(self, step: int, *, here: bool) -> None:
        """Rank 0, when nothing can refuse any more: set aside what is not on the way from a checkpoint of this folder.

        here  whether the run goes on from one
        """
        with files.disk_errors(self.folders.dir):
            if not here:
                previous.make_way(self.folders.dir)
                return
            checkpoints = [p for p in self.folders.all() if (step_of(p) or 0) > step]
            self.folders.set_aside([*checkpoints, *(p for p, at in self.exports.beside().items() if at > step)])

    def _refuse_differences(self, folder: Path, fingerprint: Json) -> None:
        ours = flatten(dict(self.fingerprint))
        theirs = {key.replace("picture", "image"): value for key, value in flatten(fingerprint).items()}  # an old word
        ours = {key: value for key, value in ours.items() if key in theirs or not key.startswith(UNKNOWN_BEFORE)}
        keys = [k for k in sorted(theirs.keys() | ours.keys()) if theirs.get(k) != ours.get(k)]
        if keys:
            raise UserError(Problem(
                what=f"{folder.name} belongs to a run with other settings", where=str(folder),
                why="; ".join(_difference(k, theirs.get(k), ours.get(k)) for k in keys),
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


def _difference(name: str, theirs: Json, ours: Json) -> str:
    """What is another one now; of contents, which are known by their digests, that they are."""
    digests = [isinstance(value, str) and DIGEST.fullmatch(value) for value in (theirs, ours)]
    if all(digests):
        return f"{CONTENTS.get(name, name)} are not those of the checkpoint"
    return f"{name}: checkpoint {theirs!r}, now {ours!r}"


def flatten(tree: Json, prefix: str = "") -> dict[str, Json]:
    """Nested dicts -> one level with dotted keys; tuples compare as lists, as JSON stores them."""
    if not isinstance(tree, dict):
        return {prefix: list(tree) if isinstance(tree, tuple) else tree}
    flat: dict[str, Json] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
