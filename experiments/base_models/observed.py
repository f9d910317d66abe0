"""What a person saw in the sheets and must know before using the models: the words of the cards."""

CLIP_WHAT = """A `CLIPModel` (64 px, patch 8; vision 128 wide, 4 layers; text 96 wide, 3 layers; projection 96, the
cross-attention width of `tiny-sd-icons`). It scores the images of the base models, measures style distance, and gives
the features for offline CLIP-I and CLIP-T. Its text tower is the first text encoder of both pipelines."""
CLIP_BUILD = """The losses `clip` and `clip_2` match images with captions, one for each of the two text towers. The
loss `noun` matches images of the same noun. The part `clip` trains both text towers and the image tower. Then `judge`
trains only the image tower, and `judge_last` only its top layer, on images that are harder to recognise. The parts give
the losses different weights, so losses of different parts cannot be compared."""
CLIP_LIMITS = """It knows icons on white and about 300 nouns, nothing else. The image tower was trained further after
the text towers were frozen (part `judge`). In this part, it learned to give similar embeddings to the same noun in
different styles. So its final embedding says little about style: use the style layer for that."""

SDXL_WHAT = """SDXL's layout at a size that trains on a laptop: UNet of 7.8 M parameters (widths 64/96/96, 2 layers per
block, transformers of depth 0, 1 and 2), two text encoders (96 and 128 wide), and size conditioning. The autoencoder
has a downsampling factor of 4 and 4 latent channels. Images have 64 px. The model predicts ε, and its scheduler is
Euler. Prompts look like "icon of a fox in the style of noto"."""
SDXL_LIMITS = """It generates the nouns of `experiments/base_models/nouns.txt` as icons on white at 64 px, one object at
a time. It does not understand scenes, counts, colours in the caption or negation. In training, the size conditioning
had original sizes from 24 to 255 px, and crops of images of up to 92 px. The default is (64, 64, 0, 0, 64, 64)."""

SDXL_OBSERVED = """\
A viewer who had seen earlier sheets got 50 images without captions (other seeds than the sheet's) and,
for each row of ten, 20 nouns to choose from. The viewer picked the right noun for 42 images, and did not decide on the
other 8: bird, traffic light, train, pancakes, snowman, deer, tennis ball and shield. These are clear at a glance:
avocado, life buoy, alien, koala, car, door, dress, high heel, light bulb, maple leaf, coconut, billiard ball, bacon,
pear, flashlight and island. Thin parts are not straight (bicycle, ferris wheel, deer), and the images of one caption
look alike with all seeds."""
SDXL_BUILD = """The script has changed since it built this model. This model was trained on the three icon sets above.
The script now trains the UNets on three more sets, and it has other noise-level weights
([what has changed](../../docs/base-models.md#how-they-were-made)). In the first 2,672 steps, the noise-level weight
was Min-SNR, not its square root. More of the images were crops (15 %) or came from small originals (10 %), and
more captions had a meaningless word for the style (15 %). The time budget was raised twice, from 64 to 67 to 81
minutes, and the cosine schedule was stretched each time."""

SD_WHAT = """Stable Diffusion 1.x's layout: UNet of 6.1 M parameters (widths 64/96/96/16, 2 layers per block), one text
encoder (96 wide), the scheduler PNDM, and no safety checker. It uses the autoencoder of `tiny-sdxl-icons`. Before
training, layers that have a counterpart of the same shape in `tiny-sdxl-icons` got its weights. The layers that read
the text were fitted by least squares to the one text encoder."""
SD_OBSERVED = """\
To the human eye, these are more or less recognisable: high heel, car, alien, life buoy, billiard ball, koala,
door, suitcase, fire extinguisher, light bulb, lipstick, rocket and tractor. Many others have the right colours, but not
the right form (maple leaf, shirt, violin, bicycle, coconut). So the score of the CLIP above is more generous than the
eye. The model was trained for 95 minutes and needs several times that. With `--stage start`, a longer training begins
with the weights of this model."""
SD_BUILD = """The script has changed since it built this model. This model was trained on the three icon sets above.
The script now trains the UNets on three more sets, and it has other noise-level weights
([what has changed](../../docs/base-models.md#how-they-were-made)). The first 499 steps had a learning rate of 1.2e-3
and an EMA decay of 0.999. The other steps had 8e-4 and 0.997."""
SD_LIMITS = """This model has the limits of [tiny-sdxl-icons](../tiny-sdxl-icons/README.md) too. It has no size
conditioning and no pooled text vector, so captions act only through cross-attention."""

OBSERVED: dict[str, dict[str, str]] = {
    "clip": {"what": CLIP_WHAT, "build": CLIP_BUILD, "limits": CLIP_LIMITS},
    "sdxl": {"what": SDXL_WHAT, "seen": SDXL_OBSERVED, "build": SDXL_BUILD, "limits": SDXL_LIMITS},
    "sd": {"what": SD_WHAT, "seen": SD_OBSERVED, "build": SD_BUILD, "limits": SD_LIMITS},
}
