"""Random BLIP and Florence-2 models, and a tagger of one matrix, small enough for every test."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import torch

BLIP_WORDS = ["a", "an", "the", "of", "on", "with", "photo", "red", "green", "blue", "dog", "cat", "house", "white"]
SIDE = 32  # pixels
TAGS = (  # name, category, and its part of red, green, blue and 1 in the upper half of an image, in levels of 255
    ("general", 9, (0, 0, 0, 1)),
    ("red_sky", 0, (1, -1, -1, 0)), ("green_sky", 0, (-1, 1, -1, 0)), ("blue_sky", 0, (-1, -1, 1, 0)),
    ("light", 0, (1, 1, 1, -2.5)), ("^_^", 0, (1, -1, -1, -0.99)), ("hero_(story)", 4, (1, -1, -1, -0.9)),
)


def build_tiny_blip(folder: Path) -> Path:
    """In the files of the models on the Hub. As there, the tokenizer does not know the token that begins a caption."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *BLIP_WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    width = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(vocabulary) + 1, "max_position_embeddings": 64, "encoder_hidden_size": 16,
            "bos_token_id": len(vocabulary), "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    vision = {"image_size": SIDE, "patch_size": 8, "initializer_range": 0.5}
    config = BlipConfig(text_config=width | text, vision_config=width | vision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BlipForConditionalGeneration(config).save_pretrained(folder)
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def build_tiny_florence(folder: Path) -> Path:
    """Its tokenizer spells every word, byte by byte; an image takes two places in the text."""
    from transformers import BartTokenizer, Florence2Config, Florence2ForConditionalGeneration
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + k) for k in range(256 - len(printable))]
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *symbols, "<mask>", "<image>"]
    tokenizer = BartTokenizer(vocab={word: k for k, word in enumerate(vocabulary)}, merges=[],
                              extra_special_tokens={"image_token": "<image>"})
    config = Florence2Config(
        text_config={"model_type": "bart", "vocab_size": len(vocabulary), "d_model": 16, "encoder_layers": 1,
                     "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                     "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 256, "bos_token_id": 0,
                     "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
                     "init_std": 0.5},
        vision_config={"depths": (1, 1), "patch_size": (7, 3), "patch_stride": (8, 4), "patch_padding": (3, 1),
                       "patch_prenorm": (False, True), "embed_dim": (8, 16), "num_heads": (2, 2), "num_groups": (2, 2),
                       "window_size": 4, "projection_dim": 16, "max_position_embeddings": 8,
                       "max_temporal_embeddings": 4, "initializer_range": 0.5},
        image_token_id=tokenizer.image_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Florence2ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, image_seq_length=2).save_pretrained(folder)
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# A tagger: sigmoid of a matrix times the mean colour of the upper half, in the files of the WD taggers


def build_tiny_tagger(folder: Path, *, batch: int | str = "batch", outputs: str = "Sigmoid") -> Path:
    """A graph for `batch` images at once, "batch" for any number; its last node is `outputs`."""
    folder.mkdir(parents=True)
    lines = [f"{k},{name},{category},{100 - k}" for k, (name, category, _) in enumerate(TAGS)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *lines]) + "\n", "utf-8")
    (folder / "model.onnx").write_bytes(onnx_model(batch, outputs))
    return folder


def onnx_model(batch: int | str, outputs: str) -> bytes:
    """Images [batch,S,S,3], BGR in 0 .. 255 -> [batch,T]. The format: onnx.proto of https://github.com/onnx/onnx."""
    sharpness = 20 / 255
    matrix = [sharpness * tag[2][2 - colour] for colour in range(3) for tag in TAGS]  # lines of blue, green, red
    bias = [sharpness * 255 * tag[2][3] for tag in TAGS]
    nodes = [("Slice", ["images", "start", "end", "axis"], "upper"), ("ReduceMean", ["upper", "plane"], "colour"),
             ("MatMul", ["colour", "matrix"], "scaled"), ("Add", ["scaled", "bias"], "logits"),
             (outputs, ["logits"], "probabilities")]
    tensors = [integers("start", [0]), integers("end", [SIDE // 2]), integers("axis", [1]), integers("plane", [1, 2]),
               floats("matrix", [3, len(TAGS)], matrix), floats("bias", [len(TAGS)], bias)]
    keep_no_dims = message((1, "keepdims"), (3, 0), (20, 2))
    graph = message(
        *((1, message(*((1, name) for name in inputs), (2, output), (4, kind),
                      *([(5, keep_no_dims)] if kind == "ReduceMean" else []))) for kind, inputs, output in nodes),
        (2, "tagger"), *((5, tensor) for tensor in tensors), (11, value("images", [batch, SIDE, SIDE, 3])),
        (12, value("probabilities", [batch, len(TAGS)])))
    return message((1, 8), (7, graph), (8, message((2, 18))))  # opset 18


def integers(name: str, numbers: Sequence[int]) -> bytes:
    return message((1, len(numbers)), (2, 7), (8, name), (9, struct.pack(f"<{len(numbers)}q", *numbers)))


def floats(name: str, shape: Sequence[int], numbers: Sequence[float]) -> bytes:
    return message(*((1, side) for side in shape), (2, 1), (8, name), (9, struct.pack(f"<{len(numbers)}f", *numbers)))


def value(name: str, shape: Sequence[int | str]) -> bytes:
    sides = [message((1, side) if isinstance(side, int) else (2, side)) for side in shape]
    return message((1, name), (2, message((1, message((1, 1), (2, message(*((1, side) for side in sides))))))))


def message(*fields: tuple[int, int | str | bytes]) -> bytes:
    """Protocol buffers: numbers as varints, everything else with its length before it."""
    written = b""
    for number, content in fields:
        if isinstance(content, int):
            written += varint(number << 3) + varint(content)
        else:
            data = content.encode() if isinstance(content, str) else content
            written += varint(number << 3 | 2) + varint(len(data)) + data
    return written


def varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])
