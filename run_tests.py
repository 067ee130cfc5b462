#!/usr/bin/env python3
"""
Runs the tests and the doctests of the installed package.

A checkout on sys.path would not override an installed geowatch, so doctests
are run by the name of the installed module.
"""
import os
import subprocess
import sys

PACKAGE = 'geowatch.utils.lightning_ext.callbacks'
DOCTESTED = ['geowatch.cli.fit', f'{PACKAGE}.plasticity'] + [
    f'{PACKAGE}.plasticity_metrics.{name}' for name in (
        '_activations', '_schedule', '_spectrum', 'dead_units', 'erank',
        'feature_erank', 'grad_mag', 'weight_mag')
] + [f'{PACKAGE}.plasticity_metrics']


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    tests = os.path.join(here, 'tests')
    env = {**os.environ, 'GEOWATCH_PREIMPORT': '0'}
    commands = [['pytest', tests, *sys.argv[1:]]] + [['xdoctest', name, '--quiet'] for name in DOCTESTED]
    # Not from the checkout: its geowatch folder is not the installed one.
    codes = [subprocess.call([sys.executable, '-m', *command], env=env, cwd=tests) for command in commands]
    return max(map(abs, codes))


if __name__ == '__main__':
    sys.exit(main())
