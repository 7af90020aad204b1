"""Process-wide set-up of jax: compilation cache, number formats, devices, memory on the CPU."""

import ctypes
import os

import jax

from sit_jax.errors import UserError, check, unknown_name

# How to install what drives an NVIDIA GPU; for messages.
INSTALL_CUDA = 'pip install -e ".[cuda13]" (with a driver older than 580: ".[cuda12]")'
_PLATFORMS = ("cpu", "gpu", "cuda", "rocm", "tpu")
# Parameters of mallopt, from malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
# Options of jax that change the numbers a program computes, each with the value used here. They can
# be set by environment variables of the same names.
_NUMERICS = {
    "jax_enable_x64": False,
    "jax_threefry_partitionable": True,
    "jax_default_prng_impl": "threefry2x32",
    "jax_random_seed_offset": 0,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
}


def changed_numerics() -> dict[str, object]:
    """Return {option: value used here} of the options of jax that are set to another value."""
    return {
        name: value
        for name, value in _NUMERICS.items()
        if getattr(jax.config, name, value) != value  # an option may be gone in a newer jax
    }


def fix_numerics() -> str | None:
    """Undo options of jax that would change results; return a warning that names them, or None.

    Results depend on the config, the seed and the data, not on the environment.
    """
    changed = changed_numerics()
    for name, value in changed.items():
        jax.config.update(name, value)
    names = ", ".join(name.upper() for name in changed)
    return f"warning: ignored, as results must not depend on it: {names}" if changed else None


def use_compilation_cache() -> None:
    """Keep compiled programs for the next start.

    They go to $JAX_COMPILATION_CACHE_DIR, or to the user's cache folder.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache_folder(), "xla"))


def cache_folder() -> str:
    """Return this project's folder in the user's cache folder; it need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "sit_jax")


def keep_host_memory() -> None:
    """Let glibc keep freed memory, so that a step on the CPU reuses that of the step before.

    XLA allocates its temporaries in each step as one large block. By default glibc takes a block of
    that size from the system and returns it at once: 190,000 page faults in a SiT-S/2 step of batch
    8, a twelfth of its time. With the two thresholds below it keeps the block in its heap. Each
    thread has a heap of its own, so the allocation has to happen in the main thread, which
    synchronous dispatch ensures.

    Call it after `hosts.join` and before anything else that creates the devices' client, which this
    does. Raises `UserError` if jax finds none of the devices that $JAX_PLATFORMS names.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # before the CPU's client exists
    backend = _start_backend()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt and backend == "cpu":
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _start_backend() -> str:
    """Start jax's devices and return the name of their platform."""
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # jax's error for cuda is a bare assertion
        reason = " ".join(str(error).split()) or "no such device"
        platforms = jax.config.jax_platforms  # type: ignore[attr-defined]  # defined at run time
        check(platforms, f"jax cannot start the devices of this machine: {reason}")
        for name in platforms.split(","):
            if name not in _PLATFORMS:
                raise unknown_name("name in JAX_PLATFORMS", name, _PLATFORMS) from error
        raise UserError(
            f"JAX_PLATFORMS={platforms} names devices that jax does not find here ({reason}); "
            f'install what drives them: {INSTALL_CUDA} or ".[tpu]"; or unset JAX_PLATFORMS to '
            "take what is there"
        ) from error
