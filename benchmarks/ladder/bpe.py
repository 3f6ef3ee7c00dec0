"""Byte pair encoding: frequent pairs of tokens become tokens.

R. Sennrich, B. Haddow and A. Birch, "Neural machine translation of rare words with
subword units", ACL 2016. The text is cut into words first, so that no token extends
over two of them; the first 256 tokens are the bytes, so that each text can be encoded.
"""

import collections
import heapq
import itertools
import re
from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["decode", "encode", "learn"]

Merge = tuple[int, int]
WORDS = re.compile(rb" ?[A-Za-z_]+| ?[0-9]+| ?[^\sA-Za-z0-9_]+|\s+")
"""Words that join to the whole text: each byte is in one of them."""


def learn(text: bytes, vocabulary: int) -> list[Merge]:
    """The merges, in their order: the n-th one makes the token 256 + n.

    Args:
      text: from which pairs are counted.
      vocabulary: the number of tokens, at least 256; fewer if no pair occurs twice.

    Returns:
      Pairs of tokens. Of pairs with one count, the smallest comes first.
    """
    words = collections.Counter(WORDS.findall(text))
    spelled = [list(word) for word in words]
    counts = list(words.values())
    pairs: collections.Counter[Merge] = collections.Counter()
    places: dict[Merge, set[int]] = collections.defaultdict(set)
    for n, tokens in enumerate(spelled):
        for pair in itertools.pairwise(tokens):
            pairs[pair] += counts[n]
            places[pair].add(n)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    merges: list[Merge] = []
    while 256 + len(merges) < vocabulary and heap:
        count, best = heapq.heappop(heap)
        if -count != pairs[best]:
            continue  # it has changed since, and has another entry
        if -count < 2:
            break
        token = 256 + len(merges)
        merges.append(best)
        changed = set()
        for n in places.pop(best):
            before, after = spelled[n], _merged(spelled[n], best, token)
            spelled[n] = after
            for pair in itertools.pairwise(before):
                pairs[pair] -= counts[n]
            for pair in itertools.pairwise(after):
                pairs[pair] += counts[n]
                places[pair].add(n)
            changed.update(itertools.pairwise(before), itertools.pairwise(after))
        for pair in changed - {best}:
            heapq.heappush(heap, (-pairs[pair], pair))
    return merges


def encode(text: bytes, merges: Sequence[Merge]) -> np.ndarray:
    """The tokens of a text, uint16."""
    ranks = {pair: n for n, pair in enumerate(merges)}
    known: dict[bytes, list[int]] = {}

    def tokens(word: bytes) -> list[int]:
        if word not in known:
            known[word] = _encoded(list(word), ranks)
        return known[word]

    words = WORDS.findall(text)
    return np.fromiter(
        itertools.chain.from_iterable(map(tokens, words)), dtype=np.uint16
    )


def decode(tokens: Iterable[int], merges: Sequence[Merge]) -> bytes:
    """The text of the tokens."""
    spelling = [bytes([n]) for n in range(256)]
    for a, b in merges:
        spelling.append(spelling[a] + spelling[b])
    return b"".join(spelling[n] for n in tokens)


def _encoded(tokens: list[int], ranks: dict[Merge, int]) -> list[int]:
    """One word: the earliest merge first, until none applies."""
    while len(tokens) > 1:
        best = min(
            itertools.pairwise(tokens), key=lambda pair: ranks.get(pair, len(ranks))
        )
        if best not in ranks:
            break
        tokens = _merged(tokens, best, 256 + ranks[best])
    return tokens


def _merged(tokens: list[int], pair: Merge, token: int) -> list[int]:
    """The tokens after each occurrence of a pair, from the left, is replaced."""
    found, n = [], 0
    while n < len(tokens):
        if tuple(tokens[n : n + 2]) == pair:
            found.append(token)
            n += 2
        else:
            found.append(tokens[n])
            n += 1
    return found
