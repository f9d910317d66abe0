"""The passes of distribution matching: which levels they draw, what they weigh, and that without it there is none."""

from __future__ import annotations

import pytest
import torch

from trainkit.diffusion import EDMSchedule, NoiseSchedule, make_levels
from trainkit.errors import UserError
from trainkit.losses.matching_term import ALIKE, MODES, MatchingTerm, make_passes, problems, window_of
from trainkit.losses.objective import Outcome, make_objective
from trainkit.losses.passes import Pass
from trainkit.options import MatchingOptions, ObjectiveOptions

SD_BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
KEYS = [(7, 3, slot) for slot in range(6)]
BOUNDS = (0.1925, 3.07)


class Recorder:
    """Stands for the loss: remembers what it was asked, and answers with one number a sample."""

    def __init__(self, answer: float = 2.0):
        self.answer, self.asked = answer, []

    def __call__(self, x0_hat, x0, *, snr, weight, alike, picture):
        self.asked.append(dict(x0_hat=x0_hat, x0=x0, snr=snr, weight=weight, alike=alike, picture=picture))
        return torch.full_like(weight, self.answer)

    def low(self, x):
        return x.mean((2, 3), keepdim=True).expand_as(x)

    def require(self, latents):
        if latents[1] < 2:
            raise ValueError("too small to split: train larger")

    def describe(self):
        return {"dist_match/loss": self.answer}

    def pack(self):
        return {"mean": torch.tensor([1.0])}, {"count": 3}

    def unpack(self, tensors, data):
        self.restored = tensors, data


def sd() -> NoiseSchedule:
    return NoiseSchedule((1 - SD_BETAS).cumprod(0), "epsilon")


def plain(schedule=None, **flags) -> Pass:
    schedule = schedule or sd()
    o = ObjectiveOptions(**flags)
    return Pass(make_levels(o, schedule), make_objective(o, schedule.prediction))


def passes(mode: str, recorder: Recorder | None = None, base: Pass | None = None, together: int = 4, **flags):
    o = MatchingOptions(**{"dist_match_gain": 1.0, "dist_match_mode": mode, **flags})
    return make_passes(o, base or plain(), lambda: recorder or Recorder(), seed=7, snr_gamma=5.0, together=together,
                       memories={})


def outcome(one: Pass, keys=KEYS) -> Outcome:
    """What a network that outputs 0 makes of random latents at the pass's levels."""
    g = torch.Generator().manual_seed(0)
    x0, n = (torch.randn(len(keys), 4, 8, 8, generator=g) for _ in range(2))
    level = one.level(one.keys(keys))
    z = one.loss.pred.add_noise(x0, n, level)
    return Outcome(torch.zeros_like(x0), x0=x0, z=z, n=n, level=level, share=torch.ones(len(keys)),
                   is_class=torch.zeros(len(keys)) > 0, prompts=["a", "b", "a", "a", "b", "c"][: len(keys)],
                   pictures=["1", "2", "3", "1", "5", "6"][: len(keys)],
                   text=torch.randn(len(keys), 5, 3, generator=g))


# -- the window -------------------------------------------------------------------------------------------------------


def test_the_default_window_is_timesteps_200_to_599_of_sds_schedule():
    window = window_of(plain().levels, *BOUNDS)
    t = window(torch.linspace(0, 1 - 2**-30, 40_000, dtype=torch.float64)).cond
    assert (int(t.min()), int(t.max()), len(t.unique())) == (200, 599, 400)
    assert window.share == pytest.approx(0.4, abs=1e-12)


@pytest.mark.parametrize("law", ["uniform", "logit_normal", "mode", "cosmap"])
def test_a_window_is_the_runs_own_law_cut_to_it(law):
    base = plain(timestep_sampling=law).levels
    window = window_of(base, *BOUNDS)
    u = torch.linspace(0, 1 - 2**-30, 200_000, dtype=torch.float64)
    t = base(u).cond
    inside = (t >= 200) & (t < 600)
    assert window.share == pytest.approx(float(inside.double().mean()), abs=2e-5)
    cut, drawn = t[inside].double(), window(u).cond.double()
    assert float(drawn.mean()) == pytest.approx(float(cut.mean()), rel=1e-4)
    assert (drawn.min(), drawn.max()) == (200, 599)


@pytest.mark.parametrize("flags", [{"edm_sigmas": "karras"}, {"edm_sigmas": "lognormal"}])
def test_a_window_works_for_laws_of_sigma_and_edm_models(flags):
    for schedule in (sd(), EDMSchedule()):
        window = window_of(plain(schedule, **flags).levels, *BOUNDS)
        snr = window(torch.linspace(0, 1 - 2**-30, 1000, dtype=torch.float64)).snr
        assert BOUNDS[0] * 0.999 <= snr.min() and snr.max() <= BOUNDS[1] * 1.001 and snr.max() > 10 * snr.min()


