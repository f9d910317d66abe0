"""The tensors of one module, as every trainer names them, and what they say together.

    down, up (A, B), mid      LoRA, LoCon        ΔW = scale · up · down, or up · mid · down (in three parts)
    hada_w1_a … hada_t2       LoHa               ΔW = scale · (w1_a w1_b) ∘ (w2_a w2_b)
    lokr_w1 … lokr_t2         LoKr               ΔW = scale · w1 ⊗ w2
    diff                      full               ΔW itself
    alpha                     scale = alpha / r, and 1 for a LoKr of two whole factors; without alpha, scale = 1
    dora_scale, lora_magnitude_vector            DoRA's magnitudes

Source: KohakuBlueleaf/LyCORIS, lycoris/modules; kohya-ss/sd-scripts, networks/lora.py; Comfy-Org/ComfyUI,
comfy/weight_adapter; huggingface/peft, tuners (lora_A, hada_*, lokr_*, lora_magnitude_vector).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trainkit.adapters.updates import Hadamard, Kronecker, LowRank, Update, Whole
from trainkit.lora_file.layer import LayerUpdate, Magnitude

ModuleParts = Mapping[str, Tensor]  # of one module
Scaling = Callable[[int], float]  # rank -> scale

HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
KRONECKER = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
ENDS = {  # part -> the end of its tensor's name
    "down": r"\.(?:lora_down|lora_A(?:\.\w+)?|lora\.down|lora_linear_layer\.down)\.weight|_lora\.down\.weight",
    "up": r"\.(?:lora_up|lora_B(?:\.\w+)?|lora\.up|lora_linear_layer\.up)\.weight|_lora\.up\.weight",
    "mid": r"\.lora_mid\.weight", "alpha": r"\.alpha", "dora_scale": r"\.dora_scale",
    "magnitude": r"\.lora_magnitude_vector(?:\.\w+)*",
    **{name: rf"\.{name}" for name in (*HADAMARD, *KRONECKER, "diff")},
}
NAME = re.compile("(.+?)(?:" + "|".join(f"(?P<{part}>{end})" for part, end in ENDS.items()) + ")")
EMBEDDINGS = {"clip_l": "clip_l", "clip_g": "clip_g", "emb_params": "clip_l", "string_to_param.*": "clip_l"}
BUNDLED = re.compile(r"bundle_emb\.(.+)\.(clip_l|clip_g|string_to_param\.\*)")  # embeddings inside of a LoRA file
MOST_ENTRIES = 2**28  # of a ΔW; the largest weight of SDXL has 13 million
OTHERS = {  # names of kinds that are not read -> what they are
    r"(^|[._])(oft|boft)(_|\.)|\.oft_": "OFT", r"\.(a1|a2|b1|b2|b)\.weight$": "GLoRA",
    r"\.(diff_b|w_norm|b_norm|bias|set_weight|reshape_weight)$": "changes of biases or norms",
    r"\.(on_input|ia3_l)": "IA³", r"double_blocks|joint_blocks|transformer_blocks_\d+_attn_|^(lora_)?transformer[._]":
    "for a transformer, such as Flux or SD 3",
}


def split(name: str) -> tuple[str, str] | None:
    """The name of a module and which part of it a tensor is: unet.x.lora_A.weight -> unet.x, down."""
    found = NAME.fullmatch(name)
    if found is None or found.lastgroup is None:
        return None
    stem = found[1].replace(".processor.", ".")  # Diffusers until 0.21: attn1.processor.to_q_lora.down.weight
    return stem + ".0" * (stem.endswith(".to_out")), found.lastgroup


def is_embedding(name: str) -> bool:
    """Whether a tensor is a textual inversion's, in a file of its own or inside of a LoRA."""
    return name in EMBEDDINGS or bool(BUNDLED.fullmatch(name))


def described(name: str) -> str:
    """What a tensor that is not read belongs to; "" where nobody knows."""
    return next((kind for pattern, kind in OTHERS.items() if re.search(pattern, name)), "")


def layer_of(parts: ModuleParts, scaling: Scaling, *, whole_rank: int = 0, over_base: bool = False
             ) -> LayerUpdate:
    """What the parts of a module say.

    scaling       where there is no alpha
    whole_rank    the rank of a LoKr of two whole factors, which has a scale too in PEFT; 0: it has none
    over_base     whether dora_scale is m ‖W‖ / ‖V‖
    Raises ValueError: a part is missing, or the parts do not fit one another.
    """
    given = {name: tensor for name, tensor in parts.items() if name not in ("alpha", "dora_scale", "magnitude")}
    if "alpha" in parts:
        alpha = single(parts["alpha"])
        scaling = lambda rank: alpha / rank  # noqa: E731
    update, kernel = update_of(given, scaling, whole_rank)
    return LayerUpdate(update, kernel, magnitude_of(parts, update, kernel, over_base))


