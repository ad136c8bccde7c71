"""Several texts in one row: positions and masks by hand, and states that are those of each text alone."""

import jax
import jax.numpy as jnp
import numpy as np

from nested_reft.models.packing import places
from tests.tiny_models import TINY, tiny_model


def test_places_by_hand():
    position, seen = places(5, jnp.array([[[1, 1, 2, 2, 2, 0]]]))
    assert position.tolist() == [[[0, 1, 0, 1, 2]]]
    assert seen.mask(5, 5)[0, 0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    position, seen = places(3)
    assert position.tolist() == [0, 1, 2] and jnp.array_equal(seen.mask(3, 3), jnp.tril(jnp.ones((3, 3), bool)))


def test_each_text_of_a_row_has_the_states_that_it_has_alone():
    """After a prompt that all share. Without segments the second text sees the first."""
    model, key = tiny_model(), jax.random.key(1)
    prompt, one, other = (
        jax.random.randint(jax.random.fold_in(key, n), (size,), 0, TINY.vocab_size) for n, size in enumerate((4, 5, 7))
    )
    rows = [jnp.concatenate([one, other]), jnp.pad(one, (0, 7)), jnp.pad(other, (0, 5))]
    row_BGC, segment_BGC = jnp.stack(rows)[:, None], jnp.tile(jnp.array([1] * 5 + [2] * 7), (3, 1, 1))

    @jax.jit
    def states(segment_BGC):
        return model.completion_hidden(
            jnp.tile(prompt, (3, 1)), jnp.ones((3, 4), bool), row_BGC, segment_BGC=segment_BGC
        )[:, 0]

    packed, unpacked = states(segment_BGC)[0], states(None)
    np.testing.assert_allclose(packed[:5], unpacked[1, :5], atol=1e-5)
    # The state that predicts a text's first token is that of its left neighbour, so it is nobody's.
    np.testing.assert_allclose(packed[6:], unpacked[2, 1:7], atol=1e-5)
    assert not np.allclose(unpacked[0, 6:], unpacked[2, 1:7], atol=1e-2)
