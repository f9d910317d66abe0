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

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trainkit.adapters.network import update_of
from trainkit.adapters.updates import Hadamard, Kronecker, LowRank, Update, decomposed, rows_norm
from trainkit.errors import Problem, UserError
from trainkit.files import disk_errors, load_tensors, save_tensors

if TYPE_CHECKING:
    from trainkit.adapters import Adapters
    from trainkit.families import Family

DOWN, UP, ALPHA, DORA_SCALE = ".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale"
LORA_A, LORA_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector.weight"
HADAMARD = {"B1": ".hada_w1_a", "A1": ".hada_w1_b", "B2": ".hada_w2_a", "A2": ".hada_w2_b"}  # our name -> the file's
KRONECKER = {"C": ".lokr_w1", "B": ".lokr_w2_a", "A": ".lokr_w2_b", "D": ".lokr_w2"}
TEXT_MODEL = "text_model."  # Transformers 5 dropped this level from CLIPTextModel; files keep it, loaders know both
LoraFileFormat = Literal["diffusers", "webui"]
Tensors = dict[str, Tensor]
NAME_BYTES = 150  # of a tensor in a header
EXACT = torch.finfo(torch.float64).eps  # of the arithmetic in which files are compared


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
    alpha = str(float(first.scale * rank))
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
    """The rank that a WebUI file's factors have: PiSSA's and OLoRA's update is 2r wide."""
    first = next(iter(network.layers))
    return len(network.update(first).low_rank().A) if network.adapter_type == "lora" else network.rank


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


def file_bytes(networks: Sequence[Adapters], layout: LoraFileFormat) -> int:
    """About how large a file will be, without writing it: its numbers, and a little for each name."""
    return sum(module_bytes(network, module, layout) for network in networks for module in network.layers)


def module_bytes(network: Adapters, module: str, layout: LoraFileFormat) -> int:
    """Shapes are those of tensors without data, so products of factors cost nothing."""
    update = update_of(network.layers[module], network.adapter_type, network.scale).map(lambda t: t.to("meta"))
    if layout == "diffusers" or network.adapter_type == "lora":
        update = update.low_rank()
    numbers = sum(part.numel() for part in vars(update).values() if isinstance(part, Tensor))
    magnitude = 4 * network.shape(module)[0] if network.magnitude(module) is not None else 0
    return numbers * (4 if layout == "diffusers" else 2) + magnitude + 3 * NAME_BYTES


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def write_diffusers(networks: Sequence[Adapters], path: Path, metadata: Mapping[str, str]) -> None:
    """The file `pipeline.load_lora_weights` reads. With alpha = rank readers that look for no alpha are right too.

    Every kind is written as B A: LoHa and LoKr are exact products of that form, of a higher rank.
    """
    tensors: Tensors = {}
    config: dict[str, object] = {}
    for network in networks:
        for module in network.layers:
            stem = f"{network.prefix}.{in_file(network, module)}"
            tensors |= {stem + end: tensor for end, tensor in diffusers_tensors(network, module).items()}
        config |= {f"{network.prefix}.{key}": value for key, value in diffusers_config(network).items()}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    with disk_errors(path):
        save_tensors(path, tensors, {**metadata, **header})


def diffusers_tensors(network: Adapters, module: str) -> Tensors:
    update, (out, *kernel) = network.update(module).low_rank(), network.shape(module)
    ones = [1] * (len(kernel) - 1)
    A, B = update.A.float(), update.B.float() * update.scale
    tensors = {LORA_A: A.reshape(-1, *kernel), LORA_B: B.reshape(out, -1, *ones)}
    magnitude = network.magnitude(module)
    if magnitude is not None:
        tensors[MAGNITUDE] = magnitude.view(1, -1, *ones) if ones else magnitude
    return tensors


def diffusers_config(network: Adapters) -> dict[str, object]:
    """What PEFT needs to build the layers again; ranks that differ from the first layer's are listed."""
    ranks = {stripped(module): len(network.update(module).low_rank().A) for module in network.layers}
    common = max(ranks.values(), key=[*ranks.values()].count, default=0)
    others = {module: rank for module, rank in ranks.items() if rank != common}
    return {"r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": others,
            "target_modules": [*ranks], "use_dora": network.decomposed}


def stripped(module: str) -> str:
    return module.removeprefix(TEXT_MODEL)


