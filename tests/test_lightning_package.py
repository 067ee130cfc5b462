"""
The callback is one of `pytorch_lightning` and of `lightning` alike, and needs no geowatch.
"""
import importlib
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
import ubelt as ub
from common import TAGS, Layers, fit, make_net

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor

CLASS = 'geowatch.utils.lightning_ext.callbacks.plasticity.PlasticityMonitor'
BOTH = pytest.mark.parametrize('name', ['pytorch_lightning', 'lightning.pytorch'])


def package_of(name):
    return pytest.importorskip(name, reason=f'{name.split(".")[0]} is not installed')


@BOTH
def test_is_a_callback_of(name):
    package = package_of(name)
    assert isinstance(PlasticityMonitor(), package.Callback)
    assert issubclass(PlasticityMonitor, package.callbacks.Callback)


@BOTH
def test_command_line_of(name, tmp_path, monkeypatch):
    """ jsonargparse checks the type, and the choice lands in the run's config. """
    package = package_of(name)
    cli_of = importlib.import_module(f'{name}.cli').LightningCLI
    monkeypatch.chdir(tmp_path)
    model = type('CLINet', (Layers, package.LightningModule), {})
    args = ['--trainer.logger=false', '--trainer.accelerator=cpu', f'--trainer.callbacks+={CLASS}',
            '--trainer.callbacks.metrics=weight_mag@1,erank', '--trainer.callbacks.samples=20',
            '--trainer.callbacks.per_layer=true']
    cli = cli_of(model, run=False, save_config_callback=None, args=args)
    (monitor,) = [c for c in cli.trainer.callbacks if isinstance(c, PlasticityMonitor)]
    assert (monitor.metrics, monitor.samples, monitor.per_layer) == ('weight_mag@1,erank', 20, True)
    # A run is repeated from the config that it wrote.
    (tmp_path / 'config.yaml').write_text(cli.parser.dump(cli.config))
    again = cli_of(model, run=False, save_config_callback=None, args=['--config=config.yaml'])
    (monitor,) = [c for c in again.trainer.callbacks if isinstance(c, PlasticityMonitor)]
    assert (monitor.metrics, monitor.interval, monitor.source, monitor.samples, monitor.layers, monitor.per_layer) == (
        'weight_mag@1,erank', 'auto', 'auto', 20, None, True)


@BOTH
def test_command_line_refuses_what_is_wrong(name, tmp_path, monkeypatch, capsys):
    package = package_of(name)
    cli_of = importlib.import_module(f'{name}.cli').LightningCLI
    monkeypatch.chdir(tmp_path)
    model = type('CLINet', (Layers, package.LightningModule), {})
    with pytest.raises(SystemExit) as info:
        cli_of(model, run=False, args=['--trainer.logger=false', f'--trainer.callbacks+={CLASS}',
                                       '--trainer.callbacks.sample=3'])
    assert info.value.code == 2
    assert 'sample' in capsys.readouterr().err
    # Its parser knows types only: the class says what else is wrong.
    with pytest.raises((ValueError, SystemExit)) as info:
        cli_of(model, run=False, args=['--trainer.logger=false', f'--trainer.callbacks+={CLASS}',
                                       '--trainer.callbacks.metrics=wieght_mag'])
    assert "Did you mean 'weight_mag'" in str(info.value) + capsys.readouterr().err


@pytest.mark.parametrize('source', ['train', 'validation'])
def test_both_measure_the_same(tmp_path, source):
    runs = {}
    for name in ('pytorch_lightning', 'lightning.pytorch'):
        package = package_of(name)
        net = make_net(type('Net', (Layers, package.LightningModule), {}), dead=5)
        _, trainer, lines, _ = fit(tmp_path / name, PlasticityMonitor(interval=2, source=source, samples=16), net,
                                   package=package)
        assert isinstance(trainer, package.Trainer)
        assert {f'plasticity/{tag}' for tag in TAGS} <= set(trainer.callback_metrics)
        runs[name] = [{key: value for key, value in line.items() if key not in ('time', 'run')} for line in lines]
    one, two = runs.values()
    assert {line['metric'] for line in one} == set(TAGS)
    assert one == two


@BOTH
def test_early_stopping_and_checkpoint_of(name, tmp_path):
    package = package_of(name)
    net = make_net(type('Net', (Layers, package.LightningModule), {}))
    keeper = package.callbacks.ModelCheckpoint(tmp_path / 'best', monitor='plasticity/erank', mode='max')
    stopping = package.callbacks.EarlyStopping('plasticity/dead_units', stopping_threshold=-1., mode='max')
    _, trainer, lines, _ = fit(tmp_path, PlasticityMonitor(), net, package=package, callbacks=[keeper, stopping])
    assert trainer.global_step == 5
    (erank,) = [line['value'] for line in lines if line['metric'] == 'erank']
    assert float(keeper.best_model_score) == pytest.approx(erank)


# --- without geowatch --------------------------------------------------------

@pytest.fixture(scope='module')
def without_geowatch(tmp_path_factory):
    """ A folder with our installed files, and one with links to all packages but geowatch. """
    root = tmp_path_factory.mktemp('without_geowatch')
    ours = [file for file in distribution('geowatch-plasticity').files if file.parts[0] == 'geowatch']
    if not ours:
        pytest.skip('geowatch-plasticity is not installed as a wheel')
    for file in ours:
        if file.suffix == '.py':
            target = root / 'ours' / str(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), target)
    assert not list((root / 'ours/geowatch').glob('__init__.py'))
    (root / 'others').mkdir()
    for folder in map(Path, sys.path):
        if folder.name in {'site-packages', 'dist-packages'}:
            for path in folder.iterdir():
                link = root / 'others' / path.name
                if not path.name.startswith('geowatch') and path.suffix != '.pth' and not link.exists():
                    link.symlink_to(path)

    def run(code):
        """ Output and exit status of code in a fresh interpreter. """
        code = f'import sys; sys.path[:0] = {[str(root / "ours"), str(root / "others")]!r}\n' + ub.codeblock(code)
        return subprocess.run([sys.executable, '-I', '-S', '-c', code], cwd=root, text=True, timeout=300,
                              capture_output=True, env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'})
    return run


def test_training_without_geowatch(without_geowatch):
    done = without_geowatch(
        '''
        import json, pathlib, warnings, torch
        import geowatch
        assert geowatch.__file__ is None, geowatch.__file__
        import pytorch_lightning as pl
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor

        class Net(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
            def training_step(self, batch, batch_idx):
                return self.net(batch).square().mean()
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        trainer = pl.Trainer(max_epochs=1, accelerator='cpu', callbacks=[PlasticityMonitor()],
                             default_root_dir='run', enable_progress_bar=False, enable_checkpointing=False)
        trainer.fit(Net(), torch.utils.data.DataLoader(torch.randn(20, 8), batch_size=8))
        lines = (pathlib.Path(trainer.log_dir) / 'plasticity.jsonl').read_text().splitlines()
        print(json.dumps(sorted(json.loads(line)['metric'] for line in lines if json.loads(line)['step'] >= 0)))
        ''')
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == sorted(TAGS)


def test_command_without_geowatch_says_what_to_install(without_geowatch):
    done = without_geowatch(
        '''
        from geowatch.cli.fit import main
        main(cmdline=['--plasticity_metrics=erank', '--config=a.yaml'])
        ''')
    assert done.returncode not in (0, None)
    assert 'pip install' in done.stderr and 'geowatch' in done.stderr
    assert 'Traceback' not in done.stderr
    assert len([line for line in done.stderr.splitlines() if 'geowatch' in line]) == 1
