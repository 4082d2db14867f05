"""The arithmetic of costs: by hand, and with the paper's own numbers."""

from __future__ import annotations

import math

import pytest

from miniplm.analysis.cost import (
    PAPER_COMPUTE_REDUCTION,
    PAPER_SCORE_BYTES,
    SCORE_BYTES,
    break_even,
    saved_to_same_loss,
    score_bytes,
    token_level_bytes,
)

TEACHER, REFERENCE, STUDENT = 1.8e9, 104e6, 200e6  # parameters
POOL, REFERENCE_TOKENS, STUDENT_TOKENS, T = 100e9, 5e9, 50e9, 1024


def read(parameters: float, tokens: float) -> float:
    """Operations of reading, in the paper's manner: two for each parameter."""
    return 2 * parameters * tokens


def test_the_papers_storage() -> None:
    """Footnote 2: 200 MB for 50B tokens, against 30 PB."""
    ours = score_bytes(STUDENT_TOKENS / T, models=1, bytes_each=PAPER_SCORE_BYTES)
    theirs = token_level_bytes(STUDENT_TOKENS, 150_000)
    assert ours == pytest.approx(195e6, rel=2e-3)
    assert theirs == 30e15
    assert theirs / ours == T * 150_000  # a number for each instance, where each token of it had one for each entry


def test_what_is_stored_here_is_a_row_for_each_instance_and_model() -> None:
    assert score_bytes(1000) == 2 * 1000 * SCORE_BYTES
    assert score_bytes(POOL / T) == pytest.approx(2.7e9, rel=0.02)
    assert token_level_bytes(10, 3) == 120


def test_break_even_by_hand() -> None:
    assert break_even(100, 40) == 2.5
    assert break_even(100, saved_to_same_loss(40, compute_reduction=3)) == 1.25
    assert break_even(0, 40) == 0


def test_nothing_saved_is_never_repaid_and_unknown_is_unknown() -> None:
    assert break_even(100, saved_to_same_loss(40, compute_reduction=1)) == math.inf
    assert break_even(100, saved_to_same_loss(40, compute_reduction=0.8)) == math.inf
    assert break_even(None, 40) is None
    assert break_even(100, None) is None


def test_the_papers_operations() -> None:
    """Paper, sections 3.4 and appendices C and E, as recomputed in the notes on it."""
    assert read(TEACHER, POOL) == pytest.approx(3.6e20)
    assert read(1.21e9, POOL) == pytest.approx(2.4e20, rel=0.01)  # without embeddings, as the paper's 2e20
    assert 3 * read(REFERENCE, REFERENCE_TOKENS) == pytest.approx(3.1e18, rel=0.01)
    assert 3 * read(STUDENT, STUDENT_TOKENS) == pytest.approx(6e19)


def test_one_student_of_the_papers_does_not_repay_its_scoring_but_a_few_do() -> None:
    offline = read(TEACHER + REFERENCE, POOL) + 3 * read(REFERENCE, REFERENCE_TOKENS)
    student = 3 * read(STUDENT, STUDENT_TOKENS)
    assert offline > student
    against_plain = break_even(offline, saved_to_same_loss(student, PAPER_COMPUTE_REDUCTION))
    against_kd = break_even(offline, read(TEACHER, STUDENT_TOKENS))
    assert against_plain == pytest.approx(384e18 / (1.2 * 60e18), rel=0.01)  # 5.3 students
    assert against_kd == pytest.approx(384e18 / 180e18, rel=0.01)  # 2.1: the pool is twice what a student reads


def test_the_papers_hours() -> None:
    """Table 9: 2.6 + 7 h for the reference; conventional distillation is 68 h of a student and 68 h of its teacher."""
    reference, conventional = 2.6 + 7.0, 68.0 + 68.0
    assert reference / conventional == pytest.approx(0.07, abs=1e-3)
    assert break_even(68.0 + reference, 68.0) == pytest.approx(1.14, abs=0.01)  # the teacher's scoring once
