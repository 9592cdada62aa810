"""Where each matrix is in a map of layers and kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from svdconvert.reports.facts import Facts, layer_of, path_of

# A larger model has a table of its matrices, but no map.
MOST_LAYERS, MOST_KINDS = 400, 64


@dataclass(frozen=True)
class Grid:
    """Where each matrix is in a map.

    Attributes:
        layers: numbers of the layers, in order.
        kinds: kinds of matrix, in the order in which a model has them.
        modules: kind and layer -> module path.
    """

    layers: Sequence[int]
    kinds: Sequence[str]
    modules: Mapping[tuple[str, int], str]

    @classmethod
    def of(cls, facts: Facts) -> Grid:
        """That of a result; matrices outside of layers have no place."""
        modules: dict[tuple[str, int], str] = {}
        for module in (*facts.matrices, *facts.dense):
            if (layer := layer_of(module)) is not None:
                modules.setdefault((path_of(module), layer), module)
        kinds = dict.fromkeys(kind for kind, _ in modules)
        known = [kind for kind in facts.kinds if kind in kinds]
        return cls(sorted({layer for _, layer in modules}), list(dict.fromkeys([*known, *kinds])), modules)

    @property
    def drawable(self) -> bool:
        """Whether there is anything to draw, and not too much."""
        return 0 < len(self.layers) <= MOST_LAYERS and 0 < len(self.kinds) <= MOST_KINDS

    def row(self, kind: str) -> list[str]:
        """Module paths of a kind, by layer."""
        return [self.modules[kind, layer] for layer in self.layers if (kind, layer) in self.modules]

    def column(self, layer: int) -> list[str]:
        """Module paths of a layer, by kind."""
        return [self.modules[kind, layer] for kind in self.kinds if (kind, layer) in self.modules]
