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
import types
import warnings

import pytorch_lightning as pl
import torch
from common import Net, make_data, make_net
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine import processes, publisher, rota
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.lines import JsonLines
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.activations import sharded
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics import calls as statistics_of_calls
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics import tensors
from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS


class OnCPU(pl.strategies.FSDPStrategy):
    """ FSDP1 without a GPU: Lightning refuses its own class, and torch has to be told. """

    def _setup_model(self, model):
        from torch.distributed.fsdp import FullyShardedDataParallel
        self.precision_plugin._desired_input_dtype = torch.float64  # it knows no double precision
        return FullyShardedDataParallel(model.double(), sharding_strategy=self.sharding_strategy,
                                        device_id=torch.device('cpu'), **self.kwargs)


class ZeroOnCPU(pl.strategies.DeepSpeedStrategy):
    """ DeepSpeed without a GPU, which Lightning refuses. """

    def setup_environment(self):
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()

    def setup_distributed(self):
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        import deepspeed
        return deepspeed.initialize(config=self.config, model=model, optimizer=optimizer, dist_init_required=False,
                                    model_parameters=list(model.parameters()))[:2]


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

    def configure_optimizers(self):
        return torch.optim.SGD((self.trainer.model or self).parameters(), lr=0.02)  # of FSDP1 those that it has made

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


def wrap_linear(module, recurse, nonwrapped_numel):
    """ Whether FSDP1 makes a buffer of a module's own: of the second layer alone, so that the first shares one. """
    return recurse or getattr(module, 'out_features', 0) == 12


class Staged(Routed):
    """ The two stages of a pipeline, with a layer that both have a copy of; of one process it has all. """

    def configure_model(self):
        self.stage = self.trainer.global_rank if self.trainer.world_size > 1 else None
        del self.side
        for name in {0: ('fc2', 'head'), 1: ('fc1', 'act')}.get(self.stage, ()):
            delattr(self, name)

    def both(self, x):
        """ Of each stage what it makes: hidden features of the first, outputs of the second. """
        if self.stage != 1:
            x = self.act(self.fc1(x))
        if self.stage is None:
            return self.head(torch.relu(self.fc2(x)))
        if self.stage == 0:
            torch.distributed.send(x.detach(), 1)
            return x
        received = x.new_empty(len(x), 16)
        torch.distributed.recv(received, 0)
        self.received = received.requires_grad_(torch.is_grad_enabled())
        return self.head(torch.relu(self.fc2(self.received)))

    def training_step(self, batch, batch_idx):
        found = self.both(batch)
        if self.stage == 0:
            gradient = torch.empty_like(found)
            torch.distributed.recv(gradient, 1)
            return (found * gradient).sum()
        loss = (found - 1).square().sum() / 8
        if self.stage == 1:
            torch.distributed.send(torch.autograd.grad(loss, self.received, retain_graph=True)[0], 0)
        return loss

    def validation_step(self, batch, batch_idx):
        self.both(batch)


class Apart(pl.strategies.DDPStrategy):
    """ Processes that share no layer. """

    def configure_ddp(self):
        pass


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
        self.step = 'setup'

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
    if name == 'one at a time':  # so that layers take turns
        rota.SECONDS = 0.
        publisher.Rota = lambda share, device: rota.Rota(0., device)
        return
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
    net = make_net(Staged if strategy == 'pipeline' else Split if plan else Routed).double()
    net.world = world
    net.always = strategy != 'ddp'  # sharding needs all layers on all processes
    replicas = world
    if world == 1:
        strategy = 'auto'
    elif strategy == 'pipeline':
        strategy, replicas = Apart(process_group_backend='gloo'), 1
    elif strategy.startswith('fsdp1'):
        # Of each layer a buffer, and one of what is left.
        strategy = OnCPU(process_group_backend='gloo', use_orig_params='flat' not in strategy,
                         auto_wrap_policy=None if 'alone' in strategy else wrap_linear)
    elif strategy.startswith('zero'):
        strategy = ZeroOnCPU(process_group_backend='gloo', config={
            'train_micro_batch_size_per_gpu': 4,
            'zero_optimization': {'stage': int(strategy[-1]), 'stage3_param_persistence_threshold': 20},
            'zero_allow_untested_optimizer': True, 'zero_force_ds_cpu_optimizer': False})
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


