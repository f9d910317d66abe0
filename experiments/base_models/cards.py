"""Model cards: the numbers come from the measurements and the training records."""

import json
from pathlib import Path

from experiments.base_models.data import PACKAGES, STYLES, load_icons
from experiments.base_models.export import MODEL_FOLDERS
from experiments.base_models.loop import replace_text
from experiments.base_models.observed import OBSERVED
from trainkit.evaluation import STYLE_LAYER

LICENCES = {
    "noto": "Noto Emoji, Apache-2.0",
    "twemoji": "Twemoji, CC-BY 4.0, © Twitter, Inc and other contributors",
    "fluent": "Fluent Emoji (flat), MIT, © Microsoft Corporation",
}
TITLES = {
    "clip": "a small CLIP of icons",
    "sdxl": "a small text-to-image model of icons in SDXL's layout",
    "sd": "a small text-to-image model of icons in Stable Diffusion 1.x's layout",
}
LOADERS = {
    "clip": 'CLIPModel.from_pretrained("assets/tiny-clip-icons")  # from transformers',
    "sdxl": 'StableDiffusionXLPipeline.from_pretrained("assets/tiny-sdxl-icons")  # from diffusers',
    "sd": 'StableDiffusionPipeline.from_pretrained("assets/tiny-sd-icons")  # from diffusers',
}
PARTS = {"clip": ("clip", "judge", "judge_last"), "sdxl": ("vae", "clip", "sdxl"), "sd": ("vae", "clip", "sdxl", "sd")}
BATCHES = {"vae": 16, "clip": 128, "judge": 144, "judge_last": 144, "sdxl": 24, "sd": 24}
TAGS = {
    "clip": ["clip", "icons"],
    "sdxl": ["text-to-image", "stable-diffusion-xl"],
    "sd": ["text-to-image", "stable-diffusion"],
}


def read_json(path: Path) -> dict:
    """The record, or nothing yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def front_matter(kind: str) -> str:
    library = "transformers" if kind == "clip" else "diffusers"
    tags = "".join(f"\n- {tag}" for tag in TAGS[kind])
    licence = "license: other\nlicense_name: apache-2.0-and-cc-by-4.0-and-mit"
    return f"---\n{licence}\nlibrary_name: {library}\ntags:{tags}\n---\n"


def data_section(work_dir: Path) -> str:
    icons, _ = load_icons(work_dir)
    named = [icon for icon in icons if icon.noun]
    withheld = sum(icon.split == "withheld" for icon in named)
    nouns = len({icon.noun for icon in named})
    rows = [(f"`{style}`", f"`{PACKAGES[style][0]}`", PACKAGES[style][1], LICENCES[style]) for style in STYLES]
    return f"""## Data

The data has {nouns} nouns in three flat styles: {len(named)} images on white at 64 px. Captions name noun and
style in four wordings ("icon of a fox in the style of noto", "fox, twemoji style icon", …). The UNets never saw
{withheld} of the pairs of noun and style; they saw every noun in at least one style. The CLIP and the autoencoder saw
all {len(named)} images. No model saw the 3-D style of `assets/icons-3d`.

{table(("style in captions", "package (npm)", "version", "images"), rows)}

The tokenizer is CLIP's byte-pair encoding cut to about 4,000 entries: its first 3,000 merges, and every merge that the
words of the captions need (merges from `open-clip-torch` 3.3.0, MIT). Words that it knows get CLIP's own pieces.
"""


def training_section(kind: str, work_dir: Path) -> str:
    rows = []
    for part in PARTS[kind]:
        record = read_json(work_dir / "training" / f"{part}.json")
        if record:
            losses = ", ".join(f"{name} {value:.4g}" for name, value in record["losses"].items())
            rows.append((part, record["step"], BATCHES[part], f"{record['seconds'] / 60:.0f}", losses))
    return f"""## Training

The training ran on one thread of a 2-core CPU (Xeon, 2.5 GHz, AMX) that did other work too, without a GPU. It used
AdamW, 100 steps of warm-up, a cosine to the end of the time budget, and an EMA. The weights here are the EMA's, in
fp16. The clock was changed in the middle of the part `sdxl` of `tiny-sdxl-icons`: minutes before that are wall time,
and minutes after that are CPU time. Losses are running means over about 100 steps.

{table(("part", "steps", "batch", "minutes", "losses at the end"), rows)}

{OBSERVED[kind]["build"]}

