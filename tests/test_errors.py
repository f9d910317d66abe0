"""What reaches the terminal: no control characters, commands that name their file, memory errors in any words."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import ROOT
from tests.support.command_lines import read
from trainkit.errors import EXIT_CODES, Problem, UserError, exit_with_message, is_out_of_memory, printable, shell_word
from trainkit.tools import evaluate, extract_clip_features, generate

ODD = st.text(st.characters(codec=None, exclude_characters="\0"), min_size=1, max_size=12)  # lone surrogates, too


@given(ODD)
def test_what_is_printable_is_one_visible_line_that_any_file_can_hold(text):
    shown = printable(text)
    assert shown.isprintable() and printable(shown) == shown
    shown.encode("utf-8")


@pytest.mark.parametrize("text, shown", [
    ("\x1b[2Jx", r"\x1b[2Jx"), ("a\udcffb", r"a\xffb"), ("\ud800", r"\ud800"), ("\u202egnp", r"\u202egnp"),
    ("a\rb", r"a\rb"), ("naïve 猫", "naïve 猫"), ("\x9b2J", r"\x9b2J"),
])
def test_what_a_terminal_would_obey_is_spelled_out(text, shown):
    assert printable(text) == shown
    assert shown in UserError(Problem(text, text, text, text)).report()


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=1, max_size=12).filter(lambda b: b"\0" not in b))
def test_a_command_names_the_file_whatever_it_is_called(name):
    word = shell_word(os.fsdecode(name))
    assert word.isprintable()
    told = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True).stdout
    assert told == name


OUT_OF_MEMORY = [
    "CUDA out of memory. Tried to allocate 20.00 MiB.", "CUDA error: out of memory", "HIP out of memory. Tried",
    "HIP error: out of memory", "MPS backend out of memory (MPS allocated: 18.13 GB)", "XPU out of memory.",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED", "HIPBLAS_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "UR error: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
    "could not create a primitive", "could not create a memory object", "std::bad_alloc", "bad allocation: bad_alloc",
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 1",
    "[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: you tried to allocate 12 bytes.",
    "unable to mmap 100 bytes from file <x.safetensors>: Cannot allocate memory (12)", "miopenStatusAllocFailed",
    "NCCL error: unhandled cuda error, Cuda failure 'out of memory'", "cudaErrorMemoryAllocation: out of memory",
    "Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
    "Unable to find a valid cuDNN algorithm to run convolution", "GET was unable to find an engine to execute this",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "DataLoader worker (pid 4242) is killed by signal: Killed. ",
    "Error out of memory at line 380 in file /src/csrc/ops.cu", "Unable to allocate 1.5 GiB for an array",
]
OTHERS = [
    "CUDA error: an illegal memory access was encountered", "mat1 and mat2 shapes cannot be multiplied",
    "Expected memory format channels_last", "could not create a file", "size mismatch",
    "DataLoader worker (pid 4242) is killed by signal: Segmentation fault. ",
]


@pytest.mark.parametrize("words", OUT_OF_MEMORY)
def test_memory_that_ran_out_is_known_by_its_words(words):
    assert is_out_of_memory(RuntimeError(words))


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("x"), OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))], ids=type)
def test_memory_that_ran_out_is_known_by_its_class_or_number(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [*map(RuntimeError, OTHERS), OSError(errno.ENOSPC, "full"), KeyError("x")], ids=str)
def test_other_errors_are_no_lack_of_memory(error):
    assert not is_out_of_memory(error)


def test_every_program_ends_with_the_exit_code_of_memory(capsys):
    def main() -> None:
        raise RuntimeError("could not create a primitive")

    with pytest.raises(SystemExit) as ended:
        exit_with_message(main)
    assert ended.value.code == EXIT_CODES["memory"]
    assert "out of memory" in capsys.readouterr().err


def test_a_model_too_large_for_memory_is_not_called_damaged(monkeypatch):
    from trainkit.families.pretrained import Repo, load_part

    class Large(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with pytest.raises(OSError):
        load_part(Repo("folder", "--base"), Large, "unet")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "iso8859-5", "cp437"])
@pytest.mark.parametrize("program", ["train_dreambooth_lora_sdxl_advanced.py", "train_text_to_image_lora.py",
                                     "scripts/generate.py", "scripts/evaluate.py", "scripts/convert_lora.py",
                                     "scripts/inspect_lora.py",
                                     "scripts/extract_clip_features.py", "scripts/caption_images.py"])
def test_help_goes_into_a_file_of_any_encoding(tmp_path, program, encoding):
    out = tmp_path / "help"
    with out.open("wb") as file:
        done = subprocess.run([sys.executable, str(ROOT / program), "--help"], stdout=file, stderr=subprocess.PIPE,
                              env={**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C"})
    assert done.returncode == 0, done.stderr.decode()
    assert b"--" in out.read_bytes() and Path(program).name.encode() in out.read_bytes()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_printed_config_is_read_back_whatever_the_encoding(tmp_path, encoding):
    command = [sys.executable, str(ROOT / "train_dreambooth_lora_sdxl_advanced.py"), "--print_config"]
    prompt = "une photo de chère ☃ 😀"
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    first = subprocess.run([*command, "--pretrained_model_name_or_path=x", f"--instance_prompt={prompt}"],
                           capture_output=True, env=env, check=True)
    (tmp_path / "c.toml").write_bytes(first.stdout)
    again = subprocess.run([*command, f"--config={tmp_path / 'c.toml'}"], capture_output=True, text=True,
                           env={**env, "PYTHONIOENCODING": "utf-8"}, encoding="utf-8")
    assert again.returncode == 0, again.stderr
    assert f'instance_prompt = "{prompt}"' in again.stdout


BYTES = {"latin-1": "caf\udce9 TOK", "half of a pair": "TOK \ud83d", "NUL": "TOK\0"}


@pytest.mark.parametrize("text", BYTES.values(), ids=BYTES)
@pytest.mark.parametrize("flag", ["instance_prompt", "validation_prompt", "class_prompt", "output_dir", "optimizer",
                                  "instance_data_dir", "lr_scheduler", "rank", "hub_token", "optimizer_args"])
def test_a_value_that_no_file_can_hold_is_refused_by_name(flag, text):
    with pytest.raises(UserError) as refused:
        read(f"--{flag}={text}")
    told = refused.value.report()
    assert f"--{flag} cannot be" in told and "UTF-8" in told
    assert all(line.isprintable() for line in told.split("\n"))


@pytest.mark.parametrize("text", BYTES.values(), ids=BYTES)
def test_so_is_one_from_a_config_or_the_environment(tmp_path, monkeypatch, text):
    (tmp_path / "c.json").write_text(json.dumps({"validation_prompt": text}))
    with pytest.raises(UserError, match="--validation_prompt cannot be"):
        read(f"--config={tmp_path / 'c.json'}")
    if "\0" not in text and "\ud83d" not in text:  # no variable of the environment holds these
        monkeypatch.setenv("LORA_CLASS_PROMPT", text)
        with pytest.raises(UserError, match="--class_prompt cannot be"):
            read()


@pytest.mark.parametrize("text", BYTES.values(), ids=BYTES)
@pytest.mark.parametrize("tool, flag", [
    (generate, "prompt"), (generate, "negative_prompt"), (generate, "lora"), (evaluate, "prompt"),
    (evaluate, "embeddings"), (extract_clip_features, "clip")])
def test_so_does_a_tool(tmp_path, tool, flag, text):
    needed = ["--images", str(tmp_path)] if tool is extract_clip_features else ["--base", "x"]
    needed += ["--prompt=a fox"] if tool is generate else []
    with pytest.raises(UserError, match=f"--{flag} cannot be"):
        tool.main([*needed, f"--out={tmp_path / 'o.safetensors'}", f"--{flag}={text}"])
