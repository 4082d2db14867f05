"""Sampling: exact top-K against `sorted`, quotas to the unit, and scores that cannot be used refused."""

from __future__ import annotations

from dataclasses import replace
from math import floor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from miniplm.errors import ArtifactMismatchError, MiniplmError, RecipeError, ScoreError
from miniplm.recipe import SamplerSettings
from miniplm.sampling.base import Pool, Selection, keep_count, open_selection, quotas, save, top_k, top_share
from miniplm.sampling.baselines import RandomSampling, ReferenceDifficulty, TeacherPreference
from miniplm.sampling.difference import DifferenceSampling, RelativeSampling, differences
from miniplm.sampling.named import identity, needs_with_proxy, sampler_from
from miniplm.scoring.base import Scores, read_parts

SOURCES = ("a", "b", "c")


def scores_of(logp: list[float] | NDArray[np.float64], **changes: object) -> Scores:
    n = len(logp)
    made = Scores(
        logp=np.asarray(logp, np.float64),
        n_tokens=np.full(n, 10, np.int32),
        n_bytes=np.full(n, 30, np.int32),
        source=(np.arange(n) % len(SOURCES)).astype(np.int32),
        sources=SOURCES,
        packed="p" * 64,
    )
    return replace(made, **changes)


def slow_top_k(scores: list[float], k: int) -> list[int]:
    """The obvious way: sort by score downwards and row upwards, keep the first k, restore the order of rows."""
    return sorted(sorted(range(len(scores)), key=lambda row: (-scores[row], row))[:k])


@settings(max_examples=300, deadline=None)
@given(
    scores=st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 1e300, -1e300, 5e-324]), min_size=1, max_size=60),
    share=st.floats(0.001, 1),
)
def test_top_k_equals_sorted_with_ties_to_the_lower_row(scores: list[float], share: float) -> None:
    k = keep_count(share, len(scores))
    assert top_k(np.array(scores), k).tolist() == slow_top_k(scores, k)


def test_top_k_equals_sorted_on_many_random_scores() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        scores = np.round(draw.normal(size=3000), 2)  # rounding makes ties
        k = int(draw.integers(1, 3000))
        assert top_k(scores, k).tolist() == slow_top_k(scores.tolist(), k)


def test_top_k_is_the_same_from_any_number_of_shards_written_in_any_order(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    logp = np.round(draw.normal(size=500), 1)
    picks = []
    for shards in (1, 3, 7):
        folder = tmp_path / str(shards)
        folder.mkdir()
        pieces = list(enumerate(np.array_split(np.arange(500), shards)))
        draw.shuffle(pieces)
        for number, rows in pieces:
            columns = {"instance": rows, "logp": logp[rows], "n_tokens": np.full(len(rows), 1, np.int32)}
            columns |= {"n_bytes": np.full(len(rows), 1, np.int32), "source": ["s"] * len(rows)}
            pq.write_table(pa.table(columns), folder / f"part-{number:05d}.parquet")
        picks.append(top_k(read_parts(folder, "p", "t").logp, 123).tolist())
    assert picks[0] == picks[1] == picks[2] == slow_top_k(logp.tolist(), 123)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_an_error_that_names_the_instance(bad: float) -> None:
    with pytest.raises(ScoreError, match="instance 2 "):
        top_k(np.array([0.0, 1.0, bad, 3.0]), 2)
    with pytest.raises(ScoreError, match="instance 1"):
        scores_of([0.0, bad])


@pytest.mark.parametrize(("ratio", "n", "k"), [(0.29, 100, 29), (0.5, 7, 3), (1.0, 7, 7), (0.1, 3, 1), (0.7, 10, 7)])
def test_k_is_the_floor_of_ratio_times_n_as_a_person_reads_it(ratio: float, n: int, k: int) -> None:
    assert keep_count(ratio, n) == k


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5, float("nan")])
def test_a_ratio_outside_its_range_is_an_error(ratio: float) -> None:
    with pytest.raises(RecipeError, match="ratio"):
        DifferenceSampling(ratio=ratio).select(scores_of([1.0, 2.0]), scores_of([1.0, 1.0]))


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(0, 500), min_size=1, max_size=30), ratio=st.floats(0.01, 1))
def test_quotas_sum_to_the_total_and_are_within_one_of_their_share(sizes: list[int], ratio: float) -> None:
    total = keep_count(ratio, sum(sizes)) if sum(sizes) else 0
    found = quotas(ratio, np.array(sizes), total)
    assert found.sum() == total
    assert all(0 <= q <= size for q, size in zip(found, sizes, strict=True))
    if total > 1:
        assert all(abs(q - ratio * size) <= 1 + 1e-6 for q, size in zip(found, sizes, strict=True))


