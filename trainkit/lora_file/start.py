"""Training that starts from a LoRA file (--network_weights) instead of from no update.

The file may have any layout that `LoraFile` reads. Each adapted layer starts with the file's update:

    the same rank     the file's A, and its B times (the file's scale / this run's scale)
    a larger rank     the same, and new components as they are without a file: A random, B zero
    a smaller rank    the nearest product of that rank (Eckart and Young 1936)
    DoRA              the file's magnitudes; from a plain LoRA m = ‖W + ΔW‖, so that training starts at W + ΔW
    LoHa, LoKr        the file's factors, of the same shapes
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainkit.adapters import NAME, Adapters, Targets
from trainkit.adapters.starts import own_parameters
from trainkit.adapters.targets import layer_paths, target_modules
from trainkit.adapters.updates import Hadamard, Kronecker, LowRank, Update, rows_norm
from trainkit.errors import Problem, UserError, counted, refuse
from trainkit.families.file_names import FileNames, ModulePlace, stripped
from trainkit.lora_file.file import LoraFile
from trainkit.lora_file.layer import LayerUpdate
from trainkit.lora_file.parts import shape_of
from trainkit.lora_file.spectrum import cut, svd
from trainkit.runtime.weight_files import embeddings_file

if TYPE_CHECKING:
    from trainkit.options import LoraOptions

log = logging.getLogger(__name__)

FLAG = "--network_weights"
KINDS = {LowRank: "lora", Hadamard: "loha", Kronecker: "lokr"}
Embeddings = Mapping[str, Tensor]


def read(options: LoraOptions, names: FileNames | None) -> LoraFile | None:
    """The file of --network_weights. UserError: it cannot be read."""
    if options.network_weights is None:
        return None
    path = Path(options.network_weights)
    return LoraFile.read(path, names=names, where=f"{FLAG} {path}")


def sized(options: LoraOptions, file: LoraFile | None) -> LoraOptions:
    """The options; with --dim_from_weights, rank, alpha and their patterns are the file's."""
    sizes = {place: size for place, layer in (file.layers if file else {}).items() if (size := size_of(layer))}
    if not options.dim_from_weights or not sizes:
        return options
    common = max(sizes.values(), key=[*sizes.values()].count)
    ranks, alphas = (others({place: size[which] for place, size in sizes.items()}, common[which]) for which in (0, 1))
    return options.model_copy(update={"rank": common[0], "lora_alpha": common[1], "lora_rank_pattern": ranks or None,
                                      "lora_alpha_pattern": alphas or None, "use_rslora": False})


def others(values: Mapping[ModulePlace, float], common: float) -> str:
    """The pattern of all modules with another value: one key for each network and value, since a file that was resized
    may have hundreds of ranks.
    """
    paths: dict[tuple[str, float], list[str]] = {}
    for (network, path), value in values.items():
        if value != common:
            paths.setdefault((network, value), []).append(path)
    return " ".join(f"{'' if network == 'unet' else network + '.'}(?:{'|'.join(held)})={value!r}"
                    for (network, value), held in paths.items())


def size_of(layer: LayerUpdate) -> tuple[int, float] | None:
    """Rank and alpha of one module in the file; None of a LoKr of two whole factors."""
    held = getattr(layer.update, "A1", getattr(layer.update, "A", None))
    return None if held is None else (len(held), layer.update.scale * len(held))


# ----------------------------------------------------------------------------------------------------------------------
# Before loading


def problems(options: LoraOptions, names: FileNames | None, network: nn.Module, targets: Targets) -> list[Problem]:
    """What keeps the UNet's adapters from starting at the file; the network may be on meta."""
    try:
        file = read(options, names)
    except UserError as error:
        return [*error.problems]
    if file is None:
        return []
    where = f"{FLAG} {options.network_weights}"
    given = {path: layer for (prefix, path), layer in file.layers.items() if prefix == "unet"}
    if not file.layers:
        return [Problem("the file holds no LoRA", where, "it has embeddings only" if file.embeddings else "it is empty",
                        f"name a LoRA file with {FLAG}, or leave the flag out")]
    adapted = {*map(stripped, target_modules(network, options, targets=targets))}
    for path, layer in given.items():
        if (found := mismatch(path, layer, options, network, where)) is not None:
            return [found]
    left = [path for path in given if path not in adapted]
    return [too_few(left, options, network, targets, where)] if left else []


