"""
Faults: training goes on, or stops by its own cause, and what was measured is on disk.
"""
import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import resource
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from common import (
    ACTIVATIONS,
    TAGS,
    Net,
    Recorder,
    fit,
    last,
    lines_of,
    make_data,
    make_net,
    matrices,
    mean_abs,
    read_lines,
)
from process_runs import killed_run, run_processes
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.overrides import _get_current_function_mode
from torch.utils.data import DataLoader

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine import publisher
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.lines import JsonLines
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics import calls, tensors
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics import rows as rows_of_features
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS

SOURCES = pytest.mark.parametrize('source', ['train', 'validation'])


def everything(source='train', **kwargs):
    """ All metrics, as often as can be. """
    return PlasticityMonitor('all', interval=1, source=source, samples=8, **kwargs)


def fine(lines, *tags):
    """ Whether each of the tags has values, and the last one is a number. """
    return all(lines_of(lines, tag) and last(lines, tag)['value'] is not None for tag in tags)


def left_behind():
    """ What of a capture is still there. """
    hooks = torch.nn.modules.module
    return [_get_current_function_mode()] if _get_current_function_mode() else [
        *hooks._global_forward_hooks, *hooks._global_forward_pre_hooks]


def others(*tags):
    return tuple(tag for tag in TAGS if tag not in tags)


# --- a metric that fails -----------------------------------------------------

def fails(*args, **kwargs):
    raise RuntimeError('a fault of the metric')


def no_value(*statistics):
    return {'rows': 1.}


def no_number(*statistics):
    return 'many'


def no_scalar(*statistics):
    return np.ones(3)


def break_formula(monkeypatch, name, formula):
    monkeypatch.setitem(METRICS, name, dataclasses.replace(METRICS[name], formula=formula))


@SOURCES
@pytest.mark.parametrize('name, fault', [*((name, fails) for name in METRICS), *(
    (name, fault) for name in ('weight_mag', 'sign_entropy') for fault in (no_value, no_number, no_scalar))])
def test_formula_that_fails(tmp_path, name, fault, source, monkeypatch, capsys):
    break_formula(monkeypatch, name, fault)
    _, trainer, lines, _ = fit(tmp_path, everything(source))
    assert trainer.global_step == 10
    out = capsys.readouterr().out
    assert out.count('Traceback') == 1
    assert out.count(f'{name} failed') == 1
    assert not lines_of(lines, name)
    steps = [line['step'] for line in lines_of(lines, 'weight_mag' if name != 'weight_mag' else 'erank')]
    assert steps == list(range(10))
    assert fine(lines, *[other for other in METRICS if other != name])


# What makes which fields: the function or method to break, and the fields that are lost with it.
MAKERS = {
    'sums': ((tensors, 'sums'), ['weights.abs', 'weights.count', 'gradients.abs', 'gradients.count',
                                 'gradients.squares', 'weights.spectrum']),
    'grams': ((tensors, 'grams'), ['weights.spectrum']),
    'away': ((calls.Away, 'add'), ['activations.away']),
    'positive': ((calls.Positive, 'add'), ['activations.positive']),
    'samples': ((calls.Samples, 'add'), ['activations.away', 'activations.positive', 'activations.spectrum',
                                         'activations.centred_spectrum']),
    'rows': ((rows_of_features.Rows, 'add'), ['activations.spectrum', 'activations.centred_spectrum']),
    'rows of a batch': ((rows_of_features.Rows, 'end_batch'), ['activations.spectrum',
                                                               'activations.centred_spectrum']),
    'all rows': ((rows_of_features.Rows, 'finish'), ['activations.spectrum', 'activations.centred_spectrum']),
}


def break_maker(monkeypatch, place, name):
    if place is tensors:  # the registry holds the function
        fields = tensors.STATISTICS[getattr(tensors, name)]
        monkeypatch.delitem(tensors.STATISTICS, getattr(tensors, name))
        monkeypatch.setitem(tensors.STATISTICS, fails, fields)
    else:
        monkeypatch.setattr(place, name, fails)


@SOURCES
@pytest.mark.parametrize('maker', MAKERS)
def test_statistic_that_fails(tmp_path, maker, source, monkeypatch, capsys):
    """ What shares it is off with one traceback for each source, all else goes on. """
    where, fields = MAKERS[maker]
    break_maker(monkeypatch, *where)
    _, trainer, lines, _ = fit(tmp_path, everything(source))
    assert trainer.global_step == 10
    lost = {name for name, metric in METRICS.items()
            if any(f'{need.source}.{need.field}' in fields for need in metric.needs)}
    assert lost and not [line for line in lines if line['metric'] in lost]
    assert fine(lines, *(METRICS.keys() - lost))
    out = capsys.readouterr().out
    assert out.count('Traceback') == len({field.partition('.')[0] for field in fields})
    assert all(name in out for name in lost)


@SOURCES
@pytest.mark.parametrize('place, name', [(torch._C, '_current_graph_task_id'), (torch._C._functorch,
                                         'peek_interpreter_stack'), (torch.overrides, '_get_current_function_mode')])