def test_difference_keeps_the_largest_log_ratio_per_token() -> None:
    teacher = scores_of([-10.0, -20.0, -30.0, -5.0], n_tokens=np.array([10, 10, 30, 10], np.int32))
    reference = scores_of([-20.0, -21.0, -60.0, -5.0], n_tokens=np.array([10, 10, 30, 10], np.int32))
    assert differences(teacher, reference).tolist() == pytest.approx([1.0, 0.1, 1.0, 0.0])
    assert DifferenceSampling(ratio=0.5).select(teacher, reference).rows.tolist() == [0, 2]
    assert DifferenceSampling(ratio=0.25).select(teacher, reference).rows.tolist() == [0], "ties go to the lower row"
    assert DifferenceSampling(ratio=0.25, normalize="sum").select(teacher, reference).rows.tolist() == [2]


def test_difference_per_byte_divides_by_bytes() -> None:
    teacher = scores_of([-10.0, -10.0], n_bytes=np.array([10, 40], np.int32))
    reference = scores_of([-20.0, -30.0], n_bytes=np.array([10, 40], np.int32))
    assert differences(teacher, reference, "byte").tolist() == pytest.approx([1.0, 0.5])


def test_the_threshold_is_the_smallest_score_that_was_kept() -> None:
    draw = np.random.default_rng(1)
    teacher, reference = scores_of(draw.normal(size=101)), scores_of(draw.normal(size=101))
    chosen = DifferenceSampling(ratio=0.3).select(teacher, reference)
    values = differences(teacher, reference)
    assert len(chosen) == floor(0.3 * 101)
    assert chosen.threshold == values[chosen.rows].min()
    assert values[np.setdiff1d(np.arange(101), chosen.rows)].max() <= chosen.threshold


def test_within_source_keeps_the_mixture_and_the_total() -> None:
    draw = np.random.default_rng(2)
    n = 300
    teacher = scores_of(draw.normal(size=n) + 5.0 * (np.arange(n) % 3))  # source c scores far above a
    reference = scores_of(np.zeros(n))
    plain = DifferenceSampling(ratio=0.5).select(teacher, reference)
    within = DifferenceSampling(ratio=0.5, within="source").select(teacher, reference)
    assert plain.by_source["a"][0] < 20
    assert {name: kept for name, (kept, _) in within.by_source.items()} == {"a": 50, "b": 50, "c": 50}
    assert len(within) == len(plain) == 150
    values = differences(teacher, reference)
    for code in range(3):
        inside = np.flatnonzero(teacher.source == code)
        best = [int(inside[r]) for r in slow_top_k(values[inside].tolist(), 50)]
        assert [r for r in within.rows.tolist() if r % 3 == code] == best


def pair(n: int, seed: int, **changes: object) -> tuple[Scores, Scores]:
    """Teacher and reference of ragged instances, both with losses as language models have."""
    draw = np.random.default_rng(seed)
    shape: dict[str, object] = {
        "n_tokens": draw.integers(1, 40, n).astype(np.int32), "n_bytes": draw.integers(1, 200, n).astype(np.int32),
    }  # fmt: skip
    reference = -draw.gamma(4.0, 10.0, n)
    teacher = reference * draw.uniform(0.3, 1.3, n)
    return scores_of(teacher, **shape, **changes), scores_of(reference, **shape, **changes)


