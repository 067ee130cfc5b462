"""
Pictures of the plasticity metrics: of one run, or of several compared.

Reads ``plasticity.jsonl``, which PlasticityMonitor writes, and what stands
beside it in the log folder. Works on runs that still go on.

CommandLine:
    python -m geowatch.cli.plasticity_report lightning_logs/version_0
    python -m geowatch.cli.plasticity_report 'runs/lr*' --under=val_acc --x=epoch
    python -m geowatch.cli.plasticity_report 'runs/lr*' --format=csv
"""
import importlib
import shlex
import sys

import scriptconfig as scfg
import ubelt as ub

__all__ = ['Comparison', 'PlasticityReportCLI', 'compare', 'load', 'report_command', 'write_report_script']

# For Python and notebooks, and where they are: the command needs none of it.
_LAZY = {'Comparison': 'comparison', 'compare': 'comparison', 'load': 'frames'}
# The host imports GDAL first unless it is told not to, and drawing needs none.
_COMMAND = 'GEOWATCH_PREIMPORT=0 python -m geowatch.cli.plasticity_report'


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'.{_LAZY[name]}', __name__), name)


class PlasticityReportCLI(scfg.DataConfig):
    """
    Draw the plasticity metrics of one run, or of several compared.

    Writes report.html, which opens offline, and with --png pictures: the grid
    of two settings, one of the paper's metrics, and two per metric, of the
    network and of its layers. Exits with 2 where a folder holds no data.
    """
    __command__ = 'plasticity_report'
    __epilog__ = ub.codeblock(
        '''
        example:
          python -m geowatch.cli.plasticity_report 'runs/lr*' --under=val_acc --x=epoch
        ''')

    runs = scfg.Value(['.'], nargs='*', type=str, position=1, help=(
        'run folders, log folders (with plasticity.jsonl in them) or globs'))
    out = scfg.Value(None, type=str, help=ub.paragraph(
        '''
        folder for the report. Default: monitor/plasticity in the log folder of
        a single run, ./plasticity_report for several%(default).0s
        '''))
    under = scfg.Value('auto', type=str, help=ub.paragraph(
        '''
        name of the loss or metric to draw under each picture, as it was
        logged, from TensorBoard files or metrics.csv; 'auto' takes one of
        validation where there is one, 'none' nothing
        '''))
    x = scfg.Value('auto', choices=['auto', 'step', 'epoch'], help=ub.paragraph(
        '''
        x-axis; 'auto' takes epochs where these have different numbers of
        steps, as with different batch sizes
        '''))
    png = scfg.Value(False, isflag=True, help='write pictures too, as PNG files beside the page: takes much longer')
    format = scfg.Value(None, choices=['json', 'csv'], help=(
        'print the table of runs in this format instead of drawing (default: draw%(default).0s)'))

    @classmethod
    def main(cls, cmdline=1, **kwargs):
        """
        Args:
            cmdline (bool | List[str]): where arguments come from
            **kwargs: defaults of the arguments

        Returns:
            int: exit code

        Example:
            >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report import PlasticityReportCLI
            >>> import ubelt as ub
            >>> import json
            >>> dpath = ub.Path.appdir('geowatch/tests/report').delete()
            >>> for lr, last in [(0.1, 24), (0.01, 58)]:
            >>>     lines = [{'metric': 'erank', 'step': step, 'epoch': step, 'value': value, 'layers': {}}
            >>>              for step, value in enumerate([59, (59 + last) / 2, last])]
            >>>     folder = (dpath / f'lr{lr}').ensuredir()
            >>>     _ = (folder / 'plasticity.jsonl').write_text('\\n'.join(map(json.dumps, lines)))
            >>> code = PlasticityReportCLI.main(cmdline=0, runs=[dpath / '*'], format='json')  # xdoctest: +ELLIPSIS
            {
            ...
                  "run": "lr0.01",
            ...
            >>> code
            0
        """
        from .runs import ReportError
        config = cls.cli(cmdline=cmdline, data=kwargs, strict=True)
        try:
            return _report(config)
        except ReportError as ex:
            print(ex, file=sys.stderr)
            return 2


