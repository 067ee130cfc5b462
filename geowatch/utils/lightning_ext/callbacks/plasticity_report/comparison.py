"""
Runs compared, for Python and notebooks: the report as an object.
"""
import html
import math

from .advice import advise
from .curves import choose_x
from .figures import draw
from .findings import find, make_table, to_records
from .foreign import readable
from .frames import import_pandas, read
from .grid import cell_value, limits, majority, make_grid, setting_text, shade
from .runs import ReportError
from .scalars import choose_under
from .styles import DEEP, PALE
from .verdicts import summary
from .words import describe, in_order

# What is read on the two ends of the scale of colours.
DARK_TEXT, LIGHT_TEXT = '#1f2933', '#ffffff'
# Names may hold what MathJax takes for a formula.
PLAIN = 'tex2jax_ignore mathjax_ignore'


class Comparison:
    """
    What the report says of some runs, see :func:`compare`.

    Args:
        table (Table): of the runs

    Attributes:
        summary (List[str]): the verdicts, best first, then what the grid of settings says
        findings (List[str]): what else is worth a look, and notes on the data
        verdicts (Dict[str, Verdict]): name of a run to its verdict, best first, with word, reason, best, at (the step
            at which it broke) and rate ('too low', 'too high' or nothing)

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.comparison import Comparison
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.findings import make_table
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.runs import Point, Run
        >>> run = Run([], {'weight_mag': [Point(0, 0, 0.5, None, {}), Point(9, 0, 0.6, None, {})]}, {}, [], name='a')
        >>> Comparison(make_table([run])).verdicts['a'].word
        'learned'
    """

    def __init__(self, table):
        self._table, self._grid, self._x = table, make_grid(table), choose_x(table.runs)
        advice = advise(table, self._grid) if self._grid else []
        self.summary = [*summary(table), *(one.text for one in advice)]
        self.findings = [finding.sentence for finding in find(table)]
        self.verdicts = {table.runs[i].name: table.verdicts[i] for i in table.order}

    def __repr__(self):
        return '\n'.join(self.summary)

    @property
    def table(self):
        """
        One row per run (pandas.DataFrame), best first: run, verdict, verdict_reason, best, the settings, and of each
        metric and the loss where it began and ended, as ``<name>.start`` and ``<name>.end``. The columns are those
        of ``--format=csv``.
        """
        records = to_records(self._table)
        under = [key for key in records[0] if key.rpartition('.')[0] == self._table.under]
        first = ['run', 'verdict', 'verdict_reason', 'best', *self._table.settings, *under]
        heads = dict.fromkeys([*first, *records[0]])
        return import_pandas().DataFrame([records[i] for i in self._table.order], columns=list(heads))

    def grid(self, colour=None):
        """
        Two settings against each other, such as learning rate (columns) and batch size (rows).

        Args:
            colour (str | None): what a cell holds: 'verdict', or one of the report's switch, such as 'val_acc',
                'Dead units' or 'time'. By itself the loss or accuracy that runs are judged by

        Returns:
            pandas.DataFrame: nan where there is no run, the mean over runs of one cell. Where further settings differ,
                they are the first level of the rows

        Raises:
            ReportError: if no setting differs between the runs, or there is no such colour
        """
        pd, grid = import_pandas(), self._grid
        if grid is None:
            raise ReportError('Expected runs that differ in a setting, as hparams.yaml or config.yaml have it, but '
                              'these do not')
        known = {quantity.title: quantity for quantity in grid.quantities}
        colour = next(iter(known), 'verdict') if colour is None else colour
        if colour != 'verdict' and colour not in known:
            raise ReportError(f'Expected `colour` to be one of {", ".join([*known, "verdict"])}, but got {colour!r}')
        columns = pd.Index(grid.columns, name=grid.titles[0])
        frames = {}
        for facet in grid.facets:
            rows = [[None] * len(grid.columns) for _ in grid.rows]
            for (row, column), runs in facet.cells.items():
                rows[row][column] = majority(self._table, runs) if colour == 'verdict' else cell_value(
                    known[colour], runs)
            frames[facet.label] = pd.DataFrame(rows, pd.Index(grid.rows, name=grid.titles[1] or None), columns,
                                               dtype='object' if colour == 'verdict' else 'float64')
        return pd.concat(frames) if len(frames) > 1 else next(iter(frames.values()))

    def figure(self, name='grid', x=None):
        """
        One of the report's pictures, which a notebook shows.

        Args:
            name (str): 'grid', 'panels', a metric such as 'erank', or its layers, 'layers-erank'
            x (str | None): 'step' or 'epoch'; by itself epochs where these have different numbers of steps

        Returns:
            matplotlib.figure.Figure | None: None for a grid where no setting differs, or layers where none differs

        Raises:
            ReportError: if there is no such picture, or no matplotlib
        """
        return draw(self._table, name, x or self._x)

    def _repr_html_(self):
        """ For notebooks: the summary, the grid and a row for each run; what others have named is text in it. """
        lines = ''.join(f'<li>{html.escape(readable(line, 500))}</li>' for line in self.summary)
        return (f'<div class="{PLAIN}" style="max-width:75em"><ul style="margin:0 0 .8em;padding-left:1.4em">{lines}'
                f'</ul>{self._grid_html()}{self._table_html()}</div>')

    def _grid_html(self):
        table, grid = self._table, self._grid
        if grid is None:
            return ''
        quantity = next(iter(grid.quantities), None)
        scale = quantity and limits(table, quantity)
        heads = _cells('th', [grid.titles[1], *map(setting_text, grid.columns)])
        parts = []
        for facet in grid.facets:
            rows = []
            for row, value in enumerate(grid.rows):
                tds = []
                for column in range(len(grid.columns)):
                    runs = facet.cells.get((row, column))
                    if not runs:
                        tds.append('<td></td>')
                        continue
                    own = cell_value(quantity, runs) if quantity else math.nan
                    part = shade(own, *scale) if quantity else None
                    part = 1 - part if part is not None and quantity.better < 0 else part
                    text = '<br>'.join(html.escape(line) for line in (
                        quantity.text(own) if quantity else '', majority(table, runs)) if line)
                    mark = 'outline:2px solid #0b6e4f;' if (row, column) == facet.best else ''
                    tds.append(f'<td style="{mark}{_colours(part)}">{text}</td>')
                rows.append(f'<tr>{_cells("th", [setting_text(value) if grid.titles[1] else ""])}{"".join(tds)}</tr>')
            title = ', '.join(filter(None, [facet.label, f'{quantity.title} at the end' if quantity else 'verdicts',
                                            f'{grid.titles[0]} from left to right']))
            parts.append('<table style="margin:0 0 .8em;text-align:center">'
                         f'<caption style="text-align:left;white-space:nowrap">{html.escape(readable(title))}</caption>'
                         f'<tr>{heads}</tr>{"".join(rows)}</table>')
        return ''.join(parts)

    def _table_html(self):
        table, names = self._table, in_order(self._table.runs)
        heads = ['run', 'verdict', *([table.under] if table.under else []), *table.settings,
                 *(describe(name).title for name in names)]
        rows = []
        for i in table.order:
            verdict = table.verdicts[i]
            word = f'{"best, " if verdict.best else ""}{verdict.word or "?"}'
            cells = [table.runs[i].name, f'{word}: {verdict.reason}' if verdict.reason else word]
            cells += [_ends(table.under, table.under_trends[i])] if table.under else []
            cells += [setting_text(values[i]) for values in table.settings.values()]
            cells += [_ends(name, table.trends[i].get(name)) for name in names]
            rows.append(f'<tr>{_cells("td", cells)}</tr>')
        return f'<table><tr>{_cells("th", heads)}</tr>{"".join(rows)}</table>'


