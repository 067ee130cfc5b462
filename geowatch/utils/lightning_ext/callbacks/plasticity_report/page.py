"""
report.html: one file that opens offline and draws itself, without any library.
"""
import datetime
import html
import json
import math
import re
from pathlib import Path

from .advice import advise
from .curves import differing_layers, layer_curve, layer_grid, metric_curve, short_names, under_curve, wants_log
from .findings import running_mean
from .foreign import readable
from .grid import cell_value, limits, majority, make_grid, setting_text, shade
from .styles import styles
from .verdicts import summary
from .words import CAVEAT, METRICS, describe, in_order

# Numbers that a page of all curves, and of all layers, has room for; points that one curve and one layer need.
MOST_NUMBERS, LINE_POINTS, LAYER_POINTS = 40_000, 600, 100
# More runs than this are drawn by their running means alone: noise upon noise shows nothing.
MOST_NOISY = 6
HEATMAP_COLUMNS, HEATMAP_CELLS = 60, 4000
ARROWS = {'rises': '\u2197', 'falls': '\u2198', 'steady': '\u2192', 'up and down': '\u223f'}
HERE = Path(__file__).parent


def write_page(table, findings, out, x='step'):
    """
    Write report.html.

    Args:
        table (Table): of the runs
        findings (List[Finding]): what to say
        out (Path): folder
        x (str): 'step' or 'epoch', which the reader can change

    Returns:
        Path: the file
    """
    fpath = out / 'report.html'
    fpath.write_text(render(table, findings, x), encoding='utf-8', errors='replace')
    return fpath


def render(table, findings, x='step'):
    """
    The page as text.

    Args:
        table (Table): of the runs
        findings (List[Finding]): what to say
        x (str): 'step' or 'epoch'

    Returns:
        str: HTML
    """
    grid = make_grid(table)
    looks = styles(table)
    parts = {
        'title': html.escape(_title(table)),
        'subtitle': html.escape(_subtitle(table)),
        'caveat': html.escape(CAVEAT),
        'answer': _answer(table, grid),
        'findings': _findings(findings),
        'table': _table(table, looks),
        'glossary': _glossary(table),
        # A closing tag inside a name must not end the script.
        'data': json.dumps(page_data(table, looks, x, grid), separators=(',', ':')).replace('<', '\\u003c'),
        'light': ''.join(f'--run{i}:{look.colour};' for i, look in enumerate(looks)),
        'dark': ''.join(f'--run{i}:{look.dark};' for i, look in enumerate(looks)),
        'css': (HERE / 'page.css').read_text(encoding='utf-8'),
        'js': ''.join((HERE / name).read_text(encoding='utf-8') for name in ('pictures.js', 'page.js')),
    }
    # In one pass, since a name may look like one of the places.
    return re.sub(r'{{(\w+)}}', lambda place: parts[place[1]], (HERE / 'page.html').read_text(encoding='utf-8'))


def _title(table):
    return f'Plasticity of {table.runs[0].name}' if len(table.runs) == 1 else f'Plasticity of {len(table.runs)} runs'


def _subtitle(table):
    folders = ', '.join(map(str, table.runs[0].folders))
    drawn = f'drawn {datetime.datetime.now():%Y-%m-%d %H:%M}'
    return f'{folders} \u00b7 {drawn}' if len(table.runs) == 1 else drawn


def _pretty(text):
    return html.escape(text).replace('-&gt;', '\u2192')


# --- words ----------------------------------------------------------------


def _answer(table, grid):
    """ What the grid says, and the verdicts, best first. """
    items = []
    for advice in advise(table, grid) if grid else []:
        lines = html.escape('\n'.join(advice.commands))
        how = f'<details><summary>as a command</summary><pre><code>{lines}</code></pre></details>' if lines else ''
        first, dot, rest = advice.text.partition('. ')
        items.append(f'<li><b>{_pretty(first + dot)}</b>{_pretty(rest)}{how}</li>' if not items else
                     f'<li>{_pretty(advice.text)}{how}</li>')
    runs = ''.join(f'<li>{_pretty(line)}</li>' for line in summary(table))
    return ((f'<ul class="advice">{"".join(items)}</ul>' if items else '')
            + (f'<ul class="verdicts">{runs}</ul>' if runs else ''))