def mismatch(path: str, layer: LayerUpdate, options: LoraOptions, network: nn.Module, where: str) -> Problem | None:
    """Why a layer of the file cannot be one of this network's adapters."""
    try:
        module: Any = network.get_submodule(path)
        weight = getattr(module, "base_layer", module).weight
        shape, why = (len(weight), weight[0].numel()), ""
    except AttributeError:
        why = f"this one has no layer {path}"
    if not why and shape_of(layer.update) != shape:
        why = f"its update of {path} is {shape_of(layer.update)}, and the weight is {shape}"
    return other_kind(path, layer, options, where) if not why else Problem(
        "the LoRA was made for another base model", where, why,
        "name the base model that the LoRA was trained on, or one of its family")


def other_kind(path: str, layer: LayerUpdate, options: LoraOptions, where: str) -> Problem | None:
    """Why a layer's kind cannot be trained on with these options."""
    kind = KINDS.get(type(layer.update), "")
    if kind != options.lora_type:
        fix = f"--lora_type {kind}" if kind else (
            "scripts/convert_lora.py --lora FILE --out OUT --svd_rank 16 makes a plain LoRA of it")
        return Problem(f"the file holds {kind or 'whole updates'}, and this run trains {options.lora_type}", where,
                       f"{path} has other factors", fix)
    if layer.magnitude is not None and layer.magnitude.by_input:
        return Problem("this DoRA cannot be trained on", where, "it has a magnitude for each input (LyCORIS's older "
                       "form)", "scripts/convert_lora.py --lora FILE --out OUT --svd_rank 16 --base MODEL makes a "
                       "plain LoRA of it")
    if layer.magnitude is not None and not options.use_dora:
        return Problem("the file is a DoRA, and this run trains plain LoRA", where, "its magnitudes would be lost",
                       "add --use_dora")
    return None


def too_few(left: list[str], options: LoraOptions, network: nn.Module, targets: Targets, where: str) -> Problem:
    """The file has updates of layers that this run leaves alone."""
    fixes = [choice for choice, ends in targets.items() if {*left} <= {*layer_paths(network, ends)}]
    limited = options.lora_unet_blocks or options.use_blora
    fix = "leave out --lora_unet_blocks and --use_blora" if limited else (
        f"--lora_layers {fixes[0]}" if fixes else "a LoRA of layers that --lora_layers can name")
    return Problem(f"the LoRA has {counted(len(left), 'layer')} that this run does not train", where,
                   f"{left[0]} for one: the training would not start from the whole LoRA", fix)


# ----------------------------------------------------------------------------------------------------------------------
# In the run


@torch.no_grad()
def begin(adapters: Adapters, file: LoraFile | None, options: LoraOptions) -> None:
    """Set each adapter to the file's update of its layer; the others stay at none."""
    if file is None or not adapters.layers:
        return
    held = {path: layer for (prefix, path), layer in file.layers.items() if prefix == adapters.prefix}
    found, lost, whole, where = 0, 0.0, 0.0, f"{FLAG} {options.network_weights}"
    for path in adapters.layers:
        if (layer := held.get(stripped(path))) is None:
            continue
        found += 1
        if (problem := mismatch(path, layer, options, adapters.network, where)) is not None:
            raise UserError(problem)
        error, size = begin_layer(adapters, path, layer)
        lost, whole = lost + error, whole + size
    cut = f"; cut to the rank of this run, it lost {100 * (lost / whole) ** 0.5:.2g} % of its size" if lost else ""
    log.info("%s: %d of %d adapted layers of the %s start from %s%s", FLAG, found, len(adapters.layers),
             adapters.prefix, Path(str(options.network_weights)).name, cut)


def say_unused(file: LoraFile | None, trained: Container[str], *, tokens: bool) -> None:
    """What the file has, and the run does not train.

    trained  the networks with adapters
    tokens   whether new tokens are learned
    """
    if file is None:
        return
    left = [network for network in dict.fromkeys(network for network, _ in file.layers) if network not in trained]
    if left:
        log.warning("%s: the file's updates of the %s are left out, because the run does not train it: "
                    "--train_text_encoder goes on with them", FLAG, " and the ".join(left))
    if file.embeddings and not tokens:
        log.warning("%s: the file's embeddings are left out, because the run learns no new tokens: "
                    "--train_text_encoder_ti goes on with them", FLAG)