def compare(runs, under='auto'):
    """
    Compare runs as the report does.

    Args:
        runs (str | PathLike | List[str | PathLike]): run folders, log folders or globs, as the report takes them
        under (str): the loss or metric to judge runs by, as it was logged; 'auto' takes one of validation where there
            is one, and else the training loss; 'none' nothing

    Returns:
        Comparison: which a notebook shows as the verdicts, the grid and a table

    Raises:
        ReportError: if nothing was measured in any of the folders, or no run has what is asked for

    Example:
        >>> # xdoctest: +REQUIRES(module:pandas)
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report import compare
        >>> import ubelt as ub
        >>> dpath = ub.Path.appdir('geowatch/tests/compare').delete().ensuredir()
        >>> for lr, end in [(0.1, 'null'), (0.01, '0.06')]:
        >>>     folder = (dpath / f'lr{lr}').ensuredir()
        >>>     _ = (folder / 'hparams.yaml').write_text(f'lr: {lr}')
        >>>     _ = (folder / 'plasticity.jsonl').write_text('\\n'.join(
        >>>         f'{{"metric": "weight_mag", "step": {step}, "epoch": 0, "value": {value}, "layers": {{}}}}'
        >>>         for step, value in [(-1, 0.05), (9, end)]))
        >>> found = compare(dpath)
        >>> found.table[['run', 'verdict', 'learning rate', 'weight_mag.end']].values.tolist()
        [['lr0.01', 'learned', 0.01, 0.06], ['lr0.1', 'diverged', 0.1, 0.05]]
        >>> found.grid('verdict').values.tolist()
        [['learned', 'diverged']]
    """
    found = read(runs)
    return Comparison(make_table(found, choose_under(found, under)))


def _cells(tag, texts):
    return ''.join(f'<{tag} style="text-align:left">{html.escape(readable(text))}</{tag}>' for text in texts)


def _ends(name, trend):
    """ Where a curve began and ended. """
    if trend is None or trend.start is None:
        return 'not measured' if trend is None else 'never finite'
    words = describe(name)
    broke = f', not finite from step {trend.broke_at}' if trend.broke_at is not None else ''
    return f'{words.text(trend.start)}\u00a0\u2192\u00a0{words.text(trend.end)}{broke}'


def _colours(part):
    """ Of a cell, also where the notebook is dark. """
    if part is None:
        return ''
    ends = (bytes.fromhex(colour.removeprefix('#')) for colour in (PALE, DEEP))
    mixed = [round(pale + part * (deep - pale)) for pale, deep in zip(*ends, strict=True)]
    return f'background:rgb{tuple(mixed)};color:{LIGHT_TEXT if part > 0.6 else DARK_TEXT}'
