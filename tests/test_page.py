"""
The page of the report: what it holds, how large it is, and what it does in a browser.
"""
import json
import math
import re
import shutil

import pytest
from test_report import line, two_runs, write_run

from geowatch.utils.lightning_ext.callbacks.plasticity_report import PlasticityReportCLI

MOST_BYTES = 1_500_000
EVIL = '<img src=x onerror=alert(1)>"\'&{{data}}\u2215script'


def write_sweep(root, odd='', layers=3, steps=40, seeds=1):
    """ 5 learning rates x 3 batch sizes, of which the highest rates break. """
    for i, lr in enumerate((1e-05, 0.001, 0.01, 0.1, 1.0)):
        for j, size in enumerate((4, 8, 16)):
            for seed in range(seeds):
                lines, each = [], 10 // (j + 1)
                for k in range(steps // (j + 1)):
                    broken = k * (j + 1) / steps * (i == 4)
                    ranks = {f'model.block{n}.fc{odd}': 50. - 40 * broken * n - i for n in range(layers)}
                    dead = {f'act{n}': .5 * broken for n in range(layers)}
                    lines += [line('erank', k, 50. - 40 * broken, ranks, per_epoch=each),
                              line('dead_units', k, 0.9 * broken, dead, per_epoch=each)]
                folder = write_run(root / f'lr{lr}-bs{size}-{seed}{odd}', lines, lr=lr, batch_size=size, seed=seed)
                scores = ''.join(f'{k},{0.2 + 0.2 * (i % 4) * k * (j + 1) / steps}\n' for k in range(steps // (j + 1)))
                (folder / 'metrics.csv').write_text('step,val_acc\n' + scores)


def report_on(root, runs):
    assert PlasticityReportCLI.main(cmdline=0, runs=[str(runs)], out=str(root)) == 0
    return root / 'report.html'


def data_of(page):
    return json.loads(page.read_text().partition('id="data">')[2].partition('</script>')[0])


# --- the file -------------------------------------------------------------


def test_a_page_is_light(tmp_path):
    """ 15 runs of 12 metrics, 30 layers and 300 measurements each; it asks for nothing else. """
    steps = range(0, 3000, 10)
    names = [f'm{k}' for k in range(12)]
    for i in range(15):
        layers = {f'layer{n}': i + n / 7 for n in range(30)}
        lines = [line(name, step, math.sin(step / 50 + i), {} if step % 300 else layers)
                 for name in names for step in steps]
        write_run(tmp_path / 'runs' / str(i), lines, lr=10. ** (i % 5), batch_size=2 ** (i // 5))
    page = report_on(tmp_path, tmp_path / 'runs')
    assert page.stat().st_size < MOST_BYTES
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)|@import|url\((?!#)', text.replace('url(#${clip})', ''))


def test_best_first_with_the_verdict_loss_and_settings_before_the_metrics(tmp_path):
    write_sweep(tmp_path / 'runs')
    text = report_on(tmp_path, tmp_path / 'runs').read_text()
    heads = re.findall(r'<th scope="col"><button>(.*?)</button>', text)
    assert heads[:5] == ['run', 'verdict', 'val_acc', 'learning rate', 'batch size']
    rows = re.findall(r'<tr><th scope="row" data-v="(.*?)">', text)
    assert len(rows) == 15 and rows[0].startswith('lr0.1-')
    # Each cell says what it is, where the head is not there: on paper and on a phone.
    cells = re.findall(r'<td[^>]* data-title="(.*?)" data-v="(.*?)">', text)
    assert [title for title, _ in cells[:len(heads) - 1]] == heads[1:]
    assert cells[2] == ('learning rate', '0.1')


def test_runs_share_what_is_alike(tmp_path):
    write_sweep(tmp_path / 'runs')
    data = data_of(report_on(tmp_path, tmp_path / 'runs'))
    assert data['x'] == 'epoch'  # batch sizes differ
    assert len(data['steps']) < 15  # lists of steps, of 45 curves
    erank = next(chart for chart in data['charts'] if chart['name'] == 'erank')
    assert data['steps'][erank['curves'][0]['s']] == list(range(40))
    # Of three layers all differ; each has its curve of each run.
    assert erank['layers']['names'] == [f'model.block{n}.fc' for n in range(3)]
    assert [len(own) for own in erank['layers']['curves']] == [15] * 3


@pytest.mark.parametrize('runs', ['*', f'lr1e-05-bs4-0{EVIL}'.replace('[', '[[]')])
def test_hostile_names_are_text(tmp_path, runs):
    """ In names of runs, layers, settings, metrics, losses, and in what is said of them. """
    write_sweep(tmp_path / 'runs', odd=EVIL)
    for folder in (tmp_path / 'runs').iterdir():
        settings = folder / 'hparams.yaml'
        odd = json.dumps({f'x{EVIL}': f'{EVIL}{len(folder.name) % 2}'})[1:-1]
        settings.write_text(f'{settings.read_text()}{odd}\n')
        with open(folder / 'plasticity.jsonl', 'a') as file:
            file.write(json.dumps(line(f'mine{EVIL}', 0, 1.0, {EVIL: 1.0})) + '\n')
        (folder / 'config.yaml').write_text(  # so that there are commands
            settings.read_text() + 'model: {class_path: geowatch.A}')
        csv = folder / 'metrics.csv'
        csv.write_text(csv.read_text().replace('val_acc', '"val_acc' + EVIL.replace('"', '""') + '"'))
    text = report_on(tmp_path, tmp_path / 'runs' / runs).read_text()
    assert '<img' not in text.replace('\\u003cimg', '')
    assert text.count('<script') == text.count('</script>') == 2
    assert '{{data}}' in text  # of the name, as it is
    if runs == '*':
        commands = re.findall(r'<pre><code>(.*?)</code></pre>', text, re.S)
        assert commands and all('&lt;img' in own and '<' not in own for own in commands)
    assert text.count('id="data"') == 1
    assert len(re.findall(r'&lt;img src=x onerror=alert\(1\)&gt;', text)) > 10
    # No attribute ends before it should.
    tags = re.sub(r'<script.*?</script>', '', text, flags=re.S)
    assert not [tag for tag in re.findall(r'<[a-z][^>]*>', tags) if re.search(r'\son\w+=', re.sub(r'"[^"]*"', '', tag))]


# --- in a browser ---------------------------------------------------------


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    webdriver = pytest.importorskip('selenium.webdriver', reason='selenium is not installed')
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if chromium is None or shutil.which('chromedriver') is None:
        pytest.skip('chromium and chromedriver are not on the PATH')
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ('headless', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run', 'disable-dev-shm-usage',
                 'disable-background-networking', 'disable-component-update', 'disable-sync',
                 f'user-data-dir={tmp_path_factory.mktemp("profile")}'):
        options.add_argument(f'--{flag}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which('chromedriver')))
    yield driver
    driver.quit()


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    root = tmp_path_factory.mktemp('two')
    # A name that is HTML must come out as text.
    two_runs(root / 'runs', odd='<b> & "</script>'.replace('/', '\u2215'))
    return report_on(root, root / 'runs')


@pytest.fixture(scope='module')
def sweep(tmp_path_factory):
    root = tmp_path_factory.mktemp('sweep')
    write_sweep(root / 'runs', odd=EVIL)
    return report_on(root, root / 'runs')


class Page:
    """ What the tests ask of a page, in JavaScript. """

    def __init__(self, driver, width):
        self.driver = driver
        self.width = width

    def js(self, expression, *args):
        return self.driver.execute_script(f'return ({expression})', *args)

    def wait(self, condition, *args, seconds=60):
        from selenium.webdriver.support.ui import WebDriverWait
        return WebDriverWait(self.driver, seconds, 0.05).until(lambda _: self.js(condition, *args), condition)

    def count(self, selector):
        return self.js('document.querySelectorAll(arguments[0]).length', selector)

    def show(self, selector):
        self.driver.execute_script("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        self.wait("pictures.find(own => '#' + own.holder.id === arguments[0]).old === false", selector)

    def texts(self, selector):
        return self.js('[...document.querySelectorAll(arguments[0])].map(e => e.textContent)', selector)

    def click(self, selector, text=''):
        """ As a person does it: where the button is, if nothing lies over it. """
        button = self.js("""[...document.querySelectorAll(arguments[0])].find(e => e.innerText.startsWith(arguments[1]))
                         """, selector, text)
        self.driver.execute_script('arguments[0].scrollIntoView({block: "center"})', button)
        button.click()

    def move(self, x, y, *further, drag=False):
        from selenium.webdriver.common.actions.action_builder import ActionBuilder
        from selenium.webdriver.common.actions.mouse_button import MouseButton
        actions = ActionBuilder(self.driver)
        actions.pointer_action.move_to_location(round(x), round(y))
        if drag:
            actions.pointer_action.pointer_down(MouseButton.LEFT)
        for place in further:
            actions.pointer_action.move_to_location(*map(round, place))
        if drag:
            actions.pointer_action.pointer_up(MouseButton.LEFT)
        actions.perform()

    def point(self, name, run, k):
        """ Where the k-th value of a run is on the screen. """
        self.show(f'#chart-{name}')
        return self.js("""(([name, run, k]) => {
            const box = document.querySelector(`#chart-${name} svg`).getBoundingClientRect();
            const point = pictures.find(own => own.holder.id === 'chart-' + name).points.filter(p => p.i === run)[k];
            return [box.left + point.x, box.top + point.y];
        })(arguments[0])""", [name, run, k])


def opened(browser, report, width, media='screen', scheme='light'):
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride',
                            {'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': False})
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {
        'media': media, 'features': [{'name': 'prefers-color-scheme', 'value': scheme}]})
    browser.get(report.as_uri())
    return Page(browser, width)


@pytest.fixture(params=[('two', 1280), ('two', 390), ('sweep', 1280), ('sweep', 390)], ids='-'.join)
def page(browser, request):
    name, width = request.param
    report = request.getfixturevalue(name)
    browser.execute_cdp_cmd('Network.enable', {})
    browser.execute_cdp_cmd('Network.emulateNetworkConditions', {
        'offline': True, 'latency': 0, 'downloadThroughput': 0, 'uploadThroughput': 0})
    for kind in ('browser', 'performance'):
        browser.get_log(kind)  # what the test before has left
    page = opened(browser, report, width)
    page.wait("document.querySelector('.facet, #chart-hero svg') !== null")
    yield page
    assert [entry['message'] for entry in browser.get_log('browser') if entry['level'] in ('SEVERE', 'WARNING')] == []
    events = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
    asked = [event['params']['request']['url'] for event in events if event['method'] == 'Network.requestWillBeSent']
    assert [url for url in asked if not url.startswith(('data:', 'blob:'))] == [report.as_uri()]
    assert page.count('img') == 0  # of a name that is HTML


def of(*names):
    return pytest.mark.parametrize('page', [(name, width) for name in names for width in (1280, 390)], indirect=True,
                                   ids=[f'{name}-{width}' for name in names for width in (1280, 390)])


@of('two', 'sweep')
def test_page_fits_its_width_and_begins_with_a_picture(page):
    assert page.js('document.documentElement.scrollWidth') <= page.width
    small = page.js("""[...document.querySelectorAll('body *')].filter(e => e.checkVisibility()
        && e.textContent.trim() && !e.children.length && e.tagName !== 'SCRIPT'
        && parseFloat(getComputedStyle(e).fontSize) < 11).map(e => e.outerHTML)""")
    assert small == []
    for selector in ('.findings p', 'tbody th', '#runs button', '#chart-hero', '#chart-erank', '#by-layer'):
        left, right = page.js("""(box => [box.left, box.right])(
            document.querySelector(arguments[0]).getBoundingClientRect())""", selector)
        assert 0 <= left < right <= page.width, selector
    assert page.js("document.querySelector('.facet').getBoundingClientRect().top") < 600
    # Only what is on the screen is drawn.
    assert page.js("pictures.filter(own => own.holder.querySelector('svg')).length") < page.js('pictures.length')


@of('two')
def test_page_says_what_the_numbers_say(page):
    text = page.texts('body')[0]
    assert 'dead units 1 % \u2192 19 %' in text and 'correlates' in text and 'lr0.1<b> & "' in text
    (row,) = [row for row in page.texts('tbody tr') if row.startswith('lr0.1')]
    assert '59 \u2192 24' in row and 'falls' in row


@of('two')
def test_hover_tells_the_value(page):
    x, y = page.point('erank', 1, 4)
    page.move(x - 3, y, (x, y))
    page.wait("!document.getElementById('tip').hidden")
    # Run lr0.1 at step 49: 59 - 35 * 4 / 9; ten steps are an epoch, the first of which is 0
    text = page.texts('#tip')[0]
    assert text.startswith('lr0.1<b> & "') and '43.44' in text and text.endswith('step 49 of epoch 4')


@of('two')
def test_a_run_can_be_switched_off_and_on(page):
    page.show('#chart-erank')
    curves = "[...document.querySelectorAll('#chart-erank path.run')].map(path => path.dataset.run)"
    assert page.js(curves) == ['0', '1', '0', '1']  # with those of the loss below
    page.click('#runs button', 'lr0.1<')
    page.show('#chart-erank')
    assert page.js(curves) == ['0', '0']
    pressed = "document.querySelectorAll('#runs button')[1].getAttribute('aria-pressed')"
    assert page.js(pressed) == 'false'
    page.click('#runs button', 'all')
    page.show('#chart-erank')
    assert page.js(curves) == ['0', '1', '0', '1'] and page.js(pressed) == 'true'


@of('two')
def test_axis_and_layers(page):
    page.click('#axis button', 'by epoch')
    page.show('#chart-erank')
    assert page.js("pictures.find(own => own.holder.id === 'chart-erank').range") == [0.1, 10]
    page.click('#metric button', 'Effective rank of weights')
    # Of fc1 both runs have the same.
    assert page.texts('#layers h3') == ['fc2'] and '1 of 2 layers' in page.texts('#scale')[0]
    page.show('#layer-0')
    assert page.count('#layer-0 path.run') == 2


@of('two')
def test_zoom(page):
    if page.width < 760:
        return  # a finger on a picture scrolls the page there
    x, y = page.point('erank', 1, 2)
    page.move(x, y, (x + 50, y + 20), (x + 150, y + 60), drag=True)
    low, high = page.wait('zoom')
    assert 29 - 2 < low < high < 99
    assert page.js("pictures.find(own => own.holder.id === 'chart-erank').range") == [low, high]
    page.driver.execute_script("document.querySelector('#chart-erank svg').dispatchEvent(new MouseEvent('dblclick'))")
    assert page.js('zoom') is None


@of('sweep')
def test_a_click_on_a_cell_shows_its_runs(page):
    assert page.count('.facet button') == 15 and page.count('.facet button.best') == 1
    assert page.texts('.facet thead th')[1:] == ['1e-05', '0.001', '0.01', '0.1', '1']
    hero = "new Set([...document.querySelectorAll('#chart-hero path.run')].map(path => path.dataset.run)).size"
    page.show('#chart-hero')
    assert page.js(hero) == 15
    page.driver.execute_script("document.querySelectorAll('.facet button')[3].click()")
    page.show('#chart-hero')
    assert page.js(hero) == 1
    assert page.js("data.runs[document.querySelector('#chart-hero path.run').dataset.run].label").startswith(
        'lr0.1-bs4')
    assert page.js("[...document.querySelectorAll('#runs [aria-pressed=\"true\"]')].length") == 1
    page.driver.execute_script("""document.querySelectorAll('.facet button')[4].dispatchEvent(
        new MouseEvent('click', {shiftKey: true}))""")
    page.show('#chart-hero')
    assert page.js(hero) == 2
    for _ in range(2):
        page.driver.execute_script("document.querySelectorAll('.facet button')[4].click()")
    page.show('#chart-hero')
    assert page.js(hero) == 15


@of('sweep')
def test_the_grid_can_be_coloured_by_else(page):
    before = page.texts('.facet button span')
    assert page.texts('#quantity button')[:2] == ['val_acc', 'Dead units']
    page.click('#quantity button', 'Dead units')
    after = page.texts('.facet button span')
    assert after != before and after[0] == '0 %'
    colours = page.js("[...document.querySelectorAll('.facet button')].map(b => getComputedStyle(b).backgroundColor)")
    assert len(set(colours)) > 1 and colours[0] != colours[4]


@of('sweep')
def test_the_table_is_sorted_by_a_click(page):
    column = """[...document.querySelectorAll('.runs-table tbody tr')]
        .map(row => Number(row.children[arguments[0]].dataset.v))"""
    k = page.texts('.runs-table thead th').index('learning rate')
    for order in (1, -1):
        page.click('.runs-table thead button', 'learning rate')
        values = page.js(column, k)
        assert values == sorted(values)[::order] and values[0] != values[-1]


def test_it_loads_in_a_second_and_answers_a_click_at_once(browser, sweep):
    loads, clicks = [], []
    for _ in range(3):  # the machine may be busy once
        page = opened(browser, sweep, 1280)
        page.wait("document.querySelector('#chart-hero svg') !== null")
        loads.append(page.js("performance.getEntriesByType('navigation')[0].domInteractive"))
        clicks.append(browser.execute_async_script("""
            const done = arguments[0], start = performance.now();
            document.querySelector('.facet button').click();
            requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));"""))
    assert min(loads) < 1000 and min(clicks) < 200  # about 200 and 20


def test_dark_and_on_paper(browser, sweep):
    light = opened(browser, sweep, 1280).js("getComputedStyle(document.querySelector('.card')).backgroundColor")
    page = opened(browser, sweep, 1280, scheme='dark')
    dark = page.js("getComputedStyle(document.querySelector('.card')).backgroundColor")
    assert light == 'rgb(255, 255, 255)' and max(map(int, re.findall(r'\d+', dark))) < 60
    page = opened(browser, sweep, 760, media='print')
    page.driver.execute_script("dispatchEvent(new Event('beforeprint'))")
    # All pictures are there, and no cell of the table ends outside the page.
    assert page.js("pictures.every(own => own.holder.querySelector('svg'))")
    cells = page.js("""[...document.querySelectorAll('.runs-table td')].map(td => {
        const box = td.getBoundingClientRect(); return [box.left, box.right, box.height]; })""")
    assert len(cells) == 15 * (len(page.texts('.runs-table thead th')) - 1)
    assert all(left >= 0 and right <= 760 and height > 0 for left, right, height in cells)
    assert page.js("getComputedStyle(document.querySelector('.runs-table td'), '::before').content") == '"verdict"'


def test_odd_numbers_are_drawn_without_an_error(browser, tmp_path):
    """ One point, none that is finite, all zero, from one end of what floats hold to the other, in layers too. """
    def lines(factor):
        for name, values in {'one': [1.], 'none': [None] * 3, 'zero': [0.] * 3, 'huge': [-1e308, 1e308, 1.],
                             'tiny': [5e-324, 1e308, 1.], 'grad_mag': [1e-300, 1e300, 0.]}.items():
            yield from (line(name, k, value, {'a': value, 'b': value and value * factor}) for k, value in
                        enumerate(values))
    for i, factor in enumerate((0.5, 0.25)):
        write_run(tmp_path / 'runs' / f'{i}', list(lines(factor)), lr=factor)
    for runs in ('*', '0'):
        page = opened(browser, report_on(tmp_path / runs.strip('*'), tmp_path / 'runs' / runs), 1280)
        page.driver.execute_script("dispatchEvent(new Event('beforeprint'))")
        assert page.js("pictures.length > 6 && pictures.every(own => own.holder.querySelector('svg'))")
        for name in page.texts('#metric button'):
            page.click('#metric button', name)
            page.driver.execute_script("dispatchEvent(new Event('beforeprint'))")
            assert not page.js("""[...document.querySelectorAll('svg > *, svg g *')].map(e => e.outerHTML)
                .filter(html => /NaN|Infinity/.test(html))""")
        assert [entry['message'] for entry in browser.get_log('browser') if entry['level'] == 'SEVERE'] == []


def test_a_single_run_has_a_map_of_its_layers(browser, tmp_path):
    write_sweep(tmp_path / 'runs')
    page = opened(browser, report_on(tmp_path, tmp_path / 'runs' / 'lr1.0-bs4-0'), 1280)
    assert page.count('#grid.drawn') == 0 and page.js("document.getElementById('runs').children.length") == 0
    page.click('#metric button', 'Effective rank of weights')
    assert page.js("(map => [map.width, map.height])(document.querySelector('.map canvas'))") == [40, 3]
    # The last layer has lost most, the first nothing: purple and white.
    pixels = page.js("""(context => [context.getImageData(39, 0, 1, 1).data, context.getImageData(39, 2, 1, 1).data]
        .map(data => [...data]))(document.querySelector('.map canvas').getContext('2d'))""")
    assert pixels[0] == [247, 247, 247, 255] and pixels[1][1] < 60
