"""
Warnings while a network trains: one of each kind, when something has broken.

They look at the lines that are measured anyway, so that they cost nothing, and
come when these come.
"""
from typing import NamedTuple

from ..plasticity_metrics import METRICS
from .lightning import scaler_of, weight_types
from .say import warn

MOST_NAMED = 3
# Shares of units, and of weights with a gradient.
DEAD = 0.5
UNMOVED = 0.5


class Sign(NamedTuple):
    """
    What a line shows.

    Attributes:
        layers (Dict[str, float]): in which it is broken, with how much of it
        is_sure (bool): whether one line is enough, or two in a row have to show it
    """
    layers: dict
    is_sure: bool


class Alarms:
    """
    Warns once of each kind of what is broken.

    Args:
        trainer (Trainer):

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.alarms import Alarms
        >>> import warnings
        >>> rows = [{'metric': 'dead_units', 'step': 9, 'value': .4, 'layers': {'act1': {'value': .75}}}]
        >>> alarms = Alarms(trainer=None)
        >>> with warnings.catch_warnings(record=True) as said:
        >>>     warnings.simplefilter('always')
        >>>     alarms.look({}, 9, rows)
        >>>     alarms.look({}, 19, rows)
        >>> len(said), str(said[0].message)[:72]
        (1, 'PlasticityMonitor: step 9: expected units that change from sample to sam')
    """

    def __init__(self, trainer):
        self._trainer = trainer
        self._said = set()     # kinds
        self._suspected = {}   # kind and metric to the layers of the last line

    def look(self, scalars, step, rows):
        """
        Args:
            scalars (Dict[str, float]): not used
            step (int): of the measurement
            rows (List[dict]): as in plasticity.jsonl
        """
        for row in rows if step >= 0 else ():  # an untrained network has done nothing yet
            for kind, (find, tell) in KINDS.items():
                sign = find(self._trainer, row) if kind not in self._said else None
                if sign is not None:
                    before = self._suspected.get((kind, row['metric']), {})
                    self._suspected[kind, row['metric']] = sign.layers
                    layers = {name: x for name, x in sign.layers.items() if sign.is_sure or name in before}
                    if layers:
                        self._said.add(kind)
                        warn(f'step {step}: {tell(self._trainer, row, layers)}. More of this kind is not said again')


# --- kinds: what a line has to show, and what is said -----------------------------


def _not_finite(trainer, row):
    source = _source(row, 'weights', 'activations', 'gradients')
    if source is None:
        return None
    layers = {name: own['nonfinite'] for name, own in row['layers'].items() if own.get('nonfinite')}
    # Gradients that overflow now and then are how a GradScaler finds its scale.
    return Sign(layers, source != 'gradients' or scaler_of(trainer) is None)


def _tell_not_finite(trainer, row, layers):
    what = _source(row, 'weights', 'activations', 'gradients')
    return (f'expected finite numbers, but {what} of {_named(layers)} are NaN or infinite. What is broken stays so: go '
            'back to a checkpoint of before, and take a smaller learning rate or clip the gradients')


def _no_gradient(trainer, row):
    if _source(row, 'gradients') is None:
        return None
    # The layers behind one that begins at zero have none in the first step.
    return Sign({name: 1. for name, own in row['layers'].items() if own['value'] == 0}, is_sure=False)


def _tell_no_gradient(trainer, row, layers):
    where = 'all layers' if len(layers) == len(row['layers']) > 1 else _named(layers)
    return (f'expected a gradient in each layer, but that of {where} was exactly 0 in two measurements in a row: no '
            'more is learned there. Take a smaller learning rate if units have died before (plasticity/dead_units); '
            'or else see whether the loss depends on it at all')


def _dead(trainer, row):
    if row['metric'] != 'dead_units':
        return None
    return Sign({name: own['value'] for name, own in row['layers'].items()
                 if (own['value'] or 0) > DEAD and not own.get('no_sample')}, is_sure=True)


def _tell_dead(trainer, row, layers):
    shares = {name: f'{share:.0%} of {name}' for name, share in layers.items()}
    return (f'expected units that change from sample to sample, but {_named(shares.values())} are saturated on every '
            'one. They learn no more: take a smaller learning rate, or an activation that does not saturate')


def _unmoved(trainer, row):
    if row['metric'] != 'update_ratio':
        return None
    is_stuck = (row.get('unmoved') or 0) > UNMOVED and any(row.get('lr') or [1.])
    return Sign({name: own['unmoved'] for name, own in row['layers'].items()
                 if is_stuck and (own.get('unmoved') or 0) > UNMOVED}, is_sure=False)


def _tell_unmoved(trainer, row, layers):
    types = weight_types(trainer)
    narrow = [name for name in types if name not in ('float32', 'float64')]
    todo = ("keep the weights in float32 (precision='bf16-mixed' instead of 'bf16-true'), or take a larger learning "
            'rate' if narrow else 'take a larger learning rate')
    return (f'expected a step to change all weights that have a gradient, but {row["unmoved"]:.0%} of them stayed the '
            f'same in two measurements in a row, as in {_named(layers)}: the steps are lost to the rounding of '
            f'{", ".join(narrow or types) or "the weights"}. To learn from them, {todo}')


KINDS = {
    'not finite': (_not_finite, _tell_not_finite),
    'no gradient': (_no_gradient, _tell_no_gradient),
    'dead': (_dead, _tell_dead),
    'unmoved': (_unmoved, _tell_unmoved),
}


def _source(row, *sources):
    """ The one of some sources that a line is of. """
    own = METRICS[row['metric']].sources if row['metric'] in METRICS else ()
    return next((source for source in sources if set(own) == {source}), None)


def _named(layers):
    names = list(layers)
    return ', '.join(names[:MOST_NAMED]) + (f' and {len(names) - MOST_NAMED} more' if len(names) > MOST_NAMED else '')
