"""The proxy: a small model that predicts log p(x) − log p_ref(x), so that the teacher need not read the whole pool.

In: the folder of a trained proxy (`proxy_training.py` makes it). Out: a `Scorer` whose answers are predictions. The
model is the reference's backbone with a scalar head on the mean of its last hidden states at the positions that predict
a counted target (paper, appendix E; the authors' data scorer is built alike).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

from miniplm import artifact
from miniplm.artifact import Identity, Manifest
from miniplm.models.flops import forward_flops, matmul_rate
from miniplm.models.load import choose_device
from miniplm.packing import tokenizer as tokenizers
from miniplm.packing.tokenizer import Tokenizer
from miniplm.recipe import Compute, Counted, Precision, ProxySettings, ScoreSettings

VERSION = 1
FIGURES, HELD_OUT, MODEL, HEAD = "proxy.json", "held_out.parquet", "model", "head.safetensors"


def identity(settings: ProxySettings, rule: Counted, inputs: Mapping[str, str]) -> Identity:
    """What a proxy is.

    Args:
        settings: of the recipe; `share` is in the sample already.
        rule: which targets count.
        inputs: fingerprints of `sample`, `teacher` and `reference` (scores of it), `model` (which is fine-tuned), and,
            where the FLOPs are to be told, `teacher_model`.

    """
    recipe = settings.model_dump(mode="json", exclude={"share"})
    return Identity("proxy", VERSION, {**recipe, "counted": rule}, inputs)


def pool_settings(rule: ScoreSettings) -> ScoreSettings:
    """How a proxy reads the pool: whole instances as they are packed; what it predicts was made by `rule` itself."""
    return rule.model_copy(update={"documents": "attend", "tokenizer": "packed", "quantize": "none"})


class Proxy:
    """A trained proxy on disk: a `Scorer` whose "log p" is the predicted difference times the counted tokens.

    So `Scores.per("token")` is the prediction. The backbone is loaded when it is first needed; what is pickled is the
    folder.

    Attributes:
        path: the artifact.
        manifest: what it is.

    """

    def __init__(self, path: Path, manifest: Manifest, dtype: Precision, compute: Compute) -> None:
        self.path = path
        self.manifest = manifest
        self.dtype: Precision = dtype
        self.compute = compute

    def __fspath__(self) -> str:
        return str(self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return load_proxy, (self.path, self.dtype, self.compute)

    @property
    def fingerprint(self) -> str:
        """Of what it was trained on and how."""
        return self.manifest.fingerprint

    @property
    def name(self) -> str:
        """What provenance calls it."""
        return str(self.path)

    @property
    def figures(self) -> dict[str, Any]:
        """What was measured: `proxy.json`."""
        return dict(json.loads((self.path / FIGURES).read_bytes()))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """That of the instances it was trained on."""
        return tokenizers.load(self.path / MODEL)

    @property
    def config(self) -> dict[str, Any]:
        """Of the backbone."""
        return dict(self._model.backbone.config.to_dict())

    @property
    def vocab_size(self) -> int:
        """Embeddings of the backbone, padding included."""
        return int(self._model.backbone.config.get_text_config().vocab_size)

    def flops_per_token(self, sequence_length: int) -> float:
        """Operations of a forward pass per predicted token: those of the backbone, for there is no vocabulary."""
        return forward_flops(self._model.backbone, sequence_length)

    def ceiling(self) -> float:
        """Operations per second that the device is able to do."""
        return matmul_rate(self._model.backbone.device, self._model.backbone.dtype)

    @torch.inference_mode()
    def score(self, tokens: NDArray[Any], counted: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The predicted difference times the counted tokens, `[B]`; see `Scorer.score`."""
        device = self._model.backbone.device
        ids = torch.from_numpy(tokens[:, :-1].astype(np.int64)).to(device)
        standardised = self._model.predict(ids, torch.from_numpy(counted).to(device)).double().cpu().numpy()
        found: NDArray[np.float64] = (standardised * self._scale[1] + self._scale[0]) * counted.sum(axis=1)
        return found

    @cached_property
    def _scale(self) -> tuple[float, float]:
        head = load_file(self.path / HEAD)
        return float(head["mean"][0]), float(head["std"][0])

    @cached_property
    def _model(self) -> Regressor:
        transformers_logging.disable_progress_bar()  # ours is enough
        backbone = AutoModel.from_pretrained(
            str(self.path / MODEL), dtype=getattr(torch, self.dtype), use_safetensors=True
        )
        head = load_file(self.path / HEAD)
        model = Regressor(backbone, head["weight"], float(head["bias"][0]), "float32")
        return model.to(choose_device(self.compute.device)).eval()


def load_proxy(path: Path | str, dtype: Precision = "float32", compute: Compute | None = None) -> Proxy:
    """Open a trained proxy; `dtype` is that of the backbone's weights. Raises ArtifactError if it is not there."""
    return Proxy(Path(path), artifact.read(path, kind="proxy"), dtype, compute or Compute())


class Regressor(nn.Module):
    """A backbone and a scalar head on the mean of its states; predicts the standardised difference.

    `forward` is what the Trainer calls, `predict` what everybody else does.
    """

    def __init__(
        self, backbone: PreTrainedModel, weight: NDArray[np.floating[Any]], bias: float, precision: Precision
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.weight = nn.Parameter(torch.from_numpy(np.asarray(weight, np.float32)))
        self.bias = nn.Parameter(torch.tensor(bias, dtype=torch.float32))
        self.autocast = getattr(torch, precision) if precision != "float32" else None

    def forward(self, input_ids: Tensor, counted: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The mean squared error."""
        return {"loss": nn.functional.mse_loss(self.predict(input_ids, counted), target)}

    def predict(self, input_ids: Tensor, counted: Tensor) -> Tensor:
        """The standardised difference, float32 `[B]`, of ids `[B, T]`."""
        return self.pooled(input_ids, counted) @ self.weight + self.bias

    def pooled(self, input_ids: Tensor, counted: Tensor) -> Tensor:
        """The mean of the states at the counted positions, float32 `[B, D]`. What is padding is behind them all."""
        with torch.autocast(input_ids.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            hidden = self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state
        mask = counted.unsqueeze(2)
        mean: Tensor = (hidden.float() * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return mean
