"""Convolution and pooling in NumPy against torch in float64."""

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional

from experiments.studies.convolution import backpropagation as bp

STRIDES, PADDINGS, DILATIONS = (1, 2, 3), (0, 1, 2), (1, 2)
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def images(*shape, seed=0):
    """Synthetic pictures: smooth waves and a little noise."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[: shape[2], : shape[3]]
    waves = np.sin(random.normal(size=(*shape[:2], 1, 1)) * rows + random.normal(size=(*shape[:2], 1, 1)) * columns)
    return waves + 0.3 * random.normal(size=shape)


def torch_gradients(function, *arrays, gradient_seed=1):
    """Output of a torch function, a random G, and its gradients with respect to the arrays."""
    tensors = [torch.from_numpy(array).requires_grad_() for array in arrays]
    y = function(*tensors)
    gradient = np.random.default_rng(gradient_seed).normal(size=tuple(y.shape))
    y.backward(torch.from_numpy(gradient))
    return y.detach().numpy(), gradient, [tensor.grad.numpy() for tensor in tensors]


@pytest.mark.parametrize(("stride", "padding", "dilation"), list(product(STRIDES, PADDINGS, DILATIONS)))
@pytest.mark.parametrize(("size", "kernel"), [((9, 11), (3, 3)), ((8, 7), (2, 3)), ((5, 5), (1, 1))])
def test_convolution_against_torch(stride, padding, dilation, size, kernel):
    random = np.random.default_rng(2)
    x, weight, bias = images(2, 3, *size), random.normal(size=(4, 3, *kernel)), random.normal(size=4)
    how = {"stride": stride, "padding": padding, "dilation": dilation}
    y, gradient, (of_x, of_weight, of_bias) = torch_gradients(
        lambda x, w, b: functional.conv2d(x, w, b, **how), x, weight, bias
    )
    np.testing.assert_allclose(bp.conv2d(x, weight, bias, **how), y, **CLOSE)
    np.testing.assert_allclose(bp.conv2d_input_gradient(gradient, weight, x.shape, **how), of_x, **CLOSE)
    np.testing.assert_allclose(bp.conv2d_weight_gradient(gradient, x, kernel, **how), of_weight, **CLOSE)
    np.testing.assert_allclose(bp.conv2d_bias_gradient(gradient), of_bias, **CLOSE)


POOLINGS = [
    (size, stride, padding)
    for size, stride, padding in product((2, 3), (None, 1, 2, 3), (0, 1))
    if padding <= size // 2
]


@pytest.mark.parametrize(("size", "stride", "padding"), POOLINGS)
@pytest.mark.parametrize("side", [(8, 8), (7, 10)])
def test_average_pooling_against_torch(size, stride, padding, side):
    x = images(2, 3, *side)
    how = {"stride": stride, "padding": padding}
    y, gradient, (of_x,) = torch_gradients(lambda x: functional.avg_pool2d(x, size, **how), x)
    np.testing.assert_allclose(bp.average_pool2d(x, size, **how), y, **CLOSE)
    np.testing.assert_allclose(bp.average_pool2d_gradient(gradient, x.shape, size, **how), of_x, **CLOSE)


@pytest.mark.parametrize(("size", "stride", "padding"), POOLINGS)
@pytest.mark.parametrize("ties", [False, True])
def test_max_pooling_against_torch(size, stride, padding, ties):
    x = images(2, 3, 9, 8)
    x = np.round(np.maximum(x, 0)) if ties else x  # as after ReLU: windows of zeros, and equal maxima
    how = {"stride": stride, "padding": padding}
    y, gradient, (of_x,) = torch_gradients(lambda x: functional.max_pool2d(x, size, **how), x)
    pooled, winners = bp.max_pool2d(x, size, **how)
    np.testing.assert_array_equal(pooled, y)
    np.testing.assert_allclose(bp.max_pool2d_gradient(gradient, winners, x.shape, size, **how), of_x, **CLOSE)


def test_two_layers_in_a_row_by_the_chain_rule():
    x, weight = images(2, 1, 8, 8), np.random.default_rng(3).normal(size=(2, 1, 3, 3))
    _, gradient, (of_x, of_weight) = torch_gradients(
        lambda x, w: functional.max_pool2d(functional.conv2d(x, w, padding=1), 2), x, weight
    )
    h = bp.conv2d(x, weight, padding=1)
    _, winners = bp.max_pool2d(h, 2)
    of_h = bp.max_pool2d_gradient(gradient, winners, h.shape, 2)
    np.testing.assert_allclose(bp.conv2d_input_gradient(of_h, weight, x.shape, padding=1), of_x, **CLOSE)
    np.testing.assert_allclose(bp.conv2d_weight_gradient(of_h, x, (3, 3), padding=1), of_weight, **CLOSE)


def test_digits_too():
    pytest.importorskip("sklearn")
    from experiments.data.batches import digits_with_labels

    x = digits_with_labels()[0][:3, :1].double().numpy() / 255
    weight = np.random.default_rng(4).normal(size=(2, 1, 5, 5))
    y, gradient, (of_x, of_weight) = torch_gradients(lambda x, w: functional.conv2d(x, w, stride=2), x, weight)
    np.testing.assert_allclose(bp.conv2d(x, weight, stride=2), y, **CLOSE)
    np.testing.assert_allclose(bp.conv2d_input_gradient(gradient, weight, x.shape, stride=2), of_x, **CLOSE)
    np.testing.assert_allclose(bp.conv2d_weight_gradient(gradient, x, (5, 5), stride=2), of_weight, **CLOSE)


def test_the_gradient_is_the_transpose_of_the_forward_map():
    # <G, conv(X)> = <conv^T(G), X>, without torch.
    x, weight = images(1, 2, 6, 5), np.random.default_rng(5).normal(size=(3, 2, 3, 2))
    y = bp.conv2d(x, weight, stride=2, padding=1)
    gradient = np.random.default_rng(6).normal(size=y.shape)
    back = bp.conv2d_input_gradient(gradient, weight, x.shape, stride=2, padding=1)
    assert (gradient * y).sum() == pytest.approx((back * x).sum(), rel=1e-12)


def test_what_makes_no_sense_is_refused():
    x, weight = images(1, 2, 5, 5), np.ones((1, 2, 3, 3))
    with pytest.raises(ValueError, match=r"same number of channels C, got shapes \(1, 2, 5, 5\) and \(1, 1, 3, 3\)"):
        bp.conv2d(x, weight[:, :1])
    with pytest.raises(ValueError, match="got stride=0"):
        bp.conv2d(x, weight, stride=0)
    with pytest.raises(ValueError, match="larger than the padded image, 5 x 5; increase the padding"):
        bp.conv2d(x, weight, dilation=3)
    with pytest.raises(ValueError, match="padding of at most half the size; got size=2, stride=None, padding=2"):
        bp.max_pool2d(x, 2, padding=2)
    with pytest.raises(ValueError, match="A window of 6 x 6 is larger"):
        bp.average_pool2d(x, 6)
