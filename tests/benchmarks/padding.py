"""The share of padding in batches of tokens, as each micro-batch pads, on text files with one sentence a line.

    python tests/benchmarks/padding.py FOLDER/train.en [FOLDER/train.de...] [--tokens 4096]

Several files are the sides of pairs. They may be compressed (.gz). Words are what white space separates.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np

from trainers.engine.batches.token_batches import TokenBatches


def words(path: Path) -> list[int]:
    """Return the number of words of each line."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        return [len(line.split()) for line in file]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    lengths = np.maximum(np.array([words(path) for path in args.files]).T, 1)
    samples = TokenBatches(lengths, args.tokens, seed=0, stream="model")
    print(f"{len(lengths):,} samples of {lengths.sum(1).mean():.1f} words; {samples.batches:,} batches of up to "
          f"{args.tokens:,} tokens")
    for ranks in (1, 2, 3, 4):
        of_ranks = [[share for draw in range(samples.batches) for share in samples.shares(draw, rank, ranks)]
                    for rank in range(ranks)]
        padded = sum(len(share.indices) * int(lengths[share.indices].max(0).sum()) for shares in of_ranks for share in shares)
        tokens = [sum(int(lengths[share.indices].sum()) for share in shares if not share.filler) for shares in of_ranks]
        fillers = sum(share.filler for shares in of_ranks for share in shares)
        print(f"{ranks} rank(s): {1 - lengths.sum() / padded:6.2%} padding, {fillers} filler(s); the busiest rank has "
              f"{max(tokens) / (sum(tokens) / ranks) - 1:.2%} more tokens than the average")
