import os
import sys

from . import PlasticityReportCLI

# A name that the terminal cannot write is no reason to stop.
sys.stdout.reconfigure(errors='replace')
try:
    code = PlasticityReportCLI.main()
    sys.stdout.flush()
except BrokenPipeError:
    # The reader, such as `head`, has seen enough.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    code = 0
sys.exit(code)
