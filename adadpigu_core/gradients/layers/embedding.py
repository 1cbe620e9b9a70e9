"""Embedding tables.

A record's gradient has as many rows as it has different tokens, so nothing of the table's size is ever made: output
gradients of equal tokens are added up by a product with the matrix that says which tokens of a record are equal.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adadpigu_core.exceptions import ModelError
from adadpigu_core.gradients.recorder import DECOMPOSITIONS, Argument, Layer, Recorder, register_rule
from adadpigu_core.gradients.transform import Block
from adadpigu_core.gradients.uses import UNDERFLOW, Factors, ShortCut, SquaredNorms, Use

_CHUNK_FLOATS = 250_000


class Lookup(ShortCut):
    """Rows of a table that records look up.

    Args:
        tokens: Int64 [n, T].
        errors: Gradients of the outputs, float32 [n, T, D].
        num_rows: Rows of the table.
    """

    def __init__(self, tokens: Tensor, errors: Tensor, num_rows: int) -> None:
        self.tokens = tokens
        self.rows, self.again = _added_up(tokens, errors)
        self.num_rows = num_rows
        self.num_records, self.positions = tokens.shape
        self.held = tokens[:1].numel() + errors[:1].numel()

    def gradients(self, start: int, stop: int) -> Tensor:
        """Gradients of some records, each of the table's size."""
        tokens, rows = self.tokens[start:stop], self.rows[start:stop]
        first = torch.arange(len(tokens), device=tokens.device).unsqueeze(1) * self.num_rows
        flat = rows.new_zeros(len(tokens) * self.num_rows, rows.shape[2])
        flat.index_add_(0, (tokens + first).flatten(), rows.flatten(0, 1))
        return flat.view(len(tokens), -1)

    def add_weighted_sum(self, factors: Factors, total: Tensor) -> None:
        """Add the sum of c_i g_i, from the very rows that were measured."""
        total.index_add_(0, self.tokens.flatten(), factors.apply(self.rows.to(total.dtype)).flatten(0, 1))

    def squared_norms(self, block: Block) -> SquaredNorms:
        """Touch only the rows that occur: the others give the offset."""
        squares = [self._squares(records, block) for records in _chunks(self.rows)]
        return SquaredNorms(torch.cat(squares) + block.offset, block.inverse_scale.numel() * UNDERFLOW)

    def forget(self) -> None:
        """Let go of the rows."""
        self.rows = self.rows.new_empty(0)

    def _squares(self, records: slice, block: Block) -> Tensor:
        tokens, rows = self.tokens[records], self.rows[records]
        inverse_scale = block.inverse_scale[tokens]
        if block.mean is None:
            squares = (rows * inverse_scale).square().sum(2)
        else:
            mean = block.mean[tokens]
            # in float64, so that what the offset counts for these rows is taken off to the last bit
            without = (mean * inverse_scale).double().square().sum(2)
            squares = ((rows - mean) * inverse_scale).square().sum(2) - without
        return squares.masked_fill(self.again[records], 0.0).sum(1, dtype=torch.float64)


def _added_up(tokens: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the row of each token where it stands first, zero where it stands again, and where that is."""
    ordered = tokens.sort(1).values
    if tokens.device.type == "cpu" and not bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        return errors, torch.zeros_like(tokens, dtype=torch.bool)
    rows, again = torch.empty_like(errors), torch.empty_like(tokens, dtype=torch.bool)
    for records in _chunks(errors):
        equal = tokens[records].unsqueeze(1) == tokens[records].unsqueeze(2)
        again[records] = equal.tril(-1).any(2)
        torch.bmm(equal.float(), errors[records], out=rows[records])
    return rows.masked_fill_(again.unsqueeze(2), 0.0), again


def _chunks(errors: Tensor) -> Iterable[slice]:
    """Some records at a time, of [n, T, D]: what is T x T or T x D of each stays inside the cache."""
    count, positions, width = errors.shape
    chunk = max(1, _CHUNK_FLOATS // max(1, positions * max(positions, width)))
    return (slice(start, start + chunk) for start in range(0, count, chunk))


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
        text = f"parameter {name}: max_norm and scale_grad_by_freq of an embedding mix records; leave them out"
        raise ModelError(text, text)
    padding = None if padding_idx is None else padding_idx % len(weight)
    return recorder.apply(Embedding(argument, padding), recorder.data(input, argument.tracked))


def _padded(input: Tensor, weight: Tensor, padding_idx: int | None = None, *others: Any, **settings: Any) -> Tensor:
    """Look up without torch's own padding, which under `vmap` is left out of the first record's gradient only."""
    found = F.embedding(input, weight, None, *others, **settings)
    if padding_idx is None:
        return found
    return torch.where((input == padding_idx % len(weight)).unsqueeze(-1), found.detach(), found)


DECOMPOSITIONS[F.embedding] = _padded
