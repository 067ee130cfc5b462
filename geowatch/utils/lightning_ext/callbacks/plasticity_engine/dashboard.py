"""
What TensorBoard shows beyond the scalars: a page of all metrics and the loss, the layers, and how to read it all.
"""
import math
import re

import numpy as np

from ..plasticity_metrics import METRICS, Words

# The host draws a picture for each scalar tag, so that layers go into other kinds of tags.
LAYERS = 'plasticity_layers'
WORST = f'{LAYERS}/worst'
HOW_TO_READ = 'plasticity/how_to_read'
MOST_NAMED = 3
MOST_BINS = 30
# Steps between two histograms of one epoch.
AT_LEAST = 10
# Layers of which a histogram would show nothing but bars of one: the band says more.
FEW = 8
# What others log, on the same page: tags are matched from their start.
_LOSS = r'(?i)(?!.*plasticity).*loss'
_OF_BAND = {'lowest': 'of the layer where it is lowest', 'highest': 'of the layer where it is highest'}
_SCORE = (r'(?i)(?!.*plasticity)(?!.*loss)(.*[^a-z])?(val|valid|validation|test|acc|accuracy|f1|auc|auroc|iou|error)'
          r'([^a-z].*)?$')


class Dashboard:
    """
    Writes into the event file of one TensorBoardLogger.

    =================================  ==================================================
    Where                              What
    =================================  ==================================================
    Custom scalars                     the loss, validation, and a chart for each metric
    Custom scalars, second page        each metric with the band of its layers
    ``plasticity_layers/<metric>``     histogram over the layers, where they are many
    ``plasticity_layers/worst``        text: the layers that are worst, metric by metric
    ``plasticity/how_to_read``         text: what each tag is, and what is worth a look
    =================================  ==================================================

    Histogram and text of a metric are written again when an epoch is over or
    ten steps have passed, and the run has become five percent longer:
    TensorBoard shows no more of them, and most steps that are logged cost
    their scalars only.

    Args:
        logger (TensorBoardLogger): of either package
        tags (List[str]): what will be logged, under ``plasticity/``

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.dashboard import Dashboard, WORST
        >>> from pytorch_lightning.loggers import TensorBoardLogger
        >>> from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        >>> import ubelt as ub
        >>> logger = TensorBoardLogger(ub.Path.appdir('geowatch/tests/dashboard').delete())
        >>> layers = {f'fc{i}': {'value': float(i)} for i in range(9)}
        >>> Dashboard(logger, ['erank']).log({}, 9, [{'metric': 'erank', 'value': 4.0, 'layers': layers}])
        >>> logger.finalize('success')
        >>> events = EventAccumulator(logger.log_dir).Reload()
        >>> events.Tags()['histograms'], events.Histograms('plasticity_layers/erank')[0].histogram_value.sum
        (['plasticity_layers/erank'], 36.0)
        >>> sorted(events.Tags()['tensors'])[1:]
        ['plasticity/how_to_read/text_summary', 'plasticity_layers/worst/text_summary']
    """

    def __init__(self, logger, tags):
        self._logger = logger
        self._tags = list(tags)
        self._prefix = prefix_of(logger)
        self._has_layout = False
        self._starts = {}   # metric to the first finite value of each of its layers
        self._written = {}  # metric to step and epoch at which last
        self._lines = {}    # metric to its line in the text, as it was last measured

    def due(self, scalars, step, rows):
        """
        What is to be written of a measurement.

        Args:
            scalars (Dict[str, float]): what the logger gets
            step (int): on the x-axis
            rows (List[dict]): as in plasticity.jsonl

        Returns:
            Tuple[dict, int, List[dict]] | None: what :meth:`log` takes; None for nothing
        """
        rows = [row for row in rows if row['layers'] and self._is_due(row, step)]
        return ({}, step, rows) if rows else None

    def log(self, scalars, step, rows):
        """
        Args:
            scalars (Dict[str, float]): not used
            step (int): on the x-axis
            rows (List[dict]): as in plasticity.jsonl
        """
        writer = self._logger.experiment
        if not self._has_layout:
            # TensorBoard heeds the first one in a run, and users add theirs at the start.
            self._has_layout = True
            writer.add_custom_scalars(layout(self._tags, self._prefix))
            writer.add_text(HOW_TO_READ, table_of(self._tags), step)
        for row in rows:
            metric = row['metric']
            layers = {name: math.nan if own['value'] is None else own['value'] for name, own in row['layers'].items()}
            starts = self._starts.setdefault(metric, {})
            finite = {name: value for name, value in layers.items() if math.isfinite(value)}
            for name, value in finite.items():
                starts.setdefault(name, value)
            if len(finite) > FEW:
                # Its default of 1550 bins for any number would take most of the time of a logged step's logging.
                writer.add_histogram(f'{LAYERS}/{metric}', np.array([*finite.values()]), step, bins=MOST_BINS)
            self._lines[metric] = line_of(metric, starts, layers)
        order = dict.fromkeys([*self._tags, *self._lines])
        writer.add_text(WORST, text_of([self._lines[tag] for tag in order if tag in self._lines]), step)

    def _is_due(self, row, step):
        last, epoch = self._written.get(row['metric'], (-1, None))
        due = last < 0 or step >= 1.05 * last and (step >= last + AT_LEAST or row['epoch'] != epoch)
        if due:
            self._written[row['metric']] = step, row['epoch']
        return due


