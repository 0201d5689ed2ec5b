// The timeline of all pipeline ranks on a canvas, and one instruction large under it. Times are microseconds.
"use strict"
const step = JSON.parse(document.getElementById("data").textContent)
const canvas = document.getElementById("timeline"), inside = document.getElementById("inside")
const hint = document.getElementById("hint")
const LEFT = 58, TOP = 26, ROW = step.ranks.length > 24 ? 26 : 32, GAP = 4
const FONT = '11px Inter, "Helvetica Neue", Helvetica, Arial, sans-serif'
const NAMES = { F: "forward", B: "backward", I: "backward for inputs", W: "backward for weights" }
const DOES = { compute: "SMs:", experts: "network:", wait: "waits for" }
let view = { from: 0, to: step.end }, drag = null, painting = false
let chosen = { rank: step.ranks.length >> 1, at: 0 }
chosen.at = Math.max(0, step.ranks[chosen.rank].slots.findIndex(([name]) => name.startsWith("FB")))

// ------------------------------------------------------------ what is drawn
// The halves of an instruction, from its name: FB(0, 3, 1, 1) is F(0, 3) with B(1, 1).
const halves = name => {
  const [, kind, list] = name.match(/^([A-Z]+)\((.*)\)$/), numbers = list.split(",").map(Number)
  return [...kind].map((one, i) => ({ kind: one, stage: numbers[2 * i], mb: numbers[2 * i + 1] }))
}
// Micro-batches that enter at the same rank have one colour.
const entry = new Map()
step.ranks.forEach((rank, number) => rank.slots.forEach(([name]) => halves(name).forEach(half => {
  if (half.kind === "F" && half.stage === 0 && !entry.has(half.mb)) entry.set(half.mb, number)
})))
const first = Math.min(...entry.values())
const side = half => entry.get(half.mb) === first ? "0" : "1"
const token = half => half.kind === "W" ? "w" : (half.kind === "F" ? "f" : "b") + side(half)
const words = name => halves(name).map(h => `${NAMES[h.kind]} of stage ${h.stage}, micro-batch ${h.mb}`).join("\nwith ")
const time = (value, unit) => (value / (unit || 1e3)).toFixed(unit ? 3 : value < 1e4 ? 2 : 1) + (unit ? " s" : " ms")
const paint = name => name.startsWith("weights") ? "w" : name.endsWith(".B") ? "b" : "f"

