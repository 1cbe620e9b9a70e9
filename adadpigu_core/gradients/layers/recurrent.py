"""Recurrent networks, unrolled: every step is a matrix applied to the input and one applied to the state.

torch's fused kernels give no output gradients of single steps, so the same recurrence is computed step by step. The
input's matrix is applied to all steps at once, and the uses of the state's matrix are one use at as many positions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from adadpigu_core.gradients.layers.linear import matrix
from adadpigu_core.gradients.recorder import DECOMPOSITIONS, Recorder, register_rule

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]
"""New state from what the input's and the state's matrices give, [rows, G H] both, and the old state."""


def _lstm(from_input: Tensor, from_state: Tensor, state: State) -> State:
    i, f, g, o = (from_input + from_state).chunk(4, dim=1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(from_input: Tensor, from_state: Tensor, state: State) -> State:
    (ri, zi, ni), (rs, zs, ns) = from_input.chunk(3, dim=1), from_state.chunk(3, dim=1)
    r, z = torch.sigmoid(ri + rs), torch.sigmoid(zi + zs)
    n = torch.tanh(ni + r * ns)
    return (n + z * (state[0] - n),)


def _plain(activation: Callable[[Tensor], Tensor], from_input: Tensor, from_state: Tensor, state: State) -> State:
    return (activation(from_input + from_state),)


def _direction(recorder: Recorder, x: Tensor, state: State, weights: list[Tensor], cell: Cell) -> tuple[Tensor, State]:
    """Run one direction of one layer over [rows, T, I]."""
    of_input, of_state, *others = weights
    input_bias, state_bias = others[:2] if len(others) > 1 else (None, None)
    projection = others[-1] if len(others) in (1, 3) else None
    steps = matrix(recorder, x, of_input, input_bias).unbind(1)
    outputs = []
    for step in steps:
        state = cell(step, matrix(recorder, state[0], of_state, state_bias), state)
        if projection is not None:
            state = (matrix(recorder, state[0], projection, None), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs, 1), state


def _network(
    cell: Cell,
    recorder: Recorder,
    x: Tensor,
    initial: Tensor | tuple[Tensor, ...],
    weights: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    if not isinstance(weights, list | tuple) or not isinstance(x, Tensor) or x.dim() != 3:
        raise recorder.unsupported(
            "is used by a recurrent network on packed sequences or on one record", weights, has_biases
        )
    states = initial if isinstance(initial, tuple) else (initial,)
    directions = 1 + bidirectional
    size = len(weights) // (num_layers * directions)  # matrices and biases, and a projection if there is one
    x = x if batch_first else x.transpose(0, 1)
    last: list[State] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            given = weights[number * size : (number + 1) * size]
            begin = tuple(state[number] for state in states)
            output, end = _direction(recorder, x.flip(1) if direction else x, begin, list(given), cell)
            outputs.append(output.flip(1) if direction else output)
            last.append(end)
        x = torch.cat(outputs, 2)
        if layer < num_layers - 1:
            x = F.dropout(x, dropout, training=train)
    final = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
    return (x if batch_first else x.transpose(0, 1), *final)


def _single(
    cell: Cell,
    recorder: Recorder,
    x: Tensor,
    initial: Tensor | tuple[Tensor, ...],
    of_input: Tensor,
    of_state: Tensor,
    input_bias: Tensor | None = None,
    state_bias: Tensor | None = None,
) -> Any:
    states = tuple(initial) if isinstance(initial, list | tuple) else (initial,)
    state = cell(matrix(recorder, x, of_input, input_bias), matrix(recorder, states[0], of_state, state_bias), states)
    return state if len(state) > 1 else state[0]


class _Unwatched:
    """Stands in for a recorder where nothing is to be recorded."""

    @staticmethod
    def tracked(_value: object) -> None:
        return None

    @staticmethod
    def unsupported(reason: str, *_values: object) -> ValueError:
        return ValueError(f"it {reason}")


for _cell, _of_network, _of_cell in (
    (_lstm, torch.lstm, torch.lstm_cell),
    (_gru, torch.gru, torch.gru_cell),
    (partial(_plain, torch.tanh), torch.rnn_tanh, torch.rnn_tanh_cell),
    (partial(_plain, torch.relu), torch.rnn_relu, torch.rnn_relu_cell),
):
    register_rule(_of_network)(partial(_network, _cell))
    DECOMPOSITIONS[_of_network] = partial(_network, _cell, cast(Recorder, _Unwatched()))
    register_rule(_of_cell)(partial(_single, _cell))
