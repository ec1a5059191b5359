"""One matrix in many disguises, always against the same float64 matrix."""

import numpy as np
import pytest
import scipy.linalg
import torch

from gradscope.operators import matrix
from tests.helpers import disguises, noise


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
@pytest.mark.parametrize("disguise", list(disguises(noise(2, 3))))
def test_every_disguise_is_the_same_matrix(shape, disguise):
    A = noise(*shape)
    op = disguises(A)[disguise]
    v, u, V = noise(shape[1], seed=2), noise(shape[0], seed=3), noise(shape[1], 3, seed=4)
    close = {"atol": 1e-12, "rtol": 1e-12}
    assert op.shape == shape
    torch.testing.assert_close(op.dense(), A, **close)
    torch.testing.assert_close(op.T.dense(), A.T, **close)
    torch.testing.assert_close(op @ v, A @ v, **close)
    torch.testing.assert_close(op @ V, A @ V, **close)
    torch.testing.assert_close(op.T @ u, A.T @ u, **close)
    assert float(u @ (op @ v)) == pytest.approx(float((op.T @ u) @ v), rel=1e-12)
    np.testing.assert_allclose(op.singular_values(), scipy.linalg.svdvals(A.numpy()), rtol=1e-12)
    scipy_op = op.to_scipy()
    np.testing.assert_allclose(scipy_op @ v.numpy(), (A @ v).numpy(), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(scipy_op.H @ u.numpy(), (A.T @ u).numpy(), rtol=1e-11, atol=1e-12)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(4,\)"):
        matrix(noise(2, 3)) @ noise(4)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        matrix(noise(3))
