"""
The settings of a run, from config.yaml of LightningCLI or hparams.yaml, and what differs between runs.
"""
import re
from pathlib import Path

# Settings that differ between any two runs and explain nothing.
WHEREABOUTS = {'default_root_dir', 'save_dir', 'dirpath', 'root_dir', 'log_dir', 'ckpt_path', 'version'}
# What people call the three settings that are tuned most.
COMMON_SETTINGS = {
    'learning rate': ('lr', 'learning_rate', 'step_size'),
    'batch size': ('batch_size',),
    'optimizer': ('optimizer', 'optim', 'optimizer.class_path', 'optimizer_name'),
}


def read_settings(folder):
    """
    Settings of a run, as flat keys.

    Args:
        folder (str | PathLike): log folder

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
    for name in ('hparams.yaml', 'config.yaml'):
        fpath = Path(folder) / name
        if fpath.exists():
            try:
                # What LightningCLI wrote is what ran: it stands over hparams.
                settings.update(_flat(_load_yaml(fpath)))
            except Exception as ex:
                notes.append(f'{name} could not be read ({type(ex).__name__})')
    return {key: value for key, value in settings.items() if key.rpartition('.')[2] not in WHEREABOUTS}, notes


def _load_yaml(fpath):
    import yaml

    class Loader(yaml.SafeLoader):
        """ Reads objects of unknown classes as the plain data that they are written with. """

    def plain(loader, suffix, node):
        if isinstance(node, yaml.MappingNode):
            return loader.construct_mapping(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return loader.construct_sequence(node, deep=True)
        return node.value

    Loader.add_multi_constructor('', plain)
    return yaml.load(fpath.read_text(encoding='utf-8'), Loader)


def _flat(item, prefix=''):
    if isinstance(item, dict):
        return {key: value for name, inner in item.items() for key, value in _flat(inner, f'{prefix}{name}.').items()}
    if isinstance(item, (list, tuple)) and any(isinstance(inner, (dict, list)) for inner in item):
        return _flat(dict(enumerate(item)), prefix)
    if isinstance(item, str) and re.fullmatch(r'[-+.\d][-+.\deE]*', item):
        # YAML 1.1 takes 1e-3 for text.
        try:
            item = float(item)
        except ValueError:
            pass
    return {prefix.removesuffix('.'): item} if prefix else {}


def compared_settings(runs):
    """
    The columns of settings: the usual three where known, and all that differs.

    Args:
        runs (List[Run]): the runs of the report

    Returns:
        Dict[str, List[object]]: title to one value per run, None where a run has none
    """
    columns = {}
    used = set()
    for title, names in COMMON_SETTINGS.items():
        keys = [_find_key(run.settings, names) for run in runs]
        used |= set(keys)
        values = [_short(run.settings.get(key)) for run, key in zip(runs, keys, strict=True)]
        if any(value is not None for value in values):
            columns[title] = values
    for key in dict.fromkeys(key for run in runs for key in run.settings if key not in used):
        values = [run.settings.get(key) for run in runs]
        if len(set(map(str, values))) > 1 and not _is_twin(key, values, columns):
            columns[key] = values
    return columns


def _is_twin(key, values, columns):
    """ Is it in the table already under another key, as model.lr beside optimizer.lr? """
    name = key.rpartition('.')[2]
    return any(name in (title.rpartition('.')[2], *COMMON_SETTINGS.get(title, ()))
               and list(map(_short, values)) == column for title, column in columns.items())


def _find_key(settings, names):
    """ The key of that name which is nearest to the root; one of the optimizer goes first. """
    keys = [key for key in settings if any(key == name or key.endswith(f'.{name}') for name in names)]
    return min(keys, key=lambda key: ('optim' not in key, key.count('.'), key), default=None)


def _short(value):
    """ torch.optim.SGD is SGD. """
    return value.rpartition('.')[2] if isinstance(value, str) and re.fullmatch(r'[\w.]+', value) else value
