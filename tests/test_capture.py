"""
What a capture sees, how it names it, and that it leaves nothing behind.
"""
import copy
import warnings
import weakref

import pytest
import torch
from conftest import BUILT_IN_ACTIVATIONS
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode
from torch.utils.checkpoint import checkpoint
from zoo import Kernels, Seen

from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations import functions
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.capture import Capture
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.functions import register_activation
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.kinds import kind_of
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.modules import fused_modules
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.sites import site_names


def watch(model, *inputs, times=1, **kwargs):
    seen = Seen()
    for _ in range(times):
        with Capture(model, seen):
            model(*inputs, **kwargs)
    return seen


def names(seen):
    return list(site_names(seen.sites).values())


def attached():
    """ All that a capture attaches to torch. """
    return (len(torch_module._global_forward_hooks), len(torch_module._global_forward_pre_hooks),
            len(torch_module._global_forward_hooks_always_called), len(torch_module._global_forward_hooks_with_kwargs),
            _get_current_function_mode(), str(torch._dynamo.eval_frame._stance.stance))


# --- sites -------------------------------------------------------------------------

class Block(nn.Module):
    """ Residual, with one nn.ReLU for both. """

    def __init__(self, width=4):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.conv2(self.relu(self.bn1(self.conv1(x))))
        out += x
        return self.relu(out)


def test_one_module_used_twice():
    seen = watch(nn.Sequential(Block(), Block()), torch.randn(2, 4, 3, 3), times=3)
    assert names(seen) == ['0.relu@conv1', '0.relu@conv2', '1.relu@conv1', '1.relu@conv2']
    assert len(seen.calls) == 12


def test_one_module_shared_by_blocks():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 4), relu, nn.Linear(4, 5), relu, nn.Linear(5, 6), relu)
    seen = watch(model, torch.randn(2, 3), times=2)
    assert names(seen) == ['1@0', '1@2', '1@4']
    assert seen.units() == [4, 5, 6]


class Items(nn.Module):
    """ As geowatch's models: items of different shapes, that can be missing, in one forward. """

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, batch):
        out = []
        for item in batch:
            if item is None:
                continue
            for frame in item['frames']:
                x = F.relu(self.stem(frame['image']))
                out.append(torch.tanh(self.head(x.mean((2, 3)))))
        return {'out': out, 'nested': [(out, None), {'n': len(out)}]}


def item(*sizes):
    return {'frames': [{'image': torch.randn(n, 3, h, w)} for n, h, w in sizes]}


def test_items_are_one_site():
    batch = [item((1, 8, 9), (2, 5, 5)), None, item((1, 4, 7)), item(), item((0, 8, 8)), None]
    seen = watch(Items(), batch, times=2)
    assert names(seen) == ['relu', 'tanh']
    assert seen.units() == [4, 5]
    assert len(seen.calls) == 2 * 2 * 3  # the empty frame has no samples
    assert not watch(Items(), [None, item()]).calls


class Loop(nn.Module):
    """ A recurrent loop that slices the time steps of one projection. """

    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(3, 4)
        self.state = nn.Linear(4, 4)

    def forward(self, x):
        hidden = x.new_zeros(len(x), 4)
        for step in self.inputs(x).unbind(1):
            hidden = torch.tanh(step + self.state(hidden))
        return hidden


class Sliced(nn.Module):
    """ One layer for all time steps, then an activation for each. """

    def __init__(self, cut):
        super().__init__()
        self.inputs = nn.Linear(3, 4)
        self.cut = cut

    def forward(self, x):
        return [torch.relu(part) for part in self.cut(self.inputs(x))]


def test_time_steps_are_one_site():
    for steps in (1, 6):
        seen = watch(Loop(), torch.randn(2, steps, 3))
        assert names(seen) == ['tanh'] and len(seen.calls) == steps
    for cut in (lambda x: x.unbind(1), lambda x: [x[:, t] for t in range(6)], lambda x: x.chunk(3, dim=1),
                lambda x: x.split(2, dim=1), lambda x: [x.select(1, t) for t in range(6)]):
        seen = watch(Sliced(cut), torch.randn(2, 6, 3))
        assert names(seen) == ['relu'] and seen.units() == [4]


