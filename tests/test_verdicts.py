"""
The verdicts of the report: on runs that are made up, on real ones, and on files that hold anything.
"""
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from test_report import line as line_of_training
from test_report import only_run, write_run
from torch.utils.data import DataLoader, TensorDataset

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_report import PlasticityReportCLI
from geowatch.utils.lightning_ext.callbacks.plasticity_report.findings import find, make_table, trend
from geowatch.utils.lightning_ext.callbacks.plasticity_report.runs import load_runs
from geowatch.utils.lightning_ext.callbacks.plasticity_report.scalars import (
    choose_under,
    direction,
    load_scalars,
    loss_name,
    score_name,
)
from geowatch.utils.lightning_ext.callbacks.plasticity_report.settings import read_settings
from geowatch.utils.lightning_ext.callbacks.plasticity_report.verdicts import judge, larger_batch, summary

# What the fresh network has, in all runs below.
FRESH = {'weight_mag': 0.05, 'erank': 40., 'feature_erank': 20., 'dead_units': 0.1}
LAYERS = {'fc1': 1., 'fc2': 1.}


def line(metric, step, value, *args, **kwargs):
    """ Also of the untrained network. """
    return {**line_of_training(metric, max(step, 0), value, *args, **kwargs), 'step': step}


def made(folder, ends, scalars=None, start=True, update=0.01, **settings):
    """ A run of 100 steps whose metrics go from the fresh network's to some ends, straight; None is never finite. """
    lines = []
    for i, step in enumerate(range(-1 if start else 9, 100, 10)):
        for name in (*FRESH, 'grad_mag', 'update_ratio'):
            first = FRESH.get(name, 1e-3)
            last = ends.get(name, update if name == 'update_ratio' else first)
            value = None if last is None and i else first if last is None or step < 0 else first + (last - first) * min(
                1, i / 5)
            if name in FRESH or step > 0:
                lines.append(line(name, step, last if name == 'update_ratio' else value, LAYERS))
    write_run(folder, lines, **settings)
    if scalars:
        rows = [','.join(['step', *scalars])]
        for i, step in enumerate(range(9, 100, 10)):
            rows.append(','.join([str(step), *(repr(a + (b - a) * i / 9) for a, b in scalars.values())]))
        (folder / 'metrics.csv').write_text('\n'.join(rows) + '\n')
    return folder


def loaded(root):
    runs, missing = load_runs([root])
    assert not missing
    for run in runs:
        load_scalars(run)
    return runs


def verdicts(root, under=None):
    runs = loaded(root)
    return {run.name: verdict for run, verdict in zip(runs, judge(runs, under), strict=True)}


LEARNED = {'weight_mag': 0.07, 'erank': 36., 'feature_erank': 22.}
STILL = {'weight_mag': 0.0501, 'erank': 39.99}
COLLAPSED = {'weight_mag': 0.12, 'erank': 25., 'feature_erank': 2., 'dead_units': 0.9, 'grad_mag': 0.}


def sweep(root, scalars=True):
    """ One run of each word, and one more that learns. """
    for name, ends, accuracy, loss, update in [
            ('best', LEARNED, 0.95, 0.1, 0.01), ('good', LEARNED, 0.93, 0.15, 0.01),
            ('slow', {'weight_mag': 0.055, 'erank': 39.}, 0.5, 1.4, 0.006), ('low', STILL, 0.11, 2.29, 1e-5),
            ('dead', COLLAPSED, 0.1, 2.35, 0.1), ('nan', {'weight_mag': None, 'grad_mag': None}, 0.1, math.nan, None)]:
        made(root / name, ends, {'val_acc': (0.1, accuracy), 'train_loss': (2.3, loss)} if scalars else None,
             update=update)


# --- the rules --------------------------------------------------------------


