#pragma once

namespace ess {

const char* probe(int kind, int* words, int blocks, int threads);

}  // namespace ess