def test_both_signs_are_two_sites():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            x = self.fc(x)
            return torch.cat([torch.relu(x), torch.relu(-x)], dim=1)

    seen = watch(Both(), torch.randn(9, 3), times=2)
    assert names(seen) == ['relu@fc#1', 'relu@fc#2']
    assert seen.units() == [4, 4]


def test_two_activations_on_one_layer():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            x = self.fc(x)
            return torch.tanh(x) * torch.sigmoid(x)

    assert names(watch(Gate(), torch.randn(2, 3), times=2)) == ['tanh', 'sigmoid']


def test_names_have_no_prefixes_of_wrappers():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self._forward_module = nn.Sequential(nn.Linear(3, 4), nn.ReLU())

        def forward(self, x):
            return self._forward_module(x)

    assert names(watch(Wrapped(), torch.randn(2, 3))) == ['1']
    compiled = torch.compile(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), backend='eager')
    assert names(watch(compiled, torch.randn(2, 3))) == ['1']


def test_a_normalized_weight_is_of_its_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
            self.fc2 = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5))

        def forward(self, x):
            return torch.relu(self.fc2(torch.relu(self.fc1(x))))

    assert names(watch(Net(), torch.randn(2, 3))) == ['relu@fc1', 'relu@fc2']


def test_the_model_need_not_be_called_itself():
    """ As in geowatch, where a step calls the parts and never forward. """
    model = nn.ModuleDict({'fc': nn.Linear(3, 4), 'act': nn.ReLU()})
    seen = Seen()
    with Capture(model, seen):
        model['act'](model['fc'](torch.randn(2, 3)))
        torch.sigmoid(torch.randn(2, 3))
    assert names(seen) == ['act', 'sigmoid']


def test_activations_of_weights_have_no_samples():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)
            self.gate = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return torch.relu(self.fc(x)) * torch.sigmoid(2 * self.gate)

    assert names(watch(Gated(), torch.randn(2, 3))) == ['relu']


# --- nothing stays -------------------------------------------------------------------

class Fails(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.error = error

    def forward(self, x):
        x = self.inner(x)
        if self.error:
            raise self.error
        return x


def test_nothing_stays_after_a_window():
    before = attached()
    model = Fails(None)
    keys = [set(vars(module)) for module in model.modules()]
    with Capture(model, Seen()):
        assert attached() != before
        model(torch.randn(2, 3))
    assert attached() == before
    assert [set(vars(module)) for module in model.modules()] == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    copy.deepcopy(model)


@pytest.mark.parametrize('error', [RuntimeError('of the model'), KeyboardInterrupt(), SystemExit()])
def test_nothing_stays_after(error):
    before = attached()
    model = nn.Sequential(Fails(error))
    seen = Seen()
    with pytest.raises(type(error)), Capture(model, seen):
        model(torch.randn(2, 3))
    assert attached() == before
    model[0].error = None
    assert names(watch(model, torch.randn(2, 3))) == names(seen) == ['0.inner.1']


def test_an_exception_that_the_model_catches():
    class Catches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Fails(RuntimeError()), Fails(None)

        def forward(self, x):
            try:
                return self.first(x)
            except RuntimeError:
                return self.second(x)

    assert names(watch(Catches(), torch.randn(2, 3), times=2)) == ['first.inner.1', 'second.inner.1']


def test_an_error_of_ours_never_reaches_the_model():
    def observe(site, *args):
        if site.module == '1':
            raise ValueError('ours')
        seen.append(site.module)

    errors, seen = [], []
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.ReLU())
    before = attached()
    with Capture(model, observe, on_error=lambda *error: errors.append(error)):
        y = model(torch.ones(2, 3))
    assert torch.equal(y, model(torch.ones(2, 3)))
    assert [(path, str(error)) for path, error in errors] == [('1', 'ours')]
    assert seen == ['2']  # it sees the others
    assert attached() == before
    with pytest.raises(ValueError, match='ours'), Capture(model, observe):
        model(torch.ones(2, 3))
    assert attached() == before


