"""Products by oneDNN: the same as torch's to rounding, forward and backward, of any layout."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from svdconvert.machine import products
from svdconvert.machine.products import fast_products, multiplied_by, multiply

CPU = torch.device("cpu")

# The same matrix by rows, by columns, and with gaps between its rows.
LAYOUTS = [lambda x: x, lambda x: x.T.contiguous().T, lambda x: torch.cat([x, x], 1)[:, : x.shape[1]]]


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the products that oneDNN is given, wherever this runs."""
    given: list[tuple[int, ...]] = []
    product = products._onednn

    def counted(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        given.append((*left.shape, right.shape[1]))
        return product(left, right, bias)

    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    monkeypatch.setattr(products, "_onednn", counted)
    return given


class TestMultiply:
    @pytest.mark.parametrize("left", LAYOUTS)
    @pytest.mark.parametrize("right", LAYOUTS)
    def test_layouts(
        self, left: Callable[[Tensor], Tensor], right: Callable[[Tensor], Tensor], by_onednn: list[tuple[int, ...]]
    ) -> None:
        """Those with gaps between their rows take oneDNN a thousand times as long, if it is given them."""
        one, other = torch.randn(300, 200), torch.randn(200, 90)
        a, b = left(one), right(other)
        exact = one.double() @ other.double()
        multiply(a, b)
        begun = time.process_time()
        found = multiply(a, b)
        assert time.process_time() - begun < 0.1
        assert by_onednn == [(300, 200, 90)] * 2
        assert float((found - exact).norm() / exact.norm()) < 1e-6

    def test_others_are_torch_s(self, by_onednn: list[tuple[int, ...]]) -> None:
        small, double = torch.randn(8, 8), torch.randn(200, 200, dtype=torch.float64)
        assert torch.equal(multiply(small, small), small @ small)
        assert torch.equal(multiply(double, double), double @ double)
        assert by_onednn == []


class TestFastProducts:
    def test_forward_and_backward(self, by_onednn: list[tuple[int, ...]]) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(192, 160, bias=False), nn.SiLU(), nn.Linear(160, 144))
        hidden = torch.randn(2, 100, 192, requires_grad=True)

        def run() -> list[Tensor]:
            output = model(hidden)
            return [output.detach(), *torch.autograd.grad(output.square().sum(), [hidden, *model.parameters()])]

        wanted = run()
        with fast_products(CPU):
            found = run()
        # two forward, and backward by inputs and by weights
        assert len(by_onednn) == 6
        for one, other in zip(found, wanted, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
        count = len(by_onednn)
        run()
        assert len(by_onednn) == count

    def test_where_torch_is_as_fast(self, by_onednn: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(products, "prefers_onednn", lambda: False)
        with fast_products(CPU):
            nn.Linear(256, 256)(torch.randn(64, 256))
        assert by_onednn == []
        assert multiplied_by(CPU.type) != "oneDNN"


def test_libraries_of_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    assert multiplied_by("cuda") == "cuBLAS"
    assert multiplied_by("mps") == "torch on mps"
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert multiplied_by("cuda") == "hipBLAS"


def test_intel_s_own_library_is_kept_on_its_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    for vendor, wanted in {"GenuineIntel": False, "AuthenticAMD": True, "": False}.items():
        monkeypatch.setattr(products, "_vendor", lambda vendor=vendor: vendor)
        assert products.prefers_onednn.__wrapped__() is (wanted and torch.backends.mkldnn.is_available())
