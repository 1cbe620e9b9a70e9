"""The backward pass, and what takes part in it."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from adadpigu_core.exceptions import ModelError
from adadpigu_core.gradients.recorder import NODE


def differentiate(loss: Tensor, model: nn.Module) -> None:
    """Run the backward pass.

    Raises:
        ModelError: The model throws activations away and computes them anew.
    """
    try:
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
    except CheckpointError as error:
        text = f"{type(model).__name__} uses torch.utils.checkpoint: leave that out; physical batches bound memory here"
        raise ModelError(text, text) from error


def has_foreign_functions(values: Iterable[Tensor]) -> bool:
    """Whether autograd functions that are neither the engine's nor torch's own lead to some values."""
    waiting, seen = [value.grad_fn for value in values if value.grad_fn is not None], set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction) and not isinstance(node, NODE):
            return True
        waiting.extend(following for following, _ in node.next_functions if following is not None)
    return False
