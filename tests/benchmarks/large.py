"""
Large networks, whose layers take turns: what was planned, and what it took.
"""
import json
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine import rota
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.rota import Rota, spectral_work
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.tensors import Gram
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import effective_rank


class Blocks(nn.Module):
    """ The matrices of a language model: of each block four of (width, width), and three of (inner, width). """

    def __init__(self, blocks, width, inner):
        super().__init__()
        shapes = {'q': (width, width), 'k': (width, width), 'v': (width, width), 'o': (width, width),
                  'gate': (inner, width), 'up': (inner, width), 'down': (width, inner)}
        self.blocks = nn.ModuleList(nn.ModuleDict({
            name: nn.Linear(columns, rows, bias=False) for name, (rows, columns) in shapes.items()})
            for _ in range(blocks))


def seven_billion():
    """
    The plan for 7 billion parameters, on the meta device, and a run of the same blocks at a fourth of the width.

    Returns:
        Dict[str, float]: seconds, and how many layers
    """
    with torch.device('meta'):
        weights = {name: weight for name, weight in Blocks(32, 4096, 11008).named_parameters()}
    works = {name: spectral_work(Gram(weight).shape[0]) for name, weight in weights.items()}
    plan = Rota(0.01, 'cpu')
    found = {'parameters': sum(weight.numel() for weight in weights.values()), 'layers': len(works),
             'planned for all': sum(works.values()) / plan.pace,
             'planned for a measurement': sum(works[name] for name in plan.plan(works, lambda name: -1)) / plan.pace}
    return {**found, **{f'at a fourth of the width: {name}': x for name, x in _run(
        _module(Blocks(32, 1024, 2752)), 'erank', torch.ones(8, 1)).items()}}


def efficientnet():
    """ The same of the features of an efficientnet, on 512 images of 64 x 64. """
    from torchvision.models import efficientnet_b0
    net = efficientnet_b0(num_classes=10)

    def loss(batch):
        return net(batch).square().mean()
    return _run(_module(net, loss), 'feature_erank', torch.randn(512, 3, 64, 64), source='validation')


def _module(net, loss=None):
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, batch_idx):
            if loss is not None:
                return loss(batch)
            return sum(weight[0, :8].square().sum() for weight in self.net.parameters())

        def validation_step(self, batch, batch_idx):
            if loss is not None:
                loss(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)
    return Module()


def _run(module, metric, data, source='auto', epochs=4):
    """ CPU seconds of measuring in each of some epochs of a step, beyond the same batches without, and the lines. """
    import pytorch_lightning as pl

    def run(monitor):
        spent = []

        class Epochs(pl.Callback):
            def on_train_epoch_start(self, trainer, module):
                spent.append(time.process_time())

            def on_train_end(self, trainer, module):
                spent.append(time.process_time())
        folder = tempfile.mkdtemp()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            trainer = pl.Trainer(
                max_epochs=epochs, accelerator='cpu', default_root_dir=folder, limit_train_batches=1,
                num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
                enable_checkpointing=False, callbacks=[Epochs(), *monitor])
            trainer.fit(module, DataLoader(data, batch_size=8), DataLoader(data, batch_size=64))
        return [after - before for before, after in zip(spent, spent[1:], strict=False)], trainer.log_dir

    plain, _ = run([])
    spent, folder = run([PlasticityMonitor(metric, interval='epoch', source=source)])
    lines = [json.loads(line) for line in (Path(folder) / 'plasticity.jsonl').read_text().splitlines()]
    lines = [line for line in lines if line['step'] >= 0]
    found = {'CPU seconds of a measurement': sorted(spent)[len(spent) // 2] - sorted(plain)[len(plain) // 2],
             'most': max(spent) - min(plain), 'limit': rota.SECONDS,
             'layers at a time': [len(line.get('fresh', line['layers'])) for line in lines],
             'layers known at the end': len(lines[-1]['layers'])}
    if metric == 'erank':
        weights = dict(module.net.named_parameters())
        name = (lines[-1].get('fresh') or list(lines[-1]['layers']))[0]
        expected = effective_rank(weights[f'{name.removeprefix("net.")}.weight']).item()
        found['off by'] = abs(lines[-1]['layers'][name]['value'] / expected - 1)
    return found



def large_models():
    """ Both of them. """
    return {'seven_billion': seven_billion(), 'efficientnet': efficientnet()}
