"""
The `geowatch` command, as a user types it.
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('geowatch.tasks.fusion', reason='geowatch is not installed')

CONFIG = '''
data:
  train_dataset: special:vidshapes4-frames9-speed0.5-multispectral-gsize64
  vali_dataset: special:vidshapes1-frames9-speed0.5-multispectral-gsize64
  chip_dims: 64
  batch_size: 2
  num_workers: 0
model: HeterogeneousModel
optimizer:
  class_path: torch.optim.SGD
  init_args: {lr: 0.001}
trainer:
  accelerator: cpu
  devices: 1
  default_root_dir: ./run
  num_sanity_val_steps: 0
  max_steps: 4
  check_val_every_n_epoch: 1
'''


def geowatch(*args, cwd):
    command = [str(Path(sys.executable).parent / 'geowatch'), *args]
    return subprocess.run(command, cwd=cwd, text=True, timeout=600,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_fit_measures(tmp_path):
    (tmp_path / 'config.yaml').write_text(CONFIG)
    run = geowatch('fit', '--config=config.yaml', '--plasticity_metrics=all', '--plasticity_source=train', cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-3000:]
    (fpath,) = tmp_path.glob('run/lightning_logs/*/plasticity.jsonl')
    lines = [json.loads(line) for line in fpath.read_text().splitlines()]
    assert {line['metric'] for line in lines} == {
        'weight_mag', 'grad_mag', 'grad_norm', 'dead_units', 'erank', 'feature_erank'}
    assert all(line['value'] > 0 for line in lines if line['metric'] != 'dead_units')
    assert 'PlasticityMonitor' in (fpath.parent / 'config.yaml').read_text()


def test_unknown_metric_exits_with_2(tmp_path):
    run = geowatch('fit', '--plasticity_metrics=wieght_mag', cwd=tmp_path)
    assert run.returncode == 2
    assert "Did you mean 'weight_mag'" in run.stdout
    assert 'Traceback' not in run.stdout
