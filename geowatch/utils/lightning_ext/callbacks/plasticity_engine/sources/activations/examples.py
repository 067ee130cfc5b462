"""
How many examples a batch has.

Where a batch is a tensor, or a collection of which all tensors have equally
many, this is what Lightning's extraction says. Here what disagrees is weighed,
and a list is told apart that holds examples instead of inputs.
"""
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn
from torch.nn.utils.rnn import PackedSequence

_PLAIN = (bool, int, float, complex, str, bytes)
_CHANNELS = (1, 3)
# A list of more things of one kind holds examples rather than inputs.
_MOST_INPUTS = 4
_DEEPEST = 8


class _Word(NamedTuple):
    """
    What one part of a batch says.

    Attributes:
        count (int): examples
        axes (int): how many it has, which is how much it knows: images more than a table beside them
        second (int | None): length of the second axis
        counts (bool): it is of whole numbers
        is_list (bool): of plain numbers, which may be lengths of sequences
    """
    count: int
    axes: int
    second: int | None = None
    counts: bool = False
    is_list: bool = False


def count_examples(batch) -> int:
    """
    Examples in a batch.

    Args:
        batch (Any): tensors in any nesting of collections, dataclasses and
            objects; a list of items as in geowatch, where an item may be None;
            what knows itself: packed and nested sequences, batches of graphs

    Returns:
        int: 0 for an empty list and None, 1 where nothing says more

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations.examples import (
        >>>     count_examples)
        >>> import torch
        >>> count_examples([{'frames': []}, None, {'frames': []}]), count_examples((torch.ones(5, 2), [1] * 5))
        (2, 5)
        >>> image, table = torch.ones(3, 32, 32), torch.ones(8732, 4)
        >>> count_examples([image] * 8), count_examples({'table': table, 'images': torch.stack([image] * 4)})
        (8, 4)
    """
    word = _word(batch)
    return int(batch is not None) if word is None else word.count


def _word(x, depth=0):
    """ What something says, or None. """
    if x is None or isinstance(x, (*_PLAIN, type, nn.Module, Iterator)) or depth > _DEEPEST:
        return None
    if (count := _own_count(x)) is not None:
        return _Word(count, _DEEPEST)
    if (shape := _shape(x)) is not None:
        return _Word(shape[0], len(shape), shape[1] if len(shape) > 1 else None, 'int' in _dtype(x)) if shape else None
    if _is_list(x):
        return _word_of_list([item for item in x if item is not None], depth + 1)
    if isinstance(x, Mapping):
        parts = x.values()
    elif dataclasses.is_dataclass(x):
        parts = [_get(x, field.name) for field in dataclasses.fields(x)]
    elif isinstance(x, tuple):
        parts = x
    else:
        # An object may know the whole program.
        parts, depth = getattr(x, '__dict__', {}).values(), depth + _DEEPEST // 2
    return _agreed([_word(part, depth + 1) for part in parts])


def _get(x, name):
    """ An attribute, or None: those of other libraries may raise anything. """
    try:
        return getattr(x, name, None)
    except Exception:
        return None


def _own_count(x):
    """ Of what knows how many examples it has: sequences in one tensor, graphs in one graph. """
    if isinstance(x, PackedSequence):
        return int(x.batch_sizes[0])
    if _get(x, 'is_nested') is True:
        return x.size(0)
    for name in ('num_graphs', 'batch_size'):
        count = None if isinstance(x, Mapping) else _get(x, name)
        if isinstance(count, int) and not isinstance(count, bool) and count > 0:
            return count
    return None


def _shape(x):
    """ Of a tensor, of any library. """
    shape = None if _get(x, 'is_nested') is True else _get(x, 'shape')
    return tuple(shape) if isinstance(shape, (tuple, list)) else None


def _dtype(x):
    return str(_get(x, 'dtype'))


def _is_list(x):
    return isinstance(x, (list, tuple)) and not hasattr(x, '_fields')


def _kind(x):
    """ In which two examples are alike, and two inputs of one batch need not be. """
    shape = _shape(x)
    return type(x).__name__ if shape is None else (len(shape), _dtype(x))


def _word_of_list(items, depth):
    """ Of a list or tuple: its items are examples, or inputs. """
    if all(isinstance(item, _PLAIN) for item in items):
        return _Word(len(items), 1, None, all(isinstance(item, int) for item in items), True)
    axes = _DEEPEST
    if all(_shape(item) is not None for item in items):
        are_examples = _are_examples(items)
    elif all(map(_is_list, items)):
        kinds = {tuple(map(_kind, item)) for item in items}
        # Of several lengths, or (image, label) each: a batch of two inputs has all images and all labels.
        are_examples = len({len(kind) for kind in kinds}) > 1 or len(kinds) == 1 and (
            len(set(*kinds)) > 1 or isinstance(items[0], list))
    else:
        # What a tokenizer returns is a batch by itself. Objects beside tensors may be anything.
        axes = 1
        are_examples = not any(
            isinstance(item, _PLAIN) or _shape(item) is not None or _is_list(item) or _own_count(item) is not None
            or isinstance(item, Mapping) and not isinstance(item, dict) for item in items)
    return _Word(len(items), axes) if are_examples else _agreed([_word(item, depth) for item in items])


def _are_examples(tensors):
    """ Whether tensors are one example each. """
    shapes = [_shape(tensor) for tensor in tensors]
    if len({_kind(tensor) for tensor in tensors}) > 1:
        return False
    axes, first = len(shapes[0]), shapes[0][:1]
    if axes == 0:
        return True
    if any(shape[:1] != first for shape in shapes):
        words = [_word(tensor) for tensor in tensors]
        return not _are_tokens(words) and not _are_tokens_in_one(words)
    are_images = axes > 2 and first[0] in _CHANNELS and all(shape[1] > _MOST_INPUTS for shape in shapes)
    return are_images or axes in (2, 3) and len(tensors) > _MOST_INPUTS


def _are_tokens(words):
    """ Whether a few are tokens (time, batch), of one batch. """
    return len(words) <= _MOST_INPUTS and all(word.counts and word.axes == 2 for word in words) and len(
        {word.second for word in words}) == 1


def _are_tokens_in_one(words):
    """ Whether they are labels, the tokens of all in one row, and where each begins, as nn.EmbeddingBag takes them. """
    counts = Counter(word.count for word in words)
    return len(words) in (3, 4) and all(word.counts and word.axes == 1 for word in words) and (
        len(counts) == 2 and min(counts.values()) == 1 < max(counts.values()))


def _agreed(words):
    """ What most say; of as many, those that have more axes, and then the first. """
    words = [word for word in words if word is not None]
    counts = Counter(word.count for word in words)
    if len(words) > 1 and len(counts) == len(words):
        # Nobody agrees: it may be time that comes first, and the batch second.
        if _are_tokens(words):
            return _Word(words[0].second, _DEEPEST)
        lengths = [word for word in words if word.axes == 1 and word.counts]
        grids = [word for word in words if word.axes == 3 or word.axes == 2 and (word.counts or lengths[0].is_list)
                 ] if lengths else []
        if len(lengths) == 1 and len(grids) == len(words) - 1 and {word.second for word in grids} == {
                lengths[0].count}:
            return lengths[0]
    return max(words, key=lambda word: (counts[word.count], word.axes), default=None)
