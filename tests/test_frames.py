"""
The report in Python and notebooks: DataFrames, the comparison as an object, and a monitor's history.
"""
import copy
import csv
import gc
import html.parser
import io
import json
import math
import pickle
import sys
import types
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from common import fit, read_lines, skip_without
from test_report import drawing, line, two_runs, write_run

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_report import PlasticityReportCLI, compare, load
from geowatch.utils.lightning_ext.callbacks.plasticity_report.runs import Point, ReportError

pd = pytest.importorskip('pandas', reason='pandas, of the extra `report`, is not installed')
NOTEBOOK = Path(__file__).resolve().parents[1] / 'docs/examples/compare_runs.ipynb'
LONG = ['run', 'folder', 'metric', 'layer', 'step', 'epoch', 'time', 'value', 'samples']


def raw(folder):
    """ What is in files below a folder, one (metric, layer, step, value) per number. """
    rows = [json.loads(text) for path in sorted(folder.rglob('plasticity.jsonl')) for text in path.open()]
    return sorted((row['metric'], layer, row['step'], value) for row in rows for layer, value in
                  [('', row['value']), *((name, own['value']) for name, own in row['layers'].items())])


def sweep(root, ends):
    """ Runs of a learning rate and a batch size each, with the accuracy that they end at. """
    for (lr, size), end in ends.items():
        lines = [{**line('weight_mag', step, 0.05 + 0.01 * lr * step, {'fc1': 0.04, 'fc2': 0.06}), 'epoch': 0}
                 for step in (-1, 9, 19)]
        folder = write_run(root / f'lr{lr}-bs{size}', lines, lr=lr, batch_size=size)
        (folder / 'metrics.csv').write_text(f'step,val_acc\n0,0.1\n19,{end}\n')


# --- frames -------------------------------------------------------------------


def test_the_long_form_holds_every_number(tmp_path):
    two_runs(tmp_path)
    frame = load(tmp_path)
    assert list(frame) == [*LONG, 'learning rate', 'batch size', 'optimizer']
    columns = ['metric', 'layer', 'step', 'value']
    assert sorted(map(tuple, frame[columns].values.tolist())) == raw(tmp_path)
    for name, own in frame.groupby('run'):
        assert set(own['learning rate']) == {float(name.removeprefix('lr'))} and set(own['batch size']) == {32}
        assert {Path(folder) for folder in own['folder']} == {tmp_path / name / 'lightning_logs' / 'version_0'}
        assert own[own.metric == 'erank'].query('layer == "fc1"').epoch.tolist() == list(range(10))


def test_the_wide_form_has_a_row_per_step_and_the_loss(tmp_path):
    two_runs(tmp_path)
    frame = load([tmp_path / 'lr0.1', tmp_path / 'lr0.01'], wide=True)
    assert list(frame.columns) == ['run', 'folder', 'step', 'epoch', 'time', 'weight_mag', 'dead_units', 'erank',
                                   'train_loss', 'learning rate', 'batch size', 'optimizer']
    assert len(frame) == 200 and frame.groupby('run').step.is_monotonic_increasing.all()
    assert frame.train_loss.tolist() == [1 / (step + 1) for step in frame.step]
    measured = frame[frame.erank.notna()]
    assert [list(row) for row in zip(measured.step, measured.erank, strict=True)] == [
        list(row[2:]) for run in ('lr0.1', 'lr0.01') for row in raw(tmp_path / run) if row[:2] == ('erank', '')]


def test_what_is_missing_or_not_finite(tmp_path):
    old = {key: x for key, x in line('erank', 19, None, samples=7).items() if key not in ('epoch', 'time')}
    write_run(tmp_path / 'a', [line('erank', 9, 4.), old], lr=0.1)
    write_run(tmp_path / 'b', [line('erank', 9, 5.)], betas='[0.9, 0.95]')
    frame = load(tmp_path)
    assert frame.value.isna().tolist() == [False, True, False] and frame.value.dtype == 'float64'
    assert frame.samples.fillna(0).tolist() == [0, 7, 0]
    assert frame.epoch.isna().tolist() == [False, True, False] and frame.step.tolist() == [9, 19, 9]
    assert frame['learning rate'].isna().tolist() == [False, False, True]
    assert frame.groupby('betas').size().to_dict() == {'[0.9, 0.95]': 1}


def test_columns_of_one_name_are_told_apart(tmp_path):
    for name, step in (('a', 5), ('b', 6)):
        folder = write_run(tmp_path / name, [line('erank', 9, 4.)], step=step, erank=step, lr=0.1)
        (folder / 'metrics.csv').write_text('step,erank,time\n9,40.0,1.0\n')
    frame = load(tmp_path, wide=True)
    assert frame[['step', 'erank', 'erank (logged)', 'time (logged)', 'step (setting)', 'erank (setting)']].iloc[
        0].tolist() == [9, 4., 40., 1., 5, 5]
    assert load(tmp_path)[['step', 'step (setting)']].iloc[1].tolist() == [9, 6]