def in_file(network: Adapters, module: str) -> str:
    return module if network.prefix == "unet" else TEXT_MODEL + stripped(module)


def write_kohya(networks: Sequence[Adapters], family: Family, path: Path, metadata: Mapping[str, str], *,
                dtype: torch.dtype = torch.float16) -> None:
    """The file ComfyUI, A1111 and Forge read; docs/adapters.md says which kinds each of them does.

    metadata  what the run adds: strings, of local paths at most the last part, since the header travels with the file
    """
    tensors: Tensors = {}
    for network in networks:
        for module in network.layers:
            name = family.webui_name(module, network.prefix)
            tensors |= {name + end: tensor for end, tensor in webui_tensors(network, module, dtype).items()}
    header = {"format": "pt", **metadata, **architecture_metadata(networks, family)}
    with disk_errors(path):
        save_tensors(path, tensors, {**header, **hash_metadata(tensors, header)})


def webui_tensors(network: Adapters, module: str, dtype: torch.dtype) -> Tensors:
    """Factors in `dtype` where all of them are normal numbers there, else in fp32; alpha and magnitude in fp32."""
    factors, alpha = FACTORS[network.adapter_type](network, module)
    kept = dtype if all(is_normal(factor, dtype) for factor in factors.values()) else torch.float32
    tensors = {end: factor.to(kept) for end, factor in factors.items()} | {ALPHA: torch.tensor(float(alpha))}
    magnitude = network.magnitude(module)
    if magnitude is not None:  # on the output axis, as the number of its entries tells a reader
        tensors[DORA_SCALE] = magnitude.view(-1, *[1] * (len(network.shape(module)) - 1))
    return tensors


def lora_factors(network: Adapters, module: str) -> tuple[Tensors, float]:
    """-> up and down, alpha"""
    update, (out, *kernel) = network.update(module).low_rank(), network.shape(module)
    down, up = balanced(update.A.float(), update.B.float())
    ones = [1] * (len(kernel) - 1)
    return {DOWN: down.reshape(-1, *kernel), UP: up.reshape(out, -1, *ones)}, update.scale * len(down)


def loha_factors(network: Adapters, module: str) -> tuple[Tensors, float]:
    update = network.update(module)
    return {end: getattr(update, name).float() for name, end in HADAMARD.items()}, update.scale * network.rank


def lokr_factors(network: Adapters, module: str) -> tuple[Tensors, float]:
    """Readers know no scale for a whole block, which has no rank: there it goes into the block."""
    update, (_, _, *kernel) = network.update(module), network.shape(module)
    held = {name: getattr(update, name) for name in KRONECKER}
    alpha = update.scale * network.rank
    if held["D"] is not None:
        held["D"], alpha = (held["D"] * update.scale).unflatten(1, (-1, *kernel)), network.rank
    return {KRONECKER[name]: factor.float() for name, factor in held.items() if factor is not None}, alpha


FACTORS = {"lora": lora_factors, "loha": loha_factors, "lokr": lokr_factors}


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


# ----------------------------------------------------------------------------------------------------------------------
# Reading back


@dataclass(frozen=True)
class Rounded:
    """A matrix and how far each entry may be from its value before the numbers it is made of were rounded, fp64.

    Errors of products are bounded by |X| dY + dX |Y| + dX dY.
    """

    value: Tensor
    error: Tensor

    @classmethod
    def read(cls, X: Tensor) -> Rounded:
        """A factor from a file, a convolution's kernel in a row; twice the rounding, as a scale was rounded with it."""
        return cls(X.double().flatten(1), 2 * rounding(X).flatten(1))

    def __matmul__(self, other: Rounded) -> Rounded:
        return self._product(other, torch.matmul)

    def kron(self, other: Rounded) -> Rounded:
        return self._product(other, torch.kron)

    def __mul__(self, other: Rounded | float) -> Rounded:
        if isinstance(other, Rounded):
            return self._product(other, torch.mul)
        return Rounded(self.value * other, self.error * abs(other))

    def _product(self, other: Rounded, times: Callable[[Tensor, Tensor], Tensor]) -> Rounded:
        X, Y = self.value.abs(), other.value.abs()
        error = times(X, other.error).add_(times(self.error, Y.add_(other.error)))
        return Rounded(times(self.value, other.value), error)

    def decomposed(self, W: Tensor, magnitude: Tensor) -> Rounded:
        """DoRA's ΔW where this is the low-rank update; magnitudes [out] are exact.

        With s = m / ‖V‖ and e = ‖dV‖ / ‖V‖ of a row, s V is off by |s| (dV + e (|V| + dV)), and by the arithmetic.
        """
        V = W + self.value
        norm = rows_norm(V)
        s, e = (magnitude.view(-1, 1) / norm).abs(), rows_norm(self.error) / norm
        error = s * (self.error + e * (V.abs() + self.error)) + 4 * EXACT * (s * V.abs() + W.abs())
        return Rounded(decomposed(W, self.value, magnitude), error)


