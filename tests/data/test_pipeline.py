"""Prompts: written and tokenized, streamed and resumed, padded and stacked."""

import json

import numpy as np
import pytest

from nested_reft.data.examples import Example
from nested_reft.data.pipeline import PromptStream, batch_prompts, prompt_size, shared_prefix
from nested_reft.data.prompts import EncodedExample, PromptFormat, check_demonstrations, encode_examples
from nested_reft.tokenizer import Tokenizer


class CharTokenizer:
    """One id per character; the chat template marks roles."""

    def encode(self, text, add_special_tokens=False):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def apply_chat_template(self, messages, add_generation_prompt=True, **variables):
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return text + "<assistant>" * add_generation_prompt


def make_examples(count, source="a", **kwargs):
    return [Example(question=f"{source}{i}", answer=str(i), source=source, **kwargs) for i in range(count)]


def encode(examples, *, instruction="Number only.", max_prompt_tokens=100, **options):
    template = f"{{question}}\n{instruction}" if instruction else "{question}"
    return encode_examples(examples, CharTokenizer(), PromptFormat(template, **options), max_prompt_tokens)


def make_stream(sizes=(5, 3), seed=0):
    return PromptStream([encode(make_examples(n, "abcdefg"[i])) for i, n in enumerate(sizes)], seed)


def draw(stream, source_index, count):
    return [stream.next(source_index).example.question for _ in range(count)]


# encode_examples


def test_chat_prompt_holds_system_question_and_instruction():
    (encoded,) = encode(make_examples(1), system="Be terse.")
    assert encoded.text == "<system>Be terse.<user>a0\nNumber only.<assistant>"
    assert CharTokenizer().decode(encoded.tokens) == encoded.text


def test_chat_without_system_has_no_system_message():
    assert encode(make_examples(1))[0].text == "<user>a0\nNumber only.<assistant>"


def test_plain_prompt_skips_the_template():
    assert encode(make_examples(1), chat=False)[0].text == "a0\nNumber only."
    assert encode(make_examples(1), chat=False, instruction="")[0].text == "a0"


def test_prompt_of_exactly_the_limit_is_allowed_and_one_more_refused():
    examples = [Example("1", "1", "sums"), Example("12345", "1", "sums")]
    assert len(encode(examples, chat=False, instruction="", max_prompt_tokens=5)) == 2
    with pytest.raises(ValueError, match=r"data.max_prompt_tokens is 4, .*source 'sums' has 5 tokens; .*'12345'"):
        encode(examples, chat=False, instruction="", max_prompt_tokens=4)


def test_no_examples_are_refused():
    with pytest.raises(ValueError, match="encode_examples got no examples"):
        encode([])


def test_system_message_without_chat_is_refused():
    with pytest.raises(ValueError, match=r"data.prompt.system is .* data.prompt.chat is False"):
        encode(make_examples(1), system="Be terse.", chat=False)


def test_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="a prompt of source 'a' has no tokens"):
        encode([Example("", "1", "a")], chat=False, instruction="")


# PromptStream