def _findings(findings):
    items = []
    for finding in findings:
        about = f'<b>{html.escape(finding.run)}</b>: ' if finding.run else ''
        why = f'<p class="why">{_pretty(finding.why)}</p>' if finding.why else ''
        items.append(f'<li class="{finding.kind}"><span class="kind">{html.escape(finding.head)}</span>'
                     f'<div><p>{about}{_pretty(finding.text)}</p>{why}</div></li>')
    return '\n'.join(items)


def _table(table, looks):
    """ Best run first; the loss, settings and the verdict before the metrics. """
    names = in_order(table.runs)
    heads = ['run', 'verdict', *([table.under] if table.under else []), *table.settings,
             *(describe(name).title for name in names), 'last step']
    rows = []
    for i in table.order:
        run, verdict, signs = table.runs[i], table.verdicts[i], table.signs(i)
        best = '<b class="best">best</b> ' if verdict.best else ''
        cells = [(f'{best}<b class="word {verdict.word.replace(" ", "-")}">{html.escape(verdict.word or "?")}</b>'
                  f'<small>{_pretty(verdict.reason)}</small>', table.order.index(i), '')]
        cells += [_trend_cell(table.under, table.under_trends[i], False)] if table.under else []
        cells += [(html.escape(setting_text(values[i])), values[i], '') for values in table.settings.values()]
        cells += [_trend_cell(name, table.trends[i].get(name), name in signs) for name in names]
        cells += [(str(run.last_step), run.last_step, '')]
        tds = ''.join(f'<td{kind} data-title="{html.escape(head)}" data-v="{html.escape(_sort_key(key))}">{text}</td>'
                      for head, (text, key, kind) in zip(heads[1:], cells, strict=True))
        rows.append(f'<tr><th scope="row" data-v="{html.escape(run.name)}">{_swatch(i, looks[i])}'
                    f'{html.escape(run.name)}</th>{tds}</tr>')
    head = ''.join(f'<th scope="col"><button>{html.escape(readable(text, 60))}</button></th>' for text in heads)
    return f'<thead><tr>{head}</tr></thead>\n<tbody>{"".join(rows)}</tbody>'


def _swatch(i, look):
    return f'<i class="swatch" style="border-top:3px {look.dash.replace("dashdot", "double")} var(--run{i})"></i>'


def _sort_key(value):
    return '' if value is None else str(value)


def _trend_cell(name, trend, is_sign):
    if trend is None or trend.start is None:
        return ('not measured' if trend is None else 'never finite'), None, ' class="quiet"'
    words = describe(name)
    ends = words.text(trend.start) if trend.points == 1 else f'{words.text(trend.start)} \u2192 {words.text(trend.end)}'
    broke = f', not finite from step {trend.broke_at}' if trend.broke_at is not None else ''
    text = f'{html.escape(ends)}<small>{ARROWS.get(trend.word, "")} {trend.word}{broke}</small>'
    return text, trend.end, ' class="sign"' if is_sign else ''


def _glossary(table):
    items = []
    for name in in_order(table.runs):
        words = describe(name)
        if name in METRICS:
            rule = f' Named above when it {words.rule}.' if words.rule else ''
            items.append(f'<dt>{html.escape(words.title)}</dt><dd>{html.escape(words.about.capitalize())}. '
                         f'{html.escape(words.why)}{rule}</dd>')
    return '\n'.join(items)


# --- data of the pictures -------------------------------------------------


