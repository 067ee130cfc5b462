"""
What has been found in a model is found anew when anything of it has changed, and only then.
"""
import sys
import weakref
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from common import Net, feature_values, fit, gradients, lines_of, make_data, make_net, mean_abs
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources import contents as contents_file
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.capture import Capture
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.experts import alike
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.owners import Owners
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.contents import Contents, Trained
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.weights import walk, weights_of

METRICS = 'weight_mag,grad_mag,dead_units'


class Rich(Net):
    """ With experts, tables of parameters, a lazy layer, and what is made of parameters. """

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.more = nn.ModuleList([nn.ParameterDict({'a': torch.ones(2, 3)}), nn.ParameterDict({})])
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.conv = nn.Conv2d(2, 3, 3)
        self.normed = parametrizations.weight_norm(nn.Linear(4, 5))
        self.pruned = prune.l1_unstructured(nn.Linear(4, 5), 'weight', amount=0.5)
        self.register_buffer('center', torch.zeros(4))


def replaced(net):
    net.fc2 = nn.Linear(16, 12)


def reordered(net):
    """ Which has no other objects and no other names. """
    net._modules['conv'] = net._modules.pop('conv')


def moved(net):
    """ From the end of one module to the begin of the next. """
    first, second = net.more
    second._parameters['a'] = first._parameters.pop('a')


def swapped(net):
    net.fc1, net.conv = net.conv, net.fc1


def tied(net):
    net.experts[1].weight = net.experts[0].weight


def grown(net):
    net.more[0]['a'].data = torch.ones(2, 3, 4)


def of_whole_numbers(net):
    net.frozen.weight.data = torch.ones(4, 4, dtype=torch.long)


def to_meta(net):
    net.to('meta')


def of_another_class(net):
    net.conv.__class__ = type('MyNorm', (nn.Conv2d,), {})


def pruned_again(net):
    prune.random_unstructured(net.pruned, 'weight', amount=0.5)


def without_hook(net):
    net.pruned._forward_pre_hooks.clear()


def flattened(net):
    net.fc1.weight._fsdp_flattened = True


CHANGES = {function.__name__: function for function in (
    replaced, reordered, moved, swapped, tied, grown, of_whole_numbers, to_meta, of_another_class, pruned_again,
    without_hook, flattened)}
CHANGES |= {
    'frozen': lambda net: net.fc1.requires_grad_(False),
    'thawed': lambda net: net.frozen.requires_grad_(True),
    'bias frozen': lambda net: net.experts[1].bias.requires_grad_(False),
    'new parameter': lambda net: setattr(net.fc1, 'weight', nn.Parameter(torch.ones(3, 4))),
    'sparse': lambda net: setattr(net.fc1, 'weight', nn.Parameter(torch.eye(3).to_sparse())),
    'a parameter more': lambda net: net.register_parameter('table', nn.Parameter(torch.ones(3, 4))),
    'a parameter less': lambda net: delattr(net.fc1, 'weight'),
    'no parameter': lambda net: net.fc1.register_parameter('weight', None),
    'a module more': lambda net: net.experts.append(nn.Linear(3, 3)),
    'a module less': lambda net: delattr(net, 'fc1'),
    'no module': lambda net: setattr(net, 'fc1', None),
    'in several places': lambda net: setattr(net, 'again', net.fc1),
    'parametrized': lambda net: parametrizations.spectral_norm(net.fc1),
    'parametrized twice': lambda net: parametrizations.spectral_norm(net.normed),
    'no longer parametrized': lambda net: parametrize.remove_parametrizations(net.normed, 'weight'),
    'made in a hook': lambda net: nn.utils.weight_norm(net.fc1),
    'no longer pruned': lambda net: prune.remove(net.pruned, 'weight'),
    'lazy': lambda net: setattr(net, 'lazy', nn.LazyLinear(3)),
}


def found(contents):
    """ All that is found in contents, to compare. """
    owners = Owners(contents)
    everything = [(name, id(getattr(weight, 'parameter', weight)), getattr(weight, 'is_made', None), why)
                  for name, weight, why in walk(contents)]
    return everything, owners.known, contents.once(alike), list(contents.once(weights_of))


@pytest.mark.parametrize('change', CHANGES)
def test_a_change_is_seen(change):
    net = make_net(Rich)
    trained = Trained(SimpleNamespace(optimizers=[torch.optim.SGD(net.parameters())]))
    before = trained.look(net)
    assert trained.look(net) is before
    first = found(before)
    CHANGES[change](net)
    after = trained.look(net)
    assert after is not before
    assert found(after) == found(Contents(net, after.is_trained))
    if change not in ('without_hook', 'pruned_again', 'in several places'):
        assert found(after) != first, 'the test shows nothing'


