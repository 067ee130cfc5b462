"""
Hidden layers in real runs: experts without a sample, what unfreezes, what is said, where to look.
"""
import copy

import pytest
import torch
from common import Net, fit, last, make_data, numpy_erank
from torch import nn
from torch.nn import functional as F

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.sites import Site
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.window import Window
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.calls import Call


class Wrapped(Net):
    """ Any network in the place of the usual one. """

    def __init__(self, net):
        super().__init__()
        for name in list(self._modules):
            del self._modules[name]
        self.net = net

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        return self.net(batch).square().mean()


def run(tmp_path, net, metrics='dead_units', source='train', loader=None, **kwargs):
    torch.manual_seed(0)
    monitor = PlasticityMonitor(metrics, source=source, **kwargs)
    module = net if isinstance(net, Net) else Wrapped(net)
    _, _, lines, _ = fit(tmp_path, monitor, module, loader=loader, max_epochs=1, validate=source == 'validation')
    return module, lines


class Mixture(nn.Module):
    """ Each expert is a module, which runs if an example is sent to it; nobody is sent to the third. """

    def __init__(self, runs_empty):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)) for _ in range(4))
        self.head = nn.Linear(4, 1)
        self.runs_empty = runs_empty

    def forward(self, x):
        chosen = torch.arange(len(x)) % 2 + 2 * (torch.arange(len(x)) % 4 == 3)
        out = x.new_zeros(len(x), 4)
        for i, expert in enumerate(self.experts):
            if self.runs_empty or (chosen == i).any():
                out[chosen == i] = expert(x[chosen == i])
        return self.head(out)


@pytest.mark.parametrize('runs_empty', [False, True])
def test_an_expert_without_a_sample(tmp_path, runs_empty):
    module, lines = run(tmp_path, Mixture(runs_empty), 'dead_units,feature_erank')
    line = last(lines, 'dead_units')
    assert {name: own['units'] for name, own in line['layers'].items()} == {
        f'net.experts.{i}.1': 12 for i in range(4)}
    assert line['layers']['net.experts.2.1'] == {'value': 1., 'units': 12, 'no_sample': True}
    assert not any('no_sample' in line['layers'][f'net.experts.{i}.1'] for i in (0, 1, 3))
    assert line['value'] == pytest.approx(sum(own['value'] for own in line['layers'].values()) / 4)
    assert 'net.experts.2.1' not in last(lines, 'feature_erank')['layers']


def test_what_unfreezes_joins(tmp_path):
    class Finetuned(Wrapped):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net[0].requires_grad_(True)

    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))
    net[0].requires_grad_(False)
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('dead_units', source='train'), Finetuned(net), max_epochs=2,
                         validate=False)
    assert [list(line['layers']) for line in lines] == [['net.3'], ['net.1', 'net.3']]


@pytest.mark.parametrize('is_part', [True, False])
def test_the_value_is_of_what_trains_only(tmp_path, is_part):
    """
    A teacher with dead units, a loss and an output, beside features whose rank is known. Where the teacher is frozen
    it is a part of the model, else nobody but the step knows of it.
    """
    class Distilled(Wrapped):
        def __init__(self, net):
            super().__init__(net)
            teacher = copy.deepcopy(net)
            with torch.no_grad():
                teacher[0].bias[:] = -100
            self.teachers = nn.ModuleList([teacher]).requires_grad_(False) if is_part else [teacher]

        def loss(self, batch):
            with torch.no_grad():
                soft = self.teachers[0](batch).sigmoid()
            return F.relu(1 + (torch.sigmoid(self(batch)) - soft)).mean() * 0

    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 1))
    module, lines = run(tmp_path, Distilled(net), 'dead_units,feature_erank')
    with torch.no_grad():
        features = module.net[:2](make_data())
    assert last(lines, 'dead_units')['value'] == float((features == 0).all(0).double().mean())
    assert last(lines, 'feature_erank')['value'] == pytest.approx(numpy_erank(features.double()), rel=1e-6)


