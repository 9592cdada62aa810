"""Gram matrices and their roots, against float64 products written out."""

from __future__ import annotations

import pytest
import torch
from support.metrics import normal

from svdconvert.linalg.gram import root_of


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("regular", [True, False])
def test_whether_a_matrix_is_singular_does_not_depend_on_its_unit(scale: float, regular: bool) -> None:
    """Rounding makes many a singular matrix regular: Cholesky's root of it magnifies what should be zeros."""
    for seed in range(20):
        rows = normal(40 if regular else 20, 24, seed=seed)
        gram = scale * (rows.T @ rows)
        root, triangular = root_of(gram.tril())
        assert triangular == regular
        assert not triangular or torch.equal(root, root.tril())
        assert torch.linalg.matrix_rank(root, rtol=1e-9) == min(rows.shape)
        assert torch.allclose(root @ root.T, gram, rtol=0, atol=1e-12 * float(gram.abs().max()))
