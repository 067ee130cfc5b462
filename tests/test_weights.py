"""
Which matrices are weights, and that they are what the network computes with.
"""
import contextlib
import copy
import io
import json
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import toys
from common import Net, fit, last, lines_of, make_data, make_net, mean_abs, numpy_erank
from process_runs import CAN_SHARD_ON_CPU, run_processes, slices
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.contents import Contents
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.weights import weights_of
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.tensors import grams
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS


def random(*shape):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))))


class Halved(nn.Module):
    """ A parametrization that in training draws a number and counts how often it ran. """

    def __init__(self):
        super().__init__()
        self.register_buffer('runs', torch.zeros(()))

    def forward(self, weight):
        if self.training:
            self.runs += 1
            weight = weight + 0 * torch.rand(())
        return weight / 2


class LowRank(nn.Module):
    """ A weight made of two parameters, neither of its shape. """

    def forward(self, left, right):
        return left @ right

    def right_inverse(self, weight):
        return weight[:, :2].clone(), weight[:2].clone()


class WithNorm(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight, self.bias = random(*shape), random(*shape)


class MyLayerNorm2d(WithNorm):
    pass


class MyLinear(WithNorm):
    """ With a bias for each of several tasks. """


def one_more(name, module):
    return lambda net: setattr(net, name, module)


# What a network of fc1, fc2 and head gets besides, and the matrices that come to its weights, or change.
KINDS = {
    'token': (one_more('cls_token', random(1, 1, 8)), {}),
    'token of two dimensions': (one_more('mask_token', random(1, 8)), {}),
    'layer scale': (one_more('gamma', random(8, 1, 1)), {}),
    'response norm': (one_more('grn', WithNorm(1, 1, 1, 8)), {}),
    'norm of images': (one_more('norm', nn.LayerNorm([3, 4, 5])), {}),
    'norm by name': (one_more('norm', MyLayerNorm2d(3, 4)), {}),
    'bias of each expert': (one_more('b1', random(3, 8)), {}),
    'bias by name': (one_more('up_proj_bias', random(3, 8)), {}),
    'list of biases': (one_more('biases', nn.ParameterList([random(3, 8)])), {}),
    'frozen': (one_more('more', nn.Linear(4, 4).requires_grad_(False)), {}),
    'whole numbers': (one_more('table', nn.Parameter(torch.ones(3, 3).long(), requires_grad=False)), {}),
    'positions': (one_more('pos_embed', random(1, 9, 8)), {'pos_embed': lambda net: net.pos_embed[0]}),
    'positions of a grid': (one_more('pos_embed', random(1, 3, 4, 8)),
                            {'pos_embed': lambda net: net.pos_embed.reshape(12, 8)}),
    'registers': (one_more('registers', random(1, 4, 8)), {'registers': lambda net: net.registers[0]}),
    'layer to one unit': (one_more('out', MyLinear(1, 8)), {'out': lambda net: net.out.weight}),
    'embedding of one': (one_more('emb', nn.Embedding(1, 8)), {'emb': lambda net: net.emb.weight}),
    'depthwise': (one_more('conv', nn.Conv2d(5, 5, 3, groups=5)),
                  {'conv': lambda net: net.conv.weight.reshape(5, 9)}),
    'one dimension': (one_more('conv', nn.Conv1d(4, 3, 5)), {'conv': lambda net: net.conv.weight.reshape(3, 20)}),
    'two inputs': (one_more('both', nn.Bilinear(3, 4, 5)), {'both': lambda net: net.both.weight.reshape(5, 12)}),
    'kernel of a style': (one_more('conv', random(1, 6, 4, 3, 3)), {'conv': lambda net: net.conv.reshape(6, 36)}),
    'experts': (one_more('experts', random(3, 6, 8)),
                {f'experts.{i}': lambda net, i=i: net.experts[i] for i in range(3)}),
    'layers of experts': (one_more('moe', MyLinear(3, 6, 8)),
                          {f'moe.{i}': lambda net, i=i: net.moe.weight[i] for i in range(3)}),
    'list': (one_more('vars', nn.ParameterList([random(5, 4), random(4)])), {'vars.0': lambda net: net.vars[0]}),
    'tied': (lambda net: setattr(net, 'again', net.fc2), {}),
    'tied weight': (lambda net: setattr(net, 'again', tied(net.fc2)), {}),
    'recurrent': (one_more('rnn', nn.RNN(1, 4)), {'rnn.weight_ih_l0': lambda net: net.rnn.weight_ih_l0,
                                                  'rnn.weight_hh_l0': lambda net: net.rnn.weight_hh_l0}),
    'weight_norm': (lambda net: parametrizations.weight_norm(net.fc1), {'fc1': lambda net: torch._weight_norm(
        net.fc1.parametrizations.weight.original1, net.fc1.parametrizations.weight.original0)}),
    'old weight_norm': (lambda net: nn.utils.weight_norm(net.fc1), {
        'fc1': lambda net: net.fc1.weight_v / net.fc1.weight_v.norm(dim=1, keepdim=True) * net.fc1.weight_g}),
    'spectral_norm': (lambda net: parametrizations.spectral_norm(net.fc1), {
        'fc1': lambda net: with_norm(net.fc1.parametrizations.weight.original,
                                     net.fc1.parametrizations.weight[0]._u, net.fc1.parametrizations.weight[0]._v)}),
    'old spectral_norm': (lambda net: nn.utils.spectral_norm(net.fc1), {
        'fc1': lambda net: with_norm(net.fc1.weight_orig, net.fc1.weight_u, net.fc1.weight_v)}),
    'orthogonal': (lambda net: parametrizations.orthogonal(net.fc2), {'fc2': lambda net: net.fc2.weight}),
    'low rank': (lambda net: parametrize.register_parametrization(net.fc2, 'weight', LowRank(), unsafe=True), {
        'fc2': lambda net: net.fc2.parametrizations.weight.original0 @ net.fc2.parametrizations.weight.original1}),
    'two in a row': (lambda net: [parametrize.register_parametrization(net.fc2, 'weight', Halved())
                                  for _ in range(2)],
                     {'fc2': lambda net: net.fc2.parametrizations.weight.original / 4}),
    'experts made': (lambda net: (setattr(net, 'experts', random(3, 6, 8)),
                                  parametrize.register_parametrization(net, 'experts', Halved())),
                     {f'experts.{i}': lambda net, i=i: net.parametrizations.experts.original[i] / 2
                      for i in range(3)}),
    'made bias': (lambda net: parametrize.register_parametrization(net.fc1, 'bias', Halved()), {}),
    'pruned': (lambda net: prune.l1_unstructured(net.fc1, 'weight', amount=0.7),
               {'fc1': lambda net: net.fc1.weight_orig * net.fc1.weight_mask}),
    'pruned twice': (lambda net: [prune.random_unstructured(net.fc1, 'weight', amount=0.4) for _ in range(2)],
                     {'fc1': lambda net: net.fc1.weight_orig * net.fc1.weight_mask}),
}


def tied(layer):
    twin = nn.Linear(layer.in_features, layer.out_features)
    twin.weight = layer.weight
    return twin


def with_norm(weight, u, v):
    return weight / (u @ weight @ v)


@pytest.mark.parametrize('kind', KINDS)
def test_kinds(kind):
    change, others = KINDS[kind]
    net = make_net()
    change(net)
    net(make_data())  # as before a first step
    with torch.no_grad():
        right = {name: make(net) for name, make in {
            **{name: lambda net, name=name: net.get_submodule(name).weight for name in ('fc1', 'fc2', 'head')},
            **others}.items()}
        state = copy.deepcopy(net.state_dict())
        drawn = torch.get_rng_state()
        got = weights_of(Contents(net))
        assert set(got) == set(right)
        for name, matrix in right.items():
            assert got[name].detach().flatten(1).numpy() == pytest.approx(matrix.flatten(1).numpy(), rel=1e-6), name
        ranks = {name: np.sqrt(np.linalg.eigvalsh(gram.make().numpy(), UPLO='L').clip(0))
                 for name, gram in grams(got, ['gram'])['gram'].items()}
        for name, matrix in right.items():
            assert ranks[name][::-1] == pytest.approx(np.linalg.svd(matrix.flatten(1).double().numpy())[1], abs=1e-6)
    # Nothing has changed by looking at it.
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(x, state[key]) for key, x in net.state_dict().items())
    assert all(module.training for module in net.modules())


