"""
Make the README's pictures from real runs: a sweep of make_verdict_table.py, and examples/online_permuted_mnist.py.

`images/grid.png` is the report's grid of a sweep of learning rates and batch sizes, `images/curves.png` its picture of
the paper's metrics. `images/report.png` and `images/tensorboard.png` are screenshots; they need chromium and
chromedriver on the PATH, and selenium.

CommandLine:
    python docs/make_pictures.py --mnist=../shared/data/mnist.npz
    python docs/make_pictures.py --mnist=digits --runs=/tmp/runs --sweep=/tmp/sweep
    python docs/make_pictures.py --only=grid
"""
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import scriptconfig as scfg

HERE = Path(__file__).resolve().parent
ENV = {**os.environ, 'GEOWATCH_PREIMPORT': '0'}
REPORT = [sys.executable, '-m', 'geowatch.cli.plasticity_report']
MOST_BYTES = 300_000


class MakePicturesCLI(scfg.DataConfig):
    """
    Make the README's pictures from a real run.
    """
    mnist = scfg.Value('data', type=str, help='as for the example: an .npz file, a folder, or digits')
    runs = scfg.Value(None, type=str, help='folder of runs of the example that are there already')
    sweep = scfg.Value(None, type=str, help='folder of runs of the sweep that are there already')
    only = scfg.Value('all', choices=['all', 'grid'], help='grid: the pictures of the sweep alone, in three minutes')
    out = scfg.Value(str(HERE / 'images'), type=str, help='folder for the pictures')

    @classmethod
    def main(cls, cmdline=1, **kwargs):
        """
        Args:
            cmdline (bool | List[str]): where arguments come from
            **kwargs: defaults of the arguments
        """
        config = cls.cli(cmdline=cmdline, data=kwargs, strict=True)
        out = Path(config.out).resolve()
        out.mkdir(parents=True, exist_ok=True)
        missing = [name for name in ('chromium', 'chromedriver') if shutil.which(name) is None]
        if missing:
            print(f'No screenshots: {" and ".join(missing)} not on the PATH')
        with tempfile.TemporaryDirectory() as work:
            sweep = Path(config.sweep or Path(work) / 'sweep').resolve()
            if not config.sweep:
                train_sweep(sweep)
            run(*REPORT, f'{sweep}/lr*', f'--out={work}/grid', '--png')
            save(Path(work) / 'grid/grid.png', out / 'grid.png')
            if not missing:
                look_at_report(Path(work) / 'grid/report.html', Path(work) / 'report.png')
                save(Path(work) / 'report.png', out / 'report.png')
            if config.only == 'grid':
                return
            runs = Path(config.runs or Path(work) / 'runs').resolve()
            if not config.runs:
                example = HERE / 'examples/online_permuted_mnist.py'
                run(sys.executable, example, f'--mnist={config.mnist}', f'--out={runs}')
            run(*REPORT, f'{runs}/lr*', f'--out={work}/report', '--under=online_accuracy', '--x=epoch', '--png')
            save(Path(work) / 'report/panels.png', out / 'curves.png')
            if not missing:
                look_at_tensorboard(runs, Path(work) / 'tensorboard.png')
                save(Path(work) / 'tensorboard.png', out / 'tensorboard.png')


def train_sweep(folder):
    """ The convolutional network on small digits, with SGD: 5 learning rates, 3 batch sizes. """
    import make_verdict_table as sweeps
    for lr in sweeps.RATES['SGD']:
        for batch_size in sweeps.BATCH_SIZES:
            own = folder / f'lr{lr:g}-bs{batch_size}'
            own.mkdir(parents=True)
            sweeps.train(own, 'CNN', 'SGD', lr, batch_size)


def look_at_report(page, target):
    """
    Take a picture of the first screen of report.html.

    Args:
        page (Path): the report
        target (Path): PNG file
    """
    with tempfile.TemporaryDirectory() as profile:
        driver = start_chromium(profile)
        try:
            driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride',
                                   {'width': 1280, 'height': 860, 'deviceScaleFactor': 1, 'mobile': False})
            driver.get(page.as_uri())
            wait(lambda: driver.execute_script("return document.querySelector('#chart-hero svg') !== null"))
            driver.save_screenshot(str(target))
        finally:
            driver.quit()


def run(*command):
    """ Run a command from any folder but the repository, whose geowatch is not the installed one. """
    subprocess.run(list(map(str, command)), check=True, env=ENV)


def save(source, target):
    """
    Copy a picture, with fewer colours where it would be large for a README.

    Args:
        source (Path): PNG file
        target (Path): where it goes
    """
    from PIL import Image
    picture = Image.open(source).convert('RGB')
    picture.save(target, optimize=True)
    if target.stat().st_size > MOST_BYTES:
        picture.quantize(64).save(target, optimize=True)
    print(f'{target}: {target.stat().st_size / 1000:.0f} kB')


def look_at_tensorboard(runs, target):
    """
    Take a picture of the dashboard, as TensorBoard shows it in a browser.

    Args:
        runs (Path): folder of event files
        target (Path): PNG file
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, '-m', 'tensorboard.main', f'--logdir={runs.name}', f'--port={port}',
                               '--host=127.0.0.1', '--load_fast=false'], env=ENV, cwd=runs.parent)
    try:
        wait(lambda: can_connect(port))
        with tempfile.TemporaryDirectory() as profile:
            driver = start_chromium(profile)
            try:
                driver.get(f'http://127.0.0.1:{port}/#custom_scalars')
                wait(lambda: driver.execute_script(COUNT_CHARTS) >= 6)
                time.sleep(5)  # its charts come in slowly, and tell nobody when they are complete
                driver.save_screenshot(str(target))
            finally:
                driver.quit()
    finally:
        server.terminate()
        server.wait()


# TensorBoard's pages are made of nested shadow trees.
COUNT_CHARTS = '''
    const find = root => [...root.querySelectorAll('*')].reduce((count, element) => count
        + (element.tagName === 'VZ-LINE-CHART2') + (element.shadowRoot ? find(element.shadowRoot) : 0), 0);
    return find(document);
'''


def start_chromium(profile):
    """ Headless, with a profile of its own. """
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which('chromium')
    for flag in ('headless', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run', 'disable-dev-shm-usage',
                 'disable-background-networking', 'disable-component-update', 'disable-sync', 'window-size=1500,920',
                 f'user-data-dir={profile}'):
        options.add_argument(f'--{flag}')
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which('chromedriver')))


def can_connect(port):
    with socket.socket() as trial:
        return trial.connect_ex(('127.0.0.1', port)) == 0


def wait(is_ready, seconds=180):
    """ Until something is so, or fail. """
    end = time.monotonic() + seconds
    while not is_ready():
        if time.monotonic() > end:
            raise TimeoutError('the page has not come up')
        time.sleep(0.5)


if __name__ == '__main__':
    MakePicturesCLI.main()
