"""
The doctests of all modules that the wheel has installed.
"""
from importlib.metadata import distribution

import pytest
import xdoctest

CALLBACKS = 'geowatch.utils.lightning_ext.callbacks'
# What is asked for by the name of a package is looked for in all its modules.
SEARCHED = ['geowatch.cli.fit', f'{CALLBACKS}.plasticity', f'{CALLBACKS}.plasticity_engine',
            f'{CALLBACKS}.plasticity_metrics', f'{CALLBACKS}.plasticity_report']
# It only runs another one.
COMMANDS = ['geowatch.cli.plasticity_report']


def test_every_module_of_the_wheel_is_searched():
    files = [file for file in distribution('geowatch-plasticity').files or [] if file.suffix == '.py']
    names = {'.'.join(file.with_suffix('').parts) for file in files}
    assert len(names) > 10, "expected a wheel: pip install '.[geowatch,tests]'"
    assert all(any(f'{name}.'.startswith(f'{known}.') for known in SEARCHED + COMMANDS) for name in names)


@pytest.mark.parametrize('name', SEARCHED)
def test_doctests(name):
    outcome = xdoctest.doctest_module(name, command='all', verbose=1)
    assert outcome['n_passed'] and not outcome['n_failed']


def test_public_names_have_an_example():
    from geowatch.cli.fit import FitCLI
    from geowatch.utils.lightning_ext.callbacks import plasticity, plasticity_metrics, plasticity_report
    public = [FitCLI, plasticity.PlasticityMonitor]
    for module in (plasticity_metrics, plasticity_report):
        public += [getattr(module, name) for name in module.__all__]
    public += [metric.formula for metric in plasticity_metrics.METRICS.values()]
    for item in public:
        if callable(item):
            texts = [item.__doc__ or '', getattr(item, 'main', item).__doc__ or '']
            assert any('>>>' in text for text in texts), item
