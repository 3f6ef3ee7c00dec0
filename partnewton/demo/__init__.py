"""The demonstration: small networks on small images, by three optimizers.

``python -m partnewton`` runs it. The same initial weights meet the same batches under
:func:`~partnewton.partition_newton`, Adam and SGD with momentum; then the partition
Hessian is measured at the weights that the first of them had early in training.
"""

from partnewton.demo.experiment import Config, Experiment, prepare
from partnewton.demo.files import write
from partnewton.demo.results import Results, run
from partnewton.demo.tables import report

__all__ = ["Config", "Experiment", "Results", "prepare", "report", "run", "write"]
