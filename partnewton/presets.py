"""Complete optimizers: a direction, `scale_by_partition_newton` and a factor.

:func:`partition_newton` is for training without tuning; :func:`paper_newton` is the
published method. ``docs/design_notes.md`` describes the experiments behind the
defaults.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from partnewton import averaging, directions, engines, partitions, rules
from partnewton._checks import check_learning_rate, check_number
from partnewton._decay import Mask
from partnewton._eager import compiled_direction
from partnewton._strictness import permissive
from partnewton.lookback import scale_by_lookback
from partnewton.summary import Summary
from partnewton.transform import scale_by_partition_newton

__all__ = ["paper_newton", "partition_newton"]


def partition_newton(
    learning_rate: optax.ScalarOrSchedule = 0.2,
    *,
    direction: optax.GradientTransformation | None = None,
    rule: Callable[[Summary], rules.Proposal] | None = None,
    average: averaging.Average | None = None,
    param_labels: partitions.ParamLabels | None = None,
    update_interval: jax.typing.ArrayLike | None = None,
    backtracking: jax.typing.ArrayLike = 30,
    lookback_rate: jax.typing.ArrayLike = 0.2,
    total_steps: jax.typing.ArrayLike | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    engine: str | engines.Engine = "auto",
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that needs no tuning: step lengths from second derivatives.

    Each subset of the direction is normalised to the root mean square (RMS) 1. At a
    refresh, every 20 updates at first and less often later, the exact derivatives of
    the loss along the direction are computed, as a :class:`partnewton.Summary`, and
    enter a running average. From the average, :func:`partnewton.rules.robust` computes
    one step length per subset: the mean of the length that minimises the model over all
    subsets jointly, and of the best common length. The lengths are kept until the next
    refresh. :func:`partnewton.learning_rates` returns them: the RMS change of the
    entries of each subset per step, before the factors.

    A step-size multiplier, the factor, multiplies all lengths, see
    :func:`partnewton.scale_by_lookback`. It grows while the loss of the newest batch
    still decreases along the displacement of the last ten steps, later of more steps.
    It decays if noise or a narrow valley makes the steps oscillate. If `learning_rate`
    is a number up to 1, the product of the two is at most 1, so that no step exceeds
    the computed lengths, and at most 2 with `total_steps`. With a schedule as
    `learning_rate`, the factor is at most 5, and at most 10 with `total_steps`.

    Args:
      learning_rate: the initial factor for all lengths, a number or a schedule; 1
        applies them in full. It is not comparable to a learning rate of Adam, so a
        number below 0.01 causes a warning; pass a schedule to avoid it.
      direction: any transformation whose outgoing updates have the sign of a gradient;
        by default that of Muon, orthogonalised momentum for matrices and kernels of
        convolutions and Adam for all other leaves, wrapped in
        :func:`partnewton.directions.equilibrated`.
      rule: computes lengths from a summary; by default :func:`partnewton.rules.robust`
        with ``shrinkage=0.5``, wrapped in :func:`partnewton.rules.with_noise_floor`.
      average: a running average of the summaries; by default an exponential one with
        decay 0.9, of summaries relative to their own gradients.
      param_labels: the partition, see :mod:`partnewton.partitions`; by default
        :func:`partnewton.partitions.auto`: each leaf is a subset; with more than 16
        leaves, repeated layers share their rates, and so do all biases and scales.
      update_interval: the number of updates between two refreshes of the lengths; by
        default it grows from 20 to 5 S, see :func:`scale_by_partition_newton`.
      backtracking: maximal number of times that new lengths are halved until a step
        decreases the loss sufficiently, see :func:`scale_by_partition_newton`.
      lookback_rate: the change of the logarithm of the factor at the end of each
        window, see :func:`partnewton.scale_by_lookback`; with 0, `learning_rate` is the
        only factor.
      total_steps: the number of updates of the whole training, if it is known. In the
        last three tenths of them the lengths decrease linearly to zero, and the factor
        is kept. By default there is no such decay.
      weight_decay, mask: decoupled weight decay, see :func:`scale_by_partition_newton`;
        AdamW's usual values, 0.01 to 0.1, have a similar effect.
      engine, has_aux: as in :func:`scale_by_partition_newton`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; its update function needs
      `params` and `value_fn`, see :func:`scale_by_partition_newton`.

    Raises:
      ValueError, TypeError: as in :func:`scale_by_partition_newton`.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = lambda params: (1 - params["x"]) ** 2 + 2 * (params["y"] + 3) ** 2
      >>> params = {"x": jnp.array(5.0), "y": jnp.array(5.0)}
      >>> tx = partition_newton()
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     grads = jax.grad(loss)(params)
      ...     updates, state = tx.update(grads, state, params, value_fn=loss)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(200):
      ...     params, state = step(params, state)
      >>> print(bool(loss(params) < 1e-3))
      True

    References:
      P. Wolinski, arXiv 2312.03885: the summary and the cubic model.
    """
    check_learning_rate(learning_rate)
    if total_steps is not None:
        check_number("total_steps", total_steps, minimum=1)
    if direction is None:
        direction = compiled_direction(
            directions.equilibrated(directions.orthogonal_momentum())
        )
    if average is None:
        average = averaging.relative(averaging.exponential(0.9, absolute_third=True))
    labels = partitions.auto if param_labels is None else param_labels
    return optax.chain(
        directions.skip_nonfinite(direction, param_labels=labels),
        scale_by_partition_newton(
            rules.with_noise_floor(rules.robust(shrinkage=0.5))
            if rule is None
            else rule,
            param_labels=labels,
            normalize="rms",
            update_interval=update_interval,
            average=average,
            backtracking=backtracking,
            weight_decay=weight_decay,
            mask=mask,
            engine=engine,
            has_aux=has_aux,
        ),
        scale_by_lookback(
            lookback_rate,
            max_scale=_largest_factor(learning_rate, total_steps),
            adapt_steps=None if total_steps is None else _decay_begin(total_steps),
            param_labels=labels,
            has_aux=has_aux,
        ),
        optax.scale_by_learning_rate(
            learning_rate
            if total_steps is None
            else _decaying(learning_rate, total_steps)
        ),
    )


