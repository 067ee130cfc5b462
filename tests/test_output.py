"""
What is printed never ends a run: on a closed pipe, a full disk, a terminal without the letters of a name.
"""
import io
import os
import sys
import warnings

import pytest
import torch
from common import Net, Recorder, fit, last, make_net, read_lines

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.say import say, warn
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import metric


class Sizes(Net):
    """ With a layer that is named in the message at the start. """

    def __init__(self):
        super().__init__()
        self.größe = torch.nn.LSTM(8, 8)

    def features(self, x):
        return super().features(x + 0 * self.größe(x)[0])


def closed_pipe():
    reads, writes = os.pipe()
    os.close(reads)
    return open(writes, 'w', encoding='utf-8')


def full_disk():
    return open('/dev/full', 'w', encoding='utf-8')


def few_letters():
    return io.TextIOWrapper(io.BytesIO(), encoding='ascii')


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize('make', [closed_pipe, full_disk, few_letters, closed, lambda: None])
def test_output_that_cannot_be_written(tmp_path, make, monkeypatch):
    @metric(needs=('weights.abs',))
    def fails_with_a_traceback(total):
        raise RuntimeError('Größe')
    stream = make()
    monkeypatch.setattr(sys, 'stdout', stream)
    monitor = PlasticityMonitor('fails_with_a_traceback,weight_mag@1,dead_units,grad_mag@100')
    _, trainer, _, _ = fit(tmp_path / 'größe', monitor, make_net(Sizes))
    assert trainer.global_step == 10 and last(read_lines(trainer), 'weight_mag')['step'] == 9
    if make is few_letters:
        stream.flush()
        text = stream.buffer.getvalue().decode('ascii')
        assert r'activations inside gr\xf6\xdfe' in text and 'RuntimeError' in text
        assert 'To see the plasticity of this run' in text
    elif stream is not None and not stream.closed:
        stream.flush()  # nothing of ours is left for the host to fail with


def test_what_the_host_has_printed_comes_first(tmp_path):
    fpath = tmp_path / 'out.txt'
    with open(fpath, 'w') as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'stdout', stream)
        print('first')
        say('second')
        assert fpath.read_text() == 'first\nsecond\n'
        print('third')
    assert fpath.read_text() == 'first\nsecond\nthird\n'


def test_warnings_that_are_errors(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='PlasticityMonitor')
        warn('something')
        _, trainer, _, _ = fit(tmp_path, PlasticityMonitor('weight_mag@1'), logger=Recorder(tmp_path / 'file' / 'logs'))
    assert trainer.global_step == 10
    said = capsys.readouterr().out
    assert 'PlasticityMonitor: something\n' in said and 'plasticity.jsonl cannot be written now' in said
