"""
How runs end: the steps of all lines of a run, from what Lightning did in it.

Each epoch is measured at its last optimizer step, however it ends. What the
steps and validations were is noted by a callback that knows nothing of ours.
"""
import datetime
import itertools
import warnings

import pytest
import pytorch_lightning as pl
import torch
from common import Net, gradient_values, last, lines_of, make_data, make_net, read_lines, weight_values
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint, Timer
from torch.utils.data import DataLoader, IterableDataset

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor

BATCHES = 6  # of an epoch
METRICS = ('weight_mag', 'grad_mag', 'erank', 'dead_units')


class Stream(IterableDataset):
    def __iter__(self):
        return iter(make_data(4 * BATCHES))


class Short(DataLoader):
    """ Says that it has more batches than there are. """

    def __len__(self):
        return super().__len__() + 2


def gone(items):
    """ A collate_fn that drops the fifth batch and the last one, as where all images of them are broken. """
    dropped = make_data(4 * BATCHES)[[16, 20]]
    return None if any((items[0] == x).all() for x in dropped) else torch.stack(items)


class Log(Callback):
    """ Which steps were made, and after which of them there was validation. """

    def __init__(self):
        self.steps, self.validations = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.steps.append((trainer.current_epoch, trainer.fit_loop.epoch_loop._batches_that_stepped))

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.validations.append(self.steps[-1])


class Ends(Net):
    """ Something happens in the second epoch, after its third batch. """

    def __init__(self, how=None):
        super().__init__()
        self.how = how

    def is_now(self, batch_idx):
        return self.trainer.current_epoch == 1 and batch_idx == 3

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.how == 'skips the rest' and self.is_now(batch_idx) else None

    def training_step(self, batch, batch_idx):
        if self.is_now(batch_idx):
            if self.how == 'stops':
                self.trainer.should_stop = True
            if self.how == 'fails':
                raise RuntimeError('its own cause')
            for callback in self.trainer.callbacks:
                if isinstance(callback, Timer):
                    callback._duration = 0.  # the time is over
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.how == 'fails after a batch' and self.is_now(batch_idx):
            raise RuntimeError('its own cause')

    def on_validation_end(self):
        if self.how == 'stops in validation' and not self.trainer.sanity_checking:
            self.trainer.should_stop |= self.trainer.global_step >= BATCHES + 2


class Iterates(Ends):
    """ Takes its batches itself. """

    def training_step(self, dataloader_iter):
        batch, index, _ = next(dataloader_iter)
        return super().training_step(batch, index)


LOADERS = {
    'sized': lambda: DataLoader(make_data(4 * BATCHES), batch_size=4),
    'short': lambda: Short(make_data(4 * BATCHES), batch_size=4),
    'dropped': lambda: DataLoader(make_data(4 * BATCHES), batch_size=4, collate_fn=gone),
    'stream': lambda: DataLoader(Stream(), batch_size=4),
}
VALIDATIONS = {
    'batches': {'val_check_interval': 2}, 'fraction': {'val_check_interval': 0.5}, 'end': {},
    'time': {'val_check_interval': datetime.timedelta(0)},  # after each batch
    'none': {'limit_val_batches': 0},
}
ENDINGS = {
    'epochs': {}, 'steps': {'max_steps': BATCHES + 3, 'max_epochs': -1}, 'batches': {'limit_train_batches': 4},
    'time': {'max_time': '00:01:00:00'}, 'stops': {}, 'stops in validation': {}, 'fails': {},
    'fails after a batch': {}, 'skips the rest': {},
}


def run(tmp_path, net, loader, metrics=METRICS, callbacks=(), source='train', ckpt_path=None, **kwargs):
    """ The lines of a run. """
    monitor = PlasticityMonitor(metrics, 'epoch', source)
    trainer = pl.Trainer(**{
        'default_root_dir': tmp_path, 'logger': False, 'max_epochs': 2, 'accelerator': 'cpu',
        'enable_progress_bar': False, 'enable_model_summary': False, 'num_sanity_val_steps': 0,
        'enable_checkpointing': any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        'callbacks': [monitor, *callbacks], **kwargs})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer.fit(net, loader, DataLoader(make_data(10), batch_size=10), ckpt_path=ckpt_path)
    return read_lines(trainer)


def last_of_epochs(moments):
    """ Of (epoch, step) the last step of each epoch. """
    return [max(own)[1] for _, own in itertools.groupby(moments, key=lambda moment: moment[0])]


def is_possible(loader, validation, source, ending):
    if validation == 'fraction' and loader == 'stream':
        return False  # Lightning refuses it
    if source == 'validation' and validation == 'none':
        return False
    return ending != 'stops in validation' or validation in ('batches', 'fraction', 'time')


