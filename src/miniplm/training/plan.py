"""The arithmetic of a training: how many steps of how many instances, and what happens at which of them."""

from __future__ import annotations

from dataclasses import dataclass

from miniplm.errors import RecipeError
from miniplm.recipe import Compute, TrainSettings

CURVE_POINTS = 20  # of a loss curve


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens how often.

    Attributes:
        steps: of the optimiser.
        batch_instances: instances of a step.
        batch_tokens: predicted tokens of a step.
        interval_steps: between points of the curve.
        checkpoint_steps: between states to resume from; a multiple of the interval, so that a point's average never
            spans a resume.
        kept: steps after which the model itself is kept.

    """

    steps: int
    batch_instances: int
    batch_tokens: int
    interval_steps: int
    checkpoint_steps: int
    kept: frozenset[int]

    @classmethod
    def of(
        cls, settings: TrainSettings, instances: int, sequence_length: int, compute: Compute, share: float = 1.0
    ) -> Plan:
        """Lay out a training.

        Args:
            settings: with `batch_tokens`; its `tokens`, or its `epochs` of `instances`, are what is seen.
            instances: of the data.
            sequence_length: T.
            compute: how often states are saved.
            share: of the steps, where FLOPs are matched.

        Raises:
            RecipeError: a batch is smaller than an instance, or the training than a batch.

        """
        assert settings.batch_tokens is not None
        batch = settings.batch_tokens // sequence_length
        if batch == 0:
            raise RecipeError(
                "a batch is smaller than one instance.",
                facts={"batch_tokens": f"{settings.batch_tokens:,}", "sequence_length": f"{sequence_length:,}"},
            )
        seen = settings.tokens
        if seen is None:
            assert settings.epochs is not None
            seen = round(settings.epochs * instances) * sequence_length
        steps = int(seen * share) // (batch * sequence_length)
        if steps == 0:
            matched = {} if share == 1.0 else {"share of the steps, FLOPs matched": f"{share:.1%}"}
            raise RecipeError(
                "the training is shorter than one batch.",
                facts={"tokens": f"{seen:,}", **matched, "tokens of a batch": f"{batch * sequence_length:,}"},
                remedy="Raise `tokens`, or lower `batch_tokens`.",
            )
        interval = max(1, steps // CURVE_POINTS)
        checkpoint = -(-steps // compute.checkpoints)
        kept = {round(steps * (n + 1) / (settings.keep + 1)) for n in range(settings.keep)} - {0, steps}
        return cls(
            steps, batch, batch * sequence_length, interval, -(-checkpoint // interval) * interval, frozenset(kept)
        )

    def micro_batch(self, wanted: int, processes: int) -> int:
        """Instances of a forward pass of one process: `wanted`, or less where a batch has no more for each.

        Raises:
            RecipeError: a batch cannot be divided evenly among processes and passes.

        """
        micro = max(1, min(wanted, self.batch_instances // processes))
        if self.batch_instances % (micro * processes):
            raise RecipeError(
                "a batch cannot be divided evenly.",
                facts={
                    "instances of a batch": self.batch_instances,
                    "compute.train_micro_batch": micro,
                    "processes": processes,
                },
                remedy="Make batch_tokens / sequence_length a multiple of compute.train_micro_batch × processes.",
            )
        return micro
