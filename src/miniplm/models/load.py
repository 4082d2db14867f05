"""Models in: made new from a config, or loaded from a folder or the Hub; safetensors only, no code of the model's own.

In: a config, or a name. Out: a `transformers` causal language model, and the fingerprint of what was loaded: that of
the artifact for a model of ours, the hash of its files for another folder, the commit for a Hub id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from miniplm import artifact
from miniplm.artifact import MANIFEST
from miniplm.errors import MissingExtraError, ModelError, RecipeError, TokenizerError
from miniplm.packing import tokenizer as tokenizers
from miniplm.packing.tokenizer import Tokenizer
from miniplm.recipe import GivenModel, Precision, ScoredModel, ServerModel, VllmModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def new_model(config: Mapping[str, Any], seed: int) -> PreTrainedModel:
    """A model with random float32 weights; the same config and seed give the same weights.

    Raises:
        RecipeError: `transformers` knows no such `model_type` or setting.

    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(config)
    model_type = settings.pop("model_type")
    torch.manual_seed(seed)
    try:
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **settings), dtype=torch.float32
        )
    except (ValueError, TypeError, KeyError) as error:
        raise RecipeError(
            f"transformers cannot make a model of this config (model_type {model_type!r}).",
            facts={"because": str(error).splitlines()[0]},
        ) from error
    return made


def load_model(given: GivenModel, dtype: Precision = "float32", device: str = "cpu") -> PreTrainedModel:
    """Load a trained model for inference.

    Raises:
        ModelError: it is not there, its weights are pickles, it needs code of its own, or it is no causal LM.

    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # ours is enough
    folder = Path(given.model).expanduser()
    if folder.is_dir():
        _refuse_pickles(folder)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(folder) if folder.is_dir() else given.model,
            revision=None if folder.is_dir() else hub_commit(given),
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=given.trust_remote_code,
        )
    except Exception as error:  # OSError, ValueError, ImportError, safetensors' own: all are "cannot be loaded"
        raise ModelError(
            f"the model {given.model!r} cannot be loaded.",
            facts={"because": str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__},
            remedy="It must be a folder or a Hub id with config.json and *.safetensors; models that bring their "
            "own code need `trust_remote_code: true`, said by you.",
        ) from error
    return model.to(device).eval()


def quantize(model: PreTrainedModel, how: Literal["int8", "fp8"]) -> None:
    """Quantise the backbone's linear layers in place, weights per row and activations per token; the head stays.

    Raises:
        MissingExtraError: `torchao` is not installed.
        ModelError: this device cannot multiply so.

    """
    from torch import nn

    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            PerRow,
            quantize_,
        )
    except ModuleNotFoundError as error:
        raise MissingExtraError("quantize", "torchao") from error
    kinds = {  # per row, so that what else is in a batch changes nothing
        "int8": Int8DynamicActivationInt8WeightConfig,
        "fp8": partial(Float8DynamicActivationFloat8WeightConfig, granularity=PerRow()),
    }
    head = model.get_output_embeddings()
    try:
        quantize_(model, kinds[how](), filter_fn=lambda module, _: isinstance(module, nn.Linear) and module is not head)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        raise ModelError(
            f"the model cannot be quantised to {how} on {model.device}.",
            facts={"because": str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__},
            remedy="fp8 needs a GPU that multiplies in it (compute capability 8.9 or more); use int8 or none.",
        ) from error


def model_fingerprint(given: ScoredModel) -> str:
    """What a given model is, independent of where it lies, and of what it is run with.

    A model behind a server is its name and revision, and whether it is sent text (it may then put a token in front):
    its weights are out of reach.

    Raises:
        ModelError: it cannot be found.

    """
    if isinstance(given, ServerModel):
        return hashlib.sha256(json.dumps(["server", given.model, given.revision, given.send]).encode()).hexdigest()
    if isinstance(given, VllmModel):
        given = GivenModel(model=given.vllm, revision=given.revision, trust_remote_code=given.trust_remote_code)
    folder = Path(given.model).expanduser()
    if (folder / MANIFEST).is_file():
        return artifact.read(folder, kind="model").fingerprint
    if folder.is_dir():
        _refuse_pickles(folder)
        code = {".py"} if given.trust_remote_code else set()
        files = sorted(p for p in folder.iterdir() if p.suffix in {".safetensors"} | code or p.name == "config.json")
        if not any(p.suffix == ".safetensors" for p in files):
            raise ModelError(
                f"the folder {folder} has no weights.",
                facts={
                    "expected": "config.json and *.safetensors",
                    "found": ", ".join(sorted(_names(folder))) or "nothing",
                },
            )
        listing = [(p.name, artifact.remembered_sha256(p)) for p in files]
        return hashlib.sha256(json.dumps(["folder", listing]).encode()).hexdigest()
    return hashlib.sha256(json.dumps(["hub", given.model, hub_commit(given)]).encode()).hexdigest()


def hub_commit(given: GivenModel) -> str:
    """The commit that a Hub id and revision stand for now; from the local cache when the Hub is out of reach.

    Raises:
        ModelError: there is no such model.

    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        return str(HfApi().model_info(given.model, revision=given.revision).sha)
    except Exception as error:  # offline, no such repository, no access, not even a valid name
        try:
            cached = try_to_load_from_cache(given.model, "config.json", revision=given.revision)
        except ValueError:
            cached = None
        if isinstance(cached, str):
            return Path(cached).parent.name
        raise ModelError(
            f"the model {given.model!r} is neither a folder here nor to be had from the Hub.",
            facts={"because": str(error).strip().splitlines()[0]},
        ) from error


