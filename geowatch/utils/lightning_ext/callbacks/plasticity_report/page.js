// The grid and the controls of the page, after pictures.js.

// --- the grid --------------------------------------------------------------

let quantity = 0;

function drawGrid() {
  const grid = data.grid, chosen = grid.quantities[quantity], holder = document.querySelector('#grid .facets');
  holder.replaceChildren();
  grid.facets.forEach((facet, f) => {
    const table = add(holder, 'table', '', 'facet');
    table.style.minWidth = `${46 + 57 * grid.columns.length}px`;
    if (facet.label) add(table, 'caption', facet.label);
    const head = add(add(table, 'thead'), 'tr');
    add(head, 'th', (grid.y && grid.y + ' ↓ ') + grid.x + ' →');
    grid.columns.forEach(text => { add(head, 'th', text).scope = 'col'; });
    const body = add(table, 'tbody');
    grid.rows.forEach((text, row) => {
      const tr = add(body, 'tr');
      add(tr, 'th', text).scope = 'row';
      grid.columns.forEach((_, column) => {
        const td = add(tr, 'td'), k = facet.cells.findIndex(cell => cell.row === row && cell.column === column);
        if (k < 0) return;
        const cell = facet.cells[k], button = add(td, 'button', '', cell.best ? 'best' : '');
        const [value, place] = chosen ? chosen.cells[f][k] : [cell.word, null];
        const part = place !== null && chosen.better < 0 ? 1 - place : place;
        add(button, 'span', value);
        add(button, 'small', cell.word + (cell.runs.length > 1 ? ` ×${cell.runs.length}` : ''));
        if (part === null) button.classList.add('nothing');
        else {
          button.style.background = `color-mix(in oklab, var(--deep) ${(100 * part).toFixed(0)}%, var(--pale))`;
          button.style.color = part > .6 ? 'var(--on-deep)' : 'var(--ink)';
        }
        button.setAttribute('aria-pressed', picked.has(cell));
        button.title = cell.runs.map(i => data.runs[i].label).join('\n');
        button.addEventListener('click', event => pick(cell, event.shiftKey || event.ctrlKey || event.metaKey));
      });
    });
  });
  const scale = document.querySelector('#grid .scale');
  scale.textContent = '';
  if (chosen) {
    const ends = chosen.better < 0 ? [chosen.high, chosen.low] : [chosen.low, chosen.high];
    add(scale, 'span', ends[0]);
    add(scale, 'i', '', 'ramp');
    add(scale, 'span', ends[1] + (chosen.better ? ' (the better end). ' : '. ') + 'A click on a cell shows its runs alone, with Shift more of them.');
  }
}

// The runs of one cell, of several with a key held down, or again all.
function pick(cell, more) {
  const was = picked.has(cell) && (more || picked.size === 1);
  if (!more) picked.clear();
  if (was) picked.delete(cell); else picked.add(cell);
  const runs = new Set([...picked].flatMap(own => own.runs));
  show(data.runs.map((_, i) => !runs.size || runs.has(i)));
}

function show(which) {
  shown = which;
  document.querySelectorAll('#runs button[data-run]').forEach(button => button.setAttribute('aria-pressed', shown[button.dataset.run]));
  if (data.grid) document.querySelectorAll('.facet button').forEach((button, k) =>
    button.setAttribute('aria-pressed', picked.has(cells[k])));
  draw();
}

// --- the controls ----------------------------------------------------------

function choice(id, options, current, choose) {
  const holder = byId(id);
  holder.hidden = options.length < 2;
  options.forEach(([value, text]) => {
    const button = add(holder, 'button', text);
    button.setAttribute('aria-pressed', value === current);
    button.addEventListener('click', () => {
      [...holder.children].forEach(other => other.setAttribute('aria-pressed', other === button));
      choose(value);
    });
  });
}

