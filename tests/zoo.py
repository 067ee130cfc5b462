"""
Networks whose activation calls and units are known without our code.

The calls come from a ``TorchDispatchMode``, which sits below everything that
we hook into and lists the kernels that really ran, in order, with their
shapes. The units come from the layers that each architecture puts before its
activations, read off the modules of the network by hand-written rules.
"""
import dataclasses
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

# Kernels that compute an activation, by the name that we report.
KERNELS = {
    'relu': 'relu', 'relu_': 'relu', 'gelu': 'gelu', 'silu': 'silu', 'silu_': 'silu', 'hardswish': 'hardswish',
    'hardswish_': 'hardswish', 'hardsigmoid': 'hardsigmoid', 'hardsigmoid_': 'hardsigmoid', 'sigmoid': 'sigmoid',
    'sigmoid_': 'sigmoid', 'tanh': 'tanh', 'tanh_': 'tanh', 'elu': 'elu', 'elu_': 'elu', 'hardtanh': 'hardtanh',
    'hardtanh_': 'hardtanh', 'leaky_relu': 'leaky_relu', 'leaky_relu_': 'leaky_relu', 'softplus': 'softplus',
    'mish': 'mish', 'glu': 'glu', 'log_sigmoid_forward': 'logsigmoid', '_prelu_kernel': 'prelu',
    # The fast path of one nn.TransformerEncoderLayer, activation included.
    '_transformer_encoder_layer_fwd': 'fast path',
}
# The kernel of an activation that is written out, as products of a gate.
WRITTEN_OUT = {'gelu': 'tanh', 'silu': 'sigmoid'}


class Kernels(TorchDispatchMode):
    """ The activation kernels that ran: (name, shape) in order. """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        name = KERNELS.get(func.overloadpacket.__name__)
        if name:
            first = output[0] if isinstance(output, (tuple, list)) else output
            self.calls.append((name, () if first.is_nested else tuple(first.shape)))
        return output


class Seen:
    """ An observer for ``Capture`` that counts dead units on its own. """

    def __init__(self):
        self.calls = []   # (site, shape, axis)
        self.states = {}  # for each site: bool of shape (values, units), at this value on all rows so far

    def __call__(self, site, output, axis, saturated, level=0.):
        self.calls.append((site, tuple(output.shape), axis))
        rows = output.movedim(axis, -1).flatten(0, -2) if output.ndim > 1 else output[None]
        stuck = torch.zeros(len(saturated), rows.shape[1], dtype=torch.bool)
        for i, value in enumerate(saturated):
            stuck[i] = ((rows.double() - value).abs() <= 1e-6).all(0)
        before = self.states.get(site)
        self.states[site] = stuck if before is None else before & stuck

    @property
    def sites(self):
        return list(dict.fromkeys(site for site, _, _ in self.calls))

    def kernels(self, written=()):
        """ The calls by the names of their kernels; `written`: functions that are written out. """
        return [(WRITTEN_OUT[site.function] if site.function in written else site.function, shape)
                for site, shape, _ in self.calls]

    def without(self, sites):
        """ The same, without what turned out to be a part of another activation. """
        self.calls = [call for call in self.calls if call[0] not in sites]
        self.states = {site: state for site, state in self.states.items() if site not in sites}
        return self

    def units(self):
        return [site.units for site in self.sites]

    def dead(self):
        """ Site to (dead units, units). """
        return {site: (int(state.any(0).sum()), state.shape[1]) for site, state in self.states.items()}


@dataclasses.dataclass
class Network:
    """
    Attributes:
        name (str):
        make (Callable[[], nn.Module]): in train mode
        inputs (Callable[[nn.Module], tuple]): arguments of the model
        units (Callable[[nn.Module], List[int]]): for each site its units
        run (Callable[[nn.Module, tuple], Any]): how the model is called
        train (bool): run in train mode and with gradients
        needs (str): package without which it cannot be made
        written (Tuple[str, ...]): activations that it writes out
        outputs (Tuple[str, ...]): layers whose activation is an output, and no hidden layer
    """
    name: str
    make: Callable
    inputs: Callable
    units: Callable
    run: Callable = lambda model, inputs: model(*inputs)
    train: bool = False
    needs: str = 'torch'
    written: tuple = ()
    outputs: tuple = ()


def images(size, n=2):
    return lambda model: (torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1)),)


def tokens(model):
    return (torch.arange(2 * 11).reshape(2, 11) % 50,)


