"""
What to say of a run when it ends: the verdict of the report, on what was measured.

The curves are kept in memory, of a length that does not grow, so that nothing
has to be read and it does not matter which loggers there are.
"""
import math
import traceback

from .dashboard import words_of
from .lightning import logged_numbers, scaler_of

MOST_POINTS = 256
# Of the loss and of what the host logs.
LOSS = 'train_loss'
MOST_SCALARS = 20
# What is said in numbers, if it was measured.
NAMED = ('dead_units', 'feature_erank', 'weight_mag')


class Curves:
    """
    What was measured in a fit, in outline.

    Args:
        trainer (Trainer):

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.verdict import thin
        >>> curve = {step: float(step) for step in range(-1, 300)}
        >>> thin(curve)
        >>> list(curve)[:3], len(curve), list(curve)[-1]
        ([-1, 1, 3], 151, 299)
    """

    def __init__(self, trainer):
        self._trainer = trainer
        self._metrics = {}   # name to step to Point
        self._scalars = {}   # name to step to number or tensor of one
        self._loss = None    # of the last batch that was looked at

    def see(self, step, loss):
        """
        The loss of a batch that is looked at anyway. It is not read before the end, for which a device would wait.

        Args:
            step (int):
            loss (Tensor):
        """
        if scaler_of(self._trainer) is None and self._trainer.lightning_module.automatic_optimization:
            self._loss = loss.detach()
            if LOSS not in self._scalars:  # that of the fresh network
                self._scalars[LOSS] = {step: self._loss}

    def add(self, scalars, step, rows):
        """
        Args:
            scalars (Dict[str, float]): not used
            step (int): of the measurement
            rows (List[dict]): as in plasticity.jsonl
        """
        from ..plasticity_report.runs import Point
        for row in rows:
            value = float('nan') if row['value'] is None else row['value']
            self._put(self._metrics, row['metric'], step, Point(
                step, row['epoch'], value, row['samples'], {}, row['time']))
        if step >= 0:
            self._note(step)

    def _note(self, step):
        if self._loss is not None:
            self._put(self._scalars, LOSS, step, self._loss)
        for name, x in logged_numbers(self._trainer).items():
            own = self._scalars.get(name, {})
            if name != LOSS and (own or len(self._scalars) < MOST_SCALARS) and (
                    not own or own[next(reversed(own))] is not x):
                self._put(self._scalars, name, step, x)

    @staticmethod
    def _put(curves, name, step, x):
        curve = curves.setdefault(name, {})
        curve[step] = x
        if len(curve) > MOST_POINTS:
            thin(curve)

    def outline(self):
        """ The metrics without their layers (Dict[str, List[Point]]), plain numbers. """
        return {name: list(curve.values()) for name, curve in self._metrics.items()}

    def verdict(self):
        """
        Returns:
            List[str]: two lines for people; none where nothing can be told, as of a run that goes on from another
        """
        if not any(-1 in curve for curve in self._metrics.values()):
            return []
        from ..plasticity_report.runs import Run, _has_small_start
        from ..plasticity_report.verdicts import judge
        last = max(step for curve in self._metrics.values() for step in curve)
        self._note(last)
        metrics = {name: dict(curve) for name, curve in self._metrics.items()}
        few = {name: curve.pop(-1) for name, curve in metrics.items() if _has_small_start(name, curve)}
        scalars = {name: {step: float(x) for step, x in curve.items()} for name, curve in self._scalars.items()}
        run = Run([], {name: list(curve.values()) for name, curve in metrics.items()}, {}, [], scalars,
                  small_start=few)
        (verdict,) = judge([run])
        if not verdict.word:
            return []
        when = '' if verdict.at is None or f'step {verdict.at}' in verdict.reason else f' at step {verdict.at}'
        return [f'Plasticity of this run: {verdict.word}{when}: {verdict.reason}', *_numbers(metrics)]


def words_on(curves):
    """ The same, whatever fails in it. """
    try:
        return curves.verdict()
    except Exception:
        return [f'PlasticityMonitor: there is no verdict, since it has failed:\n{traceback.format_exc()}']


def _numbers(metrics):
    """ What has become of it since the fresh network. """
    said = []
    for name in NAMED:
        values = [point.value for point in metrics.get(name, {}).values() if math.isfinite(point.value)]
        if len(values) > 1:
            words = words_of(name)
            said.append(f'{words.short} {words.text(values[0])} -> {words.text(values[-1])}')
    return [f'From its first to its last measurement: {", ".join(said)}'] if said else []


def thin(curve):
    """ Drop every second point of a curve (dict, in order), but for the first and the last. """
    for step in list(curve)[1:-1:2]:
        del curve[step]
