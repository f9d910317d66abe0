"""Captions in any encoding are read rightly or refused with what they say; no nonsense is ever trained on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.images import data_options, marked
from trainkit.data.rows import read_rows
from trainkit.data.sources.text import UnclearText, decode_text

TEXTS = {  # by the encodings that editors there have written
    ("gbk", "gb18030"): [
        "一只狐狸, 3d icon", "一个女孩站在街道上，背景是城市", "红色的花", "照片 TOK",
        "TOK 风格的图标", "大象在草原上行走"],
    ("big5", "cp950"): [
        "一隻狐狸, 3d icon", "貓", "龍", "a 龍, icon", "龍 in the style", "一個女孩站在街道上",
        "紅色的花", "台北的夜景"],
    ("shift_jis", "cp932", "euc_jp", "iso2022_jp"): [
        "鍵のアイコン, 3d icon", "犬が走っている", "赤い花", "女の子の写真", "アイコン", "ねこ TOK", "月夜"],
    ("cp949", "euc_kr"): ["고양이", "강아지 사진, TOK", "a 개, 3d icon", "빨간 꽃", "여우 아이콘", "집", "산 위의 새"],
    ("cp1251", "koi8_r", "cp866", "iso8859_5"): [
        "кот", "лиса, 3d icon in the style of TOK", "Красный цветок на столе", "я и ты", "a кот", "Ключ", "дом в лесу"],
    ("cp1253", "iso8859_7"): ["γάτα", "ένα κόκκινο λουλούδι"], ("cp1255", "iso8859_8"): ["חתול", "כלב אדום"],
    ("cp1256",): ["قطة حمراء"], ("cp874",): ["แมว", "ดอกไม้สีแดง"],
    ("cp1250",): ["zdjęcie łóżka", "żółty kot", "příroda", "žlutý květ", "malý pes na trávě"],
    ("cp1254",): ["kırmızı çiçek", "güneşli bir gün", "şapka"], ("cp850", "cp437"): ["a café", "über den Fluß"],
    ("mac_roman",): ["a café", "niño", "über"],
}
WESTERN = [
    "a café", "über den Fluß", "Ärger", "das Öl im Glas", "en été, à la plage", "déçu et créée", "¿Qué es?",
    "niño pequeño",
    "São Paulo, ações", "città più", "sää on hyvä", "blåbærøl", "søndag på en ø", "it’s a “quoted” word", "20°C",
    "crème brûlée, jalapeño", "façade – naïve", "CAFÉ", "Äpfel", "«Bonjour» dit-il", "l’été", "œuvre d’art", "Ça va",
    "© 2024 Zoë", "3½ m²", "größe 5×7", "äiti ja isä", "Händel & Gödel", "señorita de ojos azules, ¡olé!", "coração",
    "é uma menina", "reünie", "Åse på Ærø", "Noël à Besançon", "pingüino", "Zürich\nBern", "Málaga", "maçã",
]
CASES = [(encoding, text) for encodings, texts in TEXTS.items() for encoding in encodings for text in texts]


@pytest.mark.parametrize("encoding, text", CASES)
def test_text_of_another_script_is_refused(encoding: str, text: str) -> None:
    """Where the very bytes are UTF-8, too, there is nothing to tell it by."""
    with pytest.raises(UnclearText):
        decode_text(text.encode(encoding))


SURE = [(encoding, text) for encoding, text in CASES if encoding in (
    "gbk", "big5", "cp932", "euc_jp", "iso2022_jp", "cp949", "cp1251", "koi8_r", "cp866", "cp850", "cp1250", "cp1253")]


def test_the_guess_is_nearly_always_what_was_written() -> None:
    wrong = []
    for encoding, text in SURE:
        with pytest.raises(UnclearText) as caught:
            decode_text(text.encode(encoding))
        if text not in [reading.text for reading in caught.value.readings]:
            wrong.append((encoding, text, f"{caught.value}"))
    assert len(wrong) <= len(SURE) * 0.05, wrong


@pytest.mark.parametrize("text", WESTERN)
def test_western_text_is_read_as_it_was_written(text: str) -> None:
    assert decode_text(text.encode("cp1252")) == (text, "cp1252")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("text", [*WESTERN, *(text for texts in TEXTS.values() for text in texts), "🐈\u200d⬛", ""])
def test_unicode_with_its_mark_is_read(encoding: str, text: str) -> None:
    assert decode_text(text.encode(encoding))[0] == text
    if encoding in ("utf-16", "utf-32"):
        mark = {"utf-16": b"\xfe\xff", "utf-32": b"\0\0\xfe\xff"}[encoding]
        assert decode_text(mark + text.encode(f"{encoding}-be"))[0] == text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["a fox, 3d icon", "кот", "a 猫, 3d icon", "ένα κόκκινο", "it’s a “word”", "café"])
def test_unicode_without_its_mark_is_refused_by_name(encoding: str, text: str) -> None:
    with pytest.raises(UnclearText) as caught:
        decode_text(text.encode(encoding))
    assert (encoding.upper().replace("-LE", "LE").replace("-BE", "BE"), text) in [
        (reading.name, reading.text) for reading in caught.value.readings]


def test_a_marked_text_that_is_damaged_says_so() -> None:
    with pytest.raises(UnclearText, match="marked as UTF-16 and damaged"):
        decode_text("a fox".encode("utf-16")[:-1])
    with pytest.raises(UnclearText, match="marked as UTF-8 and damaged"):
        decode_text(b"\xef\xbb\xbfcaf\xe9")


ALPHABETS = {"cp1251": "абвгдежзийклмнопрстуфхцчшщъыьэюя", "koi8_r": "абвгдежзийклмнопрстуфхцчшщъыьэюя",
             "cp1253": "αβγδεζηθικλμνξοπρστυφχψω",
             "cp1255": "אבגדהוזחטיכלמנסעפצקרשת",
             "cp949": "가나다라마바사아자차카타파하고양이개새집꽃산",
             "shift_jis": "あいうえおかきくけこさしすせそアイウエオ猫犬花木山川空海",
             "gbk": "一只狐狸红色花朵女孩男人街道城市天空大海山水树木",
             "big5": "一隻狐狸紅色花朵女孩男人街道城市天空大海山水樹木"}


@given(st.data())
def test_words_of_another_alphabet_never_become_western(data: st.DataObject) -> None:
    encoding = data.draw(st.sampled_from(sorted(ALPHABETS)))
    words = st.text(st.sampled_from(ALPHABETS[encoding]), min_size=2, max_size=9)
    text = " ".join(data.draw(st.lists(st.one_of(words, st.sampled_from(["a", "3d icon", "TOK", "photo,"])), min_size=1,
                                       max_size=6)))
    raw = text.encode(encoding)
    try:
        assume(raw.decode("utf-8") == text)  # ASCII alone, or bytes that happen to be UTF-8
    except UnicodeDecodeError:
        with pytest.raises(UnclearText):
            decode_text(raw)


@given(st.binary(max_size=60))
def test_any_bytes_are_text_or_refused(raw: bytes) -> None:
    try:
        text, encoding = decode_text(raw)
    except UnclearText as error:
        assert f"{error}"
    else:
        assert text.encode(encoding) == raw or encoding in ("utf-8-sig", "utf-16", "utf-32")


# ---------------------------------------------------------------------------------------------------------- in a folder

CYRILLIC = "лиса, 3d icon"
RECORD = {"file_name": "fox.png", "text": CYRILLIC}
FILES = {"fox.txt": CYRILLIC, "metadata.jsonl": json.dumps(RECORD, ensure_ascii=False),
         "metadata.csv": f'file_name,text\nfox.png,"{CYRILLIC}"\n', "fox.caption": CYRILLIC}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("encoding", ["cp1251", "koi8_r"])
def test_sidecars_and_tables_go_through_one_decoder_and_the_command_converts_them(
    tmp_path: Path, name: str, encoding: str
) -> None:
    folder = tmp_path / "it's mine"
    folder.mkdir()
    marked(1, 40, 40).save(folder / "fox.png")
    (folder / name).write_bytes(FILES[name].encode(encoding))
    options = data_options(instance_data_dir=folder)
    _, (problem,) = read_rows(options)
    assert problem.kind == "data" and name in problem.why and CYRILLIC in problem.why and "iconv -f" in problem.fix
    subprocess.run(problem.fix, shell=True, check=True)
    rows, problems = read_rows(options)
    assert not problems and [row.caption for row in rows] == [CYRILLIC]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-8-sig"])
@pytest.mark.parametrize("name", FILES)
def test_western_and_marked_tables_are_read(tmp_path: Path, name: str, encoding: str) -> None:
    marked(1, 40, 40).save(tmp_path / "fox.png")
    (tmp_path / name).write_bytes(FILES[name].replace(CYRILLIC, "a café, déjà vu").encode(encoding))
    rows, problems = read_rows(data_options(instance_data_dir=tmp_path))
    assert not problems and [row.caption for row in rows] == ["a café, déjà vu"]


def test_one_command_converts_hundreds_and_leaves_utf8_alone(tmp_path: Path) -> None:
    for i in range(30):
        marked(i, 40, 40).save(tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.txt").write_bytes(f"红色的花 {i}".encode("gbk" if i % 6 else "utf-8"))
    options = data_options(instance_data_dir=tmp_path)
    _, (problem,) = read_rows(options)
    assert problem.what.startswith("25 files")
    subprocess.run(problem.fix, shell=True, check=True)
    rows, problems = read_rows(options)
    assert not problems and [row.caption for row in rows] == [f"红色的花 {i}" for i in range(30)]