def test_a_private_name_of_torch_that_is_gone(tmp_path, place, name, source, monkeypatch, capsys):
    """ It costs the metrics that need it, and not the import. """
    monkeypatch.delattr(place, name)
    _, trainer, lines, _ = fit(tmp_path, everything(source))
    assert trainer.global_step == 10
    assert {line['metric'] for line in lines} == METRICS.keys() - set(ACTIVATIONS)
    assert capsys.readouterr().out.count('Traceback') == 1


def test_formula_that_fails_late(tmp_path, monkeypatch, capsys):
    formula, calls = METRICS['erank'].formula, []

    def fails_late(spectrum):
        calls.append(1)
        if len(calls) > 3 * 4:  # of three layers: at the start, and three times more
            raise ValueError('late')
        return formula(spectrum)
    break_formula(monkeypatch, 'erank', fails_late)
    _, trainer, lines, _ = fit(tmp_path, everything())
    assert trainer.global_step == 10 and len(calls) == 13
    assert [line['step'] for line in lines_of(lines, 'erank')] == [0, 1, 2]
    assert [line['step'] for line in lines_of(lines, 'weight_mag')] == list(range(10))
    assert capsys.readouterr().out.count('Traceback') == 1


@SOURCES
def test_all_metrics_fail(tmp_path, source, monkeypatch, capsys):
    for name in METRICS:
        break_formula(monkeypatch, name, fails)
    _, trainer, _, _ = fit(tmp_path, everything(source))
    assert trainer.global_step == 10 and read_lines(trainer, start=True) == []
    assert capsys.readouterr().out.count('Traceback') == len(METRICS)


