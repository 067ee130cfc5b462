"""
Update ratio, step alignment and the distance from the start: oracles by hand, and plain training loops.
"""
import copy
import math

import pytest
import pytorch_lightning as pl
import torch
from common import Net, fit, lines_of, make_data, make_net, read_lines
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.precision import MixedPrecision
from test_gradients import ScaledOnly
from test_sources import Adam, TwoOptimizers, squares
from torch import nn
from torch.utils.data import DataLoader

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources import Updates


def weight(*rows):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows)
    return layer


class Given(pl.LightningModule):
    """ Layers with given weights, and a loss of them. """

    def __init__(self, layers, loss, optimizer):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.given, self.make = loss, optimizer

    def training_step(self, batch, batch_idx):
        return self.given(*(layer.weight for layer in self.layers.values()))

    def configure_optimizers(self):
        return self.make(self.parameters())


def run(folder, metrics, layers, loss, optimizer, steps=1, **kwargs):
    """ Lines of a run of Given, each step measured. """
    net = Given(layers, loss, optimizer)
    _, _, lines, _ = fit(folder, PlasticityMonitor(metrics, interval=1), net, validate=False, max_epochs=1,
                         loader=DataLoader(torch.zeros(steps, 1)), **kwargs)
    return lines


def half_square(*weights):
    return sum(w.square().sum() for w in weights) / 2


def of_layers(line, column='value'):
    return {layer.removeprefix('layers.'): own[column] for layer, own in line['layers'].items()}


def values(lines, metric):
    return [line['value'] for line in lines_of(lines, metric)]


# --- update_ratio: by hand -------------------------------------------------------------

def test_ratio_of_two_layers(tmp_path):
    """ The network's is that of sums, which is not the mean of the layers'. """
    given = {'a': torch.tensor([[-.3, .4]]), 'b': torch.tensor([[0., .6]])}
    (line,) = run(tmp_path, 'update_ratio', {'a': weight([3., 4.]), 'b': weight([0., 12.])},
                  lambda a, b: (a * given['a']).sum() + (b * given['b']).sum(),
                  lambda params: torch.optim.SGD(params, lr=1.))
    assert of_layers(line) == pytest.approx({'a': 0.1, 'b': 0.05}, rel=1e-6)
    assert line['value'] == pytest.approx(0.0600788437, rel=1e-6)
    assert line['lr'] == [1.] and line['unmoved'] == 0
    assert of_layers(line, 'unmoved') == {'a': 0, 'b': 0} and 'skipped' not in line


def test_of_plain_sgd_it_is_the_learning_rate(tmp_path):
    lines = run(tmp_path, 'update_ratio', {'a': weight([3., 4.]), 'b': weight([0., 12.], [5., 1.])}, half_square,
                lambda params: torch.optim.SGD(params, lr=0.1), steps=4)
    assert values(lines, 'update_ratio') == pytest.approx([0.1] * 4, rel=1e-5)
    for line in lines:
        assert of_layers(line) == pytest.approx({'a': 0.1, 'b': 0.1}, rel=1e-5)


def test_momentum(tmp_path):
    lines = run(tmp_path, 'update_ratio', {'a': weight([3., 4.]), 'b': weight([0., 12.])}, half_square,
                lambda params: torch.optim.SGD(params, lr=.1, momentum=.9), steps=3)
    assert values(lines, 'update_ratio') == pytest.approx([0.1, 0.2, 0.325], rel=1e-5)


def test_decoupled_decay_is_in_it(tmp_path):
    gradient = torch.tensor([[4., -.5]])
    (line,) = run(tmp_path, 'update_ratio', {'a': weight([2., -1.])}, lambda a: (a * gradient).sum(),
                  lambda params: torch.optim.AdamW(params, lr=.01, weight_decay=.1))
    assert line['value'] == pytest.approx(0.0072801099, rel=1e-5)


def test_a_layer_of_zeros_has_none(tmp_path):
    """ As B of a LoRA; its step counts in the network's. """
    (line,) = run(tmp_path, 'update_ratio', {'a': weight([3., 4.]), 'b': weight([0., 0.])},
                  lambda a, b: a.sum() + b.sum(), lambda params: torch.optim.SGD(params, lr=.5))
    assert of_layers(line) == {'a': pytest.approx(math.sqrt(.5) / 5), 'b': None}
    assert line['value'] == pytest.approx(1 / 5)


