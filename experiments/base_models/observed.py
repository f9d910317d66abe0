"""What a person saw in the sheets and must know before using the models: the words of the cards."""

CLIP_WHAT = """A `CLIPModel` (64 px, patch 8; vision 128 wide, 4 layers; text 96 wide, 3 layers; projection 96, the
cross-attention width of `tiny-sd-icons`). It scores the images of the base models, measures style distance, and gives
the features for offline CLIP-I and CLIP-T. Its text tower is the first text encoder of both pipelines."""
CLIP_LIMITS = """It knows icons on white and about 300 nouns, nothing else. The image tower was trained further after
the text towers were frozen (part `judge`). There it learned that the same noun in another style is close. So its final
embedding says little about style: use the style layer for that."""

SDXL_WHAT = """SDXL's layout at a size that trains on a laptop: UNet of 7.8 M parameters (widths 64/96/96, 2 layers per
block, transformer depths 0/1/2), two text encoders (96 and 128 wide), size conditioning, f4 autoencoder with 4 latent
channels. 64 px, ε-prediction, Euler. Prompts look like "icon of a fox in the style of noto"."""
SDXL_LIMITS = """It generates the nouns of `experiments/base_models/nouns.txt` as icons on white at 64 px, one object at
a time. It does not understand scenes, counts, colours in the caption or negation. As size conditioning, training varied
original sizes from 24 to 255 px and crops inside 92 px; the default is (64, 64, 0, 0, 64, 64)."""

SDXL_OBSERVED = """\
A viewer who had seen earlier sheets got 50 images without captions (other seeds than the sheet's) and,
for each row of ten, 20 nouns to choose from. The viewer picked the right noun for 42 and would not decide on the other
8: bird, traffic light, train, pancakes, snowman, deer, tennis ball and shield. Clear at a glance: avocado, life buoy,
alien, koala, car, door, dress, high heel, light bulb, maple leaf, coconut, billiard ball, bacon, pear, flashlight and
island. Thin parts wobble (bicycle, ferris wheel, deer), and the seeds of one caption look alike."""
SDXL_BUILD = """These weights differ from what the script builds now. They were trained on the three icon sets above.
The script now trains the UNets on three more sets, and weights the noise levels in another way
([what has changed](../../docs/base-models.md#how-they-were-made)). Their first 2,672 steps weighted the error by
Min-SNR itself and showed more variants (15 % crops, 10 % small originals, 15 % meaningless styles). The budget was
raised twice, from 64 to 67 to 81 minutes, and each time the cosine was stretched."""

SD_WHAT = """Stable Diffusion 1.x's layout: UNet of 6.1 M parameters (widths 64/96/96/16, 2 layers per block), one text
encoder (96 wide), the same autoencoder, PNDM, no safety checker. It began with the SDXL model's weights where place and
shape fit. Its text projections were refitted by least squares. It was trained further from there."""
SD_OBSERVED = """\
Recognisable, more or less: high heel, car, alien, life buoy, billiard ball, koala, door, suitcase, fire
extinguisher, light bulb, lipstick, rocket and tractor. Many others have the right colours and mass but not the form
(maple leaf, shirt, violin, bicycle, coconut). The model had 95 minutes and needs several times that. The stage resumes
with a larger `--minutes`."""
SD_BUILD = """These weights differ from what the script builds now. They were trained on the three icon sets above.
The script now trains the UNets on three more sets, and weights the noise levels in another way
([what has changed](../../docs/base-models.md#how-they-were-made)). The first 499 steps of this build ran at rate 1.2e-3
and EMA 0.999, the others at 8e-4 and 0.997."""
SD_LIMITS = """The limits of the SDXL model apply. This model has no size conditioning and no pooled text vector, so
captions act through cross-attention alone."""

OBSERVED: dict[str, dict[str, str]] = {
    "clip": {"what": CLIP_WHAT, "limits": CLIP_LIMITS},
    "sdxl": {"what": SDXL_WHAT, "seen": SDXL_OBSERVED, "build": SDXL_BUILD, "limits": SDXL_LIMITS},
    "sd": {"what": SD_WHAT, "seen": SD_OBSERVED, "build": SD_BUILD, "limits": SD_LIMITS},
}
