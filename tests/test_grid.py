"""
Learning rate x batch size: which runs stand in which cell, and what the report says of them.
"""
import json
import math
import shlex
from pathlib import Path

import pytest
from test_report import drawing, line, write_run

from geowatch.utils.lightning_ext.callbacks.plasticity_report import PlasticityReportCLI, styles
from geowatch.utils.lightning_ext.callbacks.plasticity_report.advice import advise, command
from geowatch.utils.lightning_ext.callbacks.plasticity_report.curves import choose_x
from geowatch.utils.lightning_ext.callbacks.plasticity_report.findings import make_table
from geowatch.utils.lightning_ext.callbacks.plasticity_report.grid import axes, cell_value, limits, make_grid, shade
from geowatch.utils.lightning_ext.callbacks.plasticity_report.runs import Point, Run
from geowatch.utils.lightning_ext.callbacks.plasticity_report.verdicts import Verdict


def a_run(score=0.5, word='learned', seconds=10., **settings):
    """ A run that has ended at an accuracy, without files. """
    points = [Point(step, step // 5, 1. + step, None, {}, 100. + seconds * step / 9) for step in (0, 9)]
    run = Run([Path('nowhere')], {'weight_mag': points}, settings, [], {'val_acc': {9: score}}, 'run')
    return run, word, score


def a_table(made):
    """ Judged as it is said here: the words of the grid are tested, not the verdicts. """
    runs, words, scores = zip(*made, strict=True)
    table = make_table(list(runs), 'val_acc')
    table.verdicts = [Verdict(word, rate=RATES.get(word, '')) for word in words]
    table.order = sorted(range(len(runs)), key=lambda i: (math.isnan(scores[i]), -scores[i]))
    return table


def sweep(*rows, rates=(0.001, 0.01, 0.1, 1.0), sizes=(8, 32), **settings):
    """ Rows of (score, word), one per batch size, one pair per learning rate. """
    return [a_run(score, word, lr=lr, batch_size=size, **settings) for size, row in zip(sizes, rows, strict=True)
            for lr, (score, word) in zip(rates, row, strict=True)]


RATES = {'collapsed': 'too high', 'diverged': 'too high', 'hardly moved': 'too low', 'slow': 'too low'}
LOW, SLOW, GOOD, HIGH, DEAD = ((0.2, 'hardly moved'), (0.5, 'slow'), (0.9, 'learned'), (0.1, 'collapsed'),
                               (math.nan, 'diverged'))
INSIDE = sweep((LOW, GOOD, HIGH, DEAD), (LOW, SLOW, (0.95, 'learned'), HIGH), (LOW, LOW, SLOW, SLOW),
               sizes=(8, 32, 128))


def said(made):
    table = a_table(made)
    return [advice.text for advice in advise(table, make_grid(table))]


# --- cells ----------------------------------------------------------------


@pytest.mark.parametrize('names', [('lr', 'batch_size'), ('learning_rate', 'bs'), ('base_lr', 'train_batch_size'),
                                   ('optimizer.init_args.lr', 'data.batch_size')])
def test_learning_rate_and_batch_size_are_found_by_name(names):
    made = [a_run(**{'width': width, names[1]: size, names[0]: lr, 'seed': i})
            for i, (width, size, lr) in enumerate([(4, 8, 0.1), (8, 16, 0.1), (4, 8, 1e-05), (8, 16, 'auto')])]
    table = a_table(made)
    assert axes(table) == ['learning rate', 'batch size']
    grid = make_grid(table)
    assert (grid.columns, grid.rows) == ([1e-05, 0.1, 'auto'], [8, 16])
    assert [facet.label for facet in grid.facets] == ['width 4', 'width 8']


def test_else_it_is_the_two_settings_that_differ():
    made = [a_run(width=width, depth=depth, seed=i, note=f'run {i}')
            for i, (width, depth) in enumerate([(64, 2), (64, 4), (128, 2), (128, 4)])]
    grid = make_grid(a_table(made))
    assert grid.titles == ('width', 'depth') and grid.columns == [64, 128] and grid.rows == [2, 4]
    assert grid.facets[0].cells == {(0, 0): [0], (1, 0): [1], (0, 1): [2], (1, 1): [3]}
    assert make_grid(a_table([a_run(lr=0.1, seed=i) for i in range(2)])) is None


def test_of_a_single_setting_it_is_a_row():
    made = [a_run(score, word, lr=lr) for lr, (score, word) in
            zip((0.001, 0.01, 0.1, 1.0), (LOW, GOOD, SLOW, HIGH), strict=True)]
    grid = make_grid(a_table(made))
    assert grid.titles == ('learning rate', '') and grid.facets[0].cells == {(0, k): [k] for k in range(4)}
    assert said(made) == [
        'Best: learning rate 0.01 with val_acc 0.9.', 'Learning rate too high: from 1 on.',
        'Learning rate too low: up to 0.001.', 'The best lies inside the grid.',
        'Try next, with all else as there: learning rate 0.003 or learning rate 0.03.']


def test_seeds_share_a_cell_and_its_mean():
    made = [a_run(score, lr=0.1, batch_size=8, seed=i) for i, score in enumerate((0.8, 0.9))]
    made += [a_run(score, word, lr=0.2, batch_size=16, seed=i) for i, (score, word) in enumerate(
        [(0.95, 'learned'), (math.nan, 'diverged')])]
    table = a_table(made)
    grid = make_grid(table)
    assert grid.facets[0].cells == {(0, 0): [0, 1], (1, 1): [2, 3]}
    quantity = grid.quantities[0]
    assert quantity.title == 'val_acc'
    assert cell_value(quantity, [0, 1]) == pytest.approx(0.85)
    assert math.isnan(cell_value(quantity, [2, 3])) and shade(math.nan, 0, 1, False) is None
    # One of two broke: the best run does not make this cell the best.
    assert grid.facets[0].best == (0, 0)
    best = 'Best: learning rate 0.1, batch size 8 with val_acc 0.85 (mean of 2 runs).'
    assert said(made)[0] == best
    made[0] = a_run(0.8, 'slow', lr=0.1, batch_size=8, seed=0)
    assert said(made)[0] == f'{best} Yet even there 1 of 2 is slow.'


def test_a_run_without_any_setting_has_no_place():
    made = sweep((LOW, GOOD, HIGH, DEAD), (SLOW,) * 4, optimizer='SGD')
    grid = make_grid(a_table([a_run(0.99), *made]))
    assert axes(a_table([a_run(0.99), *made])) == ['learning rate', 'batch size']
    assert [facet.label for facet in grid.facets] == [''] and None not in [*grid.columns, *grid.rows]
    assert sorted(i for runs in grid.facets[0].cells.values() for i in runs) == list(range(1, 9))
    assert said([a_run(0.99), *made])[0] == said(made)[0]


def test_other_settings_are_grids_of_their_own_or_averaged_over():
    made = [made for width in (4, 8) for made in sweep((LOW, GOOD, HIGH, DEAD), (SLOW,) * 4, width=width)]
    assert [facet.label for facet in make_grid(a_table(made)).facets] == ['width 4', 'width 8']
    texts = said(made)
    assert texts[0].startswith('width 4: Best: ') and texts[1].startswith('width 8: Best: ')
    made = [made for width in range(4, 12) for made in sweep((LOW, GOOD, HIGH, DEAD), (SLOW,) * 4, width=width)]
    grid = make_grid(a_table(made))
    assert len(grid.facets) == 1 and grid.merged == ['width'] and len(grid.facets[0].cells[0, 0]) == 8
    assert 'Each cell is the mean over all runs in it, whatever their width.' in said(made)


def test_quantities_and_their_colours():
    made = sweep((LOW, GOOD, HIGH, DEAD), (SLOW,) * 4)
    for run, *_ in made:
        run.scalars['val_loss'] = {9: 1e9 if run.settings['lr'] == 1. else 0.5 + run.settings['lr']}
    table = a_table(made)
    shown = {quantity.title: quantity for quantity in make_grid(table).quantities}
    assert [*shown] == ['val_acc', 'val_loss', 'weights, times fresh', 'time']
    assert shown['weights, times fresh'].values == [10.] * 8
    assert shown['weights, times fresh'].text(10.) == '\u00d710'
    assert shown['time'].values == [10.] * 8 and shown['time'].text(90.) == '1.5 min'
    assert (shown['val_acc'].better, shown['val_loss'].better, shown['time'].better) == (1, -1, -1)
    # What diverged does not make all others alike.
    table.verdicts = [Verdict('diverged' if run.settings['lr'] == 1. else 'learned') for run in table.runs]
    assert limits(table, shown['val_loss']) == (0.501, 0.6, False)


# --- words ----------------------------------------------------------------


def test_the_best_inside_the_grid_and_where_too_high_and_too_low_begin():
    assert said(INSIDE) == [
        'Best: learning rate 0.1, batch size 32 with val_acc 0.95.',
        'Learning rate too high: from 0.1 on at batch size 8, from 1 on at 32.',
        'Learning rate too low: up to 0.001 at batch size 8, up to 0.01 at 32, up to 1 at 128.',
        'The best lies inside the grid.',
        'Try next, with all else as there: learning rate 0.03 or learning rate 0.3.']


@pytest.mark.parametrize('rows, edge, tries', [
    (((GOOD, SLOW, HIGH, DEAD), (SLOW,) * 4), 'the lowest learning rate and the lowest batch size',
     'learning rate 0.0001 or batch size 4'),
    (((LOW, LOW, SLOW, SLOW), (LOW, LOW, SLOW, GOOD)), 'the highest learning rate and the highest batch size',
     'learning rate 10 or batch size 64')])
def test_the_best_at_the_edge_and_what_lies_beyond(rows, edge, tries):
    texts = said(sweep(*rows))
    assert f'The best lies at the edge of the grid: it has {edge}.' in texts
    assert f'Try next, with all else as there: {tries}.' in texts


def test_bounds_that_all_share_and_bounds_that_there_are_not():
    texts = said(sweep((LOW, GOOD, HIGH, DEAD), (LOW, GOOD, HIGH, DEAD)))
    assert 'Learning rate too high: from 0.1 on.' in texts and 'Learning rate too low: up to 0.001.' in texts
    texts = said(sweep((GOOD,) * 4, (GOOD,) * 4))
    assert 'No learning rate of these is too high.' in texts and 'No learning rate of these is too low.' in texts


def test_nothing_learns():
    texts = said(sweep((HIGH, HIGH, DEAD, DEAD), (HIGH, DEAD, DEAD, DEAD)))
    assert texts[:2] == ['No run of the grid learns: all of them broke.', 'Learning rate too high: from 0.001 on.']
    assert texts[-1] == 'Try next, with all else as there: learning rate 0.0001.'
    texts = said(sweep((LOW,) * 4, (LOW, LOW, LOW, (0.3, 'hardly moved'))))
    assert texts[0].endswith('with val_acc 0.3. Yet even there it is hardly moved.')


def test_settings_that_are_no_numbers_have_no_edge():
    made = [a_run(score, optimizer=optimizer, width=width) for optimizer, width, score in
            [('SGD', 'a', .1), ('Adam', 'a', .2), ('SGD', 'b', .3), ('Adam', 'b', .4)]]
    assert said(made) == ['Best: optimizer Adam, width b with val_acc 0.4.']


@pytest.mark.parametrize('rates', [(5e-324, 1e-300, 1e300), (1e300, 1e307, 1.7e308), (-1., 0., 1.), (True, False, 2)])
@pytest.mark.parametrize('best', [0, 1, 2, None])
def test_settings_at_the_ends_of_what_floats_hold(rates, best):
    cells = [GOOD if i == best else HIGH for i in range(3)]
    texts = said(sweep(cells, cells, rates=rates, sizes=(1, 1.7e308)))
    assert texts and not [text for text in texts if 'inf' in text or 'nan' in text]


def test_noise_is_asked_whether_a_larger_batch_helps(monkeypatch):
    from geowatch.utils.lightning_ext.callbacks.plasticity_report import advice
    monkeypatch.setattr(advice, 'larger_batch', lambda runs: f'{len(runs)} runs say so.')
    assert said(INSIDE)[-1] == '12 runs say so.'


# --- commands -------------------------------------------------------------


@pytest.mark.parametrize('folder', ['run', 'my run; rm -rf *', '$(touch x) `y` "z" \'q\'', 'größe'])
def test_the_command_is_one_that_a_shell_reads_as_it_is_meant(tmp_path, folder):
    home = tmp_path / folder
    home.mkdir()
    run = Run([home], {}, {'model.class_path': 'geowatch.A', 'lr': 1., 'batch_size': 2}, [])
    changes = {'learning rate': 0.03, 'batch size': 8}
    assert command(run, changes) == ''  # how it was started is not known
    config = 'model: {class_path: %s}\noptimizer: {init_args: {lr: 0.1}}\ndata: {batch_size: 4}\n'
    # A hyperparameter of the network is no flag.
    (home / 'hparams.yaml').write_text('batch_size: 4')
    (home / 'config.yaml').write_text(config % 'geowatch.tasks.fusion.Model')
    assert shlex.split(command(run, changes)) == [
        'geowatch', 'fit', f'--config={home}/config.yaml', '--optimizer.init_args.lr=0.03', '--data.batch_size=8']
    assert command(run, {'width': 3}) == ''
    (home / 'config.yaml').write_text(config % 'mine.Model')
    assert command(run, changes) == ''


def test_no_command_with_letters_that_cannot_be_seen(tmp_path):
    home = tmp_path / 'two\nlines'
    home.mkdir()
    (home / 'config.yaml').write_text('{model: {class_path: geowatch.A}, lr: 1}')
    assert command(Run([home], {}, {}, []), {'learning rate': 2.}) == ''


# --- looks ----------------------------------------------------------------


def test_colours_follow_the_learning_rate_and_dashes_the_batch_size():
    looks = styles.styles(a_table(INSIDE))
    by_rate = {run.settings['lr']: look.colour for (run, *_), look in zip(INSIDE, looks, strict=True)}
    by_size = {run.settings['batch_size']: look.dash for (run, *_), look in zip(INSIDE, looks, strict=True)}
    assert [look.colour for look in looks] == [by_rate[run.settings['lr']] for run, *_ in INSIDE]
    assert [look.dash for look in looks] == [by_size[run.settings['batch_size']] for run, *_ in INSIDE]
    assert len(set(by_rate.values())) == 4 and [*by_size.values()] == ['solid', 'dashed', 'dotted']
    # A sequence: each higher rate is lighter.
    weights = [sum(int(colour[i:i + 2], 16) * w for i, w in ((1, .3), (3, .6), (5, .1)))
               for colour in by_rate.values()]
    assert weights == sorted(weights)
    # Where nothing differs, by number.
    assert len(set(styles.styles(a_table([a_run(lr=1, seed=i) for i in range(9)])))) == 9


def test_epochs_by_themselves_where_their_lengths_differ():
    def run(*points):
        return Run([], {'erank': [Point(step, epoch, 1., None, {}) for step, epoch in points]}, {}, [])
    short, long, unknown = run((9, 0), (19, 1)), run((19, 0), (39, 1)), run((9, None))
    assert choose_x([short, long]) == 'epoch' and choose_x([short, short]) == 'step'
    assert choose_x([short, long], 'step') == 'step' and choose_x([short, short], 'epoch') == 'epoch'
    assert choose_x([short, unknown], 'epoch') == 'step'


# --- the command line -----------------------------------------------------


@drawing
def test_grid_png_and_words_of_files(tmp_path, capsys):
    for lr in (0.001, 0.01, 0.1):
        for size in (4, 8):
            lines = [line('weight_mag', step, 1. + step) for step in (-1, 9)]
            folder = write_run(tmp_path / 'runs' / f'{lr}-{size}', lines, learning_rate=lr, batch_size=size)
            (folder / 'metrics.csv').write_text(f'step,val_loss\n0,20\n9,{abs(math.log10(lr) + 2) + size}\n')
    assert PlasticityReportCLI.main(cmdline=0, runs=[str(tmp_path / 'runs')], out=str(tmp_path), png=True) == 0
    from matplotlib.image import imread
    assert imread(tmp_path / 'grid.png')[..., :3].std() > 0.1
    text = capsys.readouterr().out
    assert '- Best: learning rate 0.01, batch size 4 with val_loss 4.\n' in text
    page = (tmp_path / 'report.html').read_text()
    assert '<b>Best: learning rate 0.01, batch size 4 with val_loss 4.</b>' in page
    data = json.loads(page.partition('id="data">')[2].partition('</script>')[0])
    assert data['grid']['columns'] == ['0.001', '0.01', '0.1'] and data['grid']['rows'] == ['4', '8']
    assert [cell['best'] for cell in data['grid']['facets'][0]['cells']] == [False, True] + 4 * [False]
