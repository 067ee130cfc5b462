"""
The report: what it reads, what it says, what it draws, and the page in a browser.
"""
import csv
import importlib.util
import io
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from geowatch.utils.lightning_ext.callbacks import plasticity_report
from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_report import (
    PlasticityReportCLI,
    report_command,
    write_report_script,
)
from geowatch.utils.lightning_ext.callbacks.plasticity_report.curves import (
    change_of,
    differing_layers,
    layer_grid,
    metric_curve,
    short_names,
    under_curve,
)
from geowatch.utils.lightning_ext.callbacks.plasticity_report.findings import find, make_table, trend
from geowatch.utils.lightning_ext.callbacks.plasticity_report.runs import load_runs
from geowatch.utils.lightning_ext.callbacks.plasticity_report.scalars import load_scalars
from geowatch.utils.lightning_ext.callbacks.plasticity_report.settings import compared_settings

COMMAND = [sys.executable, '-m', 'geowatch.cli.plasticity_report']
ENV = {**os.environ, 'GEOWATCH_PREIMPORT': '0'}
drawing = pytest.mark.skipif(importlib.util.find_spec('matplotlib') is None,
                             reason='matplotlib, the extra `report`, is not installed')


def line(metric, step, value, layers=None, per_epoch=10, samples=None):
    return {'metric': metric, 'step': step, 'epoch': step // per_epoch, 'time': 0.0, 'samples': samples,
            'value': value, 'layers': {name: {'value': x} for name, x in (layers or {}).items()}}


def write_run(folder, lines, tail='', **settings):
    folder.mkdir(parents=True)
    text = ''.join((item if isinstance(item, str) else json.dumps(item)) + '\n' for item in lines)
    (folder / 'plasticity.jsonl').write_text(text + tail)
    if settings:
        (folder / 'hparams.yaml').write_text(''.join(f'{key}: {value}\n' for key, value in settings.items()))
    return folder


def two_runs(root, odd=''):
    """ One that loses plasticity with a large learning rate, and one that does not. """
    steps = range(9, 100, 10)
    for lr, dead, rank in [(0.1, 0.18, -35), (0.01, 0.0, -1)]:
        lines = []
        for i, step in enumerate(steps):
            # Unlike each other in every layer, so that a mix-up would show.
            share = i / 9
            lines += [
                line('weight_mag', step, 0.03 + share * dead / 4, {'fc1': 0.04, 'fc2': 0.02 + share * dead}),
                line('dead_units', step, 0.01 + share * dead, {'act1': 0.0, 'act2': 0.02 + 2 * share * dead}),
                line('erank', step, 59 + share * rank, {'fc1': 60.0, 'fc2': 58 + 1.5 * share * rank}),
            ]
        folder = write_run(root / f'lr{lr}{odd}' / 'lightning_logs' / 'version_0', lines, lr=lr, batch_size=32,
                           optimizer='SGD')
        losses = ''.join(f'{step // 10},{step},{1 / (step + 1)}\n' for step in range(100))
        (folder / 'metrics.csv').write_text('epoch,step,train_loss\n' + losses)


def only_run(folder):
    (run,), missing = load_runs([folder])
    assert not missing
    return run


def said(runs):
    return {(f.kind, f.sentence) for f in find(make_table(runs))}


# --- reading --------------------------------------------------------------


def test_run_folder_log_folder_file_and_glob_name_the_same_run(tmp_path):
    folder = write_run(tmp_path / 'a' / 'lightning_logs' / 'version_3', [line('erank', 9, 5.0)])
    for pattern in (tmp_path / 'a', folder, folder / 'plasticity.jsonl', tmp_path / '*', tmp_path / '**' / 'version_*'):
        run = only_run(pattern)
        assert run.folders == [folder.resolve()]
        assert run.name == 'a'


def test_names_tell_runs_apart_and_versions_come_in_order(tmp_path):
    for name in ('a/lightning_logs/version_10', 'a/lightning_logs/version_9', 'b/lightning_logs/version_0'):
        write_run(tmp_path / name, [line('erank', 9, 5.0)])
    runs, _ = load_runs([tmp_path])
    assert [run.name for run in runs] == [
        'a/version_9', 'a/version_10', 'b/version_0']
    assert [run.name for run in load_runs([tmp_path / 'a'])[0]] == ['version_9', 'version_10']


