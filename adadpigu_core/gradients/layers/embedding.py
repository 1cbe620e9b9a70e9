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
from adadpigu_core.gradients.uses import Factors, SquaredNorms, Use

_CHUNK_FLOATS = 1_000_000
_ROUNDING = 1e-6  # relative to the offset, from which rows that do occur are taken off


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
        self.num_records = len(tokens)
        self.held = tokens[:1].numel() + errors[:1].numel()

    def gradients(self, start: int, stop: int) -> Tensor:
        """Gradients of some records, each of the table's size."""
        tokens, errors = self.tokens[start:stop], self.errors[start:stop]
        first = torch.arange(len(tokens), device=tokens.device).unsqueeze(1) * self.num_rows
        flat = torch.zeros(len(tokens) * self.num_rows, errors.shape[2], device=errors.device)
        flat.index_add_(0, (tokens + first).flatten(), errors.flatten(0, 1))
        return flat.view(len(tokens), self.num_rows, -1)

    def weighted_sum(self, factors: Factors) -> Tensor:
        """Sum of c_i g_i."""
        total = torch.zeros(self.num_rows, self.errors.shape[2], device=self.errors.device)
        return total.index_add_(0, self.tokens.flatten(), factors.apply(self.errors).flatten(0, 1))

    def squared_norms(self, block: Block, clipping_norm: float) -> SquaredNorms:
        """Touch only the rows that occur: the others give the offset."""
        count, positions = self.tokens.shape
        values = torch.empty(count, dtype=torch.float64, device=self.errors.device)
        chunk = max(1, _CHUNK_FLOATS // (positions * max(positions, self.errors.shape[2])))
        for start in range(0, count, chunk):
            values[start : start + chunk] = self._chunk(slice(start, start + chunk), block)
        doubt: Tensor | float = block.weights.numel() * 2.0**-124
        if block.mean is not None:
            values, doubt = (values + block.offset).clamp(min=0), doubt + _ROUNDING * block.offset
        return SquaredNorms(values, doubt)

    def _chunk(self, records: slice, block: Block) -> Tensor:
        tokens, errors = self.tokens[records], self.errors[records]
        equal = tokens.unsqueeze(1) == tokens.unsqueeze(2)
        again = equal.tril(-1).any(2)  # the token stood at an earlier position
        rows = torch.bmm(equal.float(), errors)
        inverse_scale = block.inverse_scale[tokens]
        if block.mean is None:
            squares = (rows * inverse_scale).square().sum(2)
        else:
            mean = block.mean[tokens]
            squares = ((rows - mean) * inverse_scale).square().sum(2) - (mean * inverse_scale).square().sum(2)
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
