"""
Which activation calls are hidden layers, of which layer they are, and how many units they have.

Each network is small, and what is right is counted by hand: units of layers that are made dead.
"""
import copy
import dataclasses
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import Seen

from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.capture import Capture
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.functions import register_activation
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.sites import site_names
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.contents import Contents

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


def hidden(model, run=None, inputs=X, times=2, **kwargs):
    """ Name of each hidden layer to (dead units, units), as one window over several batches sees them. """
    seen, found, apart = Seen(), set(), set()
    for _ in range(times):
        with Capture(model, seen, everything=False, **kwargs) as capture:
            (run or model)(inputs)
        found |= capture.hidden
        apart |= capture.parts
    dead = seen.without(apart).dead()
    return {name: dead[site] for site, name in site_names([site for site in dead if site in found]).items()}


def kill(layer, units, value=-100.):
    with torch.no_grad():
        layer.weight[units] = 0
        layer.bias[units] = value
    return layer


def net(dead=3, units=12, out=2):
    torch.manual_seed(1)
    return nn.Sequential(kill(nn.Linear(8, units), slice(dead)), nn.ReLU(), nn.Linear(units, out))


# --- losses and metrics ------------------------------------------------------------------

def hinge(y):
    return F.relu(1 - y).mean()


class Focal(nn.Module):
    """ A loss that is a module of the model, without weights. """

    def forward(self, y):
        return (torch.sigmoid(y) * F.logsigmoid(-y) + F.softplus(y) + F.relu(y)).mean()


class Detector(nn.Module):
    """ Computes its loss itself, with a loss of each entry times a power of its probability. """

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        y = self.net(x)
        p = torch.sigmoid(y)
        return (F.binary_cross_entropy_with_logits(y, torch.ones_like(y), reduction='none') * (1 - p) ** 2).mean()


def test_a_loss_inside_of_the_forward_pass():
    assert hidden(Detector()) == {'net.1': (3, 12)}


class Metric(nn.Module):
    """ As a metric of torchmetrics: of logits that are detached, with a state. """

    def __init__(self):
        super().__init__()
        self.register_buffer('sum', torch.zeros(()))

    def forward(self, y):
        self.sum += y.detach().sigmoid().round().sum()


class Centers(nn.Module):
    """ A loss with weights of its own that are trained. """

    def __init__(self):
        super().__init__()
        self.centers = nn.Parameter(torch.randn(4, 2))

    def forward(self, y):
        return torch.cdist(y, self.centers).clamp(min=0).mean()


@pytest.mark.parametrize('loss', [
    hinge, Focal(), Metric(), lambda y: torch.sigmoid(y).mean(), lambda y: y.tanh().softmax(-1).log().mean(),
    lambda y: (F.relu(y).sqrt() + y.clamp(min=0)).sum(), lambda y: torch.maximum(y, torch.zeros(())).sum()])
def test_a_loss_is_no_hidden_layer(loss):
    model = nn.ModuleDict({'net': net(), 'loss': loss if isinstance(loss, nn.Module) else Focal()})
    assert hidden(model, lambda x: loss(model['net'](x))) == {'net.1': (3, 12)}


def test_a_loss_with_weights():
    model = nn.ModuleDict({'net': net(), 'loss': Centers()})
    assert hidden(model, lambda x: model['loss'](model['net'](x))) == {'net.1': (3, 12)}


@pytest.mark.parametrize('last', [nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.Softmax(-1), nn.LogSigmoid()])
def test_the_activation_of_an_output_is_no_hidden_layer(last):
    assert hidden(nn.Sequential(*net(), last)) == {'1': (3, 12)}


def test_the_last_activation_of_a_network_that_makes_features():
    """ Trained by a loss of features: nothing follows, and yet it is what the network has learned. """
    model = nn.Sequential(*net(), nn.ReLU())
    kill(model[2], slice(1))
    assert hidden(model, lambda x: model(x).norm()) == {'1': (3, 12), '3': (1, 2)}
    # Where the network is a method of the whole, a rectifier of a step is its loss.
    assert hidden(model, lambda x: F.relu(model[:3](x))) == {'1': (3, 12)}