def test_later_lines_win_and_what_was_undone_by_a_resume_is_gone(tmp_path):
    run = only_run(write_run(tmp_path / 'a', [
        line('erank', 9, 50.0), line('erank', 19, 40.0), line('dead_units', 29, 0.5), line('erank', 29, 30.0),
        # Resumed from a checkpoint at step 10, with other intervals.
        line('erank', 15, 45.0), line('erank', 25, 44.0), line('erank', 25, 43.0), line('dead_units', 25, 0.1)]))
    assert [(p.step, p.value) for p in run.metrics['erank']] == [(9, 50.0), (15, 45.0), (25, 43.0)]
    assert [(p.step, p.value) for p in run.metrics['dead_units']] == [(25, 0.1)]
    assert any('begin again at 15' in note for note in run.notes)


def test_a_metric_at_the_step_of_a_resume_is_kept(tmp_path):
    run = only_run(write_run(tmp_path / 'a', [
        line('erank', 9, 50.0), line('weight_mag', 9, 0.1), line('weight_mag', 19, 0.2),
        line('erank', 15, 45.0), line('weight_mag', 15, 0.3)]))
    assert [p.step for p in run.metrics['erank']] == [9, 15]
    assert [p.value for p in run.metrics['weight_mag']] == [0.1, 0.3]


def test_half_written_unreadable_and_unknown_lines(tmp_path):
    run = only_run(write_run(tmp_path / 'a', [
        line('erank', 9, 50.0), {'event': 'start'}, 'not json', {'metric': 'erank', 'step': 'x', 'value': 1},
        [1, 2], line('erank', 19, None), line('mine', 19, 2.0, {'a': None})], tail='{"metric": "erank", "st'))
    assert [p.step for p in run.metrics['erank']] == [9, 19]
    assert math.isnan(run.metrics['erank'][1].value)
    assert run.metrics['mine'][0].value == 2.0
    assert any('half-written' in note for note in run.notes)
    assert any('3, 4, 5 (3 in all)' in note for note in run.notes)


def test_settings_of_lightning_cli_and_of_hparams(tmp_path):
    a = write_run(tmp_path / 'a', [line('erank', 9, 5.0)])
    (a / 'config.yaml').write_text(textwrap.dedent('''
        seed_everything: 1
        trainer: {default_root_dir: /x/a, accumulate_grad_batches: 1, callbacks: [{class_path: C, init_args: {k: 1}}]}
        model: {class_path: m.Net, init_args: {lr: null, act: !!python/object:some.Class {name: relu}}}
        data: {batch_size: 4}
        optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1e-3}}
    '''))
    b = write_run(tmp_path / 'b', [line('erank', 9, 5.0)], learning_rate=0.1, batch_size=4, optimizer='SGD')
    runs = load_runs([a, b])[0]
    columns, _ = compared_settings(runs)
    assert columns['learning rate'] == [0.001, 0.1]
    assert columns['batch size'] == [4, 4]
    assert columns['optimizer'] == ['AdamW', 'SGD']
    assert columns['trainer.accumulate_grad_batches'] == [1, None]
    assert not any('default_root_dir' in title for title in columns)
    (b / 'hparams.yaml').write_text('lr: [1,')
    assert any('hparams.yaml could not be read' in note for note in only_run(b).notes)


def test_loss_on_the_same_axis_by_step_and_by_epoch(tmp_path):
    two_runs(tmp_path)
    run = load_runs([tmp_path])[0][0]
    load_scalars(run)
    steps, losses = under_curve(run, 'train_loss', 'step')
    assert steps == list(range(100))
    assert losses == pytest.approx([1 / (step + 1) for step in steps])
    # Ten steps per epoch: after step 9 one epoch has gone by.
    assert metric_curve(run, 'erank', 'epoch')[0] == [float(epoch) for epoch in range(1, 11)]
    assert under_curve(run, 'train_loss', 'epoch')[0][:10] == pytest.approx([0.1 * k for k in range(1, 11)])


