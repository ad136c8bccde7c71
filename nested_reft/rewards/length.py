"""DAPO's soft overlong punishment: longer completions cost gradually more."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def overlong_punishment(
    length_BG: Int[np.ndarray, "B G"], max_tokens: int, cache_tokens: int
) -> Float[np.ndarray, "B G"]:
    """Zero up to `max_tokens - cache_tokens`, then linear, and -1 from `max_tokens` on:

        R_length(y) = 0                                     if |y| <= L_max - L_cache
                      ((L_max - L_cache) - |y|) / L_cache   if L_max - L_cache < |y| <= L_max
                      -1                                    if L_max < |y|

    DAPO (arXiv 2503.14476), equation 13. Generation is cut off at L_max, so a completion that was
    cut off gets -1.

    Args:
        length_BG: tokens of each completion, the stop token included.
        max_tokens: L_max, 1 or more.
        cache_tokens: L_cache, 1 to `max_tokens`.

    Returns:
        The punishment of each completion, -1 to 0, in float32.
    """
    over_BG = length_BG - (max_tokens - cache_tokens)
    # The clip makes the three cases one expression: below 0 is no punishment, above 1 the whole.
    return -np.clip(over_BG / cache_tokens, 0, 1).astype(np.float32)
