#!/usr/bin/env python3
"""
Runs the tests, doctests among them, on the installed package.

In the folder of the tests: what lies in this one would be found before what is
installed. Each core takes whole files, at most four cores, since a process takes
more than a gigabyte. Arguments go to pytest.
"""
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent / 'tests'

if __name__ == '__main__':
    together = ['-n', str(min(4, os.cpu_count() or 1)), '--dist', 'loadfile']
    sys.exit(subprocess.call([sys.executable, '-m', 'pytest', *together, *sys.argv[1:]], cwd=TESTS,
                             env={'OMP_NUM_THREADS': '1', **os.environ, 'GEOWATCH_PREIMPORT': '0'}))
