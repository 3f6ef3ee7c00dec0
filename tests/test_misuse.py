"""What is easily done wrong, and what the user is told."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.errors import TraceContextError
from flax.training import train_state

import partnewton as pn
from partnewton import _checks, averaging, partitions, rules
from partnewton._error_hints import with_error_hints

PARAMS = {"body": jnp.array([1.0, 2.0]), "head": {"bias": jnp.array([0.5, 0.5])}}


def loss(params):
    return jnp.sum((params["body"] * params["head"]["bias"] - 1.0) ** 2)


def quick(**kwargs):
    """The transformation with a rule that compiles quickly."""
    return pn.scale_by_partition_newton(rules.newton(nonnegative=False), **kwargs)


def update(tx, params=PARAMS, value_fn=loss):
    return tx.update(params, tx.init(params), params, value_fn=value_fn)


# --- Wrappers that take leaves out or drop arguments ---------------------------------


BODY = {"body": True, "head": False}


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda tx: optax.masked(tx, BODY),
        lambda tx: optax.partition(
            {True: tx, False: optax.set_to_zero()}, lambda _: BODY
        ),
    ],
    ids=["masked", "partition"],
)
@pytest.mark.parametrize("labels", [None, {"body": "body", "head": "head"}])
def test_masks_that_hide_leaves_from_the_loss_are_explained(wrapped, labels):
    tx = wrapped(pn.scale_by_partition_newton(param_labels=labels))
    told = r"without the leaf 'head.*MaskedNode.*FROZEN"
    with pytest.raises(ValueError, match=told) as raised:
        update(tx)
    assert len(str(raised.value)) < 400


def test_a_loss_may_fill_in_what_a_mask_hides():
    tx = optax.masked(quick(), BODY)
    filled, _ = update(
        tx, value_fn=lambda params: loss(PARAMS | {"body": params["body"]})
    )
    alone = quick(param_labels=BODY | {"head": -1, "body": "b"})
    expected, _ = update(alone)
    np.testing.assert_allclose(filled["body"], expected["body"], rtol=1e-6)


def test_the_error_of_a_wrapper_that_drops_the_loss_names_the_repair():
    module = linen.Dense(1)
    params = module.init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    state = train_state.TrainState.create(
        apply_fn=module.apply, params=params, tx=quick()
    )
    with pytest.raises(ValueError, match=r"value_fn: .*TrainState\.apply_g") as raised:
        state.apply_gradients(grads=params, value_fn=lambda p: jnp.sum(p["bias"]))
    code = re.search(r"or write (.*)\.$", str(raised.value))
    scope = {"state": state, "grads": params}
    scope["loss"] = lambda p: jnp.sum((p["kernel"] + p["bias"] - 1.0) ** 2)
    exec(code[1], scope)
    assert scope["updates"].keys() == params.keys()


# --- Losses that were written for something else than parameters ---------------------


class _Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(2, 3, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.hidden(x))


def notes_of(value_fn):
    """The notes on the error of a training step of nnx with this loss."""
    model = _Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, pn.scale_by_partition_newton(), wrt=nnx.Param)
    grads = nnx.state(model, nnx.Param)
    errors = (TraceContextError, TypeError, AttributeError)
    with pytest.raises(errors) as raised:
        optimizer.update(model, grads, value_fn=value_fn(model))
    return "\n".join(raised.value.__notes__)


def test_the_error_of_a_loss_that_changes_variables_says_to_copy():
    def value_fn_of(model):
        graphdef, _, rest = nnx.split(model, nnx.Param, ...)
        x = jnp.arange(8.0).reshape(4, 2)
        return lambda params: jnp.sum(nnx.merge(graphdef, params, rest)(x) ** 2)

    assert "copy=True" in notes_of(value_fn_of)


@pytest.mark.parametrize(
    "value_fn",
    [lambda model: jnp.sum(model(jnp.ones((4, 2)))), lambda model: model.missing(1)],
)
def test_the_error_of_a_loss_of_a_model_says_that_it_gets_parameters(value_fn):
    assert "nnx.merge(graphdef, params, rest" in notes_of(lambda model: value_fn)


def test_other_errors_of_a_loss_are_left_as_they_are():
    def broken(params):
        raise KeyError("x")

    with pytest.raises(KeyError) as raised:
        with_error_hints(broken, PARAMS)(PARAMS)
    assert not hasattr(raised.value, "__notes__")
    assert with_error_hints(loss, PARAMS)(PARAMS) == loss(PARAMS)


def test_an_error_is_explained_once():
    def broken(params):
        raise TypeError("'State' object is not callable")

    state = nnx.state(_Network(nnx.Rngs(0)), nnx.Param)
    twice = with_error_hints(with_error_hints(broken, state), state)
    with pytest.raises(TypeError) as raised:
        twice(state)
    assert len(raised.value.__notes__) == 1


# --- Arguments of constructors -------------------------------------------------------


@pytest.mark.parametrize("value", ["0.1", None, [0.1], np.ones(2), jnp.ones(2)])
def test_a_learning_rate_is_a_number_or_a_schedule(value):
    with pytest.raises(TypeError, match="learning_rate must be a number"):
        _checks.check_learning_rate(value)


@pytest.mark.parametrize("value", [-0.1, -1, np.float32(-1.0), float("nan")])
def test_a_negative_learning_rate_raises(value):
    with pytest.raises(ValueError, match="learning_rate must not be negative"):
        _checks.check_learning_rate(value)


@pytest.mark.parametrize("value", [1e-3, np.float32(3e-4), 0.009])
def test_a_learning_rate_like_that_of_adam_warns(value):
    def constructor(learning_rate):
        _checks.check_learning_rate(learning_rate)

    with pytest.warns(UserWarning, match="not a learning rate like Adam's") as caught:
        constructor(value)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "value", [0.0, 0.01, 0.2, 1, optax.constant_schedule(1e-3), jnp.array(1e-3)]
)
def test_other_learning_rates_do_not_warn(value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _checks.check_learning_rate(value)
    jax.jit(lambda rate: _checks.check_learning_rate(rate))(1e-3)  # of any value


def test_a_number_is_no_string_and_not_too_small():
    _checks.check_number("share", 0.1, strict=True, below=1)
    with pytest.raises(ValueError, match=r"share must be less than 1, got 1\."):
        _checks.check_number("share", 1, below=1)
    _checks.check_number("update_interval", np.int64(1), minimum=1)
    _checks.check_number("damping", jnp.array(-1.0))  # an array may be traced
    with pytest.raises(TypeError, match="backtracking must be a number, got the str"):
        _checks.check_number("backtracking", "3")
    with pytest.raises(TypeError, match=r"rate must be a number, got shape \(2,\)"):
        _checks.check_number("rate", np.ones(2))
    with pytest.raises(ValueError, match=r"share must be positive, got 0\."):
        _checks.check_number("share", 0, strict=True)
    with pytest.raises(ValueError, match="update_interval must be at least 1, got 0"):
        _checks.check_number("update_interval", 0, minimum=1)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("cubic", "the string 'cubic'"),
        (3, "3, a int"),
        (rules.cubic, r"rule=rules.cubic\(\.\.\.\)"),
        (rules.Rule, r"rule=rules.Rule\(\.\.\.\)"),
        (rules.robust, r"rule=rules.robust\(\.\.\.\)"),
    ],
)
def test_a_rule_is_a_function_of_a_summary(value, told):
    with pytest.raises(TypeError, match=f"rule must be a function.*{told}"):
        _checks.check_rule(value)


def test_every_kind_of_callable_may_be_a_rule():
    for rule in (rules.cubic(), rules.with_noise_floor(rules.robust()), lambda s: s):
        _checks.check_rule(rule)


@pytest.mark.parametrize(
    ("value", "told"),
    [("adam", "the string 'adam'"), (optax.adam, r"the function adam. Call it: adam")],
)
def test_a_direction_is_a_transformation(value, told):
    with pytest.raises(TypeError, match=f"direction must be an optax.Grad.*{told}"):
        _checks.check_transformation("direction", value)
    for tx in (optax.scale_by_adam(), optax.chain(optax.identity())):
        _checks.check_transformation("direction", tx)


@pytest.mark.parametrize(
    ("value", "told"),
    [(0.9, "0.9, a float"), (averaging.exponential, "Call it: exponential")],
)
def test_an_average_is_a_pair_of_functions(value, told):
    with pytest.raises(TypeError, match=f"average must be an optax.Grad.*{told}"):
        _checks.check_average("average", value)
    _checks.check_average("average", averaging.exponential(0.9))


# --- Names of partitions -------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["per_tensor", "whole", "weights_biases", "per_layer", "per_element"]
)
def test_the_name_of_a_partition_is_that_partition(name):
    named, meant = (
        partitions.partition_of(PARAMS, x) for x in (name, getattr(partitions, name))
    )
    assert named.names == meant.names
    jax.tree.map(np.testing.assert_array_equal, named.labels, meant.labels)
    tx = pn.scale_by_partition_newton(param_labels=name)
    assert tuple(pn.learning_rates(tx.init(PARAMS))) == meant.names


def test_groupings_take_the_name_of_what_they_group():
    names = pn.subset_names(PARAMS, partitions.blocks(2, of="per_layer"))
    assert names == ("block 0", "block 1")


@pytest.mark.parametrize("labels", ["per_layers", "body", "blocks"])
def test_any_other_lone_string_raises(labels):
    with pytest.raises(ValueError, match=f"param_labels: '{labels}' .*'per_layer'"):
        pn.subset_names(PARAMS, labels)
    with pytest.raises(ValueError, match="is not the name of a partition"):
        partitions.blocks(2, of=labels)


# --- Rules that return something else -------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (lambda s: s.gradient, r"^rule must return a rules\.Proposal"),
        (lambda s: (s.gradient, 0.0), "got tuple"),
        (
            lambda s: pn.rules.Proposal(jnp.sum(s.gradient), 0.0),
            r"one entry per subset, shape \(1,\), got \(\)",
        ),
    ],
)
def test_a_rule_returns_a_proposal(rule, told):
    tx = pn.scale_by_partition_newton(rule)
    params = {"w": jnp.ones(2)}
    with pytest.raises((TypeError, ValueError), match=told):
        tx.update(params, tx.init(params), params, value_fn=lambda p: jnp.sum(p["w"]))
    with pytest.raises((TypeError, ValueError), match=told):
        pn.report(lambda p: jnp.sum(p["w"] ** 2), params, rule=rule)


def test_a_rule_that_reads_the_third_order_although_it_is_declared_not_to():
    rule = pn.rules.Rule(
        lambda s: pn.rules.Proposal(jnp.abs(s.third), 0.0), third_order=False
    )
    tx = pn.scale_by_partition_newton(rule)
    params = {"w": jnp.ones(2)}
    with pytest.raises(TypeError) as caught:
        tx.update(params, tx.init(params), params, value_fn=lambda p: jnp.sum(p["w"]))
    assert "third_order=True" in caught.value.__notes__[0]


# --- Missing arguments ----------------------------------------------------------------


def test_a_loss_without_its_data_is_told_to_pass_them_by_name():
    def loss(params, x):
        return jnp.sum(params["w"] * x)

    params = {"w": jnp.ones(2)}
    for tx in (pn.scale_by_partition_newton(), pn.partition_newton()):
        state = tx.init(params)
        with pytest.raises(TypeError, match=r"missing a required argument: 'x'.*x=x"):
            tx.update(params, state, params, value_fn=loss)
        tx.update(params, state, params, value_fn=loss, x=jnp.ones(2), other=1.0)


def test_missing_parameters_are_told_how_to_be_passed():
    params = {"w": jnp.ones(2)}
    for tx in (pn.partition_newton(), pn.clip_by_parameter_rms(0.1)):
        with pytest.raises(
            ValueError, match=r"call tx\.update\(updates, state, params"
        ):
            tx.update(params, tx.init(params))
