"""
The report on files that hold anything: what cannot be read is named and left out, the rest is drawn, within seconds.
"""
import importlib.util
import json
import math
import os

import pytest
from test_report import line, only_run, said, write_run

from geowatch.utils.lightning_ext.callbacks.plasticity_metrics import METRICS
from geowatch.utils.lightning_ext.callbacks.plasticity_report import PlasticityReportCLI
from geowatch.utils.lightning_ext.callbacks.plasticity_report.curves import change_of
from geowatch.utils.lightning_ext.callbacks.plasticity_report.findings import make_table, to_records
from geowatch.utils.lightning_ext.callbacks.plasticity_report.runs import load_runs
from geowatch.utils.lightning_ext.callbacks.plasticity_report.scalars import load_scalars
from geowatch.utils.lightning_ext.callbacks.plasticity_report.settings import MOST_COLUMNS, read_settings

drawing = pytest.mark.skipif(importlib.util.find_spec('matplotlib') is None,
                             reason='matplotlib, the extra `report`, is not installed')
GOOD = [line('erank', step, 60. - step, {'fc1': 50., 'fc2': 70. - step}) for step in (9, 19)]
TOO_LARGE = '1' + 400 * '0'


@pytest.mark.parametrize('key, text', [
    ('step', '1e400'), ('step', TOO_LARGE), ('step', '-7'), ('step', 'NaN'), ('epoch', TOO_LARGE), ('epoch', '-1'),
    ('epoch', '-Infinity'), ('samples', '1e999'), ('samples', '-1')])
def test_numbers_that_make_no_sense(tmp_path, key, text):
    odd = json.dumps({**line('erank', 29, 1.), key: 'x'}).replace('"x"', text)
    run = only_run(write_run(tmp_path / 'a', [*GOOD, odd]))
    assert [(p.step, p.value) for p in run.metrics['erank']] == [(9, 51.), (19, 41.)]
    assert any('left out: 3 (1 in all)' in note for note in run.notes)


@pytest.mark.parametrize('odd', ['{"a":' * 100_000, '[' * 100_000 + ']' * 100_000])
def test_lines_that_are_nested_too_deep(tmp_path, odd):
    run = only_run(write_run(tmp_path / 'a', [*GOOD, odd, line('erank', 29, 31.)]))
    assert [p.step for p in run.metrics['erank']] == [9, 19, 29]
    assert any('left out: 3 (1 in all)' in note for note in run.notes)


def test_values_beyond_what_floats_hold(tmp_path):
    run = only_run(write_run(tmp_path / 'a', [*GOOD, line('erank', 29, int(TOO_LARGE), {'fc1': int(TOO_LARGE)})]))
    assert math.isnan(run.metrics['erank'][-1].value) and math.isnan(run.metrics['erank'][-1].layers['fc1'])


def test_ratios_beyond_what_floats_hold():
    # A quotient of these is 0 or infinite, of which there is no logarithm.
    assert change_of([1e308, 1e-300]) == [0., -4.] and change_of([5e-324, 1e308]) == [0., 4.]
    words = METRICS['erank'].words
    assert words.badness(1e308, 1e-308) == words.badness(5e-324, 0.) == pytest.approx(-math.log(1e-12))
    assert [METRICS['dead_units'].words.text(x) for x in (1e308, -1e308)] == ['inf %', '-inf %']


@drawing
def test_names_that_look_like_something_else(tmp_path, capsys):
    """ A formula of matplotlib, a place in the page, a file of ours, several lines, half a character, no end. """
    names = [r'a$\frac$ {{data}}', 'panels', 'two\nlines\x1b[31m \ud800' + 'm' * 3000]
    lines = [*GOOD, *(line(name, 9, 1., {f'{name}.{i}': 10. ** -300 * i for i in range(2)}) for name in names)]
    lines += [line('huge', 9, 1e308)]
    write_run(tmp_path / 'runs' / 'e$f$g^', lines, lr='"$x^$"')
    write_run(tmp_path / 'runs' / 'b', GOOD[:1], lr='x' * 10000)
    loss = write_run(tmp_path / 'runs' / 'c', GOOD, **{'$': 1}) / 'metrics.csv'
    loss.write_text('step,lo$s$^\n9,1\n')
    assert PlasticityReportCLI.main(
        cmdline=0, runs=[str(tmp_path / 'runs')], out=str(tmp_path / 'out'), under='lo$s$^', png=True) == 0
    files = {path.name for path in (tmp_path / 'out').iterdir()}
    assert {'a_frac_data_.png', 'panels.png', 'panels_.png', 'layers-erank.png'} <= files
    (left_out,) = [row for row in capsys.readouterr().out.splitlines() if 'could not be drawn' in row]
    # The layers of a single run are another picture.
    assert PlasticityReportCLI.main(cmdline=0, runs=[str(tmp_path / 'runs' / 'e$f$g^')], out=str(tmp_path / 'one'),
                                    png=True) == 0
    assert {'layers-a_frac_data_.png', 'layers-panels.png'} <= {path.name for path in (tmp_path / 'one').iterdir()}
    assert left_out.startswith('- huge.png ')  # on an axis that matplotlib cannot divide
    text = (tmp_path / 'out' / 'report.html').read_text()
    assert len(text) < 200_000  # the data once
    assert '{{data}}' in text and text.count('<script>') == 1 and 'two lines' in text
    data = json.loads(text.partition('id="data">')[2].partition('</script>')[0])
    assert names[0] in {chart['name'] for chart in data['charts']}


