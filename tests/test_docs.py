"""
The documentation: does it build without a warning, and does it name all that there is?
"""
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BUILT_IN_ACTIVATIONS

from geowatch.cli.fit import FitCLI
from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
from geowatch.utils.lightning_ext.callbacks.plasticity_report import PlasticityReportCLI

DOCS = Path(__file__).resolve().parents[1] / 'docs'
ARGUMENTS = list(inspect.signature(PlasticityMonitor.__init__).parameters)[1:]
DEFAULTS = {name: p.default for name, p in inspect.signature(PlasticityMonitor.__init__).parameters.items()}
FLAGS = [name for name in FitCLI.__default__ if name.startswith('plasticity_')]
TAGS = [tag for metric in METRICS.values() for tag in metric.tags]


def page(name):
    return (DOCS / name).read_text()


def section(text, heading):
    """ The part of a page under a heading. """
    match = re.search(rf'^(#+) {re.escape(heading)}$(.*?)(?=^#{{1,3}} |\Z)', text, re.M | re.S)
    assert match, f'no heading {heading!r}'
    return match[2]


@pytest.fixture(scope='module')
def html(tmp_path_factory):
    missing = [name for name in ('sphinx', 'myst_parser', 'furo') if importlib.util.find_spec(name) is None]
    if missing:
        reason = f'the documentation is not built: {", ".join(missing)} not installed'
        print(reason)
        pytest.skip(reason)
    out = tmp_path_factory.mktemp('html')
    run = subprocess.run([sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-E', '-b', 'html',
                          '-d', str(out / 'doctrees'), str(DOCS), str(out)],
                         text=True, cwd=out, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         env={**os.environ, 'GEOWATCH_PREIMPORT': '0'})
    assert run.returncode == 0, run.stdout
    return out


def test_builds_without_warnings(html):
    names = {path.stem for path in html.rglob('*.html')}
    assert names >= {path.stem for path in DOCS.glob('*.md')} | set(METRICS)
    assert '<math' in (html / 'metrics/erank.html').read_text()
    assert re.search(r'<code.*>elu</', (html / 'metrics/dead_units.html').read_text())


def test_autodoc_describes_the_installed_package(html):
    text = re.sub('<[^>]+>', '', (html / 'api.html').read_text())
    for name in ('PlasticityMonitor', 'effective_rank', 'FitCLI', 'WeightMag', 'Metric', 'register_activation'):
        assert name in text
    for name in ARGUMENTS:
        assert name in text
    # The References of docstrings are on the page of sources instead.
    assert '.. [' not in text


@pytest.mark.parametrize('name', ARGUMENTS)
def test_every_argument_has_examples(name):
    text = section(page('reference.md'), name)
    assert re.search(rf'```python\n.*PlasticityMonitor\((.*{name}=|[\'"])', text), 'no example of the argument'
    assert f'--plasticity_{name}' in text, 'no example of the flag'


@pytest.mark.parametrize('name', [name for name in ARGUMENTS if name != 'metrics'])
def test_defaults_are_those_of_the_code(name):
    row = next(line for line in page('reference.md').splitlines() if line.startswith(f'| [`{name}`]'))
    assert f'`{DEFAULTS[name]!r}`' in row


def test_every_flag_is_named():
    table = section(page('reference.md'), 'Arguments and flags')
    assert FLAGS and all(f'`--{flag}`' in table for flag in FLAGS)
    documented = set(re.findall(r'--(plasticity_\w+)', page('reference.md')))
    assert documented == set(FLAGS)


def test_every_metric_and_tag_is_named():
    assert all(f'| `{name}` |' in page('reference.md') for name in METRICS)
    assert all(f'| `plasticity/{tag}` |' in page('reference.md') for tag in TAGS)
    assert all((DOCS / f'metrics/{name}.md').exists() and f'metrics/{name}' in page('index.md') for name in METRICS)


@pytest.mark.parametrize('name', METRICS)
def test_every_metric_has_its_page(name):
    text = page(f'metrics/{name}.md')
    for heading in ('Definition', 'When all is well, and when not', 'Cost', 'Other tools'):
        assert len(section(text, heading)) > 100 or heading == 'Cost'
    assert re.search(r'\$\$.+?\$\$', text, re.S), 'no formula'
    assert 'references.md' in text or name == 'grad_mag', 'no source'
    assert all(f'plasticity/{tag}`' in text for tag in METRICS[name].tags)


def test_every_flag_of_the_report_is_named():
    names = list(PlasticityReportCLI.__default__)
    assert 'under' in names
    for name in names:
        assert re.search(rf'^\| `(--)?{name}` \|', page('report.md'), re.M), name


def test_every_activation_is_in_the_table(html):
    text = re.sub('<[^>]+>', '', (html / 'metrics/dead_units.html').read_text())
    assert [name for name in BUILT_IN_ACTIVATIONS if not re.search(rf'\b{name}\b', text)] == []


def test_keys_of_the_record_are_those_of_a_run(tmp_path):
    from common import fit
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('all'), max_epochs=1)
    text = section(page('reference.md'), 'plasticity.jsonl')
    for line in lines:
        assert all(f'| `{key}` |' in text for key in line)
        assert all(f'| `{key}` |' in text for layer in line['layers'].values() for key in layer if key != 'value')


def test_no_paths_of_a_machine():
    for path in [*DOCS.rglob('*.md'), *DOCS.rglob('*.py')]:
        assert not re.search(r'(?<![\w.:/])/(root|home|work|Users)/', path.read_text()), path


def test_install_shows_the_commands_of_the_readme(html):
    text = re.sub('<[^>]+>', '', (html / 'install.html').read_text()).replace('&#39;', "'").replace('&amp;', '&')
    readme = (DOCS.parent / 'README.md').read_text()
    blocks = re.findall(r'^```(?:bash|sh)\n(python -m venv .*?)^```', readme, re.M | re.S)
    assert any('run_tests.py' in block for block in blocks)
    assert [block for block in blocks if block.strip() not in text] == []