def test_interrupt_is_not_swallowed(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt
    break_formula(monkeypatch, 'grad_mag', interrupted)
    net = make_net()
    with contextlib.suppress(KeyboardInterrupt, SystemExit):  # Lightning before 2.3 returns
        fit(tmp_path, everything(), net)
    assert net.trainer.interrupted and net.trainer.global_step == 1
    assert not left_behind()


# --- numbers that are not finite ---------------------------------------------

@pytest.mark.parametrize('value', ['nan', 'inf', '-inf'])
def test_weights_that_are_not_finite(tmp_path, value):
    net = make_net()
    with torch.no_grad():
        net.head.weight[0, :3] = float(value)

    class Frozen(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            optimizer.zero_grad()  # else the other layers would not be finite soon
    _, trainer, lines, _ = fit(tmp_path, everything('validation'), net, callbacks=[Frozen()], max_epochs=1)
    assert trainer.global_step == 5
    for tag in ('weight_mag', 'erank'):
        for line in lines_of(lines, tag):
            assert line['layers']['head'] == {'value': None, 'nonfinite': 3 / 12}
            assert {key for name in ('fc1', 'fc2') for key in line['layers'][name]} == {'value'}
            assert line['value'] is not None
    weights = matrices(net)
    del weights['head']
    assert last(lines, 'weight_mag')['value'] == pytest.approx(mean_abs(weights), rel=1e-6)
    assert fine(lines, *ACTIVATIONS)


@pytest.mark.parametrize('clip', [
    {}, {'gradient_clip_val': 1.}, {'gradient_clip_val': 1., 'gradient_clip_algorithm': 'value'}],
    ids=['no clip', 'norm', 'value'])
def test_gradients_that_are_not_finite(tmp_path, clip):
    class Bad(Net):
        def on_after_backward(self):
            self.fc2.weight.grad[1, 2:5] = float('nan')

        def on_train_batch_end(self, *args):
            self.load_state_dict(self.before)  # what a careful user does
    net = make_net(Bad)
    net.before = copy.deepcopy(net.state_dict())
    _, trainer, lines, _ = fit(tmp_path, everything(), net, max_epochs=1, **clip)
    assert trainer.global_step == 5
    for tag in ('grad_mag', 'grad_norm'):
        assert len(lines_of(lines, tag)) == 5
        for line in lines_of(lines, tag):
            assert line['layers']['fc2'] == {'value': None, 'nonfinite': 3 / 192}
            assert list(line['layers']['fc1']) == list(line['layers']['head']) == ['value']
            assert line['value'] > 0
    for line in lines_of(lines, 'grad_norm'):  # of the others, not more
        assert line['value'] == pytest.approx(math.hypot(*(
            line['layers'][name]['value'] for name in ('fc1', 'head'))), rel=1e-6)


@SOURCES
def test_features_that_are_not_finite(tmp_path, source):
    class Bad(Net):
        def features(self, x):
            first = self.act(self.fc1(x))
            spoiled = first.detach().clone()
            spoiled[0, 3] = float('inf')
            torch.relu(self.fc2(spoiled))  # not used for the loss
            return first, torch.tanh(self.fc2(first))
    _, trainer, lines, data = fit(tmp_path, everything(source), make_net(Bad))
    assert trainer.global_step == 10
    for line in lines_of(lines, 'feature_erank'):
        bad = {name: own for name, own in line['layers'].items() if own['value'] is None}
        assert len(bad) == 1 and len(line['layers']) == 3
        assert 0 < next(iter(bad.values()))['nonfinite'] < 1
        assert line['value'] > 0
    for tag in set(ACTIVATIONS) - {'feature_erank'}:
        for line in lines_of(lines, tag):
            (bad,) = [own for own in line['layers'].values() if own['value'] is None]
            assert 0 < bad['nonfinite'] < 1 and line['value'] is not None


@SOURCES
def test_a_network_that_is_not_finite_has_no_value(tmp_path, source):
    """ Which looked healthy: nothing that is NaN is dead. """
    class Bad(Net):
        def features(self, x):
            first, second = super().features(x)
            return first, torch.tanh(self.fc2(first * float('nan')))
    monitor = PlasticityMonitor('dead_units,units', interval=1, source=source)
    _, _, lines, _ = fit(tmp_path, monitor, make_net(Bad))
    for tag in ('dead_units', 'sign_entropy', 'rare_units'):
        for line in lines_of(lines, tag):
            own = line['layers']['tanh']
            assert own['value'] is None and own['nonfinite'] == 1 and own['units'] == 12
            healthy = [x for name, x in line['layers'].items() if name != 'tanh']
            weighted = sum(x['value'] * x['units'] for x in healthy if x['value'] is not None)
            sizes = sum(x['units'] for x in healthy if x['value'] is not None)
            assert line['value'] == (pytest.approx(weighted / sizes) if sizes else None)


@pytest.mark.parametrize('error', [torch.linalg.LinAlgError, RuntimeError])
def test_solver_that_fails(tmp_path, error, monkeypatch, capsys):
    solve = torch.linalg.eigvalsh

    def fails_on_some(matrix, UPLO):
        if matrix.shape[-1] == 12:
            raise error('it did not converge')
        return solve(matrix, UPLO=UPLO)
    monkeypatch.setattr(torch.linalg, 'eigvalsh', fails_on_some)
    _, trainer, lines, _ = fit(tmp_path, everything())
    assert trainer.global_step == 10
    assert fine(lines, 'weight_mag', 'grad_mag', 'grad_norm', 'dead_units', 'sign_entropy')
    if error is torch.linalg.LinAlgError:  # one layer has no value, the others do
        assert last(lines, 'erank')['layers']['fc2'] == {'value': None}
        assert fine(lines, 'erank', 'feature_erank')
    else:  # whatever else may be wrong with it costs what needs the spectrum
        ranks = [name for name, metric in METRICS.items() if any('spectrum' in need.field for need in metric.needs)]
        assert len(ranks) == 6 and not [line for line in lines if line['metric'] in ranks]
        assert capsys.readouterr().out.count('Traceback') == 3  # of weights, of features, and of centred ones


def test_a_transfer_that_fails(tmp_path, monkeypatch, capsys):
    """ As where an error of a device shows only when its results are read. """
    def fails_with_spectra(tables):
        if any(('weights', 'spectrum') in table for table in tables) and len(calls) > 1:
            raise RuntimeError('the device has failed')
        calls.append(tables)
        return to_host(tables)
    to_host, calls = publisher.to_host, []
    monkeypatch.setattr(publisher, 'to_host', fails_with_spectra)
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1,erank@3,dead_units@epoch'))
    assert trainer.global_step == 10
    # What was to be moved together is off from then on.
    assert [line['step'] for line in lines_of(lines, 'weight_mag')] == [0, 1]
    assert not lines_of(lines, 'erank') and len(lines_of(lines, 'dead_units')) == 2
    said = capsys.readouterr().out
    assert said.count('RuntimeError: the device has failed') == 1
    assert 'erank failed and will not be measured any more' in said


# --- the log folder ----------------------------------------------------------

class Steps(Callback):
    """ Calls a function at the end of some step. """

    def __init__(self, step, function):
        self.step = step
        self.function = function

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            self.function()


def test_folder_removed_in_mid_run(tmp_path):
    logger = Recorder(tmp_path / 'logs')
    fpath = tmp_path / 'logs' / 'plasticity.jsonl'
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1'), logger=logger,
                           callbacks=[Steps(4, lambda: shutil.rmtree(fpath.parent))])
    assert trainer.global_step == 10
    assert [line['step'] for line in map(json.loads, fpath.read_text().splitlines())] == list(range(4, 10))
    assert [step for step, _, _ in logger.table()] == list(range(10))


def in_the_way(tmp_path):
    """ A folder in which nobody, not even root, can write. """
    (tmp_path / 'file').write_text('')
    return tmp_path / 'file' / 'logs'


def read_only(tmp_path):
    folder = tmp_path / 'logs'
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        pytest.skip('the user of this process may write in read-only folders')
    return folder


@pytest.mark.parametrize('folder', [in_the_way, read_only])
def test_folder_that_cannot_be_written(tmp_path, folder):
    logger = Recorder(folder(tmp_path))
    with pytest.warns(UserWarning, match='plasticity.jsonl cannot be written') as said:
        _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1'), logger=logger)
    assert len([x for x in said if 'cannot be written' in str(x.message)]) == 1
    assert trainer.global_step == 10
    assert [step for step, _, _ in logger.table()] == list(range(10))


def test_folder_that_can_be_written_again(tmp_path):
    # What could not be written is not lost.
    blocker = tmp_path / 'file'
    blocker.write_text('')
    logger = Recorder(blocker / 'logs')
    with pytest.warns(UserWarning, match='cannot be written'):
        fit(tmp_path, PlasticityMonitor('weight_mag@1'), logger=logger, callbacks=[Steps(6, blocker.unlink)])
    lines = (blocker / 'logs' / 'plasticity.jsonl').read_text().splitlines()
    assert [json.loads(line)['step'] for line in lines] == list(range(-1, 10))


class Frees(Callback):
    """ Makes room when training is over, after our last line. """

    def __init__(self, blocker):
        self.blocker = blocker

    def on_train_end(self, trainer, module):
        self.blocker.unlink()


def test_folder_that_can_be_written_when_training_is_over(tmp_path):
    blocker = tmp_path / 'file'
    blocker.write_text('')
    with pytest.warns(UserWarning, match='cannot be written'):
        fit(tmp_path, PlasticityMonitor('weight_mag@1'), logger=Recorder(blocker / 'logs'), callbacks=[Frees(blocker)])
    lines = (blocker / 'logs' / 'plasticity.jsonl').read_text().splitlines()
    assert [json.loads(line)['step'] for line in lines] == list(range(-1, 10))


def test_what_is_lost_in_the_end_is_said(tmp_path):
    with pytest.warns(UserWarning, match='11 lines of .*plasticity.jsonl could not be written and are lost'):
        fit(tmp_path, PlasticityMonitor('weight_mag@1'), logger=Recorder(in_the_way(tmp_path)))


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'elsewhere').mkdir()
    fit('.', PlasticityMonitor('weight_mag@1'), logger=Recorder('logs'),
        callbacks=[Steps(4, lambda: os.chdir('elsewhere'))])
    lines = (tmp_path / 'logs' / 'plasticity.jsonl').read_text().splitlines()
    assert [json.loads(line)['step'] for line in lines] == list(range(-1, 10))
    assert not list((tmp_path / 'elsewhere').iterdir())


