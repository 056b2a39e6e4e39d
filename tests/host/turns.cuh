// The functions of kernels_cu/turns.cuh on the host device, see ptx.cuh and copies.cpp.
#pragma once
#include "types.cuh"

// Tells the worker to start the blocks in their order, as a GPU does.
extern "C" const bool host_takes_turns = true;

DEVICE void wait_for_turn(const int32* counter, int32 turn) { host::wait_for_turn(counter, turn); }

DEVICE void pass_turn(int32* counter) { host::pass_turn(counter); }

DEVICE void pass_turn_of_bulk(int32* counter) { host::pass_turn_of_bulk(counter); }
