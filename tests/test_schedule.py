"""
When each metric is logged: the whole list of logger calls of a run.
"""
import time

import pytest
import torch
from common import TAGS, Net, Recorder, feature_values, fit, lines_of, make_data, make_net, plain_training
from torch.utils.data import DataLoader, IterableDataset

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.schedule import Schedule

WEIGHTS = ('weight_mag', 'erank')
GRADIENTS = ('grad_mag', 'grad_norm', 'update_ratio')
ACTIVATIONS = ('dead_units', 'feature_erank')


def run(tmp_path, *args, net=None, **kwargs):
    """ A run with a Recorder; (table of what was logged, lines, trainer). """
    logger = Recorder(tmp_path)
    _, trainer, lines, _ = fit(tmp_path, *args, net=net or make_net(dead=5), logger=logger, **kwargs)
    steps = [step for step, _ in logger.calls]
    assert steps == sorted(steps)
    return logger.table(), lines, trainer


def expected(rows, steps):
    """ The table of a run: values of the plain training at the given steps of each metric. """
    return sorted((step, f'plasticity/{tag}', pytest.approx(rows[step][tag], rel=1e-5))
                  for tag in TAGS for step in steps.get(tag, ()))


def at(weights=(), gradients=(), activations=(), **others):
    """ Steps of groups of metrics, as steps of metrics. """
    groups = (WEIGHTS, weights), (GRADIENTS, gradients), (ACTIVATIONS, activations)
    return {**{tag: steps for tags, steps in groups for tag in tags}, **others}


ENDS = [4, 9, 14]  # the last steps of three epochs of 37 examples


