"""
What each chunk of a batch contributes to a gradient, from what layers see in the ordinary backward pass.

The gradient of a weight is a sum over examples of what came into the layer
times what comes back to it. Both are there when autograd computes it, so that
the sum can be taken chunk by chunk. Nothing is run again, and nothing is
changed.
"""
import contextlib
import math

import torch

from ..statistics.sums import sums

RULES = {}
_VIEWS = {'ViewBackward0', 'UnsafeViewBackward0', 'ReshapeAliasBackward0', 'UnsqueezeBackward0'}
# By how much the squared norm of the chunks' sum may differ from that of the gradient.
_TOLERANCE = 1e-2


class Unknown(Exception):
    """ Why the chunks of a layer are not known, for the user to read. """


class Chunks:
    """
    The chunks of one batch.

    Args:
        weights (Dict[str, Parameter]): by layer, plain ones
        examples (int): in the batch, at least `count`
        guard (Callable): makes a context in which a failure stays

    Attributes:
        count (int): of chunks
        found (Dict[str, Tuple[Tensor, Tensor]]): layer to the sum over the
            chunks of their squared norms, and the squared norm of their sum
        unknown (Dict[str, str]): layer to the reason

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.chunks import Chunks
        >>> import contextlib
        >>> import torch
        >>> layer, x = torch.nn.Linear(2, 1), torch.tensor([[3., 4.], [1., 0.], [0., 0.], [0., 0.]])
        >>> chunks = Chunks({'fc': layer.weight}, 4, contextlib.nullcontext)
        >>> with torch.enable_grad():
        >>>     loss = layer(x).sum()
        >>> chunks.watch(loss)
        >>> loss.backward()
        >>> chunks.close()
        >>> [x.item() for x in chunks.found['fc']]  # 25 + 1, and of [4, 4]
        [26.0, 32.0]
    """
    count = 4

    def __init__(self, weights, examples, guard):
        # Of what the network makes of parameters, or takes a part of, the graph knows no gradient.
        plain = {layer: weight for layer, weight in weights.items() if isinstance(weight, torch.Tensor)}
        self._layers = {id(weight): layer for layer, weight in plain.items()}
        self._shapes = {layer: weight.shape for layer, weight in plain.items()}
        self._examples = examples
        self._guard = guard
        self._handles = []
        self._left = {}  # layer to how often the graph uses it and has not come to it yet
        self._sums = {}  # layer that is used more than once to its chunks so far
        self.found, self.unknown = {}, {}
        small, larger = divmod(examples, self.count)
        self.sizes = [small + (i < larger) for i in range(self.count)]

    @property
    def equal_pieces(self):
        """ How many pieces of one size tell as much as these, whose sizes may differ by one. """
        return self._examples ** 2 / sum(size ** 2 for size in self.sizes)

    def watch(self, loss):
        """ Look at the graph of a loss, and wait for what comes back through it. """
        with self._guard():
            if loss.grad_fn is None:
                return
            parents, leaves = _graph(loss.grad_fn, self._layers)
            uses = {layer: list(_uses(leaf, parents, len(self._shapes[layer]) == 2)) for layer, leaf in leaves.items()}
            for layer, own in uses.items():
                if layer in self.found or layer in self._left:
                    self.unknown[layer] = 'more than one backward pass'
                    continue
                try:
                    rules = [_rule(node, slot) for node, slot, _ in own]
                except Unknown as ex:
                    self.unknown[layer] = str(ex)
                    continue
                self._left[layer] = len(own)
                for (node, _, transposed), rule in zip(own, rules, strict=True):
                    shapes = _shapes_of(node, parents.get(node, ()), self._handles)
                    self._handles.append(node.register_prehook(
                        lambda grads, node=node, layer=layer, rule=rule, transposed=transposed, shapes=shapes:
                        self._arrives(layer, rule, node, grads[0], transposed, shapes)))

    def _arrives(self, layer, rule, node, grad, transposed, shapes):
        if grad is None or layer in self.unknown or layer not in self._left:
            return
        with self._guard(), torch.no_grad(), _as_written(grad.device.type):
            try:
                pieces = rule(node, grad.detach(), transposed, shapes, self, self._shapes[layer])
            except Unknown as ex:
                self.unknown[layer] = str(ex)
                self._sums.pop(layer, None)
                return
            if layer in self._sums:
                pieces = [a + b for a, b in zip(self._sums[layer], pieces, strict=True)]
            self._left[layer] -= 1
            if self._left[layer]:
                self._sums[layer] = pieces
                return
            self._sums.pop(layer, None)
            squares = sums(dict(enumerate([*pieces, sum(pieces)])), ['squares'])['squares']
            *of_pieces, of_sum = squares.values()
            self.found[layer] = sum(of_pieces), of_sum

    def split(self, tensor, axis=0):
        """
        Args:
            tensor (Tensor):
            axis (int): of the examples, of which there may be several of its numbers each

        Returns:
            List[Tensor]: that of each chunk, with the examples first
        """
        each = tensor.shape[axis] // self._examples
        return tensor.movedim(axis, 0).split([size * each for size in self.sizes])

    def axis(self, *shapes):
        """
        Where the examples are.

        Args:
            *shapes (Tuple[int, ...] | None): ways to read the rows of one tensor, the likeliest first

        Returns:
            Tuple[Tuple[int, ...], int]: the first shape with one axis of as many as there are examples, and it

        Raises:
            Unknown: if there is none
        """
        shapes = [shape for shape in shapes if shape]
        for shape in shapes:
            if list(shape).count(self._examples) == 1:
                return shape, list(shape).index(self._examples)
        if any(self._examples in shape for shape in shapes):
            raise Unknown('two axes are as long as the batch')
        raise Unknown('no axis is as long as the batch')

    def close(self):
        """ Leave nothing behind. """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._sums = {}
        for layer, left in self._left.items():
            if left and layer not in self.unknown:
                self.unknown[layer] = 'the backward pass did not reach it'
        self._left = {}


