"""
Configuration of the documentation.

Nothing is put on sys.path: the pages describe the installed package, since a
checkout does not override the installed files of geowatch.
"""
import inspect
import os
import re
import textwrap
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.docutils import SphinxDirective

# The host would import GDAL first, which the documentation has no use for.
os.environ['GEOWATCH_PREIMPORT'] = '0'

HERE = Path(__file__).parent

project = 'geowatch-plasticity'
author = 'the authors of geowatch-plasticity'
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
exclude_patterns = ['_build', 'examples']
html_theme = 'furo'
html_title = project
html_show_copyright = False
html_static_path = ['static']
html_css_files = ['formula.css', 'code.css']
html_math_renderer = 'mathml'
pygments_style = 'friendly'

myst_enable_extensions = ['dollarmath', 'substitution']
myst_heading_anchors = 3
# Pages that scripts make: without them the text says where they come from.
myst_substitutions = {
    name: f'[{text}](/{name}.md)' if (HERE / f'{name}.md').exists() else f'{text} (`{source}`)'
    for name, text, source in [('benchmarks', 'benchmarks', 'tests/benchmarks'),
                               ('zoo', 'networks that were checked', 'docs/zoo.py')]}

autodoc_member_order = 'bysource'
autodoc_typehints = 'none'
napoleon_custom_sections = ['CommandLine']


def without_citations(app, what, name, obj, options, lines):
    """ Each docstring can be read alone, so that a source is cited in many; here references.md has it once. """
    kept, in_citation = [], False
    for line in lines:
        if re.match(r'\s*\.\. \[\w+\] ', line):
            in_citation = True
        elif line.strip() and not line.startswith(' ' * 3):
            in_citation = False
        if not in_citation and not re.match(r'\s*(:?References:?|\.\. rubric:: References)$', line):
            kept.append(line)
    lines[:] = kept


def literal_formulas(app, what, name, obj, options, lines):
    """ The formula at the top of a metric's file is indented: it is to be read as it stands. """
    if what == 'module':
        kept = []
        for before, line in zip(['', *lines], lines, strict=False):
            starts = line.startswith(' ' * 4) and not before and kept
            kept += ['::', '', line] if starts else [line]
        lines[:] = kept


# --- formulas, as MathML, which browsers show without a script from elsewhere -----


def inline_math(translator, node):
    translator.body.append(mathml(node.astext(), is_block=False))
    raise SkipNode


def block_math(translator, node):
    translator.body.append(f'<div class="formula">{mathml(node.astext(), is_block=True)}</div>')
    raise SkipNode


def mathml(tex, is_block):
    # docutils before 0.22 asks for the opposite, `inline`.
    flag = is_block if 'as_block' in inspect.signature(tex2mathml).parameters else not is_block
    return tex2mathml(tex, flag)


# --- tables that are made of the code ------------------------------------------


class Table(SphinxDirective):
    """ A table whose rows come from the code, so that none is missing. """
    titles = ()

    def rows(self):
        """ Lists of cells, in reStructuredText. """
        raise NotImplementedError

    def run(self):
        lines = ['.. list-table::', '   :header-rows: 1', '']
        for first, *others in [self.titles, *self.rows()]:
            lines += [f'   * - {first}', *(f'     - {cell}' for cell in others)]
        return self.parse_text_to_nodes('\n'.join(lines))


class SaturatedValues(Table):
    """ The activations, from the one place in the code where they are. """
    titles = 'Dead at', 'Function or module class'
    of_arguments = {'elu': '-alpha', 'celu': '-alpha', 'selu': '-1.758', 'hardtanh': 'min_val, max_val',
                    'threshold': 'value'}

    def rows(self):
        from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.functions import (
            SATURATED_VALUES,
        )
        functions = {}
        for name, values in SATURATED_VALUES.items():
            text = self.of_arguments[name] if callable(values) else ', '.join(f'{value:g}' for value in values)
            functions.setdefault(text, []).append(f'``{name}``')
        return [(text or 'never', ', '.join(names)) for text, names in functions.items()]


class ReportRules(Table):
    """ What the report points at, and why it does. """
    titles = 'Metric', 'Named when it', 'Because'

    def rows(self):
        from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
        return [(f'``{name}``', one.words.rule, one.words.why) for name, one in METRICS.items() if one.words.rule]