@pytest.mark.parametrize('source', ['train', 'validation'])
@pytest.mark.parametrize('ending', ENDINGS)
@pytest.mark.parametrize('loader', LOADERS)
def test_each_epoch_ends_with_its_last_step(tmp_path, loader, ending, source, capsys):
    for validation in [each for each in VALIDATIONS if is_possible(loader, each, source, ending)]:
        net, log = make_net(Ends, how=ending), Log()
        kwargs = {'tmp_path': tmp_path / validation, 'net': net, 'loader': LOADERS[loader](), 'callbacks': [log],
                  'source': source, **VALIDATIONS[validation], **ENDINGS[ending]}
        if ending.startswith('fails'):
            with pytest.raises(RuntimeError, match='its own cause'):
                run(**kwargs)
            lines = read_lines(net.trainer)
        else:
            lines = run(**kwargs)
        ends = last_of_epochs(log.steps)
        expected = {'weight_mag': ends, 'erank': ends, 'grad_mag': ends, 'dead_units': ends}
        if source == 'validation':
            expected['dead_units'] = last_of_epochs(list(dict.fromkeys(log.validations)))
        got = {name: [line['step'] for line in lines_of(lines, name)] for name in METRICS}
        assert got == expected, validation
        assert len(ends) == 3 if (loader, ending) == ('dropped', 'steps') else 2
    assert 'Traceback' not in capsys.readouterr().out


@pytest.mark.parametrize('validate', [True, False])
def test_steps_that_take_their_batches_themselves(tmp_path, validate):
    kwargs = {} if validate else {'limit_val_batches': 0}
    lines = run(tmp_path, make_net(Iterates), LOADERS['sized'](), **kwargs)
    got = {name: [line['step'] for line in lines_of(lines, name)] for name in METRICS}
    assert got == dict.fromkeys(METRICS, [5, 11])


# --- the values are those of the last step -------------------------------------

def plain_values(steps, batch_size=4):
    """ Weights after so many steps of the sized loader, and gradients of the last. """
    net, data = make_net(), make_data(4 * BATCHES).split(batch_size)
    optimizer = net.configure_optimizers()
    for step in range(steps):
        optimizer.zero_grad()
        net.loss(data[step % len(data)]).backward()
        optimizer.step()
    return {**weight_values(net), **gradient_values(net)}


@pytest.mark.parametrize('ending, steps', [
    ('stops', 10), ('stops in validation', 8), ('fails after a batch', 10), ('fails', 9), ('skips the rest', 9)])
def test_values_at_an_end_that_nobody_knew(tmp_path, ending, steps):
    net = make_net(Ends, how=ending)
    try:
        run(tmp_path, net, LOADERS['sized'](), val_check_interval=2)
    except RuntimeError as ex:
        assert str(ex) == 'its own cause'
    lines = read_lines(net.trainer)
    expected = plain_values(steps)
    # A batch that has failed has made its gradients zero.
    for name in ('weight_mag', 'erank', 'grad_mag'):
        assert last(lines, name)['step'] == steps - 1
        assert last(lines, name)['value'] == pytest.approx(expected[name], rel=1e-5)


def test_clipped_gradients_are_not_taken_for_the_gradients(tmp_path):
    lines = run(tmp_path, make_net(Ends), LOADERS['short'](), ('weight_mag', 'grad_mag'), gradient_clip_val=0.01,
                limit_val_batches=0)
    assert [line['metric'] for line in lines] == ['weight_mag'] * 2
    # Where the end can be foreseen they are measured, before they are clipped.
    lines = run(tmp_path / 'b', make_net(Ends), LOADERS['sized'](), ('grad_norm',), gradient_clip_val=0.01)
    assert len(lines) == 2 and last(lines, 'grad_norm')['value'] > 0.1


def test_what_was_never_measured_says_why(tmp_path, capsys):
    run(tmp_path, make_net(Ends), LOADERS['short'](), ('grad_norm', 'dead_units'), source='auto',
        gradient_clip_val=0.01, max_epochs=1, val_check_interval=1.0)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if 'never measured' in line]
    assert 'grad_norm (' in said and 'dead_units (no validation ran)' in said


# --- manual optimization ----------------------------------------------------------

