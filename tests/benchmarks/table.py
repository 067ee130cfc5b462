"""
The results as tables in Markdown, and as a plot.
"""
import re

TARGETS = {
    'reads': 'at most 1 from a device',
    'quiet': '< 5 µs',
    'step': 'less than all but fastai',
    'weight': '< 1.3 reads',
    'both': '< 1.6 reads',
    'erank': '< 0.5 CPU-s, 1e-6',
    'wide': '< 1/5 of svdvals, 1e-6',
    'feature': '< its forward passes',
    'registry': '< 1.15 times those of the paper',
    'noise': '< +200 %',
    'run': '< +1 %',
    'short': '< +3 %',
    'turns': '< 3 s',
    'import': '< 50 ms',
}
THREE, PAPER, ALL = (f'ours: {which}' for which in ('weight_mag, grad_mag, dead_units', 'those of the paper', 'all'))
# Metrics that are measured alone, too, and the rival that tells the same or the like.
SINGLE = {'weight_mag': None, 'grad_norm': 'Lightning grad_norm', 'dead_units': 'fastai ActivationStats',
          'update_ratio': None, 'step_alignment': None, 'noise_scale': None}
# How the numbers of a logged step come about.
STEPS = ('A tool watches every second of 106 steps, in a process of its own. What one costs is the median of its '
         'differences to the mean of the two steps beside it, over the median of those that are not watched; it '
         'differs by one or two percentage points from run to run. Memory that is freed is kept in all rows, since to '
         'give it back to the system and to get it again takes as long, by chance.')


def table(results):
    """
    Args:
        results (dict): of run.py

    Returns:
        str: Markdown
    """
    lines = ['| what | target | ours | others |', '|---|---|---|---|']

    def add(what, target, ours, others=''):
        lines.append(f'| {what} | {TARGETS[target]} | {ours} | {others} |')

    def failed(row):
        return 'error' in results.get(row, {'error': ''})

    if 'steps' in results:
        tools = results['steps']
        others = {name: own for name, own in tools.items() if not name.startswith('ours')}
        add('reads of a tensor by Python on a logged step with all metrics, ResNet-18', 'reads', _reads(tools[ALL]),
            ', '.join(f'{name} {_reads(own)}' for name, own in others.items()))
        add('CPU time of a logged step with weight_mag, grad_mag, dead_units, ResNet-18, batch of 8, 64 x 64', 'step',
            _more(tools[THREE]), ', '.join(f'{name} {_more(own)}' for name, own in others.items()))
        lines.append(f'| the same with the metrics of the paper | | {_more(tools[PAPER])} | |')
        for name, rival in SINGLE.items():
            if f'ours: {name}' in tools:
                beside = f'{rival} {_more(tools[rival])}' if rival in tools else ''
                lines.append(f'| the same with {name} alone | | {_more(tools[f"ours: {name}"])} | {beside} |')
        lines.append(f'| the same with all metrics | | {_more(tools[ALL])} | |')
    if not failed('quiet_step'):
        add('a step that is not logged: all hooks', 'quiet', f'{results["quiet_step"]["seconds"] * 1e6:.2f} µs')
    if not failed('one_read'):
        own = results['one_read']
        read, both = own['read of weights: torch.sum'], own['read of weights and gradients: torch.sum']
        others = ', '.join(f'{name} {own[name] / read:.2f}' for name in own if not name.startswith(('ours', 'read')))
        add('weight_mag of 100 million parameters, in reads of that memory', 'weight',
            f'{own["ours: weight_mag"] / read:.2f}', others)
        add('weight_mag, grad_mag and grad_norm together, in reads of weights and gradients', 'both',
            f'{own["ours: weight_mag, grad_mag, grad_norm"] / both:.2f}')
    for row, key, what in (('erank_resnet', 'erank', 'erank of all weights of ResNet-18'),
                           ('erank_wide', 'wide', 'erank of a 4096 x 11008 matrix')):
        if not failed(row):
            own = results[row]
            off = next(value for name, value in own.items() if name.startswith('difference'))
            add(what, key, f'{own["ours"]:.2f} CPU-s, off by {off:.0e}', ', '.join(
                f'{name} {value:.2f}' if isinstance(value, float) else f'{name}: {value}'
                for name, value in own.items() if not name.startswith(('ours', 'difference'))))
    if not failed('feature_erank'):
        own = results['feature_erank']['ResNet-18']
        look = own['look']
        add('feature_erank of ResNet-18, 17 sites of up to 512 units, 2000 images of 64 x 64', 'feature',
            f'{look:.2f} CPU-s, {look / own["forward"]:.0%} of them', f'forward {own["forward"]:.2f}')
        own = results['feature_erank']['three layers']
        add('feature_erank of three layers of 512 units, 2000 samples', 'feature', f'{own["ours"] * 1e3:.0f} ms',
            ', '.join(f'{name} {value * 1e3:.0f} ms' for name, value in own.items() if name != 'ours'))
    if not failed('registry'):
        own = results['registry']
        add(f'one measurement of ResNet-18 with all {own["metrics"]["all"]} metrics, 2000 images of 64 x 64',
            'registry',
            f'{own["all"]:.2f} CPU-s, {own["all"] / own["paper"]:.2f} times',
            f'the {own["metrics"]["paper"]} of the paper {own["paper"]:.2f}')
    if not failed('noise_scales'):
        own = results['noise_scales']
        texts = {name: _noise(x) for name, x in own.items() if name != 'all examples'}
        add('noise scale of an MLP on 20 batches of 64, and what a batch costs more', 'noise',
            f'{texts.pop("ours")}, of all examples {own["all examples"]["value"]:.0f}',
            ', '.join(f'{name} {text}' for name, text in texts.items()))
    for row, what in (
            ('default_run', 'default run of ResNet-18, 4 epochs of 50 000 images of 32 x 32, 10 000 of validation'),
            ('geowatch_run', "default run of geowatch's HeterogeneousModel, 5 epochs of 36 batches, 12 of validation"),
            ('short_run', 'default run of ResNet-18, 5 epochs of 400 images of 64 x 64, 80 of validation')):
        if not failed(row):
            own = results[row]
            add(what, 'short' if row == 'short_run' else 'run',
                f'{own["share"]:+.1%}, that is {own["spent in an epoch"]:.2f} CPU-s an epoch',
                f'{own["rest of an epoch"]:.0f} CPU-s an epoch without')
    if not failed('large_models'):
        own = results['large_models']
        shapes, small = own['seven_billion'], 'at a fourth of the width: '
        add(f'erank of {shapes["parameters"] / 1e9:.1f} billion parameters in {shapes["layers"]} matrices: planned '
            'for a measurement', 'turns', f'{shapes["planned for a measurement"]:.0f} s, at least one matrix; '
            f'{shapes["planned for all"]:.0f} s for all of them')
        add('the same matrices at a fourth of the width: one measurement', 'turns',
            f'{shapes[small + "CPU seconds of a measurement"]:.1f} CPU-s, '
            f'{shapes[small + "layers at a time"][-1]} matrices')
        add('feature_erank of efficientnet_b0, 512 images of 64 x 64: one measurement', 'turns',
            f'{own["efficientnet"]["CPU seconds of a measurement"]:.1f} CPU-s, '
            f'{own["efficientnet"]["layers at a time"][-1]} layers')
    if not failed('imports'):
        add('import beyond torch, Lightning and the host', 'import', f'{results["imports"]["ours"]:.0f} ms')
    for row, own in results.items():
        if isinstance(own, dict) and 'error' in own:
            lines.append(f'| {row} | | failed: {own["error"]} | |')
    said = {}
    for row, machine in results['machines'].items():
        said.setdefault(_text_of(machine), []).append(row)
    lines += ['', *([STEPS, ''] if 'steps' in results else [])]
    lines += [text if len(said) == 1 else f'{", ".join(rows)}: {text}' for text, rows in said.items()]
    return '\n'.join([*lines, ''])


