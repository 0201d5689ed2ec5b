// The element-wise loops of formats.py and e5m6.py, one pass instead of ten, bit for bit the same.
// Compiled by native.py with -ffp-contract=off: every line rounds as PyTorch's operators do.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t TILE = 128;

template <class To, class From> To bits(From x) { To y; std::memcpy(&y, &x, sizeof y); return y; }

float scale_of(uint32_t amax_bits, bool power_of_two, float largest) {
    float amax = bits<float>(amax_bits);
    float scale = (amax < 1e-4f ? 1e-4f : amax) / largest;  // NaN stays NaN
    bool finite = (bits<uint32_t>(scale) & 0x7F800000u) != 0x7F800000u;
    return power_of_two && finite ? bits<float>((bits<uint32_t>(scale) + 0x7FFFFFu) & 0x7F800000u) : scale;
}

// A format of 8 or 12 bits by the bits of its mantissa and FP32's exponent field of its smallest normal value. Adding
// that value to a subnormal one gives it an exponent, and its bits line up with all others'.
template <int mantissa, uint32_t smallest_exponent, uint32_t nan> struct Format {
    static constexpr uint32_t shift = 23 - mantissa, sign = nan < 128 ? 0x80 : 0x800;
    static constexpr uint32_t smallest_normal = smallest_exponent << 23;
    static constexpr uint32_t implicit_one = 1u << mantissa, offset = (smallest_exponent - 1) << mantissa;

    static float round(float x) {
        float unit = bits<float>(std::max(bits<uint32_t>(x) & 0x7F800000u, smallest_normal)) * (1.5f * (1 << shift));
        return bits<float>((bits<uint32_t>((x + unit) - unit) & 0x7FFFFFFFu) | (bits<uint32_t>(x) & 0x80000000u));
    }

    static uint32_t encode(float x) {
        uint32_t magnitude = bits<uint32_t>(round(x)) & 0x7FFFFFFFu;
        uint32_t subnormal = -uint32_t(magnitude < smallest_normal);  // all ones or zero
        float shifted = bits<float>(magnitude) + bits<float>(subnormal & smallest_normal);
        return std::min((bits<uint32_t>(shifted) >> shift) - offset - (subnormal & implicit_one), nan);
    }

    static uint32_t sign_of(float x) { return bits<uint32_t>(x) >> 31 ? sign : 0; }

    static float decode(uint32_t code) {
        uint32_t magnitude = code & (sign - 1);
        uint32_t subnormal = -uint32_t(magnitude < implicit_one);
        float shifted = bits<float>(((magnitude + offset) << shift) + (subnormal & (1u << 23)));
        float value = shifted - bits<float>(subnormal & smallest_normal);
        uint32_t not_a_number = -uint32_t(magnitude == nan) & 0x7FC00000u;
        return bits<float>(bits<uint32_t>(value) | not_a_number | (code & sign ? 0x80000000u : 0u));
    }
};

using E4M3 = Format<3, 121, 0x7F>;
using E5M6 = Format<6, 113, 0x7E0>;
constexpr float E4M3_MAX = 448.0f, E5M6_MAX = 65024.0f;

}  // namespace