def test_unmoved_weights_of_bfloat16(tmp_path):
    """ A step below half a unit in the last place is lost, a gradient of zero is none. """
    layer = weight([256., 1., 1., 1.])
    layer.weight.data = layer.weight.data.bfloat16()
    mask = torch.tensor([[1., 1., 1., 0.]], dtype=torch.bfloat16)
    (line,) = run(tmp_path, 'update_ratio', {'a': layer}, lambda a: (a * mask).sum(),
                  lambda params: torch.optim.SGD(params, lr=.25))
    assert line['unmoved'] == pytest.approx(1 / 3)
    assert line['value'] == pytest.approx(math.sqrt(2 / 16) / math.sqrt(256 ** 2 + 3), rel=1e-5)


# --- update_ratio: beside a plain loop -----------------------------------------------------

class Scheduled(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD([{'params': self.fc1.parameters()},
                                     {'params': [*self.fc2.parameters(), *self.head.parameters()], 'lr': 0.01}], lr=.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {'optimizer': optimizer, 'lr_scheduler': {'scheduler': schedule, 'interval': 'step'}}


class Keeper(pl.Callback):
    """ Copies of the weights, in float64, before and after each step; with the rates of the step. """

    def __init__(self):
        self.rows = []
        self.before = None

    @staticmethod
    def copies(module):
        return [p.detach().double().clone() for p in module.parameters() if p.ndim > 1 and p.requires_grad]

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self.before is None:
            self.before, self.rates = self.copies(module), []
        self.rates += [group['lr'] for group in optimizer.param_groups]

    def on_train_batch_end(self, trainer, module, *args):
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            after = self.copies(module)
            steps = [new - old for new, old in zip(after, self.before, strict=True)]
            self.rows.append(((squares(steps) / squares(self.before)) ** .5, self.rates))
            self.before = None


class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.fc1.requires_grad_(False)


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.again = nn.Linear(8, 16)
        self.again.weight = self.fc1.weight

    def features(self, x):
        first = self.act(self.fc1(x)) + self.again(x)
        return first, torch.relu(self.fc2(first))


class Rare(Net):
    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameters(), lr=0.05)


SETUPS = {
    'sgd': (Net, {}), 'adamw': (Adam, {}), 'clipping': (Adam, {'gradient_clip_val': 0.01}),
    'scheduler': (Scheduled, {}), 'accumulation': (Adam, {'accumulate_grad_batches': 2}),
    'two optimizers': (TwoOptimizers, {}), 'frozen': (Frozen, {}), 'tied': (Tied, {}), 'adagrad': (Rare, {}),
    'grad scaler': (Net, {'plugins': ScaledOnly}), 'bf16-mixed': (Adam, {'precision': 'bf16-mixed'}),
    'bf16-true': (Net, {'precision': 'bf16-true'}),
}


@pytest.mark.parametrize('name', SETUPS)
def test_ratio_beside_copies(tmp_path, name):
    cls, kwargs = SETUPS[name]
    kwargs = {key: x() if callable(x) else x for key, x in kwargs.items()}
    if name == 'bf16-true':
        kwargs['loader'] = DataLoader(make_data().bfloat16(), batch_size=8)
    keeper = Keeper()
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('update_ratio@1'), make_net(cls), validate=False,
                         callbacks=[keeper], **kwargs)
    assert [line['step'] for line in lines] == list(range(len(keeper.rows)))
    assert values(lines, 'update_ratio') == pytest.approx([ratio for ratio, _ in keeper.rows], rel=1e-5)
    assert [line['lr'] for line in lines] == [rates for _, rates in keeper.rows]


@pytest.mark.parametrize('most, rel', [(math.inf, 1e-5), (1 << 14, 0.05)])
def test_of_a_large_layer_all_on_request(tmp_path, monkeypatch, most, rel):
    monkeypatch.setattr(Updates, 'most', most)

    class Wide(Net):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 4000), nn.Linear(4000, 12)
    keeper = Keeper()
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('update_ratio@1'), make_net(Wide), validate=False,
                         callbacks=[keeper], max_epochs=1)
    assert values(lines, 'update_ratio') == pytest.approx([ratio for ratio, _ in keeper.rows], rel=rel)


def test_entries_are_the_same_in_any_order_of_memory():
    kernel = torch.randn(30, 40, 5, 5)
    last = kernel.contiguous(memory_format=torch.channels_last)
    for tensor, like in ((kernel, last), (last, last), (kernel, kernel)):
        got = Updates.entries(tensor, like)
        order = sorted(range(4), key=like.stride, reverse=True)
        torch.testing.assert_close(got, kernel.permute(order).flatten()[::3], rtol=0, atol=0)


