// The most that a core multiplies and adds: vectors of float32, in registers alone. Compiled for the processor it runs on.
#if defined(__AVX512F__)
#define BYTES 64
#define CHAINS 24
#elif defined(__AVX__)
#define BYTES 32
#define CHAINS 12
#else
#define BYTES 16
#define CHAINS 12
#endif

// What holds the compiler from computing all rounds in one.
#if defined(__aarch64__)
#define KEEP(x) __asm__("" : "+w"(x))
#elif defined(__AVX512F__)
#define KEEP(x) __asm__("" : "+v"(x))
#else
#define KEEP(x) __asm__("" : "+x"(x))
#endif

typedef float vec __attribute__((vector_size(BYTES)));

// Floating-point operations of one round: each chain waits for its own last result alone.
const long operations = 2L * CHAINS * (BYTES / 4);

float run(long rounds) {
  vec sums[CHAINS], factor = (vec){} + 0.999f, term = (vec){} + 0.001f;
#pragma GCC unroll 24
  for (int i = 0; i < CHAINS; ++i) sums[i] = (vec){} + (float)i;
  for (long r = 0; r < rounds; ++r) {
#pragma GCC unroll 24
    for (int i = 0; i < CHAINS; ++i) {
      sums[i] = sums[i] * factor + term;
      KEEP(sums[i]);
    }
  }
  float total = 0;
#pragma GCC unroll 24
  for (int i = 0; i < CHAINS; ++i) total += sums[i][0];
  return total;
}
