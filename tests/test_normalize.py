"""Unit directions: `normalize` of the transformation, against norms taken by numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import partnewton as pn
from partnewton import partitions, rules

PARAMS = {"a": jnp.array([3.0, 4.0]), "b": {"c": jnp.array([[1.0], [-2.0]])}}
LABELS = {
    "per_tensor": (partitions.per_tensor, [[0, 1], [2, 3]]),
    "whole": (partitions.whole, [[0, 1, 2, 3]]),
    "inside a leaf": (
        {"a": np.array([0, 1]), "b": {"c": np.array([[1], [1]])}},
        [[0], [1, 2, 3]],
    ),
    "frozen": ({"a": "a", "b": partitions.FROZEN}, [[0, 1]]),
}


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def update(direction, params=PARAMS, **kwargs):
    """The outgoing updates and the state, for a loss whose rates are all alike."""

    def loss(p):
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(p))

    tx = pn.scale_by_partition_newton(rules.newton(nonnegative=False), **kwargs)
    return tx.update(direction, tx.init(params), params, value_fn=loss)


def direction(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), PARAMS)


@pytest.mark.parametrize("normalize", ["norm", "rms"])
@pytest.mark.parametrize("case", LABELS)
def test_rates_are_lengths_of_steps_along_unit_directions(case, normalize):
    labels, subsets = LABELS[case]
    updates, state = update(direction(), param_labels=labels, normalize=normalize)
    outgoing = flat(updates)
    for places, eta in zip(subsets, state.learning_rates, strict=True):
        length = np.linalg.norm(outgoing[places])
        length /= np.sqrt(len(places)) if normalize == "rms" else 1
        np.testing.assert_allclose(length, abs(eta), rtol=1e-5)
    frozen = np.setdiff1d(np.arange(4), np.concatenate(subsets))
    np.testing.assert_array_equal(outgoing[frozen], 0.0)


@pytest.mark.parametrize("normalize", ["norm", "rms"])
def test_newton_steps_do_not_depend_on_the_norm_of_the_direction(normalize):
    plain, _ = update(direction())
    unit, _ = update(jax.tree.map(lambda u: 1e4 * u, direction()), normalize=normalize)
    np.testing.assert_allclose(flat(unit), flat(plain), rtol=1e-5)


def test_a_subset_without_direction_stays_where_it_is():
    updates, state = update({**direction(), "a": jnp.zeros(2)}, normalize="rms")
    np.testing.assert_array_equal(updates["a"], 0.0)
    assert state.learning_rates[0] == 0
    assert state.notfinite_count == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_norms_are_summed_in_float32_and_dtypes_stay(dtype):
    params = {"w": jnp.full(4096, 300.0, dtype)}  # the sum overflows float16
    updates, state = update(params, params, normalize="norm")
    assert updates["w"].dtype == dtype
    length = np.linalg.norm(np.asarray(updates["w"], np.float32))
    np.testing.assert_allclose(length, state.learning_rates[0], rtol=1e-2)


def test_another_name_is_one_clear_error():
    with pytest.raises(ValueError, match="normalize must be 'norm', 'rms' or None"):
        pn.scale_by_partition_newton(normalize="max")
