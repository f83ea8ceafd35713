"""open_clip's transformer blocks with self-attention that keeps queries, keys and values in one tensor.

PyTorch's `nn.MultiheadAttention` takes the three out of it one by one, so that in the backward pass each makes a tensor
as large as all three, and these are added up: on an H100 a tenth of a step of the paper's models.
"""

from __future__ import annotations

from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional


class Block(ResidualAttentionBlock):
    """open_clip's block: same weights, names and output."""

    def attention(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Attention (b, n, width) of `q_x` to itself; to others as open_clip computes it."""
        if k_x is not None or v_x is not None:
            return super().attention(q_x, k_x, v_x, attn_mask)
        packed = functional.linear(q_x, self.attn.in_proj_weight, self.attn.in_proj_bias)
        heads = packed.unflatten(-1, (3, self.attn.num_heads, self.attn.head_dim))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4).unbind()  # each (b, heads, n, head_dim)
        mask = None if attn_mask is None else attn_mask.to(queries.dtype)
        attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.attn.out_proj(attended.transpose(1, 2).flatten(2))


def pack_attention(model: nn.Module) -> None:
    """Let a model's open_clip blocks compute their attention so, in place."""
    for module in model.modules():
        if type(module) is ResidualAttentionBlock and _is_packed(module):
            module.__class__ = Block


def _is_packed(block: ResidualAttentionBlock) -> bool:
    """Whether it has one matrix for queries, keys and values, drops nothing, and reads (b, n, width)."""
    attention: nn.MultiheadAttention = block.attn
    return attention.in_proj_weight is not None and attention.dropout == 0 and attention.batch_first