def test_a_window_without_levels_is_refused_with_both_flags_named():
    with pytest.raises(UserError, match="--dist_match_min_snr, --dist_match_max_snr"):
        passes("combo", base=plain(max_timestep=100))


# -- the modes --------------------------------------------------------------------------------------------------------


def test_without_a_weight_there_is_one_plain_pass_and_no_loss_is_made():
    def unwanted():
        raise AssertionError("nothing of the term may be built")

    base = plain()
    one = make_passes(MatchingOptions(), base, unwanted, seed=0, snr_gamma=None, together=1, memories={})
    assert one(0) == (base,) and one.describe() == {} and one.pack() == ({}, {})


def test_a_second_pass_has_one_level_for_all_and_noise_of_its_own():
    ordinary, second = passes("extra")(3)
    assert ordinary.keys(KEYS) == KEYS and ordinary.level(KEYS).cond.unique().numel() > 1
    keys = second.keys(KEYS)
    assert not set(keys) & set(KEYS)
    shared = second.level(keys).cond
    assert shared.unique().numel() == 1 and 200 <= shared[0] < 600
    other_rank = [(7, 3, slot, second.name) for slot in range(6, 9)]
    assert second.level(other_rank).cond[0] == shared[0], "the level is the step's, on every rank"
    steps = {int(second.level([(7, step, 0, second.name)]).cond) for step in range(50)}
    assert len(steps) > 30


def test_extra_is_the_term_alone_and_combo_is_both():
    recorder = Recorder(answer=2.0)
    for mode in ("extra", "combo"):
        _, second = passes(mode, recorder)(0)
        o = outcome(second)
        base = plain().loss(o)
        expected = torch.full((6,), 2.0) + (base if mode == "combo" else 0)
        torch.testing.assert_close(second.loss(o), expected)
    assert (base > 0.1).all()


def test_the_term_sees_the_x0_of_the_output():
    recorder = Recorder()
    _, second = passes("combo", recorder)(0)
    o = outcome(second)
    second.loss(o)
    torch.testing.assert_close(recorder.asked[0]["x0_hat"], second.loss.pred.to_x0(o.out, o.z, o.level))
    assert recorder.asked[0]["x0"] is o.x0 and recorder.asked[0]["alike"] is None
    torch.testing.assert_close(recorder.asked[0]["weight"], torch.ones(6))  # min(1, 5/snr) in the window
    picture = recorder.asked[0]["picture"]
    assert (picture[:, None] == picture[None]).tolist() == [[a == b for b in o.pictures] for a in o.pictures]


def test_swap_has_one_pass_and_swaps_the_share_of_steps_asked_for():
    chosen = [passes("swap", dist_match_swap=0.3)(step) for step in range(600)]
    assert all(len(found) == 1 for found in chosen)
    assert sum(found[0].shared for found in chosen) / 600 == pytest.approx(0.3, abs=0.06)
    assert not any(found[0].name for found in chosen), "its noise is the ordinary one"


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_swap_keeps_the_expectation_of_the_ordinary_loss(p):
    """Σ over u of (1−p)·loss at base levels + p·loss at window levels, reweighed = Σ of the plain loss."""
    found = [one for step in range(400) for one in passes("swap", Recorder(0.0), dist_match_swap=p)(step)]
    ordinary, shared = next(f for f in found if not f.shared), next(f for f in found if f.shared)
    u = (torch.arange(20_000) + 0.5) / 20_000

    def mean_worth(one: Pass) -> float:
        level = one.levels(u)
        return float((one.loss.weight(level) * level.snr.rsqrt()).double().mean())  # any function of the level

    base = plain()
    level = base.levels(u)
    wanted = float((base.loss.weight(level) * level.snr.rsqrt()).double().mean())
    assert (1 - p) * mean_worth(ordinary) + p * mean_worth(shared) == pytest.approx(wanted, rel=1e-4)


def test_reuse_counts_only_samples_in_the_window():
    recorder = Recorder()
    (one,) = passes("reuse", recorder)(0)
    keys = [(7, 0, slot) for slot in range(40)]
    level = one.level(keys)
    latents = torch.zeros(40, 4, 8, 8)
    one.loss(Outcome(latents, x0=latents, z=latents, n=latents, level=level, share=torch.ones(40),
                     is_class=torch.zeros(40) > 0))
    inside = (level.cond >= 200) & (level.cond < 600)
    assert 5 < inside.sum() < 35
    assert torch.equal(recorder.asked[0]["weight"] > 0, inside)


def test_min_snr_and_shares_weigh_the_samples_of_the_statistic():
    recorder = Recorder()
    term = MatchingTerm(recorder, "none", snr_gamma=1.0)
    _, second = passes("combo")(0)
    o = outcome(second)
    term(second.loss.judge(o))
    torch.testing.assert_close(recorder.asked[0]["weight"], (1.0 / o.level.snr).clamp(max=1))


