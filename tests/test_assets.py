"""What ships under assets/: small enough, licensed, complete, disjoint where it must be, loadable by stock classes."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

ASSETS = Path(__file__).resolve().parents[1] / "assets"
SDXL, SD, CLIP = (ASSETS / f"tiny-{name}-icons" for name in ("sdxl", "sd", "clip"))
TOKENIZERS = (SDXL / "tokenizer", SDXL / "tokenizer_2", SD / "tokenizer", CLIP)
FOLDERS = {"icons-3d": 22, "icons-3d-reference": 120, "icons-class": 48}
MB = 1_000_000


def rows(folder: str) -> list[dict]:
    lines = (ASSETS / folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def config(*path: str) -> dict:
    return json.loads(ASSETS.joinpath(*path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sdxl():
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(SDXL)


@pytest.fixture(scope="module")
def sd():
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(SD)


def test_no_config_names_a_folder_of_the_machine_that_built_it():
    configs = [path for model in (SDXL, SD, CLIP) for path in model.rglob("*.json") if "vocab" not in path.name]
    assert [str(path) for path in configs if "_name_or_path" in path.read_text("utf-8")] == []


def test_the_models_stay_within_their_sizes():
    files = [file for folder in (SDXL, SD, CLIP) for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 40 * MB
    assert max(file.stat().st_size for file in files) < 16 * MB
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


@pytest.mark.parametrize(("folder", "count"), FOLDERS.items())
def test_every_image_has_a_caption_a_licence_and_a_white_border(folder: str, count: int):
    listed = rows(folder)
    assert {row["file_name"] for row in listed} == {file.name for file in (ASSETS / folder).glob("*.png")}
    assert len(listed) == len({row["file_name"] for row in listed}) == count
    assert all(row["text"].strip() for row in listed)
    assert (ASSETS / folder / "LICENSE").stat().st_size > 500
    for row in listed:
        image = Image.open(ASSETS / folder / row["file_name"])
        corners = [image.getpixel(at) for at in ((0, 0), (image.width - 1, image.height - 1))]
        assert image.mode == "RGB" and (255, 255, 255) in corners, row["file_name"]


def test_the_reference_shows_no_training_icon_and_the_training_icons_say_tok():
    train = {row["file_name"] for row in rows("icons-3d")}
    assert train.isdisjoint(row["file_name"] for row in rows("icons-3d-reference"))
    assert all("TOK" in row["text"] for row in rows("icons-3d"))
    sizes = {Image.open(ASSETS / "icons-3d" / name).size for name in train}
    assert len(sizes) >= 3 and min(min(size) for size in sizes) > 64


def test_the_three_models_share_one_vocabulary_with_true_end_ids():
    vocabularies = [config(str(folder), "vocab.json") for folder in TOKENIZERS]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)
    end = vocabularies[0]["<|endoftext|>"]
    assert config(str(SDXL), "text_encoder", "config.json")["eos_token_id"] == end
    assert config(str(SDXL), "text_encoder_2", "config.json")["eos_token_id"] == end
    assert config(str(SD), "text_encoder", "config.json")["eos_token_id"] == end
    assert config(str(CLIP), "config.json")["text_config"]["eos_token_id"] == end


def test_the_second_tokenizer_pads_with_the_exclamation_mark_as_sdxl_does(sdxl):
    first, second = (
        tokenizer("a fox", padding="max_length").input_ids for tokenizer in (sdxl.tokenizer, sdxl.tokenizer_2)
    )
    assert len(first) == len(second) == 77
    assert first[-1] == sdxl.tokenizer.eos_token_id and second[-1] == 0
    assert first[:4] == second[:4]


def test_known_words_get_the_pieces_clip_gives_them(sdxl):
    ids = sdxl.tokenizer("a photo of a cat").input_ids
    assert ids[1:-1] == [320, 1125, 539, 320, 2368]  # CLIP's own ids of these words lie among the first merges
    assert sdxl.tokenizer.tokenize("an owl and a mushroom") == ["an</w>", "owl</w>", "and</w>", "a</w>", "mushroom</w>"]


def test_the_pooled_vector_is_taken_at_the_end_token_even_with_larger_ids_before_it(sdxl):
    import copy

    encoder = copy.deepcopy(sdxl.text_encoder_2)
    end = sdxl.tokenizer_2.eos_token_id
    encoder.resize_token_embeddings(end + 2)
    ids = torch.tensor([[end - 1, 320, end + 1, 539, end, 0, 0]])
    with torch.no_grad():
        out = encoder(ids)
        at_end = encoder.text_projection(out.last_hidden_state[:, 4])
    torch.testing.assert_close(out.text_embeds, at_end)


def draws(pipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    answer = pipeline(
        "icon of a fox in the style of noto",
        num_inference_steps=4,
        height=64,
        width=64,
        generator=generator,
        output_type="pt",
    )
    return answer.images


@pytest.mark.parametrize("name", ["sdxl", "sd"])
def test_the_stock_pipeline_draws_a_image(name: str, request: pytest.FixtureRequest):
    pipeline = request.getfixturevalue(name)
    assert pipeline.unet.config.sample_size * pipeline.vae_scale_factor == 64
    image = draws(pipeline)
    assert image.shape == (1, 3, 64, 64) and torch.isfinite(image).all() and image.std() > 0.05


def test_the_sdxl_layout_is_sdxl_s(sdxl):
    unet = sdxl.unet.config
    assert unet.down_block_types == ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    assert (unet.layers_per_block, unet.addition_embed_type, unet.use_linear_projection) == (2, "text_time", True)
    assert sdxl.config.force_zeros_for_empty_prompt
    assert unet.cross_attention_dim == sdxl.text_encoder.config.hidden_size + sdxl.text_encoder_2.config.hidden_size


def test_the_sd_model_shares_the_clip_s_text_tower_and_its_width(sd):
    from transformers import CLIPModel, CLIPVisionModelWithProjection

    clip = CLIPModel.from_pretrained(CLIP, dtype=torch.float32)
    tower = clip.text_model.state_dict()
    shared = {name.removeprefix("text_model."): value for name, value in sd.text_encoder.state_dict().items()}
    assert {name.removeprefix("text_model."): value for name, value in tower.items()}.keys() == shared.keys()
    assert all(torch.equal(value, shared[name.removeprefix("text_model.")]) for name, value in tower.items())
    assert clip.config.projection_dim == sd.unet.config.cross_attention_dim == 96
    assert CLIPVisionModelWithProjection.from_pretrained(CLIP).config.projection_dim == 96


def test_pipelines_loaded_without_a_dtype_are_fp32_throughout(sdxl, sd):
    for pipeline in (sdxl, sd):
        dtypes = {part.dtype for part in pipeline.components.values() if isinstance(part, torch.nn.Module)}
        assert dtypes == {torch.float32}


def test_the_clip_knows_which_real_icon_a_caption_names():
    from transformers import CLIPModel, CLIPTokenizer

    from trainkit.evaluation import to_pixels

    clip = CLIPModel.from_pretrained(CLIP, dtype=torch.float32).eval()
    chosen = rows("icons-class")
    images = to_pixels([Image.open(ASSETS / "icons-class" / row["file_name"]) for row in chosen], 64)
    ids = CLIPTokenizer.from_pretrained(CLIP)(
        [row["text"] for row in chosen], padding=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        scores = clip(input_ids=ids, pixel_values=images).logits_per_image
    right = (scores.argmax(1) == torch.arange(len(chosen))).float().mean()
    assert right > 0.9
