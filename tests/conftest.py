"""What all tests share: eight CPU devices, checked shapes, and where the outside files are."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings
from jaxtyping import install_import_hook

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared" / "data"
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "alone")


def _set_up_jax() -> None:
    """Eight CPU devices in this process and in every command that a test starts.

    No compilation cache: programs of several CPU devices can hang when they come out of it (see
    `rpo_jax.training.compile_once`; none of 6 runs did without the cache).
    """
    if "jax" in sys.modules:
        raise RuntimeError("jax was imported before tests/conftest.py could set up its devices")
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        # Eight devices share few cores: a slow collective is not a stuck one.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8"
        " --xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
        " --xla_cpu_collective_call_terminate_timeout_seconds=600",
    }


_set_up_jax()

# The same examples in each run, however slow the machine is.
settings.register_profile("rpo_jax", deadline=None, derandomize=True, database=None)
settings.load_profile("rpo_jax")

# Annotations such as Float[Array, "B T D"] are checked at every call of a test, and nowhere else.
# Under jit they are checked while tracing, so compiled code pays nothing.
install_import_hook("rpo_jax", "shape_checks.check")


@pytest.fixture(scope="session")
def igakuqa_dir() -> Path:
    """The folder with the exam years 2018 to 2022, from IGAKUQA_DIR or beside the repository."""
    return _outside("IGAKUQA_DIR", SHARED / "igakuqa")


@pytest.fixture(scope="session")
def qwen_tokenizer() -> Path:
    """The tokenizer.json of Qwen2.5, from QWEN_TOKENIZER or beside the repository."""
    return _outside("QWEN_TOKENIZER", SHARED / "qwen2.5-tokenizer" / "tokenizer.json")


def _outside(variable: str, beside: Path) -> Path:
    """A path outside the repository: skips where there is none, fails where its name is wrong."""
    named = os.environ.get(variable)
    path = Path(named) if named else beside
    if not path.exists():
        if named:
            pytest.fail(f"{variable}={named}: no such file or folder")
        pytest.skip(f"{variable} is not set and {beside} does not exist")
    return path


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds a costly folder once a session, for all workers: `make_once("tiny_cpt", build)`.

    `build(folder)` fills an empty folder; whoever comes later gets the same one and only reads it.
    """
    own = tmp_path_factory.getbasetemp()
    session = own if WORKER == "alone" else own.parent

    def make(name: str, build: Callable[[Path], object]) -> Path:
        folder, done = session / f"shared-{name}", session / f"shared-{name}.done"
        with FileLock(session / f"shared-{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                build(folder)
                done.touch()
        return folder

    return make
