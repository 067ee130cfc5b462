"""
Wrong input is an error before any data is loaded, which says what was expected and what came.
"""
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from common import Recorder, fit, make_net
from torch.utils.data import DataLoader, Dataset

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor

NAMES = ('weight_mag', 'grad_mag', 'dead_units', 'erank', 'feature_erank')

# Arguments, and words of the message besides the value that came.
UNKNOWN_METRICS = [
    ('wieght_mag', 'weight_mag'), ('erank,deadunits', 'dead_units'), ('grad_mag@2,featurerank@epoch', 'feature_erank'),
    ('erank,grad-mag', 'grad_mag'),
]
WRONG_INTERVALS = ['sometimes', '5 parsecs', '', '0', '-3', '-5 minutes', '0 seconds', '1.5', 'epochs', 'nan', 'inf',
                   'every 5', '1e400 seconds', '5 months', '1mon', '2 years', '1y', '5 minutes 3 months', '5 mm', 'm',
                   '1 hour and 5', '1:30 h', '5 minutes -3 s']
WRONG_SAMPLES = ['0', '-1', '1.5', 'many', '']
WRONG_SOURCES = ['test', 'Validation', '', 'val']


def message(**kwargs):
    with pytest.raises(ValueError) as info:
        PlasticityMonitor(**kwargs)
    return str(info.value)


@pytest.mark.parametrize('metrics, nearest', UNKNOWN_METRICS)
@pytest.mark.parametrize('as_list', [False, True])
def test_unknown_metric(metrics, nearest, as_list):
    text = message(metrics=metrics.split(',') if as_list else metrics)
    unknown = [name for name in re.split('[,@]', metrics) if name not in (*NAMES, '2', 'epoch')]
    assert unknown[0] in text
    assert re.search(f"mean\\W+'?{nearest}", text)
    assert all(re.search(rf'\b{name}\b', text.replace(unknown[0], '')) for name in NAMES)


def test_metric_without_anything_near():
    text = message(metrics='xyzzy')
    assert 'xyzzy' in text and all(name in text for name in NAMES)


@pytest.mark.parametrize('metrics', ['', [], ' ', ','])
def test_no_metric(metrics):
    text = message(metrics=metrics)
    assert repr(metrics) in text and all(name in text for name in NAMES)


@pytest.mark.parametrize('metrics', [3, None, [1], ['erank', None]])
def test_metrics_that_are_no_names(metrics):
    text = message(metrics=metrics)
    assert repr(metrics) in text and 'names' in text


@pytest.mark.parametrize('metrics', ['erank@1,erank@epoch', 'erank,erank', ['erank', 'grad_mag', 'erank@2']])
def test_metric_given_twice(metrics):
    assert 'erank' in message(metrics=metrics)


@pytest.mark.parametrize('interval', [*WRONG_INTERVALS, 0, -3, 1.5, True, float('inf'), float('nan'), None, [5]])
def test_wrong_interval(interval):
    text = message(interval=interval)
    assert repr(interval) in text
    assert 'epoch' in text and 'minutes' in text and 'steps' in text


@pytest.mark.parametrize('interval', ['sometimes', '0', '-3', '5 parsecs', ''])
def test_wrong_interval_of_one_metric(interval):
    text = message(metrics=f'weight_mag@1,erank@{interval}')
    assert repr(interval) in text
    assert 'epoch' in text and 'minutes' in text


@pytest.mark.parametrize('samples', [0, -1, 1.5, True, None, '20', [20], float('inf')])
def test_wrong_samples(samples):
    text = message(samples=samples)
    assert repr(samples) in text and 'samples' in text and '1' in text


@pytest.mark.parametrize('source', [*WRONG_SOURCES, None, 3, ['train']])
def test_wrong_source(source):
    text = message(source=source)
    assert repr(source) in text
    assert all(name in text for name in ('auto', 'validation', 'train'))


