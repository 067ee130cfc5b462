"""
Half of one layer's units are made dead, for each way of writing an activation and each layout.

The last tests go through a real Trainer.
"""
import functools
import math
from collections import Counter

import pytest
import pytorch_lightning as pl
import torch
from common import fit, last, measure_calls, numpy_erank
from torch import nn
from torch.nn import functional as F
from zoo import Seen

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.axes import Part
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.capture import Capture
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.moves import follow_units
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.sites import Site
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.window import Window
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.calls import Call
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import register_activation

SIZES = (5, 1, 8)  # of the batches


def watch(model, batches, grad=False):
    """ One window over several batches. """
    seen = Seen()
    with torch.set_grad_enabled(grad):
        for batch in batches:
            with Capture(model, seen):
                model(batch)
    return seen


# --- where units go -----------------------------------------------------------------

@pytest.mark.parametrize('index', [
    0, -1, slice(1, None), (slice(None), 1), (..., 0), (None, slice(None), None), (slice(None), slice(0, 2), ..., None),
    (0, ..., slice(None, None, 2)), True, (True, slice(None), 2), torch.tensor(1), (slice(None), torch.tensor(1)),
    torch.tensor([2, 0, 1]), (slice(None), torch.tensor([0, 2])), (slice(None), [0, 2], 1), (Ellipsis, [0, 3, 1]),
    torch.tensor([True, False, True]), (slice(None), torch.tensor([True, True, False, True]))], ids=str)
def test_where_an_index_takes_units(index):
    shape = (3, 4, 5, 6)
    for axis, size in enumerate(shape):
        # Each number says of which unit it is.
        units = torch.arange(size).reshape([size if i == axis else 1 for i in range(4)]).expand(shape)
        output = units[index]
        changing = [i for i in range(output.ndim) if output.shape[i] > 1 and (output != output.narrow(i, 0, 1)).any()]
        place = follow_units('__getitem__', (units, index), {}, units, (Part(axis, size),), output)
        assert [part.axis for part in place] == changing, axis


# --- the look at one output ------------------------------------------------------

