"""A LLaMA-style model by its sizes: what both sides of a comparison are built from."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Model:
    """Sizes under the names of the keys of `[model]`. Embedding and head are two matrices."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rms_norm_eps: float = 1e-5
    rope_base: float = 10000.0
    head_dim: int = 0  # hidden_size / num_heads, where it is not given

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)

    @property
    def block_parameters(self) -> int:
        """Query, key, value, output; gate, up, down; two norms."""
        heads = self.num_heads + self.num_kv_heads
        attention = 2 * self.hidden_size * heads * self.head_dim
        return attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    @property
    def parameters(self) -> int:
        """Embedding, blocks, final norm, head."""
        ends = 2 * self.vocab_size * self.hidden_size + self.hidden_size
        return ends + self.num_layers * self.block_parameters

    def sizes(self) -> dict[str, int | float]:
        """For a config, or for the command line of another process."""
        return asdict(self)

    def words(self) -> str:
        """For a table's caption."""
        return (
            f"LLaMA-style, {self.parameters:,} parameters: vocabulary {self.vocab_size}, "
            f"hidden {self.hidden_size}, intermediate {self.intermediate_size}, "
            f"{self.num_layers} layers, {self.num_heads} query and {self.num_kv_heads} "
            f"key/value heads of {self.head_dim}, untied"
        )


LLAMA_55M = Model(32000, 512, 1408, num_layers=8, num_heads=8, num_kv_heads=2)
"""What most benches train."""
TINY = Model(1024, 128, 352, num_layers=2, num_heads=2, num_kv_heads=1)
"""What `--quick` trains."""
