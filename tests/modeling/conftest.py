"""Fixtures of the modeling files' tests; what makes their checkpoints is in ``support.tiny_factored``."""

import pytest
import torch
from support.tiny_factored import GEOMETRY, LAYOUTS, load, logits, stock_model, write_checkpoint


def pytest_configure():
    torch.set_num_threads(1)  # two threads on matrices this small only wait for each other


@pytest.fixture(scope="session", params=LAYOUTS)
def layout(request):
    """The layout of the checkpoint `tiny`: a test that uses either runs on both, unless it is marked ONE_LAYOUT."""
    return request.param


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, layout):
    """A factored checkpoint at rank 24. Read only: tests that change files copy it, or write their own."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-svd", layout=layout)


@pytest.fixture(scope="session")
def ids():
    return torch.randint(3, GEOMETRY["vocab_size"], (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def expected(tiny, ids):
    """Logits of the stock model whose dense weights are the products of the factors."""
    return logits(stock_model(tiny.product), ids)


@pytest.fixture
def model(tiny):
    return load(tiny.path)