extern "C" {

// x [R, C] in BF16 -> codes [R, C], scales [R, ceil(C / 128)]
void quantize_rows(const uint16_t* x, int64_t R, int64_t C, bool power_of_two, uint8_t* __restrict codes,
                   float* __restrict scales) {
    float values[TILE];
    for (int64_t r = 0; r < R; ++r) {
        for (int64_t c = 0; c < C; c += TILE) {
            const int64_t n = std::min(TILE, C - c);
            uint32_t amax = 0;
            for (int64_t i = 0; i < n; ++i) {
                uint32_t value = uint32_t(x[r * C + c + i]) << 16;
                amax = std::max(amax, value & 0x7FFFFFFFu);
                values[i] = bits<float>(value);
            }
            const float scale = *scales++ = scale_of(amax, power_of_two, E4M3_MAX);
            for (int64_t i = 0; i < n; ++i) {
                const float q = values[i] / scale;
                codes[r * C + c + i] = uint8_t(E4M3::encode(q) | E4M3::sign_of(q));
            }
        }
    }
}

// x [R, C] in BF16 -> words [R, ceil(C / 8) * 3], scales [R, ceil(C / 128)]
void e5m6_quantize(const uint16_t* x, int64_t R, int64_t C, bool power_of_two, uint32_t* __restrict words,
                   float* __restrict scales) {
    float values[TILE];
    uint32_t codes[TILE];
    for (int64_t r = 0; r < R; ++r, x += C) {
        for (int64_t c = 0; c < C; c += TILE) {
            const int64_t n = std::min(TILE, C - c);
            uint32_t amax = 0;
            for (int64_t i = 0; i < n; ++i) {
                uint32_t value = uint32_t(x[c + i]) << 16;
                amax = std::max(amax, value & 0x7FFFFFFFu);
                values[i] = bits<float>(value);
            }
            const float scale = *scales++ = scale_of(amax, power_of_two, E5M6_MAX);
            for (int64_t i = 0; i < n; ++i) {
                const float q = values[i] / scale;
                codes[i] = E5M6::encode(q) | (q == q ? E5M6::sign_of(q) : 0);
            }
            for (int64_t i = n; i % 8; ++i) codes[i] = 0;
            for (const uint32_t* v = codes; v < codes + n; v += 8) {
                *words++ = v[0] << 20 | v[1] << 8 | v[2] >> 4;
                *words++ = v[2] << 28 | v[3] << 16 | v[4] << 4 | v[5] >> 8;
                *words++ = v[5] << 24 | v[6] << 12 | v[7];
            }
        }
    }
}

// words and scales as above -> values [R, C]
void e5m6_dequantize(const uint32_t* words, const float* scales, int64_t R, int64_t C, float* __restrict values) {
    uint32_t codes[TILE];
    for (int64_t r = 0; r < R; ++r, values += C) {
        for (int64_t c = 0; c < C; c += TILE) {
            const int64_t n = std::min(TILE, C - c);
            for (uint32_t* v = codes; v < codes + n; v += 8) {
                const uint32_t a = *words++, b = *words++, d = *words++;
                v[0] = a >> 20, v[1] = a >> 8, v[2] = a << 4 | b >> 28, v[3] = b >> 16;
                v[4] = b >> 4, v[5] = b << 8 | d >> 24, v[6] = d >> 12, v[7] = d;
            }
            const float scale = *scales++;
            for (int64_t i = 0; i < n; ++i) values[c + i] = E5M6::decode(codes[i] & 0xFFFu) * scale;
        }
    }
}

void widen(const uint8_t* codes, int64_t n, float* __restrict values) {
    for (int64_t i = 0; i < n; ++i) values[i] = E4M3::decode(codes[i]);
}

// 1x128 tiles over columns -> 128x1 tiles over the rows of each group, which begins at a new tile:
// codes [R, C], scales [R, ceil(C / 128)] -> values [tiles x 128, C] (zeros beyond a group's last row) and
// column_scales [tiles, C], powers of two where all scales above them are
void regroup(const uint8_t* codes, const float* scales, const int64_t* counts, int64_t groups, int64_t C,
             float* __restrict values, float* __restrict column_scales) {
    const int64_t tiles_C = (C + TILE - 1) / TILE;
    for (int64_t g = 0; g < groups; ++g) {
        for (int64_t first = 0; first < counts[g]; first += TILE) {
            const int64_t n = std::min(TILE, counts[g] - first);
            uint32_t* amax = reinterpret_cast<uint32_t*>(column_scales);
            std::fill_n(amax, C, 0u);
            for (int64_t r = 0; r < n; ++r) {
                for (int64_t tile = 0; tile < tiles_C; ++tile) {
                    const float scale = scales[r * tiles_C + tile];
                    for (int64_t c = tile * TILE; c < std::min(C, (tile + 1) * TILE); ++c) {
                        const float value = E4M3::decode(codes[r * C + c]) * scale;
                        amax[c] = std::max(amax[c], bits<uint32_t>(value) & 0x7FFFFFFFu);
                        values[r * C + c] = value;
                    }
                }
            }
            for (int64_t tile = 0; tile < tiles_C; ++tile) {
                uint32_t mantissas = 0;
                for (int64_t r = 0; r < n; ++r) mantissas |= bits<uint32_t>(scales[r * tiles_C + tile]) << 9;
                for (int64_t c = tile * TILE; c < std::min(C, (tile + 1) * TILE); ++c)
                    column_scales[c] = scale_of(amax[c], mantissas == 0, E4M3_MAX);
            }
            for (int64_t r = 0; r < n; ++r)
                for (int64_t c = 0; c < C; ++c) values[r * C + c] = E4M3::round(values[r * C + c] / column_scales[c]);
            std::fill(values + n * C, values + TILE * C, 0.0f);
            codes += n * C;
            scales += n * tiles_C;
            values += TILE * C;
            column_scales += C;
        }
    }
}

}  // extern "C"
