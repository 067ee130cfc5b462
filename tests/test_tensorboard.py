"""
TensorBoard: the dashboard, histograms over layers, the worst layers; and values in the progress bar.
"""
import html
import importlib.util
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from common import TAGS, Layers, Net, fit, last, lines_of, make_net, read_lines
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard import plugin_util
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.dashboard import Dashboard, line_of, text_of
from geowatch.utils.lightning_ext.callbacks.plasticity_report import report_command, write_report_script

WORST = 'plasticity_layers/worst/text_summary'


def read(folder):
    return EventAccumulator(str(folder), size_guidance={'scalars': 0, 'histograms': 0, 'tensors': 0}).Reload()


def texts(events):
    """ Step to text. """
    return {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(WORST)}


def charts(events):
    """ Page to chart title to patterns of tags. """
    (event,) = events.Tensors('custom_scalars__config__')
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {page.title: {chart.title: list(chart.multiline.tag) for chart in page.chart} for page in layout.category}


# --- a real run ----------------------------------------------------------------

def test_one_page_has_a_chart_for_each_tag(tmp_path):
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor())
    events = read(trainer.log_dir)
    pages = charts(events)
    assert list(pages) == ['plasticity']
    assert list(pages['plasticity']) == [
        'Weight magnitude', 'Gradient magnitude', 'Gradient norm', 'Dead units', 'Effective rank of weights',
        'Effective rank of features', 'Update ratio']
    # Each pattern finds its own tag and no other.
    found = [[tag for tag in events.Tags()['scalars'] if re.match(pattern, tag)]
             for patterns in pages['plasticity'].values() for pattern in patterns]
    assert found == [[f'plasticity/{tag}'] for tag in TAGS]


def test_page_shows_what_is_measured_only(tmp_path):
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('erank'))
    assert charts(read(trainer.log_dir)) == {'plasticity': {'Effective rank of weights': ['^plasticity/erank$']}}


def test_histograms_hold_the_layers(tmp_path):
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor(interval=2))
    events, lines = read(trainer.log_dir), read_lines(trainer, start=True)
    assert events.Tags()['histograms'] == [f'plasticity_layers/{tag}' for tag in dict.fromkeys(
        line['metric'] for line in lines)]
    for tag in TAGS:
        histograms = events.Histograms(f'plasticity_layers/{tag}')
        assert [histogram.step for histogram in histograms] == [line['step'] for line in lines_of(lines, tag)]
        for histogram, line in zip(histograms, lines_of(lines, tag), strict=True):
            values = [layer['value'] for layer in line['layers'].values()]
            own = histogram.histogram_value
            assert (own.num, own.min, own.max) == (len(values), min(values), max(values))
            assert own.sum == pytest.approx(sum(values))


def test_text_names_the_worst_layers(tmp_path):
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor(interval='epoch'), make_net(dead=4))
    lines = read_lines(trainer, start=True)
    said = texts(read(trainer.log_dir))
    assert sorted(said) == sorted({line['step'] for line in lines})
    table = said[max(said)].splitlines()
    assert table[0].startswith('| metric | worst layers')
    # What was measured at an earlier step of the epoch stays in it.
    assert [row.split(' | ')[0] for row in table[2:]] == [f'| {title}' for title in (
        'Weight magnitude', 'Gradient magnitude', 'Gradient norm', 'Dead units', 'Effective rank of weights',
        'Effective rank of features', 'Update ratio')]
    layers = last(lines, 'dead_units')['layers']
    assert layers['act']['value'] == 0.25
    worst = max(layers, key=lambda name: layers[name]['value'])
    assert f'Dead units | `{worst}` 25 % \u2192 25 %' in said[max(said)]


def test_nothing_of_it_without_tensorboard(tmp_path):
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor(), logger=CSVLogger(tmp_path))
    assert lines
    assert not list(tmp_path.rglob('events.out.tfevents.*'))


def test_also_for_the_other_package_and_for_subclasses(tmp_path):
    package = pytest.importorskip('lightning.pytorch', reason='lightning is not installed')
    from lightning.pytorch.loggers import TensorBoardLogger as Theirs
    TheirNet = type('TheirNet', (Layers, package.LightningModule), {})

    class Mine(Theirs):
        pass

    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor(), make_net(TheirNet), package=package, logger=Mine(tmp_path))
    assert 'plasticity_layers/erank' in read(trainer.log_dir).Tags()['histograms']


