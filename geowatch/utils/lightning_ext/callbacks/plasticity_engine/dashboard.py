"""
What TensorBoard shows beyond the scalars: one dashboard of all metrics, and the layers without a tag for each.
"""
import math
import re

import numpy as np

from ..plasticity_metrics import METRICS, Words

# The host draws a picture for each scalar tag, so that layers go into other kinds of tags.
LAYERS = 'plasticity_layers'
WORST = f'{LAYERS}/worst'
MOST_NAMED = 3
MOST_BINS = 30


class Dashboard:
    """
    Writes into the event file of one TensorBoardLogger.

    =================================  ==================================================
    Where                              What
    =================================  ==================================================
    Custom scalars                     a chart for each metric, on one page
    ``plasticity_layers/<metric>``     histogram over the layers
    ``plasticity_layers/worst``        text: the layers that are worst, metric by metric
    =================================  ==================================================

    After the first hundred measurements of a metric, one is written when the
    run has become one percent longer, so that the file of a long run which
    measures each step stays small.

    Args:
        logger (TensorBoardLogger): of either package
        tags (List[str]): what will be logged, under ``plasticity/``

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.dashboard import Dashboard, WORST
        >>> from pytorch_lightning.loggers import TensorBoardLogger
        >>> from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        >>> import ubelt as ub
        >>> logger = TensorBoardLogger(ub.Path.appdir('geowatch/tests/dashboard').delete())
        >>> layers = {'fc1': {'value': 40.0}, 'fc2': {'value': 20.0}}
        >>> Dashboard(logger, ['erank']).log({}, 9, [{'metric': 'erank', 'value': 30.0, 'layers': layers}])
        >>> logger.finalize('success')
        >>> events = EventAccumulator(logger.log_dir).Reload()
        >>> events.Tags()['histograms'], events.Histograms('plasticity_layers/erank')[0].histogram_value.sum
        (['plasticity_layers/erank'], 60.0)
        >>> events.Tags()['tensors'] == ['custom_scalars__config__', f'{WORST}/text_summary']
        True
    """

    def __init__(self, logger, tags):
        self._logger = logger
        self._tags = list(tags)
        self._has_layout = False
        self._starts = {}   # metric to the first finite value of each of its layers
        self._written = {}  # metric to how often, and at which step last
        self._lines = {}    # metric to its line in the text, as it was last measured

    def log(self, scalars, step, rows):
        """
        Args:
            scalars (Dict[str, float]): what the logger has got already
            step (int): on the x-axis
            rows (List[dict]): as in plasticity.jsonl
        """
        writer = self._logger.experiment
        if not self._has_layout:
            # TensorBoard heeds the first one in a run, and users add theirs at the start.
            self._has_layout = True
            writer.add_custom_scalars(layout(self._tags))
        news = False
        for row in rows:
            metric = row['metric']
            layers = {name: math.nan if own['value'] is None else own['value'] for name, own in row['layers'].items()}
            starts = self._starts.setdefault(metric, {})
            for name, value in layers.items():
                if math.isfinite(value):
                    starts.setdefault(name, value)
            if layers and self._is_due(metric, step):
                news = True
                finite = [value for value in layers.values() if math.isfinite(value)]
                if finite:
                    # Its default of 1550 bins for any number would take most of the time of a logged step's logging.
                    writer.add_histogram(f'{LAYERS}/{metric}', np.array(finite), step, bins=MOST_BINS)
                self._lines[metric] = line_of(metric, starts, layers)
        if news:
            order = dict.fromkeys([*self._tags, *self._lines])
            writer.add_text(WORST, text_of([self._lines[tag] for tag in order if tag in self._lines]), step)

    def _is_due(self, metric, step):
        count, last = self._written.get(metric, (0, None))
        due = count < 100 or step >= 1.01 * last
        if due:
            self._written[metric] = count + 1, step
        return due


def is_tensorboard(logger):
    """
    Is it the TensorBoardLogger of pytorch_lightning, of lightning, or of a class made of one?

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.dashboard import is_tensorboard
        >>> from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
        >>> is_tensorboard(TensorBoardLogger('.')), is_tensorboard(CSVLogger('.'))
        (True, False)
    """
    return any(cls.__name__ == 'TensorBoardLogger' for cls in type(logger).__mro__)


def layout(tags):
    """
    Custom scalars: a page with one chart per tag.

    Args:
        tags (List[str]): under ``plasticity/``

    Returns:
        Dict[str, dict]: for SummaryWriter.add_custom_scalars, which takes patterns of tags

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.dashboard import layout
        >>> layout(['erank'])
        {'plasticity': {'Effective rank of weights': ['Multiline', ['^plasticity/erank$']]}}
    """
    return {'plasticity': {words_of(tag).title: ['Multiline', [f'^plasticity/{re.escape(tag)}$']] for tag in tags}}


def worst(words, starts, layers):
    """
    The layers that are worst, that one first, by the rule of the metric's words.

    Args:
        words (Words): of the metric
        starts (Dict[str, float]): first finite value of each layer
        layers (Dict[str, float]): value of each layer now

    Returns:
        List[str]: their names

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.dashboard import worst
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
        >>> worst(METRICS['erank'].words, {'a': 50., 'b': 9., 'c': 8.}, {'a': 20., 'b': 8., 'c': 10.})
        ['a', 'b', 'c']
        >>> worst(METRICS['dead_units'].words, {'a': .5, 'b': 0.}, {'a': .4, 'b': .3})
        ['a', 'b']
    """
    return sorted(layers, key=lambda name: words.badness(starts.get(name, math.nan), layers[name]), reverse=True)


def words_of(metric):
    """ Words (Words) of a metric by its name, also of one that is not registered any more. """
    return METRICS[metric].words if metric in METRICS else Words(metric)


def line_of(metric, starts, layers):
    """
    One line of the text.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.dashboard import line_of
        >>> line_of('dead_units', {'act1': 0., 'act2': .02}, {'act1': 0., 'act2': .38})
        '| Dead units | `act2` 2 % → 38 %, `act1` 0 % → 0 % |'
    """
    words = words_of(metric)
    named = worst(words, starts, layers)[:MOST_NAMED]
    moves = [f'{code(name)} {words.text(starts.get(name))} \u2192 '
             f'{words.text(layers[name]) if math.isfinite(layers[name]) else "not finite"}' for name in named]
    title = words.title.replace('|', r'\|')
    return f'| {title} | {", ".join(moves)} |'


def code(name):
    """
    A name as code in a table of Markdown, whatever is in it.

    Args:
        name (str): of a layer, in which all but a dot may be

    Returns:
        str: between more backticks than it has in a row; a bar between backticks ends no cell

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.dashboard import code
        >>> print(code('fc1'), code('a|b'), code('`a``b'))
        `fc1` `a|b` ``` `a``b ```
    """
    name = ' '.join(name.split())
    fence = '`' * (1 + max(map(len, re.findall('`+', name)), default=0))
    space = ' ' if name.startswith('`') or name.endswith(('`', '\\')) else ''
    return f'{fence}{space}{name}{space}{fence}'


def text_of(lines):
    """ A table in Markdown, which TensorBoard renders. """
    return '\n'.join(['| metric | worst layers: first value of this run \u2192 now |', '| --- | --- |', *lines])

