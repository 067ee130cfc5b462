"""
Make the pictures of learning_rate_and_batch_size.md from real runs: an MLP on the small digits of scikit-learn.

About two minutes on one core. Prints the numbers that the page cites.

CommandLine:
    python docs/make_tuning_pictures.py
"""
import json
import logging
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import scriptconfig as scfg
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

# Where the whole of geowatch is installed too, it would ask for GDAL.
os.environ.setdefault('GEOWATCH_PREIMPORT', '0')

HERE = Path(__file__).resolve().parent
STEPS = 300
LOG_EVERY = 5
TITLES = {'loss': 'training loss', 'update_ratio': 'update_ratio', 'step_alignment': 'step_alignment',
          'noise_fraction': 'noise_fraction', 'unmoved': 'unmoved (of update_ratio)'}


class MakeTuningPicturesCLI(scfg.DataConfig):
    """
    Make the pictures of learning_rate_and_batch_size.md from real runs.
    """
    out = scfg.Value(str(HERE / 'images'), type=str, help='folder for the pictures')

    @classmethod
    def main(cls, cmdline=1, **kwargs):
        """
        Args:
            cmdline (bool | List[str]): where arguments come from
            **kwargs: defaults of the arguments
        """
        config = cls.cli(cmdline=cmdline, data=kwargs, strict=True)
        out = Path(config.out).resolve()
        out.mkdir(parents=True, exist_ok=True)
        for name in ('pytorch_lightning', 'lightning.pytorch', 'lightning.fabric'):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.simplefilter('ignore')
        torch.set_num_threads(1)

        rates = {lr: train(lr) for lr in (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1)}
        for lr, run in rates.items():
            tell(f'AdamW, lr {lr:g}', run)
        best = min(rates, key=lambda lr: final(rates[lr]))
        for name, lr in (('too_low', 1e-5), ('too_high', 1e-1)):
            draw(out / f'learning_rate_{name}.png', {f'lr {lr:g}': rates[lr], f'lr {best:g} (best)': rates[best]},
                 ('loss', 'update_ratio', 'step_alignment'))

        halves = {'bfloat16 weights': train(1e-4, dtype=torch.bfloat16), 'float32 weights': rates[1e-4]}
        for name, run in halves.items():
            tell(f'AdamW, lr 0.0001, {name}', run)
        draw(out / 'unmoved.png', halves, ('loss', 'update_ratio', 'unmoved'))

        batches = {}
        for size in (8, 32, 128, 512):
            runs = {lr: train(lr, size, torch.optim.SGD) for lr in (0.03, 0.1, 0.3, 1.)}
            lr = min(runs, key=lambda lr, runs=runs: final(runs[lr]))
            batches[size] = runs[lr]
            tell(f'SGD, batch {size}, best lr {lr:g}', runs[lr])
        draw(out / 'batch_too_large.png', {f'batch {size}': run for size, run in batches.items()},
             ('loss', 'noise_fraction'))


def digits():
    """ Images and labels; a tenth of the labels is wrong, so that there is something that cannot be learned. """
    from sklearn.datasets import load_digits
    found, generator = load_digits(), np.random.default_rng(0)
    labels = np.where(generator.random(len(found.target)) < 0.1, generator.integers(0, 10, len(found.target)),
                      found.target)
    return TensorDataset(torch.tensor(found.images).flatten(1).float() / 16, torch.tensor(labels))


class Net(pl.LightningModule):
    """ An MLP with two hidden layers. """

    def __init__(self, optimizer, lr, dtype):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        self.net.to(dtype)
        self.make, self.lr, self.kind, self.losses = optimizer, lr, dtype, []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0].to(self.kind)).float(), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return self.make(self.parameters(), lr=self.lr)


def train(lr, batch_size=64, optimizer=torch.optim.AdamW, dtype=torch.float32, steps=STEPS):
    """
    One run.

    Args:
        lr (float): learning rate
        batch_size (int): images in a step
        optimizer (Callable): takes parameters and lr
        dtype (torch.dtype): of the weights
        steps (int): of the optimizer

    Returns:
        Dict[str, Tuple[List[int], List[float]]]: curves, as steps and values
    """
    from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
    pl.seed_everything(0, verbose=False)
    data = digits()
    loader = DataLoader(data, batch_size, sampler=RandomSampler(data, num_samples=batch_size * steps, replacement=True))
    net = Net(optimizer, lr, dtype)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(max_epochs=1, accelerator='cpu', default_root_dir=folder, enable_progress_bar=False,
                             enable_model_summary=False, enable_checkpointing=False,
                             callbacks=[PlasticityMonitor('tuning', interval=LOG_EVERY)])
        trainer.fit(net, loader)
        lines = [json.loads(line) for line in (Path(trainer.log_dir) / 'plasticity.jsonl').read_text().splitlines()]
    curves = {'loss': (list(range(steps)), net.losses)}
    for line in lines:
        for name, value in ((line['metric'], line['value']), ('unmoved', line.get('unmoved'))):
            if value is not None:
                for column, x in zip(curves.setdefault(name, ([], [])), (line['step'], value), strict=True):
                    column.append(x)
    return curves


def final(run):
    """ The loss at the end, a mean over the last tenth; inf if it is not finite. """
    loss = np.mean(run['loss'][1][-STEPS // 10:])
    return loss if np.isfinite(loss) else np.inf


def tell(name, run):
    """ Print what the page cites: the loss at the end, medians over the run, the alignment over its first tenth. """
    steps, values = run['step_alignment']
    early = [x for step, x in zip(steps, values, strict=True) if step < STEPS // 10]
    numbers = {'loss': final(run), 'early alignment': np.mean(early),
               **{key: np.median(run[key][1]) for key in ('update_ratio', 'unmoved', 'noise_fraction') if key in run},
               'noise_scale': run['noise_scale'][1][-1] if 'noise_scale' in run else np.nan}
    print(name + ':', ', '.join(f'{key} {x:.3g}' for key, x in numbers.items()), flush=True)


def draw(target, runs, names):
    """
    Some curves of some runs, side by side.

    Args:
        target (Path): PNG file
        runs (Dict[str, dict]): by what the legend says
        names (Tuple[str, ...]): of curves
    """
    figure = Figure(figsize=(3.4 * len(names), 2.8), layout='constrained')
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        for label, run in runs.items():
            steps, values = run[name]
            axes.plot(steps, smooth(values, 15 if name == 'loss' else 5), label=label, linewidth=1.4)
        axes.set_title(TITLES[name], fontsize=10)
        axes.set_xlabel('step', fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if name == 'update_ratio':
            axes.set_yscale('log')
        if name == 'loss':
            axes.set_ylim(0, 3)
        if name == 'step_alignment':
            axes.axhline(0, color='black', linewidth=0.8)
            axes.set_ylim(-1, 1)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(target, dpi=100)
    print(f'{target}: {target.stat().st_size / 1000:.0f} kB')


def smooth(values, width):
    """ A running mean; what comes first is the mean of what there is. """
    sums = np.cumsum(np.insert(np.asarray(values, dtype=float), 0, 0.))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - width, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)


if __name__ == '__main__':
    MakeTuningPicturesCLI.main()
