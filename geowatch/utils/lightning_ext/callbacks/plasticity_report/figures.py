"""
The pictures as PNG files, drawn with matplotlib and without its global state.
"""
import itertools
import math
import re
import textwrap
from functools import partial

from .findings import bin_means, running_mean
from .foreign import readable
from .glyphs import drawable, families
from .runs import ReportError
from .scalars import find_scalar
from .words import PANELS, describe, in_order

# Okabe and Ito's colours, which people with colour blindness can tell apart, less the yellow, pale on white.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00', '#000000')
DASHES = ('solid', 'dashed', 'dotted', 'dashdot')
INK, QUIET, GRID = '#1f2933', '#66727f', '#e3e7eb'
# What can be seen in a picture; longer curves become means of neighbours.
LINE_POINTS = 600
# The most that colours tell of a layer's change, as a power of two.
MOST_CHANGE = 4.0


def style(i):
    """
    Colour and dash of the i-th run, the same in all pictures.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.figures import style
        >>> style(0), style(7)
        (('#0072B2', 'solid'), ('#0072B2', 'dashed'))
    """
    return COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]


def wants_log(curves):
    """
    Does a curve need a logarithmic axis?

    Args:
        curves (List[List[float]]): all that share the axis

    Returns:
        bool: True if all are positive and span more than a factor of 30

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.figures import wants_log
        >>> wants_log([[1., 2.], [100.]]), wants_log([[0., 100.]])
        (True, False)
    """
    # Of a noisy curve its course counts: one lucky batch should not flatten all else.
    values = [value for curve in curves for value in running_mean(curve) or curve if math.isfinite(value)]
    return bool(values) and min(values) > 0 and max(values) > 30 * min(values)


def metric_curve(run, name, x):
    """
    One curve of a run.

    Args:
        run (Run): which may lack the metric
        name (str): of the metric
        x (str): 'step' or 'epoch'

    Returns:
        Tuple[List[float], List[float]]: both axes
    """
    points = run.metrics.get(name, [])
    return _shortened(run, [p.step for p in points], [p.value for p in points], x)


def under_curve(run, name, x):
    """ Like metric_curve, of a scalar of the run's loggers. """
    scalar = name and find_scalar(run, name) or {}
    return _shortened(run, list(scalar), list(scalar.values()), x)


def _shortened(run, steps, values, x):
    return _on(run, bin_means(steps, LINE_POINTS), x), bin_means(values, LINE_POINTS)


def _on(run, steps, x):
    return steps if x == 'step' else run.to_epochs(steps) or []


def draw_all(table, out, x='step'):
    """
    Write one PNG per metric, one of all, and the heatmaps of the layers.

    Args:
        table (Table): of the runs
        out (Path): folder
        x (str): 'step' or 'epoch'

    Returns:
        Tuple[List[Path], List[str]]: what was written, and a line on each that could not be drawn
    """
    try:
        import matplotlib
    except ImportError as ex:
        raise ReportError(f"The pictures need matplotlib: pip install 'geowatch-plasticity[report]' ({ex})") from None
    with matplotlib.rc_context({'font.family': families()}):
        return _write(table, list(map(_drawable, table.labels())), out, x)


def _write(table, labels, out, x):
    names = in_order(table.runs)
    pictures = [('panels', partial(_draw_panels, table, labels, x))]
    pictures += [(name, partial(_draw_metric, table, labels, name, x)) for name in names]
    pictures += [(f'layers-{name}-{run.name}', partial(_draw_layers, run, label, name, x))
                 for run, label in zip(table.runs, labels, strict=True) for name in names]
    paths, left_out = [], []
    for name, draw in pictures:
        # A name of a file has 255 bytes.
        fname = re.sub(r'[^\w.=+-]+', '_', readable(name, 60))
        while out / f'{fname}.png' in paths:
            fname += '_'
        fpath = out / f'{fname}.png'
        try:
            figure = draw()
            if figure is not None:
                figure.savefig(fpath, dpi=150, facecolor='white')
                paths.append(fpath)
        except OSError:
            raise
        except Exception as ex:  # no axis of matplotlib reaches from 1 to 1e308
            left_out.append(f'{fpath.name} could not be drawn and is left out ({type(ex).__name__}: {ex})')
    return paths, left_out


def _verbatim(text):
    """ For matplotlib, which reads what stands between two dollars as a formula. """
    return text.replace('$', r'\$')


def _drawable(text):
    """ A name in letters that some font has. """
    return _verbatim(drawable(text))


def _figure(width, height):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout='constrained')
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, hspace=0.03, wspace=0.03)
    return figure


