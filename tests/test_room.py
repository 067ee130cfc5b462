"""
A full disk: it is not our event at which TensorBoard's writer breaks, for the host uses it too.
"""
import errno
import time

import pytest
from common import Net, fit, lines_of, make_net
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine import lines, room

event_accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator',
                                        reason='tensorboard is not installed')


class Logs(Net):
    """ Logs at the first step of each epoch. """

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 0:
            self.logger.experiment.add_scalar('loss', loss, self.trainer.global_step)
        return loss


class Disk(Callback):
    """ Full after some steps. """

    def __init__(self, patch, steps, found_by):
        from tensorboard.compat.tensorflow_stub.io import gfile
        self.steps, self.is_full = steps, False
        append = gfile.LocalFileSystem.append

        def appends(fs, *args):
            if self.is_full:
                raise OSError(errno.ENOSPC, 'no space')
            append(fs, *args)

        def opens(*args, **kwargs):
            if self.is_full:
                raise OSError(errno.ENOSPC, 'no space')
            return open(*args, **kwargs)
        patch.setattr(gfile.LocalFileSystem, 'append', appends)
        if found_by == 'file':
            patch.setattr(lines, 'open', opens, raising=False)
        else:
            patch.setattr(room, 'free_bytes', lambda folder: 0 if self.is_full else float('inf'))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        # What the host has logged is on disk before, so that it has nothing to lose.
        if not self.is_full:
            trainer.logger.experiment.flush()
        self.is_full = trainer.global_step in self.steps
        time.sleep(0.01)  # for the thread to write


@pytest.mark.parametrize('found_by', ['file', 'system'])
def test_our_event_is_not_the_one_that_breaks_the_logger(tmp_path, found_by, monkeypatch, capsys):
    logger = TensorBoardLogger(str(tmp_path), flush_secs=0)
    with pytest.warns(UserWarning, match='is full: TensorBoard gets'):
        _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1'), make_net(Logs), logger=logger,
                               callbacks=[Disk(monkeypatch, (2, 3), found_by)])
    assert trainer.global_step == 10
    events = event_accumulator.EventAccumulator(logger.log_dir).Reload()
    assert [event.step for event in events.Scalars('loss')] == [0, 5]
    assert [event.step for event in events.Scalars('plasticity/weight_mag')] == list(range(-1, 10))
    assert 'Traceback' not in capsys.readouterr().out


def test_a_disk_that_stays_full(tmp_path, monkeypatch):
    logger = TensorBoardLogger(str(tmp_path), flush_secs=0)
    monkeypatch.setattr(room, 'free_bytes', lambda folder: room.LEAST - 1)
    with pytest.warns(UserWarning, match='TensorBoardLogger has not got the last 11 measurements: there was no room'):
        _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1'), make_net(Logs), logger=logger)
    assert trainer.global_step == 10 and len(lines_of(lines, 'weight_mag')) == 10
    events = event_accumulator.EventAccumulator(logger.log_dir).Reload()
    assert [event.step for event in events.Scalars('loss')] == [0, 5]
    assert 'plasticity/weight_mag' not in events.Tags()['scalars']


def test_how_much_room_there_is(tmp_path):
    import shutil
    free = shutil.disk_usage(tmp_path).free
    assert room.free_bytes(tmp_path / 'not' / 'there') == pytest.approx(free, rel=0.5)
    assert room.free_bytes(tmp_path / ('x' * 300)) == float('inf')
