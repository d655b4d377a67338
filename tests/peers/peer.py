"""One rank of a peer: trains the model in PyTorch and prints the seconds of each step.

    peer.py alone --model JSON [options]
    torchrun --standalone --nproc-per-node 2 peer.py ddp|fsdp2 --model JSON [options]

`alone` is one process with bf16 autocast over fp32 weights, or with `--dtype fp32`; `ddp` is the
same under DistributedDataParallel; `fsdp2` is `fully_shard` per block with bf16 weights and fp32
reduction. All: fp32 master weights and moments, fused AdamW, clipping, random tokens; with ranks:
gloo. Rank 0 ends with one line of JSON; its `bytes_sent` are those that the loopback interface
counted, per rank and step.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "bench"))

import attention
from attention import WAYS
from llama import Llama
from model import Model

PRECISION = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("alone", "ddp", "fsdp2"))
    parser.add_argument("--model", type=json.loads, required=True, help="sizes, as JSON")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1, help="samples per rank and step")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="alone and ddp")
    parser.add_argument("--document-tokens", type=int, help="attention stays in such documents")
    parser.add_argument("--attention", choices=WAYS, default="mask", help="inside documents")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before those")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile each block, alone the whole model"
    )
    parser.add_argument("--reshard", action="store_true", help="fsdp2: free weights after forward")
    return parser.parse_args()


def as_ddp(llama: Llama) -> nn.Module:
    """Gradients are averaged in fp32, bucket by bucket, while backward runs."""
    return DistributedDataParallel(llama, gradient_as_bucket_view=True)


def as_fsdp2(llama: Llama, reshard: bool) -> nn.Module:
    """One unit per block, and one for the rest.

    Weights stay gathered until the update by default: what Oxitron does, and less to send than
    gathering them twice.
    """
    for block in llama.layers:
        fully_shard(block, mp_policy=PRECISION, reshard_after_forward=reshard)
    fully_shard(llama, mp_policy=PRECISION, reshard_after_forward=reshard)
    for unit in (llama, *llama.layers):
        unit.set_force_sum_reduction_for_comms(True)  # gloo cannot average
    return llama


def optimizer_for(module: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    """Fused AdamW; norms without weight decay, as on the other side."""
    decayed = [p for p in module.parameters() if p.dim() >= 2]
    others = [p for p in module.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def batches(model: Model, shape: tuple[int, int], seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Tokens and targets `[batch, seq]`; ids from the range that the shards of the other side
    hold."""
    generator = torch.Generator().manual_seed(seed)
    samples, seq_len = shape

    def draw() -> tuple[Tensor, Tensor]:
        ids = torch.randint(2, model.vocab_size, (samples, seq_len + 1), generator=generator)
        return ids[:, :-1], ids[:, 1:]

    return draw


def main() -> int:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    alone, ddp = args.kind == "alone", args.kind == "ddp"
    if not alone:
        dist.init_process_group("gloo")
    rank, ranks = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    model = Model(**args.model)
    attend = attention.within(args.attention, args.seq_len, args.document_tokens)
    llama = Llama(model, args.seq_len, attend)
    parameters = sum(p.numel() for p in llama.parameters())
    if args.compile:
        for block in [llama] if alone else llama.layers:
            block.compile()
    module = llama if alone else as_ddp(llama) if ddp else as_fsdp2(llama, args.reshard)
    optimizer = optimizer_for(module)
    draw = batches(model, (args.batch, args.seq_len), rank)
    by_autocast = args.dtype == "bf16" and args.kind != "fsdp2"

    def step() -> float:
        tokens, targets = draw()
        with torch.autocast("cpu", torch.bfloat16, enabled=by_autocast):
            loss = module(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not ddp)  # DDP's gradients are views of its buckets
        return loss.item()

    seconds, losses, sent = [], [], []
    for _ in range(args.warm_up + args.steps):
        began = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - began)
        sent.append(int(LOOPBACK.read_text()))

    if rank == 0:
        result = {
            "parameters": parameters,
            "torch": torch.__version__,
            "tokens_per_step": ranks * args.batch * args.seq_len,
            "step_seconds": seconds[args.warm_up :],
            "bytes_sent": (sent[-1] - sent[0]) / (len(sent) - 1) / ranks,
            "first_loss": losses[0],
            "last_loss": losses[-1],
        }
        print(json.dumps(result), flush=True)
    if not alone:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