def test_words_of_a_metric_that_make_no_sense(tmp_path):
    words = {'title': '', 'grows': int(TOO_LARGE), 'shrinks': float('nan'), 'rises': 0.5, 'why': 'because\nof it'}
    lines = [{**line('odd_words', 9, 1.), 'words': words}, line('odd_words', 19, 2.)]
    only_run(write_run(tmp_path / 'a', lines))
    found = said(load_runs([tmp_path / 'a'])[0])
    assert ('sign', 'a: odd_words 1 -> 2.') in found


def aliases(levels):
    """ Nine times the level before, so that ten levels are more than three billion. """
    return 'a0: &a0 [1, 2]\n' + ''.join(
        f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 9)}]\n' for i in range(1, levels))


def merges(levels):
    return 'a0: &a0 {x: 1}\n' + ''.join(
        f'a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}], y{i}: 2}}\n' for i in range(1, levels))


@pytest.mark.parametrize('text, why', [
    (aliases(12), 'holds more than'), (merges(40), 'holds more than'), ('a: &a [*a]', 'holds more than'),
    ('[' * 3000, 'could not be read'), ('a: "' + 'x' * (1 << 20) + '"', 'is larger than 1 MB'),
    ('a: 0x' + 'f' * 5000, 'could not be read'), ('? [1, 2]\n: 3', 'could not be read')])
def test_settings_that_are_too_much(tmp_path, text, why):
    (tmp_path / 'config.yaml').write_text(text)
    (tmp_path / 'hparams.yaml').write_text('lr: 0.5')
    settings, (note,) = read_settings(tmp_path)
    assert settings == {'lr': 0.5}
    assert note.startswith(f'config.yaml {why}') and note.endswith('is left out')


def test_settings_with_aliases_are_read(tmp_path):
    (tmp_path / 'config.yaml').write_text('a: &a {lr: 0.5, steps: [1, 2]}\nb: *a\nc: 1' + '0' * 400)
    assert read_settings(tmp_path) == (
        {'a.lr': .5, 'a.steps': [1, 2], 'b.lr': .5, 'b.steps': [1, 2], 'c': '1' + '0' * 400}, [])


def test_settings_that_differ_in_everything(tmp_path):
    for name in 'ab':
        write_run(tmp_path / name, GOOD, **{f'key{i}': f'{i}{name}' for i in range(2000)}, lr=0.1)
    runs, _ = load_runs([tmp_path])
    table = make_table(runs)
    assert len(table.settings) == MOST_COLUMNS and table.settings['learning rate'] == [0.1, 0.1]
    assert len(to_records(table)[0]) < 2 * MOST_COLUMNS
    assert ('data', f'{2001 - MOST_COLUMNS} more settings differ between the runs than the table has room for.') in (
        said(runs))


@pytest.mark.parametrize('text, points, note', [
    ('step,loss\n1,2\n2,' + '9' * 200_000, {1: 2.}, 'field larger than field limit'),
    (f'step,loss\n{TOO_LARGE},1\n-9,1\n2,3\n', {2: 3.}, None)])
def test_scalars_that_make_no_sense(tmp_path, text, points, note):
    folder = write_run(tmp_path / 'a', GOOD)
    (folder / 'metrics.csv').write_text(text)
    run = only_run(folder)
    load_scalars(run)
    assert run.scalars == {'loss': points}
    assert any(note in own for own in run.notes) if note else len(run.notes) == 1  # there are no settings


def test_folders_and_pipes_in_place_of_files(tmp_path, capsys):
    folder = write_run(tmp_path / 'runs' / 'a', GOOD)
    (folder / 'metrics.csv').mkdir()
    os.mkfifo(folder / 'config.yaml')
    (tmp_path / 'runs' / 'b' / 'plasticity.jsonl').mkdir(parents=True)
    (tmp_path / 'runs' / 'c').mkdir()
    os.mkfifo(tmp_path / 'runs' / 'c' / 'plasticity.jsonl')
    assert PlasticityReportCLI.main(cmdline=0, runs=[str(tmp_path / 'runs')], format='csv') == 0
    assert 'erank.start' in capsys.readouterr().out


def test_many_metrics_of_ones_own(tmp_path):
    run = only_run(write_run(tmp_path / 'a', [*GOOD, *(line(f'm{i}', 9, 1.) for i in range(50))]))
    assert len(run.metrics) == 31 and 'erank' in run.metrics
    assert any('20 metrics of your own' in note for note in run.notes)


def test_many_resumes(tmp_path):
    """ Each costs what it undoes: all lines once. """
    lines = [line('erank', step, 1.) for step in range(9000)]
    lines += [line('weight_mag', 9000 - i, 2.) for i in range(9000)]
    run = only_run(write_run(tmp_path / 'a', lines))
    assert [p.step for p in run.metrics['weight_mag']] == [1] and [p.step for p in run.metrics['erank']] == [0, 1]