def band(rows):
    """
    The lowest and the highest layer of each metric.

    Args:
        rows (List[dict]): as in plasticity.jsonl

    Returns:
        Dict[str, float]: by tag, for charts of bands, which want the same steps as the metric has

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.dashboard import band
        >>> band([{'metric': 'erank', 'layers': {'fc1': {'value': 2.}, 'fc2': {'value': 3.}}}])
        {'plasticity_layers/erank/lowest': 2.0, 'plasticity_layers/erank/highest': 3.0}
    """
    found = {}
    for row in rows:
        values = [own['value'] for own in row['layers'].values() if own['value'] is not None] or [math.nan]
        found.update(zip(_band_of(row['metric']), (min(values), max(values)), strict=True))
    return found


def _band_of(metric):
    return [f'{LAYERS}/{metric}/{end}' for end in _OF_BAND]


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


def prefix_of(logger):
    """
    What a logger of Lightning puts before each tag.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.dashboard import prefix_of
        >>> from pytorch_lightning.loggers import TensorBoardLogger
        >>> prefix_of(TensorBoardLogger('.')), prefix_of(TensorBoardLogger('.', prefix='a'))
        ('', 'a-')
    """
    prefix = getattr(logger, '_prefix', '')
    return f'{prefix}{getattr(logger, "LOGGER_JOIN_CHAR", "-")}' if prefix else ''


def layout(tags, prefix=''):
    """
    Custom scalars: a page with the loss and a chart per tag, and one with the bands of their layers.

    Args:
        tags (List[str]): under ``plasticity/``
        prefix (str): before each tag

    Returns:
        Dict[str, dict]: for SummaryWriter.add_custom_scalars, which takes patterns of tags

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.dashboard import layout
        >>> pages = layout(['erank'])
        >>> list(pages['plasticity']), pages['plasticity']['Effective rank of weights']
        (['Loss', 'Validation', 'Effective rank of weights'], ['Multiline', ['^plasticity/erank$']])
        >>> pages['plasticity: lowest to highest layer']['Effective rank of weights'][1]
        ['plasticity/erank', 'plasticity_layers/erank/lowest', 'plasticity_layers/erank/highest']
    """
    charts = {'Loss': ['Multiline', [_LOSS]], 'Validation': ['Multiline', [_SCORE]]}
    charts.update({words_of(tag).title: ['Multiline', [f'^{re.escape(f"{prefix}plasticity/{tag}")}$']]
                   for tag in tags})
    bands = {words_of(tag).title: ['Margin', [f'{prefix}{one}' for one in (f'plasticity/{tag}', *_band_of(tag))]]
             for tag in tags}
    return {'plasticity': charts, 'plasticity: lowest to highest layer': bands}


def how_to_read(tag):
    """
    What a number is, and when it is worth a look.

    Args:
        tag (str): of a scalar, without what a logger puts before it

    Returns:
        str: in Markdown; empty for a tag that is none of ours

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.dashboard import how_to_read
        >>> how_to_read('plasticity/erank')
        'directions that the weights use, mean over layers. Worth a look when it falls to 0.8 of its start. \
Weights that use fewer directions can represent less. At step -1: the network before training.'
        >>> how_to_read('plasticity_layers/erank/fc1')[:34]
        'layer `fc1`: directions that the w'
    """
    where, _, rest = tag.partition('/')
    metric, _, layer = rest.partition('/')
    if metric == 'overhead':
        return "the monitor's share of the training time so far"
    words = words_of(metric)
    said = [words.about or words.title, *([f'Worth a look when it {words.rule}'] if words.rule else []),
            *([words.why.rstrip('.')] if words.why else []), 'At step -1: the network before training']
    if layer:
        said[0] = f'{_OF_BAND.get(layer) or f"layer {code(layer)}"}: {said[0]}'
    return '. '.join(said) + '.'


def table_of(tags):
    """ Of how to read each tag, in Markdown, which TensorBoard renders. """
    rows = [f'| `plasticity/{tag}` | {how_to_read(f"plasticity/{tag}")} |'.replace('\n', ' ') for tag in tags]
    return '\n'.join(['| tag | how to read it |', '| --- | --- |', *rows])


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

