"""
The doctests of all modules that the wheel has installed.
"""
from importlib.metadata import distribution

import pytest
import xdoctest

# Modules that are there to be run, and what only other modules call.
WITHOUT = {'geowatch.cli.fit.__main__', 'geowatch.utils.lightning_ext.callbacks.plasticity_report.__main__'}


def modules():
    files = distribution('geowatch-plasticity').files or []
    names = {'.'.join(file.with_suffix('').parts).removesuffix('.__init__') for file in files if file.suffix == '.py'}
    return sorted(name for name in names - WITHOUT if name.startswith('geowatch.'))


def test_the_wheel_is_installed():
    assert len(modules()) > 10, "expected a wheel: pip install '.[geowatch,tests]'"


@pytest.mark.parametrize('name', modules())
def test_doctests(name):
    outcome = xdoctest.doctest_module(name, command='all', verbose=1)
    assert not outcome['n_failed']


def test_public_names_have_an_example():
    from geowatch.cli.fit import FitCLI
    from geowatch.utils.lightning_ext.callbacks import plasticity, plasticity_metrics, plasticity_report
    public = [FitCLI, plasticity.PlasticityMonitor]
    for module in (plasticity_metrics, plasticity_report):
        public += [getattr(module, name) for name in module.__all__]
    public += plasticity_metrics.METRICS.values()
    for item in public:
        if callable(item):
            texts = [item.__doc__ or '', *(getattr(item, name).__doc__ or '' for name in ('main',) if hasattr(item, name))]
            assert any('>>>' in text for text in texts), item