def _dress(axes, title, about='', percent=False, log=False):
    from matplotlib.ticker import PercentFormatter
    # 15 characters of this size fill an inch; a longer line would run into the axes beside.
    width = axes.figure.get_size_inches()[0] / axes.get_subplotspec().get_gridspec().ncols
    title, about = _drawable(readable(title, int(13 * width))), _drawable(textwrap.fill(about, int(15 * width)))
    lines = about.count('\n') + 1 if about else 0
    axes.set_title(title, loc='left', fontsize=11, fontweight='bold', color=INK, pad=6 + 2 * bool(lines) + 12 * lines)
    if about:
        note = axes.annotate(about, (0, 1), xytext=(0, 6), xycoords='axes fraction', textcoords='offset points',
                             fontsize=8, color=QUIET)
        note.set_in_layout(False)
    axes.spines[['top', 'right']].set_visible(False)
    axes.spines[['left', 'bottom']].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelsize=8.5, which='both')
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    if log:
        axes.set_yscale('log')
    elif percent:
        top = max(axes.get_ylim()[1], 0.01)
        axes.set_ylim(-0.03 * top, min(1.03, 1.05 * top))
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=' %'))
    else:
        # A sum beside the axis is hard to read, and a factor would stand in the note above it.
        axes.ticklabel_format(axis='y', useOffset=False)
        axes.yaxis.get_offset_text().set(x=-0.01, ha='right', color=QUIET, fontsize=8.5)


def _draw_curves(axes, curves):
    """ Curves by run index; returns the lines for a legend. """
    lines = {}
    for i, (xs, ys) in curves.items():
        if xs:
            colour, dash = style(i)
            # A point between gaps, or alone, is seen only with a marker.
            marker = 'o' if len(xs) <= 12 or not all(map(math.isfinite, ys)) else None
            course = running_mean(ys)
            if course:
                axes.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.25)
            lines[i], = axes.plot(xs, course or ys, color=colour, linestyle=dash, linewidth=1.8,
                                  marker=None if course else marker, markersize=3.5)
    if not any(map(math.isfinite, (y for _, ys in curves.values() for y in ys))):
        axes.text(0.5, 0.5, 'no finite value', transform=axes.transAxes, ha='center', color=QUIET, fontsize=9)
    return lines


def _plot(axes, table, name, x):
    words = describe(name)
    curves = {i: metric_curve(run, name, x) for i, run in enumerate(table.runs)}
    lines = _draw_curves(axes, curves)
    log = not words.percent and wants_log([ys for _, ys in curves.values()])
    _dress(axes, words.title, _subtitle(words.about, log, curves), words.percent, log)
    return lines


def _plot_under(axes, table, x):
    curves = {i: under_curve(run, table.under, x) for i, run in enumerate(table.runs)}
    lines = _draw_curves(axes, curves)
    log = wants_log([ys for _, ys in curves.values()])
    _dress(axes, table.under, _subtitle('', log, curves), log=log)
    return lines


def _subtitle(about, log, curves):
    smooth = any(running_mean(ys) for _, ys in curves.values())
    return ', '.join(filter(None, [about, log and 'logarithmic', smooth and 'bold: running mean']))


def _legend(figure, lines, labels):
    width, height = figure.get_size_inches()
    if len(labels) > 1 and lines:
        shown = sorted(lines)
        columns = max(1, min(len(shown), int(width * 11 / (6 + max(len(labels[i]) for i in shown)))))
        # A long legend makes the figure taller instead of the axes smaller.
        figure.set_size_inches(width, height + 0.19 * (math.ceil(len(shown) / columns) - 1))
        figure.legend([lines[i] for i in shown], [labels[i] for i in shown], loc='outside upper left',
                      ncols=columns, frameon=False, fontsize=9, labelcolor=INK, handlelength=2.4)
    else:
        figure.suptitle(', '.join(labels), x=0.01, ha='left', fontsize=10, color=QUIET)


def _draw_metric(table, labels, name, x):
    has_under = any(under_curve(run, table.under, x)[0] for run in table.runs)
    figure = _figure(8, 5.6 if has_under else 4)
    if has_under:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
        lines = {**_plot_under(bottom, table, x), **_plot(top, table, name, x)}
    else:
        top = bottom = figure.subplots()
        lines = _plot(top, table, name, x)
    bottom.set_xlabel(_x_title(x), color=QUIET, fontsize=9)
    _legend(figure, lines, labels)
    return figure


def _draw_panels(table, labels, x):
    """ The five metrics side by side as in the paper's figure, and the loss. """
    figure = _figure(12, 6.8)
    grid = figure.subplots(2, 3, sharex=True).flatten()
    lines = {}
    for axes, name in zip(grid, PANELS, strict=False):
        if any(name in run.metrics for run in table.runs):
            lines.update(_plot(axes, table, name, x))
        else:
            axes.text(0.5, 0.5, 'not measured', transform=axes.transAxes, ha='center', color=QUIET)
            _dress(axes, describe(name).title, describe(name).about)
            axes.set_yticks([])
    if table.under:
        lines.update(_plot_under(grid[5], table, x))
    else:
        grid[5].axis('off')
    for axes in grid:
        axes.tick_params(labelbottom=True)
    for axes in grid[3:]:
        axes.set_xlabel(_x_title(x), color=QUIET, fontsize=9)
    _legend(figure, lines, labels)
    return figure


def _x_title(x):
    return 'training step' if x == 'step' else 'epochs gone by'


