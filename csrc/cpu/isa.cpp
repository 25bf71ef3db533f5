#include "cpu/isa.h"

#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lspm::cpu {

const char* isa_name() {
#if defined(__AMX_TILE__)
  return "amx";
#elif defined(__AVX512BF16__)
  return "avx512_bf16";
#elif defined(__AVX512F__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "base";
#endif
}

bool isa_request() {
#if defined(__AMX_TILE__)
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;  // Linux's asm/prctl.h
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
  return true;
#endif
}

}  // namespace lspm::cpu
