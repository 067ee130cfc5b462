"""
What several tests share: a small network, a run of it, and independent values.
"""
import contextlib
import copy
import importlib.util
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from torch.utils.data import DataLoader

from geowatch.utils.lightning_ext.callbacks.plasticity_engine.measurement import (
    additive_keys,
    derive,
    evaluate,
    needed_keys,
    to_host,
)
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.window import Window
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.calls import Call
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.tensors import functions_of
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS, members

# What is measured by default.
TAGS = (*members('paper'), 'update_ratio')


def skip_without(what, *names):
    """ Skip a test, and say why, where one of some packages is not installed. """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        reason = f'{what}: {", ".join(missing)} not installed'
        print(reason)
        pytest.skip(reason)


def of_source(*sources):
    """ The registered metrics that need one of some sources. """
    return tuple(name for name, metric in METRICS.items() if set(metric.sources) & set(sources))


ACTIVATIONS = of_source('activations')
NOISE = of_source('pieces')
# What is measured before the first step too.
AT_START = of_source('weights', 'activations')


class Layers:
    """ A network of three layers and two activations, for any LightningModule. """

    def __init__(self, dead=0):
        super().__init__()
        self.fc1 = torch.nn.Linear(8, 16)
        self.act = torch.nn.ReLU()
        self.fc2 = torch.nn.Linear(16, 12)
        self.head = torch.nn.Linear(12, 1)
        with torch.no_grad():
            self.fc1.bias[:dead] = -100

    def features(self, x):
        first = self.act(self.fc1(x))
        return first, torch.relu(self.fc2(first))

    def forward(self, x):
        return self.head(self.features(x)[1])

    def loss(self, batch):
        # A sum over examples, so that micro-batches of any size add up exactly.
        return (self(batch) - 1).square().sum() / 8

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02)


class Net(Layers, pl.LightningModule):
    pass


class Recorder(Logger):
    """ Keeps every call in memory. """

    def __init__(self, save_dir):
        super().__init__()
        self.calls = []
        self._save_dir = str(save_dir)

    name = 'recorder'
    version = 0

    @property
    def save_dir(self):
        return self._save_dir

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.calls.append((step, dict(metrics)))

    def table(self, start=False):
        """ All that was logged, as sorted (step, key, value); that of the untrained network only if asked for. """
        return sorted((step, key, float(value)) for step, metrics in self.calls for key, value in metrics.items()
                      if start or step >= 0)


def make_data(n=37):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(7))


def make_net(cls=Net, **kwargs):
    torch.manual_seed(0)
    return cls(**kwargs)


def fit(tmp_path, monitor, net=None, validate=True, n=37, batch_size=8, package=pl, callbacks=(), loader=None,
        **kwargs):
    """ Train for two epochs of 5 steps, the last batch shorter; (net, trainer, lines, data). """
    net = make_net() if net is None else net
    data = make_data(n)
    trainer = package.Trainer(**{
        'default_root_dir': tmp_path, 'max_epochs': 2, 'accelerator': 'cpu', 'enable_progress_bar': False,
        'enable_model_summary': False, 'enable_checkpointing': any('Checkpoint' in type(c).__name__ for c in callbacks),
        'callbacks': [monitor, *callbacks], **kwargs})
    with warnings.catch_warnings():
        # Of Lightning: few workers, and log_every_n_steps beyond the epoch.
        warnings.filterwarnings('ignore', message=r'.*(does not have many workers|smaller than the logging interval)')
        trainer.fit(net, DataLoader(data, batch_size=batch_size) if loader is None else loader,
                    DataLoader(data, batch_size=10) if validate else None)
    return net, trainer, read_lines(trainer), data


def read_lines(trainer, start=False):
    """ The lines of plasticity.jsonl, as strict JSON, which knows no NaN; of the untrained network only if asked. """
    if trainer.log_dir is None or not os.path.exists(fpath := Path(trainer.log_dir) / 'plasticity.jsonl'):
        return []

    def refuse(text):
        raise ValueError(f'{text} is not JSON')

    lines = [json.loads(line, parse_constant=refuse) for line in fpath.read_text().splitlines()]
    return [line for line in lines if start or line['step'] >= 0]


