"""
Noise scale and noise fraction: oracles by hand, gradients of single examples, and what each kind of batch tells.
"""
import contextlib
import copy
import gc
import math
import weakref

import pytest
import pytorch_lightning as pl
import torch
from common import Net, fit, last, lines_of, make_data, make_net
from process_runs import Routed, batches_of
from test_gradients import ScaledOnly
from test_processes import Ran
from test_tuning import Given, of_layers, resumed, values, weight
from torch import nn
from torch.utils.data import DataLoader

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.lightning import resolve
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.memory import Memory
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.chunks import Chunks
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS

# --- by hand ------------------------------------------------

def noise(folder, batches, accumulate, loss=None, width=2, **kwargs):
    """ Lines of runs whose gradients are the means of some batches, given as rows. """
    def mean(w, batch):
        return (w * batch.mean(0)).sum()

    class OfBatch(Given):
        def training_step(self, batch, batch_idx):
            return self.given(self.layers['a'].weight, batch)
    net = OfBatch({'a': weight([0.] * width)}, loss or mean, lambda params: torch.optim.SGD(params, lr=0.))
    loader = DataLoader([torch.tensor(batch) for batch in batches], batch_size=None)
    _, _, lines, _ = fit(folder, PlasticityMonitor('noise_scale@1'), net, validate=False, max_epochs=1, loader=loader,
                         accumulate_grad_batches=accumulate, **kwargs)
    return lines


def test_two_micro_batches(tmp_path):
    lines = noise(tmp_path, [[[3., 4.]] * 8, [[1., 0.]] * 8], 2)
    scale, fraction = last(lines, 'noise_scale'), last(lines, 'noise_fraction')
    assert (scale['value'], fraction['value']) == pytest.approx((80 / 3, 0.625), rel=1e-6)
    assert (scale['fraction'], scale['covered'], scale['batch_examples']) == (pytest.approx(0.625), 1, 16)
    assert of_layers(scale) == pytest.approx({'a': 80 / 3}, rel=1e-6) and of_layers(scale, 'covered') == {'a': 1}
    assert 'batch_examples' not in fraction and 'lr' not in scale


def test_four_examples(tmp_path):
    lines = noise(tmp_path, [[[y]] for y in (1., 2., 3., 6.)], 4, lambda w, y: (w - y).square().sum() / 2, width=1)
    assert values(lines, 'noise_scale') == pytest.approx([28 / 47], rel=1e-6)


def test_nothing_but_noise(tmp_path):
    """ As the contributions [1] and [-2]: no scale, and the fraction shown. """
    lines = noise(tmp_path, [[[2.]] * 8, [[-4.]] * 8], 2, width=1)
    assert values(lines, 'noise_scale') == [None] and values(lines, 'noise_fraction') == pytest.approx([9.])
    assert last(lines, 'noise_scale')['fraction'] == pytest.approx(9.)


FIRST, SECOND = [[[3., 4.]] * 8, [[1., 0.]] * 8], [[[2., 0.]] * 8, [[2., 2.]] * 8]


def test_sums_are_divided(tmp_path):
    """ Not the mean of ratios; a step whose gradient is not finite stays out of the sums. """
    bad = [[[math.nan, 1.]] * 8] * 2
    lines = noise(tmp_path, [*FIRST, *bad, *SECOND], 2)
    scales = lines_of(lines, 'noise_scale')
    assert values(lines, 'noise_scale') == [pytest.approx(80 / 3, rel=1e-6), None, pytest.approx(96 / 7, rel=1e-6)]
    assert scales[1]['layers']['layers.a']['nonfinite'] == 0.5


def test_of_the_last_25_to_50_measurements(tmp_path):
    lines = noise(tmp_path, FIRST + SECOND * 74, 2)
    got = values(lines, 'noise_scale')
    expected = []
    for step in range(75):
        begin = 0 if step < 50 else 25 if step < 75 else 50
        steps = range(begin, step + 1)
        pairs = [(8., 6.5) if i == 0 else (5., 3.) for i in steps]
        n, s = (sum(x) for x in zip(*pairs, strict=True))
        expected.append(8 * (2 * s - n) / (n - s))
    assert got == pytest.approx(expected, rel=1e-5)
    assert got[49] > got[50] == pytest.approx(8 * 1 / 2)


