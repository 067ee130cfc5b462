"""
What a capture switches on goes back, whatever comes and goes meanwhile, and wherever it is interrupted.
"""
import contextlib
import gc
import json
import sys
import threading
import warnings

import pytest
import pytorch_lightning as pl
import torch
from common import ACTIVATIONS, Net, fit, lines_of, make_data, make_net
from pytorch_lightning.callbacks import Callback
from test_faults import everything, left_behind
from torch._dynamo import eval_frame
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils.data import DataLoader

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.faults import Faults
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.lightning import choose_source
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.processes import Processes
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations import (
    capture,
    looks,
    modules,
    opening,
)
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.capture import Capture
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.trails import Trails
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS

set_stance = pytest.importorskip('torch.compiler', reason='no torch.compiler').set_stance


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    gc.collect()
    assert not left_behind() and eval_frame._stance == eval_frame.DynamoStance() and not opening._open
    assert not hasattr(getattr(sys.modules.get('torch.export._trace'), '_export', None), 'of_torch')
    assert opening._Arrival not in sys.meta_path


class Doubles(TorchFunctionMode):
    """ A mode of the user that changes what is computed. """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        return output * 2 if func is torch.nn.functional.linear else output


def stance():
    return set_stance('eager_on_recompile')


class Holds(Callback):
    """ Holds a context of the user from one hook to another. """

    def __init__(self, make, enters, leaves):
        self.make, self.seen = make, []
        setattr(self, enters, self.enter)
        setattr(self, leaves, self.leave)

    def enter(self, *args, **kwargs):
        self.context = self.make()
        self.context.__enter__()
        self.seen.append(eval_frame._stance.stance)

    def leave(self, *args, **kwargs):
        if self.context is not None:
            self.context.__exit__(None, None, None)
            self.context = None


HELD = [('on_train_batch_start', 'on_before_backward'), ('on_train_batch_start', 'on_after_backward'),
        ('on_train_batch_start', 'on_train_batch_end'), ('on_before_backward', 'on_train_batch_end')]


@pytest.mark.parametrize('first', [True, False], ids=['before ours', 'after ours'])
@pytest.mark.parametrize('enters, leaves', HELD)
@pytest.mark.parametrize('make', [Doubles, stance, lambda: torch.device('cpu')], ids=['mode', 'stance', 'device'])
def test_what_the_user_holds_across_hooks(tmp_path, make, enters, leaves, first):
    def run(own):
        holds = Holds(make, enters, leaves)
        ours = [own, holds]
        net, trainer, lines, _ = fit(tmp_path, pl.Callback(), callbacks=ours[::-1] if first else ours, max_epochs=1,
                                     validate=False)
        assert trainer.global_step == 5 and _get_current_function_mode() is None
        assert eval_frame._stance == eval_frame.DynamoStance()
        return net, lines
    net, lines = run(PlasticityMonitor('dead_units@1,weight_mag@1', source='train', samples=4))
    without, _ = run(pl.Callback())
    assert all(torch.equal(x, y) for x, y in zip(net.parameters(), without.parameters(), strict=True))
    assert len(lines_of(lines, 'dead_units')) == 5


class Second(PlasticityMonitor):
    """ Beside the first in one trainer, which takes two of one class for one. """


def test_two_monitors(tmp_path):
    _, trainer, lines, _ = fit(tmp_path, everything(), callbacks=[Second('dead_units@1', source='train', samples=8)])
    assert trainer.global_step == 10
    assert [line['step'] for line in lines_of(lines, 'dead_units')] == list(range(10))
    (second,) = tmp_path.rglob('monitor_2/plasticity.jsonl')
    steps = [json.loads(line)['step'] for line in second.read_text().splitlines()]
    assert [step for step in steps if step >= 0] == list(range(10))


def test_another_thread(tmp_path):
    """ Hooks and stances are those of the process: a second run waits its turn, with a word. """
    results = []

    def train():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            _, trainer, lines, _ = fit(tmp_path, everything())
        results.extend([trainer.global_step, lines, [str(one.message) for one in said]])
    net = make_net()
    with Capture(net, lambda *args: None):
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        assert eval_frame._stance.stance == 'force_eager' and left_behind()
    steps, lines, said = results
    assert steps == 10 and len(lines_of(lines, 'weight_mag')) == 10 and not lines_of(lines, 'dead_units')
    assert sum('another run in a thread' in text for text in said) == 1


class Raises(Callback):
    """ Keeps the callbacks after it from being told. """

    def on_exception(self, trainer, module, exception):
        raise KeyError('another')


class Breaks(Net):
    """ Ends in the middle of a forward pass that is looked at. """

    def features(self, x):
        if self.trainer.global_step == 2:
            assert left_behind()
            raise RuntimeError('its own cause')
        return super().features(x)


