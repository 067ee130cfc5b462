"""
The `geowatch` command, as a user types it, on data that is generated on the spot.
"""
import json
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from common import ACTIVATIONS, NOISE, last, lines_of, of_source

from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS

pytest.importorskip('geowatch.tasks.fusion', reason='geowatch is not installed')

# Its items are taken one by one, so that a batch has no chunks.
TAGS = tuple(name for name in METRICS if name not in NOISE)
CONFIG = {
    'seed_everything': 0,
    'data': {
        'train_dataset': 'special:vidshapes2-frames4-multispectral-gsize32',
        'vali_dataset': 'special:vidshapes1-frames4-multispectral-gsize32',
        'chip_dims': 32, 'time_steps': 2, 'batch_size': 2, 'num_workers': 0, 'max_epoch_length': 6,
        'reseed_fit_random_generators': False,  # by default no two runs of the host are alike
    },
    'model': 'HeterogeneousModel',
    'optimizer': {'class_path': 'torch.optim.SGD', 'init_args': {'lr': 0.001}},
    'trainer': {
        'accelerator': 'cpu', 'devices': 1, 'default_root_dir': './run', 'num_sanity_val_steps': 0,
        'max_epochs': 2, 'limit_val_batches': 2, 'log_every_n_steps': 2,
    },
}
MONITOR = 'geowatch.utils.lightning_ext.callbacks.plasticity.PlasticityMonitor'


def write_config(folder, name='existing.yaml', **trainer):
    config = {**CONFIG, 'trainer': {**CONFIG['trainer'], **trainer}}
    (folder / name).write_text(yaml.safe_dump(config))
    return config


def run(*command, cwd):
    done = subprocess.run([str(arg) for arg in command], cwd=cwd, text=True, timeout=900, stdout=subprocess.PIPE,
                          # On one thread, since on two under load sums differ in their last bits.
                          stderr=subprocess.STDOUT, env={**os.environ, 'GEOWATCH_PREIMPORT': '0',
                                                         'OMP_NUM_THREADS': '1'})
    return done.returncode, done.stdout


def geowatch(*args, cwd):
    """ The installed command; its output, if it ends well. """
    code, output = run(Path(sys.executable).parent / 'geowatch', *args, cwd=cwd)
    assert code == 0, output[-3000:]
    return output


def measured(folder, start=False):
    """ The log folder of the only run, and its lines; those of the untrained network only if asked for. """
    (fpath,) = folder.glob('lightning_logs/*/plasticity.jsonl')
    lines = [json.loads(line) for line in fpath.read_text().splitlines()]
    return fpath.parent, [line for line in lines if start or line['step'] >= 0]


def without_times(lines):
    return [{key: value for key, value in line.items() if key not in ('time', 'run')} for line in lines]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """ An existing config, trained with all metrics. """
    root = tmp_path_factory.mktemp('trained')
    write_config(root)
    output = geowatch('fit', '--config=existing.yaml', '--plasticity_metrics=all', '--trainer.max_epochs=2', cwd=root)
    log_dir, lines = measured(root / 'run', start=True)
    return root, log_dir, lines, output


def test_measures_everything(trained):
    _, _, lines, output = trained
    # No sanity check, so that of the untrained network there are the weights only.
    assert {line['metric'] for line in lines if line['step'] < 0} == set(of_source('weights'))
    lines = [line for line in lines if line['step'] >= 0]
    assert {line['metric'] for line in lines} == set(TAGS)
    # Three steps an epoch; weights and gradients every two steps and at least once an epoch.
    assert [line['step'] for line in lines_of(lines, 'weight_mag')] == [1, 3, 5]
    assert [line['step'] for line in lines_of(lines, 'erank')] == [2, 5]
    for tag in ACTIVATIONS:
        assert [line['epoch'] for line in lines_of(lines, tag)] == [0, 1]
        assert all(line['samples'] > 0 and len(line['layers']) >= 2 for line in lines_of(lines, tag))
    shares = ('dead_units', 'rare_units')
    assert all(line['value'] > 0 for line in lines if line['metric'] not in (*shares, 'step_alignment'))
    assert all(0 <= line['value'] <= 1 for line in lines if line['metric'] in shares)
    (said,) = [line for line in output.splitlines() if line.startswith('PlasticityMonitor: weight_mag')]
    assert 'activations in validation' in said
    assert 'never measured: noise_fraction, noise_scale' in output and 'one by one' in output


