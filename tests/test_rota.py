"""
Layers that take turns where the singular values of all would take too long.
"""
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from common import fit, lines_of, make_data, make_net, numpy_erank, read_lines
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine import publisher, rota
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.rota import Rota, spectral_work

WEIGHTS = ['fc1', 'fc2', 'head']


@pytest.fixture
def one_at_a_time(monkeypatch):
    """ No time at all, so that a measurement takes the least that there is. """
    monkeypatch.setattr(rota, 'SECONDS', 0.)
    monkeypatch.setattr(publisher, 'Rota', lambda share, device: Rota(0., device))


class Ranks(Callback):
    """ The rank of each weight after each step, by SVD. """

    def __init__(self):
        self.found = {}

    def on_train_batch_end(self, trainer, module, *args):
        self.found[trainer.global_step - 1] = {
            name: numpy_erank(module.get_submodule(name).weight.detach()) for name in WEIGHTS}


def test_weights_take_turns(tmp_path, one_at_a_time, capsys):
    ranks = Ranks()
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('erank,stable_rank,weight_mag', interval=1),
                               callbacks=[ranks])
    erank = lines_of(read_lines(trainer, start=True), 'erank')
    assert [line['fresh'] for line in erank[:7]] == [[WEIGHTS[i % 3]] for i in range(7)]
    assert [line['fresh'] for line in erank] == [
        line['fresh'] for line in lines_of(read_lines(trainer, start=True), 'stable_rank')]
    for nth, line in enumerate(erank):
        assert set(line['layers']) == set(WEIGHTS[:nth + 1])
        for i, name in enumerate(list(WEIGHTS)[:nth + 1]):
            turn = nth - (nth - i) % 3 - 1  # the step at which it was last its turn
            if turn >= 0:
                assert line['layers'][name]['value'] == pytest.approx(ranks.found[turn][name], rel=1e-5)
        assert line['value'] == pytest.approx(np.mean([own['value'] for own in line['layers'].values()]), rel=1e-9)
    # What needs no spectrum is there of all layers, as ever.
    assert all('fresh' not in line and set(line['layers']) == set(WEIGHTS) for line in lines_of(lines, 'weight_mag'))
    said = capsys.readouterr().out
    assert said.count('erank: 1 of 3 layers at this measurement') == 1


def test_metrics_share_turns(tmp_path, one_at_a_time):
    """ Where two are due and one knows a layer already, another that neither knows goes first. """
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('erank@1,stable_rank@2', interval=1))
    erank, stable = (lines_of(read_lines(trainer, start=True), name) for name in ('erank', 'stable_rank'))
    assert [line['fresh'] for line in erank[:3]] == [['fc1'], ['fc2'], ['head']]
    assert [line['step'] for line in stable[:3]] == [-1, 1, 3]
    assert [line['fresh'] for line in stable[:3]] == [['fc1'], ['head'], ['fc2']]


@pytest.mark.parametrize('source', ['train', 'validation'])
def test_features_take_turns(tmp_path, one_at_a_time, source):
    names = ['act', 'relu']
    kept = {}

    class Features(Callback):
        def on_validation_end(self, trainer, module):
            with torch.no_grad():
                x = torch.cat(list(trainer.val_dataloaders))
                kept[max(trainer.global_step - 1, -1)] = [numpy_erank(own) for own in module.features(x)]

    _, trainer, _, _ = fit(
        tmp_path, PlasticityMonitor('feature_erank,centred_erank,dead_units', interval='epoch', source=source),
        callbacks=[Features()], max_epochs=4, num_sanity_val_steps=-1)
    lines = read_lines(trainer, start=True)
    of_rank = lines_of(lines, 'feature_erank')
    assert len(of_rank) == 5
    # The first window of training begins before that of the untrained network is over.
    order = [0, 1, 0, 1, 0] if source == 'validation' else [0, 0, 1, 0, 1]
    assert [line['fresh'] for line in of_rank] == [[names[i]] for i in order]
    assert [line['fresh'] for line in lines_of(lines, 'centred_erank')] == [line['fresh'] for line in of_rank]
    assert [len(line['layers']) for line in of_rank] == [len(set(order[:n + 1])) for n in range(5)]
    if source == 'validation':
        for nth, line in enumerate(of_rank):
            expected = {names[i]: kept[of_rank[nth - (nth - i) % 2]['step']][i] for i in range(min(nth, 1) + 1)}
            assert {name: own['value'] for name, own in line['layers'].items()} == pytest.approx(expected, rel=1e-5)
            assert line['value'] == pytest.approx(np.mean(list(expected.values())), rel=1e-5)
    assert all(len(line['layers']) == 2 for line in lines_of(lines, 'dead_units'))


def test_a_resumed_run_goes_on_with_the_next(tmp_path, one_at_a_time):
    def run(folder, **kwargs):
        saves = ModelCheckpoint(tmp_path / folder / 'saved', every_n_train_steps=4, save_top_k=-1)
        trainer = pl.Trainer(
            default_root_dir=tmp_path / folder, max_epochs=2, accelerator='cpu', enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[PlasticityMonitor('erank@2,feature_erank@epoch', source='validation'), saves])
        trainer.fit(make_net(), *[DataLoader(make_data(), batch_size=8)] * 2, **kwargs)
        return [line for line in read_lines(trainer) if line['step'] > 3]
    uncut = run('a')
    saved = str(tmp_path / 'a/saved/epoch=0-step=4.ckpt')
    assert torch.load(saved, weights_only=True)
    again = run('b', ckpt_path=saved)
    assert [(line['metric'], line['fresh']) for line in again] == [(line['metric'], line['fresh']) for line in uncut]
    assert {name for line in again for name in line['fresh']} == {*WEIGHTS, 'act', 'relu'}
    assert all(len(line['layers']) == (3 if line['metric'] == 'erank' else 2) for line in again)


def test_a_moment_begins_once(tmp_path, monkeypatch):
    """ Also where it has weights and features, or the second of them would get no share of the time before. """
    begun = []
    monkeypatch.setattr(Rota, 'begin', lambda self, now, pace, begin=Rota.begin: (begun.append(now),
                                                                                  begin(self, now, pace)))
    fit(tmp_path, PlasticityMonitor('erank,feature_erank', interval='epoch', source='train'), max_epochs=3)
    # The weights before the first step, the features in it, and both at the end of each epoch.
    assert len(begun) == 5 and begun == sorted(set(begun))


def test_all_at_once_where_there_is_time(tmp_path):
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('all', interval=1))
    assert not [line for line in lines if 'fresh' in line]


def test_a_large_network_is_planned_within_seconds():
    """ The shapes of a language model of 7 billion parameters, at the pace of one core. """
    layers = {f'{block}.{name}': spectral_work(size) for block in range(32)
              for name, size in [('q', 4096), ('k', 4096), ('v', 4096), ('o', 4096),
                                 ('gate', 4096), ('up', 4096), ('down', 4096)]}
    plan, last = Rota(0.01, 'cpu'), {}
    plan.begin(0., pace=1e10)
    measurements = 0
    while len(last) < len(layers):
        taken = plan.plan(layers, lambda layer: last.get(layer, -1))
        assert not set(taken) & set(last)  # nobody has a second turn before all had one
        assert len(taken) == 1 or sum(layers[layer] for layer in taken) <= 3 * 1e10
        last.update(dict.fromkeys(taken, measurements))
        measurements += 1
    assert measurements == 224
    plan.begin(36000., pace=1e10)  # ten hours later, of which one percent are six minutes
    assert sum(layers[layer] for layer in plan.plan(layers, last.get)) / 1e10 == pytest.approx(360, rel=0.1)
