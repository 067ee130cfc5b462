"""
Gradients are those that the optimizer sees before clipping.
"""
import contextlib

import pytest
import pytorch_lightning as pl
import torch
from common import Net, fit, gradients, lines_of, make_data, make_net, mean_abs, norm, plain_training
from pytorch_lightning.plugins.precision import MixedPrecision

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor

BATCHES = 5 * 2


def run(tmp_path, net=None, interval=1, **kwargs):
    """ Lines of grad_mag and of grad_norm. """
    net, _, lines, _ = fit(tmp_path, PlasticityMonitor('grad_mag', interval=interval), net, **kwargs)
    return lines_of(lines, 'grad_mag'), lines_of(lines, 'grad_norm')


def check(lines, rows):
    for these, tag in zip(lines, ('grad_mag', 'grad_norm'), strict=True):
        assert [line['step'] for line in these] == list(range(len(rows)))
        assert [line['value'] for line in these] == pytest.approx([row[tag] for row in rows], rel=1e-5)


def test_equal_plain_training(tmp_path):
    check(run(tmp_path), plain_training(make_net(), make_data()))


def test_equal_autograd_for_each_layer(tmp_path):
    net, batch = make_net(), make_data()[:8]
    names, weights = zip(*[(n, p) for n, p in net.named_parameters() if p.ndim >= 2], strict=True)
    grads = dict(zip(names, torch.autograd.grad(net.loss(batch), weights), strict=True))
    mags, norms = run(tmp_path, net, max_epochs=1, max_steps=1)
    assert len(grads) == 3
    for line, function in ((mags[0], lambda g: g.abs().mean()), (norms[0], lambda g: g.square().sum().sqrt())):
        assert {f'{name}.weight': pytest.approx(layer['value'], rel=1e-5) for name, layer in line['layers'].items()} \
            == {name: function(grad.double()).item() for name, grad in grads.items()}


class TwoLayers(pl.LightningModule):
    """ Its gradients are [3, 4] and [0, 12], whatever the batch. """

    def __init__(self):
        super().__init__()
        self.automatic_optimization = True
        self.one = torch.nn.Linear(2, 1, bias=False)
        self.two = torch.nn.Linear(2, 1, bias=False)

    def training_step(self, batch, batch_idx):
        return (self.one(torch.tensor([3., 4.])) + self.two(torch.tensor([0., 12.]))).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_3_4_and_0_12_give_13(tmp_path):
    mags, norms = run(tmp_path, TwoLayers(), validate=False, max_epochs=1)
    assert [line['value'] for line in norms] == pytest.approx([13] * 5)
    assert [line['value'] for line in mags] == pytest.approx([19 / 4] * 5)
    assert {name: layer['value'] for name, layer in norms[0]['layers'].items()} == pytest.approx({'one': 5, 'two': 12})


@pytest.mark.parametrize('algorithm', ['norm', 'value'])
def test_before_clipping(tmp_path, algorithm):
    clip = 1e-3
    lines = run(tmp_path, max_epochs=1, max_steps=1, gradient_clip_val=clip, gradient_clip_algorithm=algorithm)
    rows = plain_training(make_net(), make_data(), epochs=1)[:1]
    assert rows[0]['grad_norm'] > 100 * clip
    check(lines, rows)


def test_before_clipping_along_a_run(tmp_path):
    lines = run(tmp_path, gradient_clip_val=0.1)
    rows = plain_training(make_net(), make_data(), clip=0.1)
    assert max(row['grad_norm'] for row in rows) > 0.2
    check(lines, rows)


class ScaledOnly(MixedPrecision):
    """ Scales the loss, and computes in float32, so that values can be compared closely. """

    def __init__(self):
        super().__init__('16-mixed', 'cpu', scaler=torch.amp.GradScaler('cpu', init_scale=65536., growth_interval=3))

    @contextlib.contextmanager
    def forward_context(self):
        yield


class WithOptimizer(Net):
    def __init__(self, optimizer):
        super().__init__()
        self.make_optimizer = optimizer

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


@pytest.mark.parametrize('fused', [False, True])
def test_unscaled_under_a_grad_scaler(tmp_path, fused):
    def optimizer(params):
        return torch.optim.SGD(params, lr=0.02, fused=fused)
    seen = []

    class Watched(WithOptimizer):
        def on_before_optimizer_step(self, optimizer):
            seen.append(norm(gradients(self)))
    assert getattr(optimizer([torch.nn.Parameter(torch.ones(2))]), '_step_supports_amp_scaling', False) is fused
    plugin = ScaledOnly()
    lines = run(tmp_path, make_net(Watched, optimizer=optimizer), plugins=[plugin])
    rows = plain_training(make_net(), make_data())
    # A fused optimizer unscales by itself: outside of it gradients are scaled.
    assert seen[0] / rows[0]['grad_norm'] == pytest.approx(65536 if fused else 1)
    assert plugin.scaler.get_scale() > 65536  # it grew along the run
    check(lines, rows)


def test_unscaled_in_half_precision(tmp_path):
    # Half precision on the CPU, with real rounding.
    plugin = MixedPrecision('16-mixed', 'cpu', scaler=torch.amp.GradScaler('cpu', init_scale=1024.))
    lines = run(tmp_path, plugins=[plugin], max_epochs=1)
    rows = plain_training(make_net(), make_data(), epochs=1)
    for these, tag in zip(lines, ('grad_mag', 'grad_norm'), strict=True):
        assert [line['value'] for line in these] == pytest.approx([row[tag] for row in rows], rel=0.02)


