// bzip2, unpacked: prose takes a quarter less in it than in what a browser unpacks by itself. The steps are those of
// its format, backwards: Huffman codes, runs of zeros, move to front, Burrows-Wheeler, runs of four.
const BLOCK_MARK = 0x314159, GROUP = 50, LOOK = 10;

class Bits {
  constructor(bytes) {
    [this.bytes, this.at, this.held, this.count] = [bytes, 0, 0, 0];
  }

  need(wanted) {
    while (this.count < wanted) {
      this.held = (this.held << 8) | this.bytes[this.at++];
      this.count += 8;
    }
  }

  take(wanted) {
    this.need(wanted);
    this.count -= wanted;
    const value = this.held >>> this.count;
    this.held &= (1 << this.count) - 1;
    return value;
  }
}

function bunzip2(bytes) {
  const bits = new Bits(bytes), parts = [];
  bits.take(16); bits.take(8);
  const most = 100000 * (bits.take(8) - 48);
  for (;;) {
    const mark = bits.take(24);
    bits.take(24); bits.take(16); bits.take(16);
    if (mark !== BLOCK_MARK) break;
    parts.push(block(bits, most));
  }
  return new Blob(parts).text();
}

function block(bits, most) {
  bits.take(1);
  const origin = bits.take(24), symbols = usedBytes(bits), size = symbols.length + 2;
  const tables = bits.take(3), selectors = chosen(bits, tables), codes = Array.from({ length: tables }, () => codeOf(bits, size));
  const links = new Uint32Array(most), counts = new Int32Array(256), front = symbols.slice();
  let length = 0, run = 0, weight = 1;
  for (let at = 0; ; at++) {
    const symbol = next(bits, codes[selectors[(at / GROUP) | 0]]);
    if (symbol < 2) {
      run += weight << symbol;
      weight <<= 1;
      continue;
    }
    if (run) {
      counts[front[0]] += run;
      links.fill(front[0], length, length + run);
      length += run;
      [run, weight] = [0, 1];
    }
    if (symbol === size - 1) break;
    const byte = front[symbol - 1];
    for (let place = symbol - 1; place > 0; place--) front[place] = front[place - 1];
    front[0] = byte;
    counts[byte]++;
    links[length++] = byte;
  }
  return unrun(links, counts, length, origin);
}

function usedBytes(bits) {
  const groups = bits.take(16), used = [];
  for (let group = 0; group < 16; group++) {
    if (!(groups & (0x8000 >> group))) continue;
    const own = bits.take(16);
    for (let at = 0; at < 16; at++) if (own & (0x8000 >> at)) used.push(16 * group + at);
  }
  return Uint8Array.from(used);
}

function chosen(bits, tables) {
  const order = Array.from({ length: tables }, (_, at) => at);
  return Uint8Array.from({ length: bits.take(15) }, () => {
    let at = 0;
    while (bits.take(1)) at++;
    order.unshift(...order.splice(at, 1));
    return order[0];
  });
}

// Canonical codes: for each length the first code, how many there are, and where their symbols begin.
function codeOf(bits, size) {
  const lengths = new Uint8Array(size), first = new Int32Array(22), count = new Int32Array(22), place = new Int32Array(22), ordered = [];
  let length = bits.take(5);
  for (let at = 0; at < size; at++) {
    while (bits.take(1)) length += bits.take(1) ? -1 : 1;
    lengths[at] = length;
    count[length]++;
  }
  for (let one = 1, code = 0; one < 21; one++) {
    [first[one], place[one]] = [code, ordered.length];
    for (let at = 0; at < size; at++) if (lengths[at] === one) ordered.push(at);
    code = (code + count[one]) << 1;
  }
  return { first, count, place, ordered: Uint16Array.from(ordered), short: shortCodes(first, count, place, ordered) };
}

// By the next LOOK bits: the symbol that they begin with, and its length; 0 where it is longer.
function shortCodes(first, count, place, ordered) {
  const found = new Uint16Array(1 << LOOK);
  for (let length = 1; length <= LOOK; length++) {
    for (let at = 0; at < count[length]; at++) {
      const from = (first[length] + at) << (LOOK - length);
      found.fill((ordered[place[length] + at] << 4) | length, from, from + (1 << (LOOK - length)));
    }
  }
  return found;
}

function next(bits, code) {
  bits.need(LOOK);
  const entry = code.short[bits.held >>> (bits.count - LOOK)];
  if (entry) {
    bits.count -= entry & 15;
    bits.held &= (1 << bits.count) - 1;
    return entry >>> 4;
  }
  let length = LOOK, value = bits.take(LOOK);
  while (value - code.first[length] >= code.count[length]) {
    value = (value << 1) | bits.take(1);
    length++;
  }
  return code.ordered[code.place[length] + value - code.first[length]];
}

function unrun(links, counts, length, origin) {
  let sum = 0;
  for (let byte = 0; byte < 256; byte++) [counts[byte], sum] = [sum, sum + counts[byte]];
  for (let at = 0; at < length; at++) links[counts[links[at] & 255]++] |= at << 8;
  let out = new Uint8Array(length + (length >> 2) + 1024), size = 0, same = 0, last = -1;
  for (let at = links[origin] >>> 8, left = length; left; left--) {
    const entry = links[at], byte = entry & 255;
    at = entry >>> 8;
    if (size + 256 > out.length) {
      const larger = new Uint8Array(2 * out.length);
      larger.set(out);
      out = larger;
    }
    if (same === 4) {
      out.fill(last, size, size + byte);
      size += byte;
      [same, last] = [0, -1];
      continue;
    }
    [same, last] = byte === last ? [same + 1, last] : [1, byte];
    out[size++] = byte;
  }
  return out.subarray(0, size);
}
