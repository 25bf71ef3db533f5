// Where threads meet: block-wide barriers, and warp operations, at which every lane leaves a pointer to its
// operands and the last to come computes for all.
#include "state.h"

namespace emu {
namespace {

bool same_place(const Site& a, const Site& b) {
  return a.line == b.line && a.id == b.id && !strcmp(a.file, b.file);
}
unsigned first_of(unsigned lanes) { return __builtin_ctz(lanes); }

// Runs the operation of `mask` if all its lanes have come.
bool complete(unsigned warp, unsigned mask) {
  const unsigned needed = mask & block.living[warp];
  if (!needed || (block.waiting[warp] & needed) != needed) return false;
  Thread* lanes = &block.threads[warp * 32];
  const Thread& a = lanes[first_of(needed)];
  const bool is_sync = !strcmp(a.op, "__syncwarp");  // may be reached from several places
  void* operands[32] = {};
  for (unsigned rest = needed; rest; rest &= rest - 1) {
    const Thread& b = lanes[first_of(rest)];
    const bool same_line = a.at.line == b.at.line && a.at.id == b.at.id;
    if (b.mask != a.mask || strcmp(a.op, b.op) || (!same_line && !is_sync))
      fail("lanes of a warp meet in different warp operations: %s mask %#x at %s, %s mask %#x at %s", a.op,
           a.mask, text(a.at).c_str(), b.op, b.mask, text(b.at).c_str());
    operands[first_of(rest)] = b.operands;
  }
  const unsigned started = block.size - warp * 32 < 32 ? (1u << (block.size - warp * 32)) - 1 : ~0u;
  const unsigned exited = mask & started & ~block.living[warp];
  if (config.strict && exited && !is_sync)
    fail("%s (%s) names lanes that have exited: %#x", a.op, text(a.at).c_str(), exited);
  if (a.aligned && needed != ~0u)
    fail("%s (%s) needs all 32 lanes, present: %#x", a.op, text(a.at).c_str(), needed);
  if (a.model) a.model(operands, needed);
  for (unsigned rest = needed; rest; rest &= rest - 1) lanes[first_of(rest)].state = State::ready;
  block.waiting[warp] &= ~needed;
  return true;
}

void join_clocks(void* operands[32], unsigned mask) {
  uint32_t joined[32] = {};
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    const Thread* thread = static_cast<Thread*>(operands[first_of(rest)]);
    for (int i = 0; i < 32; ++i) joined[i] = joined[i] > thread->clocks[i] ? joined[i] : thread->clocks[i];
  }
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    Thread* thread = static_cast<Thread*>(operands[first_of(rest)]);
    memcpy(thread->clocks, joined, sizeof joined);
    ++thread->clocks[thread->lane];
  }
}

}  // namespace

int barrier(bool predicate, Site at) {
  self->state = State::at_barrier;
  self->op = "__syncthreads";
  self->at = at;
  self->predicate = predicate;
  self->mask = 0;
  ++block.at_barrier;
  suspend();
  return block.barrier_count;
}

void release_barrier() {
  const Thread* first = nullptr;
  block.barrier_count = 0;
  for (const Thread& thread : block.threads) {
    if (thread.state != State::at_barrier) continue;
    if (!first) first = &thread;
    if (config.strict && !same_place(thread.at, first->at))
      return fail_block("divergent __syncthreads: threads of one block wait at different places");
    block.barrier_count += thread.predicate;
  }
  if (config.strict && block.alive < block.size)
    return fail_block("divergent __syncthreads: some threads exited, others wait");
  for (Thread& thread : block.threads)
    if (thread.state == State::at_barrier) thread.state = State::ready;
  block.at_barrier = 0;
  next_epoch();
  count(BARRIER);
}

void collective(const char* op, unsigned mask, bool aligned, WarpModel model, void* operands, Site at) {
  if (!(mask >> self->lane & 1))
    fail("%s (%s): lane %u is not in its own mask %#x", op, text(at).c_str(), self->lane, mask);
  self->op = op;
  self->at = at;
  self->mask = mask;
  self->aligned = aligned;
  self->model = model;
  self->operands = operands;
  self->state = State::at_warp;
  block.waiting[self->warp] |= 1u << self->lane;
  if (!complete(self->warp, mask)) suspend();
}
void sync_warp(unsigned mask, Site at) { collective("__syncwarp", mask, false, join_clocks, self, at); }
unsigned active_mask() { return 1u << lane; }  // legal, as any part of the lanes is, and the least helpful

// Others may have waited for this lane only.
void lane_exited(Thread& thread) {
  thread.state = State::exited;
  --block.alive;
  block.living[thread.warp] &= ~(1u << thread.lane);
  for (unsigned rest = block.waiting[thread.warp]; rest; rest &= rest - 1) {
    const unsigned mask = block.threads[thread.warp * 32 + first_of(rest)].mask;
    if ((mask >> thread.lane & 1) && complete(thread.warp, mask)) break;
  }
}

}  // namespace emu
