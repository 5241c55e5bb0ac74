#include "smoa_ref.h"

#include <math.h>
#include <stddef.h>

/* The number of granules of n coordinates. If g does not divide n, the last granule is short. */
static int64_t granule_count(int64_t n, int64_t granule)
{
    return n / granule + (n % granule ? 1 : 0);
}

smoa_status smoa_spectral_order(int64_t n, int64_t granule, int64_t q, const double *basis, const double *sigma,
                                double *score, int64_t *order)
{
    if (n < 0 || granule < 1 || q < 0)
        return SMOA_SIZE;
    if (!basis || !sigma || !score || !order)
        return SMOA_NULL;

    const int64_t m = granule_count(n, granule);
    for (int64_t i = 0; i < m; i++) {
        double moment = 0.0, energy = 0.0;
        for (int64_t c = i * granule; c < n && c / granule == i; c++) {
            for (int64_t j = 0; j < q; j++) {
                double amplitude = basis[c * q + j] * sigma[j];
                moment += (double)j * amplitude * amplitude;
                energy += amplitude * amplitude;
            }
        }
        score[i] = energy == 0.0 ? 0.0 : moment / energy;
        if (!isfinite(score[i]))
            return SMOA_NOT_FINITE;
    }

    /* Insertion sort. It is stable, because a granule passes only strictly larger ones. */
    for (int64_t i = 0; i < m; i++) {
        int64_t place = i;
        while (place > 0 && score[order[place - 1]] > score[i]) {
            order[place] = order[place - 1];
            place--;
        }
        order[place] = i;
    }
    return SMOA_OK;
}

smoa_status smoa_block_labels(int64_t n, int64_t granule, int64_t num_blocks, const int64_t *order,
                              int64_t *labels)
{
    if (n < 0 || granule < 1 || num_blocks < 1)
        return SMOA_SIZE;
    if (!order || !labels)
        return SMOA_NULL;

    for (int64_t c = 0; c < n; c++)
        labels[c] = -1; /* not seen yet; shows a repeated granule */

    const int64_t m = granule_count(n, granule);
    int64_t place = 0;
    for (int64_t k = 0; k < num_blocks; k++) {
        int64_t length = m / num_blocks + (k < m % num_blocks ? 1 : 0);
        for (int64_t end = place + length; place < end; place++) {
            int64_t i = order[place];
            if (i < 0 || i >= m || labels[i * granule] != -1)
                return SMOA_ORDER;
            for (int64_t c = i * granule; c < n && c / granule == i; c++)
                labels[c] = k;
        }
    }
    return SMOA_OK;
}

static smoa_status check_layer(const smoa_layer *layer)
{
    if (!layer)
        return SMOA_NULL;
    if (layer->out_features < 0 || layer->in_features < 0 || layer->num_blocks < 1 || layer->max_rank < 0)
        return SMOA_SIZE;
    if (!layer->weight || !layer->a || !layer->b || !layer->row_block || !layer->col_block || !layer->ranks)
        return SMOA_NULL;
    for (int64_t i = 0; i < layer->out_features; i++)
        if (layer->row_block[i] < 0 || layer->row_block[i] >= layer->num_blocks)
            return SMOA_LABEL;
    for (int64_t j = 0; j < layer->in_features; j++)
        if (layer->col_block[j] < 0 || layer->col_block[j] >= layer->num_blocks)
            return SMOA_LABEL;
    for (int64_t k = 0; k < layer->num_blocks; k++)
        if (layer->ranks[k] < 0 || layer->ranks[k] > layer->max_rank)
            return SMOA_RANK;
    return SMOA_OK;
}

/* The number of products B[i,t] A[t,j] in entry (i, j): the rank of its block, 0 outside the diagonal blocks. */
static int64_t entry_rank(const smoa_layer *layer, int64_t i, int64_t j)
{
    int64_t block = layer->row_block[i];
    return block == layer->col_block[j] ? layer->ranks[block] : 0;
}

