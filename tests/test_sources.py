"""
The sources beyond weights and gradients, by toy metrics: updates, pieces of a gradient, and what was before.
"""
import copy

import numpy as np
import pytest
import torch
import toys
from common import Net, fit, lines_of, make_data, make_net, read_lines
from process_runs import Routed, batches_of
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from test_processes import Ran

from geowatch.utils.lightning_ext.callbacks.plasticity import PlasticityMonitor
from geowatch.utils.lightning_ext.callbacks.plasticity_engine.sources import Pieces, Updates


@pytest.fixture(autouse=True)
def registered():
    toys.register()


def squares(tensors):
    return sum(float(x.double().square().sum()) for x in tensors)


def matrices(net):
    return [p for p in net.parameters() if p.ndim > 1]


def plain(net, batches, optimizer, accumulate=1, scale=1.):
    """ The same training without Lightning: for each step what the toys should be. """
    net = copy.deepcopy(net)
    optimizers = optimizer(net)
    rows, before_growth = [], None
    for start in range(0, len(batches), accumulate):
        before = [p.detach().clone() for p in matrices(net)]
        pieces = []
        net.zero_grad()
        parts = batches[start:start + accumulate]
        if len(parts) == 1:  # alone, it is looked at in four chunks
            parts = parts[0].tensor_split(4)
        sizes = [len(part) for part in parts]
        count = sum(sizes) ** 2 / sum(size ** 2 for size in sizes) if len(parts) == 4 else len(parts)
        for batch in parts:
            grads = torch.autograd.grad(net.loss(batch) / accumulate, list(net.parameters()))
            pieces.append([g for g, p in zip(grads, net.parameters(), strict=True) if p.ndim > 1])
            for p, g in zip(net.parameters(), grads, strict=True):
                p.grad = g if p.grad is None else p.grad + g
        total = squares(p.grad for p in matrices(net))
        for own in optimizers:
            own.step()
        change = [p.detach() - old for p, old in zip(matrices(net), before, strict=True)]
        rows.append({'step_ratio': (squares(change) / squares(before)) ** 0.5,
                     'piece_squares': sum(map(squares, pieces)), 'piece_count': count, 'of_sum': total,
                     'gradient_growth': before_growth and total / before_growth})
        before_growth = total
    return rows


class Adam(Net):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


class TwoOptimizers(Net):
    """ Which step one after the other on each batch. """

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.fc1.parameters(), lr=0.05, momentum=0.9),
                torch.optim.AdamW([*self.fc2.parameters(), *self.head.parameters()], lr=0.01)]

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers:
            optimizer.step()


def check(lines, rows, rel=1e-5):
    for name in ('step_ratio', 'piece_squares', 'piece_count'):
        assert [line['step'] for line in lines_of(lines, name)] == list(range(len(rows)))
        assert [line['value'] for line in lines_of(lines, name)] == pytest.approx([row[name] for row in rows], rel=rel)
    for line, row in zip(lines_of(lines, 'piece_squares'), rows, strict=True):
        assert sum(own['of_sum'] for own in line['layers'].values()) == pytest.approx(row['of_sum'], rel=rel)
    # Nothing was before the first.
    growth = lines_of(lines, 'gradient_growth')
    assert [line['step'] for line in growth] == list(range(1, len(rows)))
    assert [line['value'] for line in growth] == pytest.approx([row['gradient_growth'] for row in rows[1:]], rel=rel)
    ranks = lines_of(lines, 'gradient_rank')
    assert [line['layers']['head']['value'] for line in ranks] == [1.] * len(rows)


@pytest.mark.parametrize('accumulate', [1, 2, 3])
@pytest.mark.parametrize('cls', [Net, Adam, TwoOptimizers])
def test_against_a_plain_loop(tmp_path, cls, accumulate):
    if cls is TwoOptimizers and accumulate > 1:
        pytest.skip('Lightning accumulates only where it optimizes itself')
    net = make_net(cls)

    def optimizers(own):
        found = own.configure_optimizers()
        return found if isinstance(found, list) else [found]
    rows = plain(net, make_data().split(8), optimizers, accumulate)
    _, trainer, _, _ = fit(tmp_path, PlasticityMonitor(list(toys.NAMES), interval=1), net, max_epochs=1,
                           accumulate_grad_batches=accumulate)
    lines = read_lines(trainer, start=True)
    assert min(line['step'] for line in lines) == 0  # none of them is known before the first step
    check(lines, rows)


def test_on_steps_that_are_logged_only(tmp_path):
    """ Each second step, with micro-batches; nothing is attached or kept on the others. """
    class Watches(Callback):
        def on_before_backward(self, trainer, module, loss):
            hooks.append((trainer.global_step, sum(len(p._backward_hooks or ()) for p in module.parameters())))

    hooks = []
    net = make_net()
    rows = plain(net, make_data().split(4), lambda own: [own.configure_optimizers()], 2)
    _, _, lines, _ = fit(tmp_path, PlasticityMonitor('step_ratio,piece_squares,piece_count', interval=2), net,
                         max_epochs=1, batch_size=4, accumulate_grad_batches=2, callbacks=[Watches()])
    for name in ('step_ratio', 'piece_squares', 'piece_count'):
        own = lines_of(lines, name)
        assert [line['step'] for line in own] == [1, 3]
        assert [line['value'] for line in own] == pytest.approx([rows[i][name] for i in (1, 3)], rel=1e-5)
    assert {step for step, count in hooks if count} == {1, 3}
    assert not any(p._backward_hooks for p in net.parameters())


