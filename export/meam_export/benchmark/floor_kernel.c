/* The matrix products of one inference and nothing else: x += W_n ... W_1 x / steps, repeated `steps` times. */

#include <stddef.h>
#include <string.h>

#define PANEL 128
#define LANES 16

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));

/* out = W x, with W [rows, columns] stored as column-major panels of PANEL rows: their sums stay in registers, and the
   weights are read in the order of their addresses. */
static void multiply_panels(const float *restrict w, const float *restrict x, float *restrict out, size_t rows,
                      size_t columns) {
    for (size_t r = 0; r < rows; r += PANEL) {
        lanes s[PANEL / LANES] = {0};
        for (size_t c = 0; c < columns; c++, w += PANEL)
            for (size_t i = 0; i < PANEL / LANES; i++) s[i] += ((const lanes *)w)[i] * x[c];
        memcpy(out + r, s, sizeof s);
    }
}

/* The same for a row-major W, eight rows at once, so that their sums do not wait for each other. */
static void multiply_rows(const float *restrict w, const float *restrict x, float *restrict out, size_t rows,
                    size_t columns) {
    size_t r = 0;
    for (; r + 8 <= rows; r += 8) {
        const float *row = w + r * columns;
        float s[8] = {0};
        for (size_t c = 0; c < columns; c++)
            for (size_t i = 0; i < 8; i++) s[i] += row[i * columns + c] * x[c];
        memcpy(out + r, s, sizeof s);
    }
    for (; r < rows; r++) {
        float s = 0;
        for (size_t c = 0; c < columns; c++) s += w[r * columns + c] * x[c];
        out[r] = s;
    }
}

/* w holds the matrices one after the other, the i-th [sizes[i + 1], sizes[i]], in panels if sizes[i + 1] is a multiple
   of PANEL; scratch has room for two vectors of size `widest`. */
void integrate(const float *w, const size_t *sizes, size_t layers, size_t steps, float *x, float *scratch,
               size_t widest) {
    for (size_t step = 0; step < steps; step++) {
        const float *matrix = w, *input = x;
        for (size_t i = 0; i < layers; i++) {
            float *output = scratch + (i % 2) * widest;
            (sizes[i + 1] % PANEL ? multiply_rows : multiply_panels)(matrix, input, output, sizes[i + 1], sizes[i]);
            matrix += sizes[i + 1] * sizes[i];
            input = output;
        }
        for (size_t c = 0; c < sizes[0]; c++) x[c] += input[c] / (float)steps;
    }
}