@pytest.mark.parametrize("seed", range(5))
def test_relative_sampling_keeps_those_of_which_the_teacher_saves_the_largest_share(seed: int) -> None:
    teacher, reference = pair(301, seed)
    saved = [(r - t) / r for t, r in zip(teacher.logp.tolist(), reference.logp.tolist(), strict=True)]
    chosen = RelativeSampling(ratio=0.3).select(teacher, reference)
    assert chosen.rows.tolist() == slow_top_k(saved, 90)
    assert chosen.threshold == pytest.approx(min(saved[row] for row in chosen.rows))
    assert chosen.rows.tolist() != DifferenceSampling(ratio=0.3).select(teacher, reference).rows.tolist()


def test_relative_sampling_does_not_depend_on_the_unit() -> None:
    """Per token, per byte or summed; and with every loss in bits."""
    teacher, reference = pair(200, 9)
    chosen = RelativeSampling(ratio=0.4).select(teacher, reference).rows.tolist()
    for unit in ("token", "byte"):
        ours, theirs = (replace(scores, logp=scores.per(unit)) for scores in (teacher, reference))  # type: ignore[arg-type]
        assert RelativeSampling(ratio=0.4).select(ours, theirs).rows.tolist() == chosen
    bits = [replace(scores, logp=scores.logp / np.log(2)) for scores in (teacher, reference)]
    assert RelativeSampling(ratio=0.4).select(*bits).rows.tolist() == chosen


