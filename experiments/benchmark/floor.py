"""The floor under a training step: forward and backward of the networks that train in it, and nothing else.

    .venv/bin/python experiments/benchmark/floor.py MODEL BATCH LATENT_SIDE ROUNDS [wall|cpu]

Each kind of step in turn, a few passes each, medians of seconds as one line of JSON. `bare` has no adapter, kinds that
end in _peft have PEFT's own layers in the UNet, all others ours:

    plain, dora    the UNet with LoRA, with DoRA
    ti             plain, and both text encoders for one prompt, the gradient ending at the embeddings of its tokens
    te             plain, and both text encoders with LoRA for one prompt
    prior          ti with as many class images again, whose prompt is not encoded

MODEL is SDXL's, or one of SD 1.x or 2.x with its one text encoder.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from trainkit.adapters import add_adapters
from trainkit.families.unet_targets import LORA_TARGETS, TEXT_LORA_TARGETS
from trainkit.options import LoraOptions

RANK = 4
PASSES = 5
TOKENS = 77
ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Text = tuple[Tensor, Tensor]  # embeds [B,T,D], pooled [B,P]


@dataclass(frozen=True)
class Step:
    """What one kind of step runs: the UNet on `batch` images for each of the prompts.

    prompts  encode a prompt, with a gradient or as it is known from the start
    learns   whether the UNet has an adapter; else the latents ask for their gradient, so that there is one
    """

    unet: UNet2DConditionModel
    prompts: Sequence[Callable[[], Text]]
    batch: int
    side: int
    learns: bool = True

    def seconds(self, clock: Callable[[], float]) -> float:
        """Of one forward and backward."""
        rows, channels = self.batch * len(self.prompts), self.unet.config.in_channels
        z = torch.randn(rows, channels, self.side, self.side).requires_grad_(not self.learns)
        times, sizes = torch.randint(0, 1000, (rows,)), torch.full((rows, 6), 64.0)
        self.unet.zero_grad()
        start = clock()
        texts = [prompt() for prompt in self.prompts]
        embeds = torch.cat([e.expand(self.batch, -1, -1) for e, _ in texts])  # [rows,T,D]
        pooled = torch.cat([p.expand(self.batch, -1) for _, p in texts])  # [rows,P]
        out = self.unet(z, times, embeds, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
        out.square().mean().backward()
        return clock() - start


def steps(model: str, batch: int, side: int) -> dict[str, Step]:
    base = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=torch.float32)
    encoders = [kind.from_pretrained(model, subfolder=folder, dtype=torch.float32)
                for folder, kind in ENCODERS.items() if (Path(model) / folder).is_dir()]
    for network in (base.train(), *encoders):
        network.requires_grad_(False)
    known = encode(encoders)
    plain = Step(with_ours(base, dora=False), [lambda: known], batch, side)
    tokens, text_lora = with_rows(encoders), with_text_lora(encoders)
    return {
        "bare": replace(plain, unet=base, learns=False),
        "plain_peft": replace(plain, unet=with_peft(base, dora=False)), "plain": plain,
        "dora_peft": replace(plain, unet=with_peft(base, dora=True)),
        "dora": replace(plain, unet=with_ours(base, dora=True)),
        "ti": replace(plain, prompts=[tokens]), "te": replace(plain, prompts=[text_lora]),
        "prior": replace(plain, prompts=[tokens, *plain.prompts]),
    }


def with_peft(base: UNet2DConditionModel, *, dora: bool) -> UNet2DConditionModel:
    unet = copy.deepcopy(base)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", use_dora=dora,
                                target_modules=list(LORA_TARGETS["attention"])))
    return unet


def with_ours(base: UNet2DConditionModel, *, dora: bool) -> UNet2DConditionModel:
    unet = copy.deepcopy(base)
    add_adapters(unet, LoraOptions(rank=RANK, use_dora=dora), targets=LORA_TARGETS, seed=0)
    return unet


def with_rows(encoders: Sequence[PreTrainedModel]) -> Callable[[], Text]:
    """Encoders whose looked-up embeddings ask for their gradient."""
    copies = [copy.deepcopy(encoder) for encoder in encoders]
    for encoder in copies:
        encoder.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    return partial(encode, copies)


def with_text_lora(encoders: Sequence[PreTrainedModel]) -> Callable[[], Text]:
    copies = [copy.deepcopy(encoder) for encoder in encoders]
    for prefix, encoder in zip(ENCODERS, copies, strict=False):
        add_adapters(encoder, LoraOptions(rank=RANK), prefix=prefix, targets=TEXT_LORA_TARGETS, seed=0)
    return partial(encode, copies)


def encode(encoders: Sequence[PreTrainedModel]) -> Text:
    """One prompt of BOS, twenty words, EOS and padding, by what the UNet is told; SD's reads nothing pooled."""
    bos, eos = encoders[0].config.bos_token_id, encoders[0].config.eos_token_id
    ids = torch.tensor([[bos, *range(300, 320), *[eos] * (TOKENS - 21)]])
    for encoder in encoders:
        encoder.zero_grad()
    if len(encoders) == 1:
        out = encoders[0](ids)
        return out.last_hidden_state, out.pooler_output
    outs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    return torch.cat([out.hidden_states[-2] for out in outs], dim=-1), outs[-1].text_embeds


def main() -> None:
    model, batch, side, rounds = sys.argv[1], *map(int, sys.argv[2:5])
    clock = CLOCKS[sys.argv[5] if len(sys.argv) > 5 else "wall"]
    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # as the trainer does
    kinds = steps(model, batch, side)
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for name, step in list(kinds.items()) * rounds:
        passes = [step.seconds(clock) for _ in range(PASSES)]
        seconds[name] += passes[1:]  # the first finds the caches full of another network
    print(json.dumps({name: statistics.median(taken) for name, taken in seconds.items()}))


if __name__ == "__main__":
    main()