class Alive(nn.Module):
    """ Counts at each layer how many earlier activations still exist. """

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x):
        refs, self.counts = [], []
        for layer in self.layers:
            hidden = layer(x)
            x = F.relu(hidden)
            refs += [weakref.ref(hidden), weakref.ref(x)]
            del hidden
            self.counts.append(sum(ref() is not None for ref in refs))
        self.refs = refs
        return x.sum()


@pytest.mark.parametrize('grad', [False, True], ids=['eval', 'train'])
def test_no_activation_is_kept_alive(grad):
    model = Alive()
    with torch.set_grad_enabled(grad):
        model(torch.randn(4, 8))
        counts = model.counts
        shapes = []
        with Capture(model, lambda site, output, *others: shapes.append(output.shape)):
            y = model(torch.randn(4, 8))
            assert model.counts == counts
            if grad:
                y.backward()
            del y
            assert not any(ref() is not None for ref in model.refs)
        assert len(shapes) == 6
    if not grad:
        assert counts == [1] * 6


def test_memory_of_storages():
    """ Bytes of float storage that exist at each kernel are the same with a capture. """
    class Bytes(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.refs, self.peak = {}, 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                self.refs[weakref.ref(output)] = output.numel()
            self.peak = max(self.peak, sum(n for ref, n in self.refs.items() if ref() is not None))
            return output

    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True)) for _ in range(4)))
    x = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        with Bytes() as without:
            model.eval()(x)
        with Capture(model, lambda *args: None), Bytes() as within:
            model(x)
    # Only the view that an observer gets of the activation, of the same storage.
    assert within.peak <= without.peak + 2 * 4 * 14 * 14


# --- repeated, compiled, fused ---------------------------------------------------------

class Checkpointed(nn.Module):
    def __init__(self, reentrant=False, wrap=True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
        self.reentrant, self.wrap = reentrant, wrap

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=self.reentrant) if self.wrap else self.body(x)


@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointing_counts_once(reentrant):
    model, seen = Checkpointed(reentrant), Seen()
    x = torch.randn(2, 3, requires_grad=True)
    with Capture(model, seen):
        with Kernels() as kernels:
            torch.autograd.backward(model(x).sum())  # which, unlike x.backward(), runs under modes
    assert len([name for name, _ in kernels.calls if name in {'relu', 'tanh'}]) == 4  # it did run twice
    assert names(seen) == ['body.1', 'body.3'] and len(seen.calls) == 2


def test_compiled_gives_equal_numbers_and_no_recompiles():
    torch.manual_seed(0)
    plain = nn.Sequential(Block(), Block()).eval()
    with torch.no_grad():
        plain[0].conv1.weight[:2] = 0
        plain[0].bn1.bias[:2] = -100
        plain[0].conv1.bias[:2] = 0
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    inner = copy.deepcopy(plain)
    inner[0] = torch.compile(inner[0], backend=backend)
    for model in (torch.compile(copy.deepcopy(plain), backend=backend), inner):
        x = torch.randn(2, 4, 3, 3)
        with torch.no_grad():
            model(x), plain(x)
            compiled = len(graphs)
            assert compiled
            expected = watch(plain, x)
            seen = watch(model, x, times=2)
            assert {name: seen.dead()[site] for site, name in site_names(seen.sites).items()} == {
                name: expected.dead()[site] for site, name in site_names(expected.sites).items()}
            assert expected.dead()[expected.sites[0]] == (2, 4)
            model(x)
        assert len(graphs) == compiled
    torch._dynamo.reset()


def encoder(**kwargs):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=10, batch_first=True, **kwargs)
    model = nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.linear1.weight[:5] = 0
            layer.linear1.bias[:5] = -100
    return model


