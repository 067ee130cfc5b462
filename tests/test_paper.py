"""
The example docs/examples/online_permuted_mnist.py: does it show what the paper found?
"""
import csv
import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import numpy_erank
from sklearn.datasets import load_digits
from torch.nn import functional as F

from geowatch.utils.lightning_ext.callbacks.plasticity_report import PlasticityReportCLI

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / 'docs/examples/online_permuted_mnist.py'


@pytest.fixture(scope='module')
def example():
    spec = importlib.util.spec_from_file_location('online_permuted_mnist', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_images(name, folder):
    """ An .npz file for the example. """
    if name == 'mnist':
        return os.environ['MNIST_NPZ']
    # Framed as those of MNIST are. Without a frame (--mnist=digits) an image has nearly twice the squared length of one
    # of MNIST, so that a step size with which the weights grow kills most units within a few tasks: then noise is all
    # that is left to see.
    digits = load_digits()
    images = np.pad(np.kron(digits.images * (255 / 16), np.ones((1, 2, 2))), ((0, 0), (6, 6), (6, 6)))
    np.savez(folder / 'digits.npz', x_train=images.round().astype(np.uint8), y_train=digits.target)
    return folder / 'digits.npz'


def read_run(folder):
    """ Name to values, in order of tasks; metrics begin with the fresh network, as epoch 0 measures it. """
    with open(folder / 'metrics.csv', newline='') as file:
        accuracies = [float(row['online_accuracy']) for row in csv.DictReader(file) if row['online_accuracy']]
    curves = {'online_accuracy': accuracies}
    for line in (folder / 'plasticity.jsonl').read_text().splitlines():
        row = json.loads(line)
        if row['step'] >= 0:  # -1 is the fresh network too, before epoch 0
            curves.setdefault(row['metric'], []).append(row['value'])
    return curves


# Small, middle and large step sizes; the margins below were seen with five seeds on digits and three on MNIST.
STEP_SIZES = {'digits': ('0.008', '0.03', '0.14'), 'mnist': ('0.008', '0.03', '0.2')}
SMALL_SCALE = ['--tasks=50', '--examples=1800', '--width=100', '--batch_size=8']


@pytest.mark.parametrize('images', ['digits', pytest.param('mnist', marks=[pytest.mark.slow, pytest.mark.skipif(
    'MNIST_NPZ' not in os.environ, reason='MNIST_NPZ names no file of real images')])])
def test_small_scale_shows_the_loss_of_plasticity(tmp_path, capsys, images):
    sizes = STEP_SIZES[images]
    run = subprocess.run([sys.executable, str(SCRIPT), f'--mnist={find_images(images, tmp_path)}', f'--out={tmp_path}',
                          f'--step_sizes={",".join(sizes)}', *SMALL_SCALE],
                         text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert run.returncode == 0, run.stdout[-3000:]
    print(run.stdout)
    curves = {f'lr{size}': read_run(tmp_path / f'lr{size}' / 'version_0') for size in sizes}
    for own in curves.values():
        assert len(own['online_accuracy']) == 50
        assert len(own['weight_mag']) == len(own['dead_units']) == len(own['feature_erank']) == 51
    # Means over 10 of the 50 tasks each.
    fifths = [{key: [np.mean(part) for part in np.array_split(values, 5)] for key, values in own.items()}
              for own in curves.values()]
    small, middle, large = fifths

    def grown(own, key):
        return own[key][-1] / own[key][0]

    def gained(own, key):
        return own[key][-1] - own[key][0]

    # From fifth to fifth by 2.8 % or more, in all by 56 % or more; with the small step size by 7 % at most.
    weights = large['weight_mag']
    assert all(after > 1.015 * before for before, after in zip(weights, weights[1:], strict=False))
    assert grown(large, 'weight_mag') > 1.35 > 1.1 > grown(small, 'weight_mag')

    # 0.31 to 0.45, and -0.02 to 0.02 with the small step size.
    assert gained(large, 'dead_units') > 0.2 and abs(gained(small, 'dead_units')) < 0.05

    # Of the weights: it falls from fifth to fifth, by 4.9 to 6.3 % in all; with the small step size by 0.5 to 1.1 %.
    ranks = large['erank']
    assert all(after < before for before, after in zip(ranks, ranks[1:], strict=False))
    lost = [1 - grown(own, 'erank') for own in fifths]
    assert lost[2] > 0.035 and lost[2] > 3 * lost[0] and lost[0] < lost[1] < lost[2]

    # 0.34 to 0.50 of it is left, and 0.80 or more with the small step size.
    assert grown(large, 'feature_erank') < 0.6 < 0.7 < grown(small, 'feature_erank')
    assert grown(large, 'feature_erank') + 0.05 < grown(middle, 'feature_erank') < grown(small, 'feature_erank') - 0.05

    # -0.10 or less, about -0.02, and 0.04 or more.
    accuracy = [gained(own, 'online_accuracy') for own in fifths]
    assert accuracy[2] < -0.06 and accuracy[0] > 0.025
    assert accuracy[2] + 0.04 < accuracy[1] < accuracy[0] - 0.03

    # The table and the command for the report.
    assert all(name in run.stdout.split('Mean over')[1] for name in curves)
    assert f'plasticity_report {tmp_path}/lr0.008/version_0' in run.stdout
    # The report sees it too.
    capsys.readouterr()
    code = PlasticityReportCLI.main(cmdline=0, runs=[str(tmp_path / name) for name in curves], format='json',
                                    under='online_accuracy')
    records = {record['run']: record for record in json.loads(capsys.readouterr().out)['runs']}
    first, _, last = (records[name] for name in curves)
    assert code == 0
    assert [records[name]['learning rate'] for name in curves] == [float(size) for size in sizes]
    assert {'weight_mag', 'dead_units', 'feature_erank'} <= set(last['signs'])
    assert not {'weight_mag', 'dead_units'} & set(first['signs'])
    assert last['online_accuracy.trend'] == 'falls' != first['online_accuracy.trend']
    # For TensorBoard, too: the logger's file, and ours of the HParams tab.
    assert len(list(tmp_path.glob('lr*/version_0/events.out.tfevents.*'))) == 6


def test_measures_before_each_task_and_counts_before_each_update(tmp_path, example):
    """ Against plain PyTorch; 203 images in batches of 4, so that the last one is shorter. """
    lr, width, seed = 0.05, 20, 3
    config = example.OnlinePermutedMnistCLI(
        mnist='digits', out=str(tmp_path), tasks=3, examples=203, width=width, batch_size=4, seed=seed,
        accelerator='cpu')
    images, labels = example.load_images('digits')
    curves = read_run(example.train(images, labels, lr, config))

    tasks = example.PermutedMnist(images, labels, 203, 4, seed)
    torch.manual_seed(seed)
    layers = example.Net(lr, width).layers
    assert [type(layer).__name__ for layer in layers] == ['Linear', 'ReLU'] * 3 + ['Linear']
    for number in range(4):  # 0 is the fresh network
        if number:
            correct = 0
            x, y = tasks.task(number)
            for start in range(0, 203, 4):
                stop = min(start + 4, 203)
                logits = layers(x[start:stop])
                correct += int((logits.argmax(1) == y[start:stop]).sum())
                gradients = torch.autograd.grad(F.cross_entropy(logits, y[start:stop]), list(layers.parameters()))
                with torch.no_grad():
                    for param, gradient in zip(layers.parameters(), gradients, strict=True):
                        param -= lr * gradient
            assert curves['online_accuracy'][number - 1] == pytest.approx(correct / 203, abs=1e-6)
        features, x = [], tasks.task(number + 1)[0][:2000]
        with torch.no_grad():
            for layer in layers:
                x = layer(x)
                if isinstance(layer, torch.nn.ReLU):
                    features.append(x.numpy())
        dead = np.mean([(h == 0).all(0) for h in features])
        assert curves['dead_units'][number] == pytest.approx(dead)
        assert curves['feature_erank'][number] == pytest.approx(np.mean([numpy_erank(h) for h in features]), rel=1e-4)
        weights = np.concatenate([layer.weight.detach().numpy().ravel() for layer in layers[::2]])
        assert curves['weight_mag'][number] == pytest.approx(np.abs(weights).mean(), rel=1e-5)


def test_tasks_are_permutations(example):
    images, labels = example.load_images('digits')
    data = example.PermutedMnist(images, labels, examples=1797, batch_size=4, seed=0)
    first, second = data.task(1), data.task(2)
    assert torch.equal(data.task(1)[0], first[0])
    assert not torch.equal(first[0], second[0])
    for x, y in first, second:
        assert len(x) == 1797
        # Each image is there once, with its label, and only its pixels have moved.
        rows = sorted((tuple(row.sort().values.tolist()), int(label)) for row, label in zip(x, y, strict=True))
        assert rows == sorted((tuple(row.sort().values.tolist()), int(label))
                              for row, label in zip(images, labels, strict=True))
        assert (x.mean(0) - images.mean(0)).abs().max() > 0.1
    # All pixels move the same way in all images of a task.
    columns = sorted(map(tuple, images.T.sort(1).values.tolist()))
    assert columns == sorted(map(tuple, first[0].T.sort(1).values.tolist()))


def test_reads_mnist_from_npz_and_from_torchvision(tmp_path, example):
    pytest.importorskip('torchvision', reason='torchvision is not installed')
    random = np.random.default_rng(0)
    x, y = random.integers(0, 256, (7, 28, 28), dtype=np.uint8), np.arange(7, dtype=np.uint8)
    np.savez(tmp_path / 'mnist.npz', x_train=x, y_train=y, x_test=x, y_test=y)
    raw = tmp_path / 'MNIST/raw'
    raw.mkdir(parents=True)
    for part in 'train', 't10k':
        (raw / f'{part}-images-idx3-ubyte').write_bytes(struct.pack('>4i', 0x803, 7, 28, 28) + x.tobytes())
        (raw / f'{part}-labels-idx1-ubyte').write_bytes(struct.pack('>2i', 0x801, 7) + y.tobytes())
    for source in tmp_path / 'mnist.npz', tmp_path:
        images, labels = example.load_images(source)
        assert images.shape == (7, 784)
        assert images.dtype == torch.float32
        np.testing.assert_allclose(images.numpy(), x.reshape(7, 784) / 255, rtol=1e-6)
        assert labels.tolist() == list(range(7))


def test_paper_scale_is_that_of_the_paper(example):
    assert example.SCALES['paper'] == {
        'step_sizes': '0.001,0.003,0.01', 'tasks': 800, 'examples': 60000, 'width': 2000, 'batch_size': 1,
        'accelerator': 'auto'}
    torch.manual_seed(0)
    weights = [layer.weight.detach() for layer in example.Net(0.01, 2000).layers[::2]]
    assert [tuple(weight.shape) for weight in weights] == [(2000, 784), (2000, 2000), (2000, 2000), (10, 2000)]
    # Kaiming-uniform: gain 2 before a ReLU, 1 at the end.
    bounds = [(3 * gain / fan_in) ** 0.5 for gain, fan_in in [(2, 784), (2, 2000), (2, 2000), (1, 2000)]]
    assert [weight.abs().max().item() for weight in weights] == pytest.approx(bounds, rel=1e-3)
    assert torch.cat([weight.ravel() for weight in weights]).abs().mean().item() == pytest.approx(0.03, abs=0.001)
