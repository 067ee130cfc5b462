"""
The documentation: does it build without a warning, and does it name all that there is?
"""
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from common import skip_without
from conftest import BUILT_IN_ACTIVATIONS

from geowatch.cli.fit import FitCLI
from geowatch.utils.lightning_ext.callbacks import plasticity_metrics
from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import BUILT_IN, GROUPS, METRICS, members
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._vocabulary import SOURCES
from geowatch.utils.lightning_ext.callbacks.plasticity_report import PlasticityReportCLI

DOCS = Path(__file__).resolve().parents[1] / 'docs'
ARGUMENTS = list(inspect.signature(PlasticityMonitor.__init__).parameters)[1:]
DEFAULTS = {name: p.default for name, p in inspect.signature(PlasticityMonitor.__init__).parameters.items()}
FLAGS = [name for name in FitCLI.__default__ if name.startswith('plasticity_')]
USED_GROUPS = [group for group in GROUPS if members(group)]


def page(name):
    return (DOCS / name).read_text()


def plain(html, name):
    """ What a reader of a built page sees. """
    text = re.sub('<[^>]+>', '', (html / name).read_text())
    return text.replace('&#39;', "'").replace('&lt;', '<').replace('&gt;', '>').replace('&amp;', '&')


def cells(html, name):
    """ The first cell of each row of the tables of a built page. """
    rows = re.findall(r'<tr class="row-[^>]*>\s*<t[dh][^>]*>(.*?)</t[dh]>', (html / name).read_text(), re.S)
    return [re.sub('<[^>]+>', '', cell).strip().replace('&lt;', '<').replace('&gt;', '>') for cell in rows]


def section(text, heading):
    """ The part of a page under a heading. """
    match = re.search(rf'^(#+) {re.escape(heading)}$(.*?)(?=^#{{1,3}} |\Z)', text, re.M | re.S)
    assert match, f'no heading {heading!r}'
    return match[2]


@pytest.fixture(scope='module')
def html(tmp_path_factory):
    skip_without('the documentation is not built', 'sphinx', 'myst_parser', 'furo')
    out = tmp_path_factory.mktemp('html')
    run = subprocess.run([sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-E', '-b', 'html',
                          '-d', str(out / 'doctrees'), str(DOCS), str(out)],
                         text=True, cwd=out, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         env={**os.environ, 'GEOWATCH_PREIMPORT': '0'})
    assert run.returncode == 0, run.stdout
    return out


def test_builds_without_warnings(html):
    names = {path.stem for path in html.rglob('*.html')}
    assert names >= {path.stem for path in DOCS.glob('*.md')} | set(BUILT_IN)
    assert '<math' in (html / 'metrics/erank.html').read_text()
    assert re.search(r'<code.*>elu</', (html / 'metrics/dead_units.html').read_text())


def test_autodoc_describes_the_installed_package(html):
    text = plain(html, 'api.html')
    for name in ('PlasticityMonitor', 'FitCLI', *plasticity_metrics.__all__, *BUILT_IN):
        assert name in text
    for name in ARGUMENTS:
        assert name in text
    # Every public name under its public path, and each metric under that of its file.
    anchors = set(re.findall(r'id="(geowatch\.[\w.]+)"', (html / 'api.html').read_text()))
    package = plasticity_metrics.__name__
    assert anchors >= {f'{package}.{name}' for name in plasticity_metrics.__all__}
    assert anchors >= {f'{package}.{name}.{name}' for name in BUILT_IN}
    assert not [anchor for anchor in anchors if re.search(r'\._|plasticity_engine', anchor)]
    # The References of docstrings are on the page of sources instead.
    assert '.. [' not in text


@pytest.mark.parametrize('name', ARGUMENTS)
def test_every_argument_has_examples(name):
    text = section(page('reference.md'), name)
    assert re.search(rf'```python\n.*PlasticityMonitor\((.*{name}=|[\'"])', text), 'no example of the argument'
    assert f'--plasticity_{name}' in text, 'no example of the flag'


@pytest.mark.parametrize('name', ARGUMENTS)
def test_defaults_are_those_of_the_code(name):
    row = next(line for line in page('reference.md').splitlines() if line.startswith(f'| [`{name}`]'))
    assert f'`{DEFAULTS[name]!r}`' in row


def test_every_flag_is_named():
    table = section(page('reference.md'), 'Arguments and flags')
    assert FLAGS and all(f'`--{flag}`' in table for flag in FLAGS)
    documented = set(re.findall(r'--(plasticity_\w+)', page('reference.md')))
    assert documented == set(FLAGS)


def test_every_metric_and_tag_is_named(html):
    named = cells(html, 'reference.html')
    assert [name for name in named if name in METRICS] == list(BUILT_IN)
    assert list(dict.fromkeys(name for name in named if name in GROUPS)) == USED_GROUPS
    assert {*(f'plasticity/{name}' for name in BUILT_IN), 'plasticity/overhead',
            'plasticity_layers/<metric>/<layer>'} <= set(named)
    assert [name for name in cells(html, 'index.html') if name in METRICS] == list(BUILT_IN)
    for name in BUILT_IN:
        assert (DOCS / f'metrics/{name}.md').exists()
        # In the table, and in the list of pages.
        assert (html / 'index.html').read_text().count(f'href="metrics/{name}.html"') >= 2
    # No metric is described that is not there.
    assert {path.stem for path in DOCS.glob('metrics/*.md')} == set(BUILT_IN)


def test_every_statistic_is_named(html):
    named = {need for cell in cells(html, 'add_a_metric.html') for need in cell.split(', ')}
    assert {f'{source}.{field}' for source, fields in SOURCES.items() for field in fields} <= named


