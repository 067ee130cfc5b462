"""
Runs and their files: each has its own, wherever it lies, and its lines say which run they are of.
"""
import copy
import json
import pickle
import warnings
from pathlib import Path

import fsspec
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from common import Net, fit, lines_of, make_data, make_net, read_lines
from pytorch_lightning.callbacks import Callback, LearningRateFinder
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.tuner import Tuner
from torch.utils.data import DataLoader

from geowatch.cli.fit import FitCLI
from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_report.runs import load_runs


class Service(Logger):
    """ Has one folder for all of its runs, as those of WandB or MLflow. """
    name = 'project'

    def __init__(self, save_dir, version):
        super().__init__()
        self._save_dir, self._version = str(save_dir), version

    save_dir = property(lambda self: self._save_dir)
    version = property(lambda self: self._version)

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, *args, **kwargs):
        pass


class Crash(Callback):
    """ Saves after four steps and fails after six. """

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 4:
            trainer.save_checkpoint(self.path)
        if trainer.global_step == 6:
            raise RuntimeError('its own cause')


def train(root, ckpt_path=None, callbacks=(), monitors=None, epochs=1, **kwargs):
    trainer = pl.Trainer(**{
        'default_root_dir': root, 'logger': False, 'max_epochs': epochs, 'accelerator': 'cpu',
        'enable_progress_bar': False, 'enable_model_summary': False, 'enable_checkpointing': False,
        'callbacks': [*(monitors or [PlasticityMonitor('weight_mag@1')]), *callbacks], **kwargs})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer.fit(make_net(), DataLoader(make_data(40), batch_size=5), ckpt_path=ckpt_path)
    return trainer


def files(root):
    """ The lines of each file below a folder, by its path. """
    return {fpath.relative_to(root).as_posix(): [json.loads(line) for line in fpath.read_text().splitlines()]
            for fpath in Path(root).rglob('*.jsonl')}


def steps(lines):
    return [line['step'] for line in lines]


# --- which file -----------------------------------------------------------------

def test_runs_in_one_folder_each_have_a_file(tmp_path):
    for _ in range(3):
        train(tmp_path)
    found = files(tmp_path)
    runs = [{line['run'] for line in lines} for lines in found.values()]
    assert [len(own) for own in runs] == [1, 1, 1] and len(set.union(*runs)) == 3
    assert [steps(lines) for lines in found.values()] == [list(range(-1, 8))] * 3
    assert set(found) == {'plasticity.jsonl', *(f'{found[path][0]["run"]}/plasticity.jsonl' for path in found
                                                if '/' in path)}


def test_runs_of_a_logger_with_one_folder(tmp_path):
    for version in ('a', 'b', 'b', 3):
        train(tmp_path, logger=Service(tmp_path, version))
    found = files(tmp_path)
    again = [path for path in found if path.startswith('project/b/') and path.count('/') == 3]
    assert set(found) == {'plasticity.jsonl', 'project/b/plasticity.jsonl', *again,
                          'project/version_3/plasticity.jsonl'} and len(again) == 1
    assert all(steps(lines) == list(range(-1, 8)) for lines in found.values())


def test_a_resumed_run_leaves_the_lines_of_others(tmp_path):
    with pytest.raises(RuntimeError, match='its own cause'):
        train(tmp_path, callbacks=[Crash(tmp_path / 'one.ckpt')])
    (first,) = files(tmp_path)
    train(tmp_path)
    before = files(tmp_path)
    train(tmp_path, ckpt_path=tmp_path / 'one.ckpt')
    after = files(tmp_path)
    assert set(after) == set(before)
    for path, lines in after.items():
        assert (lines == before[path]) == (path != first)
    assert steps(after[first]) == list(range(-1, 8))
    assert len({line['run'] for line in after[first]}) == 1


def test_runs_that_share_a_version_of_a_logger(tmp_path):
    """ They write to one file, of which a resumed run drops its own lines only. """
    logger = {'logger': CSVLogger(tmp_path, name='run', version=0)}
    with pytest.raises(RuntimeError, match='its own cause'):
        train(tmp_path, callbacks=[Crash(tmp_path / 'one.ckpt')], **logger)
    for ckpt_path in (None, tmp_path / 'one.ckpt'):
        train(tmp_path, ckpt_path=ckpt_path, logger=CSVLogger(tmp_path, name='run', version=0))
    ((_, lines),) = files(tmp_path).items()
    by_run = {}
    for line in lines:
        by_run.setdefault(line['run'], []).append(line['step'])
    assert sorted(map(sorted, by_run.values())) == [list(range(-1, 8))] * 2
    runs, _ = load_runs([tmp_path])
    assert [run.name for run in runs] == ['run (1)', 'run (2)']
    assert [[point.step for point in run.metrics['weight_mag']] for run in runs] == [list(range(-1, 8))] * 2


