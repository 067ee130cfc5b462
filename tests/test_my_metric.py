"""
The example docs/examples/my_metric.py, which the page on adding a metric shows.
"""
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import fit, last, lines_of, make_net, matrices

from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS

SCRIPT = Path(__file__).resolve().parents[1] / 'docs/examples/my_metric.py'


@pytest.fixture
def my_metric():
    before = dict(METRICS)
    spec = importlib.util.spec_from_file_location('my_metric', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    # Other tests know the five.
    METRICS.clear()
    METRICS.update(before)


def test_measures_beside_the_five(tmp_path, my_metric):
    monitor = my_metric.Monitor('weight_rms@1,active_share,erank')
    net, trainer, lines, data = fit(tmp_path, monitor, make_net(dead=5))
    assert {line['metric'] for line in lines} == {'weight_rms', 'active_share', 'erank'}
    assert [line['step'] for line in lines_of(lines, 'weight_rms')] == list(range(10))
    assert [line['step'] for line in lines_of(lines, 'active_share')] == [4, 9]

    weights = matrices(net)
    line = last(lines, 'weight_rms')
    assert line['value'] == pytest.approx(
        np.sqrt(np.mean(np.concatenate([w.ravel() for w in weights.values()]) ** 2)), rel=1e-6)
    assert {name: layer['value'] for name, layer in line['layers'].items()} == pytest.approx(
        {name: np.sqrt(np.mean(w ** 2)) for name, w in weights.items()}, rel=1e-6)

    with torch.no_grad():
        features = torch.cat([x.flatten() for x in net.features(data)])
    line = last(lines, 'active_share')
    assert line['value'] == pytest.approx((features != 0).double().mean().item())
    assert line['samples'] == len(data)
    assert trainer.callback_metrics['plasticity/active_share'].item() == pytest.approx(line['value'])


def test_is_one_of_all(tmp_path, my_metric):
    _, _, lines, _ = fit(tmp_path, my_metric.Monitor('all'), max_epochs=1)
    assert {'weight_rms', 'active_share', 'weight_mag', 'dead_units'} <= {line['metric'] for line in lines}


def test_a_mistyped_name_is_told_from_it(my_metric):
    with pytest.raises(ValueError, match="Did you mean 'weight_rms'"):
        my_metric.Monitor('weight_rsm')


def test_doctests_of_the_example():
    run = subprocess.run([sys.executable, '-m', 'xdoctest', str(SCRIPT)], text=True, cwd=SCRIPT.parent,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert run.returncode == 0 and '2 passed' in run.stdout, run.stdout
