/* unicode.c: UTF-8 decoding and repair. */
#include "unicode.h"

#include <string.h>

int uni_decode(const char *text, size_t n, uint32_t *cp) {
    const unsigned char *s = (const unsigned char *)text;
    unsigned lead = s[0];
    if (lead < 0x80) {
        *cp = lead;
        return 1;
    }
    if (lead < 0xC2 || lead > 0xF4) return -1;
    size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    /* The second byte's range excludes overlong forms, surrogates and values above U+10FFFF
     * (The Unicode Standard, table 3-7). */
    unsigned low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    unsigned high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    uint32_t value = lead & (0x7Fu >> length);
    for (size_t i = 1; i < length; i++) {
        if (i == n) return 0;
        if (s[i] < low || s[i] > high) return -(int)i;
        value = value << 6 | (s[i] & 0x3Fu);
        low = 0x80;
        high = 0xBF;
    }
    *cp = value;
    return (int)length;
}

int uni_encode(uint32_t cp, char *out) {
    if (cp < 0x80) {
        out[0] = (char)cp;
        return 1;
    }
    int length = cp < 0x800 ? 2 : cp < 0x10000 ? 3 : 4;
    for (int i = length - 1; i > 0; i--, cp >>= 6) out[i] = (char)(0x80 | (cp & 0x3F));
    out[0] = (char)((0xF00 >> length & 0xFF) | cp);
    return length;
}

size_t uni_valid_prefix(const char *text, size_t n) {
    size_t i = 0;
    while (i < n) {
        uint64_t eight;
        if (n - i >= 8 && (memcpy(&eight, text + i, 8), (eight & 0x8080808080808080u) == 0)) {
            i += 8;
            continue;
        }
        uint32_t cp;
        int length = uni_decode(text + i, n - i, &cp);
        if (length <= 0) break;
        i += (size_t)length;
    }
    return i;
}

size_t uni_sanitize(const char *text, size_t n, char *out) {
    size_t written = 0;
    for (size_t i = 0; i < n;) {
        size_t good = uni_valid_prefix(text + i, n - i);
        memcpy(out + written, text + i, good);
        written += good;
        i += good;
        if (i == n) break;
        uint32_t cp;
        int length = uni_decode(text + i, n - i, &cp);
        written += (size_t)uni_encode(UNI_REPLACEMENT, out + written);
        i = length == 0 ? n : i + (size_t)-length;
    }
    return written;
}
