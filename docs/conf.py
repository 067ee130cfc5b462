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
html_css_files = ['formula.css']
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


class SaturatedValues(SphinxDirective):
    """ The table of activations, from the one place in the code where it is. """
    of_arguments = {'elu': '-alpha', 'celu': '-alpha', 'selu': '-1.758', 'hardtanh': 'min_val, max_val',
                    'threshold': 'value'}

    def run(self):
        from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._saturation import SATURATED_VALUES
        functions = {}
        for name, values in SATURATED_VALUES.items():
            text = self.of_arguments[name] if callable(values) else ', '.join(f'{value:g}' for value in values)
            functions.setdefault(text, []).append(f'``{name}``')
        lines = ['.. list-table::', '   :header-rows: 1', '', '   * - Dead at', '     - Function or module class']
        for text, names in functions.items():
            lines += [f'   * - {text or "never"}', f'     - {", ".join(names)}']
        return self.parse_text_to_nodes('\n'.join(lines))


class ReportRules(SphinxDirective):
    """ What the report points at, and why it does. """

    def run(self):
        from geowatch.utils.lightning_ext.callbacks.plasticity_report.words import METRICS
        lines = ['.. list-table::', '   :header-rows: 1', '', '   * - Metric', '     - Named when it',
                 '     - Because']
        for name, words in METRICS.items():
            if words.rule:
                lines += [f'   * - ``{name}``', f'     - {words.rule}', f'     - {words.why}']
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
    # After napoleon, which has removed the indentation of sections.
    app.connect('autodoc-process-docstring', without_citations, priority=900)
    app.add_html_math_renderer('mathml', (inline_math, None), (block_math, None))
    app.add_directive('saturated-values', SaturatedValues)
    app.add_directive('report-rules', ReportRules)
    app.add_directive('readme-commands', ReadmeCommands)
