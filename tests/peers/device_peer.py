"""PyTorch on one GPU (or on the processor): the same model, for speed and for its losses.

    device_peer.py speed --model JSON [options]          seconds of each step
    device_peer.py weights --model JSON --folder NEW     random weights, as a Hugging Face folder
    device_peer.py losses --folder HF --tokens FILE      the loss of each step on given tokens

What it trains with is the usual way, with Oxitron's numerics: fp32 weights under bf16 autocast, an
fp32 residual stream, fused AdamW, gradients and moments in fp32, cuDNN's or flash attention. The
casts of weights that this takes are about 1% of a step. `--weights cast` rounds all weights to bf16
first, those of embeddings and norms too, as FSDP2 does. `--weights bf16` holds weights, gradients
and moments in bf16 alone, for models whose fp32 state does not fit: faster and smaller, and not the
same training. Ends with one line of JSON.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "bench"))

import attention
import hf_weights
from llama import Llama
from model import Model
from peer import optimizer_for

CLIP_NORM = 1.0
# Tried in this order.
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("speed", "weights", "losses"))
    parser.add_argument("--model", type=json.loads, required=True, help="sizes, as JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=1, help="samples computed at once")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--weights", choices=("fp32", "cast", "bf16"), default="fp32")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of products")
    parser.add_argument("--recompute", action="store_true", help="blocks again in backward")
    parser.add_argument("--compile", action="store_true", help="torch.compile the whole model")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before those")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="of weights")
    parser.add_argument("--tokens", type=Path, help="JSON: the samples of every step")
    return parser.parse_args()


class Trainer:
    """The model on its device, and its steps."""

    def __init__(self, args: argparse.Namespace, seq_len: int) -> None:
        self.args = args
        with torch.device(args.device):
            model = Llama(Model(**args.model), seq_len, attention.whole, args.recompute)
        self.module: nn.Module = model.bfloat16() if args.weights == "bf16" else model
        if args.compile:
            model.compile(dynamic=False)
        self.optimizer = optimizer_for(model, args.lr)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    def with_cast_weights(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss with every weight rounded to bf16, and gradients of those added to fp32 ones."""
        cast = {name: p.bfloat16() for name, p in self.module.named_parameters()}
        return functional_call(self.module, cast, (tokens, targets))

    def step(self, micro_batches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """One update; its mean loss, which is not waited for."""
        args = self.args
        autocast = args.dtype == "bf16" and args.weights == "fp32"
        module = self.with_cast_weights if args.weights == "cast" else self.module
        losses = []
        for tokens, targets in micro_batches:
            with torch.autocast(args.device, torch.bfloat16, enabled=autocast):
                loss = module(tokens, targets) / len(micro_batches)
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(self.module.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum()


class Clock:
    """The time between marks: of the GPU's own, where there is one."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.marks: list = []

    def mark(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        pairs = list(zip(self.marks, self.marks[1:]))
        if not self.on_gpu:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairs]


def attend_fast(device: str) -> contextlib.AbstractContextManager:
    """Lets attention be the fastest there is on a GPU, and nothing that is slow in silence."""
    if device != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel(BACKENDS, set_priority=True)


def random_steps(args: argparse.Namespace) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Micro-batches `[micro_batch, seq]` of random ids, on the device before anything is timed."""
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.micro_batch, args.seq_len + 1)

    def draw() -> tuple[Tensor, Tensor]:
        ids = torch.randint(2, args.model["vocab_size"], shape, generator=generator)
        ids = ids.to(args.device)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    steps = [[draw() for _ in range(args.accumulation)] for _ in range(args.warm_up + args.steps)]
    return iter(steps)


def speed(args: argparse.Namespace) -> dict:
    """Seconds of each step, from one end to the next, and the most memory of tensors."""
    steps = random_steps(args)
    trainer = Trainer(args, args.seq_len)
    clock = Clock(args.device)
    losses = [trainer.step(next(steps)) for _ in range(args.warm_up)]
    clock.mark()
    for micro_batches in steps:
        losses.append(trainer.step(micro_batches))
        clock.mark()
    seconds = clock.seconds()
    first, last = losses[0].item(), losses[-1].item()
    if not math.isfinite(last):
        raise ArithmeticError(f"the loss is {last}")
    return {
        "parameters": trainer.parameters,
        "tokens_per_step": args.accumulation * args.micro_batch * args.seq_len,
        "step_seconds": seconds,
        "first_loss": first,
        "last_loss": last,
        "peak_bytes": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
    }


def weights(args: argparse.Namespace) -> dict:
    """Weights as a model begins with them."""
    model = Model(**args.model)
    module = Llama(model, 1, attention.whole)
    hf_weights.write(args.folder, model, module)
    return {"parameters": sum(p.numel() for p in module.parameters())}


def losses(args: argparse.Namespace) -> dict:
    """The losses of steps that all train on the same samples, each a document of its own: its last
    token predicts nothing."""
    samples = torch.tensor(json.loads(args.tokens.read_text(encoding="utf-8")))
    targets = torch.cat((samples[:, 1:], torch.full((len(samples), 1), -100)), dim=1)
    batch = [(samples.to(args.device), targets.to(args.device))]
    trainer = Trainer(args, samples.shape[1])
    hf_weights.read(args.folder, trainer.module)
    return {"losses": [trainer.step(batch).item() for _ in range(args.steps)]}


KINDS: dict[str, Callable[[argparse.Namespace], dict]] = {
    "speed": speed,
    "weights": weights,
    "losses": losses,
}


def main() -> int:
    args = arguments()
    torch.manual_seed(args.seed)
    fast = attend_fast(args.device) if args.kind == "speed" else contextlib.nullcontext()
    with fast:
        result = KINDS[args.kind](args)
    print(json.dumps(result | {"torch": torch.__version__}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
