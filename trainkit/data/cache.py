"""Latents encoded once: a VAE posterior (mean, log-variance) for every way an image may be seen, keyed by content.

The key covers all that the posterior depends on, so an entry is never stale: a changed image, crop, resolution,
filter, VAE or number format simply has another key.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainkit.data.batch import Sample
from trainkit.data.cache_uses import Use
from trainkit.data.geometry import CropPolicy
from trainkit.data.images import load_image
from trainkit.errors import Problem, UserError, shell_word
from trainkit.families.base import nonfinite_vae
from trainkit.files import Json, disk_errors, save_tensors
from trainkit.rng import generator
from trainkit.runtime import ranks

if TYPE_CHECKING:
    from trainkit.data.batch import Row

VERSION = 2  # raise it when pixels or posteriors of the same key would come out differently
STALE_SECONDS = 86_400  # unfinished files of a killed run are swept after a day: a live one is renamed within seconds
SUFFIX = ".safetensors"
PART, ENTRY = re.compile("[0-9a-f]{2}"), re.compile(r"[0-9a-f]{32}\.safetensors")  # names in a cache folder
DIGEST = "blake2b"  # name of the digest in a file's metadata
ENCODER = json.JSONEncoder(sort_keys=True)  # of keys, which a large set has many of
SENT_AT_ONCE = 64  # entries; those of SDXL's captions take 40 MB
WRITERS, MOST_PENDING = 4, 16  # threads that write entries, and entries that may wait for them
VIEWS_AT_ONCE = 8  # of one image in memory; at 1024 pixels a view takes 12 MiB

EncodeImages = Callable[[Tensor], tuple[Tensor, Tensor]]  # pixels [B,3,H,W] -> mean, logvar [B,C,h,w]
Item = TypeVar("Item")
_Wanted = tuple[str, Sample]  # a view of an image, its key first


StoredTensors = dict[str, Tensor]  # named tensors


class Store(Protocol):
    """A table from keys to entries: a dict keeps them in memory for one run, a `DiskStore` in a folder for many."""

    def keys(self) -> Collection[str]: ...

    def __contains__(self, key: object) -> bool: ...

    def __getitem__(self, key: str) -> StoredTensors: ...

    def __setitem__(self, key: str, entry: StoredTensors) -> None: ...


class DiskStore:
    """Entries in a folder, one safetensors file each, for many runs and many processes at once.

    A file appears under its name only when it is whole, and carries a digest of its tensors that every reading checks.
    What is there is known by its name alone, so a start reads no entry. Reading maps it into memory, so the store costs
    no RAM.
    """

    def __init__(self, folder: str | Path, run_dir: Path | None = None):
        """`run_dir` is the output folder of the run that uses the entries; its use is recorded in the folder."""
        self.folder = Path(folder)
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
        self.use = Use(self.folder, run_dir) if run_dir else None

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "use": None}  # for data loader workers: they only read

    def keys(self) -> set[str]:
        """Of all entries that are there now, by one look into each folder."""
        folders = (self.folder / name for name in _names(self.folder) if len(name) == 2)
        files = (name for folder in folders if folder.is_dir() for name in _names(folder))
        return {name.removesuffix(SUFFIX) for name in files if name.endswith(SUFFIX)}

    def __contains__(self, key: object) -> bool:
        return self._path(key).exists()

    def __getitem__(self, key: str) -> StoredTensors:
        """The entry. A damaged one is deleted, so that the next start writes it anew."""
        path, fix = self._path(key), "start the same command again: it is rebuilt"
        try:
            return read_entry(path)
        except UnreadableEntry as error:
            if isinstance(error, DamagedEntry) and not _deleted(path):
                fix = f"rm -- {shell_word(path)}; {fix}"
            raise UserError(Problem("a cache entry is gone or damaged", f"{path}", f"{error}", fix,
                                    kind="disk")) from error

    def __setitem__(self, key: str, entry: StoredTensors) -> None:
        path = self._path(key)
        with disk_errors(path):
            path.parent.mkdir(exist_ok=True)
            save_tensors(path, entry, {DIGEST: tensors_digest(entry)})

    def _path(self, key: object) -> Path:
        assert isinstance(key, str)
        return self.folder / key[:2] / f"{key}{SUFFIX}"

    def _sweep(self) -> None:
        for draft in self.folder.glob("??/.*.tmp"):
            with suppress(FileNotFoundError):  # another process has just renamed or swept it
                if time.time() - draft.stat().st_mtime > STALE_SECONDS:
                    draft.unlink()


class UnreadableEntry(Exception):
    """There is no file of that name, or it cannot be opened."""


class DamagedEntry(UnreadableEntry):
    """The file is not the one that was written."""


def read_entry(path: Path) -> StoredTensors:
    """The tensors of an entry. Raises UnreadableEntry and DamagedEntry."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            written = (file.metadata() or {}).get(DIGEST)
    except OSError as error:
        raise UnreadableEntry(f"{error}") from error
    except SafetensorError as error:
        raise DamagedEntry(f"{error}") from error
    if written != tensors_digest(tensors):
        raise DamagedEntry("its content is not what was written")
    return tensors