def test_each_epoch_covers_every_example_once_and_is_shuffled_anew():
    stream = make_stream(sizes=(20,))
    epochs = [draw(stream, 0, 20) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(f"a{i}" for i in range(20))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_sources_advance_independently():
    together, alone = make_stream(), make_stream()
    expected_a, expected_b = draw(alone, 0, 8), draw(alone, 1, 8)
    drawn = [draw(together, source, 1)[0] for source in [0, 1] * 8]
    assert drawn[::2] == expected_a
    assert drawn[1::2] == expected_b


def test_sources_of_one_size_have_different_orders_at_every_epoch():
    stream = make_stream(sizes=(20, 20))
    orders = {tuple(q[1:] for q in draw(stream, source, 20)) for source in (0, 1) for _ in range(3)}
    assert len(orders) == 6


def test_seed_decides_the_order():
    assert draw(make_stream(), 0, 10) == draw(make_stream(), 0, 10)
    assert draw(make_stream(), 0, 10) != draw(make_stream(seed=1), 0, 10)


def test_neighbouring_seeds_do_not_share_orders_between_sources():
    one, next_one = make_stream(sizes=(20, 20), seed=0), make_stream(sizes=(20, 20), seed=1)
    assert [q[1:] for q in draw(one, 1, 20)] != [q[1:] for q in draw(next_one, 0, 20)]


def test_resumed_stream_continues_where_it_stopped():
    whole = make_stream()
    expected = [whole.next(source) for source in [0, 1, 0] * 8]
    first = make_stream()
    got = [first.next(source) for source in [0, 1, 0] * 4]
    saved = json.dumps(first.get_state())
    draw(first, 0, 3)  # A state that aliased the stream would move on with it.
    resumed = make_stream()
    resumed.set_state(json.loads(saved))
    got += [resumed.next(source) for source in [0, 1, 0] * 4]
    assert got == expected


def test_state_is_a_snapshot_and_can_be_restored_twice():
    stream = make_stream()
    draw(stream, 0, 2)
    state = stream.get_state()
    after = draw(stream, 0, 4)
    for _ in range(2):
        stream.set_state(state)
        assert draw(stream, 0, 4) == after


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (make_stream(seed=1), "data position has seed 0, this run has 1"),
        (make_stream(sizes=(5, 4)), r"data position has sizes \[5, 3\], this run has \[5, 4\]"),
        (
            PromptStream([encode(make_examples(5, "x")), encode(make_examples(3, "y"))], 0),
            "data position has fingerprint",
        ),
    ],
)
def test_state_of_other_data_is_refused(stream, message):
    with pytest.raises(ValueError, match=message):
        stream.set_state(make_stream().get_state())


def test_stream_without_sources_or_examples_is_refused():
    with pytest.raises(ValueError, match="PromptStream got no sources"):
        PromptStream([], seed=0)
    with pytest.raises(ValueError, match="no examples for source 1"):
        PromptStream([encode(make_examples(1)), []], seed=0)


# prompt_size, batch_prompts


def test_prompt_size_rounds_up_to_a_multiple():
    assert [prompt_size([3, n]) for n in (1, 15, 16, 17, 32)] == [8, 16, 16, 24, 32]
    assert prompt_size([5], bucket=4) == 8
    with pytest.raises(ValueError, match="prompt_size got no lengths"):
        prompt_size([])


def test_batch_is_right_padded_and_keeps_order():
    encoded = [
        EncodedExample(Example("x", "7", "a", {"k": 1}), [5, 6, 7], "x?"),
        EncodedExample(Example("y", "8", "b"), [9], "y?"),
    ]
    prompts = batch_prompts(encoded, [1, 0], prompt_size=4)
    np.testing.assert_array_equal(prompts.tokens_BP, [[5, 6, 7, 0], [9, 0, 0, 0]])
    np.testing.assert_array_equal(prompts.length_B, [3, 1])
    np.testing.assert_array_equal(prompts.source_B, [1, 0])
    assert {a.dtype for a in (prompts.tokens_BP, prompts.length_B, prompts.source_B)} == {np.dtype(np.int32)}
    assert prompts.texts == ("x?", "y?")
    assert prompts.answers == ("7", "8")
    assert prompts.metadata == ({"k": 1}, {})
    assert prompts.references == prompts.checkers == (None, None) and prompts.forced is None


def test_batch_keeps_references_and_marks_missing_ones():
    encoded = encode(make_examples(1, reference="so 0") + make_examples(1))
    assert batch_prompts(encoded, [0, 0], prompt_size=32).references == ("so 0", None)


def test_batch_refuses_a_longer_prompt_than_its_size():
    encoded = [EncodedExample(Example("x", "7", "a"), [5, 6, 7], "x")]
    assert batch_prompts(encoded, [0], prompt_size=3).tokens_BP.shape == (1, 3)
    with pytest.raises(ValueError, match="prompt_size is 2, but the longest prompt has 3 tokens"):
        batch_prompts(encoded, [0], prompt_size=2)


@pytest.mark.parametrize(("count", "source_index"), [(0, []), (2, [0])])
def test_batch_refuses_no_examples_and_unequal_lengths(count, source_index):
    with pytest.raises(ValueError, match=f"got {count} examples and {len(source_index)} source indices"):
        batch_prompts(encode(make_examples(2))[:count], source_index, prompt_size=64)