def one_by_one(folder):
    """ How many Gram matrices are there at once when several weights with shards become spectra. """
    import gc

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from geowatch.utils.lightning_ext.callbacks.plasticity_engine.measurement import spectrum_of
    from geowatch.utils.lightning_ext.callbacks.plasticity_engine.processes import Processes, layout_of
    torch.distributed.init_process_group('gloo')
    together, most = Processes(2, 'cpu'), [0]
    mesh = init_device_mesh('cpu', (2,))
    of_part = tensors.gram

    def counted(*args):
        matrix = of_part(*args)
        there = {x.data_ptr() for x in gc.get_objects()
                 if type(x) is torch.Tensor and x.shape == matrix.shape and x.dtype is matrix.dtype}
        most[0] = max(most[0], len(there))
        return matrix
    tensors.gram = counted
    processes._NUMBERS = 40  # as for a large matrix, which takes more than a round
    together._numbers = together._numbers[:40]
    weights = {f'fc{i}': torch.arange(60.).add(i).sin().reshape(6, 10) for i in range(4)}
    stats = {('weights', 'gram'): tensors.grams({
        name: distribute_tensor(x, mesh, [Shard(i % 2)]) for i, (name, x) in enumerate(weights.items())}, ['gram'])[
            'gram']}
    (total,), _ = together.add_up([stats], [layout_of([stats])] * 2, whole=spectrum_of)
    for name, values in total['weights', 'spectrum'].items():
        torch.testing.assert_close(values.flip(0).float(), torch.linalg.svdvals(weights[name]), rtol=1e-4, atol=1e-5)
    if together.rank == 0:
        with open(f'{folder}/found.json', 'w') as file:
            json.dump({'layers': len(total['weights', 'spectrum']), 'most': most[0]}, file)
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


class Mixed(torch.nn.Module):
    """ Kinds of weights whose numbers lie in a buffer in different ways. """

    def __init__(self, is_made=False):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.experts = torch.nn.Parameter(torch.randn(3, 4, 5))
        self.wide = torch.nn.Linear(5, 7)
        self.tall = torch.nn.Linear(7, 3)
        self.tied = torch.nn.Linear(7, 3, bias=False)
        self.tied.weight = self.tall.weight
        if is_made:
            torch.nn.utils.parametrizations.weight_norm(self.wide)
            torch.nn.utils.prune.l1_unstructured(self.tall, 'weight', 0.3)

    def forward(self, x):
        x = self.conv(x).relu().mean((2, 3))
        return self.tall(self.wide(torch.einsum('bi,eio->bo', x, self.experts)).relu()).square().sum()


def statistics_of(model):
    """ All additive statistics of the weights and gradients of a model, on this process. """
    from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.contents import Contents
    from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources.weights import walk, weights_of
    from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.tensors import functions_of
    contents = Contents(model)
    assert not [layer for layer, _, why in walk(contents) if why and 'no trainer knows' in why]
    weights, found = weights_of(contents), {}
    for source, own in (('weights', weights), ('gradients', {layer: w.grad for layer, w in weights.items()})):
        for function, fields in functions_of(['count', 'abs', 'squares', 'nonfinite', 'gram']).items():
            found.update({(source, field): x for field, x in function(own, fields).items()})
    return found


def as_lists(totals):
    """ Statistics as JSON has them. """
    from geowatch.utils.lightning_ext.callbacks.plasticity_engine.statistics.spectrum import made
    return {f'{source}.{field}': {layer: torch.as_tensor(made(x), dtype=torch.float64).tolist()
                                  for layer, x in own.items()}
            for (source, field), own in totals.items()}


def write_sums(folder, model, together):
    """ Add up the statistics of a model over the processes, which part then. """
    from geowatch.utils.lightning_ext.callbacks.plasticity_engine.processes import layout_of
    stats = statistics_of(model)
    messages = together.exchange({'layout': layout_of([stats])})
    (total,), _ = together.add_up([stats], [message['layout'] for message in messages])
    if together.rank == 0:
        with open(f'{folder}/found.json', 'w') as file:
            json.dump(as_lists(total), file)
    torch.distributed.destroy_process_group()


