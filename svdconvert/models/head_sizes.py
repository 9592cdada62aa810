"""How much of a head, and of its logits, is in memory at a time. No torch."""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of a part of any head that is run on a few tokens.
HEAD_BYTES = 2**25
# Bytes of the logits of a whole vocabulary that are computed at a time.
LOGIT_BYTES = 2**26


@dataclass(frozen=True)
class HeadSizes:
    """When a head is taken in parts, and how large these are.

    Attributes:
        whole: bytes of a head that is in memory whole; that of a large vocabulary may be larger than all else.
        part: bytes of a part of a larger one, at most.
        tokens: of the vocabulary in a part, at most.
        positions: of the text that a part is multiplied with at a time. All parts are read again for the next ones,
            which for 2,048 takes a twentieth of the time of the products, or less, unless they are quantised.
    """

    whole: int
    part: int
    tokens: int
    positions: int

    def at_a_time(self, vocabulary: int, token_bytes: int) -> int:
        """Tokens of the vocabulary whose weights are in memory together.

        Args:
            vocabulary: size of all.
            token_bytes: of one token's weights in the head.
        """
        if vocabulary * token_bytes <= self.whole:
            return vocabulary
        return max(1, min(self.part // token_bytes, self.tokens))


# On the CPU, and on other devices.
ON_CPU = HeadSizes(whole=2**29, part=2**25, tokens=2**12, positions=2**11)
ON_DEVICE = HeadSizes(whole=2**33, part=2**28, tokens=2**14, positions=2**13)


def head_sizes(device: str) -> HeadSizes:
    """Those of a type of device, ``cpu`` or another."""
    return ON_CPU if device == "cpu" else ON_DEVICE


def positions_of_whole(vocabulary: int) -> int:
    """Positions of the text that a whole head is multiplied with at a time."""
    return max(1, LOGIT_BYTES // (4 * vocabulary))
