"""Primitives that the fast engine is taught, as docs/engine.md describes it."""

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from support.oracles import assert_close, quick_jit
from support.selection import some

import partnewton as pn
from partnewton import engines
from partnewton.engines import Jet, Tangent, Terms, compat
from partnewton.engines.adjoint.build import program_of
from partnewton.engines.adjoint.primitives.elementwise import ELEMENTWISE

PyTree = Any


pytestmark = pytest.mark.usefixtures("registry_is_restored")


# --- Primitives with a value and a first derivative -----------------------------------


def primitive(function: Callable, jvp: Callable | None = None) -> Callable:
    """A function as a primitive, called as the function is."""
    new = Primitive(function.__name__)
    new.def_impl(function)
    new.def_abstract_eval(
        lambda *x: jax.core.ShapedArray(jax.eval_shape(function, *x).shape, x[0].dtype)
    )
    mlir.register_lowering(new, mlir.lower_fun(function, multiple_results=False))
    ad.primitive_jvps[new] = jvp or (lambda x, v: along(function, x, v))
    return new.bind


def along(function: Callable, primals: tuple, tangents: tuple) -> tuple:
    """Value and derivative, where some tangents may be symbolic zeros."""
    return jax.jvp(function, primals, tuple(map(ad.instantiate_zeros, tangents)))


def smoothed(x):
    """Linear; its own transpose."""
    return (jnp.roll(x, 1) + 2 * x + jnp.roll(x, -1)) / 4


def softened(x):
    """Elementwise."""
    return x / (1 + x**2)


def hinge(x):
    """Piecewise linear."""
    return jnp.where(x > 0.1, 2 * x, 0.5 * x)


def log_sum_exp(x):
    return jax.nn.logsumexp(x)


def twisted(x, y):
    """Linear in either operand."""
    return x * jnp.roll(y, 1)


PRIMITIVES = types.SimpleNamespace(
    **{
        function.__name__: primitive(function)
        for function in (smoothed, softened, hinge, log_sum_exp, twisted)
    }
)


# --- Rules ---------------------------------------------------------------------------


def log_sum_exp_rule(op, primals, cotangents, jets, request):
    """With p = softmax(x), the derivatives of z are the cumulants of the tangents.

    zdot = sum(p xdot);  D2z[v, w] = c(v, w) = sum(p v w) - sum(p v) sum(p w)
    D3z[v, v, v] = c(v^2, v) - 2 sum(p v) c(v, v)
    """
    (x,), (cotangent,), ((xdot, xddot),) = primals, cotangents, jets
    p, span, v = jax.nn.softmax(x), xdot.span, xdot.values

    def covariance(v, w):
        return (v * w) @ p - (v @ p) * (w @ p)

    zdot = Tangent(v @ p, span.start)
    terms = Terms.of_hessian(xdot, xdot, weight=cotangent * p)
    terms += Terms.of_hessian(zdot, zdot, weight=-cotangent)
    if not request.third_order:
        return [Jet(zdot)], terms
    w = engines.densify(xddot, span, like=x)
    zddot = Tangent(covariance(v, v) + w @ p, span.start)
    third = covariance(v**2, v) - 2 * (v @ p) * covariance(v, v) + 3 * covariance(v, w)
    return [Jet(zdot, zddot)], terms + Terms.of_third(span, cotangent * third)


def are_both_active(equation, active):
    left, right = equation.invars
    return len(active) == 2 and left is not right


def twisted_rule(op, primals, cotangents, jets, request):
    """z = B(x, y), bilinear.

    zdot = B(xdot, y) + B(x, ydot);  zddot = B(xddot, y) + 2 B(xdot, ydot) + B(x, yddot)
    hessian_st = 2 lambda . B(xdot_s, ydot_t), symmetrised
    third_s    = 3 lambda . (B(xddot_s, ydot_s) + B(xdot_s, yddot_s))
    """
    (x, y), (cotangent,) = primals, cotangents
    (xdot, xddot), (ydot, yddot) = jets

    def along(v, w):
        """B(v_s, y) + B(x, w_s)."""
        columns = (
            engines.push(lambda _: lambda row: [twisted(row, y)], [v]),
            engines.push(lambda _: lambda row: [twisted(x, row)], [w]),
        )
        return engines.add(*(column[0] for column in columns if column))

    def across(v, w):
        """B(v_s, w_s), on the subsets that both have rows for."""
        common = None if v is None or w is None else engines.overlap(v.span, w.span)
        if common is None:
            return None
        rows = engines.restrict(v, common), engines.restrict(w, common)
        return Tangent(jax.vmap(twisted)(*rows), common.start)

    turned = Tangent(jnp.roll(ydot.values, 1, axis=1), ydot.start)
    terms = Terms.of_hessian(xdot, turned, weight=cotangent, factor=2.0)
    if not request.third_order:
        return [Jet(along(xdot, ydot))], terms
    both = across(xdot, ydot)
    for cross in (across(xddot, ydot), across(xdot, yddot)):
        if cross is not None:
            values = cross.values @ cotangent
            terms += Terms.of_third(cross.span, values, factor=3.0)
    second = engines.add(along(xddot, yddot), both, both)
    return [Jet(along(xdot, ydot), second)], terms


