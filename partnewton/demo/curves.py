"""The curves of one optimizer, which all problems of the demonstration share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["Curves"]


@dataclasses.dataclass
class Curves:
    """The training curves of one optimizer, with one entry per evaluation.

    Attributes:
      settings: its hyperparameters, as text for a table.
      learning_rate: the constant factor of the logged lengths.
      steps: the number of steps before the evaluation.
      train_loss: the loss.
      seconds: the total time of these steps, without compiling.
      compile_seconds: the compile time of a step.
      logged: the values of :func:`partnewton.metrics`, under the same names, one entry
        per refresh or evaluation; empty for the optimizers of other packages.
    """

    settings: str
    learning_rate: float = 1.0
    steps: list[int] = dataclasses.field(default_factory=list)
    train_loss: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0
    logged: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def append(self, step: int, seconds: float, **evaluated: Any) -> None:
        """Adds an evaluation.

        Args:
          step: the number of steps before it.
          seconds: the time of the steps since the last evaluation.
          **evaluated: ``train_loss``, and the curves that a problem has in addition.
        """
        self.steps.append(step)
        self.seconds.append(seconds + sum(self.seconds[-1:]))
        for name, value in evaluated.items():
            getattr(self, name).append(float(value))

    def log(self, numbers: Mapping[str, Any]) -> None:
        """Adds the metrics of a refresh or of an evaluation."""
        for name, value in numbers.items():
            self.logged.setdefault(name, []).append(float(value))

    @property
    def step_sizes(self) -> dict[str, list[float]]:
        """The RMS change of the entries of each subset in a step, from `logged`."""
        prefix, factors = "learning_rate/", self.logged.get("factor")
        return {
            name.removeprefix(prefix): [
                self.learning_rate * factor * length
                for factor, length in zip(
                    factors or [1.0] * len(values), values, strict=True
                )
            ]
            for name, values in self.logged.items()
            if name.startswith(prefix)
        }

    def line(self, name: str) -> str:
        """The whole training in one line."""
        return (
            f"{name:16}  {self.steps[-1]} steps in {self.seconds[-1]:.2f} s, compiled "
            f"in {self.compile_seconds:.2f} s, train loss {self.train_loss[-1]:.3g}"
        )
