"""
What is said when something breaks, once each, and what has become of a run at its end.
"""
import types
import warnings

import pytest
import pytorch_lightning as pl
import torch
from common import Net, fit, lines_of, make_data, make_net, read_lines
from torch.utils.data import DataLoader

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine import verdict
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.alarms import KINDS, Alarms
from geowatch.utils.lightning_ext.callbacks.plasticity_report import verdicts

EVERY_STEP = 'grad_mag@1,weight_mag@1,update_ratio@1,dead_units'


class Rate(Net):
    """ With a learning rate, and a loss that can be multiplied. """

    def __init__(self, lr=0.02, times=1., dead=0):
        super().__init__(dead=dead)
        self.lr, self.times = lr, times

    def loss(self, batch):
        return self.times * super().loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def warned(*args, **kwargs):
    """ Our warnings of a run, each by its first words and whole. """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        _, trainer, lines, _ = fit(*args, **kwargs)
    assert trainer.global_step == 10
    return [str(one.message) for one in caught if 'PlasticityMonitor: step' in str(one.message)], lines


# --- real runs -------------------------------------------------------------------

def test_a_run_that_is_well_hears_nothing(tmp_path):
    assert warned(tmp_path, PlasticityMonitor(EVERY_STEP), make_net(Rate))[0] == []


def test_numbers_that_are_not_finite(tmp_path):
    (said,), lines = warned(tmp_path, PlasticityMonitor('weight_mag@1'), make_net(Rate, lr=1e20))
    first = next(line['step'] for line in lines if line['value'] is None)
    assert said.startswith(
        f'PlasticityMonitor: step {first}: expected finite numbers, but weights of fc1, fc2, head are')
    assert 'a smaller learning rate or clip' in said


def test_gradients_that_are_not_finite(tmp_path):
    class Breaks(Rate):
        def loss(self, batch):
            loss = super().loss(batch)
            return loss * float('nan') if self.training and self.trainer.global_step == 3 else loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.)
    (said,), _ = warned(tmp_path, PlasticityMonitor('grad_mag@1'), make_net(Breaks))
    assert said.startswith('PlasticityMonitor: step 3: expected finite numbers, but gradients of fc1, fc2, head are')


def test_a_gradient_of_exactly_zero(tmp_path):
    said, lines = warned(tmp_path, PlasticityMonitor('grad_mag@1'), make_net(Rate, dead=16))
    assert [layer['value'] for layer in lines[0]['layers'].values()][0] == 0
    assert len(said) == 1 and said[0].startswith(
        'PlasticityMonitor: step 1: expected a gradient in each layer, but that of fc1, fc2 was exactly 0 in two')
    (said,), _ = warned(tmp_path, PlasticityMonitor('grad_norm@1'), make_net(Rate, times=0.))
    assert 'that of all layers was exactly 0' in said


def test_a_layer_that_begins_at_zero_is_none(tmp_path):
    net = make_net(Rate)
    torch.nn.init.zeros_(net.head.weight)  # so that those before it have no gradient in the first step
    said, lines = warned(tmp_path, PlasticityMonitor('grad_mag@1'), net)
    first, second = lines_of(lines, 'grad_mag')[:2]
    assert first['layers']['fc1']['value'] == 0 and second['layers']['fc1']['value'] > 0
    assert said == []


def test_dead_units(tmp_path):
    (said,), lines = warned(tmp_path, PlasticityMonitor('dead_units'), make_net(Rate, dead=12))
    assert lines[0]['layers']['act']['value'] == 0.75
    assert said.startswith('PlasticityMonitor: step 4: expected units that change from sample to sample, but 75% of '
                           'act are saturated on every one')
    assert warned(tmp_path, PlasticityMonitor('dead_units'), make_net(Rate, dead=8))[0] == []


