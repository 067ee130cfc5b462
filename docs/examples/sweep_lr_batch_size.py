"""
Sweep learning rate and batch size on a task of geowatch, and read the report on it.

Each pair is one `geowatch fit` with PlasticityMonitor. All runs see equally
many examples, so that they compare on epochs: a larger batch means fewer
steps. Read the report beside the loss. Where weights grow while ranks fall and
the loss rises, the learning rate is too large for that batch size; where
nothing moves and the loss hardly falls, it may be too small. A run that is
there already is not run again, so that a sweep can go on where it was stopped,
or grow.

CommandLine:
    python sweep_lr_batch_size.py --out=sweep
    python sweep_lr_batch_size.py --out=sweep --lrs=0.001,0.01 --batch_sizes=2,4,8 --run=0
    python sweep_lr_batch_size.py --out=mine --task=my_task.yaml --lrs=0.0001,0.001
"""
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import scriptconfig as scfg
import ubelt as ub

# Toy videos that geowatch makes by itself: small enough for a CPU.
TOY_TASK = ub.codeblock(
    '''
    data:
      train_dataset: special:vidshapes4-frames9-speed0.5-multispectral-gsize64
      vali_dataset: special:vidshapes2-frames9-speed0.5-multispectral-gsize64
      chip_dims: 64
      time_steps: 1
      max_epoch_length: 32
      num_workers: 0
    model:
      class_path: HeterogeneousModel
      init_args:
        backbone: small
    optimizer:
      class_path: torch.optim.AdamW
    trainer:
      accelerator: cpu
      devices: 1
      max_epochs: 4
      num_sanity_val_steps: 0
      log_every_n_steps: 1
    ''') + '\n'
# A run is compared with its own start: with all of validation before the first step, that is the untrained network, on
# the same examples as in each later measurement, whatever the batch size.
FIT_ARGS = '--plasticity_metrics=paper --trainer.num_sanity_val_steps=-1'
DONE = 'finished'


class SweepCLI(scfg.DataConfig):
    """
    Train with each pair of learning rate and batch size, then report on all of them.

    With the toy task a run takes about 20 seconds on one core.
    """
    out = scfg.Value('sweep', type=str, position=1, help=(
        'folder for the runs, OUT/lr0.001-bs4 and so on, and for the report'))
    lrs = scfg.Value('0.0003,0.003,0.03', type=str, help='learning rates, separated by commas')
    batch_sizes = scfg.Value('2,8', type=str, help='batch sizes, separated by commas')
    task = scfg.Value(None, type=str, help='what to train: a --config of `geowatch fit`. Default: a toy task')
    fit_args = scfg.Value(FIT_ARGS, type=str, help='further arguments of each `geowatch fit`')
    run = scfg.Value(True, isflag=True, help='with --run=0 print the commands and start nothing')

    @classmethod
    def main(cls, cmdline=1, **kwargs):
        """
        Args:
            cmdline (bool | List[str]): where arguments come from
            **kwargs: defaults of the arguments

        Returns:
            int: exit code, 1 if a run failed
        """
        config = cls.cli(cmdline=cmdline, data=kwargs, strict=True)
        out = Path(config.out)
        task = Path(config.task or out / 'task.yaml')
        if config.task is None:
            out.mkdir(parents=True, exist_ok=True)
            task.write_text(TOY_TASK)
        commands = make_commands(out, task, config.lrs.split(','), config.batch_sizes.split(','), config.fit_args)
        if config.run:
            succeeded = [run_once(folder, command) for folder, command in commands.items()]
        else:
            print('\n'.join(map(shlex.join, commands.values())))
        report = ['-m', 'geowatch.cli.plasticity_report',
                  *map(str, map(newest_log, commands)), f'--out={out / "report"}', '--x=epoch']
        print(shlex.join(['GEOWATCH_PREIMPORT=0', 'python', *report]), flush=True)
        if not config.run:
            return 0
        # Without this setting the host asks for GDAL, which the report has no use for.
        code = subprocess.call([sys.executable, *report], env={**os.environ, 'GEOWATCH_PREIMPORT': '0'})
        return code if all(succeeded) else 1


def newest_log(folder):
    """ The log folder of a run: the last one, if an earlier attempt was broken off. """
    versions = (folder / 'lightning_logs').glob('version_*')
    return max(versions, key=lambda path: path.stat().st_mtime, default=folder)


def make_commands(out, task, lrs, batch_sizes, fit_args=''):
    """
    Args:
        out (Path): folder for the runs
        task (Path): configuration for `geowatch fit`
        lrs (List[str]): learning rates
        batch_sizes (List[str]): batch sizes
        fit_args (str): further arguments

    Returns:
        Dict[Path, List[str]]: run folder to command

    Example:
        >>> commands = make_commands(Path('out'), Path('task.yaml'), ['0.1', '0.01'], ['4'])
        >>> for folder, command in commands.items():
        >>>     print(folder.name, *command[3:6])
        lr0.1-bs4 --data.batch_size=4 --optimizer.init_args.lr=0.1 --trainer.default_root_dir=out/lr0.1-bs4
        lr0.01-bs4 --data.batch_size=4 --optimizer.init_args.lr=0.01 --trainer.default_root_dir=out/lr0.01-bs4
    """
    folders = {out / f'lr{lr}-bs{batch_size}': (lr, batch_size) for batch_size in batch_sizes for lr in lrs}
    return {
        folder: ['geowatch', 'fit', f'--config={task}', f'--data.batch_size={batch_size}',
                 f'--optimizer.init_args.lr={lr}', f'--trainer.default_root_dir={folder}', *shlex.split(fit_args)]
        for folder, (lr, batch_size) in folders.items()}


def run_once(folder, command):
    """
    Run a command unless it has been run.

    Args:
        folder (Path): of the run; what the command says goes to log.txt in it
        command (List[str]): the command

    Returns:
        bool: whether it succeeded
    """
    if (folder / DONE).exists():
        print(f'{folder}: there already')
        return True
    folder.mkdir(parents=True, exist_ok=True)
    print(shlex.join(command), flush=True)
    # The report draws the curves; geowatch would draw them anew after each epoch.
    env = {**os.environ, 'DISABLE_TENSORBOARD_PLOTTER': '1', 'DISABLE_BATCH_PLOTTER': '1'}
    start = time.monotonic()
    # The one that belongs to this Python, also where it is not on the PATH.
    program = Path(sys.executable).with_name(command[0])
    with open(folder / 'log.txt', 'w') as log:
        code = subprocess.call([str(program), *command[1:]], env=env, stdout=log, stderr=subprocess.STDOUT)
    if code == 0:
        (folder / DONE).touch()
        print(f'{folder}: {time.monotonic() - start:.0f} seconds')
    else:
        print(f'{folder}: failed with exit code {code}, see {folder / "log.txt"}')
    return code == 0


if __name__ == '__main__':
    sys.exit(SweepCLI.main())
