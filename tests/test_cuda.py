"""
On a GPU: what every metric is there, and how often the host waits for it.

All of it runs on the CPU too, so that what a test does is known to work. Without a GPU those on one are skipped. The
rules by which nothing waits are checked on a device that is not there as well: torch follows what would happen on it.
Times on a GPU are measured by ``tests/benchmarks/gpu.py``.
"""
import contextlib
import functools
import json
import tempfile
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import references
import torch
from common import ACTIVATIONS, NOISE, Net, fit, make_net, measure_calls, measure_tensors
from pytorch_lightning.plugins.precision import MixedPrecision
from test_cost import READS, Watch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.measurement import additive_keys, derive, needed_keys
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources import STEP_SOURCES
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations import capture, readable
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.sites import Site
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.window import Window
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics import rows, spectrum, sums
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.calls import Call
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason='there is no GPU: torch.cuda.is_available() is False'))]


# Operations that give as many numbers as the device finds.
SELECT = {torch.ops.aten.nonzero, torch.ops.aten.masked_select, torch.ops.aten._unique2, torch.ops.aten.unique_dim}


@pytest.fixture(autouse=True)
def in_full_precision():
    """ By default convolutions on a GPU round what they multiply to ten bits. """
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def generator():
    return torch.Generator().manual_seed(5)


# --- of raw tensors --------------------------------------------------------------

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('device', DEVICES)
def test_of_tensors(device, dtype):
    shapes = {'conv': (6, 3, 2, 2), 'wide': (5, 40), 'tall': (40, 5), 'same size': (5, 40), 'thin': (1, 7)}
    given = {name: torch.randn(shape, generator=generator()).to(device, dtype) for name, shape in shapes.items()}
    given['conv'] = given['conv'].to(memory_format=torch.channels_last)
    arrays = {name: x.double().cpu().numpy() for name, x in given.items()}
    for name, reference in references.OF_TENSORS.items():
        value, layers = measure_tensors(name, given)
        assert [own['value'] for own in layers.values()] == pytest.approx(
            list(map(reference, arrays.values())), rel=1e-5)
        assert value == pytest.approx(references.of_network(name, list(arrays.values())), rel=1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('device', DEVICES)
def test_of_calls(device, dtype):
    inputs = {'tokens': torch.randn(10, 15, 12, generator=generator()),
              'images': torch.randn(10, 7, 3, 5, generator=generator())}
    for z in inputs.values():
        z[:, :, 0] -= 9.
    inputs = {name: z.to(device, dtype) for name, z in inputs.items()}
    inputs['images'] = inputs['images'].to(memory_format=torch.channels_last)
    axes = {'tokens': 2, 'images': 1}
    batches = [[(Site(name, 'relu', units=z.shape[axes[name]]), part.relu(), axes[name], (0.,))
                for name, z in inputs.items() for part in [z[i:i + 5]]] for i in (0, 5)]
    flat = [z.movedim(axes[name], -1).flatten(0, -2).double().cpu().numpy() for name, z in inputs.items()]
    pairs = [(z, np.maximum(z, 0)) for z in flat]
    for name, reference in references.OF_CALLS.items():
        value, layers = measure_calls(name, batches)
        assert [own['value'] for own in layers.values()] == pytest.approx(
            [reference(*pair) for pair in pairs], rel=1e-5)
        assert value == pytest.approx(references.of_network(name, pairs), rel=1e-5)


# --- in a run --------------------------------------------------------------------

class Images(Net):
    """ Convolutions and layers, with units that are dead. """

    def __init__(self, fused=False):
        super().__init__()
        self.fused = fused
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.GELU(),
            nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 4))
        del self.fc1, self.act, self.fc2, self.head
        with torch.no_grad():
            self.net[0].bias[:2] = -100
            self.net[2].bias[:3] = -100

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, fused=self.fused)