@pytest.mark.parametrize('fused', [False, True])
def test_a_step_that_a_grad_scaler_skips(tmp_path, fused):
    """ It is left out and counted, also in later lines. """
    class Overflows(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float('inf') if batch_idx in (1, 3) else 1.)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.02, fused=fused)
    keeper = Keeper()
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('update_ratio@1,weight_mag@1'), make_net(Overflows),
                         validate=False, max_epochs=1, plugins=[ScaledOnly()], callbacks=[keeper])
    own = lines_of(lines, 'update_ratio')
    assert [(line['step'], line.get('skipped', 0)) for line in own] == [(0, 0), (2, 1), (4, 2)]
    assert values(own, 'update_ratio') == pytest.approx([keeper.rows[i][0] for i in (0, 2, 4)], rel=1e-5)
    assert len(lines_of(lines, 'weight_mag')) == 5


def test_a_scale_that_grows_is_no_skip(tmp_path):
    plugin = MixedPrecision('16-mixed', 'cpu', scaler=torch.amp.GradScaler('cpu', init_scale=2., growth_interval=1))
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('update_ratio@1'), validate=False, max_epochs=1, plugins=[plugin])
    assert len(lines) == 5 and plugin.scaler.get_scale() == 64


def test_the_default_measures_it_at_log_steps(tmp_path):
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor(), log_every_n_steps=2)
    assert [line['step'] for line in lines_of(lines, 'update_ratio')] == [1, 3, 5, 7, 9]


# --- step_alignment ------------------------------------------------------------------------

def along(*lines):
    """ The steps of some lines, and their values. """
    return [(line['step'], line['value'] and pytest.approx(line['value'], abs=1e-6)) for line in lines]


def test_alignment_of_a_valley(tmp_path):
    """ Across the valley the step goes too far, along it not far enough. """
    lines = run(tmp_path, 'step_alignment', {'a': weight([1., 1.])}, lambda a: (a[0, 0] ** 2 + 4 * a[0, 1] ** 2) / 2,
                lambda params: torch.optim.SGD(params, lr=.4), steps=2)
    assert along(*lines) == [(1, -15 / 17)]


@pytest.mark.parametrize('lr, expected', [(.5, 1.), (1.5, -1.), (1., None)])
def test_alignment_in_one_dimension(tmp_path, lr, expected):
    """ One layer goes straight to the bottom, where there is no gradient. """
    lines = run(tmp_path, 'step_alignment', {'a': weight([2.])}, half_square,
                lambda params: torch.optim.SGD(params, lr=lr), steps=2)
    assert along(*lines) == [(1, expected)]


def plain_alignment(net, data, epochs=2, clip=None, scale=1.):
    """ Of a plain loop: for each step minus the cosine of its gradient and the step before. """
    net, found, before = copy.deepcopy(net), [], None
    optimizer = net.configure_optimizers()
    weights = [p for p in net.parameters() if p.ndim > 1]
    for batch in data.split(8) * epochs:
        optimizer.zero_grad()
        (net.loss(batch) * scale).backward()
        grad = torch.cat([w.grad.flatten() for w in weights]).double()
        found.append(None if before is None else -float(torch.cosine_similarity(grad, before, dim=0)))
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        old = torch.cat([w.detach().flatten() for w in weights]).double()
        optimizer.step()
        before = torch.cat([w.detach().flatten() for w in weights]).double() - old
    return found


@pytest.mark.parametrize('interval, steps', [(1, range(1, 10)), (3, [2, 5, 8]), ('epoch', [4, 9])])
@pytest.mark.parametrize('cls, clip', [(Net, 0.05), (Adam, None)])
def test_alignment_beside_a_plain_loop(tmp_path, cls, clip, interval, steps):
    """ On the steps that are due: the source sees the step before each of them. """
    net = make_net(cls)
    expected = plain_alignment(net, make_data(), clip=clip)
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('step_alignment', interval=interval), net, validate=False,
                         gradient_clip_val=clip)
    assert along(*lines) == [(step, pytest.approx(expected[step], abs=1e-5)) for step in steps]


