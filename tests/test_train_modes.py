"""What trains, what is minimised and by which optimizer: the big switches in pairs, each run also cut and resumed.

Every run ends with its published files read back. The first rows, in which every value of every switch is met, run in
the suite; the others, which complete the pairs, are marked slow.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.compare import same_checkpoint, same_tensors
from tests.support.pairs import every_value_first, pairwise
from tests.support.trainers import command, forked, make_images, metrics

pytestmark = pytest.mark.trains

STEPS = 4
FEATURES = {
    "adapter": [{}, {"use_dora": True}, {"lora_type": "loha"}, {"lora_type": "lokr", "lokr_factor": 4},
                {"lora_layers": "attention+conv"}, {"init_lora_weights": "pissa"}],
    "optimizer": [{"use_ema": True}, {"optimizer": "prodigy", "learning_rate": 1.0, "use_ema": True},
                  {"optimizer": "schedule_free_adamw", "token_std_pull": 0.0},
                  {"optimizer": "adamw8bit", "optimizer_args": "min_8bit_size=16"}],  # else small ones keep 32 bits
    "objective": [{}, {"do_edm_style_training": True}, {"snr_gamma": 5.0}, {"loss_type": "huber"}],
    "text": [{}, {"train_text_encoder_ti": True}, {"train_text_encoder": True, "train_text_encoder_frac": 0.5}],
    "prior": [{}, {"with_prior_preservation": True, "class_prompt": "icon of a thing", "num_class_images": 3}],
    "caching": [{}, {"cache_latents": True}],
    "precision": [{}, {"mixed_precision": "bf16"}],
}
FIRST, OTHERS = every_value_first(pairwise(FEATURES))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    there = tmp_path_factory.mktemp("data")
    return {"data": make_images(there / "images", n=5),
            "class_data_dir": make_images(there / "class", n=3, captions=False)}


def switches(row: tuple[int, ...], folders: dict[str, Path]) -> dict[str, object]:
    chosen: dict[str, object] = {}
    for choices, index in zip(FEATURES.values(), row, strict=True):
        chosen |= choices[index]
    return chosen | ({"class_data_dir": folders["class_data_dir"]} if "class_prompt" in chosen else {})


def named(row: tuple[int, ...]) -> str:
    return "".join(map(str, row))


def test_the_table_meets_every_pair():
    rows, sizes = FIRST + OTHERS, [len(choices) for choices in FEATURES.values()]
    columns = list(itertools.combinations(range(len(sizes)), 2))
    met = {(i, row[i], j, row[j]) for row in rows for i, j in columns}
    assert met == {(i, a, j, b) for i, j in columns for a in range(sizes[i]) for b in range(sizes[j])}
    assert len(FIRST) <= 8


@pytest.mark.parametrize("row", FIRST, ids=named)
def test_modes_compose_and_resume_to_the_bit(row, tiny_sdxl, folders, tmp_path):
    check(row, tiny_sdxl, folders, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", OTHERS, ids=named)
def test_every_pair_of_modes_composes_and_resumes_to_the_bit(row, tiny_sdxl, folders, tmp_path):
    check(row, tiny_sdxl, folders, tmp_path)


def check(row: tuple[int, ...], model: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """The run at once, and its steps after the first, second or third from that checkpoint on: one and the same."""
    chosen, cut = switches(row, folders), 1 + sum(row) % (STEPS - 1)
    outs = [tmp_path / name / "lora" for name in ("whole", "resumed")]
    for out, resumed in zip(outs, (None, outs[0] / f"checkpoint-{cut}"), strict=True):
        argv = command(model, folders["data"], out, max_train_steps=STEPS, checkpointing_steps=cut,
                       resume_from_checkpoint=resumed, **chosen)
        done = forked(argv, log=tmp_path / "log")
        assert done.code == 0, f"{chosen}, from {resumed}\n{done.output}"
        assert done.output.count("holds the trained weights") == 2, "the Diffusers file and the WebUI file"
    losses = [{m["step"]: m["loss"] for m in metrics(out)} for out in outs]
    assert losses[1] == {step: loss for step, loss in losses[0].items() if step > cut}
    assert len(losses[0]) == STEPS and all(0 < loss < 1e4 for loss in losses[0].values())
    same_checkpoint(outs[0] / f"checkpoint-{STEPS}", outs[1] / f"checkpoint-{STEPS}")
    published(outs, embeddings="train_text_encoder_ti" in chosen)


def published(outs: list[Path], *, embeddings: bool) -> None:
    """The same files, with something learned in them."""
    names = ["pytorch_lora_weights.safetensors", "lora.safetensors", *(["lora_emb.safetensors"] if embeddings else ())]
    finals = [sorted(path.name for path in out.glob("*.safetensors") if "-step0" not in path.name) for out in outs]
    assert finals == [sorted(names)] * len(outs)
    for name in names:
        same_tensors(*(out / name for out in outs))
    learned = load_file(outs[0] / names[0])
    assert all(torch.isfinite(tensor).all() for tensor in learned.values())
    assert any(tensor.abs().max() > 1e-6 for name, tensor in learned.items() if "lora_B" in name)