def test_one_word_each_and_best_first(tmp_path):
    sweep(tmp_path)
    runs = loaded(tmp_path)
    table = make_table(runs, choose_under(runs, 'auto'))
    said = {run.name: verdict for run, verdict in zip(runs, table.verdicts, strict=True)}
    assert {name: verdict.word for name, verdict in said.items()} == {
        'best': 'learned', 'good': 'learned', 'slow': 'slow', 'low': 'hardly moved', 'dead': 'collapsed',
        'nan': 'diverged'}
    assert [name for name, verdict in said.items() if verdict.best] == ['best']
    assert [runs[i].name for i in table.order] == ['best', 'good', 'slow', 'low', 'dead', 'nan']
    assert {name: verdict.rate for name, verdict in said.items()} == {
        'best': '', 'good': '', 'slow': 'too low', 'low': 'too low', 'dead': 'too high', 'nan': 'too high'}
    # Straight to the end in five measurements: below 30 % of 20 from the fifth on, at 0.
    assert (said['dead'].at, said['nan'].at) == (39, 9)
    assert table.under == 'val_acc'
    assert said['good'].reason == 'val_acc 0.93, best 0.95'
    assert said['slow'].reason == ('val_acc 0.5, best 0.95; weight magnitude +10 %, effective rank of weights -2.5 %, '
                                   'less than the best run')
    assert said['low'].reason == ('weight magnitude +0.2 %, effective rank of weights -0.025 %; val_acc 0.11, '
                                  'best 0.95')
    assert said['dead'].reason == ('gradient magnitude 0.001 -> 0, effective rank of features 20 -> 2, '
                                   'dead units 10 % -> 90 %; val_acc 0.1, best 0.95')
    assert said['nan'].reason == 'weight magnitude is not a number from step 9 on'
    assert summary(table)[0] == 'best: best, val_acc 0.95'
    assert [text.split(':')[0] for text in summary(table)] == ['best', 'good', 'slow', 'low', 'dead', 'nan']


def test_a_run_that_goes_on_has_no_rate_that_is_too_low(tmp_path):
    """ As one that was killed: it may still come as far as the others. Too high a rate shows in half of a run. """
    sweep(tmp_path)
    for name in ('slow', 'low', 'dead'):
        fpath = tmp_path / name / 'plasticity.jsonl'
        fpath.write_text(''.join(line for line in fpath.read_text().splitlines(True) if json.loads(line)['step'] < 60))
    said = verdicts(tmp_path)
    assert {name: (said[name].word, said[name].rate) for name in ('slow', 'low', 'dead')} == {
        'slow': ('slow', ''), 'low': ('hardly moved', ''), 'dead': ('collapsed', 'too high')}


def test_without_a_loss_the_metrics_tell(tmp_path):
    sweep(tmp_path, scalars=False)
    said = verdicts(tmp_path)
    assert {name: verdict.word for name, verdict in said.items()} == {
        'best': 'learned', 'good': 'learned', 'slow': 'learned', 'low': 'hardly moved', 'dead': 'collapsed',
        'nan': 'diverged'}
    assert not any(verdict.best for verdict in said.values())


@pytest.mark.parametrize('name', ['best', 'low', 'dead', 'nan'])
def test_a_run_alone_is_judged_by_its_own_start(tmp_path, name):
    sweep(tmp_path)
    word = {'best': 'learned', 'low': 'hardly moved', 'dead': 'collapsed', 'nan': 'diverged'}[name]
    (said,) = verdicts(tmp_path / name).values()
    assert (said.word, said.best) == (word, False)


def test_a_loss_that_came_down_at_once_is_no_network_that_hardly_moved(tmp_path):
    """ As of a large network after few steps, whose weights are what they were to a percent. """
    made(tmp_path / 'run', STILL)
    losses = {-1: 0.66, 9: 0.3, **dict.fromkeys(range(19, 100, 10), 0.28)}
    (tmp_path / 'run' / 'metrics.csv').write_text('step,train_loss\n' + ''.join(
        f'{step},{loss}\n' for step, loss in losses.items()))
    (said,) = verdicts(tmp_path / 'run').values()
    assert (said.word, said.rate) == ('slow', 'too low')


def test_older_files_take_the_earliest_of_comparable_runs(tmp_path):
    """ Alone, what has collapsed before the first measurement has nothing to be compared with. """
    lines = [line(name, step, 1., LAYERS) for step in (49, 99) for name in ('weight_mag', 'feature_erank')]
    made(tmp_path / 'a' / 'good', LEARNED, start=False)
    write_run(tmp_path / 'a' / 'early', lines)
    assert verdicts(tmp_path / 'a')['early'].word == 'collapsed'
    assert verdicts(tmp_path / 'a' / 'early')['early'].word != 'collapsed'
    # Of a network with other layers nothing can be taken.
    write_run(tmp_path / 'b' / 'early', lines)
    made(tmp_path / 'b' / 'good', LEARNED, start=False)
    text = (tmp_path / 'b' / 'good' / 'plasticity.jsonl').read_text()
    (tmp_path / 'b' / 'good' / 'plasticity.jsonl').write_text(text.replace('fc1', 'conv1'))
    assert verdicts(tmp_path / 'b')['early'].word != 'collapsed'