def test_weights_that_do_not_move_in_bfloat16(tmp_path):
    monitor = PlasticityMonitor('update_ratio@1')
    (said,), lines = warned(tmp_path, monitor, make_net(Rate, lr=1e-5), precision='bf16-true',
                            loader=DataLoader(torch.randn(37, 8).bfloat16(), 8), validate=False)
    share = lines[1]['unmoved']
    assert share > 0.5
    assert said.startswith('PlasticityMonitor: step 1: expected a step to change all weights that have a gradient, but '
                           f'{share:.0%} of them stayed the same in two measurements in a row')
    assert 'the rounding of bfloat16' in said and "precision='bf16-mixed' instead of 'bf16-true'" in said
    # The same in float32, where they move; and at a rate of zero, which says so.
    assert warned(tmp_path, PlasticityMonitor('update_ratio@1'), make_net(Rate, lr=1e-5))[0] == []
    said, lines = warned(tmp_path, PlasticityMonitor('update_ratio@1'), make_net(Rate, lr=0.))
    assert lines[-1]['unmoved'] == 1 and said == []


def test_each_kind_is_said_once(tmp_path):
    class Dies(Rate):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.global_step == 2:
                with torch.no_grad():
                    self.fc1.bias.fill_(-100)
            if self.trainer.global_step == 8:
                with torch.no_grad():
                    self.head.weight.fill_(float('inf'))
    said, _ = warned(tmp_path, PlasticityMonitor(EVERY_STEP + '@1', source='train', samples=8), make_net(Dies))
    assert [line.partition(', but ')[0].removeprefix('PlasticityMonitor: ') for line in said] == [
        'step 2: expected units that change from sample to sample', 'step 3: expected a gradient in each layer',
        'step 8: expected finite numbers']


def test_other_processes_say_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(pl.Trainer, 'is_global_zero', False)
    assert warned(tmp_path, PlasticityMonitor('dead_units'), make_net(Rate, dead=12))[0] == []


def test_warnings_that_are_errors_are_printed(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='PlasticityMonitor')
        _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('dead_units'), make_net(Rate, dead=12))
    assert trainer.global_step == 10 and len(lines) == 2
    assert capsys.readouterr().out.count('PlasticityMonitor: step 4: expected units') == 1


def test_what_fails_in_it_costs_itself_only(tmp_path, monkeypatch, capsys):
    def fails(*args):
        raise RuntimeError('no rule')
    monkeypatch.setitem(KINDS, 'dead', (fails, fails))
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('dead_units'))
    assert trainer.global_step == 10 and len(lines) == 2
    assert capsys.readouterr().out.count('The warnings has failed') == 1


# --- lines -----------------------------------------------------------------------

def row(metric, step=0, columns=None, **layers):
    return {'metric': metric, 'step': step, 'value': 1., **(columns or {}), 'layers': layers}


@pytest.fixture
def said(monkeypatch):
    texts = []
    monkeypatch.setattr('geowatch.utils.lightning_ext.callbacks.plasticity_engine.alarms.warn', texts.append)
    return texts


def test_a_grad_scaler_may_overflow_now_and_then(said):
    trainer = types.SimpleNamespace(precision_plugin=types.SimpleNamespace(scaler=object()))
    alarms = Alarms(trainer)
    bad, good = {'value': None, 'nonfinite': 1.}, {'value': 1.}
    for step, layer in enumerate([bad, good, bad, good]):
        alarms.look({}, step, [row('grad_norm', fc=layer)])
    assert said == []
    alarms.look({}, 4, [row('grad_norm', fc=bad)])
    alarms.look({}, 5, [row('grad_norm', fc=bad)])
    assert len(said) == 1 and said[0].startswith('step 5: expected finite numbers')


def test_what_is_no_fault(said):
    alarms = Alarms(types.SimpleNamespace(precision_plugin=None))
    for step in range(3):
        alarms.look({}, step, [
            row('dead_units', act={'value': 1., 'no_sample': True}, other={'value': 0.5}),  # an expert without tokens
            row('noise_scale', fc={'value': None, 'fraction': 1.2}),
            row('update_ratio', columns={'unmoved': None, 'lr': [0.1]}, fc={'value': None, 'unmoved': None}),
            row('update_ratio', columns={'unmoved': 0.1, 'lr': [0.1]}, fc={'value': 1., 'unmoved': 0.9}),
            row('mine', fc={'value': 0.})])
    alarms.look({}, -1, [row('dead_units', act={'value': 0.9})])  # a few examples of the sanity check
    assert said == []


