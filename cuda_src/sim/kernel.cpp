// The kernel under test, compiled for the simulator: decode.cu, or another source with the same entry (litmus tests).
#ifndef IMEX_KERNEL_SOURCE
#define IMEX_KERNEL_SOURCE "../decode.cu"
#endif
#include IMEX_KERNEL_SOURCE

#include "machine.h"

void imex::sim::kernel_entry() { decode(machine.params); }
