"""
The settings of a run, from config.yaml of LightningCLI or hparams.yaml, and what differs between runs.
"""
import datetime
import re
import struct
from pathlib import Path

from .foreign import LARGEST, readable

# In a name: a learning rate may be written as 1e-05.
NUMBER = r'\d+(?:\.\d+)?(?:e[-+]?\d+)?'
IN_SHORT = {'learning rate': 'lr', 'batch size': 'batch'}
# Settings that differ between any two runs and explain nothing.
WHEREABOUTS = {'default_root_dir', 'save_dir', 'dirpath', 'root_dir', 'log_dir', 'ckpt_path', 'version'}
# What people call the three settings that are tuned most.
COMMON_SETTINGS = {
    'learning rate': ('lr', 'learning_rate', 'base_lr', 'step_size'),
    'batch size': ('batch_size', 'train_batch_size', 'bs'),
    'optimizer': ('optimizer', 'optim', 'optimizer.class_path', 'optimizer_name'),
}
# Of a file, which takes seconds to read.
MOST_BYTES = 1 << 20
# Of a file, in all places where its aliases repeat them: a short one can hold billions.
MOST_ITEMS = 100_000
# Of numbers in one setting, such as betas.
LONGEST_LIST = 16
# What stands for an object that is written as bytes, such as a tensor.
OPAQUE = object()
# Columns that a reader can take in.
MOST_COLUMNS = 30


def read_settings(folder, names=('hparams.yaml', 'config.yaml')):
    """
    Settings of a run, as flat keys.

    Args:
        folder (str | PathLike): log folder
        names (Sequence[str]): its files of settings, of which a later one stands over an earlier one

    Returns:
        Tuple[Dict[str, object], List[str]]: dotted key to value, and what could not be read

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.settings import read_settings
        >>> import ubelt as ub
        >>> dpath = ub.Path.appdir('geowatch/tests/read_settings').delete().ensuredir()
        >>> _ = (dpath / 'config.yaml').write_text('optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1e-3}}')
        >>> read_settings(dpath)[0]
        {'optimizer.class_path': 'torch.optim.SGD', 'optimizer.init_args.lr': 0.001}
    """
    settings, notes = {}, []
    for name in names:
        fpath = Path(folder) / name
        if fpath.is_file():
            try:
                # What LightningCLI wrote is what ran: it stands over hparams.
                settings.update(_flat(_load_yaml(fpath)))
            except _TooLarge as ex:
                notes.append(f'{name} {ex} and is left out')
            except Exception as ex:
                notes.append(f'{name} could not be read ({type(ex).__name__}) and is left out')
    return {key: value for key, value in settings.items() if key.rpartition('.')[2] not in WHEREABOUTS}, notes


class _TooLarge(Exception):
    """ Which limit a file is over. """


def _load_yaml(fpath):
    import yaml
    if fpath.stat().st_size > MOST_BYTES:
        raise _TooLarge(f'is larger than {MOST_BYTES >> 20} MB')

    class Loader(yaml.SafeLoader):
        """ Reads objects of unknown classes as the plain data that they are written with. """

    def plain(loader, suffix, node):
        if isinstance(node, yaml.MappingNode):
            made = loader.construct_mapping(node, deep=True)
        elif isinstance(node, yaml.SequenceNode):
            made = _number_of(suffix, loader.construct_sequence(node, deep=True))
        else:
            made = node.value or suffix.rpartition(':')[2]  # a class or a function, which has nothing but its name
        return OPAQUE if _holds_bytes(made) else made

    Loader.add_multi_constructor('', plain)
    loader = Loader(fpath.read_text(encoding='utf-8'))
    node = loader.get_single_node()
    if _items(node, {}) > MOST_ITEMS:
        raise _TooLarge(f'holds more than {MOST_ITEMS} items in its aliases')
    return None if node is None else loader.construct_document(node)


def _number_of(kind, parts):
    """ NumPy's numbers are written as their bytes, such as a learning rate of logspace. """
    if kind.endswith('multiarray.scalar'):
        dtype, binary = parts
        letter = {'f8': 'd', 'f4': 'f', 'i8': 'q', 'i4': 'i', 'b1': '?'}.get(dtype['args'][0])
        return struct.unpack(f'<{letter}', binary)[0] if letter else OPAQUE
    return parts


