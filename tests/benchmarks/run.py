"""
What the monitor costs, beside its rivals: makes an environment, measures, writes a table and a plot.

    python tests/benchmarks/run.py --out DIR [--rows steps,one_read] [--env DIR] [--pages docs/benchmarks.md]

Run it with the Python in which the wheel of this repository is installed, on
a machine with nothing else to do; it takes about half an hour. The
environment sees all that this Python sees, and the rivals beside it, so that
all of them run with the same torch. A rival that cannot be installed or does
not run is in the table with the reason.

Some rows alone are measured anew by --rows; the others stay as they are in the
results that DIR has. With --pages the tables in Markdown pages are replaced,
without measuring anything if --rows is empty.
"""
import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

from table import SINGLE, draw, replace, short, table

HERE = Path(__file__).parent
RIVALS = ('ormas-monitor', 'fastai', 'wandb', 'torch-module-monitor', 'weightwatcher', 'mosaicml',
          'traintools', 'gns-pytorch')
# What mosaicml needs, where it cannot be installed with this torch and is installed alone.
ALONE = {'mosaicml': ('coolname', 'py-cpuinfo', 'mosaicml-cli', 'tabulate', 'torch_optimizer')}
ROWS = ('steps', 'quiet_step', 'one_read', 'erank_resnet', 'erank_wide', 'feature_erank', 'registry', 'noise_scales',
        'default_run', 'short_run', 'geowatch_run', 'large_models', 'imports', 'growth')
TOOLS = ('ours: weight_mag, grad_mag, dead_units', 'ours: those of the paper', *(f'ours: {name}' for name in SINGLE),
         'ours: all', 'ormas-monitor', 'fastai ActivationStats', 'Composer ActivationMonitor', 'wandb.watch(log="all")',
         'torch-module-monitor', 'Lightning grad_norm', 'traintools GradientHealthMonitor',
         'traintools PlasticityProbe')


# Of glibc: what is freed is kept. To give it back and get it again takes a step 4000 to 16 000 page faults, as chance
# has it, which is as much time as what is measured here.
KEEP_MEMORY = {'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': str(1 << 40)}


def make_environment(folder):
    """ An environment that sees all of this one, and the rivals; its Python, and what could not be installed. """
    python, said = folder / 'bin' / 'python', folder / 'failed.json'
    if not said.exists():
        failed = {}
        subprocess.run([sys.executable, '-m', 'venv', folder], check=True)
        packages = next((folder / 'lib').glob('python*')) / 'site-packages'
        packages.joinpath('this.pth').write_text('\n'.join(path for path in sys.path if 'site-packages' in path) + '\n')
        fixed = folder / 'constraints.txt'
        fixed.write_text(''.join(f'{name}=={version}\n' for name, version in versions(
            sys.executable, ('torch', 'torchvision', 'numpy', 'pytorch-lightning')).items()))
        for name in RIVALS:
            error = install(python, '-c', fixed, name)
            if error and name in ALONE:
                error = install(python, '--no-deps', name) or install(python, '-c', fixed, *ALONE[name])
            if error:
                failed[name] = error
        said.write_text(json.dumps(failed))
    return python, json.loads(said.read_text())


def install(python, *args):
    """ The last line of the error, or None. """
    result = subprocess.run([python, '-m', 'pip', 'install', '-q', *args], capture_output=True, text=True, check=False)
    return result.stderr.strip().splitlines()[-1] if result.returncode else None


def versions(python, names):
    code = ('import importlib.metadata as m, json, sys\nfound = {}\nfor name in sys.argv[1:]:\n'
            '    try: found[name] = m.version(name)\n    except m.PackageNotFoundError: pass\nprint(json.dumps(found))')
    return json.loads(subprocess.run([python, '-c', code, *names], capture_output=True, text=True, check=True).stdout)


def work(python, kind, name, out, threads, timeout=3600):
    """ The result of one row or tool, or why there is none. """
    env = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'GEOWATCH_PREIMPORT': '0', 'WANDB_MODE': 'offline',
           'WANDB_SILENT': 'true', **KEEP_MEMORY}
    try:
        done = subprocess.run([python, HERE / 'worker.py', kind, name], capture_output=True, text=True, env=env,
                              cwd=out, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {'error': f'took more than {timeout} s'}
    for line in done.stdout.splitlines():
        if line.startswith('RESULT '):
            return json.loads(line.removeprefix('RESULT '))
    return {'error': (done.stderr.strip().splitlines() or ['no result'])[-1][:200]}


def steps(python, out, threads):
    """ Each tool in a process of its own, one after the other. """
    return {tool: work(python, 'tool', tool, out, threads) for tool in TOOLS}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='folder for table.md, results.json and the plot')
    parser.add_argument('--env', type=Path, help='environment to make, or to use if it is there')
    parser.add_argument('--rows', default=','.join(ROWS), help='names of rows, separated by commas')
    parser.add_argument('--pages', type=Path, nargs='*', default=(), help='Markdown files whose tables are replaced')
    parser.add_argument('--threads', type=int, default=1, help='of torch')
    args = parser.parse_args()
    rows = args.rows.split(',') if args.rows else []
    if unknown := set(rows) - set(ROWS):
        parser.error(f'unknown rows {", ".join(sorted(unknown))}; expected any of {", ".join(ROWS)}')
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    fpath = out / 'results.json'
    results = {'machines': {}, **(json.loads(fpath.read_text()) if fpath.exists() else {})}
    if rows:
        python, failed = make_environment((args.env or args.out / 'env').resolve())
        machine = {'processor': _processor(), 'cores': os.cpu_count(), 'threads': args.threads,
                   'python': platform.python_version(), 'could not be installed': failed,
                   'versions': versions(python, ('torch', 'torchvision', 'pytorch-lightning', 'geowatch', *RIVALS))}
    for row in rows:
        start = time.perf_counter()
        results[row] = (steps(python, out, args.threads) if row == 'steps'
                        else work(python, 'row', row, out, args.threads))
        results['machines'][row] = machine
        fpath.write_text(json.dumps(results, indent=1))
        print(f'{row} took {time.perf_counter() - start:.0f} s', flush=True)
    tables = {'table': table(results), **({'short table': short(results)} if 'steps' in results else {})}
    (out / 'table.md').write_text('\n'.join(reversed(tables.values())))
    if 'error' not in results.get('growth', {'error': ''}):
        draw(results['growth'], out / 'cost_growth.png')
    for page in args.pages:
        page.write_text(replace(page.read_text(), tables))
        picture = page.parent / 'images' / 'cost_growth.png'
        if picture.exists() and (out / picture.name).exists():
            shutil.copy(out / picture.name, picture)
    print((out / 'table.md').read_text())


def _processor():
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == '__main__':
    main()
