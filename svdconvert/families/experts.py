"""The experts of a mixture, as files name them. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
# Names of the linear layers of an expert: the gate, what is gated, and the way back. Two where gate and what is gated
# are one.
Names = tuple[str, ...]


@dataclass(frozen=True)
class Experts:
    """The experts of a family, as its files name them.

    Attributes:
        mixture: the part of a block that holds them.
        names: of an expert's linear layers: gate, up, down; or both in one, and down.
        count: config -> experts of a block.
        width: config -> inner channels of an expert.
        field: of the configuration class with the number of experts.
        mixture_5: what transformers 5 calls the mixture, in memory and in files with stacked experts.
        router: the linear layer in it that chooses among them; it is never factored.
        biased: whether its layers, and the router, have biases.
        clamped: whether gate and what is gated are clamped, as gpt-oss does it.
        alternating: whether outputs of gate and of what it gates alternate where they are one; else the gate's lead.
        transposed: whether they are stacked as [experts, in, out], and files have them in no other form.
        files: names of the mixture's tensors in files -> in memory, where they differ; files then have stacks alone.
        scattered: whether version 4 hands them a weight for every expert, zeros for those that a token does not pass.
        multiplied_out: ways of quantisation in which files may hold them, by their names in config.json.
        since: the first version of transformers with experts of this form, if the family is older; else empty.
        beside: config -> what else the mixture has, and its shapes: an expert that every token passes.
    """

    mixture: str
    names: Names
    count: Callable[[Config], int]
    width: Callable[[Config], int]
    field: str = "num_experts"
    mixture_5: str = "mlp"
    router: str = "gate"
    biased: bool = False
    clamped: bool = False
    alternating: bool = False
    transposed: bool = False
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scattered: bool = False
    multiplied_out: tuple[str, ...] = ()
    since: tuple[int, ...] = ()
    beside: Callable[[Config], dict[str, tuple[int, ...]]] = lambda config: {}

    @property
    def targets(self) -> tuple[str, ...]:
        """Kinds of the linear layers of all experts."""
        return tuple(f"{self.mixture}.experts.*.{name}" for name in self.names)

    def shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """What the mixture of a block consists of."""
        *inward, down = self.names
        hidden, inner, count = config["hidden_size"], self.width(config), self.count(config)
        linears = {f"{self.mixture}.{self.router}": (count, hidden)}
        for expert in range(count):
            path = f"{self.mixture}.experts.{expert}"
            linears |= {f"{path}.{name}": (inner * 2 // len(inward), hidden) for name in inward}
            linears[f"{path}.{down}"] = (hidden, inner)
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in linears.items():
            found[f"{name}.weight"] = shape
            if self.biased:
                found[f"{name}.bias"] = shape[:1]
        return found | {f"{self.mixture}.{name}": shape for name, shape in self.beside(config).items()}

    @property
    def stacked_alone(self) -> bool:
        """Whether files have no matrices of single experts."""
        return self.transposed or bool(self.files)

    @property
    def stacks(self) -> Mapping[str, tuple[str, ...]]:
        """Name of a stacked tensor -> the matrices that it holds of every expert, one after the other."""
        *inward, down = self.names
        return {"gate_up_proj": tuple(inward), "down_proj": (down,)}
