"""A policy reads a prompt as training does: plain text with the tokens that the tokenizer puts around it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.data.examples import Example
from nested_reft.data.prompts import encode_examples
from nested_reft.models.config import ModelConfig
from nested_reft.models.parameters import initial_parameters
from nested_reft.models.transformer import Transformer
from nested_reft.prompt_format import PromptFormat
from nested_reft.rollout.policy import Policy
from nested_reft.tokenizer import Tokenizer, surround_plain_text

BEGIN, A, B, C = 4, 1, 2, 3


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer.characters("abc^")
    surround_plain_text(tokenizer._backend, {"bos_token": "^"}, begins=True, ends=False)
    return tokenizer


@pytest.fixture(scope="module")
def policy(tokenizer):
    config = ModelConfig(
        vocab_size=5, num_layers=1, width=8, hidden_width=8, num_heads=2, num_kv_heads=1, head_size=4, max_positions=32
    )
    return Policy(Transformer(config, initial_parameters(config, jax.random.key(0))), tokenizer)


@pytest.mark.parametrize(("chat", "tokens"), [(False, [BEGIN, A, B]), (True, [A, B])])
def test_plain_prompts_begin_with_the_begin_token_everywhere(policy, tokenizer, chat, tokens):
    prompt = PromptFormat(chat=chat)
    (encoded,) = encode_examples([Example("ab", "c", "s")], tokenizer, prompt, max_prompt_tokens=9)
    assert encoded.tokens == tokens and encoded.text == "ab"
    assert policy.prompt_tokens("ab") == 2  # its own format is chat
    # What follows the prompt, be it an answer or a completion, gets no token of its own.
    (logprob_C,) = policy.score("ab", "c", chat=chat)
    logits_TV = policy.model(jnp.array([tokens]))[0]
    np.testing.assert_allclose(logprob_C, [jax.nn.log_softmax(logits_TV[-1])[C]], rtol=1e-5)
