"""The forward passes of an optimizer step: what they yield, what the network is told, and looking without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.made_up_pass import SHAPE, Network, batch_of, step_of, told
from tests.support.matching import Recorder, passes, plain, sd
from trainkit import rng
from trainkit.condition import Condition
from trainkit.data.batch import Batch
from trainkit.losses.matching_term import MODES, make_passes
from trainkit.losses.objective import per_sample
from trainkit.losses.passes import Passes, plain_objective
from trainkit.options import FourierOptions, MatchingOptions, ObjectiveOptions
from trainkit.training.step import TrainStep

MICRO_BATCH, NUM_INSTANCE, STEPS = 4, 8, 6


def micro_batch(step: int, micro: int = 0, *, seed: int = 7, count: int = MICRO_BATCH) -> Batch:
    """A part of the step's global batch, with latents of its own."""
    keys = [(seed, step, micro * count + i) for i in range(count)]
    return batch_of(keys, step=step, num_instance=NUM_INSTANCE, mean=rng.normal(SHAPE, keys, "latents"))


def trainable() -> Network:
    network = Network()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(std=0.2, generator=rng.generator("network", name))
    return network


# -- the step ---------------------------------------------------------------------------------------------------------


def test_each_pass_of_each_micro_batch_yields_its_part_of_the_steps_loss():
    step = step_of(trainable(), passes=passes("combo"))
    batches = [micro_batch(3, micro) for micro in range(2)]
    wanted = [step.losses(objective, batch, batch.mean).sum() / NUM_INSTANCE
              for batch in batches for objective in passes("combo").of_step(3)]
    found = list(step(batches))
    assert len(found) == 4 and all(loss.requires_grad for loss in found)
    assert torch.equal(torch.stack(found), torch.stack(wanted))


def test_a_pass_is_asked_for_only_when_the_one_before_has_been_used():
    """So that its graph may go: nothing of it is held."""
    network = trainable()
    losses = step_of(network, passes=passes("combo"))([micro_batch(0)])
    for asked in (1, 2):
        next(losses).backward()
        assert len(network.asked) == asked


def test_the_network_and_the_terms_are_told_the_text_the_sizes_and_what_images_add():
    told_to_terms = []

    def term(forward, *, observe):
        told_to_terms.append(forward.condition)
        return torch.zeros_like(forward.losses)

    def longer(condition: Condition, batch: Batch) -> Condition:
        image = rng.normal((1, 3), batch.keys, "image")
        return Condition(condition, embeds=torch.cat([condition["embeds"], image], 1))

    def marked(condition: Condition, batch: Batch) -> Condition:
        return Condition(condition, mark=condition["embeds"][:, -1])

    network, batch = trainable(), micro_batch(2)
    step = replace(step_of(network), adds=(longer, marked))
    step.losses(plain().plus(term), batch, batch.mean)
    ((_, _, condition),) = network.asked
    assert condition.keys() == {"embeds", "time_ids", "mark"} and told_to_terms == [condition]
    assert torch.equal(condition["embeds"][:, :5], told(batch.prompts)["embeds"])
    assert torch.equal(condition["mark"], rng.normal((1, 3), batch.keys, "image")[:, 0])
    assert torch.equal(condition["time_ids"], batch.time_ids)


def test_a_distribution_of_noise_levels_sees_the_size_of_the_latents_in_every_mode():
    """So that a schedule may depend on it; those of today do not."""
    sizes = []
    ordinary = plain()

    def levels(u: Tensor, size: tuple[int, int] | None = None):
        sizes.append(size)
        return ordinary.levels(u, size)

    for mode in MODES:
        step = step_of(trainable(), passes=passes(mode, base=replace(ordinary, levels=levels)))
        sizes.clear()  # those of the window, which is made once
        keys = [(7, 0, i) for i in range(MICRO_BATCH)]
        list(step([batch_of(keys, num_instance=NUM_INSTANCE, mean=rng.normal((4, 6, 10), keys, "latents"))]))
        assert sizes and set(sizes) == {(6, 10)}