def begin_layer(adapters: Adapters, path: str, layer: LayerUpdate) -> tuple[float, float]:
    """-> ‖what is lost‖² and ‖ΔW‖² of the file's update."""
    layer = LayerUpdate(layer.update.map(lambda factor: factor.double()), layer.kernel, layer.magnitude)
    parameters = own_parameters(adapters.layers[path], NAME)
    if not isinstance(layer.update, LowRank):
        return put_whole(parameters, layer.update, adapters.scale_of(path), path)
    A, B, lost = fitted(layer.update, adapters.rank_of(path))
    put(parameters["lora_A.weight"], A)
    B = B / adapters.scale_of(path)
    parameters["lora_B.weight"].zero_()
    parameters["lora_B.weight"][:, :B.shape[1]] = B.view(*B.shape, *parameters["lora_B.weight"].shape[2:])
    magnitude = parameters.get("lora_magnitude_vector.weight")
    if magnitude is not None:
        W = adapters.weight(path)
        m = rows_norm(W + layer.update.delta()) if layer.magnitude is None else layer.of_paper(W).magnitude_value
        magnitude.copy_(m.view_as(magnitude))
    return lost, float(layer.update.delta().square().sum()) if lost else 0.0


def put(parameter: Tensor, rows: Tensor) -> None:
    """The first rows of a parameter."""
    parameter[:len(rows)] = rows.view(len(rows), *parameter.shape[1:])


def fitted(update: LowRank, rank: int) -> tuple[Tensor, Tensor, float]:
    """A [k,in] and B [out,k] with the scale in it, k ≤ rank, and ‖what is lost‖²."""
    if len(update.A) <= rank:
        return update.A, update.B * update.scale, 0.0
    product, lost = cut(svd(LayerUpdate(update)), rank)
    return product.A, product.B, lost


def put_whole(parameters: Mapping[str, Tensor], update: Update, scale: float, path: str) -> tuple[float, float]:
    """LoHa's and LoKr's factors; the last one carries what the scales differ by."""
    names = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b", "C": "lokr_w1",
             "B": "lokr_w2_a", "A": "lokr_w2_b", "D": "lokr_w2"}
    given = {names[name]: factor for name, factor in vars(update).items() if isinstance(factor, Tensor)}
    shapes, other = ({name: tuple(t.flatten(1).shape) for name, t in held.items()} for held in (given, parameters))
    if shapes != other:
        raise UserError(Problem("the LoRA's factors have other shapes than this run's", f"{FLAG}, {path}",
                                f"{shapes} in the file, {other} here", "--dim_from_weights, and the --lokr_factor of "
                                "the file"))
    for name, factor in given.items():
        factor = factor * update.scale / scale if name == list(given)[0] else factor
        parameters[name].copy_(factor.view_as(parameters[name]))
    return 0.0, 0.0


def embeddings(options: LoraOptions | None, names: FileNames | None, shapes: Mapping[str, tuple[int, ...]]
               ) -> Embeddings | None:
    """Rows of new tokens, from the file or from the file beside it that trainers of new tokens write; else None.

    shapes  of the rows that the run trains, by text encoder ("clip_l", "clip_g")
    """
    file = options and read(options, names)
    if not file or not options:
        return None
    path = Path(str(options.network_weights))
    beside = path.with_name(embeddings_file(path.stem))
    held = [*file.embeddings.values()]
    if not held and beside.is_file():
        held = [*LoraFile.read(beside, where=f"{FLAG}, {beside}").embeddings.values()]
    if not held:
        log.warning("%s: no embeddings in %s or %s, so the new tokens start from --initializer_concept", FLAG,
                    path.name, beside.name)
        return None
    rows = {encoder: torch.cat([found[encoder].float() for found in held if encoder in found]) for encoder in shapes
            if any(encoder in found for found in held)}
    other = {encoder: tuple(found.shape) for encoder, found in rows.items()}
    refuse([] if other == dict(shapes) else [Problem(
        "the file has other embeddings than this run's new tokens", f"{FLAG} {path}", f"{other}, and the run trains "
        f"{dict(shapes)}", "give --token_abstraction and --num_new_tokens_per_abstraction as in the first run")])
    log.info("%s: the new tokens start from the embeddings of %s", FLAG, path.name)
    return rows
