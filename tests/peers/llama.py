"""The decoder that the peers train: LLaMA as one writes it in PyTorch.

Module and parameter names are those of Hugging Face's LLaMA, so that a size or a norm found here
can be looked up on the other side. Only what PyTorch itself offers is used: `rms_norm`, an
attention of `attention.py`, and `cross_entropy`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention import Attend
from model import Model


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def rope_tables(seq_len: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[seq, head_dim]`, the two halves of a head alike."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on `[batch, heads, seq, head_dim]`, half-split."""
    left, right = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-right, left), dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Causal attention, several query heads to a key and value head."""

    def __init__(self, model: Model, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.head_dim = model.head_dim
        width, kv_width = model.num_heads * self.head_dim, model.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(model.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(model.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(model.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, model.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        split = (batch, seq, -1, self.head_dim)
        q = rotate(self.q_proj(x).view(split).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(split).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(split).transpose(1, 2)
        y = self.attend(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(batch, seq, -1))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(model.hidden_size, model.intermediate_size, bias=False)
        self.up_proj = nn.Linear(model.hidden_size, model.intermediate_size, bias=False)
        self.down_proj = nn.Linear(model.intermediate_size, model.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and SwiGLU, each behind a norm and added to the residual stream."""

    def __init__(self, model: Model, attend: Attend) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(model.hidden_size, model.rms_norm_eps)
        self.self_attn = Attention(model, attend)
        self.post_attention_layernorm = RMSNorm(model.hidden_size, model.rms_norm_eps)
        self.mlp = SwiGLU(model)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Tokens and targets `[batch, seq]` to the mean loss. With `recompute` backward computes blocks
    again from their inputs."""

    def __init__(
        self, model: Model, seq_len: int, attend: Attend, recompute: bool = False
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.embed_tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(Block(model, attend) for _ in range(model.num_layers))
        self.norm = RMSNorm(model.hidden_size, model.rms_norm_eps)
        self.lm_head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        cos, sin = rope_tables(seq_len, model.head_dim, model.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialise(model)

    def initialise(self, model: Model) -> None:
        """N(0, 0.02²); projections into the residual stream divided by √(2·layers)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = math.sqrt(2 * model.num_layers) if into_residual else 1.0
            nn.init.normal_(parameter, std=0.02 / scale)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            if self.recompute:
                x = checkpoint(layer, x, self.cos, self.sin, use_reentrant=False)
            else:
                x = layer(x, self.cos, self.sin)
        logits = self.lm_head(self.norm(x))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
