"""The report: structure, honesty of the headline, hostile text, self-containedness, reproducibility."""

from __future__ import annotations

import copy
import csv
import json
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import matplotlib
import pytest
from analysis_findings import NOTHING, analyses, effect_shares

from miniplm.report import figures, page, summary
from miniplm.report.training import students_csv

VOID = {"meta", "br", "hr", "img", "link", "input"}
SVG_TAGS = {"svg", "g", "path", "text", "use", "defs", "clippath", "rect"}
HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></title></style></svg><img src=x onerror=alert(1)>",
    '"><a href="https://example.org">x</a>',
    "'{{ 7 * 7 }}{% raw %}",
    "<!-- --> ]]> &amp; &lt;b&gt;",
    "$x^2$ and $\\frac{",
    "\x1b[31mred\x1b[0m",
    "a\x00b\x7fc\x85d",
    "\u202eevil\u202c \u2066x\u2069",
    "\ud800 lone",
    "中文 العربية 🙂",
    "_private",
    "line\nbreak\r\nand\ttab",
    "x" * 400,
    '#0072b2 style="fill: #0072b2"',
]


class Document(HTMLParser):
    """The parsed page: every start tag, the text outside and inside SVG, and what was not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.svg_tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[tuple[tuple[str, ...], str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        (self.svg_tags if "svg" in self.open else self.tags).append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append((tuple(self.open), data))

    def inside(self, *tags: str) -> list[str]:
        """The texts whose innermost elements are these."""
        found = [text for path, text in self.text if path[-len(tags) :] == tags]
        return [text.removeprefix("\n") for text in found] if tags[-1] == "pre" else found  # as browsers do

    def words(self) -> str:
        return " ".join(" ".join(text for path, text in self.text if "style" not in path).split())


def parse(html: str) -> Document:
    document = Document(html)
    assert document.open == []
    return document


def headline_of(html: str) -> str:
    found = re.search(r'<p id="headline">(.*?)</p>', html, re.DOTALL)
    assert found is not None
    return " ".join(Document(found[1]).words().split())


def said(findings: dict[str, Any]) -> str:
    """The headline, without the page around it."""
    return Document(str(page.headline(findings))).words()


def student(name: str, data: str, loss: float, tokens: int = 1998848) -> dict[str, Any]:
    curve = [
        {
            "step": step,
            "tokens": tokens * step // 8,
            "flops": 8e6 * (tokens * step // 8),
            "train_loss": loss + 4 / step,
            "cross_entropy": loss + 4 / step,
            "held_out_loss": loss + 3 / step,
            "learning_rate": 0.001,
        }
        for step in range(1, 9)
    ]
    by_source = [
        {"source": source, "loss": loss + shift, "loss_se": 0.05, "bits_per_byte": 2.2, "instances": 120}
        for source, shift in (("torch", -0.2), ("numpy", 0.1))
    ]
    return {
        "name": name, "data": data, "made_of": [{"name": data, "kind": "selection"}], "tokenizer": "ours",
        "own_tokenizer": False, "objective": {"name": "next_token"}, "match": None, "model_type": "qwen2",
        "parameters": 1329792, "tokens": tokens, "steps": 1952, "batch_tokens": 1024, "learning_rate": 0.001,
        "instances": 8000, "epochs": 0.98, "matched_share": 1.0, "flops": 8e6 * tokens, "final_train_loss": loss + 0.5,
        "final_cross_entropy": loss + 0.5, "seconds": 110.0, "resumed": False, "train_seconds": 105.2,
        "tokens_per_s": 19000, "flops_per_s": 1.5e11, "share_of_matmul_rate": 0.42, "device": "cpu", "processes": 1,
        "loss": loss, "loss_se": 0.03, "bits_per_byte": 2.31, "bits_per_byte_se": 0.01,
        "by_source": by_source, "curve": curve, "path": f"students/{name}-1a2b3c4d5e6f",
        "control": None if name == "control" else "control",
    }  # fmt: skip


def comparison(name: str, difference: float, verdict: str) -> dict[str, Any]:
    return {
        "student": name, "control": "control", "unit": "nats per token", "difference": difference, "se": 0.011,
        "bits_difference": 0.5 * difference, "instances": 972, "verdict": verdict,
    }  # fmt: skip


def selection(name: str, sampler: str, threshold: float | None, kept: float) -> dict[str, Any]:
    return {
        "name": name, "sampler": sampler, "ratio": 0.5, "normalize": "token", "within": None, "selected": 1500,
        "of": 3000, "threshold": threshold, "path": f"select-{name}",
        "by_source": [
            {"source": "torch", "pool": 2000, "selected": int(2000 * kept)},
            {"source": "numpy", "pool": 1000, "selected": 500},
        ],
    }  # fmt: skip


def example(text: str) -> dict[str, Any]:
    return {
        "row": 12, "source": "torch", "documents": ["site/torch/x.py"], "text": text,
        "teacher": 1.2, "reference": 3.4, "score": 2.2,
    }  # fmt: skip


def model(role: str, loss: float) -> dict[str, Any]:
    absent = ("name", "data", "made_of", "tokenizer", "own_tokenizer", "control")
    return {"role": role} | {key: value for key, value in student("", "", loss).items() if key not in absent}


def distilled(name: str, objective: dict[str, Any], match: str | None = None) -> dict[str, Any]:
    """A student whose loss is another quantity, 1 nat above the cross entropy in it, at twice the cost of a token."""
    one = student(name, "random", 5.3, tokens=999424)
    curve = [
        point | {"train_loss": point["train_loss"] + 1, "flops": 2 * point["flops"], "teacher_term": 2.0}
        for point in one["curve"]
    ]
    return one | {
        "objective": objective, "match": match, "matched_share": 0.5, "flops": 2 * one["flops"], "curve": curve,
        "final_train_loss": 6.8,
    }  # fmt: skip


def retokenised(name: str) -> dict[str, Any]:
    """A student with a tokenizer of its own."""
    one = student(name, "other", 3.0)
    unknown = dict.fromkeys(("loss", "loss_se"))
    return one | unknown | {
        "made_of": [
            {"name": "other", "kind": "retokenised"},
            {"name": "written", "kind": "generated"},
            {"name": "random", "kind": "selection"},
        ],
        "tokenizer": "theirs", "own_tokenizer": True,
        "curve": [point | {"held_out_loss": None} for point in one["curve"]],
        "by_source": [row | unknown for row in one["by_source"]],
    }  # fmt: skip


KD = {"name": "vanilla_kd", "share": 0.5, "temperature": 1.0, "dtype": "bfloat16"}
GENERATED = {
    "name": "written", "data": "random", "temperature": 0.7, "top_p": 0.95, "instances": 1501, "kept_unchanged": 17,
    "generated_tokens": 385792, "tokens_out": 1537000, "prompt_tokens": 768, "sequence_length": 1024,
    "teacher_flops": 1.5e12, "by_source": {"torch": 1501}, "tokens_per_s": 7606, "path": "generated/written-1a",
    "examples": [
        {"row": 4, "source": "torch", "documents": ["x.py"], "prompt": "def f(x):", "written": "\n    return 7"}
    ],
}  # fmt: skip
RETOKENIZED = {
    "name": "other", "data": "written", "tokenizer": "theirs", "of": 1502, "instances_in": 1503, "instances": 1504,
    "bytes_in": 7654321, "bytes_out": 7654321, "tokens_in": 2000010, "tokens_out": 2000000, "leftover_tokens": 10,
    "pieces": 2345, "joined_instances": 0, "cut_pieces": 1499, "sequence_length": 1024, "vocab_size": 50304,
    "by_source": {"torch": 1504}, "path": "retokenized/other-2b",
}  # fmt: skip


def full_findings() -> dict[str, Any]:
    parts = ("documents", "text_bytes", "tokens_in", "tokens_out", "leftover_tokens", "instances")
    return {
        "schema": 4,
        "name": "quickstart",
        "students": [
            student("miniplm", "difference", 5.118),
            student("ranked", "ranked", 5.16),
            student("control", "random", 5.17),
        ],
        "models": [model("teacher", 2.31), model("reference", 5.6)],
        "others": [
            dict.fromkeys(("loss", "loss_se"))
            | {"name": "theirs", "bits_per_byte": 1.25, "bits_per_byte_se": 0.01, "by_source": []}
        ],
        "comparisons": [
            comparison("miniplm", -0.052, "better"),
            comparison("ranked", -0.01, "within noise"),
        ],
        "scores": {
            "normalize": "token",
            "edges": [-1.0, 0.0, 1.0, 2.0, 3.0],
            "counts": [39, 961, 1500, 500],
            "quantiles": {"0.01": -0.1, "0.5": 1.3, "0.99": 2.9},
            "mean": 1.25,
            "negative_share": 0.013,
            "instances": 3000,
        },
        "selections": [
            selection("difference", "difference", 1.25, 0.6),
            selection("ranked", "difference", None, 0.5),
            selection("random", "random", None, 0.5),
        ],
        "generated": [],
        "retokenized": [],
        "effects": effect_shares()
        | {
            "easy_dropped": [example("MIT licence"), example("same again")],
            "hard_kept": [example("def f(x):\n    return x")],
            "noisy_dropped": [],
            "borderline": [example("between the two") | {"place": 1500, "kept": True}],
            "notes": {"noisy_dropped": "no instance scored below 0"},
        },
        **analyses(),
        "proxy": None,
        "corpus": {
            "documents": 2019, "empty": 3, "malformed": 0, "undecodable": 1, "sequence_length": 256, "vocab_size": 4096,
            "parts": {"pool": dict.fromkeys(parts, 1234567), "held_out": dict.fromkeys(parts, 89)},
        },
        "stages": [
            {
                "name": "prepare", "seconds": 8.7, "resumed": True, "tokens_per_s": None, "path": "corpus-1a",
                "fingerprint": "ab12" * 16,
            },
        ],
        "recipe": "name: quickstart\n",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "platform": "Linux, 2 cores",
    }  # fmt: skip


def distillation_findings() -> dict[str, Any]:
    """The same with distilled students, one of them with a tokenizer of its own, and the data made for them."""
    found = full_findings()
    found["students"] += [
        distilled("kd", KD, "flops"),
        distilled("policy", {"name": "minillm", "teacher_mix": 0.2}),
        distilled("own", {"name": "package.module:Class", "beta": "</td><script>"}),
        retokenised("family"),
    ]
    for point in found["students"][-2]["curve"]:
        point["cross_entropy"] = None
    found["students"][-2]["final_cross_entropy"] = None
    found["comparisons"] += [
        comparison("kd", 0.1, "worse"),
        comparison("policy", 0.2, "worse"),
        comparison("own", 0.2, "worse"),
        comparison("family", 0.04, "worse") | {"unit": "bits per byte", "bits_difference": 0.04},
    ]
    return found | {"generated": [copy.deepcopy(GENERATED)], "retokenized": [copy.deepcopy(RETOKENIZED)]}


@pytest.fixture
def findings() -> dict[str, Any]:
    return full_findings()


@pytest.fixture
def distillation() -> dict[str, Any]:
    return distillation_findings()


@pytest.fixture(scope="module")
def harmless() -> Document:
    return parse(page.render(with_text(distillation_findings(), lambda text: f"{text} x")))


@pytest.fixture
def empty(findings: dict[str, Any]) -> dict[str, Any]:
    lists = {key: [] for key, value in findings.items() if isinstance(value, list)}
    effects: dict[str, Any] = {"easy_dropped": [], "hard_kept": [], "noisy_dropped": [], "notes": {}}
    return findings | lists | NOTHING | {"scores": None, "effects": effects, "versions": {}, "recipe": ""}


FIXED = (
    "verdict", "role", "normalize", "within", "sampler", "unit", "kind", "match", "tokenizer", "windows", "end_of",
    "read_from", "effect", "more_diverse", "metric",
)  # fmt: skip
METHODS = ("next_token", "vanilla_kd", "minillm")


def with_text(value: Any, change: Callable[[str], str], key: str = "") -> Any:
    """The same findings with every free text changed; words that the schema fixes stay."""
    if isinstance(value, str):
        return value if key in FIXED or (key == "name" and value in METHODS) else change(value)
    if isinstance(value, list):
        return [with_text(one, change, key) for one in value]
    if isinstance(value, dict):
        free_keys = key in ("versions", "parts", "notes") and "noisy_dropped" not in value
        fixed = key if key in FIXED else ""  # all of what is in it
        return {
            change(name) if free_keys else name: with_text(one, change, fixed or name) for name, one in value.items()
        }
    return value


def test_every_part_of_the_full_page_is_there(findings: dict[str, Any]) -> None:
    document = parse(page.render(findings))
    assert Counter(document.tags)["svg"] == 9
    assert set(document.svg_tags) <= SVG_TAGS
    assert document.inside("title") == ["quickstart – MiniPLM report"]
    assert document.inside("article", "pre") == [
        "MIT licence", "same again", "def f(x):\n    return x", "between the two",
    ]  # fmt: skip
    assert "name: quickstart\n" in document.inside("details", "pre")
    words = document.words()
    for expected in (
        "5.118 ± 0.030", "−0.052 ± 0.011", "within noise", "1.33M", "1 min 45 s", "1.6 × 10¹³",
        "0.98 epochs", "42.0%", "19k", "place 1,500, kept",
        "no instance scored below 0", "1,234,567", "1.3% are below 0", "ab12ab12ab12", "resumed", "torch 2.13.0",
        "one seed per student", "± is one standard error", "1,500 of 3,000",
    ):  # fmt: skip
        assert expected in words, expected


def test_figures_show_the_names_and_numbers(findings: dict[str, Any]) -> None:
    document = parse(page.render(findings))
    drawn = {text for path, text in document.text if "svg" in path and text.strip()}
    assert {"miniplm  5.493", "control  5.545", "threshold 1.25", "torch", "random: 50% of all"} <= drawn


def test_tables_and_figures_are_described(findings: dict[str, Any]) -> None:
    document = parse(page.render(findings))
    tags = Counter(document.tags)
    assert tags["table"] == tags["caption"] == 18
    scopes = [value for tag, name, value in document.attributes if (tag, name) == ("th", "scope")]
    assert len(scopes) == tags["th"]
    assert set(scopes) == {"col", "row", "rowgroup"}
    labels = [value for tag, name, value in document.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(labels) == tags["svg"]
    assert any("miniplm 5.493 after 2M tokens" in label for label in labels)


def test_what_was_not_measured_is_a_dash(findings: dict[str, Any]) -> None:
    findings["students"][0] |= dict.fromkeys(
        (
            "loss", "loss_se", "bits_per_byte", "bits_per_byte_se", "train_seconds", "tokens_per_s", "device",
            "share_of_matmul_rate", "processes",
        )
    )  # fmt: skip
    findings["stages"][0]["seconds"] = None
    document = parse(page.render(findings))
    words = document.words()
    assert "miniplm next_token difference 5.618 – – −0.052 ± 0.011 better" in words
    assert "miniplm 1.33M qwen2 2M 0.98 epochs 1,952 1.6 × 10¹³ – – – –" in words
    assert not {"None", "nan"} & set(words.split())


def test_models_that_were_given_have_no_training(findings: dict[str, Any]) -> None:
    loss = ("role", "loss", "loss_se", "bits_per_byte", "bits_per_byte_se", "by_source")
    findings["models"] = [{key: one[key] if key in loss else None for key in one} for one in findings["models"]]
    words = parse(page.render(findings)).words()
    assert "teacher – – – 2.310 ± 0.030" in words
    assert words.count("The models that scored the pool") == 1, "what training took is told of the students alone"


def test_distilled_students_are_told_from_plain_ones(distillation: dict[str, Any]) -> None:
    document = parse(page.render(distillation))
    words = document.words()
    assert "kd vanilla_kd λ=0.5 random 5.800 minimised 6.800 5.300 ± 0.030" in words
    assert "own package.module:Class random – minimised 6.800 5.300" in words
    assert "999k 0.98 epochs 1,952 50.0% by flops 1.6 × 10¹³" in words
    assert "Drawn of kd , which minimise something else, is the cross entropy in it." in words
    assert "Of policy it is that of the prompts" in words
    assert "Not drawn, as the objective reports no cross_entropy : own ." in words
    drawn = Counter(text for path, text in document.text if path[-1:] == ("text",))
    assert drawn["own  5.675"] == drawn["kd  5.675"] == 2, "held-out loss against tokens and against operations"
    assert drawn["kd  5.800"] == drawn["policy  5.800"] == 1, "cross entropy, not what is minimised"
    assert "training operations, 10¹³ FLOP, a teacher's included" in drawn
    assert not any(text.endswith("  6.800") for text in drawn)


def test_nats_of_other_tokens_stand_nowhere_beside_ours(distillation: dict[str, Any]) -> None:
    document = parse(page.render(distillation))
    words = document.words()
    origin = "retokenised from written, generated from random"
    assert f"family next_token other {origin} – – 2.310 ± 0.010 +0.040 ± 0.011 bits per byte, worse" in words
    assert "Without a curve here, as its tokens are others: family ." in words
    labels = [value for tag, name, value in document.attributes if (tag, name) == ("svg", "aria-label")]
    (own,) = [label for label in labels if "family" in label]
    assert "miniplm" not in own, "a figure of its own"
    assert "– 2.200 bits/byte" in words, "by source"


def test_where_a_token_costs_all_students_the_same_one_figure_is_enough(findings: dict[str, Any]) -> None:
    words = parse(page.render(findings)).words()
    assert "Each token cost every student 8.0 × 10⁶ operations" in words
    assert "The same against training operations" not in words


def test_the_data_made_for_students_is_counted(distillation: dict[str, Any]) -> None:
    document = parse(page.render(distillation))
    words = document.words()
    assert "written random 1,501 17 385,792 1,537,000 768 0.7 top p 0.95 7.61k" in words
    assert "other written vocabulary of 50,304 1,503 of 1,502 7,654,321 7,654,321 2,000,010 2,000,000" in words
    assert document.inside("details", "article", "pre") == ["def f(x):", "\n    return 7"]


def test_a_student_looks_the_same_in_every_figure(distillation: dict[str, Any]) -> None:
    students = distillation["students"]
    whole = figures.loss_curves(students, ["control"], "cross_entropy")
    alone = figures.loss_curves(students, ["control"], "cross_entropy", only=["family"])
    colour = "--series-6"  # the sixth that is not the control
    assert colour in alone
    assert colour in whole
    assert "--series-1" not in alone


def test_an_empty_run_renders(empty: dict[str, Any]) -> None:
    html = page.render(empty)
    document = parse(html)
    assert "svg" not in document.tags
    assert "article" not in document.tags
    assert headline_of(html) == "No student was trained in this run."


@pytest.mark.parametrize(
    ("comparisons", "expected"),
    [
        (
            [comparison("miniplm", -0.052, "better")],
            "At equal tokens, miniplm is 0.052 ± 0.011 nats per token better than the random control.",
        ),
        (
            [comparison("miniplm", -0.02, "within noise")],
            "No student beat the random control. At equal tokens, the difference of miniplm is within noise: "
            "−0.020 ± 0.011 nats per token.",
        ),
        (
            [comparison("miniplm", 0.3, "worse")],
            "No student beat the random control. "
            "At equal tokens, miniplm is 0.300 ± 0.011 nats per token worse than it.",
        ),
        (
            [comparison("ranked", -0.9, "within noise"), comparison("miniplm", -0.052, "better")],
            "At equal tokens, miniplm is 0.052 ± 0.011 nats per token better than the random control. "
            "Of 2 students compared: 1 better, 1 within noise.",
        ),
        (
            [comparison("ranked", 0.2, "worse"), comparison("miniplm", 0.1, "worse")],
            "No student beat the random control. "
            "At equal tokens, miniplm is 0.100 ± 0.011 nats per token worse than it. "
            "Of 2 students compared: 2 worse.",
        ),
        ([], "Nothing was compared with a control, so this run cannot say whether the selection helps."),
    ],
)
def test_the_headline_follows_the_verdicts(
    findings: dict[str, Any], comparisons: list[dict[str, Any]], expected: str
) -> None:
    assert headline_of(page.render(findings | {"comparisons": comparisons})) == expected


def test_the_headline_without_a_control_claims_nothing(findings: dict[str, Any]) -> None:
    students = [one | {"control": None} for one in findings["students"]]
    html = page.render(findings | {"students": students, "comparisons": [], "documents": []})
    assert headline_of(html).startswith("No student has a control")
    assert headline_of(html).endswith("this run cannot say whether the selection helps.")
    words = parse(html).words()
    assert words.count("2.310 ± 0.010 no control") == 3
    assert not {"better", "worse", "noise"} & {
        word for text in parse(html).inside("td", "small") for word in text.split()
    }


def family_findings() -> dict[str, Any]:
    """Two models, a control for each, and a student of a third that has none."""
    found = full_findings()
    origin = [{"name": "theirs-random", "kind": "retokenised"}, {"name": "random", "kind": "selection"}]
    own = {"control": None, "tokenizer": "theirs", "own_tokenizer": True}
    found["students"] += [
        student("llama", "theirs", 5.0) | own | {"control": "llama-control"},
        student("llama-control", "theirs-random", 5.1) | own | {"made_of": origin},
        student("mamba", "difference", 5.3) | {"control": None},
    ]
    to_its_own = {"control": "llama-control", "unit": "bits per byte", "bits_difference": -0.09}
    found["comparisons"].append(comparison("llama", -0.09, "better") | to_its_own)
    return found


def test_with_several_controls_each_verdict_names_its_own() -> None:
    found = family_findings()
    html = page.render(found)
    assert headline_of(html) == (
        "At equal tokens, llama is 0.090 ± 0.011 bits per byte better than the random control, llama-control . "
        "Of 3 students compared: 2 better, 1 within noise. Without a control, and so without a verdict: mamba ."
    )
    document = parse(html)
    words = document.words()
    assert "−0.052 ± 0.011 better, to control" in words
    assert "−0.090 ± 0.011 bits per byte, better, to llama-control" in words
    assert words.count("no control") == 1
    assert [value for tag, name, value in document.attributes if (tag, name, value) == ("tr", "class", "control")] == [
        "control"
    ] * 2
    printed = summary.lines(found)
    assert [line.split()[0] for line in printed if line.endswith("(a control)")] == ["control", "llama-control"]
    assert [line.split()[0] for line in printed if line.endswith("(no control)")] == ["mamba"]
    assert any(line.startswith("llama ") and line.endswith("better  (llama-control)") for line in printed)
    rows = list(csv.DictReader(students_csv(found).splitlines()))
    assert [row["control"] for row in rows] == ["control", "control", "", "llama-control", "", ""]
    assert [row["verdict"] for row in rows] == ["better", "within noise", "", "better", "", ""]


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        ("worse", "llama is 0.090 ± 0.011 bits per byte worse than the random control, llama-control ."),
        (
            "within noise",
            "the difference of llama to the random control, llama-control , is within noise: "
            "−0.090 ± 0.011 bits per byte.",
        ),
    ],
)
def test_with_several_controls_no_student_beat_its_own(verdict: str, expected: str) -> None:
    found = family_findings()
    found["comparisons"] = [found["comparisons"][-1] | {"verdict": verdict}]
    assert said(found).startswith(f"No student beat its control. At equal tokens, {expected}")


def test_every_control_is_named_in_bold() -> None:
    found = family_findings()
    svg = figures.loss_curves(found["students"], ["control", "llama-control"])
    bold = re.findall(r"<text[^>]*font-weight: 700[^>]*>([^<]*)<", svg)
    assert [text.split()[0] for text in bold] == ["control", "llama-control"]


def test_the_headline_names_unequal_budgets_and_other_controls(findings: dict[str, Any]) -> None:
    findings["students"][0] |= {"tokens": 4000000, "flops": 3.2e13}
    findings["selections"][2]["sampler"] = "reference"
    assert headline_of(page.render(findings)).startswith(
        "With 4M training tokens against 2M, miniplm is 0.052 ± 0.011 nats per token better than the control."
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tokens": 1000000}, "At equal training operations, 1M training tokens against 2M, miniplm is"),
        ({"flops": 3.2e13}, "At equal tokens and 2 times the training operations, miniplm is"),
        ({"tokenizer": "theirs"}, "At equal tokens, each of its own tokenizer, miniplm is"),
    ],
)
def test_the_headline_says_what_was_equal(findings: dict[str, Any], changes: dict[str, Any], expected: str) -> None:
    findings["students"][0] |= changes
    assert said(findings).startswith(expected)


def test_the_headline_orders_students_of_different_tokenizers_by_bits(distillation: dict[str, Any]) -> None:
    ours, theirs = comparison("kd", 0.1, "worse"), distillation["comparisons"][-1]
    assert " family is 0.040 ± 0.011 bits per byte worse" in said(distillation | {"comparisons": [ours, theirs]})
    ours["bits_difference"] = 0.03
    assert " kd is 0.100 ± 0.011 nats per token worse" in said(distillation | {"comparisons": [ours, theirs]})


def test_the_headline_says_when_the_control_has_the_whole_pool(findings: dict[str, Any]) -> None:
    findings["students"][2] |= {"data": "pool", "made_of": [{"name": "pool", "kind": "pool"}]}
    assert "better than the control on the whole pool." in headline_of(page.render(findings))


@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_hostile_text_changes_no_structure(distillation: dict[str, Any], harmless: Document, hostile: str) -> None:
    html = page.render(with_text(distillation, lambda text: f"{text} {hostile}"))
    html.encode("utf-8")
    document = parse(html)
    assert document.tags == harmless.tags
    assert set(document.svg_tags) <= SVG_TAGS
    assert {name for _, name, _ in document.attributes} == {name for _, name, _ in harmless.attributes}
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", html)


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "$x^2$ $a_b$", "中文", "_private", "#0072b2"])
def test_names_in_figures_are_drawn_as_they_are(findings: dict[str, Any], name: str) -> None:
    html = page.render(with_text(findings, lambda text: name if text == "torch" else text))
    document = parse(html)
    assert name in {text for path, text in document.text if path[-1:] == ("text",)}
    assert "<script" not in html


def test_control_characters_become_visible(findings: dict[str, Any]) -> None:
    findings["effects"]["hard_kept"] = [example("\x1b[31m \x00 \u202e \x7f \ud800 a\r\nb \u0645\u06cc\u200c\u062e")]
    shown = parse(page.render(findings)).inside("article", "pre")[-2]
    assert shown == "␛[31m ␀ ⟨U+202E⟩ ⟨U+007F⟩ ⟨U+D800⟩ a\nb \u0645\u06cc\u200c\u062e"


def test_leading_newlines_of_an_example_survive(findings: dict[str, Any]) -> None:
    findings["effects"]["hard_kept"] = [example("\n\n  x")]
    assert parse(page.render(findings)).inside("article", "pre")[-2] == "\n\n  x"


def test_the_page_refers_to_nothing_outside(findings: dict[str, Any]) -> None:
    html = page.render(findings)
    document = parse(html)
    addresses = re.findall(r"""[^\s"'<>]*https?://[^\s"'<>]*""", html)
    assert set(addresses) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert len(addresses) == 2 * Counter(document.tags)["svg"]
    references = [value for _, name, value in document.attributes if name in ("href", "xlink:href", "src", "action")]
    assert references
    assert all(value.startswith("#") for value in references)
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert not {"script", "link", "img", "iframe", "form", "base"} & {*document.tags, *document.svg_tags}
    policy = [value for tag, name, value in document.attributes if (tag, name) == ("meta", "content")]
    assert any(value.startswith("default-src 'none';") for value in policy)


def test_references_inside_figures_resolve_once(distillation: dict[str, Any]) -> None:
    document = parse(page.render(distillation))
    identifiers = Counter(value for _, name, value in document.attributes if name == "id")
    assert set(identifiers.values()) == {1}
    for _, name, value in document.attributes:
        if name in ("xlink:href", "clip-path"):
            assert value.removeprefix("url(").removesuffix(")").removeprefix("#") in identifiers


def test_same_findings_same_bytes(findings: dict[str, Any]) -> None:
    before = copy.deepcopy(findings)
    html = page.render(findings)
    assert findings == before
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": True, "text.color": "red"}):
        assert page.render(json.loads(json.dumps(findings))) == html


def test_every_colour_of_a_figure_can_be_recoloured(findings: dict[str, Any]) -> None:
    svg = figures.loss_curves(findings["students"], ["control"])
    assert "var(--series-1, #0072b2)" in svg
    assert re.findall(r"(?<!, )#[0-9a-f]{6}\b", svg) == []


def test_a_threshold_on_another_scale_is_not_drawn(findings: dict[str, Any]) -> None:
    findings["selections"][0]["normalize"] = "byte"
    document = parse(page.render(findings))
    assert not [text for path, text in document.text if "svg" in path and text.startswith("threshold")]


def test_training_loss_is_there_where_held_out_loss_was_not_measured(findings: dict[str, Any]) -> None:
    for one in findings["students"]:
        for point in one["curve"]:
            point["held_out_loss"] = None
        one["curve"][0]["cross_entropy"] = None
    document = parse(page.render(findings | {"scaling": None}))
    drawn = {text for path, text in document.text if "svg" in path}
    assert "cross entropy on the training text" in drawn
    assert "held-out loss" not in drawn


def test_many_students_and_sources(findings: dict[str, Any]) -> None:
    rows = [{"source": f"source {n:02}", "pool": 1000 - n, "selected": 10 * n} for n in range(60)]
    findings["selections"][0]["by_source"] = rows
    findings["selections"] = [findings["selections"][0] | {"name": f"selection {n}"} for n in range(20)]
    findings["students"] = [student(f"student {n}", "difference", 5 + n / 100) for n in range(19)] + findings[
        "students"
    ][2:]
    document = parse(page.render(findings | {"comparisons": [], "scaling": None, "agreement": None}))
    drawn = Counter(text for path, text in document.text if path[-1:] == ("text",))
    assert sum(text.startswith("source ") for text in drawn) == figures.SOURCES_SHOWN
    assert sum(text.startswith("selection ") for text in drawn) == figures.SELECTIONS_SHOWN
    assert sum(text.startswith("student ") for text in drawn) == 2 * 19  # their ends differ in the two figures
    assert "The 20 largest of 60 sources. The first 6 of 20 selections." in document.words()
    assert {f"source {n:02}" for n in range(60)} <= set(document.inside("tr", "th"))


def test_a_curve_of_one_point_at_zero_tokens_is_drawn() -> None:
    one = student("miniplm", "difference", 5.0) | {"curve": [{"tokens": 0, "held_out_loss": 9.0, "train_loss": None}]}
    assert "miniplm" in figures.loss_curves([one], [])


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (5.12, 0.03, "5.120 ± 0.030"),
        (-0.0521, 0.0034, "−0.052 ± 0.003"),
        (-0.0521, 0.00021, "−0.0521 ± 0.0002"),
        (5.12, None, "5.120"),
        (float("nan"), 0.1, "– ± 0.100"),
        (None, 0.1, "–"),
    ],
)
def test_plus_minus(value: float | None, error: float | None, expected: str) -> None:
    assert page.plus_minus(value, error) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(2.2, "+2.20"), (-2.2, "−2.20"), (-0.001, "0.00"), (0.001, "0.00"), (None, "–")]
)
def test_amount_with_a_sign(value: float | None, expected: str) -> None:
    assert page.amount(value, 2, sign=True) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.04, "0.0 s"), (59.96, "1 min 00 s"), (105.2, "1 min 45 s"), (3931, "1 h 05 min")]
)
def test_duration(seconds: float, expected: str) -> None:
    assert page.duration(seconds) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "0"), (950, "950"), (999600, "1M"), (1329792, "1.33M"), (494032768, "494M")]
)
def test_compact(value: float, expected: str) -> None:
    assert figures.compact(value) == expected