def test_the_mask_of_a_batch_reaches_the_loss():
    step, batch = step_of(trainable()), micro_batch(2)
    mask = (torch.rand(MICRO_BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.4).float()
    errors = []

    def kept(e, level):
        errors.append(e**2)
        return errors[-1]

    objective = replace(plain(), error=kept)
    losses = step.losses(objective, replace(batch, mask=mask), batch.mean)
    assert torch.equal(losses, per_sample(errors[0], mask)) and not torch.equal(losses, per_sample(errors[0]))
    assert torch.equal(step.losses(plain(), batch, batch.mean), per_sample(errors[0]))


# -- looking without a trace ------------------------------------------------------------------------------------------


CASES = {"Fourier": (None, True), **{mode: (mode, False) for mode in MODES},
         **{f"Fourier, {mode}": (mode, True) for mode in MODES}}


def run_passes(mode: str | None, fourier: bool) -> Passes:
    """The passes of a run with everything that remembers: the gain of a target share, a bank, usual errors."""
    o = ObjectiveOptions(loss_type="fourier" if fourier else "l2", snr_gamma=5.0)
    term = FourierOptions(fourier_warmup_steps=1, fourier_mode="unified", fourier_target_share=0.2)
    objective, memories = plain_objective(o, term, sd(), total_steps=STEPS, note=lambda **facts: None)
    asked = MatchingOptions(dist_match_gain=0.5, dist_match_mode=mode, dist_match_bank=0.9,
                            dist_match_band_norm="whiten") if mode else MatchingOptions()
    return make_passes(asked, objective, seed=7, snr_gamma=5.0, together=MICRO_BATCH, memories=memories)


def look(step: TrainStep, number: int, *, observe: bool = False) -> Iterator[Tensor]:
    """Losses of other images in every pass of the step, with and without a graph, in batches of another size too."""
    for objective in step.passes.of_step(number):
        for count in (MICRO_BATCH, 3):
            batch = micro_batch(number, seed=99, count=count)
            yield step.losses(objective, batch, batch.mean, observe=observe)
            with torch.no_grad():
                yield step.losses(objective, batch, batch.mean, observe=observe)


def run(mode: str | None, fourier: bool, *, looks: int = 0, observe: bool = False) -> tuple[list[Tensor], list]:
    """Six steps of two micro-batches, with looks between them -> every loss and gradient; reports and states.

    looks  1: before each step, 2: after each pass too
    """
    network, tensors, others = trainable(), [], []
    step = step_of(network, passes=run_passes(mode, fourier))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for number in range(STEPS):
        if looks:
            list(look(step, number, observe=observe))
        for loss in step([micro_batch(number, micro) for micro in range(2)]):
            loss.backward()
            tensors.append(loss.detach())
            if looks > 1:
                list(look(step, number, observe=observe))
        tensors += [parameter.grad.clone() for parameter in network.parameters()]
        others.append(step.passes.describe())
        state, data = step.passes.pack()
        tensors += [tensor.clone() for tensor in state.values()]
        others.append((list(state), data))
        optimizer.step()
        optimizer.zero_grad()
    return tensors, others


def same(a: tuple[list[Tensor], list], b: tuple[list[Tensor], list]) -> bool:
    (tensors, others), (more, reports) = a, b
    return len(tensors) == len(more) and all(map(torch.equal, tensors, more)) and others == reports


@pytest.mark.trains
@pytest.mark.parametrize("case", CASES)
def test_looking_at_other_images_moves_no_bit_of_a_run(case):
    """Losses, gradients, what is logged and what a checkpoint has are those of the run nobody looked into."""
    alone = run(*CASES[case])
    assert same(alone, run(*CASES[case]))
    for looks in (1, 2):
        assert same(alone, run(*CASES[case], looks=looks))
        assert not same(alone, run(*CASES[case], looks=looks, observe=True)), "terms that observe would be moved"


@pytest.mark.parametrize("case", CASES)
def test_a_look_sees_the_loss_that_training_would_have(case):
    """The same bits from the same state, at levels too that no step has visited yet."""
    step = step_of(trainable(), passes=run_passes(*CASES[case]))
    for number in range(STEPS):
        seen = list(look(step, number))
        assert all(losses.isfinite().all() and losses.abs().max() < 1e3 for losses in seen)
        for objective in step.passes.of_step(number):
            batch = micro_batch(number)
            looked, trained = (step.losses(objective, batch, batch.mean, observe=observe) for observe in (False, True))
            assert torch.equal(looked, trained)
        step.passes.describe()


def test_every_term_is_told_whether_it_may_remember():
    recorder, asked = Recorder(), []

    def term(forward, *, observe):
        asked.append(observe)
        return torch.zeros_like(forward.losses)

    found = passes("combo", recorder, base=plain().plus(term))
    step, batch = step_of(trainable(), passes=found), micro_batch(0)
    list(step([batch]))
    assert asked == [True, True] and [call["observe"] for call in recorder.asked] == [True]
    for objective in found.of_step(0):
        step.losses(objective, batch, batch.mean, observe=False)
    assert asked[2:] == [False, False] and [call["observe"] for call in recorder.asked] == [True, False]