@pytest.mark.parametrize('how', ['dies', 'goes on'])
def test_an_end_that_we_are_not_told_of(tmp_path, how):
    monitor = everything()
    trainer = pl.Trainer(default_root_dir=tmp_path, max_epochs=1, accelerator='cpu', enable_progress_bar=False,
                         enable_model_summary=False, callbacks=[Raises(), monitor], logger=False)
    with contextlib.suppress(KeyError, RuntimeError), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer.fit(make_net(Breaks), DataLoader(make_data(), batch_size=8))
    assert left_behind() and eval_frame._stance.stance == 'force_eager'
    if how == 'goes on':
        monitor.setup(trainer, None, 'validate')
    else:  # the trainer may be kept by others: what is ours is not
        monitor._fit = None
        gc.collect()
    assert not left_behind() and eval_frame._stance.stance == 'default'


class PartlyCompiled(Net):
    def __init__(self):
        super().__init__()
        self.fc2 = torch.compile(self.fc2, backend='eager')


@pytest.mark.parametrize('leaves', ['on_before_backward', 'on_train_batch_end'])
def test_no_warning_of_our_hooks(tmp_path, leaves):
    """ Torch has one for modules that are compiled, which may be an error; and what is shown is as it was. """
    holds = Holds(lambda: warnings.catch_warnings(record=True), 'on_train_batch_start', leaves)
    before = list(warnings.filters)
    warnings.filterwarnings('error', message='Using `torch.compile')
    own = list(warnings.filters)
    assert own != before
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('dead_units@1', source='train', samples=4),
                               make_net(PartlyCompiled), callbacks=[holds], max_epochs=1, validate=False)
    assert trainer.global_step == 5 and len(lines_of(lines, 'dead_units')) == 5
    assert warnings.filters == own and len(holds.seen) == 5
    with left_open(make_net(PartlyCompiled)) as net, pytest.raises(UserWarning, match='global hooks'):
        net(make_data())


@contextlib.contextmanager
def left_open(net):
    """ Hooks of others. """
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        yield net
    finally:
        handle.remove()


class Decorated(Net):
    """ One method of it is compiled. """

    @torch.compile(backend='eager')
    def loss(self, batch):
        return super().loss(batch)


class Assigned(Net):
    def __init__(self):
        super().__init__()
        self.squared = torch.compile(torch.square, backend='eager')


class Disabled(Net):
    @torch.compiler.disable
    def loss(self, batch):
        return super().loss(batch)


@pytest.mark.parametrize('cls, compiled', [(Decorated, True), (Assigned, True), (Disabled, False), (Net, False)])
def test_methods_that_are_compiled(cls, compiled):
    """ Without validation such a model is not looked at unasked, since it would run uncompiled for that. """
    source, reason = choose_source('auto', False, make_net(cls))
    assert (source, reason is None) == ((None, False) if compiled else ('train', True))


class Inferred(Net):
    """ Looks ahead without gradients, before its forward pass. """

    def training_step(self, batch, batch_idx):
        with torch.inference_mode():
            self(batch)
        return super().training_step(batch, batch_idx)


class Faked(Net):
    """ Runs once with tensors that have no numbers. """

    def training_step(self, batch, batch_idx):
        from torch._subclasses.fake_tensor import FakeTensorMode
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            torch.relu(mode.from_tensor(batch))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize('cls', [Inferred, Faked])
def test_calls_that_are_not_like_the_others(tmp_path, cls, capsys):
    monitor = PlasticityMonitor('dead_units@1,sign_entropy@1,feature_erank@1,weight_mag@1', source='train')
    _, trainer, lines, _ = fit(tmp_path, monitor, make_net(cls), max_epochs=1)
    assert trainer.global_step == 5 and 'Traceback' not in capsys.readouterr().out
    for tag in ('dead_units', 'feature_erank', 'sign_entropy', 'weight_mag'):
        assert lines_of(lines, tag) and lines_of(lines, tag)[-1]['value'] is not None


class Odd(torch.Tensor):
    """ Holds another tensor, of which it does not let everything be computed. """
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.amax.default:
            raise NotImplementedError('no such reduction')
        output = func(*(x.inner if isinstance(x, cls) else x for x in args), **(kwargs or {}))
        return cls(output) if isinstance(output, torch.Tensor) else output


class Holder(Odd):
    """ Tells what it holds. """

    def __tensor_flatten__(self):
        return ['inner'], None

    @staticmethod
    def __tensor_unflatten__(held, meta, size, stride):
        return Holder(held['inner'])


class HasOdd(Net):
    """ The second layer works on such tensors. """
    odd = Odd

    def features(self, x):
        first = self.act(self.fc1(x))
        return first, torch.relu(self.fc2(self.odd(first))).inner


@pytest.mark.parametrize('odd, why', [
    (Odd, 'relu that failed: NotImplementedError in test_opening.py:'),
    (Holder, 'relu of a Holder, which has no numbers of its own')])
