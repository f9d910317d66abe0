"""Latents encoded once: a VAE posterior (mean, log-variance) for every way an image may be seen, keyed by content.

The key covers all that the posterior depends on, so an entry is never stale: a changed image, crop, resolution,
filter, VAE or number format simply has another key.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainkit.data.batch import Sample
from trainkit.data.geometry import CropPolicy
from trainkit.data.images import load_image
from trainkit.errors import Problem, UserError
from trainkit.files import Json, disk_errors, save_tensors
from trainkit.rng import generator
from trainkit.runtime import ranks

if TYPE_CHECKING:
    from trainkit.data.batch import Row

VERSION = 2  # raise it when pixels or posteriors of the same key would come out differently
STALE_SECONDS = 86_400  # unfinished files of a killed run are swept after a day: a live one is renamed within seconds
DIGEST = "blake2b"  # name of the digest in a file's metadata
SENT_AT_ONCE = 64  # entries; those of SDXL's captions take 40 MB
VIEWS_AT_ONCE = 8  # of one image in memory; at 1024 pixels a view takes 12 MiB

EncodeImages = Callable[[Tensor], tuple[Tensor, Tensor]]  # pixels [B,3,H,W] -> mean, logvar [B,C,h,w]
Item = TypeVar("Item")
_Wanted = tuple[str, Sample]  # a view of an image, its key first


StoredTensors = dict[str, Tensor]  # named tensors


class Store(Protocol):
    """A table from keys to entries: a dict keeps them in memory for one run, a `DiskStore` in a folder for many."""

    def __contains__(self, key: object) -> bool: ...

    def __getitem__(self, key: str) -> StoredTensors: ...

    def __setitem__(self, key: str, entry: StoredTensors) -> None: ...


class DiskStore:
    """Entries in a folder, one safetensors file each, for many runs and many processes at once.

    A file appears under its name only when it is whole, and carries a digest of its tensors that every reading checks.
    Reading maps it into memory, so the store costs no RAM.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()

    def __contains__(self, key: object) -> bool:
        """Whether an intact entry is there, its tensors read and compared with their digest: a damaged one counts as
        absent and is written anew.
        """
        try:
            self._read(self._path(key))
        except _Unreadable:
            return False
        return True

    def __getitem__(self, key: str) -> StoredTensors:
        path = self._path(key)
        try:
            return self._read(path)
        except _Unreadable as error:
            raise UserError(Problem("a cache entry is gone or damaged", f"{path}", f"{error}",
                                    "start the same command again: it is rebuilt", kind="disk")) from error

    def __setitem__(self, key: str, entry: StoredTensors) -> None:
        path = self._path(key)
        with disk_errors(path):
            path.parent.mkdir(exist_ok=True)
            save_tensors(path, entry, {DIGEST: tensors_digest(entry)})

    def _read(self, path: Path) -> StoredTensors:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
                written = (file.metadata() or {}).get(DIGEST)
        except (OSError, SafetensorError) as error:
            raise _Unreadable(f"{error}") from error
        if written != tensors_digest(tensors):
            raise _Unreadable("its content is not what was written")
        return tensors

    def _path(self, key: object) -> Path:
        assert isinstance(key, str)
        return self.folder / key[:2] / f"{key}.safetensors"

    def _sweep(self) -> None:
        for draft in self.folder.glob("??/.*.tmp"):
            with suppress(FileNotFoundError):  # another process has just renamed or swept it
                if time.time() - draft.stat().st_mtime > STALE_SECONDS:
                    draft.unlink()


class _Unreadable(Exception):
    """There is no file of that name, or not the one that was written."""


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """128-bit hex digest of named tensors: names, dtypes, shapes and every byte."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def open_store(folder: str | Path | None) -> Store:
    """Where latents and text embeddings are kept: a folder shared by runs, or this process's memory."""
    return {} if folder is None else DiskStore(folder)