def rounding(X: Tensor) -> Tensor:
    """Largest error of rounding to the nearest number of X's dtype, entry by entry, fp64: max(u |X|, s/2).

    u is half of the dtype's eps, s its smallest subnormal.
    """
    limits = torch.finfo(X.dtype)
    return (X.double().abs() * limits.eps / 2).clamp(min=limits.tiny * limits.eps / 2)


@dataclass(frozen=True)
class Stated:
    """What a file says about one module."""

    update: Update  # of Rounded factors
    magnitude: Tensor | None  # [out]


def verify(path: Path, networks: Sequence[Adapters], family: Family, *, layout: LoraFileFormat,
           by_factors: bool = False) -> float:
    """Read a written file by its layout's rules and compare every ΔW with the trained one -> the largest error.

    An entry may be off by what rounding the file's own numbers can do (`Rounded`). The error that is returned counts
    relative to the largest entry of its ΔW: of the order of 6e-8 in fp32 and 5e-4 in fp16.
    by_factors  do not compute the ΔW of a module whose factors are the trained ones but for rounding. It keeps the same
                bound, and its error is not known (0). For SDXL this saves most of a minute
    Raises UserError(kind="disk") naming what differs.
    """
    stems = gathered(load_tensors(path), layout)
    places = {stem: place(stem, networks, family, layout) for stem in stems}
    stated = {stem: parse(parts, layout) for stem, parts in stems.items()}
    strange = sorted(stem for stem in stems if places[stem] is None or stated[stem] is None)
    known = {(network.prefix, module) for network, module in filter(None, places.values())}
    missing = sorted(module for n in networks for module in n.layers if (n.prefix, module) not in known)
    if strange or missing:
        raise mismatch(path, f"{len(strange)} unknown or incomplete, {len(missing)} missing modules: "
                             f"{', '.join((strange + missing)[:3])}")
    judge = compare_factors if by_factors else compare
    results = {stem: judge(found, *where) for stem in stems if (found := stated[stem]) and (where := places[stem])}
    wrong = [stem for stem, (_, good) in results.items() if not good]
    if wrong:
        raise mismatch(path, f"ΔW of {wrong[0]} differs by {results[wrong[0]][0]:.1e} of its largest entry "
                             f"({len(wrong)} of {len(results)} modules differ)")
    return max(error for error, _ in results.values())


def mismatch(path: Path, why: str) -> UserError:
    return UserError(Problem(
        f"{path.name} does not hold what was trained", str(path), why,
        "check the disk, then --resume_from_checkpoint latest writes it again", kind="disk"))


def compare(stated: Stated, network: Adapters, module: str) -> tuple[float, bool]:
    """-> max|stated − trained| relative to the largest entry of ΔW, and whether every entry is within rounding."""
    trained = network.delta_weight(module)
    try:
        found = stated.update.delta()
    except RuntimeError:  # factors that do not fit one another
        return math.inf, False
    if found.value.shape != trained.shape or (stated.magnitude is None) != (network.magnitude(module) is None):
        return math.inf, False
    if stated.magnitude is not None:
        if len(stated.magnitude) != len(trained):
            return math.inf, False
        found = found.decomposed(network.weight(module), stated.magnitude.double())
    error = (found.value - trained).abs_()  # [out,in]
    largest, size = float(error.max()), float(trained.abs().max())
    return largest / (size or 1.0), math.isfinite(largest) and bool((error <= found.error).all())


def compare_factors(stated: Stated, network: Adapters, module: str) -> tuple[float, bool]:
    """As `compare`, and (0, True) where the factors and the magnitudes are the trained ones but for rounding."""
    trained, magnitude = network.update(module), network.magnitude(module)
    if not isinstance(stated.update, type(trained)):
        trained = trained.low_rank()
    same_magnitude = magnitude is None if stated.magnitude is None else (
        magnitude is not None and torch.equal(stated.magnitude, magnitude))
    same = same_magnitude and isinstance(stated.update, type(trained)) and are_rounded(stated.update, trained)
    return (0.0, True) if same else compare(stated, network, module)


