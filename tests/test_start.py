"""
The untrained network: measured before the first step, on a line with the step -1, and only then.
"""
import csv
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from common import (
    ACTIVATIONS,
    AT_START,
    Net,
    Recorder,
    feature_values,
    fit,
    lines_of,
    make_data,
    make_net,
    plain_training,
    read_lines,
    weight_values,
)
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS

GRADIENTS = ('grad_mag', 'grad_norm', 'update_ratio')


def start_of(trainer):
    """ Metric to its line of the untrained network. """
    lines = [line for line in read_lines(trainer, start=True) if line['step'] < 0]
    assert {line['step'] for line in lines} <= {-1} and {line['epoch'] for line in lines} <= {0}
    assert all(count == 1 for count in Counter(line['metric'] for line in lines).values())
    return {line['metric']: line for line in lines}


def check_values(start, data):
    net = make_net(dead=5)
    with torch.no_grad():
        expected = {**weight_values(net), **feature_values(net.features(data))}
    for name, value in expected.items():
        if name in start:
            assert start[name]['value'] == pytest.approx(value, rel=1e-5), name
    assert {start[name]['samples'] for name in ACTIVATIONS if name in start} <= {len(data)}


@pytest.mark.parametrize('batches, seen', [(-1, 37), (2, 20), (1, 10), (0, 0)])
def test_on_the_batches_of_the_sanity_check(tmp_path, batches, seen):
    _, trainer, lines, data = fit(tmp_path, PlasticityMonitor('all', interval='epoch'), make_net(dead=5),
                                  num_sanity_val_steps=batches)
    start = start_of(trainer)
    assert set(start) == set(AT_START) - (set() if seen else set(ACTIVATIONS))
    check_values(start, data[:seen])
    # What follows is as without.
    rows = plain_training(make_net(dead=5), data)
    for name in ('dead_units', 'feature_erank', 'weight_mag', 'erank'):
        assert [line['step'] for line in lines_of(lines, name)] == [4, 9]
        assert lines_of(lines, name)[0]['value'] == pytest.approx(rows[4][name], rel=1e-5)


def test_samples_say_how_many(tmp_path):
    _, trainer, _, data = fit(tmp_path, PlasticityMonitor('dead_units', samples=12), make_net(dead=5),
                              num_sanity_val_steps=-1)
    check_values(start_of(trainer), data[:20])  # two batches of ten


@pytest.mark.parametrize('accumulate, seen', [(1, 8), (3, 24)])
@pytest.mark.parametrize('interval', [1, 4, 'epoch'])
def test_on_the_batches_of_the_first_step(tmp_path, accumulate, seen, interval):
    monitor = PlasticityMonitor('all', interval=interval, source='train')
    _, trainer, _, data = fit(tmp_path, monitor, make_net(dead=5), accumulate_grad_batches=accumulate)
    start = start_of(trainer)
    assert set(start) == set(AT_START)
    check_values(start, data[:seen])


def test_few_samples_end_before_the_first_step(tmp_path):
    _, trainer, _, data = fit(tmp_path, PlasticityMonitor('dead_units', source='train', samples=8), make_net(dead=5),
                              accumulate_grad_batches=3)
    check_values(start_of(trainer), data[:8])


def test_gradients_have_no_start(tmp_path):
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('grad_mag'))
    assert start_of(trainer) == {}


# --- only once, and only of a run that begins anew --------------------------------

def test_a_resumed_run_keeps_the_first_start(tmp_path):
    keeper = ModelCheckpoint(tmp_path / 'saved', save_last=True)
    logger = {'logger': CSVLogger(tmp_path, name='run', version=0)}
    _, first, _, _ = fit(tmp_path, PlasticityMonitor('all'), callbacks=[keeper], **logger)
    before = start_of(first)
    assert set(before) == set(AT_START)
    trainer = pl.Trainer(default_root_dir=tmp_path, max_epochs=3, accelerator='cpu', enable_progress_bar=False,
                         callbacks=[PlasticityMonitor('all')], enable_model_summary=False,
                         logger=CSVLogger(tmp_path, name='run', version=0))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer.fit(make_net(), DataLoader(make_data(), batch_size=8), DataLoader(make_data(), batch_size=10),
                    ckpt_path=keeper.last_model_path)
    assert start_of(trainer) == before
    assert {line['epoch'] for line in read_lines(trainer)} == {0, 1, 2}


def test_a_fit_that_goes_on_has_no_other_start(tmp_path):
    net, trainer, _, _ = fit(tmp_path, PlasticityMonitor('all'), max_epochs=1)
    before = start_of(trainer)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(net, DataLoader(make_data(), batch_size=8), DataLoader(make_data(), batch_size=10))
    assert start_of(trainer) == before


