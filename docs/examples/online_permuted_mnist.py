"""
Loss of plasticity on Online Permuted MNIST, the experiment of section 4 of the paper.

A network learns one task after the other. All tasks are MNIST, each with the
pixels in an order of its own, and each image is seen once in a task. With a
large step size the network is quick at first; then its weights grow, units
die, features lose rank, and it learns each new task worse than the one before.

Plain PyTorch Lightning. A task is an epoch of one fit, so that a step size is
one run with one log folder. Lightning validates after an epoch, so that the
measurement on 2000 images of the next task, before it is trained on, is
the validation at the end of the task before it. Before the first task comes an
epoch 0 of one batch with a learning rate of zero, for the sake of its
validation: it measures the fresh network.

References:
    .. [Dohare2024] Dohare et al., "Loss of plasticity in deep continual
       learning", Nature 632, 768, 2024; arXiv 2306.13812, section 4.

CommandLine:
    python online_permuted_mnist.py --mnist=mnist.npz --out=runs
    python online_permuted_mnist.py --mnist=digits --step_sizes=0.003,0.05 --tasks=20
    python online_permuted_mnist.py --scale=paper --step_sizes=0.003
"""
import csv
import json
import logging
import os
import shlex
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import scriptconfig as scfg
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

# Where the whole of geowatch is installed too, it would ask for GDAL.
os.environ.setdefault('GEOWATCH_PREIMPORT', '0')

REPORT = 'GEOWATCH_PREIMPORT=0 python -m geowatch.cli.plasticity_report'
SIDE = 28
MEASURED = 2000  # images of a task that is not trained on yet

SCALES = {
    # The step sizes are larger than those of the paper, so that 50 short tasks show what 800 long ones do there.
    'small': {'step_sizes': '0.003,0.01,0.05', 'tasks': 50, 'examples': 2000, 'width': 100, 'batch_size': 4,
              'accelerator': 'cpu'},
    'paper': {'step_sizes': '0.001,0.003,0.01', 'tasks': 800, 'examples': 60000, 'width': 2000, 'batch_size': 1,
              'accelerator': 'auto'},
}


class OnlinePermutedMnistCLI(scfg.DataConfig):
    """
    Train on Online Permuted MNIST, one run for each step size, and print what became of them.

    What is not given has the value of the scale: 'small' takes one to two
    minutes on one core; 'paper' is 48 million steps for each step size, days on
    a CPU.
    """
    mnist = scfg.Value('data', type=str, position=1, help=(
        'an .npz file with x_train and y_train, or a folder in which torchvision finds MNIST or downloads it to, '
        "or 'digits': the 1797 small images of scikit-learn, made as large as those of MNIST"))
    out = scfg.Value('runs', type=str, help='folder for the runs: OUT/lr0.01/version_0 and so on')
    scale = scfg.Value('small', choices=list(SCALES), help='small, or as in the paper')
    step_sizes = scfg.Value(None, type=str, help='learning rates of SGD, separated by commas')
    tasks = scfg.Value(None, type=int, help='how many tasks are learned, one after the other')
    examples = scfg.Value(None, type=int, help='images in a task')
    width = scfg.Value(None, type=int, help='units in each of the three hidden layers')
    batch_size = scfg.Value(None, type=int, help='images in a step; the loss is their mean')
    seed = scfg.Value(0, type=int, help='of the weights and the tasks, the same for all step sizes')
    accelerator = scfg.Value(None, type=str, help="where Lightning trains, such as 'cpu' or 'gpu'")

    @classmethod
    def main(cls, cmdline=1, **kwargs):
        """
        Args:
            cmdline (bool | List[str]): where arguments come from
            **kwargs: defaults of the arguments
        """
        config = cls.cli(cmdline=cmdline, data=kwargs, strict=True)
        for key, value in SCALES[config.scale].items():
            if config[key] is None:
                config[key] = value
        if config.width <= 200:
            torch.set_num_threads(1)  # matrices this small lose by more
        logging.getLogger('pytorch_lightning').setLevel(logging.WARNING)
        images, labels = load_images(config.mnist)
        folders = [train(images, labels, float(step_size), config) for step_size in config.step_sizes.split(',')]
        print_table(folders)
        print(f'\nDraw them with\n{REPORT} {shlex.join(map(str, folders))} --under=online_accuracy '
              f'--out={shlex.quote(str(Path(config.out) / "report"))}')
        print(f'or look at them in TensorBoard with\ntensorboard --logdir={shlex.quote(str(config.out))}')