def test_folders_without_runs(tmp_path):
    with pytest.raises(ReportError, match='nowhere: no such file or folder'):
        load(tmp_path / 'nowhere')
    write_run(tmp_path / 'a', [line('erank', 9, 4.)])
    with pytest.warns(UserWarning, match='nowhere: no such file'):
        assert len(load([tmp_path / 'a', str(tmp_path / 'nowhere')])) == 1
    with pytest.raises(ReportError, match='--under=f1: no run has it'):
        compare(tmp_path, under='f1')


def test_without_pandas_it_says_what_to_install(tmp_path, monkeypatch):
    write_run(tmp_path / 'a', [line('erank', 9, 4.)])
    monkeypatch.setitem(sys.modules, 'pandas', None)
    for ask in (lambda: load(tmp_path), lambda: compare(tmp_path).table, lambda: PlasticityMonitor().history):
        with pytest.raises(ImportError, match='pip install pandas'):
            ask()
    assert 'Effective rank of weights' in compare(tmp_path)._repr_html_()  # needs none


# --- the comparison -------------------------------------------------------------


def test_the_table_is_that_of_the_command_best_first(tmp_path, capsys):
    sweep(tmp_path, {(0.1, 8): 0.9, (0.001, 8): 0.2, (0.1, 32): 0.95, (0.001, 32): 0.15})
    found = compare(str(tmp_path / '*'))
    assert PlasticityReportCLI.main(cmdline=0, runs=[str(tmp_path / '*')], format='csv') == 0
    rows = {row['run']: row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert list(found.table.run) == ['lr0.1-bs32', 'lr0.1-bs8', 'lr0.001-bs8', 'lr0.001-bs32']
    assert set(found.table) == set(rows['lr0.1-bs8'])
    for row in found.table.to_dict('records'):
        own = rows[row['run']]
        assert float(own['val_acc.end']) == row['val_acc.end'] and own['verdict'] == row['verdict']
        assert own['verdict_reason'] == row['verdict_reason'] and own['best'] == str(row['best'])
    assert found.table.best.tolist() == [True, False, False, False]
    assert [(name, verdict.word) for name, verdict in found.verdicts.items()] == list(
        found.table[['run', 'verdict']].itertuples(index=False, name=None))
    assert found.summary[0].startswith('lr0.1-bs32: best, val_acc 0.95') and repr(found).startswith(found.summary[0])
    assert any(text.startswith('Best: learning rate 0.1, batch size 32') for text in found.summary)
    assert found.findings


def test_the_grid_is_a_pivot(tmp_path):
    ends = {(0.1, 8): 0.9, (0.001, 8): 0.2, (0.1, 32): 0.95}
    sweep(tmp_path, ends)
    found = compare(tmp_path)
    grid = found.grid()
    expected = found.table.pivot(index='batch size', columns='learning rate', values='val_acc.end')
    pd.testing.assert_frame_equal(grid, expected, check_dtype=False, check_index_type=False, check_column_type=False)
    assert math.isnan(grid.loc[32, 0.001]) and grid.loc[8, 0.001] == 0.2
    assert found.grid('verdict').loc[32, 0.1] == 'learned'
    assert found.grid('weights, times fresh').loc[8, 0.1] == pytest.approx(0.069 / 0.049)
    with pytest.raises(ReportError, match="one of val_acc, .*verdict, but got 'nothing'"):
        found.grid('nothing')
    with pytest.raises(ReportError, match='differ in a setting'):
        compare(tmp_path / 'lr0.1-bs8').grid()
    # A third setting is the first level of the rows.
    for width, end in ((4, 0.5), (8, 0.6)):
        for lr in (0.1, 0.2):
            folder = write_run(tmp_path / 'three' / f'{width}-{lr}', [line('erank', 9, 4.)], lr=lr, batch_size=int(
                80 * lr), width=width)
            (folder / 'metrics.csv').write_text(f'step,val_acc\n19,{end + lr}\n')
    assert compare(tmp_path / 'three').grid().loc[('width 8', 16), 0.2] == pytest.approx(0.8)


@drawing
def test_figures(tmp_path):
    sweep(tmp_path, {(0.1, 8): 0.9, (0.001, 8): 0.2})
    found = compare(tmp_path)
    top, bottom = found.figure('weight_mag').axes
    assert len(top.lines) == len(bottom.lines) == 2
    assert {tuple(one.get_ydata()) for one in bottom.lines} == {(0.1, 0.9), (0.1, 0.2)}
    grid = found.figure()
    assert len(grid.axes[0].patches) == 2 and grid._repr_png_().startswith(b'\x89PNG')
    assert found.figure('layers-weight_mag') is None  # in which the runs do not differ
    with pytest.raises(ReportError, match="pictures grid, panels, weight_mag, layers-weight_mag, but got 'erank'"):
        found.figure('erank')


class Reader(html.parser.HTMLParser):
    """ The tags and attributes of a text, and what is read. """

    def __init__(self, text):
        super().__init__()
        self.tags, self.names, self.open, self.text = set(), set(), [], ''
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}
        if tag != 'br':
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_notebook_shows_names_as_text(tmp_path):
    odd = '<script>alert(1)</script>"&\'<img src=x onerror=y>'
    for lr, end in (('"<b>0.1"', 0.9), ('"</td><i>"', 0.2)):
        folder = write_run(tmp_path / f'run{end} <u>', [line(odd, 9, 4., {odd: 1.}), line('weight_mag', 9, 1.)], lr=lr,
                           **{f'"{odd[:8]}{odd[-10:]}"': end})
        with (folder / 'metrics.csv').open('w', newline='') as file:
            csv.writer(file).writerows([['step', f'val_acc {odd}'], [9, end]])
    page = Reader(compare(tmp_path)._repr_html_())
    assert page.tags == {'div', 'ul', 'li', 'table', 'caption', 'tr', 'th', 'td', 'br'} and page.open == []
    assert page.names == {'class', 'style'}
    for text in (odd, f'val_acc {odd}', '<b>0.1', '</td><i>', 'run0.9 <u>'):
        assert text in page.text
    # Dollars are no formula.
    assert 'mathjax_ignore' in compare(tmp_path)._repr_html_()


