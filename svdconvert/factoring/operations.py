"""What a step does with its tensors. One row of :data:`OPERATIONS` per kind of step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdconvert.errors import InputError
from svdconvert.factoring.decompositions import (
    load_decomposition,
    load_group,
    load_metric,
    load_outputs,
    load_second_moment,
)
from svdconvert.factoring.refit_files import load_refitted
from svdconvert.families.row import Section
from svdconvert.linalg.exact import factorize, truncate
from svdconvert.linalg.filtered import factorize_fast
from svdconvert.linalg.metrics import Metric, apply_metric
from svdconvert.linalg.panels import Workspace
from svdconvert.linalg.pivot import full_up, pivot, product, rounded_coefficients
from svdconvert.linalg.precision import refuse_overflow
from svdconvert.linalg.residual import relative_difference, relative_error
from svdconvert.linalg.results import Decomposition, Factors
from svdconvert.linalg.shared import SharedFactors, plain_shared, truncate_shared
from svdconvert.planning.steps import Step
from svdconvert.sentences import asked
from svdconvert.storage.reader import torch_dtype
from svdconvert.tensors import TensorInfo

# Value of a step's option -> what computes the factors.
_SOLVERS = {"exact": factorize, "fast": factorize_fast}

Operation = Callable[[Sequence[Tensor], Step, Workspace], tuple[list[Tensor], dict[str, Any]]]


def _factorize(inputs: Sequence[Tensor], step: Step, workspace: Workspace) -> tuple[list[Tensor], dict[str, Any]]:
    """W -> the tensors of its layout."""
    (weight,) = matrices(inputs, step)
    rank, solve = step.options["rank"], _SOLVERS[step.options.get("solver", "exact")]
    return _stored(weight, step, lambda dtype: solve(weight, rank, dtype, workspace), None, None)


def _truncate(inputs: Sequence[Tensor], step: Step, workspace: Workspace) -> tuple[list[Tensor], dict[str, Any]]:
    """W and its decomposition, computed beforehand -> the tensors of its layout."""
    (weight,) = matrices(inputs, step)
    file = Path(step.options["decomposition"])
    found, inner, outer = load_decomposition(file, weight.device)
    left, right = (outer, inner) if weight.shape[0] >= weight.shape[1] else (inner, outer)
    rank = step.options["rank"]
    tensors, report = _stored(
        weight, step, lambda dtype: truncate(weight, found, rank, dtype, workspace, left, right), left, right
    )
    return tensors, report | _cut_off(found, file, rank)


def _refitted(inputs: Sequence[Tensor], step: Step, workspace: Workspace) -> tuple[list[Tensor], dict[str, Any]]:
    """W and the tensors that a refit has made, with the decomposition it began from -> those tensors."""
    (weight,) = matrices(inputs, step)
    tensors, fit = load_refitted(Path(step.options["refitted"]))
    file = Path(step.options["decomposition"])
    found, _, _ = load_decomposition(file, torch.device("cpu"))
    cut = _cut_off(found, file, step.options["rank"])
    optimal = (cut["lost"] / cut["whole"]) ** 0.5 if cut["whole"] else 0.0
    error = relative_difference(weight.cpu(), stored_product(tensors))
    return tensors, _report(step, weight, error, optimal, str(found.basis.dtype)[6:]) | cut | {"refit": fit}


def _cut_off(found: Decomposition, file: Path, rank: int) -> dict[str, float]:
    """What a truncation loses and what there was, in the method's own metrics, and its error of the outputs.

    All of it is before rounding.
    """
    spectrum = found.spectrum
    told = {"lost": found.tail(rank) / found.scale**2, "whole": float(spectrum.sum())}
    losses = load_outputs(file)
    if losses is not None and float(losses[0]) > 0:
        told["output_error"] = float((losses[rank] / losses[0]).sqrt())
    return told


def _factorize_shared(
    inputs: Sequence[Tensor], step: Step, workspace: Workspace
) -> tuple[list[Tensor], dict[str, Any]]:
    """W of several layers -> one A and a B for each."""
    inputs = matrices(inputs, step)
    factors = plain_shared(inputs, None, step.options["rank"], torch_dtype(step.outputs[0].dtype), workspace)
    return [factors.down, *factors.ups], _group_report(inputs, factors, None)


def _truncate_shared(inputs: Sequence[Tensor], step: Step, workspace: Workspace) -> tuple[list[Tensor], dict[str, Any]]:
    """W of several layers and their decomposition, computed beforehand -> one A and a B for each."""
    inputs = matrices(inputs, step)
    rank, dtype, device = step.options["rank"], torch_dtype(step.outputs[0].dtype), inputs[0].device
    path = Path(step.options["decomposition"])
    metrics = [Path(metric) for metric in step.options["metrics"]]
    if not metrics:
        factors = plain_shared(inputs, load_decomposition(path, device)[0], rank, dtype, workspace)
        return [factors.down, *factors.ups], _group_report(inputs, factors, None)
    group = load_group(path, device)
    loads = [partial(load_metric, metric, device) for metric in metrics]
    factors = truncate_shared(inputs, group.found, rank, dtype, loads)
    report = _group_report(inputs, factors, group.captured)
    for layer, weight, up, metric in zip(report["layers"], inputs, factors.ups, metrics, strict=True):
        gram = load_second_moment(metric, device)
        if gram is not None:
            layer["output_error"] = relative_error(weight, up, factors.down, gram)
    return [factors.down, *factors.ups], report


def _group_report(inputs: Sequence[Tensor], factors: SharedFactors, captured: Tensor | None) -> dict[str, Any]:
    """Report of a group: what all have in common, and under ``layers`` what each has of its own.

    Args:
        inputs: the weights.
        factors: of them.
        captured: [layers, k], see :class:`svdconvert.linalg.shared.SharedDecomposition`; None without metrics.
    """
    energies = [float(torch.linalg.vector_norm(weight.double())) ** 2 for weight in inputs]
    losses = [energy * error**2 for energy, error in zip(energies, factors.relative_errors, strict=True)]
    rank = factors.down.shape[0]
    layers = []
    for i, (weight, error) in enumerate(zip(inputs, factors.relative_errors, strict=True)):
        # the loss that is known is that of the layer's own metrics; without any, that of the weights
        lost, whole = losses[i], energies[i]
        if captured is not None:
            lost, whole = float(captured[i, rank:].sum()), float(captured[i].sum())
        layers.append(
            {
                "shape": list(weight.shape),
                "relative_error": error,
                "optimal_error": (lost / whole) ** 0.5 if whole > 0 else 0.0,
                "energy_kept": 1 - error**2,
                "lost": lost,
                "whole": whole,
            }
        )
    error = (sum(losses) / sum(energies)) ** 0.5 if sum(energies) > 0 else 0.0
    return {"rank": rank, "relative_error": error, "precision": factors.precision, "layers": layers}


def matrices(stored: Sequence[Tensor], step: Step) -> Sequence[Tensor]:
    """[out, in] each, whichever way round the dense checkpoint has them; its own inverse."""
    return [tensor.T for tensor in stored] if step.options.get("transposed") else stored


def _stored(
    weight: Tensor, step: Step, solve: Callable[[torch.dtype], Factors], left: Metric, right: Metric
) -> tuple[list[Tensor], dict[str, Any]]:
    """Factors in the layout that the step asks for, and their report.

    Of the metric on the longer side the diagonal is enough.
    """
    dtype = torch_dtype(step.outputs[0].dtype)
    if step.options["layout"] == "balanced":
        factors = solve(dtype)
        return [factors.down, factors.up], balanced_report(step, weight, factors)
    factors = solve(torch.float64)
    exact = factors.up @ factors.down
    rows, _, position = pivot(factors.up, factors.down, dtype)
    span = int((factors.up.any(dim=0) & factors.down.any(dim=1)).sum())
    if right is not None and not bool(right.any()):  # it was left out of the truncation too
        right = None
    # Where only the diagonal of the inputs' metric is known, that the truncation is the best one is not to be seen in
    # it; but what rounding the rows has changed is.
    wanted = weight if weight.shape[0] >= weight.shape[1] else exact
    tensors = [rows, rounded_coefficients(wanted, rows, position, right, dtype, span), position]
    product_of_stored = stored_product(tensors)
    error = relative_difference(weight, product_of_stored)
    # without metrics both are told of the weights, and only their last digits can be the other way round
    optimal = min(factors.optimal_error, error) if left is None and right is None else factors.optimal_error
    lost = exact - product_of_stored
    added = float((apply_metric(left, apply_metric(right, lost.T).T) * lost).sum())
    told = {"rounding_excess": added / factors.metric_loss if factors.metric_loss > 0 else None}
    told |= _solver(step, factors)
    return tensors, _report(step, weight, error, optimal, factors.precision) | told


def balanced_report(step: Step, weight: Tensor, factors: Factors) -> dict[str, Any]:
    """What to record of a truncation in the balanced layout."""
    told = {"rounding_excess": factors.rounding_excess, "basis": factors.basis}
    told |= _solver(step, factors)
    return _report(step, weight, factors.relative_error, factors.optimal_error, factors.precision) | told


def _solver(step: Step, factors: Factors) -> dict[str, Any]:
    """Which solver the factors come from, where there was a choice."""
    if "solver" not in step.options:
        return {}
    if factors.certificate is None:
        return {"solver": "exact"}
    return {"solver": "filtered", "certificate": factors.certificate}


def _report(step: Step, weight: Tensor, error: float, optimal_error: float, precision: str) -> dict[str, Any]:
    return {
        "rank": step.options["rank"],
        "shape": list(weight.shape),
        "relative_error": error,
        "optimal_error": optimal_error,
        "energy_kept": 1 - error**2,
        "precision": precision,
    }


def stored_product(tensors: Sequence[Tensor]) -> Tensor:
    """The matrix that the tensors of a layout stand for: [m, n] float64."""
    down, up, *position = tensors
    return product(down, up, position[0]) if position else up.double() @ down.double()


def _multiply(inputs: Sequence[Tensor], step: Step, workspace: Workspace) -> tuple[list[Tensor], dict[str, Any]]:
    """The tensors of a layout -> W [m, n], multiplied in float32, or float64 for the pivoted layout."""
    down, up, *position = inputs
    dense = product(down, up, position[0]) if position else up.float() @ down.float()
    return list(matrices([dense.to(torch_dtype(step.outputs[0].dtype))], step)), {"rank": down.shape[0]}


def _join(inputs: Sequence[Tensor], step: Step, workspace: Workspace) -> tuple[list[Tensor], dict[str, Any]]:
    """The tensors of each part of a fused projection -> its weight or bias, every part at its place.

    The options tell for each part the step that makes it, how many of the inputs it takes, and its section.
    """
    (info,) = step.outputs
    fused = torch.empty(info.shape, dtype=torch_dtype(info.dtype), device=inputs[0].device)
    axis = len(info.shape) - 1 if step.options["transposed"] else 0
    left = list(inputs)
    for part in step.options["parts"]:
        own, left = left[: part["inputs"]], left[part["inputs"] :]
        if part["kind"] != "copy":
            inner = Step(part["kind"], step.key, (), step.outputs, part["options"])
            own, _ = OPERATIONS[part["kind"]](own, inner, workspace)
        Section(*part["section"]).put(own[0], fused, axis)
    return [fused], {}


def _extend(inputs: Sequence[Tensor], step: Step, workspace: Workspace) -> tuple[list[Tensor], dict[str, Any]]:
    """(tensors of a layout, A [q, n], B [m, q]) -> ([down; A], [up, s B]): a parallel LoRA becomes q more ranks.

    The scale is shared evenly between both, as the factors share their singular values.
    """
    down, up, *position, lora_a, lora_b = (t.float() if t.is_floating_point() else t for t in inputs)
    scale = float(step.options["scale"])
    root = abs(scale) ** 0.5
    sign = 1.0 if scale >= 0 else -1.0
    dtype = torch_dtype(step.outputs[0].dtype)
    if position:
        up = full_up(up, position[0]).float()
    wider, taller = torch.cat([down, root * lora_a]), torch.cat([up, sign * root * lora_b], dim=1)
    _refuse_overflow((wider, taller), dtype)
    tensors = list(pivot(taller, wider, dtype)) if position else [wider.to(dtype), taller.to(dtype)]
    return tensors, {"rank": wider.shape[0]}


def _extend_shared(inputs: Sequence[Tensor], step: Step, workspace: Workspace) -> tuple[list[Tensor], dict[str, Any]]:
    """(down, ups of N layers, A and B of some of them) -> down and ups with the ranks of all adapters.

    An adapter's columns are zeros in the layers that it does not change, so nothing is lost there either.
    """
    count = int(step.options["layers"])
    down, *rest = (tensor.float() for tensor in inputs)
    ups, pairs = [[up] for up in rest[:count]], iter(rest[count:])
    rows = [down]
    for index, scale in step.options["scales"]:
        lora_a, lora_b = next(pairs), next(pairs)
        root, sign = abs(scale) ** 0.5, 1.0 if scale >= 0 else -1.0
        rows.append(root * lora_a)
        for i, columns in enumerate(ups):
            own = sign * root * lora_b
            columns.append(own if i == index else own.new_zeros(columns[0].shape[0], own.shape[1]))
    dtype = torch_dtype(step.outputs[0].dtype)
    tensors = [torch.cat(rows), *(torch.cat(columns, dim=1) for columns in ups)]
    _refuse_overflow(tensors, dtype)
    return [tensor.to(dtype) for tensor in tensors], {"rank": tensors[0].shape[0]}


def _add(inputs: Sequence[Tensor], step: Step, workspace: Workspace) -> tuple[list[Tensor], dict[str, Any]]:
    """(W, A [q, n], B [m, q]) -> W + s B A, the usual merge of a LoRA into a dense weight."""
    weight, lora_a, lora_b = (tensor.float() for tensor in inputs)
    (matrix,) = matrices([weight], step)
    merged = torch.addmm(matrix, lora_b, lora_a, alpha=float(step.options["scale"]))
    dtype = torch_dtype(step.outputs[0].dtype)
    _refuse_overflow((merged,), dtype)
    return list(matrices([merged.to(dtype)], step)), {}


def _refuse_overflow(tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Refuse an adapter that is too large for the type that the model is stored in, or not finite itself."""
    for tensor in tensors:
        refuse_overflow(tensor.to(dtype), "it, with the adapter", "the adapter is damaged, or its lora_alpha too large")


