"""What a run says about itself: what it is going to do, in a few lines, and at its end which file is for what.

Facts are gathered in one place and become lines in another, so that the lines can be read and tested without a run.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trainkit.data.sampler import Shard, make_order
from trainkit.errors import counted, printable
from trainkit.options.sizes import Size
from trainkit.runtime.progress import clock

if TYPE_CHECKING:
    from trainkit.adapters import Adapters
    from trainkit.data.rows import Rows, SourceCount
    from trainkit.files import Json
    from trainkit.optim import Optim
    from trainkit.options import ImageOptions, RunOptions

log = logging.getLogger(__name__)

LABEL_WIDTH = 10
SIZES_SHOWN = 8
STEPS_COUNTED = 200  # for the mean number of forward passes
KINDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}
PRECISIONS = {"no": "fp32"}
LAST_FILES = {"README.md": "the model card", "report.html": "the report: open it in a browser"}


class PlanOptions(Protocol):
    """What of a trainer's options the plan tells."""

    @property
    def data(self) -> ImageOptions: ...

    @property
    def run(self) -> RunOptions: ...


class PlanRun(Protocol):
    """What of a run the plan tells."""

    world: int
    precision: str
    out_dir: Path

    @property
    def device_name(self) -> str: ...

    def note(self, **facts: Json) -> None: ...


@dataclass(frozen=True)
class Line:
    """A label, bold on a terminal, and what it says."""

    label: str
    text: str

    def __str__(self) -> str:
        return f"{self.label:<{LABEL_WIDTH}}{self.text}"


def log_lines(lines: Iterable[Line]) -> None:
    """Log the lines; on the first process alone, as all news."""
    for line in lines:
        log.info("%s", line, extra={"label": line.label})


def log_plan(opt: PlanOptions, rows: Rows, run: PlanRun, *, steps: int, class_images: int = 0) -> None:
    log_lines(plan_lines(plan(opt, rows, run, steps=steps, class_images=class_images)))
    if rows.account.masks:
        run.note(masks={"images": rows.account.masks, "area": round(rows.account.mask_area, 4)})


def log_trainables(networks: Sequence[Adapters], optimizer: Optim) -> None:
    log_lines(trainable_lines(trainables(networks, optimizer)))


def log_end(folder: str, files: Mapping[str, str], *, start: int, steps: int, seconds: float | None) -> None:
    log_lines(end_lines(folder, files, start=start, steps=steps, seconds=seconds))


# ----------------------------------------------------------------------------------------------------------------------
# Before anything is loaded: the data and the plan


@dataclass(frozen=True)
class Plan:
    """What is known of a run when its images have been read.

    images        without repeats and class images
    account       what was read and what was not: "22 images, 22 captions from metadata.jsonl, 1 file not read: …"
    prompted      images whose caption is the prompt
    class_images  trained on beside the others
    batch         images in a micro-batch; times accumulation and processes in an optimizer step
    sizes         images by the size (h, w) they are cut to, where each has its own; an image may have several
    passes        forward passes of a step on each process, where images have sizes of their own
    sources       one line about each, where there are several
    uses          of images in an epoch, where sources have repeats of their own
    """

    images: int
    account: str
    source: str
    resolution: int | str
    batch: int
    steps: int
    device: str
    precision: str
    folder: str
    prompt: str = ""
    prompted: int = 0
    repeats: int = 1
    class_images: int = 0
    accumulation: int = 1
    processes: int = 1
    sizes: Mapping[Size, int] = field(default_factory=dict)
    passes: float = 1
    sources: Sequence[str] = ()
    uses: int = 0

    @property
    def global_batch(self) -> int:
        return self.batch * self.accumulation * self.processes

    @property
    def visits(self) -> int:
        """Uses of images in an epoch."""
        return self.uses or self.repeats * (sum(self.sizes.values()) or self.images)

    @property
    def epochs(self) -> float:
        return self.steps * self.global_batch / self.visits