@pytest.mark.parametrize('interval, log_every, steps', [
    (1, 50, at(range(15), range(15), ENDS)),
    # The second epoch has step 6, the third 13; the first would have none.
    (7, 50, at([4, 6, 13], [4, 6, 13], ENDS)),
    ('epoch', 50, at(ENDS, ENDS, ENDS)),
    ('auto', 2, at(range(1, 15, 2), range(1, 15, 2), ENDS, erank=ENDS)),
    ('auto', 50, at(ENDS, ENDS, ENDS)),
])
def test_validation_source(tmp_path, interval, log_every, steps):
    table, lines, trainer = run(
        tmp_path, PlasticityMonitor(interval=interval), max_epochs=3, log_every_n_steps=log_every)
    assert trainer.num_sanity_val_batches == [2]
    rows = plain_training(make_net(dead=5), make_data(), epochs=3)
    assert rows[0]['dead_units'] >= 5 / 28
    assert table == expected(rows, steps)
    assert {line['samples'] for tag in ACTIVATIONS for line in lines_of(lines, tag)} == {37}
    assert all(line['epoch'] == line['step'] // 5 for line in lines)


@pytest.mark.parametrize('interval, steps, samples', [
    (1, range(15), [8, 8, 8, 8, 5] * 3), (7, [4, 6, 13], [5, 8, 8])])
def test_train_source_of_one_batch(tmp_path, interval, steps, samples):
    monitor = PlasticityMonitor(interval=interval, source='train', samples=8)
    table, lines, _ = run(tmp_path, monitor, max_epochs=3)
    rows = plain_training(make_net(dead=5), make_data(), epochs=3)
    rows = [{**row, **feature_values(row['features'])} for row in rows]
    assert table == expected(rows, at(steps, steps, steps))
    for tag in ACTIVATIONS:
        assert [line['samples'] for line in lines_of(lines, tag)] == samples


def test_train_source_of_whole_epochs(tmp_path):
    table, lines, _ = run(tmp_path, PlasticityMonitor(interval='epoch', source='train'), max_epochs=3)
    rows = plain_training(make_net(dead=5), make_data(), epochs=3)
    for end in ENDS:
        layers = zip(*(row['features'] for row in rows[end - 4:end + 1]), strict=True)
        rows[end].update(feature_values([torch.cat(layer) for layer in layers]))
    assert table == expected(rows, at(ENDS, ENDS, ENDS))
    assert {line['samples'] for tag in ACTIVATIONS for line in lines_of(lines, tag)} == {37}


def test_samples_are_reached_before_the_epoch_ends(tmp_path):
    monitor = PlasticityMonitor('dead_units', interval='epoch', source='train', samples=16)
    _, lines, _ = run(tmp_path, monitor, max_epochs=3)
    assert [line['epoch'] for line in lines] == [0, 1, 2]
    assert {line['samples'] for line in lines} == {16}


@pytest.mark.parametrize('interval, steps', [(1, [0, 1, 2]), (2, [1]), ('epoch', [2])])
@pytest.mark.parametrize('source', ['validation', 'train'])
def test_accumulation_equals_a_large_batch(tmp_path, interval, steps, source):
    # 40 examples: two steps of four micro-batches of 4, and a last one of two.
    kwargs = {'n': 40, 'max_epochs': 1}

    def monitor():
        return PlasticityMonitor(interval=interval, source=source, samples=16)
    net = make_net(dead=5)
    net.loss = lambda batch: 4 * Net.loss(net, batch)  # Lightning divides by four
    large, large_lines, _ = run(tmp_path / 'large', monitor(), batch_size=16, **kwargs)
    micro, micro_lines, _ = run(tmp_path / 'micro', monitor(), net=net, batch_size=4, accumulate_grad_batches=4,
                                **kwargs)
    assert [step for step, key, _ in large if key == 'plasticity/grad_mag'] == steps
    assert micro == [(step, key, pytest.approx(value, rel=1e-4)) for step, key, value in large]
    assert ([(line['metric'], line['samples']) for line in micro_lines] ==
            [(line['metric'], line['samples']) for line in large_lines])


def test_accumulation_equals_plain_training(tmp_path):
    net = make_net(dead=5)
    net.loss = lambda batch: 4 * Net.loss(net, batch)
    table, _, _ = run(tmp_path, PlasticityMonitor(interval=1), net=net, batch_size=4, accumulate_grad_batches=4)
    rows = plain_training(make_net(dead=5), make_data(), batch_size=16)
    assert table == expected(rows, at(range(6), range(6), [2, 5]))


@pytest.mark.parametrize('interval, steps', [
    # Validation follows the steps 1, 3, 5 and 7.
    (1, at(range(8), range(8), [1, 3, 5, 7])),
    (3, at([2, 5], [2, 5], [3, 5])),
    ('epoch', at([3, 7], [3, 7], [3, 7])),
    ('auto', at([3, 7], [3, 7], [3, 7])),
])
def test_validation_in_mid_epoch(tmp_path, interval, steps):
    table, _, _ = run(tmp_path, PlasticityMonitor(interval=interval), n=30, val_check_interval=0.5)
    rows = plain_training(make_net(dead=5), make_data(30))
    assert len(rows) == 8
    assert table == expected(rows, steps)


@pytest.mark.parametrize('interval', ['epoch', 'auto', 1, 7])
def test_validation_that_misses_the_last_step(tmp_path, interval):
    # Validation follows the steps 1, 3, 6 and 8; the epochs end at 4 and 9.
    _, lines, _ = run(tmp_path, PlasticityMonitor('dead_units', interval=interval), val_check_interval=2)
    assert {line['step'] for line in lines} <= {1, 3, 6, 8}
    assert {line['epoch'] for line in lines} == {0, 1}
    if interval in ('epoch', 'auto'):
        assert len(lines) == 2


def test_validation_every_second_epoch(tmp_path):
    table, _, _ = run(tmp_path, PlasticityMonitor(), max_epochs=4, check_val_every_n_epoch=2)
    rows = plain_training(make_net(dead=5), make_data(), epochs=4)
    assert table == expected(rows, at([4, 9, 14, 19], [4, 9, 14, 19], [9, 19]))


@pytest.mark.parametrize('metrics, interval, steps', [
    ('weight_mag@1,erank@epoch', 'auto', {'weight_mag': range(10), 'erank': [4, 9]}),
    (['grad_mag@4', 'dead_units'], 'epoch', {'grad_mag': [3, 7], 'grad_norm': [3, 7], 'dead_units': [4, 9]}),
    ('erank@2, weight_mag', 5, {'erank': [1, 3, 5, 7, 9], 'weight_mag': [4, 9]}),
])
def test_own_intervals(tmp_path, metrics, interval, steps):
    table, _, _ = run(tmp_path, PlasticityMonitor(metrics, interval=interval))
    assert table == expected(plain_training(make_net(dead=5), make_data()), steps)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(make_data())


@pytest.mark.parametrize('kwargs, steps', [
    ({'loader': DataLoader(Stream(), batch_size=8)}, [4, 9]),
    ({'limit_train_batches': 3}, [2, 5]),
    ({'max_epochs': -1, 'max_steps': 7}, [4, 6]),
], ids=['no length', 'limit_train_batches', 'max_steps'])
@pytest.mark.parametrize('interval', ['epoch', 7, 'auto'])
def test_ends_of_epochs(tmp_path, kwargs, steps, interval):
    if interval == 7 and steps == [4, 9]:
        steps = [4, 6]
    _, lines, _ = run(tmp_path, PlasticityMonitor('weight_mag,grad_mag', interval=interval), **kwargs)
    for tag in ('weight_mag', 'grad_mag', 'grad_norm'):
        assert [line['step'] for line in lines_of(lines, tag)] == steps


def test_log_every_n_steps_of_zero_is_once_per_epoch(tmp_path):
    # To Lightning it means: do not log while the epoch runs.
    _, lines, _ = run(tmp_path, PlasticityMonitor('weight_mag'), log_every_n_steps=0)
    assert [line['step'] for line in lines] == [4, 9]


class Slow(Net):
    def training_step(self, batch, batch_idx):
        time.sleep(0.1)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize('metrics, interval', [('weight_mag', '0.5 seconds'), ('weight_mag@0.5seconds', 'auto')])
def test_duration(tmp_path, metrics, interval):
    # A sleep is never shorter than asked for: at least 1.9 s of training.
    _, lines, _ = run(tmp_path, PlasticityMonitor(metrics, interval=interval), net=make_net(Slow),
                      batch_size=2, max_epochs=1, validate=False)
    times = [line['time'] for line in lines]
    assert 2 <= len(times) <= 19
    # The time of a line is read a little after the decision to measure.
    assert all(later - earlier > 0.4 for earlier, later in zip(times, times[1:], strict=False))


def test_two_fits_of_one_monitor(tmp_path):
    monitor = PlasticityMonitor('weight_mag,dead_units', interval='epoch')
    for name in ('first', 'second'):
        table, _, _ = run(tmp_path / name, monitor)
        rows = plain_training(make_net(dead=5), make_data())
        assert table == expected(rows, {'weight_mag': [4, 9], 'dead_units': [4, 9]})


def test_what_was_never_measured_is_said(tmp_path, capsys):
    _, lines, _ = run(tmp_path, PlasticityMonitor('weight_mag,dead_units', interval='epoch'), max_epochs=-1,
                      max_steps=3)
    assert [(line['metric'], line['step']) for line in lines] == [('weight_mag', 2)]
    captured = capsys.readouterr()
    (said,) = [line for line in (captured.out + captured.err).splitlines() if 'never measured' in line]
    assert 'dead_units' in said and 'weight_mag' not in said


@pytest.mark.parametrize('text, seconds', [
    ('5m', 300), ('5 M', 300), ('5min', 300), ('5 mins', 300), ('5minutes', 300), ('0.5 minute', 30), ('1h', 3600),
    ('1h30m', 5400), ('1 hour, 30 minutes', 5400), ('1 hour 5 minutes', 3900), ('2 days', 172800), ('1w', 604800),
    ('1e2 s', 100), ('250ms', 0.25)])
def test_durations(text, seconds):
    assert Schedule(text).seconds == pytest.approx(seconds)


def test_each_epoch_looks_at_all_of_its_micro_batches(tmp_path):
    # 10 micro-batches of 8, with 4 a step; max_steps ends the second epoch after its first step
    for max_steps, steps, samples in ((-1, [2, 5], [80, 80]), (4, [2, 3], [80, 32])):
        monitor = PlasticityMonitor('dead_units,update_ratio', source='train')
        _, _, lines, _ = fit(tmp_path / str(max_steps), monitor, validate=False, n=80, accumulate_grad_batches=4,
                             max_steps=max_steps)
        assert [(line['step'], line['samples']) for line in lines_of(lines, 'dead_units')] == list(
            zip(steps, samples, strict=True))
        assert [line['step'] for line in lines_of(lines, 'update_ratio')] == steps