def of(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def norms(model, but=()):
    """ Channels of the batch norms, which come right before the activations. """
    return [module.num_features for name, module in model.named_modules()
            if isinstance(module, nn.BatchNorm2d) and not any(word in name for word in but)]


def linears(model, *words):
    return [module.out_features for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and any(name.endswith(word) for word in words)]


# --- torchvision -------------------------------------------------------------

def torchvision(name, size, units, **kwargs):
    def make():
        import torchvision.models
        return getattr(torchvision.models, name)(weights=None, **kwargs)
    return Network(name, make, images(size), units, needs='torchvision')


def mobile_units(model):
    """ Of MobileNetV3 and EfficientNet: convolutions with an activation, and squeeze and excitation. """
    from torchvision.ops.misc import Conv2dNormActivation, SqueezeExcitation
    return ([block[0].out_channels for block in of(model, Conv2dNormActivation) if len(block) == 3]
            + [fc.out_channels for block in of(model, SqueezeExcitation) for fc in (block.fc1, block.fc2)]
            + linears(model, 'classifier.0'))


# --- written here ------------------------------------------------------------

class UNet(nn.Module):
    """ Convolutions down and up again, with skip connections; all activations are functions. """

    def __init__(self, widths=(5, 9, 13)):
        super().__init__()
        self.widths = widths
        self.down = nn.ModuleList(self.pair(a, b) for a, b in zip((3, *widths), widths, strict=False))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2)
                                  for a, b in zip(widths, widths[1:], strict=False))
        self.up = nn.ModuleList(self.pair(2 * a, a) for a in widths[:-1])
        self.head = nn.Conv2d(widths[0], 2, 1)

    @staticmethod
    def pair(a, b):
        return nn.ModuleList([nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(1, b), nn.Conv2d(b, b, 3, padding=1)])

    @staticmethod
    def twice(pair, x):
        first, norm, second = pair
        return torch.relu(second(F.relu(norm(first(x)), inplace=True)))

    def forward(self, x):
        skips = []
        for i, pair in enumerate(self.down):
            x = self.twice(pair, F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for skip, grow, pair in reversed(list(zip(skips, self.grow, self.up, strict=False))):
            x = self.twice(pair, torch.cat([skip, F.silu(grow(x))], dim=1))
        return self.head(x)

    def units(self):
        return [w for w in self.widths for _ in range(2)] + [w for w in self.widths[:-1] for _ in range(3)]


class Mixer(nn.Module):
    """ An MLP-Mixer: half of its linear layers work on the transposed tensor. """

    class Block(nn.Module):
        def __init__(self, tokens, dim):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.mix_tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens + 1), nn.GELU(),
                                            nn.Linear(2 * tokens + 1, tokens))
            self.mix_channels = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

        def forward(self, x):
            x = x + self.mix_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
            return x + self.mix_channels(self.norm2(x))

    def __init__(self, depth=2, dim=12):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 8, stride=8)
        self.blocks = nn.Sequential(*(self.Block(16, dim) for _ in range(depth)))
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, dim_feedforward=31, batch_first=True), 3)


def features(model):
    return (torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1)),)


# --- transformers --------------------------------------------------------------

def bert():
    import transformers
    return transformers.BertModel(transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40))


def gpt2():
    import transformers
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=24, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0))


# --- geowatch ------------------------------------------------------------------

def geowatch_model(name, **kwargs):
    def make():
        from geowatch.tasks.fusion import methods
        cls = getattr(methods, name)
        channels, classes, stats = cls.demo_dataset_stats()
        return cls(input_sensorchan=channels, classes=classes, dataset_stats=stats, **kwargs)
    return make


def geowatch_batch(*sizes, frames=2):
    def inputs(model):
        items = []
        for seed, (height, width) in enumerate(sizes):
            items += model.demo_batch(width=width, height=height, num_timesteps=frames, rng=seed)
        return (items,)
    return inputs


def heterogeneous_units(model):
    from geowatch.tasks.fusion.architectures.transformer import FeedForward
    # The heads have decoders that never run, and change gets a sigmoid of its two channels.
    return [block.net[-1].in_features for name, block in model.named_modules()
            if isinstance(block, FeedForward) and not (name.startswith('heads') and 'decoder_layers' in name)] + [2]


def multimodal_units(model):
    from geowatch.utils.util_netharn import ConvNormNd
    hidden = [block.conv.out_features for name, block in model.named_modules()
              if isinstance(block, ConvNormNd) and name.startswith(('heads.', 'token_learner'))]
    # Probabilities of classes and saliency are sigmoids.
    outputs = linears(model, 'class.hidden.output', 'saliency.hidden.output')
    # Swish of geowatch's own, in an autograd.Function.
    from geowatch.tasks.fusion.methods.network_modules import OurDepthwiseSeparableConv
    swish = [block.conv_dw.out_channels for block in of(model, OurDepthwiseSeparableConv)
             if type(block.act1).__name__ == 'Swish']
    return hidden + swish + linears(model.encoder, 'mlp.0') + outputs


