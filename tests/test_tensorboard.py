"""
TensorBoard: the dashboard, layers, the HParams tab, how to read it; and values in the progress bar.
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
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine import hparams
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.dashboard import Dashboard, line_of, text_of
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
from geowatch.utils.lightning_ext.callbacks.plasticity_report import report_command, write_report_script

WORST = 'plasticity_layers/worst/text_summary'


def read(folder):
    return EventAccumulator(str(folder), size_guidance={'scalars': 0, 'histograms': 0, 'tensors': 0}).Reload()


def texts(events):
    """ Step to text. """
    return {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(WORST)}


def charts(events):
    """ Page to chart title to tags, or patterns of them. """
    (event,) = events.Tensors('custom_scalars__config__')
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {page.title: {chart.title: list(chart.multiline.tag) or [
        getattr(chart.margin.series[0], end) for end in ('value', 'lower', 'upper')] for chart in page.chart}
        for page in layout.category}


class Deep(Net):
    """ Of enough layers for a histogram. """

    def __init__(self):
        super().__init__()
        self.more = torch.nn.Sequential(*(torch.nn.Linear(12, 12) for _ in range(7)))

    def features(self, x):
        first, second = super().features(x)
        return first, self.more(second)


# --- a real run ----------------------------------------------------------------

TITLES = ['Weight magnitude', 'Gradient magnitude', 'Gradient norm', 'Dead units', 'Effective rank of weights',
          'Effective rank of features', 'Update ratio']


class LogsAll(Net):
    """ With losses and scores by the names that people give them. """

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log_dict({'train/loss': loss, 'valve': 1., 'plasticity_of_mine/loss': 1.})
        return loss

    def validation_step(self, batch, batch_idx):
        self(batch)
        self.log_dict({'val_loss': 1., 'Val/IoU': 0.5, 'acc': 0.25})


def test_pages_have_a_chart_for_each_tag(tmp_path):
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor(), make_net(LogsAll), log_every_n_steps=1)
    events = read(trainer.log_dir)
    page, bands = charts(events).values()
    assert list(page) == ['Loss', 'Validation', *TITLES] and list(bands) == TITLES
    # Each pattern finds its own tags and no other.
    found = [[tag for tag in events.Tags()['scalars'] if re.match(pattern, tag)]
             for patterns in page.values() for pattern in patterns]
    assert found == [['train/loss', 'val_loss'], ['Val/IoU', 'acc'], *([f'plasticity/{tag}'] for tag in TAGS)]
    assert [set(tags) for tags in bands.values()] == [
        {f'plasticity/{tag}', f'plasticity_layers/{tag}/lowest', f'plasticity_layers/{tag}/highest'} for tag in TAGS]


def test_page_shows_what_is_measured_only(tmp_path):
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('erank'), make_net(Deep),
                           logger=TensorBoardLogger(tmp_path, prefix='my.run'))
    pages = charts(read(trainer.log_dir))
    assert list(pages['plasticity: lowest to highest layer'].values()) == [[
        f'my.run-plasticity{tag}' for tag in ('/erank', '_layers/erank/lowest', '_layers/erank/highest')]]
    assert pages['plasticity']['Effective rank of weights'] == [r'^my\.run\-plasticity/erank$']
    assert len(pages['plasticity']) == 3


def test_few_layers_are_a_band_around_the_value(tmp_path):
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor(interval=2))
    events, lines = read(trainer.log_dir), read_lines(trainer, start=True)
    assert events.Tags()['histograms'] == []
    for tag in TAGS:
        steps = [event.step for event in events.Scalars(f'plasticity/{tag}')]
        for end, of in (('lowest', min), ('highest', max)):
            # The host draws a picture for each of the other kind.
            assert f'plasticity_layers/{tag}/{end}' not in events.Tags()['scalars']
            curve = events.Tensors(f'plasticity_layers/{tag}/{end}')
            # A chart of bands wants the same steps in all three.
            assert [event.step for event in curve] == steps == [line['step'] for line in lines_of(lines, tag)]
            assert [event.tensor_proto.float_val[0] for event in curve] == pytest.approx([
                of(layer['value'] for layer in line['layers'].values()) for line in lines_of(lines, tag)])


def test_histograms_hold_many_layers(tmp_path):
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('paper', interval=2), make_net(Deep))
    events, lines = read(trainer.log_dir), read_lines(trainer, start=True)
    tags = ['weight_mag', 'erank', 'grad_mag', 'grad_norm']  # and the others have two hidden layers
    assert events.Tags()['histograms'] == [f'plasticity_layers/{tag}' for tag in tags]
    for tag in tags:
        histograms = events.Histograms(f'plasticity_layers/{tag}')
        by_step = {line['step']: line for line in lines_of(lines, tag)}
        start = [-1] * (-1 in by_step)  # at which there are no gradients
        # The start, and the first of each epoch of five steps.
        assert list(by_step) == [*start, 1, 3, 5, 7, 9]
        assert [histogram.step for histogram in histograms] == [*start, 1, 5]
        for histogram in histograms:
            values = [layer['value'] for layer in by_step[histogram.step]['layers'].values()]
            own = histogram.histogram_value
            assert (own.num, own.min, own.max) == (len(values), min(values), max(values))
            assert own.sum == pytest.approx(sum(values))


def test_a_measurement_is_one_event(tmp_path):
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1,grad_mag@1', per_layer=True))
    (fpath,) = Path(trainer.log_dir).glob('events.out.tfevents.1*')
    events = [event for event in EventFileLoader(str(fpath)).Load()
              if any(value.tag == 'plasticity/weight_mag' for value in event.summary.value)]
    for event, step in zip(events[2:], range(1, 10), strict=True):
        assert event.step == step
        assert [value.tag for value in event.summary.value] == [
            *(f'plasticity/{tag}' for tag in ('weight_mag', 'grad_mag', 'grad_norm')),
            *(f'plasticity_layers/{tag}/{layer}' for tag in ('weight_mag', 'grad_mag', 'grad_norm')
              for layer in ('fc1', 'fc2', 'head')),
            *(f'plasticity_layers/{tag}/{end}' for tag in ('weight_mag', 'grad_mag', 'grad_norm')
              for end in ('lowest', 'highest'))]


def test_each_tag_says_how_to_read_it(tmp_path):
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor())
    events = read(trainer.log_dir)
    for tag in TAGS:
        said = events.SummaryMetadata(f'plasticity/{tag}').summary_description
        words = METRICS[tag].words
        assert said.startswith(words.about) and words.rule in said and 'step -1' in said
        assert words.about in events.SummaryMetadata(f'plasticity_layers/{tag}/lowest').summary_description
    (text,) = events.Tensors('plasticity/how_to_read/text_summary')
    table = plugin_util.markdown_to_safe_html(text.tensor_proto.string_val[0])
    cells = [html.unescape(cell) for cell in re.findall('<td>(.*?)</td>', table)]
    assert cells[::2] == [f'<code>plasticity/{tag}</code>' for tag in TAGS]
    assert cells[1::2] == [events.SummaryMetadata(f'plasticity/{tag}').summary_description for tag in TAGS]


@pytest.mark.parametrize('by', ['logger', 'writer'])
def test_what_is_somebody_elses_gets_the_values_as_any_logger(tmp_path, by):
    seen = []

    class MyWriter(SummaryWriter):
        def add_scalar(self, tag, value, step=None, **kwargs):
            seen.append((tag, step))
            return super().add_scalar(tag, value, step, **kwargs)

    class MyLogger(TensorBoardLogger):
        @property
        def experiment(self):
            self._experiment = self._experiment or MyWriter(self.log_dir)
            return self._experiment

    class Counts(TensorBoardLogger):
        def log_metrics(self, metrics, step=None):
            seen.extend((tag, step) for tag in metrics)
            super().log_metrics(metrics, step)

    logger = (Counts if by == 'logger' else MyLogger)(tmp_path)
    fit(tmp_path, PlasticityMonitor('weight_mag@1'), logger=logger)
    assert [step for tag, step in seen if tag == 'plasticity/weight_mag'] == list(range(-1, 10))


def test_text_names_the_worst_layers(tmp_path):
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor(interval='epoch'), make_net(dead=4))
    lines = read_lines(trainer, start=True)
    said = texts(read(trainer.log_dir))
    assert sorted(said) == sorted({line['step'] for line in lines})
    table = said[max(said)].splitlines()
    assert table[0].startswith('| metric | worst layers')
    # What was measured at an earlier step of the epoch stays in it.
    assert [row.split(' | ')[0] for row in table[2:]] == [f'| {title}' for title in TITLES]
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
    events = read(trainer.log_dir)
    assert 'plasticity/erank' in events.Tags()['scalars'] and list(charts(events)['plasticity'])[2:] == TITLES


@pytest.mark.parametrize('broken', ['add_custom_scalars', 'add_histogram', 'add_text'])
def test_a_dashboard_that_fails_costs_itself_only(tmp_path, broken, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise OSError('the disk is full')
    monkeypatch.setattr(SummaryWriter, broken, fails)
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1'), make_net(Deep))
    assert trainer.global_step == 10
    assert [event.step for event in read(trainer.log_dir).Scalars('plasticity/weight_mag')] == list(range(-1, 10))
    assert [line['step'] for line in lines] == list(range(10))
    out = capsys.readouterr().out
    assert out.count('The dashboard of TensorBoardLogger has failed') == 1 and out.count('Traceback') == 1


# --- the HParams tab -------------------------------------------------------------

def table(logdir):
    """ What TensorBoard itself makes of the runs in a folder: columns of settings, and run to its row. """
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups
    runs = EventMultiplexer().AddRunsFromDirectory(str(logdir)).Reload()
    context = backend_context.Context(TBContext(data_provider=MultiplexerDataProvider(runs, str(logdir))))
    experiment = get_experiment.Handler(RequestContext(), context, '', api_pb2.GetExperimentRequest()).run()
    columns = [api_pb2.ColParams(hparam=info.name, include_in_result=True) for info in experiment.hparam_infos]
    columns += [api_pb2.ColParams(metric=info.name, include_in_result=True) for info in experiment.metric_infos]
    groups = list_session_groups.Handler(RequestContext(), context, '', api_pb2.ListSessionGroupsRequest(
        col_params=columns, slice_size=100, allowed_statuses=[0, 1, 2, 3])).run().session_groups
    rows = {group.name: ({key: getattr(x, x.WhichOneof('kind')) for key, x in group.hparams.items()},
                         {x.name.tag: x.value for x in group.metric_values}) for group in groups}
    return [info.name.tag for info in experiment.metric_infos], rows


class Saves(LogsAll):
    def __init__(self, lr=0.02, width=1, note='', weights=None):
        super().__init__()
        self.save_hyperparameters()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


@pytest.mark.parametrize('placeholder', [True, False])
@pytest.mark.parametrize('cls', [Saves, LogsAll])
def test_runs_sort_by_what_is_measured(tmp_path, cls, placeholder):
    """ Whether Lightning writes a table with its placeholder first, one without, or none. """
    lines = {}
    for lr, batch_size in ((0.01, 8), (0.001, 16)):
        net = make_net(Saves, lr=lr, weights=torch.randn(100)) if cls is Saves else make_net(cls)
        logger = TensorBoardLogger(tmp_path, name='', version=f'{lr}', default_hp_metric=placeholder)
        lines[str(lr)] = fit(tmp_path, PlasticityMonitor(), net, logger=logger, log_every_n_steps=1,
                             batch_size=batch_size)[2]
    columns, rows = table(tmp_path)
    assert columns == ['val_loss', 'Val/IoU', *(f'plasticity/{tag}' for tag in (
        'dead_units', 'feature_erank', 'erank', 'weight_mag', 'grad_mag', 'grad_norm', 'update_ratio')),
        'acc', 'plasticity_of_mine/loss', 'train/loss', 'valve']
    assert list(rows) == ['0.001', '0.01']
    for name, batch_size in (('0.01', 8), ('0.001', 16)):
        settings, values = rows[name]
        lr = float(name) if cls is Saves else 0.02
        own = {'width': 1.0, 'note': '', 'weights': 'Tensor'} if cls is Saves else {}
        assert settings == {'lr': lr, 'batch_size': batch_size, 'optimizer': 'SGD', **own}
        for tag in TAGS:
            assert values[f'plasticity/{tag}'] == pytest.approx(last(lines[name], tag)['value'])
        assert values['val_loss'] == 1 and values['Val/IoU'] == 0.5


def test_the_table_is_there_while_the_run_goes_on(tmp_path):
    """ Before Lightning says that there is a placeholder only; losses come when they are logged. """
    seen = []

    class Reads(Saves):
        def on_train_start(self):
            seen.append(table(tmp_path)[0])

        def on_train_epoch_end(self):
            seen.append(table(tmp_path)[0])

    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('erank'), make_net(Reads), log_every_n_steps=1,
                           callbacks=[pl.callbacks.EarlyStopping('val_loss')], logger=TensorBoardLogger(tmp_path))
    assert seen[0] == ['val_loss', 'plasticity/erank']
    assert {'val_loss', 'plasticity/erank', 'train/loss', 'acc'} < set(seen[-1])


def test_a_run_that_goes_on_has_one_row(tmp_path):
    for epochs in (1, 2):
        fit(tmp_path, PlasticityMonitor('erank'), make_net(Saves), max_epochs=epochs,
            logger=TensorBoardLogger(tmp_path / 'logs', version=0))
    _, rows = table(tmp_path / 'logs')
    ((settings, values),) = rows.values()
    assert settings['lr'] == 0.02 and {'val_loss', 'plasticity/erank'} < set(values)


def test_a_table_that_cannot_be_written_is_tried_again(tmp_path, monkeypatch):
    tried = []

    def fails(path, data):
        tried.append(path)
        if len(tried) < 3:
            raise OSError('the disk is full')
        replace(path, data)

    replace = hparams._replace
    monkeypatch.setattr(hparams, '_replace', fails)
    with pytest.warns(UserWarning, match='HParams tab cannot be written now .the disk is full.') as said:
        _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1'), make_net(Saves))
    assert len([one for one in said if 'HParams' in str(one.message)]) == 1
    assert trainer.global_step == 10
    columns, _ = table(tmp_path)
    assert 'plasticity/weight_mag' in columns and 'val_loss' in columns


def test_a_table_that_fails_costs_itself_only(tmp_path, monkeypatch, capsys):
    def fails(*args):
        raise RuntimeError('no table')
    monkeypatch.setattr(hparams, '_events', fails)
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1'), make_net(Saves))
    assert trainer.global_step == 10 and len(lines) == 10
    assert [event.step for event in read(trainer.log_dir).Scalars('plasticity/weight_mag')] == list(range(-1, 10))
    assert capsys.readouterr().out.count('The HParams tab of TensorBoardLogger has failed') == 1


def test_of_several_monitors_one_writes_the_table(tmp_path):
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1'), callbacks=[PlasticityMonitor('erank')])
    columns, _ = table(tmp_path)
    assert {'plasticity/weight_mag', 'plasticity/erank'} <= set(columns)
    assert len(list(tmp_path.rglob('events.out.tfevents.0.*'))) == 1


def test_settings_may_be_anything():
    class Odd:
        pass
    settings = {'a': Odd(), 'b': {'c': [1, 'x'], 'd': list(range(1000)), 'e': None}, 'f': torch.zeros(600),
                'g': 'x' * 1000, '\ud800': '\ud800', 'h': torch.float16, 'i': math.nan, 'j': torch.nn.ReLU, '_k': 1}
    plain = hparams.plain_settings(settings)
    assert plain.pop('i') != plain.get('i')
    assert plain.pop('g') == 'x' * 199 + '\u2026'
    assert plain == {'a': 'Odd', 'b/c': "[1, 'x']", 'b/d': 'list of 1000', 'f': 'Tensor', '?': '?',
                     'h': 'torch.float16', 'j': 'ReLU'}
    assert hparams._events({**plain, 'i': math.nan}, ['a\nb', 'plasticity/erank'], 0.)
    assert len(hparams.plain_settings({str(i): i for i in range(1000)})) == hparams.MOST_SETTINGS


# --- what is worst -------------------------------------------------------------

@pytest.fixture
def dashboard(tmp_path):
    logger = TensorBoardLogger(tmp_path)

    def read_back():
        logger.finalize('success')
        return read(logger.log_dir)

    own = Dashboard(logger, TAGS)
    own.read = read_back

    def put(*measured):
        chosen = own.due(*measured)
        if chosen is not None:
            own.log(*chosen)

    own.put = put
    return own


def row(metric, epoch=0, **layers):
    return {'metric': metric, 'epoch': epoch, 'value': 1.0,
            'layers': {name: {'value': value} for name, value in layers.items()}}


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
    dashboard.put({}, 0, [row(metric, **first)])
    dashboard.put({}, 10, [row(metric, **now)])
    line = texts(dashboard.read())[10].splitlines()[-1]
    assert [part.split('`')[1] for part in line.split('|')[2].split(',')] == list(order)
    assert ('not finite' in line) == (None in now.values())


def test_three_layers_are_named(dashboard):
    dashboard.put({}, 0, [row('dead_units', **{f'act{k}': k / 10 for k in range(8)})])
    assert texts(dashboard.read())[0].splitlines()[-1] == (
        '| Dead units | `act7` 70 % \u2192 70 %, `act6` 60 % \u2192 60 %, `act5` 50 % \u2192 50 % |')


def test_without_a_finite_layer_or_without_any(dashboard):
    dashboard.put({}, 0, [row('erank', a=None), row('dead_units')])
    dashboard.put({}, 1, [row('dead_units')])
    events = dashboard.read()
    assert events.Tags()['histograms'] == []
    assert texts(events)[0].splitlines()[-1] == '| Effective rank of weights | `a` n/a \u2192 not finite |'


def test_a_metric_of_ones_own(dashboard):
    others = {f'c{i}': 2. for i in range(9)}
    dashboard.put({}, 0, [row('mine', a=2., b=2.)])
    dashboard.put({}, 9, [row('mine', epoch=1, a=2., b=5.), row('mine_of_many', **others)])
    events = dashboard.read()
    assert events.Tags()['histograms'] == ['plasticity_layers/mine_of_many']
    assert texts(events)[9].splitlines()[-2] == '| mine | `b` 2 \u2192 5, `a` 2 \u2192 2 |'


def test_a_long_run_writes_less_and_less(dashboard):
    layers = {f'fc{i}': 2. for i in range(9)}
    for step in range(20000):
        dashboard.put({}, step, [row('erank', **layers)] if step % 2 else [])
    events = dashboard.read()
    steps = [histogram.step for histogram in events.Histograms('plasticity_layers/erank')]
    assert steps[:20] == list(range(1, 200, 10))
    assert len(steps) < 120
    # Never more than five percent behind, and two steps.
    assert all(after <= max(1.05 * before + 2, before + 10)
               for before, after in zip(steps, [*steps[1:], 19999], strict=True))
    assert sorted(texts(events)) == steps


def test_each_early_epoch_is_shown_however_short(dashboard):
    layers = {f'fc{i}': 2. for i in range(9)}
    dashboard.put({}, -1, [row('erank', **layers)])
    for step in range(120):  # epochs of three steps
        dashboard.put({}, step, [row('weight_mag', epoch=step // 3, **layers)]
                      + [row('erank', epoch=step // 3, **layers)] * (step % 3 == 2))
    events = dashboard.read()
    of_ranks, of_weights = ([histogram.step for histogram in events.Histograms(f'plasticity_layers/{metric}')]
                            for metric in ('erank', 'weight_mag'))
    assert of_ranks[:20] == [-1, *range(2, 20 * 3 - 1, 3)] and len(of_ranks) < 36
    assert of_weights[:20] == list(range(0, 60, 3))


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


@pytest.mark.parametrize(('metrics', 'tags'), [('paper', ('dead_units', 'feature_erank')),
                                               ('weight_mag,grad_norm,erank', ('weight_mag', 'grad_norm')),
                                               ('erank,dead_units', ('dead_units', 'erank')), ('erank', ('erank',))])
def test_progress_bar_has_two_values(tmp_path, metrics, tags):
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor(metrics, interval='epoch', prog_bar=True), make_net(Logs))
    shown = dict(trainer.progress_bar_metrics)
    assert set(shown) == {*tags, 'train_loss'}
    assert {tag: shown[tag] for tag in tags} == {tag: last(lines, tag)['value'] for tag in tags}
    assert [f'{shown[tag]:.3f}' for tag in tags] == [METRICS[tag].words.text(shown[tag]) for tag in tags]


def test_progress_bar_is_left_alone_unless_asked(tmp_path):
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor(), make_net(Logs))
    assert set(trainer.progress_bar_metrics) == {'train_loss'}


def test_progress_bar_keeps_what_the_model_shows(tmp_path):
    class Mine(Net):
        def training_step(self, batch, batch_idx):
            self.log('grad_mag', 77., prog_bar=True)
            return super().training_step(batch, batch_idx)
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('grad_mag@1', prog_bar=True), make_net(Mine))
    assert trainer.progress_bar_metrics['grad_mag'] == 77
    assert trainer.progress_bar_metrics['plasticity/grad_mag'] == last(lines, 'grad_mag')['value']


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
    for tag in ('weight_mag', 'grad_mag'):
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
