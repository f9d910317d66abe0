"""Two LoRA files people can load, each read back and compared with what was trained.

    Diffusers  pytorch_lora_weights.safetensors   PEFT's names, fp32, α/r multiplied into B, so alpha = rank
    WebUI      <name>.safetensors                 SGM names, `.alpha` tensors, ss_* and ModelSpec metadata, fp16

Reading goes by each file's own rules: ΔW = B A in the first, (alpha/r) · up · down in the second.
Source: kohya-ss/sd-scripts, networks/lora.py and library/train_util.py (names and ss_* keys); Stability-AI/ModelSpec
1.0.1 (modelspec.* keys).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from trainkit.errors import Problem, UserError
from trainkit.families.sgm import module_name
from trainkit.files import disk_errors, load_tensors, save_tensors

if TYPE_CHECKING:
    from trainkit.adapters import Adapters
    from trainkit.families.sdxl import SDXL

UNET = "unet."
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the largest entry of ΔW


@dataclass(frozen=True)
class Factors:
    """A low-rank update as a file states it: ΔW = scale · B A."""

    A: Tensor  # [r,in]
    B: Tensor  # [out,r]
    scale: float = 1.0

    def delta_weight(self) -> Tensor:
        """-> [out,in] fp64"""
        return self.B.double() @ (self.scale * self.A.double())


def architecture_metadata(adapters: Adapters, family: SDXL) -> dict[str, str]:
    """What a reader needs to know about any LoRA: kohya's minimum and ModelSpec's obligatory keys."""
    v_prediction = family.schedule.prediction_type == "v_prediction"
    side = family.unet.config.sample_size * family.vae_factor
    return {
        "ss_v2": "False", "ss_base_model_version": family.webui_base, "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapters.rank), "ss_network_alpha": str(float(adapters.alpha)), "ss_network_args": "{}",
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": f"{family.architecture}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
    }


def hash_metadata(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The hashes model browsers look LoRAs up by: SHA-256 of the tensor bytes, and an older 8-digit one.

    Both are taken of the file with the ss_* metadata alone, so that editing a title later does not change them
    (kohya-ss/sd-scripts, library/train_util.py, precalculate_safetensors_hashes).
    """
    from safetensors.torch import save

    data = save(dict(tensors), {k: v for k, v in metadata.items() if k.startswith("ss_")})
    body = 8 + int.from_bytes(data[:8], "little")
    digest = hashlib.sha256(data[body:]).hexdigest()
    legacy = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    return {"sshs_model_hash": digest, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{digest}"}


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def write_diffusers(adapters: Adapters, path: Path, metadata: Mapping[str, str]) -> None:
    """The file `pipeline.load_lora_weights` reads. With alpha = rank readers that look for no alpha are right too."""
    tensors: dict[str, Tensor] = {}
    for module in adapters.layers:
        A, B = (factor.detach().cpu().float() for factor in adapters.factors(module))
        tensors[f"{UNET}{module}{LORA_A}"], tensors[f"{UNET}{module}{LORA_B}"] = A, B * adapters.scale
    config = {"r": adapters.rank, "lora_alpha": adapters.rank, "target_modules": list(adapters.layers)}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps({UNET + k: v for k, v in config.items()})}
    with disk_errors(path):
        save_tensors(path, tensors, {**metadata, **header})


def write_kohya(adapters: Adapters, family: SDXL, path: Path, metadata: Mapping[str, str], *,
                dtype: torch.dtype = torch.float16) -> None:
    """The file ComfyUI, A1111 and Forge read.

    metadata  what the run adds: strings, of local paths at most the last part, since the header travels with the file
    """
    tensors: dict[str, Tensor] = {}
    for module in adapters.layers:
        name = family.webui_name(module)
        down, up = balanced(*(factor.detach().cpu().float() for factor in adapters.factors(module)))
        tensors[name + DOWN], tensors[name + UP] = down.to(dtype), up.to(dtype)
        tensors[name + ALPHA] = torch.tensor(float(adapters.alpha))
    header = {"format": "pt", **metadata, **architecture_metadata(adapters, family)}
    with disk_errors(path):
        save_tensors(path, tensors, {**header, **hash_metadata(tensors, header)})


