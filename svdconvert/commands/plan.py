"""What a conversion would do, from config and headers alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from svdconvert.layouts.table import DEFAULT_LAYOUT
from svdconvert.paths import path_or_text
from svdconvert.planning.fit import fitted
from svdconvert.planning.make import make_plan
from svdconvert.planning.plan import Plan
from svdconvert.settings.conversion import Conversion
from svdconvert.settings.size import INFERENCE
from svdconvert.solvers.table import DEFAULT_SOLVER
from svdconvert.storage.opening import open_source


def plan(
    model: str | os.PathLike[str],
    *,
    rank: int | Mapping[str, int] | None = None,
    keep: float | None = None,
    params: str | int | None = None,
    bytes: str | float | None = None,
    widths: str | Sequence[int] | None = None,
    fit: str | int | None = None,
    fit_context: int | None = None,
    fit_for: str = INFERENCE,
    targets: Sequence[str] = (),
    method: str | None = None,
    dtype: str = "keep",
    max_shard_size: str | int = "5GB",
    revision: str | None = None,
    factor_all: bool = False,
    rank_multiple: int = 1,
    layout: str = DEFAULT_LAYOUT.name,
    share_layers: int = 1,
    share_experts: bool = False,
    split_fused: bool = False,
    solver: str = DEFAULT_SOLVER.name,
) -> Plan:
    """What :func:`convert` would do, from config and headers alone.

    Args:
        model: local folder or GGUF file, ``owner/name`` on the Hub, or a short name such as ``polyglot-ko-3.8b``.
        rank: rank of every target, or pattern -> rank; the pattern ``*`` stands for all that no other names.
        keep: instead, the fraction of the target parameters to keep.
        params: instead, the parameters of the whole converted model, a number or ``1.4B``.
        bytes: instead, what the targets may take of their bytes in 16 bits, as a fraction below 1, or the size of all
            weight files, a whole number of bytes or ``90MB``. They are spent on ranks and bits together, by what a
            text says; the plan shows the same width for all matrices.
        widths: bits that ``bytes`` may store a weight in, as ``16,8,4`` or numbers; 16 is the model's own type. By
            default all that there are but 7. With ``rank``, ``keep`` or ``params``: the one width in which every target
            is stored, as a product or dense.
        fit: instead, the memory of a device, a number of bytes or ``8GB``: as ``bytes`` of what that leaves for
            weights, or for training as ``params``. A tenth is left free. Weights of few bits save memory where an
            engine computes with packed ones.
        fit_context: tokens of the one sequence that has to fit as well, with its cache of keys and values, or its
            activations; by default what the model reads, at most 4,096.
        fit_for: ``inference``, or ``training``, of all parameters by AdamW in float32.
        targets: patterns that choose among the linear layers; empty means all of them.
        method: row of :data:`svdconvert.methods.table.METHODS`, by default svd.
        dtype: ``keep``, ``float16``, ``bfloat16`` or ``float32``.
        max_shard_size: limit of a weight file, in bytes or as ``5GB``.
        revision: branch, tag or commit on the Hub.
        factor_all: factor also where that saves nothing.
        rank_multiple: every rank is a multiple of it, 8 or 64 say, as matrix kernels like them; ranks of a budget are
            rounded down, and a rank that is none is refused.
        layout: how the products are stored, see :func:`convert`.
        share_layers: consecutive layers that share the input-side factor of each kind of matrix, see :func:`convert`.
        share_experts: the experts of a layer share those of what reads hidden states, see :func:`convert`.
        split_fused: factor queries, keys and values that are one matrix as three, see :func:`convert`.
        solver: ``exact`` or ``fast``, see :func:`convert`.

    Raises:
        InputError: the model or the request cannot be used; the message says why.
    """
    keywords = dict(locals())  # the arguments, before anything else has a name here
    return plan_conversion(keywords.pop("model"), Conversion.of(**keywords))


def plan_conversion(model: str | os.PathLike[str], request: Conversion) -> Plan:
    """:func:`plan` of a typed request.

    Raises:
        InputError: the model or the request cannot be used; the message says why.
    """
    request.check_planned()
    source = open_source(path_or_text(model), request.hub.revision, need_weights=False)
    return make_plan(source, fitted(source, request))
