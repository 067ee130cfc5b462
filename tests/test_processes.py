"""
Several real processes: the same values as one, two collectives a step, and none that waits for ever.
"""
import copy
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from common import ACTIVATIONS, AT_START, NOISE, lines_of, of_source
from process_runs import (
    CAN_SHARD_ON_CPU,
    OURS,
    layouts,
    one_by_one,
    run_processes,
    train_together,
    trains_alone,
)

from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS

TAGS = tuple(METRICS)


class Ran:
    """ What the ranks have left in a folder. """

    def __init__(self, folder, count, seconds=120, **kwargs):
        if kwargs.get('strategy') == 'fsdp2' and not CAN_SHARD_ON_CPU:
            pytest.skip('FSDP2 does not run on a CPU with this version of torch or of Lightning')
        Path(folder).mkdir(exist_ok=True)
        defaults = {'strategy': 'ddp', 'how': 'even', 'fault': None, 'epochs': 2, 'sleep': 0., 'monitor': None,
                    'toys': 0, 'accumulate': 1}
        self.codes = run_processes(
            train_together, count, str(folder), *{**defaults, **kwargs}.values(), seconds=seconds)
        self.said = [(Path(folder) / f'rank{rank}.txt').read_text() for rank in range(count)]
        assert self.codes == [0] * count, self.said
        self.ranks = [json.loads((Path(folder) / f'rank{rank}.json').read_text()) for rank in range(count)]
        fpath = Path(folder) / 'run/version_0/plasticity.jsonl'
        self.lines = [json.loads(line) for line in fpath.read_text().splitlines()]

    def collectives(self):
        """ How many a step of each rank, checked to be the same on all. """
        first, *others = [rank['collectives'] for rank in self.ranks]
        assert all(own == first for own in others)
        return Counter(step for step, _ in first)


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    """ The same training on one process. """
    strategies = ('ddp', 'fsdp2') if CAN_SHARD_ON_CPU else ('ddp',)
    return {(strategy, source): Ran(tmp_path_factory.mktemp('one'), 1, strategy=strategy,
                                    monitor={'source': source}).lines
            for strategy in strategies for source in ('train', 'validation')}


def same(got, expected):
    """ All lines, values and layers alike: counts exactly, the rest to 1e-6. """
    def key(line):
        return line['metric'], line['step']
    got, expected = sorted(got, key=key), sorted(expected, key=key)
    assert list(map(key, got)) == list(map(key, expected))
    for line, other in zip(got, expected, strict=True):
        exact = line['metric'] in ('dead_units', 'rare_units', 'srank99')
        assert line['samples'] == other['samples']
        assert line['value'] == (other['value'] if exact else pytest.approx(other['value'], rel=1e-6))
        assert set(line['layers']) == set(other['layers'])
        for layer, own in line['layers'].items():
            expected = other['layers'][layer]
            assert own == (expected if exact else {
                key: x if x is None else pytest.approx(x, rel=1e-6) for key, x in expected.items()})


def test_an_end_that_no_process_knew(tmp_path):
    """ Of each epoch, of which all that is left is measured on all of them. """
    monitor = {'interval': 'epoch', 'source': 'train'}
    whole = Ran(tmp_path / 'one', 1, how='short', monitor=monitor)
    ran = Ran(tmp_path / 'two', 2, how='short', monitor=monitor)
    same(ran.lines, whole.lines)
    # What a step does has to be seen from its beginning.
    assert {line['metric'] for line in ran.lines} == set(of_source('weights', 'gradients', 'activations', 'distances')
                                                         ) - set(of_source('updates', 'turns', 'pieces'))
    assert {line['step'] for line in ran.lines} == {-1, 4, 9}


CASES = [('ddp', 2, 'even'), ('ddp', 3, 'even'), ('ddp', 2, 'branch'), ('ddp', 3, 'empty'), ('fsdp2', 2, 'even'),
         ('fsdp2', 3, 'branch')]