def test_sums_are_in_the_order_of_the_network():
    memory, metric = Memory(), METRICS['noise_fraction']
    layers = [f'blocks.{i}.fc' for i in (*range(9, 20), *range(9))]
    for own in (layers, layers[::-1]):
        memory.add(metric, {(need.source, need.field): dict.fromkeys(own, 1.) for need in metric.needs})
    # In that of a set, sums of floats would differ from run to run.
    assert [list(own) for own in memory.recent(metric).values()] == [layers] * len(metric.needs)


def test_sums_go_into_checkpoints(tmp_path):
    kwargs = {'accumulate_grad_batches': 2}
    _, _, whole, _ = fit(tmp_path / 'whole', PlasticityMonitor('noise_scale@1'), validate=False, **kwargs)
    lines = resumed(tmp_path, 'noise_scale@1', **kwargs)
    # Two steps of two micro-batches an epoch, and one of one, which is looked at in chunks.
    assert values(whole, 'noise_scale')[3:] == pytest.approx(values(lines, 'noise_scale'), rel=1e-6)
    assert [line['step'] for line in lines_of(whole, 'noise_scale')] == list(range(6))
    assert [line['step'] for line in lines_of(lines, 'noise_scale')] == [3, 4, 5]


# --- beside gradients of single examples ----------------------------------------

class Mean(Net):
    """ With a loss that is a mean over examples. """

    def loss(self, batch):
        return (self(batch) - batch[:, :1]).square().mean()


def by_examples(net, loss, batch):
    """ Of each weight the gradients of single examples, (examples, *shape), by torch.func. """
    params = {name: p.detach() for name, p in net.named_parameters()}
    frozen = {name: b.detach() for name, b in net.named_buffers()}

    def of_one(own, x):
        return loss(lambda *args: torch.func.functional_call(net, (own, frozen), args), x[None])
    grads = torch.func.vmap(torch.func.grad(of_one), (None, 0))(params, batch)
    return {name.removesuffix('.weight'): g.double() for name, g in grads.items() if params[name].ndim > 1}


def reference(examples, sizes):
    """ (scale, fraction) of each layer and, under None, of all, from gradients of examples in pieces of some sizes. """
    b, found, total = sum(sizes), {}, torch.zeros(2, dtype=torch.float64)
    q = sum((size / b) ** 2 for size in sizes)
    for name, grads in examples.items():
        pieces = [part.sum(0) / b for part in grads.split(sizes)]
        n, s = sum(pieces).square().sum(), sum(c.square().sum() for c in pieces)
        own = torch.stack([(s - q * n) / (1 - q), (n - s) / (1 - q)])  # noise and signal
        total += own
        found[name] = own
    found[None] = total
    return {name: (b * float(a / c) if c > 0 else None, float(a / (a + c))) for name, (a, c) in found.items()}


def compare(lines, expected, rel=1e-5):
    """ Of the first line of each metric. """
    for metric, index in (('noise_scale', 0), ('noise_fraction', 1)):
        line = lines_of(lines, metric)[0]
        got = {None: line['value'], **{layer: own['value'] for layer, own in line['layers'].items()}}
        assert got == {layer: own[index] and pytest.approx(own[index], rel=rel) for layer, own in expected.items()}


@pytest.mark.parametrize('clip, precision, rel', [(None, 32, 1e-5), (1e-3, 32, 1e-5), (None, 'bf16-mixed', 5e-2)])
def test_micro_batches_beside_single_examples(tmp_path, clip, precision, rel):
    net = make_net(Mean).double() if precision == 32 else make_net(Mean)
    data = make_data(32).to(next(net.parameters()).dtype)
    examples = by_examples(net, lambda f, x: (f(x) - x[:, :1]).square().mean(), data)
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('noise_scale@1'), net, validate=False, max_epochs=1,
                         loader=DataLoader(data, batch_size=8), accumulate_grad_batches=4, gradient_clip_val=clip,
                         precision=precision if precision != 32 else None)
    compare(lines, reference(examples, [8] * 4), rel)
    assert last(lines, 'noise_scale')['batch_examples'] == 32