# --- data -------------------------------------------------------------------


def load_images(source):
    """
    Args:
        source (str | PathLike): see ``--mnist``

    Returns:
        Tuple[Tensor, Tensor]: pixels in [0, 1] with a row for each image, and labels

    Example:
        >>> images, labels = load_images('digits')
        >>> tuple(images.shape), images.max().item(), labels[:4].tolist()
        ((1797, 784), 1.0, [0, 1, 2, 3])
    """
    if str(source) == 'digits':
        from sklearn.datasets import load_digits
        digits = load_digits()
        images = F.interpolate(torch.tensor(digits.images).unsqueeze(1) / 16, size=(SIDE, SIDE), mode='bilinear')
        labels = torch.tensor(digits.target)
    elif str(source).endswith('.npz'):
        with np.load(source) as file:
            images, labels = torch.tensor(file['x_train']) / 255, torch.tensor(file['y_train'])
    else:
        from torchvision.datasets import MNIST
        mnist = MNIST(source, train=True, download=True)
        images, labels = mnist.data / 255, mnist.targets
    return images.float().flatten(1), labels.long()


class PermutedMnist(pl.LightningDataModule):
    """
    Epoch k trains on task k and validates on the task after it.

    Needs ``Trainer(reload_dataloaders_every_n_epochs=1)``.

    Args:
        images (Tensor): a row for each image
        labels (Tensor): their classes
        examples (int): images in a task
        batch_size (int): images in a step
        seed (int): of the tasks
    """

    def __init__(self, images, labels, examples, batch_size, seed):
        super().__init__()
        self.save_hyperparameters(ignore=['images', 'labels'])
        self.images = images
        self.labels = labels

    def task(self, number):
        """
        Args:
            number (int): which task

        Returns:
            Tuple[Tensor, Tensor]: its images and labels, in the order in which it shows them
        """
        random = np.random.default_rng((self.hparams.seed, number))
        pixels = random.permutation(self.images.shape[1])
        order = random.permutation(len(self.images))[:max(self.hparams.examples, MEASURED)]
        return self.images[order][:, pixels], self.labels[order]

    def train_dataloader(self):
        number = self.trainer.current_epoch
        size = self.hparams.batch_size
        # Epoch 0 is one batch that is not learned from.
        count = self.hparams.examples if number else size
        images, labels = self.task(number)
        return make_loader(images[:count], labels[:count], size)

    def val_dataloader(self):
        images, labels = self.task(self.trainer.current_epoch + 1)
        return make_loader(images[:MEASURED], labels[:MEASURED], MEASURED)


def make_loader(images, labels, size):
    """ Batches as slices of what is in memory, which is much faster than to collect them image by image. """
    return DataLoader(list(zip(images.split(size), labels.split(size), strict=True)), batch_size=None)


# --- network ----------------------------------------------------------------


