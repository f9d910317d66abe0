"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed into it.

Every file and folder gets the mode the umask asks for. (safetensors' own `save_file` writes 0600 whatever the umask,
huggingface/safetensors#782, so tensors are serialised to bytes and written here.)
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit.errors import Problem, UserError

Json = Any  # data that JSON holds; what shape it has, the reader and writer of each file know

DISK_ERRORS = {  # the disk's doing wherever they show
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG,
}
WRITE_ERRORS = DISK_ERRORS | {errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}  # in a write, too
IN_THE_WAY = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST}  # something else has the name
SPACE_MARGIN = 1.2  # free bytes asked for per byte about to be written
LONG_NAME = 200  # bytes; file systems take 255, and a draft's name has some more
SPACE_RESERVE = 32 * 2**20  # bytes left for logs and previews


def sha256(path: Path) -> str:
    """Digest of a whole file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names, so that a rename in it survives a power cut."""
    if os.name == "nt":  # Windows cannot open folders; NTFS journals renames itself
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder under `folder`, and `folder` itself."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` to `path`: readers see the old content or the new, never a part; a failure leaves no litter.

    An OSError names `path`, whichever of the calls here raised it.
    """
    name = path.name if len(os.fsencode(path.name)) <= LONG_NAME else path.name[: LONG_NAME // 4]
    draft = path.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with draft.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
    sync_folder(path.parent)


def write_json(path: Path, data: Json) -> None:
    atomic_write(path, (json.dumps(data, indent=1) + "\n").encode())


def read_json(path: Path) -> Json:
    return json.loads(path.read_bytes())


def read_object(path: Path) -> dict[str, Json]:
    """The JSON object in a file that is useful but not needed; {} where there is none that can be read."""
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_objects(path: Path) -> Iterator[dict[str, Json]]:
    """The JSON objects in a file with one a line; torn lines, and what else is none, are skipped. None without a file.

    Lines are cut as bytes: a power cut may leave zeros, and another program any encoding.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            yield found


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; dtypes and bits are kept, devices and strides are not. One content, one SHA-256."""
    from safetensors.torch import save

    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(flat, dict(metadata) if metadata else None)
    atomic_write(path, metadata_sorted(data) if metadata else data)


def metadata_sorted(data: bytes) -> bytes:
    """A safetensors file with its metadata by name: the library writes it in an order that changes from run to run."""
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Json] = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert isinstance(metadata, dict), "metadata of a safetensors file are an object"
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **header}, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin on a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path, device=str(device))


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def size_text(size: int) -> str:
    """`5.9 MiB`, or `17 KiB` below one."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{max(1, round(size / 2**10))} KiB"


def require_space(folder: Path, size: int) -> None:
    """Refuse to start writing `size` bytes where they would not fit."""
    needed, free = int(size * SPACE_MARGIN) + SPACE_RESERVE, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(Problem(
            what=f"no room for a checkpoint: {size_text(needed)} needed, {size_text(free)} free",
            where=str(folder), kind="disk",
            why=f"a checkpoint of {size_text(size)} must be complete before an older one may be deleted",
            fix="free some space, or give --output_dir on a larger disk; then --resume_from_checkpoint latest",
        ))


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn what a disk can do to us (full, over quota, read-only, a file in the way) into a UserError on `target`."""
    try:
        yield
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise
        raise disk_error(error, target, "write") from error


def disk_error(error: OSError, target: Path, verb: str) -> UserError:
    """What `error` means to a user who can `verb` neither `target` nor the file the error names."""
    file = Path(os.fsdecode(error.filename or target))
    name = file.name if target.is_dir() else target.name
    todo = f"move {file} away" if error.errno in IN_THE_WAY else "free some space or fix the permissions"
    return UserError(Problem(
        what=f"cannot {verb} {name}: {os.strerror(error.errno or 0)}", where=str(file), kind="disk",
        why="files that were complete before are untouched", fix=f"{todo}, then --resume_from_checkpoint latest",
    ))
