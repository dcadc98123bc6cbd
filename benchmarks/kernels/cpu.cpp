// How fast could a CPU multiply with packed weights? `make bench-cpu`.
// Needs AVX-512 with BF16 (Zen 4, Sapphire Rapids or newer).
//
// The fastest look-up found (one gather of 16 codewords, which are operands of VDPBF16PS as they
// are) against a product with the same weights in bfloat16, which only has to read them: both in
// one run, taking turns, on a matrix of 4096 x 4096 that the caches no longer hold. Rows are in
// lanes: a lane's 32 pairs are 9 words of codebook entries and 2 of signs, as in
// kernels/qamw_kernels/ops/tiling.py.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

constexpr int N = 4096, K = 4096, ENTRY_BITS = 9, WORDS = ENTRY_BITS + 2, RUNS = 101;
constexpr int BLOCKS = N / 16, UNITS = K / 64;  // a unit: 32 pairs

template <typename T> static T* allocate(size_t count) {
  return static_cast<T*>(aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
}

template <int PAIR> static inline __m512i entries(const __m512i* words) {
  constexpr int word = ENTRY_BITS * PAIR / 32, shift = ENTRY_BITS * PAIR % 32;
  __m512i found = _mm512_srli_epi32(words[word], shift);
  if constexpr (shift + ENTRY_BITS > 32)
    found = _mm512_or_si512(found, _mm512_slli_epi32(words[word + 1], 32 - shift));
  return _mm512_and_si512(found, _mm512_set1_epi32((1 << ENTRY_BITS) - 1));
}

template <int TOKENS, int PAIR>
static inline void multiply_pair(const __m512i* words, const int* quadrant, const int* x,
                                 __m512* sums) {
  __m512i codewords = _mm512_i32gather_epi32(entries<PAIR>(words), quadrant, 4);
  __m512i signs = _mm512_and_si512(_mm512_slli_epi32(words[ENTRY_BITS + PAIR / 16], PAIR % 16),
                                   _mm512_set1_epi32(int(0x80008000)));
  codewords = _mm512_xor_si512(codewords, signs);
  for (int m = 0; m < TOKENS; m++) {
    __m512i activation = _mm512_set1_epi32(x[m * (K / 2) + PAIR]);
    sums[m] = _mm512_dpbf16_ps(sums[m], __m512bh(codewords), __m512bh(activation));
  }
  if constexpr (PAIR < 31) multiply_pair<TOKENS, PAIR + 1>(words, quadrant, x, sums);
}

template <int TOKENS>
static void packed(const int* tiles, const int* quadrant, const int* x, float* y) {
#pragma omp parallel for
  for (int block = 0; block < BLOCKS; block++) {
    __m512 sums[TOKENS] = {};
    for (int unit = 0; unit < UNITS; unit++) {
      size_t first = (size_t(block) * UNITS + unit) * WORDS;
      const __m512i* words = reinterpret_cast<const __m512i*>(tiles) + first;
      multiply_pair<TOKENS, 0>(words, quadrant, x + unit * 32, sums);
    }
    for (int m = 0; m < TOKENS; m++) _mm512_storeu_ps(y + m * N + block * 16, sums[m]);
  }
}

template <int TOKENS> static void bf16(const uint16_t* weight, const int* x, float* y) {
  // Rows at once, so that there are sums enough to hide the latency of one.
  constexpr int ROWS = TOKENS == 1 ? 4 : 2;
#pragma omp parallel for
  for (int row = 0; row < N; row += ROWS) {
    __m512 sums[ROWS][TOKENS] = {};
    for (int k = 0; k < K; k += 32) {
      __m512bh weights[ROWS];
      for (int r = 0; r < ROWS; r++)
        weights[r] = __m512bh(_mm512_loadu_si512(weight + size_t(row + r) * K + k));
      for (int m = 0; m < TOKENS; m++) {
        __m512bh inputs = __m512bh(_mm512_loadu_si512(x + m * (K / 2) + k / 2));
        for (int r = 0; r < ROWS; r++)
          sums[r][m] = _mm512_dpbf16_ps(sums[r][m], weights[r], inputs);
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int m = 0; m < TOKENS; m++) y[m * N + row + r] = _mm512_reduce_add_ps(sums[r][m]);
  }
}

static double median_ms(std::vector<double> times) {
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2] * 1e3;
}

template <int TOKENS>
static void compare(const int* tiles, const int* quadrant, const uint16_t* weight, const int* x) {
  std::vector<float> ours(TOKENS * N), theirs(TOKENS * N);
  std::vector<char> flush(256 << 20);
  std::vector<double> packed_times, bf16_times;
  auto timed = [&](auto call, std::vector<double>& times) {
    for (size_t i = 0; i < flush.size(); i += 64) flush[i]++;
    auto start = std::chrono::steady_clock::now();
    call();
    std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    times.push_back(taken.count());
  };
  for (int run = 0; run < RUNS; run++) {
    timed([&] { packed<TOKENS>(tiles, quadrant, x, ours.data()); }, packed_times);
    timed([&] { bf16<TOKENS>(weight, x, theirs.data()); }, bf16_times);
  }
  for (int i = 0; i < TOKENS * N; i++)
    if (!(std::abs(ours[i] - theirs[i]) <= 1e-3f * K)) {
      const char* message = "row %d differs: %g and %g; no speed is given\n";
      fprintf(stderr, message, i, ours[i], theirs[i]);
      exit(1);
    }
  double p = median_ms(packed_times), b = median_ms(bf16_times);
  printf("{\"tokens\": %d, \"threads\": %d, \"packed_ms\": %.3f, \"bf16_ms\": %.3f, "
         "\"speed_up\": %.2f, \"bf16_bytes_per_second\": %.3g}\n",
         TOKENS, omp_get_max_threads(), p, b, b / p, 2.0 * N * K / b * 1e3);
}

int main() {
  int* tiles = allocate<int>(size_t(BLOCKS) * UNITS * WORDS * 16);
  int* quadrant = allocate<int>(1 << ENTRY_BITS);
  int* x = allocate<int>(8 * K / 2);
  uint16_t* weight = allocate<uint16_t>(size_t(N) * K);
  auto bfloat = [] { return uint32_t(0x3c00 + rand() % 0x400); };  // 0.008 to 2
  for (int i = 0; i < 1 << ENTRY_BITS; i++) quadrant[i] = int(bfloat() | bfloat() << 16);
  for (int i = 0; i < 8 * K / 2; i++) x[i] = int(bfloat() | bfloat() << 16);
  for (size_t i = 0; i < size_t(BLOCKS) * UNITS * WORDS * 16; i++)
    tiles[i] = int(uint32_t(rand()) << 16 ^ uint32_t(rand()));
  for (int row = 0; row < N; row++)
    for (int pair = 0; pair < K / 2; pair++) {
      size_t first = (size_t(row / 16) * UNITS + pair / 32) * WORDS;
      auto word = [&](int j) { return uint32_t(tiles[(first + j) * 16 + row % 16]); };
      int i = pair % 32, at = ENTRY_BITS * i;
      uint64_t both = word(at / 32) | uint64_t(word(std::min(at / 32 + 1, ENTRY_BITS - 1))) << 32;
      uint32_t signs = word(ENTRY_BITS + i / 16) << i % 16 & 0x80008000u;
      uint32_t entry = (both >> at % 32) & ((1 << ENTRY_BITS) - 1);
      uint32_t codeword = uint32_t(quadrant[entry]) ^ signs;
      weight[size_t(row) * K + 2 * pair] = uint16_t(codeword);
      weight[size_t(row) * K + 2 * pair + 1] = uint16_t(codeword >> 16);
    }
  compare<1>(tiles, quadrant, weight, x);
  compare<8>(tiles, quadrant, weight, x);
}
