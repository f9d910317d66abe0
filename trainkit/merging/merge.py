"""LoRA files as one: each module's changes by a method, and the embeddings of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainkit.adapters.updates import LowRank, Update
from trainkit.errors import Problem, listing
from trainkit.families.file_names import FileNames, ModulePlace
from trainkit.lora_file import LayerUpdate, LoraFile, Weights
from trainkit.lora_file.parts import shape_of
from trainkit.lora_file.spectrum import cut, svd, svd_of
from trainkit.merging.methods import SPARSE, STACKED, MergeSettings, merged_delta

FAMILIES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}
TRIGGER = "modelspec.trigger_phrase"
NOISE = 1e-9  # of the largest singular value: below it are the rounding errors of fp64 arithmetic
ByName = Mapping[str, Mapping[str, Tensor]]  # a textual inversion's name -> text encoder -> [K,D]


@dataclass(frozen=True)
class WeightedLora:
    """A LoRA to merge, how strongly, and how the user named it."""

    lora: LoraFile
    strength: float
    name: str


@dataclass(frozen=True)
class Merge:
    """LoRAs to merge.

    weights  of the base, for a DoRA
    names    of the base's modules in files; None: those of the first LoRA
    """

    parts: Sequence[WeightedLora]
    settings: MergeSettings
    weights: Weights | None = None
    names: FileNames | None = None

    @property
    def places(self) -> list[ModulePlace]:
        """Of the modules of all, each once, in the order of the files."""
        return list(dict.fromkeys(place for part in self.parts for place in part.lora.layers))

    def held(self, place: ModulePlace) -> list[tuple[WeightedLora, LayerUpdate]]:
        return [(part, part.lora.layers[place]) for part in self.parts if place in part.lora.layers]

    # ------------------------------------------------------------------------------------------------------------------
    # What can be wrong

    def problems(self, *, into_base: bool = False) -> Iterator[Problem]:
        """into_base  whether the result is a base model, which holds any change of a weight"""
        yield from self._other_families()
        yield from self._other_shapes()
        for part in self.parts:
            if not part.lora.layers:
                yield Problem("there is no LoRA to merge", part.name, "the file holds embeddings alone",
                              "leave it out, and use it next to the merged LoRA", "data")
            elif part.lora.needs_weights:
                yield from self._dora(part, into_base=into_base)
        if not into_base and self.settings.method not in STACKED and self.settings.rank is None and not self.are_plain:
            yield Problem("no rank is given", f"--method {self.settings.method}", "a LoHa, a LoKr or a full change has "
                          "no rank of its own that the merged LoRA could take", "--rank 64")

    def _other_families(self) -> Iterator[Problem]:
        found = {part.name: part.lora.family for part in self.parts if part.lora.family}
        if len({*found.values()}) > 1:
            each = ", ".join(f"{name} is for {FAMILIES[family]}" for name, family in found.items())
            yield Problem("the LoRAs are for different base models", each, "their layers are other ones", "merge LoRAs "
                          "of one family", "data")

    def _other_shapes(self) -> Iterator[Problem]:
        wrong = [place for place in self.places if len({shape_of(layer.update) for _, layer in self.held(place)}) > 1]
        if wrong:
            held = self.held(wrong[0])
            each = ", ".join(f"{part.name}: {' × '.join(map(str, shape_of(layer.update)))}" for part, layer in held)
            yield Problem("the LoRAs are for different base models", f"{wrong[0][1]} ({each})", f"{len(wrong)} of "
                          "their layers have different sizes", "merge LoRAs of one base model", "data")

    def _dora(self, part: WeightedLora, *, into_base: bool) -> Iterator[Problem]:
        if self.settings.method == "ziplora":
            yield Problem(f"{part.name} is a DoRA", "--method ziplora", "ZipLoRA weights the columns of a LoRA, and a "
                          "DoRA's change has no such columns", f"lora-tools convert-lora --lora {part.name} --svd_rank "
                          "64 --base MODEL --to diffusers --out plain.safetensors, and merge that file", "data")
        elif self.weights is None:
            yield Problem(f"{part.name} is a DoRA", part.name, "its change depends on the base model's weights",
                          "--base MODEL", "data")
        elif self.settings.method in STACKED and not into_base:
            yield Problem(f"{part.name} is a DoRA", f"--method {self.settings.method}", "its change is no product of "
                          "few columns, so this method cannot hold it", "--method svd --rank 64 writes the nearest "
                          "LoRA and says how near it is; --into_base holds all of it", "data")

    @property
    def are_plain(self) -> bool:
        """Whether all are LoRAs (DoRAs have a rank, too)."""
        return all(isinstance(layer.update, LowRank) for part in self.parts for layer in part.lora.layers.values())

    # ------------------------------------------------------------------------------------------------------------------
    # The merged change

    def delta(self, place: ModulePlace) -> Tensor:
        """The merged change of a weight without any loss -> [out,in] fp64."""
        held = self.held(place)
        return merged_delta([self._delta(place, layer) for _, layer in held], [part.strength for part, _ in held],
                            self.settings, ".".join(place))

    def _delta(self, place: ModulePlace, layer: LayerUpdate) -> Tensor:
        if layer.magnitude is not None:
            assert self.weights is not None, "a DoRA without its base was refused"
            W = self.weights(place)
            return layer.like(W).delta(W)
        delta: Tensor = layer.update.map(lambda factor: factor.double()).delta()
        return delta

    def layer(self, place: ModulePlace) -> tuple[LayerUpdate, float, float]:
        """The merged update of a module -> it, ‖what is lost‖² and ‖ΔW‖²."""
        held = self.held(place)
        kernel = held[0][0].lora.kernel(place)
        if self.settings.method in STACKED:
            return LayerUpdate(self._stacked(held), kernel), 0.0, 1.0
        if self.settings.method in SPARSE or any(layer.magnitude is not None for _, layer in held):
            found = svd_of(self.delta(place))
        else:
            found = svd(LayerUpdate(stacked([(layer, part.strength) for part, layer in held])))
        update, lost = cut(found, self._rank(held))
        return LayerUpdate(update, kernel), lost, float(found[1].square().sum())

    def _stacked(self, held: Sequence[tuple[WeightedLora, LayerUpdate]]) -> Update:
        """A module of one file stays of its kind."""
        (part, layer), *others = held
        if not others:
            return replace(layer.update, scale=layer.update.scale * part.strength)  # type: ignore[call-arg]
        whole = stacked([(layer, part.strength) for part, layer in held])
        return whole if self.settings.method == "concat" else without_zeros(whole)

    def _rank(self, held: Sequence[tuple[WeightedLora, LayerUpdate]]) -> int:
        return self.settings.rank or sum(len(layer.update.low_rank().A) for _, layer in held)

    def run(self, show: Callable[[float], None]) -> tuple[LoraFile, float]:
        """-> the merged LoRA without embeddings, and ‖what is lost‖ / ‖ΔW‖ of all modules together.

        show  is told how many modules are done
        """
        layers, lost, whole = {}, 0.0, 0.0
        for k, place in enumerate(self.places):
            layers[place], error, size = self.layer(place)
            lost, whole = lost + error, whole + size
            show(k + 1)
        first = self.parts[0].lora
        return LoraFile(layers, metadata=base_of(self.parts), layout=first.layout, names=self.names or first.names), (
            (lost / whole) ** 0.5 if whole else 0.0)


def stacked(layers: Sequence[tuple[LayerUpdate, float]]) -> LowRank:
    """Σ strength · ΔW as one product, fp64: the factors side by side, rank r1 + r2 + …"""
    products = [(layer.update.map(lambda factor: factor.double()).low_rank(), strength) for layer, strength in layers]
    return LowRank(torch.cat([product.A for product, _ in products]),
                   torch.cat([product.B * (product.scale * strength) for product, strength in products], dim=1))


def without_zeros(product: LowRank) -> LowRank:
    """The same ΔW of the smallest rank that holds it."""
    found = svd(LayerUpdate(product))
    rank = max(1, int((found[1] > NOISE * found[1][0]).sum()))
    return product if rank >= len(product.A) else cut(found, rank)[0]


def base_of(parts: Sequence[WeightedLora]) -> dict[str, str]:
    """What the headers say of the base model, where all that say anything of it say the same; and all trigger words."""
    keys = ("ss_v2", "ss_base_model_version", "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash",
            "modelspec.architecture", "modelspec.implementation", "modelspec.resolution", "modelspec.prediction_type")
    said = {key: {part.lora.metadata[key] for part in parts if key in part.lora.metadata} for key in keys}
    triggers = dict.fromkeys(filter(None, (part.lora.metadata.get(TRIGGER) for part in parts)))
    return {key: values.pop() for key, values in said.items() if len(values) == 1} | (
        {TRIGGER: ", ".join(triggers)} if triggers else {})


# ----------------------------------------------------------------------------------------------------------------------
# Embeddings


def embeddings_of(parts: Sequence[WeightedLora], *, first: int | None = None) -> tuple[ByName, list[Problem]]:
    """The textual inversions of all, and the names that mean different ones.

    first  the LoRA, from 1, whose embedding is taken where names clash; 0: no embeddings at all; None: a problem
    """
    if first == 0:
        return {}, []
    ordered = list(parts)
    if first:
        ordered.insert(0, ordered.pop(first - 1))
    found: dict[str, Mapping[str, Tensor]] = {}
    clashes = []
    for part in ordered:
        for name, encoders in part.lora.embeddings.items():
            if name in found and not same(found[name], encoders):
                clashes.append(f"{name or '(without a name)'} of {part.name}")
            found.setdefault(name, encoders)
    if not clashes or first:
        return found, []
    return found, [Problem("two LoRAs have different embeddings of one name", listing(clashes), "a prompt with this "
                           "name would mean only one of them", "--embeddings_of 1 takes those of the first LoRA, "
                           "--embeddings_of 2 those of the second, and --embeddings_of 0 none", "data")]


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