def page_data(table, looks, x, grid):
    """
    What the page's script draws.

    Args:
        table (Table): of the runs
        looks (List[Style]): of the runs
        x (str): the axis to begin with
        grid (Grid | None): of the runs

    Returns:
        Dict[str, object]: plain data, short numbers, None where a value is not finite
    """
    runs, names = table.runs, in_order(table.runs)
    steps = _Shared()
    points = max(50, min(LINE_POINTS, MOST_NUMBERS // (len(runs) * (len(names) + 1))))

    def chart(curve, **about):
        curves = [curve(run, points) for run in runs]
        return {**about, 'log': not about['percent'] and wants_log([ys for _, ys in curves]),
                'curves': [_line(steps, *c, len(runs) <= MOST_NOISY) if c[0] else None for c in curves]}

    charts = [chart(lambda run, most, name=name: metric_curve(run, name, 'step', most), name=name,
                    title=describe(name).title, about=describe(name).about, percent=describe(name).percent)
              for name in names]
    layers = [_layer_map(runs[0], name) if len(runs) == 1 else differing_layers(table, name) for name in names]
    shown = sum(len(kept) for kept, _ in layers) if len(runs) > 1 else 1
    most = max(8, min(LAYER_POINTS, MOST_NUMBERS // max(1, shown * len(runs))))
    for item, name, own in zip(charts, names, layers, strict=True):
        item['layers'] = own if len(runs) == 1 else _layer_curves(runs, name, steps, most, *own)
    under = table.under and chart(lambda run, most: under_curve(run, table.under, 'step', most), name='under',
                                  title=table.under, about='', percent=False)
    return {
        'runs': [{'label': label, 'dash': look.dash, 'each': run.steps_per_epoch}
                 for label, look, run in zip(table.labels(), looks, runs, strict=True)],
        'x': x, 'epochs': all(run.steps_per_epoch for run in runs), 'charts': charts, 'under': under or None,
        'grid': grid and grid_data(table, grid), 'steps': steps.lists,
    }


class _Shared:
    """ Lists that many curves have in common, once. """

    def __init__(self):
        self.lists, self._places = [], {}

    def place(self, values):
        key = tuple(values)
        if key not in self._places:
            self._places[key] = len(self.lists)
            self.lists.append(_round(values))
        return self._places[key]


def _line(steps, xs, values, noisy=True):
    """ A curve, and its course: of many runs only that. """
    course = running_mean(values)
    first = values if noisy or not course else course
    line = {'s': steps.place(xs), 'y': _round(first)}
    return {**line, 'course': _round(course)} if course and noisy else line


def _layer_curves(runs, name, steps, points, layers, total):
    """ Small pictures, on one scale, of the layers in which runs differ. """
    curves = [[layer_curve(run, name, layer, 'step', points) for run in runs] for layer in layers]
    every = [ys for own in curves for _, ys in own]
    return total and {'names': short_names(layers, 30), 'full': layers, 'total': total,
                      'log': not describe(name).percent and wants_log(every),
                      'curves': [[_line(steps, *c) if c[0] else None for c in own] for own in curves]} or None


def _layer_map(run, name):
    """ A heatmap of a single run. """
    height = max((len(point.layers) for point in run.metrics[name]), default=0)
    columns = max(20, min(HEATMAP_COLUMNS, HEATMAP_CELLS // max(1, height)))
    layers, steps, rows = layer_grid(run, name, 'step', columns)
    return {'full': layers, 'names': short_names(layers, 30), 'change': describe(name).change_by_layer,
            'steps': steps, 'rows': [_round(row) for row in rows]} if layers else None


def grid_data(table, grid):
    """
    The grid as the page draws it.

    Args:
        table (Table): of the runs
        grid (Grid): of the same

    Returns:
        Dict[str, object]: plain data
    """
    facets = []
    for facet in grid.facets:
        cells = [{'row': row, 'column': column, 'runs': runs, 'word': majority(table, runs),
                  'best': (row, column) == facet.best} for (row, column), runs in sorted(facet.cells.items())]
        facets.append({'label': facet.label, 'cells': cells})
    shades = []
    for quantity in grid.quantities:
        scale = limits(table, quantity)
        values = [[cell_value(quantity, cell['runs']) for cell in facet['cells']] for facet in facets]
        shades.append({
            'title': quantity.title, 'better': quantity.better, 'low': quantity.text(scale[0]),
            'high': quantity.text(scale[1]),
            'cells': [[[quantity.text(value), shade(value, *scale)] for value in own] for own in values]})
    return {'x': grid.titles[0], 'y': grid.titles[1], 'columns': list(map(setting_text, grid.columns)),
            'rows': list(map(setting_text, grid.rows)) if grid.titles[1] else [''], 'facets': facets,
            'quantities': shades}


def _round(values):
    return [_short(value) if math.isfinite(value) else None for value in values]


def _short(value):
    """ As few letters as five digits need. """
    value = float(f'{value:.5g}')
    return int(value) if value.is_integer() and abs(value) < 1e15 else value