def unet_baseline_units(model):
    from geowatch.tasks.fusion.architectures.unet_blur import double_conv
    convs = [conv.out_channels for block in of(model, double_conv) for conv in (block.conv[0], block.conv[3])]
    # ReLUs around the three convolutions over time, and the sigmoid that makes probabilities of change.
    return convs + [model.hparams.token_dim] * 4 + [2]


NETWORKS = [
    torchvision('resnet18', 64, lambda m: norms(m, ['downsample'])),
    torchvision('resnet50', 64, lambda m: norms(m, ['downsample'])),
    torchvision('vgg11_bn', 64, lambda m: norms(m) + linears(m, 'classifier.0', 'classifier.3'), init_weights=False),
    torchvision('inception_v3', 96, lambda m: norms(m, ['AuxLogits']), init_weights=False),
    torchvision('densenet121', 64, norms),
    torchvision('mobilenet_v3_small', 64, mobile_units),
    torchvision('mobilenet_v3_large', 64, mobile_units),
    torchvision('efficientnet_b0', 64, mobile_units),
    torchvision('convnext_tiny', 64, lambda m: linears(m, 'block.3')),
    torchvision('swin_t', 64, lambda m: linears(m, 'mlp.0')),
    torchvision('vit_b_16', 64, lambda m: linears(m, 'mlp.0'), image_size=64),
    Network('TransformerEncoder, train', encoder, features, lambda m: [31] * 3, train=True),
    Network('TransformerEncoder, eval', encoder, features, lambda m: [31] * 3),
    Network('BERT', bert, tokens, lambda m: linears(m, 'intermediate.dense', 'pooler.dense'), needs='transformers',
            outputs=('pooler.dense',)),
    Network('GPT-2', gpt2, tokens, lambda m: [block.mlp.c_fc.nf for block in m.transformer.h], needs='transformers',
            written=('gelu',)),
    Network('U-Net', UNet, images(32), UNet.units),
    Network('MLP-Mixer', Mixer, images(32, 5), lambda m: linears(m, 'mix_tokens.0', 'mix_channels.0')),
    Network('HeterogeneousModel', geowatch_model('HeterogeneousModel', backbone='small', decoder='trans_conv',
                                                 token_dim=16),
            geowatch_batch((33, 32), (38, 28)), heterogeneous_units, needs='geowatch.tasks',
            outputs=('heads.change.1',)),
    Network('MultimodalTransformer', geowatch_model('MultimodalTransformer', arch_name='smt_it_joint_p2',
                                                    tokenizer='linconv'),
            geowatch_batch((33, 32), (33, 32)), multimodal_units,
            run=lambda model, inputs: model.forward_step(*inputs, with_loss=False), needs='geowatch.tasks',
            outputs=('heads.class.hidden.output', 'heads.saliency.hidden.output')),
    Network('MultimodalTransformer, dwcnn', geowatch_model('MultimodalTransformer', arch_name='smt_it_joint_p2',
                                                           tokenizer='dwcnn', token_norm='group'),
            geowatch_batch((33, 32), (33, 32)), multimodal_units,
            run=lambda model, inputs: model.forward_step(*inputs, with_loss=False), needs='geowatch.tasks',
            written=('silu',), outputs=('heads.class.hidden.output', 'heads.saliency.hidden.output')),
    Network('UNetBaseline', geowatch_model('UNetBaseline', token_dim=8), geowatch_batch((49, 48), frames=2),
            unet_baseline_units, needs='geowatch.tasks', outputs=('heads.change.outc.conv',)),
]
BY_NAME = {network.name: network for network in NETWORKS}


@dataclasses.dataclass
class Outcome:
    """ What ran, what we saw, and the units that should be there. """
    kernels: list
    seen: Seen
    units: list
    unseen: dict
    hidden: set
    written: tuple = ()

    def right(self):
        """ Whether calls and units are those that they should be. """
        return self.calls_right() and sorted(self.seen.units()) == sorted(self.units)

    def calls_right(self):
        if all(name == 'fast path' for name, _ in self.kernels):
            # The layers ran in one kernel each, and were looked at apart.
            return len(self.kernels) == len(self.seen.calls)
        return self.kernels == self.seen.kernels(self.written)


def look(network, capture):
    """
    Run a network twice: once to list its kernels, once inside a capture.

    Args:
        network (Network):
        capture (type): ``Capture``

    Returns:
        Outcome:
    """
    torch.manual_seed(0)
    model = network.make().train(network.train)
    inputs = network.inputs(model)
    with torch.set_grad_enabled(network.train):
        with Kernels() as kernels:
            network.run(model, inputs)
        seen = Seen()
        with capture(model, seen) as window:
            network.run(model, inputs)
    return Outcome(kernels.calls, seen.without(window.parts), network.units(model), window.unseen, window.hidden,
                   network.written)
