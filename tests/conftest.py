"""What all tests share: how programs are compiled, and products in full precision."""

import copy
import gc

import pytest
from support.compiling import compile_once, compile_quickly


def pytest_configure(config):
    """Programs are compiled quickly, and not again until they change.

    They are kept in pytest's cache, for the workers of pytest-xdist, for the processes
    that tests start, and for the next run. ``pytest --cache-clear`` deletes them.
    """
    # Tracing makes many objects that stay. Looking for garbage among them as often as
    # Python does by default takes a tenth of the time.
    gc.set_threshold(50_000, 50, 100)
    compile_quickly()
    if config.pluginmanager.hasplugin("cacheprovider"):
        compile_once(config.cache.mkdir("compiled"))


@pytest.fixture(autouse=True, scope="session")
def _products_are_in_full_precision():
    """An accelerator rounds the factors of float32 products by default, a CPU not."""
    import jax

    if jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_are_dropped():
    """Thousands of them in one process exceed the memory maps that Linux allows."""
    import jax

    yield
    jax.clear_caches()


@pytest.fixture
def registry_is_restored():
    """Primitives that a test registers with the engine are removed after it."""
    from partnewton.engines.adjoint.registry import TABLES

    tables = TABLES._asdict()
    before = copy.deepcopy(tables)
    yield
    for name, table in tables.items():
        table.clear()
        table.update(before[name])
