"""
How often the verdicts of the report are right: sweeps on the small digits of scikit-learn, with known accuracy.

Trains sweeps of 5 learning rates x 3 batch sizes of several networks, with the default settings of the monitor, and
compares what the report says with what each network can do at the end. About ten minutes on one core.

CommandLine:
    python docs/make_verdict_table.py train --out=sweeps
    python docs/make_verdict_table.py judge --out=sweeps --half=tuned
    python docs/make_verdict_table.py judge --out=sweeps --half='held out' --verbose=validation
    python docs/make_verdict_table.py train --out=more --times=3 --seed=1

What is true of a run was written down before any rule was. A run's gain is what it has won over the fresh network, of
what the best run of its sweep has won: in accuracy on images that no run was trained on, or in loss where there is no
accuracy. With a gain of 0.9 it is 'good'. What has less is 'too high' where its learning rate is above that of the best
run with the same batch size, and 'too low' where it is below; that best run itself is 'between' and does not count. A
run is 'dead' where it is too high with a gain below 0.1.
"""
import dataclasses
import json
import logging
import math
import os
import random
import warnings
from pathlib import Path

import pytorch_lightning as pl
import scriptconfig as scfg
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

# Where the whole of geowatch is installed too, it would ask for GDAL.
os.environ.setdefault('GEOWATCH_PREIMPORT', '0')

EPOCHS = 8
BATCH_SIZES = (16, 48, 128)
RATES = {'SGD': (1e-3, 1e-2, 1e-1, 1., 10.), 'AdamW': (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)}


def mlp(act=nn.ReLU):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), act(), nn.Linear(128, 128), act(), nn.Linear(128, 10))


def cnn():
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1),
                         nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def batch_norm():
    layers = [layer for width in (64, 96, 96) for layer in (nn.Linear(width, 96), nn.BatchNorm1d(96), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(96, 10))


class Transformer(nn.Module):
    """ The rows of an image are its tokens. """

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Linear(8, 32), nn.Parameter(0.02 * torch.randn(8, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0., batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x[:, 0]) + self.place).mean(1))


class Residual(nn.Module):
    """ A convolution, and three blocks that add to it. """

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList([nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
            for _ in range(3)])
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def autoencoder():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 64),
                         nn.ReLU(), nn.Linear(64, 64))


NETWORKS = {'MLP': mlp, 'CNN': cnn, 'transformer': Transformer, 'MLP with BatchNorm': batch_norm,
            'residual CNN': Residual, 'MLP with tanh': lambda: mlp(nn.Tanh), 'autoencoder': autoencoder,
            'MLP with GELU': lambda: mlp(nn.GELU)}
SWEEPS = [(network, optimizer) for network in NETWORKS for optimizer in RATES]


