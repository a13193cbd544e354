// The exchange alone by dense words: a kernel of its own, since both kinds in one loop take more registers than a thread has.
#include "exchange_loop.cuh"

KERNEL decode(const GRID_CONSTANT imex::LaunchParams launch) { imex::run_exchange<true>(launch); }
