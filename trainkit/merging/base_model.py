"""A base model with changes in its weights, as a folder or as one file, whichever the base is.

Every tensor keeps its number format. A model is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from trainkit.errors import Problem, UserError
from trainkit.families.file_names import TEXT_MODEL, ModulePlace
from trainkit.families.pretrained import Repo
from trainkit.families.single_file import SingleFile
from trainkit.files import disk_errors, save_tensors, sync_folder, sync_tree

WEIGHTS = re.compile(r"(diffusion_pytorch_)?model[\w.-]*\.safetensors")  # of any variant, whole or in shards
KEPT = (".json", ".txt", ".model")  # beside weights: configs and tokenizers
Change = Callable[[ModulePlace], Tensor]  # place -> ΔW [out,in] fp64


def names_in(base: Repo, place: ModulePlace) -> str | None:
    """The name of a module's weight in the files of its network."""
    network, path = place
    names = base.tensor_names(network)
    return next((name for start in ("", TEXT_MODEL) if (name := f"{start}{path}.weight") in names), None)


def base_problems(base: Repo, shapes: Mapping[ModulePlace, tuple[int, int]]) -> Iterator[Problem]:
    """Modules that the base lacks or has in another size. shapes: of the changes, [out,in]."""
    for place, shape in shapes.items():
        name = names_in(base, place)
        held = base.weight(place[0], name) if name else None
        found = None if held is None else tuple(held.flatten(1).shape)
        if found != shape:
            there = "has no such module" if found is None else f"has {found[0]} × {found[1]}"
            yield base.problem("the LoRAs do not fit the base model", f"{place[1]} of the {place[0]}: a LoRA has "
                               f"{shape[0]} × {shape[1]}, and the model {there}", "name the base model that they were "
                               "trained on", kind="data")
            return


def write_base(base: Repo, out: Path, places: list[ModulePlace], change: Change, show: Callable[[float], None],
               metadata: Mapping[str, str]) -> None:
    """Write the model W + ΔW to `out`, which does not exist. `show` is told how many modules are done."""
    done = set[ModulePlace]()  # a folder may have the same weights in two variants

    def changed(place: ModulePlace, weight: Tensor) -> None:
        new = weight.double().flatten(1) + change(place)
        weight.copy_(new.view(weight.shape))
        if not weight.isfinite().all():
            number = str(weight.dtype).removeprefix("torch.")
            raise UserError(Problem(f"{place[1]} becomes NaN or infinity", base.path, "the sum is larger than what "
                                    f"{number} can hold", "give a smaller strength, or a base model in float32",
                                    "nonfinite"))
        done.add(place)
        show(len(done))

    with disk_errors(out), draft_of(out) as draft:
        if isinstance(base, SingleFile):
            write_file(base, draft, places, changed, metadata)
        else:
            write_folder(base, draft, places, changed)


@contextmanager
def draft_of(out: Path) -> Iterator[Path]:
    """A name beside `out`; what is there at the end gets that name, and after an error nothing is left."""
    draft = out.with_name(f".{out.name[:50]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield draft
        if draft.is_dir():
            sync_tree(draft)
        draft.rename(out)
    except BaseException:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)
        raise
    sync_folder(out.parent)


def write_file(base: SingleFile, draft: Path, places: list[ModulePlace],
               changed: Callable[[ModulePlace, Tensor], None], metadata: Mapping[str, str]) -> None:
    from safetensors.torch import load_file

    tensors = load_file(base.path)
    for place in places:
        name = names_in(base, place)
        assert name is not None, "base_problems was asked"
        where = base.place_of(place[0], name)
        tensors[where.name] = tensors[where.name].clone()
        changed(place, where.take(tensors[where.name]))
    save_tensors(draft, tensors, metadata)


def write_folder(base: Repo, draft: Path, places: list[ModulePlace], changed: Callable[[ModulePlace, Tensor], None]
                 ) -> None:
    """Configs, tokenizers and all weights in safetensors; no other files, which may hold the weights from before."""
    source = base.folder("unet").parent
    by_network: dict[str, dict[str, ModulePlace]] = {}
    for place in places:
        name = names_in(base, place)
        assert name is not None, "base_problems was asked"
        by_network.setdefault(place[0], {})[name] = place
    draft.mkdir()
    shutil.copyfile(source / "model_index.json", draft / "model_index.json")
    for folder in sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for file in sorted(path for path in folder.iterdir() if path.is_file()):
            target = draft / folder.name / file.name
            if WEIGHTS.fullmatch(file.name) and folder.name in by_network:
                target.parent.mkdir(exist_ok=True)
                rewrite(file, target, by_network[folder.name], changed)
            elif WEIGHTS.fullmatch(file.name) or file.suffix in KEPT:
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)


def rewrite(file: Path, target: Path, names: Mapping[str, ModulePlace],
            changed: Callable[[ModulePlace, Tensor], None]) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    for name, place in names.items():
        if name in tensors:
            tensors[name] = tensors[name].clone()
            changed(place, tensors[name])
    save_tensors(target, tensors, metadata)
