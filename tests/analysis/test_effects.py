"""Effects: each instance is exactly one, by rules of one line; examples and neighbours are what they are called."""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import median

import numpy as np
import pytest

import miniplm
from conftest import write_jsonl
from miniplm.analysis.effects import EFFECTS, Effects, effects
from miniplm.analysis.examples import EXAMPLE_CHARACTERS, examples, neighbours
from miniplm.errors import ArtifactMismatchError, RecipeError
from miniplm.packing.instances import Packed
from miniplm.sampling.base import Pool, Selection, top_k
from miniplm.scoring.base import Scores, encode_sources

HOSTILE = "</script><b onclick=x>\x00\x1b[31m \u202e {{ 7 * 7 }} %s <|endoftext|> \U0001f600"


def scores_of(losses: list[float] | np.ndarray, sources: list[str] | None = None, packed: str = "p") -> Scores:
    """Scores of 10 tokens in 40 bytes each, from losses per token."""
    n = len(losses)
    names, codes = encode_sources(sources or ["s"] * n)
    tokens, n_bytes = np.full(n, 10, np.int32), np.full(n, 40, np.int32)
    return Scores(-10 * np.asarray(losses, np.float64), tokens, n_bytes, codes, names, packed, "t")


def random_scores(n: int = 200, seed: int = 0, **how: object) -> tuple[Scores, Scores]:
    draw = np.random.default_rng(seed)
    reference = draw.gamma(9, 0.4, n)
    teacher = np.maximum(0.01, reference - draw.gamma(2, 0.5, n) + 0.1)
    return scores_of(teacher, **how), scores_of(reference, **how)


def slow_effect(score: float, loss: float, typical: float, middle: float) -> str:
    if score < 0:
        return "noisy"
    if score <= 0.5 * typical and loss <= middle:
        return "easy"
    return "hard" if score > 1.5 * typical else "between"


def test_every_instance_is_what_the_rules_say() -> None:
    teacher, reference = random_scores()
    found = effects(teacher, reference)
    losses = [-logp / 10 for logp in reference.logp.tolist()]
    score = [(t - r) / 10 for t, r in zip(teacher.logp.tolist(), reference.logp.tolist(), strict=True)]
    typical, middle = median([one for one in score if one >= 0]), median(losses)
    expected = [slow_effect(s, loss, typical, middle) for s, loss in zip(score, losses, strict=True)]
    assert [EFFECTS[code] for code in found.effect] == expected
    assert set(expected) == set(EFFECTS), "all four are there"
    assert sum(found.of(name).astype(int) for name in EFFECTS).tolist() == [1] * 200, "each exactly one"


def test_the_papers_examples_are_what_it_calls_them() -> None:
    """Appendix F: losses of teacher and reference, nats per token; the others stand for the rest of the Pile."""
    printed = {
        "dumpster rental": (1.26, 4.20, "hard"),
        "vocabulary list": (2.36, 5.59, "hard"),
        "node.js": (0.16, 2.73, "hard"),
        "OSM XML": (1.24, 1.28, "easy"),
        "LaTeX size()": (0.44, 0.51, "easy"),
        "near-empty": (9.50, 6.60, "noisy"),
        "coordinates": (1.01, 0.90, "noisy"),
        "crystallography": (2.53, 0.26, "noisy"),
    }
    rest = [(2.4 + step / 50, 3.0 + step / 25) for step in range(20)]
    losses = [pair[:2] for pair in printed.values()] + rest
    found = effects(scores_of([t for t, _ in losses]), scores_of([r for _, r in losses]))
    assert [EFFECTS[code] for code in found.effect[: len(printed)]] == [what for _, _, what in printed.values()]


def test_effects_are_the_same_in_other_units_and_orders() -> None:
    teacher, reference = random_scores()
    found = effects(teacher, reference).effect.tolist()
    bits = [replace(one, logp=one.logp / np.log(2)) for one in (teacher, reference)]
    assert effects(*bits).effect.tolist() == found
    assert effects(teacher, reference, normalize="byte").effect.tolist() == found
    assert effects(teacher, reference, normalize="sum").effect.tolist() == found
    order = np.random.default_rng(1).permutation(200)
    moved = effects(*(replace(one, logp=one.logp[order]) for one in (teacher, reference)))
    assert moved.effect.tolist() == [found[row] for row in order]


