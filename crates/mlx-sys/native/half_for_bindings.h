// What bindgen sees in place of mlx-c's half.h, on every platform: the types are only ever used behind pointers, so
// that size and alignment are all that counts, and no compiler header (arm_fp16.h) is needed.
#pragma once
#define MLX_HALF_H
#define HAS_FLOAT16
#define HAS_BFLOAT16
#include <stdint.h>
typedef _Float16 float16_t;
typedef uint16_t bfloat16_t;
