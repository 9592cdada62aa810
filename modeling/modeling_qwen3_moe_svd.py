"""Qwen 3 with experts whose linear layers are stored as rank-r factors.

The file travels inside the checkpoint and needs only torch and transformers (4.46 to 5.23). Load with

    AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)

In place of a dense W [out, in], a factored layer holds, as `svd_layout` in config.json says,

balanced: `down` A [r, in] and `up` B [out, r], h = B A x + bias: r (in + out) numbers;
pivoted: r rows of W in `down` R [r, in] and the coefficients of the others in `up` T [out - r, r], h = P [R x; T R x]
    + bias with a permutation P: r (in + out - r) numbers.

Layers named in `svd_shared` hold `up` alone and use the `down` of an earlier layer, where it is stored once for all.

LoRA (arXiv:2106.09685) put on it runs beside the whole product: h = W x + bias + scale * LB(LA x).
"""

import copy
import functools
import importlib.metadata
import re
import sys
import time

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import (
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeForSequenceClassification,
    Qwen3MoeForTokenClassification,
    Qwen3MoeModel,
    Qwen3MoePreTrainedModel,
)

AUTO_MAP = {
    "AutoConfig": "modeling_qwen3_moe_svd.Qwen3MoeSVDConfig",
    "AutoModel": "modeling_qwen3_moe_svd.Qwen3MoeSVDModel",
    "AutoModelForCausalLM": "modeling_qwen3_moe_svd.Qwen3MoeSVDForCausalLM",
    "AutoModelForSequenceClassification": "modeling_qwen3_moe_svd.Qwen3MoeSVDForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_qwen3_moe_svd.Qwen3MoeSVDForTokenClassification",
}

NO_DENSE_WEIGHT = (
    "this layer is factored: its product can be read, but it has no dense weight to write or to merge into; "
    "to fold a LoRA adapter into the factors use `svdconvert fold`, for a method that changes the weights "
    'under it write target_modules=["down", "up"], and keep a quantizer to the factors: '
    'include=["*.down", "*.up"] in quanto, ignore=["FactoredLinear"] in llm-compressor'
)