@pytest.mark.parametrize('source', ['train', 'validation'])
@pytest.mark.parametrize('strategy, count, how', CASES)
def test_values_of_several_processes(tmp_path, one, strategy, count, how, source):
    ran = Ran(tmp_path, count, strategy=strategy, how=how, monitor={'source': source})
    # Each process has pieces of its own, but for sharded gradients: test_in_two_processes of the tuning has them.
    assert bool(lines_of(ran.lines, 'noise_scale')) == (strategy == 'ddp')
    assert ('sharded weights are reduced at once' in ran.said[0]) == (strategy == 'fsdp2')
    same(*([line for line in lines if line['metric'] not in NOISE] for lines in (ran.lines, one[strategy, source])))
    assert {line['metric'] for line in ran.lines} | set(NOISE) == set(TAGS)
    assert [line['step'] for line in lines_of(ran.lines, 'erank')] == list(range(-1, 10))
    assert max(ran.collectives().values()) <= 2
    first, *others = ran.ranks
    assert first['writes'] > 0 and all(rank['writes'] == 0 for rank in others)
    # EarlyStopping and the like have to decide the same everywhere.
    assert all(rank['values'] == pytest.approx(first['values']) and rank['steps'] == 10 for rank in others)
    assert sum('PlasticityMonitor' in said for said in ran.said) == 1


@pytest.mark.parametrize('how', ['even', 'empty'])
@pytest.mark.parametrize('count', [2, 3])
def test_windows_that_fill_unevenly(tmp_path, count, how):
    # With an empty batch one process has seen enough later than the others.
    ran = Ran(tmp_path, count, how=how, epochs=3, monitor={'source': 'train', 'samples': 11, 'interval': 2})
    assert max(ran.collectives().values()) <= 2
    for tag in ACTIVATIONS:
        lines = lines_of(ran.lines, tag)
        assert len(lines) >= 3 and all(line['samples'] >= (8 if line['step'] % 5 < 4 else 1) for line in lines)
        assert len({line['step'] for line in lines}) == len(lines)


def test_durations(tmp_path):
    # The clocks of processes differ: one of them decides.
    ran = Ran(tmp_path, 2, epochs=8, sleep=0.05, monitor={'metrics': 'weight_mag@0.4 seconds,erank@0.2 seconds'})
    assert max(ran.collectives().values()) <= 2
    counts = Counter(line['metric'] for line in ran.lines)
    assert 8 <= counts['weight_mag'] <= 20 and counts['weight_mag'] < counts['erank'] <= 30
    for tag, seconds in (('weight_mag', 0.4), ('erank', 0.2)):
        # Each epoch of 5 steps has one; no more than these and the due ones.
        lines = lines_of(ran.lines, tag)
        assert {line['epoch'] for line in lines} == set(range(8))
        duration = lines[-1]['time'] - lines[0]['time']
        assert len(lines) <= duration / seconds + 8 + 1


# What fails, and the metrics that it costs: a formula, or a statistic and all that need it.
MAKERS = {'gram': ('weights.spectrum',), 'Away': ('activations.away',), 'Positive': ('activations.positive',),
          'Rows': ('activations.spectrum', 'activations.centred_spectrum')}
LOST = {**{name: {name} for name in ('grad_norm', 'erank', 'dead_units')},
        **{maker: {name for name, metric in METRICS.items()
                   if any(f'{need.source}.{need.field}' in fields for need in metric.needs)}
           for maker, fields in MAKERS.items()}}
FAULTS = [(name, where, strategy) for name in LOST for where in (1, None) for strategy in ('ddp', 'fsdp2')
          # Activations are no shards, and what fails everywhere fails alike.
          if strategy == 'ddp' or where is not None and not LOST[name] & set(ACTIVATIONS)]


@pytest.mark.parametrize('name, where, strategy', FAULTS)
def test_metric_that_fails(tmp_path, name, where, strategy):
    ran = Ran(tmp_path, 2, strategy=strategy, fault=(name, where, 8), monitor={'source': 'train', 'samples': 4})
    said = ''.join(ran.said)
    assert said.count('Traceback') == 1 and f'fault of {name}' in said
    for tag in LOST[name]:
        assert len(lines_of(ran.lines, tag)) <= 8
    assert any(lines_of(ran.lines, tag) for tag in LOST[name])
    for tag in set(TAGS) - LOST[name]:
        steps = [] if tag in NOISE and strategy == 'fsdp2' else range(tag == 'step_alignment', 10)
        assert [line['step'] for line in lines_of(ran.lines, tag)] == [-1] * (tag in AT_START) + list(steps)
    assert max(ran.collectives().values()) <= 2


@pytest.mark.parametrize('where', [0, 1])
def test_only_metric_fails(tmp_path, where):
    # There is nothing else that would bring the processes together.
    ran = Ran(tmp_path, 2, fault=('sums', where, 3), monitor={'metrics': 'weight_mag'})
    assert [line['step'] for line in ran.lines] == [-1, 0, 1]
    assert ''.join(ran.said).count('Traceback') == 1


