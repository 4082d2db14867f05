"""Loading: safetensors only, no code of the model's own, errors that say what was found, fingerprints of contents."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from miniplm.errors import ModelError, RecipeError
from miniplm.models.load import check_vocabulary, load_model, model_fingerprint, new_model
from miniplm.recipe import GivenModel

CONFIG = {
    "model_type": "qwen2", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # small matrices; two threads wait for each other on a busy machine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as `save_pretrained` writes it."""
    new_model(CONFIG, seed=0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


def pickled(folder: Path, name: str) -> Path:
    """Replace the weights of a folder by a pickle that leaves a marker when it is opened; return the marker."""
    marker = folder.parent / "opened"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(marker)))
    return marker


def given(path: Path | str) -> GivenModel:
    return GivenModel(model=str(path))


def test_a_saved_model_is_loaded_with_its_weights_in_the_dtype_asked_for_and_in_evaluation_mode(folder: Path) -> None:
    saved = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for dtype in ("float32", "bfloat16", "float16"):
        model = load_model(given(folder), dtype)  # type: ignore[arg-type]
        assert not model.training
        for name, value in model.state_dict().items():
            assert torch.equal(value, saved[name].to(getattr(torch, dtype)))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "weights.ckpt"])
@pytest.mark.parametrize("function", [load_model, model_fingerprint])
def test_weights_that_are_pickles_are_refused_by_name_and_never_opened(
    name: str, function: object, folder: Path
) -> None:
    marker = pickled(folder, name)
    with pytest.raises(ModelError, match=rf"(?s)are pickles.*{name}.*expected.*\*\.safetensors"):
        function(given(folder))  # type: ignore[operator]
    assert not marker.exists()
    pickle.loads((folder / name).read_bytes())
    assert marker.exists(), "the trap does not work"


def test_a_pickle_beside_safetensors_is_left_alone(folder: Path) -> None:
    marker = folder.parent / "opened"
    for name in ("pytorch_model.bin", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Trap(marker)))
    load_model(given(folder))
    model_fingerprint(given(folder))
    assert not marker.exists()


def test_a_harmless_pickle_is_not_loaded_either_where_the_only_safetensors_are_of_something_else(folder: Path) -> None:
    state = load_model(given(folder)).state_dict()
    (folder / "model.safetensors").rename(folder / "adapter.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(given(folder))


@pytest.mark.parametrize("function", [load_model, model_fingerprint])
@pytest.mark.parametrize("name", ["no/such/folder/at/all", "nobody-at-all/no-such-model", "not a name at all!"])
def test_a_model_that_is_nowhere_is_a_model_error_that_names_it(name: str, function: object) -> None:
    with pytest.raises(ModelError) as error:
        function(given(name))  # type: ignore[operator]
    assert repr(name) in str(error.value)


def test_a_folder_without_weights_is_a_model_error(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"(?s)has no weights.*safetensors.*config\.json"):
        model_fingerprint(given(folder))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(given(folder))


def test_a_folder_without_config_is_a_model_error(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(given(folder))


def test_truncated_weights_are_a_model_error(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(given(folder))


@pytest.mark.parametrize("model_type", ["qwen2", "never_heard_of"])
def test_code_that_comes_with_a_model_never_runs_unless_it_is_asked_for(model_type: str, folder: Path) -> None:
    """Known architectures are loaded without their code; unknown ones are refused, with the way to allow it."""
    marker = folder.parent / "ran"
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    code += "from transformers import Qwen2Config as C, Qwen2ForCausalLM as M\n"
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    if model_type == "qwen2":
        load_model(given(folder))
    else:
        with pytest.raises(ModelError, match="trust_remote_code: true"):
            load_model(given(folder))
    model_fingerprint(given(folder))
    assert not marker.exists()


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_sizes() -> None:
    with pytest.raises(ModelError, match=r"(?s)tokenizer +152,064 tokens.*qwen +151,936 embeddings"):
        check_vocabulary(152_064, 151_936, "qwen")


@pytest.mark.parametrize("tokenizer_vocab_size", [1, 151_646, 151_936])
def test_embeddings_without_a_token_are_padding(tokenizer_vocab_size: int) -> None:
    check_vocabulary(tokenizer_vocab_size, 151_936, "qwen")


def test_the_fingerprint_of_a_folder_is_the_same_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "elsewhere" / "renamed")
    assert model_fingerprint(given(copied)) == model_fingerprint(given(folder))


def test_files_that_do_not_make_the_model_leave_its_fingerprint_alone(folder: Path) -> None:
    before = model_fingerprint(given(folder))
    (folder / "README.md").write_text("other words")
    assert model_fingerprint(given(folder)) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_byte_of_weights_or_config_changes_the_fingerprint(name: str, folder: Path) -> None:
    before = model_fingerprint(given(folder))
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert model_fingerprint(given(folder)) != before


def test_the_fingerprint_of_a_file_changes_with_its_bytes_even_where_size_and_time_stay(folder: Path) -> None:
    weights = folder / "model.safetensors"
    before, times = model_fingerprint(given(folder)), weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert model_fingerprint(given(folder)) != before


def test_the_same_config_and_seed_give_the_same_new_model_and_another_seed_another() -> None:
    first, again, other = (new_model(CONFIG, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_new_models_are_float32() -> None:
    assert {p.dtype for p in new_model({**CONFIG, "dtype": "bfloat16"}, 0).parameters()} == {torch.float32}


def test_a_model_type_that_transformers_does_not_know_is_a_recipe_error() -> None:
    with pytest.raises(RecipeError, match="qwen17"):
        new_model({"model_type": "qwen17"}, 0)


def test_making_a_new_model_leaves_the_config_given_as_it_was() -> None:
    config = dict(CONFIG)
    new_model(config, 0)
    assert config == CONFIG
    assert Qwen2Config(**{k: v for k, v in config.items() if k != "model_type"}).vocab_size == 64
