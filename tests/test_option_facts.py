"""The facts about a flag stand with its field alone: they are right, and a new flag needs no other place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Annotated, get_args

import pytest
from pydantic import TypeAdapter, ValidationError, create_model

from tests.support.made_up_run import make_run
from trainkit.errors import UserError
from trainkit.options import CONCERNS, PRESETS, TRAINERS, Concern, Flag, LoraOptions, OptionSet, RunOptions, parse
from trainkit.options.base import Resume, always, opt
from trainkit.options.config_text import markdown
from trainkit.options.prerequisites import Prerequisite, needs
from trainkit.options.trainers import known_flags
from trainkit.publish import settings
from trainkit.report.facts import RunFacts, public
from trainkit.run_fingerprint import decisive_options, fingerprint

Kinds = dict[str, type[Concern]]
REQUIRED = {"pretrained_model_name_or_path": "base", "instance_prompt": "a photo of TOK"}


def option_set(kinds: Kinds) -> type[OptionSet]:
    return create_model("Options", __base__=OptionSet, **{name: (kind, ...) for name, kind in kinds.items()})


def flags_of(trainer: str) -> dict[str, Flag]:
    return option_set(TRAINERS[trainer]).flags()


# A new flag is one field and one use ---------------------------------------------------------------------------------


class LoraWithDummy(LoraOptions):
    """Low-rank adapters"""

    lora_dummy: float = opt(
        1.5, "what a dummy is good for", unit="factor", read_with="use_dora", card="Dummy factor", gt=0)

    @property
    def scaled(self) -> float:  # the one use
        return self.lora_dummy * self.rank


class RunWithPlace(RunOptions):
    """The run"""

    dummy_dir: str | None = opt(None, "a place", path=True, resume="may change")


@pytest.fixture
def options() -> Iterator[type[OptionSet]]:
    """The DreamBooth trainer's options, as if its concerns of adapters and of the run had a field more."""
    kinds = CONCERNS | {"lora": LoraWithDummy, "run": RunWithPlace}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRAINERS, "DreamBooth", kinds)
        known_flags.cache_clear()
        yield option_set(kinds)
    known_flags.cache_clear()


def read(options: type[OptionSet], *argv: str) -> OptionSet:
    return parse(options, [*(f"--{name}={value}" for name, value in REQUIRED.items()), *argv], description="")


def test_a_new_flag_is_in_the_help_and_on_the_page_of_flags(options, capsys):
    with pytest.raises(SystemExit):
        read(options, "--help_all")
    shown = " ".join(capsys.readouterr().out.split())
    assert "--lora_dummy FACTOR what a dummy is good for (default: 1.5)" in shown
    assert "| `--lora_dummy` (DreamBooth only) | factor, > 0 | `1.5` |" in markdown(TRAINERS, PRESETS)


def test_a_new_flag_is_read_from_every_source_and_has_its_limits(options, tmp_path, monkeypatch):
    (tmp_path / "c.toml").write_text("[lora]\nlora_dummy = 2\nrank = 3\n")
    assert read(options, f"--config={tmp_path / 'c.toml'}").lora.scaled == 6
    monkeypatch.setenv("LORA_LORA_DUMMY", "2.5")
    assert read(options).lora.scaled == 10 and read(options, "--lora-dummy=3").lora.scaled == 12
    with pytest.raises(UserError, match="--lora_dummy cannot be '0'"):
        read(options, "--lora_dummy=0")
    with pytest.raises(UserError, match="did you mean --lora_dummy?"):
        read(options, "--lora_dumy=1")


def test_a_new_flag_is_printed_with_the_config(options, capsys):
    with pytest.raises(SystemExit):
        read(options, "--lora_dummy=2", "--print_config")
    assert re.search(r"^lora_dummy = 2.0 +# command line$", capsys.readouterr().out, re.M)


def test_a_new_flag_without_effect_is_said_to_have_none(options):
    assert read(options, "--lora_dummy=2").notices() == [
        "--lora_dummy has no effect: it is read only with --use_dora"]
    assert not read(options, "--lora_dummy=2", "--use_dora").notices()


