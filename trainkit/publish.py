"""The end of a run: weight files checked against the trained weights, model card, report and, when asked, the Hub."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from trainkit import summary
from trainkit.adapters import BF16_ROUNDING, FP16_ROUNDING, largest_change
from trainkit.errors import Problem, UserError
from trainkit.files import Json, atomic_write, disk_errors
from trainkit.options import RunOptions
from trainkit.options.trainers import known_flags
from trainkit.reading import parse_yaml, read_text
from trainkit.redact import redact
from trainkit.report import SampleStep, environment, sample_steps, write_report
from trainkit.report.charts import number
from trainkit.report.facts import RunFacts, public, sample_files
from trainkit.report.usage import usage
from trainkit.runtime import ranks
from trainkit.runtime.weight_files import DIFFUSERS_FILE, KOHYA_FILE, low_rank_file, lycoris_file, run_name

if TYPE_CHECKING:
    from trainkit.adapters import Adapters
    from trainkit.lora_files import LoraFiles

log = logging.getLogger(__name__)

TAGS = ("text-to-image", "diffusers")
LORA_TAGS, TOKEN_TAGS = ("lora", "template:sd-lora"), ("textual_inversion",)
LICENCES = {  # of bases on the Hub; a folder tells its own
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++", "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1": "openrail++", "stabilityai/stable-diffusion-2-1-base": "openrail++",
}
LONGEST_NAME = 255 - len(".-step00000000_emb.safetensors.1234567-12345678.tmp")  # bytes; a file's draft is longer
HUB_ID = re.compile(r"([\w-][\w.-]{0,95}/)?[\w-][\w.-]{0,95}", re.ASCII)
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def problems(options: RunOptions) -> Iterator[Problem]:
    """What would make the final files or the upload fail after hours of training."""
    yield from name_problems(run_name(Path(options.output_dir)))
    if options.push_to_hub:
        yield from hub_problems(options)


def name_problems(name: str) -> Iterator[Problem]:
    """`name` is the output folder's, and the WebUI file's."""
    flag = f"--output_dir .../{name}"
    if f"{name}.safetensors".casefold() == DIFFUSERS_FILE:
        yield Problem("the folder's name is taken", flag,
                      f"it names the file for WebUIs, and {DIFFUSERS_FILE} is the one for Diffusers",
                      "name the folder after what is learned, such as --output_dir runs/icons")
    if len(os.fsencode(name)) > LONGEST_NAME:
        yield Problem("the folder's name is too long", flag,
                      f"it names the file for WebUIs, and file systems take no more than {LONGEST_NAME} bytes of it",
                      "give --output_dir a shorter last part")


def hub_problems(options: RunOptions) -> Iterator[Problem]:
    from huggingface_hub import get_token

    if options.hub_token is None and get_token() is None:
        yield Problem("no token for the Hub", "--push_to_hub", "an upload needs to know who you are",
                      "run `hf auth login` once, or set HF_TOKEN in the environment")
    name = repo_id(options)
    if not HUB_ID.fullmatch(name):
        yield Problem(f"{name!r} is no repository name", "--hub_model_id", "the Hub allows letters, digits, . _ and -",
                      "give --hub_model_id owner/name")


def publish(options: RunOptions, files: LoraFiles) -> list[Path]:
    """Write the final files into --output_dir, verify them, and upload them when asked -> the files, weights first.

    Rank 0 does it and every other rank waits, returning no files. Where it fails, they learn that rank 0 has ended.
    Raises UserError when a written file does not hold the trained weights, or when the upload fails; by then every
    file is complete on the disk.
    """
    written = publish_here(options, files) if ranks.is_main() else []
    ranks.barrier()
    return written


def publish_here(options: RunOptions, files: LoraFiles) -> list[Path]:
    folder = Path(options.output_dir)
    with disk_errors(folder):
        weights = files.final()  # first: the other files speak of them
        written = [*weights, write_card(folder), write_report(folder)]
    run = RunFacts(folder)
    with files.averaged():
        for sentence in standstills(files.networks, run):
            log.warning("%s", sentence)
    uses = {path.name: purposes(run)[path.name].replace("see above", "see README.md") for path in weights}
    summary.log_end(options.output_dir, uses, start=run.start_step, steps=run.step, seconds=run.seconds)
    if options.push_to_hub:
        token = options.hub_token.get_secret_value() if options.hub_token else None
        url = push(folder, uploads(folder, weights), repo_id=repo_id(options), private=options.hub_private, token=token)
        log.info("uploaded to %s", url)
    return written


def standstills(networks: Sequence[Adapters], run: RunFacts) -> Iterator[str]:
    """A sentence for each network whose weights training has hardly moved.

    The measure is rounding to fp16; where the optimizer never found a step size, the coarser one to bf16.
    """
    for network in networks:
        sizes = {group: pair for group, pair in run.step_sizes.items() if group.partition(".")[0] == network.prefix}
        stuck = bool(sizes) and all(last < 2 * first for first, last in sizes.values())
        bound = BF16_ROUNDING if stuck else FP16_ROUNDING
        largest = largest_change(network, enough=bound)
        if not network.layers or largest >= bound:
            continue
        advice = "Train for more steps, or with a higher --learning_rate"
        if stuck:
            d = max(last for _, last in sizes.values())
            advice = (f"In {run.step} steps, {run.optimizer} has found no step size: it is {d:.1e}, where it started. "
                      "Raise --max_train_steps: it needs some hundred")
        yield (f"the adapters of {network.prefix} have hardly moved: no layer's weights changed by more than "
               f"{largest:.0e} of their size, which is less than rounding them to {'bf16' if stuck else 'fp16'} does. "
               f"Images with this LoRA look like the base model's. {advice}")


# ----------------------------------------------------------------------------------------------------------------------
# Model card


def write_card(folder: Path) -> Path:
    """README.md: front matter for the Hub, how to use the LoRA in three places, settings, hashes."""
    run = RunFacts(folder)
    samples, licence = sample_steps(folder, last=run.step), licence_of(run)
    matter = yaml.safe_dump(front_matter(run, samples, licence), sort_keys=False, allow_unicode=True, width=1000)
    env = environment(autoescape=False)
    env.filters |= {"text": text, "code": code, "steps": mixed}
    card = env.get_template("card.md").render(
        run=run, samples=samples, samples_grid=f"samples/step_{samples[-1].step:06d}.png" if samples else "",
        usage=usage(run), files=run.files, purposes=purposes(run), settings=settings(run), dataset=hub_dataset(run),
        licence=licence, base_is_local=Path(run.base_path).is_dir() or run.base_is_file,
        vae_is_local=bool(run.vae) and Path(str(run.option("pretrained_vae_model_name_or_path"))).is_dir(),
        front_matter=matter, title=title(run), parts=parts(run), tokens=run.embeddings.tokens if run.embeddings else {},
    )
    path = folder / "README.md"
    atomic_write(path, card.encode("utf-8"))
    return path


def purposes(run: RunFacts) -> dict[str, str]:
    """What each file is for. A DoRA is another function in A1111 and InvokeAI: docs/adapters.md."""
    return {run.embeddings_file: "Diffusers, ComfyUI, A1111, Forge", DIFFUSERS_FILE: "Diffusers",
            **dict.fromkeys((f"{run.name}.safetensors", KOHYA_FILE),
                            "ComfyUI, Forge: see above" if run.is_dora else "ComfyUI, A1111, Forge, InvokeAI"),
            lycoris_file(run.name): "LyCORIS", low_rank_file(run.name): "A1111, InvokeAI, SD.Next"}


def title(run: RunFacts) -> str:
    """What was made."""
    if run.embeddings is None:
        return "A LoRA"
    return "A LoRA and new tokens" if run.has_lora else "New tokens"


def parts(run: RunFacts) -> str:
    """What was trained."""
    encoders = {group.partition(".")[0] for group in run.rates if group.startswith("text_encoder")}
    text_part = "both text encoders" if len(encoders) > 1 else "the text encoder"
    trained = {"the UNet": run.option("train_unet_frac") != 0, text_part: run.option("train_text_encoder"),
               "the new tokens' embeddings": run.embeddings}
    return " and ".join(name for name, yes in trained.items() if yes)


def front_matter(run: RunFacts, samples: Sequence[SampleStep], licence: str | None) -> dict[str, Json]:
    """The card's metadata. See huggingface.co/docs/hub/model-cards."""
    images = samples[-1].images if samples else ()
    matter: dict[str, Json] = {
        "base_model": run.base_model, "library_name": "diffusers", "license": licence or "other",
        "pipeline_tag": "text-to-image", "tags": tags(run),
    }
    if run.trigger:
        matter["instance_prompt"] = run.trigger
    if images and run.validation_prompt:
        matter["widget"] = [{"text": run.prompted(run.validation_prompt), "output": {"url": p.file}} for p in images]
    return matter


