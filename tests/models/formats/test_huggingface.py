"""Hugging Face directories: logits agree with transformers both ways, and damage is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from nested_reft.models.config import ModelConfig
from nested_reft.models.formats import huggingface
from nested_reft.models.formats.huggingface import check_huggingface, load_huggingface, save_huggingface
from nested_reft.models.formats.huggingface_config import config_from_huggingface, config_to_huggingface
from nested_reft.models.formats.huggingface_tokenizer import huggingface_tokenizer
from nested_reft.models.lora import LoraConfig, add_lora
from nested_reft.models.parameters import initial_parameters
from nested_reft.models.transformer import Transformer
from nested_reft.tokenizer import Tokenizer
from nested_reft.untrusted import BadFile
from tests.models.reference_models import (
    CASES,
    LLAMA3_ROPE,
    SHAPE,
    random_model,
    random_tokens,
    reference_logits,
    torch,
    transformers,
)

TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
TOKENS_BT = jnp.array(random_tokens(2, 100))  # longer than the 64 positions that Llama 3's scaling starts from


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Gives a case's directory and its reference logits, computed once."""
    cache = {}

    def get(case: str):
        if case not in cache:
            directory = tmp_path_factory.mktemp(case)
            model = random_model(case)
            model.save_pretrained(directory)
            cache[case] = (directory, reference_logits(model, TOKENS_BT))
        return cache[case]

    return get


def tiny_model(dtype=jnp.float32, **changes) -> Transformer:
    smallest = ModelConfig(
        vocab_size=20, num_layers=2, width=8, hidden_width=12, num_heads=2, num_kv_heads=1, head_size=4
    )
    config = dataclasses.replace(smallest, **changes)
    return Transformer(config, initial_parameters(config, jax.random.key(0), dtype))


# In: logits.


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_with_transformers(saved, case):
    directory, expected = saved(case)
    np.testing.assert_allclose(load_huggingface(directory)(TOKENS_BT), expected, **TOLERANCE)


def test_llama3_scaling_changes_the_reference(saved):
    # Guards the test above: without scaling, or with the frequencies kept, the logits are far off.
    directory, expected = saved("llama3")
    model = load_huggingface(directory)
    unscaled = ModelConfig(**{**vars(model.config), "rope_scaling": None})
    assert np.abs(np.asarray(Transformer(unscaled, model.parameters())(TOKENS_BT)) - expected).max() > 0.1