def batches(dtype=torch.float32, memory_format=torch.contiguous_format):
    """ The last one is shorter. """
    images, labels = torch.randn(37, 3, 8, 8, generator=generator()), torch.arange(37) % 4
    images += 2 * labels[:, None, None, None] * torch.randn(1, 3, 8, 8, generator=generator())
    return DataLoader([(x.to(dtype, memory_format=memory_format), y) for x, y in zip(
        images.split(8), labels.split(8), strict=True)], batch_size=None)


def train(folder, net, loader, device='cpu', metrics='all', **kwargs):
    """ From metric and step to the value and those of layers. """
    monitor = PlasticityMonitor(metrics, interval=2, source='train', samples=8)
    _, _, lines, _ = fit(folder, monitor, net, loader=loader, validate=False, max_epochs=1, logger=False,
                         accelerator='gpu' if device == 'cuda' else device, devices=1, **kwargs)
    return {(line['metric'], line['step']): [line['value'], *(own['value'] for own in line['layers'].values())]
            for line in lines}


@functools.cache
def in_float64():
    """ Of the same run on the CPU. """
    with tempfile.TemporaryDirectory() as folder:
        return train(folder, make_net(Images).double(), batches(torch.float64))


def scaled(device):
    return MixedPrecision('16-mixed', device, torch.amp.GradScaler(device, init_scale=1024.))


CASES = ('float32', 'bf16-mixed', '16-mixed', '16-mixed, fused', 'compiled', 'channels-last')


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('device', DEVICES)
def test_in_a_run(tmp_path, device, case):
    net, kwargs, loader, metrics = make_net(Images, fused='fused' in case), {}, batches(), 'all'
    if case == 'bf16-mixed':
        kwargs = {'precision': case}
    if case.startswith('16-mixed'):
        kwargs = {'plugins': [scaled(device)]}
    if case == 'compiled':
        # Of what is compiled the pieces of a batch are not known. Where there is a GPU there is Triton.
        metrics = [name for name in METRICS if name not in NOISE]
        net.net.compile(backend='inductor' if device == 'cuda' else 'eager')
    if case == 'channels-last':
        net, loader = net.to(memory_format=torch.channels_last), batches(memory_format=torch.channels_last)
    found, expected = train(tmp_path, net, loader, device, metrics, **kwargs), in_float64()
    assert found.keys() == {key for key in expected if key[0] in METRICS and (metrics == 'all' or key[0] in metrics)}
    assert {name for name, _ in found} == set(METRICS if metrics == 'all' else metrics)
    for (name, step), values in found.items():
        if '16' in case:  # the noise scale is a ratio of small differences
            close = {'rel': 0.1 if name == 'noise_scale' else 0.03, 'abs': 0.02}
        else:
            close = {'rel': 1e-4, 'abs': 1e-4}
        assert values == pytest.approx(expected[name, step], **close), (name, step)


# --- how often the host waits ------------------------------------------------------

class Waits:
    """ Counts what makes the host wait for a device: what torch warns of on a GPU, reads of tensors on the CPU. """

    def __init__(self, device, monkeypatch):
        self.count = 0
        self._device = device
        self._open = contextlib.ExitStack()
        if device == 'cpu':
            self._patch(monkeypatch)

    def _patch(self, monkeypatch):
        # As on a device: on the CPU we look at sums where they are, which costs nothing.
        monkeypatch.setattr(sums, '_sums_on_cpu', sums._sums_on_device)
        monkeypatch.setattr(Call, '_seems_finite', lambda call: False)
        self.is_open = False
        for name in READS:
            monkeypatch.setattr(torch.Tensor, name, self._counting(getattr(torch.Tensor, name)))

    def _counting(self, original):
        def method(tensor, *args, **kwargs):
            self.count += self.is_open
            return original(tensor, *args, **kwargs)
        return method

    def __enter__(self):
        with contextlib.ExitStack() as opened:
            if self._device == 'cpu':
                self.is_open = True
                opened.callback(setattr, self, 'is_open', False)
                opened.enter_context(Selects(self))
            else:
                before = torch.cuda.get_sync_debug_mode()
                opened.callback(lambda said: setattr(self, 'count', self.count + sum(
                    'synchronizing CUDA' in str(one.message) for one in said)),
                    opened.enter_context(warnings.catch_warnings(record=True)))
                warnings.simplefilter('always')
                torch.cuda.set_sync_debug_mode('warn')
                opened.callback(torch.cuda.set_sync_debug_mode, before)
            self._open = opened.pop_all()

    def __exit__(self, *exc):
        self._open.close()