def plan(opt: PlanOptions, rows: Rows, run: PlanRun, *, steps: int, class_images: int = 0) -> Plan:
    """The facts of a trainer's options and of the rows that were read, repeats included."""
    data, options = opt.data, opt.run
    instances = [row for row in rows if not row.is_class]
    images = [row for row in instances if row.repeat == 0]
    sizes = Counter(row.cut for row in instances if row.cut and row.repeat % data.repeats == 0)
    if rows.sources:
        sizes = Counter(cut for _, cut in dict.fromkeys((row.id, row.cut) for row in instances if row.cut))
    return Plan(
        sizes=sizes, passes=passes(opt, rows, run) if sizes else 1,
        images=len(images), account=str(rows.account),
        source=", ".join(filter(None, [printable(data.source), rows.note])),
        sources=[*map(source_line, rows.sources)], uses=len(instances) if rows.sources else 0,
        prompt=data.prompt, prompted=sum(row.caption == data.prompt for row in images) if data.prompt else 0,
        repeats=1 if rows.sources else data.repeats,
        class_images=0 if any(one.is_class for one in rows.sources) else class_images,
        resolution=data.resolution, batch=options.train_batch_size,
        accumulation=options.gradient_accumulation_steps, processes=run.world, steps=steps, device=run.device_name,
        precision=run.precision, folder=printable(str(run.out_dir)))


def passes(opt: PlanOptions, rows: Rows, run: PlanRun) -> float:
    """Micro-batches of a step on each process, the mean over the first steps, class images aside."""
    shard = Shard(0, run.world, opt.run.gradient_accumulation_steps)
    instances = [row for row in rows if not row.is_class]
    order = make_order(instances, opt.run.global_batch(run.world), batch_size=opt.run.train_batch_size,
                       seed=opt.run.seed)
    steps = min(order.steps_per_epoch, STEPS_COUNTED)
    return sum(order.micro_batches(step, shard) for step in range(steps)) / steps


def plan_lines(facts: Plan) -> Iterator[Line]:
    yield Line("Images", "; ".join([f"{facts.account}; in {facts.source}", *prompts(facts), *visits(facts)]))
    for line in facts.sources:
        yield Line("Source", line)
    if facts.sources:
        yield Line("Epoch", counted(facts.visits, "image"))
    if facts.sizes:
        yield Line("Buckets", buckets(facts))
    yield Line("Training", " · ".join([f"{facts.resolution} px", batch(facts),
                                       f"{counted(facts.steps, 'step')} = {epochs(facts.epochs)}"]))
    yield Line("Device", f"{PRECISIONS.get(facts.precision, facts.precision)} on {facts.device}")
    yield Line("Folder", facts.folder)


def buckets(facts: Plan) -> str:
    """`1024x1024 12 images, 1216x832 8, 832x1216 5; an epoch is 25 images = 6.2 steps of 1.3 forward passes each`."""
    common = sorted(facts.sizes, key=lambda size: (-facts.sizes[size], size))
    listed = [f"{w}x{h} {facts.sizes[h, w]}" for h, w in common[:SIZES_SHOWN]]
    listed[0] += " images" if facts.sizes[common[0]] > 1 else " image"
    more = [f"and {len(common) - SIZES_SHOWN} more sizes"] if len(common) > SIZES_SHOWN else []
    steps = counted_parts(facts.visits / facts.global_batch, "step")
    return (f"{', '.join([*listed, *more])}; an epoch is {counted(facts.visits, 'image')} = {steps} of "
            f"{facts.passes:.1f} forward passes each")


def source_line(source: SourceCount) -> str:
    """`10_sks dog: 12 images × 10 = 120 an epoch`."""
    uses = source.rows / source.images if source.images else 0
    line = f"{source.name}: {counted(source.images, 'image')} × {uses:g} = {source.rows} an epoch"
    if source.is_class:
        line += ", of the class: as many of them in each step as of your own"
    return line + (f", weight {source.loss_weight:g}" if source.loss_weight != 1 else "")


def prompts(facts: Plan) -> Iterator[str]:
    if facts.prompted:
        which = "all" if facts.prompted == facts.images else f"{facts.prompted}"
        yield f'{which} with the prompt "{facts.prompt}"'


def visits(facts: Plan) -> Iterator[str]:
    if facts.repeats > 1:
        yield f"each {facts.repeats} times an epoch"
    if facts.class_images:
        yield f"beside them {counted(facts.class_images, 'class image')}"