def test_weight_mag_is_that_of_the_checkpoint(trained):
    import torch
    _, log_dir, lines, _ = trained
    (fpath,) = [path for path in log_dir.glob('checkpoints/*.ckpt') if 'step=6' in path.name]
    state = torch.load(fpath, map_location='cpu', weights_only=False)['state_dict']
    line = last(lines, 'weight_mag')
    assert line['step'] == 5 and len(line['layers']) > 10
    total = count = 0
    for name in line['layers']:
        weight = state[f'{name}.weight'] if f'{name}.weight' in state else state[name]
        assert line['layers'][name]['value'] == pytest.approx(weight.double().abs().mean().item(), rel=1e-6)
        total += weight.double().abs().sum().item()
        count += weight.numel()
    assert line['value'] == pytest.approx(total / count, rel=1e-6)


def test_tags_and_pictures(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    _, log_dir, lines, _ = trained
    events = EventAccumulator(str(log_dir), size_guidance={'scalars': 0})
    events.Reload()
    tags = {tag for tag in events.Tags()['scalars'] if 'plasticity' in tag}
    assert tags == {f'plasticity/{tag}' for tag in TAGS} and len(tags) <= 16
    for tag in TAGS:
        assert [(e.step, pytest.approx(e.value, rel=1e-5)) for e in events.Scalars(f'plasticity/{tag}')] == [
            (line['step'], line['value']) for line in lines_of(lines, tag)]
    # The host draws each tag.
    for tag in TAGS:
        (picture,) = log_dir.glob(f'monitor/tensorboard/plasticity_FS_{tag}.png')
        assert picture.stat().st_size > 1000


def test_package_of_the_model_has_nothing_of_ours(trained):
    import zipfile

    import torch
    from geowatch.tasks.fusion.utils import load_model_from_package
    _, log_dir, _, _ = trained
    (fpath,) = log_dir.glob('packages/*.pt')
    with zipfile.ZipFile(fpath) as file:
        assert not [name for name in file.namelist() if 'plasticity' in name]
    model = load_model_from_package(fpath)
    (saved,) = [path for path in log_dir.glob('checkpoints/*.ckpt') if 'step=6' in path.name]
    state = torch.load(saved, map_location='cpu', weights_only=False)['state_dict']
    assert all(torch.equal(param, state[name]) for name, param in model.named_parameters())


def test_repeated_from_its_config(trained):
    root, log_dir, lines, _ = trained
    config = yaml.safe_load((log_dir / 'config.yaml').read_text())
    (callback,) = [c for c in config['trainer']['callbacks'] if c['class_path'] == MONITOR]
    assert callback['init_args']['metrics'] == 'all'
    geowatch('fit', f'--config={log_dir / "config.yaml"}', '--trainer.default_root_dir=again', cwd=root)
    _, again = measured(root / 'again', start=True)
    assert without_times(again) == without_times(lines)


def test_callback_in_the_config_and_flags_beside_another_callback(tmp_path):
    # A config of its own callbacks, one of them ours: as YAML text in place of a file.
    callbacks = [{'class_path': 'pytorch_lightning.callbacks.ModelSummary', 'init_args': {'max_depth': 2}},
                 {'class_path': MONITOR, 'init_args': {'metrics': 'weight_mag@1', 'layers': 'heads.*'}}]
    config = write_config(tmp_path, callbacks=callbacks, max_epochs=1)
    geowatch('fit', '--config=' + yaml.safe_dump(config), cwd=tmp_path)
    log_dir, lines = measured(tmp_path / 'run')
    assert [(line['metric'], line['step']) for line in lines] == [('weight_mag', step) for step in range(3)]
    assert all(name.startswith('heads.') for line in lines for name in line['layers'])

    write_config(tmp_path, callbacks=callbacks[:1], max_epochs=1, default_root_dir='./flags')
    geowatch('fit', '--config', 'existing.yaml', '--plasticity_metrics', 'erank@2,grad_mag', '--plasticity_interval=3',
             '--plasticity_per_layer', cwd=tmp_path)
    log_dir, lines = measured(tmp_path / 'flags')
    assert [(line['metric'], line['step']) for line in lines] == [
        ('erank', 1), ('grad_mag', 2), ('grad_norm', 2)]
    text = (log_dir / 'config.yaml').read_text()
    assert 'pytorch_lightning.callbacks.ModelSummary' in text and 'per_layer: true' in text


def test_without_flags_it_trains_as_the_fusion_cli_does(tmp_path):
    import torch
    write_config(tmp_path, max_epochs=1)
    states = {}
    for name, command in {
            'ours': [Path(sys.executable).parent / 'geowatch', 'fit'],
            'host': [sys.executable, '-m', 'geowatch.tasks.fusion', 'fit']}.items():
        code, output = run(*command, '--config=existing.yaml', f'--trainer.default_root_dir={name}', cwd=tmp_path)
        assert code == 0, output[-3000:]
        (fpath,) = tmp_path.glob(f'{name}/lightning_logs/*/checkpoints/*.ckpt')
        states[name] = torch.load(fpath, map_location='cpu', weights_only=False)['state_dict']
        assert not list(tmp_path.glob(f'{name}/**/plasticity*'))
    assert states['ours'].keys() == states['host'].keys()
    assert all(torch.equal(x, states['host'][key]) for key, x in states['ours'].items() if isinstance(x, torch.Tensor))


def test_help_shows_our_flags(tmp_path):
    output = geowatch('fit', '--help', cwd=tmp_path)
    for flag in ('metrics', 'interval', 'source', 'samples', 'layers', 'per_layer'):
        assert f'--plasticity_{flag}' in output
    assert 'python -m geowatch.tasks.fusion fit --help' in output


def test_help_of_the_fusion_cli_is_reached(tmp_path):
    output = geowatch('fit', '--model.help=HeterogeneousModel', cwd=tmp_path)
    assert '--model.init_args' in output or '--model.token_width' in output, output[-2000:]


def test_unknown_metric_exits_with_2(tmp_path):
    code, output = run(Path(sys.executable).parent / 'geowatch', 'fit', '--plasticity_metrics=wieght_mag', cwd=tmp_path)
    assert code == 2
    assert "Did you mean 'weight_mag'" in output
    assert 'Traceback' not in output


@pytest.mark.parametrize('value, said', [('erank', 'Expected PlasticityMonitor once'), (
    'erank@sometimes', 'Expected an interval')])
def test_flags_beside_the_callback_in_the_config(value, said, monkeypatch, capsys):
    """ One error and code 2, where the trainer is made. """
    import pytorch_lightning as pl

    from geowatch.cli import fit
    from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor

    def main():
        trainer = pl.Trainer(accelerator='cpu', logger=False, callbacks=[
            PlasticityMonitor('weight_mag'), PlasticityMonitor()])
        for callback in trainer.callbacks:
            callback.setup(trainer, None, 'fit')
    monkeypatch.setattr(fit, '_import_host', lambda: SimpleNamespace(main=main))
    with pytest.raises(SystemExit) as info:
        fit.FitCLI.main(cmdline=['--config=a.yaml', f'--plasticity_metrics={value}'])
    assert info.value.code == 2
    (complaint,) = capsys.readouterr().err.splitlines()
    assert said in complaint


@pytest.mark.parametrize('error', [RuntimeError('found more than one device'), ValueError('PlasticityMonitor')])
def test_other_errors_of_the_host_are_its_own(error, monkeypatch):
    from geowatch.cli import fit

    def main():
        raise error
    monkeypatch.setattr(fit, '_import_host', lambda: SimpleNamespace(main=main))
    with pytest.raises(type(error)) as info:
        fit.FitCLI.main(cmdline=['--plasticity_metrics=erank'])
    assert info.value is error


# --- an overlay ----------------------------------------------------------------

def test_owns_no_file_of_the_host():
    theirs = {str(file) for file in distribution('geowatch').files}
    ours = {str(file) for file in distribution('geowatch-plasticity').files if file.suffix != '.pyc'}
    assert len(ours) > 10
    assert not ours & theirs
    assert not any(name.endswith('__init__.py') and not name.startswith((
        'geowatch/cli/fit/', 'geowatch/utils/lightning_ext/callbacks/plasticity_')) for name in ours)


def test_uninstalled_it_leaves_the_host_whole(tmp_path):
    """ On a copy of the host: our files put in, imported, and taken away again. """
    import shutil
    site = tmp_path / 'site'
    for name in ('geowatch', 'geowatch-plasticity'):
        own = distribution(name)
        for file in own.files:
            if file.parts[0] == 'geowatch' and file.suffix != '.pyc' and file.locate().exists():
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), site / file)
        if name == 'geowatch':
            before = {path: path.read_bytes() for path in site.rglob('*') if path.is_file()}
    code = ('import geowatch.cli.fit as fit; from geowatch.utils.lightning_ext import callbacks; '
            'print(fit.__file__, callbacks.BatchPlotter.__name__)')

    def imported():
        done = subprocess.run([sys.executable, '-c', f'import sys; sys.path.insert(0, {str(site)!r}); {code}'],
                              text=True, capture_output=True, cwd=tmp_path,
                              env={**os.environ, 'GEOWATCH_PREIMPORT': '0', 'PYTHONDONTWRITEBYTECODE': '1'})
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert str(Path('cli/fit/__init__.py')) in imported()
    # As pip does: the files that the wheel lists, and the folders that are empty then.
    for file in distribution('geowatch-plasticity').files:
        if file.parts[0] == 'geowatch':
            (site / file).unlink(missing_ok=True)
            for folder in (site / file).parents:
                if folder == site or not folder.exists() or any(folder.iterdir()):
                    break
                folder.rmdir()
    assert {path: path.read_bytes() for path in site.rglob('*') if path.is_file()} == before
    assert str(Path('cli/fit.py')) in imported()
