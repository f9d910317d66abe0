"""Files that others wrote are a value or one ValueError: no traceback, whatever they hold."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import ROOT
from tests.support.command_lines import read
from trainkit import publish
from trainkit.errors import UserError
from trainkit.families.pretrained import Repo
from trainkit.reading import MOST_BYTES, MOST_DEPTH, parse_json, parse_toml, parse_yaml, read_text
from trainkit.tools import evaluate, extract_clip_features

DEEP = {
    ".json": ["[" * 50_000, '{"a":' * 50_000, "[" * 900 + "]" * 900, '{"a":' * 70 + "1" + "}" * 70],
    ".toml": ["a = " + "[" * 5_000, "a = " + "[" * 200 + "]" * 200, ".".join("a" * 200) + " = 1",
              "a = " + "{b=" * 3_000],
    ".yaml": ["a: " + "[" * 3_000, "a: " + "[" * 200 + "]" * 200, "- " * 2_000 + "a", "a: &a [*a]",
              "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]\n" for i in range(9))],
}
ODD = [b"\xff\xfe{}", b"\x00\x01", b"", b"caf\xe9: 1", b"\xef\xbb\xbf\xff", b"[1, 2", b"!!binary x", b"? [a]\n: b",
       b"a: !!python/object:os.system x", b"a: 2024-99-99", b"!!int x", b"!!bool x", b"- !!map x", b"\t- a", b"%YAML 9"]


@pytest.mark.parametrize("kind, text", [(kind, text) for kind, texts in DEEP.items() for text in texts])
def test_a_config_nested_too_deep_is_named(tmp_path, kind, text):
    file = tmp_path / f"c{kind}"
    file.write_text(text)
    with pytest.raises(UserError, match="cannot read the config file"):
        read(f"--config={file}")


@pytest.mark.parametrize("data", ODD, ids=repr)
@pytest.mark.parametrize("kind", [".json", ".toml", ".yaml", ".yml"])
def test_a_config_of_odd_bytes_is_named_or_read(tmp_path, kind, data):
    file = tmp_path / f"c{kind}"
    file.write_bytes(data)
    try:
        read(f"--config={file}")
    except UserError as refused:
        assert str(file) in refused.report() or f"c{kind}" in refused.report()


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_value_or_a_value_error(data):
    for parse in (parse_json, parse_toml, parse_yaml):
        try:
            parse(data.decode("utf-8"))
        except ValueError:  # of UTF-8, too
            pass


@given(st.text(st.sampled_from('[]{}:,"!&*<-?| \n\tab01e=#%@`\''), max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_marks_are_a_value_or_a_value_error(text):
    for parse in (parse_json, parse_toml, parse_yaml):
        try:
            parse(text)
        except ValueError:
            pass


def test_what_is_not_too_deep_is_read():
    text = "[" * MOST_DEPTH + "]" * MOST_DEPTH
    assert parse_json(text) == json.loads(text) and parse_yaml("a: [1, {b: c}]") == {"a": [1, {"b": "c"}]}


def test_a_file_too_large_is_not_read_whole(tmp_path):
    file = tmp_path / "large.json"
    with file.open("wb") as opened:
        opened.truncate(MOST_BYTES * 50)  # a hole: no bytes on the disk
    with pytest.raises(ValueError, match="larger than"):
        read_text(file)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])  # the last one is that of PowerShell 5's `>`
def test_a_config_as_windows_writes_it_is_read(tmp_path, encoding):
    (tmp_path / "c.toml").write_text("rank = 7\n", encoding)
    assert read(f"--config={tmp_path / 'c.toml'}").lora.rank == 7


@pytest.mark.parametrize("text", [*DEEP[".json"], "[1]", "nothing", '"x"', "\ufeff{}"])
def test_a_json_file_of_a_model_is_an_object_or_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text, "utf-8")
    with pytest.raises(UserError, match="config.json is damaged"):
        Repo(str(tmp_path), "--base").json("config.json")
    assert Repo(str(tmp_path), "--base").glance("config.json") == {}


CARDS = {
    "deep": b"---\na: " + b"[" * 5_000 + b"\n---\n", "odd bytes": b"---\nlicense: caf\xe9\n---\n", "nothing": b"",
    "UTF-16": "---\nlicense: mit\n---\n".encode("utf-16"), "aliases": b"---\na: &a [*a, *a]\nb: *a\n---\n",
    "a number": b"---\nlicense: 3\n---\n", "a list": b"---\n- a\n---\n", "large": b"---\n" + b"#" * (MOST_BYTES + 1),
    "unclosed": b"---\nlicense: [mit\n---\n", "a date": b"---\nlicense: 2024-99-99\n---\n", "NUL": b"---\n\0: 1\n---\n",
}


@pytest.mark.parametrize("data", CARDS.values(), ids=CARDS)
def test_the_card_of_the_base_model_never_stops_the_end_of_a_run(tmp_path, data):
    (tmp_path / "README.md").write_bytes(data)
    assert publish.licence_of(SimpleNamespace(base_path=str(tmp_path), base_model="x")) is None


def test_a_licence_is_read(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert publish.licence_of(SimpleNamespace(base_path=str(tmp_path), base_model="x")) == "mit"


@pytest.mark.parametrize("data", [b'{"file_name":"a.png","img_features":"caf\xe9.pt"}\n', b"[" * 50_000, b"3\n"])
def test_metadata_of_legacy_features_is_named(tmp_path, data):
    (tmp_path / "metadata.jsonl").write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        extract_clip_features.in_metadata(Path(tmp_path))


@pytest.mark.parametrize("data", [b'{"noun":"caf\xe9"}\n', b"[" * 50_000])
def test_metadata_of_real_images_is_named(tmp_path, data):
    (tmp_path / "metadata.jsonl").write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        evaluate.read_reference(Path(tmp_path))


CLIP_FAULTS = {
    "pickled weights": lambda clip: (clip / "model.safetensors").rename(clip / "pytorch_model.bin"),
    "no weights": lambda clip: (clip / "model.safetensors").unlink(),
    "cut weights": lambda clip: (clip / "model.safetensors").write_bytes(
        (clip / "model.safetensors").read_bytes()[:5_000]),
    "no config": lambda clip: (clip / "config.json").unlink(),
    "config of a text": lambda clip: (clip / "config.json").write_text("[" * 50_000),
    "another width": lambda clip: (clip / "config.json").write_text(
        (clip / "config.json").read_text().replace('"hidden_size": ', '"hidden_size": 2')),
    "no preprocessor": lambda clip: (clip / "preprocessor_config.json").unlink(),
    "no mean": lambda clip: (clip / "preprocessor_config.json").write_text('{"image_mean": [1], "image_std": 3}'),
}


@pytest.mark.parametrize("fault", CLIP_FAULTS)
def test_a_judge_that_cannot_be_loaded_is_refused_before_anything_is_drawn(tmp_path, fault):
    import shutil

    clip = Path(shutil.copytree(ROOT / "assets/tiny-clip-icons", tmp_path / "clip"))
    CLIP_FAULTS[fault](clip)
    found = [*evaluate.clip_problems(clip)]
    assert len(found) == 1 and "--clip" in found[0].where


def test_the_shipped_judge_is_fine():
    assert not [*evaluate.clip_problems(ROOT / "assets/tiny-clip-icons")]