def refer(store: Store, keys: bytes | bytearray) -> bool:
    """Tell those who delete entries of a folder that this run needs these, 16 bytes each -> whether there are any such.

    What is there afterwards stays there, for the length of the run.
    """
    if not isinstance(store, DiskStore) or store.use is None:
        return False
    store.use.refer(keys)
    return True


def entry_paths(folder: Path) -> Iterator[Path]:
    """All entries of a cache folder, one look into each of its folders at a time."""
    for part in sorted(_names(folder)):
        if PART.fullmatch(part) and (folder / part).is_dir():
            yield from (folder / part / name for name in sorted(_names(folder / part)) if ENTRY.fullmatch(name))


def _names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def _deleted(path: Path) -> bool:
    """Whether the file could be deleted; it cannot in a folder that is only to be read from."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """128-bit hex digest of named tensors: names, dtypes, shapes and every byte."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def open_store(folder: str | Path | None, run_dir: Path | None = None) -> Store:
    """Where latents and text embeddings are kept: a folder shared by runs, or this process's memory."""
    return {} if folder is None else DiskStore(folder, run_dir)


def content_key(*parts: Json) -> str:
    """128-bit hex digest of plain data: equal parts, equal key, on every machine and in every run."""
    return content_key_of(parts)


def content_key_of(parts: Iterable[Json]) -> str:
    """`content_key` of parts that are made one by one, so that never all of them are in memory."""
    digest = hashlib.blake2b(b"[", digest_size=16)
    for i, part in enumerate(parts):
        digest.update(f"{ENCODER.item_separator if i else ''}{ENCODER.encode(part)}".encode())
    digest.update(b"]")
    return digest.hexdigest()