def test_layers_in_network_order_against_their_own_start(tmp_path):
    run = only_run(write_run(tmp_path / 'a', [
        line('erank', 9, 5.0, {'z': 8.0, 'a': 4.0}), line('erank', 19, 5.0, {'z': 2.0, 'a': None, 'm': 1.0})]))
    layers, steps, rows = layer_grid(run, 'erank', 'step')
    assert (layers, steps) == (['z', 'a', 'm'], [9, 19])
    assert rows[0] == [8.0, 2.0]
    assert change_of(rows[0]) == [0.0, -2.0]
    assert rows[1][0] == 4.0 and math.isnan(rows[1][1])
    assert math.isnan(rows[2][0]) and rows[2][1] == 1.0


# --- what it says ---------------------------------------------------------


@pytest.mark.parametrize(('values', 'word'), [
    ([1, 2, 3, 4], 'rises'), ([4.0, 1.0], 'falls'), ([1, 1.01, 0.99, 1.02], 'steady'),
    ([1, 5, 1, 5, 1, 5, 1], 'up and down'), ([3.0], 'one point'),
    ([], 'no data'), ([math.nan], 'no data'), ([math.nan, 1, 2, math.nan, 3], 'rises'),
    ([1 + 0.01 * k + (-1) ** k for k in range(300)], 'rises'),
])
def test_trend(values, word):
    assert trend(list(range(len(values))), values).word == word


def test_trend_of_noise_is_none():
    torch.manual_seed(0)
    words = {trend(list(range(50)), (10 + torch.randn(50)).tolist()).word for _ in range(50)}
    assert words <= {'steady', 'up and down'}


def test_findings_compare_with_the_start_and_with_the_other_run(tmp_path):
    two_runs(tmp_path)
    runs = load_runs([tmp_path])[0]
    for run in runs:
        load_scalars(run)
    findings = find(make_table(runs, 'train_loss'))
    sign, calm = findings
    assert (sign.kind, sign.run, calm.kind, calm.run) == ('sign', 'lr0.1', 'calm', 'lr0.01')
    assert 'weight magnitude 0.03 -> 0.075' in sign.text
    assert 'dead units 1 % -> 19 % (most in act2: 2 % -> 38 %)' in sign.text
    assert 'effective rank of weights 59 -> 24 (most in fc2: 58 -> 5.5)' in sign.text
    assert 'train_loss 1 -> 0.01' in sign.text
    assert sign.text.endswith('lr0.01 shows none of these.')
    assert 'no longer learns' in sign.why
    assert 'dead units 1 % -> 1 %' in calm.text


def test_settings_tell_runs_apart_where_names_do_not(tmp_path):
    for i, lr in enumerate((0.1, 0.01)):
        write_run(tmp_path / f'version_{i}', [line('erank', 9, 5.0)], lr=lr, batch_size=8)
    assert make_table(load_runs([tmp_path])[0]).labels() == ['version_0 (lr 0.1)', 'version_1 (lr 0.01)']


def test_what_broke_and_what_is_missing_is_said(tmp_path):
    write_run(tmp_path / 'nan', [line('grad_mag', 9, 1.0), line('grad_mag', 19, None), line('erank', 19, 5.0)], lr=1)
    write_run(tmp_path / 'ok', [line('grad_mag', 9 + 10 * k, 1.0) for k in range(5)], lr=0.1)
    sentences = said(load_runs([tmp_path])[0])
    assert ('broken', 'nan (lr 1): not a finite number: gradient magnitude from step 19.') in sentences
    assert ('data', 'ok (lr 0.1): effective rank of weights not measured.') in sentences
    assert ('data', 'nan (lr 1): one measurement of effective rank of weights, so that no trend can be told.'
            ) in sentences
    assert ('data', 'nan (lr 1): ends in epoch 1, where another goes on to epoch 4.') in sentences


# --- the command ----------------------------------------------------------