def test_a_new_flag_is_in_the_fingerprint_unless_it_says_otherwise(options):
    run = SimpleNamespace(global_batch=4, precision="no", world=1)
    row = SimpleNamespace(id="a", digest="b", all_captions=("c",), repeat=0, is_class=False, cut=None, mask=None,
                          loss_weight=1.0, handling=None)
    family = SimpleNamespace(identity={}, sampled_identity={}, vae_batch_size=1, storage=SimpleNamespace(name=""))
    one, other = (fingerprint(read(options, f"--lora_dummy={value}", f"--dummy_dir={value}"), [row], family, run, 10)
                  for value in (2, 3))
    assert (one["--lora_dummy"], other["--lora_dummy"]) == (2.0, 3.0)
    assert {name for name in one if one[name] != other[name]} == {"--lora_dummy"}


def test_a_new_flag_is_in_the_card_where_it_is_not_the_default_and_has_an_effect(options, tmp_path):
    def told(name: str, **given: object) -> str | None:
        return settings(RunFacts(make_run(tmp_path / name, **given))).get("Dummy factor")

    assert told("used", lora_dummy=2.0, use_dora=True) == "2.0"
    assert told("default", lora_dummy=1.5, use_dora=True) is told("idle", lora_dummy=2.0) is told("none") is None


def test_a_new_flag_that_is_a_path_is_told_without_its_folders(options):
    assert public("dummy_dir", "/home/anna/cats") == "cats" and options.flags()["dummy_dir"].facts.unit == "path"


# The facts of all flags ----------------------------------------------------------------------------------------------


def prerequisites(trainer: str) -> Iterator[tuple[Flag, Prerequisite]]:
    return ((flag, needed) for flag in flags_of(trainer).values() for needed in flag.prerequisites)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_a_flag_is_read_with_is_there(trainer):
    flags, known = flags_of(trainer), known_flags()
    for flag, needed in prerequisites(trainer):
        assert any(all(term.flag in flags for term in terms) for terms in needed.alternatives), flag.name
        for term in needed.terms:
            assert term.flag in known, (flag.name, term.flag)
            choices = known[term.flag].choices  # none: any text
            assert not choices or set(term.choices) <= set(choices), (flag.name, term)
        assert set(re.findall(r"--(\w+)", needed.said)) <= needed.flags, f"--{flag.name} says what it does not ask"


def test_flags_of_both_trainers_have_the_same_facts():
    here, there = map(flags_of, TRAINERS)
    for name in here.keys() & there.keys():
        one, other = here[name].facts, there[name].facts
        assert (one.resume, one.read_with) == (other.resume, other.read_with), name
        assert (one.card, one.path) == (other.card, other.path), name
        if one.card and not one.card.always:
            assert here[name].default == there[name].default, f"--{name}: which of them does the card leave out?"


def test_the_card_tells_every_setting_by_a_name_of_its_own_and_no_place():
    flags = [flag for flag in known_flags().values() if flag.facts.card]
    labels = [flag.facts.card.label for flag in flags]
    assert len(labels) == len(set(labels)) > 40
    places = [flag.name for flag in flags if flag.facts.path]
    assert places == ["pretrained_vae_model_name_or_path", "network_weights"], "their last parts: tests/test_repeat.py"
    assert not [flag.name for flag in flags if flag.secret]
    assert always("Rank").always and known_flags()["rank"].facts.card == always("Rank")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_facts_of_a_flag_hold_together(trainer):
    for name, flag in flags_of(trainer).items():
        facts = flag.facts
        assert facts.resume in get_args(Resume), f"--{name}: a resumed run would not know what to do with it"
        assert flag.value_type is str or not facts.path, f"--{name}: a place is a text"
        assert facts.path or facts.unit not in ("path", "path or name"), (
            f"--{name}: report and card would show the user's folders; say path=, not unit=")
        assert facts.resume != "decisive" or not flag.secret, (
            f"--{name}: the secret would be written to the disk with the fingerprint")
        assert not facts.notice or (flag.is_switch and flag.default is False and facts.resume == "may change"), (
            f"--{name}: the notice that it does nothing would stand where it does something")