def single(tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise ValueError(f"alpha has {tensor.numel()} numbers")
    return float(tensor)


def update_of(given: ModuleParts, scaling: Scaling, whole_rank: int) -> tuple[Update, tuple[int, ...] | None]:
    names = set(given)
    if {"down", "up"} <= names <= {"down", "up", "mid"}:
        return low_rank(given, scaling)
    if set(HADAMARD[:4]) <= names <= set(HADAMARD):
        return hadamard(given, scaling)
    if names <= set(KRONECKER) and names:
        return kronecker(given, scaling, whole_rank)
    if names == {"diff"}:
        D = given["diff"]
        sized(*matrix(D, "diff").shape)
        return Whole(D.flatten(1)), tuple(D.shape[2:])
    raise ValueError(f"it has {', '.join(sorted(names)) or 'no factor'}, which is no complete update")


def matrix(X: Tensor, name: str) -> Tensor:
    """A factor, a convolution's kernel in a row."""
    if X.ndim not in (2, 4) or not X.numel():
        raise ValueError(f"{name} has the shape {list(X.shape)}")
    return X.flatten(1)


def sized(*sides: int) -> None:
    if math.prod(sides) > MOST_ENTRIES:
        raise ValueError(f"its update would have {math.prod(sides):,} entries")


def fit(B: Tensor, A: Tensor, names: str) -> None:
    """Whether B A can be computed."""
    if B.shape[1] != A.shape[0]:
        raise ValueError(f"{names} do not fit: {list(B.shape)} and {list(A.shape)}")
    sized(B.shape[0], A.shape[1])


def through(T: Tensor, X: Tensor, name: str) -> Tensor:
    """A core T [r,s,kernel] and a factor X [s,in] of Tucker's form -> [r,in,kernel]."""
    if T.ndim != 4 or X.ndim < 2 or T.shape[1] != X.shape[0]:
        raise ValueError(f"{name} does not fit: {list(T.shape)} and {list(X.shape)}")
    sized(T.shape[0], math.prod(X.shape[1:]), *T.shape[2:])
    return torch.einsum("rshw,si->rihw", T.double(), X.double().flatten(1)).float()


def low_rank(given: ModuleParts, scaling: Scaling) -> tuple[Update, tuple[int, ...]]:
    down, up = given["down"], given["up"]
    if "mid" in given:
        down = through(given["mid"], down, "lora_mid")
    A, B = matrix(down, "down"), matrix(up, "up")
    fit(B, A, "up and down")
    return LowRank(A, B, scaling(len(A))), tuple(down.shape[2:])


def hadamard(given: ModuleParts, scaling: Scaling) -> tuple[Update, tuple[int, ...] | None]:
    factors, kernel = [], None
    for side in ("1", "2"):
        B, A, core = given[f"hada_w{side}_a"], given[f"hada_w{side}_b"], given.get(f"hada_t{side}")
        if core is not None:
            B, A = B.T, through(core, A, f"hada_t{side}")
            kernel = tuple(A.shape[2:])
        factors += [matrix(B, f"hada_w{side}_a"), matrix(A, f"hada_w{side}_b")]
    B1, A1, B2, A2 = factors
    fit(B1, A1, "hada_w1_a and hada_w1_b")
    fit(B2, A2, "hada_w2_a and hada_w2_b")
    if B1.shape[0] != B2.shape[0] or A1.shape[1] != A2.shape[1]:
        raise ValueError(f"the two products do not fit: {len(B1)} × {A1.shape[1]} and {len(B2)} × {A2.shape[1]}")
    return Hadamard(B1, A1, B2, A2, scaling(len(A1))), kernel


def kronecker(given: ModuleParts, scaling: Scaling, whole_rank: int) -> tuple[Update, tuple[int, ...] | None]:
    C, rank = given.get("lokr_w1"), 0
    if C is None:
        if not {"lokr_w1_a", "lokr_w1_b"} <= set(given):
            raise ValueError("lokr_w1 is missing")
        B, A = matrix(given["lokr_w1_a"], "lokr_w1_a"), matrix(given["lokr_w1_b"], "lokr_w1_b")
        fit(B, A, "lokr_w1_a and lokr_w1_b")
        C, rank = (B.double() @ A.double()).float(), len(A)
    C = matrix(C, "lokr_w1")
    if "lokr_w2" in given:
        D = given["lokr_w2"]
        rank = rank or whole_rank
        scale = scaling(rank) if rank else 1.0
        block = matrix(D, "lokr_w2")
        sized(*C.shape, *block.shape)
        return Kronecker(C, D=block, scale=scale), tuple(D.shape[2:])
    if not {"lokr_w2_a", "lokr_w2_b"} <= set(given):
        raise ValueError("lokr_w2 is missing")
    B, A, kernel = given["lokr_w2_a"], given["lokr_w2_b"], None
    if "lokr_t2" in given:
        B, A = B.T, through(given["lokr_t2"], A, "lokr_t2")
        kernel = tuple(A.shape[2:])
    B, A = matrix(B, "lokr_w2_a"), matrix(A, "lokr_w2_b")
    fit(B, A, "lokr_w2_a and lokr_w2_b")
    sized(*C.shape, len(B), A.shape[1])
    return Kronecker(C, B, A, scale=scaling(len(A))), kernel


def shape_of(update: Update) -> tuple[int, int]:
    """[out,in] of an update, without computing it."""
    held = update.map(lambda factor: factor.to("meta"))
    return tuple(held.delta().shape)


def magnitude_of(parts: ModuleParts, update: Update, kernel: tuple[int, ...] | None, over_base: bool
                 ) -> Magnitude | None:
    """PEFT's has one number for each output. A dora_scale shows it: [out,1] or [1,in], with ones for a kernel."""
    if "magnitude" not in parts and "dora_scale" not in parts:
        return None
    held = parts.get("magnitude", parts.get("dora_scale"))
    assert held is not None
    out, width = shape_of(update)
    by_output = held.numel() == out and ("magnitude" in parts or held.shape[0] == out)
    if by_output:
        return Magnitude(held.flatten(), over_base=over_base and "dora_scale" in parts)
    if held.ndim > 1 and held.shape[0] == 1 and width % held.numel() == 0 and held.numel() in (
            width, width // math.prod(kernel or (1,)), width // 9):
        return Magnitude(held.flatten(), by_input=True)
    raise ValueError(f"its magnitudes have the shape {list(held.shape)}, and its update is {out} × {width}")
