// The λ page, in the reader's browser: π* ∝ q·exp(r/λ) for the table in the text area, recomputed at every change.
// klrl_edu/site/lambda_page.py wires it to the widgets; tests/site holds every number against Python's.

const SUM_TOLERANCE = 1e-9; // as in Python
const SHOWN = 25; // bars

function parseNumber(text) {
  const plain = text.trim().replace("−", "-");
  if (/^[+-]?inf(inity)?$/i.test(plain)) return plain.startsWith("-") ? -Infinity : Infinity;
  return /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(plain) ? Number(plain) : NaN;
}

// "sentence, prob, reward" lines -> {rows} or {error}; a sentence may hold commas, for the last two separate the numbers
function parseTable(text, normalise) {
  const rows = [];
  const seen = new Map();
  for (const [index, line] of text.split(/\r?\n/).entries()) {
    const place = `Line ${index + 1}`;
    const cells = line.split(",");
    if (!line.trim() || /^\s*sentence\s*,\s*prob\s*,\s*reward\s*$/i.test(line)) continue;
    if (cells.length < 3) return { error: `${place}: “${line.trim()}” is not “sentence, prob, reward”: write two commas.` };
    const [prob, reward] = cells.slice(-2).map(parseNumber);
    const quoted = cells.slice(0, -2).join(",").trim().replace(/^"(.*)"$/, "$1");
    const sentence = quoted.normalize("NFC").split(/\s+/).filter(Boolean).join(" ");
    if (!(prob >= 0 && prob < Infinity)) return { error: `${place}: prob “${cells.at(-2).trim()}” must be a number that is not negative.` };
    if (prob > 0 && !(reward < Infinity)) return { error: `${place}: reward “${cells.at(-1).trim()}” must be a number, or -inf to forbid the sentence.` };
    if (seen.has(sentence)) return { error: `${place}: “${sentence}” already stands in line ${seen.get(sentence)}: remove one.` };
    seen.set(sentence, index + 1);
    rows.push({ sentence, prob, reward });
  }
  if (!rows.length) return { error: "The table is empty: write one “sentence, prob, reward” a line." };
  const top = Math.max(...rows.map((row) => row.prob)); // taken out first: huge or tiny weights neither overflow nor vanish
  if (top === 0) return { error: "The probabilities are all 0: at least one sentence needs mass." };
  const share = rows.reduce((sum, row) => sum + row.prob / top, 0);
  const total = top * share;
  if (!normalise && Math.abs(total - 1) > SUM_TOLERANCE)
    return { error: `The probabilities sum to ${total.toPrecision(10)}, not to 1: change them, or tick “divide by their sum”.` };
  if (rows.every((row) => row.prob === 0 || row.reward === -Infinity))
    return { error: "Every sentence with mass has reward -inf, so Z = 0 and there is no posterior: give one a finite reward." };
  return { rows: rows.map((row) => ({ ...row, prob: row.prob / top / share })) };
}

// π*, log Z, λ log Z, E[r] under π* and KL(π*‖q); the largest reward is taken out first, so nothing overflows
function tilt(rows, lambda) {
  const top = Math.max(...rows.filter((row) => row.prob > 0).map((row) => row.reward));
  const exponent = rows.map((row) => (row.prob > 0 ? (row.reward - top) / lambda : -Infinity));
  const weight = rows.map((row, i) => row.prob * Math.exp(exponent[i]));
  const logMass = Math.log(weight.reduce((a, b) => a + b, 0));
  const posterior = rows.map((row, i) => row.prob * Math.exp(exponent[i] - logMass));
  let kl = 0;
  let reward = 0;
  for (const [i, p] of posterior.entries()) {
    kl += divergenceTerm(p, rows[i].prob, logMass - exponent[i]);
    if (p > 0) reward += p * rows[i].reward;
  }
  return { posterior, logEvidence: top / lambda + logMass, value: top + lambda * logMass, expectedReward: reward, kl };
}

