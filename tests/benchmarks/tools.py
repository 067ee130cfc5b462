"""
A training of ResNet-18 that each tool watches on every second step, with what each step has cost.
"""
import contextlib
import logging
import tempfile
import time
import warnings
from collections import Counter

import torch
from table import SINGLE

BATCH, SIZE = 8, 64
READS = ('item', 'tolist', 'cpu', 'numpy', '__float__', '__bool__', '__int__', '__index__')


class Batches:
    """ Images and labels; notes the CPU time and the reads of the host between one batch and the next. """

    def __init__(self, steps):
        generator = torch.Generator().manual_seed(0)
        self._batches = [(torch.randn(BATCH, 3, SIZE, SIZE, generator=generator),
                          torch.randint(0, 10, (BATCH,), generator=generator)) for _ in range(4)]
        self.batch_size = BATCH
        self._steps = steps
        self._reads = Counter()
        self._times, self._counts = [], []
        for name in READS:
            setattr(torch.Tensor, name, self._counting(name, getattr(torch.Tensor, name)))

    def _counting(self, name, original):
        def method(tensor, *args, **kwargs):
            self._reads[name] += 1
            return original(tensor, *args, **kwargs)
        return method

    def __len__(self):
        return self._steps

    def __iter__(self):
        self._times, self._counts = [], []
        for i in range(self._steps):
            self._counts.append(sum(self._reads.values()))
            self._times.append(time.process_time())
            yield self._batches[i % 4]

    def steps(self):
        """ CPU seconds and reads of each step. The frameworks fetch at most one batch ahead. """
        return [(after - before, reads - before_reads) for before, after, before_reads, reads in zip(
            self._times, self._times[1:], self._counts, self._counts[1:], strict=False)]


def resnet():
    import torchvision
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10)


def lightning_resnet(**methods):
    """ ResNet-18 as a LightningModule, with more methods where a tool or a row wants them. """
    import pytorch_lightning as pl

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = resnet()

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    for name, method in methods.items():
        setattr(Net, name, method)
    return Net()


def run_lightning(batches, callbacks=(), logger=None, **methods):
    import pytorch_lightning as pl
    logging.getLogger('pytorch_lightning').setLevel(logging.ERROR)
    folder, net = tempfile.mkdtemp(), lightning_resnet(**methods)
    if logger is None:
        logger = pl.loggers.TensorBoardLogger(folder)
    elif callable(logger):
        logger = logger(folder, net)
    pl.Trainer(max_epochs=1, accelerator='cpu', logger=logger, default_root_dir=folder, callbacks=list(callbacks),
               enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
               log_every_n_steps=2).fit(net, batches)


# --- the tools -------------------------------------------------------------------

def ours(batches, metrics='weight_mag,grad_mag,dead_units'):
    from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
    monitor = PlasticityMonitor(metrics, interval=2, source='train', samples=BATCH)
    run_lightning(batches, [monitor])


def ours_paper(batches):
    ours(batches, 'paper')


def ours_alone(name):
    def run(batches):
        ours(batches, f'{name}@2')
    return run


def ours_all(batches):
    ours(batches, 'all')


def lightning_grad_norm(batches):
    from pytorch_lightning.utilities import grad_norm

    def on_before_optimizer_step(self, optimizer):
        if self.trainer.fit_loop.epoch_loop._batches_that_stepped % 2:
            self.log_dict(grad_norm(self, norm_type=2))

    run_lightning(batches, on_before_optimizer_step=on_before_optimizer_step)


def wandb_watch(batches):
    import wandb
    from pytorch_lightning.loggers import WandbLogger

    def logger(folder, net):
        logger = WandbLogger(save_dir=folder, offline=True, log_model=False)
        logger.watch(net, log='all', log_freq=2, log_graph=False)
        return logger

    run_lightning(batches, logger=logger)
    wandb.finish()


def ormas(batches):
    from ormas_monitor.integrations.lightning import OrmasMonitorCallback
    run_lightning(batches, [OrmasMonitorCallback(check_every=2, write_report=False, verbose=False)])


def module_monitor(batches):
    import pytorch_lightning as pl
    from torch_module_monitor import ModuleMonitor

    class Callback(pl.Callback):
        """ As its manual says: means of absolute values, and the share of zeros of each module's output. """

        def on_fit_start(self, trainer, pl_module):
            self.monitor = ModuleMonitor(monitor_step_fn=lambda step: step % 2)
            self.monitor.set_module(pl_module.net)
            self.monitor.add_parameter_metric('mag', lambda x: x.abs().mean())
            self.monitor.add_gradient_metric('mag', lambda x: x.abs().mean())
            self.monitor.add_gradient_metric('norm', lambda x: x.norm())
            self.monitor.add_activation_metric('zero', lambda x: (x == 0).float().mean())

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.monitor.begin_step(batch_idx)

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if self.monitor.is_monitoring():
                self.monitor.monitor_parameters()
                self.monitor.monitor_gradients()
                self.monitor.end_step()
                trainer.logger.log_metrics(self.monitor.get_step_metrics(), step=trainer.global_step)
            else:
                self.monitor.end_step()

    run_lightning(batches, [Callback()])


