"""
Metrics that are only there to show that each source works; a test registers them for itself.
"""
import numpy as np

from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import metric

NAMES = ('step_ratio', 'piece_squares', 'piece_count', 'gradient_growth', 'gradient_rank')


def register():
    """ Register all of them. """
    @metric(needs=('updates.squares', 'updates.before_squares'), network='sum', every='log')
    def step_ratio(squares, before):
        return np.sqrt(squares / before)

    @metric(needs=('pieces.squares', 'gradients.squares'), network='sum', every='log')
    def piece_squares(squares, of_sum):
        return {'value': squares, 'of_sum': of_sum}

    @metric(needs=('pieces.count',), network='mean', every='log')
    def piece_count(count):
        return count

    @metric(needs=('gradients.squares', 'before.gradients.squares'), network='sum', every='log')
    def gradient_growth(squares, before):
        return squares / before

    @metric(needs=('gradients.spectrum',), network='mean', every='log')
    def gradient_rank(spectrum):
        return float((spectrum > 1e-6 * spectrum.max()).sum())
