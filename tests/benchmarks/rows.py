"""
The rows of the table that need no framework around them: ours and theirs side by side.

Each takes nothing and gives plain values. Times are CPU seconds, medians of
runs that alternate.
"""
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from large import large_models
from noise import noise_scales
from tools import Batches, lightning_resnet, resnet, run_lightning

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.measurement import (
    additive_keys,
    derive,
    evaluate,
    needed_keys,
    to_host,
)
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.capture import Capture
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.sites import Site
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.window import Window
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.contents import Contents
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.weights import weights_of
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.calls import Call
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.tensors import functions_of
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS, effective_rank, members

HOOKS = ('setup', 'teardown', *(name for name in vars(PlasticityMonitor) if name.startswith('on_')))


def alternate(functions, repeats=7):
    """ Median CPU seconds of each function (Dict[str, Callable]). """
    times = {name: [] for name in functions}
    for function in functions.values():
        if repeats > 3:
            function()  # once to warm up
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    return {name: sorted(own)[len(own) // 2] for name, own in times.items()}


def measure(names, tensors):
    """ A function that measures metrics of one source: statistics, spectra, transfer, formulas. """
    metrics = [METRICS[name] for name in names.split(',')]
    (source,) = {source for metric in metrics for source in metric.sources}
    fields = [field for _, field in additive_keys(metrics)]

    def run():
        totals = {}
        for function, own in functions_of(fields).items():
            totals.update({(source, field): stats for field, stats in function(tensors, own).items()})
        finish(metrics, totals)
    return run


def finish(metrics, totals):
    (numbers,) = to_host([derive(totals, needed_keys(metrics), lambda *args: contextlib.nullcontext())])
    return {metric.name: evaluate(metric, numbers) for metric in metrics}


def look(names, net, batches):
    """ Forward passes in one window of 2000 examples; CPU seconds of our own work on them. """
    metrics = [METRICS[name] for name in names]
    window, spent = Window(names, [field for _, field in additive_keys(metrics)], 2000), 0.

    def timed(function, *args):
        nonlocal spent
        start = time.process_time()
        try:
            return function(*args)
        finally:
            spent += time.process_time() - start

    for i, batch in enumerate(batches):
        timed(window.begin_batch, batch, len(batches) - i)
        with torch.no_grad(), Capture(net, lambda *call: timed(window.add, Call(*call))) as capture:
            net(batch)
        spent += capture.seconds
        timed(window.end_batch)
    timed(lambda: finish(metrics, window.totals()))
    return spent


# --- a step that is not logged ------------------------------------------------------

def quiet_step():
    """ Microseconds of all hooks of the monitor on a step that is not logged. """
    import pytorch_lightning as pl
    found = {}

    class Probe(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 5:
                optimizer, loss = trainer.optimizers[0], torch.zeros(())
                for _ in range(9):
                    start = time.perf_counter()
                    for _ in range(2000):
                        monitor.on_train_batch_start(trainer, pl_module, batch, batch_idx)
                        monitor.on_before_zero_grad(trainer, pl_module, optimizer)
                        monitor.on_before_backward(trainer, pl_module, loss)
                        monitor.on_after_backward(trainer, pl_module)
                        monitor.on_before_optimizer_step(trainer, pl_module, optimizer)
                        monitor.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
                    times.append((time.perf_counter() - start) / 2000)
                found['seconds'] = sorted(times)[4]
                found['awake'] = monitor._fit._is_awake

    times = []
    monitor = PlasticityMonitor('all', interval=50, source='train', samples=8)
    run_lightning(Batches(12), [monitor, Probe()])
    return found


# --- weights and gradients -------------------------------------------------------------

def one_read():
    """ Weights and gradients of 100 million numbers against one read of that memory. """
    count = 100_000_000
    flat, flat_grad = torch.randn(count), torch.randn(count)
    weights = {str(i): part.view(1000, -1) for i, part in enumerate(flat.chunk(25))}
    grads = {str(i): part.view(1000, -1) for i, part in enumerate(flat_grad.chunk(25))}
    weight_mag, grad_mag = measure('weight_mag', weights), measure('grad_mag,grad_norm', grads)
    # Apart from the others, since the first to free memory after them pays for what they have left (24 ms).
    found = alternate({
        'read of weights: torch.sum': flat.sum,
        'read of weights and gradients: torch.sum': lambda: (flat.sum(), flat_grad.sum()),
        'ours: weight_mag': weight_mag,
        'ours: weight_mag, grad_mag, grad_norm': lambda: (weight_mag(), grad_mag()),
    }, repeats=25)
    return {**found, **alternate({
        'x.abs().mean() of each weight': lambda: [x.abs().mean() for x in weights.values()],
        'torch.linalg.vector_norm(x, 1) of each weight': lambda: [
            torch.linalg.vector_norm(x, 1) for x in weights.values()],
    }, repeats=25)}


# --- spectra ----------------------------------------------------------------------------

def erank_resnet():
    """ All weights of ResNet-18, and how far the values are from those of an SVD in float64. """
    net = resnet()
    weights = {name: weight.detach() for name, weight in weights_of(Contents(net)).items()}
    functions = {
        'ours': measure('erank', weights),
        'torch.linalg.svdvals of each': lambda: [torch.linalg.svdvals(x.flatten(1)) for x in weights.values()],
    }
    found = alternate(functions)
    found['difference from an SVD in float64'] = max(_error(weight) for weight in weights.values())
    try:
        import weightwatcher
    except ImportError as ex:
        found['weightwatcher'] = str(ex)
        return found
    watcher = weightwatcher.WeightWatcher(model=net)

    def analyze():
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            watcher.analyze()

    found.update(alternate({'WeightWatcher.analyze': analyze}, repeats=1))
    return found


def _error(matrix):
    values = torch.linalg.svdvals(matrix.flatten(1).double())
    p = values / values.sum()
    return abs(effective_rank(matrix).item() / torch.special.entr(p).sum().exp().item() - 1)


def erank_wide():
    """ A matrix of 4096 x 11008. Of svdvals once: it takes a minute. """
    matrix = torch.randn(4096, 11008, generator=torch.Generator().manual_seed(0))
    found = alternate({'ours': lambda: effective_rank(matrix)}, repeats=3)
    values = []
    found.update(alternate({'torch.linalg.svdvals': lambda: values.append(torch.linalg.svdvals(matrix))}, repeats=1))
    p = values[0].double() / values[0].double().sum()
    found['difference from svdvals in float32'] = abs(
        effective_rank(matrix).item() / torch.special.entr(p).sum().exp().item() - 1)
    return found


def feature_erank():
    """ The look at 2000 samples, against the forward passes: of three layers of 512 units, and of ResNet-18. """
    found = {}
    layer = torch.nn.Linear(512, 512)
    mlp = torch.nn.Sequential(torch.nn.Linear(784, 512), torch.nn.ReLU(), *[layer, torch.nn.ReLU()] * 2)
    features = [torch.randn(2000, 512).relu() for _ in range(3)]

    def ours():
        metric = METRICS['feature_erank']
        window = Window([metric.name], [field for _, field in additive_keys([metric])], 2000)
        for start in range(0, 2000, 100):
            window.begin_batch([1] * 100, 20 - start // 100)
            for i, x in enumerate(features):
                window.add(Call(Site('', 'relu', str(i), units=512), x[start:start + 100], 1))
            window.end_batch()
        finish([metric], window.totals())

    @torch.no_grad()
    def forward(net, x, size):
        for rows in x.split(size):
            net(rows)

    net = resnet().eval()
    images = torch.randn(2000, 3, 64, 64)

    found['three layers'] = alternate({
        'ours': ours,
        'SVD of the stacked features': lambda: [torch.linalg.svdvals(x) for x in features],
        'forward of 784-512-512-512': lambda: forward(mlp, torch.zeros(2000, 784), 100),
    })
    found['ResNet-18'] = {**alternate({'forward': lambda: forward(net, images, 100)}, repeats=3),
                          'look': sorted(look(['feature_erank'], net, images.split(100)) for _ in range(3))[1]}
    return found


def registry():
    """
    All metrics that are registered, against those of the paper: CPU seconds of one measurement of ResNet-18.

    Weights, gradients, and 2000 images in one window. Of the window our own
    work is timed, since the noise of the forward passes is larger.
    """
    net = resnet().eval()
    images = torch.randn(2000, 3, 64, 64, generator=torch.Generator().manual_seed(0)).split(100)
    weights = weights_of(Contents(net))
    grads = {name: torch.randn_like(weight) for name, weight in weights.items()}
    found = {'paper': [], 'all': []}
    for _ in range(3):
        for group, times in found.items():
            start = time.process_time()
            for source, tensors in (('weights', weights), ('gradients', grads)):
                measure(','.join(name for name in members(group) if METRICS[name].sources == (source,)), tensors)()
            apart = time.process_time() - start
            times.append(apart + look([name for name in members(group) if METRICS[name].sees_activations], net, images))
    return {'metrics': {group: sum(set(METRICS[name].sources) <= {'weights', 'gradients', 'activations'}
                                   for name in members(group)) for group in found},
            **{group: sorted(times)[len(times) // 2] for group, times in found.items()}}


# --- whole runs ----------------------------------------------------------------------------

class Clock:
    """
    CPU seconds in all hooks of the monitor, and of each batch of validation.

    The hooks of a monitor that is switched off are called too, so that the
    same batches can be timed without it.
    """

    def __init__(self):
        self._hooks, self._validation, self._left = 0., [], 0.
        for name in HOOKS:
            setattr(PlasticityMonitor, name, self._timed(name, getattr(PlasticityMonitor, name)))

    def _timed(self, name, hook):
        def timed(monitor, *args, **kwargs):
            start = time.process_time()
            if name == 'on_validation_batch_end':
                self._validation.append(start - self._left)
            try:
                return hook(monitor, *args, **kwargs)
            finally:
                self._left = time.process_time()
                self._hooks += self._left - start
        return timed

    def run(self, function, monitored=True):
        os.environ['DISABLE_PLASTICITY_MONITOR'] = '' if monitored else '1'
        self._hooks, self._validation = 0., []
        start = time.process_time()
        function()
        return {'whole': time.process_time() - start, 'hooks': self._hooks, 'validation': sum(self._validation)}


def _cost(watched, plain_validation, epochs):
    """ By what the monitor did, since the noise of whole runs is larger: its hooks, and what it adds to validation. """
    spent = watched['hooks'] + watched['validation'] - plain_validation
    return {**watched, 'validation without': plain_validation, 'spent': spent, 'spent in an epoch': spent / epochs,
            'rest of an epoch': (watched['whole'] - spent) / epochs, 'share': spent / (watched['whole'] - spent)}


def _resnet_run(images, validation_images, batch_size, size, epochs):
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader, TensorDataset
    generator = torch.Generator().manual_seed(0)

    def loader(count):
        return DataLoader(TensorDataset(torch.randn(count, 3, size, size, generator=generator),
                                        torch.randint(0, 10, (count,), generator=generator)), batch_size=batch_size)

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])

    pl.Trainer(max_epochs=epochs, accelerator='cpu', default_root_dir=tempfile.mkdtemp(),
               callbacks=[PlasticityMonitor()], enable_progress_bar=False, enable_model_summary=False,
               enable_checkpointing=False).fit(
        lightning_resnet(validation_step=validation_step), loader(images), loader(validation_images))


def default_run():
    """ Four epochs of ResNet-18 with all default settings, on as many images as CIFAR-10 has. """
    return _default_run(50_000, 10_000, 64, 32, epochs=4)


def short_run():
    """ Five epochs of seconds: 50 steps of 8 images of 64 x 64, and 10 batches of validation. """
    return _default_run(400, 80, 8, 64, epochs=5)


def _default_run(images, validation_images, batch_size, size, epochs):
    clock = Clock()
    # What validation takes without the monitor, a batch of training is enough to know.
    plain = clock.run(lambda: _resnet_run(batch_size, validation_images, batch_size, size, epochs), monitored=False)
    return _cost(clock.run(lambda: _resnet_run(images, validation_images, batch_size, size, epochs)),
                 plain['validation'], epochs)


def geowatch_run():
    """ Five epochs of geowatch's HeterogeneousModel by its own command, on images that it draws itself. """
    from geowatch.cli.fit import FitCLI

    def run(**limits):
        folder = tempfile.mkdtemp()
        config = {
            'seed_everything': 0,
            'data': {'train_dataset': 'special:vidshapes24-frames6-multispectral-gsize128',
                     'vali_dataset': 'special:vidshapes4-frames6-multispectral-gsize128',
                     'chip_dims': 128, 'time_steps': 3, 'batch_size': 4, 'num_workers': 0, 'max_epoch_length': 400},
            'model': 'HeterogeneousModel',
            'optimizer': {'class_path': 'torch.optim.AdamW', 'init_args': {'lr': 1e-4}},
            'trainer': {'accelerator': 'cpu', 'devices': 1, 'default_root_dir': folder, 'num_sanity_val_steps': 0,
                        'max_epochs': 5, **limits}}
        fpath = Path(folder) / 'config.json'
        fpath.write_text(json.dumps(config))
        FitCLI.main([f'--config={fpath}', '--plasticity_metrics=paper'])

    clock = Clock()
    plain = clock.run(lambda: run(limit_train_batches=1), monitored=False)
    return _cost(clock.run(run), plain['validation'], epochs=5)


def imports():
    """ Milliseconds to import plasticity.py, beyond torch, Lightning and the host. """
    found = []
    for _ in range(7):
        said = subprocess.run([sys.executable, '-X', 'importtime', '-c', (
            'import torch, pytorch_lightning\nimport geowatch.utils.lightning_ext.callbacks.plasticity')],
            capture_output=True, text=True, check=True).stderr
        times = {}
        for line in said.splitlines():
            if line.startswith('import time:') and '[us]' not in line:
                _, cumulative, name = line.removeprefix('import time:').split('|')
                times[name.strip()] = int(cumulative)
        package = 'geowatch.utils.lightning_ext.callbacks'
        found.append((times[f'{package}.plasticity'] - times.get('lightning.pytorch', 0)
                      - max(times.get(package, 0), times.get('geowatch', 0))) / 1000)
    return {'ours': sorted(found)[3]}


# --- growth ---------------------------------------------------------------------------------

def growth(sizes=(10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 300_000_000)):
    """ CPU seconds of one measurement against the number of parameters, of four square layers. """
    found = {}
    for size in sizes:
        width = round((size / 4) ** 0.5)
        net = torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False) for _ in range(4)])
        for param in net.parameters():
            param.grad = torch.ones_like(param)
        weights = {name: weight.detach() for name, weight in weights_of(Contents(net)).items()}
        grads = {name: weight.grad for name, weight in weights_of(Contents(net)).items()}
        flat = torch.empty(size)
        found[size] = alternate({
            'one read: torch.sum': flat.zero_().sum,
            'weight_mag': measure('weight_mag', weights),
            'grad_mag, grad_norm': measure('grad_mag,grad_norm', grads),
        })
        found[size].update(alternate({
            'Lightning grad_norm': lambda net=net: _grad_norm(net),
            'x.abs().mean() of each weight': lambda weights=weights: [x.abs().mean().item() for x in weights.values()],
            'histogram of each weight (as wandb.watch)': lambda weights=weights: [
                x.flatten().histc(64).tolist() for x in weights.values()],
        }))
        if width <= 1600:
            found[size].update(alternate({
                'erank': measure('erank', weights),
                'svdvals of each weight': lambda weights=weights: [torch.linalg.svdvals(x) for x in weights.values()],
            }, repeats=7 if width < 1000 else 1))
    return found


def _grad_norm(net):
    from pytorch_lightning.utilities import grad_norm
    return [float(x) for x in grad_norm(net, norm_type=2).values()]


ROWS = {row.__name__: row for row in (quiet_step, one_read, erank_resnet, erank_wide, feature_erank, registry,
                                      noise_scales, default_run, short_run, geowatch_run, large_models, imports,
                                      growth)}