_DECAY_FRACTION = 0.3  # of the training, at its end


def _decay_begin(total_steps: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    return (1 - _DECAY_FRACTION) * total_steps


def _decaying(
    learning_rate: optax.ScalarOrSchedule, total_steps: jax.typing.ArrayLike
) -> optax.Schedule:
    """The learning rate, decreasing linearly to zero at the end of the training."""

    def schedule(count: jax.Array) -> jax.Array:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        with permissive():
            remaining = (total_steps - count) / (_DECAY_FRACTION * total_steps)
            return rate * jnp.clip(remaining, 0, 1)

    return schedule


def _largest_factor(
    learning_rate: optax.ScalarOrSchedule, total_steps: jax.typing.ArrayLike | None
) -> jax.typing.ArrayLike:
    """The upper bound of the factor.

    With it, the lengths are applied in full, or twice, if steps that oscillate decay at
    the end: twice the length that minimises a quadratic function does not decrease it.
    """
    largest = 1.0 if total_steps is None else 2.0
    if callable(learning_rate):
        return largest / 0.2  # as for the default
    return jnp.maximum(1.0, largest / learning_rate)


def paper_newton(
    learning_rate: optax.ScalarOrSchedule = 0.2,
    *,
    momentum: jax.typing.ArrayLike = 0.9,
    rule: Callable[[Summary], rules.Proposal] | None = None,
    average: averaging.Average | None = None,
    smoothing: averaging.Average | None = None,
    normalize: Literal["norm", "rms"] | None = None,
    param_labels: partitions.ParamLabels | None = None,
    update_interval: jax.typing.ArrayLike = 10,
    backtracking: jax.typing.ArrayLike = 0,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    engine: str | engines.Engine = "auto",
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The published method: momentum, a cubic model of each batch, a constant factor.

    Its variants are described in ``docs/published_method.md``. The factor and the
    damping of the rule need tuning.

    Args:
      learning_rate: the factor for all rates (lambda_1 in the paper), a number or a
        schedule: 0.1 to 0.3 on mini-batches and 1 on full batches.
      momentum: the decay of the average of gradients; 0 for the gradient itself.
      rule: by default ``rules.cubic()``, with damping 1; the paper uses 1 to 10.
      average: a running average of the summaries; by default none.
      smoothing: a running average of the rates, see :func:`scale_by_partition_newton`;
        by default none.
      normalize, param_labels, backtracking, weight_decay, mask, engine, has_aux: as in
        :func:`scale_by_partition_newton`.
      update_interval: the number of updates between two refreshes of the rates.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; its update function needs
      `params` and `value_fn`.

    Raises:
      ValueError, TypeError: as in :func:`scale_by_partition_newton`.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = lambda params: (1 - params["x"]) ** 2 + 2 * (params["y"] + 3) ** 2
      >>> params = {"x": jnp.array(5.0), "y": jnp.array(5.0)}
      >>> tx = paper_newton(1.0)
      >>> state = tx.init(params)
      >>> grads = jax.grad(loss)(params)
      >>> updates, state = tx.update(grads, state, params, value_fn=loss)
      >>> print(optax.apply_updates(params, updates))
      {'x': Array(1., dtype=float32), 'y': Array(-3., dtype=float32)}

    References:
      P. Wolinski, arXiv 2312.03885.
    """
    check_learning_rate(learning_rate)
    labels = partitions.per_tensor if param_labels is None else param_labels
    return optax.chain(
        directions.skip_nonfinite(optax.ema(momentum), param_labels=labels),
        scale_by_partition_newton(
            rules.cubic() if rule is None else rule,
            param_labels=labels,
            normalize=normalize,
            update_interval=update_interval,
            average=average,
            smoothing=smoothing,
            backtracking=backtracking,
            weight_decay=weight_decay,
            mask=mask,
            engine=engine,
            has_aux=has_aux,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )
