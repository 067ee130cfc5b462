'use strict';
// What is shown, in a few variables; `draw` marks every picture as old, and those on the screen are drawn anew.
const data = JSON.parse(document.getElementById('data').textContent);
const small = matchMedia('(max-width: 760px)').matches;
const byId = id => document.getElementById(id);
const tip = byId('tip');
let shown = data.runs.map(() => true), picked = new Set(), axis = data.epochs ? data.x : 'step', zoom = null;
let metric = (data.charts.find(chart => chart.name === 'dead_units' && chart.layers)
              || data.charts.find(chart => chart.layers) || {}).name;
const DASHES = {solid: '', dashed: '7 4', dotted: '2 3', dashdot: '8 3 2 3'};

function add(parent, tag, text, className) {
  const element = parent.appendChild(document.createElement(tag));
  if (text) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function shape(parent, tag, attributes, text) {
  const element = parent.appendChild(document.createElementNS('http://www.w3.org/2000/svg', tag));
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  return element;
}

// --- numbers ---------------------------------------------------------------

const short = (value, digits = 4) => Math.abs(value) >= 1e6 || (value && Math.abs(value) < 1e-4)
  ? value.toExponential(digits - 2).replace(/\.?0+e/, 'e') : String(Number(value.toPrecision(digits)));
const written = (value, percent) => percent ? short(100 * value) + ' %' : short(value);
const inAxis = (run, step) => axis === 'step' ? step : (step + 1) / run.each;

function place(run, step) {
  if (step < 0) return 'before the first step';
  const whole = Math.round(step);
  return `step ${whole}` + (run.each ? ` of epoch ${Math.floor(whole / run.each + 1e-6)}` : '');
}

function ticks(low, high, count, log) {
  if (log) {
    const decades = Math.log10(high / low), all = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const digit of decades > 3 ? [1] : [1, 2, 5]) all.push(digit * 10 ** power);
    const inside = all.filter(value => value >= low && value <= high);
    return inside.filter((_, k) => k % Math.ceil(inside.length / (count + 1)) === 0);
  }
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find(digit => digit * power >= rough) * power, found = [];
  for (let k = Math.ceil(low / step); k * step <= high * (1 + 1e-12); k++) found.push(k * step);
  return found;
}

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) if (value !== null) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  // No further than quotients and differences can be computed; what lies beyond is drawn at the edge.
  const inside = value => value && Math.sign(value) * Math.max(1e-140, Math.min(1e140, Math.abs(value)));
  return low > high ? [low, high] : [inside(low), inside(high)];
}

// --- curves ----------------------------------------------------------------

let clips = 0;
const reach = specs => {
  const xs = specs.flatMap(spec => spec.curves.flatMap((curve, i) => curve && shown[i]
    ? [data.steps[curve.s][0], data.steps[curve.s].at(-1)].map(step => inAxis(data.runs[i], step)) : []));
  return zoom || extent(xs);
};

// One pair of axes with its curves, at `top` of an SVG, `height` high; gives the points that can be pointed at.
function plot(svg, width, top, height, spec, range, title, limits) {
  const [left, right] = [54, 18], [x0, x1] = range;
  const x = value => left + (width - left - right) * (x1 > x0 ? (value - x0) / (x1 - x0) : .5);
  const lines = spec.curves.map((curve, i) => curve && shown[i] && {
    i, curve, xs: data.steps[curve.s].map(step => inAxis(data.runs[i], step))}).filter(Boolean);
  const seen = lines.flatMap(line => (line.curve.course || line.curve.y).filter(
    (_, k) => line.xs[k] >= x0 && line.xs[k] <= x1));
  let [low, high] = limits || extent(seen);
  if (!(low <= high)) {
    shape(svg, 'text', {x: width / 2, y: top + height / 2, 'text-anchor': 'middle'}, 'nothing to show');
    return [];
  }
  const log = spec.log && low > 0;
  if (spec.percent) { low = 0; high = Math.max(high, .01); }
  const pad = log ? (high / low || 1) ** .04 : (high - low) * .05 || Math.abs(high) * .05 || .5;
  if (!spec.percent) low = log ? low / Math.max(pad, 1.02) : low - pad;
  high = log ? high * Math.max(pad, 1.02) : high + (spec.percent ? high * .04 : pad);
  const part = log ? value => Math.log(value / low) / Math.log(high / low) : value => (value - low) / (high - low);
  const y = value => Math.max(top - 20, Math.min(top + height + 20, top + height * (1 - part(value))));
  ticks(low, high, Math.max(2, height / 40), log).forEach(value => {
    shape(svg, 'line', {class: 'tick', x1: left, x2: width - right, y1: y(value), y2: y(value)});
    shape(svg, 'text', {x: left - 6, y: y(value) + 4, 'text-anchor': 'end'}, written(value, spec.percent));
  });
  ticks(x0, x1, Math.max(3, width / 90)).forEach(value => {
    shape(svg, 'line', {class: 'tick', x1: x(value), x2: x(value), y1: top, y2: top + height});
    if (title !== null) shape(svg, 'text', {x: x(value), y: top + height + 16, 'text-anchor': 'middle'}, short(value));
  });
  if (title) shape(svg, 'text', {x: (left + width - right) / 2, y: top + height + 34, 'text-anchor': 'middle'},
                   axis === 'step' ? 'training step' : 'epochs gone by');
  const clip = `clip-${clips++}`;
  shape(shape(svg, 'clipPath', {id: clip}), 'rect', {x: left - 3, y: top - 3, width: width - left - right + 6, height: height + 6});
  const group = shape(svg, 'g', {'clip-path': `url(#${clip})`}), points = [];
  const fits = value => value !== null && (!log || value > 0);
  for (const {i, curve, xs} of lines) {
    const stroke = `stroke:var(--run${i})`;
    const path = ys => ys.map((value, k) => fits(value)
      ? `${k && fits(ys[k - 1]) ? 'L' : 'M'}${x(xs[k]).toFixed(1)} ${y(value).toFixed(1)}` : '').join('');
    if (curve.course) shape(group, 'path', {class: 'noise', d: path(curve.y), style: stroke});
    const ys = curve.course || curve.y;
    shape(group, 'path', {class: 'run', 'data-run': i, d: path(ys), style: stroke, 'stroke-dasharray': DASHES[data.runs[i].dash]});
    const alone = ys.length <= 12 || ys.some(value => !fits(value));
    curve.y.forEach((value, k) => {
      if (!fits(value) || xs[k] < x0 || xs[k] > x1) return;
      points.push({i, x: x(xs[k]), y: y(value), value, step: data.steps[curve.s][k], spec});
      if (alone) shape(group, 'circle', {cx: x(xs[k]), cy: y(value), r: 2.5, style: `fill:var(--run${i})`});
    });
  }
  return points;
}

// A card that draws itself when it comes onto the screen, tells what is pointed at, and zooms all pictures.
const pictures = [], watch = new IntersectionObserver(entries => entries.forEach(entry => {
  const own = pictures.find(picture => picture.holder === entry.target);
  if (own) { own.near = entry.isIntersecting; paint(own); }
}), {rootMargin: '150px'});

function paint(picture) {
  if (picture.near && picture.old) { picture.old = false; picture.paint(picture); }
}

function draw(own = pictures) {
  own.forEach(picture => { picture.old = true; paint(picture); });
}

