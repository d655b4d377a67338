"""Writes train20.json and train20.safetensors: 20 optimizer steps of a LLaMA under PyTorch.

The run that counts is transformers' LlamaForCausalLM in fp32 (eager attention, one thread) with
torch.optim.AdamW. Beside it the same steps are taken by an independent decoder in fp64, which
shows how far fp32 rounding alone moves the figures.
"""

import math

import numpy as np
import torch

import counter_hash
import golden_io
import models
import reference_llama
from models import IGNORE, TRAIN, TRAIN_TIED, Batch, Model

STEPS, MICRO_BATCHES, ROWS, SEQ = 20, 2, 2, 96
WARMUP = 5
RECIPE = {
    "steps": STEPS,
    "micro_batches": MICRO_BATCHES,
    "rows_per_micro_batch": ROWS,
    "seq_len": SEQ,
    "lr": 1e-3,
    "lr_final_fraction": 0.1,
    "warmup_steps": WARMUP,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "weight_decay": 0.1,
    "decayed": "all tensors but the norms; embedding and head decay too, biases do not exist",
    "clip_factor": "min(1, clip_norm / (grad_norm + 1e-6))",
    "loss": "sum of the token losses of all micro-batches / valid targets of all micro-batches",
}


def learning_rate(step: int) -> float:
    """Rises linearly over the warm-up, then falls along a cosine; the last step takes a tenth."""
    done = step + 1
    if done <= WARMUP:
        return RECIPE["lr"] * done / WARMUP
    progress = (done - WARMUP) / (STEPS - WARMUP)
    floor = RECIPE["lr_final_fraction"]
    return RECIPE["lr"] * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


# (step, micro-batch, row, first padded token). Micro-batches of unequal weight tell the mean over all
# tokens from the mean of means; steps with few tokens have large gradients, which are clipped.
PADDING = [
    (3, 1, 1, 0),
    (7, 1, 1, 40),
    (9, 0, 1, 0),
    (9, 1, 0, 24),
    (9, 1, 1, 0),
    (12, 0, 1, 70),
    (12, 1, 0, 0),
    (12, 1, 1, 0),
    (16, 0, 0, 30),
    (16, 0, 1, 0),
    (16, 1, 0, 60),
]


def batches() -> list[list[Batch]]:
    """[step][micro-batch]; padding is token 0 without a target, a document of its own."""
    rows = STEPS * MICRO_BATCHES * ROWS
    packed = models.pack("train20", rows, SEQ, TRAIN.vocab_size, 1, 60)
    shape = (STEPS, MICRO_BATCHES, ROWS, SEQ)
    tokens, targets, positions = (
        field.reshape(shape).copy() for field in (packed.tokens, packed.targets, packed.positions)
    )
    for step, micro_batch, row, begin in PADDING:
        slot = (step, micro_batch, row)
        tokens[slot][begin:] = 0
        positions[slot][begin:] = np.arange(SEQ - begin)
        # From one token earlier: the last real token's target would lie in the padding.
        targets[slot][max(begin - 1, 0) :] = IGNORE
    return [
        [Batch(tokens[s, m], targets[s, m], positions[s, m]) for m in range(MICRO_BATCHES)]
        for s in range(STEPS)
    ]


def optimizer(parameters: dict[str, torch.nn.Parameter]) -> torch.optim.AdamW:
    decayed = [p for name, p in parameters.items() if counter_hash.kind(name) != "norm"]
    plain = [p for name, p in parameters.items() if counter_hash.kind(name) == "norm"]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": RECIPE["weight_decay"]},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=RECIPE["lr"],
        betas=tuple(RECIPE["betas"]),
        eps=RECIPE["eps"],
        foreach=False,
    )


def train(
    parameters: dict[str, torch.Tensor], loss_sum, data: list[list[Batch]], clip_norm: float
) -> dict:
    """Trains the parameters in place; loss and gradient norm before clipping, per step."""
    adamw = optimizer(parameters)
    losses, norms = [], []
    for step, micro_batches in enumerate(data):
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step)
        valid = sum(batch.valid() for batch in micro_batches)
        adamw.zero_grad()
        loss = 0.0
        for batch in micro_batches:
            part = loss_sum(batch) / valid
            part.backward()
            loss += float(part.detach())
        norm = torch.nn.utils.clip_grad_norm_(
            list(parameters.values()), clip_norm, foreach=False
        )
        adamw.step()
        losses.append(loss)
        norms.append(float(norm))
    return {"loss": losses, "grad_norm": norms}


def final_weights(parameters: dict[str, torch.Tensor], model: Model) -> dict:
    """Per tensor: norm, norm of the change since the start, projections of the weights."""
    out = {}
    for name, value in parameters.items():
        after = value.detach().double().numpy()
        before = counter_hash.weight(name, after.shape, model.scales()).astype(np.float64)
        out[name] = {
            "shape": list(after.shape),
            "norm": float(np.linalg.norm(after)),
            "change_norm": float(np.linalg.norm(after - before)),
            "projections": counter_hash.projections(name, after),
        }
    return out


def relative(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b))


def case(model: Model, clip_norm: float, data: list[list[Batch]]) -> dict:
    hf = models.build(model, "eager")
    parameters = dict(hf.named_parameters())
    run = train(parameters, lambda batch: models.loss_sum(hf, batch), data, clip_norm)
    exact = reference_llama.parameters(model)
    exact_run = train(
        exact, lambda batch: reference_llama.loss_sum(model, exact, batch), data, clip_norm
    )
    weights, exact_weights = final_weights(parameters, model), final_weights(exact, model)
    for name, entry in weights.items():
        difference = parameters[name].detach().double() - exact[name].detach()
        entry["fp32_error"] = float(difference.norm()) / exact_weights[name]["change_norm"]
        entry["projections_fp64"] = exact_weights[name]["projections"]
    return {
        "model": model.json(),
        "clip_norm": clip_norm,
        "clipped_steps": sum(norm > clip_norm for norm in run["grad_norm"]),
        "loss": run["loss"],
        "grad_norm": run["grad_norm"],
        "loss_fp64": exact_run["loss"],
        "grad_norm_fp64": exact_run["grad_norm"],
        "fp32_error": {
            "loss": relative(run["loss"], exact_run["loss"]),
            "grad_norm": relative(run["grad_norm"], exact_run["grad_norm"]),
        },
        "weights": weights,
    }


def main() -> None:
    out = golden_io.out_folder(__doc__)
    data = batches()
    # The tied model's gradients are larger; each bound clips some steps and leaves others alone.
    cases = {"untied": case(TRAIN, 1.0, data), "tied": case(TRAIN_TIED, 1.75, data)}
    golden_io.write_json(
        out / "train20.json",
        {
            "versions": models.versions(),
            "recipe": RECIPE,
            "learning_rate": [learning_rate(step) for step in range(STEPS)],
            "valid_targets": [[batch.valid() for batch in step] for step in data],
            "document_starts": [[batch.starts() for batch in step] for step in data],
            "cases": cases,
        },
    )
    golden_io.write_tensors(
        out / "train20.safetensors",
        {
            name: np.stack([np.stack([batch.arrays()[name] for batch in step]) for step in data])
            for name in ("tokens", "targets", "positions")
        },
    )
    for name, found in cases.items():
        print(
            f"{name:7} loss {found['loss'][0]:.4f} -> {found['loss'][-1]:.4f}, "
            f"clipped in {found['clipped_steps']} of {STEPS} steps, fp32 against fp64: "
            f"loss {found['fp32_error']['loss']:.1e}, norm {found['fp32_error']['grad_norm']:.1e}"
        )


if __name__ == "__main__":
    main()
