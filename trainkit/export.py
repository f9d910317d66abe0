"""Two LoRA files people can load, each read back and compared with what was trained.

    Diffusers  pytorch_lora_weights.safetensors   PEFT's names, fp32, the scale multiplied into B, so alpha = rank
    WebUI      <name>.safetensors                 WebUIs' names, `.alpha` tensors, ss_* and ModelSpec metadata, fp16
                                                  (fp32 for a module whose numbers leave fp16's normal range)

Reading goes by each file's own rules: ΔW = B A in the first, (alpha/r) · up · down in the second, DoRA's magnitude and
LyCORIS's factors as docs/adapters.md has them.
Source: kohya-ss/sd-scripts, networks/lora.py and library/train_util.py (names and ss_* keys); KohakuBlueleaf/LyCORIS,
lycoris/modules (hada_*, lokr_*, dora_scale); Stability-AI/ModelSpec 1.0.1 (modelspec.* keys).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainkit.adapters.network import update_of
from trainkit.families.file_names import ModulePlace, stripped
from trainkit.lora_file import DORA_NORM, LayerUpdate, Layout, LoraFile, Magnitude, MetadataLevel, hash_metadata, kept

if TYPE_CHECKING:
    from trainkit.adapters import Adapters
    from trainkit.families import Family

NAME_BYTES = 150  # of a tensor in a header


class TrainedLayers(Mapping[ModulePlace, LayerUpdate]):
    """What was trained, module by module, in fp64 on the CPU; computed when it is looked up, since all of it is large.

    A convolution's kernel is laid out in a row.
    """

    def __init__(self, networks: Sequence[Adapters]):
        self.paths: dict[ModulePlace, tuple[Adapters, str]] = {
            (network.prefix, stripped(path)): (network, path) for network in networks for path in network.layers}

    def __getitem__(self, place: ModulePlace) -> LayerUpdate:
        network, path = self.paths[place]
        magnitude = network.magnitude(path)
        return LayerUpdate(network.update(path), tuple(network.shape(path)[2:]),
                     None if magnitude is None else Magnitude(magnitude))

    def __iter__(self) -> Iterator[ModulePlace]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def weight(self, place: ModulePlace) -> Tensor:
        """The base's W -> [out,in] fp64."""
        network, path = self.paths[place]
        return network.weight(path)


def architecture_metadata(networks: Sequence[Adapters], family: Family) -> dict[str, str]:
    """What a reader needs to know about any LoRA: kohya's minimum and ModelSpec's obligatory keys."""
    v_prediction = family.schedule.prediction_type == "v_prediction"
    h, w = family.native_size
    return {
        **family.base_metadata, **family.file_metadata, **network_metadata(networks),
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": f"{family.architecture}/lora",
        "modelspec.resolution": f"{w}x{h}",
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
    }


def network_metadata(networks: Sequence[Adapters]) -> dict[str, str]:
    """The module and arguments that build such a network in kohya's trainer; LyCORIS has all but plain LoRA."""
    first = networks[0]
    rank = max(file_rank(network) for network in networks)
    alpha = str(file_alpha(first, rank))
    lycoris = {"algo": first.adapter_type} | ({"factor": str(first.factor)} if first.adapter_type == "lokr" else {})
    if any(network.decomposed for network in networks):
        lycoris |= {"dora_wd": "True", "wd_on_output": "True"}
    convolves = any(math.prod(network.shape(path)[2:]) > 1 for network in networks for path in network.layers)
    args = {"conv_dim": str(rank), "conv_alpha": alpha} if convolves else {}
    plain = lycoris == {"algo": "lora"}
    return {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya", "ss_network_dim": str(rank),
        "ss_network_alpha": alpha, "ss_network_args": json.dumps(args if plain else lycoris | args),
    }


def file_rank(network: Adapters) -> int:
    """The largest rank that a WebUI file's factors have: PiSSA's and OLoRA's update is 2r wide."""
    widest = max(network.layers, key=network.rank_of)
    return len(network.update(widest).low_rank().A) if network.adapter_type == "lora" else network.rank_of(widest)


