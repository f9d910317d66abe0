"""What eight-bit text probably says: the same bytes in every encoding that editors have written, the likeliest first.

A guess is shown to the user and never trained on.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

# Of the characters that most captions have; they decide between readings that are all possible.
HAN = set("的一是不了人我在有他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可里后小么"
          "心多天而能好都然没日于起还发成事只作当想看文开手女男孩子花树山水海天空红蓝绿白黑黄色猫狗鸟鱼马狐狸"
          "貓狗鳥魚馬車樹紅藍綠黃東雲龍鳳門開關長頭髮個來時們這說國對會過沒為學點後衣服穿著站坐背景照片圖像標風格"
          "老虎象草女性男性年轻美丽城市街道房屋建筑动物图标卡通插画人物画像少女犬青赤木花月夜空海山川田町本日語写真鍵")
HANGUL = set("개가고기나는니다대도들디로리를마만모보사서소수스시아안어에여오요우원위으은을음의이인일자장전정제조지진"
             "집차키하한해호화고양이강아지여자남자사진아이콘그림꽃나무하늘바다빨간파란초록노란흰검은색새말물산")
KANA = re.compile("[ぁ-ヿ]")
Score = Callable[[str, int, str], float]  # (character, its place, the text) -> how much it speaks for a reading
UNLIKELY = 0.4  # factor for wide encodings of bytes without a zero
COMMON = 0.5  # what a character of these sets is weight more than another


@dataclass(frozen=True)
class Reading:
    """Bytes in one encoding."""

    name: str  # as iconv calls it
    text: str


def likely_readings(data: bytes, most: int = 2) -> tuple[Reading, ...]:
    """At most `most` readings in which the text is made of everyday characters of one script."""
    scored = []
    for codec, (name, score) in READINGS.items():
        try:
            text = data.decode(codec)
        except UnicodeDecodeError:
            continue
        weight = _mean(text, score, wide="UTF" in name) * (1 if "UTF" not in name or b"\0" in data else UNLIKELY)
        scored.append((weight, Reading(name, text)))
    scored.sort(key=lambda one: -one[0])  # stable: of equals, the first in the table
    return tuple(reading for weight, reading in scored[:most] if weight > scored[0][0] / 2)


def _mean(text: str, score: Score, *, wide: bool) -> float:
    """Mean worth of the characters beyond ASCII, in wide encodings of all; 0 where one is none that text has."""
    if any(unicodedata.category(c) in ("Cn", "Co", "Cc") and not c.isspace() for c in text):
        return 0.0
    weight = [score(c, i, text) for i, c in enumerate(text) if wide or c > "\x7f"]
    return sum(weight) / len(weight) if weight else 0.1


def _level(codec: str, first: int, last: int) -> Score:
    """Characters that a national standard lists among the common ones, told by the first byte of their code."""

    def score(c: str, i: int, text: str) -> float:
        try:
            lead = c.encode(codec)[0]
        except UnicodeEncodeError:
            return 0.0
        return (1.0 if first <= lead <= last else 0.3 if _is_punctuation(c) else 0.0) + COMMON * (c in HAN)

    return score


def _japanese(c: str, i: int, text: str) -> float:
    if KANA.match(c):
        return 1.0 + COMMON
    return 0.9 * JIS(c, i, text)


def _korean(c: str, i: int, text: str) -> float:
    hangul = "가" <= c <= "힣"
    return (0.9 if hangul and _encodes(c, "euc_kr") else 0.3 if _is_punctuation(c) else 0.0) + COMMON * (c in HANGUL)


def _chinese(standard: Score) -> Score:
    return lambda c, i, text: 0.0 if KANA.match(c) else standard(c, i, text)


def _script(letters: str, weight: float = 1.0, *, latin: bool = False) -> Score:
    """Letters of an alphabet; a capital within a word is a sign of the wrong encoding, as is a mix of alphabets."""
    known = re.compile(f"[{letters}]")

    def score(c: str, i: int, text: str) -> float:
        if not known.match(c):
            return 0.2 if _is_punctuation(c) else 0.0
        neighbours = text[max(i - 1, 0) : i + 2]
        if not latin and re.search("[A-Za-z]", neighbours):
            return 0.0
        after_lower, before_lower = text[i - 1 : i].islower(), text[i + 1 : i + 2].islower()
        return weight * (1.0 if not c.isupper() else 0.2 if after_lower else 0.9 if before_lower else 0.6)

    return score


def _unicode(c: str, i: int, text: str) -> float:
    """Whether a character of a wide encoding is one of everyday text."""
    everyday = c < "\u0250" or KANA.match(c) or "가" <= c <= "힣" and _encodes(c, "euc_kr") or "Ͱ" <= c <= "๛" \
        or BIG5(c, i, text) >= 1
    return 1.0 + COMMON * (c in HAN) if everyday or GB(c, i, text) >= 1 else 0.2 * _is_punctuation(c)


def _is_punctuation(c: str) -> bool:
    return c in "、。，．：；？！（）「」『』《》“”‘’…—–·«»„№" or c.isspace()


def _encodes(c: str, codec: str) -> bool:
    try:
        return bool(c.encode(codec))
    except UnicodeEncodeError:
        return False


GB, BIG5, JIS = _level("gb2312", 0xB0, 0xD7), _level("big5", 0xA4, 0xC6), _level("shift_jis", 0x88, 0x97)
READINGS: dict[str, tuple[str, Score]] = {  # of equals, the first
    "utf_32_le": ("UTF-32LE", _unicode), "utf_32_be": ("UTF-32BE", _unicode),
    "utf_16_le": ("UTF-16LE", _unicode), "utf_16_be": ("UTF-16BE", _unicode),
    "iso2022_jp": ("ISO-2022-JP", _japanese), "cp1251": ("CP1251", _script("а-яА-ЯёЁіїєґІЇЄҐў")),
    "koi8_u": ("KOI8-U", _script("а-яА-ЯёЁіїєґІЇЄҐ")), "cp866": ("CP866", _script("а-яА-ЯёЁ", 0.95)),
    "cp932": ("CP932", _japanese), "euc_jp": ("EUC-JP", _japanese), "cp949": ("CP949", _korean),
    "gbk": ("GBK", _chinese(GB)), "big5": ("BIG5", _chinese(BIG5)),
    "cp1253": ("CP1253", _script("α-ωΑ-Ωά-ώΆ-Ώ", 0.95)), "cp1255": ("CP1255", _script("א-ת", 0.95)),
    "cp874": ("CP874", _script("ก-ฯะ-ูเ-์", 0.95)), "cp1256": ("CP1256", _script("ء-ي", 0.95)),
    "cp1250": ("CP1250", _script("ąćęłńóśźżĄĆĘŁŃÓŚŹŻáčďéěíňóřšťúůýžÁČĎÉĚÍŇÓŘŠŤÚŮÝŽőűŐŰöüÖÜăâîşţ", 0.8, latin=True)),
    "cp1254": ("CP1254", _script("çğıöşüÇĞİÖŞÜâî", 0.8, latin=True)),
    "cp1252": ("CP1252", _script("à-öø-ÿÀ-ÖØ-ÞœŒß", 0.5, latin=True)),
    "mac_roman": ("MACINTOSH", _script("à-öø-ÿ", 0.6, latin=True)),
    "cp850": ("CP850", _script("à-öø-ÿ", 0.55, latin=True)),
}