/* delta[i,j] = s * sum_t B[i,t] A[t,j] * W0[i,j] inside the aligned blocks, 0 elsewhere. */
static double delta_entry(const smoa_layer *layer, int64_t i, int64_t j)
{
    double product = 0.0;
    for (int64_t t = 0; t < entry_rank(layer, i, j); t++)
        product += layer->b[i * layer->max_rank + t] * layer->a[t * layer->in_features + j];
    return layer->scaling * product * layer->weight[i * layer->in_features + j];
}

smoa_status smoa_delta_weight(const smoa_layer *layer, double *delta)
{
    smoa_status status = check_layer(layer);
    if (status != SMOA_OK)
        return status;
    if (!delta)
        return SMOA_NULL;

    for (int64_t i = 0; i < layer->out_features; i++)
        for (int64_t j = 0; j < layer->in_features; j++)
            delta[i * layer->in_features + j] = delta_entry(layer, i, j);
    return SMOA_OK;
}

smoa_status smoa_forward(const smoa_layer *layer, int64_t tokens, const double *x, const double *bias,
                         const double *multiplier, double *y)
{
    smoa_status status = check_layer(layer);
    if (status != SMOA_OK)
        return status;
    if (tokens < 0)
        return SMOA_SIZE;
    if (!x || !y)
        return SMOA_NULL;

    const int64_t N = layer->out_features, C = layer->in_features;
    for (int64_t i = 0; i < N; i++) {
        for (int64_t token = 0; token < tokens; token++)
            y[token * N + i] = bias ? bias[i] : 0.0;
        for (int64_t j = 0; j < C; j++) {
            double weight = layer->weight[i * C + j];
            double delta = delta_entry(layer, i, j);
            for (int64_t token = 0; token < tokens; token++) {
                double base_x = x[token * C + j];
                double adapter_x = multiplier ? multiplier[token * C + j] * base_x : base_x;
                y[token * N + i] += base_x * weight + adapter_x * delta;
            }
        }
    }
    return SMOA_OK;
}

/* With G[i,j] = sum_token dY[token,i] (x o m)[token,j] and H = s G o W0, both inside the aligned blocks only:
 *     dB[i,t] = sum_j H[i,j] A[t,j]      dA[t,j] = sum_i B[i,t] H[i,j]
 *     dX[token,j] = sum_i dY[token,i] (W0[i,j] + m[token,j] delta[i,j]) */
smoa_status smoa_backward(const smoa_layer *layer, int64_t tokens, const double *x, const double *multiplier,
                          const double *dy, double *dx, double *da, double *db)
{
    smoa_status status = check_layer(layer);
    if (status != SMOA_OK)
        return status;
    if (tokens < 0)
        return SMOA_SIZE;
    if (!x || !dy || !dx || !da || !db)
        return SMOA_NULL;

    const int64_t N = layer->out_features, C = layer->in_features, rho = layer->max_rank;
    for (int64_t index = 0; index < tokens * C; index++)
        dx[index] = 0.0;
    for (int64_t index = 0; index < rho * C; index++)
        da[index] = 0.0;
    for (int64_t index = 0; index < N * rho; index++)
        db[index] = 0.0;

    for (int64_t i = 0; i < N; i++) {
        for (int64_t j = 0; j < C; j++) {
            double weight = layer->weight[i * C + j];
            double delta = delta_entry(layer, i, j);
            double g = 0.0;
            for (int64_t token = 0; token < tokens; token++) {
                double m = multiplier ? multiplier[token * C + j] : 1.0;
                g += dy[token * N + i] * m * x[token * C + j];
                dx[token * C + j] += dy[token * N + i] * (weight + m * delta);
            }
            double h = layer->scaling * g * weight;
            for (int64_t t = 0; t < entry_rank(layer, i, j); t++) {
                db[i * rho + t] += h * layer->a[t * C + j];
                da[t * C + j] += layer->b[i * rho + t] * h;
            }
        }
    }
    return SMOA_OK;
}
