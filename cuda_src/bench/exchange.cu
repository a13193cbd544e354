// The exchange alone by tagged words, or the all-gather, as the job says.
#include "exchange_loop.cuh"

KERNEL decode(const GRID_CONSTANT imex::LaunchParams launch) { imex::run_exchange<false>(launch); }