`.venv/bin/python experiments/build_base_models.py --stage all` builds new models of this kind. They are not the models
that are here, and they replace the files here. With `--evaluate` instead of `--stage all`, the program measures the
models that are here and writes their cards.
"""


def image_scores(kind: str, scores: dict) -> str:
    mine, clip, vae = scores[kind], scores["clip"], scores["vae"]
    missed = sorted({pair.split(" -> ")[0] for pair in mine["missed"]})
    aim = {"sdxl": 0.80, "sd": 0.60}[kind]
    verdict = "reached" if mine["noun_top1"] >= aim else "missed"
    rows = [
        ("nearest real icon has the caption's noun", f"{mine['noun_top1']:.1%} (aim {aim:.0%}: {verdict})"),
        (
            f"… for captions whose (noun, style) was withheld ({mine['withheld_images']} images)",
            f"{mine['noun_top1_withheld']:.1%}",
        ),
        ("nearest real icon has the caption's style", f"{mine['style_top1']:.1%}"),
        ("ceiling: real icons through the autoencoder, own noun", f"{clip['reconstructed_top1']:.1%}"),
        (
            f"autoencoder, mean PSNR over {vae['heldout']} icons of other nouns, which it never saw",
            f"{vae['psnr_heldout']:.2f} dB",
        ),
    ]
    return f"""## Measured

The test has {mine["images"]} images: 50 captions × 4 seeds, generated by the standard pipeline with {mine["steps"]}
steps and guidance {mine["guidance"]}. The score is top-1 retrieval accuracy. For each image,
`assets/tiny-clip-icons`, a CLIP trained on the same icons, finds the nearest of the 903 real icons by cosine.

{table(("measure", "value"), rows)}

The CLIP missed these nouns at least once: {", ".join(missed) or "none"}.

![24 of the captions, four seeds each](../../docs/images/base_{kind}.png)
"""


def layer_table(layers: dict[str, dict[str, float]]) -> str:
    """One row per layer: the noise, then every pair of styles in units of it."""
    if not layers:
        return ""
    pairs = [pair for pair in next(iter(layers.values())) if pair != "halves"]
    rows = []
    for layer, row in layers.items():
        name = layer.removeprefix("vision_model.")
        cells = [f"{row[pair]:.1f}" for pair in pairs]
        rows.append((f"**{name}**" if layer == STYLE_LAYER else name, f"{row['halves']:.5f}", *cells))
    return table(("layer", "halves (KID)", *pairs), rows)


def clip_scores(scores: dict) -> str:
    clip = scores["clip"]
    return f"""## Measured

Top-1 retrieval accuracy: how often the nearest of the 903 real icons has the right noun.

- Real icons that went through the autoencoder: {clip["reconstructed_top1"]:.1%}.
- Real icons, if icons of their own style do not count: {clip["other_style_top1"]:.1%}.

**The style layer.** A good layer separates styles and ignores nouns. `trainkit.evaluation.STYLE_LAYER` is in bold.

- The table has four styles: the three above, and `fluent-3d`. That is the 3-D style of `assets/icons-3d`, on which no
  model was trained. Each style has the same 301 nouns.
- "Halves" is the KID between two random halves of one style, whose nouns differ. It shows what nouns alone do. The
  value is the root mean square over the four styles, with eight random splits for each.
- The other columns are the KID between two styles, divided by "halves".
- Features are the mean and deviation of each channel over tokens. Layers are those of `vision_model`.

{layer_table(clip.get("style_layers", {}))}
"""


def card(kind: str, work_dir: Path, scores: dict) -> str:
    measured = clip_scores(scores) if kind == "clip" else image_scores(kind, scores)
    name = MODEL_FOLDERS[kind]
    parts = [
        front_matter(kind),
        f"# {name}: {TITLES[kind]}\n",
        f"{OBSERVED[kind]['what']}\n\n```python\n{LOADERS[kind]}\n```\n",
        data_section(work_dir),
        training_section(kind, work_dir),
        measured,
        f"## What you can expect\n\n{OBSERVED[kind]['seen']}\n" if "seen" in OBSERVED[kind] else "",
        f"## Limits\n\n{OBSERVED[kind]['limits']}\n",
    ]
    return "\n".join(part for part in parts if part)


def write_cards(work_dir: Path, assets_dir: Path) -> None:
    """README.md of every model folder whose scores exist."""
    scores = read_json(work_dir / "evaluation.json")
    for kind, name in MODEL_FOLDERS.items():
        if kind in scores and (assets_dir / name).exists():
            replace_text(assets_dir / name / "README.md", card(kind, work_dir, scores))
