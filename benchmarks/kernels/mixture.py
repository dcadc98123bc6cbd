"""Mixtures of experts to measure or to model."""

from typing import NamedTuple


class Mixture(NamedTuple):
    """Experts of a layer, of which ``top_k`` work on every token."""

    experts: int
    top_k: int
    hidden: int
    inner: int

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """[rows, inputs] of an expert's gate and up together, and of down."""
        return {"w13": (2 * self.inner, self.hidden), "w2": (self.hidden, self.inner)}


MIXTURES = {
    "qwen3-30b-a3b": Mixture(experts=128, top_k=8, hidden=2048, inner=768),
    "mixtral-8x7b": Mixture(experts=8, top_k=2, hidden=4096, inner=14336),
    "deepseek-v2-lite": Mixture(experts=64, top_k=6, hidden=2048, inner=1408),
}
