"""Clip-higher on a tabular policy."""

from experiments.clip_higher import final_entropy


def test_clip_higher_keeps_more_entropy_where_rewards_say_nothing():
    """A symmetric clip lets a token rise by log 1.2 = 0.18 a batch and fall by -log 0.8 = 0.22, so chance
    alone thins out the rare ones; with log 1.28 = 0.25 it does not."""
    start = [0.6] + [0.05] * 8
    assert final_entropy(0.28, start, None) > final_entropy(0.2, start, None) + 0.1
