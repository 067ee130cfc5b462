"""
TensorBoard's HParams tab: a row for each run, with its settings and the last values of what is measured.

TensorBoard heeds the first summary of a run, and Lightning writes one at the
start in which there is no metric but a placeholder. What is ours is in a file
of its own, whose name comes before that of any other event file, so that it is
read first whenever it is written: also when it turns out during the run which
losses there are. The logger's writer has no part in it.
"""
import argparse
import enum
import io
import numbers
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from ..plasticity_metrics import METRICS
from ..plasticity_report.scalars import direction, is_validation
from .lightning import logged_names, monitored_by, optimizers_of, settings_of, train_batch_size
from .say import warn

# Before events.out.tfevents.<seconds since 1970>, as strings are sorted.
FILE = 'events.out.tfevents.0.plasticity'
MOST_SETTINGS = 100
MOST_COLUMNS = 30
MOST_NAMED = 20
MOST_CHARACTERS = 200
FIRST = ('plasticity/dead_units', 'plasticity/feature_erank', 'plasticity/erank')
# What runs are sorted by first: shown before the others.
TUNED = {'lr': ('lr', 'learning_rate', 'step_size'), 'batch_size': ('batch_size',),
         'optimizer': ('optimizer', 'optim', 'optimizer_name')}


class HParams:
    """
    The row of one run in TensorBoard's HParams tab.

    Args:
        trainer (Trainer): with its model
        logger (TensorBoardLogger): of either package
        tags (List[str]): what is measured, under ``plasticity/``

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.hparams import experiment_of
        >>> experiment = experiment_of({'lr': 0.1}, ['val_loss', 'plasticity/erank'])
        >>> [info.name.tag for info in experiment.metric_infos], experiment.hparam_infos[0].name
        (['val_loss', 'plasticity/erank'], 'lr')
    """

    def __init__(self, trainer, logger, tags):
        self._trainer = trainer
        self._logger = logger
        self._tags = [f'plasticity/{tag}' for tag in tags]
        self._settings = {}   # as they were when they were first known
        self._written = None  # what the file says
        self._start = time.time()
        self._warned = False

    def log(self, scalars=None, step=0, rows=()):
        """ Write the file, if more is known by now; what cannot be written is tried again. The arguments count not. """
        self._settings = {**settings_of_run(self._trainer), **self._settings}
        known = self._settings, columns_of(self._trainer, self._tags)
        if known == self._written:
            return
        try:
            data = _events(*known, self._start)
        except ImportError:  # the logger writes with tensorboardX, which has no such tab
            self._written = known
            return
        try:
            _replace(os.path.join(self._logger.log_dir, FILE), data)
            self._written = known
        except OSError as ex:
            if not self._warned:
                self._warned = True
                warn(f"the file for TensorBoard's HParams tab cannot be written now ({ex}); it is tried again")


def settings_of_run(trainer):
    """
    What the host has saved as hyperparameters, and of learning rate, batch size and optimizer what it has not.

    Args:
        trainer (Trainer): with its model

    Returns:
        Dict[str, float | bool | str]:
    """
    settings = plain_settings(settings_of(trainer))
    optimizers = optimizers_of(trainer)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    found = {'lr': groups[0].get('initial_lr', groups[0].get('lr')) if groups else None,
             'batch_size': train_batch_size(trainer),
             'optimizer': type(optimizers[0]).__name__ if optimizers else None}
    own = {key: value for key, value in found.items() if not any(_last(name) in TUNED[key] for name in settings)}
    return {**plain_settings(own), **settings}


def columns_of(trainer, tags):
    """
    The tags whose last values are in the table. Its first five are shown unless one asks for more.

    Args:
        trainer (Trainer):
        tags (List[str]): ours

    Returns:
        List[str]: at most MOST_COLUMNS: what validation says or a loss, ours, all else
    """
    theirs = sorted(dict.fromkeys([*logged_names(trainer), *monitored_by(trainer.callbacks)]).keys() - set(tags),
                    key=lambda name: (_interest(name), name))
    first = [name for name in theirs if _interest(name) < 3][:2]
    ours = sorted(tags, key=lambda tag: FIRST.index(tag) if tag in FIRST else len(FIRST))
    return [*first, *ours, *(name for name in theirs if name not in first)][:MOST_COLUMNS]


def _interest(name):
    """ Small for what interests most: the loss of validation, its scores, other losses and scores, all else. """
    tells, validates = direction(name), is_validation(name)
    rank = 3 if not tells else 2 if not validates else 0 if tells < 0 else 1
    return rank + 0.5 * name.endswith('_step')


