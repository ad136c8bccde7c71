"""Twenty kinds of damage to a run's directory; `scripts/damage.py` has them all."""

from pathlib import Path

import pytest

from scripts import damage
from scripts.damage import WORDS, Verdict, kinds, kinds_in, markdown, stopped_run, verdicts

PAGE = Path(__file__).parents[1] / "experiments" / "results" / "robustness.md"

EXPECTED = {
    "config.json: cut to half": ("refused", "config.json' cannot be read"),
    "config.json: another rate": ("refused", "optimizer.learning_rate is 0.001, and was 0.0005"),
    "metrics.jsonl: NUL bytes at the end": ("same", ""),
    "metrics.jsonl: a line of NUL bytes": ("warned", "line 2 is no JSON object with a step"),
    "metrics.jsonl: removed": ("warned", "step 0 has 0 lines"),
    "samples.jsonl: a line missing": ("warned", "step 1 has 15 lines instead of 16"),
    "samples.jsonl: a directory in its place": ("refused", "samples.jsonl' is not a file"),
    "checkpoints/3/arrays/ocdbt.process_0/d/*: one bit flipped": ("older", "does not hold what was written"),
    "checkpoints/3/host/metadata: removed": ("older", "file host/metadata cannot be read"),
    "checkpoints: an empty directory '999'": ("same", "it is '999.damaged' now"),
    "checkpoints: the newest gone": ("older", "continuing after step 2 of 5 (tiny)"),
    "checkpoints: an empty directory '²'": ("same", ""),
    "checkpoints: checkpoint 2 under the name 3": ("older", "checkpoint 3 in"),
    "checkpoints/blocks/replay-3.safetensors: one bit flipped": ("older", "blocks/replay-3.safetensors does not hold"),
    "checkpoints/blocks/replay-1.safetensors: cut to half": ("refused", "blocks/replay-1.safetensors has"),
    "checkpoints/blocks: half written under another name": ("same", ""),
    "checkpoints/3/arrays/ocdbt.process_0/d: the smallest removed": ("older", "No such file"),
    "summary.json: half of one": ("same", ""),
    "summary.json: a directory in its place": ("refused", "summary.json' is a directory"),
    "checkpoints: all damaged": ("refused", "there is no other to continue from"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    acts = kinds()
    run = stopped_run(tmp_path_factory.mktemp("runs"))
    return {verdict.kind: verdict for verdict in verdicts(run, {kind: acts[kind] for kind in EXPECTED})}


@pytest.mark.parametrize("kind", EXPECTED)
def test_damage_is_recovered_from_or_named(kind, found):
    word, said = EXPECTED[kind]
    assert found[kind].word == word, found[kind]
    assert said in found[kind].said


def test_there_are_more_than_200_kinds():
    assert len(kinds()) >= 200


def test_the_table_of_the_results_page_has_every_kind():
    found = kinds_in(PAGE.read_text(encoding="utf-8"))
    assert found.keys() == kinds().keys()
    assert set(found.values()) <= set(WORDS) - {"silent"}
    # What the tests above find stands there too.
    assert {kind: found[kind] for kind in EXPECTED} == {kind: word for kind, (word, _) in EXPECTED.items()}


def test_the_table_can_be_read_back():
    written = [Verdict(kind, WORDS[index % 4], "") for index, kind in enumerate(kinds())]
    page = f"<!-- kinds of damage -->\n{markdown(written)}\n<!-- end of kinds -->"
    assert kinds_in(page) == {verdict.kind: verdict.word for verdict in written}


def test_words_that_no_kind_has_are_refused(capsys):
    """Nothing would be silent, and that would look as if all were well."""
    with pytest.raises(SystemExit, match=r"^2$"):
        damage.main(["metrics", "nosuch"])
    assert "words are 'metrics nosuch', and no kind of damage has all of them" in capsys.readouterr().err