def test_what_changes_nothing():
    """ As steps do: values, gradients, buffers, training or not; what has been found is found no more. """
    net, calls = make_net(Rich), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trained = Trained(SimpleNamespace(optimizers=[optimizer]))

    def find(contents):
        calls.append(contents)
        return weights_of(contents)

    first = trained.look(net).once(find)
    net(make_data()).sum().backward()
    optimizer.step()
    net.eval()
    net.center = net.center + 1
    net.register_buffer('another', torch.ones(3))
    net.fc1.register_forward_hook(lambda *args: None)
    assert trained.look(net).once(find) is first and len(calls) == 1
    # Buffers are those of now all the same.
    known = Owners(trained.look(net)).known
    assert [known[id(x)].layer for x in (net.center, net.another)] == ['center', 'another']
    trained.forget()
    assert trained.look(net).once(find) is not first


def test_what_is_lazy_is_asked_again():
    net = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.Linear(3, 1))
    trained = Trained(SimpleNamespace(optimizers=[]))
    assert list(weights_of(trained.look(net))) == ['2']
    assert trained.look(net) is not trained.look(net)
    net(torch.ones(2, 4))
    assert list(weights_of(trained.look(net))) == ['0', '2']
    assert trained.look(net) is trained.look(net)


def test_optimizers_change():
    net = make_net()
    optimizer = torch.optim.SGD(net.fc1.parameters(), lr=0.1)
    trainer = SimpleNamespace(optimizers=[optimizer])
    trained = Trained(trainer)
    assert list(weights_of(trained.look(net))) == ['fc1']
    optimizer.add_param_group({'params': [*net.head.parameters()]})
    assert list(weights_of(trained.look(net))) == ['fc1', 'head']
    assert trained.look(net) is trained.look(net)
    trainer.optimizers = [torch.optim.SGD(net.fc2.parameters(), lr=0.1)]
    assert list(weights_of(trained.look(net))) == ['fc2']
    trainer.optimizers = []
    assert list(weights_of(trained.look(net))) == ['fc1', 'fc2', 'head']


def test_sharded_and_whole_in_turn(monkeypatch):
    """ FSDP2 puts whole parameters in the place of its own, which are those that the optimizer has. """
    net = make_net()
    trained = Trained(SimpleNamespace(optimizers=[torch.optim.SGD(net.fc1.parameters())]))
    own, whole = dict(net.fc1._parameters), dict(make_net().fc1._parameters)
    monkeypatch.setattr(contents_file, 'is_sharded', lambda param: param is own['weight'])
    for params in (own, whole, own, whole, whole):
        net.fc1._parameters.update(params)
        weights = trained.look(net).once(weights_of)
        assert list(weights) == ['fc1'] and weights['fc1'] is params['weight']


def test_modules_that_hold_each_other():
    """ Of which torch can list the modules once each: their weights are found, if not their activations. """
    net = make_net()
    net.fc1.parent = net
    assert list(weights_of(Contents(net))) == ['fc1', 'fc2', 'head']


def test_a_script_module():
    net = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), nn.Linear(4, 1))
    contents = Contents(net)
    assert contents.are_those_of(net)
    Owners(contents)
    net[0][0].weight.requires_grad_(False)
    assert not contents.are_those_of(net)


# --- in a run ------------------------------------------------------------------

class Walks:
    """ Counts how often the monitor has a model list what is in it. """
    NAMES = ('named_modules', 'modules', 'parameters', 'named_parameters', 'children', 'named_children')

    def __init__(self, monkeypatch):
        self.count = 0
        for name in self.NAMES:
            monkeypatch.setattr(nn.Module, name, self._counting(getattr(nn.Module, name)))

    def _counting(self, method):
        def counted(*args, **kwargs):
            self.count += 'plasticity_engine' in sys._getframe(1).f_globals['__name__']
            return method(*args, **kwargs)
        return counted


class Watch(pl.Callback):
    """ What should be measured at each step, and what happens after it. """

    def __init__(self, events=(), walks=None):
        self.events, self.walks = dict(enumerate(events)), walks
        self.rows, self.counts = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients = {name: grad.copy() for name, grad in gradients(module).items()}
        with torch.no_grad():
            self.features = module.features(self.batch)[module.is_frozen:]

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batch = batch

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        weights = {name: param.detach().double().numpy().copy() for name, param in module.used().items()}
        self.rows.append({'weights': weights, 'gradients': self.gradients, 'features': feature_values(self.features)})
        self.counts.append(self.walks and self.walks.count)
        event = self.events.get(batch_idx)
        if event is not None:
            event(trainer, module)