TEXTS = {  # values of flags that do not take every text
    "optimizer_args": "eps=1e-6", "dist_match_weights": "1,2", "dist_match_wavelet": "db2", "fourier_scales": "1,8",
    "fourier_scale_weights": "1,2", "fourier_scale_high_freq_weights": "1,2,3", "fourier_mix": "0.3,0.7",
    "fourier_bands": "high:2", "resolutions": "768,1024",
}
SWITCHED_ON = {"guidance_token": {"guidance_token": 8.0}}  # only whether it is above 0 counts


def another(flag: Flag, *but: object) -> object:
    """A value of the flag that is neither its default nor one of `but`."""
    if flag.choices:
        return next(choice for choice in reversed(flag.choices) if choice not in (flag.default, *but))
    if flag.is_switch:
        return flag.default is False
    if flag.value_type not in (int, float):
        return TEXTS.get(flag.name, "other")
    start = flag.default or 0
    return next(value for value in (2 * start, 0.9 * start, start + 1, 0.5) if value != start and takes(flag, value))


def takes(flag: Flag, value: object) -> bool:
    try:
        TypeAdapter(Annotated[flag.field.annotation, flag.field]).validate_python(value)
    except ValidationError:
        return False
    return True


def surroundings(flags: dict[str, Flag], name: str) -> dict[str, object]:
    """Values beside which the flag is read."""
    found = SWITCHED_ON.get(name, {})
    defaults = {flag.name: flag.default for flag in flags.values()}
    for needed in flags[name].prerequisites:
        terms = next(terms for terms in needed.alternatives
                     if all(term.flag in flags and term.flag != name for term in terms))
        for term in [term for term in terms if not term.holds(defaults | found)]:
            value = term.choices[0] if term.sign == "=" else another(flags[term.flag], *term.choices)
            found = found | surroundings(flags, term.flag) | {term.flag: value}
    return found


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_flag_moves_the_fingerprint_if_and_only_if_it_is_decisive(trainer):
    kinds, flags = TRAINERS[trainer], flags_of(trainer)
    options = option_set(kinds)

    def decisive(values: dict[str, object]) -> dict[str, object]:
        given = REQUIRED | values
        parts = {concern: kind(**{n: given[n] for n in kind.model_fields if n in given})
                 for concern, kind in kinds.items()}
        return decisive_options(options(**parts))

    for name, flag in flags.items():
        beside = surroundings(flags, name)
        moved = decisive(beside) != decisive(beside | {name: another(flag)})
        what = "would be refused, though it may change" if moved else "would go on as another training"
        assert moved == (flag.facts.resume == "decisive"), f"resumed with another --{name}, a run {what}: {beside}"


# What a flag is read with --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("condition", "holding", "failing", "words"), [
    ("a", {"a": 1}, {"a": 0}, "--a"),
    ("a>0", {"a": 0.5}, {"a": 0.0}, "--a above 0"),
    ("no a", {"a": None}, {"a": "x"}, "no --a"),
    ("a=x|y", {"a": "y"}, {"a": "z"}, "--a x or y"),
    ("a!=x|y", {"a": None}, {"a": "x"}, "--a other than x or y"),
    ("a or b", {"a": "", "b": 1}, {"a": "", "b": 0}, "--a or --b"),
    ("a and b", {"a": 1, "b": 1}, {"a": 1, "b": 0}, "--a and --b"),
    ("a or b and no c", {"a": 0, "b": 1, "c": 0}, {"a": 0, "b": 1, "c": 1}, "--a or --b and no --c"),
])
def test_conditions_are_read_as_they_are_written(condition, holding, failing, words):
    needed = needs(condition)
    assert needed.holds(holding) and not needed.holds(failing)
    assert needed.words(holding) == words and needed.flags == set(holding)


def test_a_condition_names_no_flag_that_a_trainer_lacks_and_may_be_called_otherwise():
    assert needs("a or b").words({"b": 0}) == "--b"
    assert needs("a=x|y", "an --a").words({"a": 0}) == "an --a"
    for wrong in ("", "a=", "a>1", "no a=x", "a = x", "a|b"):
        with pytest.raises(AssertionError):
            needs(wrong)