@pytest.mark.parametrize('broken', ['add_custom_scalars', 'add_histogram', 'add_text'])
def test_a_dashboard_that_fails_costs_itself_only(tmp_path, broken, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise OSError('the disk is full')
    monkeypatch.setattr(SummaryWriter, broken, fails)
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1'))
    assert trainer.global_step == 10
    assert [event.step for event in read(trainer.log_dir).Scalars('plasticity/weight_mag')] == list(range(-1, 10))
    assert [line['step'] for line in lines] == list(range(10))
    out = capsys.readouterr().out
    assert out.count('The dashboard of TensorBoardLogger has failed') == 1 and out.count('Traceback') == 1


# --- what is worst -------------------------------------------------------------

@pytest.fixture
def dashboard(tmp_path):
    logger = TensorBoardLogger(tmp_path)

    def read_back():
        logger.finalize('success')
        return read(logger.log_dir)

    own = Dashboard(logger, TAGS)
    own.read = read_back
    return own


def row(metric, **layers):
    return {'metric': metric, 'value': 1.0, 'layers': {name: {'value': value} for name, value in layers.items()}}


@pytest.mark.parametrize(('metric', 'first', 'now', 'order'), [
    # How far weights have grown, and not how large they are.
    ('weight_mag', {'a': 1., 'b': .1, 'c': .1}, {'a': 1.1, 'b': .3, 'c': .05}, 'bac'),
    # How much rank is left, and not how little there was.
    ('erank', {'a': 5., 'b': 50., 'c': 4.}, {'a': 4., 'b': 20., 'c': 5.}, 'bac'),
    ('feature_erank', {'a': 5., 'b': 50.}, {'a': 0., 'b': 20.}, 'ab'),
    # Gradients may vanish or explode.
    ('grad_mag', {'a': 1., 'b': 1., 'c': 1.}, {'a': 2., 'b': .01, 'c': 30.}, 'bca'),
    ('dead_units', {'a': .5, 'b': 0., 'c': 0.}, {'a': .5, 'b': .4, 'c': .1}, 'abc'),
    # What is not finite is worst of all; what began at zero has no ratio.
    ('weight_mag', {'a': 1., 'b': 1., 'c': 0.}, {'a': 9., 'b': None, 'c': 5.}, 'bac'),
])
def test_order_of_the_worst(dashboard, metric, first, now, order):
    dashboard.log({}, 0, [row(metric, **first)])
    dashboard.log({}, 1, [row(metric, **now)])
    line = texts(dashboard.read())[1].splitlines()[-1]
    assert [part.split('`')[1] for part in line.split('|')[2].split(',')] == list(order)
    assert ('not finite' in line) == (None in now.values())


def test_three_layers_are_named(dashboard):
    dashboard.log({}, 0, [row('dead_units', **{f'act{k}': k / 10 for k in range(8)})])
    assert texts(dashboard.read())[0].splitlines()[-1] == (
        '| Dead units | `act7` 70 % \u2192 70 %, `act6` 60 % \u2192 60 %, `act5` 50 % \u2192 50 % |')


def test_without_a_finite_layer_or_without_any(dashboard):
    dashboard.log({}, 0, [row('erank', a=None), row('dead_units')])
    events = dashboard.read()
    assert events.Tags()['histograms'] == []
    assert texts(events)[0].splitlines()[-1] == '| Effective rank of weights | `a` n/a \u2192 not finite |'


def test_a_metric_of_ones_own(dashboard):
    dashboard.log({}, 0, [row('mine', a=2., b=2.)])
    dashboard.log({}, 9, [row('mine', a=2., b=5.)])
    events = dashboard.read()
    assert events.Tags()['histograms'] == ['plasticity_layers/mine']
    assert texts(events)[9].splitlines()[-1] == '| mine | `b` 2 \u2192 5, `a` 2 \u2192 2 |'


def test_a_long_run_writes_less_and_less(dashboard):
    for step in range(20000):
        dashboard.log({}, step, [row('erank', a=2.)] if step % 2 else [])
    events = dashboard.read()
    steps = [histogram.step for histogram in events.Histograms('plasticity_layers/erank')]
    assert steps[:100] == list(range(1, 200, 2))
    assert len(steps) < 600
    # Never more than one percent behind, and two steps.
    assert all(after <= 1.01 * before + 2 for before, after in zip(steps, [*steps[1:], 19999], strict=True))
    assert sorted(texts(events)) == steps


# --- geowatch's own plotter ----------------------------------------------------

def test_the_host_draws_the_default_tags_quickly(tmp_path):
    pytest.importorskip('kwplot', reason='kwplot, which geowatch draws with, is not installed')
    if not importlib.util.find_spec('geowatch.utils.lightning_ext.callbacks.tensorboard_plotter'):
        pytest.skip('geowatch is not installed')
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor(interval=1), max_epochs=20)
    events = read(trainer.log_dir)
    tags = events.Tags()['scalars']
    assert len([tag for tag in tags if tag.startswith('plasticity')]) == 7
    assert events.Scalars('plasticity/erank')[0].step == -1  # which it has to draw as well
    # The host forks from a process that has imported all of this.
    code = '''
        import sys, time
        import kwplot, matplotlib.pyplot, pandas, seaborn, tensorboard.backend.event_processing.event_accumulator
        from geowatch.utils.lightning_ext.callbacks.tensorboard_plotter import _dump_measures
        start = time.process_time()
        _dump_measures(sys.argv[1])
        print('seconds', time.process_time() - start)
    '''
    env = {**os.environ, 'GEOWATCH_PREIMPORT': '0', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code), trainer.log_dir],
                          env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds = float(done.stdout.split()[-1])
    print(f'{seconds:.1f} CPU-s')
    drawn = [path.name for path in (tmp_path.glob('lightning_logs/*/monitor/tensorboard/*.png'))]
    assert len([name for name in drawn if 'plasticity' in name]) == 7
    assert seconds < 3


