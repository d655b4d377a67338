"""What bench_steps.py measures: models, samples, settings, and what their arithmetic counts as."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKED = (HERE / "bin").is_dir()  # for a GPU machine, and not in the repository
# Modules that others need too.
SHARED = HERE if PACKED else HERE.parent
sys.path.insert(1, str(SHARED / "bench"))

import runs
from model import TINY, Model

BINARY = HERE / "bin" / "oxitron" if PACKED else runs.default_binary()
RESULTS = HERE / "results" if PACKED else runs.ROOT / "target" / "gpu-results"

LLAMA_1_3B = Model(32000, 2048, 5504, num_layers=24, num_heads=16, num_kv_heads=16)
INTERNLM2_1_8B = Model(
    92544, 2048, 8192, num_layers=24, num_heads=16, num_kv_heads=8, rope_base=1e6
)
INTERNLM2_7B = Model(
    92544, 4096, 14336, num_layers=32, num_heads=32, num_kv_heads=8, rope_base=1e6
)

# ---- settings of `oxitron train`, all of them in this one place ----------------------------------

# For every run. A checkpoint would take longer than the steps, and host memory to stage it in.
COMMON = {
    "model.dtype": "bf16",
    "optimizer.lr": "1e-4",
    "checkpoint.at_end": "false",
    "checkpoint.async": "false",
}
DETERMINISTIC = {"run.deterministic": "true"}
RECOMPUTE = {"parallel.recompute": "full"}
SMALL_MOMENTS = {"optimizer.moments_dtype": "bf16"}
# cuBLAS needs it to repeat itself.
DETERMINISTIC_ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

H200_BYTES = 139 << 30

# Sides of a comparison.
OURS, REPEATED, COMPILED, EAGER = "Oxitron", "Oxitron, deterministic", "torch.compile", "eager"
PEERS = (COMPILED, EAGER)


@dataclass(frozen=True)
class Case:
    """A step: the model, its samples, and how each side takes it."""

    name: str
    model: Model
    seq_len: int
    micro_batch: int
    accumulation: int
    settings: Mapping[str, str] = field(default_factory=dict)
    peer_options: tuple[str, ...] = ()
    # What the two sides do not have in common, for the table.
    note: str = ""
    peer_note: str = ""

    @property
    def tokens(self) -> int:
        return self.accumulation * self.micro_batch * self.seq_len

    @property
    def again(self) -> "Again":
        """Of Oxitron."""
        return Again.NEEDED if RECOMPUTE.items() <= self.settings.items() else Again.NOTHING

    def smoke(self) -> "Case":
        """The same on a processor, in a moment."""
        return replace(self, model=TINY, seq_len=self.seq_len // 64, micro_batch=1, accumulation=2)


def length(seq_len: int, micro_batch: int, accumulation: int) -> Case:
    return Case(f"1.8B at {seq_len}", INTERNLM2_1_8B, seq_len, micro_batch, accumulation)


# 32,768 tokens a step, but for the largest model.
CASES = {
    case.name: case
    for case in (
        Case("1.3B at 4096", LLAMA_1_3B, 4096, 4, 2),
        length(4096, 4, 2),
        length(8192, 2, 2),
        length(16384, 1, 2),
        length(32768, 1, 1),
        Case(
            "7B at 4096",
            INTERNLM2_7B,
            4096,
            2,
            2,
            RECOMPUTE | SMALL_MOMENTS,
            ("--weights", "bf16", "--recompute"),
            "fp32 master weights and gradients, bf16 moments; blocks computed again",
            "all state in bf16, no master weights; blocks computed again",
        ),
    )
}
MAIN, LONGEST, LARGEST = "1.3B at 4096", "1.8B at 32768", "7B at 4096"

# The most valuable first: what a limit of time cuts off is the end.
ORDER = (
    (MAIN, OURS),
    (MAIN, COMPILED),
    (MAIN, EAGER),
    (LONGEST, OURS),
    (LARGEST, OURS),
    (MAIN, REPEATED),
    ("1.8B at 4096", OURS),
    ("1.8B at 8192", OURS),
    ("1.8B at 16384", OURS),
    ("1.8B at 4096", COMPILED),
    (LONGEST, COMPILED),
    (LARGEST, COMPILED),
    ("1.8B at 8192", COMPILED),
    ("1.8B at 16384", COMPILED),
    ("1.8B at 4096", EAGER),
    (LONGEST, EAGER),
    (LARGEST, EAGER),
    ("1.8B at 8192", EAGER),
    ("1.8B at 16384", EAGER),
)
QUICK = ORDER[:2] + ORDER[3:5]
SMOKE = ORDER[:6]

# ---- arithmetic, as trainer/src/metrics/flops.rs has it -----------------------------------------


@dataclass(frozen=True)
class Flops:
    """Operations of a step: what the model needs with causal attention, the same with every pair of
    positions, and with what is computed again."""

    causal: float
    full: float
    hardware: float


class Again(Enum):
    """What blocks compute a second time."""

    NOTHING = 0
    # Ours: not the last product, which makes the next block's input, and nothing of the last block.
    NEEDED = 1
    # PyTorch's: every block as a whole.
    ALL = 2


def flops(case: Case, again: Again) -> Flops:
    """Of samples that hold one document each."""
    model = case.model
    width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    product = model.hidden_size * model.intermediate_size
    block = 2 * model.hidden_size * (width + kv_width) + 3 * product
    weights = model.num_layers * block + model.hidden_size * model.vocab_size
    pairs = width * case.seq_len
    all_pairs = model.num_layers * pairs
    causal = 6.0 * (weights + all_pairs) * case.tokens
    second = {
        Again.NOTHING: 0,
        Again.NEEDED: (model.num_layers - 1) * (block - product + pairs),
        Again.ALL: model.num_layers * (block + pairs),
    }[again]
    full = 6.0 * (weights + 2 * all_pairs) * case.tokens
    return Flops(causal, full, causal + 2.0 * second * case.tokens)