def test_overflow_is_null_and_training_goes_on(tmp_path):
    class Overflows(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float('inf') if batch_idx == 2 else 1.)
    net = make_net(Overflows)
    mags, norms = run(tmp_path, net, plugins=[ScaledOnly()], max_epochs=1)
    assert all(p.isfinite().all() for p in net.parameters())
    for lines in (mags, norms):
        assert [line['step'] for line in lines] == list(range(5))
        assert [line['value'] is None for line in lines] == [False, False, True, False, False]


# --- several optimizers, manual optimization ---------------------------------

class Manual(Net):
    """ Records what its optimizers see, by step. """

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.seen = {}

    def step(self, loss, optimizer):
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    def training_step(self, batch, batch_idx):
        self.step(self.loss(batch), self.optimizers())


def test_manual_optimization(tmp_path):
    check(run(tmp_path, make_net(Manual)), plain_training(make_net(), make_data()))


class TwoOptimizers(Manual):
    """ Both step on every batch, each for its own half of the network. """

    def configure_optimizers(self):
        lower = [*self.fc1.parameters()]
        upper = [*self.fc2.parameters(), *self.head.parameters()]
        return torch.optim.SGD(lower, lr=0.02), torch.optim.SGD(upper, lr=0.02)

    def training_step(self, batch, batch_idx):
        lower, upper = self.optimizers()
        self.manual_backward(self.loss(batch))
        lower.step()
        upper.step()
        lower.zero_grad()
        upper.zero_grad()


def test_two_optimizers_are_one_network(tmp_path):
    check(run(tmp_path, make_net(TwoOptimizers)), plain_training(make_net(), make_data()))


class GAN(pl.LightningModule):
    """ Two optimizers; the gradients that each one steps with are kept for each batch. """

    def __init__(self, alternate, toggle):
        super().__init__()
        self.automatic_optimization = False
        self.alternate = alternate
        self.toggle = toggle
        self.generator = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
        self.critic = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        self.seen = []

    def configure_optimizers(self):
        return (torch.optim.SGD(self.generator.parameters(), lr=0.02),
                torch.optim.SGD(self.critic.parameters(), lr=0.02))

    def training_step(self, batch, batch_idx):
        seen = {}
        for i, optimizer in enumerate(self.optimizers()):
            if self.alternate and batch_idx % 2 != i:
                continue
            if self.toggle:
                self.toggle_optimizer(optimizer)
            fake = self.critic(self.generator(batch)).mean()
            loss = -fake if i == 0 else fake - self.critic(batch).mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            # Of its own: the other's have been kept from its last step.
            prefix = ('generator', 'critic')[i]
            seen.update({name: grad for name, grad in gradients(self).items() if name.startswith(prefix)})
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)
        self.seen.append(seen)


@pytest.mark.parametrize('toggle', [True, False])
@pytest.mark.parametrize('alternate', [True, False])
@pytest.mark.parametrize('interval, steps', [(1, list(range(10))), ('epoch', [4, 9])])
def test_gan(tmp_path, alternate, toggle, interval, steps):
    gan = make_net(GAN, alternate=alternate, toggle=toggle)
    mags, norms = run(tmp_path, gan, interval, validate=False)
    assert len(gan.seen) == BATCHES
    for lines, function in ((mags, mean_abs), (norms, norm)):
        assert [line['step'] for line in lines] == steps
        for line in lines:
            seen = gan.seen[line['step']]
            assert set(line['layers']) == set(seen)
            assert len(seen) == (2 if alternate else 4)
            assert line['value'] == pytest.approx(function(seen), rel=1e-5)


class Accumulating(Manual):
    """ Steps on every second batch only, and never on the last one of an epoch of five. """

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        if batch_idx % 2:
            self.seen[5 * self.current_epoch + batch_idx] = gradients(self)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize('interval', [1, 'epoch'])
def test_manual_accumulation(tmp_path, interval):
    net = make_net(Accumulating)
    mags, norms = run(tmp_path, net, interval)
    assert sorted(net.seen) == [1, 3, 6, 8]
    steps = [line['step'] for line in mags]
    # Once per epoch is due at a batch without a step of the optimizer: it must not be lost.
    assert steps == [1, 3, 6, 8] if interval == 1 else steps and set(steps) <= {1, 3, 6, 8}
    for lines, function in ((mags, mean_abs), (norms, norm)):
        assert [line['step'] for line in lines] == steps
        assert [line['value'] for line in lines] == pytest.approx([function(net.seen[step]) for step in steps])


def test_layer_without_gradient(tmp_path):
    class Unused(Net):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Linear(5, 5)
    mags, norms = run(tmp_path, make_net(Unused), max_epochs=1)
    assert len(mags) == len(norms) == 5
    assert all(line['value'] > 0 for line in mags + norms)
    rows = plain_training(make_net(), make_data(), epochs=1)
    assert [line['value'] for line in norms] == pytest.approx([row['grad_norm'] for row in rows], rel=1e-5)


def test_helper_counts_what_it_should():
    # The independent values of this file, by hand.
    net = torch.nn.Linear(2, 1)
    net.weight.grad = torch.tensor([[3., -4.]])
    net.bias.grad = torch.tensor([100.])
    assert norm(gradients(net)) == 5
    assert mean_abs(gradients(net)) == 3.5
