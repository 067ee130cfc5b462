"""
What measuring costs, where that does not depend on the machine: reads by the
host, operations launched, hooks, calls of Python, and memory.

Times are measured by ``tests/benchmarks/run.py``.
"""
import gc
import itertools
import sys
import tracemalloc
from collections import Counter

import pytest
import pytorch_lightning as pl
import torch
from common import NOISE, Recorder, fit, lines_of, measure_tensors
from pytorch_lightning.loggers import TensorBoardLogger
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine import dashboard as _dashboard
from geowatch.utils.lightning_ext.callbacks.plasticity_engine import events as _events
from geowatch.utils.lightning_ext.callbacks.plasticity_engine import lines as _lines
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics import spectrum as _spectrum
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics import sums as _sums
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS

HOOKS = [name for name in vars(PlasticityMonitor) if name.startswith('on_')]
READS = ('item', 'tolist', 'cpu', 'numpy', '__float__', '__bool__', '__int__', '__index__')


class Deep(torch.nn.Module):
    """ Some layers of one width, each with an activation, as the network of a LightningModule. """

    def __init__(self, layers, width=8, convolution=False):
        super().__init__()
        layer = (lambda: torch.nn.Conv2d(width, width, 3, padding=1)) if convolution else (
            lambda: torch.nn.Linear(width, width))
        self.layers = torch.nn.Sequential(*[m for _ in range(layers) for m in (layer(), torch.nn.ReLU())])

    def forward(self, x):
        return self.layers(x)


class DeepModule(pl.LightningModule):
    def __init__(self, layers, width=8):
        super().__init__()
        self.net = Deep(layers, width)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Watch(PlasticityMonitor):
    """ A monitor each of whose hooks runs inside ``self.watch(name)``, a context manager. """


def _watched(name):
    def hook(self, *args, **kwargs):
        with self.watch(name):
            return getattr(PlasticityMonitor, name)(self, *args, **kwargs)
    return hook


for _name in HOOKS:
    setattr(Watch, _name, _watched(_name))


