"""What holds for every input, not for the examples somebody thought of: each rule is tried on drawn ones."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import tempfile
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

import train_dreambooth_lora_sdxl_advanced as dreambooth
import train_text_to_image_lora as text_to_image
from tests.support.made_up_pass import SHAPE, Network, step_of
from trainkit import export, rng
from trainkit.adapters import Adapters, add_adapters
from trainkit.adapters.updates import Update
from trainkit.data.batch import Batch, Row, Sample, Slot, collate
from trainkit.data.cache import Latents
from trainkit.data.geometry import INTERPOLATIONS, CropPolicy
from trainkit.data.sampler import Order, Shard
from trainkit.diffusion import NoiseSchedule
from trainkit.errors import UserError
from trainkit.families import sd
from trainkit.files import load_tensors
from trainkit.lora_file import LoraFile
from trainkit.losses.objective import make_objective
from trainkit.losses.passes import Passes, always
from trainkit.options import LoraOptions, ObjectiveOptions, OptionSet, parse
from trainkit.options.base import Flag
from trainkit.options.config_text import SOURCES, config_text
from trainkit.runtime.record import Metrics
from trainkit.training.gradients import Gradients

# The same examples on every machine and at every run; how long one takes says nothing on a machine that is shared.
ALIKE = dict(derandomize=True, deadline=None, database=None, phases=[Phase.explicit, Phase.generate, Phase.shrink],
             suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
some, many = settings(max_examples=25, **ALIKE), settings(max_examples=100, **ALIKE)


def rows_of(images: int, *, repeats: int = 1, is_class: bool = False) -> list[Row]:
    name = "class/image" if is_class else "image"
    return [Row(f"{name}{i}", Path(f"{name}{i}"), f"prompt {i % 3}", (40 + i, 48), f"digest of {name}{i}", repeat,
                loss_weight=0.7 if is_class else 1.0, is_class=is_class)
            for i in range(images) for repeat in range(repeats)]


# -- the stream -------------------------------------------------------------------------------------------------------


@many
@given(images=st.integers(1, 40), repeats=st.integers(1, 6), classes=st.integers(0, 50), batch=st.integers(1, 70),
       epoch=st.integers(0, 30), seed=st.integers(0, 2**32))
def test_one_shuffle_visits_each_image_exactly_as_often_as_it_is_repeated(images, repeats, classes, batch, epoch, seed):
    """Instances and class images, each in a stream of its own."""
    rows = [*rows_of(images, repeats=repeats), *rows_of(classes, is_class=True)]
    order = Order(rows, batch, seed=seed)
    for stream, (count, visits) in enumerate([(images * repeats, repeats), (classes, 1)][: 1 + bool(classes)]):
        places = range(epoch * count, (epoch + 1) * count)
        slots = [order.slot(place // batch, stream * batch + place % batch) for place in places]
        assert {slot.visit for slot in slots} == {epoch}
        assert len({slot.row for slot in slots}) == count, "a row came twice in one shuffle"
        seen = Counter(rows[slot.row].id for slot in slots)
        assert len(seen) == count // visits and set(seen.values()) == {visits}


SPLITS = dict(world=st.integers(1, 4), accumulation=st.integers(1, 4), size=st.integers(1, 4))


@many
@given(**SPLITS, images=st.integers(1, 30), classes=st.integers(0, 20), step=st.integers(0, 500))
def test_any_split_fills_each_place_of_the_global_batch_once(world, accumulation, size, images, classes, step):
    batch = world * accumulation * size
    order = Order([*rows_of(images), *rows_of(classes, is_class=True)], batch, seed=3)
    split = [slot for shard in shards(world, accumulation) for micro in order.slots(step, shard) for slot in micro]
    assert sorted(split) == [order.slot(step, place) for place in range(batch * (1 + bool(classes)))]
    sizes = {len(micro) for shard in shards(world, accumulation) for micro in order.slots(step, shard)}
    assert sizes == {size * (1 + bool(classes))}, "a rank waits for another one's micro-batch"


def shards(world: int, accumulation: int) -> list[Shard]:
    return [Shard(rank, world, accumulation) for rank in range(world)]


# -- one gradient -----------------------------------------------------------------------------------------------------

OBJECTIVES = st.fixed_dictionaries({}, optional={
    "snr_gamma": st.sampled_from([1.0, 5.0]), "noise_offset": st.sampled_from([0.1]),
    "loss_type": st.sampled_from(["l2", "huber"]), "min_timestep": st.sampled_from([300])})


@some
@given(**SPLITS, images=st.integers(1, 9), classes=st.integers(0, 5), step=st.integers(0, 50), flags=OBJECTIVES,
       prediction=st.sampled_from(["epsilon", "v_prediction"]))
def test_any_split_gives_one_gradient(world, accumulation, size, images, classes, step, flags, prediction):
    rows = [*rows_of(images), *rows_of(classes, is_class=True)]
    order = Order(rows, world * accumulation * size, seed=11)
    schedule = NoiseSchedule(torch.linspace(0.999, 0.005, 1000), prediction)
    passes = Passes(always(make_objective(ObjectiveOptions(**flags), schedule)))
    wanted, loss = gradient(rows, order, [Shard()], step, passes)
    found, parts = gradient(rows, order, shards(world, accumulation), step, passes)
    assert wanted.norm() > 1e-3
    torch.testing.assert_close(parts, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.norm()))


def gradient(rows: Sequence[Row], order: Order, ranks: Sequence[Shard], step: int, passes: Passes
             ) -> tuple[Tensor, Tensor]:
    """-> the gradient of all ranks together, and the loss of the step."""
    network = Network()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(std=0.2, generator=rng.generator("network", name))
    gradients = Gradients(network.device)  # one after the other, the ranks add up as the all-reduce does
    for shard in ranks:
        batches = [collate([sample_of(rows, slot) for slot in micro]) for micro in order.slots(step, shard)]
        assert all(isinstance(batch, Batch) for batch in batches)
        for part in step_of(network, passes=passes)(batches):
            gradients.backward(part)
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters()]), gradients.loss


def sample_of(rows: Sequence[Row], slot: Slot) -> Sample:
    row = rows[slot.row]
    mean = rng.normal(SHAPE, [(row.id, row.repeat)], "latents")[0]
    return Sample(row, row.size, 0, 0, flip=False, shape=(32, 32), slot=slot, prompt=row.caption, mean=mean)


# -- cache keys -------------------------------------------------------------------------------------------------------

ALIKE_NUMBERS = st.sampled_from([0, 1, 11, 111, 32, 321])  # written one after the other they would run together
IDENTITIES = st.one_of(st.sampled_from(["vae", "other vae", "", "1", "11"]),
                       st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from(["vae", "1"]), max_size=2))
VIEWS = st.fixed_dictionaries({
    "digest": st.sampled_from(["1", "11", "ab", "a"]), "resized": st.tuples(ALIKE_NUMBERS, ALIKE_NUMBERS),
    "top": ALIKE_NUMBERS, "left": ALIKE_NUMBERS, "flip": st.booleans(),
    "shape": st.tuples(ALIKE_NUMBERS, ALIKE_NUMBERS),
    "interpolation": st.sampled_from([*INTERPOLATIONS]), "identity": IDENTITIES,
    "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16])})


def key_of(view: Mapping[str, Any]) -> str:
    row = replace(rows_of(1)[0], digest=view["digest"])
    policy = CropPolicy(resolution=32, interpolation=view["interpolation"])
    sample = Sample(row, view["resized"], view["top"], view["left"], view["flip"], view["shape"])
    return Latents({}, policy, identity=view["identity"], dtype=view["dtype"]).key(sample)


PARTS = st.sampled_from(
    ["digest", "resized", "top", "left", "flip", "shape", "interpolation", "identity", "dtype"])


@settings(max_examples=300, **ALIKE)
@given(view=VIEWS, other=VIEWS, changed=st.one_of(PARTS.map(lambda part: {part}), st.sets(PARTS)))
def test_two_views_have_one_cache_key_only_where_they_are_one_view(view, other, changed):
    mixed = view | {name: other[name] for name in changed}
    assert (key_of(view) == key_of(mixed)) == (view == mixed)


@many
@given(size=st.tuples(st.integers(8, 40), st.integers(8, 40)), resolution=st.integers(4, 12),
       crops=st.integers(1, 50), flip=st.booleans(), seed=st.integers(0, 99))
def test_every_way_to_see_an_image_has_a_cache_key_of_its_own(size, resolution, crops, flip, seed):
    row = replace(rows_of(1)[0], size=size)
    policy = CropPolicy(resolution=resolution, random_flip=flip, cached_crops=crops)
    latents = Latents({}, policy, identity="vae")
    variants = policy.variants(row, seed)
    assert len({latents.key(sample) for sample in variants}) == len(variants)
    assert latents.key(policy.sample(row, seed=seed, epoch=crops)) in {latents.key(sample) for sample in variants}


# -- options ----------------------------------------------------------------------------------------------------------

TRAINERS: dict[str, tuple[type[OptionSet], list[str]]] = {
    "DreamBooth": (dreambooth.Options, ["--pretrained_model_name_or_path=base", "--instance_prompt=a photo of TOK"]),
    "text-to-image": (text_to_image.Options, ["--pretrained_model_name_or_path=base"]),
}
WORDS = st.text(st.one_of(st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
                          st.sampled_from("\"'\\#\n\r\t\x1b\x7f\x85 =[]")), min_size=1, max_size=12)


def value_of(flag: Flag) -> st.SearchStrategy[str]:
    """Values as typed on the command line, within the flag's limits and choices."""
    bounds = {name: getattr(limit, name) for limit in flag.field.metadata for name in ("ge", "gt", "le", "lt")
              if hasattr(limit, name)}
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if flag.choices:
        return st.sampled_from(flag.choices)
    if flag.is_switch:
        return st.sampled_from(["true", "false"])
    if flag.value_type is int:
        return st.integers(None if low is None else low + ("gt" in bounds),
                           None if high is None else high - ("lt" in bounds)).map(str)
    if flag.value_type is float:
        return st.floats(low, high, exclude_min="gt" in bounds, exclude_max="lt" in bounds, allow_nan=False,
                         allow_infinity=False).map(repr)
    return WORDS


