"""Losses to hold an engine against: four small models and a zoo of operations.

Every problem is drawn from its name alone, with numbers that float32 can hold, so
that ``make(name, jnp.float32)`` and ``make(name, jnp.float64)`` are the same point of
the same function. Float64 problems are made, and used, under `jax.enable_x64`.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

PyTree = Any
Loss = Callable[[PyTree], jax.Array]
Data = Callable[..., jax.Array]


class Problem(NamedTuple):
    """A loss and a point at which it is three times differentiable.

    Attributes:
      name: what it is called in test ids.
      loss: a function from params to a scalar.
      params: the point.
      direction: a pytree like `params`; for some problems it is the gradient.
      plain: the same function without custom rules and low precision, for oracles.
      rounding: the relative error that the loss itself makes by rounding inside.
    """

    name: str
    loss: Loss
    params: PyTree
    direction: PyTree
    plain: Loss
    rounding: float = 0.0


def make(name: str, dtype: Any) -> Problem:
    """The problem called `name`, with parameters and data of type `dtype`."""
    return _ZOO[name].make(name, dtype)


@dataclasses.dataclass(frozen=True)
class _Recipe:
    loss: Callable[[PyTree, Data], jax.Array]
    plain: Callable[[PyTree, Data], jax.Array]
    shapes: PyTree
    along_gradient: bool
    rounding: float

    def make(self, name: str, dtype: Any) -> Problem:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        data = functools.partial(_data, dtype)
        with jax.enable_x64(True):
            point = jax.tree.map(functools.partial(_draw, rng), *self._shapes())
            direction = jax.tree.map(functools.partial(_draw, rng), *self._shapes())
            if self.along_gradient:
                loss = functools.partial(self.plain, data=_data_of(jnp.float64))
                direction = jax.tree.map(_representable, jax.jit(jax.grad(loss))(point))
            point, direction = jax.tree.map(
                lambda x: jnp.asarray(x, dtype), (point, direction)
            )
        return Problem(
            name,
            functools.partial(self.loss, data=data),
            point,
            direction,
            functools.partial(self.plain, data=data),
            self.rounding,
        )

    def _shapes(self) -> tuple[PyTree]:
        def as_struct(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, np.float64)

        shapes = self.shapes() if callable(self.shapes) else self.shapes
        return (
            jax.tree.map(
                lambda x: as_struct(x if isinstance(x, tuple) else x.shape),
                shapes,
                is_leaf=lambda x: isinstance(x, tuple),
            ),
        )


_ZOO: dict[str, _Recipe] = {}


def _problem(
    shapes: PyTree,
    *,
    plain: Callable | None = None,
    along_gradient: bool = False,
    rounding: float = 0.0,
) -> Callable:
    """Enters a loss ``(params, data) -> scalar`` into the zoo under its own name."""

    def enter(loss: Callable) -> Callable:
        name = loss.__name__.strip("_")
        _ZOO[name] = _Recipe(loss, plain or loss, shapes, along_gradient, rounding)
        return loss

    return enter


def _representable(x: Any) -> np.ndarray:
    """Rounded to what float32 can hold."""
    return np.asarray(x, np.float32).astype(np.float64)


def _draw(rng: np.random.Generator, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 2.0
    return _representable(rng.normal(size=leaf.shape) / np.sqrt(fan_in))


def _data(dtype: Any, *shape: int, seed: int = 0) -> jax.Array:
    """Normal numbers that depend on shape and seed alone."""
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(_representable(rng.normal(size=shape)), dtype)


def _data_of(dtype: Any) -> Data:
    return functools.partial(_data, dtype)


def _score(y: jax.Array) -> jax.Array:
    """A scalar with all derivatives: linear, quadratic and oscillating parts."""
    return jnp.mean(jnp.sin(y) + 0.5 * y**2)


# --- The four models ---------------------------------------------------------------


@_problem(
    {
        "layer_0": {"bias": (3,), "kernel": (2, 3)},
        "layer_1": {"bias": (3,), "kernel": (3, 3)},
        "layer_2": {"bias": (2,), "kernel": (3, 2)},
    },
    along_gradient=True,
)
def mlp(p: PyTree, data: Data) -> jax.Array:
    x = data(5, 2)
    for layer in ("layer_0", "layer_1"):
        x = jnp.tanh(x @ p[layer]["kernel"] + p[layer]["bias"])
    y = x @ p["layer_2"]["kernel"] + p["layer_2"]["bias"]
    return jnp.mean((y - data(5, 2, seed=1)) ** 2)


def _conv(
    x: jax.Array, kernel: jax.Array, padding: Any = "SAME", **kwargs: Any
) -> jax.Array:
    strides = kwargs.pop("window_strides", (1,) * (x.ndim - 2))
    letters = "HWD"[: x.ndim - 2]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=numbers, **kwargs
    )


@_problem(
    {
        "conv_0": {"bias": (2,), "kernel": (3, 3, 1, 2)},
        "conv_1": {"bias": (3,), "kernel": (2, 2, 2, 3)},
        "head": {"bias": (3,), "kernel": (12, 3)},
    },
)
def convolutional_network(p: PyTree, data: Data) -> jax.Array:
    x = _conv(data(2, 4, 4, 1, seed=7), p["conv_0"]["kernel"]) + p["conv_0"]["bias"]
    x = linen.max_pool(jax.nn.elu(x), (2, 2), strides=(2, 2))
    x = jax.nn.relu(_conv(x, p["conv_1"]["kernel"]) + p["conv_1"]["bias"])
    logits = x.reshape(2, -1) @ p["head"]["kernel"] + p["head"]["bias"]
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(2), jnp.array([2, 0])])


def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-3) * scale + bias


@_problem(
    {
        "attention": {"out": (4, 4), "qkv": (4, 3, 2, 2)},
        "embedding": (5, 4),
        "norm": {"bias": (4,), "scale": (4,)},
    },
)
def attention(p: PyTree, data: Data) -> jax.Array:
    tokens = jnp.array([[0, 3, 1, 4], [2, 2, 0, 1]])
    x = p["embedding"][tokens]
    h = _layer_norm(x, p["norm"]["scale"], p["norm"]["bias"])
    q, k, v = jnp.einsum("btd,dchk->cbthk", h, p["attention"]["qkv"])
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(2)
    mask = jnp.tril(jnp.ones((4, 4), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    mixed = jnp.einsum("bhts,bshk->bthk", weights, v).reshape(2, 4, 4)
    x = x + mixed @ p["attention"]["out"]
    log_p = jax.nn.log_softmax(x @ p["embedding"].T)
    return -jnp.mean(jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], 2))


@_problem(
    {
        "cell": {"bias": (12,), "hidden": (3, 12), "input": (2, 12)},
        "readout": {"bias": (1,), "kernel": (3, 1)},
    },
)
def lstm(p: PyTree, data: Data) -> jax.Array:
    def step(carry: tuple, x: jax.Array) -> tuple:
        c, h = carry
        gates = x @ p["cell"]["input"] + h @ p["cell"]["hidden"] + p["cell"]["bias"]
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    xs = data(4, 2, 2)
    zeros = jnp.zeros((2, 3), xs.dtype)
    _, hs = lax.scan(step, (zeros, zeros), xs)
    y = hs @ p["readout"]["kernel"] + p["readout"]["bias"]
    return jnp.mean((y - data(4, 2, 1)) ** 2)


MODELS = tuple(_ZOO)


# --- Products ----------------------------------------------------------------------


@_problem({"b": (3,), "w": (2, 3)}, along_gradient=True)
def dense(p: PyTree, data: Data) -> jax.Array:
    return _score(data(4, 2) @ p["w"] + p["b"])


@_problem({"w": (3, 3)})
def a_weight_used_three_times(p: PyTree, data: Data) -> jax.Array:
    return _score(data(2, 3) @ p["w"] @ p["w"].T @ p["w"])


@_problem({"idle": (3,), "scale": (), "shift": (2,)})
def a_linear_loss_and_an_unused_leaf(p: PyTree, data: Data) -> jax.Array:
    return 3.0 * p["scale"] - jnp.sum(p["shift"] * data(2))


@_problem(())
def a_lone_scalar(p: PyTree, data: Data) -> jax.Array:
    return p**3 + jnp.cos(p)


@_problem([(2,), {"a": (2, 2)}, [(3,)]])
def a_leaf_with_zero_gradient(p: PyTree, data: Data) -> jax.Array:
    still = jnp.sum(jnp.sign(p[0]) * jnp.floor(p[0]) + lax.stop_gradient(p[0]))
    return still * _score(p[1]["a"]) + _score(p[2][0] - lax.stop_gradient(p[2][0]) + 1)


@_problem({"a": (2, 3), "b": (3, 2), "c": (2, 2, 3)}, along_gradient=True)
def einsum(p: PyTree, data: Data) -> jax.Array:
    y = jnp.einsum("bij,jk,kl->bil", p["c"], p["b"], p["a"])
    z = jnp.einsum("ij,ij->", p["a"], p["b"].T) * jnp.einsum("bii->b", y[:, :, :2])
    return _score(y) + _score(z) + _score(jnp.einsum("bi,bj->bij", y[:, 0], y[:, 1]))


@_problem({"grouped": (2, 2, 1, 4), "strided": (3, 3, 2, 2)})
def convolutions_strided_and_grouped(p: PyTree, data: Data) -> jax.Array:
    x = _conv(data(2, 5, 5, 2), p["strided"], window_strides=(2, 2))
    x = _conv(jnp.tanh(jnp.concatenate([x, -x], -1)), p["grouped"],
              feature_group_count=4)  # fmt: skip
    return _score(x)


@_problem({"dilated": (2, 2, 1, 2), "image": (1, 4, 4, 1), "transposed": (3, 3, 2, 1)})
def convolutions_dilated_and_transposed(p: PyTree, data: Data) -> jax.Array:
    x = _conv(p["image"], p["dilated"], "VALID", rhs_dilation=(2, 2))
    x = lax.conv_transpose(jnp.tanh(x), p["transposed"], (2, 2), "SAME")
    return _score(x + data(4, 4, 1))


@_problem({"kernel": (2, 2, 3), "signal": (2, 5, 2)})
def convolution_of_two_parameters(p: PyTree, data: Data) -> jax.Array:
    return _score(_conv(p["signal"], p["kernel"], "VALID"))


@_problem({"w": (3, 3, 1, 2)})
def pooling(p: PyTree, data: Data) -> jax.Array:
    x = _conv(data(1, 4, 4, 1), p["w"])
    top = linen.max_pool(x, (2, 2), strides=(2, 2))
    mean = linen.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME")
    return _score(top) + _score(mean**2)


# --- Normalisation -----------------------------------------------------------------


@_problem({"beta": (3,), "gamma": (3,), "w": (2, 3)})
def batch_norm(p: PyTree, data: Data) -> jax.Array:
    x = data(5, 2) @ p["w"]
    x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-2)
    return _score(x * p["gamma"] + p["beta"])


@_problem({"scale": (4,), "w": (2, 4)})
def group_norm_and_rms_norm(p: PyTree, data: Data) -> jax.Array:
    x = jnp.tanh(data(3, 2) @ p["w"]).reshape(3, 2, 2)
    x = (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 0.1)
    x = x.reshape(3, 4) + data(3, 4)
    x = x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-3)
    return _score(x * p["scale"])


# --- Indexing, sorting, shapes -----------------------------------------------------


@_problem({"table": (5, 2), "w": (2, 2)})
def embedding_and_gathers(p: PyTree, data: Data) -> jax.Array:
    x = p["table"][jnp.array([0, 3, 3, 1])] @ p["w"]
    y = jnp.take(p["table"], jnp.array([1, 9]), axis=0, mode="fill", fill_value=0.5)
    z = jnp.take_along_axis(x, jnp.array([[0], [1], [1], [0]]), 1)
    return _score(x) + _score(y) + _score(z) + _score(x[::2, -1] * p["w"][1])


@_problem({"w": (6,), "x": (2, 4)})
def dynamic_slices(p: PyTree, data: Data) -> jax.Array:
    start = jnp.argmax(data(3))
    x = lax.dynamic_slice(p["w"], (start,), (2,)) * p["x"][:, :2]
    y = lax.dynamic_update_slice(p["x"] ** 2, x, (0, start))
    return _score(y * lax.dynamic_index_in_dim(p["w"], start + 1))


@_problem({"a": (4, 2), "b": (3, 2)})
def scatters(p: PyTree, data: Data) -> jax.Array:
    added = jnp.sin(p["a"]).at[jnp.array([0, 2, 0])].add(p["b"])
    placed = (p["a"] ** 2).at[1].set(p["b"][0]).at[jnp.array([3]), 0].multiply(2.0)
    summed = jax.ops.segment_sum(p["a"] * placed, jnp.array([1, 0, 1, 2]), 3)
    return _score(added) + _score(placed) + _score(summed * p["b"])


@_problem({"keys": (5,), "values": (5,)})
def sorting(p: PyTree, data: Data) -> jax.Array:
    keys, values = lax.sort((p["keys"] * 2.0, p["values"] ** 2), num_keys=1)
    top, places = lax.top_k(p["values"] * p["keys"], 2)
    order = jnp.argsort(-p["values"])
    weights = jnp.arange(1.0, 6.0, dtype=keys.dtype)
    return (
        _score(keys * weights * values)
        + _score(top * p["keys"][places])
        + _score(p["keys"][order] * weights)
        + _score(p["values"][jnp.argmax(p["keys"])] * p["keys"])
    )


@_problem({"a": (2, 3), "b": (3,), "fill": ()})
def shapes(p: PyTree, data: Data) -> jax.Array:
    a, b = p["a"], p["b"]
    x = lax.pad(jnp.concatenate([a, b[None]]), p["fill"], [(1, 0, 0), (0, 1, 1)])
    y = jnp.roll(jnp.stack([a[0], b, jnp.flip(a[1])]), 1, axis=0)
    z = jnp.tile(b.reshape(3, 1), (2, 2)).T.squeeze()
    first, second = jnp.split(y * jnp.broadcast_to(b, (3, 3)), [1])
    return _score(x) + _score(y @ y.T) + _score(z) + _score(first * second)


# --- Elementwise -------------------------------------------------------------------


def _columns(p: PyTree, data: Data, *functions: Callable) -> jax.Array:
    """Each function on a column of its own of one and the same dense layer."""
    x = data(4, 2) @ p["w"] + p["b"]
    return sum(_score(f(x + i / 10)) for i, f in enumerate(functions))


@_problem({"b": (2,), "w": (2, 2)})
def activations(p: PyTree, data: Data) -> jax.Array:
    nn = jax.nn
    return _columns(p, data, nn.relu, nn.elu, nn.gelu, nn.softplus, nn.swish,
                    nn.sigmoid, nn.leaky_relu,
                    functools.partial(nn.gelu, approximate=False))  # fmt: skip


@_problem({"b": (3,), "w": (2, 3)}, along_gradient=True)
def softmaxes(p: PyTree, data: Data) -> jax.Array:
    mask = jnp.array([[True, False, True]])
    return _columns(
        p,
        data,
        jax.nn.log_softmax,
        functools.partial(jax.nn.softmax, axis=0),
        functools.partial(jax.nn.logsumexp, axis=-1),
        lambda x: jax.nn.softmax(x, where=mask, axis=-1),
    )


@_problem({"b": (2,), "w": (2, 2)})
def powers_and_quotients(p: PyTree, data: Data) -> jax.Array:
    def positive(x: jax.Array) -> jax.Array:
        return x**2 + 0.5

    return _columns(
        p,
        data,
        lambda x: x**4 - x**3,
        lambda x: positive(x) ** -2,
        lambda x: positive(x) ** 1.7,
        lambda x: positive(x) ** x,
        lambda x: 2.0**x,
        lambda x: x / positive(x),
        lambda x: jnp.sqrt(positive(x)) - lax.rsqrt(positive(x)) + jnp.cbrt(x),
        lambda x: jnp.exp(-x) + jnp.log(positive(x)) + jnp.expm1(x),
        lambda x: jnp.log1p(positive(x)) + jnp.exp2(x) + jnp.reciprocal(positive(x)),
    )


@_problem({"b": (2,), "w": (2, 2)})
def special_functions(p: PyTree, data: Data) -> jax.Array:
    return _columns(
        p,
        data,
        lambda x: jnp.sin(x) * jnp.cos(2 * x) + jnp.tan(x / 9),
        lambda x: jnp.arctan(x) + jnp.arcsin(jnp.tanh(x) / 2) + jnp.arcsinh(x),
        lambda x: jnp.sinh(x) - jnp.cosh(x / 2) + jnp.arctanh(jnp.tanh(x) / 2),
        lambda x: lax.erf(x) + lax.erfc(2 * x) + lax.erf_inv(jnp.tanh(x) / 2),
        lambda x: lax.lgamma(x**2 + 1.0) + lax.digamma(x**2 + 1.0),
    )


@_problem({"x": (4,), "y": (4,)})
def functions_of_two_arguments(p: PyTree, data: Data) -> jax.Array:
    x, y = p["x"], p["y"]
    return (
        _score(x * y - y / (x**2 + 1))
        + _score(jnp.arctan2(x, y))
        + _score(jnp.logaddexp(x, 3 * y))
        + _score(jnp.hypot(x, y))
        + _score(jnp.maximum(x * 2, y) * jnp.minimum(x, y))
        + _score(jnp.fmod(5 * x, 0.7) * y)
    )


@_problem({"x": (5,), "y": (5,)})
def piecewise_functions(p: PyTree, data: Data) -> jax.Array:
    x, y = p["x"], p["y"]
    safe, bits = jnp.where(x > 0, x, 1.0), jnp.finfo(x.dtype)
    return (
        _score(jnp.clip(x * y, -0.1, 0.2) * y)
        + _score(lax.clamp(jnp.asarray(-0.3, x.dtype), x, jnp.asarray(0.3, x.dtype)))
        + _score(jnp.where(x > 0, jnp.log(safe), y**3))
        + _score(jnp.select([x > 0.5, y > 0], [x**2, x * y], y))
        + _score(jnp.abs(x) * jnp.sign(y) * x)
        + _score(lax.reduce_precision(x, bits.nexp, bits.nmant) * y)
    )


# --- Reductions --------------------------------------------------------------------


@_problem({"w": (2, 3), "x": (3, 2)})
def reductions(p: PyTree, data: Data) -> jax.Array:
    w = p["w"] @ p["x"] @ p["w"]
    return (
        jnp.max(w) * jnp.min(p["x"])
        + _score(jnp.max(w, axis=0) * w)
        + _score(jnp.prod(w, axis=1))
        + jnp.std(w) * jnp.var(p["x"])
        + jnp.linalg.norm(w) * jnp.median(p["x"][:, 0])
        + lax.reduce(w, np.array(0, w.dtype), lax.add, (0, 1)) ** 2
    )


@_problem({"w": (2, 4)})
def cumulations(p: PyTree, data: Data) -> jax.Array:
    w = p["w"] + data(2, 4) / 4
    return (
        _score(jnp.cumsum(w**2, axis=1))
        + _score(jnp.cumprod(w, axis=1))
        + _score(lax.cumlogsumexp(w, axis=1))
        + _score(lax.cummax(w, axis=1) * w)
        + _score(lax.associative_scan(lambda a, b: a * b + a + b, w, axis=1))
    )


# --- Linear algebra ----------------------------------------------------------------


def _positive_definite(w: jax.Array) -> jax.Array:
    return w @ w.T + jnp.eye(len(w), dtype=w.dtype)


@_problem({"b": (3,), "w": (3, 3)})
def factorisations(p: PyTree, data: Data) -> jax.Array:
    m = _positive_definite(p["w"])
    factor = jnp.linalg.cholesky(m)
    x = lax.linalg.triangular_solve(factor, p["b"][:, None], left_side=True, lower=True)
    return _score(x) + jnp.sum(jnp.log(jnp.diagonal(factor)))


@_problem({"b": (3,), "w": (3, 3)})
def solves_and_determinants(p: PyTree, data: Data) -> jax.Array:
    m = _positive_definite(p["w"]) + 0.3 * p["w"]
    x = jnp.linalg.solve(m, p["b"])
    return _score(x) + jnp.linalg.slogdet(m)[1] + _score(jnp.linalg.inv(m))


@_problem({"w": (3, 3)})
def eigenvalues(p: PyTree, data: Data) -> jax.Array:
    return _score(jnp.linalg.eigvalsh(_positive_definite(p["w"]) + jnp.diag(data(3))))


# --- Control flow ------------------------------------------------------------------


@_problem({"b": (2,), "start": (2,), "w": (2, 2)}, along_gradient=True)
def scan_over_constants(p: PyTree, data: Data) -> jax.Array:
    def step(h: jax.Array, x: jax.Array) -> tuple:
        h = jnp.tanh(p["w"] @ h + p["b"] * x)
        return h, h

    h, hs = lax.scan(step, p["start"], data(4, 2), reverse=True)
    return _score(h) + _score(hs[1])


@_problem({"b": (3, 2), "w": (3, 2, 2)})
def scan_over_layers(p: PyTree, data: Data) -> jax.Array:
    def layer(carry: tuple, wb: PyTree) -> tuple:
        n, h = carry
        return (n + 1, jnp.tanh(h @ wb["w"] + wb["b"] * n) + h), None

    (n, h), _ = lax.scan(jax.checkpoint(layer), (jnp.int32(0), data(2, 2)), p)
    return _score(h) + n


@_problem({"w": (2, 2)})
def scan_in_a_scan(p: PyTree, data: Data) -> jax.Array:
    def outer(h: jax.Array, x: jax.Array) -> tuple:
        h, _ = lax.scan(lambda a, _: (jnp.sin(p["w"] @ a) + x, None), h, length=2)
        return h, jnp.sum(h)

    h, sums = lax.scan(outer, data(2), data(3, 2))
    return _score(h) * _score(sums)


@_problem({"w": (2, 2), "x": (2,)})
def fori_loop(p: PyTree, data: Data) -> jax.Array:
    def body(i: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sin(p["w"] @ x) + x * i

    return _score(lax.fori_loop(0, 3, body, p["x"]))


@_problem({"w": (2, 2)})
def while_loop_on_data(p: PyTree, data: Data) -> jax.Array:
    m = data(2, 2) @ data(2, 2).T

    def body(state: tuple) -> tuple:
        i, v = state
        return i + 1, m @ v / jnp.linalg.norm(m @ v)

    n, v = lax.while_loop(lambda s: s[0] < 5, body, (0, jnp.ones(2, m.dtype)))
    return _score(p["w"] @ v * n)


@_problem({"a": (2,), "b": (2,)})
def branches_on_parameters(p: PyTree, data: Data) -> jax.Array:
    a, b = p["a"], p["b"]
    x = lax.cond(
        jnp.sum(a) > 0, lambda a, b: jnp.sin(a) * b, lambda a, b: a**3 + b, a, b
    )
    place = jnp.argmax(jnp.stack([a[0], b[1], jnp.asarray(-9.0, a.dtype)]))
    y = lax.switch(
        place, [lambda x: x**3, lambda x: jnp.exp(x) * b, lambda x: x * 0], x
    )
    return _score(x) + _score(y)


@_problem({"w": (2, 2)})
def nested_jits(p: PyTree, data: Data) -> jax.Array:
    @jax.jit
    def inner(x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["w"])

    @jax.jit
    def outer(x: jax.Array) -> tuple:
        y = inner(x)
        return inner(y), y  # the same jaxpr twice, and two results

    first, second = outer(data(3, 2))
    return _score(first * outer(second)[0]) + _score(jax.jit(_score)(first))


@_problem({"b": (2,), "w": (2, 2)})
def vmap_inside(p: PyTree, data: Data) -> jax.Array:
    def example(x: jax.Array, b: jax.Array) -> jax.Array:
        h = lax.cond(x[0] > 0, jnp.sin, jnp.cos, p["w"] @ x)
        return lax.scan(lambda h, _: (jnp.tanh(p["w"] @ h) + b, None), h, length=2)[0]

    return _score(jax.vmap(example)(data(3, 2), p["b"] * data(3, 1))) + _score(
        lax.map(lambda x: jnp.sin(p["w"] @ x), data(3, 2))
    )


@_problem({"b": (2,), "w": (2, 2)})
def checkpoint(p: PyTree, data: Data) -> jax.Array:
    @jax.checkpoint
    def block(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ w) + x

    x = checkpoint_name(block(p["w"], data(3, 2)), "x")
    return _score(block(p["w"], lax.optimization_barrier(x)) + p["b"])


@_problem({"b": (2,), "w": (2, 2)}, along_gradient=True)
def a_gradient_inside(p: PyTree, data: Data) -> jax.Array:
    def energy(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(p["w"] @ x) * p["b"])

    force = jax.vmap(jax.grad(energy))(data(3, 2))
    _, bend = jax.jvp(jax.grad(energy), (data(2),), (data(2, seed=1),))
    return _score(force) + _score(bend)


# --- Rules of one's own ------------------------------------------------------------


def _soft(x: jax.Array, sharpness: Any) -> jax.Array:
    return jnp.log1p(jnp.exp(sharpness * x)) / sharpness


_soft_jvp = jax.custom_jvp(_soft, nondiff_argnums=(1,))


@_soft_jvp.defjvp
def _(sharpness: Any, primals: tuple, tangents: tuple) -> tuple:
    (x,), (dx,) = primals, tangents
    return _soft(x, sharpness), jax.nn.sigmoid(sharpness * x) * dx


_soft_vjp = jax.custom_vjp(_soft, nondiff_argnums=(1,))
_soft_vjp.defvjp(
    lambda x, sharpness: (_soft(x, sharpness), x),
    lambda sharpness, x, g: (jax.nn.sigmoid(sharpness * x) * g,),
)


def _soft_network(soft: Callable, p: PyTree, data: Data) -> jax.Array:
    x = soft(data(3, 2) @ p["w"], 2.0) * p["b"]
    x, _ = lax.scan(lambda x, _: (soft(x @ p["w"], 3.0), None), x, length=2)
    return _score(x)


@_problem({"b": (2,), "w": (2, 2)}, plain=functools.partial(_soft_network, _soft))
def custom_jvp(p: PyTree, data: Data) -> jax.Array:
    return _soft_network(_soft_jvp, p, data)


@_problem({"b": (2,), "w": (2, 2)}, plain=functools.partial(_soft_network, _soft))
def custom_vjp(p: PyTree, data: Data) -> jax.Array:
    return _soft_network(_soft_vjp, p, data)


# --- Random numbers and effects ----------------------------------------------------


# Random numbers are drawn in float32, for the same numbers in every precision.
_RATE = np.float32(0.3)


@_problem({"w": (2, 4)})
def random_numbers(p: PyTree, data: Data) -> jax.Array:
    keep, noise = jax.random.split(jax.random.key(3))
    x = jnp.tanh(data(3, 2) @ p["w"])
    mask = jax.random.bernoulli(keep, _RATE, x.shape)
    x = jnp.where(mask, x / 0.7, 0.0)
    return _score(x * jax.random.normal(noise, x.shape, jnp.float32).astype(x.dtype))


@_problem({"w": (2, 2)})
def a_callback_that_looks_on(p: PyTree, data: Data) -> jax.Array:
    x = jnp.tanh(data(3, 2) @ p["w"])
    jax.debug.callback(lambda *_: None, x[0])
    return _score(x @ p["w"])


# --- Number types ------------------------------------------------------------------


def _two_layers(p: PyTree, data: Data) -> jax.Array:
    return _score(jnp.tanh(data(4, 3) @ p["w"] + p["b"]) @ p["v"])


# The point at which the tanh is taken is itself rounded, to 2^-8, and with it the few
# factors of each third derivative: wider sums do not mend that.
@_problem({"b": (4,), "v": (4, 2), "w": (3, 4)}, plain=_two_layers, rounding=2**-5)
def computed_in_bfloat16(p: PyTree, data: Data) -> jax.Array:
    b, v, w = (p[k].astype(jnp.bfloat16) for k in ("b", "v", "w"))
    y = jnp.tanh(data(4, 3).astype(jnp.bfloat16) @ w + b) @ v
    return _score(y.astype(p["b"].dtype))


@_problem({"b": (4,), "v": (4, 2), "w": (3, 4)}, plain=_two_layers, rounding=2**-6)
def mixed_precision_products(p: PyTree, data: Data) -> jax.Array:
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        low = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
        return jnp.matmul(*low, preferred_element_type=jnp.float32)

    y = product(jnp.tanh(product(data(4, 3), p["w"]) + p["b"]), p["v"])
    return _score(y.astype(p["b"].dtype))


@_problem({"x": (3,), "y": (3,)})
def complex_numbers(p: PyTree, data: Data) -> jax.Array:
    z = lax.complex(p["x"], p["y"]) * jnp.exp(1j * p["x"])
    return _score(jnp.abs(z) ** 2) + _score(jnp.real(z * z)) + _score(jnp.imag(z))


# --- Flax --------------------------------------------------------------------------


class _Linen(linen.Module):
    dtype: Any

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": self.dtype}
        x = linen.Conv(2, (2, 2), strides=(2, 2), **types)(x)
        x = jax.nn.gelu(linen.BatchNorm(use_running_average=False, **types)(x))
        x = linen.Dropout(_RATE, deterministic=False)(x.reshape(len(x), -1))
        return linen.Dense(2, **types)(x)


def _linen_shapes() -> PyTree:
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    module, x = _Linen(jnp.float32), jnp.ones((3, 4, 4, 1))
    return jax.eval_shape(module.init, keys, x)["params"]


@_problem(_linen_shapes)
def linen_model(p: PyTree, data: Data) -> jax.Array:
    x = data(3, 4, 4, 1)
    y, _ = _Linen(x.dtype).apply(
        {"params": p, "batch_stats": {"BatchNorm_0": _statistics(x.dtype)}},
        x,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(7)},
    )
    return _score(y)


def _statistics(dtype: Any) -> PyTree:
    return {"mean": jnp.zeros(2, dtype), "var": jnp.ones(2, dtype)}


class _Nnx(nnx.Module):
    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        types = {"dtype": dtype, "param_dtype": dtype}
        self.conv = nnx.Conv(1, 2, (2, 2), strides=(2, 2), rngs=rngs, **types)
        self.norm = nnx.BatchNorm(2, rngs=rngs, **types)
        self.dropout = nnx.Dropout(_RATE, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs, **types)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.gelu(self.norm(self.conv(x)))
        return self.head(self.dropout(x.reshape(len(x), -1)))


def _nnx_shapes() -> PyTree:
    return nnx.state(nnx.eval_shape(lambda: _Nnx(jnp.float32, nnx.Rngs(0))), nnx.Param)


@_problem(_nnx_shapes)
def nnx_model(p: PyTree, data: Data) -> jax.Array:
    x = data(3, 4, 4, 1)
    graph, _, rest = nnx.split(_Nnx(x.dtype, nnx.Rngs(7)), nnx.Param, ...)
    # Flax keeps the running averages in float32.
    rest = jax.tree.map(
        lambda r: r.astype(x.dtype) if jnp.issubdtype(r.dtype, jnp.floating) else r,
        rest,
    )
    return _score(nnx.merge(graph, p, rest)(x))


NAMES = tuple(_ZOO)
