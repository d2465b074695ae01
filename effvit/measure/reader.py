"""What it costs a language model to read the tokens that leave a vision tower: a model of it by its sizes alone."""

from __future__ import annotations

from dataclasses import dataclass, fields

from effvit.messages import plain
from effvit.schedule import check_count, check_switch

__all__ = ["Reader", "parse_reader"]


@dataclass(frozen=True)
class Reader:
    """A decoder that reads the tokens of an image in front of those of a text: its sizes, and what they cost.

    The products of its layers are counted as those of towers are: projections, attention of all pairs of tokens, MLP.
    That is 4 n d^2 + 2 n^2 d + 2 n d m for a layer of width d with an MLP of width m, equation 5 of FastV (2403.06764),
    which calls multiply-adds FLOPs, with 3 n d m for a gated MLP and narrower keys and values for grouped queries. A
    causal kernel may skip half of the pairs. Norms, embeddings and the head of the vocabulary are left out.

    Attributes:
        layers: Number of layers.
        width: d, channels of a token.
        heads: Heads of the queries; each has d / heads channels.
        kv_heads: Heads of keys and values, which groups of query heads share (2305.13245); None: as many as of the
            queries.
        mlp: m, width of the MLP; None: 4 d.
        gated: The MLP has three matrices, as in Llama and Qwen, and not two.
        number_bytes: Bytes of a number in the cache, 2 for float16 and bfloat16.

    Raises:
        ValueError: Numbers below 1, heads that do not divide the width, or heads that cannot share those of keys.
        TypeError: No whole numbers.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int | None = None
    mlp: int | None = None
    gated: bool = True
    number_bytes: int = 2

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "kv_heads", "mlp", "number_bytes"):
            value: int | None = getattr(self, name)
            if value is not None:
                check_count(name, value, 1)
        check_switch("gated", self.gated)
        if self.width % self.heads:
            raise ValueError(
                f"heads must divide the width of a reader, got width={self.width} and heads={self.heads}; give the "
                "hidden size and the attention heads of its config"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads must divide the heads of a reader, got heads={self.heads} and kv_heads={self.kv_heads}; "
                "leave kv_heads out where queries, keys and values have as many heads"
            )

    @property
    def kv_width(self) -> int:
        """Channels of the keys of a token, in all heads."""
        return self.width // self.heads * (self.kv_heads or self.heads)

    def prefill_macs(self, tokens: int, text: int = 0) -> int:
        """MACs of reading ``tokens`` of an image and ``text`` tokens at once, before the first word is written."""
        n = check_count("tokens", tokens) + check_count("text", text)
        projections = 2 * n * self.width * (self.width + self.kv_width)  # queries and result, keys and values
        pairs = 2 * n * n * self.width
        matrices = 3 if self.gated else 2
        return self.layers * (projections + pairs + matrices * n * self.width * (self.mlp or 4 * self.width))

    def cache_bytes(self, tokens: int, text: int = 0) -> int:
        """Bytes of the keys and values that it keeps of them, all layers together."""
        n = check_count("tokens", tokens) + check_count("text", text)
        return 2 * self.layers * n * self.kv_width * self.number_bytes

    def __str__(self) -> str:
        """The sizes as they are written on the command line."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return ",".join(f"{name}={value}" for name, value in values.items() if value is not None)


def parse_reader(text: str) -> Reader:
    """The reader of "layers=32,width=4096,heads=32", as the command line has it; further fields may follow.

    Raises:
        ValueError: No such list, a field that a reader has not or that stands twice, a value that is no positive whole
            number (``gated`` is true or false), or what ``Reader`` refuses.
    """
    values: dict[str, str] = {}
    known = [entry.name for entry in fields(Reader)]
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or name not in known:
            raise ValueError(
                f"--reader takes NAME=NUMBER with commas between them, of {', '.join(known)}, got {plain(part)!r}"
            )
        if name in values:
            raise ValueError(f"--reader names {name} twice; give it once")
        values[name] = value
    gated = values.pop("gated", "true").lower()
    if gated not in ("true", "false"):
        raise ValueError(f"--reader: gated must be true or false, got {plain(gated)!r}")
    for name, value in values.items():
        if not (value.isascii() and value.isdigit()):
            raise ValueError(f"--reader: {name} must be a whole number of at least 1, got {plain(value)!r}")
    missing = [name for name in ("layers", "width", "heads") if name not in values]
    if missing:
        raise ValueError(f"--reader lacks {', '.join(missing)}; give e.g. layers=32,width=4096,heads=32,mlp=11008")
    return Reader(gated=gated == "true", **{name: int(value) for name, value in values.items()})
