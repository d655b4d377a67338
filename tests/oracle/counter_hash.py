"""Numbers that Python and Rust make alike without exchanging a file.

Golden files hold only results (logits, losses, gradient norms). The inputs, which would be large,
are functions of a *stream* (a UTF-8 name) and an *index* (a 64-bit counter); this module and its
twin `tests/support/counter_hash.rs` define them. All integer arithmetic wraps modulo 2**64.

    key(stream)        = FNV-1a-64 of the UTF-8 bytes of the name:
                         h = 0xcbf29ce484222325; for each byte b: h = (h ^ b) * 0x100000001b3
    bits(stream, i)    = splitmix64's i-th output from the state `key`:
                         z = key + (i + 1) * 0x9e3779b97f4a7c15
                         z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9
                         z = (z ^ (z >> 27)) * 0x94d049bb133111eb
                         z ^ (z >> 31)
    uniform(stream, i) = (int(bits >> 40) - 2**23) * 2**-23
                         in [-1, 1), a multiple of 2**-23 and therefore exact in f32

Weights. Element `i` (row-major) of the tensor with the Hugging Face name `name` is, in f32,

    norms (the name ends in `norm.weight`)   1 + scale * uniform(name, i)
    every other tensor                           scale * uniform(name, i)

with one `scale` per kind (`embedding` for `model.embed_tokens.weight`, `norm`, `residual` for the
projections into the residual stream, `o_proj` and `down_proj`, and `linear` for the rest,
`lm_head.weight` included). Every scale is a power of two: the product is exact, the sum is
rounded once, and fused multiply-add changes nothing. A tied model has no `lm_head.weight`.

Projections. Projection `j` of a tensor `name` is, in f64 and with `i` in row-major order,

    sum over i of uniform("projection/{j}/{name}", i) * value[i]

For an error vector e that knows nothing of the hash, E[projection**2] = |e|**2 / 3, so four of them
estimate the length of a difference between two tensors of which only one is at hand.

Documents. `documents(stream, total, vocab, shortest, longest)` is an endless sequence of documents
cut after `total` tokens:

    length of document k = shortest + bits("{stream}/lengths", k) % (longest - shortest + 1)
    token i (counted over the whole sequence), with r = bits("{stream}/tokens", i):
        (r >> 32) % vocab              if i begins a document or r % 4 == 0
        (5 * previous + 17) % vocab    otherwise

so that three of four tokens can be learnt from their predecessor.
"""

import numpy as np

_U64 = np.uint64
_MASK = (1 << 64) - 1


def key(stream: str) -> int:
    """FNV-1a-64 of the stream's name."""
    h = 0xCBF29CE484222325
    for byte in stream.encode("utf-8"):
        h = ((h ^ byte) * 0x100000001B3) & _MASK
    return h


def bits(stream: str, count: int, start: int = 0) -> np.ndarray:
    """`count` hashes from index `start` on, uint64 `[count]`."""
    with np.errstate(over="ignore"):
        index = np.arange(start + 1, start + count + 1, dtype=_U64)
        z = _U64(key(stream)) + index * _U64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> _U64(27))) * _U64(0x94D049BB133111EB)
        return z ^ (z >> _U64(31))


def uniform(stream: str, count: int, start: int = 0) -> np.ndarray:
    """`count` numbers in [-1, 1) from index `start` on, float32 `[count]`, exact."""
    top = (bits(stream, count, start) >> _U64(40)).astype(np.int32)
    return (top - np.int32(1 << 23)).astype(np.float32) * np.float32(2.0**-23)


def kind(name: str) -> str:
    """Which scale a tensor takes: `embedding`, `norm`, `residual` or `linear`."""
    if name.endswith("norm.weight"):
        return "norm"
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return "residual"
    return "embedding" if name == "model.embed_tokens.weight" else "linear"


def weight(name: str, shape: tuple[int, ...], scales: dict[str, float]) -> np.ndarray:
    """The tensor `name`, float32 of the given shape."""
    scale = np.float32(scales[kind(name)])
    values = uniform(name, int(np.prod(shape))) * scale
    if kind(name) == "norm":
        values = np.float32(1.0) + values
    return values.reshape(shape)


def projections(name: str, values: np.ndarray, count: int = 4) -> list[float]:
    """The first `count` projections of a tensor, in f64."""
    flat = np.asarray(values, dtype=np.float64).reshape(-1)
    return [
        float(np.dot(uniform(f"projection/{j}/{name}", flat.size).astype(np.float64), flat))
        for j in range(count)
    ]


def documents(
    stream: str, total: int, vocab: int, shortest: int, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int64 `[total]` and the number of each token's document, int64 `[total]`."""
    # One length per token is enough, since no document is empty.
    spread = bits(f"{stream}/lengths", total) % _U64(longest - shortest + 1)
    lengths = spread.astype(np.int64) + shortest
    document = np.repeat(np.arange(total), lengths)[:total]
    return fill(stream, document, vocab), document


def fill(stream: str, document: np.ndarray, vocab: int) -> np.ndarray:
    """Tokens int64 of documents whose lengths are given, as the number of each token's document."""
    tokens = np.empty(len(document), dtype=np.int64)
    for i, r in enumerate(bits(f"{stream}/tokens", len(document)).tolist()):
        begins = i == 0 or document[i] != document[i - 1]
        drawn = begins or r % 4 == 0
        tokens[i] = (r >> 32) % vocab if drawn else (5 * tokens[i - 1] + 17) % vocab
    return tokens


def checksum(tokens: np.ndarray) -> int:
    """FNV-1a-64 over the tokens as little-endian 32-bit words."""
    h = 0xCBF29CE484222325
    for byte in np.asarray(tokens).astype("<u4").tobytes():
        h = ((h ^ byte) * 0x100000001B3) & _MASK
    return h
