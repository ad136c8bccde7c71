"""Several texts in one row: positions and masks by hand, and states that are those of each text alone."""

import jax
import jax.numpy as jnp
import numpy as np

from nested_reft.models.packing import places
from tests.tiny_models import TINY, tiny_model


def test_places_by_hand():
    position, mask = places(5, jnp.array([[[1, 1, 2, 2, 2, 0]]]))
    assert position.tolist() == [[[0, 1, 0, 1, 2]]]
    assert mask[0, 0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    position, mask = places(3)
    assert position.tolist() == [0, 1, 2] and jnp.array_equal(mask, jnp.tril(jnp.ones((3, 3), bool)))


def test_each_text_of_a_row_has_the_states_that_it_has_alone():
    """After a prompt that all share. Without segments the second text would see the first."""
    model, key = tiny_model(), jax.random.key(1)
    prompt, one, other = (
        jax.random.randint(jax.random.fold_in(key, n), (1, size), 0, TINY.vocab_size)
        for n, size in enumerate((4, 5, 7))
    )
    valid = jnp.ones((1, 4), bool)
    row, segment = jnp.concatenate([one, other], axis=1)[None], jnp.array([[[1] * 5 + [2] * 7]])
    packed = model.completion_hidden(prompt, valid, row, segment_BGC=segment)[0, 0]
    alone = [model.completion_hidden(prompt, valid, text[None])[0, 0] for text in (one, other)]
    np.testing.assert_allclose(packed[:5], alone[0], atol=1e-5)
    # The state that predicts a text's first token is that of its left neighbour, so it is nobody's.
    np.testing.assert_allclose(packed[6:], alone[1][1:], atol=1e-5)
    assert not np.allclose(model.completion_hidden(prompt, valid, row)[0, 0, 6:], alone[1][1:], atol=1e-2)
