"""Writes gradients.json and gradients.safetensors: whole-model gradients and the errors of bf16.

The loss is the mean over the valid targets of the batch. The reference is PyTorch's autograd
through an independent fp64 decoder. Beside it stand the errors that PyTorch itself makes on the
same model and tokens: transformers' LLaMA in fp32, under bf16 autocast, and wholly in bf16. All
errors are relative, |x - ref| / |ref| in the Euclidean norm: fp32 against fp64, bf16 against the
fp32 gradients of the same attention implementation.
"""

import torch

import counter_hash
import golden_io
import models
import reference_llama
from models import INITIAL, MEDIUM, TINY, TINY_TIED, Batch, Model

Gradients = dict[str, torch.Tensor]


def exact_gradients(model: Model, batch: Batch) -> tuple[float, Gradients]:
    """Mean loss and gradients in fp64."""
    p = reference_llama.parameters(model)
    loss = reference_llama.loss_sum(model, p, batch) / batch.valid()
    loss.backward()
    return float(loss.detach()), {name: value.grad for name, value in p.items()}


def hf_gradients(
    model: Model, batch: Batch, attention: str, precision: str
) -> tuple[float, Gradients]:
    """Mean loss and gradients of transformers' model: `fp32`, `autocast` or `bf16`."""
    hf = models.build(model, attention)
    if precision == "bf16":
        hf = hf.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        loss = models.loss_sum(hf, batch) / batch.valid()
    loss.backward()
    gradients = {name: value.grad.double() for name, value in hf.named_parameters()}
    return float(loss.detach()), gradients


def length(gradients: Gradients) -> float:
    """Euclidean norm over all tensors."""
    return float(torch.sqrt(sum((g.double() ** 2).sum() for g in gradients.values())))


def errors(gradients: Gradients, reference: Gradients) -> dict:
    """Relative error of the whole, of the worst tensor, and of each tensor."""
    assert gradients.keys() == reference.keys()
    difference = {name: gradients[name].double() - reference[name] for name in reference}
    each = {name: float(difference[name].norm() / reference[name].norm()) for name in reference}
    return {
        "whole": length(difference) / length(reference),
        "worst": max(each.values()),
        "tensors": each,
    }


def case(model: Model, batch: Batch) -> tuple[dict, Gradients]:
    loss, exact = exact_gradients(model, batch)
    runs = {
        (attention, precision): hf_gradients(model, batch, attention, precision)
        for attention in ("eager", "sdpa")
        for precision in ("fp32", "autocast", "bf16")
    }
    report = {
        "model": model.json(),
        "loss": loss,
        "grad_norm": length(exact),
        "tensors": {
            name: {
                "shape": list(value.shape),
                "norm": float(value.norm()),
                "projections": counter_hash.projections(name, value.numpy()),
                # The same of transformers' fp32 gradients, to compare fp32 with fp32.
                "norm_fp32": float(runs["eager", "fp32"][1][name].norm()),
                "projections_fp32": counter_hash.projections(
                    name, runs["eager", "fp32"][1][name].numpy()
                ),
            }
            for name, value in exact.items()
        },
        "fp32_error": {},
        "bf16_autocast_error": {},
        "bf16_error": {},
        "loss_fp32": runs["eager", "fp32"][0],
        "bf16_autocast_loss": runs["eager", "autocast"][0],
    }
    for attention in ("eager", "sdpa"):
        plain = runs[attention, "fp32"][1]
        report["fp32_error"][attention] = errors(plain, exact)
        report["bf16_autocast_error"][attention] = errors(runs[attention, "autocast"][1], plain)
        report["bf16_error"][attention] = errors(runs[attention, "bf16"][1], plain)
        whole = report["fp32_error"][attention]["worst"]
        assert whole <= 1e-5, f"transformers and the fp64 decoder disagree: {whole}"
    return report, exact


def inputs() -> dict[str, tuple[Model, Batch]]:
    tiny = models.tiny_batch()
    return {
        "tiny": (TINY, tiny),
        "tiny_tied": (TINY_TIED, tiny),
        "medium": (MEDIUM, models.medium_batch()),
        "long_1024": (INITIAL, models.long_batch([389, 3, 1, 517, 200], 1024)),
        "long_4096": (INITIAL, models.long_batch([700, 2, 1531, 64, 1203, 900], 4096)),
    }


def main() -> None:
    out = golden_io.out_folder(__doc__)
    cases, tensors = {}, {}
    for name, (model, batch) in inputs().items():
        cases[name], exact = case(model, batch)
        cases[name]["valid_targets"] = batch.valid()
        cases[name]["document_starts"] = batch.starts()
        tensors |= {f"{name}.{field}": value for field, value in batch.arrays().items()}
        if name == "tiny":
            # Small enough to be kept whole; the others are known by their projections.
            tensors |= {f"tiny.grad.{key}": g.float().numpy() for key, g in exact.items()}
    golden_io.write_json(
        out / "gradients.json", {"versions": models.versions(), "cases": cases}
    )
    golden_io.write_tensors(out / "gradients.safetensors", tensors)
    for name, found in cases.items():
        for kind in ("fp32_error", "bf16_autocast_error", "bf16_error"):
            for attention, error in found[kind].items():
                print(f"{name:10} {kind:20} {attention:6} {error['whole']:.2e} worst {error['worst']:.2e}")


if __name__ == "__main__":
    main()