@pytest.mark.parametrize('activation', ['relu', 'gelu'])
@pytest.mark.parametrize('masked', [False, True], ids=['all tokens', 'padded'])
def test_fast_path_of_the_encoder(activation, masked):
    model = encoder(activation=activation)
    x = torch.randn(3, 7, 8)
    kwargs = {'src_key_padding_mask': torch.arange(7).expand(3, 7) > torch.tensor([[6], [4], [2]])} if masked else {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of nested tensors, a prototype
        expected = model(x, **kwargs)
        seen = Seen()
        with Kernels() as kernels, Capture(model, seen):
            output = model(x, **kwargs)
    assert torch.equal(output, expected)  # bit for bit
    assert [name for name, _ in kernels.calls] == ['fast path'] * 2 + [activation] * 2
    assert names(seen) == [f'layers.{i}.{activation}' for i in range(2)]
    assert list(seen.dead().values()) == [(5, 10)] * 2


def test_slow_path_of_the_encoder():
    model = encoder().train()
    seen = watch(model, torch.randn(3, 7, 8))
    assert list(seen.dead().values()) == [(5, 10)] * 2
    model.eval()  # with gradients there is no fast path either
    assert list(watch(model, torch.randn(3, 7, 8)).dead().values()) == [(5, 10)] * 2


def test_after_the_fast_path_the_trail_goes_on():
    model = nn.Sequential(encoder(), nn.ReLU())
    with torch.no_grad():
        seen = watch(model, torch.randn(3, 7, 8), times=2)
    assert names(seen) == ['0.layers.0.relu', '0.layers.1.relu', '1']
    assert seen.units() == [10, 10, 8]


def test_kernels_that_show_nothing_are_named():
    model = nn.ModuleDict({'rnn': nn.LSTM(3, 4), 'cell': nn.GRUCell(3, 4), 'att': nn.MultiheadAttention(4, 2)})
    reasons = fused_modules(model)
    assert set(reasons) == {'rnn', 'cell', 'att'}
    assert 'LSTM' in reasons['rnn'] and 'fused' in reasons['rnn']

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.fc = nn.LSTM(3, 4), nn.Linear(4, 5)

        def forward(self, x):
            x = self.rnn(x)[0]
            return torch.relu(self.fc(F.scaled_dot_product_attention(x, x, x)))

    seen, net = Seen(), Net()
    with Capture(net, seen) as capture:
        net(torch.randn(6, 2, 3))
    assert set(capture.unseen) == {'rnn', ''}
    assert capture.unseen == {'rnn': 'lstm', '': 'scaled_dot_product_attention'}
    assert names(seen) == ['relu']


def test_functorch_is_left_alone():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(5, 3)

    def run():
        return torch.func.vmap(model)(x), torch.func.grad(lambda row: model(row).sum())(x[0])

    expected, seen = run(), Seen()
    with Capture(model, seen):
        got = run()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not seen.sites


def test_autocast_sees_what_the_network_computed():
    model, types = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), []

    def observe(site, output, *others):
        types.append((output.dtype, (output.float().T @ output.float()).dtype, torch.is_grad_enabled()))

    with torch.autocast('cpu', dtype=torch.bfloat16), Capture(model, observe):
        model(torch.randn(2, 3))
    assert types == [(torch.bfloat16, torch.float32, False)]


