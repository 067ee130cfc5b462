"""
The arguments of PlasticityMonitor, once they are read and found right.
"""
from collections.abc import Sequence
from dataclasses import dataclass, field

from kwutil import util_pattern

from ..plasticity_metrics import PlasticityConfigError


@dataclass(frozen=True)
class Settings:
    """ The arguments of PlasticityMonitor, read and found right. """
    intervals: dict
    source: str
    samples: int
    patterns: list = field(default_factory=list)
    per_layer: bool = False
    prog_bar: bool = False
    budget: object = None


def read_patterns(layers):
    """
    Patterns of layer names.

    Args:
        layers (str | List[str] | None): as in a shell, separated by commas or in a list

    Returns:
        List[Pattern]:

    Raises:
        PlasticityConfigError: if it is none of these
    """
    parts = [layers] if isinstance(layers, str) else layers
    if parts is None:
        return []
    if not isinstance(parts, Sequence) or not all(isinstance(part, str) for part in parts):
        raise PlasticityConfigError('Expected `layers` to be patterns of layer names, separated by commas or in '
                                    f'a list, but got {layers!r}')
    names = [name.strip() for part in parts for name in part.split(',') if name.strip()]
    return [util_pattern.Pattern.coerce(name, hint='glob') for name in names]
