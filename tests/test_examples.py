"""
How many examples a batch has, whatever it is made of.
"""
import collections
import dataclasses
import types

import numpy as np
import pytest
import torch
from common import Net, fit, last, lines_of, make_data, make_net
from pytorch_lightning.utilities.data import extract_batch_size
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.examples import count_examples


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    note: str = ''


Pair = collections.namedtuple('Pair', 'x, y')


class Graphs:
    """ As a batch of graphs has it: nodes of all, and how many graphs. """

    def __init__(self, graphs):
        self.num_graphs = graphs
        self.x = torch.ones(45, 3)
        self.edge_index = torch.ones(2, 90).long()


class Raises:
    @property
    def shape(self):
        raise RuntimeError('no shape')


def image(height=32, width=32, channels=3):
    return torch.ones(channels, height, width)


def tokens(*shape):
    return torch.ones(shape).long()


# Where Lightning is right as well.
PLAIN = {
    'tensor': (torch.ones(5, 3), 5),
    'two tensors': ([torch.ones(5, 3), tokens(5)], 5),
    'image to image': ([torch.ones(6, 3, 32, 32)] * 2, 6),
    'crops': ([torch.ones(7, 3, size, size) for size in (64, 64, 32, 32, 32, 32)], 7),
    'dict': ({'image': torch.ones(4, 3, 8, 8), 'mask': torch.ones(4, 8, 8), 'name': list('abcd')}, 4),
    'sequences of two lengths': ([torch.ones(8, 20, 16), torch.ones(8, 18, 16)], 8),
    'many columns': ([torch.ones(9)] * 7, 9),
    'nested dicts': ({'a': {'x': torch.ones(4, 2)}, 'b': [torch.ones(4, 7)]}, 4),
    'named': (Pair(torch.ones(6, 2), torch.ones(6)), 6),
    'dataclass': (Batch(torch.ones(32, 3)), 32),
}
BETTER = {
    'list of images': ([image()] * 8, 8),
    'list of two images': ([image()] * 2, 2),
    'images of several sizes': ([image(32, 48), image(40, 32)], 2),
    'images of many channels': ([image(channels=13)] * 8, 8),
    'images and boxes': (((image(),) * 8, ({'boxes': torch.ones(3, 4), 'labels': tokens(3)},) * 8), 8),
    'images and masks': (((image(),) * 6, (tokens(32, 32),) * 6), 6),
    'pairs of image and label': ([(image(), 4), (image(), 5), (image(), 5)], 3),
    'pairs of image and mask': ([(image(), tokens(32, 32))] * 5, 5),
    'images with all boxes in one': ([torch.ones(8, 3, 32, 32), torch.ones(50, 6)], 8),
    'list of volumes': ([torch.ones(1, 16, 16, 16)] * 4, 4),
    'clouds of points': ([torch.ones(n, 3) for n in (50, 60, 70)], 3),
    'items of geowatch': ([{'frames': [image()] * 2}, None, {'frames': []}], 2),
    'items with images': ({'image': [image()] * 6, 'crs': ['x'] * 6}, 6),
    'lists of frames': ([[image()] * 2, [image()] * 3], 2),
    'lists of as many frames': ([[image()] * 2] * 3, 3),
    'texts': (['a', 'b', 'c'], 3),
    'lists of tokens': ([[1, 2, 3], [4, 5]], 2),
    'scalars': ([torch.tensor(1.)] * 4, 4),
    'UserDict': (collections.UserDict(ids=tokens(32, 10), mask=tokens(32, 10)), 32),
    'two tokenized': ((collections.UserDict(ids=tokens(32, 10)), collections.UserDict(ids=tokens(32, 8))), 32),
    'object': (types.SimpleNamespace(x=torch.ones(12, 2), y=tokens(12)), 12),
    'constant table': ({'image': torch.ones(4, 3, 8, 8), 'anchors': torch.ones(8732, 4)}, 4),
    'constant table first': ({'anchors': torch.ones(8732, 4), 'image': torch.ones(4, 3, 8, 8)}, 4),
    'constant table before two': ({'table': torch.ones(100, 10), 'x': torch.ones(32, 10), 'y': tokens(32)}, 32),
    'objects beside': ({'image': torch.ones(4, 3, 8, 8), 'transforms': [object()]}, 4),
    'names of columns': ({'x': torch.ones(32, 10), 'columns': list('abcdefghij')}, 32),
    'numbers of classes': ({'x': torch.ones(32, 10), 'classes': tokens(10)}, 32),
    'graphs': (Graphs(6), 6),
    'two batches of graphs': ((Graphs(6), Graphs(6)), 6),
    'list of lengths': ((torch.ones(4, 7), [7, 5, 3, 2]), 4),
    'time first, list of lengths': ((torch.ones(7, 4), [7, 5, 3, 2]), 4),
    'time first, lengths': ((tokens(20, 4), tokens(4)), 4),
    'time first, features': ({'x': torch.ones(20, 4, 8), 'label': tokens(4)}, 4),
    'time first, source and target': ((tokens(20, 4), tokens(18, 4)), 4),
    'labels, tokens of all in one, offsets': ((tokens(4), tokens(31), tokens(4)), 4),
    'lists of tokens as tensors': ([tokens(n) for n in (4, 31, 7)], 3),
    'packed': (pack_padded_sequence(torch.ones(4, 7, 3), [7, 5, 3, 2], batch_first=True), 4),
    'packed with labels': ((pack_sequence([torch.ones(n, 2) for n in (9, 4, 1)]), tokens(3)), 3),
    'nested': (torch.nested.nested_tensor([torch.ones(n, 3) for n in (2, 5)]), 2),
    'jagged': (torch.nested.nested_tensor([torch.ones(n, 3) for n in (2, 5, 4)], layout=torch.jagged), 3),
    'nested in a list': ([torch.nested.nested_tensor([torch.ones(n, 3) for n in (2, 5)]), tokens(2)], 2),
    'NumPy': ({'x': np.ones((4, 2)), 'y': np.ones(4)}, 4),
    'empty': ([], 0),
    'nothing': (None, 0),
    'only None': ([None, None], 0),
    'one number': (3, 1),
    'odd object': (Raises(), 1),
    'odd object beside a tensor': ((torch.ones(4, 2), Raises()), 4),
}


