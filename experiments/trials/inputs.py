"""What a run reads and what it gives away: hostile images and names, pickles, paths out of the folder, NaN, secrets."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from experiments.trials import Bench, Patch, Result, last_line
from tests.support import ROOT
from tests.support.command_lines import read, read_captioned
from tests.support.trainers import Done
from trainkit.data.images import UnreadableImage, decode
from trainkit.errors import EXIT_CODES, UserError
from trainkit.tools import generate

HOSTILE, NAMES = 10_000, 60

# ----------------------------------------------------------------------------------------------------------------------
# Images


def picture(chance: random.Random, mode: str = "RGB") -> Image.Image:
    side = chance.randint(8, 96), chance.randint(8, 96)
    image = Image.frombytes("RGB", side, chance.randbytes(3 * side[0] * side[1]))
    return image.convert(mode)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_of(width: int, height: int, *more: bytes) -> bytes:
    """A PNG whose header promises a size that its data do not hold."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + png_chunk(b"IDAT", zlib.compress(b"\0")) + \
        png_chunk(b"IEND", b"")


def cut(chance: random.Random, data: bytes) -> bytes:
    return data[:chance.randrange(1, len(data))]


def flipped(chance: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, 20)):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAKERS: dict[str, Callable[[random.Random], bytes]] = {
    "cut": lambda c: cut(c, saved(picture(c), c.choice(KINDS))),
    "bits flipped": lambda c: flipped(c, saved(picture(c), c.choice(KINDS))),
    "noise": lambda c: c.randbytes(c.randint(0, 4000)),
    "a kind under the name of another": lambda c: saved(picture(c), c.choice(KINDS)),
    "a page of HTML": lambda c: b"<!doctype html><script>alert(1)</script>" * c.randint(1, 50),
    "zeros": lambda c: bytes(c.randint(1, 5000)),
    "a header of a huge image": lambda c: png_of(c.choice((2**31 - 1, 100_000, 1)), c.choice((2**31 - 1, 100_000))),
    "a text that unpacks to 100 MB": lambda c: png_of(8, 8, png_chunk(
        b"zTXt", b"x\0\0" + zlib.compress(bytes(100_000_000), 9) if c.random() < 0.03 else b"x\0\0" + b"\xff" * 50)),
    "a broken colour profile": lambda c: saved(picture(c), "JPEG", icc_profile=c.randbytes(c.randint(1, 3000))),
    "broken EXIF": lambda c: saved(picture(c), "JPEG", exif=b"Exif\0\0" + c.randbytes(c.randint(1, 200))),
    "an odd mode": lambda c: saved(picture(c, c.choice(("1", "L", "P", "CMYK", "I", "F", "LA", "RGBA"))), "TIFF"),
    "several frames": lambda c: saved(picture(c), "GIF", save_all=True, append_images=[picture(c)] * 3),
    "one pixel wide": lambda c: saved(Image.new("RGB", (1, c.choice((1, 7, 3000)))), "PNG"),
    "a pickle": lambda c: pickle.dumps({"weights": [c.random()]}),
    "an archive": lambda c: b"PK\x03\x04" + c.randbytes(500),
}


