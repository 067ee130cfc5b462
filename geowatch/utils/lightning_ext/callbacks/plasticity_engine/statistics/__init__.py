"""
Additive statistics: numbers of one tensor, or of one call of an activation function, that add up.
"""
from collections.abc import Hashable

import torch

# (source, field) to layer or site to a tensor, or to a number that the host knows:
# {('weights', 'abs'): {'fc1': tensor(3.)}, ('weights', 'count'): {'fc1': 12.}}
Totals = dict[tuple[str, str], dict[Hashable, torch.Tensor | float]]


class CallStatistic:
    """
    Makes some fields of each site from calls of activation functions.

    Attributes:
        fields (Tuple[str, ...]): what it makes
    """
    fields = ()

    def begin_batch(self, share):
        """
        Note that a batch begins.

        Args:
            share (float): of the batch in all that will be seen
        """

    def add(self, own, call):
        """
        Add one call.

        Args:
            own (Dict[str, Tensor | float]): the fields of the call's site, changed in place
            call (Call): see :class:`.calls.Call`
        """
        raise NotImplementedError

    def end_batch(self, own, site):
        """
        Note that a batch is over.

        Args:
            own (Dict[str, Tensor | float]): the fields of a site, changed in place
            site (Hashable):
        """

    def forget(self, site):
        """
        Note that a site is left out.

        Args:
            site (Hashable):
        """

    def finish(self, own, site):
        """
        Make the fields of a site complete; more calls may follow.

        Args:
            own (Dict[str, Tensor | float]): changed in place
            site (Hashable):
        """