def test_many_layers_are_counted(said):
    alarms = Alarms(None)
    alarms.look({}, 7, [row('dead_units', **{f'act{i}': {'value': 0.6} for i in range(9)})])
    assert '60% of act0, 60% of act1, 60% of act2 and 6 more are saturated' in said[0]


# --- the end ---------------------------------------------------------------------

def ending(capsys):
    """ The last lines that are ours. """
    return [line for line in capsys.readouterr().out.splitlines() if 'this run' in line or 'measurement:' in line]


def test_a_run_ends_with_its_verdict_in_two_lines(tmp_path, capsys):
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('paper@1'), make_net(Rate, lr=1e20))
    word, numbers, command = ending(capsys)
    first = next(line['step'] for line in lines_of(lines, 'weight_mag') if line['value'] is None)
    assert word.startswith('Plasticity of this run: diverged: ') and word.endswith(f' from step {first} on')
    assert numbers.startswith('From its first to its last measurement: weight magnitude 0.14')
    assert command.startswith('To see the plasticity of this run: ')


def test_verdict_is_on_what_was_measured(tmp_path, monkeypatch, capsys):
    class Logs(Rate):
        def training_step(self, batch, batch_idx):
            self.log('mine', float(self.trainer.global_step))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.log('val_loss', self.loss(batch))

    seen = []

    def judge(runs, under=None):
        seen.extend(runs)
        return [verdicts.Verdict('slow', 'it is', at=3)]
    monkeypatch.setattr(verdicts, 'judge', judge)
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('paper@1'), make_net(Logs), log_every_n_steps=1)
    (run,) = seen
    lines = read_lines(trainer, start=True)
    assert run.metrics.keys() == {line['metric'] for line in lines}
    for name, points in run.metrics.items():
        assert [(p.step, p.epoch, p.value, p.samples) for p in points] == [
            (line['step'], line['epoch'], line['value'], line['samples']) for line in lines_of(lines, name)]
    # The loss of the fresh network on its first batch, and those of the batches that are looked at.
    assert list(run.scalars['train_loss']) == list(range(10))
    assert run.scalars['train_loss'][0] == pytest.approx(make_net(Logs).loss(make_data()[:8]).item())
    assert run.scalars['val_loss'][9] == pytest.approx(trainer.callback_metrics['val_loss'].item())
    assert run.scalars['mine'][9] == 9
    assert ending(capsys)[0] == 'Plasticity of this run: slow at step 3: it is'


def test_a_verdict_that_fails_ends_nothing(tmp_path, monkeypatch, capsys):
    def judge(*args):
        raise RuntimeError('no rules')
    monkeypatch.setattr(verdicts, 'judge', judge)
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor())
    assert trainer.global_step == 10 and lines
    out = capsys.readouterr().out
    assert out.count('there is no verdict, since it has failed') == 1 and 'no rules' in out
    assert 'To see the plasticity of this run' in out


def test_without_a_start_there_is_none(tmp_path, capsys):
    """ As of a run that goes on: the fresh network is not known. """
    fit(tmp_path, PlasticityMonitor('grad_mag@1'))
    assert len(ending(capsys)) == 1


def test_curves_are_short_whatever_the_run(tmp_path, capsys):
    trainer = pl.Trainer(logger=False, accelerator='cpu', default_root_dir=tmp_path)
    curves = verdict.Curves(trainer)
    for step in range(-1, 10_000):
        curves.add({}, step, [{'metric': 'weight_mag', 'step': step, 'epoch': 0, 'value': 1., 'samples': None,
                               'time': 0., 'layers': {}}])
    (curve,) = curves._metrics.values()
    assert len(curve) <= verdict.MOST_POINTS
    assert list(curve)[0] == -1 and list(curve)[-1] == 9_999
    assert curves.verdict()
