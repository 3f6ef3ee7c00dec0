"""Rules: from a summary to learning rates and to the decrease they predict.

A rule is a function from a :class:`~partnewton.Summary` to a :class:`Proposal`. Rules
do not receive the parameters. A proposal that is not finite is rejected by
:func:`~partnewton.scale_by_partition_newton`, so a rule need not check for that.

A function of your own can be a rule. Wrap it in a :class:`Rule` if it does not read
`summary.third`, so that the third order is not computed:

    def cauchy(summary):
        '''Steepest descent with one learning rate, by exact line search.'''
        eta = jnp.sum(summary.gradient) / jnp.sum(summary.hessian)
        rates = jnp.full_like(summary.gradient, eta)
        return rules.Proposal(rates, eta * jnp.sum(summary.gradient) / 2)

    rule = rules.Rule(cauchy, third_order=False)
"""

from partnewton.rules.cubic_model import cubic, diagonal
from partnewton.rules.noise_floor import with_noise_floor
from partnewton.rules.quadratic_model import newton
from partnewton.rules.robust_model import robust
from partnewton.rules.rule import Proposal, Rule
from partnewton.rules.rule import needs_third_order as needs_third_order
from partnewton.rules.rule import proposal_of as proposal_of

__all__ = [
    "Proposal",
    "Rule",
    "cubic",
    "diagonal",
    "newton",
    "robust",
    "with_noise_floor",
]
