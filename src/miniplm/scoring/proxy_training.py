"""Training a proxy: a model that predicts log p(x) − log p_ref(x) (paper, appendix E, whose procedure is not public).

    pool ──share──► sample ──teacher, reference──► differences ──┬─ training ───► ridge regression, then fine-tuning
                                                                 ├─ validation ─► which epoch is kept
                                                                 └─ held out ───► how good it is: `proxy.json`

In: a sample of the pool (`packing/sample.py`), teacher and reference scores of it, the reference model. Out: a folder
with `model/` (the backbone, safetensors, and the tokenizer), `head.safetensors` (`weight` [D], `bias`, and `mean` and
`std` of the target), `held_out.parquet` (`instance`, `row` of the pool, `difference`, `predicted`), and `proxy.json`.

The model is the reference's backbone with a scalar head on the mean of its last hidden states at the positions that
predict a counted target; it learns the standardised difference per token (or byte) by squared error. The head starts as
the ridge solution on the untouched backbone (closed form, float64), which is epoch 0. Of all epochs the one with the
largest Spearman correlation on the validation instances is kept (as the authors' PDS code does); the held-out instances
are looked at once, at the end.

Promised: the same inputs and settings give the same bytes on CPU, whatever was killed before. Fine-tuning is short (a
few epochs over a few per cent of the pool) and begins anew after an interruption. Not covered: models that bring their
own code, a reference with another tokenizer than the instances', training by several processes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from miniplm import artifact
from miniplm.analysis.agreement import measures, spearman
from miniplm.analysis.cost import offline_flops
from miniplm.artifact import Identity, Workspace
from miniplm.errors import ArtifactMismatchError, ModelError, TokenizerError, TrainingError
from miniplm.models.flops import TRAINING_PASSES, forward_flops, model_flops
from miniplm.models.load import check_length, check_vocabulary, choose_device, load_model, own_tokenizer
from miniplm.packing.instances import Packed, counted
from miniplm.packing.sample import pool_rows
from miniplm.packing.tokenizer import Tokenizer
from miniplm.progress import Meter, progress
from miniplm.recipe import Compute, Counted, GivenModel, ProxySettings, ScoredModel
from miniplm.sampling.difference import differences
from miniplm.scoring.base import Scores
from miniplm.scoring.proxy import FIGURES, HEAD, HELD_OUT, MODEL, Proxy, Regressor, load_proxy

_STATE = "state"
_DIVISION, _ORDER = 1, 2  # streams of random numbers
_WARMUP = 0.1  # of the steps; assumed
_PENALTIES = np.logspace(-6, 2, 49)  # of the ridge regression, in units of the largest eigenvalue
_FREEDOM = 0.5  # degrees of freedom that the head may have at the start, for each training instance


@dataclass(frozen=True, slots=True)
class ProxyData:
    """What a proxy is made of.

    Attributes:
        sample: instances drawn from the pool.
        teacher: the teacher's scores of the sample.
        reference: the reference's.
        model: the reference model, which is fine-tuned.
        teacher_model: whose FLOPs are told; None tells none.
        counted: which targets count, in the scores too.

    """

    sample: Packed
    teacher: Scores
    reference: Scores
    model: GivenModel
    teacher_model: ScoredModel | None = None
    counted: Counted = "all"


def train_proxy(
    data: ProxyData, settings: ProxySettings, out: Path, what: Identity, compute: Compute | None = None
) -> Proxy:
    """Train a proxy into the artifact at `out`, and measure it.

    Raises:
        ArtifactMismatchError: the scores are of other instances, or of tokenizers that cannot be compared.
        ModelError, TokenizerError: the reference model cannot be used on these instances.
        TrainingError: the sample is too small, or the training gives no numbers.

    """
    compute = compute or Compute()
    artifact.make(out, what, lambda work: _train(work, data, settings, compute))
    return load_proxy(out, settings.precision, compute)


@dataclass(frozen=True, slots=True)
class Division:
    """The instances of a sample by what they are for: row numbers of the sample, increasing."""

    training: NDArray[np.int64]
    validation: NDArray[np.int64]
    held_out: NDArray[np.int64]


def divide(instances: int, settings: ProxySettings) -> Division:
    """Divide a sample at random; the same seed divides alike. Raises TrainingError if there is too little to divide."""
    held_out = max(2, round(settings.held_out * instances))
    rest = held_out + max(2, round(settings.validation * instances))
    if instances - rest < 2:
        raise TrainingError(
            "the sample is too small to train a proxy on.",
            facts={"instances": instances, "held out and for validation": rest},
            remedy="Raise proxy.share, or pack a larger pool.",
        )
    shuffled = np.random.Generator(np.random.Philox(key=[settings.seed, _DIVISION])).permutation(instances)
    parts = np.split(shuffled.astype(np.int64), [held_out, rest])
    return Division(training=np.sort(parts[2]), validation=np.sort(parts[1]), held_out=np.sort(parts[0]))


def ridge(gram: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Weight `[D]` and bias of the ridge regression of y on x; the penalty is chosen by generalised cross-validation.

    Args:
        gram: `[D+2, D+2]`, Zᵀ·Z of the rows z = (1, x, y). The mean of y need not be 0; the bias is not penalised.

    """
    n = gram[0, 0]
    centred = gram[1:, 1:] - np.outer(gram[0, 1:], gram[0, 1:]) / n
    eigenvalues, vectors = np.linalg.eigh(centred[:-1, :-1])
    eigenvalues = np.maximum(eigenvalues, 0.0)
    along = vectors.T @ centred[:-1, -1]
    best: tuple[float, NDArray[np.float64]] = (math.inf, np.zeros_like(along))
    for penalty in _PENALTIES * max(eigenvalues[-1], np.finfo(np.float64).tiny):
        solution = along / (eigenvalues + penalty)
        freedom = 1 + float((eigenvalues / (eigenvalues + penalty)).sum())
        if freedom > max(_FREEDOM * n, 1.5):
            continue
        squares = float(centred[-1, -1] - 2 * solution @ along + (solution**2) @ eigenvalues)
        error = squares / (1 - freedom / n) ** 2
        if error < best[0]:
            best = error, solution
    weight = vectors @ best[1]
    return weight, float((gram[0, -1] - weight @ gram[0, 1:-1]) / n)


@dataclass(frozen=True, slots=True)
class _Examples:
    """Batches of the sample by row numbers; `target` is that of every instance, standardised."""

    sample: Packed
    rows: Any  # the data set, in NumPy's format
    target: NDArray[np.float64]
    counted: Counted

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """`input_ids [B, T]`, `counted [B, T]`, `target [B]`; the Trainer's collator."""
        rows = [int(row) for row in rows]
        found = self.rows[rows]
        ids = np.asarray(found["input_ids"]).astype(np.int64)
        return {
            "input_ids": torch.from_numpy(np.ascontiguousarray(ids[:, :-1])),
            "counted": torch.from_numpy(counted(ids, found["length"], self.sample.separator, self.counted)),
            "target": torch.from_numpy(self.target[rows].astype(np.float32)),
        }

    def batches(self, rows: NDArray[np.int64], size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """All these rows, in order, on the device."""
        for begin in range(0, len(rows), size):
            batch = self.batch(rows[begin : begin + size].tolist())
            yield {name: tensor.to(device) for name, tensor in batch.items()}


def _train(work: Workspace, data: ProxyData, settings: ProxySettings, compute: Compute) -> Mapping[str, Any]:
    for part in (MODEL, HEAD, HELD_OUT, FIGURES, _STATE):  # of a run that was killed while it wrote them
        work.remove(part)
    for role, scores in (("teacher", data.teacher), ("reference", data.reference)):
        if scores.packed != data.sample.fingerprint:
            raise ArtifactMismatchError(
                f"the {role}'s scores are of other instances than the sample's.",
                facts={
                    "sample": f"packed {data.sample.fingerprint[:12]}  {len(data.sample):,} instances",
                    role: f"packed {scores.packed[:12]}  {len(scores):,} instances  {scores.name}",
                },
                remedy="Score the sample with both models.",
            )
    difference = differences(data.teacher, data.reference, settings.normalize)
    division = divide(len(difference), settings)
    mean, std = float(difference[division.training].mean()), float(difference[division.training].std())
    if not std:
        raise TrainingError("teacher and reference differ equally on every instance: there is nothing to learn.")
    model = _reference(data, compute)
    per_token = {
        "teacher": None if data.teacher_model is None else model_flops(data.teacher_model, data.sample.sequence_length),
        "reference": forward_flops(model, data.sample.sequence_length),
        "proxy": forward_flops(model.base_model, data.sample.sequence_length),
    }
    examples = _Examples(data.sample, data.sample.dataset.with_format("numpy"), (difference - mean) / std, data.counted)
    regressor, course, passes = _fit(work, model.base_model, examples, division, settings, compute)
    predicted = _predict(regressor, examples, division.held_out, compute) * std + mean
    passes += len(division.held_out)

    _save(work, regressor, data.sample.tokenizer, mean, std)
    found = pa.table(
        {
            "instance": division.held_out,
            "row": pool_rows(data.sample)[division.held_out],
            "difference": difference[division.held_out],
            "predicted": predicted,
        }
    )
    with work.part(HELD_OUT) as path:
        pq.write_table(found, path, compression="zstd")
    counts, length = data.sample.manifest.counts, data.sample.sequence_length
    assert per_token["proxy"] is not None
    figures = {
        "normalize": settings.normalize,
        "instances": {
            "pool": counts["of"],
            "sample": len(difference),
            **{name: len(getattr(division, name)) for name in ("training", "validation", "held_out")},
        },
        "target": {"mean": mean, "std": std},
        "held_out": measures(difference[division.held_out], predicted),
        "validation_spearman": course,  # of each epoch; the first is the ridge regression
        "kept_epoch": int(np.argmax(course)),
        "flops": offline_flops(
            per_token,
            sample_tokens=counts["tokens_out"] - counts["instances"],
            pool_tokens=counts["tokens_of"] - counts["of"],
            fine_tuning=passes * per_token["proxy"] * length,
        ),
    }
    work.write_json(FIGURES, figures)
    work.provenance["device"] = str(regressor.backbone.device)
    return {"parameters": model.base_model.num_parameters(), **figures}


def _reference(data: ProxyData, compute: Compute) -> PreTrainedModel:
    """The reference model in float32, on its device, after the checks that it can read the sample."""
    if data.model.trust_remote_code:
        raise ModelError(
            "a proxy cannot be made of a model that brings its own code.",
            facts={"found": data.model.model, "expected": "an architecture that transformers has"},
        )
    model = load_model(data.model, "float32", str(choose_device(compute.device)))
    check_vocabulary(data.sample.vocab_size, int(model.config.get_text_config().vocab_size), "the reference")
    check_length(model.config.to_dict(), data.sample.sequence_length)
    own = own_tokenizer(data.model)
    if own is not None and (token := data.sample.tokenizer.differing_token(own)) is not None:
        raise TokenizerError(
            "a proxy reads the instances as they are packed, and the reference has another tokenizer.",
            facts={"the first token that differs": repr(token)},
            remedy="Take a reference with the tokenizer of the instances, or train one here.",
        )
    return model


def _fit(
    work: Workspace,
    backbone: PreTrainedModel,
    examples: _Examples,
    division: Division,
    settings: ProxySettings,
    compute: Compute,
) -> tuple[Regressor, list[float], int]:
    """The regressor of the best epoch; each epoch's Spearman on the validation part; forward passes of an instance."""
    width = int(backbone.config.get_text_config().hidden_size)
    regressor = Regressor(backbone, np.zeros(width), 0.0, settings.precision)
    batch = min(settings.batch, len(division.training))
    steps = max(1, settings.epochs * len(division.training) // batch) if settings.epochs else 0
    total = (len(division.training) + steps * batch) * examples.sample.sequence_length
    with progress(f"fit {work.path.name.removesuffix('.partial')}", total, "tok") as meter:
        gram = np.zeros((width + 2, width + 2))
        regressor.eval()
        with torch.inference_mode():
            for found in examples.batches(division.training, compute.train_micro_batch, backbone.device):
                states = regressor.pooled(found["input_ids"], found["counted"]).double().cpu().numpy()
                rows = np.column_stack([np.ones(len(states)), states, found["target"].double().cpu().numpy()])
                gram += rows.T @ rows
                meter.advance(found["input_ids"].numel())
        weight, bias = ridge(gram)
        regressor = Regressor(backbone, weight, bias, settings.precision).to(backbone.device)
        epochs = _Epochs(regressor, examples, division.validation, compute, meter, batch)
        epochs.measure()
        if steps:
            epochs.at = {round(epoch * steps / settings.epochs) for epoch in range(1, settings.epochs + 1)}
            _tune(work, regressor, epochs, division.training, settings, steps, batch, compute)
    regressor.load_state_dict(epochs.best)
    passes = len(division.training) + len(epochs.course) * len(division.validation) + TRAINING_PASSES * steps * batch
    return regressor.eval(), epochs.course, passes


class _Epochs(TrainerCallback):  # type: ignore[misc]  # transformers' classes are Any
    """Measures after each epoch, keeps the best weights, and feeds the progress meter."""

    def __init__(
        self,
        regressor: Regressor,
        examples: _Examples,
        validation: NDArray[np.int64],
        compute: Compute,
        meter: Meter,
        batch: int,
    ) -> None:
        self.regressor, self.examples, self.validation = regressor, examples, validation
        self.compute, self.meter, self.batch = compute, meter, batch
        self.at: set[int] = set()  # steps
        self.course: list[float] = []
        self.best: dict[str, Tensor] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.meter.advance(self.batch * self.examples.sample.sequence_length)
        if state.global_step in self.at:
            self.measure()
            self.regressor.train()

    def measure(self) -> None:
        """Spearman on the validation part."""
        predicted = _predict(self.regressor, self.examples, self.validation, self.compute)
        if not np.isfinite(predicted).all():
            raise TrainingError(
                f"the proxy predicts no numbers after epoch {len(self.course)}.",
                remedy="Lower proxy.learning_rate, or set `proxy.precision: float32`.",
            )
        found = spearman(self.examples.target[self.validation], predicted)
        if not self.course or found > max(self.course):
            self.best = {name: value.detach().cpu().clone() for name, value in self.regressor.state_dict().items()}
        self.course.append(found)


def _tune(
    work: Workspace,
    regressor: Regressor,
    epochs: _Epochs,
    training: NDArray[np.int64],
    settings: ProxySettings,
    steps: int,
    batch: int,
    compute: Compute,
) -> None:
    """Fine-tune backbone and head, by the Hugging Face Trainer; each epoch is in an order of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingError(
            "training by several processes is not in this version.",
            facts={"WORLD_SIZE": os.environ["WORLD_SIZE"]},
            remedy="Start it with plain `miniplm`, not with torchrun or accelerate launch.",
        )
    transformers_logging.set_verbosity_error()  # the Trainer remarks on our short runs
    micro = math.gcd(batch, compute.train_micro_batch)
    on_cpu = choose_device(compute.device).type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(work.path / _STATE),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(_WARMUP * steps),
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        seed=settings.seed,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one device: never DataParallel by surprise
    trainer = Trainer(
        model=regressor,
        args=arguments,
        data_collator=epochs.examples.batch,
        train_dataset=list(_order(training, steps * batch, settings.seed)),
        callbacks=[epochs],
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    trainer.train()
    work.remove(_STATE)


def _order(training: NDArray[np.int64], seen: int, seed: int) -> Iterator[int]:
    """Rows of the sample in the order of training, `seen` of them."""
    for position in range(seen):
        epoch, within = divmod(position, len(training))
        if within == 0:
            order = np.random.Generator(np.random.Philox(key=[seed, _ORDER + epoch])).permutation(training)
        yield int(order[within])


@torch.no_grad()
def _predict(
    regressor: Regressor, examples: _Examples, rows: NDArray[np.int64], compute: Compute
) -> NDArray[np.float64]:
    """The standardised predictions for these rows of the sample."""
    regressor.eval()
    found = [
        regressor.predict(batch["input_ids"], batch["counted"]).double().cpu().numpy()
        for batch in examples.batches(rows, compute.train_micro_batch, regressor.backbone.device)
    ]
    return np.concatenate(found)


def _save(work: Workspace, regressor: Regressor, tokenizer: Tokenizer, mean: float, std: float) -> None:
    regressor.backbone.config._name_or_path = ""  # where the reference lay is not what the proxy is
    with work.part(MODEL) as folder:
        regressor.backbone.save_pretrained(folder)
        tokenizer.save(folder)
    head = {
        "weight": regressor.weight.detach().cpu().numpy(),
        "bias": regressor.bias.detach().cpu().numpy().reshape(1),
        "mean": np.array([mean]),
        "std": np.array([std]),
    }
    with work.part(HEAD) as path:
        save_file(head, path)