class Selects(TorchDispatchMode):
    """ Counts what only the device knows the size of. """

    def __init__(self, waits):
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(
            x is not None and x.dtype is torch.bool for x in args[1])
        self._waits.count += by_mask or func.overloadpacket in SELECT
        return func(*args, **(kwargs or {}))


class Waited(Images):
    """ Notes how often the host has waited in each step, in hooks of the monitor and while it looks. """
    waits = None

    def training_step(self, batch, batch_idx):
        with self.waits:
            return super().training_step(batch, batch_idx)

    def backward(self, loss):
        with self.waits:
            super().backward(loss)

    def on_train_batch_end(self, *args):
        self.steps.append(self.waits.count)
        self.waits.count = 0


class WaitedFor(Watch):
    waits = None

    def watch(self, name):
        return self.waits


@pytest.mark.parametrize('metrics', ['all', [name for name, metric in METRICS.items() if not any(
    'spectrum' in need.field for need in metric.needs)]], ids=['all', 'no ranks'])
@pytest.mark.parametrize('fused', [False, True], ids=['float32', '16-mixed, fused'])
@pytest.mark.parametrize('device', DEVICES)
def test_waits(tmp_path, monkeypatch, device, fused, metrics):
    solved = []
    solve = spectrum.singular_values
    monkeypatch.setattr(spectrum, 'singular_values', lambda x: solved.append(x.shape) or solve(x))
    net, monitor = make_net(Waited, fused=fused), WaitedFor(metrics, interval=3, source='train', samples=8)
    net.waits = monitor.waits = Waits(device, monkeypatch)
    net.steps = []
    _, _, lines, _ = fit(tmp_path, monitor, net, loader=batches(), validate=False, max_epochs=2, logger=False,
                         accelerator='gpu' if device == 'cuda' else device, devices=1,
                         **({'plugins': [scaled(device)]} if fused else {}))
    measured = {line['metric'] for line in lines}
    assert measured == set(METRICS if metrics == 'all' else metrics)
    logged = {2, 5, 8}
    assert len(net.steps) == 10 and {line['step'] for line in lines} == logged
    # The untrained network is measured in the first step.
    assert {step for step, count in enumerate(net.steps) if count} == {0, *logged}
    if device == 'cpu' or not solved:
        assert {net.steps[step] for step in logged} == {1}
    else:  # a solver looks at its own results: once for all matrices of one size
        assert sum(net.steps[step] for step in logged) <= len(logged) + len(solved)


@pytest.mark.parametrize('device', DEVICES)
def test_what_waits_is_counted(monkeypatch, device):
    waits, x = Waits(device, monkeypatch), torch.ones(3, device=device)
    for wait in (lambda: x.sum().item(), lambda: bool(x[0]), x.tolist, x.cpu, lambda: x[x > 2], x.nonzero,
                 lambda: torch.unique(x)):
        before = waits.count
        with waits:
            wait()
        assert waits.count > before
    before = waits.count
    with waits:
        (x + 1).sum().sqrt()
    assert waits.count == before


# --- on a device that is not there ---------------------------------------------------

class Crossings(TorchDispatchMode):
    """ Notes what is copied from one device to another. """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            devices = {x.device.type for x in (*args, output) if isinstance(x, torch.Tensor)}
            if len(devices) > 1:
                self.found.append(devices)
        return output


@contextlib.contextmanager
def elsewhere():
    """ Tensors on a GPU that have no numbers: what asks for one fails. """
    rows._choice.cache_clear()
    with FakeTensorMode(), Crossings() as crossings:
        yield crossings
    rows._choice.cache_clear()


