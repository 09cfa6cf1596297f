"""Memory that was given back to the C library: kept where that was asked for."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told anything"
)

MIB = 1 << 20
TAKE_AND_FREE = """
import os
import sys
import numpy as np
from rpo_jax.sharding.allocator import keep_buffers

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

done = keep_buffers() if sys.argv[1] == "keep" else None
before = resident()
array = np.ones(1 << 28, np.uint8)
del array
print(done, resident() - before)
"""


def measure(*, keep: bool, **environment: str) -> tuple[str, int]:
    """What `keep_buffers` said, and the bytes left of an array of 256 MiB after its end."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    argv = [sys.executable, "-c", TAKE_AND_FREE, "keep" if keep else "leave"]
    env = {**clean, "JAX_PLATFORMS": "cpu", **environment}
    found = subprocess.run(argv, env=env, capture_output=True, text=True, check=True, timeout=900)
    done, left = found.stdout.split()
    return done, int(left)


def test_memory_is_kept_where_the_cpu_is_the_device() -> None:
    assert measure(keep=False)[1] < 64 * MIB
    done, left = measure(keep=True)
    assert done == "True"
    assert left > 192 * MIB


@pytest.mark.parametrize(
    "environment", [{"JAX_PLATFORMS": "tpu"}, {"MALLOC_TRIM_THRESHOLD_": "131072"}]
)
def test_nothing_is_changed_beside_an_accelerator_or_a_users_word(
    environment: dict[str, str],
) -> None:
    done, left = measure(keep=True, **environment)
    assert done == "False"
    assert left < 64 * MIB
