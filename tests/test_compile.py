"""
Networks that torch's inductor compiles for this processor: we compile nothing anew, and change no number.

What needs no compiler is in ``test_capture.py`` and ``test_untouched.py``, with backends that run what they are given.
"""
import sys
import sysconfig
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from common import NOISE, Net, fit, make_net
from test_untouched import equal
from torch import nn
from torch._dynamo.utils import counters

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS


def why_not():
    """ What the inductor lacks on this machine, None if it has all. """
    if sys.platform == 'win32':
        return 'not tried on Windows'
    from torch._inductor.cpp_builder import get_cpp_compiler
    try:
        get_cpp_compiler()
    except Exception as ex:
        return f'no C++ compiler for the inductor: {type(ex).__name__}'
    if not Path(sysconfig.get_path('include'), 'Python.h').exists():
        return 'no Python.h, which the code of the inductor includes'
    return None


pytestmark = pytest.mark.slow
# No size of a layer, so that it is a symbol in what is compiled. The last batch of 37 has 1, that of validation 7.
BATCH = 6
HOW = {'fullgraph': True, 'dynamic': True}


@pytest.fixture(scope='module', autouse=True)
def inductor():
    if (reason := why_not()) is not None:
        pytest.skip(reason)


class Body(Net):
    """ Its network is one module, as most are that are compiled in part. """

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 1))
        del self.fc1, self.act, self.fc2, self.head
        with torch.no_grad():
            self.body[0].bias[:5] = -100

    def forward(self, x):
        return self.body(x)


class Method(Body):
    """ A method of it is compiled. """

    @torch.compile(**HOW)
    def forward(self, x):
        return self.body(x)


def whole(net):
    return torch.compile(net, **HOW)


def in_place(net):
    net.body.compile(**HOW)
    return net


def wrapped(net):
    net.body = torch.compile(net.body, **HOW)
    return net


def by_itself(net):
    """ Torch finds out by itself that the size of batches changes. """
    net.body.compile(fullgraph=True)
    return net


def part(net):
    """ Some layers of it only, the activations between those and others. """
    net.body[2] = torch.compile(net.body[2], **HOW)
    net.body[3] = torch.compile(net.body[3], **HOW)
    return net


CASES = {'whole': (Body, whole), 'in place': (Body, in_place), 'wrapped': (Body, wrapped),
         'by itself': (Body, by_itself), 'part': (Body, part), 'method': (Method, lambda net: net)}


def train(tmp_path, cls, compiled, monitor, **kwargs):
    """ The weights, the lines, and how many graphs were compiled. """
    torch._dynamo.reset()
    counters.clear()
    net = make_net(cls)
    _, _, lines, _ = fit(tmp_path, monitor, compiled(net), batch_size=BATCH, log_every_n_steps=1, **kwargs)
    return net, lines, counters['stats']['unique_graphs']


def without(tmp_path, case, **kwargs):
    net, _, graphs = train(tmp_path / 'without', *CASES[case], pl.Callback(), **kwargs)
    assert graphs and counters['inductor'], 'nothing was compiled'
    assert not counters['graph_break']
    return net, graphs


def values(lines):
    return {(line['metric'], line['step']): (line['value'], [own['value'] for own in line['layers'].values()])
            for line in lines}


def same_values(lines, expected, metrics):
    found, expected = values(lines), values(expected)
    assert {name for name, _ in found} == set(metrics) and found.keys() <= expected.keys()
    for key, (value, layers) in found.items():
        assert value == pytest.approx(expected[key][0], rel=1e-3, abs=1e-6), key
        assert layers == pytest.approx(expected[key][1], rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize('case', CASES)
def test_validation_is_looked_at(tmp_path, case):
    """ Training is the same bit for bit, and as much is compiled for it. """
    plain, graphs = without(tmp_path, case)
    # The parts of a batch are not known of what is compiled.
    metrics = [name for name in METRICS if name not in NOISE]
    monitor = PlasticityMonitor(metrics, interval=2, source='validation', samples=20)
    net, lines, own_graphs = train(tmp_path / 'own', *CASES[case], monitor)
    # The validation that is looked at may be the first of its size, for which torch would compile once more.
    assert own_graphs == graphs or case == 'by itself' and own_graphs < graphs
    assert not counters['graph_break']
    assert equal(dict(net.state_dict()), dict(plain.state_dict()))
    _, expected, graphs = train(tmp_path / 'eager', Body, lambda net: net, PlasticityMonitor(
        metrics, interval=2, source='validation', samples=20))
    assert not graphs
    same_values(lines, expected, metrics)


@pytest.mark.parametrize('case', ['whole', 'by itself', 'method'])
def test_training_is_looked_at(tmp_path, case):
    """ The steps that are looked at run as they are written, those between them compiled, none of them anew. """
    plain, graphs = without(tmp_path, case, validate=False, accumulate_grad_batches=2)
    monitor = PlasticityMonitor('all', interval=2, source='train', samples=2 * BATCH)
    net, lines, own_graphs = train(tmp_path / 'own', *CASES[case], monitor, validate=False, accumulate_grad_batches=2)
    assert 0 < own_graphs <= graphs and not counters['graph_break']
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], weight, rtol=1e-5, atol=1e-6)
    _, expected, graphs = train(tmp_path / 'eager', Body, lambda net: net, PlasticityMonitor(
        'all', interval=2, source='train', samples=2 * BATCH), validate=False, accumulate_grad_batches=2)
    assert not graphs
    same_values(lines, expected, METRICS)


class Careless(pl.Callback):
    """ Changes what compiled code counts on. """

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        module.body[1].inplace = batch_idx > 2


def test_a_recompile_is_seen(tmp_path):
    _, graphs = without(tmp_path, 'in place', validate=False)
    _, _, own_graphs = train(tmp_path / 'own', *CASES['in place'], Careless(), validate=False)
    assert own_graphs > graphs
