// Run a model on the desktop as a phone runs it: ExecuTorch's C++ runtime, ids that a tokenizer made, no Python.
//
//     ET=$(python -c "import executorch, pathlib; print(pathlib.Path(executorch.__path__[0]))")
//     g++ -std=c++17 -DC10_USING_CUSTOM_GENERATED_MACROS -DET_EVENT_TRACER_ENABLED examples/mobile.cpp -I$ET/include \
//         -I$ET/include/executorch/runtime/core/portable_type/c10 -L$ET/lib -Wl,-rpath,$ET/lib \
//         -Wl,--no-as-needed -lexecutorch -lexecutorch_backend_xnnpack -lexecutorch_kernels_optimized \
//         -lexecutorch_threadpool -o mobile
//     ./mobile runs/reviews-phone/model.pte 64 101 6919 3772 1012 102
//
// Prints the logits. 64 is one of "lengths" in thresher.json: the least that has room for the ids.
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

using executorch::aten::ScalarType;
using executorch::extension::from_blob;
using executorch::extension::Module;

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: mobile MODEL.pte LENGTH ID [ID ...]\n");
    return 2;
  }
  const int length = std::atoi(argv[2]), tokens = argc - 3;
  if (tokens > length) {
    std::fprintf(stderr, "%d ids, and %d places: take a longer method\n", tokens, length);
    return 2;
  }
  std::vector<int64_t> ids(length, 0), mask(length, 0), types(length, 0);
  for (int i = 0; i < tokens; ++i) {
    ids[i] = std::atoll(argv[3 + i]);
    mask[i] = 1;
  }
  const auto tensor = [length](std::vector<int64_t>& x) {
    return from_blob(x.data(), {1, length}, ScalarType::Long);
  };
  Module model(argv[1]);
  const auto found = model.execute("forward_" + std::to_string(length), {tensor(ids), tensor(mask), tensor(types)});
  if (!found.ok()) {
    std::fprintf(stderr, "the program failed with error 0x%x\n", static_cast<int>(found.error()));
    return 1;
  }
  const auto logits = found->at(0).toTensor();
  for (int i = 0; i < logits.numel(); ++i) {
    std::printf("%g\n", logits.const_data_ptr<float>()[i]);
  }
  return 0;
}
