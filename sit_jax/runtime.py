"""Process-wide set-up of jax: the compilation cache, and memory on the CPU."""

import ctypes
import os

import jax

# Parameters of mallopt, from malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def use_compilation_cache() -> None:
    """Keep compiled programs for the next start.

    They go to $JAX_COMPILATION_CACHE_DIR, or to the user's cache folder.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "sit_jax", "xla"))


def keep_host_memory() -> None:
    """Let glibc keep freed memory, so that a step on the CPU reuses that of the step before.

    XLA allocates its temporaries in each step as one large block. By default glibc takes a block of
    that size from the system and returns it at once: 190,000 page faults in a SiT-S/2 step of batch
    8, a twelfth of its time. With the two thresholds below it keeps the block in its heap. Each
    thread has a heap of its own, so the allocation has to happen in the main thread, which
    synchronous dispatch ensures.

    Call it after `hosts.join` and before anything else that creates the devices' client.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # before the CPU's client exists
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt and jax.default_backend() == "cpu":
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
