"""FLOP matching: what a method's step costs beside a step of plain pre-training, and so how many steps it gets.

With N for a forward pass of the student and M for one of the teacher, a step of plain pre-training costs 3N (forward,
and twice that backward). The paper's methods (section 3.1, Table 1) get, for T steps of plain pre-training:

    Vanilla KD   3N / (3N + M) · T      the teacher reads what the student reads
    MiniLLM      3N / (4N + 2M) · T     the student writes too; the teacher writes with it, and judges

The paper puts parameters for N and M, embeddings included. Its rows for 200M, 500M and 1.2B students of a 1.8B teacher
(T = 100K) are 25K, 45K, 65K and 15K, 30K, 40K; the formulas give 25.0K, 45.5K, 66.7K and 13.6K, 26.8K, 42.9K.
"""

from __future__ import annotations

from dataclasses import dataclass

from miniplm.models.flops import TRAINING_PASSES
from miniplm.recipe import MiniLLMSettings, ObjectiveSettings, VanillaKDSettings


@dataclass(frozen=True, slots=True)
class Passes:
    """Forward passes' worth of work for each token of a step: of the student (backward counted in), of the teacher."""

    student: int
    teacher: int

    def cost(self, student: float, teacher: float) -> float:
        """Of a token, in the unit that a forward pass of each is given in."""
        return self.student * student + self.teacher * teacher


def passes(objective: ObjectiveSettings) -> Passes:
    """What an objective's step consists of. Objectives of the user's count as plain: what they do is not known."""
    if isinstance(objective, VanillaKDSettings):
        return Passes(TRAINING_PASSES, 1)
    if isinstance(objective, MiniLLMSettings):  # the teacher writes only where it is mixed in
        return Passes(TRAINING_PASSES + 1, 2 if objective.teacher_mix else 1)
    return Passes(TRAINING_PASSES, 0)


def matched_share(objective: ObjectiveSettings, student: float, teacher: float) -> float:
    """The share of plain pre-training's steps that cost as much.

    Args:
        objective: of the student.
        student: N, a forward pass of the student for a token: parameters, or operations.
        teacher: M, the same of the teacher.

    """
    return TRAINING_PASSES * student / passes(objective).cost(student, teacher)
