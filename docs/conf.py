"""
Configuration of the documentation.

Nothing is put on sys.path: the pages describe the installed package, since a
checkout does not override the installed files of geowatch.
"""
import os
import re
from pathlib import Path

from sphinx.util.docutils import SphinxDirective

# The host would import GDAL first, which the documentation has no use for.
os.environ['GEOWATCH_PREIMPORT'] = '0'

HERE = Path(__file__).parent

project = 'geowatch-plasticity'
author = 'the authors of geowatch-plasticity'
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.mathjax', 'sphinx.ext.napoleon']
exclude_patterns = ['_build', 'examples']
html_theme = 'furo'
html_title = project
pygments_style = 'friendly'

myst_enable_extensions = ['dollarmath', 'substitution']
myst_heading_anchors = 3
# The page on cost is made by the benchmark; without it the text says where to find it.
myst_substitutions = {
    'benchmarks': '[benchmarks](/benchmarks.md)' if (HERE / 'benchmarks.md').exists()
    else 'benchmarks (`tests/benchmarks`)'}

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


def setup(app):
    # After napoleon, which has removed the indentation of sections.
    app.connect('autodoc-process-docstring', without_citations, priority=900)
    app.add_directive('saturated-values', SaturatedValues)
    app.add_directive('report-rules', ReportRules)
