"""The models and token batches of the golden files, and how transformers runs them.

Everything here is a function of names and sizes: weights and tokens come from `counter_hash`.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import counter_hash

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

IGNORE = -100


@dataclass(frozen=True)
class Model:
    """Sizes of a LLaMA-layout model and the scales of its weights (`counter_hash.weight`)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    tied: bool
    scale_embedding: float
    scale_linear: float
    scale_residual: float
    scale_norm: float

    def scales(self) -> dict[str, float]:
        return {
            "embedding": self.scale_embedding,
            "linear": self.scale_linear,
            "residual": self.scale_residual,
            "norm": self.scale_norm,
        }

    def json(self) -> dict:
        return asdict(self)


# 8 query and 2 KV heads; the heads' total width (128) differs from the hidden size, the
# vocabulary is a prime, norms are far from one and weights far from zero (std 0.144).
TINY = Model(
    vocab_size=257,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    max_positions=256,
    rms_norm_eps=1e-5,
    rope_theta=50_000.0,
    tied=False,
    scale_embedding=0.25,
    scale_linear=0.25,
    scale_residual=0.25,
    scale_norm=0.25,
)
TINY_TIED = replace(TINY, tied=True)

# Large enough that bf16 errors average out; scores and activations of the size of a trained model.
MEDIUM = replace(
    TINY,
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=4,
    head_dim=32,
    max_positions=512,
    scale_embedding=0.125,
    scale_linear=0.125,
    scale_residual=0.125,
    scale_norm=0.125,
)

# A model as training begins: std 0.018, projections into the residual stream 0.009, norms of one.
# For long rows, where rounding errors add up over many tokens.
INITIAL = Model(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=704,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_positions=4096,
    rms_norm_eps=1e-5,
    rope_theta=50_000.0,
    tied=False,
    scale_embedding=0.03125,
    scale_linear=0.03125,
    scale_residual=0.015625,
    scale_norm=0.0,
)

# Projections of the usual initial size (std 0.036), so that 20 steps teach it something. The untied
# embedding is larger, which brings the gradient norm near 1: some steps are clipped at 1, some not.
TRAIN = replace(
    TINY,
    hidden_size=128,
    intermediate_size=192,
    scale_embedding=0.5,
    scale_linear=0.0625,
    scale_residual=0.0625,
    scale_norm=0.125,
)
TRAIN_TIED = replace(TRAIN, tied=True, scale_embedding=0.0625)


@dataclass
class Batch:
    """Packed rows: tokens, targets and positions, int64 `[rows, seq]` each.

    A target is the next token of the same document, also where the row's end cuts the document;
    the last token of a document has no target (-100). Positions restart at 0 with every document
    and with every row.
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray

    def starts(self) -> list[list[int]]:
        """Per row, the offsets where documents begin; the first is 0."""
        return [np.flatnonzero(row == 0).tolist() for row in self.positions]

    def valid(self) -> int:
        return int((self.targets != IGNORE).sum())

    def arrays(self) -> dict[str, np.ndarray]:
        """For a golden file, int32."""
        return {
            "tokens": self.tokens.astype(np.int32),
            "targets": self.targets.astype(np.int32),
            "positions": self.positions.astype(np.int32),
        }


def pack(stream: str, rows: int, seq: int, vocab: int, shortest: int, longest: int) -> Batch:
    """Cuts the documents of `stream` into rows of `seq` tokens."""
    return cut(*counter_hash.documents(stream, rows * seq + 1, vocab, shortest, longest), rows, seq)


def cut(tokens: np.ndarray, document: np.ndarray, rows: int, seq: int) -> Batch:
    """Rows of `seq` tokens; one token more says what the last one predicts."""
    targets = np.where(document[1:] == document[:-1], tokens[1:], IGNORE)
    positions = np.empty(rows * seq, dtype=np.int64)
    for i in range(rows * seq):
        begins = i % seq == 0 or document[i] != document[i - 1]
        positions[i] = 0 if begins else positions[i - 1] + 1
    shape = (rows, seq)
    return Batch(tokens[:-1].reshape(shape), targets.reshape(shape), positions.reshape(shape))


def join(*batches: Batch) -> Batch:
    return Batch(
        *(
            np.concatenate([getattr(batch, field) for batch in batches])
            for field in ("tokens", "targets", "positions")
        )
    )


def tiny_batch() -> Batch:
    """[3, 96]: the beginning of one document, documents of 1 to 50 tokens, documents of 1 to 8."""
    return join(
        pack("tiny/long", 1, 96, TINY.vocab_size, 97, 97),
        pack("tiny/packed", 1, 96, TINY.vocab_size, 1, 50),
        pack("tiny/short", 1, 96, TINY.vocab_size, 1, 8),
    )


def medium_batch() -> Batch:
    """[1, 512]: packed documents of 1 to 200 tokens."""
    return pack("medium/packed", 1, 512, MEDIUM.vocab_size, 1, 200)


def long_batch(lengths: list[int], seq: int) -> Batch:
    """[1, seq]: documents of these lengths, the last of which the row's end cuts."""
    assert sum(lengths[:-1]) < seq < sum(lengths)
    document = np.repeat(np.arange(len(lengths)), lengths)[: seq + 1]
    tokens = counter_hash.fill(f"long/{seq}", document, INITIAL.vocab_size)
    return cut(tokens, document, 1, seq)


def config(model: Model) -> LlamaConfig:
    """The transformers configuration, in the keys that the running version understands."""
    rope = {"rope_theta": model.rope_theta}
    if int(transformers.__version__.split(".")[0]) >= 5:
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta}}
    return LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_positions,
        rms_norm_eps=model.rms_norm_eps,
        tie_word_embeddings=model.tied,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
        **rope,
    )


def build(model: Model, attention: str = "eager") -> LlamaForCausalLM:
    """transformers' LLaMA in fp32 with weights from the counter hash."""
    hf = LlamaForCausalLM._from_config(config(model), attn_implementation=attention).float().train()
    scales = model.scales()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            value = counter_hash.weight(name, tuple(parameter.shape), scales)
            parameter.copy_(torch.from_numpy(value))
    inverse = hf.model.rotary_emb.inv_freq
    assert inverse.dtype == torch.float32 and inverse[0] == 1.0, "RoPE frequencies not initialised"
    expected = 1.0 / model.rope_theta ** (torch.arange(0, model.head_dim, 2).float() / model.head_dim)
    assert torch.equal(inverse, expected), "rope_theta did not reach the model"
    return hf


def row_logits(hf: LlamaForCausalLM, batch: Batch, row: int) -> torch.Tensor:
    """Logits `[seq, vocab]` of one row; transformers derives the document mask from positions."""
    return hf(
        input_ids=torch.from_numpy(batch.tokens[row : row + 1]),
        position_ids=torch.from_numpy(batch.positions[row : row + 1]),
        use_cache=False,
    ).logits[0]


def token_losses(logits: torch.Tensor, targets: np.ndarray) -> torch.Tensor:
    """Cross-entropy per token in at least fp32, 0 where there is no target; `[seq]`."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(
        logits, torch.from_numpy(targets), ignore_index=IGNORE, reduction="none"
    )


def loss_sum(hf: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Sum of all token losses of the batch, row after row."""
    return sum(
        token_losses(row_logits(hf, batch, row), batch.targets[row]).sum()
        for row in range(len(batch.tokens))
    )


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
