"""What a step does with its tensors. One row of :data:`OPERATIONS` per kind of step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from svdconvert.factoring.matrix_report import GroupReport, MatrixReport, PlainReport, RoundedReport
from svdconvert.factoring.refit_files import load_refitted
from svdconvert.factoring.rounding import MeteredMatrix, stored
from svdconvert.families.row import Section
from svdconvert.grids import Grid
from svdconvert.layouts.row import Layout
from svdconvert.layouts.table import layout_named
from svdconvert.linalg.exact import truncate
from svdconvert.linalg.feedback import SWEEPS
from svdconvert.linalg.metrics import Metric
from svdconvert.linalg.panels import Workspace
from svdconvert.linalg.precision import refuse_overflow
from svdconvert.linalg.residual import relative, relative_difference, relative_error
from svdconvert.linalg.results import Decomposition, Factors, Truncation
from svdconvert.linalg.shared import SharedFactors, plain_shared, truncate_shared
from svdconvert.planning.steps import Step
from svdconvert.sentences import asked
from svdconvert.solvers.table import DEFAULT_SOLVER, SOLVERS
from svdconvert.storage.reader import TensorsInTurn, Turned, torch_dtype
from svdconvert.storage.tensor_files import read_tensors
from svdconvert.tensors import DTYPES, FLOATS, TensorInfo

# What an operation gives: the output tensors, and what it has to report.
Done = tuple[list[Tensor], MatrixReport | RoundedReport | PlainReport]
Operation = Callable[[Sequence[Tensor], Step, Workspace], Done]
# What takes output tensors one after the other, and an operation that hands them on as they are made, and asks for its
# matrices one after the other too.
Give = Callable[[Tensor], None]
InTurn = Callable[[Sequence[Tensor], Step, Workspace, Give], GroupReport]


def _factorize(inputs: Sequence[Tensor], step: Step, workspace: Workspace) -> Done:
    """W -> the tensors of its layout."""
    (weight,) = matrices(inputs, step)
    rank, solve = step.options["rank"], SOLVERS[step.options.get("solver", DEFAULT_SOLVER.name)].factorize
    return _truncated(weight, step, lambda dtype: solve(weight, rank, dtype, workspace))


def _truncate(inputs: Sequence[Tensor], step: Step, workspace: Workspace) -> Done:
    """W and its decomposition, computed beforehand -> the tensors of its layout."""
    (weight,) = matrices(inputs, step)
    file, rank = Path(step.options["decomposition"]), step.options["rank"]
    found, inner, outer = load_decomposition(file, weight.device)
    left, right = (outer, inner) if weight.shape[0] >= weight.shape[1] else (inner, outer)
    tensors, report = _truncated(
        weight, step, lambda dtype: truncate(weight, found, rank, dtype, workspace, left, right), left, right
    )
    return tensors, replace(report, **_cut_off(found, file, rank))


def _refitted(inputs: Sequence[Tensor], step: Step, workspace: Workspace) -> Done:
    """W and the tensors that a refit has made, with the decomposition it began from -> those tensors."""
    (weight,) = matrices(inputs, step)
    tensors, fit = load_refitted(Path(step.options["refitted"]))
    file, rank = Path(step.options["decomposition"]), step.options["rank"]
    found, _, _ = load_decomposition(file, torch.device("cpu"))
    cut = _cut_off(found, file, rank)
    report = MatrixReport(
        rank=rank,
        shape=(weight.shape[0], weight.shape[1]),
        relative_error=relative_difference(weight.cpu(), layout_of_step(step).product(tensors)),
        optimal_error=relative(cut["lost"], cut["whole"]),
        precision=found.precision,
        refit=fit,
        **cut,
    )
    return tensors, report


def _rounded(inputs: Sequence[Tensor], step: Step, workspace: Workspace) -> Done:
    """W, its decomposition and both metrics -> its weights of few bits, as one matrix or as a product."""
    (weight,) = inputs
    rank, grids = step.options["rank"], grids_of_step(step)
    code = next(info.dtype for info in step.outputs if info.dtype in FLOATS)
    matrix = MeteredMatrix(weight, Path(step.options["decomposition"]), torch_dtype(code), workspace, SWEEPS)
    found = matrix.rounded(rank, grids)
    tensors, lost, whole = stored(found, grids), max(found.loss, 0.0), float(matrix.found.spectrum.sum())
    told: dict[str, Any] = {
        "shape": (weight.shape[0], weight.shape[1]),
        "bits": [8 * DTYPES[code][0] if grid is None else grid.bits for grid in grids],
        "groups": [0 if grid is None else grid.group for grid in grids],
        "relative_error": relative_difference(weight, found.product()),
        "whole": whole,
        "lost": lost,
    }
    if rank is None:
        return tensors, RoundedReport(**told)
    tail = matrix.tail(rank)
    return tensors, MatrixReport(
        rank=rank,
        optimal_error=relative(tail, whole),
        precision=matrix.found.precision,
        rounding_excess=(lost - tail) / tail if tail > 0 else None,
        basis=found.way,
        **told,
    )


def _cut_off(found: Decomposition, file: Path, rank: int) -> dict[str, Any]:
    """Of a report: what a truncation loses and what there was, in the method's metrics, and its error of the outputs.

    All of it is before rounding.
    """
    told = {"lost": found.tail(rank) / found.scale**2, "whole": float(found.spectrum.sum())}
    losses = load_outputs(file)
    if losses is not None and float(losses[0]) > 0:
        told["output_error"] = float((losses[rank] / losses[0]).sqrt())
    return told


def _factorize_shared(weights: Sequence[Tensor], step: Step, workspace: Workspace, give: Give) -> GroupReport:
    """W of several layers -> one A and a B for each."""
    rank, dtype = step.options["rank"], torch_dtype(step.outputs[0].dtype)
    return _given(weights, plain_shared(weights, None, rank, dtype, workspace, tall=_is_tall(step)), give)


def _truncate_shared(weights: Sequence[Tensor], step: Step, workspace: Workspace, give: Give) -> GroupReport:
    """W of several layers and their decomposition, computed beforehand -> one A and a B for each."""
    rank, dtype, device = step.options["rank"], torch_dtype(step.outputs[0].dtype), weights[0].device
    path, tall = Path(step.options["decomposition"]), _is_tall(step)
    metrics = [Path(metric) for metric in step.options["metrics"]]
    if not metrics:
        found, _, _ = load_decomposition(path, device)
        return _given(weights, plain_shared(weights, found, rank, dtype, workspace, tall=tall), give)
    group = load_group(path, device)
    loads = [partial(load_metric, metric, device) for metric in metrics]
    factors = truncate_shared(weights, group.found, rank, dtype, loads, tall=tall)
    moments = [partial(load_second_moment, metric, device) for metric in metrics]
    return _given(weights, factors, give, group.captured, moments)


def _is_tall(step: Step) -> bool:
    """Whether the matrices of a group, stacked, have at least as many rows as columns."""
    down, *ups = step.outputs
    return sum(up.shape[0] for up in ups) >= down.shape[1]


def _given(
    weights: Sequence[Tensor],
    factors: SharedFactors,
    give: Give,
    captured: Tensor | None = None,
    moments: Sequence[Callable[[], Tensor | None]] | None = None,
) -> GroupReport:
    """Hand on the factors of a group, one after the other, and report of them.

    Args:
        weights: of its layers.
        factors: of them.
        give: takes the factors.
        captured: [layers, k], see :class:`svdconvert.linalg.shared.SharedDecomposition`; None without metrics.
        moments: load the second moment of each layer's inputs, where there is one.
    """
    down, layers, left, energy = factors.down, [], 0.0, 0.0
    rank = down.shape[0]
    give(down)
    for i, own in enumerate(factors.own):
        give(own.up)
        # the loss that is known is that of the layer's own metrics; without any, that of the weights
        lost, whole = own.loss, own.energy
        if captured is not None:
            lost, whole = float(captured[i, rank:].sum()), float(captured[i].sum())
        weight, moment = weights[i], None if moments is None else moments[i]()
        layers.append(
            MatrixReport(
                rank=rank,
                shape=(weight.shape[0], weight.shape[1]),
                relative_error=relative(own.loss, own.energy),
                optimal_error=relative(lost, whole),
                precision=factors.precision,
                lost=lost,
                whole=whole,
                output_error=None if moment is None else relative_error(weight, own.up, down, moment),
            )
        )
        left, energy = left + own.loss, energy + own.energy
    return GroupReport(relative_error=relative(left, energy), layers=tuple(layers))


def matrices(stored: Sequence[Tensor], step: Step) -> Sequence[Tensor]:
    """[out, in] each, whichever way round the dense checkpoint has them; its own inverse."""
    return Turned(stored) if step.options.get("transposed") else stored


def grids_of_step(step: Step) -> list[Grid | None]:
    """Of each weight that a rounding step makes, its grid; None for one in a floating type."""
    return [None if grid is None else Grid(*grid) for grid in step.options["grids"]]


def layout_of_step(step: Step) -> Layout:
    """The layout of the tensors that a step makes or reads."""
    return layout_named(step.options["layout"])


def _truncated(
    weight: Tensor,
    step: Step,
    solve: Callable[[torch.dtype], Factors],
    left: Metric = None,
    right: Metric = None,
) -> tuple[list[Tensor], MatrixReport]:
    """A truncation in the layout that the step asks for.

    Of the metric on the longer side the diagonal is enough.
    """
    found = layout_of_step(step).truncate(weight, solve, torch_dtype(step.outputs[0].dtype), left, right)
    return found.tensors, matrix_report(step, weight, found)


def matrix_report(step: Step, weight: Tensor, found: Truncation) -> MatrixReport:
    """What to record of a truncation.

    Args:
        step: that made it.
        weight: the matrix, [m, n].
        found: the truncation.
    """
    solver = "exact" if found.certificate is None else "filtered"
    return MatrixReport(
        rank=step.options["rank"],
        shape=(weight.shape[0], weight.shape[1]),
        relative_error=found.relative_error,
        optimal_error=found.optimal_error,
        precision=found.precision,
        rounding_excess=found.rounding_excess,
        basis=found.basis,
        solver=solver if "solver" in step.options else None,  # where there was a choice
        certificate=found.certificate,
    )


def _healed(inputs: Sequence[Tensor], step: Step, workspace: Workspace) -> Done:
    """Stored tensors -> the same, with what training has left of those that were trained; all else is unchanged."""
    factors = read_tensors(Path(step.options["file"]), step.options["factors"])
    # By the names of what is read: a model that sees has others in files. And copies of what was not trained, since the
    # inputs lie in a buffer that the next step's are read into.
    outputs = [
        factors[info.name] if info.name in factors else tensor.clone()
        for info, tensor in zip(step.inputs, inputs, strict=True)
    ]
    return outputs, PlainReport(rank=step.options.get("rank"))


def _multiply(inputs: Sequence[Tensor], step: Step, workspace: Workspace) -> Done:
    """The tensors of a layout -> W [m, n]."""
    dense = layout_of_step(step).dense(inputs).to(torch_dtype(step.outputs[0].dtype))
    return list(matrices([dense], step)), PlainReport(rank=inputs[0].shape[0])


def _join(inputs: Sequence[Tensor], step: Step, workspace: Workspace) -> Done:
    """The tensors of each part of a fused projection -> its weight or bias, every part at its place.

    The options tell for each part the step that makes it, how many of the inputs it takes, and its section.
    """
    (info,) = step.outputs
    fused = torch.empty(info.shape, dtype=torch_dtype(info.dtype), device=inputs[0].device)
    axis = len(info.shape) - 1 if step.options["transposed"] else 0
    left = list(inputs)
    for part in step.options["parts"]:
        own, left = left[: part["inputs"]], left[part["inputs"] :]
        Section(*part["section"]).put(_part(own, part, step, workspace), fused, axis)
    return [fused], PlainReport()


def _stack(inputs: Sequence[Tensor], step: Step, workspace: Workspace) -> Done:
    """The tensors of each expert -> the stack of their matrices, or of their biases.

    The options tell whether matrices are stacked as [in, out], and for each expert the step that makes its part, and
    how many of the inputs it takes.
    """
    (info,) = step.outputs
    stack = torch.empty(info.shape, dtype=torch_dtype(info.dtype), device=inputs[0].device)
    left = list(inputs)
    for place, part in zip(stack, step.options["parts"], strict=True):
        own, left = left[: part["inputs"]], left[part["inputs"] :]
        if place.dim() == 1:
            place.copy_(own[0])
            continue
        matrix = _part(own, part, step, workspace)
        place.copy_(matrix.mT if step.options["transposed"] else matrix)
    return [stack], PlainReport()


def _part(inputs: Sequence[Tensor], part: Mapping[str, Any], step: Step, workspace: Workspace) -> Tensor:
    """A part of what a step makes, as its options tell."""
    if part["kind"] == "copy":
        return inputs[0]
    inner = Step(part["kind"], step.key, (), step.outputs, part["options"])
    (made,), _ = OPERATIONS[part["kind"]](inputs, inner, workspace)
    return made


def _extend(inputs: Sequence[Tensor], step: Step, workspace: Workspace) -> Done:
    """(tensors of a layout, A [q, n], B [m, q]) -> those of [up, s B] [down; A]: a parallel LoRA becomes q more ranks.

    The scale is shared evenly between both, as the factors share their singular values.
    """
    *stored, lora_a, lora_b = inputs
    layout, dtype = layout_of_step(step), torch_dtype(step.outputs[0].dtype)
    up, down = (factor.float() for factor in layout.factors(stored))
    inner, outer = _halves(float(step.options["scale"]), lora_a, lora_b)
    wider, taller = torch.cat([down, inner]), torch.cat([up, outer], dim=1)
    _refuse_overflow((wider, taller), dtype)
    return layout.store(taller, wider, dtype), PlainReport(rank=wider.shape[0])


def _halves(scale: float, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of an adapter in float32, each with its half of the scale."""
    root, sign = abs(scale) ** 0.5, 1.0 if scale >= 0 else -1.0
    return root * lora_a.float(), sign * root * lora_b.float()