class Net(pl.LightningModule):
    """
    Three hidden ReLU layers, Kaiming-uniform weights, plain SGD.

    Logs ``online_accuracy``: how many images of a task were classified
    correctly when they came, before the network learned from them.

    Args:
        lr (float): the step size
        width (int): units in each hidden layer
    """

    def __init__(self, lr, width):
        super().__init__()
        self.save_hyperparameters()
        sizes = [SIDE * SIDE, width, width, width]
        hidden = [[nn.Linear(*pair), nn.ReLU()] for pair in zip(sizes, sizes[1:], strict=False)]
        self.layers = nn.Sequential(*sum(hidden, []), nn.Linear(width, 10))
        for layer in self.layers[::2]:
            nonlinearity = 'linear' if layer is self.layers[-1] else 'relu'
            nn.init.kaiming_uniform_(layer.weight, nonlinearity=nonlinearity)
            nn.init.zeros_(layer.bias)

    def forward(self, images):
        return self.layers(images)

    def on_train_epoch_start(self):
        self.seen, self.correct = 0, 0

    def training_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        self.seen += len(labels)
        self.correct += (logits.detach().argmax(1) == labels).sum()
        return F.cross_entropy(logits, labels)

    def on_train_epoch_end(self):
        if self.current_epoch:
            accuracy = self.correct / self.seen
            self.log('online_accuracy', accuracy)
            if self.current_epoch % max(1, (self.trainer.max_epochs - 1) // 5) == 0:
                print(f'step size {self.hparams.lr:g}, task {self.current_epoch}: online accuracy {accuracy:.3f}')

    def validation_step(self, batch, batch_idx):
        self(batch[0])  # for PlasticityMonitor, which looks on

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: float(epoch > 0))]


def train(images, labels, step_size, config):
    """
    Learn all tasks with one step size.

    Args:
        images (Tensor): a row for each image
        labels (Tensor): their classes
        step_size (float): learning rate
        config (OnlinePermutedMnistCLI): all other settings

    Returns:
        Path: the log folder
    """
    from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
    torch.manual_seed(config.seed)
    net = Net(step_size, config.width)
    data = PermutedMnist(images, labels, config.examples, config.batch_size, config.seed)
    table = CSVLogger(config.out, name=f'lr{step_size:g}')
    events = TensorBoardLogger(config.out, name=table.name, version=table.version, default_hp_metric=False)
    trainer = pl.Trainer(
        max_epochs=config.tasks + 1,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[PlasticityMonitor(interval='epoch', source='validation', samples=MEASURED)],
        logger=[table, events],
        accelerator=config.accelerator,
        devices=1,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(net, data)
    return Path(trainer.log_dir)


# --- results ----------------------------------------------------------------


def read_run(folder):
    """
    Args:
        folder (str | PathLike): log folder of a run

    Returns:
        Dict[str, List[float]]: of each task its online accuracy, and each metric as it was before that task; the
        metrics have one value more, after the last task. What was measured before the first step, with the step -1,
        is left out, since epoch 0 measures the fresh network too
    """
    curves = {'online_accuracy': []}
    with open(Path(folder) / 'metrics.csv', newline='') as file:
        curves['online_accuracy'] = [float(row['online_accuracy']) for row in csv.DictReader(file)
                                     if row.get('online_accuracy')]
    for line in (Path(folder) / 'plasticity.jsonl').read_text().splitlines():
        row = json.loads(line)
        if row['step'] >= 0:
            curves.setdefault(row['metric'], []).append(float('nan') if row['value'] is None else row['value'])
    return curves


def print_table(folders):
    """
    Print the means over the first and the last fifth of the tasks.

    Args:
        folders (List[Path]): log folders
    """
    titles = ['online_accuracy', 'weight_mag', 'dead_units', 'feature_erank']
    print('\nMean over the first fifth of the tasks, and over the last')
    print(f'{"run":>10} ' + ''.join(f'{title:>20}' for title in titles))
    for folder in folders:
        curves = read_run(folder)
        cells = []
        for title in titles:
            values = curves[title]
            fifth = max(1, len(values) // 5)
            cells.append(f'{np.mean(values[:fifth]):.3f} -> {np.mean(values[-fifth:]):.3f}')
        print(f'{folder.parent.name:>10} ' + ''.join(f'{cell:>20}' for cell in cells))


if __name__ == '__main__':
    OnlinePermutedMnistCLI.main()