def test_tables_for_programs(tmp_path, capsys):
    two_runs(tmp_path)
    assert PlasticityReportCLI.main(cmdline=0, runs=[str(tmp_path / '*')], format='json') == 0
    data = json.loads(capsys.readouterr().out)
    good, bad = data['runs']
    assert (good['run'], good['learning rate'], bad['learning rate']) == ('lr0.01', 0.01, 0.1)
    assert (bad['erank.start'], bad['erank.end'], bad['erank.trend']) == (59, 24, 'falls')
    assert (good['erank.trend'], good['signs']) == ('steady', [])
    assert bad['signs'] == ['weight_mag', 'dead_units', 'erank']
    assert (bad['train_loss.start'], bad['train_loss.end']) == pytest.approx((1, 0.01))
    assert 'correlates' in data['caveat']
    assert PlasticityReportCLI.main(cmdline=0, runs=[str(tmp_path / '*')], format='csv') == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row['run'] for row in rows] == ['lr0.01', 'lr0.1']
    assert float(rows[1]['dead_units.end']) == pytest.approx(0.19)
    assert rows[1]['signs'] == 'weight_mag dead_units erank'
    assert not (tmp_path / 'plasticity_report').exists()


def test_a_folder_without_data_is_one_line_and_code_2(tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    done = subprocess.run([*COMMAND, tmp_path / 'empty'], env=ENV, capture_output=True, text=True, cwd=tmp_path)
    # Other lines are warnings of what the host imports.
    ours = [text for text in done.stderr.splitlines() if 'Warning' not in text and not text.startswith(' ')]
    complaint = 'no plasticity.jsonl in it. Was PlasticityMonitor among the callbacks?'
    assert (done.returncode, done.stdout, ours) == (2, '', [f'{tmp_path / "empty"}: {complaint}'])
    for name in ('nowhere', 'no*thing'):
        assert PlasticityReportCLI.main(cmdline=0, runs=[str(tmp_path / name)]) == 2
        assert capsys.readouterr().err == f'{tmp_path / name}: no such file or folder\n'
    assert list(tmp_path.rglob('*')) == [tmp_path / 'empty']


def test_a_run_that_has_not_measured_yet(tmp_path, capsys):
    write_run(tmp_path / 'a', [])
    assert PlasticityReportCLI.main(cmdline=0, runs=[str(tmp_path / 'a')]) == 2
    assert capsys.readouterr().err == f'{tmp_path / "a"}: plasticity.jsonl holds no measurement yet\n'


def test_a_good_run_beside_a_folder_without_data(tmp_path, capsys):
    write_run(tmp_path / 'good', [line('erank', 9, 5.0)])
    runs = [str(tmp_path / 'good'), str(tmp_path / 'bad')]
    assert PlasticityReportCLI.main(cmdline=0, runs=runs, format='csv') == 2
    said = capsys.readouterr()
    assert said.err == f'{tmp_path / "bad"}: no such file or folder\n'
    assert len(said.out.splitlines()) == 2


def test_an_unknown_scalar_lists_the_known_ones(tmp_path, capsys):
    two_runs(tmp_path)
    assert PlasticityReportCLI.main(cmdline=0, runs=[str(tmp_path)], under='val_acc', format='csv') == 2
    assert capsys.readouterr().err == '--under=val_acc: no run has it. There is: train_loss\n'


@drawing
def test_a_missing_library_is_one_line_and_code_2_and_the_page_needs_none(tmp_path, capsys, monkeypatch):
    folder = write_run(tmp_path / 'a', [line('erank', 9, 5.0)])
    for name in ['matplotlib', *(name for name in sys.modules if name.startswith('matplotlib.'))]:
        monkeypatch.setitem(sys.modules, name, None)
    assert PlasticityReportCLI.main(cmdline=0, runs=[str(folder)]) == 0
    assert (folder / 'monitor/plasticity/report.html').exists()
    capsys.readouterr()
    assert PlasticityReportCLI.main(cmdline=0, runs=[str(folder)], png=True) == 2
    (complaint,) = capsys.readouterr().err.splitlines()
    assert 'matplotlib' in complaint and 'pip install matplotlib' in complaint


def test_the_command_imports_neither_torch_nor_lightning(tmp_path):
    """ Of the host as it is installed, whose packages import both. """
    two_runs(tmp_path / 'runs')
    code = textwrap.dedent("""
        import runpy, sys
        sys.argv = ['report', *sys.argv[1:]]
        try:
            runpy.run_module('geowatch.cli.plasticity_report', run_name='__main__', alter_sys=True)
        except SystemExit as end:
            print(end.code, *{'torch', 'pytorch_lightning', 'matplotlib', 'pandas'} & set(sys.modules))
    """)
    done = subprocess.run([sys.executable, '-c', code, tmp_path / 'runs', f'--out={tmp_path}'], env=ENV, text=True,
                          capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == '0'


def test_importing_it_is_cheap():
    """ Without the host, whose packages import Lightning by themselves. """
    code = '''
        import sys, types
        parts = 'geowatch.utils.lightning_ext.callbacks'.split('.')
        for i in range(len(parts)):
            module = types.ModuleType('.'.join(parts[:i + 1]))
            module.__path__ = [sys.argv[1]]
            sys.modules[module.__name__] = module
        import geowatch.utils.lightning_ext.callbacks.plasticity_report
        print(*{'torch', 'pytorch_lightning', 'matplotlib', 'plotly', 'pandas', 'numpy', 'tensorboard', 'yaml'}
               & set(sys.modules))
    '''
    parent = os.path.dirname(os.path.dirname(plasticity_report.__file__))
    # What the command line library imports is not ours to choose.
    library = 'import scriptconfig, ubelt, sys; print(*sys.modules)'
    library = subprocess.check_output([sys.executable, '-c', library], text=True)
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code), parent], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= set(library.split())