def test_a_run_that_goes_on_elsewhere_is_one_run(tmp_path):
    with pytest.raises(RuntimeError, match='its own cause'):
        train(tmp_path / 'a', callbacks=[Crash(tmp_path / 'one.ckpt')])
    train(tmp_path / 'b')
    train(tmp_path / 'c', ckpt_path=tmp_path / 'one.ckpt')
    runs, _ = load_runs([tmp_path])
    assert [[folder.name for folder in run.folders] for run in runs] == [['a', 'c'], ['b']]
    assert [point.step for point in runs[0].metrics['weight_mag']] == list(range(-1, 8))


def test_older_lines_of_two_runs(tmp_path):
    """ They do not say of which run they are. """
    lines = [{'metric': name, 'step': step, 'epoch': step // 4, 'time': 0., 'samples': None, 'layers': {},
              'value': float(start + step)}
             for start, until in ((0, 8), (100, 6)) for step in range(3, until, 2) for name in ('erank', 'weight_mag')]
    (tmp_path / 'plasticity.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    runs, _ = load_runs([tmp_path])
    assert [[point.value for point in run.metrics['erank']] for run in runs] == [[3., 5., 7.], [103., 105.]]
    assert all('2 runs have written' in ' '.join(run.notes) for run in runs)
    assert len({run.name for run in runs}) == 2


def test_several_monitors(tmp_path):
    def monitors():
        return [PlasticityMonitor('weight_mag@1', layers='fc1'), PlasticityMonitor('weight_mag@1', layers='head')]
    with pytest.raises(RuntimeError, match='its own cause'):
        train(tmp_path, monitors=monitors(), callbacks=[Crash(tmp_path / 'one.ckpt')])
    train(tmp_path, monitors=monitors(), ckpt_path=tmp_path / 'one.ckpt')
    found = files(tmp_path)
    assert set(found) == {'plasticity.jsonl', 'monitor_2/plasticity.jsonl'}
    for path, layer in (('plasticity.jsonl', 'fc1'), ('monitor_2/plasticity.jsonl', 'head')):
        assert steps(found[path]) == list(range(-1, 8))
        assert {tuple(line['layers']) for line in found[path]} == {(layer,)}
    states = torch.load(tmp_path / 'one.ckpt', weights_only=True)['callbacks']
    assert len([key for key in states if key.startswith('PlasticityMonitor')]) == 2


def test_a_run_stays_itself_with_other_settings(tmp_path):
    with pytest.raises(RuntimeError, match='its own cause'):
        train(tmp_path, callbacks=[Crash(tmp_path / 'one.ckpt')])
    train(tmp_path, monitors=[PlasticityMonitor('weight_mag@1,erank@1')], ckpt_path=tmp_path / 'one.ckpt')
    ((_, lines),) = files(tmp_path).items()
    assert steps(lines_of(lines, 'weight_mag')) == list(range(-1, 8)) and len({line['run'] for line in lines}) == 1
    assert PlasticityMonitor().state_key == 'PlasticityMonitor'


# --- where --------------------------------------------------------------------------

class Whole(fsspec.get_filesystem_class('memory')):
    """ A store of whole objects, to which nothing can be added. """
    protocol = 'whole'
    store, pseudo_dirs = {}, ['']

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace('whole://', 'memory://'))

    def _open(self, path, mode='rb', **kwargs):
        if 'a' in mode:
            raise NotImplementedError
        return super()._open(path, mode, **kwargs)