@pytest.mark.parametrize('name', OURS)
@pytest.mark.parametrize('where', [0, 1, None])
def test_what_fails_between_statistics_and_numbers(tmp_path, name, where):
    """ On one process or on all: what it costs is off on all of them, said once, and training goes on. """
    ran = Ran(tmp_path, 2, fault=(name, where, 3), monitor={'metrics': 'weight_mag,dead_units,grad_norm',
                                                            'source': 'train', 'samples': 4})
    assert all(rank['steps'] == 10 for rank in ran.ranks)
    said = ''.join(ran.said)
    assert f'fault of {name}' in said and 1 <= said.count('Traceback') <= 2
    assert len(lines_of(ran.lines, 'dead_units')) < 10
    ran.collectives()  # the same on all


@pytest.mark.parametrize('where', [1, None])
def test_a_site_that_fails(tmp_path, one, where):
    """ On one process it is measured from the others, on all it is left out; all else is as it was. """
    ran = Ran(tmp_path, 2, fault=('one site', where, 0), monitor={'source': 'train'}, epochs=1)
    said = ''.join(ran.said)
    assert 'Traceback' not in said and said.count('relu that failed: RuntimeError in process_runs.py:') == 1
    assert {line['metric'] for line in ran.lines} == set(TAGS)
    expected = {(line['metric'], line['step']): line['layers'] for line in one['ddp', 'train']}
    for line in ran.lines:
        if line['metric'] in ACTIVATIONS:
            layers = expected[line['metric'], line['step']]
            assert set(layers) - set(line['layers']) == (set() if where else {'relu'})
            for layer, own in line['layers'].items():
                assert layer == 'relu' or own == pytest.approx(layers[layer], rel=1e-6)
    ran.collectives()


def test_what_takes_several_rounds(tmp_path, one):
    ran = Ran(tmp_path, 2, how='branch', fault=('small buffers', None, 0), monitor={'source': 'train'})
    same(*([line for line in lines if line['metric'] not in NOISE] for lines in (ran.lines, one['ddp', 'train'])))
    assert max(ran.collectives().values()) > 10


@pytest.mark.parametrize('strategy', ['ddp', 'fsdp2'])
def test_layers_take_the_same_turns(tmp_path, strategy):
    """ One at a time, which several processes have to agree on, or they would wait for each other for ever. """
    ranks = {'monitor': {'metrics': 'erank,feature_erank'}, 'strategy': strategy, 'fault': ('one at a time', None, 0)}
    together, alone = Ran(tmp_path / 'together', 2, **ranks), Ran(tmp_path / 'alone', 1, **ranks)
    same(together.lines, alone.lines)
    of_weights = [line['fresh'] for line in together.lines if line['metric'] == 'erank']
    assert all(len(fresh) == 1 for fresh in of_weights) and len({name for name, in of_weights}) > 2
    assert [line.get('fresh') for line in together.lines] == [line.get('fresh') for line in alone.lines]
    assert max(together.collectives().values()) <= 2


@pytest.mark.parametrize('all_of_them', [False, True])
def test_a_single_device_beside_other_processes(tmp_path, all_of_them):
    """ Processes are those of the trainer: nobody waits for one that does not train, or adds up what it has. """
    assert run_processes(trains_alone, 2, str(tmp_path), all_of_them, seconds=60) == [0, 0]


def run_or_skip(*args):
    if not CAN_SHARD_ON_CPU:
        pytest.skip('DTensor does not run on a CPU with this version of torch or of Lightning')
    return run_processes(*args)


@pytest.mark.parametrize('count, mesh', [(2, [2]), (4, [4]), (4, [2, 2])])
def test_layouts_of_sharded_weights(tmp_path, count, mesh):
    """ Each layout gives the sums of the whole, and the Gram matrix of its smaller side, without a whole matrix. """
    assert run_or_skip(layouts, count, str(tmp_path), mesh) == [0] * count
    found = json.loads((tmp_path / 'found.json').read_text())
    assert len(found) == 3 * (3 if len(mesh) == 1 else 6 * 2)
    for name, got in found.items():
        shape = tuple(map(int, name.partition(') ')[0].strip('(').split(',')))
        matrix = np.sin(np.arange(math.prod(shape), dtype=np.float32)).astype(float).reshape(shape[0], -1)
        assert got['count'] == matrix.size, name
        assert got['abs'] == pytest.approx(np.abs(matrix).sum(), rel=1e-6)
        assert got['squares'] == pytest.approx(np.square(matrix).sum(), rel=1e-6)
        gram = np.tril(got['gram'])
        assert len(gram) == min(matrix.shape)
        values = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
        assert values[::-1] == pytest.approx(np.linalg.svd(matrix, compute_uv=False), rel=1e-5, abs=1e-6)
        if 'copies' not in name and 'part of' not in name:
            assert max(message['n'] for message in got['largest part']) < matrix.size