@pytest.mark.parametrize('kind', [*PLAIN, *BETTER])
def test_kinds(kind):
    batch, right = {**PLAIN, **BETTER}[kind]
    assert count_examples(batch) == right


@pytest.mark.parametrize('kind', PLAIN)
def test_lightning_says_the_same(kind):
    batch, right = PLAIN[kind]
    batch = {name: x for name, x in batch.items() if name != 'name'} if isinstance(batch, dict) else batch
    assert extract_batch_size(batch) == right


def test_an_object_that_knows_itself_ends():
    batch = types.SimpleNamespace(x=torch.ones(3, 2))
    batch.itself = [batch]
    assert count_examples(batch) == 3


@pytest.mark.parametrize('make', [
    lambda rows: torch.nested.nested_tensor(list(rows)), lambda rows: collections.UserDict(x=rows, mask=rows > 0),
    lambda rows: [{'x': row} for row in rows], Batch], ids=['nested', 'UserDict', 'items', 'dataclass'])
def test_samples_of_a_run(tmp_path, make):
    class Takes(Net):
        def validation_step(self, batch, batch_idx):
            if isinstance(batch, list):
                rows = torch.stack([item['x'] for item in batch])
            elif isinstance(batch, torch.Tensor):
                rows = torch.stack(list(batch.unbind()))
            else:
                rows = batch['x'] if isinstance(batch, collections.UserDict) else batch.x
            self(rows)

        def val_dataloader(self):
            return DataLoader([make(rows) for rows in make_data().split(10)], batch_size=None)

    class Trains(Takes):
        training_step = lambda self, batch, i: self.loss(torch.ones(3, 8))  # noqa: E731
    _, _, lines, data = fit(tmp_path, PlasticityMonitor('dead_units', samples=20), make_net(Trains), validate=False,
                            max_epochs=1)
    assert [line['samples'] for line in lines] == [20]
    assert lines[0]['value'] is not None


@pytest.mark.parametrize('samples', [16, 20, 2000])
def test_steps_that_fetch_their_batch(tmp_path, samples):
    """ The batch is known when the step is over. """
    class Fetches(Net):
        def training_step(self, dataloader_iter):
            (batch,), _, _ = next(dataloader_iter)
            return self.loss(batch)

        def validation_step(self, dataloader_iter):
            (batch,), _, _ = next(dataloader_iter)
            self(batch)

    class Usual(Net):
        def training_step(self, batch, batch_idx):
            return self.loss(batch[0])
    runs = []
    for cls in (Fetches, Usual):
        loader = DataLoader(TensorDataset(make_data()), batch_size=8)
        net = make_net(cls)
        _, _, lines, _ = fit(tmp_path / cls.__name__, PlasticityMonitor('feature_erank', source='train',
                                                                        samples=samples),
                             net, loader=loader, validate=False, max_epochs=1)
        runs.append(last(lines, 'feature_erank'))
    fetched, usual = runs
    assert fetched['samples'] == usual['samples'] == min(-(-samples // 8) * 8, 37)
    assert len(lines_of(lines, 'feature_erank')) == 1
    assert fetched['step'] == usual['step'] and fetched['value'] == pytest.approx(usual['value'], rel=0.05)
