"""A small CLIP of the icons (Radford et al. 2021, arXiv:2103.00020): judge, feature space and frozen text encoders.

One vision tower, two text towers: the 96-wide one is the CLIP's own and the first text encoder of both pipelines; the
128-wide one, trained in the same run against its own projection of the same images, is SDXL's second.
"""

import logging
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.base_models.augment import move, soften, tint
from experiments.base_models.captions import PLAIN_TEMPLATES, TEMPLATES, caption, unknown_style_texts
from experiments.base_models.data import Icon, load_icons
from experiments.base_models.loop import DEVICE, Budget, Training, generator

LOG = logging.getLogger("base_models")
BATCH = 128
TEXT_LENGTH = 24  # training crops the padding: attention is causal, so the end token sees the same
MEAN = STD = 0.5


def text_config(width: int, eos_token_id: int, vocabulary: int, **changes) -> dict:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": width // 32,
        "max_position_embeddings": 77,
        "projection_dim": width,
        "hidden_act": "quick_gelu",
        "bos_token_id": eos_token_id - 1,
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id,
        **changes,
    }


class TwoTextClip(nn.Module):
    """The CLIP and the second text encoder with a projection of the image of its own."""

    def __init__(self, vocabulary: int, attention: str = "sdpa") -> None:
        from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig

        super().__init__()
        text = CLIPTextConfig(**text_config(96, vocabulary - 1, vocabulary))
        vision = CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=64,
            patch_size=8,
            projection_dim=96,
        )
        second = text_config(128, vocabulary - 1, vocabulary, hidden_act="gelu", pad_token_id=0)
        config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=96)
        config._attn_implementation = attention
        self.clip = CLIPModel(config)
        self.text_2 = CLIPTextModelWithProjection(CLIPTextConfig(**second))
        self.visual_projection_2 = nn.Linear(128, 128, bias=False)
        self.scale_2 = nn.Parameter(torch.tensor(2.6592))

    def forward(self, pixels: Tensor, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Unit vectors: image [B,96], text [B,96], image for the second tower [B,128], second text [B,128]."""
        vision = self.clip.vision_model(pixels).pooler_output  # [B,128]
        first = self.clip.text_projection(self.clip.text_model(ids).pooler_output)
        second = self.text_2(ids_2).text_embeds
        vectors = (self.clip.visual_projection(vision), first, self.visual_projection_2(vision), second)
        return tuple(functional.normalize(vector, dim=-1) for vector in vectors)


def contrast(left: Tensor, right: Tensor, match: Tensor, scale: Tensor) -> Tensor:
    """Cross entropy of cosines against all matching partners, both ways; the plain CLIP loss if match is diagonal."""
    logits = scale.exp().clamp(max=100) * left @ right.T  # [B,B]
    forth = -(functional.log_softmax(logits, 1) * match / match.sum(1, keepdim=True)).sum(1)
    back = -(functional.log_softmax(logits, 0) * match / match.sum(0, keepdim=True)).sum(0)
    return (forth.mean() + back.mean()) / 2


class CaptionedIcons:
    """Batches of augmented icons, caption ids and who matches whom."""

    def __init__(self, work_dir: Path, seed: int) -> None:
        from transformers import CLIPTokenizer

        icons, pixels = load_icons(work_dir)
        chosen = [index for index, icon in enumerate(icons) if icon.noun]
        self.icons: list[Icon] = [icons[index] for index in chosen]
        self.pixels = torch.from_numpy(pixels[chosen]).permute(0, 3, 1, 2).contiguous()  # uint8 [N,3,64,64]
        self.tokenizers = [CLIPTokenizer.from_pretrained(work_dir / name) for name in ("tokenizer", "tokenizer_2")]
        self.seed, self.words = (
            seed,
            style_words(self.tokenizers[0], {word for icon in self.icons for word in icon.noun.split()}),
        )

    def write(self, icon: Icon, draw: random.Random) -> tuple[str, str]:
        """A caption and the style it names: 70 % say the style, 15 % none, 15 % a word that means nothing."""
        kind = draw.random()
        if kind < 0.70:
            return caption(draw.choice(TEMPLATES), icon.noun, icon.style), icon.style
        if kind < 0.85:
            return caption(draw.choice(PLAIN_TEMPLATES), icon.noun), ""
        return unknown_style_texts(icon.noun, self.words, len(TEMPLATES), str(draw.random()))[
            draw.randrange(len(TEMPLATES))
        ], ""

    def tokens(self, texts: list[str], length: int = TEXT_LENGTH) -> list[Tensor]:
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        return [tokenizer(texts, **options).input_ids for tokenizer in self.tokenizers]

    def batch(self, step: int) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """Images [B,3,64,64] normalised, ids of both tokenizers [B,L], caption match [B,B], noun match [B,B]."""
        draw = generator(self.seed, step)
        rows = torch.randperm(len(self.icons), generator=draw)[:BATCH]
        written = [self.write(self.icons[row], random.Random(f"{self.seed} {step} {row}")) for row in rows.tolist()]
        pixels = self.pixels[rows].float() / 255
        pixels = move(pixels, scale=(0.7, 1.15), shift=0.1, angle=0.15, draw=draw)
        pixels = soften(tint(pixels, 0.25, draw), draw)
        nouns = [self.icons[row].noun for row in rows.tolist()]
        styles = [self.icons[row].style for row in rows.tolist()]
        same_noun = torch.tensor([[a == b for b in nouns] for a in nouns])
        said = torch.tensor([[not style or style == b for b in styles] for _, style in written])  # [text,image]
        return (
            (pixels - MEAN) / STD,
            self.tokens([text for text, _ in written]),
            (same_noun & said).T.float(),
            same_noun.float(),
        )


def style_words(tokenizer, nouns: set[str]) -> list[str]:
    """Whole words of the vocabulary that are no noun of ours: stand-ins for a style word without a meaning."""
    words = [entry.removesuffix("</w>") for entry in tokenizer.get_vocab() if entry.endswith("</w>")]
    return sorted(word for word in words if len(word) > 2 and word.isalpha() and word.isascii() and word not in nouns)


def train_clip(work_dir: Path, *, minutes: float, seed: int) -> None:
    torch.manual_seed(seed)
    data = CaptionedIcons(work_dir, seed)
    model = TwoTextClip(len(data.tokenizers[0]))
    training = Training("clip", model, work_dir, budget=Budget(minutes), lr=1.5e-3, ema=0.995)

    def losses_at(step: int) -> dict[str, Tensor]:
        pixels, (ids, ids_2), match, same_noun = data.batch(step)
        inputs = (tensor.to(DEVICE) for tensor in (pixels, ids, ids_2))
        vision, text, vision_2, text_2 = (vector.cpu() for vector in model(*inputs))
        scale, scale_2 = model.clip.logit_scale.cpu(), model.scale_2.cpu()
        return {
            "clip": contrast(vision, text, match, scale),
            "clip_2": contrast(vision_2, text_2, match, scale_2),
            "noun": 0.3 * noun_contrast(vision, same_noun, scale),
        }

    training.run(losses_at)
    save_clip(training.average, work_dir)


def noun_contrast(vision: Tensor, same_noun: Tensor, scale: Tensor) -> Tensor:
    """Images of one noun in other styles belong together (Khosla et al. 2020, arXiv:2004.11362, L_out)."""
    others = 1 - torch.eye(len(vision))
    partners = same_noun * others  # [B,B]
    logits = (scale.exp().clamp(max=100) * vision @ vision.T).masked_fill(others == 0, -1e4)
    rows = partners.sum(1) > 0
    fraction = partners[rows] / partners[rows].sum(1, keepdim=True)
    return -(functional.log_softmax(logits[rows], 1) * fraction).sum(1).mean()


def save_clip(model: TwoTextClip, work_dir: Path) -> None:
    """models/clip (with image processor and tokenizer) and models/text_encoder_2."""
    from transformers import CLIPImageProcessor

    folder = work_dir / "models" / "clip"
    model.clip.save_pretrained(folder)
    model.text_2.save_pretrained(work_dir / "models" / "text_encoder_2")
    sides = {"shortest_edge": 64}
    crop = {"height": 64, "width": 64}
    CLIPImageProcessor(size=sides, crop_size=crop, image_mean=[MEAN] * 3, image_std=[STD] * 3).save_pretrained(folder)