def halves():
    """ Drawn before any rule was made: which sweeps they were made on, and which were only looked at afterwards. """
    tuned = random.Random(17).sample(SWEEPS, len(SWEEPS) // 2)
    return {'tuned': [sweep for sweep in SWEEPS if sweep in tuned],
            'held out': [sweep for sweep in SWEEPS if sweep not in tuned]}


def digits():
    """ Two thirds to train on, the rest to validate. """
    from sklearn.datasets import load_digits
    found = load_digits()
    images, labels = torch.tensor(found.images).float()[:, None] / 16, torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return [TensorDataset(images[own], labels[own]) for own in (order[:1200], order[1200:])]


class Net(pl.LightningModule):
    """ Logs as people do: a loss of training, and of validation a loss and an accuracy. """

    def __init__(self, network, optimizer, lr, batch_size):
        super().__init__()
        self.save_hyperparameters()
        self.net = NETWORKS[network]()
        self.has_labels = network != 'autoencoder'

    def losses(self, batch):
        images, labels = batch
        out = self.net(images)
        if self.has_labels:
            return F.cross_entropy(out, labels), (out.argmax(1) == labels).float().mean()
        return F.mse_loss(out, images.flatten(1)), None

    def training_step(self, batch, batch_idx):
        loss, _ = self.losses(batch)
        self.log('train_loss', loss)
        return loss

    def validation_step(self, batch, batch_idx):
        loss, accuracy = self.losses(batch)
        self.log('val_loss', loss)
        if accuracy is not None:
            self.log('val_acc', accuracy)

    def configure_optimizers(self):
        return getattr(torch.optim, self.hparams.optimizer)(self.parameters(), lr=self.hparams.lr)

    @torch.no_grad()
    def measure(self, data):
        """ Loss and accuracy on all examples. """
        self.eval()
        loss, accuracy = self.losses(data.tensors)
        self.train()
        return [loss.item(), None if accuracy is None else accuracy.item()]


def train(folder, network, optimizer, lr, batch_size, seed):
    """
    One run, and what is true of it.

    Args:
        folder (Path): for its logs; truth.json comes last
        network (str): a key of NETWORKS
        optimizer (str): a key of RATES
        lr (float): learning rate
        batch_size (int): images in a step
        seed (int): of all random numbers
    """
    from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
    pl.seed_everything(seed, verbose=False)
    training, validation = digits()
    net = Net(network, optimizer, lr, batch_size)
    before = net.measure(validation)
    trainer = pl.Trainer(max_epochs=EPOCHS, accelerator='cpu', default_root_dir=folder, enable_progress_bar=False,
                         enable_model_summary=False, enable_checkpointing=False, callbacks=[PlasticityMonitor()])
    trainer.fit(net, DataLoader(training, batch_size, shuffle=True), DataLoader(validation, batch_size))
    truth = {'before': before, 'after': net.measure(validation), 'training': net.measure(training)}
    (folder / 'truth.json').write_text(json.dumps(truth))


def train_all(out, sweeps, times, seed):
    """ All that is not there yet, each run in a folder of its own. """
    for network, optimizer in sweeps:
        for lr in (times * rate for rate in RATES[optimizer]):
            for batch_size in BATCH_SIZES:
                folder = out / f'{network} {optimizer}' / f'lr{lr:g}-bs{batch_size}'
                if not (folder / 'truth.json').exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    train(folder, network, optimizer, lr, batch_size, seed)
        print(f'{network}, {optimizer}: trained', flush=True)


def won(truth):
    """ What a run has won over the fresh network: accuracy, or loss where there is none. """
    (loss, accuracy), (loss_before, accuracy_before) = truth['after'], truth['before']
    gain = loss_before - loss if accuracy is None else accuracy - accuracy_before
    return gain if math.isfinite(gain) else -math.inf


def labels(runs):
    """
    What is true of the runs of a sweep.

    Args:
        runs (Dict[Tuple[float, int], dict]): learning rate and batch size to truth.json

    Returns:
        Dict[Tuple[float, int], str]: 'good', 'too high', 'dead', 'too low' or 'between'
    """
    gains = {run: won(truth) for run, truth in runs.items()}
    most, true = max(gains.values()), {}
    for (lr, batch_size), gain in gains.items():
        best = max(rate for rate, size in runs if size == batch_size
                   and gains[rate, size] == max(gains[own] for own in runs if own[1] == batch_size))
        true[lr, batch_size] = ('good' if gain >= 0.9 * most else 'between' if lr == best else 'too low' if lr < best
                                else 'dead' if gain < 0.1 * most else 'too high')
    return true


def load(folder):
    """ The runs of a sweep as the report reads them, and what is true of them. """
    from geowatch.utils.lightning_ext.callbacks.plasticity_report.runs import load_runs
    from geowatch.utils.lightning_ext.callbacks.plasticity_report.scalars import load_scalars
    runs, _ = load_runs([folder])
    truths = {}
    for run in runs:
        load_scalars(run)
        truths[run.settings['lr'], run.settings['batch_size']] = json.loads(
            (run.folders[0].parents[1] / 'truth.json').read_text())
    true = labels(truths)
    return runs, [true[run.settings['lr'], run.settings['batch_size']] for run in runs]


def without(runs, *names):
    """ Runs as if they had not logged some scalars. """
    return [dataclasses.replace(run, scalars={name: x for name, x in run.scalars.items() if name not in names})
            for run in runs]


def views(runs):
    """ What the report may have to judge by: each a list of verdicts. """
    from geowatch.utils.lightning_ext.callbacks.plasticity_report.verdicts import judge
    of_training, bare = without(runs, 'val_loss', 'val_acc'), without(runs, 'val_loss', 'val_acc', 'train_loss')
    return {'validation': judge(runs), 'validation loss': judge(without(runs, 'val_acc')),
            'training loss': judge(of_training), 'metrics alone': judge(bare),
            'one run': [judge([run])[0] for run in of_training],
            'one run, metrics alone': [judge([run])[0] for run in bare]}


def called(verdict):
    """ What a verdict says in the words of the labels. """
    return 'good' if verdict.word == 'learned' else verdict.rate or '?'


def judge_all(out, sweeps, verbose):
    """ Print how many verdicts are right, sweep by sweep, and what is wrong. """
    count, wrong = {}, []
    for network, optimizer in sweeps:
        runs, true = load(out / f'{network} {optimizer}')
        found = views(runs)
        if not count:
            count = {view: [0, 0, 0] for view in found}
            print(f'| Sweep | {" | ".join(found)} |\n|---|{"---|" * len(found)}')
        row = []
        for view, verdicts in found.items():
            counted = [one for one in zip(runs, true, verdicts, strict=True) if one[1] != 'between']
            missed = [(run.name, label, verdict) for run, label, verdict in counted
                      if called(verdict) != {'dead': 'too high'}.get(label, label)]
            wrong += [f'{view}: {network}, {optimizer}, {name} is {label}, called {verdict.word}: {verdict.reason}'
                      for name, label, verdict in missed if verbose in (view, 'all')]
            own = (len(counted) - len(missed), len(counted),
                   sum(label == 'dead' and verdict.word == 'learned' for _, label, verdict in missed))
            count[view] = [a + b for a, b in zip(count[view], own, strict=True)]
            row.append('{} of {}'.format(*own))
        print(f'| {network}, {optimizer} | {" | ".join(row)} |')
    print(f'| together | {" | ".join(f"{right} of {every}" for right, every, _ in count.values())} |')
    print(f'| dead, called learned | {" | ".join(str(dead) for *_, dead in count.values())} |')
    print('\n'.join(wrong))


class MakeVerdictTableCLI(scfg.DataConfig):
    """
    How often the verdicts of the report are right.
    """
    what = scfg.Value('judge', position=1, choices=['train', 'judge'], help='train the sweeps, or judge what is there')
    out = scfg.Value('sweeps', type=str, help='folder of the sweeps')
    times = scfg.Value(1., type=float, help='factor on all learning rates')
    seed = scfg.Value(0, type=int, help='of all random numbers')
    half = scfg.Value('tuned', choices=['tuned', 'held out'], help='which half to judge')
    verbose = scfg.Value('', type=str, help='print each verdict of this column that is wrong')

    @classmethod
    def main(cls, cmdline=1, **kwargs):
        """
        Args:
            cmdline (bool | List[str]): where arguments come from
            **kwargs: defaults of the arguments
        """
        config = cls.cli(cmdline=cmdline, data=kwargs, strict=True)
        out = Path(config.out).resolve()
        if config.what == 'train':
            for name in ('pytorch_lightning', 'lightning.pytorch', 'lightning.fabric'):
                logging.getLogger(name).setLevel(logging.ERROR)
            warnings.simplefilter('ignore')
            torch.set_num_threads(1)
            for sweeps in halves().values():
                train_all(out, sweeps, config.times, config.seed)
        else:
            there = [sweep for sweep in halves()[config.half]
                     if len(list((out / ' '.join(sweep)).glob('*/truth.json'))) == len(BATCH_SIZES) * 5]
            judge_all(out, there, config.verbose)


if __name__ == '__main__':
    MakeVerdictTableCLI.main()
