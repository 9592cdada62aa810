"""LLaMA-Adapter for families that peft refuses (GPT-NeoX, dense and factored), with one gate per head.

Zhang et al., "LLaMA-Adapter" (arXiv:2303.16199), section 3. Each of the top layers has a prompt P [length, hidden] and
a gate g [heads] that starts at zero. With K = W_k P and V = W_v P of the layer's own projections, without rotary
positions, the self-attention output of head h becomes

    softmax(q_h K_h^T / sqrt(d)) V_h * g_h + (self-attention of head h)

and goes into the output projection. The adapter's keys are not part of the cache. peft's AdaptionPrompt has one gate
per layer in place of one per head, adds to the projected output, and supports llama, mistral and gpt2 only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.errors import InputError

WEIGHTS, CONFIG = "llama_adapter.safetensors", "llama_adapter.json"
_NAME = "llama_adapter"


@dataclass(frozen=True)
class Family:
    """Where a family's attention keeps what the adapter needs.

    Attributes:
        attention: name of the attention module in a layer.
        query: name of the projection whose output holds the queries.
        output: name of the output projection.
        queries: (output of ``query`` [B, T, ...], heads) -> [B, T, heads, head_dim], before rotary positions.
        keys_values: (attention, prompt [L, hidden], heads) -> keys and values, each [heads, L, head_dim].
    """

    attention: str
    query: str
    output: str
    queries: Callable[[Tensor, int], Tensor]
    keys_values: Callable[[Any, Tensor, int], tuple[Tensor, Tensor]]


def _fused_queries(projected: Tensor, heads: int) -> Tensor:
    return projected.unflatten(-1, (heads, 3, -1))[..., 0, :]


def _fused_keys_values(attention: Any, prompt: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    # GPT-NeoX stores [heads, (q, k, v), head_dim]. `forward` and not the call, whose hook would take it for queries.
    projected = attention.query_key_value.forward(prompt).unflatten(-1, (heads, 3, -1))
    return projected[:, :, 1].transpose(0, 1), projected[:, :, 2].transpose(0, 1)


def _separate_queries(projected: Tensor, heads: int) -> Tensor:
    return projected.unflatten(-1, (heads, -1))


def _separate_keys_values(attention: Any, prompt: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    def split(projection: nn.Module) -> Tensor:
        found: Tensor = projection(prompt).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
        return found.repeat_interleave(heads // found.shape[0], 0)  # grouped-query attention

    return split(attention.k_proj), split(attention.v_proj)


_NEOX = Family("attention", "query_key_value", "dense", _fused_queries, _fused_keys_values)
_LLAMA = Family("self_attn", "q_proj", "o_proj", _separate_queries, _separate_keys_values)
FAMILIES = {
    **dict.fromkeys(("gpt_neox", "polyglot_svd"), _NEOX),
    **dict.fromkeys(("llama", "llama_svd", "mistral", "mistral_svd", "qwen2", "qwen2_svd"), _LLAMA),
}


class AdapterPrompt(nn.Module):
    """Prompt and gates of one layer, heard through hooks on its attention.

    Hooks, because every attention implementation of every transformers version runs through the same three modules.
    They are bound methods, so that a deep copy of the model has hooks of its own.
    """

    def __init__(self, family: Family, length: int, hidden: int, heads: int, device: Any = None) -> None:
        """A random prompt and closed gates, in float32.

        Args:
            family: row of :data:`FAMILIES`.
            length: prompt tokens.
            hidden: the model's hidden size.
            heads: the model's attention heads.
            device: of the parameters.
        """
        super().__init__()
        self.family, self.heads = family, heads
        self.prompt = nn.Parameter(torch.randn(length, hidden, device=device))
        self.gate = nn.Parameter(torch.zeros(heads, device=device))
        self._heard: dict[str, Any] = {}

    def attach(self, attention: nn.Module) -> None:
        """Become part of an attention module."""
        attention.add_module(_NAME, self)
        attention.register_forward_pre_hook(self._enter, with_kwargs=True)
        getattr(attention, self.family.query).register_forward_hook(self._hear_queries)
        getattr(attention, self.family.output).register_forward_pre_hook(self._add)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Gated attention to the prompt.

        Args:
            query: [B, T, heads, head_dim], with rotary positions.
            keys, values: [heads, L, head_dim].

        Returns:
            [B, T, heads * head_dim], in the queries' dtype.
        """
        scores = torch.einsum("bthd,hld->bthl", query, keys) * query.shape[-1] ** -0.5
        weights = scores.softmax(-1, dtype=torch.float32) * self.gate[:, None]
        return torch.einsum("bthl,hld->bthd", weights.to(values.dtype), values).flatten(2).to(query.dtype)

    def _enter(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        keys, values = self.family.keys_values(attention, self.prompt.to(hidden.dtype), self.heads)
        self._heard = {"positions": kwargs["position_embeddings"], "keys": keys, "values": values}

    def _hear_queries(self, projection: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._heard["queries"] = self.family.queries(output, self.heads)

    def _add(self, projection: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        heard, self._heard = self._heard, {}
        query = _rotated(heard["queries"], *heard["positions"])
        return (args[0] + self(query, heard["keys"], heard["values"]).to(args[0].dtype),)


def _rotated(query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864, the half-split form) on the first dimensions of a head.

    Args:
        query: [B, T, heads, head_dim].
        cos, sin: [B or 1, T, dimensions that are rotated].
    """
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    turned, rest = query.split([cos.shape[-1], query.shape[-1] - cos.shape[-1]], -1)
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1).to(query.dtype)


@dataclass(frozen=True)
class AdapterConfig:
    """What a saved adapter is.

    Attributes:
        length: prompt tokens in each layer.
        layers: layers with a prompt, counted from the top.
        model_type: of the base model's config.
        base_model: folder or repository of the base model.
    """

    length: int
    layers: int
    model_type: str
    base_model: str = ""


class LlamaAdapterModel(nn.Module):
    """A causal language model with an adapter; only prompts and gates train.

    Everything that is not about the adapter is answered by the base model. The state dict holds the adapter alone, so a
    Trainer checkpoint of a 12.8B model is a few megabytes.
    """

    def __init__(self, base: Any, length: int, layers: int, base_model: str = "") -> None:
        """Put an adapter on a model, which is changed.

        Args:
            base: a loaded causal language model of a family in :data:`FAMILIES`.
            length: prompt tokens in each layer.
            layers: number of layers that get one, counted from the top.
            base_model: where it was loaded from, for the saved adapter.

        Raises:
            InputError: the family is unknown, or the model has fewer layers.
        """
        super().__init__()
        config = base.config
        if config.model_type not in FAMILIES:
            raise InputError(f"no LLaMA-Adapter for model type {config.model_type!r}; known: {', '.join(FAMILIES)}")
        family, stack = FAMILIES[config.model_type], base.base_model.layers
        if not 1 <= layers <= len(stack) or length < 1:
            raise InputError(
                f"an adapter of length {length} on {layers} layers is not possible; the model has {len(stack)} layers"
            )
        self.base_model = base.requires_grad_(False)
        self.adapter_config = AdapterConfig(length, layers, config.model_type, base_model)
        for layer in stack[len(stack) - layers :]:
            attention = getattr(layer, family.attention)
            device = next(getattr(attention, family.output).parameters()).device
            AdapterPrompt(family, length, config.hidden_size, config.num_attention_heads, device).attach(attention)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the base model."""
        return self.base_model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Prompts and gates, by their path in the base model."""
        whole = self.base_model.state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in whole.items() if f".{_NAME}." in name}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Fill the adapter, all of it.

        Raises:
            RuntimeError: a tensor is missing, not known, or of another shape.
        """
        own = self.state_dict()
        if own.keys() != state_dict.keys():
            odd = sorted(own.keys() ^ state_dict.keys())
            raise RuntimeError(f"the adapter's tensors do not fit this model, for example {odd[0]}")
        found = self.base_model.load_state_dict(state_dict, strict=False, assign=assign)
        return type(found)([], found.unexpected_keys)

    def save_adapter(self, folder: str | Path) -> None:
        """Write prompts and gates (safetensors) and what they are (JSON)."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(asdict(self.adapter_config), indent=2) + "\n", encoding="utf-8")


def load_adapter_config(folder: str | Path) -> AdapterConfig:
    """What a saved adapter is.

    Raises:
        InputError: the folder holds none, or its description is damaged.
    """
    path = Path(folder) / CONFIG
    try:
        return AdapterConfig(**json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); it is no LLaMA-Adapter") from None
    except (ValueError, TypeError):
        raise InputError(f"{path} is damaged; save the adapter again") from None


def load_adapter(base: Any, folder: str | Path) -> LlamaAdapterModel:
    """Put a saved adapter on its base model, which is changed.

    Args:
        base: the model it was trained on.
        folder: where :meth:`LlamaAdapterModel.save_adapter` wrote it.

    Raises:
        InputError: there is no adapter, or it belongs to another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = load_adapter_config(folder)
    if config.model_type != base.config.model_type:
        raise InputError(f"{folder} was trained on a {config.model_type}, not on a {base.config.model_type}")
    model = LlamaAdapterModel(base, config.length, config.layers, config.base_model)
    try:
        model.load_state_dict(load_file(Path(folder) / WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{Path(folder) / WEIGHTS} cannot be used: {str(error).splitlines()[0]}") from None
    return model.eval()