def test_every_rule_of_the_report_is_named(html):
    judged = [name for name in BUILT_IN if METRICS[name].words.rule]
    assert judged and [name for name in cells(html, 'report.html') if name in METRICS] == judged
    text = plain(html, 'report.html')
    assert all(METRICS[name].words.rule in text for name in judged)


def test_the_changelog_and_the_readme_know_every_metric():
    for name in ('README.md', 'CHANGELOG.md'):
        text = (DOCS.parent / name).read_text()
        assert [metric for metric in BUILT_IN if not re.search(rf'\b{metric}\b', text)] == [], name


def test_every_path_of_the_architecture_is_there():
    text = page('architecture.md')
    root = DOCS.parent
    callbacks = root / 'geowatch/utils/lightning_ext/callbacks'
    paths = re.findall(r'`((?:\w+/)+(?:\w+\.\w+)?)`', text)
    assert len(paths) > 20
    assert [path for path in paths if not (root / path).exists() and not (callbacks / path).exists()] == []
    assert 'tests/test_untouched.py' in paths and 'plasticity_engine/statistics/calls.py' in paths


def test_help_lists_every_metric_and_group(capsys):
    with pytest.raises(SystemExit) as ex:
        FitCLI.parse(['--help'])
    assert ex.value.code == 0
    text = capsys.readouterr().out
    for name in (*METRICS, *USED_GROUPS):
        assert re.search(rf'\b{name}\b', text), name
    assert not [group for group in GROUPS if group not in USED_GROUPS and re.search(rf'\b{group}\b', text)]
    assert '>>>' not in text and '(default: None)' not in text
    shown = ' '.join(text.partition('options:')[2].split())
    said = {'layers': 'all', 'budget': 'no limit'}
    for argument in ARGUMENTS:
        default = said.get(argument, DEFAULTS[argument])
        flag = f'--plasticity_{argument} '
        own = re.search(rf'{flag}(?:(?!--plasticity_\w+ [P\[]).)*?\(default: (.*?)\)', shown)
        assert own and own.group(1) == str(default), argument
    # Only the help asks the registry, whose import takes long.
    code = "import sys; from geowatch.cli.fit import FitCLI; FitCLI.parse(['--plasticity_metrics=erank'])\n"
    code += "sys.exit(any('plasticity_metrics' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, '-c', code], env={**os.environ, 'GEOWATCH_PREIMPORT': '0'}).returncode == 0


@pytest.mark.parametrize('name', BUILT_IN)
def test_every_metric_has_its_page(name):
    text = page(f'metrics/{name}.md')
    for heading in ('Definition', 'When all is well, and when not', 'Cost', 'Other tools'):
        assert len(section(text, heading)) > 100 or heading == 'Cost'
    assert re.search(r'\$\$.+?\$\$', text, re.S), 'no formula'
    assert 'references.md' in text, 'no source'
    assert f'`plasticity/{name}`' in text, 'no tag'


def test_every_flag_of_the_report_is_named():
    names = list(PlasticityReportCLI.__default__)
    assert 'under' in names
    for name in names:
        assert re.search(rf'^\| `(--)?{name}` \|', page('report.md'), re.M), name


def test_every_activation_is_in_the_table(html):
    text = plain(html, 'metrics/dead_units.html')
    assert [name for name in BUILT_IN_ACTIVATIONS if not re.search(rf'\b{name}\b', text)] == []


def test_keys_of_the_record_are_those_of_a_run(tmp_path):
    from common import fit, make_net, read_lines

    @plasticity_metrics.metric(needs='weights.abs')
    def my_own(absolute):
        return absolute
    net = make_net()
    net.fc2.weight.data[0, 0] = float('nan')
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('all', budget=0.5), net, max_epochs=1, batch_size=4,
                           accumulate_grad_batches=2)
    lines = read_lines(trainer, start=True)
    # Of a gradient that is not finite there is no noise.
    lines += fit(tmp_path / 'finite', PlasticityMonitor('noise_scale'), max_epochs=1)[2]
    text = section(page('reference.md'), 'plasticity.jsonl')
    keys = {key for line in lines for key in line}
    columns = {key for line in lines for layer in line['layers'].values() for key in layer if key != 'value'}
    assert keys >= {'words', 'intervals'}
    assert columns == {'units', 'linear', 'rows', 'nonfinite', 'unmoved', 'fraction', 'covered'}
    assert [key for key in sorted(keys | columns) if f'| `{key}` |' not in text] == []
    # Only where the text says so.
    assert [line['metric'] for line in lines if 'words' in line] == ['my_own']
    assert {line['metric'] for line in lines if 'intervals' in line} == {'overhead'}
    for column in ('units', 'linear', 'rows', 'unmoved', 'fraction', 'covered'):
        (row,) = [row for row in text.splitlines() if row.startswith(f'| `{column}` |')]
        assert row.split('|')[2].strip() == ', '.join(sorted({
            line['metric'] for line in lines if any(column in layer for layer in line['layers'].values())}))


def test_no_paths_of_a_machine():
    for path in [*DOCS.rglob('*.md'), *DOCS.rglob('*.py')]:
        assert not re.search(r'(?<![\w.:/])/(root|home|work|Users)/', path.read_text()), path


def test_install_shows_the_commands_of_the_readme(html):
    text = plain(html, 'install.html')
    readme = (DOCS.parent / 'README.md').read_text()
    blocks = re.findall(r'^```(?:bash|sh)\n(python -m venv .*?)^```', readme, re.M | re.S)
    assert any('run_tests.py' in block for block in blocks)
    assert [block for block in blocks if block.strip() not in text] == []