def _holds_bytes(item):
    inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return item is OPAQUE or isinstance(item, bytes) or any(map(_holds_bytes, inner))


def _items(node, known):
    """ How many there are in a node of YAML, each as often as an alias repeats it. """
    if id(node) not in known:
        known[id(node)] = MOST_ITEMS + 1  # of what is inside itself
        own = getattr(node, 'value', None)
        inner = [x for item in (own if isinstance(own, list) else ())
                 for x in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = min(1 + sum(_items(x, known) for x in inner), MOST_ITEMS + 1)
    return known[id(node)]


def _is_scalar(item):
    return item is None or isinstance(item, (str, int, float, datetime.date))


def _flat(item, prefix=''):
    if isinstance(item, dict):
        return {key: value for name, inner in item.items() for key, value in _flat(inner, f'{prefix}{name}.').items()}
    if isinstance(item, (list, tuple)) and not all(map(_is_scalar, item)):
        return _flat(dict(enumerate(item)), prefix)
    if not _is_scalar(item) and not (isinstance(item, (list, tuple)) and len(item) <= LONGEST_LIST):
        return {}  # a tensor, an object that cannot be read, or more than a reader can compare
    if isinstance(item, str) and re.fullmatch(r'[-+.\d][-+.\deE]{0,40}', item):
        # YAML 1.1 takes 1e-3 for text.
        try:
            item = float(item)
        except ValueError:
            pass
    if isinstance(item, int) and abs(item) > LARGEST:
        item = str(item)
    return {readable(prefix.removesuffix('.')): item} if prefix else {}


def compared_settings(runs):
    """
    The columns of settings: the usual three where known, and all that differs.

    Args:
        runs (List[Run]): the runs of the report

    Returns:
        Tuple[Dict[str, List[object]], int]: title to one value per run, None
            where a run has none; and how many more differ
    """
    columns, more = {}, 0
    used = set()
    for title, names in COMMON_SETTINGS.items():
        keys = [find_key(run.settings, names) for run in runs]
        used |= set(keys)
        values = [_short(run.settings.get(key)) for run, key in zip(runs, keys, strict=True)]
        if any(value is not None for value in values):
            columns[title] = values
    for key in dict.fromkeys(key for run in runs for key in run.settings if key not in used):
        values = [run.settings.get(key) for run in runs]
        if len(set(map(str, values))) > 1 and not _is_twin(key, values, columns):
            if len(columns) < MOST_COLUMNS:
                columns[key] = values
            else:
                more += 1
    return columns, more


def _is_twin(key, values, columns):
    """ Is it in the table already under another key, as model.lr beside optimizer.lr? """
    name = key.rpartition('.')[2]
    return any(name in (title.rpartition('.')[2], *COMMON_SETTINGS.get(title, ()))
               and list(map(_short, values)) == column for title, column in columns.items())


def find_key(settings, names):
    """ The key of that name which is nearest to the root; one of the optimizer goes first. """
    keys = [key for key in settings if any(key == name or key.endswith(f'.{name}') for name in names)]
    return min(keys, key=lambda key: ('optim' not in key, key.count('.'), key), default=None)


def _short(value):
    """ torch.optim.SGD is SGD. """
    return value.rpartition('.')[2] if isinstance(value, str) and re.fullmatch(r'[\w.]+', value) else value


def in_short(title, value):
    """
    A setting in a label.

    Args:
        title (str): of its column
        value (object): of a run

    Returns:
        str:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.settings import in_short
        >>> in_short('learning rate', 1e-5), in_short('optimizer', 'AdamW')
        ('lr 1e-05', 'AdamW')
    """
    text = f'{value:g}' if _is_number(value) else readable(str(value), 40)
    return text if title == 'optimizer' else f'{IN_SHORT.get(title, title)} {text}'


def is_in_name(value, name):
    """
    Does a name hold a setting, be it written in another way?

    Args:
        value (object): None is in every name
        name (str): of a run

    Returns:
        bool:

    Example:
        >>> from geowatch.utils.lightning_ext.callbacks.plasticity_report.settings import is_in_name
        >>> is_in_name(2.0, 'lr2-bs8'), is_in_name(0.00001, 'lr1e-05'), is_in_name(0.1, 'lr0.01')
        (True, True, False)
    """
    if _is_number(value):
        return value in map(float, re.findall(NUMBER, name))
    return value is None or str(value) in name


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)
