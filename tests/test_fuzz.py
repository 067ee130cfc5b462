"""
Whatever is given as argument or flag works, or is refused with the documented error.
"""
import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from geowatch.cli.fit import FitCLI
from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.agenda import Agenda
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.lightning import Moment
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.memory import Memory
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.schedule import Schedule
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.examples import count_examples
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import GROUPS, METRICS, parse_metrics

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.binary(max_size=4),
    lambda inner: (st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
                   | st.tuples(inner)), max_leaves=4)
intervals = (st.sampled_from(['auto', 'epoch', '5 minutes', '2h', '30s', '1 day', '0.5 seconds', '1e3', '-1', '0',
                              ' 7 ', '+3', '٣', '²', '1_000', 'inf', 'nan', '5 min utes', '5', 'P1D', '1e999 s', 'now'])
             | st.integers(-3, 10**9).map(str) | st.text(max_size=8))
names = st.sampled_from([*METRICS, *GROUPS, 'all', '', ' ', 'erank ', 'Erank', 'wieght_mag', '@', 'grad_norm'])
items = names | st.tuples(names, intervals).map('@'.join) | st.text(max_size=8)
metrics = st.lists(items, max_size=4).map(','.join) | st.lists(items | anything, max_size=4) | anything
many = settings(max_examples=300, deadline=None, derandomize=True)


@many
@given(metrics=metrics, interval=intervals | st.integers() | anything,
       source=st.sampled_from(['auto', 'train', 'validation']) | anything, samples=st.integers() | anything,
       layers=st.none() | st.text(max_size=10) | st.lists(st.text(max_size=5), max_size=3) | anything)
@example(metrics='all', interval=math.inf, source='auto', samples=1, layers=None)
@example(metrics='all', interval=10**400, source='auto', samples=1, layers='[')
def test_constructor(metrics, interval, source, samples, layers):
    try:
        monitor = PlasticityMonitor(metrics, interval, source, samples, layers)
    except ValueError as ex:
        assert str(ex)
        return
    assert monitor.source in ('auto', 'train', 'validation') and monitor.samples >= 1
    intervals = monitor._settings.intervals
    assert set(intervals) <= set(METRICS) and intervals
    for own in intervals.values():
        if own != 'auto':
            schedule = Schedule(own)
            assert schedule.steps is None or schedule.steps >= 1
            assert schedule.seconds is None or 0 < schedule.seconds < math.inf
            schedule.begin(Moment(0, epoch=0, is_last=True), now=0.)
            assert schedule.is_due(0)
    assert monitor.state_dict() == {}


@many
@given(metrics)
def test_names_of_metrics(text):
    try:
        chosen = parse_metrics(text)
    except ValueError as ex:
        assert any(name in str(ex) for name in METRICS) or 'names' in str(ex)
    else:
        assert chosen and set(chosen) <= set(METRICS)


@many
@given(anything)
def test_examples_of_any_batch(batch):
    assert count_examples(batch) >= 0


@many
@given(anything)
def test_any_state(state):
    monitor = PlasticityMonitor('erank')
    monitor.load_state_dict({'schedules': state, 'time': state, 'epoch': state})
    schedule = Schedule('5 minutes')
    schedule.load_state_dict({'next': state, 'epoch': state, 'left': state})
    schedule.begin(Moment(0, epoch=0, is_last=False), now=3.)
    assert schedule.is_due(0) in (True, False) and schedule.progress(3.) <= 1
    assert isinstance(json.dumps(schedule.state_dict(4.)), str)
    agenda = Agenda({'erank': 'epoch'})
    agenda.load_state_dict({'erank': state, 'gone': state})
    assert Memory(state).state_dict() == {} == Memory({'erank': state}).state_dict()


flags = st.sampled_from(['metrics', 'interval', 'source', 'samples', 'layers', 'per_layer', 'budget', 'metric',
                         ''])
values = (st.sampled_from(['all', 'erank', 'epoch', '5', 'train', 'true', 'False', '', '-1', '--', '-h', '=', 'a,b',
                           '*'])
          | st.text(st.characters(blacklist_categories=['Cs']), max_size=8))
ours = st.builds(lambda flag, equals, value: (
    [f'--plasticity_{flag}={value}'] if equals else [f'--plasticity_{flag}', value]),
    flags, st.booleans(), values)
theirs = st.sampled_from([['--config=a.yaml'], ['--trainer.max_steps', '4'], ['--no-such'],
                          ['--data.x=--plasticity'], []])


@settings(many, max_examples=150)
@given(st.lists(ours | theirs, max_size=4))
def test_flags(parts):
    args = [arg for part in parts for arg in part]
    try:
        config, fusion_args = FitCLI.parse(args)
        added = config.callback_args()
    except SystemExit as ex:
        assert ex.code == 2 or (ex.code in (0, None) and {'-h', '--help'} & set(args))
    except ValueError as ex:
        assert str(ex)  # of which main makes exit code 2
    else:
        assert not any(arg.startswith('--plasticity_') for arg in fusion_args)
        given = any(value is not None for value in config.values())
        assert bool(added) == given


@pytest.mark.parametrize('args', [['--plasticity_metrics=wieght_mag'], ['--plasticity_samples=many'],
                                  ['--plasticity_interval', '-3'], ['--plasticity_source=test'],
                                  ['--plasticity_metrics'], ['--plasticity_nothing=1']])
def test_exit_code(args, capsys):
    with pytest.raises(SystemExit) as info:
        FitCLI.main(cmdline=args)
    assert info.value.code == 2
    assert 'Traceback' not in capsys.readouterr().err
