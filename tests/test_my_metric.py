"""
The example docs/examples/my_metric.py, which the page on adding a metric shows.
"""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import Net, fit, last, lines_of, make_net, matrices, read_lines

from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
from geowatch.utils.lightning_ext.callbacks.plasticity_report import PlasticityReportCLI

SCRIPT = Path(__file__).resolve().parents[1] / 'docs/examples/my_metric.py'
OWN = ('weight_rms', 'positive_share')


class Growing(Net):
    def loss(self, batch):
        return -2 * sum(param.square().sum() for param in self.parameters())


@pytest.fixture
def my_metric():
    before = dict(METRICS)
    spec = importlib.util.spec_from_file_location('my_metric', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(METRICS) - set(before) == set(OWN)
    yield module
    # Other tests know the built-in ones.
    METRICS.clear()
    METRICS.update(before)


def test_measures_beside_the_built_in(tmp_path, my_metric):
    monitor = my_metric.Monitor('weight_rms@1,positive_share,erank')
    net, trainer, _, data = fit(tmp_path, monitor, make_net(dead=5))
    lines = read_lines(trainer, start=True)
    assert {line['metric'] for line in lines} == {'weight_rms', 'positive_share', 'erank'}
    # The untrained network first: of weights always, of activations in the sanity check.
    assert [line['step'] for line in lines_of(lines, 'weight_rms')] == [-1, *range(10)]
    assert [line['step'] for line in lines_of(lines, 'positive_share')] == [-1, 4, 9]

    weights = matrices(net)
    line = last(lines, 'weight_rms')
    assert line['value'] == pytest.approx(
        np.sqrt(np.mean(np.concatenate([w.ravel() for w in weights.values()]) ** 2)), rel=1e-6)
    assert {name: layer['value'] for name, layer in line['layers'].items()} == pytest.approx(
        {name: np.sqrt(np.mean(w ** 2)) for name, w in weights.items()}, rel=1e-6)

    with torch.no_grad():
        features = net.features(data)
    line = last(lines, 'positive_share')
    assert line['value'] == pytest.approx((torch.cat(features, 1) > 0).double().mean().item())
    assert list(line['layers'].values()) == [
        {'value': pytest.approx((x > 0).double().mean().item()), 'units': x.shape[1],
         'never': pytest.approx((x <= 0).all(0).double().mean().item())} for x in features]
    assert line['layers']['act']['never'] > 0.3  # 5 of 16
    assert line['samples'] == len(data)
    assert trainer.callback_metrics['plasticity/positive_share'].item() == pytest.approx(line['value'])


def test_is_one_of_all(tmp_path, my_metric):
    _, _, lines, _ = fit(tmp_path, my_metric.Monitor('all'), max_epochs=1)
    assert {*OWN, 'weight_mag', 'dead_units'} <= {line['metric'] for line in lines}


def test_a_mistyped_name_is_told_from_it(my_metric):
    with pytest.raises(ValueError, match="Did you mean 'weight_rms'"):
        my_metric.Monitor('weight_rsm')


def test_its_words_travel_with_the_run(tmp_path, my_metric, capsys):
    """ The report, which has not imported the file, judges it as ours. """
    pytest.importorskip('matplotlib', reason='the report needs matplotlib')
    net = make_net(Growing)
    _, trainer, _, _ = fit(tmp_path, my_metric.Monitor('weight_rms@1,weight_mag@1'), net, validate=False)
    lines = read_lines(trainer, start=True)
    assert [line['step'] for line in lines if 'words' in line] == [-1]
    assert [line['metric'] for line in lines if 'words' in line] == ['weight_rms']
    del METRICS['weight_rms']

    capsys.readouterr()
    assert PlasticityReportCLI.main(cmdline=0, runs=[trainer.log_dir], format='json') == 0
    report = json.loads(capsys.readouterr().out)
    assert report['runs'][0]['signs'] == ['weight_mag', 'weight_rms']
    (sign,) = [finding for finding in report['findings'] if finding['kind'] == 'sign']
    assert 'weight RMS' in sign['text'] and 'Large weights turn slowly.' in sign['why']


def test_doctests_of_the_example():
    run = subprocess.run([sys.executable, '-m', 'xdoctest', str(SCRIPT)], text=True, cwd=SCRIPT.parent,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert run.returncode == 0 and '2 passed' in run.stdout, run.stdout
