// Vector clocks: what comes before what, whatever the order in which things happened to run.
//
// Actors are the threads of a block, by their index, and behind them its units: what works beside
// the threads, such as the copies that one mbarrier counts, or the matrix products of a warpgroup.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

// By actor; 0 beyond the end.
using Clocks = std::vector<uint32_t>;
// What happened before of other blocks, by their serial numbers. Many threads share one of these,
// so they are not changed once they are made.
using OtherBlocks = std::map<uint32_t, std::shared_ptr<const Clocks>>;
using SharedBlocks = std::shared_ptr<const OtherBlocks>;  // null: nothing

// What either of two knows.
SharedBlocks joint(const SharedBlocks& a, const SharedBlocks& b);

struct Knowledge {
    // All that actor i did while its clock was below done[i] happened before.
    Clocks done;
    // What thread i wrote to shared memory by ordinary stores while its clock was below fenced[i]
    // is also there for the asynchronous proxy.
    Clocks fenced;
    // As `done`, of the blocks whose turns have been found passed on.
    SharedBlocks others;

    static uint32_t at(const Clocks& clocks, size_t actor) {
        return actor < clocks.size() ? clocks[actor] : 0;
    }
    static void raise(Clocks& clocks, size_t actor, uint32_t clock) {
        if (actor >= clocks.size()) clocks.resize(actor + 1, 0);
        clocks[actor] = std::max(clocks[actor], clock);
    }

    // What either of two knows.
    void join(const Knowledge& other) {
        join(done, other.done);
        join(fenced, other.fenced);
        others = joint(others, other.others);
    }
    // What both of two know.
    void meet(const Knowledge& other) {
        meet(done, other.done);
        meet(fenced, other.fenced);
        if (others != other.others) others = nullptr;  // who asks works on the block's own memory
    }
    static void join(Clocks& a, const Clocks& b) {
        if (a.size() < b.size()) a.resize(b.size(), 0);
        for (size_t i = 0; i < b.size(); ++i) a[i] = std::max(a[i], b[i]);
    }

private:
    static void meet(Clocks& a, const Clocks& b) {
        if (a.size() > b.size()) a.resize(b.size());
        for (size_t i = 0; i < a.size(); ++i) a[i] = std::min(a[i], b[i]);
    }
};

// Who accesses memory.
struct Actor {
    int first;                         // the actor of bit 0 of `lanes`, a multiple of 32
    uint32_t lanes;                    // lanes of a warp, or one unit
    uint32_t clock = 0;                // a unit's
    const Knowledge* known = nullptr;  // a unit's; threads have their own
    int issuer = -1;                   // the thread that started the unit's work, if it was one

    static Actor unit(int index, uint32_t clock, const Knowledge& known, int issuer) {
        return {index / 32 * 32, 1u << index % 32, clock, &known, issuer};
    }
};
