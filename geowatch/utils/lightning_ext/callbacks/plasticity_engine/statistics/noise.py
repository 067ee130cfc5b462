"""
Noise and signal in a gradient, from the pieces of which it is the sum.
"""


def noise_of(field: str, squares, gradient, count, examples=1.):
    """
    Estimates without bias, which add up over layers and over steps.

    With K pieces of one size the squared norm of the gradient is on average
    that of the true one and that of the noise, and the sum of those of the
    pieces is a K-th of the true one's and all of the noise's.

    Args:
        field (str): 'noise' or 'signal', which add up to the gradient's
            squared norm, or 'example_noise', that of one example's gradient
        squares (Tensor | float): sum over the pieces of their squared norms
        gradient (Tensor | float): squared norm of the gradient
        count (Tensor | float): of pieces, more than 1
        examples (Tensor | float): of which the pieces are

    Returns:
        Tensor | float:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.noise import noise_of
        >>> # Two micro-batches of 8, with the mean gradients [3, 4] and [1, 0]
        >>> [noise_of(field, 6.5, 8., 2., 16.) for field in ('noise', 'signal', 'example_noise')]
        [5.0, 3.0, 80.0]
    """
    noise = (count * squares - gradient) / (count - 1)
    return {'noise': noise, 'signal': gradient - noise, 'example_noise': examples * noise}[field]
