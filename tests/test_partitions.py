"""Partitions: which entry belongs to which subset, and what the subsets are called."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import partnewton as pn
from partnewton import partitions
from partnewton.partitions import FROZEN, partition_of


def network():
    return {
        "embedding": jnp.ones((4, 2)),
        "layers": [
            {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))},
            {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))},
        ],
        "scale": jnp.ones(()),
    }


NETWORK_NAMES = (
    "embedding",
    "layers/0/bias",
    "layers/0/kernel",
    "layers/1/bias",
    "layers/1/kernel",
    "scale",
)


def numbers(params, param_labels):
    """The number of the subset of each entry, as a list of nested lists."""
    leaves = jax.tree.leaves(params)
    labels = partition_of(params, param_labels).labels
    return [
        np.broadcast_to(label, np.shape(leaf)).tolist()
        for label, leaf in zip(labels, leaves, strict=True)
    ]


# --- Labels of every kind ------------------------------------------------------------


def test_each_leaf_is_a_subset_by_default():
    assert pn.subset_names(network()) == NETWORK_NAMES


def test_equal_labels_form_one_subset():
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}
    labels = {"a": "outer", "b": "inner", "c": "outer"}
    assert pn.subset_names(params, labels) == ("outer", "inner")
    assert numbers(params, labels) == [[0, 0], [1, 1], [0, 0]]


def test_a_label_covers_all_leaves_below_it():
    labels = {"embedding": "in", "layers": ["first", "second"], "scale": "in"}
    assert pn.subset_names(network(), labels) == ("in", "first", "second")
    assert partition_of(network(), labels).labels == (0, 1, 1, 2, 2, 0)
    assert pn.subset_names(network(), 7) == ("7",)


def test_a_function_of_the_parameters_makes_labels():
    def by_rank(params):
        return jax.tree.map(lambda leaf: f"rank {leaf.ndim}", params)

    names = pn.subset_names(network(), by_rank)
    assert names == ("rank 2", "rank 1", "rank 0")


def test_integers_are_labels_and_need_not_be_consecutive():
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}
    labels = {"a": 40, "b": np.int64(-3), "c": 40}
    assert pn.subset_names(params, labels) == ("40", "-3")
    assert partition_of(params, labels).labels == (0, 1, 0)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_an_array_of_labels_splits_a_leaf(array):
    params = {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}
    labels = {"bias": "b", "kernel": array([[5, 5], [2, 5], [2, 2]])}
    assert pn.subset_names(params, labels) == ("b", "kernel[2]", "kernel[5]")
    assert numbers(params, labels) == [[0, 0], [[2, 2], [1, 2], [1, 1]]]


def test_an_array_of_labels_broadcasts_to_its_leaf():
    params = {"kernel": jnp.ones((3, 2))}
    rows, columns = np.arange(3)[:, None], np.arange(2)
    assert numbers(params, {"kernel": rows}) == [[[0, 0], [1, 1], [2, 2]]]
    assert numbers(params, {"kernel": columns}) == [[[0, 1], [0, 1], [0, 1]]]


@pytest.mark.parametrize("label", [np.array(3), np.int32(3), jnp.array(3), 3])
def test_a_zero_dimensional_array_is_an_integer(label):
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    labels = {"a": label, "b": np.array([3, 4])}
    assert pn.subset_names(params, labels) == ("3", "b[4]")
    assert numbers(params, labels) == [[0, 0], [0, 1]]


def test_a_label_in_the_arrays_of_two_leaves_is_one_subset():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    labels = {"a": np.array([0, 1]), "b": np.array([1, 2, 1])}
    assert pn.subset_names(params, labels) == ("a[0]", "1", "b[2]")
    assert numbers(params, labels) == [[0, 1], [1, 2, 1]]


def test_an_array_of_one_label_is_as_good_as_the_label():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
    labels = {"a": np.full((2, 2), 6), "b": 6}
    assert partition_of(params, labels).labels == (0, 0)


def test_a_lone_array_has_a_name_too():
    assert pn.subset_names(jnp.ones(3)) == ("params",)
    assert pn.subset_names(jnp.ones(3), np.array([1, 0, 1])) == (
        "params[0]",
        "params[1]",
    )


def test_labels_can_be_computed_with_jax_under_jit():
    def rows(params):
        return jax.tree.map(lambda leaf: jnp.arange(len(leaf))[:, None] % 2, params)

    @jax.jit
    def sums(params):
        leaves = jax.tree.leaves(params)
        return partition_of(params, rows).inner(leaves, leaves)

    kernel = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    np.testing.assert_array_equal(sums({"kernel": kernel}), [66.0, 25.0])


# --- Frozen entries ------------------------------------------------------------------


def test_a_frozen_leaf_is_in_no_subset():
    labels = {"a": FROZEN, "b": "b", "c": np.array([FROZEN, FROZEN])}
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}
    partition = partition_of(params, labels)
    assert partition.names == ("b",)
    assert partition.labels == (FROZEN, 0, FROZEN)
    assert partition.active == (1,)
    assert partition.of_active().labels == (0,)


def test_single_entries_can_be_frozen():
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    labels = {"a": np.array([0, FROZEN, 1]), "b": "b"}
    partition = partition_of(params, labels)
    assert partition.names == ("a[0]", "a[1]", "b")
    assert partition.labels[0].tolist() == [0, FROZEN, 1]
    assert partition.active == (0, 1)


def test_leaves_of_any_type_can_be_frozen():
    params = {
        "a": jnp.ones(2),
        "complex": jnp.ones(2, jnp.complex64),
        "count": jnp.int32(3),
        "flag": np.array([True]),
        "key": jax.random.key(0),
    }
    labels = jax.tree.map(lambda _: FROZEN, params) | {"a": "a"}
    assert pn.subset_names(params, labels) == ("a",)


# --- Places without entries ----------------------------------------------------------


READY_MADE = [
    partitions.per_tensor,
    partitions.whole,
    partitions.weights_biases,
    partitions.per_layer,
    partitions.per_element,
    partitions.by_path([("", "rest")]),
    partitions.blocks(2),
    partitions.alternate(2),
]


@pytest.mark.parametrize("labels", READY_MADE)
@pytest.mark.parametrize("hollow", [None, optax.MaskedNode(), (), {}])
def test_nodes_without_leaves_are_ignored(labels, hollow):
    params = {"a": jnp.ones((2, 3)), "b": {"bias": jnp.ones(3), "w": jnp.ones(2)}}
    holey = params | {"hollow": hollow, "b": params["b"] | {"hollow": hollow}}
    plain, found = partition_of(params, labels), partition_of(holey, labels)
    assert found.names == plain.names
    jax.tree.map(np.testing.assert_array_equal, found.labels, plain.labels)


@pytest.mark.parametrize("hollow", [None, optax.MaskedNode(), {}])
@pytest.mark.parametrize(
    "labels",
    [
        {"a": "x", "b": None, "c": {"d": None}},
        {"a": "x"},
        {"a": "x", "b": "ignored", "c": "ignored"},
        {"a": "x", "b": {"kernel": "ignored"}, "c": {"d": FROZEN}},
    ],
)
def test_labels_of_nodes_without_leaves_are_ignored(hollow, labels):
    params = {"a": jnp.ones(2), "b": hollow, "c": {"d": hollow}}
    assert pn.subset_names(params, labels) == ("x",)
    with pytest.raises(ValueError, match="'e' matches no leaf"):
        pn.subset_names(params, labels | {"e": "y"})


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
@pytest.mark.parametrize("labels", READY_MADE)
def test_a_leaf_without_entries_is_in_no_subset(labels, shape):
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    empty = {"0": jnp.ones(shape), "z": jnp.ones(shape, jnp.int32)}
    plain, found = partition_of(params, labels), partition_of(params | empty, labels)
    assert found.size == plain.size
    assert found.labels[0] == found.labels[-1] == FROZEN
    jax.tree.map(np.testing.assert_array_equal, found.labels[1:-1], plain.labels)
    assert np.all(found.counts(jax.tree.leaves(params | empty)) > 0)


def test_a_leaf_without_entries_may_have_labels_of_any_kind():
    params = {"a": jnp.ones(2), "b": jnp.ones((3, 0))}
    for label in ("a", "b", 7, FROZEN, np.arange(3)[:, None], np.zeros((3, 0), int)):
        assert pn.subset_names(params, {"a": "a", "b": label}) == ("a",)
    with pytest.raises(ValueError, match="does not broadcast"):
        pn.subset_names(params, {"a": "a", "b": np.arange(3)})


def test_parameters_without_entries_raise():
    with pytest.raises(ValueError, match="params has only leaves without entries"):
        pn.subset_names({"a": jnp.ones(0)})
    with pytest.raises(ValueError, match="only frozen leaves and leaves without entr"):
        pn.subset_names({"a": jnp.ones(0), "b": jnp.ones(1)}, {"a": "a", "b": FROZEN})


# --- Containers ----------------------------------------------------------------------


class _LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1, name="tail")(linen.Dense(3, name="head")(x))


class _NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.head = nnx.Linear(2, 3, rngs=rngs)
        self.tail = nnx.Linear(3, 1, rngs=rngs)


MODEL_NAMES = ("head/bias", "head/kernel", "tail/bias", "tail/kernel")


def containers():
    linen_params = _LinenModel().init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    state = nnx.state(_NnxModel(nnx.Rngs(0)), nnx.Param)
    abstract = nnx.eval_shape(lambda: _NnxModel(nnx.Rngs(0)))
    return {
        "nested dict": jax.tree.map(np.asarray, dict(linen_params)),
        "linen": linen_params,
        "nnx.State": state,
        "pure dict of nnx.State": nnx.to_pure_dict(state),
        "abstract nnx.State": nnx.state(abstract, nnx.Param),
        "ShapeDtypeStructs": jax.eval_shape(lambda tree: tree, linen_params),
    }


@pytest.mark.parametrize("container", sorted(containers()))
def test_containers_of_the_same_parameters_give_the_same_partition(container):
    params = containers()[container]
    assert pn.subset_names(params) == MODEL_NAMES
    assert pn.subset_names(params, partitions.per_layer) == ("head", "tail")
    assert partition_of(params, partitions.weights_biases).labels == (0, 1, 0, 1)
    labels = {
        "head": "first",
        "tail": {"bias": FROZEN, "kernel": np.arange(3)[:, None]},
    }
    names = ("first", "tail/kernel[0]", "tail/kernel[1]", "tail/kernel[2]")
    assert pn.subset_names(params, labels) == names


@pytest.mark.parametrize("container", sorted(containers()))
def test_labels_may_be_in_another_container_than_the_parameters(container):
    labels = partitions.per_layer(containers()[container])
    params = containers()["nested dict"]
    assert partition_of(params, labels).labels == (0, 0, 1, 1)


def test_boxed_linen_parameters_are_named_without_the_box():
    init = linen.with_partitioning(linen.initializers.ones, (None, "model"))
    params = linen.Dense(2, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 3)))
    assert pn.subset_names(params["params"]) == ("bias", "kernel")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Heads:
    query: jax.Array
    value: jax.Array


def test_a_field_called_value_is_a_name_like_any_other():
    params = {"heads": _Heads(jnp.ones(2), jnp.ones(2)), "tail": jnp.ones(2)}
    assert pn.subset_names(params) == ("heads/query", "heads/value", "tail")
    assert pn.subset_names(params, partitions.per_layer) == ("heads", "params")
    labels = {"heads": _Heads("q", "v"), "tail": "t"}
    assert pn.subset_names(params, labels) == ("q", "v", "t")


# --- Ready-made partitions -----------------------------------------------------------


def test_per_tensor_is_the_path_of_each_leaf():
    labels = partitions.per_tensor(network())
    assert jax.tree.structure(labels) == jax.tree.structure(network())
    assert tuple(jax.tree.leaves(labels)) == NETWORK_NAMES


def test_whole_is_one_subset():
    partition = partition_of(network(), partitions.whole)
    assert partition.names == ("params",)
    assert partition.labels == (0,) * 6


@pytest.mark.parametrize(
    ("name", "shape", "label"),
    [
        ("kernel", (2, 3), "weights"),
        ("weight", (3,), "weights"),  # the name goes before the rank
        ("embedding", (3, 2), "weights"),
        ("w", (3,), "weights"),
        ("w1", (3,), "weights"),
        ("W_2", (3,), "weights"),
        ("bias", (3, 2), "biases"),
        ("attention_bias", (3, 2), "biases"),
        ("b", (2, 2), "biases"),
        ("b12", (2, 2), "biases"),
        ("scale", (3,), "biases"),
        ("gate", (3, 3), "weights"),
        ("temperature", (), "biases"),
    ],
)
def test_weights_biases_goes_by_name_and_else_by_rank(name, shape, label):
    params = {"layer": {name: jax.ShapeDtypeStruct(shape, jnp.float32)}}
    assert partitions.weights_biases(params) == {"layer": {name: label}}


def test_weights_biases_of_leaves_without_names_goes_by_rank():
    params = [(jnp.ones((2, 3)), jnp.ones(3)), (jnp.ones((3, 1)), jnp.ones(1))]
    assert pn.subset_names(params, partitions.weights_biases) == ("weights", "biases")
    assert partition_of(params, partitions.weights_biases).labels == (0, 1, 0, 1)


def test_per_layer_joins_leaves_that_share_a_parent():
    names = pn.subset_names(network(), partitions.per_layer)
    assert names == ("params", "layers/0", "layers/1")
    assert partition_of(network(), partitions.per_layer).labels == (0, 1, 1, 2, 2, 0)


def test_per_element_numbers_all_entries():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(()), "c": jnp.ones(0)}
    partition = partition_of(params, partitions.per_element)
    assert partition.size == 5
    assert partition.names == ("a[0]", "a[1]", "a[2]", "a[3]", "4")
    assert numbers(params, partitions.per_element) == [[[0, 1], [2, 3]], 4, []]


def test_by_path_takes_the_first_pattern_that_matches():
    labels = partitions.by_path(
        [("embed", FROZEN), ("^layers/0", "first"), ("bias$", "bias"), ("", 9)]
    )
    assert jax.tree.leaves(labels(network())) == [
        FROZEN,
        "first",
        "first",
        "bias",
        9,
        9,
    ]
    assert pn.subset_names(network(), labels) == ("first", "bias", "9")


def test_by_path_may_take_its_rules_from_an_iterator():
    labels = partitions.by_path(iter([("bias", "b"), ("", "rest")]))
    assert labels(network()) == labels(network())


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, [0, 0, 0, 0, 0]), (2, [0, 0, 0, 1, 1]), (5, [0, 1, 2, 3, 4])],
)
def test_blocks_are_runs_of_nearly_equal_length(n, expected):
    params = [jnp.ones(2)] * 5
    assert partition_of(params, partitions.blocks(n)).labels == tuple(expected)
    assert pn.subset_names(params, partitions.blocks(n))[-1] == f"block {n - 1}"


@pytest.mark.parametrize("count", range(1, 12))
def test_blocks_differ_in_length_by_one_at_most(count):
    params = [jnp.ones(2)] * count
    for n in range(1, count + 1):
        labels = partition_of(params, partitions.blocks(n)).labels
        assert list(labels) == sorted(labels)
        lengths = np.bincount(labels, minlength=n)
        assert len(lengths) == n
        assert lengths.max() - lengths.min() <= 1


def test_alternate_assigns_tensors_cyclically():
    params = [jnp.ones(2)] * 5
    assert partition_of(params, partitions.alternate(2)).labels == (0, 1, 0, 1, 0)
    assert pn.subset_names(params, partitions.alternate(2)) == ("turn 0", "turn 1")


@pytest.mark.parametrize("grouping", [partitions.blocks, partitions.alternate])
def test_groupings_can_group_layers_and_leave_out_what_is_frozen(grouping):
    def layers(params):
        return partitions.per_layer(params) | {"embedding": FROZEN, "scale": FROZEN}

    labels = partition_of(network(), grouping(2, of=layers)).labels
    assert labels == (FROZEN, 0, 0, 1, 1, FROZEN)


@pytest.mark.parametrize(
    "labels",
    [
        partitions.per_tensor,
        partitions.whole,
        partitions.weights_biases,
        partitions.per_layer,
        partitions.by_path([("kernel", "kernels"), ("", FROZEN)]),
        partitions.blocks(3),
        partitions.alternate(2, of=partitions.per_layer),
    ],
)
def test_optax_takes_the_same_labels(labels):
    params = network()
    factors = {label: n for n, label in enumerate({*jax.tree.leaves(labels(params))})}
    tx = optax.partition({x: optax.scale(n) for x, n in factors.items()}, labels)
    updates, _ = tx.update(params, tx.init(params), params)
    expected = [factors[label] for label in jax.tree.leaves(labels(params))]
    assert [float(x.mean()) for x in jax.tree.leaves(updates)] == expected


@pytest.mark.parametrize(
    "labels", [partitions.per_tensor, partitions.per_element, partitions.blocks(2)]
)
def test_shapes_are_enough(labels):
    abstract = jax.eval_shape(lambda tree: tree, network())
    assert numbers(abstract, labels) == numbers(network(), labels)


# --- Sums per subset -----------------------------------------------------------------


def mixed_partition(dtype=jnp.float32):
    params = {
        "a": jnp.ones((2, 3), dtype),
        "b": jnp.ones(2, dtype),
        "c": jnp.ones(4, dtype),
        "d": jnp.ones(2, dtype),
    }
    labels = {"a": np.array([4, FROZEN, 0]), "b": "x", "c": FROZEN, "d": 4}
    return params, partition_of(params, labels)


MIXED_NUMBERS = [[[1, -1, 0]] * 2, [2, 2], [-1] * 4, [1, 1]]


def random_leaves(seed):
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(rng.normal(size=np.shape(x)), jnp.float32) for x in MIXED_NUMBERS
    ]


def test_inner_products_are_taken_on_each_subset():
    _, partition = mixed_partition()
    assert partition.names == ("a[0]", "4", "x")
    xs, ys = random_leaves(0), random_leaves(1)
    expected = [
        sum(
            np.sum(np.where(np.array(n) == s, np.float64(x) * np.float64(y), 0))
            for x, y, n in zip(xs, ys, MIXED_NUMBERS, strict=True)
        )
        for s in range(3)
    ]
    np.testing.assert_allclose(partition.inner(xs, ys), expected, rtol=1e-6)


def test_restricting_to_a_subset_is_zero_elsewhere():
    _, partition = mixed_partition()
    xs = random_leaves(0)
    parts = jax.vmap(lambda s: partition.restrict(xs, s))(jnp.arange(3))
    for x, part, n in zip(xs, parts, MIXED_NUMBERS, strict=True):
        for s in range(3):
            np.testing.assert_array_equal(part[s], np.where(np.array(n) == s, x, 0))


def test_values_are_broadcast_to_the_entries_of_their_subset():
    _, partition = mixed_partition()
    values = partition.broadcast_to_leaves(jnp.array([10.0, 20.0, 30.0]))
    table = np.array([10.0, 20.0, 30.0, 0.0])
    for x, n in zip(values, MIXED_NUMBERS, strict=True):
        np.testing.assert_array_equal(np.broadcast_to(x, np.shape(n)), table[n])


def test_entries_of_each_subset_are_counted():
    params, partition = mixed_partition()
    entries = [x for n in MIXED_NUMBERS for x in np.ravel(n)]
    expected = [entries.count(s) for s in range(3)]
    np.testing.assert_array_equal(partition.counts(jax.tree.leaves(params)), expected)


def test_updates_are_scaled_by_the_value_of_their_subset():
    _, partition = mixed_partition()
    xs, values = random_leaves(0), jnp.array([10.0, 20.0, 30.0])
    table = np.append(values, 0.0)
    scaled = partition.scaled(xs, values)
    for x, found, n in zip(xs, scaled, MIXED_NUMBERS, strict=True):
        np.testing.assert_allclose(found, table[n] * x, rtol=1e-6)


def test_frozen_updates_are_zero_whatever_they_were():
    labels = {"a": np.array([0, FROZEN]), "b": FROZEN, "c": FROZEN, "d": FROZEN}
    params = {
        "a": jnp.ones(2, jnp.bfloat16),
        "b": jnp.full(2, jnp.nan),
        "c": jnp.ones(3, jnp.int8),
        "d": jax.random.split(jax.random.key(0)),
    }
    none = np.zeros(3, jax.dtypes.float0)
    updates = [jnp.array([2.0, jnp.inf]), jnp.full(2, jnp.inf), none, none[:2]]
    leaves = jax.tree.leaves(params)
    partition = partition_of(params, labels)
    scaled = jax.jit(lambda eta: partition.scaled(updates, eta, leaves))
    a, b, c, d = scaled(jnp.array([3.0]))
    np.testing.assert_array_equal(a.astype(float), [6.0, 0.0])
    np.testing.assert_array_equal(b, [0.0, 0.0])
    np.testing.assert_array_equal(c, [0, 0, 0])
    assert (a.dtype, b.dtype, c.dtype) == (jnp.bfloat16, jnp.float32, jnp.int8)
    np.testing.assert_array_equal(d, [0, 0])  # a chain can scale it

    assert partition.take_active("abcd") == ["a"]
    assert partition.put_active("abcd", ["x"]) == ["x", "b", "c", "d"]

    moved = partition.moved(leaves, [a, b, c, d])
    np.testing.assert_array_equal(moved[0].astype(float), [7.0, 1.0])
    assert moved[0].dtype == jnp.bfloat16
    assert all(x is y for x, y in zip(moved[1:], leaves[1:], strict=True))


def test_frozen_entries_of_a_leaf_are_set_to_zero():
    _, partition = mixed_partition()
    xs = random_leaves(0)
    cleared = partition.without_frozen(xs)
    for x, found, n in zip(xs, cleared, MIXED_NUMBERS, strict=True):
        part_of_leaf = len(np.unique(n)) > 1
        expected = np.where(np.array(n) == FROZEN, 0, x) if part_of_leaf else x
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_sums_over_low_precision_are_taken_in_float32(dtype):
    x = jnp.full(3000, 1.0, dtype)
    partition = partition_of(x, partitions.whole)
    assert partition.dtype == np.float32
    assert partition.inner([x], [x]).tolist() == [3000.0]


def test_sums_are_taken_in_float64_if_an_active_leaf_has_it():
    with jax.enable_x64(True):
        params = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, jnp.float64)}
        assert partition_of(params, partitions.per_tensor).dtype == np.float64
        assert partition_of(params, {"a": "a", "b": FROZEN}).dtype == np.float32


# --- Mistakes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (
            {"a": "x"},
            ValueError,
            r"param_labels: the leaf 'b/c' of params has no label",
        ),
        ({"a": "x", "b": {}}, ValueError, r"param_labels: the leaf 'b/c'"),
        (
            {"a": "x", "b": "y", "z": "oops"},
            ValueError,
            r"param_labels: 'z' matches no leaf of params; the leaves are 'a', 'b/c'",
        ),
        (
            {"a": "x", "b": {"c": {"d": "deeper"}}},
            ValueError,
            r"param_labels: the leaf 'b/c'",
        ),
        (
            {"a": np.arange(2), "b": "y"},
            ValueError,
            r"param_labels: the labels of leaf 'a' have shape \(2,\), .* \(3,\)",
        ),
        (
            {"a": np.zeros((2, 3), int), "b": "y"},
            ValueError,
            r"param_labels: the labels of leaf 'a' have shape \(2, 3\)",
        ),
        (
            {"a": 1.5, "b": "y"},
            TypeError,
            r"param_labels: the label of leaf 'a' .*float",
        ),
        (
            {"a": None, "b": "y"},
            TypeError,
            r"param_labels: the label of leaf 'a' .*None",
        ),
        (
            {"a": True, "b": "y"},
            TypeError,
            r"param_labels: the label of leaf 'a' .*bool",
        ),
        (
            {"a": "x", "b": np.array([True, False])},
            TypeError,
            r"param_labels: the label of leaf 'b/c' .*bool",
        ),
        (
            {"a": np.ones(3, np.float32), "b": "y"},
            TypeError,
            r"param_labels: the label of leaf 'a' .*float32",
        ),
        (
            {"a": FROZEN, "b": np.array([FROZEN, FROZEN])},
            ValueError,
            r"param_labels: the partition is empty: params has only frozen leaves",
        ),
    ],
)
def test_labels_that_do_not_fit_raise(labels, error, message):
    params = {"a": jnp.ones(3), "b": {"c": jnp.ones(2)}}
    with pytest.raises(error, match=message):
        pn.subset_names(params, labels)


def test_parameters_without_leaves_raise():
    with pytest.raises(ValueError, match="partition is empty: params has no leaves"):
        pn.subset_names({})


def test_two_subsets_of_one_name_raise():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"param_labels: .*'1'"):
        pn.subset_names(params, {"a": "1", "b": 1})
    with pytest.raises(ValueError, match=r"param_labels: .*'a\[0\]'"):
        pn.subset_names(params, {"a": np.array([0, 1]), "b": "a[0]"})


@pytest.mark.parametrize("leaf", [jnp.tanh, "text", object()])
def test_leaves_that_are_no_arrays_raise_an_error_with_their_name(leaf):
    params = {"a": jnp.ones(2), "b": {"c": leaf}}
    with pytest.raises(TypeError, match="params: the leaf 'b/c' is a"):
        pn.subset_names(params, {"a": "a", "b": FROZEN})


def test_a_tree_of_labels_may_be_callable():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Model:
        a: jax.Array
        b: jax.Array

        def __call__(self, x):
            return x

    labels = Model("first", "second")
    assert pn.subset_names(Model(jnp.ones(1), jnp.ones(2)), labels) == (
        "first",
        "second",
    )


def test_traced_labels_raise():
    @jax.jit
    def f(labels):
        return partition_of({"a": jnp.ones(3)}, {"a": labels}).inner([], [])

    with pytest.raises(
        TypeError, match=r"param_labels: the labels of leaf 'a'.*traced"
    ):
        f(jnp.arange(3))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.complex64])
def test_leaves_that_cannot_be_trained_must_be_frozen(dtype):
    params = {"a": jnp.ones(3), "b": jnp.ones(2, dtype)}
    with pytest.raises(TypeError, match=r"params: the leaf 'b' has dtype .*FROZEN"):
        pn.subset_names(params)
    with pytest.raises(TypeError, match="params: the leaf 'b'"):
        pn.subset_names(params, {"a": "a", "b": np.array([FROZEN, 0])})


def test_leaves_of_one_name_raise_unless_labels_tell_them_apart():
    params = {"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)}
    with pytest.raises(ValueError, match="params: two leaves have the name 'a/b'"):
        pn.subset_names(params)
    labels = {"a": {"b": "nested"}, "a/b": "flat"}
    assert pn.subset_names(params, labels) == ("nested", "flat")


def test_a_pattern_that_matches_no_leaf_raises():
    labels = partitions.by_path([("kernal", "weights"), ("", "rest")])
    with pytest.raises(ValueError, match=r"by_path: .*'kernal'.*matches no leaf"):
        pn.subset_names(network(), labels)


def test_a_leaf_that_no_pattern_matches_raises():
    labels = partitions.by_path([("kernel|bias|scale", "layers")])
    with pytest.raises(ValueError, match=r"by_path: no pattern matches .*'embedding'"):
        pn.subset_names(network(), labels)


@pytest.mark.parametrize("grouping", [partitions.blocks, partitions.alternate])
def test_groupings_into_too_many_or_too_few_raise(grouping):
    name = grouping.__name__
    with pytest.raises(ValueError, match=f"{name}: n must be at least 1, got 0"):
        grouping(0)
    with pytest.raises(ValueError, match=f"{name}: n = 7, .* only 6 subsets"):
        pn.subset_names(network(), grouping(7))
    with pytest.raises(TypeError, match=f"{name}: of= must return one label per leaf"):
        pn.subset_names(network(), grouping(2, of=partitions.per_element))


# --- many tensors -------------------------------------------------------------------


def deep_params(layers):
    """Two leaves per layer, of which one is a matrix."""
    return [{"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)} for _ in range(layers)]


def test_leaves_with_fewer_than_two_axes_are_one_subset_beside_the_matrices():
    params = {"bias": jnp.ones(3), "scale": jnp.ones(()), "kernel": jnp.ones((2, 2, 2))}
    assert partitions.per_role(params) == {
        "bias": "vectors",
        "scale": "vectors",
        "kernel": "kernel",
    }


def test_matrices_of_repeated_layers_share_a_subset():
    layer = {"Dense_0": {"kernel": jnp.ones((3, 6))}, "key": jnp.ones((3, 3))}
    other = layer | {"query": jnp.ones((3, 3))}
    params = {"Block_0": layer, "Block_1": layer, "Block_2": other}
    assert pn.subset_names(params, "per_role") == (
        "Block_*/Dense_*/kernel",
        "Block_*/key",
        "Block_2/query",
    )


def test_matrices_of_different_shapes_have_different_roles():
    shapes = [(8, 3), (3, 3), (3, 3), (3, 2), (3, 2), (3, 1)]
    params = [{"kernel": jnp.ones(shape)} for shape in shapes]
    labels = [layer["kernel"] for layer in partitions.per_role(params)]
    assert labels == [
        "0/kernel",
        *2 * ["*/kernel (3, 3)"],
        *2 * ["*/kernel (3, 2)"],
        "5/kernel",
    ]


@pytest.mark.slow
def test_the_subset_of_a_role_is_that_of_stacked_layers():
    """The same summary with a loop over layers and with `lax.scan`."""
    rng = np.random.default_rng(0)
    stacked = {
        "w": jnp.asarray(rng.normal(size=(3, 4, 4)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)

    def looped(params):
        h = x
        for layer in params["layers"]:
            h = jnp.tanh(h @ layer["w"])
        return jnp.mean((h @ params["head"]) ** 2)

    def scanned(params):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])
        return jnp.mean((h @ params["head"]) ** 2)

    layers = [{"w": w} for w in stacked["w"]]
    loop = {"head": stacked["head"], "layers": layers}
    a = pn.summarize(looped, loop, jax.grad(looped)(loop), param_labels="per_role")
    b = pn.summarize(scanned, stacked, jax.grad(scanned)(stacked))
    assert pn.subset_names(loop, "per_role") == ("head", "layers/*/w")
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_matrix_cannot_have_the_name_of_the_vectors():
    with pytest.raises(ValueError, match="the leaf 'vectors' has two axes"):
        partitions.per_role({"vectors": jnp.ones((2, 2)), "bias": jnp.ones(2)})


@pytest.mark.parametrize(("layers", "size"), [(8, 16), (9, 2)])
def test_roles_are_subsets_if_there_are_more_than_16_leaves(layers, size):
    params = deep_params(layers)
    assert partition_of(params, "auto").size == size
    state = pn.partition_newton().init(params)
    assert len(pn.learning_rates(state, params)) == size
