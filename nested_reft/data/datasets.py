r"""Published datasets: fetched from their official place, checked, and kept as ArrayRecord by TFDS.

Every dataset is read from its original files, whose SHA-256 stand here, and is written by a TFDS
builder with `file_format="array_record"`, which needs no TensorFlow. TFDS writes into a directory
of another name and renames it at the end, and a download is renamed only once its checksum is
right: what was written partly is never used.

To add one, write its reader and give it a place in `DATASETS`.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nested_reft.data.boxes import last_boxed
from nested_reft.data.dialogues import dialogue_pair
from nested_reft.paths import local_path

# The limit is on each read and not on the whole file, so slow connections still finish.
DOWNLOAD_TIMEOUT_SECONDS = 60


class Row(NamedTuple):
    """A row in the form that all datasets share; `reference` may be empty."""

    question: str
    answer: str
    reference: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class RawFile:
    """An original file: its name in a local folder, its official address, its SHA-256, and what is known of trouble."""

    name: str
    url: str
    sha256: str
    trouble: str = ""


@dataclass(frozen=True)
class Dataset:
    """A published dataset.

    Attributes:
        files: its original files.
        splits: `train` and, where there is an official held-out one, `test`. What has `test` alone is a benchmark:
            no run trains on it.
        read: from the folder of the original files and a split to its rows.
        version: raised whenever `read` gives other rows.
        homepage, license: for the curious.
    """

    files: tuple[RawFile, ...]
    splits: tuple[str, ...]
    read: Callable[[Path, str], Iterator[Row]]
    homepage: str
    license: str
    version: str = "1.0.0"


def _gsm8k(folder: Path, split: str) -> Iterator[Row]:
    """The solution without its calculator annotations is a reference: it ends in `#### answer`."""
    for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        solution, answer = row["answer"].rsplit("####", 1)
        # GSM8K marks calculator calls as <<48/2=24>>, which no model should learn to write.
        reference = re.sub(r"<<[^<>]*>>", "", solution) + f"#### {answer.strip()}"
        yield Row(row["question"], answer.strip().replace(",", ""), reference, {})


def _svamp(folder: Path, split: str) -> Iterator[Row]:
    for row in json.loads((folder / "SVAMP.json").read_text(encoding="utf-8")):
        body = row["Body"].strip()
        # Some bodies lack a final stop, and the question would run on from them.
        question = f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {row['Question'].strip()}"
        # Answers are stored as floats: 8.0 becomes 8, and a third keeps 15 digits.
        yield Row(question, f"{row['Answer']:.15g}", "", {"type": row["Type"], "equation": row["Equation"]})


def _math(folder: Path, split: str) -> Iterator[Row]:
    r"""The answer is what the solution boxes last; problems without a box have no checkable answer."""
    with tarfile.open(folder / "MATH.tar") as archive:
        for member in archive:
            # Problems lie at MATH/split/subject/number.json; everything else in the archive is left out.
            parts = Path(member.name).parts
            if not (member.isfile() and len(parts) == 4 and parts[1] == split and member.name.endswith(".json")):
                continue
            file = archive.extractfile(member)
            assert file is not None
            row = json.load(file)
            answer = last_boxed(row["solution"])
            if answer is not None:
                yield Row(row["problem"], answer, row["solution"], {"level": row["level"], "type": row["type"]})


def _math500(folder: Path, split: str) -> Iterator[Row]:
    for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        metadata = {"level": row["level"], "type": row["subject"], "id": row["unique_id"]}
        yield Row(row["problem"], row["answer"], row["solution"], metadata)


def _harmless(folder: Path, split: str) -> Iterator[Row]:
    """The dialogue up to its last reply is the question; the chosen reply is answer and reference."""
    with gzip.open(folder / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            pair = dialogue_pair(row["chosen"], row["rejected"])
            assert pair is not None  # the file is the published one
            question, chosen, metadata = pair
            yield Row(question, chosen, chosen, metadata)


_GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
_HH = "https://raw.githubusercontent.com/anthropics/hh-rlhf/master/harmless-base"
_HH_TEST = RawFile(
    "test.jsonl.gz", f"{_HH}/test.jsonl.gz", "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03"
)

DATASETS = {
    "gsm8k": Dataset(
        files=(
            RawFile(
                "train.jsonl",
                f"{_GSM8K}/train.jsonl",
                "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
            ),
            RawFile(
                "test.jsonl", f"{_GSM8K}/test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"
            ),
        ),
        splits=("train", "test"),
        read=_gsm8k,
        homepage="https://github.com/openai/grade-school-math",
        license="MIT",
    ),
    "svamp": Dataset(
        files=(
            RawFile(
                "SVAMP.json",
                "https://raw.githubusercontent.com/arkilpatel/SVAMP/main/SVAMP.json",
                "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e",
            ),
        ),
        splits=("train",),
        read=_svamp,
        homepage="https://github.com/arkilpatel/SVAMP",
        license="MIT",
    ),
    "math": Dataset(
        files=(
            RawFile(
                "MATH.tar",
                "https://people.eecs.berkeley.edu/~hendrycks/MATH.tar",
                "0fbe4fad0df66942db6c221cdcc95b298cc7f4595a2f0f518360cce84e90d9ac",
                "; the address is reported gone since January 2025: the hub has these questions as"
                " EleutherAI/hendrycks_math, and a source with a file reads them as JSONL",
            ),
        ),
        splits=("train", "test"),
        read=_math,
        homepage="https://github.com/hendrycks/math",
        license="MIT",
    ),
    # 500 of MATH's test questions (Lightman et al., 2023).
    "math500": Dataset(
        files=(
            RawFile(
                "test.jsonl",
                "https://media.githubusercontent.com/media/openai/prm800k/main/prm800k/math_splits/test.jsonl",
                "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
            ),
        ),
        splits=("test",),
        read=_math500,
        homepage="https://github.com/openai/prm800k",
        license="MIT",
    ),
    "hh_harmless_test": Dataset(
        files=(_HH_TEST,),
        splits=("train",),
        # Only the test pairs are read, and one split of them is divided by seed.
        read=lambda folder, split: _harmless(folder, "test"),
        homepage="https://github.com/anthropics/hh-rlhf",
        license="MIT",
    ),
}


def load_dataset(name: str, folder: str | None, field: str) -> dict[str, list[Row]]:
    """All rows of a dataset, by split, in their original order.

    Args:
        name: one of `DATASETS`.
        folder: where the original files lie; None downloads them from their official place.
        field: the source in the configuration, for messages.

    Returns:
        Split -> rows.

    Raises:
        ValueError: a file is missing, cannot be downloaded or is not the published one; or the
            prepared data was damaged.
        ImportError: tensorflow-datasets is not installed.
    """
    dataset = DATASETS[name]
    directory = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    builder = _builder(name, dataset, folder, directory, field)
    with contextlib.redirect_stdout(sys.stderr):  # TFDS prints; stdout belongs to the command's own result
        builder.download_and_prepare()
    return {split: _read_split(builder, split, field) for split in dataset.splits}


def _builder(name: str, dataset: Dataset, folder: str | None, directory: Path, field: str) -> Any:
    """The TFDS builder; its class is made here because TFDS is optional."""
    try:
        import array_record  # noqa: F401 - without it, TFDS asks for TensorFlow
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"{field} needs the package {error.name}; run: pip install array_record importlib_resources"
            " tensorflow-datasets"
        ) from error
    tfds.disable_progress_bar()
    text = tfds.features.Text()
    # The prefix keeps this data apart from what TFDS itself prepares under the same name.
    builder_name = f"nested_reft_{name}"

    # TFDS keeps a registry by class, and this one is made anew for each dataset.
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(dataset.version)
        name = builder_name

        def _info(self):
            features = tfds.features.FeaturesDict(dict.fromkeys(Row._fields, text))
            return tfds.core.DatasetInfo(
                builder=self,
                features=features,
                homepage=dataset.homepage,
                license=dataset.license,
                disable_shuffling=True,  # keeps the original order, so that rows can be named
            )

        def _split_generators(self, dl_manager):
            if folder is None:
                files = [download(file, directory / "downloads" / builder_name, field) for file in dataset.files]
            else:
                files = [check_local(file, local_path(folder), field) for file in dataset.files]
            # All files of a dataset lie in one folder.
            return {split: self._generate_examples(files[0].parent, split) for split in dataset.splits}

        def _generate_examples(self, folder, split):
            for index, row in enumerate(dataset.read(folder, split)):
                # Metadata differ from dataset to dataset, so every column is text.
                yield index, row._replace(metadata=json.dumps(row.metadata))._asdict()

    return Builder(data_dir=str(directory), file_format="array_record")


def _read_split(builder: Any, split: str, field: str) -> list[Row]:
    """The rows of a prepared split."""
    count = builder.info.splits[split].num_examples
    try:
        source = builder.as_data_source(split=split)
        rows = [source[index] for index in range(len(source))]
    except Exception as error:  # whatever the reader of a damaged file raises
        raise ValueError(_damaged(builder, field, f"cannot be read: {error}")) from None
    # A file that was cut off may read without any error.
    if len(rows) != count:
        raise ValueError(_damaged(builder, field, f"has {len(rows)} {split} rows instead of {count}"))
    texts = ({name: value.decode() for name, value in row.items()} for row in rows)
    return [Row(**(fields | {"metadata": json.loads(fields["metadata"])})) for fields in texts]


def _damaged(builder: Any, field: str, what: str) -> str:
    return f"{field}: the prepared data in '{builder.data_dir}' {what}; delete that directory, it is made anew"


def download(file: RawFile, directory: Path, field: str) -> Path:
    """The file in `directory`, fetched unless it is there already; it gets its name only when it is whole.

    Args:
        file: what to fetch.
        directory: where the file is kept; it is made where it does not exist.
        field: the source in the configuration, for messages.

    Returns:
        The file's path.

    Raises:
        ValueError: it cannot be fetched, or is not the published file.
    """
    target = directory / file.name
    # A file that an earlier run left counts only if it is whole.
    if target.is_file() and sha256(target) == file.sha256:
        return target
    directory.mkdir(parents=True, exist_ok=True)
    # Each download has a name of its own, so two processes may fetch the same file at once.
    handle, name = tempfile.mkstemp(dir=directory, prefix=f"{file.name}.partial-")
    partial = Path(name)
    try:
        try:
            with (
                os.fdopen(handle, "wb") as out,
                urllib.request.urlopen(file.url, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response,
            ):
                shutil.copyfileobj(response, out)
        except OSError as error:
            raise ValueError(
                f"{field}: the download of {file.url} failed ({error}); try again, or put '{file.name}' into a"
                f" folder and name it in {field}.folder{file.trouble}"
            ) from None
        _check_sha256(partial, file, f"the download of {file.url}", field)
        os.replace(partial, target)
    finally:
        # After the rename this name is gone, so only a failed download is removed.
        partial.unlink(missing_ok=True)
    return target


def check_local(file: RawFile, folder: Path, field: str) -> Path:
    """The file in a local folder.

    Args:
        file: what is looked for.
        folder: the user's folder of original files.
        field: the source in the configuration, for messages.

    Returns:
        The file's path.

    Raises:
        ValueError: it is not there, or not the published file.
    """
    path = folder / file.name
    if not path.is_file():
        raise ValueError(
            f"{field}.folder is '{folder}', which has no file '{file.name}'; get it from {file.url},"
            " or leave the folder out and it is downloaded"
        )
    _check_sha256(path, file, f"'{path}'", field)
    return path


def _check_sha256(path: Path, file: RawFile, what: str, field: str) -> None:
    found = sha256(path)
    if found != file.sha256:
        raise ValueError(
            f"{field}: {what} is not the published file: its SHA-256 is {found}, it should be {file.sha256};"
            " it was cut short or changed"
        )


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Args:
        path: the file to read, piece by piece.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