@pytest.mark.parametrize('accumulate', [1, 2])
def test_under_a_grad_scaler(tmp_path, accumulate):
    kwargs = {'validate': False, 'max_epochs': 1, 'accumulate_grad_batches': accumulate}
    _, _, plain, _ = fit(tmp_path / 'a', PlasticityMonitor('noise_scale@1'), **kwargs)
    _, _, scaled, _ = fit(tmp_path / 'b', PlasticityMonitor('noise_scale@1'), plugins=[ScaledOnly()], **kwargs)
    assert len(plain) > 4 and len(scaled) == len(plain)
    for one, two in zip(plain, scaled, strict=True):
        assert two['value'] == (one['value'] and pytest.approx(one['value'], rel=1e-4)) and two['covered'] == 1


# --- chunks of a batch ------------------------------------------------------------

class Images(pl.LightningModule):
    """ Convolutions with a batch norm between them, which lets examples see each other. """

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, groups=2)
        self.head = nn.Linear(6, 1)

    def forward(self, batch, of_examples=None):
        """ With weights of examples: each weight once for each example, (examples, *shape). """
        own = of_examples or {name: [layer.weight] for name, layer in (('one', self.one), ('two', self.two))}
        x = batch.view(-1, 2, 2, 2)
        x = torch.relu(self.norm(self.convolve(x, own['one'], self.one)))
        x = torch.tanh(self.convolve(x, own['two'], self.two)).flatten(1)
        if of_examples:
            return (x[:, None] @ own['head'].mT)[:, 0] + self.head.bias
        return self.head(x)

    @staticmethod
    def convolve(x, weights, layer):
        if len(weights) == 1:
            return layer(x)
        b, out = len(x), layer.out_channels
        y = nn.functional.conv2d(x.flatten(0, 1)[None], weights.flatten(0, 1), layer.bias.repeat(b),
                                 groups=layer.groups * b)
        return y.view(b, out, *y.shape[2:])

    def loss(self, batch, *args):
        return (self(batch, *args) - batch[:, :1]).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    configure_optimizers = Net.configure_optimizers


class Tokens(Images):
    """ A transformer, whose attention takes its weights without calling a layer. """
    batch_first = True

    def __init__(self):
        pl.LightningModule.__init__(self)
        self.embed = nn.Embedding(13, 4)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0., batch_first=self.batch_first)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(4, 1)

    def forward(self, batch):
        x = self.embed((batch * 3).abs().long().clamp(max=12))
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x).mean(1)


class TokensFirst(Tokens):
    batch_first = False


class Twice(Mean):
    """ A layer that is used twice, and a weight that is tied to another. """

    def __init__(self):
        super().__init__()
        self.again = nn.Linear(16, 8)
        self.again.weight = nn.Parameter(self.fc1.weight.detach().T.clone())

    def features(self, x):
        first = torch.tanh(self.again(self.act(self.fc1(x))))
        first = self.act(self.fc1(first)) + nn.functional.linear(first, self.again.weight.T)
        return first, torch.relu(self.fc2(first))


def contributions(net, batch):
    """ Of each weight what each example adds to the gradient of the mean loss, times the number of examples. """
    if type(net) is not Images:
        return by_examples(net, lambda f, x: (f(x) - x[:, :1]).square().mean(), batch)
    net = copy.deepcopy(net)
    layers = {'one': net.one, 'two': net.two, 'head': net.head}
    own = {name: layer.weight.detach().expand(len(batch), *layer.weight.shape).clone().requires_grad_()
           for name, layer in layers.items()}
    grads = torch.autograd.grad(net.loss(batch, own), list(own.values()))
    return {name: g.double() * len(batch) for name, g in zip(own, grads, strict=True)}


