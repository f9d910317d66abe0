"""Two LoRA files people can load, each read back and compared with what was trained.

    Diffusers  pytorch_lora_weights.safetensors   PEFT's names, fp32, α/r multiplied into B, so alpha = rank
    WebUI      <name>.safetensors                 SGM names, `.alpha` tensors, ss_* and ModelSpec metadata, fp16
                                                  (fp32 for a module whose numbers leave fp16's normal range)

Reading goes by each file's own rules: ΔW = B A in the first, (alpha/r) · up · down in the second.
Source: kohya-ss/sd-scripts, networks/lora.py and library/train_util.py (names and ss_* keys); Stability-AI/ModelSpec
1.0.1 (modelspec.* keys).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from trainkit.errors import Problem, UserError
from trainkit.families.sgm import module_name
from trainkit.files import disk_errors, load_tensors, save_tensors

if TYPE_CHECKING:
    from trainkit.adapters import Adapters
    from trainkit.families.sdxl import SDXL

UNET = "unet."
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
Layout = Literal["diffusers", "webui"]


@dataclass(frozen=True)
class Factors:
    """A low-rank update as a file states it: ΔW = scale · B A."""

    A: Tensor  # [r,in]
    B: Tensor  # [out,r]
    scale: float = 1.0

    def delta_weight(self) -> Tensor:
        """-> [out,in] fp64"""
        return self.B.double() @ (self.scale * self.A.double())

    def largest_term(self) -> float:
        """max scale · |B[i,k] A[k,j]|: the largest of the terms that ΔW is summed from."""
        return float(abs(self.scale) * (self.B.abs().amax(0).double() * self.A.abs().amax(1).double()).max())

    def rounding(self) -> Tensor:
        """How far each entry of ΔW may be from its value before the factors were rounded -> [out,in] fp64.

            2 · scale · (|B| dA + dB |A| + dB dA),   dX = max(u |X|, s/2)

        u is half of the dtype's eps, s its smallest subnormal; the 2 leaves room for the rounding of B's own scale.
        """
        A, B = self.A.double().abs(), self.B.double().abs()
        dA, dB = rounding(self.A), rounding(self.B)
        left, right = torch.cat([B, dB], dim=1), torch.cat([dA, A + dA])  # one product, not two and a sum
        return left @ right.mul_(2 * abs(self.scale))


def rounding(X: Tensor) -> Tensor:
    """Largest error of rounding to the nearest number of X's dtype, entry by entry, fp64."""
    kind = torch.finfo(X.dtype)
    return (X.double().abs() * kind.eps / 2).clamp(min=kind.tiny * kind.eps / 2)


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
        kept = dtype if is_normal(down, dtype) and is_normal(up, dtype) else torch.float32
        tensors[name + DOWN], tensors[name + UP] = down.to(kept), up.to(kept)
        tensors[name + ALPHA] = torch.tensor(float(adapters.alpha))
    header = {"format": "pt", **metadata, **architecture_metadata(adapters, family)}
    with disk_errors(path):
        save_tensors(path, tensors, {**header, **hash_metadata(tensors, header)})


def balanced(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same product from factors of like size, by a power of two, which rounds nothing.

    A young B of 1e-7 next to an A of 0.1 would lose its digits in fp16, whose normal numbers end at 6e-5.
    """
    a, b = float(A.abs().max()), float(B.abs().max())
    if not (0 < a < math.inf and 0 < b < math.inf):
        return A, B
    shift = 2.0 ** round((math.log2(a) - math.log2(b)) / 2)
    return A / shift, B * shift


def is_normal(X: Tensor, dtype: torch.dtype) -> bool:
    """Whether the largest entry is a normal number of `dtype`, or zero: then rounding costs a relative u of it."""
    largest, kind = float(X.abs().max()), torch.finfo(dtype)
    return largest == 0 or kind.tiny <= largest <= kind.max


# ----------------------------------------------------------------------------------------------------------------------
# Reading back


def verify(path: Path, adapters: Adapters, *, layout: Layout) -> float:
    """Read a written file by its layout's rules and compare every ΔW with the trained one -> the largest error.

    An entry may be off by what rounding the file's own factors can do (`Factors.rounding`). The error that is returned
    counts relative to the largest term its ΔW is summed from: of the order of u, 6e-8 in fp32 and 5e-4 in fp16.
    Raises UserError(kind="disk") naming what differs.
    """
    tensors = load_tensors(path)
    factors = webui_factors(tensors, adapters.unet) if layout == "webui" else diffusers_factors(tensors)
    read = len(factors) * (3 if layout == "webui" else 2)
    strange = sorted(factors.keys() - adapters.layers.keys())
    missing = sorted(adapters.layers.keys() - factors.keys())
    if strange or missing or read != len(tensors):
        raise mismatch(path, f"{len(strange)} unknown, {len(missing)} missing modules, {len(tensors) - read} stray "
                             f"tensors: {', '.join((strange + missing)[:3])}")
    results = {module: compare(found, adapters, module) for module, found in factors.items()}
    wrong = [module for module, (_, good) in results.items() if not good]
    if wrong:
        raise mismatch(path, f"ΔW of {wrong[0]} differs by {results[wrong[0]][0]:.1e} of its largest term "
                             f"({len(wrong)} of {len(results)} modules differ)")
    return max(error for error, _ in results.values())


def mismatch(path: Path, why: str) -> UserError:
    return UserError(Problem(
        f"{path.name} does not hold what was trained", str(path), why,
        "check the disk, then --resume_from_checkpoint latest writes it again", kind="disk"))


def compare(found: Factors, adapters: Adapters, module: str) -> tuple[float, bool]:
    """-> max|found − trained| relative to the largest term, and whether every entry is within rounding."""
    A, B = adapters.factors(module)
    if (found.A.shape, found.B.shape) != (A.shape, B.shape):
        return math.inf, False
    error = found.delta_weight().sub_(adapters.delta_weight(module)).abs_()  # [out,in]
    largest = float(error.max())
    return largest / (found.largest_term() or 1.0), math.isfinite(largest) and bool((error <= found.rounding()).all())


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