def lines_of(lines, metric):
    return [line for line in lines if line['metric'] == metric]


def last(lines, metric):
    return lines_of(lines, metric)[-1]


# --- one metric of raw tensors, without a run --------------------------------

def finish(name, totals):
    """ The value of the network, and the columns of each layer, from additive statistics. """
    def guard(*args):
        return contextlib.nullcontext()
    columns, layers = evaluate(METRICS[name], *to_host([derive(totals, needed_keys([METRICS[name]]), guard)]))
    return columns['value'], layers


def measure_tensors(name, tensors):
    """ Of a metric of weights or gradients: from layer to tensor. """
    totals = {}
    for source in METRICS[name].sources:
        fields = [field for own, field in additive_keys([METRICS[name]]) if own == source]
        for function, own in functions_of(fields).items():
            totals.update({(source, field): stats for field, stats in function(tensors, own).items()})
    return finish(name, totals)


def measure_calls(name, batches, samples=2000):
    """ Of a metric of activations: for each batch a list of (site, output, axis, saturated values). """
    window = Window([name], [field for _, field in additive_keys([METRICS[name]])], samples)
    for batch in batches:
        window.begin_batch([1] * max((call[1].shape[0] for call in batch), default=0), len(batches))
        for call in batch:
            window.add(Call(*call))
        window.end_batch()
    return finish(name, window.totals())


# --- independent values ------------------------------------------------------

def numpy_erank(matrix):
    """ exp of the entropy of the singular values, by SVD in float64. """
    s = np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)
    if not s.sum():
        return 0.0
    p = s / s.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def matrices(net):
    """ Name to weight matrix, in float64. """
    return {name.removesuffix('.weight'): param.detach().double().numpy()
            for name, param in net.named_parameters() if param.ndim >= 2}


def gradients(net):
    return {name.removesuffix('.weight'): param.grad.detach().double().numpy()
            for name, param in net.named_parameters() if param.ndim >= 2 and param.grad is not None}


def mean_abs(arrays):
    return sum(np.abs(a).sum() for a in arrays.values()) / sum(a.size for a in arrays.values())


def norm(arrays):
    return np.sqrt(sum(np.square(a).sum() for a in arrays.values()))


def weight_values(net):
    weights = matrices(net)
    return {'weight_mag': mean_abs(weights), 'erank': np.mean([numpy_erank(w) for w in weights.values()])}


def gradient_values(net):
    grads = gradients(net)
    return {'grad_mag': mean_abs(grads), 'grad_norm': norm(grads)}


def feature_values(features):
    """ Of a list of (samples, units) tensors, one for each activation. """
    dead = [(x == 0).all(0) for x in features]
    return {'dead_units': torch.cat(dead).double().mean().item(),
            'feature_erank': np.mean([numpy_erank(x.detach()) for x in features])}


def plain_training(net, data, batch_size=8, epochs=2, clip=None, optimizer=None):
    """
    The same training without Lightning: for each step what the metrics should be.

    ``'features'`` are those of the training batch; dead_units and
    feature_erank are those of all data after the step, as in validation.
    """
    net = copy.deepcopy(net)
    optimizer = optimizer(net.parameters()) if optimizer else net.configure_optimizers()
    rows = []
    for _ in range(epochs):
        for batch in data.split(batch_size):
            optimizer.zero_grad()
            row = {'features': [x.detach() for x in net.features(batch)]}
            net.loss(batch).backward()
            row.update(gradient_values(net))
            if clip:
                torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
            before = {name: w.copy() for name, w in matrices(net).items()}
            optimizer.step()
            steps = {name: w - before[name] for name, w in matrices(net).items()}
            row['update_ratio'] = norm(steps) / norm(before)
            with torch.no_grad():
                rows.append({**row, **weight_values(net), **feature_values(net.features(data))})
    return rows
