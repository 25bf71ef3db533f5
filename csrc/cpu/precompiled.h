// What nearly every kernel file includes, in front of each; setup.py has it parsed once an instruction set.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

#include "cpu/lanes.h"
#include "cpu/parallel.h"
