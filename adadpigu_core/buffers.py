"""Buffers of a model, put back after what a forward pass does to them.

How often a model is called depends on how many records were drawn. A buffer that moves with every call, such as the
vector of a spectral norm, would carry that, and what it has seen of some records, into the gradients of others.
"""

import torch
from torch import nn


class Buffers:
    """A model's buffers as they are now.

    Args:
        model: Any model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept = [
            (module._buffers, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def restore(self) -> None:
        """Put them back."""
        with torch.no_grad():
            for buffers, name, buffer, value in self._kept:
                buffer.copy_(value)
                if buffers[name] is not buffer:
                    buffers[name] = buffer