function chartCard(parent, id, spec, {height = 190, under = null, limits, title = true} = {}) {
  const holder = add(parent, 'div');
  holder.id = id;
  const total = height + (under ? 120 : 0) + (title ? 52 : 34);
  holder.style.minHeight = total + 'px';
  const picture = {holder, old: true, near: false, points: [], spec, paint() {
    holder.replaceChildren();
    const width = Math.max(200, holder.clientWidth), range = reach(under ? [spec, under] : [spec]);
    const svg = shape(holder, 'svg', {viewBox: `0 0 ${width} ${total}`, id: 'svg-' + id, role: 'img', 'aria-label': spec.title});
    picture.points = plot(svg, width, 10, height, spec, range, under ? null : title, limits && limits());
    if (under) {
      shape(svg, 'text', {class: 'head', x: 54, y: height + 34}, under.title);
      picture.points.push(...plot(svg, width, height + 44, 78, under, range, title));
    }
    picture.mark = shape(svg, 'circle', {class: 'mark', r: 4.5, visibility: 'hidden'});
    picture.range = range;
    listen(svg, picture, width);
  }};
  pictures.push(picture);
  watch.observe(holder);
  return picture;
}

function listen(svg, picture, width) {
  const at = event => event.clientX - svg.getBoundingClientRect().left, span = width - 72;
  const value = px => picture.range[0] + (Math.max(54, Math.min(54 + span, px)) - 54) / span * (picture.range[1] - picture.range[0]);
  let start = null, band = null;
  svg.addEventListener('pointermove', event => {
    if (start !== null) {
      band ||= shape(svg, 'rect', {class: 'drag', y: 10, height: picture.holder.clientHeight - 60});
      band.setAttribute('x', Math.min(start, at(event)));
      band.setAttribute('width', Math.abs(at(event) - start));
    }
    const y = event.clientY - svg.getBoundingClientRect().top;
    const far = point => (point.x - at(event)) ** 2 + (point.y - y) ** 2;
    const near = picture.points.reduce((best, point) => !best || far(point) < far(best) ? point : best, null);
    const close = near && far(near) < 40 ** 2;
    picture.mark.setAttribute('visibility', close ? 'visible' : 'hidden');
    if (!close) { tip.hidden = true; return; }
    for (const [name, place] of [['cx', near.x], ['cy', near.y]]) picture.mark.setAttribute(name, place);
    picture.mark.style.fill = `var(--run${near.i})`;
    tell(event, `${data.runs[near.i].label}\n${near.spec.title}: ${written(near.value, near.spec.percent)}\n`
         + place(data.runs[near.i], near.step));
  });
  svg.addEventListener('pointerleave', () => { tip.hidden = true; picture.mark.setAttribute('visibility', 'hidden'); });
  if (small) return;
  svg.addEventListener('pointerdown', event => { start = at(event); svg.setPointerCapture(event.pointerId); });
  svg.addEventListener('pointerup', event => {
    if (start === null) return;
    const ends = [value(start), value(at(event))].sort((a, b) => a - b), wide = Math.abs(at(event) - start) > 8;
    start = null;
    if (wide && ends.every(isFinite)) { zoom = ends; draw(); }
  });
  svg.addEventListener('dblclick', () => { zoom = null; draw(); });
}

function tell(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  tip.style.left = Math.max(4, Math.min(innerWidth - tip.offsetWidth - 8, event.clientX + 14)) + 'px';
  tip.style.top = (event.clientY + 18 + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 10 : event.clientY + 18) + 'px';
}

// --- layers ----------------------------------------------------------------

function drawLayers() {
  const holder = byId('layers'), chart = data.charts.find(chart => chart.name === metric), own = chart && chart.layers;
  for (let k = pictures.length - 1; k >= 0; k--)
    if (holder.contains(pictures[k].holder)) watch.unobserve(pictures.splice(k, 1)[0].holder);
  holder.replaceChildren();
  byId('by-layer').hidden = !own;
  if (!own) return;
  if (own.rows) { drawMap(holder, chart, own); return; }
  holder.className = 'charts many';
  byId('scale').textContent = own.names.length
    ? `The ${own.names.length} of ${own.total} layers in which the runs end most unlike each other, the input first, on one scale.`
    : `All ${own.total} layers end alike in all runs.`;
  const limits = () => extent(own.curves.flatMap(curves => curves.flatMap((curve, i) => curve && shown[i] ? curve.y : [])));
  own.names.forEach((name, k) => {
    const card = add(holder, 'div', '', 'card chart layer');
    add(card, 'h3', name).title = own.full[k];
    chartCard(card, `layer-${k}`, {title: own.full[k], percent: chart.percent, log: own.log, curves: own.curves[k]},
              {height: 120, limits, title: false});
  });
}