def test_eval_mode_stays():
    net = make_net()
    parametrizations.spectral_norm(net.fc1)
    net.fc1.eval()
    weights_of(Contents(net))['fc1'].detach()
    assert not any(module.training for module in net.fc1.modules()) and net.fc2.training


class Everything(Net):
    """ Reparametrized layers, experts, and a layer that no optimizer has. """

    def __init__(self):
        super().__init__()
        parametrizations.weight_norm(self.fc1)
        nn.utils.spectral_norm(self.fc2)
        prune.l1_unstructured(self.head, 'weight', amount=0.5)
        self.experts = random(3, 8, 8)
        self.register_parameter('b1', random(3, 8))
        self.loss_layer = nn.Linear(8, 8)
        with torch.no_grad():
            self.loss_layer.weight.mul_(100)

    def forward(self, x):
        routed = torch.stack([F.linear(part, self.experts[i % 3]) + self.b1[i % 3]
                              for i, part in enumerate(x.unbind())])
        return super().forward(self.loss_layer(routed) / 100)

    def configure_optimizers(self):
        return torch.optim.SGD([p for name, p in self.named_parameters() if 'loss_layer' not in name], lr=0.02)

    def used(self):
        """ The matrices that the next pass in eval would use. """
        parts = self.fc1.parametrizations.weight
        return {'fc1': parts.original1 / parts.original1.norm(dim=1, keepdim=True) * parts.original0,
                'fc2': with_norm(self.fc2.weight_orig, self.fc2.weight_u, self.fc2.weight_v),
                'head': self.head.weight_orig * self.head.weight_mask,
                **{f'experts.{i}': self.experts[i] for i in range(3)}}

    def used_gradients(self):
        return {'fc1': self.fc1.parametrizations.weight.original1.grad, 'fc2': self.fc2.weight_orig.grad,
                'head': self.head.weight_orig.grad, **{f'experts.{i}': self.experts.grad[i] for i in range(3)}}