def test_disk_that_is_full(tmp_path):
    # A limit of the process, under which a write stops half-way as on a full disk.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    rows = [{'step': i, 'text': 'x' * 100} for i in range(60)]
    fpath = tmp_path / 'a.jsonl'
    sink = JsonLines(fpath)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        with pytest.warns(UserWarning, match='cannot be written') as said:
            for row in rows[:50]:
                sink.add([row])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(said) == 1
    half = fpath.read_text()
    assert half.endswith('\n') and [json.loads(line) for line in half.splitlines()] == rows[:len(half.splitlines())]
    assert len(half) > 2500
    for row in rows[50:]:
        sink.add([row])
    assert [json.loads(line) for line in fpath.read_text().splitlines()] == rows


def test_disk_that_stays_full_costs_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(JsonLines, 'most', 1000)
    sink = JsonLines(in_the_way(tmp_path) / 'a.jsonl')
    with pytest.warns(UserWarning, match='cannot be written'):
        for step in range(500):
            sink.add([{'step': step}])
    (tmp_path / 'file').unlink()
    sink.add([{'step': 500}])
    steps = [json.loads(line)['step'] for line in sink.fpath.read_text().splitlines()]
    assert steps == list(range(steps[0], 501)) and 20 < len(steps) < 100


@pytest.mark.parametrize('tail, kept', [('{"step": 2, "val', 0), ('{"step": 2}', 1), ('{"step": 2}\n{', 1), ('', 0)])
def test_half_written_last_line(tmp_path, tail, kept):
    # As a killed process leaves it: the file can be read by all afterwards.
    fpath = tmp_path / 'plasticity.jsonl'
    fpath.write_text('{"step": 0}\n{"step": 1}\n' + tail)
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1'), max_epochs=1, n=16, logger=Recorder(tmp_path))
    assert [line['step'] for line in lines] == [0, 1, 2][:2 + kept] + [0, 1]


def test_drop_leaves_the_lines_of_others(tmp_path):
    fpath = tmp_path / 'a.jsonl'
    fpath.write_text('{"step": 1}\n# a note\n[1]\n{"step": 5}\n{"other": 1}\n{"st')
    JsonLines(fpath).drop(lambda row: row['step'] > 2)
    assert fpath.read_text() == '{"step": 1}\n# a note\n[1]\n{"other": 1}\n'
    assert [path.name for path in tmp_path.iterdir()] == ['a.jsonl']


class Broken(Recorder):
    """ A logger that fails from the third call on. """

    def log_metrics(self, metrics, step=None):
        super().log_metrics(metrics, step)
        if len(self.calls) > 2:
            raise OSError('the server is away')


def test_logger_that_raises(tmp_path, capsys):
    good, bad = Recorder(tmp_path), Broken(tmp_path)
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1'), logger=[bad, good])
    assert trainer.global_step == 10
    assert [line['step'] for line in lines] == [step for step, _, _ in good.table()] == list(range(10))
    assert len(bad.calls) == 3
    out = capsys.readouterr().out
    assert out.count('Broken has failed') == 1 and out.count('Traceback') == 1