@st.composite
def command_lines(draw: st.DrawFn, options: type[OptionSet]) -> list[str]:
    flags = {name: flag for name, flag in options.flags().items() if name not in SOURCES and not flag.secret}
    chosen = draw(st.lists(st.sampled_from(sorted(flags)), unique=True, max_size=10))
    return [f"--{name}={draw(value_or_off(flags[name]))}" for name in chosen]


def value_or_off(flag: Flag) -> st.SearchStrategy[str]:
    off = ["0"] if flag.facts.can_be_off else []
    off += ["none"] if flag.optional else []
    return value_of(flag) | st.sampled_from(off) if off else value_of(flag)


@pytest.mark.parametrize("trainer", TRAINERS)
@settings(max_examples=40, **ALIKE)
@given(data=st.data())
def test_any_option_set_survives_print_config_and_config(trainer, data):
    """The values, and which of them were given: a rate that is given is more than a rate that is the default."""
    options, required = TRAINERS[trainer]
    argv = [*required, *data.draw(command_lines(options))]
    wanted = accepted(options, argv)
    assume(wanted is not None)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "again.toml"
        file.write_text(printed(options, argv), "utf-8")
        again = parse(options, [f"--config={file}"], description="")
    assert values_of(again) == values_of(wanted)


@many
@given(text=WORDS)
@example(text="\x7f")
def test_any_text_is_read_from_the_config_that_it_is_printed_in(text):
    flag = dreambooth.Options.flags()["validation_prompt"]
    written = config_text({flag.name: flag}, {flag.name: text}, {flag.name: "command line"})
    assert tomllib.loads(written) == {flag.concern: {flag.name: text}}