def test_a_rank_of_few_examples_is_the_least_that_it_was(tmp_path):
    """ It is no start of a curve, but what is far below it has collapsed. """
    lines = [line('feature_erank', step, value, samples=samples) for step, value, samples in
             ((-1, 12., 32), (9, 1., 500), (19, 1., 500))]
    assert verdicts(write_run(tmp_path / 'a', lines))['a'].word == 'collapsed'


def test_what_learns_is_not_called_dead(tmp_path):
    """ Nor is a network that was good before, and hardly had to move. """
    for name, ends, accuracy in [('best', LEARNED, 0.95), ('odd', COLLAPSED, 0.94), ('tuned', STILL, 0.94),
                                 ('low', STILL, 0.2)]:
        made(tmp_path / name, ends, {'val_acc': (0.1, accuracy)}, update=1e-4)
    assert {name: said.word for name, said in verdicts(tmp_path).items()} == {
        'best': 'learned', 'odd': 'learned', 'tuned': 'learned', 'low': 'slow'}


def test_a_loss_that_explodes(tmp_path):
    for name, loss in [('good', 0.1), ('high', 40.)]:
        made(tmp_path / name, LEARNED, {'train_loss': (2.3, loss)})
    said = verdicts(tmp_path)
    assert (said['good'].word, said['high'].word, said['high'].at) == ('learned', 'diverged', 19)
    assert said['high'].reason == 'train_loss 40 at the end, 2.3 in the fresh network'


def test_a_loss_that_comes_down_from_an_explosion_is_nothing_learned(tmp_path):
    """ Of a run alone, whose network is dead. """
    folder = made(tmp_path / 'a', {**COLLAPSED, 'grad_mag': 1e-3})
    (folder / 'metrics.csv').write_text('step,train_loss\n' + ''.join(
        f'{step},{3e7 / (step + 1) ** 3}\n' for step in range(9, 100, 10)))
    assert verdicts(folder)['a'].word == 'collapsed'


def test_one_gradient_that_overflows_is_no_divergence(tmp_path):
    """ With a GradScaler that is how it finds its scale. """
    lines = [line('grad_mag', step, None if step == 29 else 1e-3) for step in (9, 19, 29)]
    lines += [line('weight_mag', step, 0.05 + step / 1000) for step in (-1, 9, 19, 29)]
    assert verdicts(write_run(tmp_path / 'once', lines))['once'].word == 'learned'
    lines[1] = line('grad_mag', 19, None)
    assert verdicts(write_run(tmp_path / 'twice', lines))['twice'].word == 'diverged'


def test_what_was_resumed_from_elsewhere_has_no_start(tmp_path):
    lines = [line(name, step, value) for step in range(1009, 1100, 10) for name, value in FRESH.items()]
    assert verdicts(write_run(tmp_path / 'a', lines))['a'].word == ''
    assert summary(make_table(loaded(tmp_path))) == []


def test_nobody_has_learned_anything(tmp_path):
    """ Then the best by chance is no yardstick. """
    for i in range(4):
        made(tmp_path / f'lr{i}', STILL, {'val_acc': (0.1, 0.1 + i / 100), 'val_loss': (2.3, 2.3 - i / 1000)},
             update=1e-5)
    said = verdicts(tmp_path)
    assert {verdict.word for verdict in said.values()} == {'hardly moved'}
    assert not any(verdict.best for verdict in said.values())


def test_chance_is_no_yardstick(tmp_path):
    """ Where all are dead or have not moved, an accuracy that is a little better tells nothing. """
    for name, ends, accuracy in [('dead1', COLLAPSED, 0.1), ('dead2', COLLAPSED, 0.12), ('low', STILL, 0.11)]:
        made(tmp_path / name, ends, {'val_acc': (0.1, accuracy)}, update=1e-5)
    assert {name: said.word for name, said in verdicts(tmp_path).items()} == {
        'dead1': 'collapsed', 'dead2': 'collapsed', 'low': 'hardly moved'}


@pytest.mark.parametrize('with_low', [False, True])
def test_near_the_best_where_nobody_knows_the_start(tmp_path, with_low):
    """ All have learned before the first validation; it takes a run that has not to see how much. """
    for name, accuracy in [('a', 0.95), ('b', 0.9), ('c', 0.8)]:
        made(tmp_path / name, LEARNED, {'val_acc': (0.79, accuracy)})
    if with_low:
        made(tmp_path / 'low', STILL, {'val_acc': (0.1, 0.1)}, update=1e-5)
    assert {name: said.word for name, said in verdicts(tmp_path).items() if name != 'low'} == {
        'a': 'learned', 'b': 'learned', 'c': 'slow'}