def are_rounded(stated: Update, trained: Update) -> bool:
    """Whether each factor is within its rounding of a trained one; then ΔW is, by |X| dY + dX |Y| + dX dY.

    One factor takes the quotient of the two scales. The components of B A may be balanced by powers of two.
    """
    found = {name: factor for name, factor in vars(stated).items() if isinstance(factor, Rounded)}
    wanted = {name: factor for name, factor in vars(trained).items() if isinstance(factor, Tensor)}
    shapes, expected = ({n: f.value.shape for n, f in found.items()}, {n: f.shape for n, f in wanted.items()})
    if shapes != expected or stated.scale == 0 or not all(bool(f.value.isfinite().all()) for f in found.values()):
        return False
    taker = next(name for name in ("D", "B", "B1") if name in wanted)
    wanted[taker] = wanted[taker] * (trained.scale / stated.scale)
    if isinstance(trained, LowRank):
        shift = (found["A"].value.abs().amax(1) / wanted["A"].abs().amax(1)).log2().round().exp2()  # [r]
        shift = torch.where(shift.isfinite() & (shift > 0), shift, 1.0)
        wanted = {"A": wanted["A"] * shift.unsqueeze(1), "B": wanted["B"] / shift}
    return all(bool(((found[name].value - factor).abs() <= found[name].error).all()) for name, factor in wanted.items())


def gathered(tensors: Tensors, layout: LoraFileFormat) -> dict[str, Tensors]:
    """The tensors of each module: stem -> {end of the name: tensor}."""
    stems: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        stem = name.partition(".")[0] if layout == "webui" else name.partition(".lora_")[0]
        stems.setdefault(stem, {})[name[len(stem):]] = tensor
    return stems


def place(
    stem: str, networks: Sequence[Adapters], family: Family, layout: LoraFileFormat,
) -> tuple[Adapters, str] | None:
    """The network and the module that a name in a file means; in WebUI files the parts of a path are joined by "_"."""
    for network in networks:
        paths = {stripped(path): path for path in network.layers}
        if layout == "webui":
            paths = {name.replace(".", "_"): path for name, path in paths.items()}
            found = family.read_webui_name(stem, network.prefix)
        else:
            found = stripped(stem.removeprefix(f"{network.prefix}.")) if stem.startswith(f"{network.prefix}.") else ""
        if found in paths:
            return network, paths[found]
    return None


def parse(parts: Tensors, layout: LoraFileFormat) -> Stated | None:
    """PEFT's rule with alpha = rank, or kohya's and LyCORIS's; None where tensors are missing or strange."""
    dora = {"diffusers": MAGNITUDE, "webui": DORA_SCALE}[layout]
    factors = {end: Rounded.read(t) for end, t in parts.items() if end not in (ALPHA, dora) and t.ndim > 1}
    unknown = parts.keys() - factors.keys() - {ALPHA, dora}
    alpha = float(parts[ALPHA]) if ALPHA in parts else None
    update: Update | None = None
    if layout == "diffusers" and factors.keys() == {LORA_A, LORA_B}:
        update = LowRank(factors[LORA_A], factors[LORA_B])
    elif layout == "webui" and alpha is not None:
        update = webui_update(factors, alpha)
    return None if unknown or update is None else Stated(update, parts[dora].flatten() if dora in parts else None)


def webui_update(factors: Mapping[str, Rounded], alpha: float) -> Update | None:
    """scale = alpha / r, and 1 for a LoKr whose factors are both whole."""
    if factors.keys() == {DOWN, UP}:
        return LowRank(factors[DOWN], factors[UP], alpha / len(factors[DOWN].value))
    if factors.keys() == set(HADAMARD.values()):
        return Hadamard(**{name: factors[end] for name, end in HADAMARD.items()},
                        scale=alpha / len(factors[HADAMARD["A1"]].value))
    C, B, A, D = (factors.get(end) for end in KRONECKER.values())
    if C is not None and D is not None and len(factors) == 2:
        return Kronecker(C, D=D)
    if C is not None and A is not None and B is not None and len(factors) == 3:
        return Kronecker(C, B, A, scale=alpha / len(A.value))
    return None