def test_shares_are_counts_of_the_pool_of_sources_and_of_what_was_kept() -> None:
    sources = ["web", "code", "web", "books"] * 50
    teacher, reference = random_scores(sources=sources)
    kept = np.zeros(200, np.bool_)
    kept[top_k(effects(teacher, reference).score, 100)] = True
    found = effects(teacher, reference, kept)
    said = found.as_dict()
    assert json.loads(json.dumps(said)) == said
    named = [EFFECTS[code] for code in found.effect]
    for part in said["effects"]:
        rows = [row for row in range(200) if named[row] == part["effect"]]
        assert part["pool"] == len(rows)
        assert part["share"] == len(rows) / 200
        assert part["kept"] == sum(bool(kept[row]) for row in rows)
        assert part["kept_share"] == part["kept"] / len(rows)
        assert part["score"] == pytest.approx(sum(found.score[row] for row in rows) / len(rows))
        assert part["score"] == pytest.approx(part["reference"] - part["teacher"])
    assert [part["source"] for part in said["by_source"]] == ["web", "books", "code"], "the largest first"
    for part in said["by_source"]:
        rows = [row for row in range(200) if sources[row] == part["source"]]
        assert (part["pool"], part["share"]) == (len(rows), len(rows) / 200)
        assert part["kept"] == sum(bool(kept[row]) for row in rows)
        assert {name: part[name] for name in EFFECTS} == {
            name: sum(named[row] == name for row in rows) / len(rows) for name in EFFECTS
        }


def test_a_selection_is_taken_if_it_is_of_these_instances() -> None:
    teacher, reference = random_scores()
    rows = np.arange(0, 200, 3)
    kept = effects(teacher, reference, Selection.of_rows(rows, Pool.of(teacher))).kept
    assert kept is not None
    assert np.flatnonzero(kept).tolist() == rows.tolist()
    for other, n in (("other", 200), (teacher.packed, 100), (teacher.packed, 300)):
        selection = Selection.of_rows(np.arange(n - 10, n), Pool(other, np.zeros(n, np.int32), ("s",)))
        with pytest.raises(ArtifactMismatchError, match="selection is of other instances"):
            effects(teacher, reference, selection)


def test_nothing_is_said_of_a_selection_that_nobody_made_or_of_an_effect_that_is_not_there() -> None:
    said = effects(scores_of([1.0, 1.0]), scores_of([2.0, 2.0])).as_dict()
    assert {part["kept"] for part in said["effects"]} == {None}
    between = {part["effect"]: part for part in said["effects"]}
    assert between["between"]["share"] == 1
    assert between["noisy"] == {
        "effect": "noisy", "pool": 0, "share": 0.0, "kept": None, "kept_share": None,
        "teacher": None, "reference": None, "score": None,
    }  # fmt: skip


@pytest.mark.parametrize(("teacher", "reference", "only"), [(1.0, 1.0, "easy"), (2.0, 1.0, "noisy")])
def test_pools_of_one_kind(teacher: float, reference: float, only: str) -> None:
    found = effects(scores_of([teacher] * 5), scores_of([reference] * 5))
    assert found.of(only).all()


def test_what_cannot_be_is_refused() -> None:
    teacher, reference = random_scores()
    with pytest.raises(RecipeError, match="easy_below"):
        effects(teacher, reference, easy_below=2, hard_above=1)
    with pytest.raises(RecipeError, match="fits"):
        effects(teacher, reference, fits=1.5)
    with pytest.raises(ArtifactMismatchError, match="selection"):
        effects(teacher, reference, np.ones(3, np.bool_))
    with pytest.raises(ArtifactMismatchError, match="different instances"):
        effects(teacher, scores_of([1.0]))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("effects")
    path = write_jsonl(folder / "c.jsonl", 120)
    lines = path.read_text().splitlines()
    hostile = [json.dumps({"id": f"h{n}", "text": HOSTILE * 30, "source": "hostile"}) for n in range(20)]
    path.write_text("\n".join(lines + hostile) + "\n")
    tokenizer = {"train": {"vocab_size": 300}}
    return miniplm.prepare(path, tokenizer=tokenizer, sequence_length=64, out=folder / "corpus").pool