# --- by what ------------------------------------------------------------------


@pytest.mark.parametrize('name, sign', [
    ('val_acc', 1), ('val/mIoU', 1), ('valid_f1', 1), ('BinaryF1Score', 1), ('map_50', 1), ('r2', 1), ('val_loss', -1),
    ('valLoss', -1), ('val/MAE', -1), ('val_sMAPE', -1), ('val_crps', -1), ('minADE', -1), ('val_pck', 1),
    ('error_of_map', -1), ('perplexity', -1), ('lr-SGD', 0), ('gradient', 0),
    ('maes', 0), ('', 0)])
def test_a_name_says_what_is_better(name, sign):
    assert direction(name) == sign


@pytest.mark.parametrize('names, score, loss', [
    (['lr', 'train_loss', 'val_loss', 'val_acc'], 'val_acc', 'train_loss'),
    (['train/loss', 'val/loss'], 'val/loss', 'train/loss'), (['train_acc', 'trainLoss'], 'trainLoss', 'trainLoss'),
    # Of a discriminator nobody can say.
    (['d_loss', 'g_loss', 'lr'], None, None), (['interval_loss', 'loss_step'], 'loss_step', 'loss_step'),
    (['val_loss'], 'val_loss', 'val_loss'), ([], None, None)])
def test_validation_before_training_and_a_score_before_a_loss(tmp_path, names, score, loss):
    run = only_run(write_run(tmp_path / 'a', [line('erank', 9, 5.)]))
    run.scalars = {name: {0: 1.} for name in names}
    assert (score_name([run]), loss_name([run])) == (score, loss)
    if score:
        assert choose_under([run], 'auto') == score


def test_under_decides_what_is_best(tmp_path):
    for name, loss, accuracy in [('a', 0.2, 0.97), ('b', 0.1, 0.96)]:
        made(tmp_path / name, LEARNED, {'val_loss': (2.3, loss), 'val_acc': (0.1, accuracy), 'lr': (1., 0.)})
    for under, best in [(None, 'a'), ('val_acc', 'a'), ('val_loss', 'b'), ('lr', 'a')]:
        assert [name for name, said in verdicts(tmp_path, under).items() if said.best] == [best], under


# --- what is printed -----------------------------------------------------------


def test_alike_ones_are_grouped(tmp_path):
    for lr, end in [(2., 'nan'), (0.1, 'good'), (1e-5, 'low')]:
        for i, batch in enumerate((8, 16, 32)):
            accuracy = {'nan': 0.1, 'good': 0.93 + i / 100, 'low': 0.1 + i / 100}[end]
            ends = {'nan': {'weight_mag': None}, 'good': LEARNED, 'low': STILL}[end]
            made(tmp_path / f'lr{lr:g}-bs{batch}', ends, {'val_acc': (0.1, accuracy)}, update=1e-5, lr=lr,
                 batch_size=batch)
    runs = loaded(tmp_path)
    assert [run.settings['lr'] for run in runs] == [1e-5] * 3 + [0.1] * 3 + [2.] * 3
    table = make_table(runs, 'val_acc')
    assert summary(table) == [
        'lr0.1-bs32: best, val_acc 0.95', 'lr0.1-bs16: learned, val_acc 0.94, best 0.95',
        'lr0.1-bs8: learned, val_acc 0.93, best 0.95', 'lr 1e-05: all three hardly moved (val_acc 0.1 to 0.12)',
        'lr 2: all three diverged before step 10']
    for verdict in table.verdicts:
        verdict.word, verdict.best = 'learned', False
    assert summary(table)[-1] == f'{runs[table.order[5]].name} and 3 more: learned (val_acc 0.1)'


@pytest.mark.parametrize('form', ['json', 'csv'])
def test_programs_get_the_verdict(tmp_path, capsys, form):
    sweep(tmp_path)
    assert PlasticityReportCLI.main(cmdline=0, runs=[str(tmp_path)], format=form) == 0
    out = capsys.readouterr().out
    if form == 'csv':
        assert out.splitlines()[0].endswith('signs,verdict,verdict_reason,best')
        return
    rows = {row['run']: row for row in json.loads(out)['runs']}
    assert (rows['best']['verdict'], rows['best']['best'], rows['dead']['verdict'], rows['dead']['best']) == (
        'learned', True, 'collapsed', False)
    assert rows['best']['verdict_reason'] == 'val_acc 0.95'


