"""The CLIP guidance token: a picture's own CLIP features stand where its caption's encoding has its last pad.

Training on pictures beside captions: Yuan et al. 2024, "Real-Fake: Effective Training Data Synthesis Through
Distribution Matching", arXiv:2310.10402. Also the file the features are kept in and the CLIP they come from.

B batch, T tokens, D width of the text and of the features, N pictures with features.
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from trainkit import rng
from trainkit.data.cache import DIGEST, tensors_digest
from trainkit.data.captions import listing
from trainkit.errors import Problem, UserError, refuse
from trainkit.families.pretrained import Repo, fingerprint, freeze, json_digest, load_part, quiet_loading
from trainkit.files import load_tensors, save_tensors

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from trainkit.data.batch import Batch
    from trainkit.data.rows import Row
    from trainkit.families import Family
    from trainkit.options import GuidanceOptions

log = logging.getLogger(__name__)

FILE_NAME = "features.safetensors"
SCRIPT = "python scripts/extract_clip_features.py"
CLIPS = {  # width of the projection -> a CLIP that has it
    96: "assets/tiny-clip-icons", 768: "openai/clip-vit-large-patch14", 1024: "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
}
KINDS = {"clip": "CLIPModel", "clip_vision_model": "CLIPVisionModelWithProjection"}  # model_type -> its class
TOO_WIDE = f"; no CLIP we know projects pictures to more than {max(CLIPS)}"
PREPROCESSING = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
                 "do_normalize", "image_mean", "image_std")

Text = tuple[Tensor, Tensor]  # embeds [B,T,D], pooled [B,P]


# ----------------------------------------------------------------------------------------------------------------------
# The file of features


@dataclass(frozen=True)
class Features:
    """CLIP features of pictures, found by the digest of a picture's content, whatever its name and place.

    rows     [N,D] fp32
    digests  one a row (trainkit.data.images.content_digest), in ascending order
    clip     the CLIP they are of, as the user named it
    made_by  digest of its weights and its preprocessing: features of two CLIPs never share a file
    """

    rows: Tensor
    digests: Sequence[str]
    clip: str
    made_by: str

    @cached_property
    def _index(self) -> dict[str, int]:
        return {digest: i for i, digest in enumerate(self.digests)}

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    def __contains__(self, digest: str) -> bool:
        return digest in self._index

    def __getitem__(self, digest: str) -> Tensor:
        """-> [D]."""
        return self.rows[self._index[digest]]

    def places(self, digests: Sequence[str]) -> Tensor:
        """Which row belongs to each digest -> [len(digests)]."""
        return torch.tensor([self._index[digest] for digest in digests], dtype=torch.long)

    def with_rows(self, more: Mapping[str, Tensor]) -> Features:
        """These and `more`, digest -> [D]; a row that is there stays."""
        new = [digest for digest in more if digest not in self]
        digests = [*self.digests, *new]
        order = sorted(range(len(digests)), key=digests.__getitem__)
        rows = torch.cat([self.rows, *(more[digest].float()[None] for digest in new)])
        return Features(rows[order], [digests[i] for i in order], self.clip, self.made_by)


def write_features(path: Path, features: Features) -> None:
    """A safetensors file of `features` [N,D] and `digests` [N,16] bytes; readers see the old file or the new one."""
    digests = torch.frombuffer(bytearray.fromhex("".join(features.digests)), dtype=torch.uint8).view(-1, 16)
    tensors = {"features": features.rows, "digests": digests}
    save_tensors(path, tensors, {
        "clip": features.clip, "made_by": features.made_by, "width": f"{features.width}",
        DIGEST: tensors_digest(tensors)})


def read_features(path: str | Path, flag: str = "--guidance_features") -> Features:
    """What `write_features` wrote, mapped into memory. UserError: the file is missing, damaged or another kind."""
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        tensors = load_tensors(file)
    except FileNotFoundError as error:
        raise UserError(Problem("no file of CLIP features there", f"{flag} {file}", f"{file} does not exist",
                                f"write it: {_command(file)}", "data")) from error
    except (OSError, SafetensorError) as error:
        raise UserError(_damaged(file, flag, f"{error}")) from error
    if not {"clip", "made_by", DIGEST} <= metadata.keys() or tensors.keys() != {"features", "digests"}:
        raise UserError(_damaged(file, flag, f"it is no file that {SCRIPT.split()[-1]} wrote"))
    if tensors_digest(tensors) != metadata[DIGEST]:
        raise UserError(_damaged(file, flag, "its content is not what was written"))
    digests = [bytes(digest).hex() for digest in tensors["digests"].numpy()]
    return Features(tensors["features"], digests, metadata["clip"], metadata["made_by"])


def _damaged(file: Path, flag: str, why: str) -> Problem:
    return Problem("the file of CLIP features cannot be read", f"{flag} {file}", why,
                   f"move it away and write it again: {_command(file)}", "data")


def _command(file: Path) -> str:
    return f"{SCRIPT} --images FOLDER --clip MODEL --out {shlex.quote(str(file))}"


# ----------------------------------------------------------------------------------------------------------------------
# The CLIP


@dataclass(frozen=True)
class Clip:
    """Pictures to image features after CLIP's projection, in fp32.

    made_by  as in Features
    """

    name: str
    made_by: str
    model: nn.Module
    processor: CLIPImageProcessorPil
    device: torch.device

    @property
    def width(self) -> int:
        """Of the projection."""
        return self.model.visual_projection.out_features

    def pixels(self, picture: Image) -> Tensor:
        """One RGB picture, preprocessed -> [3,H,W]."""
        return self.processor([picture], return_tensors="pt").pixel_values[0]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """pixels [B,3,H,W] -> features [B,D] fp32 on the CPU, as the projection puts them out (not normalised)."""
        seen = self.model.vision_model(pixels.to(self.device)).pooler_output
        return self.model.visual_projection(seen).float().cpu()


def load_clip(name: str, flag: str = "--clip", device: torch.device | str = "cpu") -> Clip:
    """A CLIPModel or CLIPVisionModelWithProjection from a folder or the Hub. UserError where it is none."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    repo = Repo(name, flag)
    refuse(repo.unreachable("config.json"))
    config = repo.json("config.json") or {}
    if config.get("model_type") not in KINDS:
        refuse([repo.problem("not a CLIP model", f"its config.json says model_type {config.get('model_type')}; known: "
                             f"{', '.join(KINDS)}", f"{flag} {CLIPS[768]}")])
    vision = config.get("vision_config", config)
    side = vision.get("image_size", 224)
    standard = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor = CLIPImageProcessorPil.from_dict(dict(repo.json("preprocessor_config.json") or standard))
    with quiet_loading():
        model = load_part(repo, getattr(transformers, KINDS[config["model_type"]]), "", dtype=torch.float32,
                          use_safetensors=True)
    settings = {key: getattr(processor, key) for key in PREPROCESSING}
    made_by = json_digest(fingerprint(repo.folder(""), None), settings)
    return Clip(name, made_by, freeze(model).to(device), processor, torch.device(device))