@contextlib.contextmanager
def _as_written(device):
    """ Neither autocast, nor a mode that watches functions. """
    with torch.autocast(device, enabled=False), torch._C.DisableTorchFunction():
        yield


# --- the graph -------------------------------------------------------------------

def _graph(root, layers):
    """ Parents of each node, as (node, slot); and the leaves of some parameters, by layer. """
    parents, leaves, todo = {root: []}, {}, [root]
    while todo:
        node = todo.pop()
        for slot, (below, _) in enumerate(node.next_functions):
            if below is None:
                continue
            if below not in parents:
                parents[below] = []
                todo.append(below)
                layer = layers.get(id(getattr(below, 'variable', None)))
                if layer is not None:
                    leaves[layer] = below
            parents[below].append((node, slot))
    return parents, leaves


def _uses(node, parents, is_matrix, transposed=False):
    """ The operations that take a weight, each with the slot, and whether it is transposed. """
    for parent, slot in parents[node]:
        name = parent.name()
        if name == 'ToCopyBackward0':
            yield from _uses(parent, parents, is_matrix, transposed)
        elif name in ('TBackward0', 'TransposeBackward0', 'PermuteBackward0') and is_matrix:
            yield from _uses(parent, parents, is_matrix, not transposed)
        else:
            yield parent, slot, transposed


def _shapes_of(node, parents, handles):
    """ In how many ways rows can be read: what came in before it was flattened; what goes out, once that is known. """
    seen = {}
    if len(parents) == 1 and parents[0][0].name() in _VIEWS:
        handles.append(parents[0][0].register_prehook(
            lambda grads: seen.update(out=None if grads[0] is None else tuple(grads[0].shape))))

    def shapes(slot, rows):
        found, below = [(rows,), _leading(seen.get('out'), rows)], node.next_functions[slot][0]
        while below is not None and below.name() in {*_VIEWS, 'ToCopyBackward0'}:
            found.append(_leading(getattr(below, '_saved_self_sym_sizes', None), rows))
            below = below.next_functions[0][0]
        return found
    return shapes


def _leading(shape, rows):
    """ The first axes of a shape, which make up so many rows; None if there are none. """
    for end in range(len(shape or ()) + 1):
        if math.prod((shape or ())[:end]) == rows:
            return tuple(int(x) for x in shape[:end])
    return None


# --- operations with weights, each a rule -----------------------------------------

def rule(*names, slot, saved):
    """
    Register how the chunks of a weight's gradient come of an operation.

    Args:
        *names (str): of nodes of autograd
        slot (int): of the weight among what goes in
        saved (str): what the node keeps and the rule reads

    Returns:
        Callable: a decorator; the function is called with (node, grad,
            transposed, shapes, chunks, shape of the weight)
    """
    def register(function):
        for name in names:
            RULES[name] = function, slot, saved
        return function
    return register