def test_shards_and_older_rope_fields(tmp_path, saved):
    model = random_model("llama3")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert not (tmp_path / "model.safetensors").exists() and len(list(tmp_path.glob("*.safetensors"))) > 3
    settings = json.loads((tmp_path / "config.json").read_text())
    rope = settings.pop("rope_parameters")
    settings["rope_theta"] = rope.pop("rope_theta")
    settings["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}  # as transformers 4 wrote it
    (tmp_path / "config.json").write_text(json.dumps(settings))
    np.testing.assert_allclose(load_huggingface(tmp_path)(TOKENS_BT), saved("llama3")[1], **TOLERANCE)


def test_bfloat16_source_is_read_exactly(tmp_path):
    model = random_model("qwen2").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load_huggingface(tmp_path).parameters()
    expected = model.model.layers[1].self_attn.q_proj.weight.float().detach().numpy()
    np.testing.assert_array_equal(loaded["layers/query"][1], expected)
    assert load_huggingface(tmp_path, jnp.bfloat16).parameters()["layers/query"].dtype == jnp.bfloat16


@pytest.mark.parametrize("case", ["llama3", "qwen2", "qwen3"])
def test_left_right_and_no_padding_agree(saved, case):
    directory, expected = saved(case)
    model, length, pad = load_huggingface(directory), TOKENS_BT.shape[1], 7
    filler = jnp.array(random_tokens(2, pad))
    valid, invalid = jnp.ones(TOKENS_BT.shape, bool), jnp.zeros((2, pad), bool)
    left = model(jnp.hstack([filler, TOKENS_BT]), jnp.hstack([invalid, valid]))
    right = model(jnp.hstack([TOKENS_BT, filler]), jnp.hstack([valid, invalid]))
    np.testing.assert_allclose(left[:, pad:], expected, **TOLERANCE)
    np.testing.assert_allclose(right[:, :length], expected, **TOLERANCE)


def test_a_head_beside_a_tied_configuration_is_used(saved, tmp_path, caplog):
    directory = copy_of(saved, tmp_path, "llama_tied")
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    # A copy of the embedding is what old exports hold: the model stays tied.
    change_tensors(directory, lambda tensors: tensors.update({"lm_head.weight": embedding}))
    assert check_huggingface(directory).tied_embeddings
    rounded = jnp.asarray(embedding, jnp.bfloat16)
    both = {"lm_head.weight": np.asarray(rounded), "model.embed_tokens.weight": np.asarray(rounded)}
    change_tensors(directory, lambda tensors: tensors.update(both))
    assert check_huggingface(directory).tied_embeddings
    # Another head is what the model was trained with, and dropping it would change every logit.
    other = {"lm_head.weight": embedding[::-1].copy(), "model.embed_tokens.weight": embedding}
    change_tensors(directory, lambda tensors: tensors.update(other))
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert not check_huggingface(directory).tied_embeddings
    np.testing.assert_allclose(
        load_huggingface(directory)(TOKENS_BT), reference_logits(reference, TOKENS_BT), **TOLERANCE
    )
    assert "holds another head, which is used" in caplog.text
    change_tensors(directory, lambda tensors: tensors.update({"lm_head.weight": embedding[:-1].copy()}))
    with pytest.raises(ValueError, match=r"'lm_head\.weight' has shape \(60, 32\); its configuration says \(61, 32\)"):
        check_huggingface(directory)


def test_buffers_of_integers_are_no_weights(saved, tmp_path):
    buffers = {"model.embed_tokens.position_ids": np.arange(9), "model.mask": np.ones(3, bool)}
    change_tensors(copy_of(saved, tmp_path), lambda tensors: tensors.update(buffers))
    np.testing.assert_allclose(load_huggingface(tmp_path)(TOKENS_BT), saved("llama")[1], **TOLERANCE)
    change_tensors(tmp_path, lambda tensors: tensors.update({"model.scales": np.ones(3, np.float32)}))
    with pytest.raises(ValueError, match=r"holds tensor 'model\.scales', which a 'llama' model has no place for"):
        load_huggingface(tmp_path)


# In: configuration.

LLAMA = {**SHAPE, "model_type": "llama", "hidden_act": "silu"}
QWEN2 = {**SHAPE, "model_type": "qwen2", "hidden_act": "silu"}


def test_absent_fields_take_the_familys_defaults():
    llama = {
        key: LLAMA[key]
        for key in LLAMA
        if key not in ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings")
    }
    config = config_from_huggingface(llama)
    assert (config.num_kv_heads, config.head_size, config.norm_epsilon) == (4, 8, 1e-6)
    assert (config.max_positions, config.rope_theta, config.tied_embeddings) == (2048, 10_000.0, False)
    assert config_from_huggingface({**QWEN2, "model_type": "qwen3"}).head_size == 128
    # null is what transformers makes of it; where Qwen does not say at all, it would be another number
    assert config_from_huggingface({**QWEN2, "num_key_value_heads": None}).num_kv_heads == 4
    with pytest.raises(ValueError, match="num_key_value_heads is None; it must be given"):
        config_from_huggingface({key: value for key, value in QWEN2.items() if key != "num_key_value_heads"})
    assert config_from_huggingface({**LLAMA, "head_dim": None}).head_size == 8
    assert config_from_huggingface({**LLAMA, "rope_theta": 5e5, "rope_scaling": None}).rope_theta == 5e5


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 2},
        {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 3},  # starts above the last layer
        {"layer_types": ["full_attention"] * 3, "sliding_window": None},
    ],
)
def test_sliding_windows_not_in_use_are_accepted(changes):
    assert config_from_huggingface({**QWEN2, **changes}).qkv_bias


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (LLAMA, {"model_type": "mamba"}, "model_type is 'mamba'; allowed are llama, qwen2, qwen3"),
        (LLAMA, {"model_type": None}, "model_type is None"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; allowed is 'silu'"),
        (LLAMA, {"attention_bias": True}, "attention_bias is True; allowed is False"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias is True; allowed is False"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config is .*; allowed is absent"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling is .*yarn.*; allowed rope_type is"),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters is .*allowed rope_type"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None; it must be given"),
        (LLAMA, {"num_hidden_layers": None}, "num_hidden_layers is None; it must be given"),
        (LLAMA, {"rope_theta": None}, r"config\.json: rope_theta is None; it must be given as a number"),
        (LLAMA, {"rope_theta": 10**400}, "rope_theta is 1000.*; it must be given as a number from 1e-30 to 1e"),
        (LLAMA, {"rope_theta": float("nan")}, "rope_theta is nan; it must be given as a number"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_scaling is 'linear'; allowed is an object"),
        (LLAMA, {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_scaling is .*head"),
        (LLAMA, {"rope_parameters": {**LLAMA3_ROPE, "factor": "8"}}, r"rope_parameters\.factor is '8'; it must be"),
        (LLAMA, {"rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "last must be more than the one before"),
        (LLAMA, {"num_attention_heads": 0}, "num_attention_heads is 0; it must be given as a whole number from 1"),
        (LLAMA, {"num_attention_heads": 64}, r"model\.shape\.head_size is 0; allowed is 1 or more"),
        (LLAMA, {"hidden_size": 32.0}, r"hidden_size is 32\.0; it must be given as a whole number"),
        (LLAMA, {"vocab_size": True}, "vocab_size is True; it must be given as a whole number"),
        (LLAMA, {"head_dim": 0}, "head_dim is 0; it must be given as a whole number"),
        (LLAMA, {"max_position_embeddings": 2**40}, "max_position_embeddings is 1099511627776; it must be"),
        (LLAMA, {"rms_norm_eps": [1e-5]}, r"rms_norm_eps is \[1e-05\]; it must be given as a number"),
        (LLAMA, {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; allowed are true and false"),
        (LLAMA, {"model_type": {}}, r"model_type is \{\}; allowed are llama"),
        (LLAMA, {"hidden_act": ["silu"]}, r"hidden_act is \['silu'\]; allowed is 'silu'"),
        (QWEN2, {"layer_types": [{}]}, r"layer_types is \[\{\}\]; allowed is a list of texts"),
        (QWEN2, {"num_key_value_heads": "2"}, "num_key_value_heads is '2'; it must be given"),
        (
            QWEN2,
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            "sliding_window is 9 and in",
        ),
        (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "allowed is full attention in every layer"),
    ],
)
def test_unsupported_configurations_are_refused(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_huggingface({**settings, **changes})


# In: damage.


def copy_of(saved, tmp_path, case="llama"):
    for path in saved(case)[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_missing_files_are_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model directory .*nowhere' does not exist"):
        load_huggingface(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json' does not exist"):
        load_huggingface(tmp_path)
    copy_of(saved, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor .*save the model as safetensors"):
        load_huggingface(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_cut_off_weights_are_refused(saved, tmp_path, size):
    path = copy_of(saved, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors' is cut off or damaged .*fetch it again"):
        check_huggingface(tmp_path)


def test_missing_shard_is_named(tmp_path):
    random_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-.*does not exist, but the index"):
        load_huggingface(tmp_path)


def test_missing_unknown_and_misshapen_tensors_are_named(saved, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(copy_of(saved, tmp_path), lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"lacks tensor '{name}'"):
        load_huggingface(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({name: np.zeros((32, 48), np.float32)}))
    with pytest.raises(ValueError, match=rf"'{name}' has shape \(32, 48\); its configuration says \(48, 32\)"):
        load_huggingface(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({name: np.zeros((48, 32), np.int8)}))
    with pytest.raises(ValueError, match=rf"'{name}' has type I8; allowed are F64"):
        load_huggingface(tmp_path)
    bias = "model.layers.0.self_attn.q_proj.bias"
    change_tensors(copy_of(saved, tmp_path), lambda tensors: tensors.update({bias: np.zeros(32, np.float32)}))
    with pytest.raises(ValueError, match=rf"holds tensor '{bias}', which a 'llama' model has no place for"):
        load_huggingface(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config\.json' is not valid JSON"),
        ("[" * 200_000, r"config\.json' is not read: its JSON is nested too deep"),
        (json.dumps({**LLAMA, "num_hidden_layers": 10**9}), "holds 30, .* asks for 1000000000 layers"),
        (json.dumps({**LLAMA, "model_type": "\x1b[2J"}), r"model_type is '\\x1b\[2J'; allowed"),
    ],
)
def test_bad_configurations_are_refused_with_their_file(saved, tmp_path, content, message):
    (copy_of(saved, tmp_path) / "config.json").write_text(content)
    with pytest.raises(BadFile, match=message):
        load_huggingface(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, {"a": ["b"]}, "a"])
def test_weight_maps_of_other_types_are_refused(saved, tmp_path, weight_map):
    index = copy_of(saved, tmp_path) / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BadFile, match="has no weight_map from tensors to files; fetch it again"):
        check_huggingface(tmp_path)


@pytest.mark.parametrize("name", ["..", "a\0b", "../../etc/passwd"])
def test_weight_maps_name_files_of_their_directory_only(saved, tmp_path, name):
    index = copy_of(saved, tmp_path) / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises((BadFile, FileNotFoundError)):
        check_huggingface(tmp_path)


# Out.


@pytest.mark.parametrize("case", CASES)
def test_export_loads_in_transformers(saved, tmp_path, case):
    directory, expected = saved(case)
    save_huggingface(load_huggingface(directory), tmp_path / "export")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    np.testing.assert_allclose(reference_logits(model, TOKENS_BT), expected, **TOLERANCE)
    assert load_huggingface(tmp_path / "export").config == load_huggingface(directory).config


def test_bfloat16_round_trip_is_exact(tmp_path):
    model = tiny_model(jnp.bfloat16, family="qwen3", qk_norm=True)
    save_huggingface(model, tmp_path / "export")
    assert json.loads((tmp_path / "export/config.json").read_text())["torch_dtype"] == "bfloat16"
    again = load_huggingface(tmp_path / "export", jnp.bfloat16).parameters()
    for name, value in model.parameters().items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_export_merges_adapters(tmp_path):
    model = tiny_model()
    add_lora(model, LoraConfig(rank=2, alpha=6.0), jax.random.key(1))
    layers: Any = model.layers  # the adapters are attributes that `add_lora` sets by name
    layers.down_lora_out = nnx.LoRAParam(jax.random.normal(jax.random.key(2), layers.down_lora_out[...].shape))
    tokens_BT = jnp.array(random_tokens(1, 6, 20))
    save_huggingface(model, tmp_path / "export")
    merged = load_huggingface(tmp_path / "export")(tokens_BT)
    np.testing.assert_allclose(merged, model(tokens_BT), **TOLERANCE)
    assert np.abs(merged - Transformer(model.config, model.parameters())(tokens_BT)).max() > 0.1


def test_export_with_tokenizer(tmp_path):
    tokenizer = Tokenizer.characters("0123456789+=")
    save_huggingface(tiny_model(), tmp_path / "export", tokenizer)
    assert json.loads((tmp_path / "export/config.json").read_text())["eos_token_id"] == 0
    assert json.loads((tmp_path / "export/generation_config.json").read_text())["eos_token_id"] == 0
    save_huggingface(tiny_model(), tmp_path / "again", tmp_path / "export")  # copies a directory's files
    for directory in ("export", "again"):
        assert huggingface_tokenizer(tmp_path / directory).encode("1+2=") == tokenizer.encode("1+2=")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "again").encode("1+2=") == tokenizer.encode("1+2=")


def test_failed_export_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "export"
    save_huggingface(tiny_model(), target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(FileExistsError, match="export' is not empty; give another directory"):
        save_huggingface(tiny_model(), target)

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "save_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_huggingface(tiny_model(), target, overwrite=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    save_huggingface(tiny_model(vocab_size=30), target, overwrite=True)
    assert load_huggingface(target).config.vocab_size == 30
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_export_that_cannot_be_renamed_puts_the_earlier_one_back(tmp_path, monkeypatch):
    target, rename = tmp_path / "export", Path.rename
    save_huggingface(tiny_model(), target)

    def fail_for_the_new_one(self, goal):
        if Path(goal) == target and not self.name.endswith("-previous"):
            raise OSError("Permission denied")
        return rename(self, goal)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(OSError, match="Permission denied"):
        save_huggingface(tiny_model(vocab_size=30), target, overwrite=True)
    assert load_huggingface(target).config.vocab_size == 20
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_export_refuses_a_file_and_what_transformers_cannot_express(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file; give a directory"):
        save_huggingface(tiny_model(), tmp_path / "file")
    with pytest.raises(ValueError, match=r"model\.shape\.width is 10 .*num_heads 4; a 'llama' model is exported only"):
        config_to_huggingface(dataclasses.replace(tiny_model().config, width=10, num_heads=4), jnp.float32)
    with pytest.raises(ValueError, match=r"model\.qkv_bias is True; a 'llama' model is exported with False only"):
        config_to_huggingface(tiny_model(qkv_bias=True).config, jnp.float32)
