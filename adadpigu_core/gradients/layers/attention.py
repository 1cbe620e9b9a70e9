"""Multi-head attention: its projections are matrices, recorded as such; between them there are no parameters."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adadpigu_core.gradients.layers.linear import matrix
from adadpigu_core.gradients.recorder import Recorder, register_rule


@register_rule(F.multi_head_attention_forward)
def attention(  # the signature is torch's
    recorder: Recorder,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """Record attention over [T, rows, E], which is how torch calls it.

    Only the two projections are replaced; torch itself computes what lies between, with identities in their place.
    """
    if query.dim() != 3 or bias_k is not None or bias_v is not None or static_k is not None or static_v is not None:
        given = (in_proj_weight, in_proj_bias, bias_k, bias_v, q_proj_weight, out_proj_weight, out_proj_bias)
        raise recorder.unsupported("is used by attention without batch, or with bias_k or bias_v", *given)
    if is_causal and attn_mask is None:
        raise RuntimeError("attention with is_causal needs attn_mask")
    same = key is query and value is query
    query, key, value = (values.transpose(0, 1) for values in (query, key, value))
    if use_separate_proj_weight:
        weights = [q_proj_weight, k_proj_weight, v_proj_weight]
        projected = _separate(recorder, (query, key, value), weights, in_proj_bias)
    elif same:
        assert in_proj_weight is not None  # noqa: S101  # for the type checker
        projected = list(matrix(recorder, query, in_proj_weight, in_proj_bias).chunk(3, dim=-1))
    else:
        assert in_proj_weight is not None  # noqa: S101  # for the type checker
        size = embed_dim_to_check
        weights = [recorder.rows_of(in_proj_weight, i * size, (i + 1) * size) for i in range(3)]
        projected = _separate(recorder, (query, key, value), weights, in_proj_bias)
    mask = _mask(key_padding_mask, attn_mask, query, key, num_heads, add_zero_attn=add_zero_attn)
    heads = [p.reshape(*p.shape[:2], num_heads, -1).transpose(1, 2) for p in projected]  # [rows, H, T, E / H]
    if add_zero_attn:
        heads[1:] = [F.pad(h, (0, 0, 0, 1)) for h in heads[1:]]
    dropout = dropout_p if training else 0.0
    if need_weights:
        scores = heads[0] @ heads[1].transpose(2, 3) / math.sqrt(heads[0].shape[-1])
        shares = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
        mixed = shares @ heads[2]
    else:
        shares = None
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], mask, dropout)
    output = matrix(recorder, mixed.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    if shares is not None and average_attn_weights:
        shares = shares.mean(1)
    return output.transpose(0, 1), shares


def _separate(recorder: Recorder, inputs: Any, weights: Any, bias: Tensor | None) -> list[Tensor]:
    biases: list[Tensor | None] = [None] * 3
    if bias is not None:
        size = len(bias) // 3
        biases = [recorder.rows_of(bias, i * size, (i + 1) * size) for i in range(3)]
    return [matrix(recorder, x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]


def _mask(
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    query: Tensor,
    key: Tensor,
    num_heads: int,
    *,
    add_zero_attn: bool,
) -> Tensor | None:
    """Put both masks together, to be added to scores [rows, H, T, S]."""
    total: Tensor | None = None
    if attn_mask is not None:
        total = _additive(attn_mask, query.dtype)
        total = total.view(-1, num_heads, *total.shape[1:]) if total.dim() == 3 else total
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, query.dtype).view(len(key), 1, 1, -1)
        total = padding if total is None else total + padding
    if total is not None and add_zero_attn:
        total = F.pad(total, (0, 1))
    return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)
