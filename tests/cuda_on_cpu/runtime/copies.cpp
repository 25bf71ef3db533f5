// cp.async, atomics and the counters.
#include "state.h"

namespace emu {
namespace {
uint64_t counters[kCounters];

template <class T>
uint64_t update(void* pointer, AtomicModel model, uint64_t operand, uint64_t operand2) {
  T old;
  memcpy(&old, pointer, sizeof old);
  const T changed = static_cast<T>(model(old, operand, operand2));
  memcpy(pointer, &changed, sizeof changed);
  return old;
}
}  // namespace

void cp_async(void* shared, const void* global, unsigned bytes, unsigned source_bytes, Site at) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % bytes)
    fail("cp.async: misaligned address (%u bytes, %s)", bytes, text(at).c_str());
  check_access(shared, bytes, Access::write, true, "cp.async destination", at);
  if (source_bytes) check_access(global, source_bytes, Access::read, false, "cp.async source", at);
  char* to = static_cast<char*>(shared);
  mark_pending(to, bytes);
  memset(to, 0xFF, bytes);
  self->copies.push_back({to, static_cast<const char*>(global), bytes, source_bytes, self->groups});
  count(CP_ASYNC);
}
void cp_async_commit() { ++self->groups; }
void cp_async_wait(int pending_groups) {
  auto copy = self->copies.begin();
  for (; copy != self->copies.end(); ++copy) {
    if (pending_groups >= 0 && copy->group >= self->groups - pending_groups) break;
    mark_copied(copy->to, copy->bytes);
    memcpy(copy->to, copy->from, copy->source_bytes);
    memset(copy->to + copy->source_bytes, 0, copy->bytes - copy->source_bytes);
  }
  self->copies.erase(self->copies.begin(), copy);
}

uint64_t atomic_update(void* pointer, int bytes, AtomicModel model, uint64_t operand, uint64_t operand2,
                       Site at) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail("atomic: misaligned address (%s)", text(at).c_str());
  check_access(pointer, bytes, Access::atomic, false, "atomic", at);
  return bytes == 8 ? update<uint64_t>(pointer, model, operand, operand2)
                    : update<uint32_t>(pointer, model, operand, operand2);
}

void count(Counter counter, unsigned n) { counters[counter] += n; }

}  // namespace emu

extern "C" uint64_t emu_stat(int counter) {  // and starts it again
  const uint64_t n = emu::counters[counter];
  emu::counters[counter] = 0;
  return n;
}
