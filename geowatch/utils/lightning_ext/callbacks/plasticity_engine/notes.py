"""
What lines of the record say of a step besides: with which learning rate it was made.
"""


class Notes:
    """
    Noted of each step that is measured.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.notes import Notes
        >>> import torch
        >>> notes, weight = Notes(), torch.nn.Parameter(torch.ones(2))
        >>> notes.before_step(torch.optim.SGD([weight], lr=0.1))
        >>> notes.take(), notes.take()
        ({'lr': [0.1]}, {})
    """

    def __init__(self):
        self._rates = {}  # of each optimizer that has stepped, those of its groups

    def before_step(self, optimizer):
        """ An optimizer is about to step; a scheduler may change its rates before the batch ends. """
        # A rate can be a tensor, which the scheduler changes in place.
        self._rates[id(optimizer)] = [rate.clone() if hasattr(rate, 'clone') else rate for rate in (
            group['lr'] for group in optimizer.param_groups if 'lr' in group)]

    def take(self):
        """
        Returns:
            Dict[str, Any]: keys of NOTES to plain data, of the step that ends
        """
        rates, self._rates = self._rates, {}
        found = {'lr': [float(rate) for own in rates.values() for rate in own]}
        return {key: x for key, x in found.items() if x}