# --- the pictures ---------------------------------------------------------


def ink(fpath):
    """ The share of pixels that are not white. """
    from matplotlib.image import imread
    return (imread(fpath)[..., :3].min(axis=2) < 0.98).mean()


@drawing
def test_pictures_and_page_are_written(tmp_path, capsys):
    two_runs(tmp_path / 'runs')
    out = tmp_path / 'out'
    assert PlasticityReportCLI.main(cmdline=0, runs=[str(tmp_path / 'runs')], out=str(out), x='epoch', png=True) == 0
    metrics = ['dead_units', 'erank', 'weight_mag']
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [f'{name}.png' for name in [*metrics, *(f'layers-{name}' for name in metrics), 'panels', 'grid']]
        + ['report.html'])
    for path in out.glob('*.png'):
        assert ink(path) > 0.01, path
    text = capsys.readouterr().out
    assert 'dead units 1 % -> 19 %' in text and 'correlates' in text and str(out / 'report.html') in text
    from geowatch.utils.lightning_ext.callbacks.plasticity_report.figures import _draw_layers
    # Of a single run the layers are a heatmap.
    figure = _draw_layers(only_run(tmp_path / 'runs' / 'lr0.1'), 'lr0.1', 'erank', 'epoch')
    assert figure.axes[0].collections[0].get_array().shape == (2, 10)


def test_pictures_only_when_asked_for(tmp_path, capsys):
    two_runs(tmp_path / 'runs')
    assert PlasticityReportCLI.main(cmdline=0, runs=[str(tmp_path / 'runs')], out=str(tmp_path / 'out')) == 0
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['report.html']
    assert capsys.readouterr().out.endswith(f'Wrote {tmp_path / "out" / "report.html"}\n')


@drawing
def test_layers_of_several_runs_are_on_one_scale(tmp_path):
    from geowatch.utils.lightning_ext.callbacks.plasticity_report.figures import _draw_layer_curves
    two_runs(tmp_path)
    table = make_table(load_runs([tmp_path])[0])
    # Dead units of act1 are 0 in both runs.
    assert differing_layers(table, 'dead_units') == (['act2'], 2)
    assert differing_layers(table, 'erank') == (['fc2'], 2)
    for run in table.runs:
        for point in run.metrics['dead_units']:
            point.layers['act3'] = 0.5 * point.layers['act2'] if '0.1' in run.name else 0.0
    axes = _draw_layer_curves(table, table.labels(), 'dead_units', 'step').axes
    assert [ax.get_title('left') for ax in axes] == ['act2', 'act3', ][:len(axes)]
    assert len({ax.get_ylim() for ax in axes}) == 1 and axes[0].get_ylim()[1] > 0.38


def test_short_names_stay_distinct():
    layers = [f'model.encoder.layers.{i}.{name}' for i in (0, 1, 10) for name in ('attention.output.dense', 'mlp.fc1')]
    for most in (8, 12, 20):
        short = short_names(layers, most)
        assert len(set(short)) == len(layers)
    assert short_names(layers, 30)[0] == '0.attention.output.dense'


