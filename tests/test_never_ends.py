"""
Nothing of ours ends a run: whatever fails, wherever it fails, training goes on as without the monitor.
"""
import json
import warnings

import pytest
import pytorch_lightning as pl
import torch
from common import Recorder, fit, lines_of, make_data, make_net
from pytorch_lightning.callbacks import ModelCheckpoint
from test_faults import everything, left_behind
from torch.utils.data import DataLoader

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.budget import Budget
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.fit import Fit
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.memory import Memory
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import PlasticityConfigError, Words, metric

HOOKS = [name for name in vars(Fit)
         if not name.startswith('_') and name not in ('give_up', 'drop_repeated_lines', 'fail')]


@pytest.mark.parametrize('hook', ['__init__', *HOOKS])
def test_a_fault_outside_of_any_metric(tmp_path, hook, monkeypatch, capsys):
    """ Of each method that a hook of Lightning calls. """
    before = getattr(Fit, hook)

    def fails(self, *args):
        before(self, *args)
        raise RuntimeError('a fault of ours')
    monkeypatch.setattr(Fit, hook, fails)
    keeper = ModelCheckpoint(tmp_path / 'saved', every_n_train_steps=5)
    net, trainer, _, _ = fit(tmp_path, everything(), callbacks=[keeper], max_epochs=1)
    assert trainer.global_step == 5 and not left_behind()
    if hook != 'load_state_dict':  # there is nothing to load
        assert capsys.readouterr().out.count('Traceback') == 1
    without, _, _, _ = fit(tmp_path, pl.Callback(), max_epochs=1)
    assert all(torch.equal(x, y) for x, y in zip(net.parameters(), without.parameters(), strict=True))


def test_a_folder_that_cannot_be_searched(tmp_path, capsys):
    """ A name beyond what the system takes, which not even root can look for. """
    logger = Recorder(tmp_path / ('x' * 300))
    with pytest.warns(UserWarning, match='cannot be written'):
        _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1'), logger=logger)
    assert trainer.global_step == 10 and len(logger.table()) == 10
    assert 'Traceback' not in capsys.readouterr().out


DEEP = '{"a":' * 50_000


@pytest.mark.parametrize('garbage', [
    DEEP + '\n', '\0\xff\n', '[1]\n3\nnull\n{"step": {}, "time": []}\n', '{"time": "x"}\n'],
    ids=['deep', 'bytes', 'others', 'text'])
def test_a_run_that_goes_on_beside_garbage(tmp_path, garbage):
    keeper = ModelCheckpoint(tmp_path / 'saved', every_n_train_steps=5, save_top_k=-1)
    logger = Recorder(tmp_path / 'logs')
    fit(tmp_path, PlasticityMonitor('weight_mag@1'), callbacks=[keeper], logger=logger, max_epochs=1)
    fpath = tmp_path / 'logs' / 'plasticity.jsonl'
    with open(fpath, 'a', encoding='latin-1') as file:
        file.write(garbage + DEEP)  # the last line without an end, as after a kill
    trainer = pl.Trainer(default_root_dir=tmp_path, max_epochs=2, accelerator='cpu', enable_progress_bar=False,
                         callbacks=[PlasticityMonitor('weight_mag@1')], enable_model_summary=False, logger=logger)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer.fit(make_net(), DataLoader(make_data(), batch_size=8), ckpt_path=keeper.best_model_path)
    assert trainer.global_step == 10
    ours = [row for row in fpath.read_text(encoding='latin-1').splitlines() if row.startswith('{"metric"')]
    assert [json.loads(row)['step'] for row in ours] == list(range(-1, 10))


def deep(levels=5000):
    found = []
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize('saved', [
    deep(), [1, 2], {'m': [[1, 2, deep()]]}, {'m': [['weights', 'abs', {'fc1': deep()}]]}, {'m': 3}], ids=range(5))
def test_memory_that_cannot_be_read(saved):
    memory = Memory(saved)
    assert not memory.before and not memory.skipped and not memory.state_dict()


@pytest.mark.parametrize('state', [
    [1], 'text', 7, {'schedules': [1], 'memory': deep(50)},
    {'schedules': {'weight_mag': {'next': -1, 'epoch': 'x', 'left': 10 ** 400}}}], ids=range(5))
def test_state_that_cannot_be_read(tmp_path, state):
    monitor = PlasticityMonitor('weight_mag@1 s')

    class Loads(pl.Callback):
        def on_fit_start(self, trainer, module):
            pass

        def setup(self, trainer, module, stage):
            monitor.load_state_dict(state)
    _, trainer, lines, _ = fit(tmp_path, monitor, callbacks=[Loads()])
    assert trainer.global_step == 10 and lines_of(lines, 'weight_mag')


@pytest.mark.parametrize('budget', ['1e-320', '1e-300', 5e-324, '0.0000001 %'])
def test_a_budget_that_allows_next_to_nothing(tmp_path, budget):
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1,erank@1', budget=budget))
    assert trainer.global_step == 10
    assert [line['step'] for line in lines_of(lines, 'weight_mag')] == [0]  # once, and then never again
    plan = Budget(budget).plan({'seconds': 1., 'spent': {'a': 5.}, 'counts': {'a': 1}}, 1, {'a': 1})
    assert plan[1]['a'] > 1e6


# --- metrics of users ----------------------------------------------------------


@pytest.mark.parametrize('words', [Words('t', grows=object()), Words('t', why=b'bytes'), Words('')])
def test_words_that_are_no_words(tmp_path, words):
    @metric(needs='weights.abs', words=words)
    def odd(total):
        return total
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('odd@1,weight_mag@1'))
    assert trainer.global_step == 10
    assert [line['step'] for line in lines_of(lines, 'weight_mag')] == list(range(10))


@pytest.mark.parametrize('name', ['größe', '__class__', '_', 'A1', 'x' * 300])
def test_names_of_metrics(tmp_path, name):
    def formula(total):
        return total
    formula.__name__ = name
    metric(needs='weights.abs', network='sum', every='log')(formula)
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor(f'{name}@1'))
    assert trainer.global_step == 10
    assert [line['step'] for line in lines_of(lines, name)] == list(range(10))
    assert float(trainer.callback_metrics[f'plasticity/{name}']) > 0


@pytest.mark.parametrize('name', ['a b', '', 'a/b', 'a@1', 'a,b', 'all', 'paper', None])
def test_names_of_metrics_that_are_refused(name):
    def formula(total):
        return total
    if name is None:  # as functools.partial has none
        class Formula:
            def __call__(self, total):
                return total
        formula = Formula()
    else:
        formula.__name__ = name
    with pytest.raises(PlasticityConfigError, match="Expected a metric's name"):
        metric(needs='weights.abs')(formula)


@pytest.mark.parametrize('returned', [[1., 2.], (3.,), {'value': [1.]}, {'value': 1., 'more': {}}, {1: 2.}, 'x'])
def test_formulas_that_return_no_number(tmp_path, returned, capsys):
    @metric(needs='weights.abs', every='log')
    def odd(total):
        return returned
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('odd@1,weight_mag@1'))
    assert trainer.global_step == 10 and not lines_of(lines, 'odd') and len(lines_of(lines, 'weight_mag')) == 10
    assert 'Expected the formula of' in capsys.readouterr().out