def chunked(folder, net, data, batch_size=10, **kwargs):
    return fit(folder, PlasticityMonitor('noise_scale@1'), net, validate=False, max_epochs=1,
               loader=DataLoader(data, batch_size=batch_size), **kwargs)[2]


@pytest.mark.parametrize('precision, rel', [('64-true', 1e-7), ('32-true', 1e-5), ('bf16-mixed', 1e-2)])
@pytest.mark.parametrize('cls', [Mean, Images, Tokens, TokensFirst, Twice])
def test_chunks_beside_single_examples(tmp_path, cls, precision, rel):
    """ Of 10 examples, in chunks of 3, 3, 2 and 2. """
    net, data = make_net(cls), make_data(37)
    if precision == '64-true':
        net, data = net.double(), data.double()
    expected = reference(contributions(net, data[:10]), [3, 3, 2, 2])
    lines = chunked(tmp_path, net, data, precision=precision)
    if precision == 'bf16-mixed':  # layers have more rounding than the network
        value, fraction = (last(lines[:2], name)['value'] for name in ('noise_scale', 'noise_fraction'))
        assert fraction == pytest.approx(expected[None][1], rel=rel)
        assert value is None and expected[None][0] is None or value == pytest.approx(expected[None][0], rel=5 * rel)
    else:
        compare(lines, expected, rel)
    assert lines[0]['covered'] == 1 and last(lines, 'noise_scale')['batch_examples'] == 7
    assert len(lines_of(lines, 'noise_scale')) == 4


class Loops(Mean):
    def loss(self, batch):
        return sum((self(item['x'][None]) - 1).square().sum() for item in batch)


class Itself(Mean):
    """ With a weight in an operation that has no rule, most of the gradient. """

    def features(self, x):
        first = torch.relu(torch.einsum('bi,oi->bo', x, self.fc1.weight * 5))
        return first, torch.relu(self.fc2(first))


class Checkpointed(Mean):
    def features(self, x):
        from torch.utils.checkpoint import checkpoint
        first = checkpoint(lambda x: self.act(self.fc1(x)), x, use_reentrant=False)
        return first, checkpoint(lambda x: torch.relu(self.fc2(x)), first, use_reentrant=False)


class Square(Mean):
    """ As many tokens as examples: which is which cannot be told. """

    def forward(self, x):
        return super().forward(x[:, None].expand(-1, len(x), -1)).mean(1)


class TwoLosses(Mean):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for loss in (self.loss(batch), self(batch).mean()):
            self.manual_backward(loss)
        optimizer.step()


@pytest.mark.parametrize('cls, batch_size, words, has_lines', [
    (Mean, 3, ['less than 4 examples'], False), (Loops, None, ['one by one'], False),
    (Itself, 8, ['fc1 (used by MulBackward0)', 'covered'], True),
    (Checkpointed, 8, ['fc1 (its activations are checkpointed or offloaded)', 'fc2'], True),
    (Square, 8, ['two axes are as long as the batch'], False),
    (TwoLosses, 8, ['more than one backward pass', 'accumulate_grad_batches'], False),
])
def test_what_is_not_known_is_said(tmp_path, capsys, cls, batch_size, words, has_lines):
    data = make_data(12 if batch_size == 3 else 16)
    loader = DataLoader(data, batch_size=batch_size)
    if cls is Loops:
        loader = DataLoader([[{'x': x} for x in part] for part in data.split(8)], batch_size=None)
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('noise_scale@1'), make_net(cls), validate=False, loader=loader)
    out = capsys.readouterr().out
    (told,) = [line for line in out.splitlines() if line.startswith('PlasticityMonitor: noise_')
               and 'every step' not in line]
    assert all(word in told for word in words), told
    assert bool(lines) == has_lines
    for line in lines_of(lines, 'noise_scale'):
        shares = of_layers(line, 'covered')
        assert shares['fc1'] == 0 and shares['head'] == 1
        assert (line['value'] is None) == (line['covered'] < 0.9) and 0 < line['covered'] < 1