let colours = {}
function look() {
  const style = getComputedStyle(document.documentElement)
  for (const key of ["ink", "faint", "line", "track", "card", "accent", "f0", "f1", "b0", "b1", "w", "x", "wait"])
    colours[key] = style.getPropertyValue("--" + key).trim()
}
function prepare(target, height) {
  const ratio = devicePixelRatio || 1, width = target.clientWidth
  target.style.height = height + "px"
  target.width = Math.round(width * ratio), target.height = Math.round(height * ratio)
  const pen = target.getContext("2d")
  pen.setTransform(ratio, 0, 0, ratio, 0, 0)
  pen.font = FONT, pen.textBaseline = "middle"
  return [pen, width]
}
function label(pen, text, x, y, room, colour) {
  if (room < 14 || pen.measureText(text).width > room - 4) return false
  pen.fillStyle = colour, pen.textAlign = "center", pen.fillText(text, x, y), pen.textAlign = "left"
  return true
}
const on = colour => ["b0", "b1", "wait"].includes(colour) ? "#fff" : "#14202c"
function box(pen, colour, x, y, width, height) {
  pen.fillStyle = colour, pen.fillRect(x, y, Math.max(width, .5), height)
}
// Ticks at round times, about 110 pixels apart.
function axis(pen, from, to, width, bottom) {
  const rough = (to - from) / Math.max(2, width / 110), ten = 10 ** Math.floor(Math.log10(rough))
  const pitch = [1, 2, 5, 10].map(n => n * ten).find(n => n >= rough)
  for (let at = Math.ceil(from / pitch) * pitch; at <= to; at += pitch) {
    const x = LEFT + (at - from) / (to - from) * width
    box(pen, colours.line, x, TOP - 6, 1, bottom - TOP + 6)
    if (x > LEFT + width - 22) continue
    pen.fillStyle = colours.faint, pen.textAlign = "center"
    pen.fillText(pitch >= 1e5 ? (at / 1e6).toFixed(1) + " s" : (at / 1e3).toFixed(pitch < 1e3 ? 1 : 0) + " ms", x, 10)
    pen.textAlign = "left"
  }
}
// The lanes of a race between x and x + width: SMs above, network below. Returns what lies where, for pointing at it.
function lanes(pen, slot, x, y, width, height, named) {
  const race = step.races[slot[3]], scale = width / (race.seconds * 1e6), half = (height - 1) / 2
  const both = halves(slot[0])
  const forward = both.find(h => h.kind === "F"), backward = both.find(h => h.kind !== "F")
  for (const [lane, name, layer, begin, end] of race.spans) {
    const left = x + begin * scale, room = (end - begin) * scale
    if (left > x + width || left + room < LEFT || room < .1) continue
    const kind = paint(name), of = kind === "f" ? forward || backward : backward || forward
    const colour = lane === "wait" ? "wait" : lane === "experts" ? "x" : kind === "w" ? "w" : token(of)
    box(pen, colours[colour], left, lane === "experts" ? y + half + 1 : y, room - (room > 3 ? .6 : 0), half)
    const middle = y + (lane === "experts" ? 1.5 : .5) * half + 1
    if (named) for (const text of layer >= 0 ? [`${name} ${layer}`, name, name.slice(0, 3)] : [name, name.slice(0, 4)])
      if (label(pen, text, left + room / 2, middle, room, on(colour))) break
  }
}
function draw() {
  painting = false
  const bottom = TOP + step.ranks.length * (ROW + GAP)
  const [pen, whole] = prepare(canvas, bottom + 2), width = whole - LEFT
  const scale = width / (view.to - view.from), at = value => LEFT + (value - view.from) * scale
  pen.clearRect(0, 0, whole, bottom + 2)
  axis(pen, view.from, view.to, width, bottom)
  step.ranks.forEach((rank, number) => {
    const y = TOP + number * (ROW + GAP)
    pen.fillStyle = colours.faint, pen.fillText("rank " + number, 0, y + ROW / 2)
    pen.save(), pen.beginPath(), pen.rect(LEFT, y - 2, width, ROW + 4), pen.clip()
    box(pen, colours.track, at(0), y, step.end * scale, ROW)
    rank.slots.forEach((slot, position) => {
      const [name, begin, end, race] = slot
      if (end < view.from || begin > view.to) return
      const x = at(begin), room = (end - begin) * scale, both = halves(name)
      const left = Math.max(x, LEFT), right = Math.min(x + room, whole)
      if (room > 260) { // the lanes under the name
        const part = room / both.length
        both.forEach((h, i) => {
          const left = Math.max(x + i * part, LEFT), right = Math.min(x + (i + 1) * part, whole)
          box(pen, colours[token(h)], x + i * part, y, part - 1, 11)
          label(pen, `${h.kind} stage ${h.stage}, ${h.mb}`, (left + right) / 2, y + 6, right - left, on(token(h)))
        })
        lanes(pen, slot, x, y + 12, room - 1, ROW - 12, false)
      } else {
        const height = ROW / both.length, gap = room > 4 ? 1 : 0
        both.forEach((h, i) => {
          box(pen, colours[token(h)], x, y + i * height, room - gap, height)
          label(pen, h.kind + h.mb, (left + right) / 2, y + (i + .5) * height, right - left, on(token(h)))
        })
        const still = step.races[race].exposed / step.races[race].seconds
        if (room > 30) box(pen, colours.wait, x, y + ROW - 3, room * still, 3)
      }
      if (number === chosen.rank && position === chosen.at) {
        pen.strokeStyle = colours.ink, pen.lineWidth = 2, pen.strokeRect(x, y - 1, Math.max(room, 3), ROW + 2)
      }
    })
    pen.restore()
  })
}
function detail() {
  const slot = step.ranks[chosen.rank].slots[chosen.at]
  const [pen, whole] = prepare(inside, 128), race = step.races[slot[3]], width = whole - LEFT
  pen.clearRect(0, 0, whole, 128)
  axis(pen, 0, race.seconds * 1e6, width, 104)
  pen.fillStyle = colours.faint, pen.fillText("SMs", 0, TOP + 19), pen.fillText("network", 0, TOP + 59)
  lanes(pen, slot, LEFT, TOP, width, 79, true)
  pen.fillStyle = colours.ink
  const said = `rank ${chosen.rank}: ${words(slot[0]).replace("\n", " ")}, from ${time(slot[1], 1e6)}`
  pen.fillText(`${said}, ${time(race.seconds * 1e6)}, ${time(race.exposed * 1e6)} of it exposed`, LEFT, 119)
}
// What each rank holds over the step: an area under what a GPU has, with a dot at the peak.
function held() {
  const bottom = TOP + step.ranks.length * (ROW + GAP)
  const [pen, whole] = prepare(document.getElementById("held"), bottom + 2), width = whole - LEFT
  const scale = width / step.end, most = Math.max(step.memory, ...step.ranks.flatMap(r => r.held.map(([top]) => top)))
  pen.clearRect(0, 0, whole, bottom + 2)
  axis(pen, 0, step.end, width, bottom)
  step.ranks.forEach((rank, number) => {
    const y = TOP + number * (ROW + GAP), at = time => LEFT + time * scale, level = size => y + ROW * (1 - size / most)
    const peak = rank.held.reduce((best, [top], i) => top > rank.held[best][0] ? i : best, 0)
    const middle = ([, begin, end]) => at((begin + end) / 2)
    pen.fillStyle = colours.faint, pen.fillText("rank " + number, 0, y + ROW / 2)
    box(pen, colours.track, LEFT, y, width, ROW)
    pen.beginPath(), pen.moveTo(LEFT, y + ROW), pen.lineTo(LEFT, level(rank.held[rank.held.length - 1][1]))
    rank.slots.forEach((slot, i) => {
      if (i) pen.lineTo(at(slot[1]), level(rank.held[i - 1][1]))
      pen.lineTo(middle(slot), level(rank.held[i][0])), pen.lineTo(at(slot[2]), level(rank.held[i][1]))
    })
    pen.lineTo(at(rank.slots[rank.slots.length - 1][2]), y + ROW)
    pen.fillStyle = colours.f1, pen.fill()
    box(pen, colours.wait, LEFT, level(step.memory), width, 1)
    pen.beginPath(), pen.arc(middle(rank.slots[peak]), level(rank.held[peak][0]), 3.5, 0, 7)
    pen.fillStyle = colours.ink, pen.fill()
  })
}
const refresh = () => { if (!painting) painting = true, requestAnimationFrame(draw) }