def flattened(folder, sharding, keeps, is_made):
    """ Statistics of what FSDP1 has flattened, after a backward pass, added up over the processes. """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    from geowatch.utils.lightning_ext.callbacks.plasticity_engine.processes import Processes
    torch.distributed.init_process_group('gloo')
    together = Processes(torch.distributed.get_world_size(), 'cpu')
    mesh = init_device_mesh('cpu', (2, together.count // 2)) if 'HYBRID' in sharding else None
    torch.manual_seed(0)
    model = FullyShardedDataParallel(
        Mixed(is_made).double(), sharding_strategy=ShardingStrategy[sharding], use_orig_params=keeps, device_mesh=mesh,
        device_id=torch.device('cpu'), auto_wrap_policy=lambda module, recurse, nonwrapped_numel: recurse or isinstance(
            module, torch.nn.Conv2d))
    model(torch.randn(6, 3, 5, 5).double()).backward()
    write_sums(folder, model, together)


def made_in_shards(folder):
    """ Statistics of what a network makes of parameters that FSDP2 has sharded. """
    from torch.distributed.fsdp import fully_shard

    from geowatch.utils.lightning_ext.callbacks.plasticity_engine.processes import Processes
    torch.distributed.init_process_group('gloo')
    together = Processes(torch.distributed.get_world_size(), 'cpu')
    torch.manual_seed(0)
    model = Mixed(is_made=True).double().to(memory_format=torch.contiguous_format)  # all that it takes
    fully_shard(model, mesh=torch.distributed.init_device_mesh('cpu', (together.count,)))
    model(torch.randn(6, 3, 5, 5).double()).backward()
    write_sums(folder, model, together)


def as_deepspeed(model, stage):
    """ A model as ZeRO leaves it after a backward pass: stand-ins for what it attaches to parameters. """
    world, rank, group = torch.distributed.get_world_size(), torch.distributed.get_rank(), torch.distributed.group.WORLD
    offset, total = 0, sum(param.numel() for param in model.parameters())
    for param in model.parameters():
        whole, gradient, numbers = param.detach().flatten().clone(), param.grad.flatten(), param.numel()
        if stage == 3:  # of each parameter a part on each process, the last one padded
            size = -(-numbers // world)
            whole, gradient = (torch.nn.functional.pad(x, [0, size * world - numbers], value=42.)[rank * size:][:size]
                               for x in (whole, gradient))
            param.ds_id, param.ds_shape, param.ds_process_group, param.ds_tensor = id(param), param.shape, group, whole
            param.ds_tensor.ds_numel = size
            param._z3_optimizer = types.SimpleNamespace(get_local_fp32_grad_for_param=lambda _, own=gradient: own)
            param.data = param.new_empty(0)
        else:  # parts of all parameters in a row, of which most processes have none of a small one
            size = -(-total // world)
            start, end = (min(max(size * index - offset, 0), numbers) for index in (rank, rank + 1))
            param._dp_group, param._index_in_param_group = group, 0
            param._hp_mapping = types.SimpleNamespace(
                lp_fragment_address=types.SimpleNamespace(start=start, numel=end - start),
                get_lp_grad_fragment=lambda _, own=gradient[start:end]: own) if start < end else None
            offset += numbers
        param.grad = None


def zero_stands_in(folder, stage):
    """ Statistics of what DeepSpeed's documented interface gives, added up over the processes. """
    from geowatch.utils.lightning_ext.callbacks.plasticity_engine.processes import Processes
    torch.distributed.init_process_group('gloo')
    sys.modules['deepspeed'] = types.ModuleType('deepspeed')
    sys.modules['deepspeed.utils'] = types.SimpleNamespace(
        safe_get_local_grad=lambda param: param._z3_optimizer.get_local_fp32_grad_for_param(param))
    together = Processes(torch.distributed.get_world_size(), 'cpu')
    torch.manual_seed(0)
    model = Mixed().double()
    model(torch.randn(6, 3, 5, 5).double()).backward()
    as_deepspeed(model, stage)
    write_sums(folder, model, together)
