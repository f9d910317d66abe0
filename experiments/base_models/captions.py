"""Captions that name a noun and a drawing style, and the words the tokenizer must know whole."""

import random

from experiments.base_models.data import STYLES, read_nouns

TEMPLATES = (
    "icon of {a_noun} in the style of {style}",
    "{noun}, {style} style icon",
    "icon in the style of {style}, {a_noun}",
    "{style} icon of {a_noun}",
)
PLAIN_TEMPLATES = ("icon of {a_noun}", "{a_noun}")
TRAINING_PROMPT = "3d icon in the style of TOK, {a_noun}"
# singular or plural nouns that take no article
MASS = (
    "bacon",
    "bread",
    "broccoli",
    "butter",
    "cheese",
    "corn",
    "popcorn",
    "ramen",
    "salt",
    "spaghetti",
    "sushi",
    "fire",
    "coffee",
    "coral",
)
SINGULAR_IN_S = (
    "bus",
    "cactus",
    "octopus",
    "compass",
    "hourglass",
    "wine glass",
    "magnifying glass",
    "dress",
    "rhinoceros",
)
COMMON_WORDS = (
    "3d tok photo picture image drawing painting sketch style icon icons emoji illustration of a an the in on with and "
    "white black red green blue yellow orange purple pink brown gray background simple flat glossy shiny soft cute "
    "small large big old new happy sad wooden golden cartoon realistic render shaded isolated pixel watercolor"
)


def with_article(noun: str) -> str:
    """The noun as English puts it after "of": "a dog", "an owl", "grapes"."""
    plural = noun.endswith("s") and noun not in SINGULAR_IN_S
    if noun in MASS or plural:
        return noun
    return f"{'an' if noun[0] in 'aeiou' and not noun.startswith('uni') else 'a'} {noun}"


def caption(template: str, noun: str, style: str = "") -> str:
    return template.format(noun=noun, a_noun=with_article(noun), style=style)


def caption_texts(noun: str, style: str) -> list[str]:
    """Every styled caption of an image, in the order of TEMPLATES."""
    return [caption(template, noun, style) for template in TEMPLATES]


def unknown_style_texts(noun: str, words: list[str], count: int, seed: str) -> list[str]:
    """Captions whose style is a random word, as an untrained "TOK" is: the noun must survive a style nobody knows."""
    draw = random.Random(f"{seed} {noun}")
    texts = []
    for index in range(count):
        style = " ".join(draw.sample(words, draw.choice((1, 2))))
        prefix = draw.choice(("", f"{draw.choice(words)} "))
        texts.append(prefix + caption(TEMPLATES[index % len(TEMPLATES)], noun, style))
    return texts


def all_words() -> list[str]:
    """The distinct words of all captions, sorted."""
    text = " ".join([COMMON_WORDS, *STYLES, *read_nouns().values(), *TEMPLATES, *PLAIN_TEMPLATES])
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    return sorted(set(words))
