"""Difference Sampling (paper, Eq. 4): keep the instances with the largest log p(x) − log p_ref(x); its relative form.

A difference in nats is larger where there are more nats to save: text of few bits per byte can hardly score high. The
relative form divides by the reference's loss, so that it asks which *share* of it the teacher saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from miniplm.errors import ArtifactMismatchError, RecipeError
from miniplm.sampling.base import Pool, Selection, check_same_instances, top_share
from miniplm.scoring.base import Normalize, Scores


@dataclass(frozen=True, kw_only=True)
class DifferenceSampling:
    """The top share by the difference of log-probabilities.

    Attributes:
        ratio: α, the share of the pool that is kept.
        normalize: the difference per `token` (the paper's code: a difference of mean losses), per `byte`, or of the
            `sum`.
        within: `source` keeps the top share inside each source, so that the corpus keeps its mixture.

    """

    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "reference"})
    ratio: float = 0.5
    normalize: Normalize = "token"
    within: Literal["source"] | None = None

    def select(
        self, teacher: Scores | None = None, reference: Scores | None = None, *, pool: Pool | None = None
    ) -> Selection:
        """Keep ⌊ratio·N⌋ instances. Raises ArtifactMismatchError if the two were not scored on the same instances."""
        if teacher is None or reference is None:
            raise RecipeError("Difference Sampling needs the scores of the teacher and of the reference.")
        scores = differences(teacher, reference, self.normalize)
        return top_share(scores, self.ratio, Pool.of(teacher), within_source=self.within == "source")

    def select_predicted(self, predicted: Scores) -> Selection:
        """As `select`, by the differences that a proxy predicts: `predicted.per("token")`, whatever it was trained on.

        `normalize` is not read: the proxy was trained on the difference per token or per byte.
        """
        scores = predicted.per("token")
        return top_share(scores, self.ratio, Pool.of(predicted), within_source=self.within == "source")


@dataclass(frozen=True, kw_only=True)
class RelativeSampling:
    """The top share by 1 − log p(x) / log p_ref(x): the share of the reference's loss that the teacher saves.

    Not of the paper. It has no unit: both sums are of the same text, so it is the same in nats or bits, per byte or in
    all, whatever tokenizers the two have.

    Attributes:
        ratio: α, the share of the pool that is kept.
        within: `source` keeps the top share inside each source.

    """

    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "reference"})
    ratio: float = 0.5
    within: Literal["source"] | None = None

    def select(
        self, teacher: Scores | None = None, reference: Scores | None = None, *, pool: Pool | None = None
    ) -> Selection:
        """Keep ⌊ratio·N⌋ instances. Raises ArtifactMismatchError if the two were not scored on the same instances."""
        if teacher is None or reference is None:
            raise RecipeError("relative sampling needs the scores of the teacher and of the reference.")
        check_same_instances(teacher, reference)
        certain = reference.logp == 0  # nothing was left to save
        scores = 1 - np.where(certain, 1.0, teacher.logp) / np.where(certain, 1.0, reference.logp)
        return top_share(scores, self.ratio, Pool.of(teacher), within_source=self.within == "source")


def differences(teacher: Scores, reference: Scores, normalize: Normalize = "token") -> NDArray[np.float64]:
    """Log p(x) − log p_ref(x) of each instance in nats, `[N]`, per token, per byte, or of the sums.

    Raises:
        ArtifactMismatchError: the two are of different instances, or per token of different tokenizers.

    """
    check_same_instances(teacher, reference)
    if normalize == "token" and teacher.tokenizer != reference.tokenizer:
        raise ArtifactMismatchError(
            "teacher and reference were scored under different tokenizers: a difference per token means nothing.",
            facts={
                "teacher": f"{teacher.name}    tokenizer {teacher.tokenizer[:12]}  {teacher.n_tokens.sum():,} tokens",
                "reference": f"{reference.name}    tokenizer {reference.tokenizer[:12]}  "
                f"{reference.n_tokens.sum():,} tokens",
            },
            remedy="Compare them per byte: normalize: byte.",
        )
    return teacher.per(normalize) - reference.per(normalize)