// ------------------------------------------------------------ moving
function show(from, to) {
  const length = Math.min(Math.max(to - from, 2e3), step.end)
  const begin = Math.min(Math.max(from, 0), step.end - length)
  view = { from: begin, to: begin + length }
  hint.hidden = true
  refresh()
}
function zoom(factor, centre) {
  const length = Math.min(Math.max((view.to - view.from) * factor, 2e3), step.end)
  const share = (centre - view.from) / (view.to - view.from)
  show(centre - share * length, centre + (1 - share) * length)
}
const moment = x => view.from + (x - LEFT) / (canvas.clientWidth - LEFT) * (view.to - view.from)
function under(event) {
  const rank = Math.floor((event.offsetY - TOP) / (ROW + GAP)), at = moment(event.offsetX)
  if (event.offsetX < LEFT || !step.ranks[rank]) return null
  return { rank, at: step.ranks[rank].slots.findIndex(([, begin, end]) => begin <= at && at < end), moment: at }
}
canvas.addEventListener("wheel", event => {
  event.preventDefault()
  const sideways = Math.abs(event.deltaX) > Math.abs(event.deltaY)
  const move = event.deltaX / canvas.clientWidth * (view.to - view.from)
  sideways ? show(view.from + move, view.to + move) : zoom(Math.exp(event.deltaY * .0015), moment(event.offsetX))
}, { passive: false })
canvas.addEventListener("pointerdown", event => {
  drag = { x: event.offsetX, view, moved: false }
  canvas.setPointerCapture(event.pointerId)
})
canvas.addEventListener("pointermove", event => {
  if (drag) {
    const move = (drag.x - event.offsetX) / (canvas.clientWidth - LEFT) * (drag.view.to - drag.view.from)
    drag.moved ||= Math.abs(drag.x - event.offsetX) > 3
    if (drag.moved) show(drag.view.from + move, drag.view.to + move)
    return
  }
  const found = under(event)
  hint.hidden = !found || found.at < 0
  if (hint.hidden) return
  const [name, begin, end, race] = step.ranks[found.rank].slots[found.at]
  const { exposed, seconds, spans } = step.races[race], passed = (found.moment - begin) / (end - begin) * seconds * 1e6
  const now = spans.filter(([, , , from, to]) => from <= passed && passed < to)
  hint.textContent = [
    `${name} on rank ${found.rank}`, words(name), `${time(begin, 1e6)} to ${time(end, 1e6)}: ${time(end - begin)}`,
    `${time(exposed * 1e6)} exposed`,
    ...now.map(([lane, part, layer, from, to]) =>
      `${DOES[lane]} ${part}${layer >= 0 ? `, layer ${layer}` : ""} ${time(to - from)}`),
  ].join("\n")
  const left = Math.min(event.offsetX + 14, canvas.clientWidth - hint.offsetWidth)
  hint.style.left = left + "px"
  const above = found.rank > step.ranks.length / 2
  hint.style.top = event.offsetY + (above ? -hint.offsetHeight - 10 : 16) + "px"
})
canvas.addEventListener("pointerup", event => {
  const found = !drag?.moved && under(event)
  drag = null
  if (found && found.at >= 0) chosen = found, refresh(), detail()
})
canvas.addEventListener("pointerleave", () => { hint.hidden = true })
canvas.addEventListener("dblclick", event => zoom(.25, moment(event.offsetX)))
canvas.addEventListener("keydown", event => {
  const length = view.to - view.from, middle = (view.from + view.to) / 2
  const keys = {
    ArrowLeft: () => show(view.from - length / 5, view.to - length / 5),
    ArrowRight: () => show(view.from + length / 5, view.to + length / 5),
    "+": () => zoom(.6, middle), "=": () => zoom(.6, middle), ArrowUp: () => zoom(.6, middle),
    "-": () => zoom(1 / .6, middle), ArrowDown: () => zoom(1 / .6, middle),
    0: () => show(0, step.end), Home: () => show(0, step.end),
  }
  if (keys[event.key] && !event.ctrlKey && !event.metaKey) event.preventDefault(), keys[event.key]()
})
const all = () => { look(), draw(), detail(), held() }
addEventListener("resize", all)
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all)
all()
document.documentElement.dataset.drawn = step.ranks.length // whoever drives a browser may wait for it
