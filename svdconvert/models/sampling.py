"""Text that a model writes: tokens drawn one after the other from its own distribution.

Each token depends on all before it, so every weight is needed for every token: the model is in memory whole, with the
keys and values of a batch of sequences. Run block by block, it would be read from the disk once a token.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from svdconvert.errors import InputError
from svdconvert.families.table import LONGEST, dense_architecture
from svdconvert.foreign import foreign_code, quiet_transformers
from svdconvert.machine.devices import has_bfloat16
from svdconvert.machine.memory import available_memory_bytes
from svdconvert.models.loading import load_source
from svdconvert.models.loss import wide
from svdconvert.models.skeleton import skeleton
from svdconvert.models.softmax import draw
from svdconvert.models.writing import sequences_at_a_time, writing_bytes
from svdconvert.sentences import asked
from svdconvert.storage.gguf_source import GgufSource
from svdconvert.storage.source import Source
from svdconvert.tensors import majority_dtype
from svdconvert.words import size as size_text


class Sampler:
    """Draws sequences from a dense model.

    Attributes:
        dtype: that the model computes in.
        batch: sequences at a time.
        needed: bytes of the weights, of the keys and values of a batch, and of its logits.
    """

    def __init__(self, source: Source, samples: int, length: int, *, device: str) -> None:
        """Look at the model; its weights are read when they are needed.

        Args:
            source: the dense model.
            samples: sequences, all that are asked for.
            length: tokens of a sequence.
            device: that it runs on.

        Raises:
            InputError: the model reads no sequences of this length.
        """
        self._source, self._length, self._device = source, length, device
        config = skeleton(source, dense_architecture(source.config, source.where)).config
        self.vocabulary = int(config.vocab_size)
        lengths = (getattr(config, name, None) for name in LONGEST)  # models without a limit have none of them
        longest = next((length for length in lengths if length is not None), None)
        if longest is not None and length > longest:
            raise InputError(
                f"calibration sequences of {length:,} tokens are too long; {source.name} reads up to {longest:,}, so "
                f"lower {asked('calibration.length')}"
            )
        if getattr(config, "cache_implementation", None) == "hybrid" and length > config.sliding_window:
            # Measured with 4.46.3: from the end of the window on, logits are others than without a cache.
            raise InputError(
                f"transformers {transformers.__version__} gets sequences wrong that {source.name} writes beyond its "
                f"window of {config.sliding_window:,} tokens; update transformers, or lower "
                f"{asked('calibration.length', length)}"
            )
        self.dtype = sampling_dtype(source, device)
        weights = sum(info.size for info in source.tensors.values()) * self.dtype.itemsize
        cache = _cache_elements(config) * length * self.dtype.itemsize
        self.batch = sequences_at_a_time(weights, cache)
        self.needed = writing_bytes(weights, cache, self.vocabulary, samples)

    def load(self) -> Any:
        """The model, whole on the device.

        Raises:
            InputError: the free memory is too small for it, or it cannot be loaded.
        """
        free, where = _free_bytes(self._device)
        if self.needed > free:
            raise InputError(
                f"{self._source.name} needs {size_text(self.needed)} of memory to write its own text "
                f"({asked('calibration.text', 'self')}), since all its weights are used for every token, but {where} "
                f"has {size_text(free)} free; give a text as {asked('calibration.text')}, which needs one block at a "
                f"time, or a lower {asked('calibration.length')}"
            )
        model: Any = load_source(self._source, self._device, self.dtype)
        model.generation_config = GenerationConfig()  # whose temperature, penalties or forbidden words would count
        return model

    def write(
        self,
        model: Any,
        first: Tensor,
        uniform: Tensor,
        *,
        after: tuple[int, int] | None = None,
        progress: Callable[[int], None] = lambda position: None,
    ) -> Tensor:
        """Continue sequences by tokens of the model's whole distribution: temperature 1, none left out.

        Args:
            model: from :meth:`load`.
            first: [batch], int64, the first token of each.
            uniform: [batch, length], float64 in [0, 1); a token is the quantile of its number.
            after: a token, and the one that always follows it.
            progress: called with the number of tokens that each sequence has.

        Returns:
            [batch, length], int64, on the CPU.

        Raises:
            InputError: the logits are not finite, or transformers cannot run the model.
        """
        drawing = _Drawing(uniform.to(self._device), self._source, after, progress)
        settings = GenerationConfig(
            max_new_tokens=self._length - 1,
            do_sample=False,  # of the one token that is left possible
            use_cache=True,
            pad_token_id=0,
            cache_implementation=getattr(model.config, "cache_implementation", None),
        )
        ids = first[:, None].to(self._device)
        with (
            torch.inference_mode(),
            quiet_transformers(),
            foreign_code(f"{self._source.where} cannot write a text", "give a text in the place of its own"),
        ):
            written: Tensor = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                logits_processor=LogitsProcessorList([drawing]),
            )
        return written.cpu()


class _Drawing(LogitsProcessor):
    """Leaves one token possible: the drawn one."""

    def __init__(
        self, uniform: Tensor, source: Source, after: tuple[int, int] | None, progress: Callable[[int], None]
    ) -> None:
        self._uniform, self._source, self._after, self._progress = uniform, source, after, progress

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [batch, vocabulary] of which all but one are -inf in each row."""
        position, logits = input_ids.shape[1], wide(scores)
        if not bool(torch.isfinite(logits).all()):
            raise InputError(
                f"the head gives NaN or infinite activations where {self._source.where} writes its own text; check the "
                "source model"
            )
        tokens = draw(logits, self._uniform[:, position])
        if self._after is not None:
            token, follower = self._after
            tokens = tokens.masked_fill(input_ids[:, -1] == token, follower)
        self._progress(position + 1)
        return torch.full_like(logits, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def sampling_dtype(source: Source, device: str) -> torch.dtype:
    """The type that a model writes in: the stored one; 16 bits for a GGUF file, whose weights have fewer.

    On a CPU, 16 bits are those of bfloat16 where it computes with them, and float32 elsewhere.
    """
    stored = getattr(torch, majority_dtype(source.tensors.values()))
    assert isinstance(stored, torch.dtype)
    if stored.itemsize > 2 and not isinstance(source, GgufSource):
        return torch.float32
    if device.startswith("cuda"):
        return stored if stored.itemsize == 2 else torch.bfloat16
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def _cache_elements(config: Any) -> int:
    """Numbers that are kept of one token: keys and values of all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width)


def _free_bytes(device: str) -> tuple[int, str]:
    """Memory for one of the processes on this machine, and whose it is."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0]), device
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return available_memory_bytes() // processes, "this machine" if processes == 1 else "each process"