def tags(run: RunFacts) -> list[str]:
    parts = (TAGS, LORA_TAGS if run.has_lora else (), [run.base_series] if run.base_series else (),
             TOKEN_TAGS if run.embeddings else ())
    return [tag for part in parts for tag in part]


def licence_of(run: RunFacts) -> str | None:
    """Licence of the base model: from the card in its folder, or known for its Hub name."""
    card = Path(run.base_path) / "README.md"
    if not card.is_file():
        return LICENCES.get(run.base_model)
    try:
        match = FRONT_MATTER.match(read_text(card))
        matter = parse_yaml(match[1]) if match else None
    except (OSError, ValueError) as error:
        log.warning("cannot read the licence in %s: %s", card, " ".join(str(error).split()))
        return None
    found = matter.get("license") if isinstance(matter, dict) else None
    return found if isinstance(found, str) and found else None


def hub_dataset(run: RunFacts) -> str | None:
    """The data set's name if it is one on the Hub; a folder's name is private."""
    name = str(run.option("dataset_name") or "")
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def settings(run: RunFacts) -> dict[str, str]:
    """The rows of the card's table: what had an effect. Which options it tells, their fields say."""
    card_values = {card.label: public(flag.name, run.setting(flag.name)) for flag in known_flags().values()
                   if (card := flag.facts.card) if card.always or run.option(flag.name) != flag.default}
    rates = {f"Learning rate, {group}": number(rate) for group, rate in run.rates.items()}
    values = {"Steps": run.step, "Optimizer": run.optimizer, **rates, **card_values}
    return {name: str(value) for name, value in values.items() if value is not None}