def test_alignment_with_micro_batches_and_two_optimizers(tmp_path):
    rows = plain_alignment(make_net(), make_data(32), epochs=1, scale=0.5)  # Lightning takes the mean of two
    _, _, lines, _ = fit(tmp_path / 'a', PlasticityMonitor('step_alignment@1'), validate=False, max_epochs=1,
                         n=32, batch_size=4, accumulate_grad_batches=2)
    assert along(*lines) == [(step, pytest.approx(rows[step], abs=1e-5)) for step in (1, 2, 3)]
    _, _, lines, _ = fit(tmp_path / 'b', PlasticityMonitor('step_alignment@1'), make_net(TwoOptimizers),
                         validate=False, max_epochs=1)
    assert [line['step'] for line in lines] == [1, 2, 3, 4]
    assert all(-1 <= own['value'] <= 1 for line in lines for own in line['layers'].values())


def test_alignment_of_another_set_of_weights(tmp_path):
    """ A layer that thaws changes what is compared: that step is left out. """
    class Thaws(Frozen):
        def on_train_batch_start(self, batch, batch_idx):
            self.fc1.requires_grad_(batch_idx >= 2)
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('step_alignment@1'), make_net(Thaws), validate=False, max_epochs=1)
    assert [line['step'] for line in lines] == [1, 3, 4]
    assert [len(line['layers']) for line in lines] == [2, 3, 3]


def resumed(folder, monitor, first=1, **kwargs):
    """ Lines of a run of two epochs, saved after the first, and of that which goes on from there. """
    keeper = ModelCheckpoint(folder / 'saved', save_last=True)
    fit(folder / 'one', PlasticityMonitor(monitor), validate=False, max_epochs=first, callbacks=[keeper], **kwargs)
    net, data = make_net(), make_data()
    trainer = pl.Trainer(default_root_dir=folder / 'two', max_epochs=2, accelerator='cpu', enable_progress_bar=False,
                         enable_model_summary=False, callbacks=[PlasticityMonitor(monitor)], log_every_n_steps=1,
                         enable_checkpointing=False, **kwargs)
    trainer.fit(net, DataLoader(data, batch_size=8), ckpt_path=keeper.last_model_path)
    return read_lines(trainer)


def test_alignment_begins_anew_after_a_resume(tmp_path):
    assert [line['step'] for line in resumed(tmp_path, 'step_alignment@1')] == [6, 7, 8, 9]


def test_alignment_of_a_skipped_step(tmp_path):
    class Overflows(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float('inf') if batch_idx == 2 else 1.)
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('step_alignment@1'), make_net(Overflows), validate=False,
                         max_epochs=1, plugins=[ScaledOnly()])
    # The gradient of step 2 is infinite, and nothing has moved when that of step 3 is there.
    assert [(line['step'], line['value'] is None, line.get('skipped', 0)) for line in lines] == [
        (1, False, 0), (2, True, 0), (4, False, 1)]
    assert all(own['nonfinite'] > 0.9 for own in lines[1]['layers'].values())


# --- weight_distance ----------------------------------------------------------------------

def test_distance(tmp_path):
    lines = run(tmp_path, 'weight_distance', {'a': weight([3., 4.]), 'b': weight([0., 12.])}, half_square,
                lambda params: torch.optim.SGD(params, lr=.1, momentum=.9), steps=3)
    assert values(lines, 'weight_distance') == pytest.approx([0.1, 0.28, 0.514], rel=1e-5)
    assert of_layers(lines[-1]) == pytest.approx({'a': 0.514, 'b': 0.514}, rel=1e-5)


def test_distance_after_a_resume(tmp_path, capsys):
    """ From the first start; without it, a reason. """
    _, _, whole, _ = fit(tmp_path / 'whole', PlasticityMonitor('weight_distance@1'), validate=False)
    lines = resumed(tmp_path, 'weight_distance@1')
    assert [line['step'] for line in lines] == [5, 6, 7, 8, 9]
    assert values(lines, 'weight_distance') == pytest.approx(values(whole, 'weight_distance')[5:], rel=1e-6)
    capsys.readouterr()
    net = make_net()
    trainer = pl.Trainer(default_root_dir=tmp_path / 'three', max_epochs=2, accelerator='cpu', logger=False,
                         enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                         callbacks=[PlasticityMonitor('weight_distance@1')])
    keeper = ModelCheckpoint(tmp_path / 'other', save_last=True)
    fit(tmp_path / 'four', PlasticityMonitor('weight_mag'), validate=False, max_epochs=1, callbacks=[keeper])
    trainer.fit(net, DataLoader(make_data(), batch_size=8), ckpt_path=keeper.last_model_path)
    assert 'weight_distance: this run goes on from a checkpoint' in capsys.readouterr().out
    assert read_lines(trainer) == []