def outputs():
    """ Axis of the units, and an output of the activation: shapes, strides and types. """
    def normal(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()

    yield -1, normal(7, 12)
    yield 1, normal(6, 12, 3, 5)
    yield 1, normal(6, 12, 20, 20)
    yield 1, normal(6, 12, 3, 5).to(memory_format=torch.channels_last)
    yield 1, normal(40, 12, 20, 20)             # more than 4096 positions
    yield 1, normal(40, 12, 20, 20).to(memory_format=torch.channels_last)
    yield 1, normal(40, 12, 20, 20)[::2, :, ::2, 1:]
    yield 0, normal(12, 30)
    yield 2, normal(4, 9, 12, 11)
    yield 2, normal(3, 2000, 12)
    yield 1, normal(2, 12, 7, 4, 3).to(memory_format=torch.channels_last_3d)
    yield 0, normal(12)
    yield 1, normal(6, 12, 3, 5).to(torch.bfloat16)


@pytest.mark.parametrize('axis, output', list(outputs()))
@pytest.mark.parametrize('bad', [None, float('nan'), float('inf')])
def test_any_layout(axis, output, bad):
    output = output.clone(memory_format=torch.preserve_format)
    columns = output.movedim(axis, -1)
    columns[..., 2:5] = 0
    if bad is not None:
        columns[(0,) * (output.ndim - 1) + (3,)] = bad
    sites = Site('act', 'relu', units=12), Site('again', 'relu', units=12)
    batches = [[(site, output, axis, (0.,)) for site in sites]] * 2
    rows = columns.reshape(-1, columns.shape[-1])
    value, layers = measure_calls('dead_units', batches)
    # By hand: of three units that are 0 one has a sample that is not, if there is a bad number.
    assert {own['units'] for own in layers.values()} == {12} and list(layers) == ['act.relu', 'again.relu']
    if bad is None:
        assert value == (rows == 0).all(0).double().mean().item()
    else:
        assert math.isnan(value) and all(math.isnan(own['value']) for own in layers.values())
        assert layers['act.relu']['nonfinite'] * rows.numel() == pytest.approx(1)
    _, layers = measure_calls('feature_erank', batches)
    most = 2000  # of which an example has several if there are few
    assert layers['act.relu']['rows'] == min(2 * len(rows), most)
    if bad is not None:
        assert math.isnan(layers['act.relu']['value'])
    elif 2 * len(rows) <= most:
        assert layers['act.relu']['value'] == pytest.approx(numpy_erank(rows.double()), rel=1e-6)


@pytest.mark.parametrize('positions, examples, batches, calls', [
    (1, 50, 4, 1), (64, 50, 4, 1), (64, 8, 25, 1), (7, 13, 3, 4), (4096, 3, 5, 1), (1, 1000, 4, 1)])
def test_rows_are_spread_evenly(positions, examples, batches, calls):
    """ One row holds the number of its example, and that of its position: each is there as often as another. """
    samples, units, seen = 200, 2, []
    fields = ['gram', 'sum', 'rows']
    window = Window(['feature_erank'], fields, samples)
    take, site = window._makers[0], Site('act', 'relu', units=units)
    flush = take._flush

    def keep(own, key):
        seen.extend(x.tolist() for x in take._waiting[key])
        flush(own, key)
    take._flush = keep
    for batch in range(batches):
        window.begin_batch(torch.zeros(examples, 1), batches - batch)
        numbers = torch.stack(torch.meshgrid(
            torch.arange(batch * examples, (batch + 1) * examples), torch.arange(positions), indexing='ij'), 1)
        for part in numbers.double().tensor_split(calls):
            window.add(Call(site, part, 1))
        window.end_batch()
    own = window.totals()
    rows = [tuple(row) for part in seen for row in part]
    total, most = positions * examples * min(batches, -(-samples // examples) + 1), max(samples, 8 * units)
    assert len(rows) == len(set(rows)) == own['activations', 'rows'][site] <= most
    assert len(rows) >= 0.9 * min(most, total if examples * batches <= samples else most)
    if len(rows) < positions * examples * batches and positions > 1:
        places = Counter(int(position) // -(-positions // 4) for _, position in rows)
        assert max(places.values()) <= 1.5 * len(rows) / 4 + 4  # no quarter of the picture is left out
        assert min(places.values()) >= 0.5 * len(rows) / 4 - 4
    each = Counter(example for example, _ in rows)
    assert max(each.values()) <= 2 * len(rows) / len(each) + 1
    # The sums are those of the rows.
    assert own['activations', 'sum'][site].tolist() == pytest.approx([sum(x) for x in zip(*rows, strict=True)])


# --- ways of writing an activation ---------------------------------------------

def geglu(x):
    x, gates = x.chunk(2, dim=-1)
    return x * F.gelu(gates)


@functools.partial(register_activation, saturated_values=(0.,))
def squared_relu_of_a_user(x):
    return torch.clamp(x, min=0).square()


class ModuleOfAUser(nn.Module):
    def forward(self, x):
        return x * (x > 0)


register_activation(ModuleOfAUser, (0.,))


# Way of writing: the function, and the input at which a unit is dead.
WAYS = {
    'nn.ReLU': (nn.ReLU(), -100), 'nn.ReLU in place': (nn.ReLU(inplace=True), -100), 'F.relu': (F.relu, -100),
    'F.relu in place': (lambda x: F.relu(x, inplace=True), -100), 'torch.relu': (torch.relu, -100),
    'torch.relu_': (torch.relu_, -100), 'x.relu': (lambda x: x.relu(), -100), 'x.relu_': (lambda x: x.relu_(), -100),
    'F.relu6, high': (F.relu6, 100), 'F.relu6, low': (F.relu6, -100),
    'nn.ReLU6, high': (nn.ReLU6(), 100), 'F.gelu': (F.gelu, -100),
    'nn.GELU, tanh': (nn.GELU('tanh'), -100), 'F.silu': (F.silu, -100), 'nn.SiLU': (nn.SiLU(inplace=True), -100),
    'F.mish': (F.mish, -100), 'F.hardswish': (F.hardswish, -100), 'nn.Hardswish': (nn.Hardswish(True), -100),
    'F.softplus': (F.softplus, -100), 'nn.Softplus': (nn.Softplus(), -100),
    'torch.sigmoid, low': (torch.sigmoid, -100), 'x.sigmoid_, high': (lambda x: x.sigmoid_(), 100),
    'nn.Sigmoid': (nn.Sigmoid(), 100), 'F.sigmoid': (F.sigmoid, -100), 'special.expit': (torch.special.expit, 100),
    'F.hardsigmoid': (F.hardsigmoid, 100), 'F.logsigmoid': (F.logsigmoid, 100),
    'torch.tanh, low': (torch.tanh, -100), 'x.tanh, high': (lambda x: x.tanh(), 100), 'nn.Tanh': (nn.Tanh(), 100),
    'F.hardtanh': (lambda x: F.hardtanh(x, -2, 3), 100), 'nn.Hardtanh': (nn.Hardtanh(-.5, .5), -100),
    'F.softsign': (F.softsign, 1e9), 'F.elu': (lambda x: F.elu(x, alpha=.5), -100), 'nn.ELU': (nn.ELU(2.), -100),
    'torch.celu': (lambda x: torch.celu(x, .5), -100), 'torch.selu': (torch.selu, -100), 'nn.SELU': (nn.SELU(), -100),
    'F.threshold': (lambda x: F.threshold(x, .1, 7.), -100), 'nn.Hardshrink': (nn.Hardshrink(.1), 0),
    'F.softshrink': (lambda x: F.softshrink(x, .1), 0), 'function of a user': (squared_relu_of_a_user, -100),
    'module of a user': (ModuleOfAUser(), -100),
    'out=': (lambda x: torch.tanh(x, out=torch.empty_like(x)), 100),
}


class OneLayer(nn.Module):
    def __init__(self, function, units=10):
        super().__init__()
        self.layer = nn.Linear(6, units)
        self.function = function

    def forward(self, x):
        return self.function(self.layer(x))


def pin(layer, value, dead):
    """ Units that get the same input on every sample. """
    with torch.no_grad():
        layer.weight[dead] = 0
        layer.bias[dead] = value


@pytest.mark.parametrize('grad', [False, True], ids=['no grad', 'grad'])
@pytest.mark.parametrize('way', WAYS)
def test_ways(way, grad):
    torch.manual_seed(0)
    function, value = WAYS[way]
    if way == 'out=' and grad:
        pytest.skip('out= is an error of torch where gradients are needed')
    model = OneLayer(function)
    pin(model.layer, value, slice(5))
    seen = watch(model, [3 * torch.randn(n, 6) for n in SIZES], grad)
    assert list(seen.dead().values()) == [(5, 10)]
    assert len(seen.calls) == len(SIZES)


@pytest.mark.parametrize('function', [F.glu, nn.GLU(), geglu], ids=['F.glu', 'nn.GLU', 'GEGLU'])
def test_gated(function):
    torch.manual_seed(0)
    model = OneLayer(function, units=20)  # the last 10 are gates
    pin(model.layer, -200, slice(10, 15))
    seen = watch(model, [torch.randn(n, 6) for n in SIZES])
    assert list(seen.dead().values()) == [(5, 10)]


def test_without_saturated_values():
    """ Leaky functions are seen, and have no unit that could die. """
    for function in (F.leaky_relu, nn.PReLU(), nn.RReLU(), F.tanhshrink):
        seen = watch(OneLayer(function), [torch.randn(3, 6)])
        assert [site.units for site in seen.sites] == [10]
        assert list(seen.dead().values()) == [(0, 10)]


# --- layouts -----------------------------------------------------------------------

class Layout(nn.Module):
    """ A layer whose first half of 4 units is dead, something in between, and ReLU. """

    def __init__(self, layer, between=lambda x: x, before=lambda x: x):
        super().__init__()
        self.layer = layer
        self.between = between
        self.before = before

    def forward(self, x):
        return F.relu(self.between(self.layer(self.before(x))))


class Recurrent(nn.Module):
    """ A loop over time without nn.RNN. """

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.back = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.back.weight[:2] = 0

    def forward(self, x):
        hidden = torch.zeros(len(x), 4)
        for t in range(x.shape[1]):
            hidden = torch.relu(self.layer(x[:, t]) + self.back(hidden))
        return hidden


class Raw(nn.Module):
    """ A layer written as a product with a parameter. """

    def __init__(self, product):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.zeros(4))
        self.product = product

    def forward(self, x):
        return self.product(x, self.weight, self.bias)


class FirstNorm(nn.Module):
    """ A norm and no layer before the activation. """

    def __init__(self, norm):
        super().__init__()
        self.layer = norm

    def forward(self, x):
        return F.relu(self.layer(x))


def normalized(layer):
    return nn.utils.parametrizations.weight_norm(layer)


def channel_shuffle(x):
    b, c, *rest = x.shape
    return x.view(b, 2, c // 2, *rest).transpose(1, 2).reshape(b, c, *rest)


def frames_and_back(x):
    """ Frames and channels on one axis, as for a resize, and apart again. """
    together = x.flatten(0, 1)[None]
    return F.interpolate(together, scale_factor=2).unflatten(1, x.shape[:2])[0]


norm = nn.BatchNorm2d(4).eval()
# All sizes are 4 but that of the batch, so that no size gives an axis away.
LAYOUTS = {
    'B F': (lambda: Layout(nn.Linear(4, 4)), (4,)),
    'B T F': (lambda: Layout(nn.Linear(4, 4)), (4, 4)),
    'T B F': (lambda: Layout(nn.Linear(4, 4), before=lambda x: x.transpose(0, 1)), (4, 4)),
    'B H W F': (lambda: Layout(nn.Linear(4, 4)), (4, 4, 4)),
    'B F T': (lambda: Layout(nn.Linear(4, 4), between=lambda x: x.transpose(1, 2)), (4, 4)),
    'x.mT': (lambda: Layout(nn.Linear(4, 4), between=lambda x: x.mT.contiguous()), (4, 4)),
    'F B': (lambda: Layout(nn.Linear(4, 4), between=lambda x: x.t()), (4,)),
    'conv1d': (lambda: Layout(nn.Conv1d(4, 4, 3, padding=1)), (4, 4)),
    'conv2d': (lambda: Layout(nn.Conv2d(4, 4, 3, padding=1)), (4, 4, 4)),
    'conv3d': (lambda: Layout(nn.Conv3d(4, 4, 3, padding=1)), (4, 4, 4, 4)),
    'depthwise': (lambda: Layout(nn.Conv2d(4, 4, 3, padding=1, groups=4)), (4, 4, 4)),
    'transposed conv': (lambda: Layout(nn.ConvTranspose2d(4, 4, 2, stride=2)), (4, 4, 4)),
    'channels last in memory': (lambda: Layout(nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last),
                                               before=lambda x: x.to(memory_format=torch.channels_last)), (4, 4, 4)),
    'ConvNeXt': (lambda: Layout(nn.Linear(4, 4), before=lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,))),
                 (4, 4, 4)),
    'ConvNeXt, back': (lambda: Layout(nn.Linear(4, 4), before=lambda x: x.permute(0, 2, 3, 1),
                                      between=lambda x: x.permute(0, 3, 1, 2)), (4, 4, 4)),
    'channels to the end': (lambda: Layout(nn.Conv2d(4, 4, 1), between=lambda x: x.movedim(1, -1)), (4, 4, 4)),
    'patches': (lambda: Layout(nn.Conv2d(4, 4, 2, stride=2), between=lambda x: x.flatten(2).transpose(1, 2)),
                (4, 8, 2)),
    'patches, copied': (lambda: Layout(nn.Conv2d(4, 4, 2, stride=2),
                                       between=lambda x: x.reshape(len(x), 4, 4).permute(0, 2, 1).contiguous()),
                        (4, 8, 2)),
    'Swin windows': (lambda: Layout(nn.Linear(4, 4), between=lambda x: x.view(len(x), 2, 2, 2, 2, 4).permute(
        0, 1, 3, 2, 4, 5).reshape(-1, 4, 4)), (4, 4, 4)),
    'batch norm': (lambda: Layout(nn.Conv2d(4, 4, 1), between=norm), (4, 4, 4)),
    'dropout': (lambda: Layout(nn.Linear(4, 4), between=nn.Dropout(.5).eval()), (4, 4)),
    'residual': (lambda: Layout(nn.Linear(4, 4), between=lambda x: x + torch.zeros_like(x)), (4, 4)),
    'in place sum': (lambda: Layout(nn.Linear(4, 4), between=lambda x: x.add_(0)), (4, 4)),
    'pooled': (lambda: Layout(nn.Conv2d(4, 4, 1), between=lambda x: x.mean((2, 3))), (4, 4, 4)),
    'max over time': (lambda: Layout(nn.Linear(4, 4), between=lambda x: x.amax(1)), (4, 4)),
    'one token': (lambda: Layout(nn.Linear(4, 4), between=lambda x: x[:, 0]), (4, 4)),
    'masked tokens': (lambda: Layout(nn.Linear(4, 4), between=lambda x: x[torch.ones(x.shape[:2], dtype=bool)]),
                      (4, 4)),
    'stacked': (lambda: Layout(nn.Linear(4, 4), between=lambda x: torch.stack([x, x])), (4, 4)),
    'stacked at the end': (lambda: Layout(nn.Conv2d(4, 4, 1), between=lambda x: torch.stack([x, x], -1)), (4, 4, 4)),
    'unsqueezed': (lambda: Layout(nn.Conv2d(4, 4, 1), between=lambda x: x[None, :, None]), (4, 4, 4)),
    'channel shuffle': (lambda: Layout(nn.Conv2d(4, 4, 1), between=channel_shuffle), (4, 4, 4)),
    'frames and back': (lambda: Layout(nn.Conv2d(4, 4, 1), between=frames_and_back), (4, 4, 4)),
    'recurrent loop': (Recurrent, (4, 4)),
    'F.linear': (lambda: Layout(Raw(F.linear)), (4, 4)),
    'x @ W.T': (lambda: Layout(Raw(lambda x, w, b: x @ w.T + b)), (4, 4)),
    'torch.matmul': (lambda: Layout(Raw(lambda x, w, b: torch.matmul(x, w.mT).add(b))), (4, 4)),
    'addmm': (lambda: Layout(Raw(lambda x, w, b: torch.addmm(b, x, w.t()))), (4,)),
    'W @ x': (lambda: Layout(Raw(lambda x, w, b: w @ x + b[:, None])), (4, 4)),
    'x.__rmatmul__(W)': (lambda: Layout(Raw(lambda x, w, b: x.__rmatmul__(w) + b[:, None])), (4, 4)),
    'mm, weight first': (lambda: Layout(Raw(lambda x, w, b: torch.mm(w, x.T) + b[:, None])), (4,)),
    'bmm, weight first': (lambda: Layout(Raw(lambda x, w, b: torch.bmm(w.expand(len(x), 4, 4), x) + b[:, None])),
                          (4, 4)),
    'addmm, weight first': (lambda: Layout(Raw(lambda x, w, b: torch.addmm(b[:, None], w, x.T))), (4,)),
    'einsum': (lambda: Layout(Raw(lambda x, w, b: torch.einsum('bti,oi->bto', x, w) + b)), (4, 4)),
    'einsum, units first': (lambda: Layout(Raw(lambda x, w, b: torch.einsum('bti,oi->bot', x, w) + b[:, None])),
                            (4, 4)),
    'einsum, weight first': (lambda: Layout(Raw(lambda x, w, b: torch.einsum('oi,bti->bot', w, x)
                                                            + b[:, None])), (4, 4)),
    'parametrized': (lambda: Layout(normalized(nn.Linear(4, 4))), (4, 4)),
    'batch norm first': (lambda: FirstNorm(nn.BatchNorm1d(4).eval()), (4, 4)),
    'layer norm first': (lambda: FirstNorm(nn.LayerNorm(4)), (4, 4)),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts(layout):
    torch.manual_seed(0)
    make, shape = LAYOUTS[layout]
    model = make()
    layer = getattr(model.layer, 'layer', model.layer)
    with torch.no_grad():
        if layout == 'parametrized':
            layer.bias[:2] = -100
        elif layout == 'transposed conv':
            layer.weight[:, :2] = 0
        else:
            layer.weight[:2] = 0
        layer.bias[:2] = -100
        layer.bias[2:] = 0.
    seen = watch(model, [torch.randn(n, *shape) for n in (9, 1, 6)])
    assert len(seen.sites) == 1, seen.sites
    assert list(seen.dead().values()) == [(2, 4)]


def test_pixel_shuffle():
    """ Of 8 channels 4 become positions each: the 2 that are left are units. """
    model = Layout(nn.Conv2d(3, 8, 1), between=lambda x: F.pixel_shuffle(x, 2))
    pin(model.layer, -100, slice(4))
    assert list(watch(model, [torch.randn(n, 3, 4, 4) for n in SIZES]).dead().values()) == [(1, 2)]
    model = Layout(nn.Conv2d(3, 8, 1), between=lambda x: x.unflatten(1, (2, 2, 2)).permute(0, 1, 4, 2, 5, 3).reshape(
        len(x), 2, 8, 8))
    pin(model.layer, -100, slice(4))
    assert list(watch(model, [torch.randn(n, 3, 4, 4) for n in SIZES]).dead().values()) == [(1, 2)]


def test_heads():
    """ Features that are split over heads are units all the same. """
    model = Layout(nn.Linear(4, 8), between=lambda x: x.unflatten(-1, (2, 4)).transpose(1, 2))
    with torch.no_grad():
        model.layer.weight[[0, 1, 4, 5]] = 0
        model.layer.bias[[0, 1, 4, 5]] = -100
    assert list(watch(model, [torch.randn(n, 3, 4) for n in SIZES]).dead().values()) == [(4, 8)]


def test_one_example_without_a_batch():
    model = Layout(nn.Conv2d(4, 4, 1))
    pin(model.layer, -100, slice(2))
    assert list(watch(model, [torch.randn(4, 4, 4)]).dead().values()) == [(2, 4)]
    model = Layout(nn.Linear(4, 4))
    pin(model.layer, -100, slice(4))
    assert list(watch(model, [torch.randn(4)]).dead().values()) == [(4, 4)]
    model = Layout(Raw(lambda x, w, b: w @ x + b))
    pin(model.layer, -100, slice(4))
    assert list(watch(model, [torch.randn(4)]).dead().values()) == [(4, 4)]


def test_dead_in_one_batch_only():
    model = Layout(nn.Linear(1, 4))
    with torch.no_grad():
        model.layer.weight.copy_(torch.tensor([[1.], [1.], [-1.], [0.]]))
        model.layer.bias.copy_(torch.tensor([0., 0., 0., -1.]))
    ones = torch.ones(3, 1)
    assert list(watch(model, [ones]).dead().values()) == [(2, 4)]
    assert list(watch(model, [ones, -ones]).dead().values()) == [(1, 4)]


# --- through a real Trainer ----------------------------------------------------------

class HalfDead(pl.LightningModule):
    """ Half of the units of each layer are dead: channels, tokens' features, features. """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.tokens = nn.Linear(8, 12)
        self.hidden = nn.Linear(12, 16)
        self.act = nn.GELU()
        self.head = nn.Linear(16, 1)
        with torch.no_grad():
            self.norm.weight[:4] = 0
            self.norm.bias[:4] = -100
        pin(self.tokens, -200, slice(6))
        pin(self.hidden, 300, slice(8))

    def forward(self, x):
        x = self.norm(self.conv(x.view(-1, 1, 2, 4))).relu_()
        x = self.act(self.tokens(x.flatten(2).transpose(1, 2)))
        return self.head(torch.tanh(self.hidden(x.mean(1))))

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


@pytest.mark.parametrize('samples', [12, 2000])
@pytest.mark.parametrize('source', ['train', 'validation'])
def test_half_dead_in_a_trainer(tmp_path, source, samples):
    torch.manual_seed(0)
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('dead_units', source=source, samples=samples), HalfDead())
    line = last(lines, 'dead_units')
    assert line['value'] == pytest.approx(0.5)
    assert {name: (layer['value'], layer['units']) for name, layer in line['layers'].items()} == {
        'relu': (0.5, 8), 'act': (0.5, 12), 'tanh': (0.5, 16)}
    # Batches of 8 in training and 10 in validation, of 37.
    wanted = {('train', 12): 16, ('validation', 12): 20, ('train', 2000): 37, ('validation', 2000): 37}
    assert line['samples'] == wanted[source, samples]


def test_many_batches_are_exact(tmp_path):
    """ A unit that is alive on a single example of the last, shorter batch is not dead. """
    net = HalfDead()
    with torch.no_grad():
        net.conv.weight.fill_(1)
        net.norm.weight.zero_()
        net.norm.weight[7] = 1
        net.norm.bias.fill_(-1)
    data = torch.zeros(37, 8)
    data[36] = 1
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('dead_units', source='train'), net, loader=loader,
                         validate=False, max_epochs=1)
    assert last(lines, 'dead_units')['layers']['relu'] == {'value': 7 / 8, 'units': 8}