def _report(config):
    from .findings import find, make_table, to_records
    from .runs import load_runs
    from .scalars import choose_under, load_scalars
    patterns = [config.runs] if isinstance(config.runs, str) else config.runs
    runs, missing = load_runs(patterns)
    for line in missing:
        print(line, file=sys.stderr)
    if runs:
        for run in runs:
            load_scalars(run)
        table = make_table(runs, choose_under(runs, config.under))
        findings = find(table)
        if config.format:
            _print_table(to_records(table), findings, config.format)
        else:
            _write(table, findings, config)
    return 2 if missing else 0


def _write(table, findings, config):
    from .curves import choose_x
    from .page import write_page
    from .runs import ReportError
    from .verdicts import summary
    from .words import CAVEAT
    single = table.runs[0].folders[-1] / 'monitor' / 'plasticity' if len(table.runs) == 1 else None
    x = choose_x(table.runs, config.x)
    out = ub.Path(config.out or single or 'plasticity_report').expand()
    try:
        page = write_page(table, findings, out.ensuredir(), x)
        pictures, left_out = [], []
        if config.png:
            from .figures import draw_all
            pictures, left_out = draw_all(table, out, x)
    except OSError as ex:
        raise ReportError(f'{out}: the report could not be written ({ex})') from None
    for line in summary(table):
        print(line)
    for line in [*_advice(table), *(finding.sentence for finding in findings), *left_out]:
        print(f'- {line}')
    print(CAVEAT)
    print(f'Wrote {page}' + (f' and {len(pictures)} pictures beside it' if config.png else ''))


def _advice(table):
    """ What the grid says, with what to type. """
    from .advice import advise
    from .grid import make_grid
    grid = make_grid(table)
    for advice in advise(table, grid) if grid else []:
        yield '\n    '.join([advice.text, *advice.commands])


def _print_table(records, findings, form):
    if form == 'json':
        import json

        from .words import CAVEAT
        said = [{'kind': f.kind, 'run': f.run, 'text': f.sentence, 'why': f.why} for f in findings]
        print(json.dumps({'runs': records, 'findings': said, 'caveat': CAVEAT}, indent=2, default=str))
    else:
        import csv
        writer = csv.DictWriter(sys.stdout, list(records[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows({**record, 'signs': ' '.join(record['signs'])} for record in records)


def report_command(log_dir):
    """
    The command that reports on a run, for people to read and paste.

    Args:
        log_dir (str | PathLike): the run's log folder

    Returns:
        str: one line for a POSIX shell

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report import report_command
        >>> report_command('my runs/version_0')
        "GEOWATCH_PREIMPORT=0 python -m geowatch.cli.plasticity_report 'my runs/version_0'"
    """
    return f'{_COMMAND} {shlex.quote(str(log_dir))}'


def write_report_script(log_dir):
    """
    Put a script into a log folder that reports on the run in it.

    It takes further arguments, such as other runs to compare with. It finds
    the run by its own place, so that the folder may be moved.

    Args:
        log_dir (str | PathLike): the run's log folder

    Returns:
        ub.Path: the script, `plasticity_report.sh`

    Raises:
        OSError: if it cannot be written, or made one that can be run

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report import write_report_script
        >>> import ubelt as ub
        >>> dpath = ub.Path.appdir('geowatch/tests/report_script').ensuredir()
        >>> fpath = write_report_script(dpath)
        >>> fpath.name, '--under=val_loss' in fpath.read_text()
        ('plasticity_report.sh', True)
    """
    fpath = ub.Path(log_dir).ensuredir() / 'plasticity_report.sh'
    fpath.write_text(ub.codeblock(
        f'''
        #!/usr/bin/env bash
        # Draws the plasticity metrics of this run, also while it goes on. More runs to
        # compare with and flags may follow, as in: ./plasticity_report.sh ../version_1 --under=val_loss
        PYTHON={shlex.quote(sys.executable or 'python')}
        command -v "$PYTHON" > /dev/null || PYTHON=python
        # Not `python -m`, which would import from the folder that it is started in, whatever lies there.
        GEOWATCH_PREIMPORT=0 "$PYTHON" -c '
        import sys
        sys.path[:] = [place for place in sys.path if place]
        import runpy
        runpy.run_module("geowatch.cli.plasticity_report", run_name="__main__", alter_sys=True)
        ' "$(dirname "$0")" "$@"
        ''') + '\n', encoding='utf-8', errors='surrogateescape')
    fpath.chmod('ug+x')
    return fpath
