import os
import sys

from . import PlasticityReportCLI

try:
    code = PlasticityReportCLI.main()
    sys.stdout.flush()
except BrokenPipeError:
    # The reader, such as `head`, has seen enough.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    code = 0
sys.exit(code)
