"""The experts of a mixture, as files name them. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
# Names of the three matrices of an expert: the gate, what is gated, and the way back.
Names = tuple[str, str, str]


@dataclass(frozen=True)
class Experts:
    """The experts of a family, as its files name them.

    Attributes:
        mixture: the part of a block that holds them.
        names: of an expert's linear layers: gate, up, down.
        count: config -> experts of a block.
        width: config -> inner channels of an expert.
        field: of the configuration class with the number of experts.
        mixture_5: what transformers 5 calls the mixture, in memory and in files with stacked experts.
        router: the linear layer in it that chooses among them; it is never factored.
    """

    mixture: str
    names: Names
    count: Callable[[Config], int]
    width: Callable[[Config], int]
    field: str = "num_experts"
    mixture_5: str = "mlp"
    router: str = "gate"

    @property
    def targets(self) -> tuple[str, ...]:
        """Kinds of the linear layers of all experts."""
        return tuple(f"{self.mixture}.experts.*.{name}" for name in self.names)

    def shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """What the mixture of a block consists of."""
        gate, up, down = self.names
        hidden, inner, count = config["hidden_size"], self.width(config), self.count(config)
        found: dict[str, tuple[int, ...]] = {f"{self.mixture}.{self.router}.weight": (count, hidden)}
        for expert in range(count):
            path = f"{self.mixture}.experts.{expert}"
            found |= {f"{path}.{gate}.weight": (inner, hidden), f"{path}.{up}.weight": (inner, hidden)}
            found[f"{path}.{down}.weight"] = (hidden, inner)
        return found

    @property
    def stacks(self) -> Mapping[str, tuple[str, ...]]:
        """Name of a stacked tensor -> the matrices that it holds of every expert, one after the other."""
        gate, up, down = self.names
        return {"gate_up_proj": (gate, up), "down_proj": (down,)}
