"""What a rule is, and what it returns."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from partnewton.summary import Summary

__all__ = ["Proposal", "Rule", "needs_third_order", "proposal_of"]


class Proposal(NamedTuple):
    """What a rule returns.

    Attributes:
      learning_rates: eta, shape (S,).
      predicted_decrease: the decrease of the rule's model of the loss for the step
        ``sum_s eta_s * u_s``, shape ().
      status: a :class:`~partnewton.CubicStatus`, shape (), 0 for success.
    """

    learning_rates: jax.Array
    predicted_decrease: jax.Array
    status: jax.typing.ArrayLike = 0


@dataclasses.dataclass(frozen=True)
class Rule:
    """A function from a summary to a proposal, and what it needs of the summary.

    Attributes:
      propose: the function.
      third_order: whether it reads `summary.third`; if not, that is None.

    Example:
      >>> import jax.numpy as jnp
      >>> sign = lambda s: Proposal(jnp.sign(s.gradient), jnp.sum(jnp.abs(s.gradient)))
      >>> rule = Rule(sign, third_order=False)
      >>> summary = Summary(jnp.array(1.0), jnp.array([2.0, -3.0]), jnp.eye(2), None)
      >>> print(rule(summary).learning_rates)
      [ 1. -1.]
    """

    propose: Callable[[Summary], Proposal]
    third_order: bool = True

    def __call__(self, summary: Summary) -> Proposal:
        return self.propose(summary)


def proposal_of(rule: Callable[[Summary], Proposal], summary: Summary) -> Proposal:
    """What a rule returns for a summary, checked.

    Raises:
      TypeError: it is not a proposal.
      ValueError: the rates do not have the shape (S,).
    """
    try:
        proposal = rule(summary)
    except (TypeError, AttributeError) as error:
        if summary.third is None and "NoneType" in str(error):
            error.add_note(
                "summary.third is None, because the rule was declared not to read it: "
                "use rules.Rule(propose, third_order=True)."
            )
        raise
    if not isinstance(proposal, Proposal):
        raise TypeError(
            "rule must return a rules.Proposal(learning_rates, predicted_decrease), "
            f"got {type(proposal).__name__}."
        )
    shape, expected = jnp.shape(proposal.learning_rates), summary.gradient.shape
    if shape != expected:
        raise ValueError(
            f"rule: learning_rates must have one entry per subset, shape {expected}, "
            f"got {shape}."
        )
    return proposal


def needs_third_order(rule: Callable[[Summary], Proposal]) -> bool:
    """Whether a rule reads `summary.third`; assumed of a function that is no Rule."""
    return rule.third_order if isinstance(rule, Rule) else True
