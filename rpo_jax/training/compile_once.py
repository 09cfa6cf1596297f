"""One compilation for all runs of a process that are the same program."""

import contextlib
import os
import tempfile
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

_FOLDER = "jax_compilation_cache_dir"
_CPU_DEVICES = "jax_num_cpu_devices"


@contextlib.contextmanager
def compile_once() -> Iterator[None]:
    """Within it a program is compiled once, however many runs trace it anew.

    It is jax's own cache of compiled programs, in a folder that is deleted in the end. Where one
    is set already (JAX_COMPILATION_CACHE_DIR), as on pods, that one serves and stays. Several CPU
    devices in one process get none.
    """
    if getattr(jax.config, _FOLDER) or _has_several_cpu_devices():
        yield
        return
    with tempfile.TemporaryDirectory(prefix="rpo_jax-compiled-") as folder:
        compilation_cache.reset_cache()
        with (
            _set(_FOLDER, folder),
            _set("jax_persistent_cache_min_compile_time_secs", 0.0),
        ):
            try:
                yield
            finally:
                compilation_cache.reset_cache()


def _has_several_cpu_devices() -> bool:
    """Whether this process was told to see more than one, found without starting a backend.

    Their programs can hang when they come out of the cache, since the devices then run independent
    collectives in different orders (seen with jaxlib 0.10.2 in 2 of 5 runs).
    """
    flags = os.environ.get("XLA_FLAGS", "")
    return "host_platform_device_count" in flags or getattr(jax.config, _CPU_DEVICES) > 1


@contextlib.contextmanager
def _set(name: str, value: str | float) -> Iterator[None]:
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)
