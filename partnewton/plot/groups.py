"""Consecutive subsets grouped by the beginnings of their names."""

import itertools
from collections.abc import Sequence

import numpy as np

__all__ = ["layer_groups"]


def layer_groups(names: Sequence[str]) -> list[tuple[str, int]]:
    """Group consecutive subsets by a common prefix of their names.

    A group is a run of names whose first parts are equal, "blocks/0" for example. The
    number of parts is chosen so that the number of groups is as close as possible, in
    ratio, to the square root of the number of names: a figure then has few groups of
    few subsets each.

    Args:
      names: subset names, with parts separated by "/".

    Returns:
      ``[(common prefix, number of subsets), ...]``; an empty list if there would be one
      group only, or one group per name.

    Example:
      >>> layer_groups(["conv/kernel", "conv/bias", "dense/kernel", "dense/bias"])
      [('conv', 2), ('dense', 2)]
      >>> layer_groups(["kernel", "bias"])
      []
    """
    parts = [name.split("/") for name in names]
    groupings: list[list[tuple[str, int]]] = []
    for depth in range(1, max(map(len, parts), default=0)):
        # The last part, such as "kernel", is never part of the prefix.
        prefixes = ["/".join(x[: max(1, min(depth, len(x) - 1))]) for x in parts]
        groups = [(key, len(list(run))) for key, run in itertools.groupby(prefixes)]
        if 1 < len(groups) < len(names):
            groupings.append(groups)

    def distance(groups: list[tuple[str, int]]) -> float:
        return abs(np.log(len(groups) ** 2 / len(names)))

    return min(groupings, key=distance, default=[])