def _rule(node, slot):
    name = node.name()
    if name not in RULES or RULES[name][1] != slot:
        raise Unknown(f'used by {name}')
    function, _, saved = RULES[name]
    tensor = getattr(node, f'_raw_saved_{saved}', None)
    # What activation checkpointing or offloading keeps may be read once only, and that is by the run itself.
    if not hasattr(tensor, 'unpack_hook'):
        raise Unknown('this torch does not tell whether activations are checkpointed: 2.14 does')
    if tensor.unpack_hook is not None:
        raise Unknown('its activations are checkpointed or offloaded')
    return function


def _wide(piece):
    return piece.float() if piece.element_size() < 4 else piece


def _linear(x, slot, grad, transposed, shapes, chunks):
    lead, axis = chunks.axis(*shapes(slot, x.shape[0]))
    ins, outs = (chunks.split(t.reshape(*lead, t.shape[-1]), axis) for t in (x, grad))
    for i, o in zip(ins, outs, strict=True):
        i, o = i.reshape(-1, i.shape[-1]), o.reshape(-1, o.shape[-1])
        yield _wide(o.T @ i if transposed else i.T @ o)


@rule('AddmmBackward0', slot=2, saved='mat1')
def _addmm(node, grad, transposed, shapes, chunks, shape):
    return [node._saved_alpha * piece for piece in _linear(node._saved_mat1, 1, grad, transposed, shapes, chunks)]


@rule('MmBackward0', slot=1, saved='self')
def _mm(node, grad, transposed, shapes, chunks, shape):
    return list(_linear(node._saved_self, 0, grad, transposed, shapes, chunks))


@rule('ConvolutionBackward0', slot=1, saved='input')
def _convolution(node, grad, transposed, shapes, chunks, shape):
    x, weight = node._saved_input, node._saved_weight
    lead, axis = chunks.axis(*shapes(0, x.shape[0]))
    ins, outs = (chunks.split(t.reshape(*lead, *t.shape[1:]), axis) for t in (x, grad))
    return [_wide(torch.ops.aten.convolution_backward(
        o.reshape(-1, *grad.shape[1:]), i.reshape(-1, *x.shape[1:]), weight, [0], node._saved_stride,
        node._saved_padding, node._saved_dilation, node._saved_transposed, node._saved_output_padding,
        node._saved_groups, [False, True, False])[1]) for i, o in zip(ins, outs, strict=True)]


@rule('EmbeddingBackward0', slot=0, saved='indices')
def _embedding(node, grad, transposed, shapes, chunks, shape):
    if node._saved_sparse or node._saved_scale_grad_by_freq:
        raise Unknown('a sparse embedding, or one that is scaled by frequency')
    indices, padding = node._saved_indices, node._saved_padding_idx
    padding = padding if padding < shape[0] else -1  # for none, as a number without a sign
    _, axis = chunks.axis(tuple(indices.shape))
    return [_wide(torch.ops.aten.embedding_dense_backward(o, i, shape[0], padding, False))
            for i, o in zip(chunks.split(indices, axis), chunks.split(grad, axis), strict=True)]


# --- the check ---------------------------------------------------------------------

def known(squares, of_sum, gradient):
    """
    What is known of a layer, 0 where its chunks do not add up to its gradient.

    Args:
        squares (Tensor): sum over the chunks of their squared norms
        of_sum (Tensor): squared norm of their sum
        gradient (Tensor): squared norm of the gradient

    Returns:
        Tuple[Tensor, Tensor]: the first as it belongs to the gradient, and the gradient's

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.chunks import known
        >>> import torch
        >>> known(*torch.tensor([26., 32., 32.])), known(*torch.tensor([26., 32., 40.]))
        ((tensor(26.), tensor(32.)), (tensor(0.), tensor(0.)))
    """
    adds_up = (of_sum - gradient).abs() <= _TOLERANCE * gradient
    # What is left between the two is rounding, of which both have the same share.
    scaled = squares * torch.where(of_sum > 0, gradient / of_sum, 1.)
    return tuple(torch.where(adds_up, x, torch.zeros_like(x)) for x in (scaled, gradient))
