"""Diversity: every measure against double loops, samples that no order changes, copies that are less diverse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from math import exp, log, sqrt
from pathlib import Path

import numpy as np
import pytest

import miniplm
from conftest import WORDS, write_jsonl
from miniplm.analysis.diversity import GROUPS, MEASURES, compression, diversity, mean_cosine_distance, packed_diversity
from miniplm.analysis.intervals import mean_of
from miniplm.analysis.lsa import DIMENSIONS, Lsa
from miniplm.analysis.words import Words, distinct, self_bleu, words
from miniplm.errors import CorpusTooSmallError, RecipeError

TEXTS = [
    "The cat sat on the mat.",
    "the cat sat on the mat again, and the cat sat",
    "A dog!",
    "a dog sat on the cat on the mat and the dog",
    "Nothing of the kind",
    "the the the the the the",
    "one",
    "",
]


def made(count: int, seed: int, vocabulary: Sequence[str] = WORDS, least: int = 5, most: int = 30) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(vocabulary, draw.integers(least, most))) for _ in range(count)]


def slow_ngrams(text: str, order: int) -> list[tuple[str, ...]]:
    split = words(text)
    return [tuple(split[i : i + order]) for i in range(len(split) - order + 1)]


def slow_bleu(hypothesis: str, references: list[str]) -> float:
    """Papineni et al., by the definition; orders to the length of the hypothesis, 0.1 for no match."""
    own = len(words(hypothesis))
    if own == 0:
        return float(any(not words(one) for one in references))
    total = 0.0
    for order in range(1, min(4, own) + 1):
        counts = Counter(slow_ngrams(hypothesis, order))
        matches = sum(
            min(count, max(slow_ngrams(one, order).count(ngram) for one in references))
            for ngram, count in counts.items()
        )
        if order == 1 and matches == 0:
            return 0.0
        total += log((matches or 0.1) / (own - order + 1)) / min(4, own)
    closest = min((len(words(one)) for one in references), key=lambda length: (abs(length - own), length))
    return exp(total) * (1 if own >= closest else exp(1 - closest / own))


def test_words_are_runs_of_letters_of_any_script_lower_cased() -> None:
    assert words("Der Über-Mut, x_1 = 3.5;\n東京 タワー\x00<b>") == [
        "der", "über", "mut", "x_1", "3", "5", "東京", "タワー", "b",
    ]  # fmt: skip


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_distinct_is_the_share_of_different_ngrams_inside_instances(order: int) -> None:
    for texts in (TEXTS, made(30, 0), [""], ["a"] * 5):
        every = [ngram for text in texts for ngram in slow_ngrams(text, order)]
        assert distinct(Words.of(texts), order) == (len(set(every)) / len(every) if every else 0.0)


def test_distinct_counts_only_the_words_it_is_given() -> None:
    text = Words.of(["a b a b a", "c c c"])
    assert len(text) == 8
    assert distinct(text.first(4), 1) == 2 / 4
    assert distinct(text.first(6), 2) == 2 / 4, "c after a is of another instance"


@pytest.mark.parametrize("texts", [TEXTS, made(25, 1), made(12, 2, WORDS[:3], 0, 6), ["x", "x"], ["", ""], ["", "a"]])
def test_self_bleu_is_bleu_against_all_the_others(texts: list[str]) -> None:
    expected = [slow_bleu(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
    assert self_bleu(Words.of(texts)).tolist() == pytest.approx(expected)


def test_self_bleu_is_that_of_nltk() -> None:
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    texts = [text for text in TEXTS if text] + made(20, 3)
    split = [words(text) for text in texts]
    how = bleu.SmoothingFunction().method1
    expected = [
        bleu.sentence_bleu(split[:i] + split[i + 1 :], one, smoothing_function=how, auto_reweigh=True)
        for i, one in enumerate(split)
    ]
    assert self_bleu(Words.of(texts)).tolist() == pytest.approx(expected)


def slow_mean_distance(vectors: np.ndarray) -> float:
    total, pairs = 0.0, 0
    for i, a in enumerate(vectors):
        for j, b in enumerate(vectors):
            if i != j:
                total += 1 - sum(x * y for x, y in zip(a, b, strict=True)) / (sqrt(sum(a * a)) * sqrt(sum(b * b)))
                pairs += 1
    return total / pairs


@pytest.mark.parametrize(("count", "width"), [(3, 2), (20, 5), (7, 40)])
def test_the_mean_distance_is_that_of_all_pairs_and_its_error_that_of_leaving_each_out(count: int, width: int) -> None:
    vectors = np.random.default_rng(count).normal(0.3, 1, (count, width))
    found = mean_cosine_distance(vectors)
    assert found.value == pytest.approx(slow_mean_distance(vectors))
    assert mean_cosine_distance(vectors * np.arange(1, count + 1)[:, None]).value == pytest.approx(found.value)
    without = np.array([slow_mean_distance(np.delete(vectors, i, axis=0)) for i in range(count)])
    error = ((count - 1) / count * ((without - without.mean()) ** 2).sum()) ** 0.5
    from scipy.stats import t

    assert found.high - found.value == pytest.approx(t.ppf(0.975, count - 1) * error)


def test_vectors_of_nothing_are_alike_and_unlike_others() -> None:
    assert mean_cosine_distance(np.zeros((4, 3))).value == pytest.approx(0)
    half = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    assert mean_cosine_distance(half).value == pytest.approx(8 / 12)


def test_the_fallbacks_vectors_are_cosines_of_tf_idf_and_of_its_best_approximation() -> None:
    learn = pytest.importorskip("sklearn.feature_extraction.text")
    texts = [*made(200, 0, [f"w{i}" for i in range(400)]), "w1 w1 w1 w2", ""]
    vectorizer = learn.TfidfVectorizer(tokenizer=words, token_pattern=None, sublinear_tf=True)
    exact = vectorizer.fit_transform(texts).toarray()
    small = Lsa().encode(texts[:50])
    theirs = vectorizer.fit_transform(texts[:50]).toarray()
    assert small @ small.T == pytest.approx(theirs @ theirs.T)
    found = Lsa().encode(texts)
    assert found.shape == (202, DIMENSIONS)
    left, values, _ = np.linalg.svd(exact, full_matrices=False)
    best = (left * values)[:, :DIMENSIONS]
    assert np.abs(found @ found.T - best @ best.T).max() < 1e-8
    assert Lsa().encode(["", "!"]).shape[0] == 2


def test_compression_sees_what_comes_again_far_away() -> None:
    noise = np.random.default_rng(0).bytes(50_000)
    assert compression(noise) == pytest.approx(1, abs=0.01)
    assert compression(noise + noise) == pytest.approx(2, abs=0.05)


def test_figures_are_means_over_groups_of_equal_amounts_of_text() -> None:
    pool, short = made(200, 0), made(60, 1, least=5, most=8)
    found = diversity(pool, {"short": short})
    assert found.instances == 60
    assert set(found.figures) == {"pool", "short"}
    again = np.random.default_rng(0).choice(60, 60, replace=False)
    drawn = [sorted(short)[i] for i in again]
    groups = [drawn[start::GROUPS] for start in range(GROUPS)]
    assert found.words == min(sum(len(words(text)) for text in group) for group in groups)
    assert found.n_bytes == min(len("\n".join(group)) for group in groups)
    for order in (1, 2, 3):
        parts = []
        for group in groups:
            cut, left = [], found.words
            for text in group:
                cut.append(" ".join(words(text)[:left]))
                left -= len(words(cut[-1]))
            ngrams = [ngram for text in cut for ngram in slow_ngrams(text, order)]
            parts.append(len(set(ngrams)) / len(ngrams))
        assert found.figures["short"][f"distinct_{order}"].value == pytest.approx(np.mean(parts))
    bleu = [np.mean([slow_bleu(t, g[:i] + g[i + 1 :]) for i, t in enumerate(g)]) for g in groups]
    assert found.figures["short"]["self_bleu"].value == pytest.approx(np.mean(bleu))
    raw = [compression("\n".join(group).encode()[: found.n_bytes]) for group in groups]
    assert found.figures["short"]["compression"] == mean_of(raw)


def test_neither_the_order_of_texts_nor_of_collections_matters_but_the_seed_does() -> None:
    pool, other = made(150, 0), made(120, 1, WORDS[:6])
    found = diversity(pool, {"other": other, "all": pool}, sample=100)
    turned = diversity(pool[::-1], {"all": pool, "other": other[::-1]}, sample=100)
    assert turned.figures == found.figures
    assert found.figures["all"] == found.figures["pool"]
    assert found.as_dict()["collections"][2]["semantic"]["minus_pool"]["value"] == 0
    assert diversity(pool, {"other": other, "all": pool}, sample=100, seed=1).figures != found.figures


def test_duplicates_are_less_diverse_by_every_measure() -> None:
    pool = made(300, 0, [f"w{i}" for i in range(500)])
    said = diversity(pool, {"copies": pool[:6] * 50, "random": pool[:150]}).as_dict()
    assert json.loads(json.dumps(said)) == said
    assert said["encoder"].startswith("tf-idf + lsa (no sentence encoder")
    by_name = {one["name"]: one for one in said["collections"]}
    for measure, more in MEASURES.items():
        assert by_name["pool"][measure]["minus_pool"] is None
        less = by_name["copies"][measure]["minus_pool"]
        assert (less["high"] < 0) if more == "higher" else (less["low"] > 0), measure
        same = by_name["random"][measure]["minus_pool"]
        assert abs(same["value"]) < abs(less["value"]) / 5


def test_an_encoder_reads_every_text_once() -> None:
    class Counting:
        name = "letters"

        def encode(self, texts: Sequence[str]) -> np.ndarray:
            assert len(set(texts)) == len(texts)
            return np.array([[text.count(letter) for letter in "abc"] for text in texts])

    pool = ["a a", "b c", "c c a"] * 10
    found = diversity(pool, {"one": ["a a"] * 30}, encoder=Counting())
    assert found.encoder == "letters"
    assert found.figures["one"]["semantic"].value == pytest.approx(0)
    vectors = np.array([[2, 0, 0], [0, 1, 1], [1, 0, 2]] * 10)
    assert found.figures["pool"]["semantic"].value == pytest.approx(100 * slow_mean_distance(vectors))


def test_packed_instances_are_measured_as_their_texts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", 100)
    tokenizer = {"train": {"vocab_size": 300}}
    pool = miniplm.prepare(path, tokenizer=tokenizer, sequence_length=64, out=tmp_path / "corpus").pool
    rows = np.arange(40, 90)
    found = packed_diversity(pool, {"some": rows}, sample=50)
    assert found == packed_diversity(pool, {"some": rows[::-1]}, sample=50)
    itself = packed_diversity(pool, {"itself": pool}, sample=50).figures
    assert itself["itself"] == itself["pool"]
    texts = diversity([pool.text(row) for row in range(40, 90)], {}, sample=50)  # all 50, dealt otherwise
    assert found.figures["some"]["self_bleu"].value == pytest.approx(texts.figures["pool"]["self_bleu"].value, rel=0.2)


def test_hostile_text_is_only_text() -> None:
    hostile = [
        "\x00",
        "\ud800 lone",
        "</script>",
        "{{ x }}",
        "%s %d",
        "\u202eabc",
        "",
        "   ",
        "a" * 100_000,
        "\U0001f600",
    ]
    found = diversity(hostile * 4, {"plain": made(40, 0)})
    for figures in found.figures.values():
        assert all(np.isfinite([one.value, one.low, one.high]).all() for one in figures.values())
    nothing = diversity([""] * 20, {}).figures["pool"]
    assert (nothing["distinct_1"].value, nothing["self_bleu"].value) == (0, 1)
    assert nothing["semantic"].value == pytest.approx(0)


def test_too_few_instances_are_an_error_with_their_numbers() -> None:
    with pytest.raises(CorpusTooSmallError, match=r"few +3 instances"):
        diversity(made(100, 0), {"few": ["a", "b", "c"]})
    with pytest.raises(RecipeError, match="pool"):
        diversity(made(100, 0), {"pool": made(100, 0)})


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """The truth is the mean over very many groups of as many instances, and of all pairs of very many instances."""
    instances, length, times = 10, 12, 200
    vocabulary = np.arange(60)
    draw = np.random.default_rng(0)
    weights = 1 / (1.0 + vocabulary)

    def group() -> Words:
        ids = draw.choice(60, instances * length, p=weights / weights.sum())
        return Words(ids.astype(np.int64), np.repeat(np.arange(instances), length), instances)

    measures = {"distinct_2": lambda one: distinct(one, 2), "self_bleu": lambda one: float(self_bleu(one).mean())}
    for name, measure in measures.items():
        truth = np.mean([measure(group()) for _ in range(2000)])
        held = [mean_of([measure(group()) for _ in range(GROUPS)]) for _ in range(times)]
        assert 0.9 <= np.mean([one.low <= truth <= one.high for one in held]) <= 0.99, name

    centre = np.array([0.5, 0.5, 0.0])
    mean = np.mean([v / np.linalg.norm(v) for v in draw.normal(centre, 1, (200_000, 3))], axis=0)
    found = [mean_cosine_distance(draw.normal(centre, 1, (100, 3))) for _ in range(times)]
    assert 0.9 <= np.mean([one.low <= 1 - mean @ mean <= one.high for one in found]) <= 0.99


def test_importing_analysis_loads_nothing_heavy() -> None:
    script = (
        "import sys, miniplm.analysis.diversity, miniplm.analysis.effects, miniplm.analysis.examples;"
        "import miniplm.analysis.agreement, miniplm.models.encoder;"
        "print({'torch', 'transformers', 'sklearn', 'sacrebleu', 'nltk', 'scipy.stats', 'scipy'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