def file_alpha(network: Adapters, rank: int) -> float:
    """The alpha of a WebUI file: LoHa's and LoKr's scale is in their factors."""
    return float(network.scale_of(max(network.layers, key=network.rank_of)) * rank
                 if network.adapter_type == "lora" else rank)


def file_bytes(networks: Sequence[Adapters], layout: Layout) -> int:
    """About how large a file will be, without writing it: its numbers, and a little for each name."""
    return sum(module_bytes(network, module, layout) for network in networks for module in network.layers)


def module_bytes(network: Adapters, module: str, layout: Layout) -> int:
    """Shapes are those of tensors without data, so products of factors cost nothing."""
    update = update_of(network.layers[module], network.adapter_type, network.scale_of(module)).map(
        lambda t: t.to("meta"))
    if layout == "diffusers" or network.adapter_type == "lora":
        update = update.low_rank()
    numbers = sum(part.numel() for part in vars(update).values() if isinstance(part, Tensor))
    magnitude = 4 * network.shape(module)[0] if network.magnitude(module) is not None else 0
    return numbers * (4 if layout == "diffusers" else 2) + magnitude + 3 * NAME_BYTES


# ----------------------------------------------------------------------------------------------------------------------
# Writing and reading back


def write_diffusers(networks: Sequence[Adapters], path: Path, metadata: Mapping[str, str], *,
                    level: MetadataLevel = "full") -> None:
    """The file `pipeline.load_lora_weights` reads. With alpha = rank readers that look for no alpha are right too."""
    LoraFile(TrainedLayers(networks), metadata=kept(metadata, level)).save(path, "diffusers")


def write_kohya(networks: Sequence[Adapters], family: Family, path: Path, metadata: Mapping[str, str], *,
                dtype: torch.dtype = torch.float16, layout: Layout = "webui", level: MetadataLevel = "full") -> None:
    """The file ComfyUI, A1111 and Forge read; docs/adapters.md says which kinds each of them does.

    metadata  what the run adds: strings, of local paths at most the last part, since the header travels with the file
    layout    "lycoris" keeps the paper's magnitudes of a DoRA
    """
    layers, header = TrainedLayers(networks), {**metadata, **architecture_metadata(networks, family)}
    if layout == "webui" and any(network.decomposed for network in networks):
        header[DORA_NORM] = "base"
    LoraFile(layers, metadata=header, names=family.names).save(
        path, layout, dtype=dtype, weights=layers.weight,
        metadata=lambda tensors: kept(header | hash_metadata(tensors, {"format": "pt", **header}), level))


def verify(path: Path, networks: Sequence[Adapters], family: Family, *, layout: Layout, by_factors: bool = False
           ) -> float:
    """Read a written file by its layout's rules and compare every ΔW with the trained one -> the largest error.

    See `LoraFile.check`, which raises UserError naming what differs.
    """
    layers = TrainedLayers(networks)
    return LoraFile(layers, names=family.names).check(path, layout, weights=layers.weight, by_factors=by_factors)


def write_low_rank(networks: Sequence[Adapters], family: Family, path: Path, metadata: Mapping[str, str], *, rank: int,
                   level: MetadataLevel = "full") -> tuple[float, float]:
    """The nearest plain LoRA of a rank, for programs that know no DoRA of our form -> ‖what is lost‖ / ‖ΔW‖, and the
    largest error of the file that is read back, against that LoRA.
    """
    layers = TrainedLayers(networks)
    plain, lost = LoraFile(layers, names=family.names).low_rank(rank, layers.weight)
    header = {**metadata, **architecture_metadata(networks, family), "ss_network_module": "networks.lora",
              "ss_network_dim": str(rank), "ss_network_alpha": str(float(rank)), "ss_network_args": "{}"}
    plain.save(path, "webui", metadata=lambda tensors: kept(
        header | hash_metadata(tensors, {"format": "pt", **header}), level))
    return lost, plain.check(path, "webui")