@pytest.mark.parametrize('scale, says', [
    (300., 'larger too'), (20., 'about right'), (3., 'hardly help'), (None, None)])
def test_whether_a_larger_batch_would_help(tmp_path, scale, says):
    folder = made(tmp_path / 'a', LEARNED, batch_size=16, optimizer='AdamW')
    with open(folder / 'plasticity.jsonl', 'a') as file:
        file.writelines(json.dumps(line('noise_scale', step, scale)) + '\n' for step in (109, 119))
    text = larger_batch(loaded(tmp_path))
    if scale is None:
        assert text == ''
    else:
        assert says in text and f'at least {scale:g} at the end' in text and 'batch size 16' in text
    assert larger_batch([]) == ''


# --- what was wrong ------------------------------------------------------------


@pytest.mark.parametrize('values, word', [
    ([12., *[1.] * 40], 'falls'), ([1., 6., *[12.] * 40], 'rises'),
    ([12., 6., 3., *(1 + 0.2 * (-1) ** k for k in range(40))], 'falls'),
    ([5., *(5 + (-1) ** k for k in range(40))], 'up and down')])
def test_what_happens_in_the_first_fifth_is_a_direction(values, word):
    assert trend(list(range(len(values))), values).word == word


def test_what_falls_is_not_flagged_for_growth(tmp_path):
    """ Its first value is low, and it ends at five times that, below all that came in between. """
    values = [1., 20., 18., 16., 14., 12., 10., 8., 6., 5.]
    run = only_run(write_run(tmp_path / 'a', [line('grad_mag', k, value) for k, value in enumerate(values)]))
    table = make_table([run])
    assert table.trends[0]['grad_mag'].word == 'falls'
    assert table.signs(0) == []


def test_names_and_settings_are_sorted_by_number(tmp_path):
    rates = ('1e-05', '0.0001', '0.1', '1', '1e+2')
    for rate in reversed(rates):
        write_run(tmp_path / f'lr{rate}', [line('erank', 9, 5.)], lr=rate)
    runs = loaded(tmp_path)
    assert [run.name for run in runs] == [f'lr{rate}' for rate in rates]
    assert make_table(runs).labels() == [run.name for run in runs]


def test_a_label_says_nothing_twice(tmp_path):
    for name, lr, batch in [('lr2-bs8', 2., 8), ('lr0.5-bs8', 0.5, 8)]:
        write_run(tmp_path / name, [line('erank', 9, 5.)], lr=lr, batch_size=batch, seed=int(2 * lr))
    assert make_table(loaded(tmp_path)).labels() == ['lr0.5-bs8 (seed 1)', 'lr2-bs8 (seed 4)']


def test_kinds_follow_the_verdict(tmp_path):
    sweep(tmp_path)
    for name in ('best', 'good'):
        with open(tmp_path / name / 'plasticity.jsonl', 'a') as file:
            file.write(json.dumps(line('dead_units', 109, 0.4, LAYERS)) + '\n')
    runs = loaded(tmp_path)
    said = {finding.run: (finding.kind, finding.head) for finding in find(make_table(runs, 'val_acc'))
            if finding.kind != 'data'}
    assert said == {'best': ('calm', 'Learned'), 'good': ('sign', 'Learned'), 'slow': ('sign', 'Slow'),
                    'low': ('sign', 'Hardly moved'), 'dead': ('broken', 'Collapsed'), 'nan': ('broken', 'Diverged')}


def test_tensors_are_no_settings_and_numbers_of_numpy_are(tmp_path):
    """ As Lightning writes them. """
    from pytorch_lightning.core.saving import save_hparams_to_yaml
    save_hparams_to_yaml(str(tmp_path / 'hparams.yaml'), {
        'lr': np.float64(0.1), 'batch_size': np.int64(8), 'weights': torch.rand(30), 'array': np.arange(9.),
        'module': torch.nn.Linear(2, 3), 'nested': {'class_weights': torch.rand(3), 'betas': (0.9, 0.99)},
        'several': [torch.rand(2), 3], 'act': torch.nn.ReLU, 'long': list(range(1000)), 'name': 'a'})
    settings, notes = read_settings(tmp_path)
    assert not notes
    assert settings == {'lr': 0.1, 'batch_size': 8, 'nested.betas': [0.9, 0.99], 'several.1': 3,
                        'act': 'torch.nn.modules.activation.ReLU', 'name': 'a'}


