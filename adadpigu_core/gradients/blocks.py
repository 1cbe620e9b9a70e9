"""From the uses of a parameter to norms, and from factors to the sum.

The cost of a block of P coordinates for one record: its gradient takes T P multiplications for T positions, as the
ordinary weight gradient that it replaces. So

* a short cut to the norms is taken wherever a use has one, since it needs less than P for each record;
* rows and columns in which nothing is retained are left out beforehand, where a use can do that;
* otherwise gradients are made a few records at a time, so that they are standardised, squared and summed inside the
  cache. They are kept for the sum if there is memory for them, or if that takes no more than inputs and output
  gradients, which then are forgotten; if not, they are made again, in the same way.

The sum is made of the very numbers whose norms were taken. Another product that adds up the positions of a record in
another order would differ from them by what float32 loses of each term, and where the terms cancel, that can be more
than all that is left.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from adadpigu_core.gradients.transform import Block
from adadpigu_core.gradients.uses import UNDERFLOW, Dense, Factors, Product, ShortCut, SquaredNorms, Use

# How many more gradients are made at once on an accelerator, which has no small cache to stay in: 256 MB of them.
_MORE_ON_ACCELERATORS = 256


class Workspace:
    """Memory for gradients that are kept, used again by one physical batch after the other.

    Args:
        floats: How many may be kept.
        num_records: Of the largest physical batch.
        device: Of the model.
    """

    def __init__(self, floats: int, num_records: int, device: torch.device) -> None:
        self._floats = floats
        self._num_records = num_records
        self._device = device
        self._kept: dict[int, Tensor] = {}

    def take(self, start: int, count: int, size: int, *, always: bool) -> Tensor | None:
        """Give room for the gradients of a block, float32 [count, size], if there is any."""
        if start not in self._kept:
            if not always and self._num_records * size > self._floats:
                return None
            if not always:
                self._floats -= self._num_records * size
            self._kept[start] = torch.empty(self._num_records, size, dtype=torch.float32, device=self._device)
        return self._kept[start][:count]


@dataclass(frozen=True)
class Finished:
    """A block whose norms are known.

    Args:
        start: Its first coordinate.
        block: Its standardisation.
        squared_norms: Of all records.
        kept: g_i - a, [n, P] in the order of the use; None if there was no room, or a short cut.
        use: What to make the sum from, and what knows the order of ``kept``.
        short: The use again if the norms came by its short cut, to which a sum belongs that is one as well.
        smaller: Whether norms, ``kept`` and ``use`` are those of the block's part.
    """

    start: int
    block: Block
    squared_norms: SquaredNorms
    kept: Tensor | None
    use: Use
    short: ShortCut | None
    smaller: bool

    @property
    def stop(self) -> int:
        """Behind its last coordinate."""
        return self.start + self.block.inverse_scale.numel()

    def add(self, factors: Factors, total: Tensor, *, first: bool) -> None:
        """Add the sum of c_i (g_i - a) to the coordinates of the block in ``total``, float32 [d].

        Args:
            factors: Clipping factors.
            total: Sum so far.
            first: There is none so far; what ``total`` holds does not count.
        """
        target = total[self.start : self.stop].view(self.block.inverse_scale.shape)
        if not self.smaller:
            self._add(factors, self.block, target, first=first)
            return
        assert self.block.part is not None  # noqa: S101  # where else would something smaller come from
        if first:
            target.zero_()
        part = torch.empty_like(self.block.smaller.inverse_scale)
        self._add(factors, self.block.smaller, part, first=True)
        self.block.part.add(part, target)

    def _add(self, factors: Factors, block: Block, target: Tensor, *, first: bool) -> None:
        if self.short is None:
            added = self.use.restored(self._weighted_sum(factors, block), tuple(target.shape))
            target.copy_(added) if first else target.add_(added)
            return
        if block.mean is None:
            self.short.add_weighted_sum(factors, target.zero_() if first else target)
            return
        # what is left of both may be far smaller than either of them, so that float32 would lose it
        centred = target.new_zeros(target.shape, dtype=torch.float64)
        self.short.add_weighted_sum(factors, centred)
        centred -= factors.values.double().sum() * block.mean
        target.copy_(centred) if first else target.add_(centred)

    def _weighted_sum(self, factors: Factors, block: Block) -> Tensor:
        """Sum of c_i (g_i - a) in the order of the use, [P]."""
        if self.kept is not None:
            return factors.values @ factors.clean(self.kept)
        total = block.inverse_scale.new_zeros(block.inverse_scale.numel())
        for first, last, gradients in _in_chunks(self.use, block):
            some = factors.of(first, last)
            total += some.values @ some.clean(gradients)
        return total


def finish(start: int, block: Block, uses: Sequence[Use], workspace: Workspace) -> Finished:
    """Compute the norms of a block.

    Args:
        start: First coordinate of the block.
        block: Its standardisation.
        uses: All uses of the block by the same records.
        workspace: Where gradients may be kept.
    """
    use = _one(uses, tuple(block.inverse_scale.shape))
    restricted = None if block.part is None else use.restricted(block.part)
    if restricted is None:
        return Finished(start, block, *_measured(start, block, use, workspace), smaller=False)
    return Finished(start, block, *_measured(start, block.smaller, restricted, workspace), smaller=True)


def _measured(
    start: int, block: Block, use: Use, workspace: Workspace
) -> tuple[SquaredNorms, Tensor | None, Use, ShortCut | None]:
    """Norms of a block, what is kept of its gradients, what the sum can be made from, and by which short cut."""
    if isinstance(use, ShortCut):
        norms = use.squared_norms(block)
        if norms is not None:
            return norms, None, use, use
    count, size = use.num_records, block.inverse_scale.numel()
    kept = workspace.take(start, count, size, always=size <= use.held)
    values = _squared_norms(use, block, kept)
    if kept is not None:
        use.forget()
    return SquaredNorms(values, size * UNDERFLOW), kept, use, None


def _squared_norms(use: Use, block: Block, kept: Tensor | None) -> Tensor:
    """Squared norms through gradients, float64 [n]; g_i - a is written to ``kept``, [n, P]."""
    inverse_scale = use.arranged(block.inverse_scale)
    values = torch.empty(use.num_records, dtype=torch.float64, device=inverse_scale.device)
    scaled = inverse_scale.new_empty(min(_chunk(use, block), use.num_records), len(inverse_scale))
    for first, last, gradients in _in_chunks(use, block, kept):
        values[first:last] = torch.mul(gradients, inverse_scale, out=scaled[: last - first]).square_().sum(1)
    return values


def _in_chunks(use: Use, block: Block, kept: Tensor | None = None) -> Iterator[tuple[int, int, Tensor]]:
    """g_i - a, [some, P] in the order of the use, of a few records at a time; always the same numbers."""
    mean = None if block.mean is None else use.arranged(block.mean)
    chunk = _chunk(use, block)
    for first in range(0, use.num_records, chunk):
        last = min(first + chunk, use.num_records)
        if kept is None:
            gradients = use.gradients(first, last)
            if mean is not None:
                gradients = gradients - mean
        else:
            gradients = kept[first:last]
            use.write_gradients(first, last, gradients)
            if mean is not None:
                gradients -= mean
        yield first, last, gradients


def _chunk(use: Use, block: Block) -> int:
    on_accelerator = block.inverse_scale.device.type != "cpu"
    return use.chunk(block.inverse_scale.numel(), _MORE_ON_ACCELERATORS if on_accelerator else 1)


def made_whole(uses: Sequence[Use]) -> bool:
    """Whether the gradients of all records of a physical batch have to be there at once."""
    return any(isinstance(use, Dense) for use in uses) or (len(uses) > 1 and not _joinable(uses))


def _joinable(uses: Sequence[Use]) -> TypeGuard[Sequence[Product]]:
    return all(type(use) is Product for use in uses)


def _one(uses: Sequence[Use], shape: tuple[int, ...]) -> Use:
    """Put the uses of a parameter together: gradients add up before they are squared."""
    if len(uses) == 1:
        return uses[0]
    if _joinable(uses):
        return Product.joined(uses)
    total, *others = (use.restored(use.gradients(0, use.num_records), shape) for use in uses)
    for gradients in others:
        total = total + gradients
    return Dense(total)
