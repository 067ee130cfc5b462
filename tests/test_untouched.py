"""
With and without the monitor: the same training, bit for bit, and nothing left on the user's objects.
"""
import copy
import functools
import io
import pickle
import random
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from common import ACTIVATIONS, NOISE, Net, fit, make_data, make_net, read_lines
from pytorch_lightning.callbacks import Callback, StochasticWeightAveraging
from torch import nn
from torch.overrides import _get_current_function_mode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.data import DataLoader

from geowatch.utils.lightning_ext.callbacks.plasticity import METRICS, PlasticityMonitor


class Base(pl.LightningModule):
    """ Keeps every loss. """

    def __init__(self):
        super().__init__()
        self.net = self.make()
        self.losses = []

    def note(self, kind, loss):
        # Also how far each random generator is.
        self.losses.append((kind, loss.detach().clone(), torch.rand(1), np.random.rand(), random.random()))
        return loss

    def loss(self, batch):
        return (self.net(batch) - batch.mean(1, keepdim=True)).square().mean()

    def training_step(self, batch, batch_idx):
        return self.note('train', self.loss(batch))

    def validation_step(self, batch, batch_idx):
        self.note('validation', self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class MLP(Base):
    def make(self):
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 12), nn.GELU(),
                             nn.Linear(12, 1))


class Convolutions(Base):
    def make(self):
        return nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6),
                             nn.ReLU(inplace=True), nn.Dropout2d(0.2), nn.Conv2d(6, 4, 2), nn.Tanh(), nn.Flatten(),
                             nn.Linear(4, 1))


class Transformer(Base):
    """ Whose evaluation takes the fast path. """

    def make(self):
        layer = nn.TransformerEncoderLayer(4, 2, 16, dropout=0.1, batch_first=True)
        return nn.Sequential(nn.Unflatten(1, (2, 4)), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(8, 1))


class FrozenTransformer(Transformer):
    """ A pretrained part in evaluation mode, while gradients are recorded. """

    def make(self):
        net = super().make()
        net[1].requires_grad_(False)
        return net

    def on_train_batch_start(self, batch, batch_idx):
        self.net[1].eval()


class Adversarial(Base):
    """ Two optimizers, by hand, with a forward pass between them. """

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Linear(8, 12), nn.LeakyReLU(), nn.Linear(12, 1))

    def make(self):
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))

    def loss(self, batch):
        return self.critic(self.net(torch.randn(len(batch), 4))).mean()

    def training_step(self, batch, batch_idx):
        one, two = self.optimizers()
        for optimizer, loss in ((one, lambda: -self.loss(batch)),
                                (two, lambda: self.loss(batch) - self.critic(batch).mean())):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.note('train', loss()))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return (torch.optim.Adam(self.net.parameters(), lr=0.01), torch.optim.SGD(self.critic.parameters(), lr=0.01))


class Manual(MLP):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.note('train', self.loss(batch)))
        self.clip_gradients(optimizer, gradient_clip_val=0.5)
        optimizer.step()


class Checkpointed(MLP):
    reentrant = False

    def loss(self, batch):
        batch = batch.clone().requires_grad_()
        out = checkpoint(self.net[:4], batch, use_reentrant=self.reentrant)
        return (self.net[4:](out) - 1).square().mean()


class ReentrantCheckpointed(Checkpointed):
    reentrant = True


class Away(nn.Module):
    """ Functions that the metrics use, too. """

    def forward(self, x):
        return x - x.amax(1, keepdim=True) + x.sum(1, keepdim=True)


class SelectivelyCheckpointed(MLP):
    """ Keeps the results of products, in the order in which they were called. """

    def make(self):
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Away(), nn.Linear(16, 12), nn.GELU(), Away(),
                             nn.Linear(12, 1))

    def loss(self, batch):
        def policy(ctx, op, *args, **kwargs):
            name = str(op)
            return CheckpointPolicy.MUST_SAVE if 'mm' in name or 'max' in name or 'sum' in name else (
                CheckpointPolicy.PREFER_RECOMPUTE)
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        out = checkpoint(self.net[:6], batch, use_reentrant=False, context_fn=contexts)
        return (self.net[6:](out) - 1).square().mean()


class Recurrent(Base):
    def make(self):
        return nn.LSTM(4, 6, batch_first=True)

    def loss(self, batch):
        return torch.tanh(self.net(batch.view(-1, 2, 4))[0]).square().mean()


class Copies(MLP):
    """ Copied and saved in the middle of the forward pass. """

    def loss(self, batch):
        loss = super().loss(batch)
        for module in (self, self.net):
            copy.deepcopy(module)
            torch.save(module, io.BytesIO())
            pickle.dumps(module)
        return loss


class Vmapped(MLP):
    def make(self):
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def loss(self, batch):
        weights = dict(self.net.named_parameters())

        def one(x):
            return torch.func.functional_call(self.net, weights, (x[None],)).square().sum()
        return torch.func.vmap(one)(batch).mean() + super().loss(batch)


