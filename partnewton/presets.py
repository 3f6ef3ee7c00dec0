"""Whole optimizers: a direction, the link and a factor, each a chain to read.

:func:`partition_newton` is for training without tuning; :func:`paper_newton` is the
published method. Where the numbers come from: ``docs/how_to_choose.md``.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from partnewton import averaging, directions, engines, partitions, rules
from partnewton._checks import check_learning_rate
from partnewton._eager import compiled_direction
from partnewton.lookback import scale_by_lookback
from partnewton.transform import scale_by_partition_newton

__all__ = ["paper_newton", "partition_newton"]


def partition_newton(
    learning_rate: optax.ScalarOrSchedule = 0.2,
    *,
    direction: optax.GradientTransformation | None = None,
    rule: rules.Rule | None = None,
    average: averaging.Average | None = None,
    param_labels: partitions.ParamLabels | None = None,
    update_interval: jax.typing.ArrayLike | None = None,
    backtracking: jax.typing.ArrayLike = 30,
    lookback_rate: jax.typing.ArrayLike = 0.2,
    engine: str | engines.Engine = "auto",
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """One learning rate per subset, solved for: an optimizer to use as it is.

    From time to time, at every 20th update at first, the exact summary of the loss
    along the unit directions of all subsets enters a running average, and
    :func:`partnewton.rules.robust` solves it for one length of step per subset, half of
    the way between the best lengths and the best length that is the same for all; it is
    kept until the next refresh. Directions have the root mean square 1, so that
    :func:`partnewton.learning_rates` of its state are lengths per entry: by how much
    the entries of a subset move. One factor multiplies all of them, see
    :func:`partnewton.scale_by_lookback`: it grows while the trajectory of the last ten
    steps, and later of more, still descends on the newest batch, and it decays where
    noise or a narrow valley makes steps oscillate. It never makes a step longer than
    the lengths that were solved for, however long a loss decreases.

    Args:
      learning_rate: the factor on all lengths at the start, a number or a schedule; 1
        takes the lengths in full. It is not a learning rate like Adam's: a plain number
        below 0.01 is taken for one and warned of; pass a schedule if it is meant.
      direction: any transformation whose outgoing updates are gradient-like; by default
        that of Muon, orthogonalised momentum for matrices and kernels of convolutions
        and Adam for all other leaves, in the units of
        :func:`partnewton.directions.equilibrated`.
      rule: from a summary to lengths; by default :func:`partnewton.rules.robust` with
        ``shrinkage=0.5``, wrapped in
        :func:`partnewton.rules.with_noise_floor`.
      average: a running average of the summaries; by default an exponential one of
        decay 0.9, each summary relative to its own gradient.
      param_labels: the partition, see :mod:`partnewton.partitions`; by default each
        leaf is a subset.
      update_interval: refresh the lengths at every so many updates; by default an
        interval that grows from 20 updates to 5 S, see
        :func:`scale_by_partition_newton`.
      backtracking: how often lengths are halved, at most, while they do not lower the
        loss as they should, see :func:`scale_by_partition_newton`.
      lookback_rate: by how much the logarithm of the factor changes at the end of each
        window, see :func:`partnewton.scale_by_lookback`; 0 for a factor that is
        `learning_rate` throughout.
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
    if direction is None:
        direction = compiled_direction(directions.equilibrated(orthogonal_momentum()))
    if average is None:
        average = averaging.relative(averaging.exponential(0.9, absolute_third=True))
    labels = partitions.per_tensor if param_labels is None else param_labels
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
            engine=engine,
            has_aux=has_aux,
        ),
        scale_by_lookback(
            lookback_rate,
            max_scale=_largest_factor(learning_rate),
            param_labels=labels,
            has_aux=has_aux,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


def _largest_factor(learning_rate: optax.ScalarOrSchedule) -> jax.typing.ArrayLike:
    """What takes the lengths that were solved for in full, and no longer steps."""
    if callable(learning_rate):
        return 5.0  # as for the default
    return jnp.maximum(1.0, 1.0 / learning_rate)


def orthogonal_momentum() -> optax.GradientTransformation:
    """The direction of :func:`optax.contrib.muon`, with the sign of a gradient.

    A kernel of four axes or more is that of a convolution, and one matrix: from all
    axes but the last to the last.
    """

    def as_matrix(x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        if x.ndim == 2 or x.ndim >= 4:
            return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), -1)
        return None

    def numbers(params: optax.Params) -> optax.Params:
        return jax.tree.map(as_matrix, params)

    muon = optax.contrib.muon(1.0, muon_weight_dimension_numbers=numbers)
    return optax.chain(muon, optax.scale(-1.0))


def paper_newton(
    learning_rate: optax.ScalarOrSchedule = 0.2,
    *,
    momentum: jax.typing.ArrayLike = 0.9,
    rule: rules.Rule | None = None,
    average: averaging.Average | None = None,
    smoothing: averaging.Average | None = None,
    normalize: Literal["norm", "rms"] | None = None,
    param_labels: partitions.ParamLabels | None = None,
    update_interval: jax.typing.ArrayLike = 10,
    backtracking: jax.typing.ArrayLike = 0,
    engine: str | engines.Engine = "auto",
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The published method: momentum, the cubic model of one batch, a factor.

    Its variants are described in ``docs/published_method.md``. It needs tuning, of the
    factor and of the damping of the rule.

    Args:
      learning_rate: the factor on all rates, a number or a schedule: lambda_1, 0.1 to
        0.3 on mini-batches and 1 on full batches.
      momentum: the decay of the average of gradients; 0 for the gradient itself.
      rule: by default ``rules.cubic()``, with damping 1; 1 to 10 are published.
      average: a running average of the summaries; by default none.
      smoothing: a running average of the rates, see :func:`scale_by_partition_newton`;
        by default none.
      normalize, param_labels, backtracking, engine, has_aux: as in
        :func:`scale_by_partition_newton`.
      update_interval: refresh the rates at every so many updates.

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
            engine=engine,
            has_aux=has_aux,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )
