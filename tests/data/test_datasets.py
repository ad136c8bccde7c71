"""Published datasets: fetched, checked, prepared and read; and never used when written partly."""

import dataclasses
import hashlib
import http.server
import json
import sys
import tarfile
import threading

import pytest

from nested_reft.data import datasets
from nested_reft.data.boxes import boxed, last_boxed
from nested_reft.data.datasets import DATASETS, Dataset, RawFile, download, load_dataset
from nested_reft.data.sources import DatasetSource, load_source
from tests.shared_data import original_files

pytest.importorskip("tensorflow_datasets", reason="needs the optional package tensorflow-datasets")

PAIRS = {"train": [["1+1", "2"], ["1+2", "3"], ["1+1", "2"], ["2+2", "4"]], "test": [["2+2", "4"], ["3+3", "6"]]}


@pytest.fixture(autouse=True)
def data_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


@pytest.fixture
def website(tmp_path):
    """A folder served over HTTP, and its address."""
    folder = tmp_path / "website"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def pairs(website, monkeypatch):
    """A dataset `pairs`, published on the website as one JSON file."""
    folder, address = website
    content = json.dumps(PAIRS).encode()
    (folder / "pairs.json").write_bytes(content)

    def read(folder, split):
        for question, answer in json.loads((folder / "pairs.json").read_text())[split]:
            yield datasets.Row(question, answer, "", {"digits": 2})

    file = RawFile("pairs.json", f"{address}/pairs.json", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(DATASETS, "pairs", Dataset((file,), ("train", "test"), read, "here", "none"))
    return folder


def source(**changes):
    return DatasetSource(
        **({"name": "s", "dataset": "pairs", "train_size": None, "heldout_size": 2, "seed": 0} | changes)
    )


def test_download_prepare_and_read_without_tensorflow(pairs, caplog):
    train, heldout = load_source(source())
    # 1+1 is there twice, and 2+2 is held out: both are removed from training, and reported.
    assert sorted(e.question for e in train) == ["1+1", "1+2"]
    assert sorted(e.question for e in heldout) == ["2+2", "3+3"]
    assert train[0].metadata == {"digits": 2} and train[0].reference is None
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("nested_reft")]
    assert messages == [
        "source 's': 1 train rows removed, because they ask what an earlier one asks; the first is row 3: '1+1'",
        "source 's': 1 train rows removed, because they are held out as well; the first is row 4: '2+2'",
    ]
    assert "tensorflow" not in sys.modules


def test_prepared_data_is_used_again_and_the_original_file_is_not_needed(pairs):
    first = load_source(source())
    (pairs / "pairs.json").unlink()
    assert load_source(source()) == first
    assert load_source(source(folder="/nowhere")) == first


def test_a_local_folder_stands_in_for_the_download(pairs, tmp_path):
    local = tmp_path / "local"
    local.mkdir()
    with pytest.raises(ValueError, match=r"data.sources.s.folder is '.*local', which has no file 'pairs.json'; get it"):
        load_source(source(folder=str(local)))
    (pairs / "pairs.json").rename(local / "pairs.json")
    assert len(load_source(source(folder=str(local)))[0]) == 2


def test_a_changed_file_is_refused_and_nothing_of_it_stays(pairs, tmp_path, data_directory):
    whole = (pairs / "pairs.json").read_bytes()
    (pairs / "pairs.json").write_bytes(whole[:-1])
    with pytest.raises(
        ValueError, match=r"data.sources.s: the download of http.* is not the published file: its SHA-256"
    ):
        load_source(source())
    with pytest.raises(ValueError, match=r"data.sources.s: '.*pairs.json' is not the published file"):
        load_source(source(folder=str(pairs)))
    assert [path for path in data_directory.rglob("*") if path.is_file()] == []
    (pairs / "pairs.json").write_bytes(whole)
    assert len(load_source(source())[0]) == 2


def test_the_trouble_with_an_address_is_said(pairs, monkeypatch):
    (pairs / "pairs.json").unlink()
    (file,) = DATASETS["math"].files
    assert "gone since January 2025" in file.trouble and "EleutherAI/hendrycks_math" in file.trouble
    gone = dataclasses.replace(file, url=(pairs / "pairs.json").as_uri())
    with pytest.raises(ValueError, match=r"x: the download .*name it in x.folder; the address is reported gone"):
        download(gone, pairs, "x")


def test_a_failing_download_is_refused_with_what_to_do(pairs):
    (pairs / "pairs.json").unlink()
    with pytest.raises(ValueError, match=r"the download of http.* failed \(.*404.*put 'pairs.json' into a folder"):
        load_source(source())


def test_a_partial_download_is_never_taken_for_the_file(pairs, data_directory):
    downloads = data_directory / "downloads" / "nested_reft_pairs"
    downloads.mkdir(parents=True)
    (downloads / "pairs.json").write_bytes(b'{"train": [')
    assert len(load_source(source())[0]) == 2


def test_an_interrupted_preparation_is_never_used(pairs, monkeypatch):
    dataset = DATASETS["pairs"]

    def interrupted(folder, split):
        yield from list(dataset.read(folder, split))[:1]
        raise KeyboardInterrupt

    monkeypatch.setitem(DATASETS, "pairs", dataclasses.replace(dataset, read=interrupted))
    with pytest.raises(KeyboardInterrupt):
        load_source(source())
    monkeypatch.setitem(DATASETS, "pairs", dataset)
    assert [len(rows) for rows in load_dataset("pairs", None, "f").values()] == [4, 2]


def test_prepared_data_with_rows_missing_is_refused(pairs, data_directory):
    load_source(source())
    (train,), (test,) = (list(data_directory.rglob(f"*-{split}.array_record*")) for split in ("train", "test"))
    train.write_bytes(test.read_bytes())  # a whole file, but of 2 rows instead of 4
    with pytest.raises(ValueError, match=r"the prepared data in '.*' .*; delete that directory, it is made anew"):
        load_source(source())


def test_damaged_prepared_data_is_refused(pairs, data_directory):
    load_source(source())
    (damaged,) = data_directory.rglob("*-train.array_record*")
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"the prepared data in '.*' .*; delete that directory, it is made anew"):
        load_source(source())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "gsm9k"}, "data.sources.s.dataset is 'gsm9k'; allowed are gsm8k, "),
        ({"train_size": 0}, "data.sources.s.train_size is 0; allowed is 1 or more"),
        ({"heldout_size": 0}, "data.sources.s.heldout_size is 0; allowed is 1 or more"),
        ({"seed": -1}, "data.sources.s.seed is -1; allowed is 0 or more"),
        ({"heldout_size": 3}, "data.sources.s.heldout_size is 3; there are 2 distinct rows"),
        ({"train_size": 3}, "data.sources.s.train_size is 3; 2 distinct rows are left beside the held-out ones"),
    ],
)
def test_bad_configuration_is_refused(pairs, changes, message):
    with pytest.raises(ValueError, match=message):
        load_source(source(**changes))


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record"])
def test_missing_package_says_what_to_install(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"data.sources.s needs .*{package}.*pip install array_record"):
        load_source(source(dataset="gsm8k"))


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{7}", "7"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\fbox{3}", "3"),
        (r"so $\boxed 9$.", "9"),
        (r"\boxed{7", None),
        (r"\boxed{}", None),
        ("7", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def test_boxes_are_read_in_one_pass_outermost_only():
    assert boxed(r"\boxed{a \boxed{b}} \boxed{\{1, 2\}} } \boxed{c") == [r"a \boxed{b}", r"\{1, 2\}"]
    assert boxed(r"\boxed{" * 100_000 + "7" + "}") == ["7"]


def test_math_is_read_from_its_archive(tmp_path):
    """The published archive is too large to ship: its layout, with two problems, one of them without a box."""
    for split, name, solution in (
        ("train", "1", r"\boxed{\frac{1}{2}}"),
        ("train", "2", "none"),
        ("test", "3", r"\boxed{3}"),
    ):
        path = tmp_path / "MATH" / split / "algebra" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"problem": f"p{name}", "solution": solution, "level": "Level 1", "type": "Algebra"})
        )
    with tarfile.open(tmp_path / "MATH.tar", "w") as archive:
        archive.add(tmp_path / "MATH", "MATH")
    (row,) = DATASETS["math"].read(tmp_path, "train")
    assert row == ("p1", r"\frac{1}{2}", r"\boxed{\frac{1}{2}}", {"level": "Level 1", "type": "Algebra"})
    assert [row.question for row in DATASETS["math"].read(tmp_path, "test")] == ["p3"]


def test_gsm8k_svamp_and_preference_pairs():
    train, heldout = load_source(DatasetSource("g", "gsm8k", None, 1319, 0, original_files("gsm8k")))
    assert (len(train), len(heldout)) == (7473, 1319)
    solutions = [(e.answer, e.reference) for e in heldout[:50] if e.reference and "," not in e.reference]
    assert len(solutions) > 10
    assert all("<<" not in solution and solution.endswith(f"#### {answer}") for answer, solution in solutions)
    train, heldout = load_source(DatasetSource("s", "svamp", None, 100, 0, original_files("svamp")))
    assert (len(train), len(heldout)) == (900, 100)
    assert {e.answer for e in train + heldout} >= {"51", "1"}
    train, heldout = load_source(DatasetSource("h", "hh_harmless_test", None, 100, 0, original_files("hh_harmless")))
    assert (len(train), len(heldout)) == (2212, 100)  # two prompts have two pairs each
    for pair in heldout:
        assert pair.question.startswith("Human:") and pair.answer == pair.reference != pair.metadata["rejected"]