def balanced(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same product from factors of like size, by a power of two, which rounds nothing.

    A young B of 1e-7 next to an A of 0.1 would lose its digits in fp16, whose normal numbers end at 6e-5.
    """
    a, b = A.abs().max(), B.abs().max()
    if a == 0 or b == 0:
        return A, B
    shift = torch.exp2(torch.round(torch.log2(a / b) / 2))
    return A / shift, B * shift


# ----------------------------------------------------------------------------------------------------------------------
# Reading back


def verify(path: Path, adapters: Adapters) -> float:
    """Read a written file by its own rules and compare every ΔW with the trained one -> the largest error.

    Errors count relative to the largest entry of |B| |A|, the terms ΔW is summed from: rounding each factor to a
    relative u moves no entry by more than 2u of that. Allowed are 1e-6 in fp32 and 1e-3 in fp16 (2u = 9.8e-4).
    Raises UserError(kind="disk") naming what differs.
    """
    tensors = load_tensors(path)
    webui = any(name.endswith(DOWN) for name in tensors)
    factors = webui_factors(tensors, adapters.unet) if webui else diffusers_factors(tensors)
    read = len(factors) * (3 if webui else 2)
    strange = sorted(factors.keys() - adapters.layers.keys())
    missing = sorted(adapters.layers.keys() - factors.keys())
    if strange or missing or read != len(tensors):
        raise mismatch(path, f"{len(strange)} unknown, {len(missing)} missing modules, {len(tensors) - read} stray "
                             f"tensors: {', '.join((strange + missing)[:3])}")
    dtype = next(iter(factors.values())).A.dtype
    errors = {module: relative_error(found.delta_weight(), adapters.delta_weight(module), adapters.term_size(module))
              for module, found in factors.items()}
    wrong = [module for module, error in errors.items() if not error <= TOLERANCE[dtype]]  # NaN is wrong too
    if wrong:
        raise mismatch(path, f"ΔW of {wrong[0]} differs by {errors[wrong[0]]:.1e} of its largest term "
                             f"({len(wrong)} of {len(errors)} modules differ)")
    return max(errors.values())


def mismatch(path: Path, why: str) -> UserError:
    return UserError(Problem(
        f"{path.name} does not hold what was trained", str(path), why,
        "check the disk, then --resume_from_checkpoint latest writes it again", kind="disk"))


def relative_error(found: Tensor, expected: Tensor, size: float) -> float:
    """max|found − expected| / size; 0 for two zeros, NaN where either holds one."""
    if found.shape != expected.shape:
        return float("inf")
    difference = float(vector_norm(found - expected, float("inf")))
    return difference / size if size else difference


def diffusers_factors(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """PEFT's rule with alpha = rank: ΔW = B A."""
    paths = [name.removeprefix(UNET).removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)]
    pairs = {path: (tensors.get(f"{UNET}{path}{LORA_A}"), tensors.get(f"{UNET}{path}{LORA_B}")) for path in paths}
    return {path: Factors(A, B) for path, (A, B) in pairs.items() if A is not None and B is not None}


def webui_factors(tensors: Mapping[str, Tensor], unet: nn.Module) -> dict[str, Factors]:
    """kohya's rule: ΔW = (alpha / r) · up · down; paths are told apart by their parts joined with "_"."""
    paths = {path.replace(".", "_"): path for path, _ in unet.named_modules()}
    return {paths.get(module_name(name, unet.config), name): factors for name, factors in webui_triples(tensors)}


def webui_triples(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Factors]]:
    for key, down in tensors.items():
        name = key.removesuffix(DOWN)
        if key.endswith(DOWN) and name + UP in tensors and name + ALPHA in tensors:
            yield name, Factors(down, tensors[name + UP], float(tensors[name + ALPHA]) / len(down))
