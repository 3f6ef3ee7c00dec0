"""How the tests compile programs, which costs more than all that they do with them."""

import os
import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

# XLA's CPU backend compiles four times as fast with these. They are about the machine
# code and the way it is made: which operations a program has does not depend on them.
OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# From 0.11 on, XLA has no other way, and refuses to start with this option.
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    OPTIONS["xla_cpu_use_fusion_emitters"] = False
LARGEST_CACHE = 2**30  # bytes


def compile_quickly() -> None:
    """Sets the options for this process and for those that it starts.

    It does nothing where XLA_FLAGS is set: ``XLA_FLAGS= pytest`` tests programs as XLA
    compiles them for users. Nor does it where jax has a plugin for an accelerator, as
    compilers for accelerators read these options too. Call it before jax is imported.
    """
    if find_spec("jax_plugins"):
        return
    flags = [f"--{name}={str(value).lower()}" for name, value in OPTIONS.items()]
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))


def compile_once(folder: Path) -> None:
    """Caches compiled programs, for this process and for those that it starts.

    It does nothing where JAX_COMPILATION_CACHE_DIR is set. Call it before jax is
    imported.

    Args:
      folder: an existing folder for the cache. A cache that has become too large, with
        programs of many earlier versions of the code, is deleted first.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        if sum(path.stat().st_size for path in folder.iterdir()) > LARGEST_CACHE:
            shutil.rmtree(folder)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