def batches(count, width=8, size=4, sized=True):
    data = [torch.randn(size, width, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    return DataLoader(data if sized else Unsized(data), batch_size=None)


def train(tmp_path, monitor, net, count=6, **kwargs):
    return fit(tmp_path, monitor, net=net, loader=batches(count, net.net.layers[0].in_features), validate=False,
               max_epochs=1, log_every_n_steps=1, **kwargs)


# --- reads by the host ---------------------------------------------------------

class Reads:
    """ Counts what makes the host wait for a device, and what is launched, per step. """

    def __init__(self, monkeypatch):
        self.counts = Counter()
        self.inside = False
        for name in READS:
            monkeypatch.setattr(torch.Tensor, name, self._counting(name, getattr(torch.Tensor, name)))

    def _counting(self, name, original):
        def method(tensor, *args, **kwargs):
            if self.inside:
                self.counts[name] += 1
            return original(tensor, *args, **kwargs)
        return method

    def __enter__(self):
        self.inside = True

    def __exit__(self, *exc):
        self.inside = False


@pytest.mark.parametrize('layers', [2, 40])
def test_one_read_on_a_logged_step(tmp_path, monkeypatch, layers):
    # As on a GPU: on the CPU a sum is looked at where it is, which costs nothing.
    monkeypatch.setattr(_sums, '_sums_on_cpu', _sums._sums_on_device)
    reads = Reads(monkeypatch)
    per_step = []

    class Monitor(Watch):
        def watch(self, name):
            if name == 'on_train_batch_end':
                per_step.append(reads.counts)
                reads.counts = Counter()
            return reads

        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            per_step[-1] += reads.counts
            reads.counts = Counter()

    monitor = Monitor('all', interval=2, source='train', samples=4)
    # What a logger does with numbers of the host is its own.
    _, _, lines, _ = train(tmp_path, monitor, DeepModule(layers), logger=Recorder(tmp_path))
    assert [line['step'] for line in lines_of(lines, 'feature_erank')] == [1, 3, 5]
    assert len(lines_of(lines, 'dead_units')[0]['layers']) == layers
    # Of the untrained network, the weights before the first step and the activations in it.
    assert [sum(counts.values()) for counts in per_step] == [2, 1, 0, 1, 0, 1], per_step
    # The counting itself works.
    with reads:
        bool(torch.ones(1).item() + float(torch.ones(1)))
    assert sum(reads.counts.values()) >= 2


# --- what is written -----------------------------------------------------------

def test_a_measurement_is_one_write_and_one_flush(tmp_path, monkeypatch):
    writer = pytest.importorskip('torch.utils.tensorboard', reason='tensorboard is not installed').SummaryWriter
    done = []

    def note(owner, name):
        original = getattr(owner, name)

        def noted(self, *args):
            done.append(f'{owner.__name__}.{name}')
            return original(self, *args)
        monkeypatch.setattr(owner, name, noted)
    for owner, name in ((_lines.JsonLines, '_append'), (_dashboard.Dashboard, 'log'), (_events.Events, 'log'),
                        (writer, 'flush')):
        note(owner, name)
    per_step = []

    class Monitor(PlasticityMonitor):
        def on_train_batch_end(self, *args):
            done.clear()
            super().on_train_batch_end(*args)
            per_step.append(tuple(done))

    # Of both weights and features, read from different places.
    monitor = Monitor('weight_mag,grad_mag,dead_units', interval=2, source='train', samples=4)
    _, _, lines, _ = train(tmp_path, monitor, DeepModule(3), count=12, logger=TensorBoardLogger(tmp_path))
    assert [line['step'] for line in lines_of(lines, 'dead_units')] == [1, 3, 5, 7, 9, 11]
    assert len(lines) == 4 * 6
    written, scalars = ('JsonLines._append',), ('Events.log', 'SummaryWriter.flush')
    plain, full = written + scalars, (*written, 'Dashboard.log', *scalars)
    # First the untrained network's features; histograms and text come at most every ten steps of an epoch.
    assert per_step[1::2] == [full, plain, plain, plain, plain, full] and per_step[::2] == [full, *[()] * 5]


# --- a step that is not logged ---------------------------------------------------

def hooks_present(model):
    return [table for module in model.modules() for table in (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks) if table
    ] + [table for table in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks) if table] + [
        param for param in model.parameters() if param._backward_hooks] + (
            [mode] if (mode := _get_current_function_mode()) is not None else [])


class Looking(DeepModule):
    """ Notes what is attached while its forward runs. """

    def training_step(self, batch, batch_idx):
        self.present.append(len(hooks_present(self)))
        return super().training_step(batch, batch_idx)


def test_nothing_is_attached_on_a_step_that_is_not_logged(tmp_path):
    net = Looking(2)
    net.present = []
    train(tmp_path, PlasticityMonitor('all', interval=3, source='train', samples=4), net, count=7)
    # Two global hooks and a mode, on the steps that are looked at: the first, each third, and no more at the end.
    assert net.present == [3, 0, 3, 0, 0, 3, 0]


class Calls:
    """ Counts the calls of Python functions, and the operations of torch. """

    def __init__(self):
        self.python = self.torch = 0

    def _profile(self, frame, event, arg):
        self.python += event in ('call', 'c_call')

    def __enter__(self):
        self._mode = Ops(self)
        self._mode.__enter__()
        sys.setprofile(self._profile)

    def __exit__(self, *exc):
        sys.setprofile(None)
        self._mode.__exit__(*exc)


class Ops(TorchDispatchMode):
    def __init__(self, calls):
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._calls.torch += 1
        return func(*args, **(kwargs or {}))


class Counting(Watch):
    """ Calls of Python and of torch in the hooks of each step. """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = []

    def watch(self, name):
        if name == 'on_train_batch_start':
            self.steps.append(Calls())
        return self.steps[-1] if self.steps else Calls()


@pytest.mark.parametrize('metrics, kwargs', [
    ('weight_mag,grad_mag,erank', {'interval': 50}),
    ('weight_mag,grad_mag,erank', {'interval': 'epoch'}),
    ('weight_mag,grad_mag,erank', {'interval': 'auto'}),
    ('all', {'interval': 50, 'source': 'train', 'samples': 4}),
], ids=str)
@pytest.mark.parametrize('length', ['known', 'unknown'])
def test_a_step_that_is_not_logged_is_a_few_calls(tmp_path, metrics, kwargs, length):
    counts = set()
    for layers in (2, 30):
        monitor = Counting(metrics, **kwargs)
        fit(tmp_path / str(layers), monitor, net=DeepModule(layers), validate=False, max_epochs=1,
            loader=batches(60, sized=length == 'known'), log_every_n_steps=50)
        quiet = monitor.steps[10:40]
        assert {step.torch for step in quiet} == {0}
        assert monitor.steps[49].torch > 0 or kwargs['interval'] == 'epoch'
        counts |= {step.python for step in quiet}
    # Of five hooks, with the calls that count them, whatever the number of layers.
    assert len(counts) == 1 and counts.pop() <= 50


class Unsized(IterableDataset):
    def __init__(self, data):
        super().__init__()
        self._data = data

    def __iter__(self):
        return iter(self._data)


def test_steps_that_are_not_logged_are_not_awake(tmp_path):
    awake = []

    class Monitor(PlasticityMonitor):
        def on_train_batch_end(self, *args):
            awake.append(self._fit._is_awake)
            super().on_train_batch_end(*args)

    train(tmp_path, Monitor('weight_mag', interval=4), DeepModule(2), count=10)
    # The first is looked at for what comes next, and the last of the epoch always.
    assert [step for step, is_awake in enumerate(awake) if is_awake] == [0, 3, 7, 9]


# --- growth -----------------------------------------------------------------------

def test_operations_grow_linearly_with_layers(tmp_path):
    launched = {}
    for layers in (5, 10, 20, 40):
        monitor = Counting('all', interval=2, source='train', samples=4)
        train(tmp_path / str(layers), monitor, DeepModule(layers), count=6)
        # The first makes what the others use again.
        assert monitor.steps[1].torch >= monitor.steps[3].torch == monitor.steps[5].torch
        launched[layers] = monitor.steps[3].torch
    per_layer = (launched[10] - launched[5]) / 5
    assert 0 < per_layer < 270  # of 17 metrics
    for fewer, more in ((10, 20), (20, 40)):
        assert launched[more] - launched[fewer] <= (more - fewer) * per_layer * 1.05, launched


def test_a_tensor_of_a_device_is_a_few_operations():
    # Multi-tensor kernels: the number of calls for all tensors together, not for each.
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names():
        _sums._sums_on_device([torch.randn(3, 3) for _ in range(50)], ['abs', 'squares', 'nonfinite'])
    counts = Counter(names)
    assert counts['aten._foreach_norm.Scalar'] == 2
    # For each tensor, what counts the numbers that are not finite.
    assert counts['aten.count_nonzero.default'] + counts['aten.count_nonzero.dim_IntList'] == 50


def test_no_memory_grows_over_thousands_of_measurements(tmp_path):
    class Small(Recorder):
        def log_metrics(self, metrics, step=None):
            self.step = step

    measured = []

    class Monitor(PlasticityMonitor):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            if args[-1] in (200, 1035):
                gc.collect()
                measured.append(tracemalloc.get_traced_memory()[0])
                self.objects = getattr(self, 'objects', [])
                self.objects.append(sum(isinstance(x, torch.Tensor) for x in gc.get_objects()))

    monitor = Monitor('all', interval=1, source='train', samples=2)
    tracemalloc.start()
    try:
        _, _, lines, _ = fit(tmp_path, monitor, net=DeepModule(2), loader=batches(1037, size=2), validate=False,
                             max_epochs=1, logger=Small(tmp_path))
    finally:
        tracemalloc.stop()
    # A batch of two has no chunks, and the first step none before it.
    assert len(lines) == 1037 * (len(METRICS) - len(NOISE)) - 1
    # 12 500 measurements later; one number kept of each would be 350 KB.
    assert measured[1] - measured[0] < 50_000
    assert monitor.objects[1] <= monitor.objects[0] + 5


# --- memory -----------------------------------------------------------------------

def peak_bytes(function):
    """ Bytes that torch holds at once while a function runs, beyond those before. """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    changes, events = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    return max(itertools.accumulate(size for _, size in sorted(changes)), default=0)


def test_the_bytes_are_counted():
    x = torch.ones(1 << 20)
    assert peak_bytes(lambda: (x + 1, x + 2)) == pytest.approx(8 << 20, abs=100)
    assert peak_bytes(lambda: x.sum()) < 1 << 10


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize('metric', ['weight_mag', 'grad_mag', 'erank'])
def test_no_full_copy_of_weights_or_gradients(metric, dtype):
    tensors = {'a': torch.ones(8, 1 << 21, dtype=dtype), 'b': torch.ones(8, 1 << 20, dtype=dtype)}
    size = sum(x.nbytes for x in tensors.values())
    peak = peak_bytes(lambda: measure_tensors(metric, tensors))
    # Chunks of a fixed size, in float64 for the effective rank.
    limit = (_spectrum._CHUNK * 8 * 1.6) if metric == 'erank' else _sums._CHUNK * 8 * 1.1
    assert 0 < peak <= limit
    if metric != 'erank':
        assert peak < size / 20


def test_one_gram_matrix_at_a_time():
    """ Of many layers, or a large network would need more memory for them than for its weights. """
    peaks = [peak_bytes(lambda own=own: measure_tensors('erank', own)) for own in (
        {f'fc{i}': torch.eye(256) for i in range(layers)} for layers in (1, 8))]
    assert 256 * 256 * 8 < peaks[1] < 1.1 * peaks[0]


def test_a_graph_is_not_kept(tmp_path):
    """ The statistics of a step hold on to no activations. """
    monitor = PlasticityMonitor('all', interval=1, source='train', samples=10 ** 6)
    kept = []

    class Net(DeepModule):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            kept.extend(getattr(x, 'requires_grad', False) for window in monitor._fit.looks.windows
                        for own in window.totals().values() for x in own.values())

    train(tmp_path, monitor, Net(2))
    assert kept and not any(kept)
