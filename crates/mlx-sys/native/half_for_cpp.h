// mlx-c's half.h knows the two 16-bit float types on Arm only. Elsewhere MLX's own classes take their names; the
// guard keeps the original header out.
#pragma once
#if !defined(__aarch64__)
#define MLX_HALF_H
#define HAS_FLOAT16
#define HAS_BFLOAT16
#include "mlx/types/half_types.h"
using mlx::core::bfloat16_t;
using mlx::core::float16_t;
#endif
