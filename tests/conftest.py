"""What all tests share."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_are_dropped():
    """Thousands of them in one process exceed the memory maps that Linux allows."""
    yield
    jax.clear_caches()