def register_twisted():
    engines.register_linear("twisted", operands=(0,))
    engines.rule("twisted", when=are_both_active)(twisted_rule)


class Case(NamedTuple):
    """How a primitive is registered, and the rule that it has from then on."""

    register: Callable[[], Any]
    rule: str
    apply: Callable[..., jax.Array]


CASES = {
    "linear": Case(
        lambda: engines.register_linear("smoothed"),
        "linear",
        lambda x, y: PRIMITIVES.smoothed(x),
    ),
    "elementwise": Case(
        lambda: engines.register_elementwise("softened"),
        "elementwise",
        lambda x, y: PRIMITIVES.softened(x),
    ),
    "piecewise_linear": Case(
        lambda: engines.register_piecewise_linear("hinge"),
        "piecewise_linear",
        lambda x, y: PRIMITIVES.hinge(x),
    ),
    "rule": Case(
        lambda: engines.rule("log_sum_exp")(log_sum_exp_rule),
        "log_sum_exp_rule",
        lambda x, y: PRIMITIVES.log_sum_exp(x) * jnp.ones(3),
    ),
    "rule_of_two_operands": Case(register_twisted, "twisted_rule", PRIMITIVES.twisted),
    "linear_in_one_operand": Case(
        register_twisted,
        "linear",
        lambda x, y: PRIMITIVES.twisted(x, jnp.arange(6.0)),
    ),
}


def matrix(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).normal(size=shape)


def loss_around(apply: Callable) -> Callable[[PyTree], jax.Array]:
    """A loss with a function of two arrays in it, which all parameters move."""

    def loss(p: PyTree) -> jax.Array:
        x = matrix(6, 4) @ jnp.sin(p["a"]) + matrix(6, 3) @ jnp.cos(p["b"])
        y = matrix(6, 3) @ jnp.tanh(p["b"] * p["c"])
        z = apply(x, y)
        return jnp.sum(jnp.sin(matrix(5, z.size) @ z))

    return loss


def point() -> PyTree:
    return {"a": jnp.arange(1.0, 5.0) / 4, "b": jnp.arange(3.0) - 1.3, "c": jnp.ones(3)}


def rules_in(loss: Callable, params: PyTree) -> set[tuple[str, str]]:
    """The primitives of the operations, with the names of their rules."""
    program, _ = program_of(compat.traced(loss, params)[1])
    return {
        (e.primitive.name, op.rule.name)
        for op in program.ops
        if op.rule
        for e in op.equations
    }


def assert_is_the_reference(loss: Callable, params: PyTree) -> None:
    """Summary and tensors, of both engines."""

    def both(engine):
        common = {"engine": engine, "param_labels": pn.partitions.per_tensor}

        def compute(params):
            return (
                pn.summarize(loss, params, params, **common),
                pn.derivative_tensors(loss, params, params, **common),
            )

        return jax.tree.leaves(quick_jit(compute)(params))

    for found, expected in zip(both("adjoint"), both("jvp_of_grad"), strict=True):
        assert_close(found, np.asarray(expected), 1e-11, "summary")


@pytest.mark.parametrize("name", some(CASES, default=["rule_of_two_operands"]))
def test_a_primitive_that_is_not_registered_has_the_summary_of_the_reference(name):
    with jax.enable_x64(True):
        assert_is_the_reference(loss_around(CASES[name].apply), point())


@pytest.mark.parametrize("name", some(CASES, default=["linear", "elementwise", "rule"]))
def test_a_registered_primitive_has_its_rule_and_the_same_summary(name):
    case = CASES[name]
    with jax.enable_x64(True):
        params, loss = point(), loss_around(case.apply)
        before = rules_in(loss, params)
        case.register()
        after = rules_in(loss, params)
        assert_is_the_reference(loss_around(case.apply), params)
    ((primitive, _),) = before - after
    assert before - after == {(primitive, "generic")}
    assert after - before == {(primitive, case.rule)}


def watched(apply: Callable) -> tuple[Callable, list[int]]:
    """A rule, and a list that grows each time it is called."""
    calls = []

    @functools.wraps(apply)
    def rule(*args):
        calls.append(1)
        return apply(*args)

    return rule, calls


