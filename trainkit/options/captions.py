"""The concern of captions: which files they are in, and how they differ from visit to visit."""

from __future__ import annotations

import re

from pydantic import field_validator

from trainkit.options.base import Concern, opt

TOKENS = 75  # that a text encoder reads at once, between its start and end token
LENGTHS = (TOKENS, 2 * TOKENS, 3 * TOKENS)  # kohya's
VARIANTS = 8  # of a caption, where their number is limited and left open
VARIES = "shuffle_caption or caption_tag_dropout_rate>0 or enable_wildcard"
TAGS = "shuffle_caption or caption_tag_dropout_rate>0"


class CaptionOptions(Concern):
    """Captions"""

    caption_extension: str | None = opt(
        None, "The ending of the caption files next to the images. Without this flag, .txt and .caption files are "
        "read.", unit="ending", resume="in the data", min_length=1)
    caption_prefix: str | None = opt(
        None, "Text in front of every caption, such as a trigger word. A space is put between the two.", unit="text",
        resume="in the data", min_length=1)
    caption_suffix: str | None = opt(
        None, "Text behind every caption. A space is put between the two.", unit="text", resume="in the data",
        min_length=1)
    caption_dropout_rate: float = opt(
        0.0,
        "The probability that an image is trained without its caption. Then the model gets what it is given without a "
        "prompt, so the LoRA also learns for the negative side of classifier-free guidance.", unit="0..1",
        card="Caption dropout", ge=0, le=1, off=0.0)
    caption_dropout_every_n_epochs: int = opt(
        0,
        "In every Nth epoch, all images are trained without their captions. With 5, these are the epochs 5, 10, 15 and "
        "so on, counted from 1.", unit="epochs", resume="in the data", card="Epochs between those without captions",
        ge=0, off=0)
    shuffle_caption: bool = opt(
        False, "Put the tags of a caption into a new order each time its image is used. Tags are separated by "
        "--caption_separator.", card="Shuffled tags")
    keep_tokens: int = opt(
        0, "How many tags at the start of a caption are not shuffled or dropped. The tags of --caption_prefix count.",
        unit="tags", read_with=TAGS, card="Tags kept in place", ge=0, off=0)
    keep_tokens_separator: str | None = opt(
        None,
        "A mark in the captions, such as |||. Tags in front of it are not shuffled or dropped, and neither are tags "
        "behind a second mark. --keep_tokens is not used for a caption with the mark. The mark itself is removed.",
        unit="mark", min_length=1)
    caption_tag_dropout_rate: float = opt(
        0.0, "The probability that a tag is left out, for each tag and each time its image is used.", unit="0..1",
        card="Tag dropout", ge=0, le=1, off=0.0)
    caption_separator: str = opt(
        ",", "The separator of the tags.", unit="separator", min_length=1)
    secondary_separator: str | None = opt(
        None,
        "A second separator, such as ;;;. Tags with this separator between them stay together when tags are shuffled "
        "and dropped. It then becomes --caption_separator.", unit="separator", min_length=1)
    enable_wildcard: bool = opt(
        False,
        "Choose one part of {red|green|blue} in a caption each time its image is used. From a caption of several "
        "lines, one line is chosen. Write {{ and }} for braces that are meant as such.")
    caption_variants: int | None = opt(
        None,
        "How many variants of each caption are made by shuffling, tag dropout and wildcards. Without this flag, there "
        f"are {VARIANTS}. There is no limit when the text encoders are trained in every step.", unit="variants",
        read_with=VARIES, ge=1)
    max_token_length: int = opt(
        TOKENS,
        "The length of captions and prompts in tokens: 75, 150 or 225. A longer text is cut into parts of 75 tokens "
        "that are encoded one by one, as WebUIs do.", unit="tokens", card="Caption length, tokens")

    @field_validator("caption_extension")
    @classmethod
    def _is_an_ending(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\.?\w+", value):
            raise ValueError("it is the last part of a file name, such as .txt or .caption")
        return value and f".{value.removeprefix('.').lower()}"

    @field_validator("max_token_length")
    @classmethod
    def _is_whole_parts(cls, value: int) -> int:
        if value not in LENGTHS:
            raise ValueError(f"text encoders read {TOKENS} tokens at once, so it is one of "
                             f"{', '.join(map(str, LENGTHS))}")
        return value

    @property
    def varies(self) -> bool:
        """Whether the text of a caption differs from visit to visit."""
        return self.shuffle_caption or self.caption_tag_dropout_rate > 0 or self.enable_wildcard

    @property
    def drops(self) -> bool:
        """Whether an image is sometimes trained without its caption."""
        return self.caption_dropout_rate > 0 or self.caption_dropout_every_n_epochs > 0

    @property
    def max_chunks(self) -> int:
        """Parts that a long text is encoded in."""
        return self.max_token_length // TOKENS

    def extension(self, compat: str | None) -> str | None:
        """The ending of caption files, where only one is read: kohya's scripts have .caption by default."""
        return self.caption_extension or (".caption" if compat == "kohya" else None)

    def decisive(self) -> dict[str, object]:
        """What is not at its default: a checkpoint made before one of these flags was there can be resumed from."""
        return {name: value for name, value in super().decisive().items()
                if value != self.flag(name.removeprefix("--")).default}
