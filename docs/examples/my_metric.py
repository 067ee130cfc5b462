"""
Two metrics of your own for PlasticityMonitor: one of weights, one of activations.

A metric names the statistics that it needs, and is a NumPy function of those
of one layer. PlasticityMonitor collects them, adds them up over batches and
processes, and calls the function.

CommandLine:
    geowatch fit --config=train.yaml \
        --trainer.callbacks+=my_metric.Monitor --trainer.callbacks.metrics=all
"""
import numpy as np

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import Words, metric


@metric(
    needs=('weights.squares', 'weights.count'),
    network='sum',  # the network's value is the formula of the sums over all layers
    every='log',    # interval='auto' is then log_every_n_steps
    words=Words('Weight RMS', 'root of the mean squared weight', grows=1.5, why='Large weights turn slowly.'))
def weight_rms(squares, count):
    """
    Root of the mean squared weight.

    Example:
        >>> float(weight_rms(squares=25., count=1.)), float(weight_rms(squares=25. + 144., count=4.))
        (5.0, 6.5)
    """
    return np.sqrt(squares / count)


@metric(
    needs=('activations.positive', 'activations.samples'),
    network='units',  # the network's value is the mean over layers, weighted by their units
    every='epoch',
    words=Words('Positive share', 'how often units are on, mean over units', shrinks=0.5, percent=True,
                change_by_layer=False, why='Units that are seldom on seldom learn.'))
def positive_share(positive, samples):
    """
    How often units are on; `never` is the share of those that never are.

    Example:
        >>> positive_share(positive=np.array([0., 2., 4., 4.]), samples=4.)
        {'value': 0.625, 'never': 0.25}
    """
    share = positive / samples
    # 'value' is the metric; further columns go into the layer's record.
    return {'value': float(share.mean()), 'never': float((share == 0).mean())}


class Monitor(PlasticityMonitor):
    """ PlasticityMonitor under a name that imports this file, for configuration files. """