# --- the history of a monitor -----------------------------------------------------


class Asks(pl.Callback):
    """ How much there is after each epoch. """

    def __init__(self, monitor):
        self.monitor, self.counts = monitor, []

    def on_train_epoch_start(self, trainer, pl_module):
        self.counts.append(len(self.monitor.history))


@pytest.mark.parametrize('logger', [True, False])
def test_history_is_what_the_file_holds(tmp_path, logger):
    monitor = PlasticityMonitor('weight_mag@1,dead_units')
    assert monitor.history.empty and list(monitor.history) == LONG
    asks = Asks(monitor)
    _, trainer, _, _ = fit(tmp_path, monitor, callbacks=[asks], logger=logger)
    lines = read_lines(trainer, start=True)
    history = monitor.history
    assert list(history)[:len(LONG)] == LONG
    assert sorted(map(tuple, history[['metric', 'layer', 'step', 'value']].values.tolist())) == raw(tmp_path)
    assert history[history.layer == ''].time.tolist() == [
        row['time'] for name in ('weight_mag', 'dead_units') for row in lines if row['metric'] == name]
    assert 0 < asks.counts[0] < asks.counts[1] < len(history)
    # Of the next fit there is nothing of this one; in copies there is nothing.
    assert copy.deepcopy(monitor).history.empty and pickle.loads(pickle.dumps(monitor)).history.empty
    fit(tmp_path / 'next', monitor, max_epochs=1)
    assert len(monitor.history) == len(raw(tmp_path / 'next'))


def reachable(item):
    """ All objects that one keeps alive, but for code. """
    found, left = {}, [item]
    while left:
        item = left.pop()
        if id(item) not in found and not isinstance(item, (type, types.ModuleType, types.FunctionType)):
            found[id(item)] = item
            left += gc.get_referents(item)
    return found.values()


def test_history_outlives_the_trainer_and_the_file(tmp_path):
    monitor = PlasticityMonitor('weight_mag@1')
    _, trainer, _, _ = fit(tmp_path, monitor)
    lines = read_lines(trainer, start=True)
    # Lightning itself gives each callback methods of the module.
    kept = list(reachable([x for name, x in vars(monitor).items() if name not in ('log', 'log_dict')]))
    assert any(isinstance(item, Point) for item in kept)
    assert not [item for item in kept if isinstance(item, (pl.Trainer, torch.Tensor, torch.nn.Module))]
    (Path(trainer.log_dir) / 'plasticity.jsonl').unlink()
    history = monitor.history
    assert [(row.metric, row.layer, row.step, row.epoch, row.value) for row in history.itertuples()] == [
        ('weight_mag', '', row['step'], row['epoch'], row['value']) for row in lines]


# --- a notebook ---------------------------------------------------------------------


def test_the_notebook_runs(tmp_path):
    skip_without('the notebook is not run', 'nbclient', 'ipykernel', 'matplotlib')
    import nbformat
    from nbclient import NotebookClient
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {'metadata': {'path': str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name='python3', resources=where).execute()
    shown = [output['data'] for cell in notebook.cells if cell.cell_type == 'code'
             for output in cell.outputs if output.output_type == 'execute_result']
    history, found, grid, figure, ranks = shown
    assert all('text/html' in data for data in (history, found, grid, ranks)) and 'image/png' in figure
    page = Reader(found['text/html'])
    assert 'lr0.1-bs8: best' in page.text and page.text.count('hardly moved') >= 4
    assert 'learning rate' in grid['text/html'] and '0.1' in ranks['text/html']
