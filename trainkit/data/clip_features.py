"""CLIP features of images: the file they are kept in and the CLIP they come from.

D width of the features, N images with features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainkit.data.cache import DIGEST, tensors_digest
from trainkit.errors import Problem, UserError, refuse, shell_word
from trainkit.families.pretrained import Repo, freeze, json_digest, load_part, quiet_loading, weights_digest
from trainkit.files import load_tensors, save_tensors

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


FILE_NAME = "features.safetensors"
SCRIPT = "python -m trainkit.tools extract-clip-features"  # in a clone, and where the package is installed
CLIPS = {  # width of the projection -> a CLIP that has it
    96: "assets/tiny-clip-icons", 768: "openai/clip-vit-large-patch14", 1024: "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
}
CLIP_CLASSES = {"clip": "CLIPModel", "clip_vision_model": "CLIPVisionModelWithProjection"}  # model_type -> its class
TOO_WIDE = f"; no CLIP we know projects images to more than {max(CLIPS)}"
PREPROCESSING = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
                 "do_normalize", "image_mean", "image_std")


# ----------------------------------------------------------------------------------------------------------------------
# The file of features


@dataclass(frozen=True)
class Features:
    """CLIP features of images, found by the digest of an image's content, whatever its name and place.

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
    return f"{SCRIPT} --images FOLDER --clip MODEL --out {shell_word(file)}"


# ----------------------------------------------------------------------------------------------------------------------
# The CLIP


@dataclass(frozen=True)
class Clip:
    """Images to image features after CLIP's projection, in fp32.

    made_by  as in Features
    """

    name: str
    made_by: str
    model: Any  # CLIPModel or CLIPVisionModelWithProjection
    processor: CLIPImageProcessorPil
    device: torch.device

    @property
    def width(self) -> int:
        """Of the projection."""
        return self.model.visual_projection.out_features

    def pixels(self, image: Image) -> Tensor:
        """One RGB image, preprocessed -> [3,H,W]."""
        return self.processor([image], return_tensors="pt").pixel_values[0]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """pixels [B,3,H,W] -> features [B,D] fp32 on the CPU, as the projection puts them out (not normalised)."""
        pooled = self.model.vision_model(pixels.to(self.device)).pooler_output
        return self.model.visual_projection(pooled).float().cpu()


def load_clip(name: str, flag: str = "--clip", device: torch.device | str = "cpu") -> Clip:
    """A CLIPModel or CLIPVisionModelWithProjection from a folder or the Hub. UserError where it is none."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    repo = Repo(name, flag)
    refuse(repo.unreachable("config.json"))
    config = repo.json("config.json") or {}
    if config.get("model_type") not in CLIP_CLASSES:
        refuse([repo.problem("not a CLIP model", f"its config.json says model_type {config.get('model_type')}; known: "
                             f"{', '.join(CLIP_CLASSES)}", f"{flag} {CLIPS[768]}")])
    vision = config.get("vision_config", config)
    side = vision.get("image_size", 224)
    standard = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor = CLIPImageProcessorPil.from_dict(dict(repo.json("preprocessor_config.json") or standard))
    with quiet_loading():
        model = load_part(repo, getattr(transformers, CLIP_CLASSES[config["model_type"]]), "", dtype=torch.float32,
                          use_safetensors=True)
    settings = {key: getattr(processor, key) for key in PREPROCESSING}
    made_by = json_digest(weights_digest(repo.folder(""), None), settings)
    return Clip(name, made_by, freeze(model).to(device), processor, torch.device(device))