def test_it_costs_no_measurement_of_another_kind(tmp_path, monkeypatch):
    """ Spectra are taken as often as there are lines, and a start does not make a metric wait. """
    solve, calls = torch.linalg.eigvalsh, []
    monkeypatch.setattr(torch.linalg, 'eigvalsh', lambda *args, **kwargs: calls.append(1) or solve(*args, **kwargs))
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('erank,feature_erank', interval='epoch'))
    lines = read_lines(trainer, start=True)
    assert len(calls) == sum(len(line['layers']) for line in lines) == 3 * 3 + 3 * 2


def test_a_run_is_compared_with_its_fresh_network(tmp_path, capsys):
    """ Of which most units die in the first epoch: not 'dead 90 % -> 90 %'. """
    from geowatch.utils.lightning_ext.callbacks.plasticity_report import PlasticityReportCLI

    class Ruined(Net):
        def on_train_batch_end(self, *args):
            with torch.no_grad():
                self.fc1.bias[:14] = self.fc2.bias[:11] = -100.
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('dead_units'), make_net(Ruined), max_epochs=3,
                                 num_sanity_val_steps=-1)
    first = start_of(trainer)['dead_units']['value']
    assert first < 0.2 and all(line['value'] > 0.5 for line in lines)
    capsys.readouterr()
    assert PlasticityReportCLI.main(cmdline=0, runs=[trainer.log_dir], format='csv') == 0
    (row,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert float(row['dead_units.start']) == pytest.approx(first)
    assert row['signs'] == 'dead_units' and float(row['dead_units.end']) > 0.8


def test_an_interrupted_sanity_check_leaves_nothing(tmp_path):
    class Stops(Callback):
        def on_validation_batch_end(self, *args):
            raise RuntimeError('its own cause')
    with pytest.raises(RuntimeError, match='its own cause'):
        fit(tmp_path, PlasticityMonitor('all'), callbacks=[Stops()])
    assert torch.overrides._get_current_function_mode() is None


# --- where it goes ------------------------------------------------------------------

def test_what_others_watch_is_there_from_the_start(tmp_path):
    """ Though Lightning forgets it after the sanity check. """
    class Watches(Callback):
        def on_train_start(self, trainer, module):
            seen.update(trainer.callback_metrics)

    seen = {}
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('all'), callbacks=[Watches()])
    assert {f'plasticity/{name}' for name in AT_START} == set(seen)
    start = start_of(trainer)
    assert {name: float(x) for name, x in seen.items()} == pytest.approx(
        {f'plasticity/{name}': line['value'] for name, line in start.items()})


def test_early_stopping_looks_before_the_first_measurement(tmp_path):
    stopping = EarlyStopping('plasticity/erank', mode='max', patience=100, strict=True)
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('erank', interval='epoch'), callbacks=[stopping],
                           val_check_interval=0.25, n=64)
    assert trainer.global_step == 16 and not stopping.stopped_epoch


def test_loggers_get_it(tmp_path):
    own = Recorder(tmp_path)
    loggers = [own, CSVLogger(tmp_path, name='csv'), TensorBoardLogger(tmp_path, name='tb')]
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('all'), logger=loggers)
    expected = {f'plasticity/{name}': pytest.approx(line['value'], rel=1e-6)
                for name, line in start_of(trainer).items()}
    assert {key: value for step, key, value in own.table(start=True) if step == -1} == expected
    rows = list(csv.DictReader((Path(loggers[1].log_dir) / 'metrics.csv').open()))
    got = {}
    for row in rows:
        if row['step'] == '-1':
            got.update({key: float(value) for key, value in row.items() if key.startswith('plasticity') and value})
    assert got == expected
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(loggers[2].log_dir, size_guidance={'scalars': 0}).Reload()
    for name in METRICS:
        steps = [event.step for event in events.Scalars(f'plasticity/{name}')]
        assert steps == sorted(set(steps)) and (steps[0] == -1) == (name in AT_START)


def test_wandb_takes_it(tmp_path, monkeypatch):
    pytest.importorskip('wandb', reason='wandb is not installed: its logger was not tried with a step of -1')
    from pytorch_lightning.loggers import WandbLogger
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    logger, calls = WandbLogger(save_dir=tmp_path, offline=True), []
    log = logger.experiment.log
    monkeypatch.setattr(logger.experiment, 'log',
                        lambda values, **kwargs: calls.append(values) or log(values, **kwargs))
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('weight_mag,dead_units', interval='epoch'), logger=logger)
    logger.experiment.finish()
    steps = [own['trainer/global_step'] for own in calls if 'plasticity/weight_mag' in own]
    assert steps == [-1, 4, 9]


def test_numbers_of_the_start_are_plain(tmp_path):
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('all'))
    assert all(np.isfinite(line['value']) for line in start_of(trainer).values())