def test_a_strided_part_of_a_large_layer():
    """ An odd stride, sums in proportion. """
    import contextlib
    torch.manual_seed(0)
    weight = torch.randn(300, 200)
    source = Updates(['count', 'squares', 'before_squares'], lambda *args: contextlib.nullcontext())
    source.before_step({'w': weight}, 1.)
    (kept,) = source._before.values()
    assert Updates.most / 2 <= len(kept) == 60000 / 5 <= Updates.most
    old = weight.clone()
    weight += 0.01 * torch.randn(300, 200)
    source.end_step({'w': weight})
    found = source.take()
    assert found['count']['w'] == 60000
    assert found['squares']['w'].item() == pytest.approx(squares([weight - old]), rel=0.05)
    assert found['before_squares']['w'].item() == pytest.approx(squares([old]), rel=0.05)
    assert source.take() == {}


def test_bfloat16_weights_are_subtracted_exactly():
    import contextlib
    weight = torch.full((2, 2), 256., dtype=torch.bfloat16)
    source = Updates(['squares'], lambda *args: contextlib.nullcontext())
    source.before_step({'w': weight}, 1.)
    weight[0, 0] = 258.
    source.end_step({'w': weight})
    assert source.take()['squares']['w'].item() == 4.


@pytest.mark.parametrize('fused', [False, True])
def test_a_scaled_gradient_has_pieces_of_its_own_size(fused):
    import contextlib
    weight = torch.ones(1, 2, requires_grad=True)
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
    source = Pieces(['squares', 'gradient'], lambda *args: contextlib.nullcontext(), scaler=scaler)
    for is_first in (True, False):
        source.begin_batch({'w': weight}, is_first)
        scaler.scale((weight * torch.tensor([[3., 4.]])).sum()).backward()
        source.after_backward({'w': weight})
    if not fused:  # which would unscale by itself
        weight.grad /= 1024
    source.before_step({'w': weight}, scale=1024. if fused else 1.)
    found = source.take()
    assert (found['squares']['w'].item(), found['gradient']['w'].item()) == (50., 100.)


# --- checkpoints -------------------------------------------------------------------

def test_what_was_before_is_in_checkpoints(tmp_path):
    """ The first step after a resume is compared with the last one before. """
    monitor = 'gradient_growth@1,grad_norm@1'
    keeper = ModelCheckpoint(tmp_path / 'saved', save_last=True)
    _, _, whole, _ = fit(tmp_path / 'whole', PlasticityMonitor(monitor), make_net(), max_epochs=3)
    fit(tmp_path, PlasticityMonitor(monitor), make_net(), callbacks=[keeper])
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader
    trainer = pl.Trainer(default_root_dir=tmp_path, max_epochs=3, accelerator='cpu', enable_progress_bar=False,
                         callbacks=[PlasticityMonitor(monitor)], enable_model_summary=False)
    trainer.fit(make_net(), DataLoader(make_data(), batch_size=8), ckpt_path=keeper.last_model_path)
    lines = read_lines(trainer, start=True)
    growth = lines_of(lines, 'gradient_growth')
    assert [line['step'] for line in growth] == list(range(10, 15))
    assert [line['value'] for line in growth] == pytest.approx(
        [line['value'] for line in lines_of(whole, 'gradient_growth')][-5:], rel=1e-6)


# --- several processes ----------------------------------------------------------------

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    return Ran(tmp_path_factory.mktemp('alone'), 1, toys=2).lines


@pytest.mark.parametrize('strategy', ['ddp', 'fsdp2'])
def test_in_two_processes(tmp_path, alone, strategy):
    """ With two micro-batches a step. Steps and gradients are those of one process, pieces are of their own. """
    ran = Ran(tmp_path, 2, strategy=strategy, toys=2)
    assert max(ran.collectives().values()) <= 2
    for name in ('step_ratio', 'gradient_growth', 'gradient_rank'):
        own, others = lines_of(ran.lines, name), lines_of(alone, name)
        assert [line['step'] for line in own] == [line['step'] for line in others] and len(own) >= 5
        assert [line['value'] for line in own] == pytest.approx([line['value'] for line in others], rel=1e-6)
    # Of DDP each process has a piece of each micro-batch, of a sharded gradient all have one together.
    each = 2 if strategy == 'ddp' else 1
    counts = [line['layers']['fc1']['value'] for line in lines_of(ran.lines, 'piece_count')]
    assert counts == [count for count in (2. * each, 2. * each, each) if count > 1] * 2  # five batches, two a step
    net = make_net(Routed).double()
    net.always = True
    parts = [batches_of(rank, 2, 'even') for rank in range(2)]
    pieces = []
    for batch in (0, 1):
        found = [torch.autograd.grad(net.loss(part[batch]) / 2, matrices(net), allow_unused=True) for part in parts]
        if strategy == 'fsdp2':
            found = [[a + b for a, b in zip(*found, strict=True)]]
        pieces += found
    expected = sum(squares(x for x in piece if x is not None) for piece in pieces)
    line = lines_of(ran.lines, 'piece_squares')[0]
    assert line['value'] == pytest.approx(expected, rel=1e-6)
    assert np.isfinite([own['of_sum'] for own in line['layers'].values()]).all()