def test_random_numbers_and_results_stay():
    model = nn.Sequential(nn.Linear(3, 40), nn.Dropout(.5), nn.ReLU(inplace=True))
    results = []
    for capture in (False, True):
        torch.manual_seed(3)
        x = torch.randn(2, 3)
        if capture:
            with Capture(model, Seen()):
                results.append((model(x), torch.rand(1)))
        else:
            results.append((model(x), torch.rand(1)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- activations of users -----------------------------------------------------------------

@pytest.fixture
def table():
    """ The table of saturated values, put back afterwards. """
    before = dict(functions.SATURATED_VALUES)
    yield functions.SATURATED_VALUES
    functions.SATURATED_VALUES.clear()
    functions.SATURATED_VALUES.update(before)


def test_register_a_module(table):
    class Squared(nn.Module):
        def forward(self, x):
            return torch.relu(x).square()

    model = nn.Sequential(nn.Linear(3, 4), Squared())
    assert watch(model, torch.randn(2, 3)).sites[0].function == 'relu'
    assert register_activation(Squared, (0.,)) is Squared
    seen = watch(model, torch.randn(2, 3), times=2)
    assert [site.function for site in seen.sites] == ['Squared']  # and not the relu inside
    assert names(seen) == ['1'] and len(seen.calls) == 2


def test_register_a_function_of_torch(table):
    model = nn.Sequential(nn.Linear(3, 4))
    call = model.forward
    model.forward = lambda x: torch.sinh(call(x))
    assert not watch(model, torch.randn(2, 3)).calls
    register_activation(torch.sinh, (0.,))
    assert watch(model, torch.randn(2, 3)).units() == [4]


def test_saturated_values_that_follow_from_the_arguments(table):
    register_activation('clamp', lambda x, min=None, max=None: tuple(float(v) for v in (min, max) if v is not None))
    values = []
    with Capture(nn.Identity(), lambda site, output, axis, saturated, level: values.append(saturated)):
        torch.clamp(torch.randn(2, 3), 0)
        torch.randn(2, 3).clamp_(-1, max=2)
        F.elu(torch.randn(2, 3), .5)
        F.hardtanh(torch.randn(2, 3), -2, 3)
        F.threshold(torch.randn(2, 3), 1, 7)
    assert values == [(0,), (-1, 2), (-.5,), (-2, 3), (7,)]


@pytest.mark.parametrize('function, values, words', [
    (3, (0.,), '`function`'), (torch.relu, 'abc', '`saturated_values`'), (dict, (0.,), 'torch.nn.Module')])
def test_register_wrong_input(function, values, words, table):
    with pytest.raises(ValueError, match=words):
        register_activation(function, values)


def test_every_function_in_the_table_exists():
    """ So that a name with a typing error cannot pass for an activation. """
    def exists(name):
        return any(hasattr(place, name) for place in (
            torch, F, torch._C._nn, torch.Tensor)) or hasattr(torch.special, name.removeprefix('special_'))

    from_transformers = {name for name in BUILT_IN_ACTIVATIONS if name.endswith('Activation')}
    assert [name for name in BUILT_IN_ACTIVATIONS if name not in from_transformers and not exists(name)] == []
    if from_transformers:
        activations = pytest.importorskip('transformers.activations', reason='transformers is not installed')
        assert [name for name in from_transformers if not hasattr(activations, name)] == []


def test_cost_of_names():
    """ What is looked up for each call is looked up once. """
    kind_of.cache_clear()
    watch(nn.Sequential(*(nn.ReLU() for _ in range(50))), torch.randn(2, 3))
    info = kind_of.cache_info()
    assert info.misses <= 3 and info.hits >= 47


@pytest.mark.xfail(strict=True, reason='a site is told by the layer that made its input, here chosen by the data')
def test_one_activation_behind_a_choice_of_layers():
    """ As UNetBaseline's first ReLU, behind the tokenizer of whichever sensor the last frame has. """
    class Sensors(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokenizers = nn.ModuleDict({'S2': nn.Linear(3, 4), 'L8': nn.Linear(2, 4)})
            self.backbone = nn.Sequential(nn.ReLU(), nn.Linear(4, 4))

        def forward(self, item):
            return self.backbone(self.tokenizers[item['sensor']](item['data']))

    model, seen = Sensors(), Seen()
    with Capture(model, seen):
        for sensor, bands in (('S2', 3), ('L8', 2)):
            model({'sensor': sensor, 'data': torch.randn(5, bands)})
    assert seen.units() == [4]
