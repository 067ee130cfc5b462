"""
The scalars of one measurement as one event of TensorBoard, each tag with a word on how to read it.
"""
from .dashboard import how_to_read, prefix_of


class Events:
    """
    Writes scalars for one TensorBoardLogger.

    All tags of a measurement are one event of the logger's own writer. A
    logger or a writer of somebody's own class gets them through
    ``log_metrics``, as any logger does. The first event of a tag says how to
    read it, which TensorBoard shows above the chart.

    Args:
        logger (TensorBoardLogger): of either package

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.events import Events
        >>> from pytorch_lightning.loggers import TensorBoardLogger
        >>> from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        >>> import ubelt as ub
        >>> logger = TensorBoardLogger(ub.Path.appdir('geowatch/tests/events').delete())
        >>> Events(logger).log({'plasticity/erank': 30.0, 'plasticity/dead_units': 0.5}, 9)
        >>> logger.finalize('success')
        >>> events = EventAccumulator(logger.log_dir).Reload()
        >>> events.Scalars('plasticity/erank')[0].value, events.Scalars('plasticity/dead_units')[0].step
        (30.0, 9)
        >>> events.SummaryMetadata('plasticity/erank').summary_description[:14]
        'directions tha'
    """

    def __init__(self, logger):
        self._logger = logger
        self._is_own = not _comes_with_lightning(type(logger).log_metrics)
        self._prefix = prefix_of(logger)
        self._described = set()

    def log(self, scalars, step, band=None):
        """
        Args:
            scalars (Dict[str, float]): by tag
            step (int): on the x-axis
            band (Dict[str, float] | None): further ones, for charts of TensorBoard only: the host draws a picture
                for each scalar of the old kind
        """
        writer = self._logger.experiment
        if self._is_own or type(writer).__module__ != 'torch.utils.tensorboard.writer':
            self._logger.log_metrics(scalars, step=step)
            return
        from tensorboard.compat.proto.summary_pb2 import Summary
        told = [tag for tag in (*scalars, *(band or ())) if tag not in self._described]
        self._described.update(told)
        values = [Summary.Value(tag=self._prefix + tag) for tag in told]
        for tag, value in zip(told, values, strict=True):
            # Without a value: of one of the old kind TensorBoard's fast reader drops what is said.
            value.metadata.plugin_data.plugin_name = 'scalars'
            value.metadata.summary_description = how_to_read(tag)
        values += [Summary.Value(tag=self._prefix + tag, simple_value=x) for tag, x in scalars.items()]
        for tag, x in (band or {}).items():
            value = Summary.Value(tag=self._prefix + tag)
            value.tensor.dtype = 1  # DT_FLOAT
            value.tensor.float_val.append(x)
            values.append(value)
        writer._get_file_writer().add_summary(Summary(value=values), step)


def _comes_with_lightning(function):
    return function.__module__.partition('.')[0] in ('lightning', 'lightning_fabric', 'pytorch_lightning')
