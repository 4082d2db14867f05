"""The sections of the analyses: each figure stands where it belongs, and a section of nothing is not there."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
from analysis_findings import MODELS, NOTHING, agreement, cost, diversity, effect_shares, scaling, tasks
from test_page import full_findings, parse

from miniplm.report import analysis_figures, page, summary
from miniplm.report.analysis import measured_reductions
from miniplm.report.drawing import SERIES

HEADINGS = {
    "tasks": "Documents and tasks",
    "scaling": "Compute and scaling",
    "agreement": "Does the reference stand for the student?",
    "diversity": "Diversity",
    "cost": "What it cost, and who repays it",
}
CONTROLS = ["control"]


@pytest.fixture(scope="module")
def words() -> str:
    return parse(page.render(full_findings())).words()


def rows_of(words: str, name: str) -> list[str]:
    """What follows a name in the text, wherever it stands."""
    return [part[:160] for part in words.split(f" {name} ")[1:]]


def says(words: str, name: str, *cells: str) -> bool:
    return any(row.startswith(" ".join(cells)) for row in rows_of(words, name))


def test_losses_on_documents_stand_beside_each_other(words: str) -> None:
    assert "dclm : 1,234 documents, the beginning of each. By document: the mean over documents" in words
    assert says(words, "teacher", "4.250 ± 0.013 4.125 ± 0.013 1.500 ± 0.013 –")
    assert says(words, "miniplm", "4.252 ± 0.013 4.127 ± 0.013 1.502 ± 0.013 −0.062 ± 0.013 better")
    assert says(words, "theirs", "– – 1.505 ± 0.013"), "tokens of its own: in bits per byte alone"
    assert "whole : 1,234 windows, which hold the whole of each document." in words
    assert says(words, "teacher", "4.125 ± 0.013 1.500 ± 0.013"), "nothing by document where instances are windows"


def test_accuracies_stand_beside_each_other(words: str) -> None:
    assert "hellaswag acc_norm of 10,042 lambada_openai acc of 5,153" in words
    assert says(words, "teacher", "31.2% ± 0.3% 28.7% ± 0.4% 33.8%")
    assert "the examples of storycloze_2018, piqa are not there: this average is another than the paper's" in words
    assert "hellaswag : 7 requests were too long ." in words
    assert "zero-shot" in words


def test_models_of_other_people_have_a_row_of_held_out_loss(words: str) -> None:
    assert "Models of other people theirs – – – – 1.250 ± 0.010 –" in words


def test_compute_to_the_same_loss_says_what_was_measured(words: str) -> None:
    assert says(words, "miniplm", "control 1.18 measured at 5.493: 1.08 to ∞ 1.31 by the law at 5.493: 1.21 to ∞")
    assert says(words, "ranked", "control never by the law at 5.493: −0.10 to ∞ 0.50 by the law")
    assert list(measured_reductions(scaling())) == ["miniplm"]
    assert measured_reductions(scaling())["miniplm"]["end_of"] == "control"
    assert measured_reductions(None) == {}


def test_laws_have_their_constants_and_their_caveat(words: str) -> None:
    row = "2.5 × 10³ 0.231 0.131 to 0.331 3.115 3.015 to 3.215 5.100 5.000 to 5.200 0.3% 7 1 left out"
    assert says(words, "miniplm", row)
    assert "are not converged runs" in words
    assert "without the first 20% of training" in words
    assert "α is between 0.41 and 0.59" in words
    assert "too few points to fit one to: ranked" in words


def test_effects_say_their_rule_and_their_shares(words: str) -> None:
    assert "(up to 0.45, and a loss of the reference up to 3.21)" in words
    assert "where the teacher is far ahead (above 1.35)" in words
    assert says(words, "easy", "375 12.5% 187 50.0% 2.25 3.50 +1.25")
    assert "in what difference kept, and in each source" in words
    assert says(words, "torch", "2,000 50.0% 12.5% 56.2% 25.0% 6.2%")
    assert "place 1,500, kept" in words


def test_agreement_stands_beside_the_papers(words: str) -> None:
    assert "A student that saw random text, as control did, is the paper's q." in words
    assert says(words, "control", "control 0.671 0.571 to 0.771 0.621 0.521 to 0.721 72.1% 62.1% to 82.1%")
    assert says(words, "104M", "0.826 0.840 87.4%")
    assert "would agree on 50.0%" in words


def test_without_a_control_nobody_is_the_papers_q() -> None:
    found = full_findings()
    found["agreement"]["students"] = found["agreement"]["students"][1:]
    shown = parse(page.render(found)).words()
    assert "The paper's q is a student that saw random text; there is none here." in shown


def test_diversity_names_its_encoder_and_marks_what_chance_does_not_explain() -> None:
    html = page.render(full_findings())
    words = parse(html).words()
    assert "vectors by tf-idf + lsa (no sentence encoder was given)" in words
    assert "Of 1,000 instances of each" in words
    assert says(words, "difference", "0.500 +0.062 0.052 to 0.072 0.500")
    assert "<b>+0.062</b>" in html
    assert "<b>−0.002</b>" not in html, "its interval holds 0"
    assert "32.25" in words


def test_too_small_a_pool_has_no_diversity() -> None:
    found = full_findings() | {
        "diversity": {"collections": [], "because": "there are too few <instances>.", "paper": {}}
    }
    assert "Not measured: there are too few <instances>." in parse(page.render(found)).words()


def test_costs_are_added_up_and_repaid(words: str) -> None:
    assert "offline: corpus, reference, scores, selection 1.5 × 10¹³ 1 min 45 s 42 MB" in words
    assert "students at least 1.5 × 10¹³" in words
    assert says(words, "miniplm", "3.8 × 10¹³ 1.6 × 10¹³ 2.5 13.0 0.0 to never reduction 1.18 2.0")
    assert says(words, "ranked", "3.8 × 10¹³ 1.6 × 10¹³ – – 2.0")
    assert "take 279 kB" in words
    assert "would take 43 GB, 154k times as much" in words
    assert says(words, "prepare", "8.7 s resumed – – 12 MB"), "stages have their operations and their disk"


@pytest.mark.parametrize("name", HEADINGS)
def test_a_section_of_nothing_is_not_there(name: str) -> None:
    found = full_findings()
    before = parse(page.render(found)).inside("section", "h2")
    nothing = {name: None} | ({"documents": []} if name == "tasks" else {})
    after = parse(page.render(found | nothing)).inside("section", "h2")
    assert HEADINGS[name] in before
    assert after == [heading for heading in before if heading != HEADINGS[name]]


def test_documents_without_tasks_and_tasks_without_documents() -> None:
    for nothing in ({"tasks": None}, {"documents": []}):
        assert HEADINGS["tasks"] in parse(page.render(full_findings() | nothing)).inside("section", "h2")


FIGURES: dict[str, Callable[[], str]] = {
    "tasks": lambda: analysis_figures.task_dots(tasks(), CONTROLS),
    "effects": lambda: analysis_figures.effect_shares(effect_shares()),
    "agreement": lambda: analysis_figures.decisions(agreement()),
    "laws": lambda: analysis_figures.laws(scaling(), full_findings()["students"], CONTROLS),
    "same loss": lambda: analysis_figures.compute_to_same_loss(scaling()),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_the_same_again_and_can_be_recoloured(name: str) -> None:
    svg = FIGURES[name]()
    assert svg == FIGURES[name]()
    assert f"var(--series-1, {SERIES[0]})" in svg
    assert re.findall(r"(?<!, )#[0-9a-f]{6}\b", svg) == []


def test_figures_of_nothing_are_empty() -> None:
    assert set(analysis_figures.drawn(NOTHING | {"effects": {}, "students": []}, []).values()) == {""}


def test_figures_say_what_they_show() -> None:
    assert all(f"{name} 0.{31 + number}" in FIGURES["tasks"]() for number, (name, _) in enumerate(MODELS))
    assert "what was kept: easy 12%, between 56%, hard 25%, noisy 6%." in FIGURES["effects"]()
    assert "Pearson 0.671, the same decision on 72.1%" in FIGURES["agreement"]()
    assert "miniplm 5.100 at 1.6 × 10¹⁴" in FIGURES["laws"]()
    assert "miniplm 1.6 × 10¹³, control 1.9 × 10¹³" in FIGURES["same loss"]()


def test_each_student_has_a_line_of_analyses_in_the_terminal() -> None:
    lines = summary.lines(full_findings())
    heading = next(n for n, line in enumerate(lines) if line.startswith("student ") and "break-even" in line)
    miniplm, ranked, control = lines[heading + 1 : heading + 4]
    for said in ("4.2520 nats/token", "4.1270 nats/token", "33.2% ± 0.3%", "10.2% (by chance 50.0%)"):
        assert said in miniplm
    assert miniplm.endswith("1.18 (1.08 to ∞)   2.5 / 13.0 (0.0 to never)")
    assert ranked.endswith("–                  – / not measured")
    assert control.split()[0] == "control"
    assert control.endswith("–")


def test_what_nobody_analysed_is_not_printed() -> None:
    found = copy.deepcopy(full_findings()) | NOTHING
    assert not any("break-even" in line or "same decision" in line for line in summary.lines(found))


def test_findings_of_analyses_are_made_of_plain_types() -> None:
    kinds: set[type[Any]] = set()

    def walk(value: Any) -> None:
        kinds.add(type(value))
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(inner)

    for part in (tasks(), scaling(), agreement(), diversity(), cost()):
        walk(part)
    assert kinds <= {dict, list, str, int, float, bool, type(None)}
