"""
The pictures as PNG files, drawn with matplotlib and without its global state.
"""
import io
import itertools
import math
import re
import textwrap
from functools import partial

from .curves import (
    change_limit,
    change_of,
    differing_layers,
    layer_curve,
    layer_grid,
    metric_curve,
    short_names,
    under_curve,
    wants_log,
)
from .findings import running_mean
from .foreign import readable
from .glyphs import drawable, families
from .grid import cell_value, limits, majority, make_grid, setting_text, shade
from .runs import ReportError
from .styles import DEEP, PALE, styles
from .words import PANELS, describe, in_order

INK, QUIET, GRID = '#1f2933', '#66727f', '#e3e7eb'


def draw_all(table, out, x='step'):
    """
    Write PNG files: the grid, one of the paper's metrics, and two per metric, of the network and of layers.

    Args:
        table (Table): of the runs
        out (Path): folder
        x (str): 'step' or 'epoch'

    Returns:
        Tuple[List[Path], List[str]]: what was written, and a line on each that could not be drawn
    """
    with _fonts():
        return _write(_pictures(table, x), out)


def draw(table, name, x='step'):
    """
    One of the pictures, such as a notebook shows.

    Args:
        table (Table): of the runs
        name (str): of the file without .png: 'grid', 'panels', a metric, or 'layers-' and a metric
        x (str): 'step' or 'epoch'

    Returns:
        matplotlib.figure.Figure | None: None where runs differ in no setting, or in no layer

    Raises:
        ReportError: if there is no such picture, or no matplotlib
    """
    with _fonts():
        pictures = dict(_pictures(table, x))
        if name not in pictures:
            raise ReportError(f'Expected one of the pictures {", ".join(pictures)}, but got {readable(repr(name))}')
        return pictures[name]()


def _fonts():
    try:
        import matplotlib
    except ImportError as ex:
        raise ReportError(f'The pictures need matplotlib: pip install matplotlib ({ex})') from None
    return matplotlib.rc_context({'font.family': families()})


def _pictures(table, x):
    """ Names, and what draws them. """
    labels, names = list(map(_drawable, table.labels())), in_order(table.runs)
    pictures = [('grid', partial(_draw_grid, table)), ('panels', partial(_draw_panels, table, labels, x))]
    pictures += [(name, partial(_draw_metric, table, labels, name, x)) for name in names]
    pictures += [(f'layers-{name}', partial(_draw_layers, table.runs[0], labels[0], name, x) if len(table.runs) == 1
                  else partial(_draw_layer_curves, table, labels, name, x)) for name in names]
    return pictures


def _write(pictures, out):
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

    class Picture(Figure):
        """ Which a notebook shows without pyplot. """

        def _repr_png_(self):
            file = io.BytesIO()
            self.savefig(file, dpi=100, facecolor='white')
            return file.getvalue()

    figure = Picture(figsize=(width, height), layout='constrained')
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


def _draw_curves(axes, table, curves):
    """ Curves by run index; returns the lines for a legend. """
    lines, looks = {}, styles(table)
    for i, (xs, ys) in curves.items():
        if xs:
            colour, _, dash = looks[i]
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
    lines = _draw_curves(axes, table, curves)
    log = not words.percent and wants_log([ys for _, ys in curves.values()])
    _dress(axes, words.title, _subtitle(words.about, log, curves), words.percent, log)
    return lines


def _plot_under(axes, table, x):
    curves = {i: under_curve(run, table.under, x) for i, run in enumerate(table.runs)}
    lines = _draw_curves(axes, table, curves)
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


def _draw_layer_curves(table, labels, name, x):
    """ The layers in which runs differ, on one scale. """
    layers, _ = differing_layers(table, name)
    if not layers:
        return None
    words, columns = describe(name), min(3, len(layers))
    height = math.ceil(len(layers) / columns)
    figure = _figure(4 * columns, 0.8 + 2.2 * height)
    grid = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False).flatten()
    curves = [{i: layer_curve(run, name, layer, x) for i, run in enumerate(table.runs)} for layer in layers]
    log = not words.percent and wants_log([ys for own in curves for _, ys in own.values()])
    lines = {}
    for axes, own in zip(grid, curves, strict=False):
        lines.update(_draw_curves(axes, table, own))
    span = grid[0].get_ylim()
    for axes, layer in zip(grid, short_names(layers, 30), strict=False):
        if not log:
            axes.set_ylim(span)  # which is that of all, where each would stretch it
        _dress(axes, layer, '', words.percent, log)
    for axes in grid[len(layers):]:
        axes.axis('off')
    figure.supxlabel(_x_title(x), color=QUIET, fontsize=9)
    _legend(figure, lines, labels)
    return figure


def _draw_grid(table):
    """ Learning rate x batch size, coloured by what the runs are judged by. """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle
    grid = make_grid(table)
    if grid is None:
        return None
    count, (height, width) = len(grid.facets), (len(grid.rows), len(grid.columns))
    figure = _figure(max(4, 0.95 * width + 0.8) * count, 1.3 + 0.62 * height)
    quantity = next(iter(grid.quantities), None)
    scale = quantity and limits(table, quantity)
    colours = LinearSegmentedColormap.from_list('', [PALE, DEEP])
    for axes, facet in zip(figure.subplots(1, count, squeeze=False)[0], grid.facets, strict=True):
        for (row, column), runs in facet.cells.items():
            value = cell_value(quantity, runs) if quantity else math.nan
            part = quantity and shade(value, *scale)
            part = 1 - part if part is not None and quantity.better < 0 else part
            best = (row, column) == facet.best
            axes.add_patch(Rectangle((column + 0.03, row + 0.04), 0.94, 0.92, linewidth=2.5 if best else 0,
                                     facecolor=GRID if part is None else colours(part),
                                     edgecolor='#0b6e4f' if best else 'none'))
            text = '\n'.join(filter(None, [quantity and quantity.text(value), majority(table, runs)]))
            axes.text(column + 0.5, row + 0.5, text, ha='center', va='center', fontsize=8.5,
                      color='white' if part is not None and part > 0.6 else INK, fontweight='bold' if best else None)
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_xticks([i + 0.5 for i in range(width)], [_drawable(setting_text(value)) for value in grid.columns])
        rows = map(setting_text, grid.rows) if grid.titles[1] else ['']
        axes.set_yticks([i + 0.5 for i in range(height)], [_drawable(text) for text in rows])
        axes.tick_params(length=0, labelsize=9, colors=INK)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(_drawable(readable(grid.titles[0], 60)), color=QUIET, fontsize=9)
        axes.set_ylabel(_drawable(readable(grid.titles[1], 40)), color=QUIET, fontsize=9)
        title = ', '.join(filter(None, [facet.label, quantity and f'{quantity.title} at the end']))
        axes.set_title(_drawable(readable(title, 60)), loc='left', fontsize=11, fontweight='bold', color=INK)
    return figure


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