def test_relative_sampling_finds_instances_of_which_nothing_can_be_saved_worth_nothing() -> None:
    """Those that the reference is certain of come after those that the teacher is better at."""
    teacher = scores_of([-1.0, -3.0, 0.0, -2.0, -5.0])
    reference = scores_of([-2.0, -2.0, 0.0, -2.0, 0.0])  # shares saved: 0.5, -0.5, 0, 0, 0
    kept = [RelativeSampling(ratio=k / 5).select(teacher, reference).rows.tolist() for k in range(1, 6)]
    assert kept == [[0], [0, 2], [0, 2, 3], [0, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_relative_sampling_within_sources_keeps_the_best_of_each() -> None:
    teacher, reference = pair(300, 2)
    chosen = RelativeSampling(ratio=0.5, within="source").select(teacher, reference)
    assert {name: kept for name, (kept, _) in chosen.by_source.items()} == {"a": 50, "b": 50, "c": 50}
    saved = 1 - teacher.logp / reference.logp
    for code in range(3):
        inside = np.flatnonzero(teacher.source == code)
        best = [int(inside[r]) for r in slow_top_k(saved[inside].tolist(), 50)]
        assert [r for r in chosen.rows.tolist() if r % 3 == code] == best


def test_relative_sampling_refuses_what_it_cannot_use() -> None:
    teacher, reference = pair(10, 0)
    for scores in ((teacher, None), (None, reference)):
        with pytest.raises(RecipeError, match="teacher and of the reference"):
            RelativeSampling().select(*scores)
    with pytest.raises(ArtifactMismatchError, match="different instances"):
        RelativeSampling().select(teacher, replace(reference, packed="q" * 64))
    with pytest.raises(RecipeError, match="normalize"):
        sampler_from(SamplerSettings(sampler="relative", normalize="byte"))
    with pytest.raises(RecipeError, match="proxy"):
        needs_with_proxy("relative", RelativeSampling())
    assert sampler_from(SamplerSettings(sampler="relative", ratio=0.1)) == RelativeSampling(ratio=0.1)


def test_preference_and_difficulty_are_the_two_halves_of_the_difference() -> None:
    scores = scores_of([-4.0, -1.0, -3.0, -2.0])
    assert TeacherPreference(ratio=0.5).select(scores).rows.tolist() == [1, 3]
    assert ReferenceDifficulty(ratio=0.5).select(None, scores).rows.tolist() == [0, 2]


def test_random_sampling_is_uniform_seeded_and_without_replacement() -> None:
    pool = Pool.of(scores_of(np.zeros(40)))
    kept = np.zeros(40)
    for seed in range(400):
        chosen = RandomSampling(ratio=0.25, seed=seed).select(pool=pool)
        assert len(set(chosen.rows.tolist())) == 10
        kept[chosen.rows] += 1
    assert abs(kept / 400 - 0.25).max() < 5 * (0.25 * 0.75 / 400) ** 0.5
    again = RandomSampling(ratio=0.25, seed=7).select(pool=pool)
    assert again.rows.tolist() == RandomSampling(ratio=0.25, seed=7).select(pool=pool).rows.tolist()


def test_random_sampling_within_sources_meets_the_quotas() -> None:
    pool = Pool.of(scores_of(np.zeros(30)))
    chosen = RandomSampling(ratio=0.5, within="source").select(pool=pool)
    assert {name: kept for name, (kept, _) in chosen.by_source.items()} == {"a": 5, "b": 5, "c": 5}


def test_scores_of_other_instances_are_refused_with_both_sides() -> None:
    ours, theirs = scores_of([1.0, 2.0]), scores_of([1.0, 2.0], packed="q" * 64)
    with pytest.raises(ArtifactMismatchError, match="different instances") as caught:
        DifferenceSampling().select(ours, theirs)
    assert "pppppppppppp" in str(caught.value)
    assert "qqqqqqqqqqqq" in str(caught.value)
    with pytest.raises(ArtifactMismatchError, match="different instances"):
        DifferenceSampling().select(ours, scores_of([1.0]))


def test_scores_that_counted_other_targets_are_refused() -> None:
    with pytest.raises(ArtifactMismatchError, match="counted"):
        DifferenceSampling().select(scores_of([1.0]), scores_of([1.0], n_tokens=np.array([9], np.int32)))


@settings(max_examples=50, deadline=None)
@given(low=st.floats(0.05, 0.9), step=st.floats(0.01, 0.1), seed=st.integers(0, 1000))
def test_a_larger_ratio_keeps_all_that_a_smaller_one_keeps(low: float, step: float, seed: int) -> None:
    values = np.round(np.random.default_rng(seed).normal(size=200), 1)
    pool = Pool.of(scores_of(values))
    small = top_share(values, low, pool, within_source=False)
    large = top_share(values, low + step, pool, within_source=False)
    assert set(small.rows.tolist()) <= set(large.rows.tolist())


def test_a_selection_survives_the_disk(tmp_path: Path) -> None:
    pool = Pool.of(scores_of(np.arange(20.0)))
    sampler = DifferenceSampling(ratio=0.4)
    chosen = sampler.select(scores_of(np.arange(20.0)), scores_of(np.zeros(20)))
    what = identity("difference", sampler, {"pool": pool.fingerprint, "teacher": "t", "reference": "r"})
    save(tmp_path / "chosen", what, chosen)
    found: Selection = open_selection(tmp_path / "chosen")
    assert found.rows.tolist() == chosen.rows.tolist()
    assert (found.of, found.threshold, found.by_source, found.packed) == (
        chosen.of, chosen.threshold, chosen.by_source, chosen.packed,
    )  # fmt: skip


def test_samplers_by_name_take_only_the_settings_they_have() -> None:
    assert sampler_from(SamplerSettings(sampler="difference", within="source")) == DifferenceSampling(within="source")
    with pytest.raises(RecipeError, match="normalize"):
        sampler_from(SamplerSettings(sampler="random", normalize="byte"))
    with pytest.raises(RecipeError, match="Did you mean 'difference'"):
        sampler_from(SamplerSettings(sampler="diference"))


def test_a_sampler_of_ones_own_is_imported_and_given_its_settings() -> None:
    settings_ = SamplerSettings(sampler="miniplm.sampling.baselines:RandomSampling", seed=5)
    assert sampler_from(settings_) == RandomSampling(seed=5)
    with pytest.raises(MiniplmError, match="cannot be imported"):
        sampler_from(SamplerSettings(sampler="no_such_module:Thing"))
