"""`python -m partnewton`: the command line of the demonstration."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

DESCRIPTION = """\
Train a small Flax NNX network three times, with partition_newton, Adam and
SGD with momentum, from the same initial weights and with the same batches.
Print the losses and the step length of each tensor, and write two figures and
the training curves.

With --problem images, the default, these are the scanned digits of
scikit-learn, or the images in a local folder. With --problem text, a small
transformer predicts the next character of the source of Python's own modules.
With --problem pinn, a physics-informed network solves a differential equation,
with subspace_newton, L-BFGS and Adam, each for the same number of seconds.
Nothing is downloaded and no pickle is loaded.
"""

EPILOG = """\
files of --data-dir:
  MNIST, Fashion-MNIST   train-images-idx3-ubyte, train-labels-idx1-ubyte,
                         t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte,
                         plain or .gz
  CIFAR-10, binary       data_batch_1.bin to data_batch_5.bin, test_batch.bin,
                         in the folder or its subfolder cifar-10-batches-bin
"""

PARTITIONS = ("per_tensor", "whole", "weights_biases", "per_layer")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the error and exits with code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def parser() -> Parser:
    """The parser of the command line; its options are the fields of `demo.Config`."""
    result = Parser(
        prog="partnewton",
        usage="python -m partnewton [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument
    add(
        "--problem",
        choices=("images", "text", "pinn"),
        default="images",
        help="scanned digits (default), characters of Python's own modules, or a "
        "physics-informed network",
    )
    add(
        "--model",
        choices=("cnn", "mlp"),
        default="cnn",
        help="of images: a convolutional network (default) or a multilayer perceptron",
    )
    add(
        "--steps",
        type=_integer_type(1),
        default=600,
        metavar="N",
        help="number of steps of each optimizer, of pinn that of subspace_newton "
        "(default: %(default)s)",
    )
    add(
        "--seed",
        type=_integer_type(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="seed of the data split, the weights and the batches "
        "(default: %(default)s)",
    )
    add(
        "--partition",
        type=_partition_type,
        default="per_tensor",
        metavar="NAME",
        help="which parameters share a learning rate: per_tensor (default), whole, "
        "weights_biases, per_layer, blocks:N or alternate:N",
    )
    add(
        "--data-dir",
        type=Path,
        metavar="FOLDER",
        help="train on the images in this folder (default: the digits)",
    )
    add(
        "--output",
        type=Path,
        default=Path("partnewton-demo"),
        metavar="FOLDER",
        help="folder for losses.png, partition.png and curves.json "
        "(default: %(default)s)",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demonstration.

    Args:
      argv: the arguments of the command line, without the name of the program.

    Returns:
      The exit code: 0, or 130 after a keyboard interrupt.

    Raises:
      SystemExit: with code 2, after one line on standard error, if the arguments or the
        files that they name are invalid; with code 0 after ``--help``.
    """
    arguments = parser()
    options = arguments.parse_args(argv)
    try:
        return _demonstrate(arguments, options)
    except KeyboardInterrupt:
        return 130


def _demonstrate(arguments: Parser, options: argparse.Namespace) -> int:
    try:
        # Imported late, since help and argument errors do not need the slow imports.
        from partnewton import demo

        problem = demo
        if options.problem == "pinn":
            from partnewton.demo import pinn as problem
        experiment = problem.prepare(demo.Config(**vars(options)))
    except ImportError as error:
        arguments.error(f'{error}; try: pip install "partnewton[demo]"')
    except (OSError, ValueError) as error:
        arguments.error(str(error))
    results = problem.run(experiment)
    print(f"\n{problem.report(results)}\n")
    try:
        paths = problem.write(results)
    except OSError as error:
        arguments.error(str(error))
    print(f"Wrote {', '.join(map(str, paths))} in {results.wall_seconds:.0f} seconds.")
    return 0


def _integer_type(least: int, most: int | None = None) -> type:
    """An argument type: an integer in a range."""
    wanted = f"an integer from {least}" + ("" if most is None else f" to {most}")

    def integer(text: str) -> int:
        value = int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else None
        if value is None or value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return integer


def _partition_type(text: str) -> str:
    """An argument type: the name of a partition."""
    if text in PARTITIONS or re.fullmatch(r"(blocks|alternate):[1-9]\d{0,8}", text):
        return text
    raise argparse.ArgumentTypeError(
        f"must be one of {', '.join(PARTITIONS)}, blocks:N or alternate:N with N at "
        f"least 1, got {text!r}"
    )


if __name__ == "__main__":
    sys.exit(main())
