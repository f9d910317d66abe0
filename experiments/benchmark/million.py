"""What a data set of very many images costs at the start: seconds of CPU and memory of each stage.

    .venv/bin/python experiments/benchmark/million.py [IMAGES] [FOLDER] [STAGE ...]

Packs IMAGES distinct images of 2x2 pixels with captions into ten WebDataset shards and into a Parquet file in FOLDER,
where they are not there already. Then every stage runs in a process of its own and gives a line of JSON. The stages:

    scan     the shards are scanned, and their index is written
    list     images and captions are listed from the index
    first    everything that a run reads before its model, every image decoded once
    again    the same once more: what was read is remembered
    parquet  as `first`, from the Parquet file
    order    the shuffle of two epochs
    prepare  what follows after the images are listed, none of them decoded: the order of the first step, dropout of
             captions, the captions to encode, and the fingerprint of the data set
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

IMAGES, FOLDER, SHARDS = 1_000_000, "runs/benchmark_million", 10


def png(number: int) -> bytes:
    """2x2 pixels that say the number."""
    colours = number.to_bytes(12, "little")
    content = zlib.compress(b"\0" + colours[:6] + b"\0" + colours[6:])
    header = struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", content), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks)


def caption(number: int) -> str:
    return f"an icon of thing number {number % 5000} in soft light"


def pack(path: Path, numbers: range) -> None:
    with tarfile.open(path, "w") as file:
        for name, content in ((f"{number:08}{ending}", content) for number in numbers
                              for ending, content in ((".png", png(number)), (".txt", caption(number).encode()))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, BytesIO(content))


def make(folder: Path, images: int) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    (folder / "shards").mkdir(parents=True, exist_ok=True)
    each = images // SHARDS
    for shard in range(SHARDS):
        path = folder / "shards" / f"{shard:03}.tar"
        if path.exists():
            continue
        pack(path.with_suffix(".part"), range(shard * each, (shard + 1) * each))
        path.with_suffix(".part").rename(path)
    if not (folder / "set.parquet").exists():
        cells = pa.array([{"bytes": png(i), "path": None} for i in range(images)],
                         pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        parquet.write_table(pa.table({"image": cells, "text": [caption(i) for i in range(images)]}),
                            folder / "set.parquet", row_group_size=10_000)


def scan(folder: Path) -> int:
    from trainkit.data.sources.shard_index import ShardIndex

    index = ShardIndex(folder)
    return len([index.add(path) for path in sorted((folder / "shards").glob("*.tar"))])


def listed(folder: Path) -> int:
    from trainkit.data.sources.shards import find_shards, list_shards

    shards = folder / "shards"
    return len(list_shards(options(folder, shards), find_shards(str(shards))).listed)


def rows(folder: Path, name: str = "shards") -> int:
    from trainkit.data.rows import read_rows

    found, problems = read_rows(options(folder, folder / name))
    assert not problems, problems
    return len(found)


def order(folder: Path) -> int:
    from trainkit.data.sampler import _shuffle

    return len([_shuffle(len_of(folder), "order", 0, epoch) for epoch in range(2)][0])


def prepare(folder: Path) -> int:
    from trainkit.data import caption_changes, sampler
    from trainkit.data.batch import Row
    from trainkit.data.sources.shards import find_shards, list_shards
    from trainkit.options import CaptionOptions
    from trainkit.run_fingerprint import contents

    shards, stages = folder / "shards", []
    listed = list_shards(options(folder, shards), find_shards(str(shards))).listed
    stages.append(("listed", peak_mib(), time.process_time()))
    rows = [Row(one.id, one.source, one.caption, (2, 2), f"{i:032x}") for i, one in enumerate(listed)]
    del listed
    captions = CaptionOptions(caption_dropout_rate=0.1)
    rows, _ = caption_changes.finished(rows, captions)
    stages.append(("rows", peak_mib(), time.process_time()))
    order = sampler.make_order(rows, 4, batch_size=4, seed=0)
    next(iter(order.slots(0, sampler.Shard(0, 1))))
    stages.append(("order", peak_mib(), time.process_time()))
    changes = caption_changes.make_changes(captions, rows, seed=0, live=False)
    len([*changes.announced(rows)])
    stages.append(("captions", peak_mib(), time.process_time()))
    contents(rows)
    stages.append(("fingerprint", peak_mib(), time.process_time()))
    print(json.dumps(stages), flush=True)
    return len(rows)


def len_of(folder: Path) -> int:
    return int((folder / "images").read_text("utf-8"))


def options(folder: Path, name: Path):  # type: ignore[no-untyped-def]
    from trainkit.options import CaptionedDataOptions

    return CaptionedDataOptions(dataset_name=str(name), latent_cache_dir=str(folder), cache_dir=str(folder / "hf"),
                                resolution=2)


STAGES: dict[str, Callable[[Path], int]] = {
    "scan": scan, "list": listed, "first": rows, "again": rows, "parquet": lambda folder: rows(folder, "set.parquet"),
    "order": order, "prepare": prepare,
}


def peak_mib() -> int:
    """Of the resident memory of this program; getrusage's would be that of the program that started it, if larger."""
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def measure(folder: Path, stage: str) -> None:
    from trainkit.data import rows as imported  # noqa: F401, imports are not timed

    before = peak_mib()
    clock, cpu = time.perf_counter(), time.process_time()
    count = STAGES[stage](folder)
    print(json.dumps({
        "stage": stage, "count": count, "cpu_seconds": round(time.process_time() - cpu, 1),
        "seconds": round(time.perf_counter() - clock, 1), "mib_before": before, "peak_mib": peak_mib()}),
        flush=True)


def main() -> None:
    given = sys.argv[1:]
    if given[:1] == ["--stage"]:
        return measure(Path(given[1]), given[2])
    images, folder = int(given[0]) if given else IMAGES, Path(given[1] if len(given) > 1 else FOLDER).absolute()
    make(folder, images)
    (folder / "images").write_text(f"{images}", "utf-8")
    environment = os.environ | {"XDG_CACHE_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    for stage in given[2:] or STAGES:
        subprocess.run([sys.executable, __file__, "--stage", str(folder), stage], env=environment, check=True)
    return None


if __name__ == "__main__":
    main()