class SecondOrder(MLP):
    """ A penalty on the gradient, as for Wasserstein GANs. """

    def loss(self, batch):
        with torch.enable_grad():
            batch = batch.clone().requires_grad_()
            out = self.net(batch)
            (grad,) = torch.autograd.grad(out.sum(), batch, create_graph=True)
            return out.square().mean() + grad.square().mean()


class Average(Callback):
    """ An average of the weights, copied at the start. """

    def on_fit_start(self, trainer, module):
        self.average = copy.deepcopy(module.net)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        with torch.no_grad():
            for own, new in zip(self.average.parameters(), module.net.parameters(), strict=True):
                own.lerp_(new, 0.1)

    def on_train_end(self, trainer, module):
        module.load_state_dict({**module.state_dict(), **{f'net.{k}': v for k, v in self.average.state_dict().items()}})


class LBFGS(MLP):
    def make(self):
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=3)


CASES = {
    'mlp': (MLP, {}), 'convolutions': (Convolutions, {}), 'transformer': (Transformer, {}),
    'frozen transformer': (FrozenTransformer, {}), 'two optimizers': (Adversarial, {}), 'manual': (Manual, {}),
    'accumulation': (MLP, {'accumulate_grad_batches': 3}), 'clipping': (MLP, {'gradient_clip_val': 0.1}),
    'bf16': (Convolutions, {'precision': 'bf16-mixed'}), 'bf16 transformer': (Transformer, {'precision': 'bf16-mixed'}),
    'bf16-true': (MLP, {'precision': 'bf16-true'}), 'average': (MLP, {'callbacks': Average}),
    'swa': (MLP, {'callbacks': lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1)}),
    'checkpointed': (Checkpointed, {}), 'reentrant': (ReentrantCheckpointed, {}),
    'selective': (SelectivelyCheckpointed, {}), 'recurrent': (Recurrent, {}), 'copies': (Copies, {}),
    'vmap': (Vmapped, {}), 'second order': (SecondOrder, {'inference_mode': False}), 'lbfgs': (LBFGS, {}),
    'within the epoch': (MLP, {'val_check_interval': 2}), 'anomaly': (MLP, {'detect_anomaly': True}),
}


def keys_of(module):
    """ All that can be left on modules and parameters. """
    keys = {}
    for name, part in module.named_modules():
        keys[name] = sorted(vars(part)), [len(value) for key, value in sorted(vars(part).items()) if 'hooks' in key], (
            type(part), part.forward.__qualname__)
    for name, param in module.named_parameters():
        keys[f'parameter {name}'] = sorted(vars(param)), len(param._backward_hooks or ()), type(param)
    return keys


def global_hooks():
    hooks = vars(torch.nn.modules.module)
    return {key: len(value) for key, value in hooks.items() if key.startswith('_global') and hasattr(value, '__len__')}


def generators():
    return torch.get_rng_state(), np.random.get_state()[1], random.getstate()


def train(tmp_path, name, monitor):
    cls, kwargs = CASES[name]
    kwargs = dict(kwargs)
    more = [kwargs.pop('callbacks')()] if 'callbacks' in kwargs else []
    pl.seed_everything(3)
    module = cls()
    trainer = pl.Trainer(default_root_dir=tmp_path, max_epochs=2, accelerator='cpu', enable_progress_bar=False,
                         enable_model_summary=False, enable_checkpointing=False, callbacks=[*monitor, *more], **kwargs)
    data = make_data(26)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer.fit(module, DataLoader(data, batch_size=6, shuffle=True), DataLoader(data, batch_size=10))
    return module, trainer, generators()


def equal(one, two):
    """ The same, bit for bit, in any nesting. """
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one.contiguous().view(-1).view(torch.uint8),
                                                      two.contiguous().view(-1).view(torch.uint8))
    if isinstance(one, np.ndarray):
        return np.array_equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


@functools.cache
def without(name):
    """ The run without the monitor. """
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        module, trainer, state = train(folder, name, [])
    return module, [optimizer.state_dict() for optimizer in trainer.optimizers], state, keys_of(module)


@pytest.mark.parametrize('source', ['train', 'validation'])
@pytest.mark.parametrize('name', CASES)
def test_training_is_the_same(tmp_path, name, source, capsys):
    plain, optimizers, state, keys = without(name)
    hooks = global_hooks()
    monitor = PlasticityMonitor('all', interval=1, source=source, samples=20, per_layer=True)
    module, trainer, own_state = train(tmp_path, name, [monitor])
    assert [kind for kind, *_ in module.losses] == [kind for kind, *_ in plain.losses]
    assert equal(module.losses, plain.losses)
    assert equal(module.state_dict(), plain.state_dict())
    assert equal([optimizer.state_dict() for optimizer in trainer.optimizers], optimizers)
    assert equal(own_state, state)
    # Nothing is left.
    assert keys_of(module) == keys
    assert global_hooks() == hooks and _get_current_function_mode() is None
    copy.deepcopy(module)
    # And something was measured.
    assert 'Traceback' not in capsys.readouterr().out
    measured = {line['metric'] for line in read_lines(trainer)}
    # Of one fused kernel neither activations nor chunks are known; in front of all that is trained is no hidden layer.
    left_out = {'recurrent': {*ACTIVATIONS, *NOISE}, 'frozen transformer': {*ACTIVATIONS}}
    assert set(METRICS) - measured <= left_out.get(name, set())


