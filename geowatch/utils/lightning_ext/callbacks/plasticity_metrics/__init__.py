"""
What is measured: one formula per file, which is registered by lying in this folder.

A metric names the statistics that it needs, and is a NumPy function of those
of one layer. All lists of metrics, from the command line's help to the tables
of the documentation, come from the registry.
"""
import importlib
import pkgutil

from ._errors import PlasticityConfigError
from ._registry import GROUPS, METRICS, Metric, in_order, members, metric, parse_metrics
from ._words import Words

__all__ = ['GROUPS', 'METRICS', 'Metric', 'PlasticityConfigError', 'Words', 'effective_rank', 'members', 'metric',
           'parse_metrics', 'register_activation']

for _found in pkgutil.iter_modules(__path__):
    if not _found.name.startswith('_'):
        importlib.import_module(f'{__name__}.{_found.name}')
_ordered = {name: METRICS[name] for name in in_order(METRICS)}
METRICS.clear()
METRICS.update(_ordered)
BUILT_IN = tuple(METRICS)


def __getattr__(name):
    # Functions of tensors, so that the formulas alone can be read without torch.
    if name == 'effective_rank':
        from ..plasticity_engine.statistics.spectrum import effective_rank
        return effective_rank
    if name == 'register_activation':
        from ..plasticity_engine.sources.activations.functions import register_activation
        return register_activation
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
