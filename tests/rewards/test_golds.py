r"""Gold answers that are accepted before training are right when a completion repeats them, and no near miss is.

`math_golds.jsonl` has a gold answer a line, in the style of MATH, with other forms of it (`right`) and near misses
(`wrong`).
"""

import json
from pathlib import Path

import pytest

from nested_reft.data.datasets import DATASETS
from nested_reft.data.examples import Example
from nested_reft.rewards.reward import RewardConfig, check_answers
from tests.rewards.test_reward import score_texts
from tests.shared_data import original_files

MATH = RewardConfig(checker="math")
ROWS = [json.loads(line) for line in Path(__file__).with_name("math_golds.jsonl").read_text("utf-8").splitlines()]


def golds(name: str) -> list[str]:
    folder = Path(original_files(name))
    return [row.answer for split in DATASETS[name].splits for row in DATASETS[name].read(folder, split)]


def accuracies(pairs: list[tuple[str, str]], config: RewardConfig = MATH) -> list[float]:
    """The accuracy of a completion for each pair of its text and a gold answer; all are scored."""
    texts = [[text] for text, _ in pairs]
    _, accuracy_BG, scored_BG, _ = score_texts(texts, [gold for _, gold in pairs], config)
    assert scored_BG.all()
    return accuracy_BG[:, 0].tolist()


@pytest.mark.parametrize("kind", sorted({row["kind"] for row in ROWS}))
def test_math_style_golds_and_their_near_misses(kind):
    pytest.importorskip("math_verify", reason="needs the optional package math-verify")
    rows = [row for row in ROWS if row["kind"] == kind]
    check_answers([Example("q", row["gold"], kind) for row in rows], MATH)
    boxes = {
        right: [(rf"\boxed{{{answer}}}", row["gold"]) for row in rows for answer in answers(row)]
        for right, answers in ((1, lambda row: [row["gold"], *row["right"]]), (0, lambda row: row["wrong"]))
    }
    for right, pairs in boxes.items():
        found = accuracies(pairs)
        assert [pair for pair, accuracy in zip(pairs, found, strict=True) if accuracy != right] == []


def test_there_are_200_math_style_golds_of_every_kind():
    assert len({row["gold"] for row in ROWS}) >= 200
    assert all(row["wrong"] for row in ROWS)


@pytest.mark.parametrize("name", ["gsm8k", "svamp"])
@pytest.mark.parametrize("checker", ["math", "exact"])
def test_all_published_golds_and_their_near_misses(name, checker):
    config = RewardConfig(checker=checker)
    answers = sorted(set(golds(name)))  # equal golds are one case
    check_answers([Example("q", answer, name) for answer in answers], config)
    mark = r"\boxed{%s}" if checker == "math" else "%s"
    assert set(accuracies([(mark % answer, answer) for answer in answers], config)) == {1.0}
    # Off by one, by a power of ten, by the sign.
    wrong = [(mark % near, a) for a in answers for near in (int(a) + 1, 10 * int(a) or 10, -int(a) or -1)]
    assert set(accuracies(wrong, config)) == {0.0}


def test_reported_answers():
    """Answers that were scored wrongly once, as completions."""
    pytest.importorskip("math_verify", reason="needs the optional package math-verify")
    cases = [json.loads(line) for line in Path(__file__).with_name("answers.jsonl").read_text("utf-8").splitlines()]
    found = accuracies([(case["completion"], case["gold"]) for case in cases])
    assert found == [case["right"] for case in cases]
