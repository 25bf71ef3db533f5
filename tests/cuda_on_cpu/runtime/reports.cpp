// What went wrong, said in words: the kernel, the block and thread, the source line, who waits where.
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "state.h"

namespace emu {
namespace {

std::string first_error;  // since the last emu_clear_error()
bool has_failed = false;

std::string formatted(const char* format, va_list arguments) {
  char buffer[1024];
  vsnprintf(buffer, sizeof buffer, format, arguments);
  return buffer;
}

const char* file_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

void erase_all(std::string& from, const char* what) {
  for (size_t i; (i = from.find(what)) != std::string::npos;) from.erase(i, strlen(what));
}
void cut_at(std::string& from, const char* what) {
  if (size_t i = from.find(what); i != std::string::npos) from.resize(i);
}

// addr2line's two lines about a code address: function and file:line.
void look_up(const void* code, const char* options, std::string& function, std::string& line) {
  Dl_info library;
  function = line = "?";
  if (!dladdr(code, &library)) return;
  const size_t offset = static_cast<const char*>(code) - static_cast<const char*>(library.dli_fbase);
  char buffer[4096];
  snprintf(buffer, sizeof buffer, "addr2line %s '%s' %#zx 2>/dev/null", options, library.dli_fname, offset);
  FILE* pipe = popen(buffer, "r");
  if (!pipe) return;
  if (fgets(buffer, sizeof buffer, pipe)) function = buffer;
  if (fgets(buffer, sizeof buffer, pipe)) line = buffer;
  pclose(pipe);
  cut_at(function, "\n");
  cut_at(line, "\n");
}

// Who waits where, with runs of threads that do the same folded into one line.
std::string waiting_list() {
  std::string list;
  for (unsigned first = 0, next; first < block.size; first = next) {
    const Thread& a = block.threads[first];
    auto same = [&](const Thread& b) {
      if (a.state != b.state) return false;
      return a.state == State::exited || (a.at.line == b.at.line && a.mask == b.mask && !strcmp(a.op, b.op));
    };
    for (next = first + 1; next < block.size && same(block.threads[next]); ++next) {
    }
    list += text("\n    threads %u-%u: ", first, next - 1);
    if (a.state == State::exited) list += "exited";
    if (a.state == State::at_barrier) list += "at __syncthreads, " + text(a.at);
    if (a.state == State::at_warp) list += text("at %s mask %#x, ", a.op, a.mask) + text(a.at);
  }
  return list;
}

}  // namespace

std::string text(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string result = formatted(format, arguments);
  va_end(arguments);
  return result;
}
std::string text(Site at) { return text("%s:%d", file_name(at.file), at.line); }

std::string symbol(const void* code) {
  std::string function, line;
  look_up(code, "-Cfse", function, line);
  for (const char* noise : {"(anonymous namespace)::", "void "}) erase_all(function, noise);
  cut_at(function, "(");
  return function;
}
std::string mangled_symbol(const void* code) {
  std::string function, line;
  look_up(code, "-fse", function, line);
  return function;
}
std::string source_line(const void* return_address) {
  std::string function, line;
  look_up(static_cast<const char*>(return_address) - 1, "-Cfse", function, line);
  cut_at(line, " (discriminator");
  return line;
}

void report(const std::string& message) {
  if (has_failed) return;
  has_failed = true;
  first_error = message;
}
bool failed() { return has_failed; }

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const std::string problem = formatted(format, arguments);
  va_end(arguments);
  if (!self) {
    fprintf(stderr, "cuda_on_cpu: %s\n", problem.c_str());
    abort();
  }
  const uint3 b = block.index, t = self->index;
  report("[" + symbol(block.kernel) + "] " +
         text("block (%u,%u,%u) thread (%u,%u,%u): ", b.x, b.y, b.z, t.x, t.y, t.z) + problem);
  block.failed = true;
  suspend();
  abort();  // the scheduler never comes back to a failed block
}

void fail_block(const char* what) {
  const uint3 b = block.index;
  report("[" + symbol(block.kernel) + "] " + text("block (%u,%u,%u): %s", b.x, b.y, b.z, what) +
         waiting_list());
  block.failed = true;
}

}  // namespace emu

extern "C" {
const char* emu_last_error() { return emu::has_failed ? emu::first_error.c_str() : nullptr; }
void emu_clear_error() { emu::has_failed = false; }
}