def accepted(options: type[OptionSet], argv: Sequence[str]) -> OptionSet | None:
    """The options, None where they are refused."""
    try:
        parsed = parse(options, argv, description="")
    except UserError:
        return None
    return None if any(parsed.problems()) else parsed


def printed(options: type[OptionSet], argv: Sequence[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        parse(options, [*argv, "--print_config"], description="")
    return out.getvalue()


def values_of(options: OptionSet) -> dict[str, tuple[object, bool]]:
    """Each flag's value, and whether it was given."""
    origins = options.origins
    return {name: (value, origins.get(name, "default") != "default")
            for name, value in options.flat().items() if name not in SOURCES}


# -- records ----------------------------------------------------------------------------------------------------------

# A session: how many steps it ran, which part of its next row a kill left on the disk, from which of the steps done
# so far the next one goes on
SESSIONS = st.lists(st.tuples(st.integers(0, 12), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6)


@many
@given(sessions=SESSIONS)
def test_resumed_metrics_are_a_continuation(sessions):
    with tempfile.TemporaryDirectory() as folder:
        metrics, start = Metrics(Path(folder)), 0
        expected: dict[int, int] = {}  # step -> the session that wrote it last
        for session, (steps, torn, back) in enumerate(sessions):
            expected = {step: expected[step] for step in range(1, start + 1)}
            assert metrics.begin(start) == (seconds(start, expected[start]) if start else 0)
            for step in range(start + 1, start + steps + 1):
                metrics.write({"step": step, "session": session, "seconds": seconds(step, session)})
                expected[step] = session
            done = start + steps
            cut_off = json.dumps({"step": done + 1, "session": session, "seconds": 1.0})
            with metrics.path.open("a") as file:
                file.write(cut_off[: int(torn * len(cut_off))])
            start = round(back * done)
        metrics.begin(start) if start else None
        lines = metrics.path.read_text().splitlines() if start else []
        assert [(row["step"], row["session"]) for row in map(json.loads, lines)] == [
            (step, expected[step]) for step in range(1, start + 1)]


def seconds(step: int, session: int) -> float:
    return step + session / 10


# -- exported files ---------------------------------------------------------------------------------------------------

# A tree of modules, named with the words of a UNet's paths, which the reader of WebUIs' names knows
OUTER, INNER, LAYERS = ("down_blocks", "mid_block", "up_blocks"), ("0", "1", "attn1"), ("to_q", "to_k", "proj")
SIZES = st.integers(2, 9)
LAYER = st.one_of(st.tuples(SIZES, SIZES), st.tuples(SIZES, SIZES, st.sampled_from([1, 3])))  # a kernel: a convolution
TREES = st.dictionaries(st.tuples(st.sampled_from(OUTER), st.sampled_from(INNER), st.sampled_from(LAYERS)), LAYER,
                        min_size=1, max_size=5)
KINDS = st.sampled_from([{}, {"use_rslora": True}, {"use_dora": True}, {"lora_type": "loha"}, {"lora_type": "lokr"},
                         {"lora_type": "lokr", "lokr_factor": 2}])


class Tree(nn.Module, PeftAdapterMixin):
    """Layers at the ends of dotted paths; it is only written, read and loaded, never run."""

    def __init__(self, layers: Mapping[tuple[str, ...], tuple[int, ...]]):
        super().__init__()
        for path, (out, width, *kernel) in sorted(layers.items()):
            place: nn.Module = self
            for name in path[:-1]:
                if not hasattr(place, name):
                    place.add_module(name, nn.Module())
                place = getattr(place, name)
            place.add_module(path[-1], nn.Conv2d(width, out, *kernel) if kernel else nn.Linear(width, out))


class Names:
    """Of a family, what the export asks: the names in WebUI files are Stable Diffusion's."""

    names = sd.SD.names
    architecture, base_metadata, native_size = "stable-diffusion-v1", {"ss_v2": "False"}, (512, 512)
    schedule, file_metadata = SimpleNamespace(prediction_type="epsilon"), {}


def trained(network: Tree, rank: int, alpha: float, kind: Mapping[str, object], seed: int) -> Adapters:
    """Adapters none of whose factors is zero, some far smaller than the others."""
    options = LoraOptions(rank=rank, lora_alpha=alpha, lora_layers="attention", **kind)
    adapters = add_adapters(network, options, targets={"attention": LAYERS}, seed=seed)
    for name, parameter in adapters.named_parameters().items():
        size = 10.0 ** -rng.integer(6, "size", seed, name)
        drawn = torch.randn(parameter.shape, generator=rng.generator("factor", seed, name)) * size
        parameter.data = drawn.abs() + 0.5 if "magnitude" in name else drawn
    return adapters


@some
@given(tree=TREES, rank=st.integers(1, 4), alpha=st.sampled_from([1, 2, 3, 4.5]), kind=KINDS, seed=st.integers(0, 99))
def test_the_diffusers_file_that_diffusers_has_read_is_written_the_same_again(tree, rank, alpha, kind, seed):
    base = Tree(tree)
    first = trained(copy.deepcopy(base), rank, alpha, kind, seed)
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one.safetensors", Path(folder) / "two.safetensors"
        export.write_diffusers([first], one, {})
        export.verify(one, [first], Names(), layout="diffusers")
        config = json.loads(header(one)["lora_adapter_metadata"])
        base.load_lora_adapter(load_tensors(one), prefix="unet", adapter_name="default", metadata=config)
        export.write_diffusers([Adapters(base, rank=config["unet.r"], alpha=config["unet.lora_alpha"])], two, {})
        assert one.read_bytes() == two.read_bytes()


@some
@given(tree=TREES, rank=st.integers(1, 4), alpha=st.sampled_from([1, 2, 3, 4.5]), kind=KINDS, seed=st.integers(0, 99))
def test_the_webui_file_that_was_read_is_written_the_same_again(tree, rank, alpha, kind, seed):
    network = trained(Tree(tree), rank, alpha, kind, seed)
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one.safetensors", Path(folder) / "two.safetensors"
        export.write_kohya([network], Names(), one, {}, layout="lycoris")
        export.verify(one, [network], Names(), layout="lycoris")
        export.write_kohya([FromFile(network, LoraFile.read(one, names=Names.names))], Names(), two, {},
                           layout="lycoris")
        assert one.read_bytes() == two.read_bytes()


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@dataclass(frozen=True)
class FromFile:
    """What a file says of the adapters of a network, in the place of the trained ones."""

    trained: Adapters
    stated: LoraFile

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trained, name)

    def update(self, path: str) -> Update:
        return self.stated.layers["unet", path].update.map(lambda factor: factor.double())

    def magnitude(self, path: str) -> Tensor | None:
        held = self.stated.layers["unet", path].magnitude
        return held and held.value