def hostile_images(bench: Bench, result: Result) -> None:
    """10,000 image files have 15 kinds of damage. Each must be decoded to a plain RGB image, or refused in one
    sentence.
    """
    chance, kinds = random.Random(2), [*MAKERS]
    for number in range(HOSTILE):
        kind = kinds[number % len(kinds)]
        data, begun, why = MAKERS[kind](chance), time.monotonic(), ""
        try:
            image = decode(data)
            went_on, refused = image.mode == "RGB" and min(image.size) >= 1, False
        except UnreadableImage as error:
            went_on, refused = False, bool(str(error)) and "\n" not in str(error)
        except Exception as error:  # a crash of any other kind is what this trial looks for
            went_on, refused, why = False, False, f"{type(error).__name__}: {error}"
        result.largest("seconds for one file", time.monotonic() - begun)
        result.count(f"{kind}, file {number}", went_on=went_on, refused=refused, why=why)
    result.largest("peak memory of the whole process, MiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def hostile_folder(bench: Bench, result: Result) -> None:
    """60 such files are put among six good images. The trainer must name every file that it cannot read, and stop. Only
    files that cannot be read are attempts. The others can be read in spite of the damage.
    """
    chance, folder = random.Random(3), bench.fresh("hostile") / "data"
    shutil.copytree(bench.data, folder)
    bad = []
    for number, kind in enumerate([*MAKERS] * 4):
        path = folder / f"h{number:02d}.{chance.choice(('png', 'jpg', 'webp'))}"
        path.write_bytes(MAKERS[kind](chance))
        try:
            decode(path.read_bytes())
        except UnreadableImage:
            bad.append(path)
    while bad:
        done = bench.run(bench.fresh("hostile_out"), instance_data_dir=folder)
        named = [path for path in bad if path.name in done.output]
        for path in named:
            path.unlink()
            result.count(path.name, refused=done.code == EXIT_CODES["data"])
        if not named:
            result.count(f"{len(bad)} files", why=f"named in no message: exit {done.code}, {last_line(done.output)}")
            break
        bad = [path for path in bad if path not in named]


# ----------------------------------------------------------------------------------------------------------------------
# Names


ODD_NAMES = (
    "new\nline", "tab\there", "bell\a", "esc\x1b[31mred", "back\bspace", "carriage\rreturn", "  blanks  ", "trailing.",
    "-rf", "--output_dir=x", "$(touch CANARY)", "`touch CANARY`", "a;touch CANARY", "a|touch CANARY", "a&b", "a>b",
    "'q'", '"q"', "%s%n%d", "{0.__class__}", "<b>bold", "[link](x)", "![i](x)", "* _ ~ #", "| t |",
    "日本語", "é", "e\u0301", "🦊", "\u202egnp", "\u200b", "ß", "İ", "ﬁ", "Ω", "\x7f", "\u2028", "CON", "nul",
    "a:b", "a?b", "a*b", "a\\b", "x" * 250, "é" * 120, "...", "~", "#", "@500", "=", "+", "!", "metadata",
    "checkpoint-1", "latest", "__init__", "None", "NaN", "0", "1e5",
)


def hostile_names(bench: Bench, result: Result) -> None:
    """Images and their captions have 60 odd names. Each must be trained on, refused, or listed as not read. No name may
    be run as a command.
    """
    assert len(ODD_NAMES) == NAMES
    for name in ODD_NAMES:
        folder, out = bench.fresh("names") / "data", bench.fresh("names_out")
        folder.mkdir(parents=True)
        for stem in (name, "good"):
            shutil.copy(next(bench.data.glob("*.png")), folder / f"{stem}.png")
            (folder / f"{stem}.txt").write_text("a TOK icon", "utf-8")
        done = bench.run(out, instance_data_dir=folder, max_train_steps=1)
        safe = not [*ROOT.glob("CANARY"), *folder.glob("CANARY")] and "\x1b[31m" not in done.output
        result.count(repr(name)[:40], went_on=safe and done.code == 0 and "2 captions" in done.output,
                     refused=safe and (done.code == EXIT_CODES["data"] or "1 file not read" in done.output),
                     why=f"exit {done.code}, {last_line(done.output)}")


def escapes(bench: Bench, result: Result) -> None:
    """The metadata names a file outside the data folder in 60 ways. All must be refused, and the file never opened."""
    secret = bench.fresh("secret") / "private.png"
    secret.parent.mkdir()
    shutil.copy(next(bench.data.glob("*.png")), secret)
    name = secret.parent.name
    ways = [f"../{name}/private.png", f"{secret}", f"file://{secret}", f"x/../../{name}/private.png", f"//{secret}",
            f"./../{name}/./private.png", f"..\\{name}\\private.png", f"{secret}\0.png",
            f"good.png/../../{name}/private.png", f"{secret.parent}/./private.png"]
    tables = ("metadata.jsonl", "metadata.csv", "metadata.tsv")
    for trainer in ("train_dreambooth_lora_sdxl_advanced", "train_text_to_image_lora"):
        for table in tables:
            for way in ways:
                folder = bench.fresh("escape")
                folder.mkdir()
                shutil.copy(next(bench.data.glob("*.png")), folder / "good.png")
                write_table(folder / table, ("good.png", way))
                said, opened = reading(trainer, folder, secret)
                result.count(f"{way!r} in {table}", refused=said is not None and not opened,
                             why=f"opened {opened}, refused {said}")


def write_table(path: Path, names: tuple[str, ...]) -> None:
    if path.suffix == ".jsonl":
        lines = [json.dumps({"file_name": name, "text": "words"}) for name in names]
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [mark.join(("file_name", "text")), *(mark.join((name, "words")) for name in names)]
    path.write_text("\n".join(lines) + "\n", "utf-8")


watching: list[str] = []  # paths that were opened while `reading` looked


def reading(trainer: str, folder: Path, secret: Path) -> tuple[str | None, bool]:
    """(what the trainer's reading of a folder refused, whether the secret file was opened)."""
    from trainkit.data.rows import read_rows

    if not watching:
        sys.addaudithook(lambda event, args: watching.append(str(args[0])) if event == "open" else None)
    captioned = trainer == "train_text_to_image_lora"
    data = (read_captioned(f"--train_data_dir={folder}") if captioned else read(f"--instance_data_dir={folder}")).data
    watching[:] = ["watched"]
    try:
        rows, problems = read_rows(data)
    except UserError as error:
        rows, problems = [], error.problems
    opened = any(Path(os.fsdecode(path)).resolve() == secret.resolve() for path in watching[1:])
    outside = any("private" in row.id or "linked" in row.id for row in rows)
    return (problems[0].what if problems and not outside else None), opened


# ----------------------------------------------------------------------------------------------------------------------
# Pickles


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def pickles(bench: Bench, result: Result) -> None:
    """A pickle is a file that can run code when it is read. It stands where weights, features or states should be. It
    must never be unpickled.
    """
    canary = bench.folder / "unpickled"
    data = pickle.dumps(Touch(canary))
    zipped = io.BytesIO()
    torch.save(Touch(canary), zipped)
    for what, place in WHERE.items():
        for kind, content in (("pickle", data), ("torch.save", zipped.getvalue())):
            canary.unlink(missing_ok=True)
            code, said = place(bench, content)
            clean = not canary.exists()
            result.count(f"{kind} as {what}", went_on=clean and code == 0,
                         refused=clean and code in (EXIT_CODES["usage"], EXIT_CODES["data"], EXIT_CODES["disk"]),
                         why=f"unpickled: {not clean}, exit {code}, {said}")


Place = Callable[[Bench, bytes], tuple[int, str]]  # puts a pickle somewhere and reads there -> (exit code, message)


def instead_of(part: str, name: str) -> Place:
    """As the weights of a part of the base model."""
    def place(bench: Bench, content: bytes) -> tuple[int, str]:
        model = bench.fresh("pickled_model")
        shutil.copytree(bench.model, model)
        for weights in (model / part).glob("*.safetensors"):
            weights.unlink()
        (model / part / name).write_bytes(content)
        return ended(bench.run(bench.fresh("pickled"), pretrained_model_name_or_path=model, max_train_steps=1))

    return place


def in_checkpoint(name: str) -> Place:
    """As a file of the checkpoint that a run resumes from."""
    def place(bench: Bench, content: bytes) -> tuple[int, str]:
        out = bench.fresh("pickled")
        bench.run(out, max_train_steps=2, checkpointing_steps=1, stop_after_steps=1)
        (out / "checkpoint-1" / name).write_bytes(content)
        return ended(bench.resume(out, max_train_steps=2, checkpointing_steps=1))

    return place


def to_generate(flag: str, name: str) -> Place:
    """As a file of weights for the tool that generates images."""
    def place(bench: Bench, content: bytes) -> tuple[int, str]:
        file = bench.folder / name
        file.write_bytes(content)
        sys.argv = ["generate", f"--base={bench.model}", f"{flag}={file}", "--prompt=an icon", "--steps=1",
                    "--width=32", "--height=32", f"--out={bench.fresh('pickled')}"]
        try:
            generate.main()
        except UserError as error:
            return error.exit_code, error.problems[0].what
        except SystemExit as stop:
            return int(stop.code or 0), ""
        return 0, ""

    return place


def as_features(bench: Bench, content: bytes) -> tuple[int, str]:
    """As the features of --guidance_features."""
    file = bench.folder / "features.pt"
    file.write_bytes(content)
    return ended(bench.run(bench.fresh("pickled"), guidance_token=8.0, guidance_features=file, max_train_steps=1))


UNET_WEIGHTS, TEXT_WEIGHTS = "diffusion_pytorch_model", "model"
WEIGHTS_OF = {"unet": UNET_WEIGHTS, "vae": UNET_WEIGHTS, "text_encoder": TEXT_WEIGHTS, "text_encoder_2": TEXT_WEIGHTS}
STATES = ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "adapters.safetensors", "state.json", "model.pt")
WHERE: dict[str, Place] = {
    **{f"{part}/{name}.safetensors": instead_of(part, f"{name}.safetensors") for part, name in WEIGHTS_OF.items()},
    **{f"{part}/{name}.bin": instead_of(part, f"{'pytorch_' if name == TEXT_WEIGHTS else ''}{name}.bin")
       for part, name in WEIGHTS_OF.items()},
    **{f"checkpoint/{name}": in_checkpoint(name) for name in STATES},
    **{f"generate {flag} evil{suffix}": to_generate(flag, f"evil{suffix}") for flag in ("--lora", "--embeddings")
       for suffix in (".pt", ".bin", ".safetensors")},
    "--guidance_features": as_features,
}


