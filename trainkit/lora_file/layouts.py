"""The tensors of one module in each layout. Reading them again is the business of parts.py.

    diffusers   lora_A, lora_B with the scale in it, lora_magnitude_vector; fp32, every kind as one product
    webui       lora_down, lora_up, alpha · hada_* · lokr_* · diff; dora_scale over the base's norm (ComfyUI, Forge)
    lycoris     the same, with the paper's dora_scale
    onetrainer  as lycoris, with Diffusers' words in names
    peft        as diffusers, one folder for each network
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from trainkit.adapters.updates import Hadamard, Kronecker, Update, Whole
from trainkit.families.file_names import PEFT, TEXT_MODEL, FileNames, ModulePlace, joined
from trainkit.lora_file.layer import LayerUpdate

Layout = Literal["diffusers", "webui", "lycoris", "onetrainer", "peft"]
Tensors = dict[str, Tensor]
DORA_NORM = "ss_dora_norm"  # in a header: which norm dora_scale is for, "base" or the paper's


def stem_of(place: ModulePlace, layout: Layout, names: FileNames) -> str:
    """What the module is called in a layout."""
    network, path = place
    if layout in ("diffusers", "peft"):
        whole = path if network == "unet" else TEXT_MODEL + path
        return f"{network}.{whole}" if layout == "diffusers" else f"{PEFT}{whole}"
    return joined(path) if layout == "onetrainer" and network == "unet" else names.webui(path, network)


def tensors_of(layer: LayerUpdate, layout: Layout, *, dtype: torch.dtype, rank: int) -> Tensors:
    """End of a name -> tensor. The kernel must be known, and magnitudes be as the layout has them.

    dtype  of the factors in the layouts that have a choice, if their numbers allow it
    rank   the alpha of a LoKr of two whole factors, which readers pass over
    """
    if layout in ("diffusers", "peft"):
        return product_tensors(layer)
    return webui_tensors(layer, dtype, rank)


def product_tensors(layer: LayerUpdate) -> Tensors:
    """Every kind as B A: LoHa and LoKr are exact products of that form, of a higher rank."""
    update, kernel = double(layer.update).low_rank(), layer.kernel or ()
    ones = [1] * len(kernel)
    A, B = update.A.float(), update.B.float() * update.scale
    tensors = {".lora_A.weight": A.reshape(len(A), -1, *kernel), ".lora_B.weight": B.reshape(len(B), -1, *ones)}
    if layer.magnitude is not None:
        held = layer.magnitude.value.float()
        tensors[".lora_magnitude_vector.weight"] = held.view(1, -1, *ones) if ones else held
    return tensors


def webui_tensors(layer: LayerUpdate, dtype: torch.dtype, rank: int) -> Tensors:
    """Factors in `dtype` where all of them are normal numbers there, else in fp32; alpha and magnitude in fp32."""
    kernel = layer.kernel or ()
    factors, alpha = webui_factors(layer.update, kernel, rank)
    kept = dtype if all(is_normal(factor, dtype) for factor in factors.values()) else torch.float32
    tensors = {end: factor.to(kept).contiguous() for end, factor in factors.items()}
    if alpha is not None:
        tensors[".alpha"] = torch.tensor(float(alpha))
    if layer.magnitude is not None:  # the number of its entries, and their axis, tell a reader which magnitudes
        ones = [1] * len(kernel)
        shape = [1, -1, *ones] if layer.magnitude.by_input else [-1, 1, *ones]
        tensors[".dora_scale"] = layer.magnitude.value.float().view(shape)
    return tensors


def webui_factors(update: Update, kernel: tuple[int, ...], rank: int) -> tuple[Tensors, float | None]:
    """-> end of a name -> factor, and alpha. LoHa and LoKr take the scale into a factor: LyCORIS applies it twice."""
    update = double(update)
    if isinstance(update, Hadamard):
        B1 = update.B1.float() * update.scale
        factors = {"w1_a": B1, "w1_b": update.A1, "w2_a": update.B2, "w2_b": update.A2}
        return {f".hada_{end}": factor.float() for end, factor in factors.items()}, len(update.A1)
    if isinstance(update, Kronecker) and smaller_first(update, kernel):
        return kronecker_factors(update, kernel, rank)
    if isinstance(update, Whole):
        whole = (update.D * update.scale).float()
        return {".diff": whole.reshape(len(whole), -1, *kernel)}, None
    product = update.low_rank()
    A, B = balanced(product.A.float(), product.B.float())
    ones = [1] * len(kernel)
    return {".lora_down.weight": A.reshape(len(A), -1, *kernel),
            ".lora_up.weight": B.reshape(len(B), -1, *ones)}, product.scale * len(A)


def kronecker_factors(update: Kronecker, kernel: tuple[int, ...], rank: int) -> tuple[Tensors, float]:
    C = update.C.float()
    if update.D is not None:
        D = (update.D * update.scale).float()
        return {".lokr_w1": C, ".lokr_w2": D.reshape(len(D), -1, *kernel)}, rank
    assert update.A is not None and update.B is not None, "the block is D, or B and A"
    return {".lokr_w1": C, ".lokr_w2_a": update.B.float() * update.scale, ".lokr_w2_b": update.A.float()}, len(update.A)


def smaller_first(update: Kronecker, kernel: tuple[int, ...]) -> bool:
    """Whether C is no larger than the block, as LyCORIS's factorisation has it; else it cannot load the pair."""
    out, width = update.block_shape
    return len(update.C) <= out and update.C.shape[1] <= width // math.prod(kernel)


def double(update: Update) -> Update:
    return update.map(lambda factor: factor.double())


def balanced(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same product from components of like size: each row of A [r,in] and its column of B [out,r] by a power of
    two, which rounds nothing.

    A young B of 1e-7 next to an A of 0.1 would lose its digits in fp16, whose normal numbers end at 6e-5.
    """
    a, b = A.abs().amax(1), B.abs().amax(0)  # [r]
    exponent = ((a.log2() - b.log2()) / 2).round()
    shift = torch.where(exponent.isfinite(), exponent, 0.0).exp2()
    return A / shift.unsqueeze(1), B * shift


def is_normal(X: Tensor, dtype: torch.dtype) -> bool:
    """Whether the largest entry is a normal number of `dtype`, or zero: then rounding costs a relative u of it."""
    largest, limits = float(X.abs().max()), torch.finfo(dtype)
    return largest == 0 or limits.tiny <= largest <= limits.max


def adapter_config(products: dict[str, Tensors]) -> dict[str, object]:
    """What PEFT needs to build the layers of one network again, from the tensors of each module.

    Ranks that differ from most layers' are listed.
    """
    ranks = {module: len(tensors[".lora_A.weight"]) for module, tensors in products.items()}
    common = max(ranks.values(), key=[*ranks.values()].count, default=0)
    others = {module: rank for module, rank in ranks.items() if rank != common}
    decomposed = any(".lora_magnitude_vector.weight" in tensors for tensors in products.values())
    return {"r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": others,
            "target_modules": [*ranks], "use_dora": decomposed}