def batch(facts: Plan) -> str:
    factors = [f"{facts.accumulation} accumulated" if facts.accumulation > 1 else "",
               f"{facts.processes} processes" if facts.processes > 1 else ""]
    product = " × ".join(filter(None, [f"batch {facts.batch}", *factors]))
    return product if facts.global_batch == facts.batch else f"{product} = {facts.global_batch}"


def epochs(number: float) -> str:
    return counted_parts(number, "epoch")


def counted_parts(number: float, what: str) -> str:
    """`0.7 epochs`, `1 epoch`, `55 epochs`."""
    shown = f"{number:.0f}" if number >= 10 else f"{number:.1f}".removesuffix(".0")
    return f"{shown} {what}" + ("" if shown == "1" else "s")


# ----------------------------------------------------------------------------------------------------------------------
# Before the loop: what trains


@dataclass(frozen=True)
class Trainables:
    """What learns in a run, and by which rule.

    ranks   the smallest and the largest of a layer
    layers  those with an adapter, by network
    rates   learning rate by parameter group
    """

    kind: str
    ranks: tuple[int, int]
    layers: Mapping[str, int]
    tokens: int
    parameters: int
    optimizer: str
    rates: Mapping[str, float]


def trainables(networks: Sequence[Adapters], optimizer: Optim) -> Trainables:
    networks = [network for network in networks if network.layers]
    kinds = {"DoRA" if network.decomposed else KINDS[network.adapter_type] for network in networks}
    held = {network.rank_of(path) for network in networks for path in network.layers} or {0}
    tokens = [member.params[0].shape[0] for member in optimizer.members if member.name == "tokens"]
    return Trainables(
        kind=" and ".join(sorted(kinds)), ranks=(min(held), max(held)), tokens=sum(tokens),
        layers={network.prefix: len(network.layers) for network in networks},
        parameters=sum(p.numel() for p in optimizer.params), optimizer=optimizer.name,
        rates={member.name: member.base_lr for member in optimizer.members})


def trainable_lines(facts: Trainables) -> Iterator[Line]:
    least, most = facts.ranks
    rank = f"rank {most}" if least == most else f"ranks {least} to {most}"
    network = f"{facts.kind} {rank} on {layers(facts.layers)}" if facts.layers else ""
    tokens = counted(facts.tokens, "new token") if facts.tokens else ""
    what = " and ".join(filter(None, [network, tokens]))
    yield Line("Learning", f"{what}, {parameters(facts.parameters)} · {facts.optimizer}, rate {rates(facts.rates)}")


def layers(by_network: Mapping[str, int]) -> str:
    """`136 layers`, or with more networks `136 layers of the UNet and 48 of the text encoders`."""
    words = Counter({"UNet": 0})
    for network, number in by_network.items():
        words["UNet" if network == "unet" else "text encoders"] += number
    found = [(number, name) for name, number in words.items() if number]
    if [name for _, name in found] == ["UNet"]:
        return counted(found[0][0], "layer")
    first, *others = [f"{number} of the {name}" for number, name in found]
    return " and ".join([first.replace(" of", " layers of", 1), *others])


def parameters(number: int) -> str:
    return f"{number / 1e6:.2f} M parameters" if number >= 10_000 else f"{number} parameters"


def rates(by_group: Mapping[str, float]) -> str:
    if len(set(by_group.values())) == 1:
        return f"{next(iter(by_group.values())):g}"
    return ", ".join(f"{rate:g} ({group})" for group, rate in by_group.items())


# ----------------------------------------------------------------------------------------------------------------------
# At the end


def end_lines(folder: str, files: Mapping[str, str], *, start: int, steps: int, seconds: float | None
              ) -> Iterator[Line]:
    """What lies in the folder, and what for: weight files as `files` says, then what every run writes.

    start  finished steps at the start of this session
    """
    spent = f" in {clock(seconds)}" if seconds else ""
    already = "all were finished already, none was trained now; " if start == steps else ""
    yield Line("Done", f"{counted(steps, 'step')}{spent}; {already}in {folder}:")
    files = {**files, **LAST_FILES}
    width = max(map(len, files))
    for name, purpose in files.items():
        yield Line("", f"{name:<{width}}  {purpose}")