@pytest.mark.parametrize('layers', [3, [3], ['fc1', None]])
def test_wrong_layers(layers):
    text = message(layers=layers)
    assert 'layers' in text and repr(layers) in text


@pytest.mark.parametrize('name', ['per_layer', 'prog_bar'])
@pytest.mark.parametrize('value', ['maybe', 'True', None, 1])
def test_wrong_switches(name, value):
    assert message(**{name: value}) == f'Expected `{name}` to be True or False, but got {value!r}'


@pytest.mark.parametrize('kwargs', [
    {'metrics': 'all'}, {'metrics': 'weight_mag, erank'}, {'metrics': ['erank@2', 'weight_mag']},
    {'interval': 5}, {'interval': '5'}, {'interval': 'epoch'}, {'interval': '5 minutes'}, {'interval': '5minutes'},
    {'interval': '1h'}, {'interval': '0.5 seconds'}, {'interval': 'auto'}, {'metrics': 'erank@5 minutes'},
    {'source': 'train'}, {'samples': 1}, {'layers': 'fc*'}, {'layers': ['fc1', 'head']}, {'layers': None},
    {'per_layer': True},
])
def test_right_input_is_not_refused(kwargs):
    PlasticityMonitor(**kwargs)


# --- what only the run can tell ----------------------------------------------

class Untouched(Dataset):
    """ Fails where an example is read. """

    def __len__(self):
        return 16

    def __getitem__(self, index):
        raise AssertionError('an example was loaded')


def refused(tmp_path, monitor, validate):
    """ The error of a run in which no example may be read. """
    loader = DataLoader(Untouched(), batch_size=4)
    net = make_net()
    net.val_dataloader = lambda: loader
    with pytest.raises(ValueError) as info:
        fit(tmp_path, monitor, net, validate=False, loader=loader, **({} if validate else {'limit_val_batches': 0}))
    return str(info.value)


def test_reading_is_noticed(tmp_path):
    with pytest.raises(AssertionError, match='an example was loaded'):
        fit(tmp_path, PlasticityMonitor(), loader=DataLoader(Untouched(), batch_size=4))


@pytest.mark.parametrize('validate', [True, False])
@pytest.mark.parametrize('layers, unmatched', [('fc9', 'fc9'), (['encoder.*', 'FC1'], 'encoder.*'), ('fc1,fc9', 'fc9')])
def test_layer_pattern_that_matches_nothing(tmp_path, layers, unmatched, validate):
    text = refused(tmp_path, PlasticityMonitor(layers=layers), validate)
    assert unmatched in text
    assert all(name in text for name in ('fc1', 'fc2', 'head'))


@pytest.mark.parametrize('layers, names', [
    ('fc1', {'fc1'}), ('fc*', {'fc1', 'fc2'}), ('fc1, head', {'fc1', 'head'}), (['fc[2-9]'], {'fc2'}), (None, {
        'fc1', 'fc2', 'head'})])
def test_layer_pattern_that_matches(tmp_path, layers, names):
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag,erank,grad_mag', layers=layers), max_epochs=1)
    assert {line['metric'] for line in lines} == {'weight_mag', 'erank', 'grad_mag', 'grad_norm'}
    assert all(set(line['layers']) == names for line in lines)


def test_validation_source_without_a_loader(tmp_path):
    text = refused(tmp_path, PlasticityMonitor(source='validation'), validate=False)
    assert 'validation' in text and 'train' in text


def test_auto_source_without_a_loader_looks_at_training(tmp_path):
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('dead_units'), validate=False)
    assert [(line['step'], line['samples']) for line in lines] == [(4, 37), (9, 37)]


# --- no logger, no folder ----------------------------------------------------

class Homeless(Recorder):
    """ A logger without a folder. """
    save_dir = None


