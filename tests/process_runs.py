"""
What runs in processes of their own: a run that is killed, and the ranks of a distributed one.

The processes are forked from a server that has imported everything once, since
to start one afresh takes ten seconds.
"""
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
import warnings

import pytorch_lightning as pl
import torch
from common import Net, make_data, make_net
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine import processes, publisher
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sinks import JsonLines
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations import sharded
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics import calls as statistics_of_calls
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics import tensors
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS

# With torch 2.6 fully_shard fails on a CPU, whose streams lack what it calls.
CAN_SHARD_ON_CPU = hasattr(pl.strategies, 'ModelParallelStrategy') and hasattr(torch.cpu.Stream, 'record_event')

_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(['process_runs'])


def run_processes(function, count, *args, seconds=120):
    """
    Run a function in several processes, with the environment of torchrun.

    Args:
        function (Callable): of this module
        count (int): of processes
        *args: plain arguments of the function
        seconds (float): after which they hang

    Returns:
        List[int]: exit codes

    Raises:
        TimeoutError: if one hangs; none is left running
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    workers = [_context.Process(target=_work, args=(function, rank, count, port, args)) for rank in range(count)]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + seconds
    try:
        for worker in workers:
            worker.join(max(0, deadline - time.monotonic()))
        alive = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
        if alive:
            raise TimeoutError(f'ranks {alive} of {count} are still running after {seconds} s')
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    return [worker.exitcode for worker in workers]


def _work(function, rank, count, port, args):
    warnings.simplefilter('ignore')
    if count > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
                          MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), TORCHELASTIC_RUN_ID='test',
                          GROUP_RANK='0')
    function(*args)
    # Without the interpreter's own end, in which the threads of torch have hung
    # once in a process that was forked.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# --- killed in mid-run -------------------------------------------------------

class Kill(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Indexed(Net):
    """ Its batches follow from the step, since a loader starts anew when a run goes on in mid-epoch. """

    def training_step(self, batch, batch_idx):
        return super().training_step(make_data(40)[self.trainer.global_step:][:8], batch_idx)


def killed_run(folder, kill_at, source, every, ckpt):
    """ Four epochs of 5 steps, killed after some step, that go on from a checkpoint if there is one. """
    keeper = ModelCheckpoint(f'{folder}/saved', every_n_train_steps=every, save_top_k=-1, filename='{step}')
    monitor = PlasticityMonitor('weight_mag@1,grad_mag@3,erank@epoch,dead_units@2,feature_erank@epoch', source=source,
                                samples=12)
    trainer = pl.Trainer(default_root_dir=folder, max_epochs=4, accelerator='cpu', enable_progress_bar=False,
                         enable_model_summary=False, callbacks=[monitor, keeper, Kill(kill_at)],
                         logger=CSVLogger(folder, name='run', version=0))
    trainer.fit(make_net(Indexed), DataLoader(make_data(40), batch_size=8), DataLoader(make_data(), batch_size=10),
                ckpt_path=ckpt or None)


# --- several processes that train together ------------------------------------

class Routed(Net):
    """ Some examples take a branch, which is not there for a process that has none of them. """

    def __init__(self):
        super().__init__()
        self.side = torch.nn.Linear(8, 16)
        self.world, self.shard, self.always, self.tensor_parallel = 1, False, False, False

    def features(self, x):
        first = self.act(self.fc1(x))
        chosen = x[:, 0] > 0.5
        if chosen.any() or self.always:
            first = first.index_add(0, chosen.nonzero()[:, 0], torch.tanh(self.side(x[chosen])))
        return first, torch.relu(self.fc2(first))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.world  # of which DDP takes the mean

    def configure_model(self):
        if self.tensor_parallel:
            from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
            # Rows of the first, columns of the second, so that features are split between the two.
            parallelize_module(self, self.device_mesh['tensor_parallel'], {
                'fc2': ColwiseParallel(), 'head': RowwiseParallel()})
        if self.shard:
            from torch.distributed.fsdp import fully_shard
            mesh = self.device_mesh['data_parallel']
            for layer in (self.fc1, self.fc2, self.side, *([self.head] if self.tensor_parallel else [])):
                fully_shard(layer, mesh=mesh)
            if not self.tensor_parallel:
                fully_shard(self, mesh=mesh)


class Split(Net):
    """ Its layers are split over processes in one of several ways, by units or by samples; some units are dead. """
    plan, shard, world, always = None, False, 1, True

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.fc1.bias[[0, 1, 15]] = self.fc2.bias[[5, 11]] = -100

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.world

    def forward(self, x):
        return super().forward(x[:len(x) // 2 * 2])  # local tensors have to be of one size

    def configure_model(self):
        if self.plan:
            from torch.distributed.tensor import Replicate, Shard
            from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
            plans = {
                'units': {'fc1': ColwiseParallel(), 'fc2': RowwiseParallel()},
                'units, DTensor': {
                    'fc1': ColwiseParallel(use_local_output=False), 'fc2': RowwiseParallel(use_local_output=False),
                    'head': RowwiseParallel(input_layouts=Replicate())},
                'samples': {'fc1': ColwiseParallel(output_layouts=Shard(0)),
                            'fc2': ColwiseParallel(input_layouts=Shard(0)), 'head': RowwiseParallel()},
                'samples, DTensor': {
                    'fc1': ColwiseParallel(output_layouts=Shard(0), use_local_output=False),
                    'fc2': ColwiseParallel(input_layouts=Shard(0), use_local_output=False), 'head': RowwiseParallel()}}
            parallelize_module(self, self.device_mesh['tensor_parallel'], plans[self.plan])
        if self.shard:
            from torch.distributed.fsdp import fully_shard
            for layer in (self.fc1, self.fc2, self.head):
                fully_shard(layer, mesh=self.device_mesh['data_parallel'])


def batches_of(rank, world, how, step=8):
    """ The part of one process of batches of 8 and a shorter last one. """
    parts = []
    for i, batch in enumerate(make_data().double().split(step)):
        index = torch.arange(len(batch))
        if how == 'branch':  # the last one has all of the examples that take the branch
            owner = torch.where(batch[:, 0] > 0.5, world - 1, index % max(1, world - 1))
        elif how == 'empty' and i % 2:  # the last one has nothing
            owner = index % max(1, world - 1)
        else:
            owner = index % world
        parts.append(batch[owner == rank])
    return parts


class Short(DataLoader):
    """ Says that it has more batches than there are. """

    def __len__(self):
        return super().__len__() + 2


class Watch(Callback):
    """ Counts our collectives and writes, by step. """

    def __init__(self):
        self.collectives = []
        self.writes = 0
        self.step = 0

    def patch(self):
        for name in ('all_gather', 'all_reduce', 'broadcast', 'all_gather_object', 'barrier'):
            setattr(torch.distributed, name, self.counting(name, getattr(torch.distributed, name)))
        add = JsonLines.add

        def counting_add(sink, rows):
            self.writes += 1
            add(sink, rows)
        JsonLines.add = counting_add

    def counting(self, name, function):
        def counted(*args, **kwargs):
            if 'plasticity' in sys._getframe(1).f_code.co_filename:
                self.collectives.append((self.step, name))
            return function(*args, **kwargs)
        return counted

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.step = trainer.global_step

    def on_validation_start(self, trainer, module):
        self.step = f'validation {trainer.global_step}'

    def on_train_start(self, trainer, module):
        self.step = 'start'


# What is between the statistics and the numbers.
OURS = {'message': (publisher, 'layout_of'), 'give': (processes._Addend, 'give'), 'take': (processes._Addend, 'take'),
        'derive': (publisher, 'derive'), 'transfer': (publisher, 'to_host')}


def fault_of(fault, rank):
    """ Make something fail: (name of a metric or of a maker of statistics, rank or None for all, calls before). """
    name, where, after = fault
    if where not in (None, rank):
        return
    calls = []
    if name == 'small buffers':  # so that everything takes several rounds
        processes._MESSAGE, processes._NUMBERS = 64, 77
        return

    def failing(original):
        def fails(*args, **kwargs):
            calls.append(1)
            if len(calls) > after:
                raise RuntimeError(f'fault of {name}')
            return original(*args, **kwargs)
        return fails
    if name in OURS:
        place, attribute = OURS[name]
        setattr(place, attribute, failing(getattr(place, attribute)))
    elif name in METRICS:
        METRICS[name] = dataclasses.replace(METRICS[name], formula=failing(METRICS[name].formula))
    elif name == 'gram':
        tensors.gram = failing(tensors.gram)
    elif name == 'one site':
        add = statistics_of_calls.Away.add

        def fails_at_one(self, own, call):
            if call.site.layer == 'fc2':
                raise RuntimeError('fault of one site')
            add(self, own, call)
        statistics_of_calls.Away.add = fails_at_one
    elif name == 'sums':
        tensors.STATISTICS[failing(tensors.sums)] = tensors.STATISTICS.pop(tensors.sums)
    else:
        cls = getattr(statistics_of_calls, name)
        cls.add = failing(cls.add)


def train_together(folder, strategy='ddp', how='even', fault=None, epochs=2, sleep=0., monitor=None, toys=0,
                   accumulate=1):
    """ What each rank does; what it saw goes to a file. """
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    watch = Watch()
    watch.patch()
    if fault:
        fault_of(fault, rank)
    if toys:  # metrics of all sources, with so many micro-batches a step
        from toys import NAMES, register
        register()
        monitor = {'metrics': list(NAMES)}
    strategy, _, plan = strategy.partition(' by ')
    net = make_net(Split if plan else Routed).double()
    net.world = world
    net.always = strategy != 'ddp'  # sharding needs all layers on all processes
    replicas = world
    if world == 1:
        strategy = 'auto'
    elif strategy == 'ddp':
        strategy = pl.strategies.DDPStrategy(process_group_backend='gloo', find_unused_parameters=True)
    else:
        net.tensor_parallel, net.plan = strategy == 'tensor parallel', plan
        replicas = world // 2 if net.tensor_parallel else world
        net.shard = replicas > 1
        net.world = replicas
        strategy = pl.strategies.ModelParallelStrategy(
            data_parallel_size=replicas, tensor_parallel_size=world // replicas, process_group_backend='gloo')
    replica = rank // (world // replicas)
    if sleep:
        net.on_train_batch_end = lambda *args: time.sleep(sleep)
    trainer = pl.Trainer(
        default_root_dir=folder, max_epochs=epochs, accelerator='cpu', devices=world, strategy=strategy,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        accumulate_grad_batches=toys or accumulate,
        num_sanity_val_steps=-1,  # so that the start sees the same data whatever the number of processes
        use_distributed_sampler=False, logger=CSVLogger(folder, name='run', version=0),
        callbacks=[watch, PlasticityMonitor(**{'metrics': 'all', 'interval': 1, **(monitor or {})})])
    validation = list(make_data().double().split(10))
    # Not as many on each, but under FSDP2, which itself would wait for ever.
    validation = [x[replica::replicas] for x in validation] if net.always else validation[rank::world]
    with open(f'{folder}/rank{rank}.txt', 'w') as file, contextlib.redirect_stdout(file):
        loader = Short if how == 'short' else DataLoader
        trainer.fit(net, loader(batches_of(replica, replicas, how), batch_size=None),
                    DataLoader(validation, batch_size=None))
    assert not sharded._of_torch and not sharded._listening  # DTensor is as it was
    with open(f'{folder}/rank{rank}.json', 'w') as file:
        values = {key: float(x) for key, x in trainer.callback_metrics.items() if 'plasticity' in key}
        json.dump({'steps': trainer.global_step, 'collectives': watch.collectives, 'writes': watch.writes,
                   'values': values}, file)
    if world > 1:
        torch.distributed.barrier()  # nobody leaves while another waits for it
        torch.distributed.destroy_process_group()


def trains_alone(folder, all_of_them):
    """ Processes that know each other, of which one, or each for itself, trains on a single device. """
    torch.distributed.init_process_group('gloo')
    rank = torch.distributed.get_rank()
    if all_of_them or rank == 0:
        net = make_net()
        with torch.no_grad():
            net.fc1.weight += rank  # sums of both would be told from those of one
        expected = sum(p.abs().sum().item() for p in net.parameters() if p.ndim > 1)
        expected /= sum(p.numel() for p in net.parameters() if p.ndim > 1)
        trainer = pl.Trainer(
            accelerator='cpu', devices=1, strategy=pl.strategies.SingleDeviceStrategy('cpu'), max_steps=1 + rank,
            default_root_dir=folder, logger=CSVLogger(folder, name=f'rank{rank}', version=0),
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            callbacks=[PlasticityMonitor('weight_mag,dead_units')])
        trainer.fit(net, DataLoader(make_data(), batch_size=8))
        with open(f'{folder}/rank{rank}/version_0/plasticity.jsonl') as file:
            line = json.loads(file.readline())
        assert (line['metric'], line['step']) == ('weight_mag', -1)
        assert abs(line['value'] - expected) < 1e-6, (line['value'], expected)


def layouts(folder, mesh_shape):
    """ Statistics of a matrix in other layouts than FSDP2's, added up over the processes. """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from geowatch.utils.lightning_ext.callbacks.plasticity_engine.processes import Processes, layout_of
    from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sharding import part_for_gram
    from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.tensors import functions_of
    torch.distributed.init_process_group('gloo')
    together = Processes(torch.distributed.get_world_size(), 'cpu')
    mesh = init_device_mesh('cpu', tuple(mesh_shape), mesh_dim_names=tuple('ab'[:len(mesh_shape)]))
    rows, columns, both = Shard(0), Shard(1), Replicate()
    cases = {'rows': [rows], 'columns': [columns], 'copies': [both]} if len(mesh_shape) == 1 else {
        'rows and columns': [rows, columns], 'columns and rows': [columns, rows], 'rows twice': [rows, rows],
        'copies of rows': [both, rows], 'copies of columns': [columns, both], 'copies': [both, both]}
    meshes = {'': mesh} if len(mesh_shape) == 1 else {'': mesh, ' of a part of the mesh': mesh['b']}
    found = {}
    for shape in ((7, 4), (4, 7), (6, 2, 3, 3)):
        matrix = torch.arange(float(math.prod(shape))).sin().reshape(shape)
        for part, own in meshes.items():
            for name, placements in cases.items():
                tensor = distribute_tensor(matrix, own, placements[-own.ndim:])
                piece, _, _ = part_for_gram(tensor)
                stats = {}
                for function, fields in functions_of(['count', 'abs', 'squares', 'nonfinite', 'gram']).items():
                    stats.update({('weights', field): x for field, x in function({'x': tensor}, fields).items()})
                (total,), _ = together.add_up([stats], [layout_of([stats])] * together.count)
                found[f'{tuple(shape)} {name}{part}'] = {
                    'largest part': together.exchange({'n': piece.numel()}),
                    **{field: x['x'].tolist() for (_, field), x in total.items()}}
    if together.rank == 0:
        with open(f'{folder}/found.json', 'w') as file:
            json.dump(found, file)
    torch.distributed.destroy_process_group()


