"""One LoRA file, whichever program wrote it: what it says about each module, its embeddings, and its header."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from trainkit.errors import Problem, UserError
from trainkit.families.file_names import SD_NAMES, FileNames, ModulePlace, kernel_of, xl_names
from trainkit.files import disk_errors, save_tensors, write_json
from trainkit.lora_file import parts as module_parts
from trainkit.lora_file.contents import (
    ADAPTER_METADATA,
    PEFT_CONFIG,
    FamilyName,
    group,
    layer_at,
    layout_of,
    network_configs,
    peft_config,
    stated_family,
    take_embeddings,
    unread,
)
from trainkit.lora_file.header import read_header, read_tensors
from trainkit.lora_file.layer import LayerUpdate
from trainkit.lora_file.layouts import DORA_NORM, Layout, Tensors, adapter_config, stem_of, tensors_of
from trainkit.lora_file.rounding import compare, compare_factors
from trainkit.lora_file.spectrum import cut, svd

Weights = Callable[[ModulePlace], Tensor]  # the base's W of a module -> [out,in], in the precision to compute with

PEFT_WEIGHTS = "adapter_model.safetensors"
WIDTHS: dict[int, FamilyName] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # of the text that attention is given
CROSS = re.compile(r"attn2\.to_[kv]$")  # layers as wide as the text


@dataclass(frozen=True)
class LoraFile:
    """What one file says.

    layers      the update of each module
    embeddings  name of a textual inversion -> text encoder ("clip_l", "clip_g") -> [K,D]; "" names the file's own
    layout      the one that it was read from; "" where it was made otherwise
    names       what its base model's modules are called in files
    """

    layers: Mapping[ModulePlace, LayerUpdate]
    embeddings: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    layout: Layout | Literal[""] = ""
    names: FileNames | None = None

    @classmethod
    def read(cls, path: Path, *, names: FileNames | None = None, where: str = "", network: str | None = None
             ) -> LoraFile:
        """Any layout's file, or the folder of a PEFT checkpoint.

        names    of the base model, where its UNet is not numbered as the released ones
        where    how the user named the file
        network  of a PEFT checkpoint, whose names do not say which text encoder it is for
        UserError: it cannot be read, or holds tensors that are no part of a known update; they are named.
        """
        config = peft_config(path, where) if path.is_dir() else None
        file = path / PEFT_WEIGHTS if path.is_dir() else path
        tensors, metadata = read_tensors(file, where), dict(read_header(file, where).metadata)
        embeddings = take_embeddings(tensors, file)
        grouped, strange = group(tensors, names.unet if names else None)
        if strange:
            raise unread(file, where, strange)
        layout = layout_of(tensors)
        configs = network_configs(metadata, config, file, where)
        layers = {}
        for place, given in grouped.items():
            if network and place[0] != "unet":
                place = (network, place[1])
            layers[place] = layer_at(place, given, configs, metadata.get(DORA_NORM) == "base", file, where)
        found = cls(layers, embeddings, metadata, layout, names)
        return found if names else replace(found, names=released_names(found.family))

    @property
    def family(self) -> FamilyName | None:
        """The base model's family by the width of its text, else by the header and the text encoders; None: unknown."""
        widths = {layer_width(layer) for (_, path), layer in self.layers.items() if CROSS.search(path)}
        if len(widths) == 1 and (found := WIDTHS.get(next(iter(widths)))):
            return found
        return stated_family(self.metadata, {network for network, _ in self.layers} | {
            "text_encoder_2" for encoders in self.embeddings.values() if "clip_g" in encoders})

    @property
    def needs_weights(self) -> bool:
        """Whether its updates depend on the base's weights."""
        return any(layer.magnitude is not None for layer in self.layers.values())

    # ------------------------------------------------------------------------------------------------------------------
    # Writing

    def write(self, path: Path, layout: Layout, *, dtype: torch.dtype = torch.float16, weights: Weights | None = None,
              metadata: Callable[[Tensors], Mapping[str, str]] | None = None) -> float:
        """`save` and `check`; a file that does not hold what it should is removed -> the largest relative error."""
        self.save(path, layout, dtype=dtype, weights=weights, metadata=metadata)
        try:
            return self.check(path, layout, weights=weights)
        except UserError:
            if path.is_file():
                path.unlink()
            raise

    def save(self, path: Path, layout: Layout, *, dtype: torch.dtype = torch.float16, weights: Weights | None = None,
             metadata: Callable[[Tensors], Mapping[str, str]] | None = None) -> None:
        """Write it in a layout.

        dtype     of the factors, where the layout has a choice
        weights   of the base, for a DoRA whose magnitudes must change
        metadata  the header of the tensors; else this file's own
        """
        assert not (self.layers and self.embeddings and layout in ("diffusers", "peft")), "embeddings need another file"
        names, rank = self.names or released_names(self.family), whole_number(self.metadata.get("ss_network_dim"))
        each = {place: tensors_of(self._ready(place, layout, weights), layout, dtype=dtype, rank=rank)
                for place in self.layers}
        if layout == "peft":
            self._save_peft(path, each, names)
            return
        tensors = {stem_of(place, layout, names) + end: t for place, found in each.items() for end, t in found.items()}
        header = {"format": "pt", **(metadata(tensors) if metadata else self.metadata)}
        header.pop(DORA_NORM, None)
        if layout == "webui" and self._over_base:
            header[DORA_NORM] = "base"
        header.pop(ADAPTER_METADATA, None)
        if layout == "diffusers" and each:
            header[ADAPTER_METADATA] = json.dumps(diffusers_config(each))
        tensors |= bundled(self.embeddings)
        with disk_errors(path):
            save_tensors(path, tensors, header)

    def check(self, path: Path, layout: Layout, *, weights: Weights | None = None, by_factors: bool = False) -> float:
        """Read a written file and compare every ΔW with this one's -> the largest error.

        An entry may be off by what rounding the file's own numbers can do (`Rounded`). The error that is returned
        counts relative to the largest entry of its ΔW: of the order of 6e-8 in fp32 and 5e-4 in fp16.
        by_factors  do not compute the ΔW of a module whose factors are the wanted ones but for rounding. It keeps the
                    same bound, and its error is not known (0). SDXL at rank 32 takes a second of CPU time, and not 12
        Raises UserError(kind="disk") naming what differs.
        """
        try:
            found = self._read_back(path, layout)
        except UserError as error:
            raise mismatch(path, f"{error.problems[0].what}: {error.problems[0].why}") from error
        missing, strange = self.layers.keys() - found.layers.keys(), found.layers.keys() - self.layers.keys()
        if missing or strange or (self.layers and layout_family(found.layout) != layout_family(layout)):
            listed = ", ".join(path for _, path in sorted(missing | strange)[:3])
            raise mismatch(path, f"{len(strange)} unknown and {len(missing)} missing modules: {listed}")
        if not same_embeddings(found.embeddings, self.embeddings):
            raise mismatch(path, "its embeddings differ")
        judge = compare_factors if by_factors else compare
        results = {place: judge(layer, self.layers[place], weights and partial(weights, place))
                   for place, layer in found.layers.items()}
        wrong = [place for place, (_, good) in results.items() if not good]
        if wrong:
            raise mismatch(path, f"ΔW of {wrong[0][1]} differs by {results[wrong[0]][0]:.1e} of its largest entry "
                                 f"({len(wrong)} of {len(results)} modules differ)")
        return max((error for error, _ in results.values()), default=0.0)

    def low_rank(self, rank: int, weights: Weights | None) -> tuple[LoraFile, float]:
        """The best plain LoRA of a rank -> it, and what is lost: ‖error‖ / ‖ΔW‖ of all modules together."""
        layers, lost, whole = {}, 0.0, 0.0
        for place, layer in self.layers.items():
            W = weights(place) if weights and layer.magnitude is not None else None
            found = svd(layer, W)
            update, error = cut(found, rank)
            layers[place] = LayerUpdate(update, self.kernel(place))
            lost, whole = lost + error, whole + float(found[1].square().sum())
        return replace(self, layers=layers, layout=""), (lost / whole) ** 0.5 if whole else 0.0

    def kernel(self, place: ModulePlace) -> tuple[int, ...]:
        held = self.layers[place].kernel
        return kernel_of(place, linear_projections=self.family != "sd1") if held is None else held

    @property
    def _over_base(self) -> bool:
        return any(layer.magnitude is not None and not layer.magnitude.by_input for layer in self.layers.values())

    def _ready(self, place: ModulePlace, layout: Layout, weights: Weights | None) -> LayerUpdate:
        """The layer with its kernel, and with the magnitudes that a layout has."""
        layer = replace(self.layers[place], kernel=self.kernel(place))
        held = layer.magnitude
        if held is None:
            return layer
        if held.by_input and layout in ("diffusers", "peft"):
            raise UserError(Problem(
                "this DoRA cannot be written for Diffusers", place[1], "it has a magnitude for each input (LyCORIS's "
                "older form), and Diffusers has one for each output: they are different functions",
                "--svd_rank 64 --base MODEL writes the nearest plain LoRA", "data"))
        over = layout == "webui"
        if held.by_input or held.over_base == over:
            return layer
        if weights is None:
            raise UserError(Problem("this DoRA needs its base model", place[1], "its magnitudes are for another norm "
                                    "in this layout, and the norms are those of the base's weights", "--base MODEL"))
        W = weights(place)
        if tuple(W.shape) != (shape := module_parts.shape_of(layer.update)):
            raise UserError(Problem("the base model is another one", place[1], f"its weight is {tuple(W.shape)}, and "
                                    f"the LoRA's update is {shape}", "name the model it was trained on with --base"))
        return layer.over_base(W) if over else layer.of_paper(W)

    def _save_peft(self, folder: Path, each: Mapping[ModulePlace, Tensors], names: FileNames) -> None:
        """One folder for each network: adapter_model.safetensors and adapter_config.json."""
        for network in dict.fromkeys(network for network, _ in each):
            held = {path: tensors for (other, path), tensors in each.items() if other == network}
            tensors = {stem_of((network, path), "peft", names) + end: tensor
                       for path, found in held.items() for end, tensor in found.items()}
            place = folder / network
            with disk_errors(place):
                place.mkdir(parents=True, exist_ok=True)
                save_tensors(place / PEFT_WEIGHTS, tensors, {"format": "pt"})
                write_json(place / PEFT_CONFIG, {"peft_type": "LORA", "lora_bias": False, "bias": "none",
                                                 "base_model_name_or_path": None, **adapter_config(held)})

    def _read_back(self, path: Path, layout: Layout) -> LoraFile:
        if layout != "peft":
            return LoraFile.read(path, names=self.names)
        files = [LoraFile.read(path / network, names=self.names, network=None if network == "unet" else network)
                 for network in dict.fromkeys(network for network, _ in self.layers)]
        return replace(files[0], layers={place: layer for file in files for place, layer in file.layers.items()})


