"""
Where results go: loggers, callback_metrics, plasticity.jsonl, the message at fit start.
"""
import json
import math
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from common import TAGS, Net, Recorder, fit, lines_of, make_data, make_net, matrices, mean_abs, read_lines
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor

KEYS = {f'plasticity/{tag}' for tag in TAGS}


def read_events(log_dir):
    """ Scalars of the event files of a folder: tag to list of (step, value). """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(log_dir), size_guidance={'scalars': 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()['scalars']}


def table(lines):
    """ What plasticity.jsonl holds, as a Recorder's table. """
    return sorted((line['step'], f'plasticity/{line["metric"]}', line['value']) for line in lines)


# --- loggers -----------------------------------------------------------------

def test_event_file(tmp_path):
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor(interval=2))
    lines = read_lines(trainer, start=True)
    events = read_events(trainer.log_dir)
    assert set(events) == KEYS
    for tag in TAGS:
        expected = [(line['step'], pytest.approx(line['value'], rel=1e-6)) for line in lines_of(lines, tag)]
        assert events[f'plasticity/{tag}'] == expected
        assert len(expected) >= 2


def test_two_loggers_get_the_same(tmp_path):
    loggers = [Recorder(tmp_path), CSVLogger(tmp_path, name='csv'), TensorBoardLogger(tmp_path, name='tb')]
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor(interval=3), logger=loggers)
    lines = read_lines(trainer, start=True)
    events = read_events(loggers[2].log_dir)
    assert sorted((step, tag, pytest.approx(value, rel=1e-6)) for tag, pairs in events.items()
                  for step, value in pairs) == table(lines)
    assert loggers[0].table(start=True) == [(step, key, pytest.approx(value)) for step, key, value in table(lines)]
    header = (Path(loggers[1].log_dir) / 'metrics.csv').read_text().splitlines()[0]
    assert set(header.split(',')) >= KEYS


def test_per_layer(tmp_path):
    logger = Recorder(tmp_path)
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor(per_layer=True), logger=logger)
    expected = table(lines) + [
        (line['step'], f'plasticity_layers/{line["metric"]}/{name}', layer['value'])
        for line in lines for name, layer in line['layers'].items()]
    assert logger.table() == [(step, key, pytest.approx(value)) for step, key, value in sorted(expected)]
    assert {f'plasticity_layers/{tag}/{layer}' for tag in ('weight_mag', 'grad_mag', 'grad_norm', 'erank')
            for layer in ('fc1', 'fc2', 'head')} < {key for _, key, _ in expected}
    for tag in ('dead_units', 'feature_erank'):
        assert len([key for key in {key for _, key, _ in expected} if key.startswith(f'plasticity_layers/{tag}/')]) == 2


def test_layers_stay_out_of_the_loggers(tmp_path):
    # The host draws a picture for each tag.
    logger = Recorder(tmp_path)
    fit(tmp_path, PlasticityMonitor(), logger=logger)
    assert {key for _, key, _ in logger.table()} == KEYS


def test_x_axis_is_that_of_lightning(tmp_path):
    class Logs(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log('loss', loss, on_step=True)
            return loss
    logger = Recorder(tmp_path)
    fit(tmp_path, PlasticityMonitor('weight_mag,grad_mag'), make_net(Logs), logger=logger, log_every_n_steps=2,
        accumulate_grad_batches=2, n=64)
    steps = {tag: [step for step, key, _ in logger.table() if key == tag]
             for tag in ('loss', 'plasticity/weight_mag', 'plasticity/grad_mag')}
    assert len(set(steps['loss'])) >= 3
    assert set(steps['plasticity/weight_mag']) == set(steps['plasticity/grad_mag']) == set(steps['loss'])


# --- callback_metrics --------------------------------------------------------

def test_callback_metrics_are_the_last_values(tmp_path):
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor(interval=1))
    newest = {f'plasticity/{line["metric"]}': line['value'] for line in lines}
    assert set(newest) == KEYS
    for key, value in newest.items():
        assert isinstance(trainer.callback_metrics[key], torch.Tensor)
        assert float(trainer.callback_metrics[key]) == pytest.approx(value)


class Shrinking(Net):
    """ Weights become smaller in each epoch. """

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, weight_decay=10.)


METRICS_TO_WATCH = ['weight_mag', 'grad_mag', 'erank', 'dead_units', 'feature_erank']


