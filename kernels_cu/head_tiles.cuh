// In which order blocks take the tiles of all heads.
#pragma once
#include "types.cuh"

// A head, counted through all batch entries, and the place of a tile among the head's.
struct HeadTile {
    uint32 head, tile;
};

// What comes at place `number` where heads are taken in sections of `section`: within a section
// first the first tiles of all its heads, then the second ones, and so on. With one head a section
// its tiles are neighbours, so that what they share stays in L2. Where tiles differ in length, the
// first are the longest, and a section has enough tiles for all blocks that run at a time, so that
// the blocks which end last are short ones. Where blocks of a head take turns, a section lets them
// start so far apart that they need not wait for each other.
DEVICE HeadTile nth_head_tile(uint32 number, uint32 tiles, uint32 heads, uint32 section) {
    const uint32 first = number / (section * tiles) * section;
    const uint32 rest = number - first * tiles;
    const uint32 wide = section == 1 ? 1 : min(section, heads - first);
    return {first + rest % wide, rest / wide};
}

// A section's tiles in the portable kernels, for each block that a multiprocessor holds: about
// twice what run at a time on a large card.
constexpr uint32 SECTION_BLOCKS = 256;

// That of a block of this grid, which has one for each tile; AT_A_TIME: about how many blocks run.
template <bool UNEQUAL, uint32 AT_A_TIME>
DEVICE HeadTile head_tile_of(uint32 block, uint32 tiles) {
    const uint32 section = UNEQUAL ? ceil_div(AT_A_TIME, tiles) : 1;
    return nth_head_tile(block, tiles, gridDim.x / tiles, section);
}
