"""Causal attention inside documents, in the ways that PyTorch has for it on a CPU.

Documents are equally long here, so each way is at its best: the mask is made once, and so are the
block mask and the offsets.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries `[batch, heads, seq, head_dim]`, keys and values of fewer heads; answers as queries."""


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A sample is one document."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def masked(seq_len: int, document: int) -> Attend:
    """A dense mask, added to all scores; nothing is skipped."""
    number = torch.arange(seq_len) // document
    mask = (number[:, None] == number[None, :]).tril()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    return attend


def split(seq_len: int, document: int) -> Attend:
    """Documents as samples of their own: what a kernel for variable lengths comes to where all
    lengths are equal."""
    parts = seq_len // document

    def cut(x: Tensor) -> Tensor:
        batch, heads, _, width = x.shape
        x = x.view(batch, heads, parts, document, width).transpose(1, 2)
        return x.reshape(batch * parts, heads, document, width)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, _, width = q.shape
        y = whole(cut(q), cut(k), cut(v)).view(batch, parts, heads, document, width)
        return y.transpose(1, 2).reshape(batch, heads, seq_len, width)

    return attend


def flexible(seq_len: int, document: int) -> Attend:
    """FlexAttention, which skips blocks; it is fast only under torch.compile."""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query // document == key // document)

    blocks = create_block_mask(visible, None, None, seq_len, seq_len, device="cpu")
    compiled = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=blocks, enable_gqa=True)

    return attend


BY_NAME = {"mask": masked, "split": split, "flex": flexible}
WAYS = tuple(BY_NAME)


def within(way: str, seq_len: int, document: int | None) -> Attend:
    """Attention inside documents of so many tokens, in one of [`WAYS`]."""
    if document is None or document == seq_len:
        return whole
    if seq_len % document:
        raise ValueError(f"documents of {document} tokens do not fill samples of {seq_len}")
    return BY_NAME[way](seq_len, document)