def traintools_health(batches):
    """ Between backward and step, as its manual says: norms of each parameter and its gradient, and their ratio. """
    from traintools import GradientHealthMonitor
    monitor = GradientHealthMonitor()

    def on_before_optimizer_step(self, optimizer):
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        if step % 2:
            report = monitor.inspect(self.net, step=step, lr=optimizer.param_groups[0]['lr'])
            self.log_dict({'grad_norm': report.total_grad_norm, 'update_ratio': report.global_update_ratio})

    run_lightning(batches, on_before_optimizer_step=on_before_optimizer_step)


def traintools_probe(batches):
    """ Dormant units and ranks of up to 1024 rows of features of each activation module; paused on other steps. """
    from traintools import PlasticityProbe

    def on_fit_start(self):
        self.probe = PlasticityProbe(self.net)

    def training_step(self, batch, batch_idx):
        with contextlib.nullcontext() if batch_idx % 2 else self.probe.paused():
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer):
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        if step % 2:
            self.log('plasticity', self.probe.measure(step=step).global_score)
            self.probe.reset_buffers()

    run_lightning(batches, on_fit_start=on_fit_start, training_step=training_step,
                  on_before_optimizer_step=on_before_optimizer_step)


def fastai(batches):
    from fastai.callback.core import Callback, CancelValidException
    from fastai.callback.hook import ActivationStats
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import SGD

    class NoValidation(Callback):
        def before_validate(self):
            raise CancelValidException

    batches.to = lambda device: batches
    batches.device = torch.device('cpu')
    # By default it looks at all modules with parameters.
    learner = Learner(DataLoaders(batches, batches), resnet(), loss_func=torch.nn.functional.cross_entropy,
                      opt_func=SGD, lr=1e-3, cbs=[ActivationStats(every=2), NoValidation()])
    with learner.no_logging():
        learner.fit(1)


def composer(batches):
    from composer import Trainer
    from composer.callbacks import ActivationMonitor
    from composer.loggers import InMemoryLogger
    from composer.models import ComposerModel

    class Net(ComposerModel):
        def __init__(self):
            super().__init__()
            self.net = resnet()

        def forward(self, batch):
            return self.net(batch[0])

        def loss(self, outputs, batch, *args, **kwargs):
            return torch.nn.functional.cross_entropy(outputs, batch[1])

    net = Net()
    Trainer(model=net, train_dataloader=batches, max_duration='1ep', device='cpu', progress_bar=False,
            optimizers=torch.optim.SGD(net.parameters(), lr=1e-3), loggers=[InMemoryLogger()],
            callbacks=[ActivationMonitor(interval='2ba', only_log_wandb=False)]).fit()


TOOLS = {
    'ours: weight_mag, grad_mag, dead_units': ours, 'ours: those of the paper': ours_paper,
    **{f'ours: {name}': ours_alone(name) for name in SINGLE},
    'ours: all': ours_all, 'ormas-monitor': ormas, 'fastai ActivationStats': fastai,
    'Composer ActivationMonitor': composer,
    'wandb.watch(log="all")': wandb_watch, 'torch-module-monitor': module_monitor,
    'Lightning grad_norm': lightning_grad_norm, 'traintools GradientHealthMonitor': traintools_health,
    'traintools PlasticityProbe': traintools_probe,
}


def watched_steps(name, steps=106):
    """
    Each watched step is compared with the mean of the two beside it, so that a slow minute of the machine is in both.

    Args:
        name (str): of a tool
        steps (int): to train

    Returns:
        dict: CPU seconds of a step without the tool, how many more one with it
            takes, and how many reads of the host it has more; medians
    """
    warnings.filterwarnings('ignore')
    batches = Batches(steps)
    TOOLS[name](batches)
    rows = batches.steps()[6:]
    found = []
    # The odd or the even ones, whichever cost more: that a tool is cheaper than nothing is noise.
    for start in (0, 1):
        others, own = rows[start::2], rows[start + 1::2]
        seconds, reads = ([watched[i] - (before[i] + after[i]) / 2 for before, watched, after in zip(
            others, own, others[1:], strict=False)] for i in (0, 1))
        found.append({'without': _median([time for time, _ in others]), 'more': _median(seconds),
                      'reads': int(_median(reads))})
    return max(found, key=lambda own: own['more'])


def _median(numbers):
    return sorted(numbers)[len(numbers) // 2]