def arrays(tensors):
    return {name: x.detach().double().numpy().copy() for name, x in tensors.items()}


@pytest.fixture(scope='module')
def run_of_everything(tmp_path_factory):
    """ A run with the monitor, and what was there before and after each step. """
    before = dict(METRICS)
    toys.register()
    seen = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.append([arrays(module.used()), arrays(module.used_gradients())])

        def on_train_batch_end(self, trainer, module, *args):
            seen[-1].append(arrays(module.used()))

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        net, _, lines, _ = fit(tmp_path_factory.mktemp('all'),
                               PlasticityMonitor('weight_mag,grad_mag,erank,step_ratio', interval=1),
                               make_net(Everything), callbacks=[Watch()], max_epochs=1)
    METRICS.clear()
    METRICS.update(before)  # a module's fixture comes before what cleans up after a test
    return net, lines, seen, said.getvalue()


def test_values_of_a_run(run_of_everything):
    _, lines, seen, said = run_of_everything
    assert len(seen) == 5
    for step, (before, gradients, after) in enumerate(seen):
        right = {
            'weight_mag': mean_abs(after), 'grad_mag': mean_abs(gradients),
            'erank': np.mean([numpy_erank(x) for x in after.values()]),
            'step_ratio': np.sqrt(sum(np.square(after[name] - x).sum() for name, x in before.items())
                                  / sum(np.square(x).sum() for x in before.values()))}
        for name, value in right.items():
            line = lines_of(lines, name)[step]
            assert set(line['layers']) == set(after), name
            assert line['value'] == pytest.approx(value, rel=1e-5), name
    ranks = {name: own['value'] for name, own in last(lines, 'erank')['layers'].items()}
    assert ranks == pytest.approx({name: numpy_erank(x) for name, x in seen[-1][2].items()}, rel=1e-5)
    assert '6 weights. Not watched: 1 weight: in no optimizer' in said


