#!/usr/bin/env python3
"""
Runs the tests, doctests among them, on the installed package.

In the folder of the tests: what lies in this one would be found before what is
installed. Arguments go to pytest.
"""
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent / 'tests'

if __name__ == '__main__':
    sys.exit(subprocess.call([sys.executable, '-m', 'pytest', *sys.argv[1:]], cwd=TESTS,
                             env={**os.environ, 'GEOWATCH_PREIMPORT': '0'}))
