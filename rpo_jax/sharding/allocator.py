"""The C library's allocator, where it is also that of the devices: on a CPU."""

import ctypes
import importlib.metadata
import importlib.util
import os

import jax

# M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD of glibc's malloc.h, each with its variable.
_KEEP = (
    (-8, 1, "MALLOC_ARENA_MAX"),
    (-4, 0, "MALLOC_MMAP_MAX_"),
    (-1, -1, "MALLOC_TRIM_THRESHOLD_"),
)


def keep_buffers() -> bool:
    """Tells glibc to keep the memory that this process was once given; for a program's first line.

    XLA's CPU backend takes the buffers of a step anew each time. glibc hands large ones back to
    the system, which clears every page of them once more: a fifth of a small step's time, see
    docs/speed.md. It counts only before jax starts its threads.

    Returns:
        Whether it was done: not where accelerators hold the buffers, where there is no glibc, or
        where the environment says how (`MALLOC_...`, see mallopt(3)).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    told = any(name in os.environ for *_, name in _KEEP)
    if mallopt is None or told or not _on_cpu():
        return False
    done = [mallopt(option, value) for option, value, _ in _KEEP]
    return all(done)


def _on_cpu() -> bool:
    """Whether jax will run on the CPU, told without starting it."""
    platforms: str | None = getattr(jax.config, "jax_platforms")  # noqa: B009 - not in its types
    if platforms:
        return platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not (plugins or importlib.util.find_spec("libtpu"))
