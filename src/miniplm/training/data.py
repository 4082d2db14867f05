"""The order of training: which instance is seen when, the same for any number of processes, resumed or not.

In: the rows (any `datasets.Dataset` with `input_ids [T+1]` and, optionally, `length`), a seed, and how many instances
are to be seen. Out: a map-style dataset as long as the training, whose item i is the i-th instance to be seen: epoch
after epoch, each in an order of its own drawn from (seed, epoch); and a collator that makes batches of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from miniplm.packing.instances import counted
from miniplm.recipe import Counted
from miniplm.training.objectives import Batch

if TYPE_CHECKING:
    import datasets

Item = tuple[NDArray[Any], int, int]


class TrainingOrder(Dataset[Item]):
    """Item i is the i-th instance of training: (`input_ids [T+1]`, length, i)."""

    def __init__(self, rows: datasets.Dataset, instances: int, seed: int) -> None:
        self.rows = rows.with_format("numpy")
        self.instances = instances
        self.seed = seed
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.instances

    def row(self, position: int) -> int:
        """The row of the data set that is seen at this position."""
        epoch, within = divmod(position, len(self.rows))
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._epoch, self._permutation = epoch, generator.permutation(len(self.rows))
        return int(self._permutation[within])

    def __getitem__(self, position: int) -> Item:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Item]:
        """Several items at once; the DataLoader asks for a batch in this way."""
        return _items(self.rows, [self.row(p) for p in positions], positions)


class InOrder(Dataset[Item]):
    """The rows as they are, for measuring."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows.with_format("numpy")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Item:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Item]:
        """Several items at once."""
        return _items(self.rows, list(positions), positions)


class Collator:
    """Makes a batch of items: shifts the targets, and weighs them by the rule for which count."""

    def __init__(self, separator: int, rule: Counted) -> None:
        self.separator, self.rule = separator, rule

    def __call__(self, items: Sequence[Item]) -> Batch:
        ids = np.stack([ids for ids, _, _ in items]).astype(np.int64)
        mask = counted(ids, [length for _, length, _ in items], self.separator, self.rule)
        weights = None
        if not mask.all():
            per_instance = mask / np.maximum(mask.sum(axis=1, keepdims=True), 1)
            weights = torch.from_numpy((per_instance / len(items)).astype(np.float32))
        return Batch(
            input_ids=torch.from_numpy(np.ascontiguousarray(ids[:, :-1])),
            targets=torch.from_numpy(np.ascontiguousarray(ids[:, 1:])),
            weights=weights,
            positions=torch.tensor([position for _, _, position in items]),
        )


def _items(rows: datasets.Dataset, numbers: list[int], positions: Sequence[int]) -> list[Item]:
    batch = rows[numbers]
    ids = np.asarray(batch["input_ids"])
    lengths = batch["length"] if "length" in batch else [ids.shape[1]] * len(ids)
    return [(row, int(length), place) for row, length, place in zip(ids, lengths, positions, strict=True)]
