"""A user's own questions: read row by row, and each refusal with its row."""

import json

import pytest

from nested_reft.data.sources import JsonlSource, load_source


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(*rows, name="mine.jsonl"):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"\n".join(lines))

    return write


def mine(**changes):
    return JsonlSource(
        **({"name": "m", "file": "mine.jsonl", "train_size": None, "heldout_size": 1, "seed": 0} | changes)
    )


def pair(index, **more):
    return {"question": f"q{index}", "answer": str(index)} | more


def test_fields_metadata_and_disjoint_lists(write, caplog):
    write(
        {"q": "a", "a": 1, "level": 3, "worked": "so 1"},
        b"",
        {"q": "b", "a": 2.5, "worked": "so 2.5"},
        {"q": "a", "a": 1, "worked": "x"},
    )
    names = {"question_field": "q", "answer_field": "a", "reference_field": "worked"}
    train, heldout = load_source(mine(**names, checker="math"))
    by_question = {e.question: e for e in train + heldout}
    assert len(train) == len(heldout) == 1
    assert by_question["a"].answer == "1" and by_question["b"].answer == "2.5"
    assert by_question["a"].metadata == {"level": 3} and by_question["a"].reference == "so 1"
    assert by_question["a"].checker == "math" and by_question["a"].source == "m"
    assert "1 train rows removed, because they ask what an earlier one asks; the first is row 3" in caplog.text


@pytest.mark.parametrize(
    "number",
    ["0.00001", "1e-05", "2e16", "20000000000000000.0", "7", "-0.50", "1" + "0" * 400, "3." + "14" * 100, "1e999"],
)
def test_an_answer_that_is_a_number_stays_as_it_is_written(write, number):
    write(f'{{"question": "a", "answer": {number}, "level": 2.50}}'.encode(), pair(2))
    (example,) = [e for part in load_source(mine()) for e in part if e.question == "a"]
    assert example.answer == number and example.metadata == {"level": 2.5}


def test_sizes_are_drawn_by_the_seed_and_the_rest_is_left(write):
    write(*(pair(i) for i in range(20)))
    lists = [load_source(mine(train_size=5, heldout_size=3, seed=seed)) for seed in (0, 0, 1)]
    assert lists[0] == lists[1] != lists[2]
    assert [len(part) for part in lists[0]] == [5, 3]


def test_a_file_of_its_own_for_held_out_questions(write):
    write(pair(1), pair(2))
    write(pair(2), pair(3), name="test.jsonl")
    train, heldout = load_source(mine(heldout_file="test.jsonl", heldout_size=2))
    assert [e.question for e in train] == ["q1"] and sorted(e.question for e in heldout) == ["q2", "q3"]
    # q2 is held out officially: it stays out of training even where it is not drawn.
    assert [e.question for e in load_source(mine(heldout_file="test.jsonl"))[0]] == ["q1"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [pair(1), {"question": "x"}],
            r"data.sources.m.file is 'mine.jsonl': row 2 has no field 'answer'; it has 'question'",
        ),
        ([pair(1), b"", b"{"], "row 3 is not JSON"),
        ([b"\xff\xfe"], "row 1 is not JSON in UTF-8"),
        ([pair(1), [1]], "row 2 is list; each row must be an object"),
        ([pair(1, answer="")], "row 1 has the answer ''; allowed is text that is not empty, or a number"),
        ([pair(1, answer=None)], "row 1 has the answer 'None'"),
        ([pair(1, answer=True)], "row 1 has the answer 'True'"),
        ([b'{"question": "q", "answer": NaN}'], "row 1 has the answer 'nan'"),
        ([b'{"question": "q", "answer": -Infinity}'], "row 1 has the answer '-inf'"),
        ([b'{"question": "q", "answer": "x\\ud800"}'], "row 1 has the answer .*, which holds half of a surrogate pair"),
        ([b'{"question": "q", "answer": "1", "n": ' + b"9" * 5000 + b"}"], "row 1 is not JSON in UTF-8 .*digits"),
        ([b'{"question": "q", "answer": ' + b"[" * 100_000 + b"}"], "row 1 is not JSON in UTF-8"),
        ([], "data.sources.m.file is 'mine.jsonl', which has no rows"),
        ([pair(1)], "data.sources.m.heldout_size is 1, and no question is left to train on"),
    ],
)
def test_bad_rows_are_refused_with_their_number(write, rows, message):
    write(*rows)
    with pytest.raises(ValueError, match=message):
        load_source(mine())


def test_bad_configuration_is_refused(write):
    with pytest.raises(ValueError, match=r"data.sources.m.file is 'mine.jsonl', which does not exist"):
        load_source(mine())
    write(pair(1), pair(2))
    with pytest.raises(ValueError, match=r"data.sources.m.heldout_file is 'no.jsonl', which does not exist"):
        load_source(mine(heldout_file="no.jsonl"))
    with pytest.raises(ValueError, match="each needs a field of its own"):
        mine(answer_field="question")


def pairs_file(**changes):
    return mine(question_field="prompt", answer_field="chosen", **changes)


def by_question(source):
    return {example.question: example for part in load_source(source) for example in part}


def test_pairs_keep_numbers_as_they_are_written_and_may_lack_an_answer(write):
    """What a pair lacks is counted where pairs are learnt from, so the file is not refused for it."""
    write(
        b'{"prompt": "a", "chosen": 0.50, "rejected": 7e-05}',
        {"prompt": "b", "chosen": " ", "rejected": "no"},
        {"prompt": "c", "chosen": "yes", "rejected": ""},
        {"prompt": "d", "chosen": "yes", "rejected": None},
    )
    found = by_question(pairs_file())
    assert [(found[q].answer, found[q].metadata["rejected"]) for q in "abcd"] == [
        ("0.50", "7e-05"),
        (" ", "no"),
        ("yes", ""),
        ("yes", None),
    ]


def test_dialogues_become_a_prompt_and_two_replies(write):
    """The last reply of each is cut off. Pairs that part before it keep the other dialogue, and are skipped later."""
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?"
    write(
        {"chosen": f"{start}\n\nAssistant: Because.", "rejected": f"{start}\n\nAssistant: No.\n"},
        {"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: y\n\nAssistant: b", "level": 1},
        {"prompt": "own", "chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "b"},
        {"chosen": "\n\nHuman: z\n\nAssistant:", "rejected": "\n\nHuman: z\n\nAssistant: b"},
    )
    found = by_question(pairs_file())
    first, parted, own, empty = (found[q] for q in (start.strip(), "Human: x", "own", "Human: z"))
    assert (first.answer, first.metadata) == ("Because.", {"rejected": "No."})
    assert parted.metadata == {"rejected": "b", "rejected_dialogue": "Human: y", "level": 1} and parted.answer == "a"
    assert own.answer == "\n\nHuman: x\n\nAssistant: a" and empty.answer == ""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "row 1 has no field 'prompt'; it has 'chosen', 'rejected'"),
        ({"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}, "row 1 has the prompt ''; allowed is text"),
        ({"prompt": "a", "chosen": "a", "rejected": "\ud800"}, "row 1 has the rejected .*half of a surrogate pair"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "row 1 has the chosen 'None'; allowed is text"),
        ({"prompt": "a", "chosen": "b", "rejected": True}, "row 1 has the rejected 'True'; allowed is text"),
    ],
)
def test_pairs_that_cannot_be_read_are_refused(write, row, message):
    write(row, {"prompt": "b", "chosen": "1", "rejected": "2"})
    with pytest.raises(ValueError, match=message):
        load_source(pairs_file())