def test_sharded_spectra_one_by_one(tmp_path):
    assert run_or_skip(one_by_one, 2, str(tmp_path)) == [0, 0]
    found = json.loads((tmp_path / 'found.json').read_text())
    assert found == {'layers': 4, 'most': 2}  # the next one begins in the round in which the last one ends


@pytest.mark.parametrize('source', ['train', 'validation'])
@pytest.mark.parametrize('count', [2, 4], ids=['tensor parallel', 'with FSDP2'])
def test_tensor_parallel_weights(tmp_path, one, count, source):
    """ Rows of one layer and columns of the next on each process, with 4 sharded over two replicas as well. """
    weights = {'metrics': 'weight_mag,grad_mag,erank,stable_rank,spectral_norm', 'source': source}
    ran = Ran(tmp_path, count, strategy='tensor parallel', monitor=weights)
    names = {'weight_mag', 'grad_mag', 'grad_norm', 'erank', 'stable_rank', 'spectral_norm'}
    assert {line['metric'] for line in ran.lines} == names
    same(ran.lines, [line for line in one['fsdp2', source] if line['metric'] in names])
    assert max(ran.collectives().values()) <= 2
    assert not any('Not watched' in said and 'erank' in said.partition('Not watched')[2] for said in ran.said)


@pytest.mark.parametrize('source', ['train', 'validation'])
def test_stages_of_a_pipeline(tmp_path, source):
    """ Each process has layers of its own: the lines have all of them, and the network's value is that of all. """
    kwargs = {'strategy': 'pipeline', 'accumulate': 2, 'monitor': {'source': source, 'layers': 'fc*,head,act'}}
    whole, ran = (Ran(tmp_path / str(count), count, **kwargs) for count in (1, 2))
    # One process alone takes the last batch of the epoch, which is all of its step, in chunks.
    got, expected = ([line for line in own.lines if line['metric'] not in NOISE or line['step'] < 2]
                     for own in (ran, whole))
    same(got, expected)
    assert {line['metric'] for line in got} == set(TAGS)
    assert all(line['layers'].keys() == {'fc1', 'fc2', 'head'} for line in lines_of(got, 'erank'))
    # Of a step with two micro-batches the first only asks whether windows are full.
    assert max(ran.collectives().values()) <= 2 + (source == 'train')
    first, second = ran.ranks
    assert second['values'] == pytest.approx(first['values'])


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    return {source: Ran(tmp_path_factory.mktemp('whole'), 1, strategy='tensor parallel by units', epochs=1,
                        monitor={'metrics': ','.join(ACTIVATIONS), 'source': source}).lines
            for source in ('train', 'validation')}


@pytest.mark.parametrize('count, plan, source', [
    (2, 'units', 'train'), (2, 'units', 'validation'), (2, 'units, DTensor', 'validation'),
    (2, 'samples', 'validation'), (2, 'samples, DTensor', 'train'), (4, 'units', 'train')])
def test_tensor_parallel_activations(tmp_path, whole, count, plan, source):
    """ Units of all processes are joined, and what several have alike counts once. """
    ran = Ran(tmp_path, count, strategy=f'tensor parallel by {plan}', epochs=1,
              monitor={'metrics': ','.join(ACTIVATIONS), 'source': source})
    is_split = {'units': 'act', 'samples': 'relu'}[plan.partition(',')[0]]
    of_rows = {name for name in ACTIVATIONS if any('spectrum' in need.field for need in METRICS[name].needs)}
    assert ran.said[0].count(f'inside {"act" if is_split == "act" else "the step"}: ranks of features of relu') == 1
    expected = []
    for line in copy.deepcopy(whole[source]):
        assert set(line['layers']) == {'act', 'relu'}
        if line['metric'] in of_rows:
            del line['layers'][is_split]
            line['value'] = line['layers'][{'act': 'relu', 'relu': 'act'}[is_split]]['value']
        expected.append(line)
    same(ran.lines, expected)
    dead = lines_of(ran.lines, 'dead_units')[-1]
    assert dead['layers']['act'] == {'value': 3 / 16, 'units': 16} and dead['layers']['relu']['units'] == 12
    assert max(ran.collectives().values()) <= 2
    assert ran.lines[-1]['samples'] == whole[source][-1]['samples']
