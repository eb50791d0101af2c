/* LMA on the CPU: K linear segments over a dense float array, K fixed at compile time so that every loop over it unrolls.
 *
 * One pass forward and one pass backward, no index is kept. Work is cut into chunks of fixed size and the partial sums
 * of the chunks are added in order, so a result does not depend on the number of threads. Plain GCC vector extensions:
 * the same source is AVX-512, AVX2 and NEON. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 8
#define CHUNK 4096

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t mask __attribute__((vector_size(LANES * 4)));

static inline vec fill(float value) { return value - (vec){0}; }
static inline vec choose(mask m, vec yes, vec no) { return (vec)((m & (mask)yes) | (~m & (mask)no)); }

/* `count` < LANES only at the end of an array; the missing lanes read as zero. */
static inline vec load(const float *from, int64_t count) {
  vec v = {0};
  memcpy(&v, from, (count < LANES ? count : LANES) * sizeof(float));
  return v;
}
static inline void store(float *to, vec v, int64_t count) {
  memcpy(to, &v, (count < LANES ? count : LANES) * sizeof(float));
}

/* table[j] of the segment (cuts[j-1], cuts[j]] that x lies in; a NaN lies in segment 0. */
static inline vec look_up(vec x, const float *cuts, const float *table) {
  vec found = fill(table[0]);
#pragma GCC unroll 64
  for (int j = 1; j < K; j++) found = choose(x > fill(cuts[j - 1]), fill(table[j]), found);
  return found;
}

/* Mean and unbiased standard deviation of x[n]. Chunks are centred on their own mean, then merged (Chan et al. 1979). */
int statistics(const float *x, int64_t n, int threads, float *mean_std) {
  int64_t chunks = (n + CHUNK - 1) / CHUNK;
  double(*part)[2] = malloc((chunks + 1) * sizeof *part);
  if (!part) return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t c = 0; c < chunks; c++) {
    const float *from = x + c * CHUNK;
    int64_t size = n - c * CHUNK < CHUNK ? n - c * CHUNK : CHUNK, whole = size / LANES * LANES;
    vec sum = {0}, square = {0};
    for (int64_t i = 0; i < whole; i += LANES) sum += load(from + i, LANES);
    float pivot = 0;
    for (int l = 0; l < LANES; l++) pivot += sum[l];
    pivot = whole ? pivot / whole : from[0];
    sum = fill(0);
    for (int64_t i = 0; i < whole; i += LANES) {
      vec d = load(from + i, LANES) - fill(pivot);
      sum += d, square += d * d;
    }
    double s = 0, q = 0;
    for (int l = 0; l < LANES; l++) s += sum[l], q += square[l];
    for (int64_t i = whole; i < size; i++) {
      double d = (double)from[i] - pivot;
      s += d, q += d * d;
    }
    part[c][0] = pivot + s / size;
    part[c][1] = q - s * s / size;
  }
  double count = 0, mean = 0, m2 = 0;
  for (int64_t c = 0; c < chunks; c++) {
    double size = n - c * CHUNK < CHUNK ? n - c * CHUNK : CHUNK, delta = part[c][0] - mean;
    mean += delta * size / (count + size);
    m2 += part[c][1] + delta * delta * count * size / (count + size);
    count += size;
  }
  free(part);
  mean_std[0] = n ? mean : NAN;
  mean_std[1] = n > 1 ? sqrt(m2 / (n - 1)) : 0;
  return 0;
}

int forward(const float *x, float *y, int64_t n, int threads, const float *cuts, const float *slopes, const float *biases) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t lo = 0; lo < n; lo += CHUNK) {
    int64_t hi = lo + CHUNK < n ? lo + CHUNK : n, i = lo;
    for (; i + LANES <= hi; i += LANES) {
      vec v = load(x + i, LANES);
      store(y + i, look_up(v, cuts, slopes) * v + look_up(v, cuts, biases), LANES);
    }
    if (i < hi) {
      vec v = load(x + i, hi - i);
      store(y + i, look_up(v, cuts, slopes) * v + look_up(v, cuts, biases), hi - i);
    }
  }
  return 0;
}

/* sums[0..K) += g x and sums[K..2K) += g over the elements above each cut (all elements for j = 0). */
static inline vec backward_step(vec x, vec g, const float *cuts, const float *slopes, vec *sums) {
  vec gx = g * x, zero = fill(0);
  sums[0] += gx, sums[K] += g;
#pragma GCC unroll 64
  for (int j = 1; j < K; j++) {
    mask above = x > fill(cuts[j - 1]);
    sums[j] += choose(above, gx, zero), sums[K + j] += choose(above, g, zero);
  }
  return g * look_up(x, cuts, slopes);
}

int backward(const float *x, const float *g, float *grad_x, int64_t n, int threads, const float *cuts, const float *slopes,
             float *grad_slopes, float *grad_biases) {
  int64_t chunks = (n + CHUNK - 1) / CHUNK;
  double(*part)[2 * K] = malloc((chunks + 1) * sizeof *part), total[2 * K] = {0};
  if (!part) return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t c = 0; c < chunks; c++) {
    vec sums[2 * K] = {{0}};
    int64_t hi = (c + 1) * CHUNK < n ? (c + 1) * CHUNK : n, i = c * CHUNK;
    for (; i + LANES <= hi; i += LANES)
      store(grad_x + i, backward_step(load(x + i, LANES), load(g + i, LANES), cuts, slopes, sums), LANES);
    if (i < hi) /* missing lanes have g = 0: they add nothing */
      store(grad_x + i, backward_step(load(x + i, hi - i), load(g + i, hi - i), cuts, slopes, sums), hi - i);
    for (int j = 0; j < 2 * K; j++) {
      part[c][j] = 0;
      for (int l = 0; l < LANES; l++) part[c][j] += sums[j][l];
    }
  }
  for (int64_t c = 0; c < chunks; c++)
    for (int j = 0; j < 2 * K; j++) total[j] += part[c][j];
  free(part);
  for (int j = 0; j < K; j++) { /* above a cut minus above the next one = in the segment between */
    grad_slopes[j] = total[j] - (j + 1 < K ? total[j + 1] : 0);
    grad_biases[j] = total[K + j] - (j + 1 < K ? total[K + j + 1] : 0);
  }
  return 0;
}