def test_a_difference_is_seen(tmp_path):
    # The comparison can fail: a monitor that draws one random number.
    class Careless(PlasticityMonitor):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            torch.rand(1)
    module, _, state = train(tmp_path, 'mlp', [Careless('weight_mag')])
    plain, _, plain_state, _ = without('mlp')
    assert not equal(state, plain_state) and not equal(module.losses, plain.losses)
    assert not equal(module.state_dict(), plain.state_dict())
    assert not equal(torch.tensor([0.]), torch.tensor([-0.]))


def test_losses_of_a_compiled_model(tmp_path):
    # 'auto' looks at validation only, so that training stays the same.
    def run(folder, callbacks):
        pl.seed_everything(3)
        module = Net()
        module.fc2.compile(backend='eager')
        trainer = pl.Trainer(default_root_dir=folder, max_epochs=2, accelerator='cpu', enable_progress_bar=False,
                             enable_model_summary=False, enable_checkpointing=False, callbacks=callbacks, logger=False)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            trainer.fit(module, DataLoader(make_data(), batch_size=8), DataLoader(make_data(), batch_size=8))
        return module.state_dict()
    assert equal(run(tmp_path / '1', []), run(tmp_path / '2', [PlasticityMonitor('all', interval=1)]))


def test_geowatch_model(tmp_path):
    # Batches are lists of dicts, and an item may be None.
    pytest.importorskip('geowatch.tasks.fusion', reason='geowatch is not installed')
    from geowatch.tasks.fusion.architectures.transformer import TransformerEncoderDecoder
    from geowatch.tasks.fusion.methods import HeterogeneousModel
    from geowatch.tasks.fusion.methods.heterogeneous import ScaleAgnostictPositionalEncoder

    def run(folder, callbacks):
        pl.seed_everything(3)
        channels, classes, dataset_stats = HeterogeneousModel.demo_dataset_stats()
        encoder = ScaleAgnostictPositionalEncoder(3)
        backbone = TransformerEncoderDecoder(
            encoder_depth=1, decoder_depth=1, dim=encoder.output_dim + 16, queries_dim=encoder.output_dim,
            logits_dim=16, cross_heads=1, latent_heads=1, cross_dim_head=1, latent_dim_head=1)
        model = HeterogeneousModel(classes=classes, dataset_stats=dataset_stats, input_sensorchan=channels,
                                   position_encoder=encoder, backbone=backbone)
        model.configure_optimizers = lambda: torch.optim.AdamW(model.parameters(), lr=0.001)
        batches = [model.demo_batch(batch_size=2, width=16, height=16) for _ in range(3)]
        batches[1].append(None)
        trainer = pl.Trainer(default_root_dir=folder, max_epochs=2, accelerator='cpu', enable_progress_bar=False,
                             enable_model_summary=False, enable_checkpointing=False, callbacks=callbacks)
        trainer.fit(model, DataLoader(batches, batch_size=None), DataLoader(batches[:1], batch_size=None))
        losses = {key: x for key, x in trainer.callback_metrics.items() if 'plasticity' not in key}
        return trainer, [losses, model.state_dict(), trainer.optimizers[0].state_dict(), generators()], keys_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        _, plain, keys = run(tmp_path / 'plain', [])
        for source in ('train', 'validation'):
            monitor = PlasticityMonitor('all', interval=1, source=source, samples=2)
            trainer, own, own_keys = run(tmp_path / source, [monitor])
            assert equal(own, plain)
            assert own_keys == keys and _get_current_function_mode() is None
            # Its items are taken one by one.
            assert {line['metric'] for line in read_lines(trainer)} == set(METRICS) - set(NOISE)
            copy.deepcopy(trainer.lightning_module)


class EndsEarly(Net):
    """ Ends its epochs early, and adds to a metric of its own in the hook that comes after ours. """

    def __init__(self):
        super().__init__()
        from torchmetrics import MeanMetric
        self.mean, self.means = MeanMetric(), []

    def training_step(self, batch, batch_idx):
        self.mean.update(float(batch_idx))
        self.log('mean', self.mean, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 3 else None

    def on_train_epoch_end(self):
        self.mean.update(1000.)
        self.means.append(float(self.mean.compute()))


@pytest.mark.parametrize('monitored', [True, False])
def test_an_epoch_that_ends_early_leaves_the_metrics_of_the_model_alone(tmp_path, monitored):
    monitor = PlasticityMonitor('dead_units', source='train') if monitored else pl.Callback()
    net, trainer, lines, _ = fit(tmp_path, monitor, make_net(EndsEarly), max_epochs=1)
    assert net.means == [pytest.approx((0 + 1 + 2 + 1000) / 4)]
    assert float(trainer.callback_metrics['mean']) == pytest.approx((0 + 1 + 2 + 1000) / 4)
    assert bool(lines) == monitored