def _extend_shared(inputs: Sequence[Tensor], step: Step, workspace: Workspace) -> Done:
    """(down, ups of N layers, A and B of some of them) -> down and ups with the ranks of all adapters.

    An adapter's columns are zeros in the layers that it does not change, so nothing is lost there either.
    """
    count = int(step.options["layers"])
    down, *rest = (tensor.float() for tensor in inputs)
    ups, pairs = [[up] for up in rest[:count]], iter(rest[count:])
    rows = [down]
    for index, scale in step.options["scales"]:
        lora_a, lora_b = next(pairs), next(pairs)
        inner, outer = _halves(scale, lora_a, lora_b)
        rows.append(inner)
        for i, columns in enumerate(ups):
            columns.append(outer if i == index else outer.new_zeros(columns[0].shape[0], outer.shape[1]))
    dtype = torch_dtype(step.outputs[0].dtype)
    tensors = [torch.cat(rows), *(torch.cat(columns, dim=1) for columns in ups)]
    _refuse_overflow(tensors, dtype)
    return [tensor.to(dtype) for tensor in tensors], PlainReport(rank=tensors[0].shape[0])


def _add(inputs: Sequence[Tensor], step: Step, workspace: Workspace) -> Done:
    """(W, A [q, n], B [m, q]) -> W + s B A, the usual merge of a LoRA into a dense weight."""
    weight, lora_a, lora_b = (tensor.float() for tensor in inputs)
    (matrix,) = matrices([weight], step)
    merged = torch.addmm(matrix, lora_b, lora_a, alpha=float(step.options["scale"]))
    dtype = torch_dtype(step.outputs[0].dtype)
    _refuse_overflow((merged,), dtype)
    return list(matrices([merged.to(dtype)], step)), PlainReport()