// p log(p/q) + q − p with d = log q/p: the terms sum to KL(p‖q), and none is negative, so a KL near 0 keeps its digits
function divergenceTerm(p, q, d) {
  if (p === 0) return q;
  if (Math.abs(d) < 1e-2) return p * d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d / 720))));
  return Math.abs(d) < 1 ? p * (Math.expm1(d) - d) : q - p - p * d;
}

function digits(x) {
  return Number.isFinite(x) ? x.toPrecision(12).replace("-", "−") : x > 0 ? "∞" : "−∞";
}

// at most twelve digits, without zeros that say nothing: 0.4, 2, −∞
function short(x) {
  return Number.isFinite(x) ? String(Number(x.toPrecision(12))).replace("-", "−") : digits(x);
}

function escapeText(text) {
  return text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
}

function show(result) {
  document.body.dataset.klrl = JSON.stringify(result, (_, x) => (typeof x === "number" && !Number.isFinite(x) ? String(x) : x));
}

// whichever of the two λ controls was moved sets the other; a typed λ beyond the slider's ends leaves it at the end
const stop = Math.max(-1, Math.min(1, Math.log(typed.value) / Math.log(20)));
if (cb_obj === typed && typed.value > 0) slider.value = stop;
if (cb_obj === slider && !(Math.abs(slider.value - stop) < 1e-12)) typed.value = 20 ** slider.value;

const lambda = typed.value;
const parsed = lambda > 0 && lambda < Infinity ? parseTable(table.value, normalise.active.length > 0) : { error: "λ must be a positive number." };
if (parsed.error) {
  message.text = `<p role="alert" class="error">${escapeText(parsed.error)}</p>`;
  numbers.text = "";
  listing.text = "";
  source.data = { sentence: [], q: [], posterior: [], reward: [] };
  bars.y_range.factors = [];
  show({ error: parsed.error });
} else {
  const rows = parsed.rows;
  const result = tilt(rows, lambda);
  const order = rows.map((_, i) => i);
  if (rows.length > SHOWN) order.sort((i, j) => rows[j].prob + result.posterior[j] - rows[i].prob - result.posterior[i]);
  const drawn = order.slice(0, SHOWN);
  const label = (i) => (rows[i].sentence.length > 24 ? `${i + 1}. ${rows[i].sentence.slice(0, 20)}…` : rows[i].sentence || "(empty)");
  bars.y_range.factors = drawn.map(label).reverse();
  bars.height = 90 + 40 * drawn.length;
  source.data = {
    sentence: drawn.map(label),
    q: drawn.map((i) => rows[i].prob),
    posterior: drawn.map((i) => result.posterior[i]),
    reward: drawn.map((i) => short(rows[i].reward)),
  };
  message.text = rows.length > SHOWN ? `<p>The bars show the ${SHOWN} sentences with most mass, of ${rows.length}.</p>` : "";
  const line = (name, value, unit) => `<tr><th scope="row">${name}</th><td>${digits(value)}</td><td class="unit">${unit}</td></tr>`;
  numbers.text = `<table>${line("E<sub>π*</sub>[r]", result.expectedReward, "reward")}${line("KL(π*‖q)", result.kl, "nats")}${line(
    "log Z", result.logEvidence, "nats")}${line("λ log Z", result.value, "reward")}</table>`;
  const cells = (i) => `<td>${short(rows[i].prob)}</td><td>${short(rows[i].reward)}</td><td>${digits(result.posterior[i])}</td>`;
  const body = rows.map((row, i) => `<tr><th scope="row">${escapeText(row.sentence) || "(empty)"}</th>${cells(i)}</tr>`).join("");
  listing.text = `<table><tr><th>sentence</th><th>q</th><th>r</th><th>π*</th></tr>${body}</table>`;
  show({ lambda, sentences: rows.map((row) => row.sentence), prior: rows.map((row) => row.prob), rewards: rows.map((row) => row.reward), ...result });
}