def mismatch(path: Path, why: str) -> UserError:
    return UserError(Problem(
        f"{path.name} does not hold what was trained", str(path), why,
        "check the disk, then write it again: in a run, with --resume_from_checkpoint latest", kind="disk"))


def released_names(family: FamilyName | None) -> FileNames:
    return xl_names() if family == "sdxl" else SD_NAMES


def layout_family(layout: str) -> str:
    """WebUIs, LyCORIS and OneTrainer share a grammar."""
    return "webui" if layout in ("webui", "lycoris", "onetrainer") else layout


def bundled(embeddings: Mapping[str, Mapping[str, Tensor]]) -> Tensors:
    """Embeddings as WebUIs and OneTrainer read them inside of a LoRA file; one without a name as a file of its own.

    A1111 knows one text encoder's as emb_params.
    """
    alone = {"clip_l": "emb_params"} if embeddings.get("", {}).keys() == {"clip_l"} else {}
    return {f"bundle_emb.{name}.{encoder}" if name else alone.get(encoder, encoder): tensor
            for name, encoders in embeddings.items() for encoder, tensor in encoders.items()}


def same_embeddings(found: Mapping[str, Mapping[str, Tensor]], wanted: Mapping[str, Mapping[str, Tensor]]) -> bool:
    flat, other = ({(name, encoder): tensor for name, encoders in held.items() for encoder, tensor in encoders.items()}
                   for held in (found, wanted))
    return flat.keys() == other.keys() and all(torch.equal(flat[key], other[key]) for key in flat)


def diffusers_config(each: Mapping[ModulePlace, Tensors]) -> dict[str, object]:
    """Each network's PEFT config, its keys after the network's name."""
    networks = dict.fromkeys(network for network, _ in each)
    return {f"{network}.{key}": value for network in networks for key, value in adapter_config(
        {path: tensors for (other, path), tensors in each.items() if other == network}).items()}


def layer_width(layer: LayerUpdate) -> int:
    return module_parts.shape_of(layer.update)[1]


def whole_number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() and int(text) else 1