@pytest.mark.parametrize('logger', ['none', 'no folder'])
def test_no_logger_or_folder_is_one_warning(tmp_path, logger, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = make_net()
    before = [p.detach().clone() for p in net.parameters()]
    logger = Homeless(tmp_path) if logger == 'no folder' else False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        _, trainer, _, _ = fit(tmp_path, PlasticityMonitor(interval=1), net, logger=logger)
    ours = [str(w.message) for w in caught if 'plasticity' in str(w.message).lower()]
    assert len(ours) == 1
    assert trainer.global_step == 10
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert trainer.callback_metrics['plasticity/weight_mag'] > 0
    if logger:
        assert {key for _, key, _ in logger.table()} >= {'plasticity/weight_mag', 'plasticity/dead_units'}


# --- the command line --------------------------------------------------------

FLAGS = [
    # What is given, what the message says of it, and what it says was expected.
    ('metrics', 'wieght_mag', "'wieght_mag'", "'weight_mag'"),
    ('metrics', 'grad_mag@2,featurerank@epoch', "'featurerank'", "'feature_erank'"),
    ('metrics', 'weight_mag,erank@sometimes', "'sometimes'", "'5 minutes'"),
    *(('interval', value, repr(value), "'5 minutes'") for value in WRONG_INTERVALS),
    *(('samples', value, value, 'at least 1') for value in WRONG_SAMPLES),
    *(('source', value, repr(value), 'validation') for value in WRONG_SOURCES),
]


# argparse takes neither nothing nor '-3' as an argument of its own.
FORMS = [(*row, False) for row in FLAGS] + [(*row, True) for row in FLAGS if row[1] and not row[1].startswith('-')]


@pytest.mark.parametrize('flag, value, came, expected, as_two', FORMS)
def test_flag_exits_with_2(flag, value, came, expected, as_two, capsys, monkeypatch):
    from geowatch.cli.fit import main
    # Nothing of the fusion CLI may run before the flags are known to be right.
    monkeypatch.setitem(sys.modules, 'geowatch.tasks.fusion', None)
    with pytest.raises(SystemExit) as info:
        main(cmdline=[f'--plasticity_{flag}', value] if as_two else [f'--plasticity_{flag}={value}'])
    assert info.value.code == 2
    captured = capsys.readouterr()
    error = captured.err[captured.err.index('error:'):]
    assert came in error and expected in error
    assert 'Traceback' not in captured.out + captured.err


CONFIG = '''
data:
  train_dataset: special:vidshapes2-frames2-multispectral-gsize32
  chip_dims: 32
  batch_size: 2
  num_workers: 0
model: HeterogeneousModel
optimizer:
  class_path: torch.optim.SGD
  init_args: {lr: 0.001}
trainer:
  accelerator: cpu
  devices: 1
  default_root_dir: ./run
  num_sanity_val_steps: 0
  max_steps: 1
'''


IN_YAML = '''
  callbacks:
  - class_path: geowatch.utils.lightning_ext.callbacks.plasticity.PlasticityMonitor
    init_args: {metrics: wieght_mag}
'''


@pytest.mark.parametrize('config, flags, word', [
    (CONFIG, ['--plasticity_layers=nothing.*'], 'nothing.*'),
    (CONFIG, ['--plasticity_source=validation'], 'train'),
    # A parser that tries one type after another may swallow what the class says.
    (CONFIG + IN_YAML.lstrip('\n'), [], "Did you mean 'weight_mag'"),
], ids=['layers', 'no validation loader', 'in the config'])
def test_command_exits_with_2(tmp_path, config, flags, word):
    pytest.importorskip('geowatch.tasks.fusion', reason='geowatch is not installed')
    (tmp_path / 'config.yaml').write_text(config)
    command = [sys.executable, '-m', 'geowatch', 'fit', '--config=config.yaml', *flags]
    run = subprocess.run(command, cwd=tmp_path, text=True, timeout=600, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, env={**os.environ, 'GEOWATCH_PREIMPORT': '0'})
    assert run.returncode == 2, run.stdout[-3000:]
    assert word in run.stdout
    assert 'Traceback' not in run.stdout
    assert not list(tmp_path.glob('run/lightning_logs/*/plasticity.jsonl'))