def experiment_of(settings, columns):
    """
    The names of all columns, which TensorBoard takes from the first run of a table.

    Args:
        settings (Dict[str, float | bool | str]):
        columns (List[str]): tags

    Returns:
        Experiment: of TensorBoard's HParams plugin
    """
    from tensorboard.plugins.hparams import api_pb2
    first = {key for names in TUNED.values() for key in settings if _last(key) in names}
    infos = []
    for key, value in settings.items():
        kind = ('DATA_TYPE_BOOL' if isinstance(value, bool) else
                'DATA_TYPE_FLOAT64' if isinstance(value, float) else 'DATA_TYPE_STRING')
        infos.append(api_pb2.HParamInfo(name=key, type=getattr(api_pb2, kind)))
        if 'differs' in api_pb2.HParamInfo.DESCRIPTOR.fields_by_name:  # those come first
            infos[-1].differs = key in first
    metrics = []
    for tag in columns:
        words = METRICS[name].words if (name := tag.removeprefix('plasticity/')) in METRICS else None
        metrics.append(api_pb2.MetricInfo(
            name=api_pb2.MetricName(tag=tag), display_name=words.title if words else tag,
            description=words.about if words else ''))
    return api_pb2.Experiment(hparam_infos=infos, metric_infos=metrics)


def _last(key):
    return key.replace('/', '.').rpartition('.')[2]


def _events(settings, columns, start):
    """ The bytes of an event file. """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter
    session = plugin_data_pb2.SessionStartInfo(start_time_secs=start)
    for key, value in settings.items():
        kind = 'bool_value' if isinstance(value, bool) else 'number_value' if isinstance(value, float) else (
            'string_value')
        setattr(session.hparams[key], kind, value)
    said = {metadata.EXPERIMENT_TAG: {'experiment': experiment_of(settings, columns)},
            metadata.SESSION_START_INFO_TAG: {'session_start_info': session}}
    file = io.BytesIO()
    writer = RecordWriter(file)
    writer.write(Event(wall_time=start, file_version='brain.Event:2').SerializeToString())
    for tag, own in said.items():
        value = Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(
            plugin_data_pb2.HParamsPluginData(**own)))
        writer.write(Event(wall_time=start, summary=Summary(value=[value])).SerializeToString())
    return file.getvalue()


def _replace(path, data):
    """ Write a file at one go, so that nobody reads half of it. """
    if '://' in path:
        from fsspec.core import url_to_fs
        files, place = url_to_fs(path)
        try:
            files.makedirs(files._parent(place), exist_ok=True)
            files.pipe_file(place, data)
        except Exception as ex:  # each store has its own
            raise OSError(str(ex)) from ex
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name('plasticity_hparams.part')
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def plain_settings(settings):
    """
    Settings as flat keys and plain values.

    Args:
        settings (Dict): of any kind, nested

    Returns:
        Dict[str, float | bool | str]: what is none of these is a text of at most MOST_CHARACTERS; None is left out

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.hparams import plain_settings
        >>> plain_settings({'lr': 1, 'net': {'relu': True, 'sizes': [8, 4]}, 'seed': None})
        {'lr': 1.0, 'net/relu': True, 'net/sizes': '[8, 4]'}
    """
    found = {}

    def add(prefix, value):
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if not str(key).startswith('_'):  # of LightningCLI
                    add(f'{prefix}/{key}' if prefix else str(key), inner)
        elif prefix and value is not None and len(found) < MOST_SETTINGS:
            is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            found[_text(prefix)] = value if isinstance(value, bool) else float(value) if is_number else _short(value)

    add('', settings)
    return found


def _short(value):
    if isinstance(value, (list, tuple, set)):
        is_plain = len(value) <= MOST_NAMED and all(isinstance(x, (str, numbers.Real, type(None))) for x in value)
        return _text(value) if is_plain else f'{type(value).__name__} of {len(value)}'
    if isinstance(value, (str, os.PathLike, enum.Enum, torch.dtype)):
        return _text(value)
    return _text(getattr(value, '__name__', type(value).__name__))  # all numbers of a tensor are no setting


def _text(value):
    """ A short one, which can be encoded. """
    text = str(value).encode('utf-8', 'replace').decode()
    return text if len(text) <= MOST_CHARACTERS else f'{text[:MOST_CHARACTERS - 1]}\u2026'
