// Device memory: shared memory at the bottom of an arena of addresses, global buffers above it, poison in all
// that is not written yet and red zones around all that is handed out.
//
// Under AddressSanitizer (asan) buffers are ordinary ones and its own red zones take the place of ours.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <map>

#include "state.h"

namespace emu {
namespace {

constexpr size_t kPage = 4096, kArena = size_t(8) << 30;
constexpr size_t kGlobalStart = size_t(64) << 20;  // addresses below are shared memory
constexpr size_t kSharedRoom = size_t(1) << 20;
constexpr size_t kSharedBase = 1024;  // nothing starts at address 0; wgmma's swizzles repeat every 1024 bytes
constexpr size_t kSharedAlignment = 128;
constexpr size_t kStaticSharedMax = 48 * 1024;        // CUDA's
constexpr unsigned char kRed = 0xCB, kPoison = 0xFF;  // 0xFF: NaN in every float type

char *arena, *shared;
#ifndef EMU_ASAN
size_t global_used = kGlobalStart;
#endif
std::map<char*, size_t> buffers;  // global ones: start, bytes

size_t rounded_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

void make_red(char* start, size_t bytes) {
#ifdef EMU_ASAN
  __asan_poison_memory_region(start, bytes);
#else
  memset(start, kRed, bytes);
#endif
}
bool still_red([[maybe_unused]] const char* start, [[maybe_unused]] size_t bytes) {
#ifndef EMU_ASAN
  for (size_t i = 0; i < bytes; ++i)
    if (static_cast<unsigned char>(start[i]) != kRed) return false;
#endif
  return true;
}

SharedArray& new_array(const void* key, const char* name, size_t bytes) {
  const size_t room = rounded_up(bytes, kSharedAlignment);
  char* data = shared + block.shared_used;
#ifdef EMU_ASAN
  __asan_unpoison_memory_region(data, bytes);
#endif
  memset(data, kPoison, bytes);
  make_red(data + bytes, room - bytes + kRedZone);
  block.shared_used += room + kRedZone;
  return block.arrays.emplace_back(SharedArray{key, name, data, bytes});
}

// The buffer that `pointer` is in or, where it is in none, the one before it.
std::map<char*, size_t>::iterator buffer_at(const char* pointer) {
  auto next = buffers.upper_bound(const_cast<char*>(pointer));
  return next == buffers.begin() ? buffers.end() : std::prev(next);
}

}  // namespace

void prepare_arena() {
  if (arena) return;
  arena = static_cast<char*>(
      mmap(nullptr, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (arena == MAP_FAILED) {
    perror("cuda_on_cpu: mmap");
    abort();
  }
#ifdef EMU_ASAN
  shared = static_cast<char*>(aligned_alloc(kPage, kSharedRoom));
#else
  shared = arena;
  mprotect(shared, kSharedRoom, PROT_READ | PROT_WRITE);
#endif
}

bool in_arena(const char* pointer) { return size_t(pointer - arena) < kArena; }
bool in_shared(const char* pointer) { return size_t(pointer - shared) < kSharedRoom; }
size_t arena_offset(const char* pointer) { return pointer - arena; }

void start_shared_memory(size_t dynamic_bytes) {
  block.arrays.clear();
  make_red(shared, kSharedBase);
#ifdef EMU_ASAN
  make_red(shared, kSharedRoom);
#endif
  block.shared_used = kSharedBase;
  new_array(nullptr, "dynamic shared memory", dynamic_bytes);
}

void* shared_array(const void* key, const char* name, size_t bytes) {
  size_t total = bytes;
  for (SharedArray& array : block.arrays) {
    if (array.key == key) return array.data;
    total += array.bytes;
  }
  if (total - block.arrays[0].bytes > kStaticSharedMax)
    fail("more than 48 KiB of static shared memory (%s)", name);
  if (total > config.shared_max)
    fail("static and dynamic shared memory of %zu bytes, limit %zu", total, config.shared_max);
  return new_array(key, name, bytes).data;
}
void* dynamic_shared() { return block.arrays[0].data; }
uint32_t to_shared(const void* pointer) { return static_cast<const char*>(pointer) - shared; }
char* from_shared(uint32_t address) { return shared + address; }

bool in_bounds(const char* pointer, size_t bytes) {
  if (in_shared(pointer)) {
    for (const SharedArray& array : block.arrays)
      if (pointer >= array.data && pointer + bytes <= array.data + array.bytes) return true;
    return false;
  }
  auto buffer = buffer_at(pointer);
  return buffer != buffers.end() && pointer + bytes <= buffer->first + buffer->second;
}

std::string name_of(const char* pointer) {
  if (in_shared(pointer)) {
    for (const SharedArray& array : block.arrays)
      if (pointer >= array.data && pointer < array.data + array.bytes)
        return text(", %s + %td", array.name, pointer - array.data);
    return "";
  }
  auto buffer = buffer_at(pointer);
  if (buffer == buffers.end()) return "";
  return text(", byte %td of the global buffer of %zu bytes at %p", pointer - buffer->first, buffer->second,
              static_cast<void*>(buffer->first));
}

std::string broken_red_zone() {
  if (!still_red(shared, kSharedBase)) return "shared memory written out of bounds (red zone)";
  for (const SharedArray& array : block.arrays)
    if (!still_red(array.data + array.bytes,
                   rounded_up(array.bytes, kSharedAlignment) - array.bytes + kRedZone))
      return "shared memory written out of bounds (red zone)";
  for (auto [start, bytes] : buffers)
    if (!still_red(start - kRedZone, kRedZone) || !still_red(start + bytes, kRedZone))
      return text("global buffer of %zu bytes at %p: written out of bounds (red zone)", bytes,
                  static_cast<void*>(start));
  return "";
}

}  // namespace emu

// Device memory as the tests see it.
using namespace emu;
extern "C" {

void* emu_malloc(size_t bytes) {
  prepare_arena();
#ifdef EMU_ASAN
  const size_t room = rounded_up(bytes + 1, 256);
  char* data = static_cast<char*>(aligned_alloc(256, room));
  __asan_poison_memory_region(data + bytes, room - bytes);
#else
  // Every buffer has pages of its own, and one without access after them.
  char* data = arena + global_used + kRedZone;
  const size_t room = rounded_up(bytes + 2 * kRedZone, kPage);
  if (global_used + room + kPage > kUsableArena) return nullptr;
  mprotect(arena + global_used, room, PROT_READ | PROT_WRITE);
  global_used += room + kPage;
  make_red(data - kRedZone, kRedZone);
  make_red(data + bytes, kRedZone);
  buffers[data] = bytes;
#endif
  memset(data, kPoison, bytes);
  return data;
}

void emu_free(void* pointer) {
#ifdef EMU_ASAN
  free(pointer);
#else
  auto buffer = buffers.find(static_cast<char*>(pointer));
  if (buffer == buffers.end()) return;
  const size_t offset = arena_offset(buffer->first - kRedZone);
  const size_t room = rounded_up(buffer->second + 2 * kRedZone, kPage);
  madvise(arena + offset, room, MADV_DONTNEED);
  mprotect(arena + offset, room, PROT_NONE);
  forget_shadow(offset, room);
  buffers.erase(buffer);
#endif
}

void emu_memcpy(void* to, const void* from, size_t bytes) {
  if (bytes == 0) return;  // an empty tensor has no address
  memmove(to, from, bytes);
  mark_host_write(static_cast<char*>(to), bytes);
}
void emu_memset(void* to, int value, size_t bytes) {
  memset(to, value, bytes);
  mark_host_write(static_cast<char*>(to), bytes);
}

}  // extern "C"
