"""One matrix of properties that every optimizer of this library has.

They are those to which optax holds its own optimizers: whoever puts one of ours in the
place of one of theirs must notice nothing but the extra argument `value_fn`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from support.oracles import types_of
from support.selection import some
from support.states import newton_state

import partnewton as pn
from partnewton import averaging, partitions, rules


def published(learning_rate=1.0, *, update_interval=1, **kwargs):
    """The published method, with a refresh at each update."""
    return pn.paper_newton(learning_rate, update_interval=update_interval, **kwargs)


# Most of them with the rule that compiles in half of the time of the default one.
OPTIMIZERS = {
    "default": published(),
    "kept_rates": published(0.3, update_interval=3, rule=rules.robust()),
    "newton": published(momentum=0.0, rule=rules.newton()),
    "diagonal": published(rule=rules.diagonal()),
    "averaged": published(0.3, average=averaging.exponential(), rule=rules.robust()),
    "per_element": published(param_labels=partitions.per_element),
    # At a minimum with an RMS below 1 / decay, the lengths and the decay vanish.
    "decayed": published(weight_decay=0.01, rule=rules.robust()),
    "tracked": optax.chain(
        pn.directions.skip_nonfinite(optax.ema(0.9)),
        pn.scale_by_partition_newton(),
        optax.scale_by_learning_rate(0.3),
        pn.track_average(),
    ),
    "adam_direction": optax.chain(
        optax.scale_by_adam(),
        pn.scale_by_partition_newton(rules.robust()),
        optax.scale_by_learning_rate(0.3),
    ),
    "subspace": pn.subspace_newton(),
}
# Newton's rule compiles fastest; others train by default, in the first test.
every_optimizer = pytest.mark.parametrize("name", some(OPTIMIZERS, default=["newton"]))
TRAINED = ["default", "newton", "tracked", "subspace"]
# What wraps an optimizer, or follows it, sees these four kinds of them.
each_kind = pytest.mark.parametrize("name", some(TRAINED, default=["newton"]))


class Target(NamedTuple):
    """A function to minimise, where to start, and the only minimum."""

    loss: object
    start: object
    minimum: object


@functools.cache
def parabola(dtype=jnp.float32):
    minimum = jnp.array([1.0, -1.0, 1.0], dtype)
    return Target(
        lambda x: jnp.sum((x - minimum) ** 2), jnp.array([-1.0, 10, 1], dtype), minimum
    )


@functools.cache
def rosenbrock(dtype=jnp.float32):
    return Target(
        lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2,
        jnp.zeros(2, dtype),
        jnp.ones(2, dtype),
    )


@functools.cache
def matrix(dtype=jnp.float32):
    minimum = jnp.array([[3.0, -2.0], [1.0, 4.0]], dtype)
    return Target(
        lambda x: jnp.sum((x - minimum) ** 2), jnp.zeros((2, 2), dtype), minimum
    )


@functools.cache
def mixed(dtype=jnp.float32):
    """A vector and a matrix that interact."""
    b, A = jnp.array([1.0, -1.0], dtype), jnp.array([[2.0, 0.0], [-1.0, 1.0]], dtype)

    def loss(params):
        x, M = params["x"] - b, params["M"] - A
        return jnp.sum((M[0] + x) ** 2) + jnp.sum(x**2) + jnp.sum(M**2)

    start = {"x": jnp.zeros(2, dtype), "M": jnp.zeros((2, 2), dtype)}
    return Target(loss, start, {"x": b, "M": A})


def step(tx, loss, params, state, **extra):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(
        grads, state, params, value_fn=loss, value=value, grad=grads, **extra
    )
    return optax.apply_updates(params, updates), state


jitted_step = jax.jit(step, static_argnames=("tx", "loss"))


@functools.partial(jax.jit, static_argnames=("tx", "loss"))
def train(tx, loss, params, steps):
    """Some steps in one loop: the carry must keep structure, shapes and dtypes."""
    return jax.lax.fori_loop(
        0, steps, lambda _, carry: step(tx, loss, *carry), (params, tx.init(params))
    )


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol),
        actual,
        expected,
    )


# --- by itself -------------------------------------------------------------------

# One rate for both coordinates, without an average or from an earlier step: where these
# are in the curved valley after thousands of steps depends on rounding.
ERRATIC = [("newton", rosenbrock), ("kept_rates", rosenbrock)]


@pytest.mark.parametrize(
    "target", some([parabola, rosenbrock, matrix, mixed], default=[mixed])
)
@pytest.mark.parametrize("name", some(OPTIMIZERS, default=TRAINED))
def test_thousands_of_steps_in_a_loop_find_the_minimum(name, target):
    loss, start, minimum = target()
    params, state = train(OPTIMIZERS[name], loss, start, 3000)
    if (name, target) not in ERRATIC:
        assert_close(params, minimum, rtol=0, atol=1e-3)
    assert newton_state(state).count == 3000
    assert newton_state(state).notfinite_count == 0


@every_optimizer
def test_jit_and_eager_agree(name):
    tx, (loss, params, _) = OPTIMIZERS[name], mixed()
    eager = compiled = params, tx.init(params)
    for _ in range(2):
        eager = step(tx, loss, *eager)
        compiled = jitted_step(tx, loss, *compiled)
        assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@every_optimizer
def test_the_second_call_does_not_recompile(name):
    tx, (loss, params, _) = OPTIMIZERS[name], mixed()
    traced = []

    @jax.jit
    @functools.wraps(step)  # a program of one name and content is compiled once
    def call(params, state):
        traced.append(1)
        return step(tx, loss, params, state)

    state = tx.init(params)
    for _ in range(3):
        params, state = call(params, state)
    assert len(traced) == 1


@every_optimizer
def test_the_state_of_weakly_typed_parameters_is_not_weakly_typed(name):
    tx = OPTIMIZERS[name]
    params = {"a": jnp.array(2.0), "b": jnp.asarray(3.0)}
    assert any(x.weak_type for x in jax.tree.leaves(params))

    def loss(p):
        return (p["a"] - 1.0) ** 2 + (p["b"] + p["a"]) ** 2

    state = tx.init(params)
    _, later = jitted_step(tx, loss, params, state)
    if name == "adam_direction":  # whose first zeros, optax's own, are weakly typed
        state, later = newton_state(state), newton_state(later)
    assert types_of(state) == types_of(later)
    assert not any(weak for _, _, weak in types_of(state))


@every_optimizer
def test_what_is_initialised_from_shapes_is_what_is_initialised_from_arrays(name):
    tx, params = OPTIMIZERS[name], mixed().start
    shapes = jax.eval_shape(lambda: params)
    from_shapes = jax.eval_shape(tx.init, shapes)
    assert jax.tree.structure(from_shapes) == jax.tree.structure(tx.init(params))
    assert types_of(from_shapes) == types_of(tx.init(params))
    assert_close(jax.jit(tx.init)(params), tx.init(params))


@every_optimizer
def test_unknown_extra_arguments_are_accepted(name):
    tx, (loss, params, _) = OPTIMIZERS[name], mixed()
    state = tx.init(params)
    plain = jitted_step(tx, loss, params, state)
    more = jitted_step(
        tx, loss, params, state, what_nobody_expects=1, nor={"this": jnp.ones(2)}
    )
    assert_close(more, plain, rtol=0, atol=0)


@every_optimizer
def test_map_params_works_on_the_state(name):
    tx, (loss, params, _) = OPTIMIZERS[name], mixed()
    _, state = train(tx, loss, params, 2)
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    # What is like the parameters was doubled, what is measured stays.
    ours, theirs = newton_state(doubled), newton_state(state)
    if name == "subspace":
        direction, mapped = theirs.steps, ours.steps
        ours, theirs = (x._replace(steps=(), direction=()) for x in (ours, theirs))
    else:
        field = "mu" if name == "adam_direction" else "ema"
        direction, mapped = getattr(state[0], field), getattr(doubled[0], field)
    assert_close(ours, theirs, rtol=0, atol=0)
    assert_close(mapped, jax.tree.map(lambda x: 2 * x, direction))


DTYPES = [
    *((name, jnp.bfloat16) for name in OPTIMIZERS),
    *((name, x) for name in TRAINED for x in (jnp.float16, jnp.float32, jnp.float64)),
]


@pytest.mark.parametrize("case", some(DTYPES, default=[("newton", jnp.bfloat16)]))
def test_updates_have_the_dtype_of_the_parameters_and_states_keep_theirs(case):
    name, dtype = case
    tx = OPTIMIZERS[name]
    with jax.enable_x64(dtype == jnp.float64):
        loss, params, _ = parabola(dtype)
        state = tx.init(params)

        @jax.jit
        def call(really, params, state):
            grads = jax.grad(loss)(params)
            # Both branches must be of one type.
            return jax.lax.cond(
                really,
                lambda: tx.update(grads, state, params, value_fn=loss),
                lambda: (params, state),
            )

        for really in (True, False, True):
            updates, after = call(really, params, state)
            assert updates.dtype == dtype
            assert types_of(after) == types_of(state)
            params, state = optax.apply_updates(params, updates), after
        assert params.dtype == dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        assert newton_state(state).learning_rates.dtype == wide
        assert np.isfinite(float(loss(params)))


@every_optimizer
def test_each_leaf_of_a_mixed_tree_keeps_its_dtype(name):
    tx = OPTIMIZERS[name]
    with jax.enable_x64(True):
        dtypes = {
            "brain": jnp.bfloat16,
            "double": jnp.float64,
            "half": jnp.float16,
            "single": jnp.float32,
        }
        params = {k: jnp.array([1.0, 2.0], v) for k, v in dtypes.items()}

        def loss(p):
            total = sum(x.astype(jnp.float64) for x in p.values())
            # So weak an interaction that even rates that ignore it go down.
            return 0.1 * jnp.sum((total - 1.0) ** 2) + sum(
                jnp.sum(x.astype(jnp.float64) ** 2) for x in p.values()
            )

        state = tx.init(params)
        before = loss(params)
        for _ in range(3):
            params, after = jitted_step(tx, loss, params, state)
            assert types_of(after) == types_of(state)
            state = after
        assert {k: x.dtype for k, x in params.items()} == dtypes
        assert loss(params) < before


# --- in the wrappers of optax ----------------------------------------------------

FACTORIES = {
    "numbers": functools.partial(
        pn.paper_newton, learning_rate=0.3, momentum=0.5, update_interval=2
    ),
    "a_rule": functools.partial(
        pn.paper_newton, learning_rate=0.3, rule=rules.newton()
    ),
    "a_partition": functools.partial(
        pn.paper_newton, learning_rate=0.3, param_labels=partitions.whole
    ),
}
STATIC = ("rule", "param_labels", "average", "engine")


@pytest.mark.parametrize("case", some(FACTORIES, default=["a_rule"]))
def test_inject_hyperparams_gives_the_same_updates(case):
    loss, params, _ = mixed()
    plain = FACTORIES[case]()
    hyperparams = FACTORIES[case].keywords
    injected = optax.inject_hyperparams(pn.paper_newton, STATIC)(**hyperparams)
    ours, state = train(injected, loss, params, 6)
    theirs, expected = train(plain, loss, params, 6)
    assert_close(ours, theirs, rtol=1e-5)
    assert_close(state.inner_state, expected, rtol=1e-4, atol=1e-5)
    state.hyperparams["learning_rate"] = jnp.zeros(())
    stays, _ = jitted_step(injected, loss, ours, state)
    assert_close(stays, ours, rtol=0, atol=0)


@pytest.mark.slow
def test_the_damping_can_be_injected_and_scheduled():
    loss, params, _ = rosenbrock()

    def optimizer(damping):
        return published(rule=rules.cubic(damping))

    schedule = optax.exponential_decay(4.0, 1, 0.5)
    injected = optax.inject_hyperparams(optimizer)(damping=schedule)
    ours, state = params, injected.init(params)
    theirs, other = params, optimizer(1.0).init(params)
    for n in range(3):
        ours, state = jitted_step(injected, loss, ours, state)
        halved = optimizer(4.0 * 0.5**n)
        theirs, other = jitted_step(halved, loss, theirs, other)
    assert_close(ours, theirs, rtol=1e-4)


@pytest.mark.slow
def test_a_constant_schedule_is_a_constant():
    loss, params, _ = rosenbrock()
    constant = published(0.3, rule=rules.newton())
    scheduled = published(optax.constant_schedule(0.3), rule=rules.newton())
    assert_close(
        train(scheduled, loss, params, 10)[0], train(constant, loss, params, 10)[0]
    )
    other = published(optax.linear_schedule(0.3, 0.0, 5), rule=rules.newton())
    with pytest.raises(AssertionError):
        assert_close(
            train(other, loss, params, 10)[0], train(constant, loss, params, 10)[0]
        )


@each_kind
def test_chains_and_named_chains_pass_extra_arguments_on(name):
    loss, params, _ = mixed()
    tx = OPTIMIZERS[name]
    plain = train(tx, loss, params, 3)[0]
    chain = optax.chain(optax.clip(1e3), tx, optax.identity())
    named = optax.named_chain(("first", optax.identity()), ("ours", tx))
    assert_close(train(chain, loss, params, 3)[0], plain)
    after, state = train(named, loss, params, 3)
    assert_close(after, plain)
    assert newton_state(state["ours"]).count == 3


@each_kind
def test_apply_if_finite_never_skips_an_update(name):
    loss, params, _ = mixed()
    tx = OPTIMIZERS[name]
    wrapped = optax.apply_if_finite(tx, 3)
    after, state = train(wrapped, loss, params, 3)
    assert_close(after, train(tx, loss, params, 3)[0])
    assert state.total_notfinite == 0


@each_kind
def test_multi_steps_takes_the_mean_gradient_and_the_last_micro_batch(name):
    tx = OPTIMIZERS[name]
    accumulating = optax.MultiSteps(tx, every_k_schedule=2)

    def loss(x, target):
        return jnp.sum((x - target) ** 4 + (x - target) ** 2)

    params = jnp.array([1.0, 2.0])
    batches = jnp.array([[3.0, -1.0], [2.0, 0.5], [1.0, 1.0], [0.0, 2.0]])

    @functools.partial(jax.jit, static_argnames="tx")
    def call(tx, grads, state, params, target):
        updates, state = tx.update(grads, state, params, value_fn=loss, target=target)
        return optax.apply_updates(params, updates), state

    ours, state = params, accumulating.init(params)
    theirs, other = params, tx.init(params)
    for first, second in (batches[:2], batches[2:]):
        before = ours
        ours, state = call(
            accumulating, jax.grad(loss)(ours, first), state, ours, first
        )
        np.testing.assert_array_equal(ours, before)
        ours, state = call(
            accumulating, jax.grad(loss)(ours, second), state, ours, second
        )
        mean = (jax.grad(loss)(theirs, first) + jax.grad(loss)(theirs, second)) / 2
        theirs, other = call(tx, mean, other, theirs, second)
        assert_close(ours, theirs, rtol=1e-4)
    assert newton_state(state).count == 2


@each_kind
def test_reduce_on_plateau_may_follow(name):
    tx = OPTIMIZERS[name]
    loss, params, minimum = parabola()
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=20)
    after, state = train(optax.chain(tx, plateau), loss, params, 400)
    assert_close(after, minimum, rtol=0, atol=0.05)
    assert state[-1].scale < 1  # at the minimum nothing improves any more


@pytest.mark.parametrize(
    "line_search",
    [
        optax.scale_by_backtracking_linesearch(15),
        optax.scale_by_zoom_linesearch(15),
    ],
    ids=["backtracking", "zoom"],
)
@pytest.mark.parametrize(
    "name", some(["default", "newton", "kept_rates"], default=["newton"])
)
def test_a_line_search_may_follow_and_never_increases_the_loss(name, line_search):
    """Its arguments and ours are the same ones, those of `value_fn` included."""
    tx = optax.chain(OPTIMIZERS[name], line_search)

    def loss(x, shift):
        return (1 - x[0] + shift) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2

    @jax.jit
    def call(params, state, shift):
        value, grads = jax.value_and_grad(loss)(params, shift)
        updates, state = tx.update(
            grads,
            state,
            params,
            value=value,
            grad=grads,
            value_fn=loss,
            shift=shift,
        )
        return optax.apply_updates(params, updates), state

    params = jnp.array([-1.2, 1.0])
    state = tx.init(params)
    shift = jnp.zeros(())
    values = [loss(params, shift)]
    for _ in range(30):
        params, state = call(params, state, shift)
        values.append(loss(params, shift))
    assert np.all(np.diff(values) <= 1e-6)
    # 24.2 at the start; the floor of the valley is at (1 + 1.2)^2 = 4.84 there.
    assert values[-1] < 4.84


# --- with models -----------------------------------------------------------------


class Normalised(nnx.Module):
    """What a pure function of the weights is not: running means, and dice."""

    def __init__(self, rngs):
        # No bias: normalisation takes it out again, and rounding would rate it.
        self.first = nnx.Linear(4, 8, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))


def regression():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 4)), jnp.float32)
    return x, jnp.sin(x[:, :1]) + 0.5 * x[:, 1:2]


def normalised_training(tx, steps):
    """Losses as the gradient and as the summary see them; running means; states."""
    graphdef, params, rest = nnx.split(Normalised(nnx.Rngs(0)), nnx.Param, ...)
    x, y = regression()

    def loss_and_rest(params, rest, x, y):
        model = nnx.merge(graphdef, params, rest, copy=True)
        loss = jnp.mean((model(x) - y) ** 2)
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    def loss(params, rest, x, y):
        return loss_and_rest(params, rest, x, y)[0]

    @jax.jit
    def call(params, rest, state):
        (value, rest_after), grads = jax.value_and_grad(loss_and_rest, has_aux=True)(
            params, rest, x, y
        )
        updates, state = tx.update(
            grads, state, params, value_fn=loss, rest=rest, x=x, y=y
        )
        return optax.apply_updates(params, updates), rest_after, state, value

    state = tx.init(params)
    values, seen, means = [], [], [np.asarray(rest["norm"]["mean"][...])]
    for _ in range(steps):
        params, rest, state, value = call(params, rest, state)
        values.append(float(value))
        seen.append(float(newton_state(state).loss))
        means.append(np.asarray(rest["norm"]["mean"][...]))
    return values, seen, means, state


@every_optimizer
def test_batch_norm_and_dropout_are_arguments_of_the_loss(name):
    if name == "per_element":
        pytest.skip("as many subsets as entries are for very small models")
    values, seen, means, state = normalised_training(OPTIMIZERS[name], 1)
    assert len(pn.learning_rates(state)) == 5
    # The summary saw the same mask and the same running means as the gradient.
    np.testing.assert_allclose(seen, values, rtol=1e-5)
    assert not np.array_equal(means[0], means[1])


@pytest.mark.slow
def test_batch_norm_and_dropout_train_in_the_published_setting():
    """Dropout is noise: a factor of 1 is for losses without."""
    tx = published(0.2, rule=rules.cubic(10.0))
    values, seen, _, state = normalised_training(tx, 100)
    np.testing.assert_allclose(seen, values, rtol=1e-5)
    assert len(set(values)) == 100  # each step throws its own dice
    assert newton_state(state).notfinite_count == 0
    assert np.mean(values[-10:]) < 0.5 * values[0]
