"""
One row or one tool in a process of its own: prints what it has measured as one line of JSON.
"""
import contextlib
import json
import logging
import os
import sys
import warnings


def main(kind, name):
    warnings.filterwarnings('ignore')
    logging.disable(logging.WARNING)
    import torch
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    with contextlib.redirect_stdout(sys.stderr):
        if kind == 'tool':
            import tools
            result = tools.watched_steps(name)
        else:
            import rows
            result = rows.ROWS[name]()
    print('RESULT ' + json.dumps(result))


if __name__ == '__main__':
    main(*sys.argv[1:])
