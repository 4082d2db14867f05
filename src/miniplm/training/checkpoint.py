"""A trained model's folder: `save_pretrained`, tokenizer, model card, and the loss curve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniplm.artifact import Manifest, Workspace
from miniplm.packing.tokenizer import Tokenizer

if TYPE_CHECKING:  # who reads a curve needs no torch, which takes seconds to import
    from torch import Tensor
    from transformers import PreTrainedModel

CURVE = "training.jsonl"
KEPT = "checkpoints"  # folder of the models kept along the way

Point = dict[str, Any]
"""Of a loss curve: `step`, `tokens`, `flops`, `train_loss`, `held_out_loss`, `learning_rate`, `grad_norm`, metrics."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A trained model on disk; `transformers` takes it where it takes a folder."""

    path: Path
    manifest: Manifest

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def fingerprint(self) -> str:
        """Of what it was trained on and how."""
        return self.manifest.fingerprint


def read_curve(model: Path) -> list[Point]:
    """The loss curve of a trained model; see `Point`."""
    return [json.loads(line) for line in (model / CURVE).read_text().splitlines()]


def write_model(
    work: Workspace,
    scratch: Path,
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    extra: Mapping[str, str],
) -> None:
    """Write a finished model into its artifact, file by file; `extra` are further text files (name -> content)."""
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch, state_dict=weights)
    save_tokenizer(tokenizer, scratch)
    for name, content in extra.items():
        (scratch / name).write_text(content, encoding="utf-8")
    for path in sorted(scratch.iterdir()):
        with work.part(path.name) as temporary:
            path.rename(temporary)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer as `PreTrainedTokenizerFast` reads it, its special tokens read as such.

    `AutoTokenizer` of transformers 5 is no reader of it: to a `qwen2` model it gives Qwen2's own normaliser and
    splitter, whatever the folder says (`MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS`). *Measured 2026-11-21, NOTES.md.*
    """
    from transformers import PreTrainedTokenizerFast

    separator = tokenizer.token(tokenizer.separator)
    tokenizer.backend.encode_special_tokens = False
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, eos_token=separator, pad_token=separator
    ).save_pretrained(folder)
    tokenizer.backend.encode_special_tokens = True


def curve_lines(curve: Sequence[Point]) -> str:
    """The curve as JSON lines."""
    return "".join(json.dumps(point) + "\n" for point in curve)


def card(
    counts: Mapping[str, Any],
    about: Mapping[str, str],
    license_: str | None,
    final: Point,
    *,
    objective: str = "next_token",
    start: str | None = None,
) -> str:
    """The model card.

    Args:
        counts: as in the manifest.
        about: what is known of the data and how it was chosen: name -> value.
        license_: as the Hub spells it; None leaves it open, and says so.
        final: the last point of the curve.
        objective: what the training loss is of.
        start: the model that was trained further: a Hub id, or a folder, which stays out of the card.

    """
    loss = "loss (nats per token)" if objective == "next_token" else f"loss ({objective})"
    losses = {
        f"final training {loss}": final.get("train_loss"),
        "final cross entropy (nats per token)": final.get("cross_entropy"),
        "final held-out loss (nats per token)": final.get("held_out_loss"),
    }
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [miniplm]"]
    head += [f"license: {json.dumps(license_)}"] if license_ else []
    head += [f"base_model: {json.dumps(start)}"] if start is not None and not _is_folder(start) else []
    rows = [(name, value) for name, value in about.items()]
    rows += [(name.replace("_", " "), f"{value:,}") for name, value in counts.items() if isinstance(value, int)]
    rows += [("training operations", f"{counts['train_flops']:.3g}")]
    rows += [(name, f"{value:.4f}") for name, value in losses.items() if value is not None]
    return "\n".join(
        [
            *head, "---", "",
            f"# A {counts['parameters'] / 1e6:,.1f}M-parameter {counts['model_type']} model", "",
            f"{'Pre-trained' if start is None else 'Trained further'} by miniplm (MiniPLM, arXiv 2410.17215). What it",
            f"was made of is in `manifest.json`, its losses in `{CURVE}`.", "",
            "| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows), "",
            "## Use", "",
            "```python",
            "from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast", "",
            "model = AutoModelForCausalLM.from_pretrained(folder)",
            "tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # as in training",
            "```", "",
            "(For Qwen2 models `AutoTokenizer` of transformers 5 splits text otherwise, whatever the folder says.)", "",
            "## Licence", "",
            f"{_cell(license_)}." if license_ else "Not stated by who trained it. The licences of data and teacher "
            "may bear on it.", "",
        ]
    )  # fmt: skip


def public_name(model: str) -> str:
    """What a card calls a model: the Hub id, or of a folder its last part; where it lies is nobody's business."""
    return Path(model).expanduser().resolve().name if _is_folder(model) else model


def _is_folder(model: str) -> bool:
    return Path(model).expanduser().is_dir()


def _cell(text: str) -> str:
    """Text that may come from a corpus or a path, in a table of Markdown."""
    for mark, escaped in (("\\", "\\\\"), ("|", "\\|"), ("[", "\\["), ("<", "&lt;")):
        text = text.replace(mark, escaped)
    return " ".join(text.split())
