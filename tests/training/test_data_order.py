"""The order of training and the batches: each row exactly once an epoch, and Eq. 5 against a loop."""

from __future__ import annotations

import random
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from miniplm.packing.instances import counted
from miniplm.recipe import Counted
from miniplm.training.data import Collator, InOrder, TrainingOrder

T = 6
SEPARATOR = 0
RULES: tuple[Counted, ...] = ("all", "skip_after_separator")


def rows_of(count: int, lengths: list[int] | None = None) -> datasets.Dataset:
    """Rows whose first token is their number."""
    ids = [[number, *range(100, 100 + T)] for number in range(count)]
    columns: dict[str, Any] = {"input_ids": ids}
    features = {"input_ids": datasets.List(datasets.Value("uint16"), length=T + 1)}
    if lengths is not None:
        columns["length"] = lengths
        features["length"] = datasets.Value("int32")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def seen(order: TrainingOrder) -> list[int]:
    return [int(order[position][0][0]) for position in range(len(order))]


def test_every_row_is_seen_exactly_once_in_each_epoch() -> None:
    order = TrainingOrder(rows_of(11), 33, seed=4)
    numbers = seen(order)
    for epoch in range(3):
        assert sorted(numbers[11 * epoch : 11 * (epoch + 1)]) == list(range(11))


def test_a_last_epoch_that_is_not_whole_sees_no_row_twice() -> None:
    numbers = seen(TrainingOrder(rows_of(11), 18, seed=4))
    assert len(numbers) == 18
    assert len(set(numbers[11:])) == 7


def test_each_epoch_has_an_order_of_its_own_and_none_is_that_of_the_rows() -> None:
    numbers = seen(TrainingOrder(rows_of(50), 150, seed=0))
    orders = [tuple(numbers[50 * epoch : 50 * (epoch + 1)]) for epoch in range(3)]
    assert len({*orders, tuple(range(50))}) == 4


def test_seeds_give_different_orders_and_one_seed_always_the_same() -> None:
    rows = rows_of(50)
    orders = [tuple(seen(TrainingOrder(rows, 100, seed))) for seed in (0, 1, 2, 1)]
    assert orders[1] == orders[3]
    assert len(set(orders)) == 3


def test_no_seed_begins_with_the_second_epoch_of_another() -> None:
    rows = rows_of(50)
    orders = {seed: seen(TrainingOrder(rows, 150, seed)) for seed in range(5)}
    epochs = [tuple(numbers[50 * e : 50 * (e + 1)]) for numbers in orders.values() for e in range(3)]
    assert len(set(epochs)) == 15


def test_the_order_does_not_depend_on_how_long_the_training_is() -> None:
    rows = rows_of(11)
    assert seen(TrainingOrder(rows, 30, seed=4))[:20] == seen(TrainingOrder(rows, 20, seed=4))


@pytest.mark.parametrize(
    "pattern", ["batches", "from the middle", "backwards", "at random", "one by one, new each time"]
)
def test_the_order_is_the_same_however_it_is_read(pattern: str) -> None:
    rows = rows_of(11)
    expected = seen(TrainingOrder(rows, 40, seed=4))
    order = TrainingOrder(rows, 40, seed=4)
    positions = list(range(40))
    if pattern == "batches":
        batches = [order.__getitems__(positions[begin : begin + 7]) for begin in range(0, 40, 7)]
        assert [int(ids[0]) for batch in batches for ids, _, _ in batch] == expected
        return
    if pattern == "from the middle":
        positions = positions[17:]
    elif pattern == "backwards":
        positions.reverse()
    elif pattern == "at random":
        random.Random(0).shuffle(positions)
    for position in positions:
        if pattern == "one by one, new each time":
            order = TrainingOrder(rows, 40, seed=4)
        assert int(order[position][0][0]) == expected[position]


def test_a_batch_across_the_end_of_an_epoch_has_rows_of_both() -> None:
    order = TrainingOrder(rows_of(11), 22, seed=4)
    expected = seen(TrainingOrder(rows_of(11), 22, seed=4))
    assert [int(ids[0]) for ids, _, _ in order.__getitems__([12, 10, 11, 0])] == [expected[p] for p in (12, 10, 11, 0)]


def test_data_loader_workers_see_the_same_order() -> None:
    rows = rows_of(11)
    loader = torch.utils.data.DataLoader(TrainingOrder(rows, 40, seed=4), batch_size=3, num_workers=2, collate_fn=list)
    assert [int(ids[0]) for batch in loader for ids, _, _ in batch] == seen(TrainingOrder(rows, 40, seed=4))


def test_items_are_the_rows_with_their_lengths_or_with_all_tokens_where_no_length_is_given() -> None:
    lengths = [2, 7, 5]
    for ids, length, _ in (TrainingOrder(rows_of(3, lengths), 3, seed=0)[p] for p in range(3)):
        assert length == lengths[ids[0]]
        assert ids.tolist() == [ids[0], *range(100, 100 + T)]
    assert [length for _, length, _ in (TrainingOrder(rows_of(3), 3, seed=0)[p] for p in range(3))] == [T + 1] * 3


