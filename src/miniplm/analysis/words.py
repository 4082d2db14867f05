r"""Texts as words and n-grams, and the measures of diversity that count them: distinct-n and Self-BLEU.

A word is a run of letters, digits and underscores of any script (Unicode's, `\w+`), lower-cased; punctuation and space
only divide. Scripts without spaces between words are cut at punctuation alone. n-grams lie inside one instance.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ORDERS = 4  # of BLEU
_WORD = re.compile(r"\w+")
_SMALL = 0.1  # matches that stand for none: smoothing method 1 of Chen and Cherry (2014), as Texygen's Self-BLEU has it


def words(text: str) -> list[str]:
    """The words of a text."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class Words:
    """The words of some instances, one after the other.

    Attributes:
        ids: `[M]`, a number for each different word.
        instance: `[M]`, which instance each is of.
        instances: how many there are; some may have no words.

    """

    ids: NDArray[np.int64]
    instance: NDArray[np.int64]
    instances: int

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, texts: Sequence[str]) -> Words:
        """The words of some texts."""
        known: dict[str, int] = {}
        split = [[known.setdefault(word, len(known)) for word in words(text)] for text in texts]
        return cls(
            np.array([word for one in split for word in one], np.int64),
            np.repeat(np.arange(len(split)), [len(one) for one in split]),
            len(split),
        )

    def first(self, count: int) -> Words:
        """The first so many words."""
        return Words(self.ids[:count], self.instance[:count], self.instances)

    def ngrams(self, order: int) -> Words:
        """Runs of `order` words, numbered as words are."""
        if order == 1:
            return self
        ids = self.ids
        for ahead in range(1, order):
            following = self.ids[ahead:]
            pairs = ids[: len(following)] * (int(self.ids.max(initial=0)) + 1) + following
            ids = np.unique(pairs, return_inverse=True)[1]
        starts = self.instance[: len(ids)]
        inside = starts == self.instance[order - 1 :]
        return Words(ids[inside], starts[inside], self.instances)


def distinct(text: Words, order: int) -> float:
    """The share of different n-grams among all; it falls with the number of words, so compare equal numbers only."""
    ngrams = text.ngrams(order)
    return len(np.unique(ngrams.ids)) / len(ngrams) if len(ngrams) else 0.0


def self_bleu(text: Words) -> NDArray[np.float64]:
    """BLEU of each instance against all the others as its references, `[instances]`, 0 to 1.

    Orders 1 to 4, or to the instance's length if that is less, equally weighted; brevity by the closest length among
    the references. An instance of no words is 1 if there is another of none. O(M log M): for each n-gram, the two
    instances that have it most often say what the most among the others is.
    """
    lengths = np.bincount(text.instance, minlength=text.instances)
    logs = np.zeros(text.instances)
    orders = np.minimum(lengths, ORDERS)
    for order in range(1, ORDERS + 1):
        matches = _matches(text.ngrams(order), text.instances)
        if order == 1:
            nothing = matches == 0
        there = orders >= order
        precision = np.where(matches[there] > 0, matches[there], _SMALL) / (lengths[there] - order + 1)
        logs[there] += np.log(precision) / orders[there]
    found = _brevity(lengths) * np.exp(logs)
    found[nothing] = 0.0
    empty = lengths == 0
    found[empty] = float(empty.sum() > 1)
    return found


def _matches(ngrams: Words, instances: int) -> NDArray[np.float64]:
    """The n-grams of each instance, each at most as often as the other that has it most often, `[instances]`."""
    keys, counts = np.unique(ngrams.ids * instances + ngrams.instance, return_counts=True)
    ids, owner = np.divmod(keys, max(1, instances))
    order = np.lexsort((-counts, ids))  # by n-gram, who has it most often first
    ids, owner, counts = ids[order], owner[order], counts[order]
    starts = np.flatnonzero(np.diff(ids, prepend=-1))
    size = np.diff(np.append(starts, len(ids)))
    most = np.repeat(counts[starts], size)
    second = np.where(size > 1, counts[np.minimum(starts + 1, max(0, len(counts) - 1))], 0)
    is_first = np.zeros(len(ids), np.bool_)
    is_first[starts] = True
    among_others = np.where(is_first, np.repeat(second, size), most)
    matches = np.bincount(owner, np.minimum(counts, among_others), minlength=instances)
    return matches.astype(np.float64)


def _brevity(lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """The penalty of each instance for being shorter than the reference closest in length; the shorter one of two."""
    penalty = np.ones(len(lengths))
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order]
    for place, instance in enumerate(order):
        own = int(ordered[place])
        if not own or place + 1 == len(order):
            continue  # no reference is longer
        above = int(ordered[place + 1])
        below = int(ordered[place - 1]) if place else None
        if below is None or above - own < own - below:
            penalty[instance] = np.exp(min(0.0, 1 - above / own))
    return penalty
