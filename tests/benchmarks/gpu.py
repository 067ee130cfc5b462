"""
On a GPU: whether the numbers are right, how often the host waits, and what each metric costs beside a training step.

    python tests/benchmarks/gpu.py [--out results.json]

Run it with the Python in which the wheel of this repository is installed. First come the tests of
``tests/test_cuda.py``; then ResNet-50 and a transformer of a billion parameters are trained for some steps with each
metric on every second one, which takes 40 GB of the GPU's memory. It prints tables in Markdown. With
``--device=cpu --small`` it takes no GPU and a minute or two, and tells nothing but that it works.
"""
import argparse
import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine import publisher
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS

TESTS = Path(__file__).resolve().parents[1]
# Steps that are left out: the first ones choose kernels and get memory.
WARM = 4


class Transformer(nn.Module):
    """ Predicts the next token; the head has the weights of the embedding. """

    def __init__(self, layers, width, tokens):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // 16, 4 * width, dropout=0., activation='gelu', batch_first=True,
                                       norm_first=True) for _ in range(layers))

    def forward(self, tokens):
        x = self.embedding(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return (x @ self.embedding.weight.T).flatten(0, 1)


def resnet(small):
    """ Network, input and target. """
    if small:
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(),
                            nn.Linear(144, 10))
        return net, torch.randn(8, 3, 10, 10), torch.randint(0, 10, (8,))
    from torchvision.models import resnet50
    return resnet50(), torch.randn(64, 3, 224, 224), torch.randint(0, 1000, (64,))


def transformer(small):
    """ Network, input and target. """
    layers, width, tokens, length = (2, 32, 100, 16) if small else (18, 2048, 50304, 1024)
    text = torch.randint(0, tokens, (4, length + 1))
    return Transformer(layers, width, tokens), text[:, :-1], text[:, 1:].flatten()


class Module(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-5, fused=True)


