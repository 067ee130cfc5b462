"""
An overlay of the installed geowatch package: only files that the host lacks.
"""
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
CALLBACKS = 'geowatch.utils.lightning_ext.callbacks'


def requirements(name):
    lines = (HERE / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


setup(
    name='geowatch-plasticity',
    version='0.1.0',
    description='See whether a network in training is losing its ability to learn',
    long_description=(HERE / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    # Namespace packages throughout: an __init__.py of the host is the host's.
    packages=['geowatch.cli.fit', CALLBACKS, *(f'{CALLBACKS}.{name}' for name in find_packages(
        CALLBACKS.replace('.', '/')))],
    py_modules=['geowatch.cli.plasticity_report'],
    package_data={f'{CALLBACKS}.plasticity_report': ['*.html', '*.css', '*.js']},
    install_requires=requirements('runtime'),
    extras_require={name: requirements(name) for name in ('geowatch', 'report', 'tests', 'docs')},
)
