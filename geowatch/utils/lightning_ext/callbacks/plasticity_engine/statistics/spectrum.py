"""
Additive Gram matrices, and the singular values that come of them.
"""
import torch

from ...plasticity_metrics._formulas import entropy_rank

# Numbers that are held in float64 at once: 32 MB.
_CHUNK = 1 << 22
# Columns whose products with those before them are computed at once: so half of
# the work on a wide Gram matrix is left out, as the other half is never needed.
# In one piece 128 columns take 1.4, 256 take 1.5 and 512 take 1.3 times as long.
_NARROW, _WIDE = 96, 192
# Numbers in one batch for the solver: 128 MB.
_BATCH = 1 << 24


def gram(matrix: torch.Tensor, side: str, total: torch.Tensor | None = None) -> torch.Tensor:
    """
    Lower triangle of the Gram matrix of one side, in float64, whatever autocast is active.

    Gram matrices over disjoint rows (``side='columns'``) or disjoint columns
    (``side='rows'``) of one matrix add up to the Gram matrix of the whole,
    which is what lets batches and processes be combined exactly.

    Args:
        matrix (Tensor): of shape (n, m), any floating point type.
        side (str): 'columns' gives the (m, m) matrix ``A.T @ A``,
            'rows' gives the (n, n) matrix ``A @ A.T``.
        total (Tensor | None): a Gram matrix to add to, in place

    Returns:
        Tensor: float64, square; above the diagonal may be 0. On the CPU if
            the device has no float64 (MPS).

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.spectrum import gram
        >>> import torch
        >>> gram(torch.tensor([[3., 0.], [0., 2.], [4., 0.]]), 'columns').tolist()
        [[25.0, 0.0], [0.0, 4.0]]
    """
    matrix = matrix.detach()
    if matrix.device.type == 'mps':
        matrix = matrix.cpu()
    tall = matrix if side == 'columns' else matrix.mT
    width = tall.shape[1]
    if total is None:
        total = tall.new_zeros(width, width, dtype=torch.float64)
    # Inside autocast a float32 product would become bfloat16. float64 is not
    # cast today, but nothing promises that.
    with torch.autocast(matrix.device.type, enabled=False):
        block = _NARROW if width <= 256 else _WIDE
        for rows in tall.split(max(1, _CHUNK // max(1, width))):
            rows = rows.to(torch.float64)
            for start in range(0, width, block):
                end = start + block
                total[start:end, :end].addmm_(rows[:, start:end].mT, rows[:, :end])
    return total


def centred(gram_matrix: torch.Tensor, total: torch.Tensor, rows: float | torch.Tensor) -> torch.Tensor:
    """
    Gram matrix of the columns less their means.

    Args:
        gram_matrix (Tensor): lower triangle of X^T X, float64, of shape (d, d)
        total (Tensor): sum of each column, float64, of shape (d,)
        rows (float | Tensor): of X

    Returns:
        Tensor: lower triangle of the centred one, of shape (d, d)

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.spectrum import centred, gram
        >>> import torch
        >>> x = torch.tensor([[1., 0., 5.], [0., 1., 5.], [-1., 0., 5.], [0., -1., 5.]]).double()
        >>> centred(gram(x, 'columns'), x.sum(0), rows=4).tril().tolist()
        [[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    """
    return gram_matrix - torch.outer(total, total / rows)


def singular_values(gram_matrix: torch.Tensor) -> torch.Tensor:
    """
    Singular values of every matrix that has the given Gram matrix.

    Args:
        gram_matrix (Tensor): float64, of shape (..., d, d); its lower
            triangle is read, as :func:`gram` makes it

    Returns:
        Tensor: float64, of shape (..., d), the smallest first; nan where an
            entry is not finite or the solver fails

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.spectrum import singular_values
        >>> import torch
        >>> singular_values(torch.diag(torch.tensor([9., 0., 4.])).double()).tolist()
        [0.0, 2.0, 3.0]
    """
    if gram_matrix.numel() == 0:
        return gram_matrix.new_zeros(gram_matrix.shape[:-1])
    finite = gram_matrix.isfinite().flatten(-2).all(-1)[..., None]
    # LAPACK may hang or abort on a non-finite number: it never sees one.
    safe = torch.where(finite[..., None], gram_matrix, 0.)
    # Inside the range where the solver is accurate, however tiny or huge the matrix is.
    scale = safe.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.)
    try:
        values = torch.linalg.eigvalsh(safe / scale[..., None], UPLO='L')
    except torch.linalg.LinAlgError:
        return torch.full_like(gram_matrix[..., 0], torch.nan)
    return torch.where(finite, values.clamp(min=0).sqrt() * scale.sqrt(), torch.nan)


def spectra(grams: list) -> list[torch.Tensor]:
    """
    Singular values of several matrices, of which few are there at a time.

    On a GPU, matrices of one size go to the solver in one batch; on a CPU one
    after the other is faster (8 of 128 x 128: 3.3 ms, against 5.4 in a batch).

    Args:
        grams (List[Tensor | Gram]): each of shape (d, d) for some d; float64,
            or what makes it

    Returns:
        List[Tensor]: float64, each of shape (d,)

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.spectrum import spectra
        >>> import torch
        >>> [x.tolist() for x in spectra([torch.eye(2).double(), 4 * torch.eye(1).double()])]
        [[1.0, 1.0], [2.0]]
    """
    found = [None] * len(grams)
    for size in dict.fromkeys(own.shape[0] for own in grams):
        where = [i for i, own in enumerate(grams) if own.shape[0] == size]
        while where:
            first = made(grams[where[0]])
            many = 1 if first.device.type == 'cpu' else max(1, _BATCH // max(first.numel(), 1))
            together, where = where[:many], where[many:]
            batch = torch.stack([first, *(made(grams[i]) for i in together[1:])]) if many > 1 else first[None]
            for i, values in zip(together, singular_values(batch), strict=True):
                found[i] = values
    return found


def made(own):
    """ A statistic (Tensor | float) that is there, or is made now. """
    return own.make() if hasattr(own, 'make') else own


def effective_rank(matrix: torch.Tensor) -> torch.Tensor:
    """
    Effective rank of a matrix: how many dimensions it really uses [Roy2007]_.

    Neither centred nor squared: p are the singular values over their sum, and
    the rank is the exponential of the entropy of p.

    Args:
        matrix (Tensor): of shape (n, m), floating point. A tensor with more
            dimensions is taken as a convolution kernel, that is as the matrix
            (out, in * kh * kw).

    Returns:
        Tensor: 0-d float64 between 0 (a zero matrix) and min(n, m); nan where
            an entry is not finite.

    Raises:
        ValueError: if the tensor has fewer than two dimensions or is not
            real floating point.

    References:
        .. [Roy2007] Roy and Vetterli, "The effective rank: a measure of
           effective dimensionality", EUSIPCO 2007.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import effective_rank
        >>> import torch
        >>> round(effective_rank(torch.eye(5)).item(), 6)
        5.0
        >>> round(effective_rank(torch.ones(5, 3)).item(), 6)
        1.0
        >>> effective_rank(torch.zeros(5, 3)).item()
        0.0
    """
    if matrix.ndim < 2 or not matrix.is_floating_point():
        raise ValueError(
            'Expected `matrix` to be a floating point tensor with two or more '
            f'dimensions, but got {matrix.dtype} of shape {tuple(matrix.shape)}')
    if matrix.numel() == 0:
        return matrix.new_zeros((), dtype=torch.float64)
    matrix = matrix.detach().flatten(1)
    values = singular_values(gram(matrix, 'columns' if matrix.shape[0] >= matrix.shape[1] else 'rows'))
    return values.new_tensor(entropy_rank(values.numpy(force=True)))
