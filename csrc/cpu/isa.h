#pragma once

namespace lspm::cpu {
const char* isa_name();  // the instruction set that the kernels of this module are compiled for
bool isa_request();      // asks the operating system for what it must grant first: AMX tiles
}  // namespace lspm::cpu
