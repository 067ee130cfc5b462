"""
Values of a real run against an independent computation.
"""
import json
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import effective_rank


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.fc1 = torch.nn.Linear(8, 16)
        self.act = torch.nn.ReLU()
        self.fc2 = torch.nn.Linear(16, 12)
        self.head = torch.nn.Linear(12, 1)

    def forward(self, x):
        return self.head(torch.relu(self.fc2(self.act(self.fc1(x)))))

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log('val_loss', self(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, monitor, net=None, validate=True, **kwargs):
    torch.manual_seed(0)
    net = net or Net()
    trainer = pl.Trainer(default_root_dir=tmp_path, callbacks=[monitor], accelerator='cpu',
                         enable_progress_bar=False, enable_model_summary=False,
                         **{'max_epochs': 2, **kwargs})
    data = torch.randn(37, 8)
    trainer.fit(net, DataLoader(data, batch_size=8), DataLoader(data, batch_size=10) if validate else None)
    lines = [json.loads(line) for line in (Path(trainer.log_dir) / 'plasticity.jsonl').read_text().splitlines()]
    return net, trainer, lines, data


def numpy_erank(matrix):
    s = np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)
    p = s / s.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def last(lines, metric):
    return [line for line in lines if line['metric'] == metric][-1]


@pytest.mark.parametrize('source', ['validation', 'train'])
def test_all_metrics_run(tmp_path, source):
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor(interval=1, source=source, samples=20))
    assert {line['metric'] for line in lines} == {
        'weight_mag', 'grad_mag', 'grad_norm', 'dead_units', 'erank', 'feature_erank'}
    assert {f'plasticity/{line["metric"]}' for line in lines} <= set(trainer.callback_metrics)


def test_weights_equal_numpy(tmp_path):
    net, _, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1,erank@1'))
    weights = {n.removesuffix('.weight'): p.detach().numpy() for n, p in net.named_parameters() if p.ndim >= 2}
    assert len(weights) == 3
    line = last(lines, 'weight_mag')
    expected = sum(np.abs(w).sum(dtype=np.float64) for w in weights.values()) / sum(w.size for w in weights.values())
    assert line['value'] == pytest.approx(expected, rel=1e-6)
    line = last(lines, 'erank')
    for name, weight in weights.items():
        assert line['layers'][name]['value'] == pytest.approx(numpy_erank(weight), rel=1e-6)
    assert line['value'] == pytest.approx(np.mean([numpy_erank(w) for w in weights.values()]), rel=1e-6)


def test_features_and_dead_units_equal_numpy(tmp_path):
    net = Net()
    with torch.no_grad():
        net.fc1.bias[:5] = -100
    net, _, lines, data = fit(tmp_path, PlasticityMonitor('dead_units,feature_erank'), net, max_epochs=1)
    with torch.no_grad():
        first = net.act(net.fc1(data))
        second = torch.relu(net.fc2(first))
    dead = [int((x == 0).all(0).sum()) for x in (first, second)]
    assert dead[0] >= 5
    line = last(lines, 'dead_units')
    assert [layer['units'] for layer in line['layers'].values()] == [16, 12]
    assert line['value'] == pytest.approx(sum(dead) / 28)
    assert line['samples'] == 37
    line = last(lines, 'feature_erank')
    values = [layer['value'] for layer in line['layers'].values()]
    assert values == pytest.approx([numpy_erank(first), numpy_erank(second)], rel=1e-5)


@pytest.mark.parametrize('interval, steps', [(1, list(range(10))), (7, [4, 6]), ('epoch', [4, 9]), ('auto', [4, 9])])
def test_steps_of_weights(tmp_path, interval, steps):
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag,grad_mag', interval=interval))
    for metric in ('weight_mag', 'grad_mag', 'grad_norm'):
        assert [line['step'] for line in lines if line['metric'] == metric] == steps


@pytest.mark.parametrize('kwargs, words', [
    ({'metrics': 'wieght_mag'}, "Did you mean 'weight_mag'"), ({'interval': 'sometimes'}, 'duration'),
    ({'interval': 0}, 'positive'), ({'samples': 0}, 'at least 1'), ({'source': 'test'}, 'validation'),
])
def test_wrong_input(kwargs, words):
    with pytest.raises(ValueError, match=words):
        PlasticityMonitor(**kwargs)


@pytest.mark.parametrize('shape', [(40, 7), (7, 40), (16, 16)])
@pytest.mark.parametrize('offset', [0, 1000])
def test_effective_rank_equals_svd(shape, offset):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + offset
    assert effective_rank(matrix).item() == pytest.approx(numpy_erank(matrix), rel=1e-5)
