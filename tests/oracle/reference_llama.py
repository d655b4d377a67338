"""A LLaMA decoder in plain PyTorch, written from the equations, for runs in fp64.

transformers computes norms and eager softmax in fp32 even when the model is fp64, so it cannot be
its own high-precision reference. This one computes everything in the dtype of its parameters,
except that the angles of RoPE, their cosines and sines are fp32 values as the format demands
(a checkpoint means `cos(f32(position) * f32(inv_freq))`); they are widened afterwards.
It shares no code with transformers and is therefore also a second opinion on it.
"""

import math

import numpy as np
import torch

import counter_hash
from models import Batch, Model, token_losses


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes of all tensors, in the order of the forward pass."""
    h, i = model.hidden_size, model.intermediate_size
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    out = {"model.embed_tokens.weight": (model.vocab_size, h)}
    for n in range(model.num_layers):
        block = f"model.layers.{n}"
        out |= {
            f"{block}.input_layernorm.weight": (h,),
            f"{block}.self_attn.q_proj.weight": (q, h),
            f"{block}.self_attn.k_proj.weight": (kv, h),
            f"{block}.self_attn.v_proj.weight": (kv, h),
            f"{block}.self_attn.o_proj.weight": (h, q),
            f"{block}.post_attention_layernorm.weight": (h,),
            f"{block}.mlp.gate_proj.weight": (i, h),
            f"{block}.mlp.up_proj.weight": (i, h),
            f"{block}.mlp.down_proj.weight": (h, i),
        }
    out["model.norm.weight"] = (h,)
    if not model.tied:
        out["lm_head.weight"] = (model.vocab_size, h)
    return out


def parameters(model: Model, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Leaf tensors with the f32 values of the counter hash."""
    scales = model.scales()
    return {
        name: torch.from_numpy(counter_hash.weight(name, shape, scales)).to(dtype).requires_grad_()
        for name, shape in shapes(model).items()
    }


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x `[seq, heads, d]`, cos and sin `[seq, 1, d/2]`: turns the pairs (i, i + d/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def logits(
    model: Model, p: dict[str, torch.Tensor], tokens: np.ndarray, positions: np.ndarray
) -> torch.Tensor:
    """Logits `[seq, vocab]` of one packed row, document by document within attention."""
    dtype = p["model.norm.weight"].dtype
    seq, d = len(tokens), model.head_dim
    group = model.num_heads // model.num_kv_heads
    exponent = torch.arange(0, d, 2, dtype=torch.float32) / d
    angle = torch.from_numpy(positions).float()[:, None] * (1.0 / model.rope_theta**exponent)
    cos, sin = angle.cos().to(dtype)[:, None, :], angle.sin().to(dtype)[:, None, :]
    document = torch.from_numpy(np.cumsum(positions == 0))
    step = torch.arange(seq)
    visible = (document[:, None] == document[None, :]) & (step[:, None] >= step[None, :])

    x = p["model.embed_tokens.weight"][torch.from_numpy(tokens)]
    for n in range(model.num_layers):
        block = f"model.layers.{n}"
        y = _norm(x, p[f"{block}.input_layernorm.weight"], model.rms_norm_eps)
        heads = [
            (y @ p[f"{block}.self_attn.{which}_proj.weight"].T).view(seq, -1, d) for which in "qkv"
        ]
        q, k, v = _rotate(heads[0], cos, sin), _rotate(heads[1], cos, sin), heads[2]
        mixed = []
        for head in range(model.num_heads):
            scores = q[:, head] @ k[:, head // group].T / math.sqrt(d)
            scores = scores.masked_fill(~visible, -math.inf)
            mixed.append(torch.softmax(scores, dim=-1) @ v[:, head // group])
        x = x + torch.cat(mixed, dim=-1) @ p[f"{block}.self_attn.o_proj.weight"].T
        y = _norm(x, p[f"{block}.post_attention_layernorm.weight"], model.rms_norm_eps)
        gate, up = (y @ p[f"{block}.mlp.{which}_proj.weight"].T for which in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ p[f"{block}.mlp.down_proj.weight"].T
    x = _norm(x, p["model.norm.weight"], model.rms_norm_eps)
    head = p["model.embed_tokens.weight" if model.tied else "lm_head.weight"]
    return x @ head.T


def loss_sum(model: Model, p: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    """Sum of all token losses of the batch."""
    return sum(
        token_losses(logits(model, p, tokens, positions), targets).sum()
        for tokens, positions, targets in zip(batch.tokens, batch.positions, batch.targets)
    )