@drawing
def test_notes_stay_over_their_own_axes(tmp_path):
    """ With the longest note that there is: logarithmic, and with a running mean. """
    from geowatch.utils.lightning_ext.callbacks.plasticity_report.figures import _draw_panels
    folder = write_run(tmp_path / 'a', [line(name, k, 10. ** (k % 3 + k // 20)) for k in range(100)
                                        for name in ('weight_mag', 'grad_mag', 'erank', 'feature_erank')])
    table = make_table([only_run(folder)])
    figure = _draw_panels(table, table.labels(), 'step')
    figure.savefig(tmp_path / 'panels.png')
    notes = [axes.texts[0] for axes in figure.axes if axes.texts and 'logarithmic' in axes.texts[0].get_text()]
    assert len(notes) == 4
    assert 'running mean' in notes[1].get_text().replace('\n', ' ')
    for note in notes:
        own, axes = note.get_window_extent(), note.axes.get_window_extent()
        assert axes.x0 - 1 <= own.x0 and own.x1 <= axes.x1 + 1, note.get_text()
        assert own.y1 < note.axes._left_title.get_window_extent().y0 + 1


@drawing
def test_a_report_that_cannot_be_written_is_one_line_and_code_2(tmp_path, capsys):
    folder = write_run(tmp_path / 'a', [line('erank', 9, 5.0)])
    assert PlasticityReportCLI.main(cmdline=0, runs=[str(folder)], out=str(folder / 'plasticity.jsonl')) == 2
    (complaint,) = capsys.readouterr().err.splitlines()
    assert 'the report could not be written' in complaint


@drawing
def test_broken_runs_still_get_a_report(tmp_path):
    runs = tmp_path / 'runs'
    write_run(runs / 'one', [line('erank', 9, 5.0, {'a': 5.0})])
    write_run(runs / 'zero', [line('dead_units', 9 + k, 0.0, {'a': 0.0, 'b': 0.0}) for k in range(3)])
    write_run(runs / 'nan', [line('erank', 9 + k, None, {'a': None}) for k in range(3)])
    write_run(runs / 'own', [line('my/metric', 9 + k, 2.0 * k) for k in range(3)])
    write_run(runs / 'long', [line('grad_mag', k, 2.0 ** -(k % 70), {'a': 0.0, 'b': 1.0}) for k in range(1500)])
    write_run(runs / 'no_epoch', [{'metric': 'erank', 'step': 3, 'value': 4}], tail='{"met')
    for name in ('*', 'one', 'zero', 'nan', 'own', 'long', 'no_epoch'):
        out = tmp_path / 'out' / name.replace('*', 'all')
        assert PlasticityReportCLI.main(cmdline=0, runs=[str(runs / name)], out=str(out), x='epoch',
                                        png=name in ('*', 'own')) == 0
        assert (out / 'report.html').exists() and (out / 'panels.png').exists() == (name in ('*', 'own'))
    assert (tmp_path / 'out' / 'own' / 'my_metric.png').exists()


@drawing
def test_the_script_reports_on_its_run_also_after_a_move(tmp_path):
    lines = [line('erank', 9 + k, 5.0 - k, {'a': 5.0 - k}) for k in range(3)]
    folder = write_run(tmp_path / 'my runs' / 'größe', lines)
    fpath = write_report_script(folder)
    assert os.access(fpath, os.X_OK)
    moved = shutil.move(tmp_path / 'my runs', tmp_path / "else where's")
    # Whatever else lies in the folder, in which people start it, is not run, and a terminal may know few letters.
    moved = moved / 'größe'
    for trap in (moved / 'geowatch' / '__init__.py', moved / 'runpy.py', moved / 'json.py'):
        trap.parent.mkdir(exist_ok=True)
        trap.write_text('raise SystemExit("from the folder of the run")')
    done = subprocess.run([f'./{fpath.name}', '--under=none'], capture_output=True, text=True, cwd=moved,
                          env={**os.environ, 'PYTHONIOENCODING': 'ascii'})
    assert done.returncode == 0, done.stderr
    assert '- gr??e: ' in done.stdout
    assert (moved / 'monitor' / 'plasticity' / 'report.html').exists()


def test_the_command_can_be_pasted_into_a_shell(tmp_path):
    folder = write_run(tmp_path / "it's a run", [line('erank', 9, 5.0)])
    command = report_command(folder).replace('python', sys.executable, 1)
    done = subprocess.run(f'{command} --format=csv', shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'erank.start' in done.stdout


# --- real runs ------------------------------------------------------------


class Net(pl.LightningModule):
    def __init__(self, lr, batch_size):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 12),
                                       torch.nn.ReLU(), torch.nn.Linear(12, 1))

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch) - 1).square().mean()
        self.log('train_loss', loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


def fit(root, lr, batch_size, epochs, logger=True, ckpt_path=None):
    torch.manual_seed(0)
    trainer = pl.Trainer(max_epochs=epochs, default_root_dir=root, accelerator='cpu', logger=logger,
                         log_every_n_steps=2, callbacks=[PlasticityMonitor()], enable_progress_bar=False,
                         enable_model_summary=False, enable_checkpointing=False)
    # 21 examples: the last batch is shorter.
    trainer.fit(Net(lr, batch_size), DataLoader(torch.rand(21, 8), batch_size=batch_size), ckpt_path=ckpt_path)
    return trainer


def test_real_runs_of_two_loggers(tmp_path, capsys):
    fit(tmp_path / 'a', 0.1, 4, 2)
    fit(tmp_path / 'b', 0.01, 8, 2, logger=pl.loggers.CSVLogger(tmp_path / 'b'))
    assert PlasticityReportCLI.main(cmdline=0, runs=[str(tmp_path)], format='json') == 0
    records = json.loads(capsys.readouterr().out.partition('\n{')[2].join(['{', '']))['runs']
    assert [(r['run'], r['learning rate'], r['batch size']) for r in records] == [('a', 0.1, 4), ('b', 0.01, 8)]
    for record in records:
        lines = [json.loads(text) for text in open(os.path.join(record['folder'], 'plasticity.jsonl'))]
        for name in ('weight_mag', 'grad_mag', 'grad_norm', 'dead_units', 'erank', 'feature_erank'):
            # A rank of the first batch is no start to compare with: it has fewer examples than an epoch.
            values = [item['value'] for item in lines if item['metric'] == name
                      and (item['step'] >= 0 or name != 'feature_erank')]
            assert len(values) > 1
            assert (record[f'{name}.start'], record[f'{name}.end']) == (values[0], values[-1])
        assert record['train_loss.points'] > 1
        assert 0 < record['train_loss.end'] < record['train_loss.start']
        assert record['last_epoch'] == 1


def test_a_resumed_run_is_one_run_and_a_sweep_is_not(tmp_path):
    trainer = fit(tmp_path / 'a', 0.1, 4, 2)
    trainer.save_checkpoint(tmp_path / 'a' / 'last.ckpt')
    fit(tmp_path / 'a', 0.1, 4, 4, ckpt_path=tmp_path / 'a' / 'last.ckpt')
    run = only_run(tmp_path / 'a')
    assert [folder.name for folder in run.folders] == ['version_0', 'version_1']
    assert run.epochs == (0, 3)
    steps = [point.step for point in run.metrics['erank']]
    assert len(steps) == 5 and steps == sorted(steps)
    # 6 batches per epoch, and the untrained network
    assert run.to_epochs(steps) == [0, 1, 2, 3, 4]
    load_scalars(run)
    assert max(run.scalars['train_loss']) > 12 > min(run.scalars['train_loss'])
    for _ in range(2):
        fit(tmp_path / 'b', 0.1, 4, 2)
    assert len(load_runs([tmp_path / 'b'])[0]) == 2


@pytest.mark.parametrize('first, kept', [(8, [4]), (20, [-1, 4]), (None, [-1, 4])])
def test_a_rank_of_few_examples_is_no_start(tmp_path, first, kept):
    """ Below half of those that come after it: of ranks of features, not of what else is measured on them. """
    lines = [{'metric': name, 'step': step, 'epoch': 0, 'samples': samples, 'value': 5., 'layers': {}}
             for name in ('feature_erank', 'dead_units', 'mine') for step, samples in ((-1, first), (4, 37))]
    (tmp_path / 'plasticity.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    run = only_run(tmp_path)
    assert [point.step for point in run.metrics['feature_erank']] == kept
    for name in ('dead_units', 'mine'):
        assert [point.step for point in run.metrics[name]] == [-1, 4]
    assert any('feature_erank of the untrained network' in note for note in run.notes) == (kept == [4])


def test_words_of_a_users_metric_come_with_its_run(tmp_path):
    words = {'title': 'Mine', 'about': 'a number', 'rises': 0.2, 'why': 'It should not.', 'odd': 1, 'grows': 'much'}
    lines = [{'metric': 'mine', 'step': step, 'epoch': step, 'value': value, 'layers': {}}
             for step, value in enumerate((0.1, 0.2, 0.4, 0.6))]
    lines[0]['words'] = words
    (tmp_path / 'plasticity.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    findings = find(make_table([only_run(tmp_path)]))
    (sign,) = [finding for finding in findings if finding.kind == 'sign']
    assert 'mine 0.1 -> 0.6' in sign.text and sign.why == 'It should not.'


def test_a_run_that_goes_up_and_down_is_not_called_calm(tmp_path):
    steps = range(9, 200, 10)
    write_run(tmp_path / 'steady', [line('dead_units', step, 0.01 + step / 1000) for step in steps])
    write_run(tmp_path / 'restless', [line('dead_units', step, (0.07, 0.3, 0.02, 0.25)[i % 4]) for i, step in
                                      enumerate(steps)])
    write_run(tmp_path / 'calm', [line('dead_units', step, 0.01) for step in steps])
    runs, _ = load_runs([tmp_path / name for name in ('steady', 'restless', 'calm')])
    table = make_table(runs)
    assert table.trends[1]['dead_units'].word == 'up and down'
    said = {finding.run: finding.text for finding in find(table)}
    assert said['calm'].startswith('nothing moved far')
    assert 'went up and down' in said['restless'] and 'nothing moved' not in said['restless']
    # Nor is it said to lack what the other one shows.
    assert 'calm does not show this' in said['steady'] and 'restless' not in said['steady']


@drawing
@pytest.mark.parametrize('base, step', [(18.65, 1e-3), (0., 1e-7)])
def test_the_numbers_beside_an_axis_do_not_cover_its_note(tmp_path, base, step):
    from geowatch.utils.lightning_ext.callbacks.plasticity_report import figures
    write_run(tmp_path / 'run', [line('erank', 10 * i + 9, base + i * step) for i in range(5)])
    runs, _ = load_runs([tmp_path / 'run'])
    figure = figures._draw_metric(make_table(runs), ['run'], 'erank', 'step')
    figure.canvas.draw()
    axes = figure.axes[0]
    offset = axes.yaxis.get_offset_text()
    # All that stands beside the axis, be it a factor, ends left of where the note begins.
    assert '+' not in offset.get_text()
    assert not offset.get_text() or offset.get_window_extent().x1 <= axes.get_window_extent().x0


@drawing
@pytest.mark.parametrize('has_font', [False, True])
def test_names_in_other_scripts(tmp_path, monkeypatch, recwarn, has_font):
    """ Drawn where a font has them, and spelled out where none has: no empty boxes, of which Matplotlib warns. """
    from geowatch.utils.lightning_ext.callbacks.plasticity_report import figures, glyphs
    # In a font that Matplotlib brings, and in none.
    known, known_spelled, unknown = '\u2312', r'\u2312', '\U00012345'
    monkeypatch.setattr(glyphs, '_FALLBACKS', ('STIXGeneral',) if has_font else ())
    for cached in (glyphs.families, glyphs._letters):
        cached.cache_clear()
    layers = {f'{letter}.fc{i}': float(i) for i, letter in enumerate((known, unknown, 'gr\u00f6\u00dfe'), 1)}
    write_run(tmp_path / f'run{known}', [line('erank', step, 2., layers) for step in (4, 9)])
    runs, _ = load_runs([tmp_path / f'run{known}'])
    paths, left_out = figures.draw_all(make_table(runs), tmp_path)
    assert not left_out
    shown = figures._draw_layers(runs[0], 'run', 'erank', 'step').axes[0].get_yticklabels()
    for cached in (glyphs.families, glyphs._letters):
        cached.cache_clear()
    assert len(paths) == 3 and not [str(w.message) for w in recwarn if 'lyph' in str(w.message)]
    assert [text.get_text() for text in shown] == [
        f'{known if has_font else known_spelled}.fc1', r'\U00012345.fc2', 'gr\u00f6\u00dfe.fc3']
