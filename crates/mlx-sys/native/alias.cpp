// A second array object over the buffer of an evaluated array. MLX writes to a buffer in place only when nobody else
// holds it; a cache that is written step after step is always held by somebody (its owner, and the steps still in
// flight), so that every write would copy all of it. The alias has one holder: the operation that consumes it.
#include "mlx/c/array.h"
#include "mlx/c/error.h"
#include "mlx/mlx.h"

extern "C" int mlx_sys_array_alias(mlx_array* result, const mlx_array source) {
  try {
    if (!source.ctx || !result) {
      throw std::invalid_argument("[alias] no array");
    }
    auto& original = *static_cast<mlx::core::array*>(source.ctx);
    if (!original.is_available() || !original.flags().row_contiguous ||
        original.offset() != 0 || original.data_size() != original.size()) {
      throw std::invalid_argument("[alias] the array is not evaluated, or not one whole row-contiguous buffer");
    }
    // The buffer lives as long as an alias of it does.
    auto alias = mlx::core::array(
        original.buffer(),
        original.shape(),
        original.dtype(),
        [keep = original.data_shared_ptr()](mlx::core::allocator::Buffer) {});
    if (result->ctx) {
      *static_cast<mlx::core::array*>(result->ctx) = std::move(alias);
    } else {
      result->ctx = new mlx::core::array(std::move(alias));
    }
    return 0;
  } catch (std::exception& e) {
    mlx_error(e.what());
    return 1;
  }
}