@pytest.mark.parametrize("kernel", ALIKE)
def test_kernels_are_told_what_to_compare_by(kernel):
    _, second = passes("combo", dist_match_kernel=kernel)(0)
    o = outcome(second)
    alike = ALIKE[kernel](o, Recorder())
    if kernel == "none":
        assert alike is None
    elif kernel == "class":
        same = alike[:, None] == alike[None]
        assert same.tolist() == [[a == b for b in o.prompts] for a in o.prompts]
    else:
        assert alike.shape[0] == 6 and alike.ndim == 2 and alike.std() > 0


def test_one_picture_has_nothing_to_be_matched_with_but_a_bank():
    for changes in ({}, {"dist_match_gain": 0.0, "dist_match": 0.003}):
        with pytest.raises(UserError, match="--train_batch_size 2 or more"):
            passes("combo", together=1, **changes)
    passes("combo", together=1, dist_match_bank=0.9)
    assert len(MODES) == 4


def test_what_the_loss_remembers_and_finds_is_the_runs():
    recorder = Recorder()
    found = passes("combo", recorder)
    tensors, data = found.pack()
    found.unpack(tensors, data)
    assert recorder.restored == recorder.pack() and found.describe() == {"dist_match/loss": 2.0}


def test_what_the_loss_refuses_is_the_runs_message():
    def refusing():
        raise ValueError("zero: is no boundary of this and that: leave one out")

    o, captions = MatchingOptions(dist_match_gain=1.0), {"1": "a", "2": "b", "3": "a"}
    (problem,) = problems(o, refusing, captions, (4, 8, 8))
    assert (problem.why, problem.fix) == ("zero: is no boundary of this and that", "leave one out")
    (problem,) = problems(o, Recorder, captions, (4, 1, 1))
    assert problem.why == "too small to split"
    assert not list(problems(MatchingOptions(), refusing, captions, (4, 8, 8)))
    assert not list(problems(o, Recorder, captions, (4, 8, 8)))


def test_a_class_needs_two_pictures_with_one_caption():
    o = MatchingOptions(dist_match_gain=1.0, dist_match_kernel="class")
    (problem,) = problems(o, Recorder, {"1": "a", "2": "b", "3": "c"}, (4, 8, 8))
    assert problem.where == "--dist_match_kernel class"
    assert not list(problems(o, Recorder, {"1": "a", "2": "b", "3": "a"}, (4, 8, 8)))


def test_one_picture_however_often_repeated_has_nothing_in_common_with_another():
    o = MatchingOptions(dist_match_gain=1.0)
    (problem,) = problems(o, Recorder, {"1": "a"}, (4, 8, 8))
    assert problem.what == "distribution matching of one picture"
    assert not list(problems(o, Recorder, {}, (4, 8, 8))), "no picture at all is the data's problem"


def test_levels_are_comparable_by_whitening_or_by_weighing_them_in_noise():
    assert MatchingOptions(dist_match_gain=1, dist_match_mode="reuse").loss["timestep_weight"] == "x0"
    assert MatchingOptions(dist_match=1, dist_match_mode="reuse").loss["timestep_weight"] == "eps"
    assert MatchingOptions(dist_match=1).loss["timestep_weight"] == "x0"


def test_one_flag_is_the_form_as_it_was_first_written_and_the_other_the_better_one():
    first, better = MatchingOptions(dist_match=0.003), MatchingOptions(dist_match_gain=0.3)
    assert (first.mode, first.loss["method"], first.loss["statistic"], first.loss["band_norm"]) == (
        "extra", "wavelet", "sum", "grid")
    assert (better.mode, better.loss["method"], better.loss["statistic"], better.loss["band_norm"]) == (
        "combo", "dct", "u", "whiten")


def test_what_decides_the_bits_is_what_flags_come_to_not_how_they_were_written():
    short, long = MatchingOptions(dist_match=0.003), MatchingOptions(dist_match=0.003, dist_match_statistic="sum")
    assert short.decisive() == long.decisive() != MatchingOptions(dist_match=0.004).decisive()
    dct = [MatchingOptions(dist_match_gain=1, dist_match_wavelet=name).decisive() for name in ("db3", "db4")]
    assert dct[0] == dct[1], "a wavelet is not read by the method dct"
    assert MatchingOptions(dist_match_mode="swap", dist_match_swap=0.2).decisive() == MatchingOptions().decisive()
    swaps = [MatchingOptions(dist_match_gain=1, dist_match_mode="swap", dist_match_swap=p) for p in (0.2, 0.3)]
    assert swaps[0].decisive() != swaps[1].decisive()