def short(results):
    """ The tools that watch a step, side by side, of the same results: Markdown. """
    tools = results['steps']
    others = {name: own for name, own in tools.items() if not name.startswith('ours')}
    rows = (['', 'ours', *others], ['---'] * (2 + len(others)),
            ['tensors read by Python on a logged step', *map(_reads, (tools[PAPER], *others.values()))],
            ['CPU time of a logged step', *map(_more, (tools[THREE], *others.values()))])
    return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def replace(page, tables):
    """
    Put tables into a page, each between a comment with its name and one that says end.

    Args:
        page (str): Markdown
        tables (Dict[str, str]): by name

    Returns:
        str: the page
    """
    for name, text in tables.items():
        begin, end = f'<!-- {name} -->\n', '<!-- end -->'
        page = re.sub(f'{begin}.*?{end}', lambda _, own=f'{begin}\n{text}\n{end}': own, page, flags=re.DOTALL)
    return page


def _text_of(machine):
    versions = ', '.join(f'{name} {version}' for name, version in machine['versions'].items())
    missing = ''.join(f' {name} could not be installed: {why}.' for name, why in
                      machine['could not be installed'].items())
    return (f'{machine["processor"]}, {machine["cores"]} cores, {machine["threads"]} thread of torch, Python '
            f'{machine["python"]}; {versions}.{missing}')


def _reads(own):
    return own['error'] if 'error' in own else str(own['reads'])


def _noise(own):
    return own['error'] if 'error' in own else f'{own["value"]:.0f} ({own["more"]:+.0%})'


def _more(own):
    return own['error'] if 'error' in own else f'{own["more"] / own["without"]:+.0%}'


def draw(growth, fpath):
    """
    Cost against the number of parameters, on logarithmic axes.

    Args:
        growth (Dict[str, Dict[str, float]]): size to CPU seconds of each
        fpath (str | PathLike):
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.add_subplot()
    names = dict.fromkeys(name for own in growth.values() for name in own)
    for name in names:
        ours = name in {'weight_mag', 'grad_mag, grad_norm', 'erank'}
        points = [(int(size), own[name]) for size, own in growth.items() if name in own]
        axes.loglog(*zip(*points, strict=True), marker='o', label=f'ours: {name}' if ours else name,
                    linestyle='-' if ours else '--', linewidth=2 if ours else 1)
    axes.set(xlabel='parameters (four square layers)', ylabel='CPU seconds of one measurement')
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(fpath)