def ended(done: Done) -> tuple[int, str]:
    return done.code, last_line(done.output)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers that are none


def nonfinite(bench: Bench, result: Result) -> None:
    """A network or a gradient gives NaN or infinity, or the learning rate is 100. No such number may reach a file of
    weights.
    """
    for name, patch in injections().items():
        out = bench.fresh("nonfinite")
        flags: dict[str, object] = {"learning_rate": 100.0} if "rate" in name else {}
        done = bench.run(out, patch=patch, max_train_steps=20, cache_latents="cached" in name, **flags)
        files = [*out.rglob("*.safetensors")]
        clean = all(torch.isfinite(tensor).all() for file in files for tensor in load_file(file).values())
        result.count(name, went_on=clean and done.code == 0, refused=clean and done.code == EXIT_CODES["nonfinite"],
                     why=f"finite files: {clean}, exit {done.code}, {last_line(done.output)}")


def injections() -> dict[str, Patch]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    def encode(value: float) -> Patch:
        def patch() -> None:
            real = AutoencoderKL._encode
            AutoencoderKL._encode = lambda self, pixels: real(self, pixels) * value
        return patch

    nan, inf, unet = float("nan"), float("inf"), UNet2DConditionModel
    return {
        "UNet gives NaN once": spoil(unet, nan, lambda n: n == 3),
        "UNet gives infinity once": spoil(unet, inf, lambda n: n == 3),
        "UNet gives NaN from the third step on": spoil(unet, nan, lambda n: n >= 3),
        "UNet gives infinity from the third step on": spoil(unet, inf, lambda n: n >= 3),
        "gradient is NaN once": spoil(unet, nan, lambda n: n == 4, backward=True),
        "gradient is infinite once": spoil(unet, inf, lambda n: n == 4, backward=True),
        "gradient is NaN from the start": spoil(unet, nan, lambda n: True, backward=True),
        "VAE gives NaN": encode(nan),
        "VAE gives NaN, latents cached": encode(nan),
        "VAE gives infinity, latents cached": encode(inf),
        "text encoder gives NaN": spoil(CLIPTextModel, nan, lambda n: True),
        "learning rate of 100": lambda: None,
    }


