"""Streams of a GPU, on a machine without one: torch.cuda is replaced by a book of what is done in which order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.results import products

# Before torch.cuda is replaced: what transformers imports with a model names torch's types as it is loaded.
from transformers import GPTNeoXForCausalLM  # noqa: F401

from svdconvert import convert
from svdconvert.factoring import stacks as units
from svdconvert.machine import lanes
from svdconvert.machine.lanes import Lanes, lanes_of

DEVICE = torch.device("cuda")


class Book:
    """Streams and events by number, and what was done with them; no work is ever late here."""

    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []
        self.made = self.events = 0
        self.waited: set[int] = set()
        self.here = threading.local()

    def write(self, *line: Any) -> None:
        self.lines.append(line)

    @property
    def current(self) -> Stream:
        return getattr(self.here, "stream", None) or Stream(self, 0)


class Event:
    def __init__(self, book: Book, number: int) -> None:
        self.book, self.number = book, number

    def synchronize(self) -> None:
        self.book.waited.add(self.number)
        self.book.write("host waits", self.number)


class Stream:
    def __init__(self, book: Book, number: int) -> None:
        self.book, self.number = book, number

    def record_event(self) -> Event:
        self.book.events += 1
        self.book.write("event", self.number, self.book.events)
        return Event(self.book, self.book.events)

    def wait_event(self, event: Event) -> None:
        self.book.write("waits", self.number, event.number)


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> Book:
    """What was done; tensors stay on the CPU."""
    book = Book()

    def new_stream(device: torch.device) -> Stream:
        assert device == DEVICE
        book.made += 1
        return Stream(book, book.made)

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before = getattr(book.here, "stream", None)
        book.here.stream = stream
        yield
        book.here.stream = before

    class Reentrant:
        def __init__(self, stream: Stream) -> None:
            self.stream, self.entered = stream, []

        def __enter__(self) -> None:
            self.entered.append(on(self.stream))
            self.entered[-1].__enter__()

        def __exit__(self, *exception: object) -> None:
            self.entered.pop().__exit__(*exception)

    real_to: Callable[..., torch.Tensor] = torch.Tensor.to
    real_copy: Callable[..., torch.Tensor] = torch.Tensor.copy_
    real_empty: Callable[..., torch.Tensor] = torch.empty
    real_eye: Callable[..., torch.Tensor] = torch.eye

    def to(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if args and args[0] == DEVICE:
            book.write("copy in", book.current.number, options.get("non_blocking"))
            return tensor.clone()
        return real_to(tensor, *args, **options)

    def copy_(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if non_blocking:
            book.write("copy out", book.current.number)
        return real_copy(target, source)

    def empty(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            book.write("pinned")
        return real_empty(*args, **options)

    # what is there before there are streams
    monkeypatch.setattr(torch, "eye", lambda size, device=None, **options: real_eye(size, **options))
    monkeypatch.setattr(torch.cuda, "Stream", new_stream)
    monkeypatch.setattr(torch.cuda, "stream", Reentrant)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: book.current)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: book.write("belongs to", stream.number), raising=False
    )
    return book


def test_in_order(book: Book) -> None:
    ways = lanes_of(DEVICE)
    assert ways.ahead == 1
    staged = ways.staging(64)
    assert (staged.dtype, staged.shape) == (torch.uint8, (64,))
    assert book.lines.pop(0) == ("pinned",)
    coming = ways.upload([staged, staged])
    with ways.worker():  # stream 3, after those of the copies
        (one, _) = coming.take()
        leaving = ways.download([one])
    coming.wait()
    (back,) = leaving.wait()
    assert back.shape == staged.shape
    assert book.lines == [
        ("copy in", 1, True),
        ("copy in", 1, True),
        ("event", 1, 1),
        ("waits", 3, 1),
        ("belongs to", 3),
        ("belongs to", 3),
        ("event", 3, 2),
        ("waits", 2, 2),
        ("pinned",),
        ("copy out", 2),
        ("belongs to", 2),
        ("event", 2, 3),
        ("host waits", 1),
        ("host waits", 3),
    ]


def test_every_worker_has_a_stream(book: Book) -> None:
    ways = lanes_of(DEVICE)
    one, other = ways.worker(), ways.worker()
    for lane, number in ((one, 3), (other, 4), (one, 3)):
        with lane:
            assert book.current.number == number
    assert book.current.number == 0


@pytest.mark.parametrize("workers", [1, 3])
def test_a_conversion(workers: int, dense: Path, book: Book, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stacks, begun ahead, on streams; the tensors are the CPU's, and so is the result, but for rounding."""
    convert(dense, tmp_path / "plain", rank=20, device="cpu", check=False)
    monkeypatch.setattr("svdconvert.jobs.pipeline.lanes_of", lambda device: lanes._CudaLanes(DEVICE))
    monkeypatch.setattr("svdconvert.jobs.pipeline.in_units", lambda steps, device: units.in_units(steps, DEVICE))
    begun: list[int] = []
    real = units.begin_stack

    def begin_stack(unit: Any, inputs: Any, workspace: Any, ways: Lanes) -> Any:
        begun.append(len(unit))
        return real(unit, inputs, workspace, ways)

    monkeypatch.setattr("svdconvert.factoring.stacks.begin_stack", begin_stack)
    monkeypatch.setattr(
        "svdconvert.factoring.stacks.is_stacked", lambda step, device: units._stack_key(step) is not None
    )
    convert(dense, tmp_path / "lanes", rank=20, device="cpu", check=False, workers=workers)
    assert begun == [3, 3, 3, 3]  # three layers, four kinds of matrices
    first, second = products(tmp_path / "plain"), products(tmp_path / "lanes")
    for name, product in first.items():
        assert torch.allclose(product, second[name], atol=3e-3 * float(product.abs().max())), name
    arrivals = [line[2] for line in book.lines if line[:2] == ("event", 1)]
    results = [line[2] for line in book.lines if line[:2] == ("event", 2)]
    assert len(arrivals) == len(results) == 4
    assert book.waited == {*arrivals, *results}
    for arrival in arrivals:  # the buffer is used again only after its copy was over
        waits = [i for i, line in enumerate(book.lines) if line[0] == "waits" and line[2] == arrival]
        host = book.lines.index(("host waits", arrival))
        assert len(waits) == 1
        assert waits[0] < host