class Qwen3MoeSVDConfig(Qwen3MoeConfig):
    """Qwen 3 with experts configuration plus the ranks of the factored layers and the way they are stored.

    Args:
        svd_ranks: `{"layers.0.self_attn.q_proj": 24, ...}`, module paths relative to the base model.
            A linear layer that is not named stays dense.
        svd_layout: "balanced" (SVDLinear) or "pivoted" (PivotedLinear), for all layers in svd_ranks.
        svd_shared: `{"layers.1.self_attn.q_proj": "layers.0.self_attn.q_proj", ...}`, a layer and the
            one whose `down` it uses: both in svd_ranks, at the same rank.
        **kwargs: the fields of `Qwen3MoeConfig`. The rotary settings may come in the spelling of transformers 4
            (`rope_theta`, `rope_scaling`), of transformers 5 (`rope_parameters`), or in both.

    Raises:
        ValueError: a rank that is not a positive int, an unknown layout, a layer that cannot share, or two rotary
            spellings that contradict each other.
    """

    # Not "qwen3_moe": without trust_remote_code, transformers must refuse. As "qwen3_moe" it would load the stock model
    # with random weights in place of every factored layer, and only print a report.
    model_type = "qwen3_moe_svd"

    def __init__(
        self,
        svd_ranks=None,
        svd_layout="balanced",
        svd_shared=None,
        rope_theta=None,
        rope_parameters=None,
        rope_scaling=None,
        dtype=None,
        torch_dtype=None,
        **kwargs,
    ):
        rope = dict(rope_parameters or {})
        rope_theta = _agreeing("rope_theta", rope_theta, rope.pop("rope_theta", None), 10000.0)
        if rope_scaling is None and rope.get("rope_type", "default") != "default":
            rope_scaling = rope
        # every version understands the older spellings as arguments
        super().__init__(
            rope_theta=rope_theta,
            rope_scaling=dict(rope_scaling) if rope_scaling else None,
            # transformers 5 writes dtype, which 4.46 takes for an unknown setting and would keep beside its own
            torch_dtype=dtype if dtype is not None else torch_dtype,
            **kwargs,
        )
        self.svd_ranks = dict(svd_ranks or {})
        for path, rank in self.svd_ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"svd_ranks[{path!r}] must be a positive int, got {rank!r}")
        if svd_layout not in list(LAYOUTS):  # of a list, because the value may be unhashable
            raise ValueError(f"svd_layout must be one of {', '.join(LAYOUTS)}, got {svd_layout!r}")
        self.svd_layout = svd_layout
        self.svd_shared = dict(svd_shared or {})
        for path, owner in self.svd_shared.items():
            _check_shared(self, path, owner)

    @property
    def base_model_tp_plan(self):
        """Tensor-parallel plan (module path pattern -> style) for the factors, or for the layers left dense.

        The stock plan, where this version has one, names the outer layers. Of a column-parallel layer `up` is sharded,
        of a row-parallel one `down`, so that the all-reduce moves r numbers per token. A pattern covers all layers, so
        a projection factored in some layers only leaves its whole block (attention or MLP) unsharded. So does the
        pivoted layout, whose outputs are permuted: no contiguous piece of `up` gives those of one process.
        """
        stock = getattr(super(), "base_model_tp_plan", None) or {}
        if "svd_layout" not in vars(self):  # asked by the class above, before the factors are known
            return stock or None
        # every process has all experts, whose rules are for the tensors in which transformers 5 stacks them
        stock = {rule: style for rule, style in stock.items() if ".experts" not in rule and style != "ep_router"}
        counts = (0,) if self.svd_layout == "pivoted" else (0, self.num_hidden_layers)
        factored = {rule: sum(path.endswith(rule.partition("*")[2]) for path in self.svd_ranks) for rule in stock}
        mixed = {rule.rpartition(".")[0] for rule in stock if factored[rule] not in counts}
        plan = {}
        for rule, style in stock.items():
            if rule.rpartition(".")[0] not in mixed:
                side = ".up" if style.startswith("colwise") else ".down"
                plan[rule + (side if factored[rule] else "")] = style
        plan.update(vars(self).get("_tied_rule", {}))
        return plan

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan):
        """Keeps the rule that transformers 5.15 to 5.22 add for a tied embedding, and only that."""
        self._tied_rule = {rule: style for rule, style in plan.items() if rule == "embed_tokens"}

    @property
    def base_model_ep_plan(self):
        """None: the stock plan is for stacked experts."""

    def to_dict(self):
        """The serialised form, with each setting in the spelling of transformers 4 and of transformers 5.

        Each drops the other's: a file with rope_parameters alone gives wrong logits on transformers 4 without a word.
        """
        out = super().to_dict()
        if out.get("rope_parameters") is None:  # transformers 4
            out["rope_parameters"] = {
                "rope_type": "default",
                **(out.get("rope_scaling") or {}),
                "rope_theta": out["rope_theta"],
            }
        else:
            scaling = dict(out["rope_parameters"])
            out["rope_theta"] = scaling.pop("rope_theta")
            out["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
        # save_pretrained puts this file beside the weights, so the names are local ones. (4.46 keeps those of a Hub
        # repository, and a saved model would run whatever that repository holds by then.)
        # transformers 4 reads num_experts alone, and 5 writes num_local_experts in its place
        out["num_experts"] = out["num_local_experts"] = self.num_experts
        out.pop("_tied_rule", None)
        out["auto_map"] = dict(AUTO_MAP)
        return out


def _agreeing(name, value, other, default):
    """`value` or `other`, whichever is given; ValueError if both are given and differ."""
    if value is not None and other is not None and value != other:
        raise ValueError(f"the config says {name}={value}, but {other} in rope_parameters")
    return next(v for v in (value, other, default) if v is not None)


def _check_shared(config, path, owner):
    """ValueError if `svd_shared` says of a layer what cannot be."""
    ranks, where = config.svd_ranks, f"svd_shared[{path!r}] is {owner!r}"
    if config.svd_layout != "balanced":
        raise ValueError(f"{where}, but layers share `down` in the balanced layout alone")
    for name in (path, owner):
        if not isinstance(name, str) or name not in ranks:
            raise ValueError(f"{where}, but svd_ranks does not name {name!r}")
    if owner in config.svd_shared:
        raise ValueError(f"{where}, which has no `down` of its own: it is in svd_shared itself")
    if ranks[path] != ranks[owner]:
        raise ValueError(f"{where}, but their ranks differ: {ranks[path]} and {ranks[owner]}")


def _held(linear):
    """What a linear layer holds in the place of its weight, for its type and device, or to be dequantised."""
    weight = getattr(linear, "weight", None)
    return linear.weight_scale if weight is None else weight  # packed, before its first use


def _matrix(linear):
    """The weight [out, in] of a linear layer as numbers that can be multiplied: dequantised if it is not there so."""
    weight = _held(linear)
    if type(weight) not in (torch.Tensor, nn.Parameter):
        kind = type(weight).__name__
        if kind == "DTensor":
            raise RuntimeError("the weight of a factored layer cannot be read where its factors are sharded")
        if kind == "Params4bit":  # on CPUs, bitsandbytes reorders it for inference; so by way of its product
            multiply = sys.modules["bitsandbytes"].matmul_4bit  # imported, and transformers would insist on an `import`
            weight = multiply(torch.eye(linear.in_features, device=weight.device), weight, weight.quant_state).t()
        elif kind == "Int8Params":
            state = linear.state
            rows, scales = (weight.data, weight.SCB) if state.CB is None else (state.CB, state.SCB)
            weight = rows.float() * scales.view(-1, 1) / 127
        else:
            weight = weight.dequantize()
    if weight.shape != (linear.out_features, linear.in_features):
        raise RuntimeError("the weight of a factored layer cannot be read where its factors are sharded")
    return weight


# A weight of fewer numbers is multiplied in the time that it takes to call another routine.
LARGE = 2**18
# What is timed: rows of inputs (a token, a few sequences' tokens, a prompt), and outputs of a weight with 512 inputs.
TIMED_ROWS, TIMED_OUTPUTS = (1, 16, 128), (2048, 8192)


@functools.cache
def _onednn_is_faster(rows, outputs, threads):
    """Whether oneDNN multiplies [rows, 512] by [512, outputs] in less than 0.9 of the time of `F.linear` on this CPU.

    Measured once for a number of `threads`, in 3 to 150 ms. PyTorch leaves products in float32 to MKL. On a processor
    that is not Intel's those take up to twice as long, at some sizes and not at others, and the product of one token
    runs in a single thread; oneDNN's threads in turn have to be woken where waiting ones sleep.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    # whatever the caller has set as the usual type and device: the answer is kept
    weight, x = (torch.ones(count, 512, dtype=torch.float32, device="cpu") for count in (outputs, rows))
    seconds = {nn.functional.linear: [], _onednn: []}
    begin = time.perf_counter()
    while len(seconds[_onednn]) < 12 and time.perf_counter() - begin < 0.3:  # a busy machine takes longer
        for product, taken in seconds.items():
            start = time.perf_counter()
            try:
                product(x, weight)
            except (RuntimeError, TypeError):  # no interface that torch promises to keep
                return False
            taken.append(time.perf_counter() - start)
    theirs, ours = (min(taken) for taken in seconds.values())
    return ours < 0.9 * theirs  # nearer to 1, it would be one today and the other tomorrow


def _nearest(count, timed):
    return min(timed, key=lambda one: max(one, count) / min(one, count))


def _prefers_onednn(rows, weight):
    """Whether products of so many rows and `weight` are left to oneDNN: as the nearest ones that are timed."""
    timed = _nearest(rows, TIMED_ROWS), _nearest(weight.numel() // 512, TIMED_OUTPUTS)
    return torch.backends.mkldnn.enabled and _onednn_is_faster(*timed, torch.get_num_threads())


def _onednn(x, weight, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _onednn_by_few_shapes(x, weight, bias):
    """The product of `x` [..., n] and `weight` by oneDNN, of one of 24 numbers of rows at a time.

    oneDNN keeps half a megabyte of code for each shape that it has multiplied, and a part of it for ever: prompts of
    many lengths would let a process grow. So rows are parted into powers of two, up to 4,096, and fewer than 16.
    """
    rows = x.numel() // x.shape[-1]
    most, power = divmod(rows, 4096)
    parts = [4096] * most + [1 << bit for bit in range(11, 3, -1) if power >> bit & 1]
    parts += [rows % 16] if rows % 16 else []
    if len(parts) < 2:
        return _onednn(x, weight, bias)
    y = torch.cat([_onednn(part, weight, bias) for part in x.reshape(rows, -1).split(parts)])
    return y.view(*x.shape[:-1], -1)


def _has_onednn_product(linear, x):
    """Whether `linear(x)` is a product and no more, without a gradient, on a CPU in float32, where oneDNN is faster.

    Not so if anybody has put something around or in the place of the layer or of its weight.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
        return False
    if type(linear) is not nn.Linear:
        return False
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
    return (
        type(weight) is nn.Parameter
        and type(x) is torch.Tensor
        and weight.numel() >= LARGE
        and weight.is_cpu
        and x.is_cpu
        and weight.dtype == x.dtype == torch.float32
        and (bias is None or (bias.is_cpu and bias.dtype == torch.float32))
        and weight.is_contiguous()
        and x.shape[-1] == linear.in_features
        and x.numel() > 0
        and not (linear._forward_pre_hooks or linear._forward_hooks or "forward" in linear.__dict__)
        and not nn.modules.module._has_any_global_hook()
        and not torch.is_autocast_enabled("cpu")
        and getattr(torch.autograd.forward_ad, "_current_level", 0) < 0  # no_grad does not turn that off
        and _prefers_onednn(x.numel() // linear.in_features, weight)
    )


def _apply(linear, x):
    """linear(x); where nobody can tell the difference, by the faster one of two routines."""
    return _onednn_by_few_shapes(x, linear.weight, linear.bias) if _has_onednn_product(linear, x) else linear(x)


class FactoredLinear(nn.Module):
    """Linear layer [..., in_features] -> [..., out_features] whose weight is held as two inner ones, `down` and `up`.

    Not an `nn.Linear` while a model is being built: quantizers and serving engines replace every `nn.Linear` they
    find, and have to find `down` and `up`, not the layer around them.
    """

    def __init__(self, in_features, out_features, rank):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.path = "a factored layer"  # in messages; where the layer is in its model, once it is there

    @staticmethod
    def highest_rank(in_features, out_features):
        return min(in_features, out_features)

    def init_own(self):
        """Initial values of what this module holds beside `down` and `up`, which are initialised on their own."""

    def inner(self):
        """The module that computes z = A x [..., r]."""
        return self.down

    def outputs(self, z, y):
        """What the layer gives without its bias [..., out], of z = down(x) [..., r] and y = up(z)."""
        return y

    @torch.no_grad()
    def product(self):
        """The weight W [out, in] that the factors stand for, multiplied anew at every call.

        Raises:
            RuntimeError: the factors are spread over processes.
        """
        up = _matrix(self.up)
        z = _matrix(self.inner()).to(up).t()
        return self.outputs(z, z @ up.t()).t().contiguous()

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class SVDLinear(FactoredLinear):
    """Rank-r linear layer of two factors, y = up(down(x)), with the bias on `up`."""

    def __init__(self, in_features, out_features, rank, bias=True, device=None, dtype=None):
        super().__init__(in_features, out_features, rank)
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x):
        return _apply(self.up, _apply(self.down, x))


class SharedSVDLinear(FactoredLinear):
    """SVDLinear that holds `up` alone and uses the `down` of another one, its owner: y = up(owner.down(x)).

    The owner is no submodule here, so that `down` has one place and one name in the model: it is counted, saved, moved
    and trained once, and whatever replaces it there (a quantizer, a serving engine) is used by all.
    """

    def __init__(self, owner, out_features, bias=True, device=None, dtype=None):
        super().__init__(owner.in_features, out_features, owner.rank)
        self.__dict__["owner"] = owner  # nn.Module would take it for a submodule
        self.up = nn.Linear(owner.rank, out_features, bias=bias, device=device, dtype=dtype)

    def inner(self):
        return self.owner.down

    def forward(self, x):
        down = self.inner()
        # Layers of one model may lie on several devices, and what moves inputs between them sees to whole blocks. On
        # meta, weights are offloaded: they and their input are moved when `down` is called.
        device = getattr(down, "weight", x).device
        z = _apply(down, x if device.type == "meta" else x.to(device))
        return _apply(self.up, z.to(x.device))


class PivotedLinear(FactoredLinear):
    """Rank-r linear layer of r rows of its weight, `down` [r, in], and the others' coefficients, `up` [out - r, r].

    y[i] = [z; up(z)][position[i]] + bias[i] with z = down(x) [..., r]; `position` [out] is a permutation.
    """

    def __init__(self, in_features, out_features, rank, bias=True, device=None, dtype=None):
        super().__init__(in_features, out_features, rank)
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        # Where the weights are on meta, somebody will load them, who may have left the buffers elsewhere, to be filled.
        # Until then no index is valid: an engine that loads parameters only must not compute with an identity.
        device = None if _held(self.down).is_meta else device
        self.register_buffer("position", torch.full((out_features,), -1, device=device, dtype=torch.int64))
        self.checked = False  # whether `position` is known to be a permutation
        self.init_own()

    @staticmethod
    def highest_rank(in_features, out_features):
        return min(in_features, out_features - 1)  # no quantizer or engine expects an `up` without outputs

    @torch.no_grad()
    def init_own(self):
        # transformers 5 comes here after loading, and marks what it has loaded; 4 comes before
        if not _held(self.down).is_meta and not getattr(self.position, "_is_hf_initialized", False):
            self.position.copy_(torch.arange(self.out_features, device=self.position.device))
        if self.bias is not None and not getattr(self.bias, "_is_hf_initialized", False):
            self.bias.zero_()

    def check(self, position):
        """ValueError if `position`, which may lie elsewhere than in this layer, is no permutation of the outputs.

        Waits for the device; so it is done once, after loading or at the first use.
        """
        found = position.long().sort().values
        if not torch.equal(found, torch.arange(self.out_features, device=found.device)):
            raise ValueError(
                f"{self.path}.position is no permutation of 0 to {self.out_features - 1}: it was not loaded with the "
                "weights, or what wrote the checkpoint changed it (by averaging two, say)"
            )
        self.checked = True

    def _load_from_state_dict(self, *args, **kwargs):
        self.checked = False
        super()._load_from_state_dict(*args, **kwargs)

    def outputs(self, z, y):
        # index_select: the gradient of an indexing expression is a sort, because its indices might repeat. On CPUs
        # it is several times as fast on a matrix as on a batch of them.
        both = torch.cat([z, y], -1).reshape(-1, self.out_features).index_select(-1, self.position)
        return both.view(*z.shape[:-1], self.out_features)

    def forward(self, x):
        if self.position.is_meta and not x.is_meta:  # torch would return uninitialised memory
            raise RuntimeError("`position` of a pivoted layer was not loaded with its weights")
        if not (self.checked or self.position.is_meta or torch.compiler.is_compiling()):
            self.check(self.position)
        z = _apply(self.down, x)
        y = self.outputs(z, _apply(self.up, z))
        # as nn.Linear and bitsandbytes do it: a bias in float32 beside layers in half precision does not widen y
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Expert(nn.Module):
    """One MLP of a mixture, [tokens, width] -> [tokens, width]."""

    def __init__(self, width, inner, act_fn, **options):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False, **options)
        self.up_proj = nn.Linear(width, inner, bias=False, **options)
        self.down_proj = nn.Linear(inner, width, bias=False, **options)
        self.act_fn = act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """The experts of a mixture as modules, of whose layers each has a rank of its own."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """[tokens, width], and for each of its choices the number of an expert and its weight [tokens, k]."""
        tokens = hidden_states.shape[0]
        if getattr(torch.compiler, "is_exporting", bool)():  # a graph runs all: it cannot depend on what is chosen
            weights = top_k_weights.new_zeros(tokens, len(self)).scatter_(1, top_k_index, top_k_weights)
            outputs = torch.stack([expert(hidden_states) for expert in self], 1) * weights[..., None]
            # what is not chosen may overflow in float16, and 0 times infinity is no number
            return outputs.masked_fill(weights[..., None] == 0, 0).sum(1).to(hidden_states.dtype)
        if tokens == 1 and not torch.is_grad_enabled():  # as answers are written: there is nothing to put in order
            outputs = torch.cat([self[number](hidden_states) for number in top_k_index[0].tolist()])
            return (outputs * top_k_weights.t()).sum(0, keepdim=True).to(hidden_states.dtype)
        # ordered by expert, then by choice, then by token: what an expert gets lies together
        choices = top_k_index.t().flatten()
        order = choices.argsort(stable=True)
        token = order % tokens
        counts = choices.bincount(minlength=len(self)).tolist()
        parts = zip(self, hidden_states[token].split(counts), strict=True)
        # where gradients are taken, experts without a token too: theirs are zeros, and not missing
        outputs = [expert(part) for expert, part in parts if len(part) or torch.is_grad_enabled()]
        weighted = torch.cat(outputs) * top_k_weights.t().flatten()[order, None]
        return torch.zeros_like(hidden_states).index_add_(0, token, weighted.to(hidden_states.dtype))


def _separate_experts(model):
    """Puts modules in the place of the tensors in which transformers 5 stacks experts, under the names of files."""
    for block in model.layers:
        mixture = getattr(block, "mlp", None)
        stacked = getattr(mixture, "experts", None)
        if stacked is None or isinstance(stacked, nn.ModuleList):
            continue
        weight = stacked.gate_up_proj
        count, inner, width = weight.shape
        options = {"device": weight.device, "dtype": weight.dtype}
        mixture.experts = Experts(Expert(width, inner // 2, stacked.act_fn, **options) for _ in range(count))


LAYOUTS = {"balanced": SVDLinear, "pivoted": PivotedLinear}


class _Adaptable(nn.modules.linear.NonDynamicallyQuantizableLinear):
    """What a loaded factored layer becomes too: an `nn.Linear` to PEFT, which then adapts it as a whole.

    Its `weight` can be read, not written.
    """

    @property
    def weight(self):
        # what compiles knows no tensors of other classes, and merges nothing
        return self.product() if torch.compiler.is_compiling() else _DenseWeight(self)

    def __setattr__(self, name, value):
        if name == "weight" and getattr(value, "layer", None) is not self:
            raise RuntimeError(NO_DENSE_WEIGHT)
        # PEFT 0.13 unloads an adapter by assigning the layer its own weight and bias
        if name != "weight":
            super().__setattr__(name, value)


class _BiasOfUp(_Adaptable):
    """An adaptable layer whose bias is that of `up`, and called so in checkpoints of the model.

    A PEFT adapter that trains biases (`bias="lora_only"`) keeps it as `base_layer.bias`, as it would on any layer.
    """

    from_adapter = False  # whether the bias came from an adapter, so that it belongs to it also when it is not trained

    @property
    def bias(self):
        return self.up.bias

    def __setattr__(self, name, value):
        if name != "bias":
            super().__setattr__(name, value)
        elif value is not self.up.bias:  # transformers 5 loads an adapter by assignment
            self.up.bias, self.from_adapter = value, True

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        bias = self.up.bias
        if prefix.endswith("base_layer.") and bias is not None and (self.from_adapter or bias.requires_grad):
            # a copy, as FSDP gathers for a moment only what it has stored, under its own name
            destination[prefix + "bias"] = bias if keep_vars else bias.detach().clone()

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if prefix + "bias" in state_dict:
            state_dict[prefix + "up.bias"] = state_dict.pop(prefix + "bias")
            self.from_adapter = True
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class AdaptableSVDLinear(SVDLinear, _BiasOfUp):
    pass


class AdaptableSharedSVDLinear(SharedSVDLinear, _BiasOfUp):
    pass


class AdaptablePivotedLinear(PivotedLinear, _Adaptable):
    pass


ADAPTABLE = {
    SVDLinear: AdaptableSVDLinear,
    SharedSVDLinear: AdaptableSharedSVDLinear,
    PivotedLinear: AdaptablePivotedLinear,
}


class _DenseWeight(torch.Tensor):
    """The weight [out, in] of a factored layer, to be read: what computes with it gets `layer.product()`.

    Until then it is a shape, a dtype and a device. What would change it raises, and so do views of it. (A stock LoRA
    merge adds to the weight that it reads. Given the product, it would add to a temporary and then drop the adapter;
    given `up.weight`, it would corrupt the layer where r == in_features.)
    """

    # attribute access stays as it is in C++; whatever computes comes to __torch_dispatch__
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, layer, part=None):
        """The weight of `layer`; or `part`, a view of its product."""
        if part is None:
            like, shape, strides = _held(layer.up), (layer.out_features, layer.in_features), (layer.in_features, 1)
        else:
            like, shape, strides = part, part.shape, part.stride()
        return torch.Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=like.dtype, device=like.device)

    def __init__(self, layer, part=None):
        self.layer, self.part = layer if part is None else None, part

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        changed = [given.get(argument.name) for argument in func._schema.arguments if argument.is_write]
        if any(isinstance(value, cls) for value in tree_flatten(changed)[0]):
            raise RuntimeError(NO_DENSE_WEIGHT)
        if func is torch.ops.aten.detach.default and args[0].layer is not None:
            return cls(args[0].layer)
        out = func(*tree_map_only(cls, cls._numbers, args), **tree_map_only(cls, cls._numbers, kwargs))
        if any(result.alias_info is not None for result in func._schema.returns):
            out = tree_map_only(torch.Tensor, lambda part: cls(None, part), out)
        return out

    def _numbers(self):
        return self.layer.product() if self.part is None else self.part

    @property
    def data(self):
        return self

    @data.setter
    def data(self, value):
        raise RuntimeError(NO_DENSE_WEIGHT)

    @property
    def requires_grad(self):
        return False

    @requires_grad.setter
    def requires_grad(self, value):
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad=True):
        if requires_grad:
            raise RuntimeError(NO_DENSE_WEIGHT)
        return self

    def type(self, dtype=None, **kwargs):
        # Without a dtype it is how torch names what is no parameter, to a tool that gives it to a layer of its own.
        if dtype is None:
            raise RuntimeError(NO_DENSE_WEIGHT)
        return super().type(dtype, **kwargs)

    def __repr__(self):
        return f"<weight of factors: {tuple(self.shape)}, {self.dtype}, {self.device}>"


def _factor_linears(model, config):
    """Replaces the dense linear layers named in `svd_ranks` by factored ones of the same device and dtype.

    Raises:
        ValueError: a path that is no linear layer of `model`, a rank that the layout cannot have at its shape, or
            layers that share but read inputs of different sizes.
    """
    layout, shared = LAYOUTS[config.svd_layout], config.svd_shared
    dense = {path: _dense_linear(model, path) for path in config.svd_ranks}
    sizes = {path: tuple(layer.weight.shape) for path, layer in dense.items()}
    stacked = dict.fromkeys(sizes, 0)  # outputs of layers that share, which are one matrix, by their owner
    for path, (rows, _) in sizes.items():
        stacked[shared.get(path, path)] += rows
    lenders = set(shared.values())
    for path, rank in config.svd_ranks.items():
        owner = shared.get(path, path)
        if sizes[path][1] != sizes[owner][1]:
            raise ValueError(
                f"svd_shared[{path!r}] is {owner!r}, but they read {sizes[path][1]} and {sizes[owner][1]} inputs"
            )
        inputs, outputs = sizes[owner][1], stacked[owner]
        highest = layout.highest_rank(inputs, outputs)
        if rank > highest:
            raise ValueError(
                f"svd_ranks[{path!r}] is {rank}, but the layer is {outputs} x {inputs}"
                f"{' with those that share its `down`' if owner in lenders else ''}: "
                f"the {config.svd_layout} layout has a rank of at most {highest} there"
            )
    factored = {}
    for path in sorted(dense, key=shared.__contains__):  # owners first
        old, (rows, columns) = dense[path], sizes[path]
        options = {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
        if path in shared:
            new = SharedSVDLinear(factored[shared[path]], rows, **options)
        else:
            new = layout(columns, rows, config.svd_ranks[path], **options)
        factored[path] = new
        new.path = path
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)


def _dense_linear(model, path):
    """The linear layer of that path; ValueError if there is none."""
    try:
        dense = model.get_submodule(path)
    except AttributeError:
        dense = None
    if not isinstance(dense, nn.Linear):
        raise ValueError(f"svd_ranks names {path!r}, which is not a linear layer of {type(model).__name__}")
    return dense


def _make_adaptable(model):
    for module in model.modules():
        if type(module) in ADAPTABLE:
            module.__class__ = ADAPTABLE[type(module)]


class _Factored:
    """What the model classes share: the switch to adaptable layers, and the check of what was loaded."""

    _can_compile_fullgraph = False  # how many tokens an expert gets is known by their values alone

    def _init_weights(self, module):
        # an adaptable layer passes for an nn.Linear, but has no weight to fill
        if isinstance(module, FactoredLinear):
            module.init_own()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """As in transformers.

        Raises:
            ValueError: svd_ranks and the tensors of the checkpoint disagree. (transformers would fill the layers in
                question with initial values and only print a report.)
        """
        # on disk with the weights; by default transformers 4 wants `position` at hand there, and does not load it
        kwargs.setdefault("offload_buffers", True)
        _check_packing(kwargs.get("config"))
        plain = False
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"], plain = _packed(_skipping_factors(kwargs["quantization_config"]))
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        _check_factors(model, info)
        _tie_head(model)
        _unpack(model, plain)
        _check_positions(model)
        _make_adaptable(model)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args, **kwargs):
        """As in transformers. Weights that were loaded packed are saved packed, unless one of them has changed."""
        packed = None if len(args) > 2 or kwargs.get("state_dict") is not None else _packed_again(self)
        if packed is None:
            return super().save_pretrained(*args, **kwargs)
        settings = _compressor(self).quantization_config
        status, weights = settings.quantization_status, {layer: layer._parameters.pop("weight") for layer in packed}
        settings.quantization_status = type(status)("compressed")
        try:
            for layer, words in packed.items():
                layer.register_parameter("weight_packed", nn.Parameter(words, requires_grad=False))
            return super().save_pretrained(*args, **kwargs)
        finally:
            settings.quantization_status = status
            for layer, weight in weights.items():
                layer._parameters.pop("weight_packed", None)
                layer.register_parameter("weight", weight)

    def get_submodule(self, target):
        """As in torch. A factor of a layer that PEFT adapts is no submodule any more; its name leads to the adapter.

        PEFT lists all names first. By "all-linear" it wants the layer, which it replaces, and then its factors. Led to
        an adapter that is there already, it brings that up to date; so every layer is adapted once, as a whole.
        """
        try:
            return super().get_submodule(target)
        except AttributeError:
            path, _, name = target.rpartition(".")
            layer = super().get_submodule(path)
            if name in ("down", "up") and isinstance(getattr(layer, "base_layer", None), FactoredLinear):
                return layer
            raise

    def for_decoding(self):
        """Store the `up` weights that lie on the CPU in float32 by columns, and return the model.

        A token at a time, MKL reads a matrix of short rows at half the speed at which it reads the same one by columns,
        and `up` has rows of r numbers only. Where oneDNN multiplies them there is nothing to gain, and they stay.
        Shapes, names and what is saved stay the same. For inference: FSDP takes no parameters of that kind, and what is
        moved or cast afterwards may be laid out by rows again.
        """
        for module in self.modules():
            if isinstance(module, FactoredLinear) and type(module.up) is nn.Linear:
                weight = module.up.weight
                by_onednn = weight.numel() >= LARGE and _prefers_onednn(1, weight)
                if weight.device.type == "cpu" and weight.dtype == torch.float32 and not by_onednn:
                    weight.data = weight.data.t().contiguous().t()
        return self

    def add_adapter(self, *args, **kwargs):
        _make_adaptable(self)
        return super().add_adapter(*args, **kwargs)

    def load_adapter(self, *args, **kwargs):
        # also reached from inside from_pretrained, when it is given the folder of an adapter
        _make_adaptable(self)
        return super().load_adapter(*args, **kwargs)


# where the quantizers of transformers are told which layers to leave as they are
SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")


def _skipping_factors(settings):
    """A copy of a quantizer's settings whose skip lists name the factors of every layer that they name.

    To transformers 5 a plain name is the end of a path, so `q_proj` would not reach `down` and `up` below it.
    To transformers 4 it is any part of a path.
    """
    settings = copy.deepcopy(settings)
    fields = settings if isinstance(settings, dict) else vars(settings)
    for skip_list in SKIP_LISTS:
        names = fields.get(skip_list) or []
        if patterns := [pattern for name in names if (pattern := _factors_below(name))]:
            fields[skip_list] = [*names, *patterns]
    return settings


def _factors_below(name):
    """A pattern of the factors of the layers that an entry of a skip list ends at; "" where it reaches them itself."""
    below = r"\.(?:down|up)(?:\.|$)"
    if re.fullmatch(r"[\w.]+", name):
        return f".*{re.escape(name)}{below}"
    return f"(?:{name[:-1]}){below}" if name.endswith("$") else ""


def _check_packing(config):
    """ImportError if the installed compressed-tensors would take packed weights of this model for other numbers."""
    settings = getattr(config, "quantization_config", None)
    if not isinstance(settings, dict) or settings.get("quant_method") != "compressed-tensors":
        return
    groups = settings.get("config_groups") or {}
    widths = {(group.get("weights") or {}).get("num_bits") for group in groups.values() if isinstance(group, dict)}
    straddling = sorted(bits for bits in widths if isinstance(bits, int) and 0 < bits < 32 and 32 % bits)
    try:
        version = importlib.metadata.version("compressed-tensors")
    except importlib.metadata.PackageNotFoundError:
        return  # transformers will say so
    if straddling and tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (0, 18):
        raise ImportError(
            f"this model has weights of {straddling[0]} bits, which compressed-tensors packs otherwise since 0.18, and "
            f"{version} is installed: update it, with transformers 4.57 or newer, or write the model at 16 bits with "
            "`svdconvert densify`"
        )


def _packed(settings):
    """`(settings, plain)`: how packed weights are loaded, and whether they are to become plain ones.

    Asked for that, transformers 5.23 dequantises all layers as it would those of the first group, whatever theirs is;
    so they are loaded packed, and unpacked each by its own.
    """
    fields = settings if isinstance(settings, dict) else vars(settings)
    method = fields.get("quant_method")
    if getattr(method, "value", method) != "compressed-tensors":
        return settings, False
    plain = bool(fields.get("dequantize")) or fields.get("run_compressed") is False
    if fields.get("dequantize"):
        fields["dequantize"] = False
    return settings, plain


def _compressor(model):
    """What compressed-tensors has packed the weights of a loaded model with; None if they are not packed."""
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    return compressor if hasattr(compressor, "decompress_model") else None


def _unpack(model, plain):
    """Gives packed layers weights to compute with, as compressed-tensors does when a model is called first.

    What does not call the model would find no weights: PEFT's wrapper, `product`, the base model by itself.

    Args:
        plain: whether nothing shall be left of how they were packed, so that they are trained and saved as any others.
    """
    compressor = _compressor(model)
    if compressor is None:
        return
    if any("weight_packed" in module._parameters for module in model.modules()):
        compressor.decompress_model(model)
    if plain:
        metadata = sys.modules["compressed_tensors.quantization"].QuantizationMetadata
        for module in model.modules():
            if hasattr(module, "quantization_scheme"):
                metadata.clear_quantization(module)
                module.requires_grad_(True)
        # transformers 4 would write the last one into config.json, which cannot hold it
        for name in ("hf_quantizer", "quantization_method", "quantization_config", "_pre_quantization_dtype"):
            vars(model).pop(name, None)
            vars(model.config).pop(name, None)
        model.is_quantized = False


def _packed_again(model):
    """Layer -> its packed weight, of a model whose weights came packed; None if any is not what packing leaves of it.

    In float32, since integers are not found again by a division in bfloat16.
    """
    if _compressor(model) is None:
        return None
    registry = sys.modules["compressed_tensors.compressors"].BaseCompressor
    packed = {}
    for layer in model.modules():
        scheme = getattr(layer, "quantization_scheme", None)
        if scheme is None:
            continue
        held = {name: parameter.data for name, parameter in layer._parameters.items() if parameter is not None}
        form = getattr(scheme, "format", None)  # what packed it; older versions do not say
        if form is None or "weight" not in held or held["weight"].is_meta:
            return None
        packing = registry.get_value_from_registry(getattr(form, "value", form))
        wide = {name: value.float() if value.is_floating_point() else value for name, value in held.items()}
        packed[layer] = packing.compress(wide, scheme)["weight_packed"]
        again = packing.decompress({**held, "weight_packed": packed[layer]}, scheme)["weight"]
        if not torch.equal(again, held["weight"]):
            return None
    return packed or None


def _check_factors(model, info):
    """ValueError if `info` (the loading info of transformers) shows factors without a rank or ranks without factors."""
    ranks, shared = model.config.svd_ranks, model.config.svd_shared
    parameters = dict(model.named_parameters())
    # With low_cpu_mem_usage alone, transformers 4 takes all missing tensors of one size for tied, does not report them,
    # and leaves them on meta. (All of them are there in a process that is to receive its weights from another one.)
    on_meta = {name for name, parameter in parameters.items() if parameter.is_meta}
    if hasattr(model, "hf_device_map") or len(on_meta) == len(parameters):
        on_meta = set()
    # a bias beside `position` is one of the factors if it is lacking; left over, it may be anybody's
    factor = re.compile(r"(?:model\.)?(.+?)\.((?:down|up)\.(?:weight|bias|weight_\w+)|position|bias)")
    mismatched = (key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])  # 4.57 gives names only
    absent = sorted(
        key
        for key in {*info["missing_keys"], *mismatched, *on_meta}
        if (match := factor.fullmatch(key)) and match[1] in ranks
    )
    unnamed = sorted(
        key
        for key in info["unexpected_keys"]
        if (match := factor.fullmatch(key)) and match[1] not in ranks and match[2] != "bias"
    )
    doubled = sorted(
        key
        for key in info["unexpected_keys"]
        if (match := factor.fullmatch(key)) and match[1] in shared and match[2].startswith("down.")
    )
    for keys, what in (
        (unnamed, "the checkpoint holds factors of layers that svd_ranks in its config.json does not name"),
        (doubled, "the checkpoint holds factors of their own for layers that share another's by its svd_shared"),
        (absent, "the checkpoint lacks factors for svd_ranks in its config.json"),
    ):
        if keys:
            raise ValueError(f"{what}: {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if keys[3:] else ""))


def _tie_head(model):
    """Ties a head left without its weight: transformers 5.3.0 takes a tied one for loaded if the code is not its own.

    A product with a weight on meta may be uninitialised memory.
    """
    parts = model.get_input_embeddings(), model.get_output_embeddings()
    embedding, head = (getattr(part, "weight", None) for part in parts)
    if head is not None and embedding is not None and head.is_meta and not embedding.is_meta:
        model.tie_weights()


def _check_positions(model):
    """ValueError if `position` of a pivoted layer is no permutation; one still to be loaded is checked when used."""
    for layer in model.modules():
        if isinstance(layer, PivotedLinear):
            hook = getattr(layer, "_hf_hook", None)
            # accelerate brings what it has offloaded when the layer is called
            offloaded = getattr(hook, "weights_map", None) if getattr(hook, "offload_buffers", False) else None
            if offloaded is None:
                position = layer.position
            else:
                # transformers 4 would bring it in the dtype of the weights: in bfloat16, 257 becomes 256
                index = getattr(offloaded.dataset, "index", None) or {}
                index.get(offloaded.prefix + "position", {})["dtype"] = "int64"
                position = offloaded["position"]
            if not position.is_meta:
                layer.check(position)


class Qwen3MoeSVDModel(_Factored, Qwen3MoeModel):
    """Qwen3MoeModel in which the layers named in `config.svd_ranks` are factored."""

    config_class = Qwen3MoeSVDConfig

    def __init__(self, config):
        super().__init__(config)
        _separate_experts(self)
        _factor_linears(self, config)
        self.post_init()  # again, for the initial weights of the factors
        if not self.get_input_embeddings().weight.is_meta:  # on meta a quantizer or a serving engine may still follow
            _make_adaptable(self)


class Qwen3MoeSVDForCausalLM(_Factored, Qwen3MoeForCausalLM):
    """Qwen3MoeForCausalLM around a Qwen3MoeSVDModel."""

    config_class = Qwen3MoeSVDConfig

    def __init__(self, config):
        Qwen3MoePreTrainedModel.__init__(self, config)  # not Qwen3MoeForCausalLM's own, which builds a dense model
        self.model = Qwen3MoeSVDModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.num_experts, self.num_experts_per_tok = config.num_experts, config.num_experts_per_tok
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.post_init()


class Qwen3MoeSVDForSequenceClassification(_Factored, Qwen3MoeForSequenceClassification):
    """Qwen3MoeForSequenceClassification around a Qwen3MoeSVDModel."""

    config_class = Qwen3MoeSVDConfig

    def __init__(self, config):
        Qwen3MoePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = Qwen3MoeSVDModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class Qwen3MoeSVDForTokenClassification(_Factored, Qwen3MoeForTokenClassification):
    """Qwen3MoeForTokenClassification around a Qwen3MoeSVDModel."""

    config_class = Qwen3MoeSVDConfig

    def __init__(self, config):
        Qwen3MoePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = Qwen3MoeSVDModel(config)
        rates = [getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout")]
        self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.1))
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


# so that save_pretrained puts this file into the checkpoint even where the class was imported, not loaded through Auto*
Qwen3MoeSVDConfig.register_for_auto_class()
Qwen3MoeSVDModel.register_for_auto_class("AutoModel")
Qwen3MoeSVDForCausalLM.register_for_auto_class("AutoModelForCausalLM")
Qwen3MoeSVDForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
Qwen3MoeSVDForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
