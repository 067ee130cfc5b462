"""
effective_rank against the singular values of numpy in float64.
"""
import numpy as np
import pytest
import torch
from common import numpy_erank
from hypothesis import given, settings
from hypothesis import strategies as st

from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.spectrum import gram
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import effective_rank

SHAPES = [(40, 7), (7, 40), (16, 16), (300, 20), (20, 300), (64, 63)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(n, m):
    rank = max(1, min(n, m) // 4)
    return normal(n, rank) @ normal(rank, m, seed=1)


def power_law(n, m):
    """ Singular values 1, 1/4, 1/9, … """
    u, _, vh = torch.linalg.svd(normal(n, m).double(), full_matrices=False)
    s = torch.arange(1., min(n, m) + 1).double() ** -2
    return ((u * s) @ vh).float()


def half_dead(n, m):
    return torch.relu(normal(n, m)) * (torch.arange(m) % 2)


def large_mean(n, m):
    return normal(n, m) + 1000


MATRICES = [normal, low_rank, power_law, half_dead, large_mean]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('make', MATRICES)
def test_equals_svd(make, shape):
    matrix = make(*shape)
    assert effective_rank(matrix).item() == pytest.approx(numpy_erank(matrix), rel=1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('make', MATRICES)
def test_types(make, dtype):
    matrix = make(30, 20).to(dtype)
    # bfloat16 has no numpy type; the way over float64 is exact.
    assert effective_rank(matrix).item() == pytest.approx(numpy_erank(matrix.double()), rel=1e-5)
    assert effective_rank(matrix).ndim == 0


def test_half_precision_does_not_overflow():
    # 60000 ** 2 is beyond the range of float16, and 1e-7 ** 2 below it.
    for factor in (60000., 1e-7):
        matrix = (torch.eye(6) * factor).half()
        assert matrix.any() and effective_rank(matrix).item() == pytest.approx(6, rel=1e-6)


@pytest.mark.parametrize('factor', [1e-30, 1e-18, 1., 1e18, 1e30])
def test_scale_does_not_matter(factor):
    matrix = normal(12, 9)
    assert effective_rank(matrix * factor).item() == pytest.approx(numpy_erank(matrix), rel=1e-5)


@pytest.mark.parametrize('d', [1, 2, 17, 64])
def test_identity_has_full_rank(d):
    assert effective_rank(torch.eye(d)).item() == pytest.approx(d, rel=1e-9)
    assert effective_rank(-3 * torch.eye(d)).item() == pytest.approx(d, rel=1e-9)


@pytest.mark.parametrize('shape', SHAPES)
def test_outer_product_has_rank_one(shape):
    n, m = shape
    assert effective_rank(torch.ones(n, m)).item() == pytest.approx(1, rel=1e-5)
    assert effective_rank(torch.outer(normal(n), normal(m, seed=1)).double()).item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize('shape', [(5, 3), (3, 5), (1, 4), (4, 1), (4, 3, 2, 2)])
def test_zero_has_rank_zero(shape):
    assert effective_rank(torch.zeros(shape)).item() == 0


def test_two_equal_values_have_rank_two():
    assert effective_rank(torch.diag(torch.tensor([5., 5., 0., 0.]))).item() == pytest.approx(2, rel=1e-9)
    # p = 3/4, 1/4: by hand.
    expected = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert effective_rank(torch.diag(torch.tensor([3., 1.]))).item() == pytest.approx(expected, rel=1e-9)


def test_neither_centred_nor_squared():
    matrix = normal(30, 10) * torch.arange(1., 11) + 5
    value = effective_rank(matrix).item()
    centred = numpy_erank(matrix - matrix.mean(0))
    assert abs(value - centred) > 0.1
    s = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
    p = s / s.sum()
    assert abs(value - np.exp(-(p * np.log(p)).sum())) > 0.1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(1, 12), m=st.integers(1, 12), seed=st.integers(0, 99), factor=st.sampled_from([1e-6, 1., 1e6]),
       keep=st.floats(0, 1))
def test_never_above_the_smaller_side(n, m, seed, factor, keep):
    matrix = normal(n, m, seed=seed) * factor * (torch.rand(n, m, generator=torch.Generator().manual_seed(seed)) < keep)
    value = effective_rank(matrix).item()
    assert value == pytest.approx(numpy_erank(matrix), rel=1e-5)
    assert value <= min(n, m) * (1 + 1e-12)
    assert value >= (1 - 1e-5 if matrix.any() else 0)
    assert effective_rank(matrix.mT).item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize('d', [3, 50, 257])
def test_orthogonal_is_not_above_d(d):
    matrix = torch.linalg.qr(normal(d, d).double())[0]
    assert d * (1 - 1e-9) < effective_rank(matrix).item() <= d * (1 + 1e-12)


def test_not_contiguous():
    base = normal(40, 30)
    for view in (base.T, base[::3], base[:, ::2], base.flip(0), base[:1].expand(6, -1)):
        assert effective_rank(view).item() == pytest.approx(numpy_erank(view), rel=1e-5)
    kernel = normal(8, 4, 3, 3).to(memory_format=torch.channels_last)
    assert not kernel.is_contiguous()
    assert effective_rank(kernel).item() == pytest.approx(numpy_erank(kernel.reshape(8, -1)), rel=1e-5)


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('shape', [(5, 3), (3, 5), (1, 3), (70, 70), (4, 3, 2, 2)])
def test_not_finite_is_nan(bad, shape):
    matrix = normal(*shape)
    matrix.view(-1)[1] = bad
    assert effective_rank(matrix).isnan()
    assert effective_rank(torch.full(shape, bad)).isnan()


@pytest.mark.parametrize('shape', [(1, 1), (1, 9), (9, 1)])
def test_one_row(shape):
    assert effective_rank(normal(*shape)).item() == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize('shape', [(0, 4), (4, 0), (0, 0), (3, 0, 2, 2)])
def test_empty_has_rank_zero(shape):
    assert effective_rank(torch.zeros(shape)).item() == 0


@pytest.mark.parametrize('shape', [(8, 4, 3), (8, 4, 3, 5), (8, 2, 3, 2, 2), (4, 1, 3, 3)])
def test_kernel_is_out_by_the_rest(shape):
    kernel = normal(*shape)
    assert effective_rank(kernel).item() == pytest.approx(numpy_erank(kernel.reshape(shape[0], -1)), rel=1e-5)


@pytest.mark.parametrize('width', [1, 95, 96, 97, 193, 256, 257, 384, 500])
@pytest.mark.parametrize('parts', [1, 3])
def test_lower_triangle_of_any_width(width, parts):
    matrix = normal(600, width)
    total = None
    for rows in matrix.chunk(parts):
        total = gram(rows, 'columns', total)
    whole = matrix.double().numpy()
    assert total.dtype == torch.float64
    np.testing.assert_allclose(np.tril(total.numpy()), np.tril(whole.T @ whole), rtol=1e-12, atol=1e-9)
    assert effective_rank(matrix).item() == pytest.approx(numpy_erank(matrix), rel=1e-9)


def test_inside_autocast():
    matrix = normal(40, 20)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert effective_rank(matrix).item() == pytest.approx(numpy_erank(matrix), rel=1e-5)


def test_parameter_is_left_alone():
    param = torch.nn.Parameter(normal(6, 5))
    before = param.detach().clone()
    value = effective_rank(param)
    assert not value.requires_grad and param.grad is None
    assert torch.equal(param, before)


@pytest.mark.parametrize('wrong', [torch.ones(3), torch.tensor(1.), torch.ones(3, 3, dtype=torch.int64),
                                   torch.ones(3, 3, dtype=torch.complex64)])
def test_wrong_input_says_what_came(wrong):
    with pytest.raises(ValueError, match=str(wrong.dtype)):
        effective_rank(wrong)
