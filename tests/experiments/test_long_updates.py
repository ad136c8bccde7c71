"""The benchmark of long updates, without compiling one."""

from types import SimpleNamespace

import pytest

from experiments.benchmarks import long_updates
from experiments.benchmarks.worker import Case
from nested_reft import backends

CASE = Case(1, 2, 4, 8)


@pytest.fixture
def traced(monkeypatch):
    """By how many pairs of a query and a key attention went by blocks, whenever an update was traced."""
    seen = []
    memory = SimpleNamespace(argument_size_in_bytes=3, temp_size_in_bytes=4)
    compiled = SimpleNamespace(memory_analysis=lambda: memory)
    lowered = SimpleNamespace(compile=lambda: compiled)

    def lower(*_):
        seen.append(backends.LONG_ATTENTION)
        return lowered

    monkeypatch.setattr(long_updates, "make_update", lambda task: SimpleNamespace(lower=lower))
    return seen


def test_attention_is_set_for_an_update_and_set_back(traced):
    shipped = backends.LONG_ATTENTION
    rows = [long_updates.compiled(CASE, attention) for attention in ("all scores", "blocks")]
    assert traced == [2**62, shipped] and shipped == backends.LONG_ATTENTION
    assert [row["peak_bytes"] for row in rows] == [7, 7]


def test_attention_is_set_back_where_an_update_does_not_compile(traced, monkeypatch):
    def lower(*_):
        raise RuntimeError("out of memory")

    shipped = backends.LONG_ATTENTION
    monkeypatch.setattr(long_updates, "make_update", lambda task: SimpleNamespace(lower=lower))
    with pytest.raises(RuntimeError, match="out of memory"):
        long_updates.compiled(CASE, "all scores")
    assert shipped == backends.LONG_ATTENTION
