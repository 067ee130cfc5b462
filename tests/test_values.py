"""
Values of a real run against an independent computation.
"""
import numpy as np
import pytest
import torch
from common import TAGS, fit, last, make_net, matrices, mean_abs, numpy_erank

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor


@pytest.mark.parametrize('source', ['validation', 'train'])
def test_all_metrics_run(tmp_path, source):
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor(interval=1, source=source, samples=20))
    assert {line['metric'] for line in lines} == set(TAGS)
    assert {f'plasticity/{line["metric"]}' for line in lines} <= set(trainer.callback_metrics)


def test_weights_equal_numpy(tmp_path):
    net, _, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1,erank@1'))
    weights = matrices(net)
    assert len(weights) == 3
    assert last(lines, 'weight_mag')['value'] == pytest.approx(mean_abs(weights), rel=1e-6)
    line = last(lines, 'erank')
    assert set(line['layers']) == set(weights)
    for name, weight in weights.items():
        assert line['layers'][name]['value'] == pytest.approx(numpy_erank(weight), rel=1e-6)
    assert line['value'] == pytest.approx(np.mean([numpy_erank(w) for w in weights.values()]), rel=1e-6)


def test_features_and_dead_units_equal_numpy(tmp_path):
    net = make_net(dead=5)
    net, _, lines, data = fit(tmp_path, PlasticityMonitor('dead_units,feature_erank'), net, max_epochs=1)
    with torch.no_grad():
        first, second = net.features(data)
    dead = [int((x == 0).all(0).sum()) for x in (first, second)]
    assert dead[0] >= 5
    line = last(lines, 'dead_units')
    assert [layer['units'] for layer in line['layers'].values()] == [16, 12]
    assert line['value'] == pytest.approx(sum(dead) / 28)
    assert line['samples'] == 37
    line = last(lines, 'feature_erank')
    values = [layer['value'] for layer in line['layers'].values()]
    assert values == pytest.approx([numpy_erank(first), numpy_erank(second)], rel=1e-5)
