"""The rules that every request must meet, whatever the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from svdconvert.errors import InputError
from svdconvert.layouts.table import layout_named
from svdconvert.methods.table import METHODS, Method
from svdconvert.sentences import asked
from svdconvert.settings.afterwards import Afterwards
from svdconvert.settings.hub import Hub
from svdconvert.settings.output import DTYPES, Output
from svdconvert.settings.recipe import ALLOCATIONS, REFITS, Recipe
from svdconvert.settings.row import unknown
from svdconvert.settings.runtime import Runtime
from svdconvert.settings.scope import Scope
from svdconvert.settings.size import Size
from svdconvert.settings.text import Stats, Text
from svdconvert.solvers.table import SOLVERS


class Request(Protocol):
    """What the rules read of a :class:`svdconvert.settings.conversion.Conversion`."""

    @property
    def size(self) -> Size: ...
    @property
    def scope(self) -> Scope: ...
    @property
    def recipe(self) -> Recipe: ...
    @property
    def calibration(self) -> Text | Stats | None: ...
    @property
    def afterwards(self) -> Afterwards: ...
    @property
    def output(self) -> Output: ...
    @property
    def runtime(self) -> Runtime: ...
    @property
    def hub(self) -> Hub: ...
    @property
    def method(self) -> Method: ...
    @property
    def options(self) -> Mapping[str, float]: ...
    @property
    def allocation(self) -> str: ...


Rule = Callable[[Request], None]


def size(request: Request) -> None:
    """A size is given, and only one."""
    request.size.check()


def method(request: Request) -> None:
    """The method is known, and reads the settings that are given for it."""
    _ = request.options


def allocation(request: Request) -> None:
    """The allocation is known, and has ranks to choose."""
    chosen = request.recipe.allocation
    if chosen is not None:
        _known("allocation", chosen, ALLOCATIONS)
    if chosen not in (None, "uniform") and request.size.patterns:
        raise InputError(
            f"{asked('allocation', chosen)} chooses the ranks itself; give {asked('keep')}, {asked('params')}, or a "
            f"{asked('rank')} without patterns"
        )


def refit(request: Request) -> None:
    """The refit is known, goes with single matrices only, and keeps what a size promises."""
    chosen = request.recipe.refit
    _known("refit", chosen, REFITS)
    if chosen != "none" and request.size.max_kl is not None:
        raise InputError(
            f"{asked('refit', chosen)} is judged by the loss and might exceed {asked('max_kl', request.size.max_kl)}; "
            f"give {asked('max_loss')}, or leave one of them out"
        )
    if chosen != "none" and request.scope.shared:
        named = "share_layers" if request.scope.share_layers != 1 else "share_experts"
        raise InputError(f"{asked('refit', chosen)} does not go with {asked(named)}; leave one of them out")


def text(request: Request) -> None:
    """A text is given where one is needed, and nowhere else."""
    row, given = request.method, request.calibration is not None
    users = _users_of_the_text(request)
    for words in users:
        if not given:
            raise InputError(f"{words} needs a text; give one as {asked('calibration')}")
    healed = request.afterwards.heal and request.afterwards.text is None
    if given and not users and not healed:
        word = "stats" if isinstance(request.calibration, Stats) else "calibration"
        raise InputError(
            f"{asked(word)} has no effect on {asked('method', row.name)}, which uses the weights alone; leave it out"
        )


def reads_text(request: Request) -> bool:
    """Whether a conversion reads a text; healing aside."""
    return bool(_users_of_the_text(request))


def healing(request: Request) -> None:
    """There is a text to heal on, and nothing is said of a healing that is not asked for."""
    request.afterwards.check(request.calibration)


def _users_of_the_text(request: Request) -> list[str]:
    """What a request asks for that reads a text."""
    row, refitted, limit = request.method, request.recipe.refit, request.size.limit
    users = {
        **({asked(*request.size.given): True} if request.size.in_bytes else {}),
        asked("method", row.name): bool(row.statistics),
        asked("refit", refitted): refitted != "none",
        asked("allocation", "measured"): request.allocation == "measured",
        **({} if limit is None else {asked(*limit): True}),
    }
    return [words for words, reads in users.items() if reads]


def parts(request: Request) -> None:
    """The statistics can be had for parts of fused projections; a Fisher vector sums over all outputs of a layer."""
    row = request.method
    if request.scope.split_fused and isinstance(request.calibration, Stats) and "fisher" in row.statistics:
        raise InputError(
            f"{asked('method', row.name)} with {asked('split_fused')} needs the text itself, {asked('calibration')}, "
            "and no other method beside it: collected statistics have the Fisher information of whole layers only"
        )


def solver(request: Request) -> None:
    """The solver is known, and the fast one is for plain truncations of single matrices."""
    chosen = request.recipe.solver
    _known("solver", chosen, tuple(SOLVERS))
    if not SOLVERS[chosen].single_plain_only:
        return
    others = (
        (bool(request.method.statistics), asked("method", request.method.name)),
        (bool(request.scope.shared), request.scope.shared),
        (request.allocation != "uniform", asked("allocation", request.allocation)),
        (request.size.limit is not None, asked(*(request.size.limit or ("max_loss",)))),
        (request.recipe.refit != "none", asked("refit", request.recipe.refit)),
        (request.size.rounds, asked(*request.size.rounded_by)),
        (request.runtime.keeps, f"{asked('work')} or {asked('keep_work')}"),
    )
    other = next((words for given, words in others if given), None)
    if other:
        raise InputError(
            f"{asked('solver', chosen)} is for plain SVD of single matrices and does not go with {other}; leave one "
            "of them out"
        )


def bits(request: Request) -> None:
    """Few bits are for single matrices in two plain factors; bytes are spent by the loss that a method estimates."""
    if not request.size.rounds:
        return
    given, in_bytes = asked(*request.size.rounded_by), request.size.in_bytes
    others = (
        (bool(request.scope.shared), request.scope.shared),
        (request.scope.split_fused, asked("split_fused", True)),
        (request.recipe.refit != "none", asked("refit", request.recipe.refit)),
        (in_bytes and request.recipe.allocation == "uniform", asked("allocation", request.recipe.allocation)),
        (not layout_named(request.recipe.layout).two_factors, asked("layout", request.recipe.layout)),
    )
    other = next((words for given, words in others if given), None)
    if other is not None:
        raise InputError(f"{given} does not go with {other}; leave one of them out")
    if in_bytes and not request.method.in_loss:
        good = next(row.name for row in METHODS.values() if row.in_loss)
        raise InputError(
            f"{given} compares matrices by the loss that each would add, which "
            f"{asked('method', request.method.name)} does not estimate; use {asked('method', good)}"
        )


def work(request: Request) -> None:
    """Decompositions are kept in one place."""
    if request.runtime.keep_work and request.runtime.work is not None:
        raise InputError(
            f"give either {asked('keep_work')}, which keeps decompositions beside the result, or {asked('work')}"
        )


def upload(request: Request) -> None:
    """What is said of an upload is said of one that is asked for."""
    hub = request.hub
    if hub.push_to is None and (hub.private or hub.push_revision is not None):
        field = asked("private", True) if hub.private else asked("hub_revision", hub.push_revision)
        raise InputError(f"{field} has no effect without {asked('push_to_hub')}; give the repository as well")


def dtype(request: Request) -> None:
    """The type is one that models are stored in."""
    _known("dtype", request.output.dtype, DTYPES)


def layout(request: Request) -> None:
    """The layout is known."""
    layout_named(request.recipe.layout)


def planned_size(request: Request) -> None:
    """The size is known before anything is measured."""
    if request.size.limit is not None:
        raise InputError(
            f"a plan cannot know the size that {asked(*request.size.limit)} leads to, since it has to be measured; "
            f"plan {asked('keep')} or {asked('params')}"
        )


def sharing(request: Request) -> None:
    """So many layers can share, in this layout."""
    layers, stored = request.scope.share_layers, layout_named(request.recipe.layout)
    if layers < 1:
        raise InputError(f"{asked('share_layers', layers)} is too small; the least is 1, which shares nothing")
    if layers > 1 and request.scope.share_experts:
        raise InputError(
            f"{asked('share_layers', layers)} does not go with {asked('share_experts', True)}; leave one of them out"
        )
    if request.scope.shared and not stored.two_factors:
        raise InputError(
            f"{request.scope.shared} does not go with {asked('layout', stored.name)}, which keeps rows of "
            f"each single matrix; use {asked('layout', 'balanced')}"
        )


# In the order in which they are tried. Those that a plan depends on:
PLANNED: Sequence[Rule] = (
    *(size, planned_size, method, allocation, refit, bits, healing),
    *(solver, dtype, layout, sharing),
)
# Those of `svdconvert spectrum`, which has no size:
METHOD: Sequence[Rule] = (method, layout, text, parts)
ALL: Sequence[Rule] = (
    *(size, method, allocation, refit, bits, healing, text, parts),
    *(solver, work, upload, dtype, layout, sharing),
)


def check(request: Request, rules: Sequence[Rule]) -> None:
    """Try rules in order.

    Raises:
        InputError: the request breaks one.
    """
    for rule in rules:
        rule(request)


def _known(field: str, value: Any, words: Sequence[str]) -> None:
    if value not in words:
        raise unknown(field, value, words)
