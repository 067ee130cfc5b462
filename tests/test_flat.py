"""
Parameters in flat buffers: FSDP1 and DeepSpeed's ZeRO, whose parts add up to what one process has.
"""
import json

import pytest
import torch
from common import NOISE, lines_of
from process_runs import (
    CAN_SHARD_ON_CPU,
    Mixed,
    as_lists,
    flattened,
    made_in_shards,
    run_processes,
    statistics_of,
    zero_stands_in,
)
from test_processes import Ran, same

from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS

# What is not computed from a spectrum is a sum.
SUMS = [name for name, metric in METRICS.items() if 'activations' not in metric.sources and not any(
    'spectrum' in need.field for need in metric.needs)]


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    """ The same training on one process. """
    return Ran(tmp_path_factory.mktemp('one'), 1, strategy='fsdp1', monitor={'source': 'train'}).lines


@pytest.mark.parametrize('strategy, count, how', [
    ('fsdp1', 2, 'even'), ('fsdp1 flat', 2, 'even'), ('fsdp1 alone', 3, 'branch')])
def test_fsdp1_is_like_one_process(tmp_path, one, strategy, count, how):
    """ With parameters that keep their names or not, in one buffer or several. """
    ran = Ran(tmp_path, count, strategy=strategy, how=how, monitor={'source': 'train'})
    lines, expected = ([line for line in lines if line['metric'] not in NOISE] for lines in (ran.lines, one))
    same(lines, expected)
    for name in set(SUMS).difference(NOISE):
        got, wanted = ([(line['value'], line['layers']['fc2']['value']) for line in lines_of(own, name)]
                       for own in (lines, expected))
        assert len(got) >= 9 and got == [pytest.approx(pair, rel=1e-12) for pair in wanted], name
    assert {line['metric'] for line in lines} | set(NOISE) == set(METRICS)
    # Beside the two of each moment the weights that are gathered, one by one.
    assert 2 < max(ran.collectives().values()) <= 2 + 4
    assert 'Not watched' not in ''.join(ran.said)


def test_micro_batches_under_fsdp1(tmp_path):
    """ Their gradients are no parts yet, of which pieces would be wrong numbers: said, and the others go on. """
    ran = Ran(tmp_path, 2, strategy='fsdp1 flat', accumulate=2, epochs=1,
              monitor={'metrics': 'noise_scale,grad_mag', 'source': 'train'})
    assert ran.said[0].count('RuntimeError: FSDP1 keeps the gradients of micro-batches whole until the last one') == 1
    assert not lines_of(ran.lines, 'noise_scale') and len(lines_of(ran.lines, 'grad_mag')) == 3


@pytest.mark.parametrize('sharding, keeps, count', [
    ('FULL_SHARD', True, 3), ('FULL_SHARD', False, 3), ('SHARD_GRAD_OP', True, 2), ('NO_SHARD', True, 2),
    ('HYBRID_SHARD', False, 4)])
def test_what_fsdp1_has_flattened(tmp_path, sharding, keeps, count):
    """ Weights and gradients, also of matrices in one parameter, and of a convolution whose channels are last. """
    assert run_processes(flattened, count, str(tmp_path), sharding, keeps, False) == [0] * count
    adds_up(tmp_path)


@pytest.mark.parametrize('keeps', [True, False])
def test_what_is_made_of_flattened_parameters(tmp_path, keeps):
    """ A weight norm of torch's parametrizations, and a pruned layer, which makes its weight in a hook. """
    assert run_processes(flattened, 2, str(tmp_path), 'FULL_SHARD', keeps, True) == [0, 0]
    adds_up(tmp_path, is_made=True)


@pytest.mark.skipif(not CAN_SHARD_ON_CPU, reason='FSDP2 does not run on a CPU with this version of torch')
def test_what_is_made_of_shards(tmp_path):
    assert run_processes(made_in_shards, 2, str(tmp_path)) == [0, 0]
    adds_up(tmp_path, is_made=True)


@pytest.mark.parametrize('stage, count', [(1, 3), (3, 2)])
def test_what_deepspeed_keeps_in_parts(tmp_path, stage, count):
    """ Of stand-ins, since most have no DeepSpeed; ZeRO 2 differs from ZeRO 1 in nothing that is read. """
    assert run_processes(zero_stands_in, count, str(tmp_path), stage) == [0] * count
    adds_up(tmp_path)


def adds_up(folder, is_made=False):
    torch.manual_seed(0)
    model = Mixed(is_made).double()
    model(torch.randn(6, 3, 5, 5).double()).backward()
    expected, got = as_lists(statistics_of(model)), json.loads((folder / 'found.json').read_text())
    assert got.keys() == expected.keys()
    assert set(got['weights.abs']) == {'conv', 'experts.0', 'experts.1', 'experts.2', 'wide', 'tall'}
    for key, own in expected.items():
        assert got[key].keys() == own.keys()
        for layer, x in own.items():
            assert torch.tensor(got[key][layer]).tril() == pytest.approx(torch.tensor(x).tril(), rel=1e-11, abs=1e-14
                                                                         ) if 'gram' in key else (
                got[key][layer] == pytest.approx(x, rel=1e-12)), (key, layer)


@pytest.mark.slow  # it compiles a function of its own first
@pytest.mark.parametrize('stage', [1, 2, 3])
def test_deepspeed_is_like_one_process(tmp_path, one, stage, monkeypatch):
    """ On a CPU, in float32, as it knows nothing wider. """
    pytest.importorskip('deepspeed', reason='DeepSpeed is not installed')
    ran = Ran(tmp_path, 2, strategy=f'zero{stage}', monitor={'source': 'train'}, seconds=600)
    for line, other in zip(*(sorted((line for line in lines if line['metric'] not in NOISE),
                                    key=lambda line: (line['metric'], line['step'])) for lines in (ran.lines, one)),
                           strict=True):
        assert (line['metric'], line['step'], line['samples']) == (other['metric'], other['step'], other['samples'])
        assert line['value'] == pytest.approx(other['value'], rel=1e-5)
        assert line['layers'].keys() == other['layers'].keys()
        for layer, own in line['layers'].items():
            wanted = other['layers'][layer]['value']
            assert own['value'] == (wanted and pytest.approx(wanted, rel=1e-4)), (line['metric'], layer)