class MetricTable(Table):
    """ All metrics; which columns, and in which order, the arguments say. """
    required_arguments = 1
    final_argument_whitespace = True
    columns = {
        'metric': ('Metric', lambda name, one: f':doc:`{name} </metrics/{name}>`'),
        'name': ('Name', lambda name, one: f'``{name}``'),
        'page': ('Page', lambda name, one: f':doc:`{one.words.title.lower()} </metrics/{name}>`'),
        'about': ('What it is', lambda name, one: one.words.about),
        'rule': ('Worth a look when it', lambda name, one: one.words.rule),
        'group': ('Group', lambda name, one: f'``{one.group}``' if one.group else 'none'),
        'auto': ("``'auto'``", lambda name, one: '``log_every_n_steps``' if one.every == 'log' else 'epoch'),
    }

    def run(self):
        self.chosen = [self.columns[name] for name in self.arguments[0].split()]
        self.titles = [title for title, _ in self.chosen]
        return super().run()

    def rows(self):
        from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
        return [[cell(name, one) for _, cell in self.chosen] for name, one in METRICS.items()]


class GroupTable(Table):
    """ The groups that have members. """
    titles = 'Group', 'What it holds', 'Metrics'

    def rows(self):
        from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import GROUPS, members
        named = {**GROUPS, 'all': 'all of them, your own included'}
        return [(f'``{group}``', about, ', '.join(f'``{name}``' for name in members(group)) if group in GROUPS else '')
                for group, about in named.items() if members(group)]


class TagTable(Table):
    """ All tags. """
    titles = 'Tag', 'Value'

    def rows(self):
        from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
        return [*((f'``plasticity/{name}``', one.words.about) for name, one in METRICS.items()),
                ('``plasticity/overhead``', "with ``budget``: the monitor's share of the training time so far"),
                ('``plasticity_layers/<metric>/<layer>``', 'the same of one layer, with ``per_layer``')]


class StatisticsTable(Table):
    """ What a metric can need. """
    titles = 'Need', 'What the formula gets of a layer'

    def rows(self):
        from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._vocabulary import SOURCES
        needs = {}
        for source, fields in SOURCES.items():
            for field, about in fields.items():
                needs.setdefault((field, about), []).append(f'``{source}.{field}``')
        return [(', '.join(names), about) for (_, about), names in needs.items()]


class MetricPages(SphinxDirective):
    """ The pages of the metrics, in the order of the registry. """

    def run(self):
        from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
        lines = ['.. toctree::', '   :caption: Metrics', '   :maxdepth: 1', '']
        lines += [f'   metrics/{name}' for name in METRICS]
        return self.parse_text_to_nodes('\n'.join(lines))


class MetricModules(SphinxDirective):
    """ The files of the metrics, each with its definition and its function. """

    def run(self):
        from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
        lines = [line for one in METRICS.values()
                 for line in (f'.. automodule:: {one.formula.__module__}', '   :members:', '')]
        return self.parse_text_to_nodes('\n'.join(lines))


class ReadmeCommands(SphinxDirective):
    """ The commands of the README that do all the set-up, so that they stand in one place. """

    def run(self):
        text = (HERE.parent / 'README.md').read_text()
        self.env.note_dependency(str(HERE.parent / 'README.md'))
        nodes = []
        for block in re.findall(r'^```(?:bash|sh)\n(python -m venv .*?)^```', text, re.M | re.S):
            nodes += self.parse_text_to_nodes('.. code-block:: bash\n\n' + textwrap.indent(block, '   '))
        return nodes


def setup(app):
    # Before napoleon, which makes its own blocks.
    app.connect('autodoc-process-docstring', literal_formulas, priority=100)
    # After napoleon, which has removed the indentation of sections.
    app.connect('autodoc-process-docstring', without_citations, priority=900)
    app.add_html_math_renderer('mathml', (inline_math, None), (block_math, None))
    for name, directive in {
            'saturated-values': SaturatedValues, 'report-rules': ReportRules, 'metric-table': MetricTable,
            'group-table': GroupTable, 'tag-table': TagTable, 'statistics-table': StatisticsTable,
            'metric-pages': MetricPages, 'metric-modules': MetricModules, 'readme-commands': ReadmeCommands}.items():
        app.add_directive(name, directive)