def content_key(*parts: Json) -> str:
    """128-bit hex digest of plain data: equal parts, equal key, on every machine and in every run."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


class Latents:
    """Sample -> the VAE's posterior for what it shows."""

    def __init__(self, store: Store, policy: CropPolicy, *, identity: Json, dtype: torch.dtype = torch.float32):
        self.store, self.policy, self.identity, self.dtype = store, policy, identity, dtype

    def key(self, sample: Sample) -> str:
        crop = [*sample.resized, sample.top, sample.left, sample.flip]
        content = [sample.row.digest, crop, self.policy.resolution, self.policy.interpolation]
        return content_key(VERSION, content, self.identity, str(self.dtype))

    def __call__(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """-> mean, logvar [C,h,w] fp32."""
        entry = self.store[self.key(sample)]
        return entry["mean"].float(), entry["logvar"].float()

    def put(self, key: str, mean: Tensor, logvar: Tensor) -> None:
        posterior = {"mean": mean, "logvar": logvar}  # copied: a slice would keep its whole batch alive
        self.store[key] = {k: v.detach().to("cpu", self.dtype, copy=True) for k, v in posterior.items()}


def cache_latents(
    rows: Sequence[Row], policy: CropPolicy, encode: EncodeImages, store: Store, *, seed: int, identity: Json,
    batch_size: int = 1, num_workers: int = 0, dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> Latents:
    """Encode every variant of every row that the store lacks; `progress(done, total)` counts those.

    `identity` is plain data that changes when the VAE does. With batch_size 1 an entry does not depend, to the last
    bit, on which others were missing, and so not on the number of processes: each of them encodes a part. Raises
    UserError naming the image when the VAE gives NaN or infinity.
    """
    latents = Latents(store, policy, identity=identity, dtype=dtype)
    wanted = list({latents.key(sample): sample for row in rows for sample in policy.variants(row, seed)}.items())
    fill = partial(_encode_missing, latents=latents, encode=encode, batch_size=batch_size, num_workers=num_workers,
                   progress=progress)
    fill_together(store, wanted, _own_part(wanted), fill)
    return latents


def fill_together(store: Store, whole: Sequence[Item], part: Sequence[Item], fill: Callable[[Sequence[Item]], object],
                  ) -> None:
    """Every rank fills the store with its part of the whole; afterwards each has all of it.

    Ranks send each other what they have in memory. On disks each looks for what it still lacks, which is nothing where
    they share the disk.
    """
    if ranks.world() == 1:
        fill(whole)
    elif isinstance(store, dict):
        before = set(store)
        fill(part)
        _exchange(store, [key for key in store if key not in before])
    else:
        fill(part)
        ranks.barrier()
        fill(whole)


def _exchange(store: dict[str, StoredTensors], new: Sequence[str]) -> None:
    """All ranks get the new entries of each; a few at once, since they are in memory several times meanwhile."""
    for start in range(0, max(ranks.gather(len(new))), SENT_AT_ONCE):
        for entries in ranks.gather({key: store[key] for key in new[start : start + SENT_AT_ONCE]}):
            store.update({key: entry for key, entry in entries.items() if key not in store})


def _own_part(wanted: Sequence[_Wanted]) -> list[_Wanted]:
    """Every world-th image, with all its views; counted over all images, since the ranks differ in what they find
    missing while others are writing.
    """
    number = {digest: i for i, digest in enumerate(dict.fromkeys(sample.row.digest for _, sample in wanted))}
    return [view for view in wanted if number[view[1].row.digest] % ranks.world() == ranks.rank()]


def _encode_missing(
    wanted: Sequence[_Wanted], *, latents: Latents, encode: EncodeImages, batch_size: int, num_workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    policy = latents.policy
    missing = [view for view in wanted if view[0] not in latents.store]
    loader = DataLoader(_Views(policy, missing), batch_size=None, collate_fn=_as_is, num_workers=num_workers,
                        generator=generator("latent cache"))  # its own: the global one must not move with the loader
    done = 0
    for views in _chunks(chain.from_iterable(unguarded(loader)), batch_size):
        for view, mean, logvar in zip(views, *encode(torch.stack([view.pixels for view in views])), strict=True):
            _refuse_nonfinite(view.name, mean, logvar)
            latents.put(view.key, mean, logvar)
        done += len(views)
        if progress:
            progress(done, len(missing))


@dataclass(frozen=True)
class _View:
    key: str
    name: str  # the row's id
    pixels: Tensor  # [3,H,W] in -1..1


class _Views(Dataset["list[_View] | UserError"]):
    """The missing variants, one item an image, so that each is decoded and resized once.

    An error is an item, see `unguarded`.
    """

    def __init__(self, policy: CropPolicy, missing: Iterable[_Wanted]):
        images: dict[str, list[_Wanted]] = {}
        for key, sample in missing:
            images.setdefault(sample.row.digest, []).append((key, sample))
        self.policy = policy
        self.items = [some for every in images.values() for some in _chunks(iter(every), VIEWS_AT_ONCE)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> list[_View] | UserError:
        keys, samples = zip(*self.items[index], strict=True)
        try:
            pixels = self.policy.views(load_image(samples[0].row), samples)  # [V,3,H,W]
        except UserError as error:
            return error
        return [_View(key, sample.row.id, view) for key, sample, view in zip(keys, samples, pixels, strict=True)]


def _refuse_nonfinite(name: str, mean: Tensor, logvar: Tensor) -> None:
    if not (mean.isfinite().all() and logvar.isfinite().all()):
        raise UserError(Problem(
            f"the VAE turns image {name} into NaN or infinity", "--cache_latents",
            "its weights are damaged, or its activations overflow the number format it runs in; nothing was cached",
            "--pretrained_vae_model_name_or_path ANOTHER_VAE", kind="nonfinite"))


def _chunks(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while chunk := list(islice(items, size)):
        yield chunk


def _as_is(item: Item) -> Item:
    """A DataLoader's collate_fn that leaves items alone."""
    return item


def unguarded(loader: DataLoader[Item | UserError]) -> Iterator[Item]:
    """The loader's items; raises the user errors among them. Its workers end with this iterator, whatever ends it.

    A data set returns a UserError as an item, because a DataLoader's worker would raise it again with its text as the
    only argument and lose kind and parts.
    """
    items = iter(loader)
    try:
        for item in items:
            if isinstance(item, UserError):
                raise item
            yield item
    finally:
        del items  # else a traceback that holds this frame keeps the workers, and forked children try to join them
