"""
What has been seen of the activations for one metric, until it is enough.
"""
from ._schedule import Poll


class Window:
    """
    A measurement of activations that spans as many batches as it needs.

    Args:
        wanted (int): examples that this process has to see

    Attributes:
        stats (Dict[Site, Dict[str, Tensor]]): additive statistics
        examples (int): seen so far
        batches (int): that went by, seen or not: the same on all processes

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._window import Window
        >>> window = Window(wanted=10)
        >>> window.count({'image': [1, 2, 3, 4, 5, 6]})
        >>> window.examples, window.is_full
        (6, False)
    """

    def __init__(self, wanted):
        self.wanted = wanted
        self.stats = {}
        self.examples = self.batches = 0
        self.poll = Poll()

    @property
    def is_full(self):
        return self.examples >= self.wanted

    def count(self, batch):
        """ Note that another batch is looked at. """
        self.examples += count_examples(batch)


def count_examples(batch):
    """
    Examples in a batch: a list of items as in geowatch, where an item may be
    None, or tensors in any nesting.

    Args:
        batch (Any):

    Returns:
        int:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._window import count_examples
        >>> import torch
        >>> count_examples([{'frames': []}, None, {'frames': []}]), count_examples((torch.ones(5, 2), [1] * 5))
        (2, 5)
    """
    shape = getattr(batch, 'shape', None)
    if shape is not None:
        return shape[0] if len(shape) else 1
    if isinstance(batch, dict):
        return max(map(count_examples, batch.values()), default=0)
    if isinstance(batch, (list, tuple)):
        # One item an example, or one entry an input?
        if all(item is None or not hasattr(item, 'shape') and not isinstance(item, (list, tuple)) for item in batch):
            return sum(item is not None for item in batch)
        return max(map(count_examples, batch), default=0)
    return int(batch is not None)
