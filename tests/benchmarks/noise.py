"""
The noise scale of one network on the same batches: ours and theirs, beside the value of all examples.
"""
import contextlib
import time

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.chunks import Chunks
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.noise import noise_of

BATCH, BATCHES = 64, 20


def noise_scales():
    """
    Of an MLP without biases, since ours leaves them out, on 20 batches of 64, with the weights as they are.

    For each the noise scale, and how much CPU time it takes beyond that of a
    forward and a backward pass. Theirs that are one value a batch are medians
    of batches, ours and those that give numerator and denominator are sums.
    """
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(64, 512, bias=False), nn.ReLU(), nn.Linear(512, 512, bias=False), nn.ReLU(),
                          nn.Linear(512, 10, bias=False)))
    labels = torch.randint(0, 10, (BATCH * BATCHES,))
    images = torch.randn(10, 64)[labels] + 2 * torch.randn(BATCH * BATCHES, 64)
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    weights = {name: p for name, p in net.named_parameters()}

    def plain(x, y):
        net.zero_grad()
        cross_entropy(net(x), y).backward()

    def ours(x, y):
        net.zero_grad()
        chunks = Chunks(weights, BATCH, contextlib.nullcontext)
        loss = cross_entropy(net(x), y)
        chunks.watch(loss)
        loss.backward()
        chunks.close()
        squares, gradient = (float(sum(own)) for own in zip(*chunks.found.values(), strict=True))
        return [noise_of(field, squares, gradient, chunks.equal_pieces, BATCH) for field in ('example_noise', 'signal')]

    found = {'all examples': {'value': _exact(net, images, labels)}}
    methods = {'plain': plain, 'ours': ours, **_rivals(net, plain)}
    for name, method in methods.items():
        if isinstance(method, str):
            found[name] = {'error': method}
            continue
        results, times = [], []
        for x, y in batches:
            start = time.process_time()
            results.append(method(x, y))
            times.append(time.process_time() - start)
        median = sorted(times)[BATCHES // 2]
        if name == 'plain':
            baseline = median
        elif isinstance(results[0], float):
            found[name] = {'value': sorted(results)[BATCHES // 2], 'more': median / baseline - 1}
        else:
            noise, signal = (sum(own) for own in zip(*results, strict=True))
            found[name] = {'value': noise / signal, 'more': median / baseline - 1}
    return found


def _exact(net, images, labels):
    """ The trace of the covariance of single examples' gradients, over the squared norm of their mean. """
    params = {name: p.detach() for name, p in net.named_parameters()}

    def of_one(own, x, y):
        return cross_entropy(torch.func.functional_call(net, own, (x[None],)), y[None])
    count, squares, total = len(images), 0., 0.
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        grads = torch.func.vmap(torch.func.grad(of_one), (None, 0, 0))(params, x, y)
        flat = torch.cat([g.flatten(1) for g in grads.values()], 1).double()
        squares, total = squares + flat.square().sum(), total + flat.sum(0)
    mean = (total / count).square().sum()
    noise = (squares / count - mean) * count / (count - 1)
    return float(noise / (mean - noise / count))


def _rivals(net, plain):
    """ Functions of a batch, or why there is none. """
    found = {}
    try:
        from traintools.gradnoise import estimate_gns

        def traintools(x, y):
            plain(x, y)
            result = estimate_gns(net, cross_entropy, x, y, n_splits=4)
            return result.tr_sigma, result.g_squared
        found['traintools estimate_gns'] = traintools
    except ImportError as ex:
        found['traintools estimate_gns'] = str(ex)
    try:
        from gns_pytorch import compute_gns

        def gns_pytorch(x, y):
            net.zero_grad()
            losses = cross_entropy(net(x), y, reduction='none')
            value = compute_gns(losses, net, param_percentage=1., batch_percentage=1.)
            losses.mean().backward()
            return float(value)
        found['gns-pytorch compute_gns'] = gns_pytorch
    except ImportError as ex:
        found['gns-pytorch compute_gns'] = str(ex)
    return found