class Changing(Net):
    is_frozen = False

    def used(self):
        """ Matrices that are trained, as the next forward pass would use them. """
        layers = {'fc1': self.fc1, 'fc2': self.fc2, 'head': self.head}
        return {name: layer.weight_orig * layer.weight_mask if prune.is_pruned(layer) else layer.weight
                for name, layer in layers.items() if layer.bias.requires_grad}


def trains_all(trainer, module):
    """ The optimizer has what the model has now. """
    trainer.optimizers[0].param_groups[0]['params'] = list(module.parameters())


def freeze(trainer, module):
    module.fc1.requires_grad_(False)
    module.fc1.zero_grad()
    module.is_frozen = True


def thaw(trainer, module):
    module.fc1.requires_grad_(True)
    module.is_frozen = False


def replace_layers(trainer, module):
    module.fc2, module.head = nn.Linear(16, 20), nn.Linear(20, 1)
    with torch.no_grad():
        module.fc2.bias[:7] = -100
    trains_all(trainer, module)


def cut_in_place(trainer, module):
    """ Which keeps all objects. """
    module.fc2.weight.data, module.fc2.bias.data = module.fc2.weight.data[3:], module.fc2.bias.data[3:]
    module.head.weight.data = module.head.weight.data[:, 3:]
    module.zero_grad()


def prune_first(trainer, module):
    prune.l1_unstructured(module.fc1, 'weight', amount=0.5)


def test_each_change_of_a_run(tmp_path):
    events = [None, freeze, thaw, replace_layers, cut_in_place, prune_first]
    watch = Watch(events)
    monitor = PlasticityMonitor(METRICS, interval=1, source='train', samples=8)
    _, _, lines, _ = fit(tmp_path, monitor, make_net(Changing, dead=5), n=61, callbacks=[watch], max_epochs=1,
                         validate=False)
    assert len(watch.rows) == 8
    for step, row in enumerate(watch.rows):
        magnitude, gradient, dead = (lines_of(lines, name)[step] for name in METRICS.split(','))
        assert set(magnitude['layers']) == set(row['weights']), step
        assert magnitude['value'] == pytest.approx(mean_abs(row['weights']), rel=1e-5), step
        grads = {name.removesuffix('.weight_orig'): grad for name, grad in row['gradients'].items()}
        assert set(gradient['layers']) == set(grads), step
        assert gradient['value'] == pytest.approx(mean_abs(grads), rel=1e-5), step
        assert dead['value'] == pytest.approx(row['features']['dead_units']), step
    assert [len(row['weights']) for row in watch.rows] == [3, 3, 2, 3, 3, 3, 3, 3]
    assert len({round(row['features']['dead_units'], 4) for row in watch.rows}) >= 4


def test_an_unchanged_model_is_walked_once(tmp_path, monkeypatch):
    walks = Walks(monkeypatch)
    watch = Watch(walks=walks)
    monitor = PlasticityMonitor(METRICS + ',update_ratio,noise_scale', interval=1, source='train', samples=8)
    fit(tmp_path, monitor, make_net(Changing), n=32, callbacks=[watch], max_epochs=1, validate=False)
    first, second, *_, last = watch.counts
    assert 0 < first == second == last


def test_nothing_is_kept_of_what_is_replaced(tmp_path):
    """ At latest at the next look a layer is gone, and after the fit at once. """
    refs, gone = [], []

    def replace(trainer, module):
        refs.extend([weakref.ref(module.fc2), weakref.ref(module.fc2.weight)])
        replace_layers(trainer, module)

    class Ends(Watch):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            gone.append([ref() is None for ref in refs])

        def on_train_end(self, trainer, module):
            replace(trainer, module)
            self.fit = monitor._fit
    monitor, watch = PlasticityMonitor(METRICS, interval=1, source='train', samples=8), Ends([None, replace])
    fit(tmp_path, monitor, make_net(Changing), n=32, callbacks=[watch], max_epochs=1, validate=False)
    assert len(gone) == 4 and gone[2:] == [[True, True]] * 2
    assert watch.fit is not None and len(refs) == 4 and all(ref() is None for ref in refs)


def test_a_capture_keeps_no_contents():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    contents = Contents(net)
    capture = Capture(net, lambda *args: None, contents=contents)
    with capture:
        net(torch.ones(2, 3))
    ref = weakref.ref(contents)
    del contents
    assert ref() is None
    assert capture.hidden
