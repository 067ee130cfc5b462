"""
report.html: one file that opens offline, interactive by plotly.js inside it.
"""
import datetime
import html
import json
import math
import re
from pathlib import Path

from .figures import LINE_POINTS, change_limit, change_of, layer_grid, short_names, style, wants_log
from .findings import bin_means, running_mean
from .foreign import readable
from .runs import ReportError
from .scalars import find_scalar
from .words import CAVEAT, METRICS, describe, in_order

# What a browser draws without delay.
HEATMAP_COLUMNS, HEATMAP_CELLS = 150, 20000
KINDS = {'broken': 'Broke', 'sign': 'Worth a look', 'calm': 'No sign', 'data': 'Data'}
ARROWS = {'rises': '\u2197', 'falls': '\u2198', 'steady': '\u2192', 'up and down': '\u223f'}


def write_page(table, findings, out, x='step'):
    """
    Write report.html.

    Args:
        table (Table): of the runs
        findings (List[Finding]): what to say first
        out (Path): folder
        x (str): 'step' or 'epoch', which the reader can change

    Returns:
        Path: the file
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as ex:
        raise ReportError(f"report.html needs plotly: pip install 'geowatch-plasticity[report]' ({ex})") from None
    parts = {
        'title': html.escape(_title(table)),
        'subtitle': html.escape(_subtitle(table)),
        'caveat': html.escape(CAVEAT),
        'findings': _findings(findings),
        'table': _table(table),
        'glossary': _glossary(table),
        # A closing tag inside a name must not end the script.
        'data': json.dumps(page_data(table, x)).replace('<', '\\u003c'),
        'plotly': get_plotlyjs(),
    }
    text = (Path(__file__).parent / 'page.html').read_text(encoding='utf-8')
    # In one pass, since a name may look like one of the places.
    text = re.sub(r'{{(\w+)}}', lambda place: parts[place[1]], text)
    fpath = out / 'report.html'
    fpath.write_text(text, encoding='utf-8', errors='replace')
    return fpath


def _title(table):
    return f'Plasticity of {table.runs[0].name}' if len(table.runs) == 1 else f'Plasticity of {len(table.runs)} runs'


def _subtitle(table):
    folders = ', '.join(map(str, table.runs[0].folders))
    drawn = f'drawn {datetime.datetime.now():%Y-%m-%d %H:%M}'
    return f'{folders} \u00b7 {drawn}' if len(table.runs) == 1 else drawn


def _pretty(text):
    return html.escape(text).replace('-&gt;', '\u2192')


def _findings(findings):
    items = []
    for finding in findings:
        about = f'<b>{html.escape(finding.run)}</b>: ' if finding.run else ''
        why = f'<p class="why">{_pretty(finding.why)}</p>' if finding.why else ''
        items.append(f'<li class="{finding.kind}"><span class="kind">{KINDS[finding.kind]}</span>'
                     f'<div><p>{about}{_pretty(finding.text)}</p>{why}</div></li>')
    return '\n'.join(items)


def _table(table):
    names = in_order(table.runs)
    heads = ['run', *table.settings, 'last step', *(describe(name).title for name in names)]
    heads += [table.under] if table.under else []
    rows = []
    for i, run in enumerate(table.runs):
        colour, dash = style(i)
        cells = [f'<th scope="row">{_swatch(colour, dash)}{html.escape(run.name)}</th>']
        cells += [f'<td>{html.escape(_value(values[i]))}</td>' for values in table.settings.values()]
        cells += [f'<td>{run.last_step}</td>']
        signs = table.signs(i)
        cells += [_trend_cell(name, table.trends[i].get(name), name in signs) for name in names]
        cells += [_trend_cell(table.under, table.under_trends[i], False)] if table.under else []
        rows.append(f'<tr>{"".join(cells)}</tr>')
    head = ''.join(f'<th scope="col">{html.escape(text)}</th>' for text in heads)
    return f'<thead><tr>{head}</tr></thead>\n<tbody>{"".join(rows)}</tbody>'


def _swatch(colour, dash):
    return f'<i class="swatch" style="border-top:3px {dash.replace("dashdot", "double")} {colour}"></i>'


def _value(value):
    return '\u2013' if value is None else f'{value:g}' if isinstance(value, float) else readable(str(value))


def _trend_cell(name, trend, is_sign):
    if trend is None or trend.start is None:
        return f'<td class="quiet">{"not measured" if trend is None else "never finite"}</td>'
    words = describe(name)
    ends = words.text(trend.start) if trend.points == 1 else f'{words.text(trend.start)} \u2192 {words.text(trend.end)}'
    broke = f', not finite from step {trend.broke_at}' if trend.broke_at is not None else ''
    arrow = ARROWS.get(trend.word, '')
    return (f'<td{" class=sign" if is_sign else ""}>{ends}'
            f'<small>{arrow} {trend.word}{broke}</small></td>')


def _glossary(table):
    items = []
    for name in in_order(table.runs):
        words = describe(name)
        if name in METRICS:
            rule = f' Named above when it {words.rule}.' if words.rule else ''
            items.append(f'<dt>{html.escape(words.title)}</dt><dd>{html.escape(words.about.capitalize())}. '
                         f'{html.escape(words.why)}{rule}</dd>')
    return '\n'.join(items)


def page_data(table, x):
    """
    What the page's script draws.

    Args:
        table (Table): of the runs
        x (str): the axis to begin with

    Returns:
        Dict[str, object]: plain data, short numbers, None where a value is not finite
    """
    runs, names = table.runs, in_order(table.runs)
    charts = []
    for name in names:
        words = describe(name)
        curves = [_line(run, [p.step for p in run.metrics.get(name, [])],
                        [p.value for p in run.metrics.get(name, [])]) for run in runs]
        charts.append({'name': name, 'title': words.title, 'about': words.about, 'percent': words.percent,
                       'log': not words.percent and _log(curves), 'curves': curves,
                       'layers': _layers(runs, name)})
    under = None
    if table.under:
        scalars = [find_scalar(run, table.under) or {} for run in runs]
        curves = [_line(run, list(s), list(s.values())) for run, s in zip(runs, scalars, strict=True)]
        under = {'title': table.under, 'log': _log(curves), 'curves': curves}
    return {
        'runs': [{'label': label, 'colour': style(i)[0], 'dash': _plotly_dash(style(i)[1])}
                 for i, label in enumerate(table.labels())],
        'x': x, 'epochs': all(run.steps_per_epoch for run in runs), 'charts': charts, 'under': under,
    }


def _log(curves):
    return wants_log([[math.nan if y is None else y for y in curve['y']] for curve in curves])


def _plotly_dash(dash):
    return {'dashed': 'dash', 'dotted': 'dot'}.get(dash, dash)


def _line(run, steps, values):
    steps, each = bin_means(steps, LINE_POINTS), max(1, math.ceil(len(steps) / LINE_POINTS))
    values = bin_means(values, LINE_POINTS)
    course = running_mean(values)
    return {'step': _round(steps), 'epoch': _round(run.to_epochs(steps) or []), 'y': _round(values),
            'course': course and _round(course), 'mean_of': each}


def _layers(runs, name):
    """ One heatmap per run: values to read, colours to see. """
    words, maps = describe(name), []
    for run in runs:
        height = max((len(point.layers) for point in run.metrics.get(name, [])), default=0)
        columns = max(20, min(HEATMAP_COLUMNS, HEATMAP_CELLS // max(1, height)))
        layers, steps, rows = layer_grid(run, name, 'step', columns)
        colours = list(map(change_of, rows)) if words.change_by_layer else rows
        maps.append({'layers': layers, 'short': short_names(layers, 25),
                     'step': steps, 'epoch': _round(run.to_epochs(steps) or []), 'z': [_round(row) for row in colours],
                     'text': [[words.text(value) for value in row] for row in rows],
                     'limit': change_limit(colours)})
    limit = max(item['limit'] for item in maps)
    return {'change': words.change_by_layer, 'limit': limit, 'maps': maps} if any(m['layers'] for m in maps) else None


def _round(values):
    return [float(f'{value:.5g}') if math.isfinite(value) else None for value in values]
