"""The icons: fetched from npm at pinned versions, composed on white at 64 px, named by style and noun."""

import hashlib
import io
import json
import logging
import subprocess
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

LOG = logging.getLogger("base_models")
SIZE = 64
STYLES = ("noto", "twemoji", "fluent")
CONCEPT = "fluent-3d"  # the style users teach; nothing in the base ever sees it
PACKAGES = {
    "noto": ("emoji-datasource-google", "16.0.0", "img/google/64/"),
    "twemoji": ("emoji-datasource-twitter", "16.0.0", "img/twitter/64/"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6", ""),
    CONCEPT: ("@lobehub/fluent-emoji-3d", "1.1.0", "assets/"),
}
# Styles that only the UNets see: more ways to draw one noun. CLIP, autoencoder and measurements keep to STYLES.
UNET_STYLES = ("emojione", "firefox", "noto blob")
PACKAGES |= {
    "emojione": ("@iconify-json/emojione", "1.2.3", ""),
    "firefox": ("@iconify-json/fxemoji", "1.2.2", ""),
    "noto blob": ("@iconify-json/noto-v1", "1.2.5", ""),
}
NOUNS_FILE = Path(__file__).with_name("nouns.txt")
SKIPPED_CATEGORIES = ("Flags", "Component", "People & Body")  # people come in hundreds of near-duplicates
HELDOUT_CATEGORIES = ("Animals & Nature", "Food & Drink", "Activities", "Travel & Places", "Objects")


@dataclass(frozen=True)
class Icon:
    """One image of the base training set; `noun` is empty for icons outside the list of nouns."""

    key: str
    style: str
    noun: str
    split: str  # train: text-to-image pairs · withheld: the pair the UNet never sees · extra: VAE only · heldout: PSNR


def fetch_packages(work_dir: Path) -> dict[str, Path]:
    """Download the npm packages once; returns style -> tarball."""
    folder = work_dir / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    tarballs = {}
    for style, (name, version, _) in PACKAGES.items():
        tarball = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
        if not tarball.exists():
            LOG.info("npm pack %s@%s", name, version)
            subprocess.run(["npm", "pack", f"{name}@{version}"], cwd=folder, check=True, capture_output=True)
        tarballs[style] = tarball
    return tarballs


def read_members(tarball: Path, prefix: str, names: Iterable[str] | None = None) -> dict[str, bytes]:
    """File name -> bytes of the members of an npm tarball under `prefix`, or of just those `names`."""
    wanted = None if names is None else set(names)
    found = {}
    with tarfile.open(tarball) as archive:
        for member in archive:
            inside = member.name.removeprefix("package/")
            name = inside.removeprefix(prefix)
            if member.isfile() and inside.startswith(prefix) and (wanted is None or name in wanted):
                found[name] = archive.extractfile(member).read()
    return found


def read_nouns(path: Path = NOUNS_FILE) -> dict[str, str]:
    """Short name in emoji.json -> noun used in captions."""
    nouns = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            short, _, noun = line.partition(" = ")
            nouns[short] = noun or short.replace("_", " ")
    assert len(set(nouns.values())) == len(nouns), "two icons share a noun"
    return nouns


def on_white(image: Image.Image, size: int = SIZE) -> Image.Image:
    """Compose on white and resize to `size` square; an alpha edge must not turn black."""
    image = image.convert("RGBA")
    side = max(image.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def draw_svg(body: str, width: int, height: int, size: int = 2 * SIZE) -> Image.Image:
    """Rasterise the inside of an iconify icon of `width` x `height` units; twice the final size is crisper."""
    import resvg_py

    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {namespaces} viewBox="0 0 {width} {height}">{body}</svg>'
    ElementTree.fromstring(svg)  # a broken icon fails here with a line number, not inside the rasteriser
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))))


def code_points(entry: dict) -> list[str]:
    """Spellings of an emoji's code points; packages disagree about the variation selector FE0F."""
    full = entry["unified"].lower()
    spellings = [full, full.replace("-fe0f", "")]
    return spellings + ([entry["non_qualified"].lower()] if entry["non_qualified"] else [])


def read_emoji_table(tarballs: dict[str, Path]) -> list[dict]:
    """The entries of emoji.json that are images of things: the nouns, and no flags, people or clock faces else."""
    nouns = read_nouns()
    entries = json.loads(read_members(tarballs["noto"], "", ["emoji.json"])["emoji.json"])
    return [
        entry
        for entry in entries
        if entry["short_name"] in nouns
        or (entry["category"] not in SKIPPED_CATEGORIES and not entry["short_name"].startswith("clock"))
    ]


