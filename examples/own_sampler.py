"""A sampler of your own: a class with `needs` and `select`, named in a recipe or passed as an object.

    select:
      ratio: {sampler: "own_sampler:LogRatio", ratio: 0.5}     # with examples/ on PYTHONPATH

It keeps the instances with the largest ratio of log-probabilities instead of their difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from miniplm.sampling.base import Pool, Selection, check_same_instances, top_share
from miniplm.scoring.base import Scores


@dataclass(frozen=True, kw_only=True)
class LogRatio:
    """The top share by log p_ref(x) / log p(x): how many times harder the reference finds an instance."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "reference"})
    ratio: float = 0.5

    def select(self, teacher: Scores, reference: Scores, *, pool: Pool | None = None) -> Selection:
        """Keep the top share."""
        check_same_instances(teacher, reference)
        return top_share(reference.logp / teacher.logp, self.ratio, Pool.of(teacher), within_source=False)