def test_run_is_untouched(run_of_everything, tmp_path):
    """ The power iteration of spectral_norm goes on as if nobody had looked. """
    plain, *_ = fit(tmp_path, pl.Callback(), make_net(Everything), max_epochs=1)
    state = run_of_everything[0].state_dict()
    assert all(torch.equal(x, state[key]) for key, x in plain.state_dict().items())


def test_patterns_of_experts(tmp_path):
    def layers(pattern):
        _, _, lines, _ = fit(tmp_path, PlasticityMonitor('erank', interval='epoch', layers=pattern),
                             make_net(Everything), max_epochs=1)
        return set(last(lines, 'erank')['layers'])
    assert layers('experts') == {f'experts.{i}' for i in range(3)}
    assert layers('experts.1,fc1') == {'experts.1', 'fc1'}


def test_what_comes_to_an_optimizer_later(tmp_path):
    class Thaws(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([*self.fc2.parameters(), *self.head.parameters()], lr=0.02)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.optimizers().add_param_group({'params': [*self.fc1.parameters()]})
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag,grad_mag', interval=1), make_net(Thaws))
    for name in ('weight_mag', 'grad_mag'):
        assert [set(line['layers']) == {'fc1', 'fc2', 'head'} for line in lines_of(lines, name)] == [False] * 5 + [
            True] * 5
        assert set(lines_of(lines, name)[0]['layers']) == {'fc2', 'head'}


def test_optimizer_that_lightning_does_not_know(tmp_path):
    class Own(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            self.own = torch.optim.SGD(self.parameters(), lr=0.02)

        def training_step(self, batch, batch_idx):
            self.own.zero_grad()
            self.loss(batch).backward()
            self.own.step()
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag', interval='epoch'), make_net(Own), validate=False)
    assert lines and set(last(lines, 'weight_mag')['layers']) == {'fc1', 'fc2', 'head'}


@pytest.mark.skipif(not CAN_SHARD_ON_CPU, reason='DTensor does not run on a CPU with this version of torch')
@pytest.mark.parametrize('mesh', [[2], pytest.param([2, 2], marks=pytest.mark.slow)], ids=str)
def test_matrices_of_sharded_parameters(tmp_path, mesh):
    """ However experts and tables lie on processes, the sums and Gram matrices are those of whole matrices. """
    assert run_processes(slices, math.prod(mesh), str(tmp_path), mesh) == [0] * math.prod(mesh)
    found = json.loads((tmp_path / 'found.json').read_text())
    assert len(found) == (4 if len(mesh) == 1 else 6) * 5
    for name, got in found.items():
        shape, index = json.loads(name.partition(' ')[0]), int(name.split()[1])
        whole = np.sin(np.arange(np.prod(shape), dtype=np.float32)).astype(float).reshape(shape)
        matrix = whole[index].reshape(-1, shape[-1])
        assert got['count'] == pytest.approx(matrix.size), name
        assert got['abs'] == pytest.approx(np.abs(matrix).sum(), rel=1e-6), name
        gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
        assert np.tril(got['gram']) == pytest.approx(np.tril(gram), abs=1e-5), name


def test_weight_without_a_gradient_of_its_own(tmp_path, capsys):
    net = make_net()
    KINDS['low rank'][0](net)
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag,grad_mag', interval='epoch'), net, max_epochs=1)
    assert set(last(lines, 'weight_mag')['layers']) == {'fc1', 'fc2', 'head'}
    assert set(last(lines, 'grad_mag')['layers']) == {'fc1', 'head'}
    assert '1 weight: no gradient, as several parameters make it' in capsys.readouterr().out