@pytest.mark.parametrize('source', ['train', 'validation'])
@pytest.mark.parametrize('first', [False, True], ids=['after the monitor', 'before the monitor'])
@pytest.mark.parametrize('metric', METRICS_TO_WATCH)
def test_early_stopping(tmp_path, metric, first, source):
    # Whatever the order of the callbacks, it sees a value at the end of the first epoch.
    stopping = EarlyStopping(f'plasticity/{metric}', stopping_threshold=-1., mode='max', strict=True,
                             check_on_train_epoch_end=source == 'train')
    monitor = PlasticityMonitor(interval='epoch', source=source)
    one, two = (stopping, monitor) if first else (monitor, stopping)
    _, trainer, lines, _ = fit(tmp_path, one, callbacks=[two], max_epochs=5)
    assert trainer.current_epoch == 1 and trainer.global_step == 5
    assert stopping.stopped_epoch == 0
    assert {line['epoch'] for line in lines} == {0}


def test_early_stopping_by_patience(tmp_path):
    stopping = EarlyStopping('plasticity/weight_mag', mode='max', patience=2, check_on_train_epoch_end=True)
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag', interval='epoch'), make_net(Shrinking),
                               callbacks=[stopping], max_epochs=10)
    values = [line['value'] for line in lines]
    assert values == sorted(values, reverse=True) and len(values) == 3
    assert float(stopping.best_score) == pytest.approx(values[0])


def test_model_checkpoint_keeps_the_best(tmp_path):
    keeper = ModelCheckpoint(tmp_path / 'best', monitor='plasticity/weight_mag', mode='max', save_top_k=1,
                             filename='{step}')
    net, _, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag', interval='epoch'), make_net(Shrinking),
                           callbacks=[keeper], max_epochs=3)
    assert [line['step'] for line in lines] == [4, 9, 14]
    assert Path(keeper.best_model_path).stem == 'step=5'
    state = torch.load(keeper.best_model_path, weights_only=True)['state_dict']
    best = make_net()
    best.load_state_dict(state)
    assert float(keeper.best_model_score) == pytest.approx(mean_abs(matrices(best)), rel=1e-6)
    assert mean_abs(matrices(net)) < 0.9 * mean_abs(matrices(best))


def test_model_checkpoint_at_each_step(tmp_path):
    keeper = ModelCheckpoint(tmp_path / 'best', monitor='plasticity/weight_mag', mode='min', save_top_k=2,
                             every_n_train_steps=2)
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1'), make_net(Shrinking), callbacks=[keeper],
                         validate=False)
    values = {line['step'] + 1: line['value'] for line in lines}
    assert sorted(float(score) for score in keeper.best_k_models.values()) == pytest.approx([values[10], values[8]])


# --- plasticity.jsonl --------------------------------------------------------

@pytest.mark.parametrize('source', ['train', 'validation'])
def test_lines(tmp_path, source):
    before = time.time()
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor(source=source))
    assert {line['metric'] for line in lines} == set(TAGS)
    for line in lines:
        more = ['unmoved', 'lr'] if line['metric'] == 'update_ratio' else []
        assert list(line) == ['metric', 'step', 'epoch', 'time', 'samples', 'value', 'layers', *more, 'run']
        assert line['epoch'] == line['step'] // 5
        assert before <= line['time'] <= time.time()
        assert len(line['layers']) == (2 if line['metric'] in ('dead_units', 'feature_erank') else 3)
        assert all(math.isfinite(layer['value']) for layer in line['layers'].values())
        assert all(('units' in layer) == (line['metric'] == 'dead_units') for layer in line['layers'].values())
    for tag in ('dead_units', 'feature_erank'):
        assert {line['samples'] for line in lines_of(lines, tag)} == {37}
        assert len({tuple(line['layers']) for line in lines_of(lines, tag)}) == 1
    times = [line['time'] for line in lines]
    assert times == sorted(times)
    assert [path.name for path in Path(trainer.log_dir).glob('*.jsonl')] == ['plasticity.jsonl']


def test_not_finite_is_null(tmp_path):
    net = make_net()
    with torch.no_grad():
        net.head.weight[0, 0] = float('nan')
    logger = Recorder(tmp_path)
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag,grad_mag,erank'), net, logger=logger)
    assert trainer.global_step == 10
    assert {line['metric'] for line in lines} == {'weight_mag', 'grad_mag', 'grad_norm', 'erank'}
    assert all(line['layers']['head']['value'] is None for line in lines if line['metric'] in ('weight_mag', 'erank'))


