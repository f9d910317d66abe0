"""The CLIP guidance token: an image's own CLIP features stand where its caption's encoding has its last pad.

Training on images beside captions: Yuan et al. 2024, "Real-Fake: Effective Training Data Synthesis Through
Distribution Matching", arXiv:2310.10402.

B batch, T tokens, D width of the text and of the features, N images with features.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainkit import rng
from trainkit.condition import UNCONDITIONAL, Condition
from trainkit.data.cache import tensors_digest
from trainkit.data.clip_features import CLIPS, FILE_NAME, SCRIPT, TOO_WIDE, read_features
from trainkit.devices import upload
from trainkit.errors import Problem, UserError, counted, listing, shell_word
from trainkit.families.tokenize import has_free_place, prompt_lengths

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from trainkit.data.batch import Batch, Row
    from trainkit.data.caption_changes import CaptionChanges
    from trainkit.families import Family
    from trainkit.options import GuidanceOptions

log = logging.getLogger(__name__)


# ----------------------------------------------------------------------------------------------------------------------
# The token


def with_token(embeds: Tensor, tokens: Tensor, where: Tensor, lengths: Sequence[int] = ()) -> Tensor:
    """A copy of embeds [B,T,D] whose last position is tokens [B,D] in the rows that `where` [B] names.

    lengths  of the prompts in tokens, B of them: one that is repeated to fill T gets its token at each of its ends
    """
    length = embeds.shape[1]
    periods = torch.tensor(list(lengths) or [length] * len(embeds))  # [B]
    ends = where.cpu()[:, None] & (torch.arange(1, length + 1) % periods[:, None] == 0)  # [B,T]
    ends, tokens = upload([ends, tokens.to(embeds.dtype)], embeds.device)
    return torch.where(ends[:, :, None], tokens[:, None], embeds)


@dataclass(frozen=True)
class ClipToken:
    """The last pad of each caption's encoding becomes scale · features of the image; nothing is changed in place.

    rows     [N,D] features
    places   [rows of the data set] -> row of features
    full     captions whose encoding has no pad: their end token stays
    dropout  fraction of visits without the token, so that classifier-free guidance has a branch to start from
    lengths  the lengths of captions in tokens, where they differ

    A visit without a caption has no token either: it gets exactly what the base model is given without a prompt.
    """

    rows: Tensor
    places: Tensor
    full: Container[str]
    scale: float
    dropout: float
    lengths: Callable[[Sequence[str]], Sequence[int]] | None = None

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """What a checkpoint and the run that resumes it must agree on."""
        return {"--guidance_features": tensors_digest({"features": self.rows[self.places.unique()]})}

    def __call__(self, condition: Condition, batch: Batch) -> Condition:
        free_place = torch.tensor([prompt not in self.full and prompt != UNCONDITIONAL for prompt in batch.prompts])
        kept = rng.uniform(batch.keys, "guidance dropout") >= self.dropout
        tokens = self.scale * self.rows[self.places[torch.tensor(batch.rows)]]
        lengths = self.lengths(batch.prompts) if self.lengths else ()
        return Condition(condition, embeds=with_token(condition["embeds"], tokens, free_place & kept, lengths))


@dataclass(frozen=True)
class FullPrompts:
    """Those prompts whose encoding has no pad, whether they are known before the run or not."""

    tokenizers: Sequence[CLIPTokenizer]
    max_chunks: int

    def __contains__(self, prompt: object) -> bool:
        return not has_free_place(self.tokenizers, [str(prompt)], self.max_chunks)[0]


def make_clip_token(options: GuidanceOptions, rows: Sequence[Row], family: Family,
                    captions: CaptionChanges) -> ClipToken | None:
    """The token of a run, None where it is not asked for; says which captions leave no place for it."""
    if not options.guidance_token:
        return None
    assert options.guidance_features is not None, "`problems` refuses a token without features"
    features = read_features(options.guidance_features)
    texts = sorted({text for row in rows if row.repeat == 0 for text in captions.examples(row)})
    free = has_free_place(family.tokenizers, texts, family.max_chunks)
    full = [text for text, is_free in zip(texts, free, strict=True) if not is_free]
    if full:
        log.warning("%s the text encoder's whole context; their images are trained on without the "
                    "guidance token: %s", counted(len(full), "caption fills", "captions fill"), listing(full))
    endless = captions.endless
    return ClipToken(features.rows, features.places([row.digest for row in rows]),
                     FullPrompts(family.tokenizers, family.max_chunks) if endless else frozenset(full),
                     options.guidance_token_scale, options.guidance_token_dropout,
                     partial(prompt_lengths, family.tokenizers, most=family.max_chunks))


# ----------------------------------------------------------------------------------------------------------------------
# Before the run


def problems(options: GuidanceOptions, rows: Sequence[Row], width: int) -> Iterator[Problem]:
    """What keeps the token from being fed to a UNet that takes text `width` wide (its cross_attention_dim)."""
    if not options.guidance_token:
        return
    if not options.guidance_features:
        yield _no_file(rows, width)
        return
    where = f"--guidance_features {options.guidance_features}"
    try:
        features = read_features(options.guidance_features)
    except UserError as error:
        yield from error.problems
        return
    yield from (incompatible := list(incompatible_features(features.width, width, where)))
    missing = sorted({row.id for row in rows if row.digest not in features})
    if missing and not incompatible:
        fix = f"{_extract(rows, features.clip, options.guidance_features)}; it adds what is missing"
        what = f"{counted(len(missing), 'image has', 'images have')} no CLIP features"
        yield Problem(what, where, listing(missing), fix, "data")


def _no_file(rows: Sequence[Row], width: int) -> Problem:
    what, where = "--guidance_token without --guidance_features", "--guidance_token"
    if width > max(CLIPS):
        return Problem(what, where, f"it takes CLIP features as wide as the model's text, {width}{TOO_WIDE}",
                       "leave out --guidance_token, or train an SD 1.x or 2.x model")
    clip = CLIPS.get(width, f"A_CLIP_PROJECTING_TO_{width}")
    return Problem(what, where, "the token is made of the images' CLIP features, which are extracted once",
                   f"{_extract(rows, clip, FILE_NAME)}; then --guidance_features {FILE_NAME}")


def incompatible_features(have: int, width: int, where: str) -> Iterator[Problem]:
    """Features `have` wide for a UNet that takes text `width` wide."""
    if have == width:
        return
    fix = f"extract them into another file with a CLIP that fits: --clip {CLIPS[width]}" if width in CLIPS else (
        "leave the token out" if width > max(CLIPS) else f"extract them with a CLIP whose projection is {width} wide")
    yield Problem(f"CLIP features {have} wide do not fit a model whose text is {width} wide", where,
                  "the token takes the place of a text token in the UNet's cross-attention"
                  f"{TOO_WIDE if width > max(CLIPS) else ''}", fix)


def _extract(rows: Sequence[Row], clip: str, out: str) -> str:
    """The command that writes the features of these images: of the folder they are in, or of their data set."""
    folders = [row.source.parent for row in rows if isinstance(row.source, Path)]
    source = f"--images {shell_word(os.path.commonpath(folders))}" if folders else "--dataset_name NAME"
    return f"{SCRIPT} {source} --clip {shell_word(clip)} --out {shell_word(out)}"