# --- interrupted in the middle -----------------------------------------------

class Interrupted(Net):
    """ Ends in the middle of a forward pass. """
    error = KeyboardInterrupt
    where = None

    def features(self, x):
        train, step = self.trainer.training, self.trainer.global_step
        if (train, step) == ((True, 3) if self.where == 'train' else (False, 5)):
            assert left_behind(), 'no capture to be interrupted'
            raise self.error('in the middle')
        return super().features(x)


@SOURCES
@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError, SystemExit])
def test_interrupt_in_mid_capture(tmp_path, source, error):
    net = make_net(Interrupted)
    net.error, net.where = error, source
    with contextlib.suppress(error, SystemExit):
        fit(tmp_path, everything(source), net)
    assert net.trainer.interrupted and net.trainer.global_step < 10
    assert not left_behind()
    steps = 3 if source == 'train' else 5
    assert [line['step'] for line in lines_of(read_lines(net.trainer), 'weight_mag')] == list(range(steps))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    # The same objects go on.
    again = copy.deepcopy(net)
    again.__class__ = Net
    _, trainer, lines, _ = fit(tmp_path, net.trainer.callbacks[0], again)
    assert trainer.global_step == 10 and fine(lines, *TAGS)


def test_interrupt_by_another_callback(tmp_path):
    class Stops(Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            raise KeyboardInterrupt
        on_validation_batch_start = on_before_zero_grad
    net = make_net()
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        fit(tmp_path, everything(), net, callbacks=[Stops()], validate=False)
    assert net.trainer.interrupted and net.trainer.global_step == 0
    assert not left_behind()


@SOURCES
def test_epoch_that_the_model_ends(tmp_path, source):
    class Skips(Net):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 3:
                return -1

        def on_validation_start(self):
            self.left = left_behind()

        def on_train_epoch_end(self):
            self.left_after = left_behind()
    net = make_net(Skips)
    _, trainer, lines, _ = fit(tmp_path, everything(source), net)
    assert trainer.global_step == 6
    assert not left_behind() and not net.left and not net.left_after
    assert [line['step'] for line in lines_of(lines, 'weight_mag')] == list(range(6))
    assert fine(lines, *(TAGS if source == 'train' else others(*ACTIVATIONS)))  # Lightning does not validate


# --- killed, and gone on from a checkpoint -----------------------------------

def run_and_kill(folder, kill_at=-1, source='train', every=4, ckpt=''):
    (code,) = run_processes(killed_run, 1, str(folder), kill_at, source, every, str(ckpt))
    assert code == (0 if kill_at < 0 else -signal.SIGKILL)


def rows(folder):
    lines = (Path(folder) / 'run/version_0/plasticity.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({row['run'] for row in rows}) == 1  # however often it has gone on
    return [{key: value for key, value in row.items() if key not in ('time', 'run')} for row in rows]


@pytest.fixture(scope='module', params=['train', 'validation'])
def whole_run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    run_and_kill(folder, source=request.param)
    return request.param, rows(folder)


# Epochs of 5 steps: in mid-epoch, one step before its end, at its end, and twice.
@pytest.mark.parametrize('every, kills', [(3, [4]), (4, [6]), (4, [15]), (5, [8]), (5, [11]), (3, [5, 8, 14])], ids=str)
def test_killed_and_resumed(tmp_path, whole_run, every, kills):
    source, expected = whole_run
    saved = ''
    for kill_at in kills:
        run_and_kill(tmp_path, kill_at, source, every, saved)
        assert max(row['step'] for row in rows(tmp_path)) >= kill_at - 1  # on disk when the process died
        saved = tmp_path / 'saved' / f'step={kill_at // every * every}.ckpt'
    run_and_kill(tmp_path, -1, source, every, saved)

    def by_step(lines, windows):
        return sorted((row for row in lines if windows == (source == 'train' and row['metric'] in ACTIVATIONS)),
                      key=lambda row: (row['metric'], row['step']))
    got = rows(tmp_path)
    assert by_step(got, windows=False) == by_step(expected, windows=False)
    # What a window has seen before the checkpoint is not in it: it opens again.
    found = [(row['metric'], row['step']) for row in by_step(got, windows=True)]
    assert len(set(found)) == len(found)
    assert abs(len(found) - len(by_step(expected, windows=True))) <= len(kills)
    assert all(row['samples'] >= 8 for row in by_step(got, windows=True))


# --- checkpoints -------------------------------------------------------------

def plain_values(x):
    if isinstance(x, dict):
        return all(isinstance(key, str) for key in x) and all(map(plain_values, x.values()))
    if isinstance(x, list):
        return all(map(plain_values, x))
    return x is None or type(x) in (bool, int, float, str)


@SOURCES
def test_state_is_small_and_plain(tmp_path, source):
    keeper = ModelCheckpoint(tmp_path / 'saved', every_n_train_steps=3, save_top_k=-1)
    fit(tmp_path, PlasticityMonitor('weight_mag@1,erank@5 minutes,dead_units@epoch', source=source), callbacks=[keeper])
    states = []
    for path in (tmp_path / 'saved').glob('*.ckpt'):
        saved = torch.load(path, weights_only=True)['callbacks']
        states += [state for name, state in saved.items() if 'PlasticityMonitor' in name]
    assert len(states) == 3
    assert all(plain_values(state) and len(json.dumps(state)) < 1000 for state in states)


@pytest.mark.parametrize('change', [
    lambda state: None, lambda state: {}, lambda state: {'version': 99, 'schedules': 'none'},
    lambda state: {'version': 0, 'last': [1, 2]}, lambda state: {**state, 'schedules': {'gone': {'owed': True}}},
    lambda state: {**state, 'schedules': {'weight_mag': {'owed': 'x', 'elapsed': 'long', 'more': []}}, 'time': 'noon'},
    lambda state: {**state, 'schedules': {'weight_mag': [1]}, 'time': None},
], ids=['without', 'empty', 'other', 'older', 'unknown metric', 'odd values', 'odd types'])
def test_checkpoint_of_another_version(tmp_path, change):
    keeper = ModelCheckpoint(tmp_path / 'saved', save_last=True)
    fit(tmp_path, PlasticityMonitor('weight_mag@1,erank@5 minutes'), callbacks=[keeper])
    saved = torch.load(keeper.last_model_path, weights_only=True)
    (name,) = [name for name in saved['callbacks'] if 'PlasticityMonitor' in name]
    state = change(saved['callbacks'].pop(name))
    if state is not None:
        saved['callbacks'][name] = state
    torch.save(saved, tmp_path / 'changed.ckpt')
    trainer = pl.Trainer(default_root_dir=tmp_path, max_epochs=3, accelerator='cpu', enable_progress_bar=False,
                         callbacks=[PlasticityMonitor('weight_mag@1,erank@5 minutes')], enable_model_summary=False)
    trainer.fit(make_net(), DataLoader(make_data(), batch_size=8), ckpt_path=tmp_path / 'changed.ckpt')
    assert [line['step'] for line in lines_of(read_lines(trainer), 'weight_mag')] == list(range(10, 15))


# --- models that are unusual -------------------------------------------------

@SOURCES
def test_layers_that_change_in_mid_run(tmp_path, source):
    class Grows(Net):
        def __init__(self):
            super().__init__()
            self.fc1.requires_grad_(False)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:  # unfreeze, and a new head
                self.fc1.requires_grad_(True)
                self.head = torch.nn.Sequential(torch.nn.Linear(12, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
                self.optimizers().add_param_group({'params': [*self.fc1.parameters(), *self.head.parameters()]})

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.02)
    _, trainer, lines, _ = fit(tmp_path, everything(source), make_net(Grows))
    assert trainer.global_step == 10
    for tag in ('weight_mag', 'grad_mag', 'erank'):
        assert [set(line['layers']) for line in lines_of(lines, tag)] == (
            [{'fc2', 'head'}] * 5 + [{'fc1', 'fc2', 'head.0', 'head.2'}] * 5)
    for tag in ACTIVATIONS:
        # In front of the first trained layer there is no hidden one.
        assert len(lines_of(lines, tag)[0]['layers']) == 1 and len(last(lines, tag)['layers']) == 3


def prune(net):
    from torch.nn.utils import prune
    prune.l1_unstructured(net.fc1, 'weight', amount=0.5)


def weight_norm(net):
    torch.nn.utils.parametrizations.weight_norm(net.fc1)


def spectral_norm(net):
    torch.nn.utils.parametrizations.spectral_norm(net.fc1)


def old_spectral_norm(net):
    torch.nn.utils.spectral_norm(net.fc1)


def orthogonal(net):
    torch.nn.utils.parametrizations.orthogonal(net.fc1)


def own_parametrization(net):
    class Symmetric(torch.nn.Module):
        def forward(self, x):
            return x.abs()
    torch.nn.utils.parametrize.register_parametrization(net.fc1, 'weight', Symmetric())


def tied(net):
    net.fc2 = torch.nn.Linear(16, 16)
    net.fc2.weight = torch.nn.Parameter(net.fc2.weight)
    net.extra = torch.nn.Linear(16, 16)
    net.extra.weight = net.fc2.weight
    net.head = torch.nn.Linear(16, 1)


def lazy(net):
    net.fc1 = torch.nn.LazyLinear(16)


def no_gradient(net):
    net.unused = torch.nn.Linear(3, 3)


def complex_parameter(net):
    net.phase = torch.nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))


def integer_parameter(net):
    net.table = torch.nn.Parameter(torch.ones(3, 3, dtype=torch.int64), requires_grad=False)


def empty_parameter(net):
    net.none = torch.nn.Parameter(torch.ones(0, 3))
    net.empty = torch.nn.Linear(4, 0)


def meta_parameter(net):
    net.later = torch.nn.Linear(3, 3, device='meta')


def quantized(net):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net.quick = torch.ao.nn.quantized.dynamic.Linear(3, 3)


def half(net):
    net.small = torch.nn.Linear(3, 3, dtype=torch.float16)


def float8(net):
    net.tiny = torch.nn.Parameter(torch.ones(3, 3).to(torch.float8_e4m3fn), requires_grad=False)


def float8_trainable(net):
    net.tiny = torch.nn.Parameter(torch.ones(3, 3).to(torch.float8_e4m3fn))


def sparse_parameter(net):
    net.sparse = torch.nn.Parameter(torch.eye(3).to_sparse())


def scalar(net):
    net.scale = torch.nn.Parameter(torch.tensor(1.))


def scripted(net):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net.act = torch.jit.script(torch.nn.ReLU())


@SOURCES
@pytest.mark.parametrize('change', [
    prune, weight_norm, spectral_norm, old_spectral_norm, orthogonal, own_parametrization, tied, lazy, no_gradient,
    complex_parameter, integer_parameter, empty_parameter, meta_parameter, quantized, half, float8, float8_trainable,
    sparse_parameter, scalar, scripted])
def test_unusual_layers(tmp_path, change, source, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if change is quantized and not torch.backends.quantized.supported_engines:
            pytest.skip('this torch has no engine for quantized layers')
        net = make_net()
        change(net)
        if change is meta_parameter:  # Lightning would move it to the device
            net.later._apply = lambda fn, recurse=True: net.later
        _, trainer, lines, _ = fit(tmp_path, everything(source), net, enable_checkpointing=False)
    assert trainer.global_step == 10
    assert 'Traceback' not in capsys.readouterr().out
    assert fine(lines, *(TAGS if change is not scripted else others(*ACTIVATIONS)))
    names = set(last(lines, 'weight_mag')['layers'])
    assert not names & {'phase', 'table', 'none', 'empty', 'later', 'sparse', 'scale', 'extra'}
    if change not in (prune, weight_norm, old_spectral_norm):
        assert {'fc1', 'fc2', 'head'} <= names


def test_sparse_gradients(tmp_path):
    class Words(Net):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(50, 8, sparse=True)

        def forward(self, x):
            # Words that are there twice, so that the gradient is not coalesced.
            return super().forward(self.embed((x[:, :2].abs() * 3).long()).sum(1))

        def on_before_optimizer_step(self, optimizer):
            grad = self.embed.weight.grad
            assert grad.is_sparse
            self.dense = grad.to_dense().double()
    net = make_net(Words)
    _, trainer, lines, _ = fit(tmp_path, everything(), net)
    assert trainer.global_step == 10
    assert last(lines, 'grad_norm')['layers']['embed']['value'] == pytest.approx(net.dense.norm().item(), rel=1e-6)
    assert last(lines, 'grad_mag')['layers']['embed']['value'] == pytest.approx(net.dense.abs().mean().item(), rel=1e-6)


@SOURCES
def test_batches_of_size_zero(tmp_path, source, capsys):
    class Empty(Net):
        def loss(self, batch):
            return super().loss(batch[:0] if self.trainer.global_step % 2 else batch)

        def validation_step(self, batch, batch_idx):
            self(batch[:0] if batch_idx == 1 else batch)
    _, trainer, lines, _ = fit(tmp_path, everything(source), make_net(Empty))
    assert trainer.global_step == 10 and fine(lines, *TAGS)
    assert 'Traceback' not in capsys.readouterr().out


@SOURCES
def test_no_layers(tmp_path, source, capsys):
    class Nothing(pl.LightningModule):
        def training_step(self, batch, batch_idx):
            return None

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return None
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fit(tmp_path, everything(source), Nothing())
    out = capsys.readouterr().out
    assert 'Traceback' not in out
    assert 'never measured' in out and 'dead_units' in out


class SkipsSteps(Net):
    def training_step(self, batch, batch_idx):
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


class SkipsInOptimizer(Net):
    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        if batch_idx % 2:
            closure()
        else:
            optimizer.step(closure)


@SOURCES
@pytest.mark.parametrize('cls', [SkipsSteps, SkipsInOptimizer])
def test_steps_that_are_skipped(tmp_path, cls, source, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        _, trainer, lines, _ = fit(tmp_path, everything(source), make_net(cls))
    assert fine(lines, *TAGS)
    assert 'Traceback' not in capsys.readouterr().out
    assert [line['step'] for line in lines_of(lines, 'weight_mag')] == sorted(
        {line['step'] for line in lines_of(lines, 'weight_mag')})


# --- runs that are unusual ---------------------------------------------------

@SOURCES
@pytest.mark.parametrize('kwargs', [
    {'limit_train_batches': 0}, {'limit_val_batches': 0}, {'fast_dev_run': True}, {'fast_dev_run': 3},
    {'overfit_batches': 2}, {'max_epochs': 0}, {'max_steps': 3, 'max_epochs': -1}, {'val_check_interval': 2},
    {'check_val_every_n_epoch': 2}, {'check_val_every_n_epoch': None, 'val_check_interval': 3}, {'logger': False},
    {'num_sanity_val_steps': -1}, {'reload_dataloaders_every_n_epochs': 1}, {'use_distributed_sampler': False},
    {'detect_anomaly': True}, {'inference_mode': False}, {'profiler': 'simple'}, {'barebones': True},
    {'max_time': '00:00:00:00'}, {'min_steps': 12, 'max_epochs': 1}, {'log_every_n_steps': 0},
    {'accumulate_grad_batches': 7},
], ids=lambda kwargs: ','.join(f'{key}={value}' for key, value in kwargs.items()))
def test_unusual_runs(tmp_path, kwargs, source, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if 'barebones' in kwargs:
        kwargs = {**kwargs, 'enable_progress_bar': False, 'logger': False}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if kwargs.get('limit_val_batches') == 0 and source == 'validation':
            with pytest.raises(ValueError, match='validation'):
                fit(tmp_path, everything(source), **kwargs)
            return
        _, trainer, lines, _ = fit(tmp_path, everything(source), **kwargs)
        _, without, _, _ = fit(tmp_path, Callback(), **kwargs)
    assert trainer.global_step == without.global_step
    assert 'Traceback' not in capsys.readouterr().out
    assert not left_behind()
    trained = trainer.global_step > 0
    assert ('plasticity/weight_mag' in trainer.callback_metrics) == trained
    if trained and trainer.log_dir is not None and not trainer.fast_dev_run:
        steps = [line['step'] for line in lines_of(lines, 'weight_mag')]
        assert steps == list(range(trainer.fit_loop.epoch_loop._batches_that_stepped))


def test_without_fit(tmp_path, capsys):
    monitor = everything()
    trainer = pl.Trainer(default_root_dir=tmp_path, accelerator='cpu', enable_progress_bar=False, callbacks=[monitor])
    loader = DataLoader(make_data(), batch_size=10)

    class Tests(Net):
        test_step = Net.validation_step
    net = make_net(Tests)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer.validate(net, loader, verbose=False)
        trainer.test(net, loader, verbose=False)
        trainer.predict(net, loader)
    assert read_lines(trainer) == [] and not left_behind()
    assert 'PlasticityMonitor' not in capsys.readouterr().out
    assert monitor.state_dict() == {}


@SOURCES
def test_several_validation_loaders(tmp_path, source):
    class Two(Net):
        def val_dataloader(self):
            return [DataLoader(make_data(11), batch_size=4), DataLoader(make_data(5), batch_size=4)]

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self(batch)
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('all', source=source), make_net(Two), validate=False)
    assert trainer.global_step == 10 and fine(lines, *TAGS)
    assert last(lines, 'dead_units')['samples'] == (16 if source == 'validation' else 37)


@SOURCES
def test_fit_twice(tmp_path, source):
    # The same callback: with another trainer, and with the same one for more epochs.
    monitor = everything(source)
    net, first, lines, _ = fit(tmp_path, monitor)
    _, second, again, _ = fit(tmp_path, monitor)
    changes = {'time': 0, 'run': ''}
    assert [{**line, **changes} for line in lines] == [{**line, **changes} for line in again]
    assert lines[0]['run'] != again[0]['run']
    second.fit_loop.max_epochs = 3
    loaders = DataLoader(make_data(), batch_size=8), DataLoader(make_data(), batch_size=10)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        second.fit(second.lightning_module, *loaders)
    lines = lines_of(read_lines(second), 'weight_mag')
    assert [line['step'] for line in lines] == list(range(15))
    assert {line['run'] for line in lines} == {again[0]['run']}


def test_fit_after_a_resumed_fit_that_failed(tmp_path):
    # What a checkpoint has restored is not for the next run.
    keeper = ModelCheckpoint(tmp_path / 'saved', every_n_train_steps=3, save_top_k=-1)
    fit(tmp_path, PlasticityMonitor('weight_mag@4'), callbacks=[keeper])
    monitor = PlasticityMonitor('weight_mag@4')

    class Fails(Net):
        def on_train_start(self):
            raise RuntimeError('its own cause')
    trainer = pl.Trainer(default_root_dir=tmp_path, max_epochs=3, accelerator='cpu', enable_progress_bar=False,
                         callbacks=[monitor], enable_model_summary=False)
    (saved,) = (tmp_path / 'saved').glob('*step=6*')
    with pytest.raises(RuntimeError, match='its own cause'):
        trainer.fit(make_net(Fails), DataLoader(make_data(), batch_size=8), ckpt_path=saved)
    monitor.load_state_dict({'schedules': {'weight_mag': {'owed': True}}})
    _, _, lines, _ = fit(tmp_path, monitor)
    _, _, expected, _ = fit(tmp_path, PlasticityMonitor('weight_mag@4'))
    assert [line['step'] for line in lines] == [line['step'] for line in expected]


def test_objects_can_be_copied_after_fit(tmp_path):
    monitor = everything()
    net, trainer, _, _ = fit(tmp_path, monitor, logger=CSVLogger(tmp_path))
    for thing in (monitor, net):
        copy.deepcopy(thing)
        torch.save(thing, io.BytesIO())
    assert math.isfinite(trainer.callback_metrics['plasticity/erank'])
