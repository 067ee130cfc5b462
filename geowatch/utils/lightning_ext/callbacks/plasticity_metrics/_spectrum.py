"""
Effective rank from additive Gram matrices.

References:
    .. [Roy2007] Roy and Vetterli, "The effective rank: a measure of effective
       dimensionality", EUSIPCO 2007.
"""
import torch

# Numbers that are held in float64 at once: 32 MB.
_CHUNK = 1 << 22
# Columns whose products with those before them are computed at once: so half of
# the work on a wide Gram matrix is left out, as the other half is never needed.
# In one piece 128 columns take 1.4, 256 take 1.5 and 512 take 1.3 times as long.
_NARROW, _WIDE = 96, 192


def gram(matrix, side, total=None):
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
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._spectrum import gram
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


def smaller_side(matrix):
    """
    Name the side of a matrix whose Gram matrix is the smaller one.

    Args:
        matrix (Tensor): of shape (n, m)

    Returns:
        str: 'columns' or 'rows', for :func:`gram`.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._spectrum import smaller_side
        >>> import torch
        >>> smaller_side(torch.empty(9, 2)), smaller_side(torch.empty(2, 9))
        ('columns', 'rows')
    """
    return 'columns' if matrix.shape[0] >= matrix.shape[1] else 'rows'


def entropy_rank(gram_matrix):
    """
    Effective rank of every matrix that has the given Gram matrix [Roy2007]_.

    With singular values s and p = s / sum(s) it is exp(-sum(p log p)), where
    0 log 0 = 0.

    Args:
        gram_matrix (Tensor): float64, of shape (..., d, d); its lower
            triangle is read, as :func:`gram` makes it

    Returns:
        Tensor: float64, of shape (...). 0 for a zero or empty matrix, nan
            where an entry is not finite or the solver fails.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._spectrum import entropy_rank
        >>> import torch
        >>> round(entropy_rank(torch.eye(4, dtype=torch.float64)).item(), 6)
        4.0
        >>> entropy_rank(torch.zeros(2, 3, 3, dtype=torch.float64)).tolist()
        [0.0, 0.0]
    """
    if gram_matrix.numel() == 0:
        return gram_matrix.new_zeros(gram_matrix.shape[:-2])
    finite = gram_matrix.isfinite().flatten(-2).all(-1)
    # LAPACK may hang or abort on a non-finite number: it never sees one.
    safe = torch.where(finite[..., None, None], gram_matrix, 0.)
    # A common factor does not change p, and keeps tiny and huge matrices
    # inside the range where the solver is accurate.
    scale = safe.diagonal(dim1=-2, dim2=-1).amax(-1)
    safe = safe / torch.where(scale > 0, scale, 1.)[..., None, None]
    try:
        singular = torch.linalg.eigvalsh(safe, UPLO='L').clamp(min=0).sqrt()
    except torch.linalg.LinAlgError:
        return torch.full_like(scale, torch.nan)
    total = singular.sum(-1)
    p = singular / torch.where(total > 0, total, 1.)[..., None]
    rank = torch.special.entr(p).sum(-1).exp()
    rank = torch.where(total > 0, rank, 0.)
    return torch.where(finite, rank, torch.nan)


def entropy_ranks(grams):
    """
    Effective ranks of several matrices.

    On a GPU, matrices of one size go to the solver in one batch; on a CPU one
    after the other is faster (8 of 128 x 128: 3.3 ms, against 5.4 in a batch).

    Args:
        grams (List[Tensor]): float64, each of shape (d, d) for some d

    Returns:
        Tensor: float64, of shape (len(grams),)

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._spectrum import entropy_ranks
        >>> import torch
        >>> [round(x, 6) for x in entropy_ranks([torch.eye(2).double(), torch.eye(3).double()]).tolist()]
        [2.0, 3.0]
    """
    if not grams:
        return torch.zeros(0, dtype=torch.float64)
    if grams[0].device.type == 'cpu':
        return torch.stack([entropy_rank(g) for g in grams])
    ranks = [None] * len(grams)
    for size in {g.shape[0] for g in grams}:
        where = [i for i, g in enumerate(grams) if g.shape[0] == size]
        for i, rank in zip(where, entropy_rank(torch.stack([grams[i] for i in where])), strict=True):
            ranks[i] = rank
    return torch.stack(ranks)


def effective_rank(matrix):
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
    return entropy_rank(gram(matrix, smaller_side(matrix)))