# demonstrations


def test_demonstrations_are_earlier_turns():
    (encoded,) = encode(make_examples(1), system="Terse.", demonstrations=(("b", "2"), ("c", "3")))
    assert encoded.text == "<system>Terse.<user>b<assistant>2<user>c<assistant>3<user>a0\nNumber only.<assistant>"


def test_variables_reach_the_chat_template():
    tokenizer = Tokenizer.characters("abc")
    template = "{{ 'a' if enable_thinking else 'b' }}{{ mood }}"
    tokenizer = Tokenizer(tokenizer._backend, tokenizer.special_tokens, template)
    assert PromptFormat(variables=(("enable_thinking", True), ("mood", "c"))).write("", tokenizer) == "ac"
    assert PromptFormat(variables=(("enable_thinking", False),)).write("", tokenizer) == "b"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variables": (("messages", 1),)}, "data.prompt.variables is .* are given already"),
        ({"variables": (("a", 1), ("a", 2))}, "data.prompt.variables is .*; each name must be there once"),
        ({"variables": (("a", 1),), "chat": False}, "data.prompt.variables is .* plain text has no turns"),
    ],
)
def test_variables_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PromptFormat(**changes)


def test_a_held_out_question_as_demonstration_is_refused():
    prompt = PromptFormat("What is {question}?", demonstrations=(("What is a1?", "1"),))
    check_demonstrations(prompt, make_examples(1))
    with pytest.raises(ValueError, match=r"demonstrations holds 'What is a1\?', which is a held-out"):
        check_demonstrations(prompt, make_examples(2))


# several hosts


def test_hosts_take_turns_in_one_order():
    examples = [encode(make_examples(7))]
    alone = draw(PromptStream(examples, 0), 0, 42)
    hosts = [draw(PromptStream(examples, 0, index, 3), 0, 14) for index in range(3)]
    assert [question for turn in zip(*hosts, strict=True) for question in turn] == alone


def test_the_position_of_another_host_is_refused():
    state = PromptStream([encode(make_examples(7))], 0, 1, 3).get_state()
    with pytest.raises(ValueError, match=r"data position has shard \[1, 3\], this run has \[0, 1\]"):
        PromptStream([encode(make_examples(7))], 0).set_state(state)
    with pytest.raises(ValueError, match="process_index 3 of 3"):
        PromptStream([encode(make_examples(7))], 0, 3, 3)


# prompts that are too long


def test_too_long_prompts_are_dropped_and_counted(caplog):
    examples = [Example("1", "1", "sums"), Example("12345", "1", "sums"), Example("123", "1", "sums")]
    kept = encode_examples(examples, CharTokenizer(), PromptFormat(chat=False), 3, "drop")
    assert [e.text for e in kept] == ["1", "123"]
    assert "source 'sums': 1 of 3 prompts dropped" in caplog.text
    with pytest.raises(ValueError, match="all 1 prompts of source 'sums' are longer; the shortest has 5 tokens"):
        encode_examples(examples[1:2], CharTokenizer(), PromptFormat(chat=False), 3, "drop")


def test_a_source_with_a_prompt_of_its_own_is_named_in_refusals():
    with pytest.raises(ValueError, match=r"data.sources.sums.prompt.template is '\{no\}', which cannot be filled"):
        encode_examples(make_examples(1), CharTokenizer(), PromptFormat("{no}"), 9, field="data.sources.sums.prompt")


@pytest.mark.parametrize(
    "prompts, expected",
    [
        ([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3]], 2),  # the third keeps one token of its own
        ([[1, 2, 3, 4], [1, 2, 9, 4], [1, 2, 3, 4]], 2),
        ([[1, 2], [3, 4]], 0),
        ([[1, 2, 3, 4]], 3),
        ([[1, 2, 3, 4], [1, 5, 3, 4]], 0),  # one token is under the least of two
    ],
)
def test_shared_prefix(prompts, expected):
    assert shared_prefix(prompts, least=2) == expected
