"""Writes counter_hash.tsv: test vectors that every implementation of the counter hash must meet.

Lines of four tab-separated fields; `#` begins a comment:

    bits      stream  index                           16 hex digits
    uniform   stream  index                           8 hex digits, the bits of the f32
    weight    name    index/kind's scale              8 hex digits, the bits of the f32
    projection name   which/kind's scale              f64, of the first 1000 weights of that name
    documents stream  total,vocab,shortest,longest    16 hex digits, checksum of the tokens,
                                                      then that of the document numbers
"""

import numpy as np

import counter_hash
import golden_io

STREAMS = ["", "a", "model.embed_tokens.weight", "projection/3/lm_head.weight", "Übung/トークン"]
INDICES = [0, 1, 2, 63, 1_000_003, 2**32 + 5]
WEIGHTS = [
    ("model.embed_tokens.weight", 0.5),
    ("model.layers.11.self_attn.q_proj.weight", 0.0625),
    ("model.layers.0.post_attention_layernorm.weight", 0.25),
    ("model.norm.weight", 0.125),
]
DOCUMENTS = [("train20", 7681, 257, 1, 60), ("tiny/short", 97, 257, 1, 8), ("d", 5, 512, 9, 9)]


def f32_hex(value: np.float32) -> str:
    return f"{int(np.float32(value).view(np.uint32)):08x}"


def main() -> None:
    out = golden_io.out_folder(__doc__)
    lines = [f"# {line}".rstrip() for line in __doc__.strip().splitlines()]
    for stream in STREAMS:
        for index in INDICES:
            value = int(counter_hash.bits(stream, 1, index)[0])
            lines.append(f"bits\t{stream}\t{index}\t{value:016x}")
            lines.append(
                f"uniform\t{stream}\t{index}\t{f32_hex(counter_hash.uniform(stream, 1, index)[0])}"
            )
    for name, scale in WEIGHTS:
        scales = dict.fromkeys(("embedding", "linear", "residual", "norm"), scale)
        values = counter_hash.weight(name, (1000,), scales)
        for index in (0, 1, 999):
            lines.append(f"weight\t{name}\t{index}/{scale}\t{f32_hex(values[index])}")
        for which, value in enumerate(counter_hash.projections(name, values, 2)):
            lines.append(f"projection\t{name}\t{which}/{scale}\t{value!r}")
    for stream, total, vocab, shortest, longest in DOCUMENTS:
        tokens, document = counter_hash.documents(stream, total, vocab, shortest, longest)
        lines.append(
            f"documents\t{stream}\t{total},{vocab},{shortest},{longest}"
            f"\t{counter_hash.checksum(tokens):016x},{counter_hash.checksum(document):016x}"
        )
    (out / "counter_hash.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
