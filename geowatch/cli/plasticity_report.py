"""
The report without what the host imports for its callbacks: torch, Lightning and more, ten seconds of it.

The report reads files. It stands among the callbacks, whose packages import all
of them; here they are folders to find it in, and nothing in them runs.

CommandLine:
    GEOWATCH_PREIMPORT=0 python -m geowatch.cli.plasticity_report lightning_logs/version_0
    GEOWATCH_PREIMPORT=0 python -m geowatch.cli.plasticity_report 'runs/lr*' --out report
"""
import importlib.util
import runpy
import sys

PACKAGES = ('geowatch.utils.lightning_ext', 'geowatch.utils.lightning_ext.callbacks')

# Only in a process of its own: in another these packages would lack what they define.
if __name__ == '__main__':
    for name in PACKAGES:
        sys.modules[name] = importlib.util.module_from_spec(importlib.util.find_spec(name))
    runpy.run_module(f'{PACKAGES[-1]}.plasticity_report', run_name='__main__', alter_sys=True)