@dataclasses.dataclass
class Out:
    features: torch.Tensor


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = nn.Sequential(*net(), nn.ReLU()), wrap
        kill(self.net[2], slice(1))

    def forward(self, x):
        return self.wrap(self.net[2](self.net[1](self.net[0](x))))


@pytest.mark.parametrize('wrap', [
    lambda y: F.relu(y), lambda y: {'f': [F.relu(y)]}, lambda y: (F.normalize(F.relu(y), dim=1), None),
    lambda y: Out(F.relu(y)), lambda y: F.relu(y).unflatten(0, (2, -1)).mean(1)])
def test_features_that_a_network_returns(wrap):
    assert hidden(Wrapped(wrap)) == {'net.1': (3, 12), 'relu': (1, 2)}


@pytest.mark.parametrize('loss', [
    lambda y: F.relu(1 - y).mean(), lambda y: {'loss': F.elu(y).sum(), 'logits': y},
    lambda y: F.relu(.1 - (y[:, None] - y[None])).mean(), lambda y: (F.relu(y.norm(dim=1)).mean(), y)])
def test_a_loss_inside_of_the_networks_own_forward(loss):
    assert hidden(Wrapped(loss)) == {'net.1': (3, 12)}


def test_the_user_names_a_module():
    model = nn.Sequential(*net(), nn.Sigmoid())
    kill(model[2], slice(1), 100)
    assert hidden(model, names=lambda path: path == '3') == {'1': (3, 12), '3': (1, 2)}


def test_a_generator_and_a_discriminator():
    """ The output of the one is inside of both together, and nowhere if it is detached. """
    model = nn.ModuleDict({'g': nn.Sequential(*net(), nn.Tanh()), 'd': nn.Sequential(
        nn.Linear(2, 5), nn.LeakyReLU(), nn.Linear(5, 1))})
    both = hidden(model, lambda x: hinge(model['d'](model['g'](x))))
    assert list(both) == ['g.1', 'g.3', 'd.1']
    assert list(hidden(model, lambda x: hinge(model['d'](model['g'](x).detach())))) == ['g.1', 'd.1']


def test_an_auxiliary_head_and_a_bottleneck():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3), nn.Tanh())
            self.decoder = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 8), nn.Sigmoid())
            self.aux = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))

        def forward(self, x):
            early = self.encoder[:2](x)
            return self.decoder(self.encoder[2:](early)), self.aux(early)

    assert list(hidden(Net())) == ['encoder.1', 'encoder.3', 'decoder.1', 'aux.1']


# --- frozen networks -------------------------------------------------------------------------

def test_frozen_networks_do_not_count():
    student = net()
    teacher = copy.deepcopy(student).requires_grad_(False)
    kill(teacher[0], slice(12))
    vgg = nn.Sequential(nn.Linear(2, 20), nn.ReLU(), nn.Linear(20, 1)).requires_grad_(False)
    model = nn.ModuleDict({'student': student, 'teacher': teacher, 'vgg': vgg})

    def step(x):
        return model['vgg'](model['student'](x)) - model['vgg'](model['teacher'](x))
    assert hidden(model, step) == {'student.1': (3, 12)}


def test_what_no_optimizer_has_is_frozen():
    model = nn.ModuleDict({'a': net(), 'b': net()})

    def step(x):
        return model['a'](x) + model['b'](x)
    assert hidden(model, step, contents=Contents(model, lambda name, param: name.startswith('b.'))) == {'b.1': (3, 12)}


@pytest.mark.parametrize('frozen, names', [
    ((), ['1', '3', '5']), (('0',), ['3', '5']), (('2', '4'), ['1', '3', '5']), (('0', '2', '4'), []),
    (('0', '2', '4', '6'), [])])
