"""How many sequences a model writes at a time, and the memory that it takes: for plans too, which run nothing."""

from __future__ import annotations

# Sequences that are written at a time, at most; fewer where their keys and values would take more than half of the
# weights' memory, or than CACHE_BYTES if that is more. No option changes it, since rounding depends on it.
MOST_SEQUENCES = 64
CACHE_BYTES = 2**30

# A softmax over the vocabulary and its sums, in float64, beside logits in float32.
LOGIT_BYTES = 28


def sequences_at_a_time(weights: int, cache: int) -> int:
    """Sequences that are written at a time, a power of 2.

    Args:
        weights: bytes of the model.
        cache: bytes of the keys and values of a sequence.
    """
    fitting = max(weights // 2, CACHE_BYTES) // cache
    return 1 << (min(max(fitting, 1), MOST_SEQUENCES).bit_length() - 1)


def writing_bytes(weights: int, cache: int, vocabulary: int, samples: int) -> int:
    """Memory of a model that writes: its weights, and the keys, values and logits of the sequences in work.

    Args:
        weights, cache: as of :func:`sequences_at_a_time`.
        vocabulary: of the model.
        samples: sequences in all.
    """
    return weights + min(sequences_at_a_time(weights, cache), samples) * (cache + vocabulary * LOGIT_BYTES)
