// The entry point torch.ops.fusedformer_native.linear. The conventions are those of ops.cpp.
#include <algorithm>

#include "linear.h"
#include "tasks.h"
#include "tensors.h"

namespace fusedformer {
namespace {

// A task is a piece of the weights: of so many bytes where there are enough for all threads, and
// never of fewer than this.
constexpr int64_t kPieceBytes = 512 << 10, kLeastPieceBytes = 128 << 10;

// y (..., N) = x (..., K) W^T + bias, of W (N, K); all of one dtype, K and the rows of x not 0.
Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  const int64_t width = weight.size(1), columns = weight.size(0), rows = x.numel() / width;
  const Rows x_rows = rows_of(x, width), weight_rows = rows_of(weight, width);
  const std::optional<Rows> bias_row = rows_of(bias, columns);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = columns;
  const Tensor y = new_tensor(sizes, x.scalar_type());

  const Linear a{x_rows.matrix, weight_rows.matrix, matrix_of(bias_row).data,
                 output(y, columns), rows, columns, width};
  const LinearKernels& kernels = FUSEDFORMER_PICK(linear_kernels);
  const int64_t block_bytes = kLinearBlock * width * size_of(a.weight.type);
  const int64_t blocks = (columns + kLinearBlock - 1) / kLinearBlock;
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t fair = std::min((blocks + threads - 1) / threads, kPieceBytes / block_bytes);
  const int64_t piece = std::max<int64_t>({fair, kLeastPieceBytes / block_bytes, 1}) * kLinearBlock;
  const int64_t pieces = (columns + piece - 1) / piece;
  run_tasks(pieces, pieces, 0, [&](int64_t n, char*) {
    kernels.forward(a, n * piece, std::min(columns, (n + 1) * piece));
  });
  return y;
}

}  // namespace
}  // namespace fusedformer

STABLE_TORCH_LIBRARY_FRAGMENT(fusedformer_native, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fusedformer_native, CPU, m) {
  m.impl("linear", TORCH_BOX(&fusedformer::linear));
}