def name_of(given: GivenModel) -> str:
    """Which model this is, for people: the folder, or the Hub id with its commit."""
    return given.model if Path(given.model).expanduser().is_dir() else f"{given.model}@{hub_commit(given)}"


def choose_device(wanted: str) -> torch.device:
    """The device that `compute.device` stands for: `auto` is CUDA where there is one, else the CPU.

    Raises:
        ModelError: there is no such device.

    """
    import torch

    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"compute.device is {wanted!r}, but torch finds no CUDA device.", remedy="Use `device: cpu`.")
    if wanted != "auto":
        return torch.device(wanted)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_vocabulary(tokenizer_vocab_size: int, model_vocab_size: int, model: str) -> None:
    """Raise ModelError if the tokenizer has ids that the model has no embedding for (more embeddings are padding)."""
    if tokenizer_vocab_size > model_vocab_size:
        raise ModelError(
            "the tokenizer's vocabulary exceeds the model's.",
            facts={"tokenizer": f"{tokenizer_vocab_size:,} tokens", model: f"{model_vocab_size:,} embeddings"},
            remedy="Use the model's own tokenizer, or a model with at least as many embeddings.",
        )


def own_tokenizer(given: GivenModel) -> Tokenizer | None:
    """The tokenizer that lies beside a model; None if there is none that can be read."""
    folder = Path(given.model).expanduser()
    try:
        if folder.is_dir():
            return tokenizers.load(folder) if (folder / "tokenizer.json").is_file() else None
        return tokenizers.load(given.model, hub_commit(given))
    except TokenizerError:  # no fast tokenizer beside the weights: there is nothing to compare
        return None


def tokenizer_fingerprint(given: ScoredModel) -> str:
    """What decides the ids that a model's own tokenizer gives a text; "" for a model of ours, whose fingerprint has it.

    Raises:
        TokenizerError: a server's tokenizer cannot be loaded.

    """
    if isinstance(given, ServerModel):
        return "" if given.tokenizer is None else tokenizers.load(given.tokenizer).fingerprint
    if isinstance(given, VllmModel):
        given = GivenModel(model=given.vllm, revision=given.revision)
    if (Path(given.model).expanduser() / MANIFEST).is_file():
        return ""
    own = own_tokenizer(given)
    return "" if own is None else own.fingerprint


def check_reads(given: GivenModel, embeddings: int, tokenizer: Tokenizer) -> None:
    """Make sure that a model reads a tokenizer's ids as they are meant. More embeddings than tokens are padding.

    Raises:
        TokenizerError: its own tokenizer, where it has one, means something else by some id.
        ModelError: it has fewer embeddings than the tokenizer has tokens.

    """
    theirs = own_tokenizer(given)
    if theirs is not None and (token := tokenizer.differing_token(theirs)) is not None:
        raise TokenizerError(
            f"{given.model} was trained with another tokenizer than the instances were packed with.",
            facts={
                "instances": f"{len(tokenizer.vocabulary):,} tokens, {token!r} is {tokenizer.vocabulary[token]}",
                "model": f"{len(theirs.vocabulary):,} tokens, {token!r} is {theirs.vocabulary.get(token)}",
            },
            remedy="Across tokenizers only data can be distilled: score with `tokenizer: own`, and `retokenize`.",
        )
    check_vocabulary(tokenizer.vocab_size, embeddings, str(given.model))


def positions(config: Mapping[str, Any]) -> int | None:
    """How many tokens a model has positions for; None if it does not say."""
    found = config.get("n_positions") or config.get("max_position_embeddings")
    return None if found is None else int(found)


def check_length(config: Mapping[str, Any], sequence_length: int) -> None:
    """Raise ModelError if a model has learned positions for fewer tokens than an instance has."""
    if (there := positions(config)) is not None and sequence_length > there:
        raise ModelError(
            "the instances are longer than the model's positions.",
            facts={"sequence_length": f"{sequence_length:,}", "positions": f"{there:,}"},
            remedy="Use a model for longer texts, or prepare the corpus with a shorter sequence_length.",
        )


def _refuse_pickles(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = [p.name for pattern in _PICKLES for p in folder.glob(pattern)]
    if pickles:
        raise ModelError(
            f"the weights in {folder} are pickles, which can run any code when they are opened.",
            facts={"found": ", ".join(sorted(pickles)), "expected": "*.safetensors"},
            remedy="Convert them where you trust them: model.save_pretrained(folder, safe_serialization=True).",
        )


def _names(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()]