function sort(head, column) {
  const down = head.getAttribute('aria-sort') === 'ascending', body = document.querySelector('.runs-table tbody');
  document.querySelectorAll('.runs-table thead th').forEach(th => th.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const key = row => row.children[column].dataset.v, number = text => text === '' ? NaN : Number(text);
  const compare = (a, b) => {
    const [m, n] = [number(a), number(b)];
    if (isNaN(m) && isNaN(n)) return (a === '') - (b === '') || (down ? -1 : 1) * a.localeCompare(b, undefined, {numeric: true});
    return isNaN(m) - isNaN(n) || (down ? n - m : m - n);  // what is missing stays last
  };
  body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
}

const cells = [];
if (data.grid) {
  data.grid.facets.forEach(facet => cells.push(...facet.cells));
  document.querySelector('.first').classList.add('with-grid');
  byId('grid').classList.add('drawn');
  choice('quantity', data.grid.quantities.map((own, k) => [k, own.title]), 0, value => { quantity = value; drawGrid(); });
  drawGrid();
}
const hero = data.under || data.charts[0];
if (hero) {
  const card = add(byId('hero'), 'div', '', 'card chart');
  add(card, 'h3', hero.title);
  add(card, 'p', about(hero));
  legend(card);
  chartCard(card, 'chart-hero', hero, {height: 220});
}

function swatch(parent, i, colour = `var(--run${i})`) {
  add(parent, 'i', '', 'swatch').style.borderTop = `3px ${data.runs[i].dash.replace('dashdot', 'double')} ${colour}`;
}

// What colours and dashes stand for.
function legend(card) {
  const grid = data.grid;
  if (!grid) return;
  for (const [title, values, key] of [[grid.x, grid.columns, 'column'], [grid.y, grid.rows, 'row']]) {
    if (!title) continue;
    const line = add(card, 'p', title + ' ', 'legend');
    values.forEach((text, k) => {
      const cell = cells.find(cell => cell[key] === k), item = cell && add(line, 'span');
      if (!cell) return;
      swatch(item, cell.runs[0], key === 'row' ? 'var(--quiet)' : undefined);
      if (key === 'column') item.firstChild.style.borderTopStyle = 'solid';
      add(item, 'span', text);
    });
  }
}

function about(chart) {
  return [chart.about, chart.log && 'logarithmic', chart.curves.some(curve => curve && curve.course) && 'bold: running mean']
    .filter(Boolean).join(', ');
}

data.charts.forEach(chart => {
  const card = add(byId('charts'), 'div', '', 'card chart');
  add(card, 'h3', chart.title);
  add(card, 'p', about(chart));
  chartCard(card, 'chart-' + chart.name, chart, {under: data.under});
});
if (data.runs.length > 1) {
  data.runs.forEach((run, i) => {
    const button = add(byId('runs'), 'button');
    swatch(button, i);
    add(button, 'span', run.label);
    button.title = 'Show or hide this run';
    button.dataset.run = i;
    button.addEventListener('click', () => { picked.clear(); show(shown.map((on, k) => k === i ? !on : on)); });
  });
  for (const [text, on] of [['all', true], ['none', false]])
    add(byId('runs'), 'button', text).addEventListener('click', () => { picked.clear(); show(shown.map(() => on)); });
  show(shown);
}
choice('axis', data.epochs ? [['step', 'by step'], ['epoch', 'by epoch']] : [], axis, value => { axis = value; zoom = null; draw(); });
choice('metric', data.charts.filter(chart => chart.layers).map(chart => [chart.name, chart.title]), metric,
       value => { metric = value; drawLayers(); });
document.querySelectorAll('.runs-table thead th').forEach((th, column) =>
  th.querySelector('button').addEventListener('click', () => sort(th, column)));
drawLayers();
let wide = innerWidth;
addEventListener('resize', () => { if (innerWidth !== wide) { wide = innerWidth; drawLayers(); draw(); } });
// On paper all is on the screen.
addEventListener('beforeprint', () => {
  pictures.forEach(picture => { picture.near = true; paint(picture); });
  document.querySelectorAll('details').forEach(details => { details.open = true; });
});
