"""The passes of distribution matching: which levels they draw, what they weigh, and that without it there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.made_up_pass import KEYS, Network, batch_of, forward_of, losses_of, step_of
from tests.support.matching import Recorder, passes, plain, sd
from trainkit.diffusion import EDMSchedule, draw_noise
from trainkit.errors import UserError
from trainkit.losses.matching_term import ALIKE, MODES, MatchingTerm, make_passes, problems, window_of
from trainkit.losses.objective import Objective
from trainkit.options import MatchingOptions

BOUNDS = (0.1925, 3.07)


def recording(o: MatchingOptions) -> Recorder:
    return Recorder()


def drawn(objective: Objective, keys=KEYS) -> tuple[Tensor, list]:
    """What a training step draws for a pass: the timestep of each sample, and the keys of its noise."""
    asked, network = [], Network()

    def noise(shape, keys):
        asked.extend(keys)
        return draw_noise(shape, keys)

    step_of(network, noise=noise).losses(objective, batch_of(keys), torch.zeros(len(keys), 4, 8, 8))
    ((_, level, _),) = network.asked
    return level.cond, asked


# -- the window -------------------------------------------------------------------------------------------------------


def test_the_default_window_is_timesteps_200_to_599_of_sds_schedule():
    window = window_of(plain().levels, *BOUNDS)
    t = window(torch.linspace(0, 1 - 2**-30, 40_000, dtype=torch.float64)).cond
    assert (int(t.min()), int(t.max()), len(t.unique())) == (200, 599, 400)
    assert window.probability == pytest.approx(0.4, abs=1e-12)


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal", "mode", "cosmap"])
def test_a_window_is_the_runs_own_distribution_cut_to_it(distribution):
    base = plain(timestep_sampling=distribution).levels
    window = window_of(base, *BOUNDS)
    u = torch.linspace(0, 1 - 2**-30, 200_000, dtype=torch.float64)
    t = base(u).cond
    inside = (t >= 200) & (t < 600)
    assert window.probability == pytest.approx(float(inside.double().mean()), abs=2e-5)
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
    def unwanted(o):
        raise AssertionError("nothing of the term may be built")

    base = plain()
    found = make_passes(MatchingOptions(), base, seed=0, snr_gamma=None, together=1, memories={}, matcher=unwanted)
    assert found.of_step(0) == (base,) and found.of_step(0)[0] is base
    assert found.describe() == {} and found.pack() == ({}, {})


def test_a_second_pass_has_one_level_for_all_and_noise_of_its_own():
    ordinary, second = passes("extra").of_step(3)
    t, keys = drawn(ordinary)
    assert keys == KEYS and t.unique().numel() > 1
    shared, keys = drawn(second)
    assert not set(keys) & set(KEYS)
    assert shared.unique().numel() == 1 and 200 <= shared[0] < 600
    other_rank = [(7, 3, slot) for slot in range(6, 9)]
    assert drawn(second, other_rank)[0][0] == shared[0], "the level is the step's, on every rank"
    steps = {int(drawn(second, [(7, step, 0)])[0]) for step in range(50)}
    assert len(steps) > 30


def test_extra_is_the_term_alone_and_combo_is_both():
    recorder = Recorder(answer=2.0)
    for mode in ("extra", "combo"):
        _, second = passes(mode, recorder).of_step(0)
        forward = forward_of(second)
        base = losses_of(plain(), forward)
        expected = torch.full((6,), 2.0) + (base if mode == "combo" else 0)
        torch.testing.assert_close(losses_of(second, forward), expected)
    assert (base > 0.1).all()


def test_the_term_sees_the_x0_of_the_output():
    recorder = Recorder()
    _, second = passes("combo", recorder).of_step(0)
    forward = forward_of(second)
    losses_of(second, forward)
    wanted = second.pred.to_x0(forward.out, forward.z, forward.level)
    torch.testing.assert_close(recorder.asked[0]["x0_hat"], wanted)
    assert recorder.asked[0]["x0"] is forward.x0 and recorder.asked[0]["alike"] is None
    torch.testing.assert_close(recorder.asked[0]["weight"], torch.ones(6))  # min(1, 5/snr) in the window
    image = recorder.asked[0]["picture"]
    digests = forward.batch.images
    assert (image[:, None] == image[None]).tolist() == [[a == b for b in digests] for a in digests]


def test_swap_has_one_pass_and_swaps_the_share_of_steps_asked_for():
    swapping = passes("swap", dist_match_swap=0.3)
    chosen = [swapping.of_step(step) for step in range(600)]
    assert all(len(found) == 1 for found in chosen)
    assert sum(found[0].shared for found in chosen) / 600 == pytest.approx(0.3, abs=0.06)
    assert not any(found[0].name for found in chosen), "its noise is the ordinary one"


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_swap_keeps_the_expectation_of_the_ordinary_loss(p):
    """Σ over u of (1−p)·loss at base levels + p·loss at window levels, reweighed = Σ of the plain loss."""
    swapping = passes("swap", Recorder(0.0), dist_match_swap=p)
    found = [one for step in range(400) for one in swapping.of_step(step)]
    ordinary, shared = next(f for f in found if not f.shared), next(f for f in found if f.shared)
    u = (torch.arange(20_000) + 0.5) / 20_000

    def mean_loss(objective: Objective) -> float:
        level = objective.levels(u)
        return float((objective.weight(level) * level.snr.sqrt()).double().mean())  # any function of the level

    wanted = mean_loss(plain())
    assert (1 - p) * mean_loss(ordinary) + p * mean_loss(shared) == pytest.approx(wanted, rel=1e-4)


def test_reuse_counts_only_samples_in_the_window():
    recorder = Recorder()
    (one,) = passes("reuse", recorder).of_step(0)
    forward = forward_of(one, [(7, 0, slot) for slot in range(40)])
    losses_of(one, forward)
    level = forward.level
    inside = (level.cond >= 200) & (level.cond < 600)
    assert 5 < inside.sum() < 35
    assert torch.equal(recorder.asked[0]["weight"] > 0, inside)


def test_min_snr_and_shares_weigh_the_samples_of_the_statistic():
    recorder = Recorder()
    term = MatchingTerm(recorder, "none", snr_gamma=1.0)
    _, second = passes("combo").of_step(0)
    forward = forward_of(second)
    term(forward, observe=True)
    expected = (1.0 / forward.level.snr).clamp(max=1)
    torch.testing.assert_close(recorder.asked[0]["weight"], expected)
    loss_weight = torch.linspace(0, 2, 6)
    term(replace(forward, batch=replace(forward.batch, loss_weight=loss_weight)), observe=True)
    torch.testing.assert_close(recorder.asked[1]["weight"], loss_weight * expected)


@pytest.mark.parametrize("kernel", ALIKE)
def test_kernels_are_told_what_to_compare_by(kernel):
    _, second = passes("combo", dist_match_kernel=kernel).of_step(0)
    forward = forward_of(second)
    alike = ALIKE[kernel](forward, Recorder())
    if kernel == "none":
        assert alike is None
    elif kernel == "class":
        same = alike[:, None] == alike[None]
        prompts = forward.batch.prompts
        assert same.tolist() == [[a == b for b in prompts] for a in prompts]
    else:
        assert alike.shape[0] == 6 and alike.ndim == 2 and alike.std() > 0


def test_one_image_has_nothing_to_be_matched_with_but_a_bank():
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
    def refusing(o):
        raise ValueError("zero: is no boundary of this and that: leave one out")

    o, captions = MatchingOptions(dist_match_gain=1.0), {"1": "a", "2": "b", "3": "a"}
    (problem,) = problems(o, captions, (4, 8, 8), refusing)
    assert (problem.why, problem.fix) == ("zero: is no boundary of this and that", "leave one out")
    (problem,) = problems(o, captions, (4, 1, 1), recording)
    assert problem.why == "too small to split"
    assert not list(problems(MatchingOptions(), captions, (4, 8, 8), refusing))
    assert not list(problems(o, captions, (4, 8, 8), recording))


def test_a_class_needs_two_images_with_one_caption():
    o = MatchingOptions(dist_match_gain=1.0, dist_match_kernel="class")
    (problem,) = problems(o, {"1": "a", "2": "b", "3": "c"}, (4, 8, 8), recording)
    assert problem.where == "--dist_match_kernel class"
    assert not list(problems(o, {"1": "a", "2": "b", "3": "a"}, (4, 8, 8), recording))


def test_one_image_however_often_repeated_has_nothing_in_common_with_another():
    o = MatchingOptions(dist_match_gain=1.0)
    (problem,) = problems(o, {"1": "a"}, (4, 8, 8), recording)
    assert problem.what == "distribution matching of one image"
    assert not list(problems(o, {}, (4, 8, 8), recording)), "no image at all is the data's problem"


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
