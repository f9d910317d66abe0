"""Bytes of captions and tables become text here and nowhere else: UTF-8, marked UTF-16 and 32, plausible Western text.

Eight-bit text does not say what it is: every file in any Chinese, Japanese, Korean or Cyrillic encoding can be read as
Western text, too, as nonsense. So Western text has to look like it, word by word, and anything else is refused with
what it probably says.
"""

from __future__ import annotations

import codecs
import re
import shlex
import unicodedata
from collections.abc import Iterable, Mapping

from trainkit.data.sources.encodings import Reading, likely_readings
from trainkit.errors import SHOWN, printable, shell_word

MARKS = (  # UTF-32's mark begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)
WESTERN = "cp1252"
LANGUAGES = (  # letters besides a to z, by language
    "àâæçèéêëîïôùûüœ", "äöüß", "áéíïñóúü", "àáâãçéêíóôõúü", "àèéìíòóùú", "äåéöü", "åæéèêòóôøü", "áâäèéêëíîïóôöúü",
)
ONE_LETTER = set("àáäåèéêíóöøúÀÉÈ")  # words of one letter, such as French à and Swedish ö
CAPITALS = set("ÀÁÂÃÄÅÆŒ")  # the lead bytes of common characters in Big5 and Shift-JIS, where an ASCII byte may follow
LETTERS = "A-Za-zÀ-ÖØ-öø-ÿŒœ"
WORD = re.compile(f"[{LETTERS}]+")
MIDWORD = re.compile("[a-zà-öø-ÿ][À-ÖØ-ÞŒ]|[À-ÖØ-öø-ÿŒœ]{3}|[ìòù](?=[a-zà-öø-ÿ])|õ(?!e)")
SYMBOL_PLACES = {  # where a Western sign may stand; one that is missing here has no place in a caption
    "“": r"(?<!\w)“(?=[^“]*”)", "”": r"(?<=\S)”(?!\w)", "„": r"(?<!\w)„(?=[^„]*“|[^„]*”)",
    "‘": r"(?<!\w)‘(?=[^‘]*’)", "’": r"(?<=\S)’|’(?=\d\d)", "«": r"(?<!\w)«(?=[^«]*»)",
    "»": r"(?<!\w)»(?=[^»]*«)|(?<=\S)»(?!\w)",
    "¿": r"(?<!\w)¿(?=[^¿]*\?)", "¡": r"(?<!\w)¡(?=[^¡]*!)", "–": r"(?<=\s)–(?=\s)|(?<=\w)–(?=[A-Z\d])",
    "—": r"(?<=\s)—(?=\s)|(?<=[a-z\d])—(?=[a-zA-Z\d])", "…": r"…", "•": r"•(?=\s)",
    "·": f"(?<=[{LETTERS}])·(?=[{LETTERS}])|(?<=\\s)·(?=\\s)",
    "°": r"(?<=\d)°|(?<=\d )°(?=[CF])", "º": r"(?<=[\dnN])º", "ª": r"(?<=[\dnN])ª", "²": r"(?<=[\dm])²(?!\w)",
    "³": r"(?<=[\dm])³(?!\w)", "½": r"(?<![^\W\d])½(?!\w)", "¼": r"(?<![^\W\d])¼(?!\w)", "¾": r"(?<![^\W\d])¾(?!\w)",
    "×": r"(?<=\d)×(?=\d)|(?<=\s)×(?=\s)", "£": r"£(?=\d)", "€": r"€(?= ?\d)|(?<=\d)€|(?<=\d )€", "¥": r"¥(?=\d)",
    "©": r"©(?=\s|\d|$)", "®": r"(?<=\w)®(?!\w)", "™": r"(?<=\w)™(?!\w)", "±": r"±(?=\d)",
    "µ": r"(?<=\d)µ(?=m)|(?<=\d )µ(?=m)",
    "\xa0": r"(?<=\S)\xa0(?=\S)",
}
ALLOWED = {sign: re.compile(place) for sign, place in SYMBOL_PLACES.items()}
WIDE = 5  # text in which one byte of so many is a control character has two or four bytes a character
CONTROLS = bytes({*range(32)} - {*b"\t\n\v\f\r"})
DOCUMENTS = {  # first bytes of what word processors write, whatever it is called
    b"{\\rtf": "RTF", b"PK\x03\x04": "a packed document", b"%PDF": "a PDF", b"\xd0\xcf\x11\xe0": "a Word document",
}
NOTHING = {"nan", "none", "null", "<na>", "n/a", "undefined"}  # what programs write where there is no text


class UnclearText(Exception):
    """Bytes that are neither Unicode nor plausibly Western; what they may say, the likeliest first."""

    def __init__(self, readings: tuple[Reading, ...] = (), why: str = "is no text in any encoding this trainer knows"):
        super().__init__(why)
        self.readings, self.why = readings, why

    def __str__(self) -> str:
        if not self.readings:
            return self.why
        first, *others = (f"{one.name}, '{printable(one_line(one.text)[:60])}'" for one in self.readings)
        return f"is not UTF-8; it probably says in {first}" + (f", or in {others[0]}" if others else "")


def one_line(text: str) -> str:
    """Text as a prompt: line breaks and runs of space become one space, control characters and lone surrogates, which
    no tokenizer can encode, vanish.
    """
    if text.isprintable():  # it holds none of these
        return " ".join(text.split())
    visible = (c if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs") else "" for c in text)
    return " ".join("".join(visible).split())


def as_caption(text: str) -> str:
    """Text as a caption: its lines, each as `one_line` makes it, without blank ones; "" where a program has written
    that there is none.
    """
    lines = "\n".join(filter(None, map(one_line, text.splitlines())))
    return "" if lines.casefold() in NOTHING else lines


def decode_text(data: bytes) -> tuple[str, str]:
    """(text, the encoding it was in). Raises UnclearText where that would be a guess, and for what is no plain text."""
    for start, kind in DOCUMENTS.items():
        if data.startswith(start):
            raise UnclearText(why=f"is {kind}, and no plain text: save it as plain text (UTF-8)")
    for mark, encoding in MARKS:
        if data.startswith(mark):
            return _decoded(data, encoding), encoding
    controls = len(data) - len(data.translate(None, CONTROLS))
    if controls and controls * WIDE >= len(data) or b"\x1b$" in data:  # UTF-16 or 32 without a mark; ISO-2022
        raise UnclearText(likely_readings(data))
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        pass
    if not plausibly_western(data):
        raise UnclearText(likely_readings(data))
    return data.decode(WESTERN), WESTERN


def _decoded(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        raise UnclearText(why=f"is marked as {encoding.removesuffix('-sig').upper()} and damaged") from None


def plausibly_western(data: bytes) -> bool:
    """Whether text in cp1252 reads like words of a Western European language, sign by sign."""
    try:
        text = data.decode(WESTERN)
    except UnicodeDecodeError:
        return False
    if "\0" in text or not all(map(_western_word, WORD.findall(text))):
        return False
    signs = {c for c in WORD.sub("", text) if c > "\x7f"}
    return all(sign in ALLOWED and len(ALLOWED[sign].findall(text)) == text.count(sign) for sign in signs)


def _western_word(word: str) -> bool:
    """Whether a word is spelled with the letters of one Western language, some of its letters being a to z."""
    if word.isascii():
        return True
    high = {c for c in word.lower() if c > "\x7f"}
    if not any(c.isascii() for c in word):
        return word in ONE_LETTER
    if word[0] in CAPITALS and len(word) == 2:
        return False
    return not MIDWORD.search(word) and any(high <= set(letters) for letters in LANGUAGES)


def iconv(files: Mapping[str, Iterable[str]], folder: str) -> str:
    """The command that writes files anew in UTF-8: {encoding: paths}.

    Where they are many, all text files of the folder that are not UTF-8 are converted, so that one command is enough.
    """
    convert = 'iconv -f {} -t UTF-8 "$f" > "$f.utf8" && mv "$f.utf8" "$f"'
    loops = []
    for encoding, paths in files.items():
        paths = list(paths)
        if len(paths) > SHOWN and len(files) == 1:
            suffix = paths[0].rpartition(".")[2]
            test = 'iconv -f UTF-8 -t UTF-8 "$f" >/dev/null 2>&1 ||'
            loops.append(f"for f in {shell_word(folder)}/*.{suffix}; do {test} {{ {convert.format(encoding)}; }}; done")
        else:
            words = " ".join(shell_word(path) for path in paths[:SHOWN])
            loops.append(f"for f in {words}; do {convert.format(shlex.quote(encoding))}; done")
    return "; ".join(loops)
