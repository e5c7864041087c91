// A second array object over the buffer of an evaluated array. MLX writes to a buffer in place only when nobody else
// holds it; a cache that is written step after step is always held by somebody (its owner, and the steps still in
// flight), so that every write would copy all of it. The alias has one holder: the operation that consumes it.
#include <limits>

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

// Memory that nobody has written yet: the system hands its pages out when they are first used, so that a large cache costs
// what is in it. `like` gives the element type.
extern "C" int mlx_sys_array_uninitialised(mlx_array* result, const int* shape, size_t axes, const mlx_array like) {
  try {
    if (!like.ctx || !result || !shape) {
      throw std::invalid_argument("[uninitialised] no array");
    }
    auto dtype = static_cast<mlx::core::array*>(like.ctx)->dtype();
    size_t bytes = mlx::core::size_of(dtype);
    for (size_t axis = 0; axis < axes; ++axis) {
      auto width = static_cast<size_t>(shape[axis]);
      if (shape[axis] <= 0 || bytes > std::numeric_limits<size_t>::max() / width) {
        throw std::invalid_argument("[uninitialised] an impossible shape");
      }
      bytes *= width;
    }
    auto buffer = mlx::core::allocator::malloc(bytes);
    auto fresh = mlx::core::array(buffer, mlx::core::Shape(shape, shape + axes), dtype);
    if (result->ctx) {
      *static_cast<mlx::core::array*>(result->ctx) = std::move(fresh);
    } else {
      result->ctx = new mlx::core::array(std::move(fresh));
    }
    return 0;
  } catch (std::exception& e) {
    mlx_error(e.what());
    return 1;
  }
}
