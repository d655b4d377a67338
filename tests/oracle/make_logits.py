"""Writes logits.json and logits.safetensors: what a model answers, in fp32.

The logits are those of transformers' LlamaForCausalLM (fp32, eager attention). Before they are
written they are held against sdpa attention, against every document run alone, and against an
independent fp64 decoder.
"""

import numpy as np
import torch

import golden_io
import models
import reference_llama
from models import TINY, TINY_TIED, Batch


def packed_rows(batch: Batch) -> list[list[int]]:
    """Per row the positions whose logits are kept: all of row 0, else each document's ends."""
    kept = [list(range(batch.tokens.shape[1]))]
    for starts in batch.starts()[1:]:
        ends = [start - 1 for start in starts[1:]] + [batch.tokens.shape[1] - 1]
        kept.append(sorted(set(starts) | set(ends)))
    return kept


def documents_alone(hf, batch: Batch, row: int) -> torch.Tensor:
    """Logits of one row, each document in a forward pass of its own."""
    bounds = batch.starts()[row] + [batch.tokens.shape[1]]
    return torch.cat(
        [
            hf(torch.from_numpy(batch.tokens[row : row + 1, a:b]), use_cache=False).logits[0]
            for a, b in zip(bounds, bounds[1:])
        ]
    )


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


@torch.no_grad()
def main() -> None:
    out = golden_io.out_folder(__doc__)
    batch = models.tiny_batch()
    kept = packed_rows(batch)
    tensors = batch.arrays()
    cases = {}
    for case, model in (("untied", TINY), ("tied", TINY_TIED)):
        eager, sdpa = models.build(model, "eager"), models.build(model, "sdpa")
        exact = reference_llama.parameters(model)
        logits, losses, differences = [], [], {"sdpa": 0.0, "alone": 0.0, "fp64": 0.0}
        for row in range(len(batch.tokens)):
            got = models.row_logits(eager, batch, row)
            twins = {
                "sdpa": models.row_logits(sdpa, batch, row),
                "alone": documents_alone(eager, batch, row),
                "fp64": reference_llama.logits(
                    model, exact, batch.tokens[row], batch.positions[row]
                ),
            }
            for name, twin in twins.items():
                differences[name] = max(differences[name], largest(got, twin))
            logits.append(got)
            losses.append(models.token_losses(twins["fp64"], batch.targets[row]))
        std = float(torch.stack(logits).std())
        for name, difference in differences.items():
            # fp32 rounding and nothing else: a wrong mask, head or angle gives differences of 1.
            assert difference <= 1e-5 * max(1.0, std), f"{case}: {name} differs by {difference}"
        kept_logits = np.concatenate([got[rows].numpy() for got, rows in zip(logits, kept)])
        tensors[f"{case}.logits"] = kept_logits
        tensors[f"{case}.token_losses"] = torch.stack(losses).float().numpy()
        total = float(torch.stack(losses).sum())
        cases[case] = {
            "model": model.json(),
            "loss": total / batch.valid(),
            "logits_std": std,
            "max_difference_error": differences,
        }
    golden_io.write_json(
        out / "logits.json",
        {
            "versions": models.versions(),
            "rows": batch.tokens.shape[0],
            "seq_len": batch.tokens.shape[1],
            "valid_targets": batch.valid(),
            "document_starts": batch.starts(),
            "kept_positions": kept,
            "cases": cases,
        },
    )
    golden_io.write_tensors(out / "logits.safetensors", tensors)


if __name__ == "__main__":
    main()