def layers(num_layers: int) -> tuple[Callable, PyTree]:
    """A network with a primitive in each of its layers, and its parameters."""

    def loss(params: PyTree) -> jax.Array:
        x = matrix(5)
        for p in params:
            x = jnp.tanh(p["w"] @ PRIMITIVES.twisted(x, jnp.cos(p["b"])))
            x = x + PRIMITIVES.log_sum_exp(x)
        return jnp.sum(x**2)

    shapes = [((5, 5, n), (5, n)) for n in range(1, num_layers + 1)]
    return loss, [
        {"w": jnp.array(matrix(*w)[..., 0]), "b": jnp.array(matrix(*b)[:, 0])}
        for w, b in shapes
    ]


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [4, 8])
def test_a_rule_in_layers_that_repeat(num_layers):
    register_twisted()
    rule, calls = watched(log_sum_exp_rule)
    engines.rule("log_sum_exp")(rule)
    with jax.enable_x64(True):
        loss, params = layers(num_layers)
        jax.eval_shape(functools.partial(pn.summarize, loss), params, params)
        assert 0 < len(calls) < num_layers
        assert_is_the_reference(loss, params)


@pytest.mark.slow
def test_a_rule_in_a_scan():
    engines.rule("log_sum_exp")(log_sum_exp_rule)

    def loss(p: PyTree) -> jax.Array:
        def body(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
            z = PRIMITIVES.log_sum_exp(jnp.sin(x * p["a"]) * y)
            return jnp.tanh(x + z * p["a"]), z

        x, z = lax.scan(body, jnp.ones(4), matrix(3, 4) * p["b"][:, None])
        return jnp.sum(x**2) + jnp.sum(jnp.sin(z) * p["c"])

    with jax.enable_x64(True):
        assert_is_the_reference(loss, point())


def test_the_last_rule_that_applies_is_the_one():
    first, calls_of_first = watched(log_sum_exp_rule)
    second, calls_of_second = watched(log_sum_exp_rule)
    never, calls_of_never = watched(log_sum_exp_rule)
    for rule, when in (
        (first, None),
        (second, lambda equation, active: active == [0]),
        (never, lambda equation, active: len(active) == 2),
    ):
        assert engines.rule("log_sum_exp", when=when)(rule) is rule
    loss = loss_around(CASES["rule"].apply)
    jax.eval_shape(functools.partial(pn.summarize, loss), point(), point())
    assert calls_of_second
    assert not calls_of_first
    assert not calls_of_never


@pytest.mark.slow
def test_a_rule_without_terms_is_not_given_cotangents():
    @engines.rule("smoothed", is_curved=False)
    def rule(op, primals, cotangents, jets, request):
        assert cotangents is None
        first, second = (
            engines.push(lambda _: lambda row: [smoothed(row)], [jets[0][n]])
            for n in (0, 1)
        )
        return [Jet(first[0], second[0] if second else None)], Terms()

    with jax.enable_x64(True):
        loss = loss_around(CASES["linear"].apply)
        assert ("smoothed", "rule") in rules_in(loss, point())
        assert_is_the_reference(loss, point())


@pytest.mark.slow
def test_where_a_rule_raises_jax_differentiates():
    @engines.rule("log_sum_exp")
    def unfinished(op, primals, cotangents, jets, request):
        raise NotImplementedError("third order")

    with jax.enable_x64(True), pytest.warns(RuntimeWarning) as caught:
        assert_is_the_reference(loss_around(CASES["rule"].apply), point())
    warning = caught[0]
    assert warning.filename == __file__
    assert "rule unfinished of the primitive log_sum_exp" in str(warning.message)
    assert "NotImplementedError: third order" in str(warning.message)


@pytest.mark.filterwarnings("default")
def test_the_warning_about_a_rule_is_shown_once(recwarn):
    @engines.rule("log_sum_exp")
    def unfinished(op, primals, cotangents, jets, request):
        raise NotImplementedError("shown once")

    loss, params = layers(3)
    for _ in range(2):
        jax.eval_shape(functools.partial(pn.summarize, loss), params, params)
    assert len(recwarn) == 1


def test_a_registered_rule_takes_precedence_over_a_run_of_elementwise_equations():
    rule, calls = watched(ELEMENTWISE.apply)
    engines.rule("tanh")(rule)

    def loss(p: PyTree) -> jax.Array:
        return jnp.sum(jnp.exp(jnp.tanh(jnp.sin(p["a"] * p["c"][:1]) + 1.0)))

    with jax.enable_x64(True):
        assert ("tanh", "elementwise") in rules_in(loss, point())
        assert_is_the_reference(loss, point())
    assert calls


@pytest.mark.parametrize(
    "register",
    [
        engines.register_linear,
        engines.register_elementwise,
        engines.register_piecewise_linear,
        engines.register_piecewise_constant,
        engines.rule,
    ],
)
def test_primitives_are_registered_by_name(register):
    with pytest.raises(TypeError, match="by its name, a string, got smoothed"):
        register(Primitive("smoothed"))


def test_a_rule_without_a_primitive_is_an_error():
    with pytest.raises(TypeError, match="by its name"):

        @engines.rule
        def rule(op, primals, cotangents, jets, request):
            """A decorator without its parentheses."""


def test_singularities_are_at_zero_or_elsewhere():
    with pytest.raises(ValueError, match='None, "zero" or "elsewhere", got 0'):
        engines.register_elementwise("softened", singular=0)


# --- What users get wrong -------------------------------------------------------------


def cube_rule(op, primals, cotangents, jets, request, third=6.0):
    (x,), (cotangent,), ((xdot, _),) = primals, cotangents, jets
    zdot = Tangent(3 * x**2 * xdot.values, xdot.start)
    terms = Terms.of_hessian(xdot, xdot, weight=cotangent * third * x)
    return [Jet(zdot)], terms


class CubeRule:
    def __call__(self, *arguments):
        return cube_rule(*arguments)


def cube(x):
    return x**3


cubed = primitive(cube)


def loss_of_cubes(p):
    return jnp.sum(cubed(p["a"] * p["b"]))


corner = {"a": jnp.arange(1.0, 4.0), "b": jnp.array([0.5, -1.0, 2.0])}


def second_order_of_cubes():
    return [
        pn.summarize(loss_of_cubes, corner, corner, third_order=False, engine=e).hessian
        for e in engines.ENGINES
    ]


@pytest.mark.parametrize(
    "make",
    [
        functools.partial,
        lambda f: functools.partial(f, third=6.0),
        lambda f: CubeRule(),
    ],
    ids=["partial", "partial of an option", "object"],
)
def test_every_kind_of_callable_may_be_the_rule_of_a_primitive(make):
    engines.rule("cube")(make(cube_rule))
    names = {x.rule for x in engines.operations(loss_of_cubes, corner)}
    assert names & {"cube_rule", "CubeRule"}
    np.testing.assert_allclose(*second_order_of_cubes(), rtol=1e-5)


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (lambda jets: None, "a list of 1 engines.Jet"),
        (lambda jets: jets, "a list of 1 engines.Jet"),
        (lambda jets: (jets[0], Terms()), "a list of 1 engines.Jet"),
        (lambda jets: ([jets[0].first], Terms()), "got a Tangent in the list"),
        (lambda jets: ([Jet(jets[0].first.values)], Terms()), "two engines.Tangent"),
        (lambda jets: (jets, 0.0), "got float as the second"),
        (
            lambda jets: ([Jet(Tangent(jets[0].first.values[:, :1]))], Terms()),
            r"shape of the output, \(3,\), got rows of shape \(1,\)",
        ),
    ],
)
def test_the_warning_about_a_wrong_result_of_a_rule_says_what_is_expected(result, told):
    def wrong_rule(op, primals, cotangents, jets, request):
        return result(jets)

    engines.rule("cube")(wrong_rule)
    with pytest.warns(RuntimeWarning, match=rf"wrong_rule of the primitive.*{told}"):
        np.testing.assert_allclose(*second_order_of_cubes(), rtol=1e-5)


def test_the_warning_about_a_rule_that_is_a_partial_names_its_function():
    def failing_rule(*arguments):
        raise ValueError("no idea")

    engines.rule("cube")(functools.partial(failing_rule))
    with pytest.warns(RuntimeWarning, match="The rule failing_rule .* no idea"):
        second_order_of_cubes()


def test_a_rule_that_is_not_a_function_is_an_error():
    with pytest.raises(TypeError, match="A rule is a function, got str"):
        engines.rule("cube")("cube_rule")


# --- The list of operations -----------------------------------------------------------


def test_operations_lists_rules_also_in_a_scan_and_in_the_final_step():
    @jax.custom_vjp
    def clipped(x):
        return x

    clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))

    def loss(p):
        def body(carry, _):
            return jnp.sin(carry) * p["b"], None

        carry, _ = lax.scan(body, p["a"], length=3)
        return jnp.sum(clipped(jnp.cumsum(carry)) ** 2)

    listed = engines.operations(loss, corner)
    assert listed[0] == ("scan", ("scan",))
    assert ("linear", ("cumsum",)) in listed
    assert any("sin" in x.primitives for x in listed[1:3])
    assert listed[-1].rule == "final step"
    assert "custom_vjp_call" in listed[-1].primitives