def test_selected_rows_are_all_that_is_seen() -> None:
    chosen = rows_of(20).select([3, 5, 8, 13])
    assert sorted(seen(TrainingOrder(chosen, 4, seed=0))) == [3, 5, 8, 13]


def test_in_order_is_the_rows_as_they_are() -> None:
    rows = InOrder(rows_of(5, [7, 6, 5, 4, 3]))
    assert len(rows) == 5
    assert [(int(ids[0]), length) for ids, length, _ in (rows[p] for p in range(5))] == [
        (0, 7), (1, 6), (2, 5), (3, 4), (4, 3),
    ]  # fmt: skip


def ragged_items() -> list[tuple[np.ndarray[Any, Any], int, int]]:
    """Five instances: whole, with separators in the middle, short, of two tokens, with a separator as first token."""
    draw = np.random.default_rng(0)
    ids = draw.integers(1, 50, (5, T + 1)).astype(np.uint16)
    ids[1, 2] = ids[1, 4] = ids[4, 0] = SEPARATOR
    lengths = [T + 1, T + 1, 4, 2, T + 1]
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = SEPARATOR
    return list(zip(ids, lengths, range(len(lengths)), strict=True))


def counts(ids: np.ndarray[Any, Any], length: int, position: int, rule: Counted) -> bool:
    """Whether the target at `position` + 1 counts, as the rule reads."""
    return position + 1 < length and (rule == "all" or ids[position] != SEPARATOR)


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_has_inputs_and_the_token_after_each(rule: Counted) -> None:
    items = ragged_items()
    batch = Collator(SEPARATOR, rule)(items)
    assert batch["input_ids"].dtype == batch["targets"].dtype == torch.int64
    for number, (ids, _, _) in enumerate(items):
        for position in range(T):
            assert batch["input_ids"][number, position] == ids[position]
            assert batch["targets"][number, position] == ids[position + 1]


@pytest.mark.parametrize("rule", RULES)
def test_the_loss_of_a_batch_is_the_mean_over_instances_of_each_ones_mean_over_counted_targets(rule: Counted) -> None:
    items = ragged_items()
    batch = Collator(SEPARATOR, rule)(items)
    nll = torch.rand(5, T, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    means = []
    for number, (ids, length, _) in enumerate(items):
        own = [float(nll[number, p]) for p in range(T) if counts(ids, length, p, rule)]
        means.append(sum(own) / len(own))
    assert batch["weights"] is not None
    assert batch["weights"].dtype == torch.float32
    torch.testing.assert_close(float((nll * batch["weights"]).sum()), sum(means) / 5, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_weights_sum_to_one_and_are_zero_exactly_where_a_target_does_not_count(rule: Counted) -> None:
    items = ragged_items()
    weights = Collator(SEPARATOR, rule)(items)["weights"]
    assert weights is not None
    torch.testing.assert_close(float(weights.sum()), 1.0, rtol=0, atol=1e-6)
    for number, (ids, length, _) in enumerate(items):
        for position in range(T):
            assert (float(weights[number, position]) > 0) == counts(ids, length, position, rule)


def test_there_are_weights_only_where_a_target_does_not_count() -> None:
    whole = [(ids, T + 1, 0) for ids, _, _ in ragged_items()[:1]]
    short, with_separator = ragged_items()[2:3], ragged_items()[1:2]
    assert Collator(SEPARATOR, "all")(whole)["weights"] is None
    assert Collator(SEPARATOR, "skip_after_separator")(whole)["weights"] is None
    assert Collator(SEPARATOR, "all")(with_separator)["weights"] is None
    assert Collator(SEPARATOR, "skip_after_separator")(with_separator)["weights"] is not None
    assert Collator(SEPARATOR, "all")(whole + short)["weights"] is not None


def test_an_instance_in_which_nothing_counts_weighs_nothing() -> None:
    ids = np.array([SEPARATOR, 5] + [SEPARATOR] * (T - 1), np.uint16)
    whole = ragged_items()[0]
    weights = Collator(SEPARATOR, "skip_after_separator")([(ids, 2, 0), whole])["weights"]
    assert weights is not None
    assert weights[0].tolist() == [0.0] * T
    assert torch.isfinite(weights).all()


@pytest.mark.parametrize("rule", RULES)
def test_training_counts_the_targets_that_scoring_counts(rule: Counted) -> None:
    items = ragged_items()
    mask = counted(np.stack([ids for ids, _, _ in items]), [length for _, length, _ in items], SEPARATOR, rule)
    weights = Collator(SEPARATOR, rule)(items)["weights"]
    assert weights is not None
    np.testing.assert_array_equal(mask, (weights > 0).numpy())