class StyleSource:
    """Images of one style by emoji entry."""

    def __init__(self, style: str, tarball: Path) -> None:
        self.is_svg = PACKAGES[style][0].startswith("@iconify-json/")
        if self.is_svg:
            files = read_members(tarball, "", ["icons.json", "chars.json"])
            collection = json.loads(files["icons.json"])
            self.icons = collection["icons"]
            self.width, self.height = collection.get("width", 16), collection.get("height", 16)  # iconify's default
            self.chars = json.loads(files["chars.json"])  # code points to names; some collections have only names
            self.names = {letters(name): name for name in self.icons}
        else:
            self.files = read_members(tarball, PACKAGES[style][2])

    def draw(self, entry: dict) -> Image.Image | None:
        """RGBA image at the source's own size, or None where the set has none."""
        return self.draw_svg_icon(entry) if self.is_svg else self.read_file(entry)

    def draw_svg_icon(self, entry: dict) -> Image.Image | None:
        """By code point where the collection lists them, else by the emoji's name or short name."""
        by_code = [self.chars.get(code) for code in code_points(entry)]
        by_name = [] if self.chars else [self.names.get(letters(entry[key] or "")) for key in ("name", "short_name")]
        name = next((name for name in by_code + by_name if name in self.icons), None)
        if name is None:
            return None
        icon = self.icons[name]
        return draw_svg(icon["body"], icon.get("width", self.width), icon.get("height", self.height))

    def read_file(self, entry: dict) -> Image.Image | None:
        files = (self.files.get(f"{code}{suffix}") for code in code_points(entry) for suffix in (".png", ".webp"))
        data = next((data for data in files if data is not None), None)
        return None if data is None else Image.open(io.BytesIO(data)).convert("RGBA")


def letters(name: str) -> str:
    """A name without case and punctuation, as collections spell one name in several ways."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def stable_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, so a longer list of nouns moves nobody else's split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def withheld_style(noun: str, fraction: float = 0.45) -> str | None:
    """The style in which the UNet never sees this noun (45 % of nouns lose one of three styles: 15 % of pairs)."""
    if stable_fraction(f"withhold {noun}") >= fraction:
        return None
    return STYLES[int(stable_fraction(f"style {noun}") * len(STYLES))]


def split_of(entry: dict, style: str, noun: str) -> str:
    if noun:
        return "withheld" if withheld_style(noun) == style else "train"
    drawn = stable_fraction(f"heldout {entry['short_name']}") < 0.15
    return "heldout" if drawn and entry["category"] in HELDOUT_CATEGORIES else "extra"


def compose_icons(tarballs: dict[str, Path]) -> tuple[list[Icon], np.ndarray]:
    """All base icons; pixels uint8 [N,64,64,3]."""
    nouns, icons, pixels = read_nouns(), [], []
    entries = read_emoji_table(tarballs)
    missing = nouns.keys() - {entry["short_name"] for entry in entries}
    assert not missing, f"not in emoji.json: {sorted(missing)}"
    for style in STYLES:
        source = StyleSource(style, tarballs[style])
        for entry in entries:
            key = entry["short_name"]
            image = source.draw(entry)
            assert image is not None or key not in nouns, f"{style} does not draw {key}"
            if image is not None:
                noun = nouns.get(key, "")
                icons.append(Icon(key, style, noun, split_of(entry, style, noun)))
                pixels.append(np.asarray(on_white(image)))
    return icons, np.stack(pixels)


def compose_unet_icons(tarballs: dict[str, Path]) -> tuple[list[Icon], np.ndarray]:
    """The nouns in the styles that only the UNets see, as far as each set has them; pixels uint8 [N,64,64,3]."""
    nouns, icons, pixels = read_nouns(), [], []
    for style in UNET_STYLES:
        source = StyleSource(style, tarballs[style])
        for entry in read_emoji_table(tarballs):
            image = source.draw(entry) if entry["short_name"] in nouns else None
            if image is not None:
                icons.append(Icon(entry["short_name"], style, nouns[entry["short_name"]], "train"))
                pixels.append(np.asarray(on_white(image)))
    return icons, np.stack(pixels)


def write_icons(work_dir: Path, name: str, icons: list[Icon], pixels: np.ndarray) -> None:
    np.save(work_dir / f"{name}.npy", pixels)
    (work_dir / f"{name}.json").write_text(json.dumps([vars(icon) for icon in icons], indent=0), encoding="utf-8")


def build_icons(work_dir: Path) -> None:
    """Write icons and unet_icons, each as .npy (uint8 [N,64,64,3]) and .json, into the work folder."""
    tarballs = fetch_packages(work_dir)
    icons, pixels = compose_icons(tarballs)
    write_icons(work_dir, "icons", icons, pixels)
    more, more_pixels = compose_unet_icons(tarballs)
    write_icons(work_dir, "unet_icons", more, more_pixels)
    LOG.info("for the UNets alone: %s", {style: sum(icon.style == style for icon in more) for style in UNET_STYLES})
    counts = {split: sum(icon.split == split for icon in icons) for split in ("train", "withheld", "extra", "heldout")}
    LOG.info("%d icons, %d nouns: %s", len(icons), len(read_nouns()), counts)


def load_icons(work_dir: Path, name: str = "icons") -> tuple[list[Icon], np.ndarray]:
    """What `build_icons` wrote: `icons`, or `unet_icons`."""
    records = json.loads((work_dir / f"{name}.json").read_text(encoding="utf-8"))
    return [Icon(**record) for record in records], np.load(work_dir / f"{name}.npy")