# --- files that hold anything ----------------------------------------------------


def test_names_that_look_like_something_else(tmp_path, capsys):
    """ In each text that a verdict has. """
    odd = '<script>alert(1)</script>$(rm -rf ~)\x1b[31m\ud800_loss'
    for lr, end in [('"<b>"', 0.1), ('\'"; ls #', 2.3)]:
        folder = made(tmp_path / f'run{end}', LEARNED, lr=json.dumps(lr))
        rows = ''.join(f'{step},{2.3 + (end - 2.3) * step / 99}\n' for step in range(9, 100, 10))
        (folder / 'metrics.csv').write_text(f'step,"val {odd}"\n{rows}', errors='replace')
    runs = loaded(tmp_path)
    table = make_table(runs, choose_under(runs, 'auto'))
    texts = [*summary(table), *(verdict.reason for verdict in table.verdicts)]
    assert any('script' in text for text in texts)
    assert all(text.isprintable() and len(text) < 400 for text in texts)
    assert PlasticityReportCLI.main(cmdline=0, runs=[str(tmp_path)], format='json') == 0
    assert len(json.loads(capsys.readouterr().out)['runs']) == 2


@pytest.mark.parametrize('value', [math.inf, -math.inf, math.nan, 1e308, -1e308, 5e-324, 0.])
def test_numbers_that_make_no_sense(tmp_path, value):
    for name, last in [('a', value), ('b', 0.1)]:
        folder = made(tmp_path / name, {'weight_mag': last, 'update_ratio': value})
        rows = ''.join(f'{step},{value if step % 2 else last},{last}\n' for step in range(40))
        (folder / 'metrics.csv').write_text(f'step,train_loss,val_acc\n{rows}')
    for runs in (loaded(tmp_path), loaded(tmp_path / 'a')):
        table = make_table(runs, choose_under(runs, 'auto'))
        assert len(table.verdicts) == len(table.order) == len(runs)
        assert all(isinstance(text, str) for text in summary(table))
        assert larger_batch(runs) == ''


# --- real runs ---------------------------------------------------------------------


class Net(pl.LightningModule):
    def __init__(self, lr):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32),
                                       torch.nn.ReLU(), torch.nn.Linear(32, 10))

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log('train_loss', loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log('val_acc', (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


def test_real_runs_with_default_settings(tmp_path):
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images).flatten(1).float() / 16, torch.tensor(digits.target))
    training, validation = torch.utils.data.random_split(data, [797, 1000], torch.Generator().manual_seed(0))
    for lr in (1e-4, 0.5, 100.):
        torch.manual_seed(0)
        trainer = pl.Trainer(max_epochs=3, default_root_dir=tmp_path / f'lr{lr}', accelerator='cpu',
                             log_every_n_steps=10, callbacks=[PlasticityMonitor()], enable_progress_bar=False,
                             enable_model_summary=False, enable_checkpointing=False)
        # The last batch is shorter.
        trainer.fit(Net(lr), DataLoader(training, 30, shuffle=True), DataLoader(validation, 500))
    said = verdicts(tmp_path)
    assert {name: (verdict.word in words, verdict.best) for (name, verdict), words in zip(
        said.items(), [('hardly moved',), ('learned',), ('diverged', 'collapsed')], strict=True)} == {
        'lr0.0001': (True, False), 'lr0.5': (True, True), 'lr100.0': (True, False)}


def test_what_is_true_of_a_sweep():
    """ In the script that makes the table of right and wrong. """
    spec = importlib.util.spec_from_file_location(
        'make_verdict_table', Path(__file__).resolve().parents[1] / 'docs' / 'make_verdict_table.py')
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    runs = {(lr, 8): {'before': [2.3, 0.1], 'after': [1., accuracy]} for lr, accuracy in
            [(1e-4, 0.2), (1e-3, 0.95), (1e-2, 0.92), (1e-1, 0.5), (1., 0.1)]}
    runs[0.1, 16] = {'before': [2.3, 0.1], 'after': [1., 0.7]}
    assert script.labels(runs) == {
        (1e-4, 8): 'too low', (1e-3, 8): 'good', (1e-2, 8): 'good', (1e-1, 8): 'too high', (1., 8): 'dead',
        (0.1, 16): 'between'}
    drawn = script.halves()
    assert len(drawn['tuned']) == len(drawn['held out']) == 8 and not set(drawn['tuned']) & set(drawn['held out'])