OPERATIONS: Mapping[str, Operation] = {
    "factorize": _factorize,
    "truncate": _truncate,
    "factorize_shared": _factorize_shared,
    "truncate_shared": _truncate_shared,
    "refit": _refitted,
    "multiply": _multiply,
    "join": _join,
    "extend": _extend,
    "extend_shared": _extend_shared,
    "add": _add,
}


def run(step: Step, inputs: Sequence[Tensor], workspace: Workspace) -> tuple[list[Tensor], dict[str, Any]]:
    """Carry out a step.

    Args:
        step: any but ``copy``.
        inputs: its tensors, on the device that is to compute.
        workspace: buffers of the calling thread.

    Returns:
        The output tensors, contiguous on the CPU, and what to record about the step.

    Raises:
        InputError: a tensor has NaN or infinite entries, or does not fit its type; the message names it.
    """
    try:
        outputs, report = OPERATIONS[step.kind](inputs, step, workspace)
        for info, tensor in zip(step.outputs, outputs, strict=True):
            assert tuple(tensor.shape) == info.shape, (step.key, info, tensor.shape)
            refuse_overflow(tensor, info.name, f"choose another {asked('dtype')}")
    except InputError as error:
        raise InputError(f"tensor {step.key} cannot be converted: {error.sentence.marked}") from None
    return [tensor.contiguous().cpu() for tensor in outputs], report


def convert_piece(piece: Tensor, source: TensorInfo, target: TensorInfo) -> Tensor:
    """Bytes of a copied tensor, checked and in the type of the target.

    Args:
        piece: flat uint8 tensor holding whole elements of the source's type.
        source, target: the tensor before and after.

    Raises:
        InputError: it has NaN or infinite entries, or entries that the target's type cannot hold.
    """
    values = piece.view(torch_dtype(source.dtype))
    low, high = torch.aminmax(values) if values.numel() else (torch.zeros(()), torch.zeros(()))
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise InputError(f"tensor {source.name} has NaN or infinite entries; repair the source checkpoint")
    if source.dtype == target.dtype:
        return piece
    converted = values.to(torch_dtype(target.dtype))
    refuse_overflow(converted, f"tensor {source.name}", f"choose another {asked('dtype')}")
    return converted.view(torch.uint8)
