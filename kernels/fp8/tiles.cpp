// The element-wise loops of formats.py and reference.py, one pass instead of ten, bit for bit the same.
// Compiled by native.py with -ffp-contract=off: every line rounds as PyTorch's operators do.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t TILE = 128;

template <class To, class From> To bits(From x) { To y; std::memcpy(&y, &x, sizeof y); return y; }

float scale_of(uint32_t amax_bits, bool power_of_two) {
    float amax = bits<float>(amax_bits);
    float scale = (amax < 1e-4f ? 1e-4f : amax) / 448.0f;  // NaN stays NaN
    bool finite = (bits<uint32_t>(scale) & 0x7F800000u) != 0x7F800000u;
    return power_of_two && finite ? bits<float>((bits<uint32_t>(scale) + 0x7FFFFFu) & 0x7F800000u) : scale;
}

// Below 2^-6, E4M3 is subnormal: adding 2^-6 gives such a value an exponent, and its bits line up with all others'.
constexpr uint32_t SMALLEST_NORMAL = 121u << 23;

inline float round_to_e4m3(float x) {
    float unit = bits<float>(std::max(bits<uint32_t>(x) & 0x7F800000u, SMALLEST_NORMAL)) * (1.5f * (1 << 20));
    return (x + unit) - unit;
}

inline uint8_t encode(float x) {
    uint32_t magnitude = bits<uint32_t>(round_to_e4m3(x)) & 0x7FFFFFFFu;
    uint32_t subnormal = -uint32_t(magnitude < SMALLEST_NORMAL);  // all ones or zero
    float shifted = bits<float>(magnitude) + bits<float>(subnormal & SMALLEST_NORMAL);
    uint32_t code = (bits<uint32_t>(shifted) >> 20) - (120u << 3) - (subnormal & 8u);
    return uint8_t(std::min(code, 127u) | (bits<uint32_t>(x) >> 24 & 0x80u));
}

inline float decode(uint8_t code) {
    uint32_t magnitude = code & 0x7Fu;
    uint32_t subnormal = -uint32_t(magnitude < 8u);
    float shifted = bits<float>((magnitude << 20) + (120u << 23) + (subnormal & (1u << 23)));
    float value = shifted - bits<float>(subnormal & SMALLEST_NORMAL);
    return bits<float>(bits<uint32_t>(value) | uint32_t(code & 0x80u) << 24);
}

}  // namespace

extern "C" {

// x [R, C] in BF16 -> codes [R, C], scales [R, ceil(C / 128)]
void quantize_rows(const uint16_t* x, int64_t R, int64_t C, bool power_of_two, uint8_t* __restrict codes, float* __restrict scales) {
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
            const float scale = *scales++ = scale_of(amax, power_of_two);
            for (int64_t i = 0; i < n; ++i) codes[r * C + c + i] = encode(values[i] / scale);
        }
    }
}

void widen(const uint8_t* codes, int64_t n, float* __restrict values) {
    for (int64_t i = 0; i < n; ++i) values[i] = decode(codes[i]);
}

// 1x128 tiles over columns -> 128x1 tiles over the rows of each group, which begins at a new tile:
// codes [R, C], scales [R, ceil(C / 128)] -> values [tiles x 128, C] (rows beyond a group's last stay unset) and
// column_scales [tiles, C]
void requantize(const uint8_t* codes, const float* scales, const int64_t* counts, int64_t groups, int64_t C,
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
                        const float value = decode(codes[r * C + c]) * scale;
                        amax[c] = std::max(amax[c], bits<uint32_t>(value) & 0x7FFFFFFFu);
                        values[r * C + c] = value;
                    }
                }
            }
            for (int64_t c = 0; c < C; ++c) column_scales[c] = scale_of(amax[c], false);
            for (int64_t r = 0; r < n; ++r)
                for (int64_t c = 0; c < C; ++c) values[r * C + c] = round_to_e4m3(values[r * C + c] / column_scales[c]);
            codes += n * C;
            scales += n * tiles_C;
            values += TILE * C;
            column_scales += C;
        }
    }
}

}  // extern "C"