class Latents:
    """Sample -> the VAE's posterior for what it shows."""

    def __init__(self, store: Store, policy: CropPolicy, *, identity: Json, dtype: torch.dtype = torch.float32):
        self.store, self.policy, self.identity, self.dtype = store, policy, identity, dtype

    def key(self, sample: Sample) -> str:
        crop = [*sample.resized, sample.top, sample.left, sample.flip]
        height, width = sample.shape
        size = height if height == width else [height, width]
        content = [sample.row.pixels_digest, crop, size, self.policy.of(sample.row).interpolation]
        return content_key(VERSION, content, self.identity, str(self.dtype))

    def __call__(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """-> mean, logvar [C,h,w] fp32."""
        entry = self.store[self.key(sample)]
        return entry["mean"].float(), entry["logvar"].float()

    def entry(self, mean: Tensor, logvar: Tensor) -> StoredTensors:
        posterior = {"mean": mean, "logvar": logvar}  # copied: a slice would keep its whole batch alive
        return {k: v.detach().to("cpu", self.dtype, copy=True) for k, v in posterior.items()}


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
    fill_together(store, rows, own_part(rows), partial(
        _encode_missing, latents=latents, seed=seed, encode=encode, batch_size=batch_size, num_workers=num_workers,
        progress=progress))
    return latents


def _all_views(rows: Iterable[Row], latents: Latents, seed: int) -> Iterator[_Wanted]:
    for row in rows:
        for sample in latents.policy.variants(row, seed):
            yield latents.key(sample), sample


def missing_views(views: Callable[[], Iterable[_Wanted]], store: Store) -> list[_Wanted]:
    """Those that the store lacks, each once; of the others nothing is kept but their keys, for the list of uses.

    Looks again when another process has deleted entries before that list was written.
    """
    while True:
        there, keys, missing = store.keys(), bytearray(), {}
        for key, sample in views():
            keys += bytes.fromhex(key)
            if key not in there:
                missing[key] = sample
        shared = refer(store, keys)
        if not shared or set(store.keys()).issuperset(there):
            return [*missing.items()]


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


def own_part(rows: Sequence[Row]) -> list[Row]:
    """The rows of every world-th image, whether they are missing or not: while others are writing, ranks differ in what
    they find missing.
    """
    number = {digest: i for i, digest in enumerate(dict.fromkeys(row.pixels_digest for row in rows))}
    return [row for row in rows if number[row.pixels_digest] % ranks.world() == ranks.rank()]


def _encode_missing(
    rows: Sequence[Row], *, latents: Latents, seed: int, encode: EncodeImages, batch_size: int, num_workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    missing = missing_views(partial(_all_views, rows, latents, seed), latents.store)
    loader = DataLoader(_Views(latents.policy, missing), batch_size=None, collate_fn=_as_is, num_workers=num_workers,
                        generator=generator("latent cache"))  # its own: the global one must not move with the loader
    done, all_views = 0, chain.from_iterable(unguarded(loader))
    alike = (views for _, views in groupby(all_views, key=lambda view: view.pixels.shape))
    with _Writer(latents.store) as write:
        for views in chain.from_iterable(_chunks(views, batch_size) for views in alike):
            for view, mean, logvar in zip(views, *encode(torch.stack([view.pixels for view in views])), strict=True):
                _refuse_nonfinite(view.name, mean, logvar)
                write(view.key, latents.entry(mean, logvar))
            done += len(views)
            if progress:
                progress(done, len(missing))


class _Writer:
    """Puts entries into a store. A folder's are written by threads, while the next images are encoded: a disk may take
    longer to flush an entry than the VAE takes to encode it.

    Inside `with`; at its end all entries are written. An error of a thread is raised by a later call or by that end.
    """

    def __init__(self, store: Store):
        self.store, self.pending = store, deque[Future[None]]()
        self.pool = ThreadPoolExecutor(WRITERS) if isinstance(store, DiskStore) else None

    def __call__(self, key: str, entry: StoredTensors) -> None:
        if self.pool is None:
            self.store[key] = entry
            return
        self.pending.append(self.pool.submit(self.store.__setitem__, key, entry))
        while len(self.pending) > MOST_PENDING:
            self.pending.popleft().result()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.pool:
            self.pool.shutdown(wait=True)
        if error is None:
            for future in self.pending:
                future.result()


@dataclass(frozen=True)
class _View:
    key: str
    name: str  # the row's id
    pixels: Tensor  # [3,H,W] in -1..1


class _Views(Dataset["list[_View] | UserError"]):
    """The missing variants, one item an image and size, so that each is decoded and resized once for it.

    An error is an item, see `unguarded`.
    """

    def __init__(self, policy: CropPolicy, missing: Iterable[_Wanted]):
        images: dict[object, list[_Wanted]] = {}
        for key, sample in missing:
            alike = sample.row.pixels_digest, sample.resized, sample.shape, policy.of(sample.row).interpolation
            images.setdefault(alike, []).append((key, sample))
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
        raise UserError(nonfinite_vae(f"image {name}", "--cache_latents", "; nothing was cached"))


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