def layer_grid(run, name, x, columns=400):
    """
    The layers of a run over time.

    Args:
        run (Run): which may lack the metric
        name (str): of the metric
        x (str): 'step' or 'epoch'
        columns (int): the most measurements, evenly spread, first and last included

    Returns:
        Tuple[List[str], List[float], List[List[float]]]: names in network order, x axis, a row of values per layer
    """
    points = run.metrics.get(name, [])
    if len(points) > columns:
        points = [points[round(i * (len(points) - 1) / (columns - 1))] for i in range(columns)]
    layers = list(dict.fromkeys(layer for point in points for layer in point.layers))
    xs = _on(run, [p.step for p in points], x)
    return layers if xs else [], xs, [[p.layers.get(layer, math.nan) for p in points] for layer in layers]


def change_of(values):
    """
    A layer's values as powers of two of its first one above zero.

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.figures import change_of
        >>> change_of([4.0, 8.0, 2.0, 0.0])
        [0.0, 1.0, -1.0, -4.0]
    """
    first = next((value for value in values if math.isfinite(value) and value > 0), math.nan)
    # What has collapsed to zero gets the last colour, not the one of a gap.
    return [math.nan if not math.isfinite(value) else
            max(-MOST_CHANGE, min(MOST_CHANGE, math.log2(value) - math.log2(first))) if value > 0 else -MOST_CHANGE
            for value in values]


def change_limit(rows):
    """ A symmetric limit of the colour scale: no less than 25 percent. """
    largest = max((abs(value) for row in rows for value in row if math.isfinite(value)), default=0)
    return max(0.32, largest)


def _draw_layers(run, label, name, x):
    layers, xs, rows = layer_grid(run, name, x)
    if not layers:
        return None
    words = describe(name)
    height = min(36, 1.5 + 0.22 * len(layers))
    figure = _figure(9, height)
    axes = figure.subplots()
    # Cells reach halfway to their neighbours.
    middles = [(a + b) / 2 for a, b in itertools.pairwise(xs)]
    reach = (xs[-1] - xs[0]) / (2 * (len(xs) - 1)) if len(xs) > 1 else 0.5
    edges = [xs[0] - reach, *middles, xs[-1] + reach]
    if words.change_by_layer:
        colours = [change_of(row) for row in rows]
        limit = change_limit(colours)
        options = {'cmap': 'PuOr_r', 'vmin': -limit, 'vmax': limit}
    else:
        colours, options = rows, {'cmap': 'YlOrBr', 'vmin': 0, 'vmax': 1 if words.percent else None}
    image = axes.pcolormesh(edges, range(len(layers) + 1), colours, rasterized=True, **options)
    axes.set_facecolor('#d5dade')
    axes.invert_yaxis()
    shown = range(0, len(layers), math.ceil(len(layers) / 170))
    names = short_names([drawable(layer) for layer in layers], 44)
    axes.set_yticks([i + 0.5 for i in shown], [_verbatim(names[i]) for i in shown])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8.5, colors=INK)
    axes.set_title(_drawable(f'{readable(words.title, 80)} by layer'), loc='left', fontsize=11, fontweight='bold',
                   color=INK, pad=20)
    axes.annotate(label, (0, 1), xytext=(0, 6), xycoords='axes fraction', textcoords='offset points',
                  fontsize=8.5, color=QUIET)
    axes.set_xlabel(_x_title(x), color=QUIET, fontsize=9)
    ends = axes.secondary_yaxis('right')
    ends.set_yticks([i + 0.5 for i in shown], [_ends(words, rows[i]) for i in shown])
    ends.tick_params(length=0, labelsize=8, colors=QUIET)
    ends.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=max(6, 5 * height), fraction=0.05)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, colors=QUIET)
    if words.change_by_layer:
        ticks = [-limit, -limit / 2, 0, limit / 2, limit]
        bar.set_ticks(ticks, labels=[f'\u00d7{2 ** tick:.2g}' for tick in ticks])
        bar.set_label('times its own start', color=QUIET, fontsize=8)
    elif words.percent:
        bar.set_ticks([0, 0.5, 1], labels=['0 %', '50 %', '100 %'])
    return figure


def _ends(words, row):
    finite = [value for value in row if math.isfinite(value)]
    return f'{words.text(finite[0])} \u2192 {words.text(finite[-1])}' if finite else 'n/a'


def short_names(layers, most):
    """
    Names of layers to write beside a picture: long ones without what all begin with.

    Args:
        layers (List[str]): dotted names
        most (int): longest name; longer ones lose their middle

    Returns:
        List[str]: in the same order

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.figures import short_names
        >>> short_names(['model.blocks.0.fc1', 'model.blocks.11.attention'], 10)
        ['0.fc1', '11.a\u2026tion']
    """
    if all(len(layer) <= most for layer in layers):
        return list(layers)
    parts = [layer.split('.') for layer in layers]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts) and len(parts) > 1:
        shared += 1
    names = ['.'.join(p[shared:]) for p in parts]
    return [readable(name, most) for name in names]