def _refuse_overflow(tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Refuse an adapter that is too large for the type that the model is stored in, or not finite itself."""
    for tensor in tensors:
        refuse_overflow(tensor.to(dtype), "it, with the adapter", "the adapter is damaged, or its lora_alpha too large")


OPERATIONS: Mapping[str, Operation] = {
    "factorize": _factorize,
    "truncate": _truncate,
    "refit": _refitted,
    "round": _rounded,
    "healed": _healed,
    "multiply": _multiply,
    "join": _join,
    "stack": _stack,
    "extend": _extend,
    "extend_shared": _extend_shared,
    "add": _add,
}

# Steps of layers that share a factor. What they have in memory does not depend on how many layers there are.
IN_TURN: Mapping[str, InTurn] = {"factorize_shared": _factorize_shared, "truncate_shared": _truncate_shared}


def run(step: Step, inputs: Sequence[Tensor], workspace: Workspace) -> tuple[list[Tensor], dict[str, Any]]:
    """Carry out a step.

    Args:
        step: any but ``copy``.
        inputs: its tensors, on the device that is to compute.
        workspace: buffers of the calling thread.

    Returns:
        The output tensors, contiguous on the CPU, and what the journal keeps about the step, in JSON types.

    Raises:
        InputError: a tensor has NaN or infinite entries, or does not fit its type; the message names it.
    """
    outputs: list[Tensor] = []
    if step.kind in IN_TURN:
        return outputs, run_in_turn(step, inputs, workspace, outputs.append)
    with _naming(lambda: step.key):
        made, report = OPERATIONS[step.kind](inputs, step, workspace)
        for info, tensor in zip(step.outputs, made, strict=True):
            outputs.append(_checked(step, info, tensor))
    return outputs, report.to_json()


def run_in_turn(step: Step, inputs: Sequence[Tensor], workspace: Workspace, give: Give) -> dict[str, Any]:
    """Carry out a step of :data:`IN_TURN`.

    Args:
        step: of layers that share a factor.
        inputs: its tensors, on the device that is to compute, each valid until the next is asked for.
        workspace: buffers of the calling thread.
        give: takes its output tensors in their order, contiguous on the CPU.

    Returns, raises:
        As :func:`run`.
    """
    places = iter(step.outputs)

    def take(made: Tensor) -> None:
        give(_checked(step, next(places), made))

    def name() -> str:
        return step.inputs[inputs.place].name if isinstance(inputs, TensorsInTurn) else step.key

    with _naming(name):
        return IN_TURN[step.kind](matrices(inputs, step), step, workspace, take).to_json()


@contextmanager
def _naming(name: Callable[[], str]) -> Iterator[None]:
    """Say which tensor an InputError is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"tensor {name()} cannot be converted: {error.sentence.marked}") from None


def _checked(step: Step, info: TensorInfo, tensor: Tensor) -> Tensor:
    """An output tensor of a step, contiguous on the CPU."""
    assert tuple(tensor.shape) == info.shape, (step.key, info, tensor.shape)
    refuse_overflow(tensor, info.name, f"choose another {asked('dtype')}")
    return tensor.contiguous().cpu()


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
