"""
Networks of public libraries, small and with random weights: what is a weight, and how many examples a batch has.

A library that is not installed is skipped, and named. None of them needs another torch:
pip install --no-deps 'timm>=1' transformers monai torch_geometric torchgeo segmentation_models_pytorch
"""
import re

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from common import last, read_lines
from torch import nn
from torch.utils.data import DataLoader

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor

pytestmark = pytest.mark.slow
LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.RNNBase)


class Task(pl.LightningModule):
    """ A network that trains on a batch of its own kind. """

    def __init__(self, net, forward):
        super().__init__()
        self.net, self.forward_net = net, forward

    def training_step(self, batch, batch_idx):
        return self.forward_net(self.net, batch).float().square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def images(channels=3, size=32, count=4):
    return [torch.randn(count, channels, size, size) for _ in range(2)]


def timm_net(name, **kwargs):
    timm = pytest.importorskip('timm', minversion='1.0', reason='timm 1.0 is not installed')
    return timm.create_model(name, pretrained=False, num_classes=5, **kwargs), images()


def vit():
    net, batches = timm_net('vit_tiny_patch16_224', img_size=32, depth=2)
    return net, batches, lambda net, x: net(x), 4, [r'pos_embed']


def convnext():
    # Its layer scales and norms are none.
    net, batches = timm_net('convnext_tiny', depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    return net, batches, lambda net, x: net(x), 4, []


def torchvision_vit():
    torchvision = pytest.importorskip('torchvision', reason='torchvision is not installed')
    net = torchvision.models.VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)
    return net, images(), lambda net, x: net(x), 4, [r'pos_embedding', r'in_proj_weight']


def torchvision_swin():
    torchvision = pytest.importorskip('torchvision', reason='torchvision is not installed')
    # Its tables of relative positions are biases.
    net = torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=5)
    return net, images(), lambda net, x: net(x), 4, []


def tokenized(**kwargs):
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    return [transformers.BatchEncoding({'input_ids': torch.randint(0, 32, (6, 9)),
                                        'attention_mask': torch.ones(6, 9).long()}) for _ in range(2)]


def language(kind, **kwargs):
    batches = tokenized()
    import transformers
    config = getattr(transformers, f'{kind}Config')(vocab_size=32, **kwargs)
    return getattr(transformers, f'{kind}Model')(config), batches, lambda net, x: net(**x).last_hidden_state, 6


def bert():
    return *language('Bert', hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24), []


def gpt2():
    # Its linear layers are called Conv1D.
    return *language('GPT2', n_embd=16, n_layer=2, n_head=2, n_positions=16), [r'(c_attn|c_proj|c_fc)\.weight']


def mixtral():
    return *language('Mixtral', hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=2, num_local_experts=3), [r'gate\.weight', r'experts\.\w+_proj']


def graphs():
    pytest.importorskip('torch_geometric', reason='torch_geometric is not installed')
    from torch_geometric.data import Batch, Data
    from torch_geometric.nn import GAT, global_mean_pool
    batches = [Batch.from_data_list([Data(x=torch.randn(n, 7), edge_index=torch.randint(0, n, (2, 3 * n)))
                                     for n in (4, 6, 5)]) for _ in range(2)]
    net = GAT(7, 16, num_layers=2, heads=2)
    # A vector of attention for each of two heads; the second layer has one.
    return (net, batches, lambda net, b: global_mean_pool(net(b.x, b.edge_index), b.batch), 3,
            [r'lin\.weight', r'convs\.\d\.att_(src|dst)'])


def monai():
    nets = pytest.importorskip('monai.networks.nets', reason='monai is not installed')
    from monai.data import MetaTensor
    batches = [{'image': MetaTensor(torch.randn(4, 1, 16, 16)), 'label': MetaTensor(torch.randn(4, 1, 16, 16))}
               for _ in range(2)]
    net = nets.UNet(2, 1, 2, channels=(4, 8, 16), strides=(2, 2), num_res_units=1, act='RELU')
    return net, batches, lambda net, batch: net(batch['image']), 4, []


def segmentation():
    smp = pytest.importorskip('segmentation_models_pytorch', reason='segmentation_models_pytorch is not installed')
    return smp.Unet('resnet18', encoder_weights=None), images(), lambda net, x: net(x), 4, []


def expected(net, extras):
    """ Numbers of all weights, by their parameters' names: of layers, and what the case lists. """
    layers = {f'{path}.{name}'.strip('.'): param for path, module in net.named_modules() if isinstance(module, LAYERS)
              for name, param in module.named_parameters(recurse=False) if 'weight' in name}
    listed = {name: param for name, param in net.named_parameters()
              if any(re.search(f'{pattern}$', name) for pattern in extras)}
    return {**layers, **listed}


@pytest.mark.parametrize('make', [vit, convnext, torchvision_vit, torchvision_swin, bert, gpt2, mixtral, graphs,
                                  monai, segmentation], ids=lambda make: make.__name__)
def test_network(tmp_path, make, capsys):
    torch.manual_seed(0)
    net, batches, forward, examples, extras = make()
    task = Task(net, forward)
    monitor = PlasticityMonitor('weight_mag,grad_mag,erank,dead_units,feature_erank', source='train', interval=1)
    trainer = pl.Trainer(max_epochs=1, default_root_dir=tmp_path, accelerator='cpu', enable_progress_bar=False,
                         enable_model_summary=False, enable_checkpointing=False, callbacks=[monitor])
    trainer.fit(task, DataLoader(batches, batch_size=None))
    out = capsys.readouterr().out
    assert 'failed' not in out, out
    right = {name: param.detach().double().numpy() for name, param in expected(net, extras).items()}
    line = last(read_lines(trainer), 'weight_mag')
    got = {re.sub(r'^net\.', '', layer) for layer in line['layers']}
    # An expert goes by the name of all with its number.
    names = {name.removesuffix('.weight') for name in right}
    assert {layer if layer in names else layer.rpartition('.')[0] for layer in got} == names
    total = sum(np.abs(x).sum() for x in right.values()) / sum(x.size for x in right.values())
    assert line['value'] == pytest.approx(total, rel=1e-5)
    assert {last(read_lines(trainer), 'dead_units')['samples']} <= {examples, 2 * examples}


def test_task_of_torchgeo(tmp_path, capsys):
    trainers = pytest.importorskip('torchgeo.trainers', reason='torchgeo is not installed')
    package = pytest.importorskip('lightning.pytorch', reason='lightning is not installed')
    task = trainers.ClassificationTask(model='resnet18', weights=None, in_channels=4, num_classes=3)
    batches = [{'image': torch.randn(4, 4, 32, 32), 'label': torch.tensor([0, 1, 2, 1])} for _ in range(2)]
    trainer = package.Trainer(max_epochs=1, default_root_dir=tmp_path, accelerator='cpu', enable_progress_bar=False,
                              enable_model_summary=False, enable_checkpointing=False,
                              callbacks=[PlasticityMonitor('weight_mag,erank,dead_units', source='train')])
    # Its learning rate follows a value of the validation.
    trainer.fit(task, *[DataLoader(batches, batch_size=None)] * 2)
    assert 'failed' not in capsys.readouterr().out
    right = [param for name, param in task.named_parameters() if param.ndim > 1]
    lines = read_lines(trainer)
    assert len(last(lines, 'erank')['layers']) == len(right)
    assert last(lines, 'weight_mag')['value'] == pytest.approx(
        float(sum(p.abs().sum() for p in right) / sum(p.numel() for p in right)), rel=1e-5)
    assert last(lines, 'dead_units')['samples'] == 8