def slices(folder, mesh_shape):
    """ Statistics of the matrices that a parameter of three dimensions holds, in each layout. """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from geowatch.utils.lightning_ext.callbacks.plasticity_engine.processes import Processes, layout_of
    from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.weights import Weight
    from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.tensors import functions_of
    torch.distributed.init_process_group('gloo')
    processes = Processes(torch.distributed.get_world_size(), 'cpu')
    mesh = init_device_mesh('cpu', tuple(mesh_shape), mesh_dim_names=tuple('ab'[:len(mesh_shape)]))
    entries, rows, columns, both = Shard(0), Shard(1), Shard(2), Replicate()
    cases = [[entries], [rows], [columns], [both]] if len(mesh_shape) == 1 else [
        [entries, rows], [both, entries], [entries, entries], [rows, columns], [both, columns], [entries, both]]
    found = {}
    for shape, indices in (((5, 3, 7), (0, 4)), ((5, 7, 3), (0, 4)), ((1, 6, 4), (0,))):
        whole = torch.arange(float(math.prod(shape))).sin().reshape(shape)
        for placements in cases:
            param = torch.nn.Parameter(distribute_tensor(whole, mesh, placements))
            for index in indices:
                stats = {}
                for function, fields in functions_of(['count', 'abs', 'squares', 'nonfinite', 'gram']).items():
                    stats.update({('weights', field): x for field, x in function(
                        {'x': Weight([param], index=index)}, fields).items()})
                (total,), _ = processes.add_up([stats], [layout_of([stats])] * processes.count)
                found[f'{json.dumps(shape, separators=(",", ":"))} {index} {placements}'] = {
                    field: x['x'].tolist() for (_, field), x in total.items()}
    if processes.rank == 0:
        with open(f'{folder}/found.json', 'w') as file:
            json.dump(found, file)
    torch.distributed.destroy_process_group()


def flattened(folder):
    """ What FSDP1 makes of the weights. """
    from torch.distributed.fsdp import FullyShardedDataParallel

    from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.weights import why_not_a_weight
    torch.distributed.init_process_group('gloo')
    found = []
    for keeps in (False, True):
        model = FullyShardedDataParallel(make_net(), use_orig_params=keeps, device_id=torch.device('cpu'))
        found.append(sorted({str(why_not_a_weight(param)) for param in model.parameters()}))
    if torch.distributed.get_rank() == 0:
        with open(f'{folder}/found.json', 'w') as file:
            json.dump(found, file)
    torch.distributed.destroy_process_group()