# ----------------------------------------------------------------------------------------------------------------------
# The token


def with_token(embeds: Tensor, tokens: Tensor, where: Tensor) -> Tensor:
    """A copy of embeds [B,T,D] whose last position is tokens [B,D] in the rows that `where` [B] names."""
    last = torch.where(where.to(embeds.device)[:, None], tokens.to(embeds), embeds[:, -1])
    return torch.cat([embeds[:, :-1], last[:, None]], dim=1)


def has_room(tokenizers: Sequence[CLIPTokenizer], prompts: Sequence[str]) -> list[bool]:
    """Whether each prompt leaves the last position to padding, for every text encoder."""
    ids = [t(list(prompts), truncation=True, max_length=t.model_max_length).input_ids for t in tokenizers]
    limits = [t.model_max_length for t in tokenizers]
    return [all(len(one) < limit for one, limit in zip(of_prompt, limits, strict=True))
            for of_prompt in zip(*ids, strict=True)]


class Guidance(Protocol):
    """What a training step asks: the text of a batch as the network is to see it.

    identity  what a checkpoint and the run that resumes it must agree on
    """

    @property
    def identity(self) -> Mapping[str, str]: ...

    def __call__(self, text: Text, batch: Batch, keys: Sequence[rng.Key]) -> Text: ...


