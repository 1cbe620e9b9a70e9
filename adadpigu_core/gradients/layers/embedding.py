"""Embedding tables.

A record's gradient has as many rows as it has different tokens, so nothing of the table's size is ever made: output
gradients of equal tokens are added up by a product with the matrix that says which tokens of a record are equal.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adadpigu_core.gradients.recorder import Argument, Layer, Recorder, UnsupportedUseError, register_rule
from adadpigu_core.gradients.transform import Block
from adadpigu_core.gradients.uses import UNDERFLOW, Factors, SquaredNorms, Use

_CHUNK_FLOATS = 1_000_000


class Lookup(Use):
    """Rows of a table that records look up.

    Args:
        tokens: Int64 [n, T].
        errors: Gradients of the rows, float32 [n, T, D].
        num_rows: Rows of the table.
    """

    def __init__(self, tokens: Tensor, errors: Tensor, num_rows: int) -> None:
        self.tokens = tokens
        self.errors = errors
        self.num_rows = num_rows
        self.num_records, self.positions = tokens.shape
        self.held = tokens[:1].numel() + errors[:1].numel()

    def gradients(self, start: int, stop: int) -> Tensor:
        """Gradients of some records, each of the table's size."""
        tokens, errors = self.tokens[start:stop], self.errors[start:stop]
        first = torch.arange(len(tokens), device=tokens.device).unsqueeze(1) * self.num_rows
        flat = torch.zeros(len(tokens) * self.num_rows, errors.shape[2], device=errors.device)
        flat.index_add_(0, (tokens + first).flatten(), errors.flatten(0, 1))
        return flat.view(len(tokens), -1)

    def add_weighted_sum(self, factors: Factors, total: Tensor) -> None:
        """Add the sum of c_i g_i, from the very rows that were measured."""
        for records in self._chunks():
            rows, _ = self._rows(records)
            part = Factors(factors.values[records], None if factors.broken is None else factors.broken[records])
            total.index_add_(0, self.tokens[records].flatten(), part.apply(rows).flatten(0, 1))

    def squared_norms(self, block: Block) -> SquaredNorms:
        """Touch only the rows that occur: the others give the offset."""
        values = torch.empty(self.num_records, dtype=torch.float64, device=self.errors.device)
        for records in self._chunks():
            values[records] = self._squares(records, block)
        return SquaredNorms(values + block.offset, block.inverse_scale.numel() * UNDERFLOW)

    def forget(self) -> None:
        """Let go of the output gradients."""
        self.errors = self.errors.new_empty(0)

    def _chunks(self) -> Iterable[slice]:
        chunk = max(1, _CHUNK_FLOATS // (self.positions * max(self.positions, self.errors.shape[2])))
        return (slice(start, start + chunk) for start in range(0, self.num_records, chunk))

    def _rows(self, records: slice) -> tuple[Tensor, Tensor]:
        """Gradient of the row of each token where it stands first, zero where it stands again, and where that is."""
        tokens = self.tokens[records]
        equal = tokens.unsqueeze(1) == tokens.unsqueeze(2)
        again = equal.tril(-1).any(2)
        return torch.bmm(equal.float(), self.errors[records]).masked_fill_(again.unsqueeze(2), 0.0), again

    def _squares(self, records: slice, block: Block) -> Tensor:
        tokens = self.tokens[records]
        rows, again = self._rows(records)
        inverse_scale = block.inverse_scale[tokens]
        if block.mean is None:
            squares = (rows * inverse_scale).square().sum(2)
        else:
            mean = block.mean[tokens]
            # in float64, so that what the offset counts for these rows is taken off to the last bit
            without = (mean * inverse_scale).double().square().sum(2)
            squares = ((rows - mean) * inverse_scale).square().sum(2) - without
        return squares.masked_fill(again, 0.0).sum(1, dtype=torch.float64)


@dataclass
class Embedding(Layer):
    """Rows of a table."""

    weight: Argument
    padding: int | None

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """The table."""
        return (self.weight,)

    def forward(self, x: Tensor) -> Tensor:
        """Look up."""
        return F.embedding(x, self.weight.value)

    def input_gradient(self, x: Tensor, e: Tensor) -> Tensor:
        """Tokens have no gradient."""
        raise AssertionError

    def uses(self, recorder: Recorder, x: Tensor, e: Tensor) -> Iterable[tuple[Argument, Use]]:
        """Rows that were looked up; the one that stands for padding does not learn."""
        if self.padding is not None:
            e = e.masked_fill((x == self.padding).unsqueeze(-1), 0.0)
        tokens = x.reshape(recorder.num_records, -1)
        yield self.weight, Lookup(tokens, recorder.by_record(e.float()), len(self.weight.value))


@register_rule(F.embedding)
def embedding(
    recorder: Recorder,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Record ``F.embedding``."""
    argument = recorder.argument(weight)
    name = argument.tracked.name if argument.tracked else ""
    if max_norm is not None or scale_grad_by_freq:
        raise UnsupportedUseError(name, "is an embedding with max_norm or scale_grad_by_freq, which mix records")
    padding = None if padding_idx is None else padding_idx % len(weight)
    return recorder.apply(Embedding(argument, padding), recorder.data(input, argument.tracked))
