"""The demonstration: small networks trained on small images with three optimizers.

``python -m partnewton`` runs it. It trains with :func:`~partnewton.partition_newton`,
Adam and SGD with momentum, from the same weights and with the same batches, and then
computes the partition Hessian at weights of an early step of `partition_newton`.
:mod:`partnewton.demo.pinn` is another problem, with other optimizers.
"""

from partnewton.demo.experiment import Config, Experiment, prepare
from partnewton.demo.files import write
from partnewton.demo.results import Results, run
from partnewton.demo.tables import report

__all__ = ["Config", "Experiment", "Results", "prepare", "report", "run", "write"]
