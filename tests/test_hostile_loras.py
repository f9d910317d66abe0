"""Files that are no LoRA, or a damaged one: each is named in one message, and nothing is half-written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from tests.support.lora_layouts import write_lora
from trainkit.errors import UserError, refuse
from trainkit.inference import lora_problems, read_embedding, unreadable
from trainkit.tools import convert_lora, generate, merge_loras, resize_lora

STEM = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
DOWN, UP, ALPHA = f"{STEM}.lora_down.weight", f"{STEM}.lora_up.weight", f"{STEM}.alpha"
A, B = torch.ones(2, 2048), torch.ones(24, 2)
GOOD = {DOWN: A, UP: B}


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE: dict[str, bytes] = {
    "empty": b"", "seven bytes": b"1234567", "zip": b"PK\x03\x04" + bytes(64), "pickle": b"\x80\x02}q\x00." + bytes(64),
    "web page": b"<!DOCTYPE html><html>not found</html>", "text": b"this is a note about my LoRA, not the LoRA\n",
    "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "image": b"\x89PNG\r\n\x1a\n" + bytes(64), "zeros": bytes(256), "huge header": (2**60).to_bytes(8, "little") + b"{",
    "header beyond the file": (4096).to_bytes(8, "little") + b"{}", "header is no JSON": raw(b"{{{{{{{{"),
    "header is a list": raw([1, 2]), "deep header": raw(b"[" * 5000), "no tensors": raw({}),
    "truncated": save(GOOD)[:-100], "too long": save(GOOD) + bytes(16),
    "overlapping tensors": raw({DOWN: entry([2], 0, 8), UP: entry([2], 4, 12)}, bytes(12)),
    "negative shape": raw({DOWN: entry([-2], 0, 8)}, bytes(8)),
    "offsets that lie": raw({DOWN: entry([1000], 0, 8)}, bytes(8)),
    "NaN": save(GOOD | {DOWN: torch.full((2, 2048), float("nan"))}),
    "infinity": save(GOOD | {UP: torch.full((24, 2), float("inf"))}),
    "integers": save({DOWN: A.int(), UP: B.int()}),
    "a checkpoint": save({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4, 3, 3)}),
    "a VAE": save({"first_stage_model.decoder.conv_in.weight": torch.ones(4, 4, 3, 3)}),
    "a ControlNet": save({"control_model.input_hint_block.0.weight": torch.ones(4, 3, 3, 3)}),
    "an embedding": save({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}),
    "OFT": save({f"{STEM}.oft_blocks": torch.ones(2, 4, 4)}),
    "GLoRA": save({f"{STEM}.a1.weight": A, f"{STEM}.a2.weight": B}),
    "Flux": save({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": A,
                  "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": B}),
    "changes of biases": save(GOOD | {f"{STEM}.diff_b": torch.ones(24)}),
    "one half": save({DOWN: A}), "ranks that differ": save({DOWN: A, UP: torch.ones(24, 3)}),
    "two alphas": save(GOOD | {ALPHA: torch.ones(2)}),
    "rank zero": save({DOWN: torch.ones(0, 2048), UP: torch.ones(24, 0)}),
    "three axes": save({DOWN: torch.ones(2, 2048, 1), UP: torch.ones(24, 2, 1)}),
    "a module nobody has": save({"lora_unet_warp_drive.lora_down.weight": A, "lora_unet_warp_drive.lora_up.weight": B}),
    "one module twice": save(GOOD | {f"{STEM}.lora_A.weight": A.clone(), f"{STEM}.lora_B.weight": B.clone()}),
    "LoHa without a part": save({f"{STEM}.hada_w1_a": B, f"{STEM}.hada_w1_b": A, f"{STEM}.hada_w2_a": B.clone()}),
    "LoKr without its block": save({f"{STEM}.lokr_w1": torch.ones(2, 2)}),
    "DoRA of another width": save(GOOD | {f"{STEM}.dora_scale": torch.ones(7, 1)}),
    "a gigantic product": save({f"{STEM}.lokr_w1": torch.ones(2**9, 2**9), f"{STEM}.lokr_w2": torch.ones(2**9, 2**9)}),
}
TOOLS: dict[str, Callable[[Path, Path, Path], object]] = {
    "merge": lambda good, bad, out: merge_loras.main([str(good), str(bad), f"--out={out}"]),
    "merge first": lambda good, bad, out: merge_loras.main([str(bad), f"{good}:0.5", "--method=ties", f"--out={out}"]),
    "resize": lambda good, bad, out: resize_lora.main([f"--lora={bad}", "--new_rank=1", f"--out={out}"]),
}


def test_there_are_thirty_and_more():
    assert len(HOSTILE) >= 30 and len({*HOSTILE.values()}) == len(HOSTILE)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_hostile_file_is_named_and_nothing_is_written(tmp_path, tool):
    good = write_lora(tmp_path / "good.safetensors", "kohya", modules=("to_k",))
    out, told = tmp_path / "out.safetensors", {}
    for name, content in HOSTILE.items():
        bad = tmp_path / f"bad-{name.replace(' ', '-')}.safetensors"
        bad.write_bytes(content)
        with pytest.raises(UserError) as caught:
            TOOLS[tool](good, bad, out)
            pytest.fail(f"{name} was taken for a LoRA")
        told[name] = f"{caught.value}"
        assert bad.name in told[name], f"{name}: {told[name]}"
        assert "next:" in told[name] and len(told[name]) < 1200, name
        bad.unlink()
        assert [path.name for path in tmp_path.iterdir()] == ["good.safetensors"], name
    assert "run code" in told["pickle"] and "git lfs pull" in told["git lfs"] and "finite" in told["NaN"]


@pytest.mark.trains
@pytest.mark.parametrize("flag", ["--lora", "--embedding"])
def test_generate_names_a_hostile_file_before_a_model_is_loaded(tiny_sdxl, tmp_path, monkeypatch, flag):
    """Each in one message; not even the folder for the images is made."""
    monkeypatch.setattr(generate, "load_pipeline", None)
    more = {"a LoRA of SD 1.x": save({f"{STEM}.lora_down.weight": torch.ones(2, 768), UP: B}),
            "狐 und (Fuchs)": b"", "of another width": save({DOWN: torch.ones(2, 77), UP: B})}
    if flag == "--lora":
        more["an embedding"] = save({"emb_params": torch.ones(2, 24)})
    else:
        more["a LoRA"] = save(GOOD)
        more |= {"an embedding": HOSTILE["NaN"], "embedding of NaN": save({"emb_params": torch.full((1, 9), math.nan)})}
    by_main = {"pickle", "huge header", "NaN", *more}  # each takes a third of a second
    for name, content in (HOSTILE | more).items():
        (bad := tmp_path / f"bad {name}.safetensors").write_bytes(content)
        with pytest.raises(UserError) as caught:
            if name in by_main:
                generate.main([f"--base={tiny_sdxl}", "--prompt=a", f"{flag}={bad}", f"--out={tmp_path / 'out'}"])
            of = ([bad], []) if flag == "--lora" else ([], [bad])
            refuse([*lora_problems(of[0], str(tiny_sdxl))] or unreadable(*of, str(tiny_sdxl)))
        problem, = caught.value.problems
        assert bad.name in f"{problem.what} {problem.where} {problem.why}" and problem.fix, name
        bad.unlink()
        assert not [*tmp_path.iterdir()], name
    (folder := tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match=r"folder.safetensors"):
        generate.main([f"--base={tiny_sdxl}", "--prompt=a", f"{flag}={folder}", f"--out={tmp_path / 'out'}"])


def test_a_pickled_embedding_comes_with_the_command_that_converts_it(tiny_sd, tmp_path, monkeypatch):
    """The command itself works on a file as A1111 writes it."""
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.nn.Parameter(torch.ones(2, 24))},
                "name": "bad", "step": 9}, file := tmp_path / "bad.pt")
    with pytest.raises(UserError) as caught:
        generate.main([f"--base={tiny_sd}", "--prompt=a", f"--embedding={file}", f"--out={tmp_path / 'out'}"])
    problem, = caught.value.problems
    code = problem.fix.partition('"')[2].removesuffix('"')
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # what the command runs
    assert read_embedding(tmp_path / "bad.safetensors").embeddings[""]["clip_l"].shape == (2, 24)


def test_a_file_that_was_there_stays_when_a_merge_fails(tmp_path):
    good = write_lora(tmp_path / "good.safetensors", "kohya", modules=("to_k",))
    (tmp_path / "bad.safetensors").write_bytes(HOSTILE["truncated"])
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    with pytest.raises(UserError):
        merge_loras.main([str(good), str(tmp_path / "bad.safetensors"), f"--out={tmp_path / 'out.safetensors'}"])
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("out", ["out.safetensors", "a/b/out.safetensors", "folder", "good.safetensors"])
def test_what_stands_in_the_way_of_the_output_is_told(tmp_path, out, monkeypatch):
    good = write_lora(tmp_path / "good.safetensors", "kohya", modules=("to_k",))
    (tmp_path / "folder").mkdir()
    if out == "out.safetensors":  # a folder that cannot be written to; root may write everywhere
        from trainkit.lora_file import file as lora_file

        def full(*given: object) -> None:
            raise OSError(28, "No space left on device", str(tmp_path / out))

        monkeypatch.setattr(lora_file, "save_tensors", full)
    before = good.read_bytes()
    for run in (lambda: merge_loras.main([str(good), str(good), f"--out={tmp_path / out}"]),
                lambda: resize_lora.main([f"--lora={good}", "--new_rank=1", f"--out={tmp_path / out}"]),
                lambda: convert_lora.main([f"--lora={good}", "--to=webui", f"--out={tmp_path / out}"])):
        with pytest.raises(UserError) as caught:
            run()
        assert Path(out).name in f"{caught.value}" and "--resume" not in f"{caught.value}"
    assert good.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {"good.safetensors", "folder"}
