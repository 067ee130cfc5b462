"""
Where an activation function is called, and what to call that place.
"""
import dataclasses
from collections import Counter
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Site:
    """
    Where an activation function is called.

    Attributes:
        module (str): path of the module whose forward made the call
        function (str): name of the function, or class of a module that was
            registered as an activation
        layer (str): path of the layer that produced the input
        nth (int): how many such calls came before since that layer ran
        units (int): number of units, on all processes together
        is_module (bool): True if the module is one activation, as ``nn.ReLU``
        offset (int | None): the first of the units that this process has; None if it has all
        samples (Tuple[int, ...]): which part of the samples of its batch this process has

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.sites import Site
        >>> Site('block.relu', 'relu', 'block.conv1', is_module=True).names()[:2]
        ['block.relu', 'block.relu@conv1']
        >>> Site('block', 'relu', 'block.conv1').names()[:2]
        ['block.relu', 'block.relu@conv1']
    """
    module: str
    function: str
    layer: str = ''
    nth: int = 0
    units: int = dataclasses.field(default=0, compare=False)  # one site has one number of units
    is_module: bool = False
    offset: int | None = dataclasses.field(default=None, compare=False)
    samples: tuple = dataclasses.field(default=(), compare=False)

    def names(self) -> list[str]:
        """ Names from the shortest to the one that tells all sites apart. """
        function = '' if self.is_module else self.function
        short = '.'.join(part for part in (self.module, function) if part)
        parent = self.module.rpartition('.')[0] if self.is_module else self.module
        layer = self.layer.removeprefix(f'{parent}.') if parent else self.layer
        at_layer = f'{short}@{layer}' if layer else short
        numbered = f'{at_layer}#{self.nth + 1}'
        return [short, at_layer, numbered, f'{numbered}:{self.function}/{self.units}']


def site_names(sites: Iterable[Site]) -> dict[Site, str]:
    """
    Readable names, in the order given: as short as is unambiguous.

    Args:
        sites (Iterable[Site]):

    Returns:
        Dict[Site, str]:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.sites import (
        >>>     Site, site_names)
        >>> sites = [Site('block.relu', 'relu', 'block.conv1', is_module=True),
        >>>          Site('block.relu', 'relu', 'block.conv2', is_module=True), Site('', 'tanh', 'head')]
        >>> list(site_names(sites).values())
        ['block.relu@conv1', 'block.relu@conv2', 'tanh']
    """
    candidates = {site: site.names() for site in sites}
    counts = Counter(name for names in candidates.values() for name in set(names))
    return {site: next((name for name in names if counts[name] == 1), names[-1])
            for site, names in candidates.items()}
