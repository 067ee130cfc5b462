"""
The example docs/examples/sweep_lr_batch_size.py.
"""
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / 'docs/examples/sweep_lr_batch_size.py'


def sweep(*args):
    return subprocess.run([sys.executable, str(SCRIPT), *args], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**os.environ, 'GEOWATCH_PREIMPORT': '0'})


def test_prints_a_command_for_each_pair(tmp_path):
    run = sweep(f'--out={tmp_path}', '--lrs=0.1,0.01', '--batch_sizes=2,4,8', '--run=0', '--fit_args=--a=1 --b="2 3"')
    assert run.returncode == 0, run.stdout
    commands = [shlex.split(line) for line in run.stdout.splitlines() if line.startswith('geowatch fit')]
    pairs = [(dict(arg.lstrip('-').split('=', 1) for arg in command[2:])) for command in commands]
    assert [(pair['optimizer.init_args.lr'], pair['data.batch_size']) for pair in pairs] == [
        (lr, size) for size in ('2', '4', '8') for lr in ('0.1', '0.01')]
    assert len({pair['trainer.default_root_dir'] for pair in pairs}) == 6
    assert all((pair['a'], pair['b']) == ('1', '2 3') for pair in pairs)
    assert 'max_epochs' in (tmp_path / 'task.yaml').read_text()
    assert sorted(tmp_path.iterdir()) == [tmp_path / 'task.yaml']


@pytest.mark.slow
def test_trains_reports_and_goes_on(tmp_path):
    pytest.importorskip('geowatch.tasks.fusion', reason='geowatch is not installed')
    args = [f'--out={tmp_path}', '--batch_sizes=2', '--fit_args=--plasticity_metrics=weight_mag@1 '
            '--data.max_epoch_length=4 --trainer.max_epochs=1 --trainer.limit_val_batches=1']
    run = sweep(*args, '--lrs=0.001')
    assert run.returncode == 0, run.stdout[-3000:]
    (fpath,) = tmp_path.glob('lr0.001-bs2/lightning_logs/*/plasticity.jsonl')
    lines = [json.loads(line) for line in fpath.read_text().splitlines()]
    assert [line['step'] for line in lines] == [-1, 0, 1]
    assert (tmp_path / 'report/report.html').exists()
    before = fpath.read_text()

    # What is there stays as it is; what fails is named, and the rest is still reported on.
    (tmp_path / 'report/report.html').unlink()
    run = sweep(*args, '--lrs=0.001,no_number')
    assert run.returncode == 1
    assert f'{tmp_path / "lr0.001-bs2"}: there already' in run.stdout
    assert 'lrno_number-bs2: failed with exit code' in run.stdout
    assert 'no_number' in (tmp_path / 'lrno_number-bs2/log.txt').read_text()
    assert fpath.read_text() == before
    assert (tmp_path / 'report/report.html').exists()
