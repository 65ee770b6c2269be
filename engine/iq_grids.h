/* iq_grids.h: code books of the IQ types. A row holds one index per value, 2 bits each (IQ1, IQ2:
 * 8 values) or 3 bits each (IQ3: 4 values), lowest first, into that type's list of values. */
#ifndef AMBER_IQ_GRIDS_H
#define AMBER_IQ_GRIDS_H

#include <stdint.h>

extern const uint16_t iq2_xxs_grid[256], iq2_xs_grid[512], iq2_s_grid[1024];
extern const uint16_t iq3_xxs_grid[256], iq3_s_grid[512];
extern const uint16_t iq1_grid[2048];

#endif