def fields_of(source):
    return [field for own, field in additive_keys(METRICS.values()) if own == source]


def spectra_of(source, found):
    keys = [key for key in needed_keys(METRICS.values()) if key[0] == source]
    return derive({(source, field): own for field, own in found.items()}, keys, lambda *args: contextlib.nullcontext())


@pytest.mark.parametrize('name', [name for name, source in STEP_SOURCES.items() if not source.sees_backward])
def test_a_source_never_waits(name):
    with elsewhere() as crossings:
        scaler = types.SimpleNamespace(_scale=torch.ones((), device='cuda'))
        source = STEP_SOURCES[name](fields_of(name), lambda *args: contextlib.nullcontext(), 1, scaler)
        shapes = {'wide': (40, 90), 'tall': (6, 4), 'conv': (5, 3, 2, 2)}
        weights = {layer: torch.empty(shape, device='cuda') for layer, shape in shapes.items()}
        for weight in weights.values():
            weight.grad = torch.empty_like(weight)
        source.begin_training(weights, is_new=True)
        for step in range(2):
            source.begin_step(step, fields_of(name))
            source.begin_batch(weights, examples=8)
            source.before_step(weights, torch.ones((), device='cuda'))
            source.end_step(weights)
        found = source.take()
        assert set(found) == set(fields_of(name)) and spectra_of(name, found)
    assert crossings.found == []


def test_a_network_on_two_devices():
    with elsewhere() as crossings:
        given = {device: torch.empty(6, 4, device=device) for device in ('cuda:0', 'cuda:1', 'cuda:0')}
        found = sums.sums(given, ['count', 'abs', 'squares', 'nonfinite'])
        for field in ('abs', 'squares', 'nonfinite'):
            assert {device: str(x.device) for device, x in found[field].items()} == {x: x for x in given}
    assert crossings.found == []


def test_a_look_never_waits(monkeypatch):
    monkeypatch.setattr(readable, '_is_fake', lambda x: False)
    monkeypatch.setattr(capture, 'unseen_by_others', contextlib.nullcontext)
    with elsewhere() as crossings:
        with torch.device('cuda'):
            net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.SiLU(), nn.Flatten(),
                                nn.Linear(96, rows.MAX_UNITS + 1), nn.Tanh(), nn.Linear(rows.MAX_UNITS + 1, 2))
            images = torch.randn(8, 3, 8, 8)
        window = Window(ACTIVATIONS, fields_of('activations'), 20)
        for _ in range(3):
            window.begin_batch(images)
            with capture.Capture(net, lambda *seen: window.add(Call(*seen))):
                net(images)
            window.end_batch()
        totals = window.totals()
        assert {field for _, field in totals} == set(fields_of('activations'))
        assert len(totals['activations', 'gram']) == 3
        spectra_of('activations', {field: own for (_, field), own in totals.items()})
    # Which units of a layer with very many are looked at.
    assert crossings.found == [{'cpu', 'cuda'}]


def test_who_waits_is_seen():
    with elsewhere() as crossings:
        x = torch.empty(3, device='cuda')
        for wait in (lambda: bool(x[0]), lambda: x[x > 2]):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                wait()
        x.cpu()
        assert crossings.found == [{'cpu', 'cuda'}]


# --- the benchmark -----------------------------------------------------------------

def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / 'benchmarks'))
    import gpu
    gpu.main(['--device=cpu', '--small', '--skip-tests', '--repeats=1', '--metrics=weight_mag,paper',
              f'--out={tmp_path / "results.json"}'])
    results = json.loads((tmp_path / 'results.json').read_text())
    printed = capsys.readouterr().out
    for name in gpu.NETWORKS:
        assert f'### {name}: ' in printed
        for metrics in ('weight_mag', 'paper'):
            own = results[name][metrics]
            assert own['measured'] and own['plain']['seconds'] > 0 == own['plain']['wait']
            assert 0 < own['logged']['wait'] < own['logged']['seconds']
            assert own['between']['wait'] == 0
    assert printed.count('| paper |') == 2 and 'no value' not in printed