class Crashes(Net):
    """ Looks at the file from outside, in the middle of the run, then fails. """
    error = None

    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            self.at_crash = read_lines(self.trainer)
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize('error', [RuntimeError('the step has failed'), KeyboardInterrupt(), SystemExit(3)])
def test_lines_survive_a_crash(tmp_path, error):
    net = make_net(Crashes)
    net.error = error
    # Lightning makes a SystemExit of Ctrl-C.
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        fit(tmp_path, PlasticityMonitor('weight_mag@1,erank@2', interval=1), net)
    # They are on disk before the run fails, so that a killed process keeps them too.
    assert [(line['metric'], line['step']) for line in net.at_crash] == [
        ('weight_mag', 0), ('weight_mag', 1), ('erank', 1), ('weight_mag', 2)]
    assert read_lines(net.trainer)[:4] == net.at_crash


def test_second_fit_in_one_folder_appends(tmp_path):
    for epochs in (1, 2):
        _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag', interval='epoch'), max_epochs=1,
                                   logger=CSVLogger(tmp_path, name='run', version=0))
        assert [line['step'] for line in lines] == [4] * epochs


def test_resumed_run_goes_on(tmp_path):
    keeper = ModelCheckpoint(tmp_path / 'saved', save_last=True)
    fit(tmp_path, PlasticityMonitor('weight_mag', interval='epoch'), callbacks=[keeper])
    trainer = pl.Trainer(default_root_dir=tmp_path, max_epochs=3, accelerator='cpu', enable_progress_bar=False,
                         callbacks=[PlasticityMonitor('weight_mag', interval='epoch')])
    trainer.fit(make_net(), DataLoader(make_data(), batch_size=8), DataLoader(make_data(), batch_size=10),
                ckpt_path=keeper.last_model_path)
    assert [(line['step'], line['epoch']) for line in read_lines(trainer)] == [(14, 2)]


# --- off, and what is said ---------------------------------------------------

@pytest.mark.parametrize('value', ['1', 'true', 'True', 'on', 'yes'])
def test_kill_switch(tmp_path, value, monkeypatch, capsys):
    monkeypatch.setenv('DISABLE_PLASTICITY_MONITOR', value)
    logger = Recorder(tmp_path)
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor(interval=1), logger=logger)
    assert trainer.global_step == 10
    assert lines == [] and logger.calls == []
    assert not [key for key in trainer.callback_metrics if 'plasticity' in key]
    assert not list(tmp_path.rglob('plasticity.jsonl'))
    assert 'never measured' not in capsys.readouterr().out


@pytest.mark.parametrize('value', ['0', 'false', 'off', 'no', ''])
def test_kill_switch_that_is_off(tmp_path, value, monkeypatch):
    monkeypatch.setenv('DISABLE_PLASTICITY_MONITOR', value)
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag'), max_epochs=1)
    assert [line['step'] for line in lines] == [4]


def test_message_at_fit_start(tmp_path, capsys):
    class Says(Net):
        def on_train_start(self):
            self.said = capsys.readouterr()
    net = make_net(Says)
    net.fc2.weight.requires_grad_(False)
    fit(tmp_path, PlasticityMonitor('weight_mag@3,erank@epoch'), net)
    text = net.said.out + net.said.err
    assert text.count('PlasticityMonitor') == 1
    assert 'weight_mag' in text and 'erank' in text and '3' in text and 'epoch' in text
    assert 'frozen' in text  # what is not watched, and why
    after = capsys.readouterr()
    assert 'PlasticityMonitor' not in after.out + after.err  # it ends with a verdict: see test_alarms.py


def test_only_fit_measures(tmp_path):
    logger = Recorder(tmp_path)
    _, trainer, lines, data = fit(tmp_path, PlasticityMonitor(), logger=logger)
    calls = len(logger.calls)
    assert calls > 0
    loader = DataLoader(data, batch_size=10)
    trainer.validate(make_net(), loader, verbose=False)
    trainer.predict(make_net(), loader)
    assert len(logger.calls) == calls
    assert read_lines(trainer) == lines


def test_fast_dev_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor(), fast_dev_run=True)
    assert trainer.global_step == 1
    assert {key for key in trainer.callback_metrics if key.startswith('plasticity/')} == KEYS


def test_values_are_plain_json(tmp_path):
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor(), max_epochs=1)
    text = (Path(trainer.log_dir) / 'plasticity.jsonl').read_text()
    # With the untrained network, but for its gradients and steps.
    assert text.endswith('\n') and len(text.splitlines()) == 2 * len(TAGS) - 3
    assert all(isinstance(json.loads(line)['value'], (int, float)) for line in text.splitlines())