class Manual(Net):
    """ Two optimizers; `critic` steps of the first in each batch, the second in each other batch only. """

    def __init__(self, critic=1, raw=False, alternate=False):
        super().__init__()
        self.automatic_optimization = False
        self.critic, self.raw, self.alternate = critic, raw, alternate

    def configure_optimizers(self):
        return [torch.optim.SGD([*self.fc1.parameters(), *self.fc2.parameters()], lr=0.02),
                torch.optim.SGD(self.head.parameters(), lr=0.02)]

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers(use_pl_optimizer=not self.raw)
        turn = [first] * self.critic + [second]
        if self.alternate:
            turn = [first] if batch_idx % 2 else [second]
        for optimizer in turn:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


@pytest.mark.parametrize('kwargs, max_steps, end', [
    ({'alternate': True}, 5, 4), ({'critic': 1}, 6, 2), ({'critic': 5}, 24, 3), ({'critic': 5}, 6, 0)], ids=str)
def test_max_steps_of_two_optimizers(tmp_path, kwargs, max_steps, end):
    lines = run(tmp_path, make_net(Manual, **kwargs), LOADERS['sized'](), ('weight_mag', 'erank', 'grad_mag'),
                max_steps=max_steps, max_epochs=-1, limit_val_batches=0)
    assert {(line['metric'], line['step']) for line in lines if line['metric'] != 'grad_norm'} == {
        ('weight_mag', end), ('erank', end), ('grad_mag', end)}
    lines = run(tmp_path / 'b', make_net(Manual, **kwargs), LOADERS['sized'](), ('dead_units',),
                max_steps=max_steps, max_epochs=-1)
    assert [(line['step'], line['samples']) for line in lines] == [(end, 4 * (end + 1))]


class InBackward(Net):
    """ Each weight steps as soon as its gradient is there, in optimizers that Lightning does not know. """

    def configure_optimizers(self):
        for param in self.parameters():
            optimizer = torch.optim.SGD([param], lr=0.02)

            def step(param, optimizer=optimizer):
                optimizer.step()
                optimizer.zero_grad()
            param.register_post_accumulate_grad_hook(step)


@pytest.mark.parametrize('net', [Manual(raw=True), InBackward()], ids=['of the optimizer itself', 'in backward'])
def test_steps_that_lightning_does_not_tell_of(tmp_path, net):
    net.load_state_dict(make_net().state_dict())
    lines = run(tmp_path, net, LOADERS['sized'](), 'weight_mag@1,grad_mag@1', max_epochs=1)
    assert [line['step'] for line in lines_of(lines, 'grad_mag')] == list(range(BATCHES))
    expected = plain_values(1)
    if isinstance(net, InBackward):
        assert lines_of(lines, 'grad_mag')[0]['value'] == pytest.approx(expected['grad_mag'], rel=1e-5)
    assert set(lines_of(lines, 'grad_mag')[0]['layers']) == {'fc1', 'fc2', 'head'}
    from torch.optim import optimizer
    assert not optimizer._global_optimizer_pre_hooks


# --- what others watch --------------------------------------------------------------

@pytest.mark.parametrize('loader', ['sized', 'stream'])
@pytest.mark.parametrize('tag', ['dead_units', 'erank', 'weight_mag', 'grad_norm'])
def test_others_see_a_new_value_at_each_validation(tmp_path, tag, loader):
    seen = []

    class Stopping(EarlyStopping):
        def on_validation_end(self, trainer, module):
            super().on_validation_end(trainer, module)
            seen.append(float(trainer.callback_metrics[self.monitor]))
    stopping = Stopping(f'plasticity/{tag}', patience=99)
    keeper = ModelCheckpoint(tmp_path / 'saved', monitor=f'plasticity/{tag}')
    lines = run(tmp_path, make_net(Ends), LOADERS[loader](), callbacks=[stopping, keeper], source='validation',
                val_check_interval=2)
    assert [line['step'] for line in lines_of(lines, tag)] == [1, 3, 5, 7, 9, 11]
    assert seen == pytest.approx([line['value'] for line in lines_of(lines, tag)])


def test_a_resumed_run_has_the_values_that_others_watch(tmp_path):
    keeper = ModelCheckpoint(tmp_path / 'saved', every_n_train_steps=3, save_top_k=-1)
    lines = run(tmp_path, make_net(Ends), LOADERS['sized'](), callbacks=[keeper], source='validation')
    (saved,) = (tmp_path / 'saved').glob('*step=9*')
    seen = {}

    class Looks(Callback):
        def on_train_start(self, trainer, module):
            seen.update(trainer.callback_metrics)
    run(tmp_path, make_net(Ends), LOADERS['sized'](), callbacks=[Looks()], source='validation', ckpt_path=saved)
    assert {name: float(x) for name, x in seen.items()} == pytest.approx(
        {f'plasticity/{line["metric"]}': line['value'] for line in lines if line['epoch'] == 0})