# --- the progress bar ----------------------------------------------------------

class Logs(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log('train_loss', loss, prog_bar=True)
        return loss


def test_progress_bar_has_the_values(tmp_path):
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor(prog_bar=True), make_net(Logs))
    shown = dict(trainer.progress_bar_metrics)
    assert set(shown) == {*TAGS, 'train_loss'}
    assert {tag: shown[tag] for tag in TAGS} == {tag: last(lines, tag)['value'] for tag in TAGS}


def test_progress_bar_is_left_alone_unless_asked(tmp_path):
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor(), make_net(Logs))
    assert set(trainer.progress_bar_metrics) == {'train_loss'}


def test_progress_bar_keeps_what_the_model_shows(tmp_path):
    class Mine(Net):
        def training_step(self, batch, batch_idx):
            self.log('grad_norm', 77., prog_bar=True)
            return super().training_step(batch, batch_idx)
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('grad_mag@1', prog_bar=True), make_net(Mine))
    assert trainer.progress_bar_metrics['grad_norm'] == 77
    assert trainer.progress_bar_metrics['plasticity/grad_norm'] == last(lines, 'grad_norm')['value']


@pytest.mark.parametrize('bar', [RichProgressBar, TQDMProgressBar])
def test_both_bars_show_small_numbers(tmp_path, bar, capsys, monkeypatch):
    if bar is RichProgressBar:
        pytest.importorskip('rich', reason='rich is not installed')
        monkeypatch.setenv('COLUMNS', '250')
        monkeypatch.setenv('FORCE_COLOR', '1')
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1,grad_mag@1', prog_bar=True),
                               enable_progress_bar=True, callbacks=[bar()], limit_val_batches=0, logger=False)
    said = ''.join(capsys.readouterr())
    sign = ': ' if bar is RichProgressBar else '='
    for tag in ('weight_mag', 'grad_mag', 'grad_norm'):
        # The bar is drawn before the last values are there.
        values = {f'{line["value"]:.3g}' for line in lines_of(lines, tag)}
        assert any(f'{tag}{sign}{value}' in said for value in values), (tag, values, said[-600:])