const SCALES = {  // PuOr and YlOrBr, which people with colour blindness can read
  change: ['#542788', '#998ec3', '#d8daeb', '#f7f7f7', '#fee0b6', '#f1a340', '#b35806'],
  value: ['#ffffe5', '#fee391', '#fe9929', '#cc4c02', '#662506']};

function colour(scale, part) {
  const at = Math.max(0, Math.min(1, part)) * (scale.length - 1), k = Math.min(Math.floor(at), scale.length - 2);
  return [1, 3, 5].map(i => {
    const [a, b] = [scale[k], scale[k + 1]].map(text => parseInt(text.slice(i, i + 2), 16));
    return a + (at - k) * (b - a);
  });
}

function drawMap(holder, chart, own) {
  holder.className = 'charts';
  byId('scale').textContent = 'Layers in the order of the network, the input at the top. Colour: ' + (own.change
    ? 'each layer against its own first value; purple has shrunk, orange has grown.' : 'the value itself.');
  const card = add(holder, 'div', '', 'card chart wide'), div = add(card, 'div', '', 'map');
  const firsts = own.rows.map(row => row.find(value => value > 0));
  const seen = own.rows.map((row, k) => row.map(value => value === null ? null : !own.change ? value
    : value > 0 ? Math.max(-4, Math.min(4, Math.log2(value / firsts[k]))) : -4));
  const limit = own.change ? Math.max(.32, ...seen.flat().map(Math.abs)) : chart.percent ? 1 : Math.max(...seen.flat());
  const width = div.clientWidth, high = Math.max(8, Math.min(26, 700 / own.names.length)), height = high * own.names.length;
  const left = Math.min(width * .35, 10 + 6.6 * Math.max(...own.names.map(name => name.length)));
  const svg = shape(div, 'svg', {viewBox: `0 0 ${width} ${height + 40}`});
  const every = Math.ceil(14 / high), canvas = add(div, 'canvas');
  own.names.forEach((name, k) => k % every || shape(svg, 'text', {x: left - 6, y: high * (k + .5) + 4, 'text-anchor': 'end'}, name));
  const run = data.runs[0], count = own.steps.length;
  [0, count - 1].forEach(k => shape(svg, 'text', {x: k ? width - 4 : left, y: height + 16, 'text-anchor': k ? 'end' : 'start'},
                                    place(run, own.steps[k])));
  Object.assign(canvas, {width: count, height: own.names.length});
  canvas.style.cssText = `left:${left}px;top:0;width:${width - left - 4}px;height:${height}px`;
  const image = new ImageData(count, own.names.length);
  seen.flat().forEach((value, k) => value !== null && image.data.set([...colour(
    own.change ? SCALES.change : SCALES.value, own.change ? .5 + value / limit / 2 : value / (limit || 1)), 255], 4 * k));
  canvas.getContext('2d').putImageData(image, 0, 0);
  canvas.addEventListener('pointermove', event => {
    const box = canvas.getBoundingClientRect();
    const column = Math.min(count - 1, Math.floor((event.clientX - box.left) / box.width * count));
    const row = Math.min(own.names.length - 1, Math.floor((event.clientY - box.top) / box.height * own.names.length));
    const value = own.rows[row][column];
    tell(event, `${own.full[row]}\n${value === null ? 'n/a' : written(value, chart.percent)}`
         + (own.change && value > 0 ? ` (×${short(value / firsts[row], 3)})` : '') + `\n${place(run, own.steps[column])}`);
  });
  canvas.addEventListener('pointerleave', () => { tip.hidden = true; });
}
