"""The steps that are possible from the current parameters."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from partnewton import engines
from partnewton._error_hints import with_error_hints
from partnewton._tree import all_finite
from partnewton.partitions.partition import Partition
from partnewton.subspace.basis import combine, orthonormal
from partnewton.subspace.line import line_step
from partnewton.subspace.model import quadratic_model
from partnewton.subspace.search import search
from partnewton.summary import summarize

__all__ = ["Point", "Step"]

Leaves = Sequence[jax.Array]

_NOISE_INTERVAL = 10  # updates


class Step(NamedTuple):
    """A step, with the sign of a gradient, and what is known of it.

    Attributes:
      step: the active leaves; zeros if it was not accepted.
      rms: the root mean square of the entries of each subset, (S,).
      loss: before the step, ().
      damping: to begin with at the next step in the subspace, ().
      decrease: of the loss, (); 0 if the step was not accepted.
      predicted_decrease: by the quadratic model, ().
      noise: the rounding errors of the loss, ().
      is_finite: whether the loss and its derivatives were finite, ().
      is_of_subspace: whether it is one in the subspace, ().
    """

    step: list[jax.Array]
    rms: jax.Array
    loss: jax.Array
    damping: jax.Array
    decrease: jax.Array
    predicted_decrease: jax.Array
    noise: jax.Array
    is_finite: jax.Array
    is_of_subspace: jax.Array

    @property
    def is_accepted(self) -> jax.Array:
        """Whether the step decreases the loss, ()."""
        return self.decrease > 0


class Point:
    """The parameters, and the loss around them."""

    def __init__(
        self,
        value_fn: Callable[[optax.Params], Any],
        params: optax.Params,
        partition: Partition,
        has_aux: bool,
    ):
        self._value_fn, self._has_aux = value_fn, has_aux
        self._params, self._partition = params, partition
        self._leaves, self._treedef = jax.tree.flatten(params)
        self._likes = partition.take_active(self._leaves)
        self._active = partition.of_active()
        self._value = self._loss_at(params)

    def noise(
        self, last: jax.Array, count: jax.Array, was_refused: jax.Array
    ) -> jax.Array:
        """The rounding errors of the loss, measured at every tenth update.

        They are its change if all parameters change by a few eps. They are measured
        after a step that was refused too, since rounding errors may be the reason.

        Args:
          last: the last result. One change can be small by chance, so the result is at
            least 0.9 times the last one.
          count: the number of updates, from which the number of eps follows, so that
            not all changes are the same if the parameters are.
          was_refused: whether no step was accepted at the last update.
        """

        def measured() -> jax.Array:
            size = 1 + (count + count // _NOISE_INTERVAL) % 7
            eps = size.astype(last.dtype) * jnp.finfo(last.dtype).eps
            nearby = self._after(self._cast([-eps * x for x in self._likes]))
            # Both by the same program, whose rounding errors are measured.
            change = self._loss_at(nearby) - self._loss_at(self._params)
            change = jnp.nan_to_num(jnp.abs(change), posinf=0).astype(last.dtype)
            return jnp.maximum(change, 0.9 * last)

        is_due = (count % _NOISE_INTERVAL == 0) | was_refused
        return jax.lax.cond(is_due, measured, lambda: last)

    def step(
        self,
        directions: Sequence[Leaves],
        damping: jax.Array,
        engine: str | engines.Engine,
        noise: jax.Array,
        skips_second: jax.Array,
    ) -> Step:
        """A multiple of the second direction, or else a step in the subspace.

        Args:
          directions: the gradient, one with the length of a Newton step, and others.
          damping: of the last step in the subspace.
          engine: computes the summary.
          noise: the rounding errors of the loss.
          skips_second: whether the second direction is not to be tried by itself.
        """
        active, (gradient, direction, *_) = self._active, directions
        slope = jnp.sum(active.inner(gradient, direction)).astype(damping.dtype)
        skips = skips_second | ~(jnp.isfinite(slope) & (slope > 0))

        def scaled(t: jax.Array) -> list[jax.Array]:
            return self._cast([t * x for x in direction])

        line = line_step(
            self._value.astype(damping.dtype),
            jnp.where(skips, 0, slope),
            lambda t: self._loss_at(self._after(scaled(t))),
            lambda t: self._slope(scaled(t), direction),
            noise,
        )

        def along_line() -> Step:
            t, decrease = line
            return self._described(
                scaled(t),
                loss=self._value,
                damping=damping,
                decrease=decrease,
                predicted_decrease=t * (1 - t / 2) * slope,
                noise=noise,
                is_finite=jnp.array(True),
                is_of_subspace=jnp.array(False),
            )

        def in_subspace() -> Step:
            return self.subspace_step(directions, damping, engine, noise)

        return jax.lax.cond(line.decrease > 0, along_line, in_subspace)

    def subspace_step(
        self,
        directions: Sequence[Leaves],
        damping: jax.Array,
        engine: str | engines.Engine,
        noise: jax.Array,
    ) -> Step:
        """The step in the span of all directions on each subset.

        Args:
          directions, damping, engine, noise: as for `step`.
        """
        active, count = self._active, len(directions)
        basis = self._cast(orthonormal(directions, active))
        summary = summarize(
            self._value_fn,
            self._params,
            [self._whole([q[k] for q in basis]) for k in range(count)],
            param_labels=self._partition,
            third_order=False,
            engine=engine,
            has_aux=self._has_aux,
        )
        if self._has_aux:
            summary = summary[0]
        # The rounding errors of the value in the summary are not those of the trials.
        numbers = self._value, summary.gradient, summary.hessian
        is_finite = all_finite((active.largest(directions[0]), numbers))
        value, gradient, hessian = (jnp.where(is_finite, x, 0) for x in numbers)
        # The first direction is the gradient, up to one factor. Where they differ,
        # they are rounding errors.
        given = jax.vmap(lambda q: active.inner(directions[0], q))(basis)
        square = jnp.sum(given**2)
        factor = jnp.sum(given * gradient) / jnp.where(square > 0, square, 1)
        error = jnp.sum((gradient - factor * given) ** 2, axis=0)
        is_noise = error > 0.01 * jnp.sum(gradient**2, axis=0)

        def step_of(eta: jax.Array) -> list[jax.Array]:
            return self._cast(combine(basis, eta.reshape(gradient.shape), active))

        def slope_at(eta: jax.Array) -> jax.Array:
            step = step_of(eta)
            return self._slope(step, step)

        trial = search(
            quadratic_model(value, gradient, hessian, is_noise),
            damping,
            value,
            lambda eta: self._loss_at(self._after(step_of(eta))),
            slope_at,
            noise,
        )
        is_accepted = is_finite & (trial.decrease > 0)
        return self._described(
            step_of(jnp.where(is_accepted, trial.eta, 0)),
            loss=value,
            damping=trial.damping,
            decrease=jnp.where(is_accepted, trial.decrease, 0),
            predicted_decrease=trial.predicted_decrease,
            noise=trial.noise,
            is_finite=is_finite,
            is_of_subspace=jnp.array(True),
        )

    def moving(self, found: Step) -> Step:
        """The step, refused if it is below the last digit of all parameters.

        Its decrease, which slopes predict, is then not achieved.
        """
        after = jax.tree.leaves(self._after(found.step))
        after = self._partition.take_active(after)
        moves = [jnp.any(x != y) for x, y in zip(after, self._likes, strict=True)]
        is_moving = jnp.any(jnp.stack(moves))
        kept = found.step, found.rms, found.decrease
        step, rms, decrease = jax.tree.map(lambda x: jnp.where(is_moving, x, 0), kept)
        return found._replace(step=step, rms=rms, decrease=decrease)

    def _described(
        self,
        step: list[jax.Array],
        *,
        loss: jax.Array,
        damping: jax.Array,
        decrease: jax.Array,
        predicted_decrease: jax.Array,
        noise: jax.Array,
        is_finite: jax.Array,
        is_of_subspace: jax.Array,
    ) -> Step:
        counts = np.maximum(self._active.counts(self._likes), 1)
        dtype = damping.dtype
        return Step(
            step,
            jnp.sqrt(self._active.inner(step, step) / counts).astype(dtype),
            loss.astype(dtype),
            damping.astype(dtype),
            decrease.astype(dtype),
            predicted_decrease.astype(dtype),
            noise,
            is_finite,
            is_of_subspace,
        )

    def _whole(self, active: Leaves) -> optax.Params:
        leaves = self._partition.put_active(self._leaves, active)
        return jax.tree.unflatten(self._treedef, leaves)

    def _cast(self, leaves: Leaves) -> list[jax.Array]:
        columns = zip(leaves, self._likes, strict=True)
        return [x.astype(jnp.result_type(like)) for x, like in columns]

    def _after(self, step: Leaves) -> optax.Params:
        return self._partition.moved(self._params, self._whole([-x for x in step]))

    def _loss_at(self, params: optax.Params) -> jax.Array:
        value = with_error_hints(self._value_fn, self._params)(params)
        return value[0] if self._has_aux else value

    def _gradient(self, params: optax.Params) -> Leaves:
        arrays = self._partition.take_active(jax.tree.leaves(params))
        return jax.grad(lambda xs: self._loss_at(self._whole(xs)))(arrays)

    def _slope(self, step: Leaves, direction: Leaves) -> jax.Array:
        """The decrease of the loss per unit of a direction, after a step."""
        grads = self._gradient(self._after(step))
        return jnp.sum(self._active.inner(grads, direction))