def spoil(network: type, value: float, calls: Callable[[int], bool], backward: bool = False) -> Patch:
    """In the child: the network's answers, or the gradients that reach them, times `value` in chosen calls from 1."""
    def patch() -> None:
        real, count = network.forward, 0

        def spoiled(self: object, *args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            answer = real(self, *args, **kwargs)
            if calls(count) and backward and answer[0].requires_grad:
                answer[0].register_hook(lambda gradient: gradient * value)
            elif calls(count) and not backward:
                answer[0].data.mul_(value)
            return answer

        network.forward = spoiled

    return patch


# ----------------------------------------------------------------------------------------------------------------------
# Secrets


SECRETS = {
    "Hugging Face": "hf_" + "aZ3" * 11, "GitHub": "ghp_" + "aZ3" * 12, "GitLab": "glpat-AbCdEf-0123456789xy",
    "OpenAI": "sk-proj-" + "aZ3" * 14, "AWS": "AKIAABCDEFGHIJKLMNOP", "W&B": "0a1b2c3d4e" * 4,
    "a password in an address": "https://bob:S3cretS3cret@host.example/model",
    "a signed address": "https://b.example/k?X-Amz-Signature=S3cretS3cret",
}
PLACES = ("--revision", "--hub_token", "--validation_prompt", "--instance_prompt", "environment", "a caption")


def secrets(bench: Bench, result: Result) -> None:
    """A run that logs to TensorBoard gets eight kinds of secrets in six places. None may be in a file or on the
    terminal. The W&B key stands beside its name, because 40 hexadecimal digits alone may be the number of a
    commit.
    """
    for kind, secret in SECRETS.items():
        for place in PLACES:
            out, data, flags = bench.fresh("secret_run"), bench.data, {}
            plain = place in ("environment", "--hub_token")  # elsewhere 40 hexadecimal digits alone may be a commit
            text = f"WANDB_API_KEY={secret}" if kind == "W&B" and not plain else secret
            if place == "a caption":
                data = bench.fresh("secret_data")
                shutil.copytree(bench.data, data)
                write_table(data / "metadata.jsonl", tuple(sorted(path.name for path in data.glob("*.png"))))
                words = (data / "metadata.jsonl").read_text("utf-8").replace('"words"', json.dumps(f"TOK {text}"))
                (data / "metadata.jsonl").write_text(words, "utf-8")
            elif place.startswith("--"):
                flags = {place[2:]: f"TOK {text}" if "prompt" in place else text}
            variables = {"WANDB_API_KEY": secret} if place == "environment" else {}
            done = bench.run(out, patch=lambda variables=variables: os.environ.update(variables), max_train_steps=1,
                             instance_data_dir=data, checkpointing_steps=1, report_to="tensorboard",
                             num_validation_images=1, **flags)
            needle = "S3cretS3cret" if "S3cret" in secret else secret
            where = [path.relative_to(out).as_posix() for path in out.rglob("*")
                     if path.is_file() and needle.encode() in path.read_bytes()]
            where += ["the terminal"] if needle in done.output else []
            result.count(f"{kind} in {place}", went_on=not where and done.code == 0,
                         refused=not where and done.code == EXIT_CODES["usage"],
                         why=f"found in {where}, exit {done.code}, {last_line(done.output)}")


TRIALS = (hostile_images, hostile_folder, hostile_names, escapes, pickles, nonfinite, secrets)
