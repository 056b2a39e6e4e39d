// What the threads of a block know of each other's progress, see clocks.hpp.
#include "clocks.hpp"

#include "block.hpp"

// ---- knowledge of other blocks ------------------------------------------------------------------

static bool contains(const Clocks& a, const Clocks& b) {
    for (size_t i = 0; i < b.size(); ++i) {
        if (Knowledge::at(a, i) < b[i]) return false;
    }
    return true;
}

static bool contains(const OtherBlocks& a, const OtherBlocks& b) {
    for (const auto& [block, clocks] : b) {
        const auto found = a.find(block);
        if (found == a.end()) return false;
        if (found->second != clocks && !contains(*found->second, *clocks)) return false;
    }
    return true;
}

// Mostly one of two knows all that the other does: then both go on with the same object.
SharedBlocks joint(const SharedBlocks& a, const SharedBlocks& b) {
    if (!b || a == b || (a && contains(*a, *b))) return a;
    if (!a || contains(*b, *a)) return b;
    auto both = std::make_shared<OtherBlocks>(*a);
    for (const auto& [block, clocks] : *b) {
        auto& own = (*both)[block];
        if (!own) {
            own = clocks;
        } else if (own != clocks) {
            const auto joined = std::make_shared<Clocks>(*own);
            Knowledge::join(*joined, *clocks);
            own = joined;
        }
    }
    return both;
}

// ---- knowledge of a block's threads -------------------------------------------------------------

// From now on each of them knows all that any of them knew, and has done.
void Block::order_memory(const std::vector<Thread*>& participants) {
    tick();
    const auto joint = std::make_shared<Knowledge>(*participants.front()->known);
    const Knowledge* joined = participants.front()->known.get();
    for (const Thread* thread : participants) {
        if (thread->known.get() != joined) joint->join(*thread->known);
        joined = thread->known.get();
    }
    for (Thread* thread : participants) {
        thread->clock = time_;
        Knowledge::raise(joint->done, thread->index, time_);
        if (thread->fenced) Knowledge::raise(joint->fenced, thread->index, thread->fenced);
    }
    for (Thread* thread : participants) thread->known = joint;
    if (static_cast<int>(participants.size()) == count_) all_know_ = time_;
}

int Block::new_unit(const std::string& name) {
    unit_names_.push_back(name);
    return count_ + static_cast<int>(unit_names_.size()) - 1;
}

Knowledge Block::view(const Thread& thread) const {
    Knowledge knowledge = *thread.known;
    Knowledge::raise(knowledge.done, thread.index, thread.clock);
    Knowledge::raise(knowledge.fenced, thread.index, thread.fenced);
    return knowledge;
}

SharedBlocks Block::view_from_outside(Thread& thread) {
    thread.clock = tick();
    const Knowledge knowledge = view(thread);
    const auto blocks = std::make_shared<OtherBlocks>();
    if (knowledge.others) *blocks = *knowledge.others;
    (*blocks)[serial_] = std::make_shared<const Clocks>(knowledge.done);
    return blocks;
}

void Block::publish(Thread& thread, Phase& phase) {
    thread.clock = tick();
    phase.released.join(*thread.known);
    Knowledge::raise(phase.released.done, thread.index, thread.clock);
    Knowledge::raise(phase.released.fenced, thread.index, thread.fenced);
}

// The thread's knowledge, for itself alone.
static Knowledge& own_knowledge(Thread& thread) {
    if (thread.known.use_count() > 1) thread.known = std::make_shared<Knowledge>(*thread.known);
    return *thread.known;
}

void Block::fence(Thread& thread) {
    thread.clock = thread.fenced = tick();
    Knowledge& known = own_knowledge(thread);
    for (int i = 0; i < count_; ++i) {
        Knowledge::raise(known.fenced, i, std::max(Knowledge::at(known.done, i), all_know_));
    }
}

void Block::learn(Thread& thread, const Knowledge& knowledge) {
    own_knowledge(thread).join(knowledge);
}

void Block::learn(Thread& thread, int unit, uint32_t clock) {
    Knowledge::raise(own_knowledge(thread).done, unit, clock);
}

void Block::learn(Thread& thread, const SharedBlocks& others) {
    Knowledge& known = own_knowledge(thread);
    known.others = joint(known.others, others);
}

void Block::wait_for_prerequisites() {
    if (!current_launch.overlaps()) return;
    current_launch.has_waited = true;
    learn(*running_, prerequisites_, 1);
}
