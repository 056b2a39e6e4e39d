// Zero in the tickets of hopper_forward, see hopper_items.cuh.
#include "types.cuh"
#include "ptx.cuh"
#include "params.cuh"

extern "C" __global__ void hopper_clear_tickets(const __grid_constant__ AttentionParams params) {
    launch_dependents();
    if (threadIdx.x == 0) *static_cast<uint32*>(params.tickets.data) = 0;
}
