#!/usr/bin/env python3
"""
Runs the tests, doctests among them, on the installed package.

From the folder of the tests: a checkout on sys.path would not override an
installed geowatch. Arguments go to pytest.
"""
import os
import sys
from pathlib import Path

import pytest

if __name__ == '__main__':
    os.environ['GEOWATCH_PREIMPORT'] = '0'
    os.chdir(Path(__file__).resolve().parent / 'tests')
    sys.exit(pytest.main(sys.argv[1:]))
