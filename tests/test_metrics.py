"""
Every registered metric against NumPy, on raw tensors and in real runs; each statistic is additive.
"""
import contextlib
import math

import numpy as np
import pytest
import references
import torch
from common import (
    ACTIVATIONS,
    TAGS,
    Net,
    fit,
    lines_of,
    make_data,
    make_net,
    measure_calls,
    measure_tensors,
    read_lines,
)

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources import STEP_SOURCES
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.sites import Site
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.window import Window
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.calls import Call, makers_of
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.spectrum import gram, made
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.tensors import STATISTICS, functions_of
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import (
    GROUPS,
    METRICS,
    PlasticityConfigError,
    members,
    metric,
)
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics._vocabulary import MADE_OF, SOURCES, additive_fields

OF_ONE = [*references.OF_TENSORS, *references.OF_CALLS]
# Fields that a source makes itself.
OF_STEPS = {
    'weights': set(), 'gradients': set(), 'updates': {'before_squares', 'moving', 'unmoved'},
    'pieces': {'examples', 'gradient', 'known'}, 'distances': {'start_squares'},
    'turns': {'dot', 'gradient_squares', 'step_squares'}}
EXACT = {'dead_units', 'rare_units', 'srank99'}


def test_every_metric_has_a_reference():
    """ To add a metric, say in references.py once more and in other words what it is. """
    assert METRICS.keys() == {*OF_ONE, *references.OF_STEPS}


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    shapes = {'conv': (6, 3, 2, 2), 'wide': (5, 40), 'tall': (40, 5), 'thin': (1, 7)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def calls(dtype=torch.float32):
    """ Two layers with a ReLU: inputs and outputs, 150 samples; some units never on, always on, rarely on. """
    generator, found = torch.Generator().manual_seed(4), {}
    for name, units in (('one', 12), ('two', 7)):
        z = torch.randn(150, units, generator=generator)
        z[:, 0] = -1.
        z[:, 1] = z[:, 1].abs() + 0.1
        z[:, 2] = -1.
        z[5, 2] = 3.
        found[Site(name, 'relu', units=units)] = z.to(dtype), z.to(dtype).relu()
    return found


def close(name, got, expected, rel=1e-6):
    assert got == (expected if name in EXACT else pytest.approx(expected, rel=rel)), name


@pytest.mark.parametrize('dtype, rel', [(torch.float32, 1e-5), (torch.float64, 1e-7), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize('name', references.OF_TENSORS)
def test_of_tensors(name, dtype, rel):
    given = tensors(dtype)
    value, layers = measure_tensors(name, given)
    arrays = {layer: x.double().numpy() for layer, x in given.items()}
    assert list(layers) == list(given)
    for layer, own in layers.items():
        close(name, own['value'], references.OF_TENSORS[name](arrays[layer]), rel)
        assert 'nonfinite' not in own
    close(name, value, references.of_network(name, list(arrays.values())), rel)


@pytest.mark.parametrize('batches', [1, 4, 150])
@pytest.mark.parametrize('dtype, rel', [(torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize('name', references.OF_CALLS)
def test_of_calls(name, dtype, rel, batches):
    given = calls(dtype)
    parts = {site: h.tensor_split(batches) for site, (_, h) in given.items()}
    value, layers = measure_calls(name, [[(site, parts[site][i], 1, (0.,)) for site in given] for i in range(batches)])
    arrays = {f'{site.module}.relu': (z.double().numpy(), h.double().numpy()) for site, (z, h) in given.items()}
    assert list(layers) == list(arrays)
    for layer, own in layers.items():
        close(name, own['value'], references.OF_CALLS[name](*arrays[layer]), rel)
        assert own.get('units', arrays[layer][1].shape[1]) == arrays[layer][1].shape[1]
        assert own.get('rows', 150) == 150
        if 'linear' in own:
            assert own['linear'] == np.mean([p == 1 for p in references.share_on(arrays[layer][0])]) > 0
    close(name, value, references.of_network(name, list(arrays.values())), rel)


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('name', OF_ONE)
def test_a_layer_that_is_not_finite(name, bad):
    if name in ACTIVATIONS:
        given = calls()
        first, second = given
        spoiled = given[first][1].clone()
        spoiled[4, 3:6] = bad
        value, layers = measure_calls(name, [[(first, spoiled, 1, (0.,)), (second, given[second][1], 1, (0.,))]])
        left = [tuple(x.double().numpy() for x in given[second])]
        share = 3 / spoiled.numel()
    else:
        given = tensors()
        given['wide'][2, 3:6] = bad
        value, layers = measure_tensors(name, given)
        left = [x.double().numpy() for layer, x in given.items() if layer != 'wide']
        share = 3 / 200
    (own,) = [own for own in layers.values() if 'nonfinite' in own]
    assert math.isnan(own['value']) and own['nonfinite'] == pytest.approx(share)
    assert sum(math.isnan(own['value']) for own in layers.values()) == 1
    close(name, value, references.of_network(name, left), 1e-5)


@pytest.mark.parametrize('name', METRICS)
def test_no_layer(name):
    value, layers = measure_calls(name, [[]]) if name in ACTIVATIONS else measure_tensors(name, {})
    assert layers == {} and math.isnan(value)


def test_oracles():
    """ By hand, and to ten digits. """
    z = torch.tensor([[-1., 1., -1., 1.], [-1., 1., -1., 1.], [-1., -1., -1., 1.], [-1., -1., 1., 1.]])
    site = Site('act', 'relu', units=4)
    for name, expected in (('sign_entropy', 0.4528195311), ('rare_units', 0.25), ('dead_units', 0.25)):
        value, layers = measure_calls(name, [[(site, z.relu(), 1, (0.,))]])
        assert value == pytest.approx(expected, abs=1e-10)
        assert layers['act.relu'].get('linear', 0.25) == 0.25
    weight = {'w': torch.diag(torch.tensor([3., 1., 4., 2.]))}
    for name, expected in (('erank', 3.5961154666), ('stable_rank', 1.875), ('spectral_norm', 4.)):
        assert measure_tensors(name, weight)[0] == pytest.approx(expected, abs=1e-9)
    features = torch.diag(torch.tensor([3., 1., 4., 2.]))
    assert measure_calls('srank99', [[(site, features, 1, (0.,))]])[0] == 4
    x = torch.tensor([[1., 0., 5.], [0., 1., 5.], [-1., 0., 5.], [0., -1., 5.]])
    site = Site('act', 'relu', units=3)
    for name, expected in (('feature_erank', 1.9745534389), ('centred_erank', 2.)):
        assert measure_calls(name, [[(site, x, 1, (0.,))]])[0] == pytest.approx(expected, abs=1e-9)
    gradients = {'a': torch.tensor([[3., 4.]]), 'b': torch.tensor([[math.nan, 12.]])}
    assert measure_tensors('grad_norm', gradients)[0] == 5  # of the finite layer, and not more


# The activation, and the output above which its input is positive.
SIGNS = {'relu': torch.relu, 'tanh': torch.tanh, 'sigmoid': torch.sigmoid, 'gelu': torch.nn.functional.gelu,
         'silu': torch.nn.functional.silu, 'elu': torch.nn.functional.elu, 'leaky_relu': torch.nn.functional.leaky_relu,
         'hardsigmoid': torch.nn.functional.hardsigmoid, 'softplus': torch.nn.functional.softplus,
         'logsigmoid': torch.nn.functional.logsigmoid, 'steep softplus':
             lambda x: torch.nn.functional.softplus(x, beta=3.), 'hardswish': torch.nn.functional.hardswish,
         'softsign': torch.nn.functional.softsign}


@pytest.mark.parametrize('name', SIGNS)
def test_the_sign_is_that_of_the_input(tmp_path, name):
    class Signs(Net):
        def features(self, x):
            first = SIGNS[name](self.fc1(x))
            return first, SIGNS[name](self.fc2(first))
    net, _, lines, data = fit(tmp_path, PlasticityMonitor('sign_entropy'), make_net(Signs, dead=3), max_epochs=1)
    with torch.no_grad():
        z = net.fc1(data).double().numpy()
    (line,) = lines
    expected = np.mean([references.bits(p) for p in references.share_on(z)])
    assert next(iter(line['layers'].values()))['value'] == pytest.approx(expected, abs=1e-9)


# --- in a real run -------------------------------------------------------------

class Keeps(Net):
    """ Notes its raw tensors at each step: weights after it, gradients before clipping, both sides of activations. """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.raw, self.seen = [], []

    def features(self, x):
        first = self.fc1(x)
        one = self.act(first)
        second = self.fc2(one)
        if self.training:
            self.seen.append([first.detach(), second.detach()])
        return one, torch.relu(second)

    def on_before_optimizer_step(self, optimizer):
        self.grads = [p.grad.detach().clone() for p in self.parameters() if p.ndim > 1]

    def on_train_batch_end(self, *args):
        if not self.trainer.fit_loop.epoch_loop._should_accumulate():
            inputs = [torch.cat(layer) for layer in zip(*self.seen, strict=True)]
            self.raw.append({'weights': [p.detach().clone() for p in self.parameters() if p.ndim > 1],
                             'gradients': self.grads, 'calls': [(z, z.relu()) for z in inputs]})
            self.seen = []


def expected_of(raw, name):
    kind = 'calls' if name in ACTIVATIONS else METRICS[name].sources[0]
    return references.of_network(name, [
        tuple(x.double().numpy() for x in own) if kind == 'calls' else own.double().numpy() for own in raw[kind]])


@pytest.mark.parametrize('kwargs', [
    {}, {'accumulate_grad_batches': 2, 'batch_size': 4}, {'gradient_clip_val': 0.01}, {'precision': 'bf16-true'},
], ids=['plain', 'micro-batches', 'clipping', 'bfloat16'])
def test_in_a_run(tmp_path, kwargs):
    net = make_net(Keeps, dead=5)
    if 'precision' in kwargs:
        kwargs = {**kwargs, 'loader': torch.utils.data.DataLoader(make_data().bfloat16(), batch_size=8)}
    monitor = PlasticityMonitor(OF_ONE, interval=1, source='train', samples=8)
    _, _, lines, _ = fit(tmp_path, monitor, net, validate=False, **kwargs)
    assert len(net.raw) == 10
    for name in OF_ONE:
        own = lines_of(lines, name)
        assert [line['step'] for line in own] == list(range(10))
        for line, raw in zip(own, net.raw, strict=True):
            # The last batch of an epoch has 5 examples.
            close(name, line['value'], expected_of(raw, name), 1e-4)


# --- additive statistics ---------------------------------------------------------

def test_all_fields_are_made():
    """ What the vocabulary lists is what is made: by a function of tensors, of calls, or by its source. """
    of_tensors = {field for fields in STATISTICS.values() for field in fields}
    of_calls = {field for maker in makers_of([*SOURCES['activations'], 'gram'], lambda units: 10)
                for field in maker.fields}
    for source, fields in SOURCES.items():
        for field in fields:
            made = of_calls if source == 'activations' else of_tensors | OF_STEPS[source]
            assert set(additive_fields(field)) <= made, (source, field)
    assert of_calls - set(SOURCES['activations']) == {'gram', 'sum'} == set(MADE_OF['centred_spectrum']) - {'rows'}
    assert set(STEP_SOURCES) == set(SOURCES) - {'activations'}


@pytest.mark.parametrize('field', [field for fields in STATISTICS.values() for field in fields])
def test_tensor_statistics_add_up(field):
    """ Over row shards and column shards: of the Gram matrix, over that side that is not its own. """
    whole, matrix = tensors(torch.float64), tensors(torch.float64)
    ((function, fields),) = functions_of([field]).items()

    def of(x):
        return torch.as_tensor(made(function({'x': x}, fields)[field]['x'])).double()
    for name in ('wide', 'tall'):
        matrix = whole[name]
        axis = 1 if name == 'wide' else 0
        # Of parts the smaller side may be the other one.
        parts = [torch.tril(gram_of(part, axis)) if field == 'gram' else of(part)
                 for part in matrix.tensor_split(3, axis)]
        total = torch.tril(of(matrix)) if field == 'gram' else of(matrix)
        torch.testing.assert_close(sum(parts), total, rtol=1e-12, atol=1e-12)


def gram_of(part, axis):
    return gram(part, 'rows' if axis == 1 else 'columns')


@pytest.mark.parametrize('parts', [2, 5])
def test_call_statistics_add_up(parts):
    """ Over calls of one batch, over batches, and over processes that have seen different ones. """
    fields = ['away', 'positive', 'samples', 'nonfinite', 'gram', 'sum', 'rows']
    given = calls(torch.float64)

    def totals(batches):
        window = Window([], fields, 2000)
        for batch in batches:
            window.begin_batch([1] * sum(len(call[1]) for call in batch if call[0] == batch[0][0]))
            for call in batch:
                window.add(Call(*call))
            window.end_batch()
        return window.totals()
    split = {site: h.tensor_split(parts) for site, (_, h) in given.items()}
    whole = totals([[(site, h, 1, (0.,)) for site, (_, h) in given.items()]])
    of_calls = totals([[(site, part, 1, (0.,)) for site in split for part in split[site]]])
    of_batches = totals([[(site, split[site][i], 1, (0.,)) for site in split] for i in range(parts)])
    of_processes = [totals([[(site, split[site][i], 1, (0.,)) for site in split]]) for i in range(parts)]
    summed = {key: {site: sum(own[key][site] for own in of_processes) for site in given} for key in whole}
    assert whole.keys() == {('activations', field) for field in fields}
    for other in (of_calls, of_batches, summed):
        assert other.keys() == whole.keys()
        for (source, field), own in whole.items():
            for site, x in own.items():
                got = torch.as_tensor(other[source, field][site]).double()
                want = torch.as_tensor(x).double()
                if field == 'away':  # how often a unit moved: only whether it never did is the same
                    got, want = got == 0, want == 0
                if field == 'gram':
                    got, want = got.tril(), want.tril()
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('shape', [(3,), (4, 3)])
def test_what_is_changed_in_place_after_a_call_counts_as_it_was(shape):
    output, window = torch.ones(shape), Window([], ['away', 'gram'], 10)
    window.begin_batch([1])
    window.add(Call('fc', output, -1, (0., 1.)))
    output.zero_()
    window.end_batch()
    assert window.totals()['activations', 'away']['fc'].tolist() == [[1.] * 3, [0.] * 3]


# --- the registry ------------------------------------------------------------------

@contextlib.contextmanager
def refused(*words):
    before = dict(METRICS)
    with pytest.raises(PlasticityConfigError) as info:
        yield
    assert all(word in str(info.value) for word in words), info.value
    assert before == METRICS


def nothing(x):
    return x


def test_unknown_needs_fail_when_a_metric_is_registered():
    with refused('weigths.abs', 'weights, gradients, distances, turns, updates, pieces, activations'):
        metric(needs=('weigths.abs',))(nothing)
    with refused('weights.away', 'weights.abs', 'weights.spectrum'):
        metric(needs=('weights.away',))(nothing)
    with refused("'weights.abs'", '3'):
        metric(needs=(3,))(nothing)
    with refused('at least one statistic'):
        metric(needs=())(nothing)


def test_wrong_metrics_are_refused():
    with refused('network', 'sum, mean, units', "'median'"):
        metric(needs='weights.abs', network='median')(nothing)
    with refused('every', 'log, epoch'):
        metric(needs='weights.abs', every='minute')(nothing)
    with refused('group', 'paper'):
        metric(needs='weights.abs', group='best')(nothing)
    with refused('shapes differ'):
        metric(needs='weights.spectrum', network='sum')(nothing)
    with refused('for activations only'):
        metric(needs='weights.abs', network='units')(nothing)
    with refused('weights, activations'):
        metric(needs=('weights.abs', 'activations.rows'))(nothing)

    def erank(spectrum):
        return 0.
    with refused("'erank' is taken", 'plasticity_metrics.erank'):
        metric(needs='weights.spectrum')(erank)

    def ranks(spectrum):
        return 0.
    with refused('no group', "'ranks'"):
        metric(needs='weights.spectrum')(ranks)
    odd = type(nothing)(nothing.__code__, {}, 'a-b')
    with refused('letters, digits', "'a-b'"):
        metric(needs='weights.abs')(odd)


def test_groups():
    assert set(members('paper')) == {'weight_mag', 'grad_mag', 'grad_norm', 'dead_units', 'erank', 'feature_erank'}
    assert set(members('units')) == {'sign_entropy', 'rare_units'}
    assert set(members('ranks')) == {'srank99', 'centred_erank', 'stable_rank', 'spectral_norm'}
    assert set(members('tuning')) == {'update_ratio', 'step_alignment', 'noise_scale', 'noise_fraction'}
    assert members('all') == list(METRICS)
    # Which keeps a copy of all weights.
    assert [name for name, one in METRICS.items() if one.group not in GROUPS] == ['weight_distance']


@pytest.mark.parametrize('choice, expected', [
    ('paper', dict.fromkeys(members('paper'))),
    ('units@3', dict.fromkeys(members('units'), '3')),
    ('ranks@epoch, srank99@2', {**dict.fromkeys(members('ranks'), 'epoch'), 'srank99': '2'}),
    ('srank99@2, ranks@epoch', {**dict.fromkeys(members('ranks'), 'epoch'), 'srank99': '2'}),
    ('all,erank@1', {**dict.fromkeys(METRICS), 'erank': '1'}),
    ('grad_norm@2', {'grad_norm': '2'}), ('grad_mag@2', {'grad_mag': '2', 'grad_norm': '2'}),
    ('grad_mag@2,grad_norm@4', {'grad_mag': '2', 'grad_norm': '4'}),
    (['paper@1', 'units'], {**dict.fromkeys(members('paper'), '1'), **dict.fromkeys(members('units'))}),
])
def test_choices(choice, expected):
    assert PlasticityMonitor(choice, interval='auto')._settings.intervals == {
        name: 'auto' if own is None else own for name, own in expected.items()}


def test_the_default(tmp_path):
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor(), max_epochs=1)
    assert {line['metric'] for line in read_lines(trainer)} == {*members('paper'), 'update_ratio'} == set(TAGS)


def test_one_statistic_serves_all_that_need_it(tmp_path, monkeypatch):
    """ Five metrics of one spectrum take it once. """
    from geowatch.utils.lightning_ext.callbacks.plasticity_engine import measurement
    from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics import spectrum
    calls, solve = [], torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, 'eigvalsh', lambda *args, **kwargs: calls.append(1) or solve(*args, **kwargs))
    for name in 'abc':
        def formula(values):
            return float(values.max())
        formula.__name__ = formula.__qualname__ = f'largest_{name}'
        metric(needs='weights.spectrum')(formula)
    counts = []
    for chosen in ('erank', 'erank,stable_rank,spectral_norm,largest_a,largest_b,largest_c'):
        calls.clear()
        _, trainer, lines, _ = fit(tmp_path / str(len(chosen)), PlasticityMonitor(chosen, interval=2), max_epochs=1)
        counts.append(len(calls))
        assert len({line['metric'] for line in lines}) == chosen.count(',') + 1
    assert counts[0] == counts[1] == 3 * 3  # three weights, at the start and at two steps
    assert measurement.spectra is spectrum.spectra