def test_a_gradient_that_a_hook_changes_is_not_known(tmp_path):
    class Hooked(Mean):
        def on_fit_start(self):
            self.fc2.weight.register_hook(lambda grad: grad * 2)
    lines = chunked(tmp_path, make_net(Hooked), make_data(16), batch_size=8)
    shares = of_layers(lines_of(lines, 'noise_scale')[0], 'covered')
    assert shares == {'fc1': 1, 'fc2': 0, 'head': 1}


def test_chunks_at_every_tenth_log_step(tmp_path):
    def intervals(**kwargs):
        monitor = PlasticityMonitor('tuning')
        _, trainer, _, _ = fit(tmp_path, monitor, max_steps=1, log_every_n_steps=3, logger=False, **kwargs)
        return {name: resolve('auto', METRICS[name], trainer) for name in ('noise_scale', 'update_ratio')}
    assert intervals() == {'noise_scale': 30, 'update_ratio': 3}
    assert intervals(accumulate_grad_batches=2) == {'noise_scale': 3, 'update_ratio': 3}


@pytest.mark.parametrize('fails', [False, True])
def test_nothing_of_the_graph_is_kept(tmp_path, monkeypatch, fails):
    """ Hooks on nodes of a graph refer to it: they are gone when the backward pass is over, and need no collector. """
    class Fails(Mean):
        def on_after_backward(self):
            if fails:
                raise KeyboardInterrupt

    made, begin = [], Chunks.__init__

    def remember(self, *args):
        begin(self, *args)
        made.append(weakref.ref(self))
    monkeypatch.setattr(Chunks, '__init__', remember)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            chunked(tmp_path, make_net(Fails), make_data(16), batch_size=8)
        assert len(made) == 2 - fails and not any(chunks() for chunks in made)
    finally:
        gc.enable()


# --- several processes ---------------------------------------------------------------------

@pytest.mark.parametrize('strategy', ['ddp', 'fsdp2'])
def test_in_two_processes(tmp_path, strategy):
    """ Ranks and micro-batches are pieces; of sharded gradients, which are reduced at once, micro-batches alone. """
    names = 'update_ratio,step_alignment,noise_scale,weight_distance'
    ran = Ran(tmp_path / 'two', 2, strategy=strategy, epochs=1, monitor={'metrics': names}, accumulate=2)
    alone = Ran(tmp_path / 'one', 1, strategy=strategy, epochs=1, monitor={'metrics': names}, accumulate=2)
    assert max(ran.collectives().values()) <= 2
    for name in names.split(','):
        own, others = lines_of(ran.lines, name), lines_of(alone.lines, name)
        assert len(own) >= 2 and [line['step'] for line in own] == (
            list(range(len(own))) if name == 'noise_scale' else [line['step'] for line in others])
        if name != 'noise_scale' or strategy == 'fsdp2':
            assert values(own, name) == pytest.approx(values(others, name)[:len(own)], rel=1e-6)
    net = make_net(Routed).double()
    net.always = strategy != 'ddp'
    parts = [batches_of(rank, 2, 'even')[:2] for rank in range(2)]
    weights = {name.removesuffix('.weight'): p for name, p in net.named_parameters() if p.ndim > 1}
    pieces = [torch.autograd.grad(net.loss(batch) / 2, list(weights.values()), allow_unused=True)
              for part in parts for batch in part]
    if strategy == 'fsdp2':
        pieces = [[a + b for a, b in zip(pieces[i], pieces[i + 2], strict=True)] for i in range(2)]
    line, k, b = lines_of(ran.lines, 'noise_scale')[0], len(pieces), sum(len(x) for part in parts for x in part)
    n = s = 0.
    for layer, own in zip(weights, zip(*pieces, strict=True), strict=True):
        own = [torch.zeros_like(weights[layer]) if g is None else g for g in own]
        n, s = n + sum(own).square().sum().item(), s + sum(g.square().sum().item() for g in own)
    assert line['fraction'] == pytest.approx((k * s - n) / ((k - 1) * n), rel=1e-6)
    assert line['value'] == (pytest.approx(b / k * (k * s - n) / (n - s), rel=1e-6) if n > s else None)
    assert line['batch_examples'] == b == 16
