#include "../attention.h"
#include "attention_tiles.cuh"
namespace lspm::cuda {
void attention_backward(const HeadsView&, const float*, const HeadsView&, const HeadsView&, const HeadsView&, const AttentionExtras&, const HeadsView&, const float*, const HeadsView&, const HeadsView&, const HeadsView&, float*, const AttentionShape&, int, void*) {}
}