class Clock(pl.Callback):
    """ Seconds of each step, from the device idle to the device idle, what of it the host waits, and bytes at most. """

    def __init__(self):
        self.starts, self.waits, self.bytes = [], [], []

    def on_train_batch_start(self, trainer, module, *args):
        if module.device.type == 'cuda':
            torch.cuda.synchronize()
            self.bytes.append(torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        self.starts.append(time.perf_counter())
        self.waits.append(0.)

    def on_train_end(self, trainer, module):
        self.on_train_batch_start(trainer, module)

    @contextlib.contextmanager
    def watch_transfers(self):
        """ The one place at which the host waits for our numbers. """
        to_host = publisher.to_host

        def timed(tables):
            start = time.perf_counter()
            numbers = to_host(tables)
            if self.waits:
                self.waits[-1] += time.perf_counter() - start
            return numbers
        publisher.to_host = timed
        try:
            yield
        finally:
            publisher.to_host = to_host

    def medians(self, first, every=1):
        """ Of each second step from one on, or of all. """
        seconds = [end - start for start, end in zip(self.starts, self.starts[1:], strict=False)]
        return {'seconds': _median(seconds[first::every]), 'wait': _median(self.waits[:-1][first::every]),
                'bytes': max(self.bytes[1:][first::every], default=None)}


def _median(numbers):
    return sorted(numbers)[len(numbers) // 2]


def train(module, batch, steps, args, metrics=None):
    """ Train on one batch; the Clock, and whether something was measured. """
    folder, clock = tempfile.mkdtemp(), Clock()
    monitor = [] if metrics is None else [PlasticityMonitor(metrics, interval=2, source='train', samples=len(batch[0]))]
    trainer = pl.Trainer(
        max_steps=steps, accelerator='gpu' if args.device == 'cuda' else args.device, devices=1, logger=False,
        precision=args.precision, default_root_dir=folder, callbacks=[clock, *monitor], enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False)
    with clock.watch_transfers(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer.fit(module, torch.utils.data.DataLoader([batch] * steps, batch_size=None))
    lines = Path(folder, 'plasticity.jsonl')
    return clock, lines.exists() and any('"step": -1' not in line for line in lines.read_text().splitlines())


def measure(name, make, args):
    """ Of a network a row for each metric. """
    net, *batch = make(args.small)
    module, batch = Module(net), tuple(x.to(args.device) for x in batch)
    steps, rows = WARM + 2 * args.repeats, {}

    def without():
        return train(module, batch, steps, args)[0].medians(WARM)
    plain = without()
    print(f'\n### {name}: {sum(p.numel() for p in net.parameters()) / 1e6:,.1f} million parameters, a step of '
          f'{len(batch[0])} examples in {args.precision} takes {_ms(plain["seconds"])} ms{_memory(plain)}\n')
    print('| metric | a logged step, ms | more than one without | of that the host waits, ms | a step between, ms | '
          'more memory |')
    print('|---|---|---|---|---|---|')
    for metrics in args.metrics.split(','):
        try:
            plain = without()  # in turn, since a device that is warm has another clock
            clock, measured = train(module, batch, steps, args, metrics)
        except torch.OutOfMemoryError:
            print(f'| {metrics} | out of memory | | | | |', flush=True)
            continue
        # The steps 1, 3, 5, ... are logged.
        rows[metrics] = {'plain': plain, 'logged': clock.medians(WARM + 1, 2), 'between': clock.medians(WARM, 2),
                         'measured': measured}
        logged, between = rows[metrics]['logged'], rows[metrics]['between']
        more = '' if logged['bytes'] is None else f'{(logged["bytes"] - plain["bytes"]) / 2 ** 20:+,.0f} MiB'
        print(f'| {metrics} | {_ms(logged["seconds"])} | {logged["seconds"] / plain["seconds"] - 1:+.1%} | '
              f'{_ms(logged["wait"])} | {_ms(between["seconds"])} | {more if measured else "no value"} |', flush=True)
    return rows


def _ms(seconds):
    return f'{seconds * 1e3:,.2f}'


def _memory(own):
    return '' if own['bytes'] is None else f' and {own["bytes"] / 2 ** 30:.2f} GiB'


NETWORKS = {'ResNet-50': resnet, 'transformer': transformer}


def main(argv=None):
    """ All of it; what was measured (Dict[str, Any]), by network and metric. """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda', choices=['cuda', 'cpu'])
    parser.add_argument('--small', action='store_true', help='networks of some thousand parameters')
    parser.add_argument('--networks', default=','.join(NETWORKS), help='names, separated by commas')
    parser.add_argument('--metrics', default=','.join([*METRICS, 'paper', 'all']), help='metrics and groups, likewise')
    parser.add_argument('--precision', default='bf16-mixed', help='as the Trainer takes it')
    parser.add_argument('--repeats', type=int, default=7, help='steps that are logged, of each metric')
    parser.add_argument('--skip-tests', action='store_true', help='only measure')
    parser.add_argument('--out', type=Path, help='file for all numbers, as JSON')
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('there is no GPU: torch.cuda.is_available() is False; --device=cpu --small shows that it works')
    for package in ('pytorch_lightning', 'lightning.pytorch'):
        logging.getLogger(package).setLevel(logging.ERROR)
    device = torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'
    results = {'device': device, 'torch': torch.__version__, 'precision': args.precision}
    print(f'{device}, torch {torch.__version__}', flush=True)
    if not args.skip_tests:
        results['tests failed'] = subprocess.call([sys.executable, '-m', 'pytest', 'test_cuda.py'], cwd=TESTS,
                                                  env={**os.environ, 'GEOWATCH_PREIMPORT': '0'})
    torch.manual_seed(0)
    for name in args.networks.split(','):
        results[name] = measure(name, NETWORKS[name], args)
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1))
    return results


if __name__ == '__main__':
    sys.exit(bool(main().get('tests failed')))