@pytest.fixture(scope="module")
def found(pool: Packed) -> Effects:
    teacher, reference = random_scores(len(pool), sources=pool.dataset["source"][:], packed=pool.fingerprint)
    kept = np.zeros(len(pool), np.bool_)
    kept[top_k(effects(teacher, reference).score, len(pool) // 2)] = True
    return effects(teacher, reference, kept)


def test_examples_are_of_their_effect_and_of_different_sources(pool: Packed, found: Effects) -> None:
    shown = examples(pool, found)
    kept = found.kept
    assert kept is not None
    for name, effect, was_kept in (
        ("easy_dropped", "easy", 0),
        ("hard_kept", "hard", 1),
        ("noisy_dropped", "noisy", 0),
    ):
        assert len(shown[name]) == 3
        assert len({one["source"] for one in shown[name]}) == 3, "there are several"
        for one in shown[name]:
            assert found.of(effect)[one["row"]]
            assert kept[one["row"]] == was_kept
            assert one["score"] == found.score[one["row"]] == pytest.approx(one["reference"] - one["teacher"])
            assert (one["source"], one["documents"]) == tuple(
                pool.dataset[one["row"]][k] for k in ("source", "documents")
            )
    assert shown["hard_kept"][0]["row"] == int(np.argmax(found.score))
    assert shown["noisy_dropped"][0]["row"] == int(np.argmin(found.score))
    assert shown["notes"] == {}
    assert json.loads(json.dumps(shown)) == shown


def test_examples_make_do_with_the_nearest_and_say_so(pool: Packed) -> None:
    n = len(pool)
    losses = np.linspace(5, 5.5, n)
    teacher = scores_of(losses - 1 - np.linspace(0, 0.1, n), packed=pool.fingerprint)
    shown = examples(pool, effects(teacher, scores_of(losses, packed=pool.fingerprint)))
    assert shown["notes"].keys() == {"easy_dropped", "hard_kept", "noisy_dropped"}
    assert shown["easy_dropped"][0]["row"] == 0
    assert shown["hard_kept"][0]["row"] == n - 1
    assert shown["noisy_dropped"] == []


def test_text_is_shown_as_it_is_and_cut(pool: Packed, found: Effects) -> None:
    row = pool.dataset["source"][:].index("hostile")
    (one,) = [one for one in neighbours(pool, found, row) if one["row"] == row]
    assert one["text"] == pool.text(row)[:EXAMPLE_CHARACTERS]
    assert one["text"].startswith(HOSTILE[:20])


def test_neighbours_are_those_next_in_the_order_of_scores(pool: Packed, found: Effects) -> None:
    order = sorted(range(len(pool)), key=lambda row: (-found.score[row], row))
    for row in (order[0], order[5], order[-1]):
        place = order.index(row)
        shown = neighbours(pool, found, row, count=2)
        expected = range(max(0, place - 2), min(len(order), place + 3))
        assert [one["row"] for one in shown] == [order[i] for i in expected]
        assert [one["place"] for one in shown] == [i + 1 for i in expected]
    with pytest.raises(RecipeError, match="no instance"):
        neighbours(pool, found, len(pool))


def test_by_default_they_are_those_at_the_border_of_what_was_kept(pool: Packed, found: Effects) -> None:
    assert [one["kept"] for one in neighbours(pool, found)] == [True] * 3 + [False] * 3
    scores = [one["score"] for one in neighbours(pool, found)]
    assert scores == sorted(scores, reverse=True)


def test_a_samples_instances_are_shown_by_their_rows_of_the_pool(pool: Packed, found: Effects) -> None:
    rows = np.arange(len(pool)) * 7 + 1
    plain, shown = examples(pool, found), examples(pool, found, rows=rows)
    for name in ("easy_dropped", "hard_kept", "noisy_dropped"):
        assert [one["row"] for one in shown[name]] == [one["row"] * 7 + 1 for one in plain[name]]
        assert [one["text"] for one in shown[name]] == [one["text"] for one in plain[name]]
    assert [one["row"] for one in neighbours(pool, found, rows=rows)] == [
        one["row"] * 7 + 1 for one in neighbours(pool, found)
    ]


def test_instances_that_were_not_scored_are_refused(pool: Packed) -> None:
    other = effects(*random_scores(len(pool)))
    with pytest.raises(ArtifactMismatchError, match="other instances"):
        examples(pool, other)
    with pytest.raises(ArtifactMismatchError, match="other instances"):
        neighbours(pool, other)
