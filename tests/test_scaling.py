"""The scaling benchmark: its cases are what they say, and its table is complete."""

import jax
import pytest
from support.selection import some

from benchmarks import scaling


@pytest.mark.parametrize(
    "case",
    some([*scaling.SUBSETS[:3], *scaling.PARAMETERS[:3]], default=scaling.SUBSETS[:1]),
)
def test_networks_have_the_size_of_their_case(case):
    params, loss, x = scaling.network(case)
    leaves = jax.tree.leaves(params)
    assert len(leaves) == case.subsets
    assert sum(leaf.size for leaf in leaves) == pytest.approx(case.parameters, rel=0.05)
    assert x.shape[0] == case.batch
    assert jax.eval_shape(loss, params, x).shape == ()


def test_a_row_is_measured_and_printed():
    row = scaling.measure(scaling.Case(2, 100, 4), "jvp_of_grad", repeats=2)
    assert row.gradient > 0
    assert row.second > 0
    assert row.third > 0
    assert row.third_bytes >= row.second_bytes > 0
    lines = scaling.table([row]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[-1].startswith("| 2 | 1.1e2 | 4 | ")


def test_what_needs_too_much_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(scaling, "MAX_BYTES", 10.0)
    assert scaling._timed(lambda x: x @ x.T, 2, jax.numpy.ones((8, 8))) is None