def test_small_numbers_keep_their_digits(tmp_path):
    class Small(Net):
        def loss(self, batch):
            return 1e-5 * super().loss(batch)
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('grad_mag@1', prog_bar=True), make_net(Small))
    value = trainer.progress_bar_metrics['grad_mag']
    assert 0 < value < 1e-4
    # As the rich bar writes it.
    assert f'{value:.3f}' == f'{last(lines, "grad_mag")["value"]:.3g}'


def test_flag_of_geowatch_fit():
    from geowatch.cli.fit import FitCLI
    for args in (['--plasticity_prog_bar'], ['--plasticity_metrics=erank', '--plasticity_prog_bar=True']):
        config, others = FitCLI.parse([*args, '--trainer.max_steps=1'])
        assert config.callback_args()[-1] == '--trainer.callbacks.prog_bar=True'
        assert others == ['--trainer.max_steps=1']
    config, _ = FitCLI.parse(['--plasticity_metrics=erank'])
    assert not any('prog_bar' in arg for arg in config.callback_args())


# --- the report's script and command -------------------------------------------

def test_script_and_command_for_the_run(tmp_path, capsys):
    """ That both work is in test_report.py. """
    _, trainer, _, _ = fit(tmp_path / 'my runs', PlasticityMonitor('weight_mag'))
    (said,) = [line for line in capsys.readouterr().out.splitlines() if 'plasticity_report' in line]
    assert said.endswith(report_command(trainer.log_dir))
    script = Path(trainer.log_dir, 'plasticity_report.sh')
    assert os.access(script, os.X_OK)
    assert script.read_text() == write_report_script(tmp_path).read_text()


def test_the_command_can_be_pasted_from_a_narrow_terminal(tmp_path, capsys, monkeypatch):
    pytest.importorskip('rich', reason='rich is not installed')
    monkeypatch.setenv('COLUMNS', '60')
    monkeypatch.setenv('FORCE_COLOR', '1')
    # The bar is closed after the monitor.
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('weight_mag'), enable_progress_bar=True,
                           callbacks=[RichProgressBar()])
    assert report_command(trainer.log_dir) in capsys.readouterr().out


def test_a_script_that_cannot_be_written_only_warns(tmp_path):
    (tmp_path / 'run/version_0/plasticity_report.sh').mkdir(parents=True)
    with pytest.warns(UserWarning, match='script for the report could not be written'):
        trainer = pl.Trainer(max_epochs=1, accelerator='cpu', enable_progress_bar=False, enable_model_summary=False,
                             enable_checkpointing=False, callbacks=[PlasticityMonitor('weight_mag@1')],
                             logger=CSVLogger(tmp_path, name='run', version=0))
        trainer.fit(make_net(), torch.utils.data.DataLoader(torch.randn(16, 8), batch_size=8))
    assert [line['step'] for line in read_lines(trainer)] == [0, 1]
    assert all(math.isfinite(line['value']) for line in read_lines(trainer))


def test_no_command_where_nothing_was_measured(tmp_path, capsys):
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1000000', interval=1000000), max_epochs=0)
    assert lines == []
    assert 'plasticity_report' not in capsys.readouterr().out
    assert not list(tmp_path.rglob('plasticity_report.sh'))


@pytest.mark.parametrize('name', ['a|b', 'a`b', '`a``|b`', '|', 'a\nb', 'back\\', '<b>x</b>', '\u5c42_1'])
def test_odd_names_keep_the_table(name):
    """ As TensorBoard renders it: one row of two cells, with the name as it is. """
    line = line_of('dead_units', {name: 0., 'fc2': 0.}, {name: .5, 'fc2': .25})
    table = plugin_util.markdown_to_safe_html(text_of([line, line_of('a|b', {'fc': 1.}, {'fc': 2.})]))
    cells = [html.unescape(cell) for cell in re.findall('<td>(.*?)</td>', table)]
    shown = ' '.join(name.split())
    assert cells == ['Dead units', f'<code>{shown}</code> 0 % \u2192 50 %, <code>fc2</code> 0 % \u2192 25 %',
                     'a|b', '<code>fc</code> 1 \u2192 2']
