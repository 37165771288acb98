// The kernels for the best instruction set that this CPU has.
#pragma once

#include "attention_kernels.h"
#include "similarity_kernels.h"

namespace vlmo_fast {

struct Capability {
  const char* name;
  const similarity::Kernels* similarity;
  const attention::Kernels* attention;
  bool supported;
};

const Capability& capability();

}  // namespace vlmo_fast
