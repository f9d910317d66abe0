"""What a network is told: named tensors of one batch that are picked and joined together."""

from __future__ import annotations

import pytest
import torch

from trainkit.condition import Condition


def condition_of(*values: float) -> Condition:
    """Two tensors of other shapes and dtypes; the entries say which they are."""
    column = torch.tensor(values)
    return Condition(embeds=column[:, None, None].expand(-1, 3, 2).clone(), pooled=column[:, None].double())


def test_one_with_more_leaves_the_first_as_it_is() -> None:
    first = condition_of(1, 2)
    more = Condition(first, time_ids=torch.zeros(2, 6), pooled=torch.ones(2, 1))
    assert set(more) == {"embeds", "pooled", "time_ids"} and set(first) == {"embeds", "pooled"}
    assert more["embeds"] is first["embeds"] and torch.equal(more["pooled"], torch.ones(2, 1))
    assert first["pooled"].flatten().tolist() == [1, 2]


def test_take_picks_entries_of_every_tensor_in_the_order_of_the_index() -> None:
    taken = condition_of(1, 2, 3).take(torch.tensor([2, 0, 2, 1]))
    assert isinstance(taken, Condition)
    assert taken["pooled"].flatten().tolist() == [3, 1, 3, 2] and taken["pooled"].dtype == torch.float64
    assert taken["embeds"].shape == (4, 3, 2) and taken["embeds"][:, 1, 1].tolist() == [3, 1, 3, 2]


def test_the_gradient_of_a_repeated_entry_is_the_sum_over_its_repeats() -> None:
    first = Condition(embeds=torch.randn(3, 4, 2, requires_grad=True))
    index, weight = torch.tensor([2, 0, 2, 2]), torch.randn(4, 4, 2)
    (first.take(index)["embeds"] * weight).sum().backward()
    wanted = torch.stack([weight[1], torch.zeros(4, 2), weight[0] + weight[2] + weight[3]])
    torch.testing.assert_close(first["embeds"].grad, wanted)


def test_the_gradient_of_repeated_entries_has_the_same_bits_every_time() -> None:
    """A resumed run must add in the order of an uninterrupted one."""
    torch.manual_seed(0)
    values, index = torch.randn(5, 77, 16), torch.randint(5, (64,))
    weight = torch.randn(64, 77, 16) * 10.0 ** torch.randint(-4, 5, (64, 1, 1))

    def gradient() -> torch.Tensor:
        first = Condition(embeds=values.clone().requires_grad_())
        (first.take(index)["embeds"] * weight).sum().backward()
        return first["embeds"].grad

    assert all(torch.equal(gradient(), gradient()) for _ in range(5))


def test_cat_joins_each_tensor_and_take_undoes_it() -> None:
    parts = [condition_of(1, 2), condition_of(3), condition_of(4, 5)]
    whole = Condition.cat(parts)
    assert isinstance(whole, Condition) and whole["pooled"].flatten().tolist() == [1, 2, 3, 4, 5]
    assert whole["embeds"].shape == (5, 3, 2) and whole["embeds"][:, 0, 0].tolist() == [1, 2, 3, 4, 5]
    again = whole.take(torch.tensor([2]))
    assert all(torch.equal(again[name], t) for name, t in parts[1].items())


def test_conditions_of_other_names_cannot_be_joined() -> None:
    with pytest.raises(KeyError, match="pooled"):
        Condition.cat([condition_of(1), Condition(embeds=torch.zeros(1, 3, 2))])
