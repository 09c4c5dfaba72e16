// How a page that had to be dense is packed: letters of fifteen bits (the first says how many bits of the last are none
// of it), and in them LZMA, which sees a window of megabytes and unpacks fast; browsers have neither.
const FIRST_LETTER = 0x3400, LETTER_BITS = 15;

function unlettered(letters) {
  const over = letters.charCodeAt(0) - FIRST_LETTER, bytes = new Uint8Array((LETTER_BITS * (letters.length - 1) - over) / 8);
  for (let at = 1, place = 0, held = 0, count = 0; at < letters.length; at++) {
    held = (held << LETTER_BITS) | (letters.charCodeAt(at) - FIRST_LETTER);
    for (count += LETTER_BITS; count >= 8 && place < bytes.length;) bytes[place++] = held >>> (count -= 8);
    held &= (1 << count) - 1;
  }
  return bytes;
}

// LZMA of one kind: four bits of the byte before tell which literals to expect, the position none (lc 4, lp 0, pb 0).
// A range decoder reads bits by adaptive odds; they spell literals, and matches as lengths and distances.
function unlzma(bytes) {
  const HEAD = 13, LITERAL = 0x300, CONTEXT_BITS = 4, STATES = 12, EVEN = 1024;
  let at = HEAD + 1, range = 0xffffffff, code = 0;
  for (let left = 4; left; left--) code = ((code << 8) | bytes[at++]) >>> 0;
  const odds = (size) => new Uint16Array(size).fill(EVEN);
  const lengths = () => ({ choice: odds(2), low: odds(8), middle: odds(8), high: odds(256) });
  const literals = odds(LITERAL << CONTEXT_BITS), isMatch = odds(STATES), isRepeat = odds(STATES), isOlder = odds(STATES), isLong = odds(STATES);
  const isSecond = odds(STATES), isThird = odds(STATES), slots = [odds(64), odds(64), odds(64), odds(64)], near = odds(115), low = odds(16);
  const ofMatch = lengths(), ofRepeat = lengths();
  let out = new Uint8Array(12 * bytes.length), size = 0, state = 0, last = 0, second = 0, third = 0, fourth = 0;

  function bit(own, place) {
    const chance = own[place], bound = (range >>> 11) * chance;
    let found = 0;
    if (code < bound) {
      range = bound;
      own[place] = chance + ((2048 - chance) >> 5);
    } else {
      range -= bound;
      code -= bound;
      own[place] = chance - (chance >> 5);
      found = 1;
    }
    if (range < 0x1000000) {
      range *= 256;
      code = code * 256 + bytes[at++];
    }
    return found;
  }

  function even(count) {
    let found = 0;
    for (; count; count--) {
      range = Math.floor(range / 2);
      const one = code >= range ? 1 : 0;
      if (one) code -= range;
      found = 2 * found + one;
      if (range < 0x1000000) {
        range *= 256;
        code = code * 256 + bytes[at++];
      }
    }
    return found;
  }

  function tree(own, count) {
    let found = 1;
    for (let left = count; left; left--) found = (found << 1) | bit(own, found);
    return found - (1 << count);
  }

  function backwards(own, offset, count) {
    let found = 0, place = 1;
    for (let order = 0; order < count; order++) {
      const one = bit(own, offset + place);
      place = (place << 1) | one;
      found |= one << order;
    }
    return found;
  }

  function length(own) {
    if (!bit(own.choice, 0)) return tree(own.low, 3);
    return bit(own.choice, 1) ? 16 + tree(own.high, 8) : 8 + tree(own.middle, 3);
  }

  function distance(long) {
    const slot = tree(slots[Math.min(long, 3)], 6);
    if (slot < 4) return slot;
    const count = (slot >> 1) - 1, base = (2 | (slot & 1)) * 2 ** count;
    return slot < 14 ? base + backwards(near, base - slot, count) : base + 16 * even(count - 4) + backwards(low, 0, 4);
  }

  function literal() {
    const base = LITERAL * (size ? out[size - 1] >> (8 - CONTEXT_BITS) : 0);
    let found = 1;
    if (state >= 7) {
      for (let other = out[size - last - 1]; found < 0x100;) {
        const expected = (other >> 7) & 1, one = bit(literals, base + ((1 + expected) << 8) + found);
        other <<= 1;
        found = (found << 1) | one;
        if (one !== expected) break;
      }
    }
    while (found < 0x100) found = (found << 1) | bit(literals, base + found);
    state = state < 4 ? 0 : state < 10 ? state - 3 : state - 6;
    return found;
  }

  function recalled() {
    let found = second;
    if (bit(isSecond, state)) {
      found = third;
      if (bit(isThird, state)) [found, fourth] = [fourth, third];
      third = second;
    }
    second = last;
    return found;
  }

  for (;;) {
    if (size + 300 > out.length) {
      if (at > bytes.length) throw new RangeError("the end of a packed part is missing");
      const larger = new Uint8Array(2 * out.length + 1000);
      larger.set(out);
      out = larger;
    }
    let long = 0;
    if (!bit(isMatch, state)) {
      const byte = literal();
      out[size++] = byte;
      continue;
    } else if (!bit(isRepeat, state)) {
      [fourth, third, second] = [third, second, last];
      long = length(ofMatch);
      last = distance(long);
      if (last === 0xffffffff) return out.subarray(0, size);
      state = state < 7 ? 7 : 10;
    } else {
      const old = state < 7;
      let whole = true;
      if (bit(isOlder, state)) last = recalled();
      else whole = bit(isLong, state) === 1;
      long = whole ? length(ofRepeat) : -1;
      state = whole ? (old ? 8 : 11) : old ? 9 : 11;
    }
    for (let left = long + 2; left; left--, size++) out[size] = out[size - last - 1];
  }
}