def test_the_first_line_names_what_is_frozen(tmp_path, capsys):
    class Distilled(Wrapped):
        def __init__(self, net):
            super().__init__(net)
            self.teacher = nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 1)).requires_grad_(False)

    run(tmp_path, Distilled(nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 1))))
    assert '2 weights: frozen (teacher)' in capsys.readouterr().out


def test_the_user_names_the_output(tmp_path):
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1), nn.Sigmoid())
    _, lines = run(tmp_path / 'a', net, layers='net*')
    assert list(last(lines, 'dead_units')['layers']) == ['net.1']
    _, lines = run(tmp_path / 'b', net, layers='net*,net.3')
    assert list(last(lines, 'dead_units')['layers']) == ['net.1', 'net.3']


@pytest.mark.parametrize('act, words', [
    (nn.LeakyReLU(), 'no activation that was seen has an output at which a unit is dead: leaky_relu'),
    (nn.Softmax(-1), 'no activation function was seen')])
def test_why_nothing_is_measured(tmp_path, capsys, act, words):
    _, lines = run(tmp_path, nn.Sequential(nn.Linear(8, 6), act, nn.Linear(6, 1)))
    assert not lines
    assert f'never measured: dead_units ({words})' in capsys.readouterr().out
    _, lines = run(tmp_path / 'frozen', nn.Sequential(nn.Linear(8, 6).requires_grad_(False), nn.ReLU(),
                                                      nn.Linear(6, 1)))
    assert not lines
    assert 'no activation function was seen' not in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize('sanity', [0, 2])
def test_a_validation_that_runs_no_model(tmp_path, capsys, sanity):
    class Silent(Net):
        def validation_step(self, batch, batch_idx):
            pass

    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('dead_units,weight_mag'), Silent(), max_epochs=2,
                         num_sanity_val_steps=sanity)
    steps = [line['step'] for line in lines if line['metric'] == 'dead_units']
    assert steps == ([9] if not sanity else [4, 9])
    assert capsys.readouterr().out.count('activations are seen in training') == 1


def test_lazy_layers_are_measured_and_not_announced_as_lost(tmp_path, capsys):
    _, lines = run(tmp_path, nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(1)), 'dead_units,weight_mag',
                   source='validation')
    assert list(last(lines, 'weight_mag')['layers']) == ['net.0', 'net.2']
    assert 'without a shape yet, measured once it has one (net)' in capsys.readouterr().out


def test_units_that_change_are_left_out_and_memory_is_bounded(tmp_path, capsys):
    class Cropped(nn.Module):
        """ As many units as the batch has examples or so. """

        def __init__(self):
            super().__init__()
            self.fc, self.mix, self.head = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 1)

        def forward(self, x):
            units = len(x) // 2  # 4 of a full batch, 2 of the last one
            x = torch.relu(self.mix(torch.relu(self.fc(x)))[:, :units])
            return self.head(F.pad(x, (0, 6 - units)))

    _, lines = run(tmp_path, Cropped())
    assert [[own['units'] for own in line['layers'].values()] for line in lines] == [[6]]  # of fc
    assert 'not seen: activations inside net: relu of a changing number of units' in capsys.readouterr().out

    window = Window(['feature_erank'], ['gram', 'rows'], samples=10 ** 6)
    for width in range(3, 400):
        window.begin_batch(torch.zeros(4, width))
        window.add(Call(Site('a', 'relu', 'fc', units=width), torch.rand(4, width), 1))
        window.add(Call(Site('a', 'relu', 'fc2', units=5), torch.rand(4, 5), 1))
        window.end_batch()
    assert {site.layer for site in window.totals()['activations', 'gram']} == {'fc2'}
    assert {site.layer for site in window.apart} == {'fc'}
    rows = next(maker for maker in window._makers if 'gram' in maker.fields)
    assert not any(site.layer == 'fc' for site in rows._waiting)