def test_a_site_that_cannot_be_measured(tmp_path, odd, why, capsys):
    """ It is left out, with a word, and all else is measured. """
    net = make_net(HasOdd)
    net.odd = odd
    _, trainer, lines, _ = fit(tmp_path, everything(), net, max_epochs=1)
    out = capsys.readouterr().out
    assert trainer.global_step == 5 and 'Traceback' not in out
    assert out.count(f'not seen: activations inside the step: {why}') == 1
    assert {line['metric'] for line in lines} == set(METRICS)
    assert all(set(line['layers']) == {'act'} for line in lines if line['metric'] in ACTIVATIONS)


class Unfollowed(Net):
    """ Calls a function in a way in which it cannot be followed. """

    def features(self, x):
        first, second = super().features(x)
        return first, torch.tanh(second)


def test_a_call_that_cannot_be_followed(tmp_path, monkeypatch, capsys):
    def fails(self, name, *args):
        if name == 'tanh':
            raise TypeError('of this call')
        return follow(self, name, *args)
    follow = Trails.follow
    monkeypatch.setattr(Trails, 'follow', fails)
    _, trainer, lines, _ = fit(tmp_path, everything(), make_net(Unfollowed), max_epochs=1)
    out = capsys.readouterr().out
    assert trainer.global_step == 5 and 'Traceback' not in out
    assert out.count('not seen: activations inside the step: a call that failed: TypeError in test_opening.py:') == 1
    assert all(set(line['layers']) == {'act', 'relu'} for line in lines if line['metric'] in ACTIVATIONS)


class Exports(Net):
    """ Exports a part of itself once, before its forward pass. """
    strict, in_training, exported = True, True, None

    def forward(self, x):
        if self.exported is None and self.training == self.in_training:
            self.is_looked_at = bool(opening._open)
            inner = torch.nn.Sequential(self.fc1, self.act, self.fc2, torch.nn.Tanh())
            program = torch.export.export(inner, (x[:2],), strict=self.strict)
            stacks = [(list(node.meta.get('nn_module_stack', {}).values()), node.meta.get('stack_trace'))
                      for node in program.graph.nodes]
            self.exported = str(program), stacks
        return super().forward(x)


@pytest.mark.parametrize('source, strict, is_first', [
    ('train', True, True), ('train', True, False), ('validation', True, False), ('train', False, False)])
def test_what_is_exported_meanwhile(tmp_path, monkeypatch, source, strict, is_first):
    """ Is what it would be without us, and what runs after it is seen, also where torch loads its exports for it. """
    if is_first:
        monkeypatch.delitem(sys.modules, 'torch.export._trace', raising=False)

    def run(monitor, name):
        net = make_net(Exports)
        net.strict, net.in_training = strict, source == 'train'
        _, trainer, lines, _ = fit(tmp_path / name, monitor, net, n=9, max_epochs=1, num_sanity_val_steps=0,
                                   validate=source == 'validation')
        assert trainer.global_step == 2 and net.is_looked_at == (name == 'with')
        return net.exported, lines
    exported, lines = run(PlasticityMonitor('dead_units@1,feature_erank', source=source, samples=8), 'with')
    assert exported == run(pl.Callback(), 'without')[0]
    assert set(lines_of(lines, 'dead_units')[-1]['layers']) == {'act', 'relu'}


# --- interrupted anywhere ---------------------------------------------------------

def interrupted(function, nth):
    """ Raise KeyboardInterrupt at the n-th line of ours that a function runs; whether there was one. """
    files = {module.__file__ for module in (capture, looks, modules, opening)}
    left = nth

    def trace(frame, event, arg):
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        if event == 'line':
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize('theirs', [contextlib.nullcontext, Doubles], ids=['alone', 'with a mode'])
def test_an_interrupt_at_each_line(theirs):
    model, held = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()), theirs()
    count = {'open': 0, 'close': 0}
    with held:
        before = _get_current_function_mode()
        for when in count:
            while True:
                look = looks.Looks(2000, Processes(1, 'cpu'), lambda layer: True, Faults(), lambda names, fields: names)
                look.open(['dead_units'], ['away'])
                if when == 'close':
                    look.look(model, torch.ones(5, 3))
                found = interrupted(look.look_away if when == 'close' else lambda look=look: look.look(
                    model, torch.ones(5, 3)), count[when] + 1)
                look.look_away()  # what on_exception does
                assert _get_current_function_mode() is before and not opening._open, (when, count)
                assert not torch.nn.modules.module._global_forward_hooks, (when, count)
                assert not torch.nn.modules.module._global_forward_pre_hooks
                assert eval_frame._stance.stance == 'default', (when, count)
                if not found:
                    break
                count[when] += 1
    assert count['open'] > 30 and count['close'] > 20
