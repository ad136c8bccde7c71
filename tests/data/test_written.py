"""Demonstrations and preference pairs: what can be learnt from, and how it becomes a batch."""

import json
import logging

import numpy as np
import pytest

from nested_reft.data.examples import Example, distinct
from nested_reft.data.pipeline import batch_prompts
from nested_reft.data.prompts import EncodedExample
from nested_reft.data.sources import DatasetSource, JsonlSource, load_source
from nested_reft.data.written import demonstration, pair, usable, written_batch
from tests.shared_data import original_files


def example(chosen: str, rejected, question: str = "q", **metadata) -> EncodedExample:
    found = Example(question, chosen, "pairs", {"rejected": rejected} | metadata)
    return EncodedExample(found, [1, 2], question)


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_pairs_that_teach_nothing_are_counted_and_named(caplog):
    good = example("ab", "c")
    bad = [
        example("same", "same", "equal?"),
        example("a", "  ", "empty?"),
        example("a", None, "none?"),
        example("abcde", "a", "long?"),
        example("a", "b", "parted?", rejected_dialogue="other"),
    ]
    with caplog.at_level(logging.WARNING):
        # Five characters and the stop token are one too many.
        assert usable([*bad[:3], good, *bad[3:]], pair, encode, 5, "train") == [good]
    assert "source 'pairs': 5 of 6 train rows cannot be learnt from and are skipped" in caplog.text
    for words in (
        "1 with equal answers, the first to 'equal?'",
        "2 with an empty answer or none, the first to 'empty?'",
        "1 with an answer of more than 5 tokens, the first to 'long?'",
        "1 with two prompts, the first to 'parted?'",
    ):
        assert words in caplog.text


def test_a_source_without_a_usable_pair_is_refused():
    with pytest.raises(ValueError, match=r"'pairs': 1 of 1 heldout rows cannot be learnt from: 1 with an empty answer"):
        usable([EncodedExample(Example("q", "a", "pairs"), [1], "q")], pair, encode, 9, "heldout")


def test_a_demonstration_is_the_reference_where_there_is_one():
    assert demonstration(Example("q", "4", "s", reference="2 + 2 = 4")) == ["2 + 2 = 4"]
    assert demonstration(Example("q", "4", "s")) == ["4"]


def test_a_batch_has_both_answers_with_their_stop_tokens():
    prompts = batch_prompts([example("ab", "c")], [0], 4)
    batch = written_batch(prompts, [["ab", "c"]], (1.0, -1.0), encode, 7, 5)
    assert batch.tokens_BGC.tolist() == [[[97, 98, 7, 0, 0], [99, 7, 0, 0, 0]]]
    assert batch.length_BG.tolist() == [[3, 2]] and batch.signal_BG.tolist() == [[1, -1]]
    assert np.asarray(batch.mask_BGC).sum() == 5 and batch.behavior_logprob_BGC is None


def test_a_prompt_may_have_several_pairs_and_all_stay_on_one_side(tmp_path):
    rows = [{"prompt": f"p{n % 10}", "chosen": f"good {n}", "rejected": "bad"} for n in range(40)]
    rows.append(rows[3])  # the same pair twice
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = JsonlSource(
        "pairs", str(tmp_path / "pairs.jsonl"), None, 8, 0, question_field="prompt", answer_field="chosen"
    )
    train, heldout = load_source(source)
    assert len(heldout) == 8
    assert not {e.question for e in train} & {e.question for e in heldout}
    # 40 pairs of 10 prompts; whatever shares a prompt with a held-out pair is in neither list, or held out.
    asked = {e.question for e in heldout}
    assert len(train) == 4 * (10 - len(asked))
    assert len({(e.question, e.answer) for e in train}) == len(train)


def test_other_questions_are_still_asked_once():
    assert len(distinct([Example("q", "1", "s"), Example("q", "2", "s")], "train")) == 1


def test_the_published_pairs(tmp_path, monkeypatch):
    """2,312 pairs. Of the training part five have two prompts and four an empty answer."""
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    source = DatasetSource("hh", "hh_harmless_test", None, 300, 0, folder=original_files("hh_harmless"))
    train, heldout = load_source(source)
    assert len(train) == 2012 and len(heldout) == 300
    encoded = [EncodedExample(e, [1], e.question) for e in train]
    kept = usable(encoded, pair, lambda text: list(text.encode()), 10**6, "train")
    assert len(kept) == 2003
