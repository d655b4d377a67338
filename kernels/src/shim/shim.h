// The C face of what libtorch offers only to C++. Every function that can fail returns null on
// success and otherwise a message allocated by malloc, which the caller frees.
#pragma once

#include <cstdint>

extern "C" {

// Makes every later CPU allocation of libtorch counted. Call once, early.
char *oxitron_memory_install();

// Bytes alive, the largest number of bytes alive since the last reset, and allocations so far.
void oxitron_memory_read(uint64_t *current, uint64_t *peak, uint64_t *allocations);

// Lets the peak start again from the bytes alive now.
void oxitron_memory_reset_peak();
}
