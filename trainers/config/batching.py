"""Split the global batch of a step over ranks, and then into micro-batches. No other file divides a batch. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

from trainers.contract.errors import UserError
from trainers.contract.text import either

EVALUATION = 4  # an evaluation keeps no activations for a backward pass, so it takes this many micro-batches at a time


@dataclass(frozen=True)
class Batching:
    """The global batch of one optimizer step, and the parts that ranks compute one after the other.

    Attributes:
        batch: samples in the global batch.
        ranks: number of ranks.
        most: the largest micro-batch that is allowed (`train.micro_batch_size`), in samples; None: no limit.
        evaluated: `eval.batch_size`.
    """

    batch: int
    ranks: int
    most: int | None = None
    evaluated: int | None = None

    @property
    def share(self) -> int:
        """A rank's part of the global batch, in samples."""
        return max(1, self.batch // self.ranks)

    @property
    def micro(self) -> int:
        """Samples that a rank computes at a time: as many as are allowed and divide its share."""
        return self.sizes()[0]

    @property
    def accumulation(self) -> int:
        """Number of micro-batches that each rank computes in a step."""
        return self.share // self.micro

    @property
    def evaluation(self) -> int:
        """Samples that a rank evaluates at a time."""
        return self.evaluated or EVALUATION * (self.most or self.share)

    def sizes(self) -> list[int]:
        """Return the micro-batch sizes that are allowed, the largest first: `train.micro_batch_size=auto` tries them in turn."""
        return [size for size in divisors(self.share) if size <= (self.most or self.share)]

    def smaller(self) -> int | None:
        """Return the next smaller micro-batch size; None if there is none."""
        return next(iter(self.sizes()[1:]), None)

    def fits(self, ranks: int) -> bool:
        """Whether this number of ranks can share the batch."""
        return self.batch % ranks == 0

    def check(self) -> None:
        """Check that the ranks can share the batch.

        Raises:
            UserError: they cannot; the hint lists numbers that work.
        """
        batch, ranks = self.batch, self.ranks
        if not self.fits(ranks):
            near = sorted({max(1, batch // ranks) * ranks, (batch // ranks + 1) * ranks})
            fits = [n for n in range(1, min(batch, 4 * ranks) + 1) if batch % n == 0]
            raise UserError(f"`train.batch_size` is {batch}, not a multiple of {ranks} ranks",
                            f"use train.batch_size={either(near)}, or {either(fits[-12:])} ranks")

    def described(self, auto: bool = False) -> str:
        """Return the split in words, for a person.

        Args:
            auto: the micro-batch size is `auto`, so smaller ones may be tried.
        """
        parts = f"{self.micro} micro-batch x {self.accumulation} accumulation"
        if auto:
            parts = f"auto micro-batch x accumulation ({parts}, or smaller micro-batches if these do not fit)"
        elif self.most and self.most > self.micro:
            parts += f" (train.micro_batch_size={self.most} is an upper bound)"
        return f"{self.batch} = {self.ranks} rank(s) x {parts}"


@lru_cache
def divisors(number: int) -> tuple[int, ...]:
    """Return the divisors of a positive number, the largest first."""
    low = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return tuple(sorted({*low, *(number // n for n in low)}, reverse=True))
