"""What was learnt from releases goes into checkpoints and messages, and is taken from there only where it fits."""

from collections.abc import Mapping

from torch import Tensor

from adadpigu_core.exceptions import MessageError


def taken(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], name: str, of: str = "the model"
) -> dict[str, Tensor]:
    """Take what goes by the same names as one's own.

    Args:
        state: What was kept; may hold more.
        own: Tensors of the right names and shapes.
        name: Of the field, for the error.
        of: What shapes depend on, for the error.

    Raises:
        MessageError: Something is missing or of another shape.
    """
    if any(key not in state or state[key].shape != own[key].shape for key in own):
        text = f"{name}: {of} changed during the run"
        raise MessageError(text, text)
    return {key: state[key] for key in own}