class NoGuidance:
    """The text as it is."""

    identity: Mapping[str, str] = {}

    def __call__(self, text: Text, batch: Batch, keys: Sequence[rng.Key]) -> Text:
        return text


@dataclass(frozen=True)
class ClipGuidance:
    """The last pad of each caption's encoding becomes scale · features of the picture; nothing is changed in place.

    rows     [N,D] features
    places   [rows of the data set] -> row of features
    full     captions whose encoding has no pad: their end token stays
    dropout  share of visits without the token, so that classifier-free guidance has a branch to start from
    """

    rows: Tensor
    places: Tensor
    full: frozenset[str]
    scale: float
    dropout: float

    @cached_property
    def identity(self) -> Mapping[str, str]:
        return {"--guidance_features": tensors_digest({"features": self.rows[self.places.unique()]})}

    def __call__(self, text: Text, batch: Batch, keys: Sequence[rng.Key]) -> Text:
        embeds, pooled = text
        room = torch.tensor([prompt not in self.full for prompt in batch.prompts])
        kept = rng.uniform(keys, "guidance dropout") >= self.dropout
        places = self.places[torch.tensor([slot.row for slot in batch.slots])]
        return with_token(embeds, self.scale * self.rows[places], room & kept), pooled


def make_guidance(options: GuidanceOptions, rows: Sequence[Row], family: Family) -> Guidance:
    """The guidance of a run; says which captions leave no place for the token."""
    if not options.guidance_token:
        return NoGuidance()
    features = read_features(options.guidance_features)
    captions = sorted({caption for row in rows for caption in row.all_captions})
    full = [caption for caption, room in zip(captions, has_room(family.tokenizers, captions), strict=True) if not room]
    if full:
        log.warning("%d captions fill the text encoder's whole context; their pictures are trained on without the "
                    "guidance token: %s", len(full), listing(full))
    return ClipGuidance(features.rows, features.places([row.digest for row in rows]), frozenset(full),
                        options.guidance_token_scale, options.guidance_token_dropout)


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
    yield from (unfit := list(misfits(features.width, width, where)))
    lacking = sorted({row.id for row in rows if row.digest not in features})
    if lacking and not unfit:
        fix = f"{_extract(rows, features.clip, options.guidance_features)}; it adds what is missing"
        yield Problem(f"{len(lacking)} pictures have no CLIP features", where, listing(lacking), fix, "data")


def _no_file(rows: Sequence[Row], width: int) -> Problem:
    what, where = "--guidance_token without --guidance_features", "--guidance_token"
    if width > max(CLIPS):
        return Problem(what, where, f"it takes CLIP features as wide as the model's text, {width}{TOO_WIDE}",
                       "leave out --guidance_token, or train an SD 1.x or 2.x model")
    clip = CLIPS.get(width, f"A_CLIP_PROJECTING_TO_{width}")
    return Problem(what, where, "the token is made of the pictures' CLIP features, which are extracted once",
                   f"{_extract(rows, clip, FILE_NAME)}; then --guidance_features {FILE_NAME}")


def misfits(have: int, width: int, where: str) -> Iterator[Problem]:
    """Features `have` wide for a UNet that takes text `width` wide."""
    if have == width:
        return
    fix = f"extract them into another file with a CLIP that fits: --clip {CLIPS[width]}" if width in CLIPS else (
        "leave the token out" if width > max(CLIPS) else f"extract them with a CLIP whose projection is {width} wide")
    yield Problem(f"CLIP features {have} wide do not fit a model whose text is {width} wide", where,
                  "the token takes the place of a text token in the UNet's cross-attention"
                  f"{TOO_WIDE if width > max(CLIPS) else ''}", fix)


def _extract(rows: Sequence[Row], clip: str, out: str) -> str:
    """The command that writes the features of these pictures: of the folder they are in, or of their data set."""
    folders = [row.source.parent for row in rows if isinstance(row.source, Path)]
    source = f"--images {shlex.quote(os.path.commonpath(folders))}" if folders else "--dataset_name NAME"
    return f"{SCRIPT} {source} --clip {shlex.quote(clip)} --out {shlex.quote(out)}"