@pytest.mark.parametrize('protocol', ['memory', 'whole'])
def test_remote_folders(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    fsspec.register_implementation('whole', Whole, clobber=True)
    store = fsspec.filesystem(protocol)
    with pytest.raises(RuntimeError, match='its own cause'):
        train(f'{protocol}://bucket/run', callbacks=[Crash(tmp_path / 'one.ckpt')])
    train(f'{protocol}://bucket/run')
    train(f'{protocol}://bucket/run', ckpt_path=tmp_path / 'one.ckpt')
    found = [[json.loads(line) for line in store.cat_file(path).splitlines()]
             for path in sorted(store.find('/bucket')) if path.endswith('.jsonl')]
    store.rm('/bucket', recursive=True)
    assert [steps(lines) for lines in found] == [list(range(-1, 8))] * 2
    assert [len({line['run'] for line in lines}) for lines in found] == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ['one.ckpt']


def test_a_remote_folder_that_fails_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fsspec.register_implementation('whole', Whole, clobber=True)
    for method in ('pipe_file', 'touch', 'makedirs'):
        def fails(*args, **kwargs):
            raise RuntimeError('no credentials')
        monkeypatch.setattr(Whole, method, fails)
    with pytest.warns(UserWarning, match='cannot be written now .no credentials'):
        trainer = pl.Trainer(
            default_root_dir='whole://bucket/run', logger=False, max_epochs=1, accelerator='cpu',
            enable_progress_bar=False, enable_checkpointing=False, callbacks=[PlasticityMonitor('weight_mag@1')])
        trainer.fit(make_net(), DataLoader(make_data(40), batch_size=5))
    assert trainer.global_step == 8 and not list(tmp_path.iterdir())


# --- arguments, and copies ------------------------------------------------------------

def test_what_stands_for_lists_and_numbers():
    omegaconf = pytest.importorskip('omegaconf', reason='omegaconf is not installed: its lists were not tried')
    names = ['weight_mag', 'erank@2']
    for sequence in (tuple(names), omegaconf.ListConfig(names)):
        monitor = PlasticityMonitor(sequence, layers=sequence[:1], samples=np.int64(12), interval=np.int32(3),
                                    budget=np.float64(0.02))
        assert monitor._settings.intervals == {'weight_mag': np.int32(3), 'erank': '2'}
        assert monitor._settings.samples == 12 and type(monitor._settings.samples) is int
        assert monitor._settings.patterns[0].match('weight_mag')
        pickle.loads(pickle.dumps(monitor))


@pytest.mark.parametrize('args', [
    ['--plasticity-metrics', 'erank', '--plasticity-per-layer'],
    ['--plasticity-metrics=erank', '--plasticity_per_layer']])
def test_flags_with_dashes(args):
    config, others = FitCLI.parse([*args, '--trainer.max_steps=4', '--my-own=x'])
    assert others == ['--trainer.max_steps=4', '--my-own=x']
    assert (config.plasticity_metrics, config.plasticity_per_layer) == ('erank', True)


@pytest.mark.parametrize('kwargs', [
    {}, {'budget': '2%'}, {'metrics': 'all', 'layers': 'fc*,head'}, {'interval': '5 minutes', 'source': 'train'},
    {'per_layer': True, 'prog_bar': True}], ids=str)
def test_copies_before_in_and_after_a_fit(tmp_path, kwargs):
    copies = []

    class Copies(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            monitor = trainer.callbacks[0]
            copies.extend([pickle.loads(pickle.dumps(monitor)), copy.deepcopy(monitor)])
    monitor = PlasticityMonitor(**kwargs)
    copies.append(copy.deepcopy(monitor))
    _, _, lines, _ = fit(tmp_path / 'a', monitor, callbacks=[Copies()], max_epochs=1, n=16)
    copies.append(pickle.loads(pickle.dumps(monitor)))
    assert len(copies) == 6
    _, _, again, _ = fit(tmp_path / 'b', copies[2], max_epochs=1, n=16)
    changes = {'time': 0., 'run': '', 'value': 0., 'intervals': {}}
    assert [{**line, **changes} for line in again if line['metric'] != 'overhead'] == [
        {**line, **changes} for line in lines if line['metric'] != 'overhead']
    assert lines[0]['run'] != again[0]['run']


# --- silence ----------------------------------------------------------------------------

class Rate(Net):
    lr, batch_size = 0.01, 4

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return DataLoader(make_data(40), batch_size=self.batch_size)

    val_dataloader = train_dataloader


@pytest.mark.parametrize('tune', [
    lambda tuner, net: tuner.lr_find(net, num_training=8),
    lambda tuner, net: tuner.scale_batch_size(net, max_trials=1, steps_per_trial=1)], ids=['lr_find', 'batch size'])
def test_a_tuner_alone_is_silent(tmp_path, tune, monkeypatch, capsys, recwarn):
    monkeypatch.chdir(tmp_path)
    trainer = pl.Trainer(callbacks=[PlasticityMonitor()], max_epochs=1, accelerator='cpu', logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    tune(Tuner(trainer), make_net(Rate))
    said = capsys.readouterr()
    assert 'plasticity' not in (said.out + said.err + ''.join(str(each.message) for each in recwarn)).lower()
    assert files(tmp_path) == {}


def test_a_tuner_in_a_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    net = make_net(Rate)
    callbacks = [PlasticityMonitor('weight_mag@1'), LearningRateFinder(num_training_steps=5)]
    trainer = pl.Trainer(default_root_dir=tmp_path, callbacks=callbacks, max_epochs=1, accelerator='cpu', logger=False,
                         enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(net)
    assert steps(read_lines(trainer, start=True)) == list(range(-1, 10))
    assert capsys.readouterr().out.count('PlasticityMonitor: weight_mag') == 1