def text(value: Json) -> str:
    """Words in Markdown that mean themselves: on one line, no markup, no HTML."""
    return re.sub(r"([\\`*_{}\[\]<>|#!&~])", r"\\\1", " ".join(str(value).split()))


def code(value: Json) -> str:
    """A literal in Markdown; a backtick, which would end it, becomes an apostrophe, and | would end a table's cell."""
    return f"`{' '.join(str(value).split()).replace('`', chr(39)).replace('|', '/')}`"


def mixed(step: str) -> str:
    """A sentence with literals between backticks."""
    return "".join(code(part) if k % 2 else spaced_text(part) for k, part in enumerate(step.split("`")))


def spaced_text(part: str) -> str:
    """`text` that keeps the space at both ends."""
    return f"{' ' if part[:1].isspace() else ''}{text(part)}{' ' if part[-1:].isspace() else ''}"


# ----------------------------------------------------------------------------------------------------------------------
# Hub


def repo_id(options: RunOptions) -> str:
    return options.hub_model_id or Path(options.output_dir).name


def uploads(folder: Path, weights: Sequence[Path]) -> list[Path]:
    """What goes to the Hub, by name: never checkpoints, logs, caches, run.json or another run's files.

    A list, not patterns: the Hub client's `*` matches across folders, so `*.safetensors` would send checkpoints too.
    """
    last = RunFacts(folder).step
    samples = [path for path, step in sample_files(folder).items() if step <= last]
    return [*weights, folder / "README.md", folder / "report.html", *samples]


def push(folder: Path, files: Sequence[Path], *, repo_id: str, private: bool, token: str | None) -> str:
    """Create the repository if need be and upload exactly `files` in one commit -> its URL."""
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    operations = [CommitOperationAdd(path_in_repo=f.relative_to(folder).as_posix(), path_or_fileobj=f) for f in files]
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        api.create_commit(repo.repo_id, operations=operations, commit_message="LoRA, model card, samples, report")
    except (OSError, httpx.HTTPError) as error:
        reason = redact(str(error), [token] if token else [])
        raise UserError(Problem(
            what=f"the upload to {repo_id} failed: {reason}", where="--push_to_hub",
            why=f"every file is complete in {folder}; only the upload is missing",
            fix="run `hf auth login`, then the same command with --resume_from_checkpoint latest: it only publishes",
        )) from error
    return repo.url