def test_partly_trained(frozen, names):
    """ What lies after the first trained layer counts, if a trained layer follows; what unfreezes joins. """
    model = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(),
                          nn.Linear(7, 1))
    for name in frozen:
        model[int(name)].requires_grad_(False)
    assert list(hidden(model)) == names
    assert list(hidden(model.requires_grad_())) == ['1', '3', '5']


def test_low_rank_adapters():
    class Adapted(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.base = linear.requires_grad_(False)
            self.a, self.b = nn.Linear(linear.in_features, 2, False), nn.Linear(2, linear.out_features, False)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    model = nn.Sequential(Adapted(nn.Linear(8, 6)), nn.ReLU(), Adapted(nn.Linear(6, 5)), nn.GELU(),
                          nn.Linear(5, 1).requires_grad_(False))
    # After the second no trained layer follows; the module that calls it holds the adapter.
    assert list(hidden(model)) == ['1', '3']


# --- layers are told apart by their parameters ----------------------------------------------

class Learner(nn.Module):
    """ All weights in one list, as in meta-learning. """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vars = nn.ParameterList([torch.randn(12, 8), torch.zeros(12), torch.randn(12, 12), torch.full(
            (12,), -1e3), torch.randn(1, 12), torch.zeros(1)])

    def forward(self, x, weights=None):
        w = list(self.vars) if weights is None else weights
        return F.linear(F.relu(F.linear(F.relu(F.linear(x, w[0], w[1])), w[2], w[3])), w[4], w[5])


@pytest.mark.parametrize('way', ['list', 'fast weights', 'masked', 'detached', 'called with weights'])
def test_weights_of_one_module(way):
    model = Learner()

    def run(x):
        if way == 'list':
            return model(x)
        if way == 'fast weights':
            grads = torch.autograd.grad(model(x).sum(), list(model.vars))
            return model(x, [w - 0.0 * g for w, g in zip(model.vars, grads, strict=True)])
        if way == 'masked':
            return model(x, [w * torch.ones_like(w) for w in model.vars])
        if way == 'detached':
            return model(x, [w.clone() for w in model.vars])
        return torch.func.functional_call(model, dict(model.named_parameters()), (x,))

    assert hidden(model, run) == {'relu@vars.0': (0, 12), 'relu@vars.2': (12, 12)}


@pytest.mark.parametrize('examples', [4, 6])
@pytest.mark.parametrize('way', ['mixed kernels', 'scaled kernels'])
def test_kernels_that_are_made_for_each_example(way, examples):
    """ The groups of the convolution are the examples, as in CondConv and in StyleGAN. """
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernels = nn.Parameter(torch.randn(4 if way == 'mixed kernels' else 1, 6, 3, 3, 3))
            self.bias = nn.Parameter(torch.zeros(6))
            self.router, self.head = nn.Linear(3, 4 if way == 'mixed kernels' else 3), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            made = self.router(x.mean((2, 3)))
            if way == 'mixed kernels':
                kernels = made.softmax(1) @ self.kernels.flatten(1)
            else:
                kernels = self.kernels * made[:, None, :, None, None]
            y = F.conv2d(x.reshape(1, -1, 5, 5), kernels.view(-1, 3, 3, 3), padding=1, groups=len(x))
            return self.head(F.relu(y.view(-1, 6, 5, 5) + self.bias.view(-1, 1, 1)))

    model = Net()
    with torch.no_grad():
        model.bias[:2] = -500
    assert list(hidden(model, inputs=torch.randn(examples, 3, 5, 5)).values()) == [(2, 6)]


def test_layers_on_an_axis_of_their_own():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(kill(nn.Linear(8, 6), slice(2 * i)) for i in range(3))
            self.head = nn.Linear(6, 1)

        def forward(self, x):
            return self.head(F.relu(torch.stack([layer(x) for layer in self.layers], 1)).mean(1))

    assert list(hidden(Net()).values()) == [(6, 18)]


def test_losses_of_two_layers_side_by_side():
    """ What has no units has none either where it is stacked. """
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.heads = net(), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

        def forward(self, x):
            return torch.stack([F.relu(1 - head(self.body(x))).mean() for head in self.heads])

    assert list(hidden(Net())) == ['body.1']


def test_real_and_imaginary_parts():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.real, self.imaginary, self.head = kill(nn.Linear(8, 6), slice(2)), nn.Linear(8, 6), nn.Linear(6, 1)

        def forward(self, x):
            z = torch.complex(self.real(x), self.imaginary(x))
            return self.head(torch.complex(F.relu(z.real), F.relu(z.imag)).abs())

    assert sorted(hidden(Net()).values()) == [(0, 6), (2, 6)]


def test_a_hypernetwork():
    class Net(nn.Module):
        def __init__(self, conditional):
            super().__init__()
            self.conditional = conditional
            self.z1, self.z2 = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
            self.make = nn.Linear(4, 64)
            self.make1, self.make2, self.head = nn.Linear(4, 64), nn.Linear(4, 64), nn.Linear(8, 1)

        def forward(self, x):
            if self.conditional:
                w1, w2 = self.make1(x.mean(0)[:4]), self.make2(x.mean(0)[:4])
            else:
                w1, w2 = self.make(self.z1), self.make(self.z2)
            x = torch.relu(F.linear(x, w1.view(8, 8)))
            return self.head(torch.relu(F.linear(x, w2.view(8, 8)) - 1e3))

    for conditional in (False, True):
        assert sorted(hidden(Net(conditional)).values()) == [(0, 8), (8, 8)]


class Experts(nn.Module):
    """ Four experts of 16 units, the second of which is dead, in one parameter. """

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Parameter(torch.rand(4, 8, 16) + .1), nn.Parameter(torch.randn(4, 16, 8))
        with torch.no_grad():
            self.up[1] *= -1
        self.way = way

    def forward(self, x):
        x = x.abs() + .1
        if self.way == 'index':
            return sum(F.relu(x @ self.up[e]) @ self.down[e] for e in range(4))
        if self.way == 'unbind':
            return sum(F.relu(x @ up) @ down for up, down in zip(self.up.unbind(), self.down.unbind(), strict=True))
        if self.way == 'bmm':
            x = x.expand(4, -1, -1)
            return torch.bmm(F.relu(torch.bmm(x, self.up)), self.down).sum(0)
        if self.way == 'matmul':
            return (F.relu(x @ self.up) @ self.down).sum(0)
        if self.way == 'baddbmm':
            hidden = torch.baddbmm(x.new_zeros(4, 1, 16), x.expand(4, -1, -1), self.up)
            return (F.relu(hidden) @ self.down).sum(0)
        if self.way == 'einsum':
            hidden = F.relu(torch.einsum('bc,ecd->ebd', x, self.up))
            return torch.einsum('ebd,edc->bc', hidden, self.down)
        if self.way == 'einsum, own tokens':
            hidden = F.relu(torch.einsum('ebc,ecd->ebd', x.expand(4, -1, -1), self.up))
            return torch.einsum('ebd,edc->bc', hidden, self.down)
        chosen = torch.arange(len(x)) % 4
        if self.way == 'gathered':
            return (F.relu(torch.bmm(x[:, None], self.up[chosen])) @ self.down[chosen]).squeeze(1)
        if self.way == 'gathered, einsum':
            hidden = F.relu(torch.einsum('bc,bcd->bd', x, self.up[chosen]))
            return torch.einsum('bd,bdc->bc', hidden, self.down[chosen])
        order, ends = chosen.argsort(), torch.bincount(chosen, minlength=4).cumsum(0).int()
        hidden = F.relu(F.grouped_mm(x[order], self.up, offs=ends))
        return F.grouped_mm(hidden, self.down, offs=ends)


@pytest.mark.parametrize('way', ['index', 'unbind', 'bmm', 'matmul', 'baddbmm', 'einsum', 'einsum, own tokens',
                                 'gathered', 'gathered, einsum', 'grouped'])
def test_experts_of_one_parameter(way):
    if way == 'grouped' and not hasattr(F, 'grouped_mm'):
        pytest.skip('this torch has no grouped_mm')
    x = X.to(torch.bfloat16) if way == 'grouped' else X
    model = Experts(way).to(x.dtype)
    try:
        model(x)
    except (RuntimeError, NotImplementedError) as ex:
        pytest.skip(f'this torch has no grouped_mm on a CPU: {ex}')
    assert list(hidden(model, inputs=x).items()) == [(f'relu@up.{i}', (16 * (i == 1), 16)) for i in range(4)]


# --- activations that are written out ------------------------------------------------------

def assigned_below(x):
    x = x.clone()
    x[x < 0] = 0
    return x


WRITTEN = {
    'swish': (lambda x: x * torch.sigmoid(x), F.silu), 'quick gelu': (lambda x: x * torch.sigmoid(1.702 * x), None),
    'swish, times': (lambda x: torch.sigmoid(x).mul(x), F.silu), 'in place': (lambda x: x.mul_(x.sigmoid()), F.silu),
    'mish': (lambda x: x * torch.tanh(F.softplus(x)), F.mish),
    'gelu, tanh': (lambda x: .5 * x * (1 + torch.tanh(.7978845608 * (x + .044715 * x ** 3))),
                   lambda x: F.gelu(x, approximate='tanh')),
    'gelu, pow': (lambda x: .5 * x * (1 + torch.tanh(.7978845608 * (x + .044715 * torch.pow(x, 3)))), None),
    'gelu, erf': (lambda x: x * .5 * (1 + torch.erf(x / 2 ** .5)), F.gelu),
    'hard swish': (lambda x: x * F.relu6(x + 3) / 6, F.hardswish),
    'hard swish, clamp': (lambda x: x * (x + 3).clamp(0, 6) / 6, F.hardswish),
    'hard swish, hardtanh': (lambda x: x * (F.hardtanh(x + 3, 0., 6.) / 6), F.hardswish),
    'relu, clamp': (lambda x: x.clamp(min=0), F.relu), 'relu, clip': (lambda x: torch.clip(x, 0), F.relu),
    'relu, clamp_': (lambda x: x.clamp_(min=0.), F.relu), 'relu, clamp_min': (lambda x: x.clamp_min(0), F.relu),
    'relu, maximum': (lambda x: torch.maximum(x, torch.zeros_like(x)), F.relu),
    'relu, max': (lambda x: torch.max(torch.tensor(0.), x), F.relu),
    'relu, fmax': (lambda x: torch.fmax(x, torch.zeros_like(x)), F.relu),
    'relu, where as a method': (lambda x: x.where(x > 0, 0.), F.relu),
    'relu, where': (lambda x: torch.where(x > 0, x, 0.), F.relu),
    'relu, where not': (lambda x: torch.where(x <= 0, torch.zeros_like(x), x), F.relu),
    'relu, product': (lambda x: x * (x > 0), F.relu), 'relu, cast': (lambda x: (x >= 0).float() * x, F.relu),
    'swish, divided': (lambda x: x / (1 + torch.exp(-x)), F.silu),
    'swish, times a fraction': (lambda x: x * (1 / (1 + torch.exp(-x))), F.silu),
    'gelu, erfc': (lambda x: .5 * x * torch.erfc(-x / 2 ** .5), F.gelu),
    'gelu, ndtr': (lambda x: x * torch.special.ndtr(x), F.gelu),
    'mish, log': (lambda x: x * torch.tanh(torch.log1p(torch.exp(x.clamp(max=80)))), None),
    'relu, assigned': (assigned_below, F.relu),
    'relu, fill': (lambda x: x.masked_fill(x < 0, 0), F.relu), 'relu6': (lambda x: x.clamp(0, 6), F.relu6),
}


class Swish(torch.autograd.Function):
    """ Written to save memory. """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize('way', [*WRITTEN, 'autograd.Function'])
def test_written_out(way):
    """ Two units are dead, four are alive on the linear side, where a gate by itself would be saturated. """
    function, same = WRITTEN.get(way, (Swish.apply, F.silu))
    torch.manual_seed(0)
    first = kill(nn.Linear(8, 12), slice(2), -120.)
    with torch.no_grad():
        first.bias[2:6] = 5. if way == 'relu6' else 60.

    class Net(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.first, self.last, self.function = first, nn.Linear(12, 1), function

        def forward(self, x):
            return self.last(self.function(self.first(x)))

    found = hidden(Net(function), inputs=X)
    assert list(found.values()) == [(2, 12)]
    if same is not None:
        assert list(hidden(Net(same), inputs=X)) == list(found)


def test_a_function_of_autograd_is_registered_by_its_class():
    class Sharp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.from_numpy(np.maximum(x.detach().numpy(), 0) ** 1.5)

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = kill(nn.Linear(8, 12), slice(2)), nn.Linear(12, 1)
            self.act = Sharp.apply

        def forward(self, x):
            return self.last(self.act(self.first(x)))

    torch.manual_seed(0)
    model = Net()
    expected = model(X)
    assert not hidden(model)
    with Capture(model, Seen()) as capture:
        model(X)
    assert capture.unseen == {'last': 'Sharp, an autograd.Function that is not registered'}
    for _ in range(2):
        assert register_activation(Sharp, (0.,)) is Sharp
    assert list(hidden(model).values()) == [(2, 12)]
    with torch.no_grad():
        assert list(hidden(model).values()) == [(2, 12)]
    assert torch.equal(model(X), expected)
    gradients = [torch.autograd.grad(y.sum(), model.first.bias)[0] for y in (model(X), expected)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize('leaky', [
    lambda x: torch.where(x > 0, x, .1 * x), lambda x: torch.maximum(x, .1 * x), lambda x: torch.max(.1 * x, x),
    lambda x: torch.where(x <= 0, torch.expm1(x), x)])
def test_written_out_leaky(leaky):
    """ Seen, with no value at which a unit is dead. """
    first, last = nn.Linear(8, 12), nn.Linear(12, 1)
    model = nn.ModuleList([first, last])
    found = hidden(model, lambda x: last(leaky(first(x))))
    assert found == {'leaky_relu': (0, 12)}


def test_gates_of_something_else_stay_gates():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.down, self.up = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
            self.both, self.head = nn.Conv2d(6, 10, 1), nn.Conv2d(5, 1, 1)

        def forward(self, x):
            x = self.conv(x)
            x = x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
            x = F.relu(x)  # the units of conv
            value, gate = self.both(x).chunk(2, 1)
            return self.head(torch.tanh(value) * torch.sigmoid(gate))

    names = list(hidden(Net(), inputs=torch.randn(2, 3, 4, 4)))
    assert names == ['relu@down', 'sigmoid@up', 'relu@conv', 'tanh', 'sigmoid@both']


def test_a_hinge_of_boxes_is_no_relu_of_units():
    """ A clamp between bounds is none. """
    model = net()
    assert hidden(model, lambda x: model[2](model[1](model[0](x)).clamp(0, 640).clamp(min=1e-6))) == {'1': (3, 12)}


# --- units on the right axis ------------------------------------------------------------------

class Attention(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way = way
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 1)

    def forward(self, x):
        b, n, _ = x.shape
        if self.way == 'v, attention transposed':
            q, k, v = self.qkv(x).mT.chunk(3, 1)
            return self.head(F.relu(v @ (q.mT @ k).softmax(-1).mT).mT)
        q, k, v = self.qkv(x).view(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
        if self.way == 'heads in the batch':
            q, k, v = (t.reshape(b * 2, n, 4) for t in (q, k, v))
            y = F.relu(torch.bmm((q @ k.mT).softmax(-1), v)).view(b, 2, n, 4)
        elif self.way == 'einsum':
            y = F.relu(torch.einsum('bhij,bhjd->bhid', torch.einsum('bhid,bhjd->bhij', q, k).softmax(-1), v))
        elif self.way == 'fused':
            y = F.relu(F.scaled_dot_product_attention(q, k, v))
        elif self.way == 'linear':
            q, k = F.elu(q) + 1, F.elu(k) + 1
            y = F.relu((q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1)))
        else:
            scores = q @ k.mT
            y = F.relu((5 * torch.tanh(scores / 5)).softmax(-1) @ v)
        return self.head(y.transpose(1, 2).reshape(b, n, 8))


@pytest.mark.parametrize('way, units', [
    ('v, attention transposed', [8]), ('heads in the batch', [8]), ('einsum', [8]), ('fused', [8]),
    ('linear', [8, 8, 8]), ('soft cap', [8])])
def test_attention(way, units):
    """ The tanh of scores has no units. """
    model = Attention(way)
    for sizes in ((3, 5), (2, 7)):
        found = hidden(model, inputs=torch.randn(*sizes, 8), times=1)
        assert [own for _, own in found.values()] == units
    if way == 'soft cap':
        with Capture(model, Seen(), everything=False) as capture:
            model(torch.randn(2, 5, 8))
        assert {site.function for site in capture.without_units & capture.hidden} == {'tanh'}


class Rearranged(nn.Module):
    def __init__(self, layer, between, head):
        super().__init__()
        self.layer, self.between, self.head = layer, between, head

    def forward(self, x):
        return self.head(F.relu(self.between(self.layer(x))))


def graph_attention(x):
    h = x.view(-1, 3, 4)
    return (h.mean(-1, keepdim=True).softmax(0) * h).reshape(-1, 12)


def broadcast_attention(x):
    h = x.view(-1, 3, 4)
    return (h.sum(-1).softmax(0).unsqueeze(-1) * h).view(-1, 12)


REARRANGED = {
    'graph attention': (nn.Linear(8, 12), graph_attention, nn.Linear(12, 1), (9, 8), 12),
    'graph attention, sum': (nn.Linear(8, 12), broadcast_attention, nn.Linear(12, 1), (9, 8), 12),
    'adjacency': (nn.Linear(8, 12), lambda x: torch.ones(9, 9) @ x, nn.Linear(12, 1), (9, 8), 12),
    'pixel shuffle': (nn.Conv2d(3, 12, 1), lambda x: F.pixel_shuffle(x, 2), nn.Conv2d(3, 1, 1), (2, 3, 4, 6), 3),
    'pixel shuffle by hand': (
        nn.Conv2d(3, 12, 1),
        lambda x: x.view(2, 3, 2, 2, 4, 6).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 8, 12), nn.Conv2d(3, 1, 1),
        (2, 3, 4, 6), 3),
    'unpatchify': (
        nn.Linear(8, 2 * 2 * 5),
        lambda x: x.view(2, 3, 4, 2, 2, 5).permute(0, 5, 1, 3, 2, 4).reshape(2, 5, 6, 8), nn.Conv2d(5, 1, 1),
        (2, 12, 8), 5),
    'anchors': (
        nn.Conv2d(3, 9, 1), lambda x: x.view(2, 3, 3, *x.shape[2:]).permute(0, 3, 4, 1, 2).reshape(2, -1, 3),
        nn.Linear(3, 1), (2, 3, 4, 5), 3),
    'channels shuffled': (
        nn.Conv2d(3, 12, 1), lambda x: x.view(2, 3, 4, 4, 5).transpose(1, 2).reshape(2, 12, 4, 5),
        nn.Conv2d(12, 1, 1), (2, 3, 4, 5), 12),
    'channels in the batch': (
        nn.Conv2d(3, 12, 1), lambda x: x.reshape(24, 1, 4, 5), lambda x: nn.Conv2d(12, 1, 1)(x.view(2, 12, 4, 5)),
        (2, 3, 4, 5), 12),
    'maxout': (nn.Linear(8, 12), lambda x: x.view(-1, 4, 3).amax(-1), nn.Linear(4, 1), (9, 8), 4),
    'concatenated': (nn.Linear(8, 12), lambda x: torch.cat([x, -x], 1), nn.Linear(24, 1), (9, 8), 24),
    'indexed': (nn.Linear(8, 12), lambda x: x[:, None, :][..., 2:8], nn.Linear(6, 1), (9, 8), 6),
    'masked': (nn.Linear(8, 12), lambda x: x[x.sum(-1) > -1e9], nn.Linear(12, 1), (2, 9, 8), 12),
    'assigned': (nn.Linear(8, 12), lambda x: assigned(x), nn.Linear(12, 1), (9, 8), 12),
    'tokens first': (nn.Linear(8, 12), lambda x: x.permute(2, 0, 1).flatten(1), lambda x: nn.Linear(12, 1)(x.T),
                     (2, 9, 8), 12),
}


def assigned(x):
    out = torch.zeros_like(x)
    out[torch.arange(len(x))] = x
    return out


@pytest.mark.parametrize('way', REARRANGED)
def test_rearranged(way):
    layer, between, head, shape, units = REARRANGED[way]
    found = hidden(Rearranged(layer, between, head if isinstance(head, nn.Module) else nn.Identity()),
                   inputs=torch.randn(shape))
    assert [own for _, own in found.values()] == [units]


def test_patches_of_einops():
    einops = pytest.importorskip('einops', reason='einops is not installed')
    model = nn.Sequential(nn.Linear(8, 20), nn.Identity(), nn.Conv2d(5, 1, 1))
    found = hidden(model, lambda x: model[2](F.relu(einops.rearrange(
        model[0](x), 'b (h w) (p q c) -> b c (h p) (w q)', h=3, p=2, q=2))), inputs=torch.randn(2, 12, 8))
    assert [own for _, own in found.values()] == [5]


# --- what is not seen is said; names; subclasses ---------------------------------------------

def test_scripted_parts_are_one_layer():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that it is deprecated
        scripted = torch.jit.script(net(out=5))
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), scripted, nn.ReLU(), nn.Linear(5, 1))
    seen = Seen()
    with Capture(model, seen, everything=False) as capture:
        model(X)
    assert {site.module for site in capture.hidden} == {'1', '3'} and capture.unseen == {'2': 'torch.jit'}
    assert seen.units() == [8, 5]


def test_transforms_of_functions_are_named():
    model = net()
    with Capture(model, Seen()) as capture:
        torch.func.vmap(model)(X)
    assert capture.unseen == {'1': 'a transform of torch.func'}


class Marked(torch.Tensor):
    """ A subclass that counts what is done with it. """
    calls = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_are_measured_as_plain_tensors():
    model, types = net(), set()
    expected = hidden(model)
    model(X.as_subclass(Marked))
    without, Marked.calls = Marked.calls, 0
    with Capture(model, lambda site, output, *others: types.add(type(output)), everything=False):
        model(X.as_subclass(Marked))
    assert types == {torch.Tensor} and Marked.calls == without
    assert hidden(model, inputs=X.as_subclass(Marked)) == expected


def test_a_shared_activation_is_named_after_its_block():
    class Block(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.fc, self.act = nn.Linear(8, 8), act

        def forward(self, x):
            return self.act(self.fc(x))

    act = nn.ReLU()
    assert list(hidden(nn.Sequential(Block(act), Block(act), nn.Linear(8, 1)))) == ['0.act', '1.act']
